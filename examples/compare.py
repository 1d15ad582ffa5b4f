# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Asks a vision language model which of two methods' answers it prefers; Table 3 of the paper.

    python examples/compare.py --triplets triplets.jsonl --answers ours=evaluation/ours --against DIA=dia VISII=visii \\
        --model Qwen/Qwen2-VL-72B-Instruct --output preferences.jsonl
    python examples/compare.py --triplets triplets.jsonl --answers ours=evaluation/ours --against SDEdit=sdedit \\
        --judge captioner

A method's answers are pictures in a folder, each named by the index of its triplet: 00000.png is the answer to the
file's first line, as `evaluate.py` writes them. For each triplet and each method of `--against`, the model is shown
one picture with A, A' and B, and below them both answers side by side as Option 1 and Option 2, and is asked which
one fits. Any chat model that `AutoModelForImageTextToText` of transformers loads will do; some need torchvision too.
It answers without sampling. The wording is ours, since the paper's is in a supplement that is not at hand;
`--question` takes another, which must ask for Option 1 or Option 2.

Each question is asked twice, with the two answers in each other's place; the seed draws which order comes first. A
method has won if both replies name it. They are a *tie* if they name different methods, so that the place decided,
and a *refusal* if one of them names neither. The preference is the share won of what was won or lost, with its 95 %
Wilson interval. `option 1` is how often the first place was chosen, 0.5 for a judge who does not mind places.

`--judge captioner` is a stand-in for trying this out without such a model. It sees no two pictures together:
Storybook's captioner describes A, A', B and each answer. Between the captions of A and A' some words change. It prefers
the answer in whose caption more of these words change from B's; if both do alike, it refuses.

`--output` keeps each reply as a JSON line, and is whole at any time. What it has is not asked again, unless the
pictures, the judge or the question are others, so that after an interruption the same command goes on.
"""

import argparse
import hashlib
import inspect
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from answers import add_answers, parse_method, read_square
from common import STORYBOOK, load_pipeline, loading, make_sheet, told_in_one_line
from evaluate import PICTURES, read_triplets
from PIL import Image, ImageOps
from tables import markdown, rate_cell
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline_difference_inversion import DifferenceInversionPipeline, replacing


QUESTION = (
    "The first row shows picture A, then A', which is A after a change, and then another picture, B. The second row "
    "shows two attempts to change B in the same way: Option 1 on the left, and Option 2 on its right. Which of them is "
    "the more suitable B': changed as A was changed into A', with everything else as in B? "
    'Answer with "Option 1" or "Option 2" only.'
)
STAND_IN = (
    "The judge is a captioner in place of a vision language model. It compares words, not pictures, and what its "
    "captions leave out counts for nothing. It refuses where both answers' captions fit equally well. These figures "
    "try out the procedure; they are no preference of a model that looks."
)
TILE = 384  # of a picture as the model is shown it, in pixels


@dataclass(frozen=True)
class Question:
    """Two methods' answers to a triplet, in the order in which they are shown."""

    index: int
    options: tuple[str, str]
    paths: tuple[Path, ...]  # of A, A', B and both options

    def pictures(self) -> list[Image.Image]:
        return [read_square(path, TILE) for path in self.paths]

    def fingerprint(self, *asked: str) -> str:
        """The same only for the same pictures in the same order, put to the same judge in the same words."""
        digest = hashlib.sha256(json.dumps([self.index, self.options, *asked]).encode())
        for path in self.paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def draw_questions(answered: list[dict[str, Path]], first: str, others: list[str], seed: int) -> Iterator[Question]:
    """Each pair of answers in both orders, triplet by triplet."""
    for index, paths in enumerate(answered):
        for other in others:
            order = [first, other]
            random.Random(f"{seed} {index} {other}").shuffle(order)
            for options in (order, order[::-1]):
                yield Question(index, tuple(options), tuple(paths[name] for name in (*PICTURES, *options)))


# -------------------------------------------------------------------------------------------------------- judges


@dataclass(frozen=True)
class Reply:
    """What the judge said, and which option that is: 1, 2, or None for neither."""

    said: str
    choice: int | None


def ask_model(pipe: DifferenceInversionPipeline, question: Question, text: str) -> Reply:
    (said,) = pipe.caption([draw_sheet(question)], question=text, max_new_tokens=256)
    return Reply(said, choice_of(said))


