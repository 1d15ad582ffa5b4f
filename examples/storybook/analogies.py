# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Image analogies whose right answer is known, and the judge that scores an answer."""

import dataclasses
import functools
import random

import numpy as np
from PIL import Image
from world import ATTRIBUTES, BLEND, PICTURE_SIZE, Scene, random_scene, render


# Values half way between two, which no word names. Only those that the judge still knows after the VAE, which was trained
# on plain values and draws what is near one of them as that one. All reconstructions of 70 pictures of each of these were
# nearest to their own blend. Against plain values alone that held for 87 % of red+yellow, 87 % of blue+yellow, 37 % of
# blue+purple and 53 % of painting+pixel art. After the VAE, red+purple looks like red+blue or blue+yellow, and pixel
# art+pencil sketch like painting+pencil sketch.
BLENDS: dict[str, tuple[str, ...]] = {"color": ("red+blue", "yellow+purple"), "style": ("painting+pencil sketch",)}


@dataclasses.dataclass(frozen=True)
class Analogy:
    """before : after :: query : target. Only the attributes `kinds` differ between the scenes of each pair.

    `kind` is the first of them, and by default the only one.
    """

    kind: str
    before: Scene
    after: Scene
    query: Scene
    target: Scene
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.kinds:
            object.__setattr__(self, "kinds", (self.kind,))  # the way to set a field of a frozen dataclass


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a picture shows, by the nearest of the candidate scenes.

    Attributes:
        success: the nearest scene is the target.
        kept: every attribute but the changed ones is the query's.
        psnr: decibels against the target picture.
    """

    success: bool
    kept: bool
    psnr: float


def random_analogy(rng: random.Random, kind: str | None = None, second_kind: str | None = None) -> Analogy:
    """Draws a pair that differs in one attribute, and a query that has the pair's old value of it but differs from
    the pair in layout and in at least one other attribute.

    Args:
        rng: what draws.
        kind: the attribute that changes; drawn if not given.
        second_kind: another attribute that changes with it, if any.
    """
    kind = kind or rng.choice(list(ATTRIBUTES))
    kinds = (kind,) if second_kind is None else (kind, second_kind)
    before = random_scene(rng)
    changes = {
        name: rng.choice([value for value in ATTRIBUTES[name] if value != getattr(before, name)]) for name in kinds
    }
    return _analogy(rng, before, changes)


def random_wordless_analogy(rng: random.Random, kind: str) -> Analogy:
    """Draws an analogy whose change no word names: `kind` goes from a plain value to one of BLENDS.

    The plain value may be one of the two that the blend lies between.
    """
    return _analogy(rng, random_scene(rng), {kind: rng.choice(BLENDS[kind])})


def _analogy(rng: random.Random, before: Scene, changes: dict[str, str]) -> Analogy:
    """The analogy that makes these changes to `before` and to a query, which is drawn."""
    old = {name: getattr(before, name) for name in changes}
    query = dataclasses.replace(random_scene(rng), **old)
    while all(getattr(query, name) == getattr(before, name) for name in ATTRIBUTES):
        query = dataclasses.replace(random_scene(rng), **old)
    after, target = (dataclasses.replace(scene, **changes) for scene in (before, query))
    kinds = tuple(changes)
    return Analogy(kinds[0], before, after, query, target, kinds)


def _chosen(kind: str, value: str, before: Scene, query: Scene) -> Analogy:
    after, target = (dataclasses.replace(scene, **{kind: value}) for scene in (before, query))
    return Analogy(kind, before, after, query, target)


# Chosen by hand, to show and to try.
EXAMPLES: dict[str, Analogy] = {
    "cabin → castle": _chosen(
        "subject",
        "castle",
        Scene("cabin", "red", "grass", "day", "nothing", "painting", x=0.51, size=0.48, horizon=0.59),
        Scene("cabin", "blue", "snow", "sunset", "nothing", "painting", x=0.39, size=0.46, horizon=0.59),
    ),
    "day → night": _chosen(
        "sky",
        "night",
        Scene("windmill", "blue", "grass", "day", "nothing", "painting", x=0.50, size=0.44, horizon=0.60),
        Scene("castle", "yellow", "desert", "day", "nothing", "painting", x=0.46, size=0.49, horizon=0.60),
    ),
    "a rainbow": _chosen(
        "extra",
        "rainbow",
        Scene("tent", "red", "snow", "day", "nothing", "painting", x=0.40, size=0.48, horizon=0.61),
        Scene("boat", "purple", "water", "day", "nothing", "painting", x=0.39, size=0.49, horizon=0.65),
    ),
    "red → yellow": _chosen(
        "color",
        "yellow",
        Scene("tent", "red", "desert", "day", "nothing", "painting", x=0.42, size=0.47, horizon=0.60),
        Scene("windmill", "red", "grass", "sunset", "nothing", "painting", x=0.49, size=0.47, horizon=0.62),
    ),
    "painting → pixel art": _chosen(
        "style",
        "pixel art",
        Scene("castle", "purple", "grass", "day", "nothing", "painting", x=0.43, size=0.47, horizon=0.62),
        Scene("cabin", "yellow", "desert", "sunset", "balloon", "painting", x=0.40, size=0.47, horizon=0.60),
    ),
}


def neighbours(scene: Scene) -> list[Scene]:
    """Every scene that differs from this one in exactly one attribute, with no value but the plain ones."""
    return [
        dataclasses.replace(scene, **{name: value})
        for name, values in ATTRIBUTES.items()
        for value in values
        if value != getattr(scene, name)
    ]


def candidates(analogy: Analogy) -> set[Scene]:
    """The scenes that an answer is compared with: the target, the query and every scene one attribute from either.

    Where two attributes change, the scenes half way, with only one of the two changed, are among them. Where the target
    has a blend, so are all other blends of the same attribute.
    """
    scenes = {analogy.target, analogy.query, *neighbours(analogy.target), *neighbours(analogy.query)}
    if BLEND in getattr(analogy.target, analogy.kind):
        scenes |= {dataclasses.replace(analogy.query, **{analogy.kind: blend}) for blend in BLENDS[analogy.kind]}
    return scenes


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


@functools.lru_cache(maxsize=256)  # an analogy has about fifty candidates, and several answers
def _drawn(scene: Scene) -> np.ndarray:
    return _pixels(render(scene))


def judge(image: Image.Image, analogy: Analogy) -> Verdict:
    """Finds which of the candidate scenes a picture shows.

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
    errors = {scene: float(np.mean((answer - _drawn(scene)) ** 2)) for scene in candidates(analogy)}
    nearest = min(errors, key=errors.get)
    others = [name for name in ATTRIBUTES if name not in analogy.kinds]
    return Verdict(
        success=nearest == analogy.target,
        kept=all(getattr(nearest, name) == getattr(analogy.query, name) for name in others),
        psnr=float(-10 * np.log10(max(errors[analogy.target], 1e-10))),
    )
