# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores the pipeline on fresh image analogies whose right answers are known.

    python examples/storybook/benchmark.py --seed 1 2 --per-kind 20

Each analogy is answered from its three pictures alone, with the captioner's prompts and default settings. Beside it
stand an oracle, which is given the true caption of the answer on the query inverted likewise, and no change at all.
Rates have their 95 % Wilson intervals behind them; `direction` is the paper's directional score, by Storybook's CLIP.
`--sdedit 0.6 0.8` adds stock diffusers' image to image at these strengths, which is given the true caption as well.

Other settings, several at once on the same analogies, each `--config` one row of the table and a bare one the defaults:

    python examples/storybook/benchmark.py --seed 301 --config --config num_tokens=8 --config init=zeros guidance_scale=2

`--output FILE.jsonl` keeps every verdict as it comes, and `--sheet FILE.png` shows the first twelve analogies: A, A', B,
the answer of each configuration, the oracle's, and the target. `torchrun --nproc_per_node 2` in place of `python`, with
OMP_NUM_THREADS=1, shares the analogies out between two CPU cores. Seeds from 300 on are for choosing settings, and those
below for reporting them.
"""

import argparse
import ast
import dataclasses
import inspect
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from analogies import Analogy, Verdict, judge, random_analogy
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm
from world import ATTRIBUTES, describe, render


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from evaluate import Encoder, directional_score, encoder_of  # noqa: E402

from pipeline_difference_inversion import DifferenceInversionPipeline  # noqa: E402


APPLYING = ("num_inference_steps", "guidance_scale", "inversion", "strength", "eta")
NO_CHANGE = "no change"
SDEDIT_GUIDANCE_SCALE = 2.0  # at which Storybook's text to image is scored
Z = statistics.NormalDist().inv_cdf(0.975)  # of a 95 % interval


@dataclasses.dataclass
class Answer:
    """One analogy's pictures and their scores, by method."""

    analogy: Analogy
    seed: int
    index: int
    pictures: dict[str, Image.Image]
    verdicts: dict[str, Verdict]
    directions: dict[str, float]  # directional scores, by Storybook's CLIP


def load_pipeline(folder: Path, device: torch.device) -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


# ----------------------------------------------------------------------------------------------------- answering


def draw_analogies(seeds: list[int], per_kind: int) -> list[tuple[int, int, Analogy]]:
    """The same number of every kind from each seed, with the seed and the place in its order."""
    drawn = []
    for seed in seeds:
        rng = random.Random(f"benchmark {seed}")
        kinds = list(ATTRIBUTES) * per_kind
        drawn += [(seed, index, random_analogy(rng, kind)) for index, kind in enumerate(kinds)]
    return drawn


def name_of(config: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items()) or "default"


def applying(config: dict) -> dict:
    return {name: value for name, value in config.items() if name in APPLYING}


def oracle_name(config: dict, configs: list[dict]) -> str:
    """One oracle for all configurations that apply differences alike."""
    alike = all(applying(other) == applying(config) for other in configs)
    return "oracle" if alike else f"oracle, {name_of(applying(config))}"


def answer(pipe: DifferenceInversionPipeline, analogy: Analogy, index: int, options: argparse.Namespace) -> dict:
    """Every method's picture for one analogy, by name."""
    before, after, query = (render(scene) for scene in (analogy.before, analogy.after, analogy.query))
    truth, pictures, references = describe(analogy.target), {}, {}
    for config in options.configs:
        generator = torch.Generator().manual_seed(index)
        out = pipe(image=query, before=before, after=after, generator=generator, **config)
        pictures[name_of(config)] = out.images[0]
        name = oracle_name(config, options.configs)
        if name not in references:
            words = {"source_prompt": pipe.caption([query]), "prompt": truth}
            references[name] = pipe(image=query, **words, **applying(config)).images[0]
    for strength in options.sdedit:
        generator = torch.Generator().manual_seed(index)
        references[f"SDEdit, {strength:g}"] = sdedit(pipe)(
            truth, query, strength, guidance_scale=SDEDIT_GUIDANCE_SCALE, generator=generator
        ).images[0]
    return pictures | references | {NO_CHANGE: query}


