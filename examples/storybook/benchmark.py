# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores the pipeline on fresh image analogies whose right answers are known.

    python examples/storybook/benchmark.py --seed 1 2 --per-kind 20 --setting captioner loose

Each setting asks in its own way, and has its own rows in the tables:

    captioner    the captioner writes the prompts
    loose        A, A' and B are each described by someone else, who leaves things out, sometimes what changes
    wrong        the caption of A or of A' is wrong about something that does not change
    chance       whole captions among a captioner's idle words ("a photo of"), which are others for each picture; the
                 oracle's caption has those of B's, since Storybook never met such words
    unsaid       true captions without what changes, so that it can be learned from the pictures alone
    silent       empty prompts of A and A'; the captioner's of B
    two          two attributes change at once; the captioner's prompts
    two-unsaid   the same analogies; true captions without either change
    reversed     loose captions; B is the picture that has the change, `difference_scale=-1` is to take it back
    random-rows  loose captions; tokens begin as random rows (`init="random"`)
    wordless     the change is to a colour or a style half way between two, for which there is no word; the captioner's
                 prompts

All but the last ask the same analogies, or the same with two changes. Prompts are drawn for each question on its own.

Beside our answer stand the oracle's, which is given the true caption of the right answer and B's own prompt on the query
inverted likewise, and no change at all. Where no caption is true, a `ceiling` takes the oracle's place: random rows that are
learned from the query and the right answer itself in 200 steps, without a CLIP loss.

Rates have their 95 % Wilson intervals behind them. `read` is how often the captioner reads the right scene in the answer,
every word of it: unlike the judge, who compares pixels, it does not mind where things stand or how large they are.
`direction` is the paper's directional score, by Storybook's CLIP; `UNet` is how many latents an answer sends through the
UNet, of which those that tokens are learned on come back through it as well. The rows `far` are the analogies whose query
shares neither subject, ground nor sky with the pair, but for what changes. Where two attributes change, a row's kind is the
first.

Several configurations answer the same questions, each `--config` one of them and a bare one the defaults. Another table
then compares the later ones with the first, question by question:

    python examples/storybook/benchmark.py --seed 301 --config --config num_tokens=8 --config num_optimization_steps=0

What a setting itself asks of the pipeline no configuration changes.

`--paper` adds the paper's own configuration, and `--sdedit 0.6 0.8` stock diffusers' image to image at these strengths,
which is given the true caption as the oracle is. `--instruct FOLDER` adds InstructPix2Pix with the UNet that `train.py
instruct` wrote there, which is given the true instruction, and `--visii` the instruction that VISII learns for it from the
pair alone, in 1000 steps. `--inpaint FOLDER` adds Analogist, with the UNet of `train.py inpaint`, which is given the true
caption in place of a VLM's; and `--dia` DIA, which is given pictures alone. Those that are told the truth have no rows where
it has no words. `--dino FOLDER` adds a column, the directional score by the DINO of `train.py dino`.

`--output FILE.jsonl` keeps every verdict as it comes. What FILE already has of the same questions and methods is not
answered again and counts in the tables, so that a run that was stopped goes on; use another FILE for another model or
data type. `--sheet FILE.png` shows the first twelve analogies of the first setting that were answered now: A, A', B, the
answer of each configuration, the oracle's, and the target; `--failures FILE.png` likewise the first twelve that went wrong.
`accelerate launch --multi_gpu --num_processes 2` in place of `python` shares the questions out between two GPUs, or, with
OMP_NUM_THREADS=1 and whatever the option's name says, between two CPU cores. Seeds from 300 on are for choosing settings,
and those below for reporting them.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from analogies import Analogy, judge
from baselines import (
    DIA_INFERENCE_STEPS,
    AnalogistAttention,
    analogist,
    dia_condition,
    dia_noise,
    visii_instruction,
)
from components import XL_COMPONENTS
from PIL import Image
from questions import SETTINGS, Question, draw_questions
from tqdm import tqdm
from world import ATTRIBUTES, describe, render, restatement

