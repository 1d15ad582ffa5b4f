# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Folders of answers to a file of triplets, one folder for each method, for those who compare methods."""

from dataclasses import dataclass
from pathlib import Path

from common import parse_named_folder, read_picture
from evaluate import PICTURES, find_answers
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class Method:
    """A name for the tables, and the folder of its answers, whose names are as `evaluate.py` takes them."""

    name: str
    folder: Path


def parse_method(text: str) -> Method:
    return Method(*parse_named_folder(text))


def add_answers(triplets: list[dict], methods: list[Method], option: str) -> list[dict[str, Path]]:
    """For each triplet the paths of A, A' and B (`before`, `after`, `image`), and of each method's answer, by name.

    Raises:
        ValueError: if two methods have one name, an answer is missing, or a file is no picture.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names) or set(names) & set(PICTURES):
        raise ValueError(f"{option}: {', '.join(names)} are not names that differ; give NAME=FOLDER")
    answers = zip(*(find_answers(method.name, method.folder, triplets, option) for method in methods), strict=True)
    answered = [
        {name: Path(triplet[name]) for name in PICTURES} | dict(zip(names, paths, strict=True))
        for triplet, paths in zip(triplets, answers, strict=True)
    ]
    for path in dict.fromkeys(path for paths in answered for path in paths.values()):
        check_whole(path)
    return answered


def check_whole(path: Path) -> None:
    """To its last byte: a picture that was cut short would stop a long run."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture") from error
    except (OSError, SyntaxError) as error:  # Pillow's readers raise either
        raise ValueError(f"{path} is a damaged picture: {error}") from error


def read_square(path: Path, largest: int) -> Image.Image:
    """A picture cut to a square from its middle, as `evaluate.py` cuts what it answers (at most `largest` pixels)."""
    picture = read_picture(str(path), "a picture to show")
    side = min(*picture.size, largest)
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
