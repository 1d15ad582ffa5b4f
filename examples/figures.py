# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Pictures that explain a difference: how its losses fell, what a parameter does, and where it acts in a query.

    python examples/figures.py --output outputs
    python examples/figures.py --before a.png --after a2.png --image b.png --output outputs
    python examples/figures.py --difference d.safetensors --image b.png --sweep strength=0.3,0.6,0.9 --output outputs

Writes a picture for each, and `explained.png` with all of them. Without `--difference` it learns one first, by default
from the quickstart's pair, saves it, and draws its losses as well. In a program, these return PIL images:

    sweep(pipe, image, difference, "difference_scale", (0.25, 0.5, 0.75, 1))
    show_where(pipe, image, difference)
    plot_losses(losses)  # what `callback_on_optimization_step` was given at each step
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    DRAWING,
    IMAGES,
    LEARNING,
    STORYBOOK,
    answer,
    fit_picture,
    learn,
    learning_settings,
    load_pipeline,
    make_folder,
    make_sheet,
    parse_setting,
    picture_size,
    read,
    read_difference,
    read_settings,
    told_in_one_line,
)
from PIL import Image, ImageOps

from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


try:
    from matplotlib.figure import Figure
except ImportError:  # the losses alone are drawn with it
    Figure = None

CYCLE = 4  # Steps after which learning from words has used all its noises; other learning draws new ones at each step.
# In latents, over all steps: with less, rounding would be what is seen. Storybook's own move by about 1.3 at most.
LEAST_MOVED = 0.05
SWEEPS = ["difference_scale=0.3,0.6,1.0", "guidance_scale=0.5,2.0,4.0"]


# ------------------------------------------------------------------------------------------------ a parameter


def sweep(
    pipe: DifferenceInversionPipeline,
    image: Image.Image,
    difference: Any,
    parameter: str,
    values: Sequence,
    **settings,
) -> Image.Image:
    """A row of pictures: the query, and its answer at each value of one argument of the pipeline's call.

    Each answer has the same seed. `settings` are `seed` and other arguments of the call.
    """
    return make_sheet([sweep_row(pipe, image, difference, parameter, values, **settings)])


def sweep_row(
    pipe: DifferenceInversionPipeline,
    image: Image.Image,
    difference: Any,
    parameter: str,
    values: Sequence,
    *,
    seed: int = 0,
    **settings,
) -> list[tuple[str, Image.Image]]:
    """The same with its labels, as a row for `make_sheet`."""
    answers = (answer(pipe, image, difference, seed, **settings | {parameter: value}) for value in values)
    return [("B", image), *((f"{parameter} {value}", each) for value, each in zip(values, answers, strict=True))]


# ------------------------------------------------------------------------------------------------ where it acts


def show_where(pipe: DifferenceInversionPipeline, image: Image.Image, difference: Any, **settings) -> Image.Image:
    """The query in grey, and over it, the brighter the more the difference acts there.

    `settings` are those of `places`.
    """
    heat = Image.fromarray(places(pipe, image, difference, **settings).mul(255).byte().numpy())
    heat = heat.resize(image.size, Image.Resampling.BICUBIC)
    glow = ImageOps.colorize(heat, black="#1b0c41", mid="#ed6925", white="#fcffa4")
    grey = image.convert("L").point(lambda value: value * 0.7)
    return Image.composite(glow, grey.convert("RGB"), heat.point(lambda value: min(255, 40 + value * 1.3)))