from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import make_image_grid


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from common import (  # noqa: E402
    APPLYING,
    LEARNING,
    as_arguments,
    check_model,
    check_picture_target,
    check_target,
    loading,
    parse_setting,
    told_in_one_line,
)
from evaluate import Encoder, directional_score, encoder_of, load_encoder  # noqa: E402
from stock import load_inpaint, load_instruct, load_sdedit, stock  # noqa: E402
from tables import Z, markdown, rate_cell, wilson  # noqa: E402

from pipeline_difference_inversion import DifferenceInversionPipeline  # noqa: E402


NO_CHANGE = "no change"
# The paper says zeros, alpha and the two weights, but not which is which. The rest it leaves open: tokens, steps, strength
# and guidance are what this project used with DDIM inversion, and were not searched for this configuration.
PAPER = {
    "objective": "consistency",
    "init": "zeros",
    "alpha": 0.8,
    "lambda_clip": 0.01,
    "lambda_tc": 6.0,
    "lambda_before": 1.0,
    "num_tokens": 4,
    "num_optimization_steps": 120,
    "num_samples_per_step": 2,
    "learning_rate": 0.01,
    "inversion": "ddim",
    "strength": 0.9,
    "guidance_scale": 2.5,
    "replace_phrases": False,
    "complete_prompts": False,
}
CEILING = {"init": "random", "num_optimization_steps": 200, "lambda_clip": 0.0}  # CLIP would lead to words
SDEDIT_GUIDANCE_SCALE = 2.0  # at which Storybook's text to image is scored
# Of the text's guidance of 2 and 4 and the picture's of 1 and 1.5, these had 22 of the 24 analogies of `--seed 301 --per-kind
# 4` right, and the others 20 or 21.
INSTRUCT = {"num_inference_steps": 25, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
# By `--seed 564`: of three analogies, 1 and 1.5 had one right, and 2 and 3 none.
DIA_GUIDANCE_SCALE = 1.0
# Of six analogies of `--seed 564`, 1 and 8 had three right, 2 one and 4 two; 1 is nearest to the right pictures.
ANALOGIST = {"num_inference_steps": 50, "guidance_scale": 1.0}
# Each folder that an option names, and the file that it must hold.
FOLDERS = {
    "model": "model_index.json",
    "xl": "unet/config.json",
    "instruct": "config.json",
    "inpaint": "config.json",
    "dino": "config.json",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Score:
    """What one method's answer to one question is worth.

    Attributes:
        success, kept, psnr: the judge's verdict.
        read: whether the captioner reads the right scene in the answer; None where no caption is true.
        direction: directional score, by Storybook's CLIP.
        evaluations: latents sent through the UNet.
        dino: directional score by a DINO; None where there is none.
    """

    success: bool
    kept: bool
    psnr: float
    read: bool | None
    direction: float
    evaluations: int
    dino: float | None = None


@dataclasses.dataclass
class Answer:
    """What was made of one question, by method."""

    question: Question
    said: dict[str, str]  # the prompts, by argument; the captioner's where none is given
    scores: dict[str, Score]
    pictures: dict[str, Image.Image]  # none where the scores come from an earlier run


def load_pipeline(
    folder: Path, device: torch.device, xl: Path | None = None, dtype: torch.dtype = torch.float32
) -> DifferenceInversionPipeline:
    parts = {}
    if xl:
        with loading("--xl", xl, "the folder of Storybook-XL's own parts"):
            parts = {name: kind.from_pretrained(xl / name) for name, (_, kind) in XL_COMPONENTS.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    with loading("--model", folder, "the folder of a Storybook"):
        pipe = DifferenceInversionPipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # a CPU then has a batch of 12 in 0.6 of the time
    return pipe.to(device)


def load_others(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> dict[str, DiffusionPipeline]:
    """The pipelines of the methods that have a UNet of their own."""
    others = {}
    if options.instruct:
        others["instruct"] = load_instruct(pipe, options.instruct, "--instruct")
    if options.inpaint:
        others["inpaint"] = load_inpaint(pipe, options.inpaint, "--inpaint")
        others["inpaint"].unet.set_attn_processor(AnalogistAttention())
    return others


# ----------------------------------------------------------------------------------------------------- answering


@dataclasses.dataclass
class Task:
    """A question with its pictures, and what answers it."""

    pipe: DifferenceInversionPipeline
    others: dict[str, DiffusionPipeline]  # "instruct" and "inpaint", where they are asked too
    question: Question
    before: Image.Image
    after: Image.Image
    query: Image.Image
    said: dict[str, str]

    @property
    def generator(self) -> torch.Generator:
        """A fresh one, so that every method draws the same noise."""
        return torch.Generator().manual_seed(self.question.index)


def make_task(pipe: DifferenceInversionPipeline, others: dict[str, DiffusionPipeline], question: Question) -> Task:
    analogy = question.analogy
    pictures = [render(scene) for scene in (analogy.before, analogy.after, analogy.query)]
    captions = dict(zip(("before_prompt", "after_prompt", "prompt"), pipe.caption(pictures), strict=True))
    return Task(pipe, others, question, *pictures, said=captions | question.prompts)


def ours(task: Task, config: dict) -> Image.Image:
    asked = as_arguments(config | task.question.arguments) | task.question.prompts
    pair = {"before": task.before, "after": task.after}
    return task.pipe(image=task.query, **pair, **asked, generator=task.generator).images[0]


def oracle(task: Task, config: dict) -> Image.Image:
    prompts = {"source_prompt": task.said["prompt"], "prompt": task.question.captions.answer}
    return task.pipe(image=task.query, **prompts, **applying(config), generator=task.generator).images[0]


def ceiling(task: Task, config: dict) -> Image.Image:
    pair = {"before": task.query, "after": render(task.question.analogy.target)}
    asked = as_arguments(CEILING | applying(config))
    return task.pipe(image=task.query, **pair, **asked, generator=task.generator).images[0]


def sdedit(task: Task, strength: float) -> Image.Image:
    asked = {"prompt": task.question.captions.answer, "strength": strength, "guidance_scale": SDEDIT_GUIDANCE_SCALE}
    return load_sdedit(task.pipe)(image=task.query, **asked, generator=task.generator).images[0]


def instruct_pix2pix(task: Task) -> Image.Image:
    analogy, rng = task.question.analogy, random.Random(task.question.index)
    told = ", ".join(restatement(analogy.target, kind, analogy.query, rng) for kind in analogy.kinds)
    return task.others["instruct"](image=task.query, prompt=told, **INSTRUCT, generator=task.generator).images[0]


def visii(task: Task) -> Image.Image:
    """Has no way back, and so learns from the pair in the order in which the query is to change."""
    before, after = map(render, task.question.change)
    learned = visii_instruction(task.pipe, task.others["instruct"], before, after, task.generator)
    return task.others["instruct"](
        image=task.query, prompt_embeds=learned, **INSTRUCT, generator=task.generator
    ).images[0]


def analogist_grid(task: Task) -> Image.Image:
    pictures = [*map(render, task.question.change), task.query]
    told = {"prompt": task.question.captions.answer, **ANALOGIST, "generator": task.generator}
    return analogist(task.others["inpaint"], *pictures, **told)


def dia(task: Task) -> Image.Image:
    """Adds what the pair's conditions differ by to the query's, as DIA does, at the strength of 1."""
    generator = task.generator
    pictures = [*map(render, task.question.change), task.query]
    before, after, query = (dia_condition(task.pipe, picture, generator) for picture in pictures)
    noise = dia_noise(task.pipe, task.query, query, generator)
    asked = {"num_inference_steps": DIA_INFERENCE_STEPS, "guidance_scale": DIA_GUIDANCE_SCALE, "latents": noise}
    return stock(StableDiffusionPipeline, task.pipe)(prompt_embeds=query + after - before, **asked).images[0]


def no_change(task: Task) -> Image.Image:
    return task.query


Method = Callable[[Task], Image.Image]


def methods(question: Question, options: argparse.Namespace) -> dict[str, Method]:
    """What answers a question, by the name that it has in the tables."""
    has_words = question.captions.answer is not None
    reference, name = (oracle, "oracle") if has_words else (ceiling, "ceiling")
    asked = {name_of(config): functools.partial(ours, config=config) for config in options.configs}
    for config in options.configs:
        asked[reference_name(name, config, options.configs)] = functools.partial(reference, config=config)
    if has_words:
        asked |= {f"SDEdit, {s:g}": functools.partial(sdedit, strength=s) for s in options.sdedit}
    if has_words and options.instruct:
        asked["InstructPix2Pix"] = instruct_pix2pix
    if options.visii:
        asked["VISII"] = visii
    if options.dia:
        asked["DIA"] = dia
    if has_words and options.inpaint:
        asked["Analogist"] = analogist_grid
    return asked | {NO_CHANGE: no_change}


def name_of(config: dict) -> str:
    if config == PAPER:
        return "paper"
    return ", ".join(f"{name}={value}" for name, value in config.items()) or "default"


def applying(config: dict) -> dict:
    return {name: value for name, value in config.items() if name in APPLYING}


def reference_name(name: str, config: dict, configs: list[dict]) -> str:
    """One oracle, or ceiling, for all configurations that apply differences alike."""
    alike = all(applying(other) == applying(config) for other in configs)
    return name if alike else f"{name}, {name_of(applying(config))}"


@contextmanager
def counted(unets: list[torch.nn.Module]) -> Iterator[list[int]]:
    """While open, the batch size of each call of one of the UNets joins the list."""
    counts = []
    hooks = [u.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0]))) for u in unets]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def answer(pipe, others, encoders: dict[str, Encoder], question: Question, options: argparse.Namespace) -> Answer:
    """Every method's picture for one question, and their scores."""
    task = make_task(pipe, others, question)
    result = Answer(question, task.said, scores={}, pictures={})
    unets = [asked.unet for asked in (pipe, *others.values())]
    for name, method in methods(question, options).items():
        with counted(unets) as counts:
            picture = method(task)
        result.scores[name] = score(task, encoders, picture, sum(counts))
        if question.setting == options.setting[0]:  # the sheets show no others
            result.pictures[name] = picture
    return result


