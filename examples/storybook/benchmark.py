# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores the pipeline on fresh image analogies whose right answers are known.

    python examples/storybook/benchmark.py --seed 1 --per-kind 20

Each analogy is answered from its three pictures alone, with the captioner's prompts and default settings. Beside it
stand an oracle, which is given the true caption of the answer on the query inverted likewise, and no change at all.
`--set num_tokens=8 --set guidance_scale=2` tries other settings, `--output FILE.jsonl` keeps every verdict, and
`--sheet FILE.png` shows the first analogies as they came: A, A', B, answer, oracle, target.
"""

import argparse
import ast
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
from analogies import Analogy, Verdict, judge, random_analogy
from diffusers.utils import make_image_grid
from tqdm import tqdm
from world import ATTRIBUTES, describe, render


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from pipeline_difference_inversion import DifferenceInversionPipeline  # noqa: E402


@dataclasses.dataclass
class Answer:
    """One analogy's pictures and verdicts, by method."""

    analogy: Analogy
    pictures: dict
    verdicts: dict[str, Verdict]


def load_pipeline(folder: Path) -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def answer(pipe: DifferenceInversionPipeline, analogy: Analogy, settings: dict, seed: int) -> Answer:
    """The pipeline's, the oracle's and the lazy answer to one analogy."""
    before, after, query = (render(scene) for scene in (analogy.before, analogy.after, analogy.query))
    generator = torch.Generator().manual_seed(seed)
    applying = {name: value for name, value in settings.items() if name in APPLYING}
    pictures = {
        "difference": pipe(image=query, before=before, after=after, generator=generator, **settings).images[0],
        "oracle": pipe(
            image=query,
            source_prompt=pipe.caption([query]),
            prompt=describe(analogy.target),
            generator=generator,
            **applying,
        ).images[0],
        "no change": query,
    }
    return Answer(analogy, pictures, {method: judge(picture, analogy) for method, picture in pictures.items()})


APPLYING = ("num_inference_steps", "guidance_scale", "inversion", "strength", "eta")


def table(answers: list[Answer]) -> str:
    """Rates and mean PSNR by kind of change, in Markdown."""
    methods = list(answers[0].verdicts)
    lines = ["| kind | n | " + " | ".join(f"{method}: success | kept | PSNR" for method in methods) + " |"]
    lines.append("|---|---|" + "---|---|---|" * len(methods))
    for kind in (*ATTRIBUTES, "all"):
        chosen = [a for a in answers if kind in ("all", a.analogy.kind)]
        if not chosen:
            continue
        cells = []
        for method in methods:
            verdicts = [a.verdicts[method] for a in chosen]
            mean = [sum(getattr(v, field) for v in verdicts) / len(verdicts) for field in ("success", "kept", "psnr")]
            cells += [f"{mean[0]:.2f}", f"{mean[1]:.2f}", f"{mean[2]:.1f} dB"]
        lines.append(f"| {kind} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def json_line(a: Answer) -> str:
    verdicts = {method: dataclasses.asdict(verdict) for method, verdict in a.verdicts.items()}
    return json.dumps(dataclasses.asdict(a.analogy) | verdicts) + "\n"


def make_sheet(answers: list[Answer]):
    """A, A', B, the answer, the oracle's and the target, an analogy to a row, two to a line."""
    tiles = []
    for a in answers:
        before, after, query, target = (render(getattr(a.analogy, x)) for x in ("before", "after", "query", "target"))
        tiles += [before, after, query, a.pictures["difference"], a.pictures["oracle"], target]
    return make_image_grid(tiles, rows=len(answers) // 2, cols=12)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-kind", type=int, default=20, help="analogies of each of the six kinds")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the pipeline")
    parser.add_argument("--output", type=Path, help="a JSON line for each analogy")
    parser.add_argument("--sheet", type=Path, help="the first twelve analogies as one picture")
    return parser.parse_args()


def parse_setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main() -> None:
    options = parse_options()
    settings = dict(parse_setting(text) for text in options.set)
    pipe = load_pipeline(options.model)
    rng = random.Random(f"benchmark {options.seed}")
    analogies = [random_analogy(rng, kind) for _ in range(options.per_kind) for kind in ATTRIBUTES]
    start = time.monotonic()
    answers = []
    with open(options.output or os.devnull, "w", buffering=1) as lines:
        for seed, analogy in enumerate(tqdm(analogies)):
            answers.append(answer(pipe, analogy, settings, seed))
            lines.write(json_line(answers[-1]))
    seconds = (time.monotonic() - start) / len(answers)
    print(f"seed {options.seed}, settings {settings or 'default'}, {seconds:.1f} s an analogy\n\n{table(answers)}")
    if options.sheet:
        make_sheet(answers[:12]).save(options.sheet)


if __name__ == "__main__":
    main()
