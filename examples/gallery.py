# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Draws the README's sheet of what the parameters do, with the quickstart's pictures.

python examples/gallery.py examples/images/parameters.png
"""

import sys

import torch
from common import IMAGES, STORYBOOK, load_pipeline, make_sheet, open_image
from figures import sweep_row


VARIATIONS = {
    "difference_scale": (0.0, 0.25, 0.5, 0.75, 1.0),
    "guidance_scale": (0.5, 1.0, 2.0, 4.0, 8.0),
    "strength": (0.05, 0.1, 0.2, 0.4, 0.9),
}


def main(path: str) -> None:
    pipe = load_pipeline(str(STORYBOOK))
    pipe.set_progress_bar_config(disable=True)
    before, after, query = (open_image(str(IMAGES / f"{name}.png"), 128) for name in ("before", "after", "query_1"))
    difference = pipe.invert_difference(before, after, generator=torch.Generator().manual_seed(0))
    # Without the query, which is what the first picture of the first row shows.
    rows = [sweep_row(pipe, query, difference, name, values)[1:] for name, values in VARIATIONS.items()]
    make_sheet(rows).save(path)


if __name__ == "__main__":
    main(sys.argv[1])