def score(task: Task, encoders: dict[str, Encoder], picture: Image.Image, evaluations: int) -> Score:
    """By `encoders`, each of which gives the field of its name."""
    question = task.question
    before, after = map(render, question.change)
    read = None
    if question.captions.answer is not None:
        read = task.pipe.caption([picture]) == [describe(question.analogy.target)]
    return Score(
        **dataclasses.asdict(judge(picture, question.analogy)),
        read=read,
        evaluations=evaluations,
        **{name: directional_score(encode, before, after, task.query, picture) for name, encode in encoders.items()},
    )


def is_far(analogy: Analogy) -> bool:
    """Whether the query shares neither subject, ground nor sky with the pair, but for what changes."""
    others = {"subject", "ground", "sky"} - set(analogy.kinds)
    return all(getattr(analogy.query, name) != getattr(analogy.before, name) for name in others)


# ------------------------------------------------------------------------------------------- what is kept of answers


def json_record(a: Answer) -> dict:
    question = a.question
    return {
        "setting": question.setting,
        "seed": question.seed,
        "index": question.index,
        "far": is_far(question.analogy),
        **dataclasses.asdict(question.analogy),
        "prompts": a.said,
        "methods": {name: dataclasses.asdict(score) for name, score in a.scores.items()},
    }


