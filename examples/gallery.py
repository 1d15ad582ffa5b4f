# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Draws the README's sheet of what the parameters do, with the quickstart's pictures.

    python examples/gallery.py examples/images/parameters.png

Each row is the query with one difference, drawn with other values of one parameter, all others at their defaults. A
`difference_scale` of 0 is no change.
"""

import argparse
from pathlib import Path

import torch
from common import (
    IMAGES,
    STORYBOOK,
    check_picture_target,
    load_pipeline,
    make_sheet,
    picture_size,
    read_picture,
    told_in_one_line,
)
from figures import sweep_row
from PIL import ImageOps


VARIATIONS = {
    "difference_scale": (0.0, 0.25, 0.5, 0.75, 1.0),
    "guidance_scale": (0.5, 1.0, 2.0, 4.0, 8.0),
    "strength": (0.05, 0.1, 0.2, 0.4, 0.9),
}


@told_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture to write, such as parameters.png")
    file = check_picture_target(parser.parse_args(arguments).file, "FILE")
    names = ("before", "after", "query_1")
    pictures = [read_picture(str(IMAGES / f"{name}.png"), "the quickstart's picture") for name in names]

    pipe = load_pipeline(str(STORYBOOK))
    pipe.set_progress_bar_config(disable=True)
    size = picture_size(pipe)
    before, after, query = (ImageOps.fit(picture, (size, size)) for picture in pictures)
    difference = pipe.invert_difference(before, after, generator=torch.Generator().manual_seed(0))
    # Without the query, which is what the first picture of the first row shows.
    rows = [sweep_row(pipe, query, difference, name, values)[1:] for name, values in VARIATIONS.items()]
    make_sheet(rows).save(file)


if __name__ == "__main__":
    main()