def draw_sheet(question: Question) -> Image.Image:
    """All five as one picture, a square, since some models' processors cut others to one."""
    a, a2, b, first, second = question.pictures()
    sheet = make_sheet([[("A", a), ("A'", a2), ("B", b)], [("Option 1", first), ("Option 2", second)]], TILE)
    return ImageOps.pad(sheet, (max(sheet.size),) * 2, color="white")


# An option by its name; a sentence that does no more than choose one; where its reasons begin; and what turns it round.
NAMED = re.compile(r"\boption #?(1|2|one|two)\b|\b(first|second) option\b")
CHOSEN = re.compile(
    r"(?:.*\b(?:answer|choice|choose|pick|prefer|select)(?: is)?:? )?"
    r"(?:the )?(?:option )?#?(1|2|one|two|first|second)(?: option| one| picture| image)?"
    r"(?: is (?:the )?(?:better|best|more|right|correct)\b.*)?"
)
BESIDES = re.compile(r",? (?:because|since|as|over|rather than)\b|, not\b")
DENIED = re.compile(r"\b(?:not|neither|nor|cannot|both|worse|worst)\b|n't\b")
FIRST = ("1", "one", "first")


def choice_of(said: str) -> int | None:
    """Which option a reply chooses, 1 or 2; None if that is not plain.

    It is plain if some sentence does no more than choose one ("Option 1.", "the first", "My answer is Option 1",
    "Option 1 is better …", "Option 1, because …") and none chooses the other; or else if only one of them is named at
    all, and nothing is denied. What a model thinks before it replies is no part of the reply.
    """
    reply = re.sub(
        r"[*_`\"“”()\[\]]", "", said.rpartition("</think>")[2].partition("<think>")[0].lower().replace("’", "'")
    )
    sentences = [BESIDES.split(" ".join(s.split()))[0].strip(" :,") for s in re.split(r"[.!?;\n]", reply)]
    plain = [match[1] for s in sentences if (match := CHOSEN.fullmatch(s)) and not DENIED.search(s)]
    named = [] if DENIED.search(reply) else [match[1] or match[2] for match in NAMED.finditer(reply)]
    choices = {1 if word in FIRST else 2 for word in plain or named}
    return choices.pop() if len(choices) == 1 else None


def ask_captioner(pipe: DifferenceInversionPipeline, question: Question, text: str) -> Reply:
    """Prefers the option that changes B's caption in more of the words in which A's changes; None if both do alike."""
    captions = pipe.caption(question.pictures())
    a, a2, b, first, second = (Counter(re.findall(r"[\w']+", caption.lower())) for caption in captions)
    likeness = [agreement((a, a2), (b, option)) for option in (first, second)]
    choice = None if likeness[0] == likeness[1] else 1 + likeness.index(max(likeness))
    said = zip(("A", "A'", "B", "Option 1", "Option 2"), captions, strict=True)
    return Reply("; ".join(f"{name}: {caption}" for name, caption in said), choice)


def agreement(one: tuple[Counter, Counter], other: tuple[Counter, Counter]) -> float:
    """Of the words that either change takes away or adds, the share that both do, 0 to 1 (Dice's coefficient)."""
    (lost, gained), (other_lost, other_gained) = ((x - y, y - x) for x, y in (one, other))
    shared = (lost & other_lost).total() + (gained & other_gained).total()
    return 2 * shared / max(1, sum(words.total() for words in (lost, gained, other_lost, other_gained)))


JUDGES = {"model": ask_model, "captioner": ask_captioner}


