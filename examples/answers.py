# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Folders of answers to a file of triplets, one folder for each method, for those who compare methods."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from common import read_picture
from evaluate import PATHS
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class Method:
    """A name for the tables, and the folder of its answers, each named by its triplet's index from 0: 00000.png."""

    name: str
    folder: Path


def parse_method(text: str) -> Method:
    """NAME=FOLDER, or a folder alone, whose name is then the method's."""
    name, named, folder = text.partition("=")
    method = Method(name, Path(folder)) if named and not Path(text).is_dir() else Method(Path(text).name, Path(text))
    if not method.folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {method.folder}; give NAME=FOLDER or FOLDER")
    if not method.name:
        raise argparse.ArgumentTypeError(f"{text!r} gives the method no name; give NAME=FOLDER")
    return method


def add_answers(triplets: list[dict], methods: list[Method], option: str) -> list[dict[str, Path]]:
    """For each triplet the paths of A, A' and B (`before`, `after`, `image`), and of each method's answer, by name.

    Raises:
        SystemExit: if two methods have one name, an answer is missing, or a file is no picture.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names) or set(names) & set(PATHS):
        raise SystemExit(f"{option}: {', '.join(names)} are not names that differ; give NAME=FOLDER")
    for method in methods:
        missing = [path.name for path in answer_paths(method, len(triplets)) if not path.is_file()]
        if missing:
            raise SystemExit(
                f"{option} {method.folder} lacks {len(missing)} of {len(triplets)} answers, the first {missing[0]}"
            )
    answers = zip(*(answer_paths(method, len(triplets)) for method in methods), strict=True)
    answered = [
        {name: triplet[name] for name in PATHS} | dict(zip(names, paths, strict=True))
        for triplet, paths in zip(triplets, answers, strict=True)
    ]
    for path in dict.fromkeys(path for paths in answered for path in paths.values()):
        check_picture(path)
    return answered


def answer_paths(method: Method, count: int) -> list[Path]:
    return [method.folder / f"{index:05d}.png" for index in range(count)]


def check_picture(path: Path) -> None:
    """To its last byte: a picture that was cut short would stop a long run."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except UnidentifiedImageError as error:
        raise SystemExit(f"{path} is no picture") from error
    except (OSError, SyntaxError) as error:  # Pillow's readers raise either
        raise SystemExit(f"{path} is a damaged picture: {error}") from error


def read_square(path: Path, largest: int) -> Image.Image:
    """A picture cut to a square from its middle, as `evaluate.py` cuts what it answers (at most `largest` pixels)."""
    picture = read_picture(str(path))
    side = min(*picture.size, largest)
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
