# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Asks people which method's answer is the most suitable; Table 2 of the paper.

    python examples/user_study.py make --triplets triplets.jsonl --output study.html \\
        --answers ours=evaluation/ours DIA=dia Analogist=analogist VISII=visii
    python examples/user_study.py count study.html answers/

`make` writes one HTML page, for a computer or a phone. It holds all pictures and loads nothing from a network, so it
can be mailed, or put on any server. Each question shows A, A', B and the answers of two to four methods in random
order, and asks for the most suitable one. At the end it hands over a file, `answers-….json`, which participants send
back. The wording is ours, since the paper's is in a supplement that is not at hand. A method's answers are pictures
in a folder, each named by the index of its triplet: 00000.png is the answer to the file's first line, as
`evaluate.py` writes them.

The page knows which option is whose, in a form that nobody reads by accident. The methods' names are only in there,
so keep the page: without it the answers cannot be counted.

`count` prints how often each method was preferred, with two 95 % intervals. Wilson's takes every choice for
independent of all others. The second, by bootstrap, is of other participants who answer other questions: both are
drawn again with replacement. It says nothing of a method that nobody or everybody preferred. Files of another page,
incomplete ones, and all but the last of one participant are left out and listed, and the exit status is then 1.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
from answers import add_answers, parse_method, read_square
from common import told_in_one_line
from evaluate import PICTURES, read_triplets
from make_triplets import positive
from tables import markdown, rate_cell
from tqdm import tqdm

from pipeline_difference_inversion import replacing


TEMPLATE = Path(__file__).with_name("user_study.html")
STUDY = re.compile(r'<script type="application/json" id="study">(.*?)</script>', re.DOTALL)
RESAMPLES = 5000


# ---------------------------------------------------------------------------------------------------------- make