def load_judge(options: argparse.Namespace) -> DifferenceInversionPipeline:
    """Storybook, or a pipeline that has nothing but the model in its captioner's place, which it knows how to ask."""
    if options.judge == "captioner":
        pipe = load_pipeline(str(STORYBOOK))
    else:
        pipe = pipeline_of(*load_model(options.model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_model(name: str) -> tuple:
    with loading("--model", name, "a chat model's folder or Hub name"):
        processor = AutoProcessor.from_pretrained(name)
        if not getattr(processor, "chat_template", None):
            raise ValueError("its processor has no chat template, so it does not converse")
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto").eval()
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model, processor


def pipeline_of(model, processor) -> DifferenceInversionPipeline:
    needed = [
        p.name for p in inspect.signature(DifferenceInversionPipeline).parameters.values() if p.default is p.empty
    ]
    return DifferenceInversionPipeline(
        **dict.fromkeys(needed) | {"captioner": model, "captioner_processor": processor}
    )


# ------------------------------------------------------------------------------------------- what is kept of replies


def read_replies(path: Path) -> dict[str, dict]:
    """The lines of an earlier run, by the fingerprint of what was asked."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return {reply["asked"]: reply for reply in map(json.loads, lines)}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--output {path} is there, but is no file of replies: {error!r}; name another") from error


def write_replies(path: Path, replies: Iterable[dict]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(reply) + "\n" for reply in replies))


# ----------------------------------------------------------------------------------------------------- reporting


def outcome(replies: list[dict], first: str) -> str:
    """Of the two replies to one pair of answers, one in each order."""
    chosen = {reply["options"][reply["choice"] - 1] if reply["choice"] else None for reply in replies}
    if None in chosen:
        return "refused"
    return "tie" if len(chosen) == 2 else "won" if first in chosen else "lost"


def table(replies: list[dict], judge: str, first: str, others: list[str]) -> str:
    """A line for each of the other methods, in Markdown."""
    rows = []
    for other in others:
        own = [reply for reply in replies if other in reply["options"]]
        pairs = [[reply for reply in own if reply["index"] == index] for index in {reply["index"] for reply in own}]
        counts = Counter(outcome(pair, first) for pair in pairs)
        preference = rate_cell([True] * counts["won"] + [False] * counts["lost"])
        places = [reply["choice"] == 1 for reply in own if reply["choice"]]
        place = f"{mean(places):.2f}" if places else "–"
        kinds = [counts[kind] for kind in ("won", "lost", "tie", "refused")]
        rows.append([judge, f"{first} against {other}", len(pairs), *kinds, preference, place])
    head = ["judge", "methods", "triplets", "won", "lost", "ties", "refusals", "preference", "option 1"]
    return markdown(head, rows)


# ---------------------------------------------------------------------------------------------------------- main


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    method = {"type": parse_method, "required": True, "metavar": "NAME=FOLDER"}
    parser.add_argument("--triplets", type=Path, required=True, help="a file of JSON lines, as evaluate.py reads it")
    parser.add_argument("--answers", **method, help="the method whose preference is measured; pictures by index")
    parser.add_argument("--against", **method, nargs="+", help="the methods that it is compared with, one by one")
    parser.add_argument("--judge", choices=JUDGES, default="model", help="captioner is a stand-in for trying this out")
    parser.add_argument("--model", metavar="NAME", help="a chat model that sees: its folder or Hub name")
    parser.add_argument(
        "--question", default=QUESTION, help="what the model is asked; it must offer Option 1 and Option 2"
    )
    parser.add_argument("--output", type=Path, default=Path("preferences.jsonl"), help="a JSON line for each reply")
    parser.add_argument("--seed", type=int, default=0, help="draws which order is asked first")
    options = parser.parse_args(arguments)
    if (options.judge == "model") != bool(options.model):
        parser.error("give either --model NAME, the model that judges, or --judge captioner")
    return options


@told_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    judge = options.model or "captioner (a stand-in)"
    methods = [options.answers, *options.against]
    answered = add_answers(read_triplets(options.triplets), methods, "--answers or --against")
    first, *others = (method.name for method in methods)
    replies = read_replies(options.output)
    questions = draw_questions(answered, first, others, options.seed)
    asked = {question.fingerprint(judge, options.question): question for question in questions}
    left = {fingerprint: question for fingerprint, question in asked.items() if fingerprint not in replies}
    pipe = load_judge(options) if left else None
    for fingerprint, question in tqdm(left.items(), unit=" questions"):
        reply = JUDGES[options.judge](pipe, question, options.question)
        said = {"index": question.index, "options": question.options, "judge": judge, **asdict(reply)}
        replies[fingerprint] = said | {"asked": fingerprint}
        write_replies(options.output, replies.values())
    print(f"{len(left)} questions asked, {len(asked) - len(left)} were answered before: {options.output.resolve()}\n")
    print(table([replies[fingerprint] for fingerprint in asked], judge, first, others))
    if options.judge == "captioner":
        print(f"\n{STAND_IN}")


if __name__ == "__main__":
    main()
