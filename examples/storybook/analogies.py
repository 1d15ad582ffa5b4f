# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Image analogies whose right answer is known, and the judge that scores an answer."""

import dataclasses
import random

import numpy as np
from PIL import Image
from world import ATTRIBUTES, PICTURE_SIZE, Scene, random_scene, render


@dataclasses.dataclass(frozen=True)
class Analogy:
    """before : after :: query : target. Only the attribute `kind` differs between the scenes of each pair."""

    kind: str
    before: Scene
    after: Scene
    query: Scene
    target: Scene


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a picture shows, by the nearest of the candidate scenes.

    Attributes:
        success: the nearest scene is the target.
        kept: every attribute but the changed one is the query's.
        psnr: decibels against the target picture.
    """

    success: bool
    kept: bool
    psnr: float


def random_analogy(rng: random.Random, kind: str | None = None) -> Analogy:
    """Draws a pair that differs in one attribute, and a query that has the pair's old value of it but differs from
    the pair in layout and in at least one other attribute. `kind` fixes which attribute changes."""
    kind = kind or rng.choice(list(ATTRIBUTES))
    before = random_scene(rng)
    new_value = rng.choice([value for value in ATTRIBUTES[kind] if value != getattr(before, kind)])
    query = dataclasses.replace(random_scene(rng), **{kind: getattr(before, kind)})
    while all(getattr(query, name) == getattr(before, name) for name in ATTRIBUTES):
        query = dataclasses.replace(random_scene(rng), **{kind: getattr(before, kind)})
    after, target = (dataclasses.replace(scene, **{kind: new_value}) for scene in (before, query))
    return Analogy(kind, before, after, query, target)


def neighbours(scene: Scene) -> list[Scene]:
    """Every scene that differs from this one in exactly one attribute."""
    return [
        dataclasses.replace(scene, **{name: value})
        for name, values in ATTRIBUTES.items()
        for value in values
        if value != getattr(scene, name)
    ]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def judge(image: Image.Image, analogy: Analogy) -> Verdict:
    """Finds what a picture shows among the target, the query and every scene one attribute away from either.

    The distance is the mean squared error over pixels; captions and the diffusion model have no say in it.

    Args:
        image: the answer, 128×128 pixels, any mode.
        analogy: the question.

    Raises:
        ValueError: if the picture has another size.
    """
    if image.size != (PICTURE_SIZE, PICTURE_SIZE):
        raise ValueError(f"`image` is {image.size[0]}×{image.size[1]}; the judge takes {PICTURE_SIZE}×{PICTURE_SIZE}.")
    answer = _pixels(image)
    candidates = {analogy.target, analogy.query, *neighbours(analogy.target), *neighbours(analogy.query)}
    errors = {scene: float(np.mean((answer - _pixels(render(scene))) ** 2)) for scene in candidates}
    nearest = min(errors, key=errors.get)
    return Verdict(
        success=nearest == analogy.target,
        kept=all(
            getattr(nearest, name) == getattr(analogy.query, name) for name in ATTRIBUTES if name != analogy.kind
        ),
        psnr=float(-10 * np.log10(max(errors[analogy.target], 1e-10))),
    )