def places(
    pipe: DifferenceInversionPipeline,
    image: Image.Image,
    difference: Any,
    *,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    **settings,
) -> torch.Tensor:
    """How much the difference moves the query's latents at each place: (height, width) in latents, 0 to 1.

    The query is drawn twice. A black mask keeps one on the way that leads back to it. At each step the other sets out
    from there too, and what lies between them after the step is the difference's doing.

    `settings` are other arguments of the pipeline's call, such as `prompt` and `num_inference_steps`; a `difference_scale` is 1 or
    -1. `stopped` is asked after each step whether to leave out the rest.
    """
    moved = []

    def compare(pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        kept, changed = tensors["latents"]
        moved.append((changed - kept).float().abs().mean(0))
        pipe._interrupt = stopped()
        return {"latents": torch.stack([kept, kept])}

    pipe(
        image=[image, image],
        difference=difference,
        mask_image=[Image.new("L", image.size, color) for color in ("black", "white")],
        generator=[torch.Generator().manual_seed(seed) for _ in range(2)],
        callback_on_step_end=compare,
        output_type="latent",
        **settings,
    )
    total = sum(moved).cpu()
    return total / total.max().clamp(min=LEAST_MOVED)


# --------------------------------------------------------------------------------------------------- the losses


def plot_losses(losses: Sequence[dict[str, Any]], size: tuple[int, int] = (960, 320)) -> Image.Image:
    """Each loss by step: a point for a step, and a line for the mean of the last four.

    The points jump, because each step has noises of its own; the line says what is learned.

    Args:
        losses: the values that `callback_on_optimization_step` was given at each step.
        size: of the picture, in pixels.
    """
    if Figure is None:
        raise ImportError('plot_losses needs matplotlib: pip install -e ".[demo]"')
    if not losses:
        raise ValueError("`losses` is empty: learning took no step")
    names = [name for name in losses[0] if name.endswith("loss")]
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [step[name] for step in losses]
        steps = range(1, len(values) + 1)
        means = [sum(values[end - CYCLE : end]) / CYCLE for end in steps[CYCLE - 1 :]]
        axes.plot(steps, values, "o", color="#f4a261", markersize=4)
        axes.plot(steps[CYCLE - 1 :], means, color="#264653", linewidth=2)
        axes.set_title(name.replace("_", " ").replace("clip", "CLIP"))
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


# --------------------------------------------------------------------------------------------------- the script


def arrange(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures, each in its own size, on white."""
    heights = [max(picture.height for picture in row) for row in rows]
    width = max(sum(picture.width for picture in row) for row in rows)
    whole, top = Image.new("RGB", (width, sum(heights)), "white"), 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            whole.paste(picture, (left, top))
            left += picture.width
        top += height
    return whole


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--difference", help="a learned difference: a file, a folder or a Hub name")
    parser.add_argument("--before", help="picture A, to learn from; a path or an address")
    parser.add_argument("--after", help="picture A', the same after the change")
    parser.add_argument("--before-prompt", help="describes --before; by default the captioner does")
    parser.add_argument("--after-prompt", help="describes --after")
    parser.add_argument("--image", default=str(IMAGES / "query_1.png"), help="the query B")
    parser.add_argument("--prompt", help="describes --image")
    parser.add_argument(
        "--sweep", nargs="+", default=SWEEPS, metavar="NAME=V1,V2,…", help=f"default: {' '.join(SWEEPS)}"
    )
    parser.add_argument(
        "--config", nargs="+", metavar="NAME=VALUE", help="the README's parameters, such as init=random"
    )
    parser.add_argument("--model", default=str(STORYBOOK), help="a Stable Diffusion's folder or Hub name")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def check_pair(options: argparse.Namespace) -> None:
    """A difference or a pair is given, or neither, which is the quickstart's pair."""
    pair = [options.before, options.after]
    if options.difference and any(pair):
        raise ValueError("--difference is learned already; leave out --before and --after, or leave out --difference")
    if any(pair) and not all(pair):
        raise ValueError("--before and --after belong together; give both")
    if not options.difference and Figure is None:
        raise ValueError('the losses need matplotlib: pip install -e ".[demo]", or give --difference')
    if not options.difference and not any(pair):
        options.before, options.after = str(IMAGES / "before.png"), str(IMAGES / "after.png")


def read_sweeps(texts: list[str]) -> dict[str, tuple]:
    """The values of each parameter by its name."""
    known, sweeps = ("difference_scale", *DRAWING), {}
    for name, values in map(parse_setting, texts):
        if name not in known:
            raise ValueError(f"--sweep: there is no parameter {name!r}; known are {', '.join(known)}")
        if values == "":
            raise ValueError(f"--sweep: give {name} its values, such as {name}=0.5,1.0")
        values = values.split(",") if isinstance(values, str) else values
        sweeps[name] = values if isinstance(values, (list, tuple)) else (values,)
    return sweeps


def draw(options: argparse.Namespace) -> list[Path]:
    """Checks what was asked, and draws it; returns the files."""
    check_pair(options)
    sweeps = read_sweeps(options.sweep)
    settings = read_settings(options.config, DRAWING if options.difference else (*LEARNING, *DRAWING))
    learning = {name: value for name, value in settings.items() if name in LEARNING}
    drawing = {name: value for name, value in settings.items() if name in DRAWING} | {"prompt": options.prompt}
    learning_settings(learning)
    given = [("--image", options.image)]
    if options.difference:
        difference = read_difference(options.difference)
    else:
        given += [("--before", options.before), ("--after", options.after)]
    pictures = [read(*each) for each in given]
    make_folder(options.output)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    query, *pair = (fit_picture(picture, picture_size(pipe), path) for path, picture in pictures)

    losses = []
    if pair:
        learning |= {"before_prompt": options.before_prompt, "after_prompt": options.after_prompt}
        difference, losses = learn_watched(pipe, pair, options.output, options.seed, learning)
    drawn = {
        name: sweep(pipe, query, difference, name, values, seed=options.seed, **drawing)
        for name, values in sweeps.items()
    }
    where = show_where(pipe, query, difference, seed=options.seed, **drawing)
    rows, last = [[picture] for picture in drawn.values()], make_sheet([[("where it acts", where)]])
    drawn["where"] = make_sheet([[("B", query), ("where it acts", where)]])
    if losses:
        rest = max(picture.width for picture in drawn.values()) - last.width
        drawn["losses"] = plot_losses(losses, (max(rest, 800), last.height))
        rows.append([last, drawn["losses"]])
    else:
        rows.append([last])
    return save(drawn | {"explained": arrange(rows)}, options.output)


def learn_watched(
    pipe: DifferenceInversionPipeline, pair: list[Image.Image], folder: Path, seed: int, settings: dict
) -> tuple[DifferenceTokens, list[dict]]:
    """The difference, which is saved, and the losses of each step."""
    losses = []
    settings = settings | {"callback_on_optimization_step": lambda pipe, step, values: losses.append(values)}
    difference, path = learn(pipe, *pair, folder / "difference.safetensors", seed, **settings)
    print(f"{path.resolve()}\n{difference}")
    return difference, losses


def save(pictures: dict[str, Image.Image], folder: Path) -> list[Path]:
    paths = [folder / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        picture.save(path, optimize=True)
    return paths


@told_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    for path in draw(parse_options(arguments)):
        print(path.resolve())


if __name__ == "__main__":
    main()