def read_answers(path: Path | None, questions: list[Question], options: argparse.Namespace) -> list[Answer]:
    """The answers that an earlier run left in a file, in no order; of several to one question the last.

    Counted are those to the same questions, word for word, that have all the methods that are asked now.
    """
    if path is None or not path.is_file():
        return []
    asked, found = {question.place: question for question in questions}, {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a run was stopped while it wrote
            continue
        question = asked.get(tuple(record.get(name) for name in ("setting", "seed", "index")))
        earlier = question and earlier_answer(record, question, list(methods(question, options)), bool(options.dino))
        if earlier:
            found[question.place] = earlier
    return list(found.values())


def earlier_answer(record: dict, question: Question, names: list[str], with_dino: bool) -> Answer | None:
    """The answer that a line of the file holds, if it is one to this question by all these methods."""
    same_scenes = json.loads(json.dumps(dataclasses.asdict(question.analogy))).items() <= record.items()
    same_prompts = question.prompts.items() <= record["prompts"].items()
    if not same_scenes or not same_prompts or not set(names) <= set(record["methods"]):
        return None
    scores = {name: Score(**record["methods"][name]) for name in names}
    if with_dino and any(score.dino is None for score in scores.values()):
        return None
    return Answer(question, record["prompts"], scores, pictures={})


def end_last_line(path: Path) -> None:
    """So that what is written next begins a line, even if a run was stopped while it wrote."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        with open(path, "a") as lines:
            lines.write("\n")


# ----------------------------------------------------------------------------------------------------- reporting


def newcombe(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """How much more often the second of two paired outcomes is true than the first, and the 95 % interval of that.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data"
    (1998), method 10.
    """
    count, pairs = len(first), list(zip(first, second, strict=True))
    rates = [sum(outcomes) / count for outcomes in (first, second)]
    (low_1, high_1), (low_2, high_2) = (wilson(rate, count) for rate in rates)
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_1, only_2 = pairs.count((True, False)), pairs.count((False, True))
    # The correlation of the two, drawn towards zero.
    agreement = both * neither - only_1 * only_2
    if agreement > 0:
        agreement = max(0.0, agreement - count / 2)
    spread = ((both + only_1) * (neither + only_2) * (both + only_2) * (neither + only_1)) ** 0.5
    correlation = agreement / spread if spread else 0.0

    def distance(one: float, other: float) -> float:
        return (one * one - 2 * correlation * one * other + other * other) ** 0.5

    difference = rates[1] - rates[0]
    below = distance(rates[1] - low_2, high_1 - rates[0])
    above = distance(high_2 - rates[1], rates[0] - low_1)
    return difference, difference - below, difference + above


def mean_difference_cell(first: list[float], second: list[float]) -> str:
    """The mean of paired differences with its 95 % interval, by the normal distribution."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f} dB"
    return f"{mean:+.1f} ± {Z * statistics.stdev(differences) / len(differences) ** 0.5:.1f} dB"


def columns(answers: list[Answer]) -> list[str]:
    """`DINO` stands among them only where all was scored by one."""
    scores = [score for a in answers for score in a.scores.values()]
    dino = ["DINO"] if all(score.dino is not None for score in scores) else []
    return ["success", "kept", "read", "PSNR", "direction", *dino, "UNet"]


def cells(scores: list[Score], names: list[str]) -> list[str]:
    """The rates and means of these columns."""
    read = [s.read for s in scores if s.read is not None]
    values = {
        "success": lambda: rate_cell(s.success for s in scores),
        "kept": lambda: rate_cell(s.kept for s in scores),
        "read": lambda: f"{statistics.mean(read):.2f}" if read else "–",
        "PSNR": lambda: f"{statistics.mean(s.psnr for s in scores):.1f} dB",
        "direction": lambda: f"{statistics.mean(s.direction for s in scores):.2f}",
        "DINO": lambda: f"{statistics.mean(s.dino for s in scores):.2f}",
        "UNet": lambda: f"{statistics.mean(s.evaluations for s in scores):.0f}",
    }
    return [values[name]() for name in names]


def by_setting(answers: list[Answer]) -> dict[str, list[Answer]]:
    settings = dict.fromkeys(a.question.setting for a in answers)
    return {setting: [a for a in answers if a.question.setting == setting] for setting in settings}


def summary_table(answers: list[Answer]) -> str:
    """Rates and means by setting and method, in Markdown."""
    names = columns(answers)
    rows = [
        [setting, method, len(chosen), *cells([a.scores[method] for a in chosen], names)]
        for setting, chosen in by_setting(answers).items()
        for method in chosen[0].scores
    ]
    return markdown(["setting", "method", "n", *names], rows)


def comparison_table(answers: list[Answer], names: list[str]) -> str:
    """How much better each later configuration does than the first on the same questions, in Markdown."""
    rows = []
    for setting, chosen in by_setting(answers).items():
        first = [a.scores[names[0]] for a in chosen]
        for name in names[1:]:
            second = [a.scores[name] for a in chosen]
            success = newcombe([s.success for s in first], [s.success for s in second])
            psnr = mean_difference_cell([s.psnr for s in first], [s.psnr for s in second])
            rows.append([setting, name, len(chosen), "{:+.2f} ({:+.2f} to {:+.2f})".format(*success), psnr])
    return markdown(["setting", f"against {names[0]}", "n", "success", "PSNR"], rows)


def kind_table(answers: list[Answer]) -> str:
    """Rates and means by setting, kind of change and method, in Markdown."""
    rows, names = [], columns(answers)
    for setting, own in by_setting(answers).items():
        for kind in ("far", *ATTRIBUTES):
            chosen = [a for a in own if is_of_kind(a.question.analogy, kind)]
            for method in chosen[0].scores if chosen else ():
                rows.append([setting, kind, len(chosen), method, *cells([a.scores[method] for a in chosen], names)])
    return markdown(["setting", "kind", "n", "method", *names], rows)


def is_of_kind(analogy: Analogy, kind: str) -> bool:
    return is_far(analogy) if kind == "far" else analogy.kind == kind


def report(answers: list[Answer], configs: list[dict]) -> str:
    """All tables; questions are in each setting's order."""
    tables = [summary_table(answers)]
    if len(configs) > 1:
        tables.append(comparison_table(answers, [name_of(config) for config in configs]))
    return "\n\n".join([*tables, kind_table(answers)])


def make_sheet(answers: list[Answer]) -> Image.Image:
    """A, A', B, the answers, the oracle's and the target; an analogy to a row, or two where there is room."""
    rows = []
    for a in answers:
        analogy = a.question.analogy
        before, after, query, target = map(render, (analogy.before, analogy.after, analogy.query, analogy.target))
        answered = [picture for method, picture in a.pictures.items() if method != NO_CHANGE]
        rows.append([before, after, query, *answered, target])
    if len(rows[0]) == 6 and len(rows) % 2 == 0:
        rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
    return make_image_grid(sum(rows, []), rows=len(rows), cols=len(rows[0]))


def save_sheets(answers: list[Answer], options: argparse.Namespace) -> None:
    """Of the answers that have pictures."""
    shown = [a for a in answers if a.pictures]
    failed = [a for a in shown if not next(iter(a.scores.values())).success]
    for path, chosen in ((options.sheet, shown), (options.failures, failed)):
        if path and chosen:
            make_sheet(chosen[:12]).save(path)


# ---------------------------------------------------------------------------------------------------------- main


def parse_argument(text: str) -> tuple[str, object]:
    name, value = parse_setting(text)
    if name not in (*LEARNING, *inspect.signature(DifferenceInversionPipeline.__call__).parameters):
        raise argparse.ArgumentTypeError(f"the pipeline has no argument {name!r}")
    return name, value


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the analogies; several are run together")
    parser.add_argument("--per-kind", type=int, default=20, help="analogies of each of the six kinds from each seed")
    parser.add_argument(
        "--setting", nargs="+", default=["captioner"], choices=SETTINGS, metavar="NAME", help=", ".join(SETTINGS)
    )
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument(
        "--xl",
        type=Path,
        nargs="?",
        const=HERE / "model_xl",
        metavar="FOLDER",
        help="Storybook-XL, whose own parts lie there beside those of --model",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all models")
    parser.add_argument(
        "--config",
        action="append",
        nargs="*",
        type=parse_argument,
        metavar="NAME=VALUE",
        help="arguments of the pipeline; give it again for another configuration, bare for the defaults",
    )
    parser.add_argument("--paper", action="store_true", help="adds the paper's own configuration")
    parser.add_argument("--sdedit", type=float, nargs="+", default=[], metavar="STRENGTH", help="SDEdit's, 0 to 1")
    parser.add_argument("--others-only", action="store_true", help="leaves out our own answers and the oracle's")
    parser.add_argument("--instruct", type=Path, metavar="FOLDER", help="the UNet that `train.py instruct` wrote")
    parser.add_argument("--visii", action="store_true", help="adds VISII, a minute or more an analogy on a CPU")
    parser.add_argument("--dia", action="store_true", help="adds DIA")
    parser.add_argument(
        "--inpaint", type=Path, metavar="FOLDER", help="Analogist's UNet, which `train.py inpaint` wrote"
    )
    parser.add_argument("--dino", type=Path, metavar="FOLDER", help="of `train.py dino`; adds its directional score")
    parser.add_argument("--output", type=Path, help="a JSON line for each question; those in it are not asked again")
    parser.add_argument("--sheet", type=Path, help="the first setting's first twelve analogies as one picture")
    parser.add_argument("--failures", type=Path, help="the first twelve where the first row's method failed, likewise")
    options = parser.parse_args(arguments)
    if options.visii and not options.instruct:
        parser.error("--visii learns an instruction for the UNet of --instruct; give that too")
    for name in ("visii", "dia"):
        if getattr(options, name) and options.dtype != "float32":
            parser.error(f"--{name} learns in steps that are lost in --dtype bfloat16")
    if options.others_only and (options.config or options.paper):
        parser.error("--others-only leaves out what --config and --paper ask for")
    if options.per_kind < 1:
        parser.error(f"--per-kind is {options.per_kind}; give at least 1")
    if any(not 0 <= strength <= 1 for strength in options.sdedit):
        parser.error(f"--sdedit is {options.sdedit}; strengths are 0 to 1")
    configs = [dict(config) for config in options.config or [[]]] + [PAPER] * options.paper
    options.configs = [] if options.others_only else configs
    options.setting = list(dict.fromkeys(options.setting))
    return options


def check_files(options: argparse.Namespace) -> None:
    """Before hours of answers that could not be written."""
    if options.output:
        check_target(options.output, "--output")
    for name in ("sheet", "failures"):
        if file := getattr(options, name):
            check_picture_target(file, f"--{name}")
    for name, file in FOLDERS.items():
        if folder := getattr(options, name):
            check_model(str(folder), f"--{name}", (file,))


def main(arguments: list[str] | None = None) -> None:
    options, state = parse_options(arguments), PartialState(cpu=not torch.cuda.is_available())
    with told_in_one_line():
        check_files(options)
        pipe = load_pipeline(options.model, state.device, options.xl, DTYPES[options.dtype])
        others = load_others(pipe, options)
        encoders = {"direction": encoder_of(pipe.clip, pipe.clip_processor.image_processor)}
        if options.dino:
            encoders["dino"] = load_encoder(str(options.dino), state.device, "--dino")
    questions = [q for setting in options.setting for q in draw_questions(setting, options.seed, options.per_kind)]
    earlier = read_answers(options.output, questions, options)
    state.wait_for_everyone()  # all have read before anyone writes
    if state.is_main_process and options.output:
        end_last_line(options.output)
    state.wait_for_everyone()
    known = {a.question.place for a in earlier}
    left = [question for question in questions if question.place not in known]
    # Dealt out like cards, so that the first questions are answered first, and every process gets every kind.
    mine = left[state.process_index :: state.num_processes]
    start, answers = time.monotonic(), []
    with open(options.output or os.devnull, "a", buffering=1) as lines:
        for question in tqdm(mine, disable=not state.is_main_process):
            answers.append(answer(pipe, others, encoders, question, options))
            lines.write(json.dumps(json_record(answers[-1])) + "\n")
    seconds = (time.monotonic() - start) / max(1, len(answers))
    order = {question.place: number for number, question in enumerate(questions)}
    answers = sorted([*earlier, *gather_object(answers)], key=lambda a: order[a.question.place])
    if state.is_main_process:
        print(f"seeds {options.seed}; {seconds:.1f} s an analogy and process; {len(earlier)} were answered before\n")
        print(report(answers, options.configs))
        save_sheets(answers, options)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