def make(options: argparse.Namespace) -> int:
    if options.output.exists():
        raise ValueError(f"{options.output} is there already, and answers to it may be out; --output is a new file")
    if not 2 <= len(options.answers) <= 4:
        raise ValueError(f"--answers takes two to four methods, and has {len(options.answers)}")
    triplets = add_answers(read_triplets(options.triplets), options.answers, "--answers")
    if options.count and options.count > len(triplets):
        raise ValueError(f"--count {options.count} is more than the {len(triplets)} triplets of {options.triplets}")
    rng = random.Random(options.seed)
    chosen = rng.sample(triplets, options.count) if options.count else triplets
    orders = [rng.sample([method.name for method in options.answers], len(options.answers)) for _ in chosen]
    page = make_page(chosen, orders, options.size)
    with replacing(options.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{len(chosen)} questions, {len(page) / 1e6:.1f} MB: {options.output.resolve()}")
    return 0


def make_page(triplets: list[dict], orders: list[list[str]], size: int) -> str:
    questions = []
    for paths, order in zip(tqdm(triplets, unit=" questions"), orders, strict=True):
        asked = {name: as_uri(paths[name], size) for name in PICTURES}
        questions.append(asked | {"options": [as_uri(paths[name], size) for name in order]})
    study = {"questions": questions, "key": base64.b64encode(json.dumps(orders).encode()).decode()}
    study = {"id": hashlib.sha256(json.dumps(study).encode()).hexdigest()[:16]} | study
    _, _, template = TEMPLATE.read_text(encoding="utf-8").partition(
        "\n"
    )  # participants need not know whose page it is
    return template.replace(">STUDY<", f">{json.dumps(study)}<")


def as_uri(path: Path, size: int) -> str:
    """The picture itself in place of an address."""
    file = io.BytesIO()
    read_square(path, size).save(file, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------------------- count


def count(options: argparse.Namespace) -> int:
    study, orders = read_study(options.study)
    files = find_files(options.answers)
    answers, faults = {}, {}
    for path in files:
        try:
            answers[path] = read_answers(path, study, orders)
        except ValueError as error:
            faults[path] = str(error)
    faults |= leave_out_earlier(answers)
    for path, fault in faults.items():
        print(f"{path} is left out: {fault}", file=sys.stderr)
    if not answers:
        raise ValueError(f"none of the {len(files)} files of answers can be counted")
    choices = [answer["choices"] for answer in answers.values()]
    sizes = {"participants": len(choices), "questions": len(orders), "methods": len(orders[0])}
    print(", ".join(f"{name}: {size}" for name, size in (sizes | {"files left out": len(faults)}).items()) + "\n")
    print(table(choices, orders))
    return int(bool(faults))


def read_study(path: Path) -> tuple[str, list[list[str]]]:
    """The page's id, and the methods' names in the order in which each question shows them."""
    try:
        study = json.loads(STUDY.search(path.read_text(encoding="utf-8"))[1])
        return study["id"], json.loads(base64.b64decode(study["key"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no page that `make` wrote: {error}") from error


def find_files(paths: list[Path]) -> list[Path]:
    """The files, and those of the folders; each once."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no {path}; give files of answers, or folders with them")
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"there are no files of answers (*.json) in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(file.resolve() for file in files))


def read_answers(path: Path, study: str, orders: list[list[str]]) -> dict:
    """A file of answers whose every choice is there; a ValueError says why it is none."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(answer, dict) or not {"study", "participant", "finished", "choices"} <= answer.keys():
        raise ValueError("it is no file of answers")
    if answer["study"] != study:
        raise ValueError(f"it answers another page, {answer['study']}; this one is {study}")
    given = answer["choices"] if isinstance(answer["choices"], list) else []
    answered = sum(choice in range(1, len(orders[0]) + 1) for choice in given)
    if not answered == len(given) == len(orders):
        raise ValueError(f"it answers {answered} of {len(orders)} questions")
    return answer


def leave_out_earlier(answers: dict[Path, dict]) -> dict[Path, str]:
    """Takes out all but the last file of each participant, who may have gone back and changed a choice; says why."""
    last = {}
    for path in sorted(answers, key=lambda path: str(answers[path]["finished"])):
        last[str(answers[path]["participant"])] = path
    earlier = [path for path in answers if path not in last.values()]
    return {path: f"its participant finished {last[str(answers.pop(path)['participant'])]} later" for path in earlier}


def table(choices: list[list[int]], orders: list[list[str]]) -> str:
    """A line for each method, the most preferred first, in Markdown; choices (participants, questions) from 1."""
    names = sorted(orders[0])
    places = np.array(
        [[names.index(order[choice - 1]) for choice, order in zip(c, orders, strict=True)] for c in choices]
    )
    votes = places[..., None] == np.arange(len(names))  # (participants, questions, methods)
    low, high = resampled(votes)
    rows = [
        [name, votes[..., i].sum(), rate_cell(votes[..., i].flat), f"{low[i]:.2f} to {high[i]:.2f}"]
        for i, name in enumerate(names)
    ]
    rows.sort(key=lambda row: -row[1])
    return markdown(["method", "choices", "preference (Wilson)", "other people and questions"], rows)


def resampled(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % intervals of each method's share when participants and questions are drawn again with replacement."""
    rng, (people, questions, methods) = np.random.default_rng(0), votes.shape
    by_person = rng.multinomial(people, np.full(people, 1 / people), RESAMPLES)
    by_question = rng.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
    tallies = (by_person @ votes.reshape(people, -1)).reshape(RESAMPLES, questions, methods)
    shares = np.einsum("rqm,rq->rm", tallies, by_question) / (people * questions)
    return tuple(np.quantile(shares, (0.025, 0.975), axis=0))


# ---------------------------------------------------------------------------------------------------------- main


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="writes the page")
    making.set_defaults(run=make)
    making.add_argument("--triplets", type=Path, required=True, help="a file of JSON lines, as evaluate.py reads it")
    making.add_argument(
        "--answers", type=parse_method, nargs="+", required=True, metavar="NAME=FOLDER", help="two to four methods"
    )
    making.add_argument(
        "--output", type=Path, default=Path("study.html"), help="the page, which must not be there yet"
    )
    making.add_argument("--count", type=positive, help="how many questions, drawn from the triplets; by default all")
    making.add_argument("--size", type=positive, default=384, help="most pixels of a picture's side")
    making.add_argument("--seed", type=int, default=0, help="draws questions, and the order of options")
    counting = commands.add_parser("count", help="counts files of answers")
    counting.set_defaults(run=count)
    counting.add_argument("study", type=Path, help="the page")
    counting.add_argument("answers", type=Path, nargs="+", help="files of answers, or folders with them")
    return parser.parse_args(arguments)


@told_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