def sdedit(pipe: DifferenceInversionPipeline) -> StableDiffusionImg2ImgPipeline:
    """Stock diffusers' image to image with the same parts."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    stock = StableDiffusionImg2ImgPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def scored(encode: Encoder, seed: int, index: int, analogy: Analogy, pictures: dict) -> Answer:
    verdicts = {name: judge(picture, analogy) for name, picture in pictures.items()}
    known = [render(scene) for scene in (analogy.before, analogy.after, analogy.query)]
    directions = {name: directional_score(encode, *known, picture) for name, picture in pictures.items()}
    return Answer(analogy, seed, index, pictures, verdicts, directions)


# ----------------------------------------------------------------------------------------------------- reporting


def wilson(rate: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate that was seen in `count` trials."""
    middle = (rate + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * (rate * (1 - rate) / count + Z * Z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def rate_cell(outcomes: Iterable[bool]) -> str:
    outcomes = list(outcomes)
    rate = sum(outcomes) / len(outcomes)
    return "{:.2f} ({:.2f} to {:.2f})".format(rate, *wilson(rate, len(outcomes)))


def table(answers: list[Answer]) -> str:
    """Rates and means by kind of change and method, in Markdown."""
    lines = ["| kind | n | method | success | kept | PSNR | direction |", "|---|---|---|---|---|---|---|"]
    for kind in ("all", *ATTRIBUTES):
        chosen = [a for a in answers if kind in ("all", a.analogy.kind)]
        for method in chosen[0].verdicts if chosen else ():
            verdicts = [a.verdicts[method] for a in chosen]
            success, kept = rate_cell(v.success for v in verdicts), rate_cell(v.kept for v in verdicts)
            psnr = statistics.mean(v.psnr for v in verdicts)
            direction = statistics.mean(a.directions[method] for a in chosen)
            cells = [kind, len(chosen), method, success, kept, f"{psnr:.1f} dB", f"{direction:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def json_line(a: Answer) -> str:
    methods = {name: dataclasses.asdict(v) | {"direction": a.directions[name]} for name, v in a.verdicts.items()}
    return json.dumps({"seed": a.seed, "index": a.index, **dataclasses.asdict(a.analogy), "methods": methods}) + "\n"


def make_sheet(answers: list[Answer]) -> Image.Image:
    """A, A', B, the answers, the oracle's and the target; an analogy to a row, or two where there is room."""
    rows = []
    for a in answers:
        before, after, query, target = (render(getattr(a.analogy, x)) for x in ("before", "after", "query", "target"))
        answered = [picture for method, picture in a.pictures.items() if method != NO_CHANGE]
        rows.append([before, after, query, *answered, target])
    if len(rows[0]) == 6 and len(rows) % 2 == 0:
        rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
    return make_image_grid(sum(rows, []), rows=len(rows), cols=len(rows[0]))


# ---------------------------------------------------------------------------------------------------------- main


def parse_setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    if name not in inspect.signature(DifferenceInversionPipeline.__call__).parameters:
        raise argparse.ArgumentTypeError(f"the pipeline has no argument {name!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the analogies; several are run together")
    parser.add_argument("--per-kind", type=int, default=20, help="analogies of each of the six kinds from each seed")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument(
        "--config",
        action="append",
        nargs="*",
        type=parse_setting,
        metavar="NAME=VALUE",
        help="arguments of the pipeline; give it again for another configuration, bare for the defaults",
    )
    parser.add_argument("--sdedit", type=float, nargs="+", default=[], metavar="STRENGTH", help="SDEdit's, 0 to 1")
    parser.add_argument("--output", type=Path, help="a JSON line for each analogy")
    parser.add_argument("--sheet", type=Path, help="the first twelve analogies as one picture")
    options = parser.parse_args()
    options.configs = [dict(config) for config in options.config or [[]]]
    return options


def main() -> None:
    options, state = parse_options(), PartialState(cpu=not torch.cuda.is_available())
    pipe = load_pipeline(options.model, state.device)
    encode = encoder_of(pipe.clip, pipe.clip_processor.image_processor)
    analogies = draw_analogies(options.seed, options.per_kind)
    output = options.output or os.devnull
    if state.is_main_process:
        open(output, "w").close()
    state.wait_for_everyone()
    start, answers = time.monotonic(), []
    # Dealt out like cards, so that the first analogies are answered first, and every process gets every kind.
    mine = analogies[state.process_index :: state.num_processes]
    with open(output, "a", buffering=1) as lines:
        for seed, index, analogy in tqdm(mine, disable=not state.is_main_process):
            answers.append(scored(encode, seed, index, analogy, answer(pipe, analogy, index, options)))
            lines.write(json_line(answers[-1]))
    seconds = (time.monotonic() - start) / max(1, len(answers))
    answers = sorted(gather_object(answers), key=lambda a: (options.seed.index(a.seed), a.index))
    if state.is_main_process:
        print(f"seeds {options.seed}; {seconds:.1f} s an analogy and process\n\n{table(answers)}")
        if options.sheet:
            make_sheet(answers[:12]).save(options.sheet)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
