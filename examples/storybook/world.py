# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The Storybook world: small landscapes that a program draws and describes, so that every right answer is known.

A scene has *attributes*, which captions name and differences change, and a *layout* (`x`, `size`, `horizon`), which no
caption names. Everything else in a picture follows from these; nothing is random.

    python examples/storybook/world.py sheet.png    # draws 64 scenes to look at
"""

import argparse
import dataclasses
import functools
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": ("cabin", "castle", "tent", "pine tree", "windmill", "boat"),
    "color": ("red", "blue", "yellow", "purple"),
    "ground": ("grass", "desert", "snow", "water"),
    "sky": ("day", "sunset", "night", "storm"),
    "extra": ("nothing", "rainbow", "moon", "balloon"),
    "style": ("painting", "pixel art", "pencil sketch"),
}
BLEND = "+"  # joins two values that a picture is half way between, as in "red+yellow"; no caption names such a value
PICTURE_SIZE = 128  # pixels, width and height
SUPERSAMPLING = 2


@dataclasses.dataclass(frozen=True)
class Scene:
    """One landscape. `x`, `size` and `horizon` are fractions of the picture's side; the origin is top left.

    `color` and `style` may also be a blend of two values, as in "red+yellow": see `render`.
    """

    subject: str
    color: str
    ground: str
    sky: str
    extra: str
    style: str
    x: float  # the subject's middle, 0.34 to 0.54
    size: float  # the subject's width, 0.42 to 0.50
    horizon: float  # height of the horizon line, 0.54 to 0.66


def random_layout(rng: random.Random) -> dict[str, float]:
    """Draws `x`, `size` and `horizon` in the ranges that keep the subject whole and the extras in sight."""
    return {"x": rng.uniform(0.34, 0.54), "size": rng.uniform(0.42, 0.50), "horizon": rng.uniform(0.54, 0.66)}


def random_scene(rng: random.Random) -> Scene:
    """Draws every attribute and the layout uniformly."""
    return Scene(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()}, **random_layout(rng))


# --------------------------------------------------------------------------------------------------- captions

_SKY_PHRASES = {"day": "by day", "sunset": "at sunset", "night": "at night", "storm": "in a storm"}


def _phrase(scene: Scene, attribute: str) -> str:
    """The words for one attribute alone; an absent extra has none."""
    value = getattr(scene, attribute)
    if attribute == "subject":
        return f"a {value}"
    if attribute == "ground":
        return f"on {value}"
    if attribute == "sky":
        return _SKY_PHRASES[value]
    if attribute == "extra":
        return "" if value == "nothing" else f"with a {value}"
    return value


def describe(scene: Scene) -> str:
    """The one full sentence of a scene: `a red cabin on grass at sunset with a rainbow, pixel art`."""
    places = [_phrase(scene, attribute) for attribute in ("ground", "sky", "extra")]
    return " ".join(filter(None, [f"a {scene.color} {scene.subject}", *places])) + f", {scene.style}"


def loose_caption(scene: Scene, rng: random.Random, always: tuple[str, ...] = ()) -> str:
    """Some of the attributes, in some order; sometimes none, and the caption is empty.

    An extra that is there is nearly always named, so that silence about extras means that there is none, as in captions
    that people write. Those in `always` are named for certain.
    """
    keep = {"subject": 0.9, "color": 0.75, "ground": 0.75, "sky": 0.75, "extra": 0.95, "style": 0.7}
    named = {attribute for attribute in ATTRIBUTES if attribute in always or rng.random() < keep[attribute]}
    if "subject" in named:
        parts = [f"a {scene.color} {scene.subject}" if "color" in named else f"a {scene.subject}"]
    else:
        parts = [f"something {scene.color}"] if "color" in named else []
    places = [_phrase(scene, attribute) for attribute in ("ground", "sky", "extra") if attribute in named]
    if rng.random() < 0.5:
        rng.shuffle(places)
    parts += places
    text = rng.choice((" ", " ", ", ")).join(filter(None, parts))
    if "style" not in named:
        return text
    if rng.random() < 0.25:
        return f"{scene.style} of {text}" if text else scene.style
    return f"{text}, {scene.style}" if text else scene.style


def restatement(scene: Scene, attribute: str, said: Scene, rng: random.Random) -> str:
    """The words that correct what `said` got wrong about one attribute."""
    if attribute == "subject":
        return rng.choice((f"a {scene.subject}", scene.subject, f"a {scene.color} {scene.subject}"))
    if attribute == "color":
        return rng.choice((scene.color, scene.color, f"a {scene.color} {scene.subject}"))
    if attribute == "extra" and scene.extra == "nothing":
        return rng.choice(("with nothing", f"without a {said.extra}"))
    return _phrase(scene, attribute)


def caption(scene: Scene, rng: random.Random) -> str:
    """A varied caption for training: attributes left out, reordered and, two times in five, restated.

    A restated attribute is first named wrongly and put right at the end (`a red cabin on grass, a castle`): captions
    that people write are redundant and revise themselves, and a difference appended to a prompt is such a revision.
    The subject is put right most often, because a noun at the end is the hardest to hear: it could be one thing more.
    """
    if rng.random() >= 0.4:
        return loose_caption(scene, rng)
    restated = ["subject"] if rng.random() < 0.4 else rng.sample(list(ATTRIBUTES), rng.choice((1, 1, 1, 2)))
    wrong = {a: rng.choice([v for v in ATTRIBUTES[a] if v != getattr(scene, a)]) for a in restated}
    said = dataclasses.replace(scene, **wrong)
    first = describe(said) if rng.random() < 0.6 else loose_caption(said, rng, always=tuple(restated))
    corrections = [restatement(scene, attribute, said, rng) for attribute in restated]
    return rng.choice((", ", " ")).join([first, *corrections])


# ---------------------------------------------------------------------------------------------------- pictures

_OUTLINE = (52, 40, 48)
_WOOD = (124, 82, 52)
_CREAM = (250, 240, 216)
_COLORS = {"red": (222, 50, 44), "blue": (44, 92, 226), "yellow": (255, 214, 40), "purple": (184, 54, 204)}
_SKIES = {  # colour at the top, half way, and at the horizon
    "day": ((96, 182, 240), (150, 210, 248), (214, 238, 250)),
    "sunset": ((122, 66, 138), (236, 110, 92), (255, 204, 112)),
    "night": ((12, 16, 48), (24, 32, 82), (48, 62, 124)),
    "storm": ((70, 78, 88), (104, 112, 120), (146, 152, 154)),
}
_GROUNDS = {  # near, far, detail
    "grass": ((104, 176, 66), (70, 138, 58), (52, 112, 48)),
    "desert": ((224, 164, 96), (198, 132, 78), (166, 104, 62)),
    "snow": ((240, 246, 252), (204, 218, 236), (162, 182, 212)),
    "water": ((38, 134, 160), (66, 170, 186), (168, 222, 226)),
}
_LIGHT = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.84, 0.76),
    "night": (0.44, 0.50, 0.72),
    "storm": (0.68, 0.72, 0.74),
}
_RAINBOW = ((228, 60, 56), (248, 150, 50), (250, 222, 70), (90, 186, 90), (70, 120, 220), (140, 80, 190))


def _lit(color: tuple[int, int, int], sky: str, share: float = 1.0) -> tuple[int, int, int]:
    """A colour under the sky's light; `share` is how much of that light reaches it."""
    return tuple(round(c * (1 - share + share * light)) for c, light in zip(color, _LIGHT[sky], strict=True))


def _main_color(value: str) -> tuple[int, int, int]:
    """The colour of the subject's main part; of a blend, the mean of its two colours."""
    channels = zip(*(_COLORS[name] for name in value.split(BLEND)), strict=True)
    return tuple(round(sum(channel) / len(channel)) for channel in channels)


class _Canvas:
    """Pillow's drawing calls in fractions of the picture's side, at the supersampled size."""

    def __init__(self):
        self.side = PICTURE_SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (self.side, self.side))
        self.draw = ImageDraw.Draw(self.image)

    def _points(self, points):
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, points, fill, outline=True):
        points = self._points(points)
        self.draw.polygon(points, fill=fill)
        if outline:
            self.draw.line([*points, points[0], points[1]], fill=_OUTLINE, width=3, joint="curve")

    def rectangle(self, left, top, right, bottom, fill, outline=True):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, outline)

    def ellipse(self, x, y, rx, ry, fill, outline=False):
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill=fill, outline=_OUTLINE if outline else None, width=3 if outline else 0)

    def line(self, points, fill, width):
        self.draw.line(self._points(points), fill=fill, width=max(1, round(width * self.side)), joint="curve")

    def arc(self, x, y, radius, width, fill):
        box = self._points([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.arc(box, 180, 360, fill=fill, width=max(1, round(width * self.side)))


@functools.lru_cache(maxsize=8)  # scenes are mostly drawn along with others that have the same sky and horizon
def _gradient(sky: str, horizon: float, side: int) -> Image.Image:
    """A sky's colours, from the top down to the horizon."""
    top, middle, bottom = _SKIES[sky]
    column, colors = Image.new("RGB", (1, side)), []
    for row in range(side):
        height = min(1.0, row / side / horizon)
        start, end, t = (top, middle, height * 2) if height < 0.5 else (middle, bottom, height * 2 - 1)
        colors.append(tuple(round(a + (b - a) * t) for a, b in zip(start, end, strict=True)))
    column.putdata(colors)
    return column.resize((side, side), Image.Resampling.NEAREST)


def _draw_sky(canvas: _Canvas, scene: Scene) -> None:
    canvas.image.paste(_gradient(scene.sky, scene.horizon, canvas.side))
    if scene.sky == "day":
        canvas.ellipse(0.13, 0.14, 0.085, 0.085, (255, 226, 96))
        _draw_cloud(canvas, 0.40, 0.12, 0.085, (255, 255, 255))
    elif scene.sky == "sunset":
        canvas.ellipse(0.88, scene.horizon - 0.02, 0.15, 0.15, (255, 240, 170))
    elif scene.sky == "night":
        for x, y in ((0.07, 0.10), (0.20, 0.22), (0.33, 0.08), (0.46, 0.17), (0.58, 0.06), (0.12, 0.36), (0.93, 0.40)):
            canvas.polygon(_star(x, y, 0.026), (255, 246, 190), outline=False)
    else:
        for x, y, r in ((0.12, 0.05, 0.12), (0.46, 0.03, 0.13), (0.80, 0.02, 0.12)):
            _draw_cloud(canvas, x, y, r, (44, 48, 58))
        bolt = ((0.17, 0.14), (0.08, 0.33), (0.14, 0.32), (0.08, 0.48), (0.22, 0.27), (0.15, 0.28), (0.24, 0.14))
        canvas.polygon(bolt, (255, 240, 120), outline=False)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Eight points, far and near in turn."""
    radii = (radius if i % 2 == 0 else radius * 0.38 for i in range(8))
    return [(x + r * math.sin(math.pi * i / 4), y + r * math.cos(math.pi * i / 4)) for i, r in enumerate(radii)]


def _draw_cloud(canvas: _Canvas, x: float, y: float, radius: float, fill) -> None:
    for dx, dy, scale in ((-1.0, 0.25, 0.7), (0.0, 0.0, 1.0), (1.0, 0.25, 0.75)):
        canvas.ellipse(x + dx * radius, y + dy * radius, radius * scale * 1.1, radius * scale * 0.8, fill)


def _draw_extra(canvas: _Canvas, scene: Scene) -> None:
    """Extras stand in the upper right, which no subject reaches; the rainbow spans the whole sky."""
    if scene.extra == "rainbow":
        for band, color in enumerate(_RAINBOW):
            canvas.arc(0.5, scene.horizon + 0.06, 0.54 - band * 0.026, 0.028, color)
    elif scene.extra == "moon":
        canvas.ellipse(0.84, 0.15, 0.125, 0.125, (255, 250, 214), outline=True)
        for dx, dy, r in ((-0.045, -0.03, 0.03), (0.035, 0.03, 0.038), (0.04, -0.06, 0.018)):
            canvas.ellipse(0.84 + dx, 0.15 + dy, r, r, (206, 196, 160))
    elif scene.extra == "balloon":
        for dx in (-0.045, 0.045):
            canvas.line([(0.84 + dx * 1.8, 0.18), (0.84 + dx * 0.7, 0.31)], _OUTLINE, 0.008)
        canvas.rectangle(0.80, 0.30, 0.88, 0.36, _WOOD)
        canvas.ellipse(0.84, 0.14, 0.125, 0.125, (255, 120, 30), outline=True)
        canvas.ellipse(0.84, 0.14, 0.070, 0.125, (255, 250, 240), outline=False)
        canvas.ellipse(0.84, 0.14, 0.030, 0.125, (20, 160, 150), outline=False)


def _draw_ground(canvas: _Canvas, scene: Scene) -> None:
    near, far, detail = (_lit(color, scene.sky) for color in _GROUNDS[scene.ground])
    top = scene.horizon
    canvas.rectangle(0, top, 1.001, 1.001, near, outline=False)
    if scene.ground == "grass":
        canvas.ellipse(0.16, top + 0.05, 0.42, 0.12, far)
        canvas.ellipse(0.90, top + 0.05, 0.36, 0.09, far)
        canvas.polygon([(0, top + 0.08), (0.5, top + 0.04), (1, top + 0.09), (1, 1), (0, 1)], near, outline=False)
        for x, y in ((0.10, 0.20), (0.30, 0.31), (0.62, 0.32), (0.88, 0.22), (0.80, 0.36)):
            for dx, height in ((-0.028, 0.045), (0.0, 0.06), (0.028, 0.045)):
                blade = [(x + dx * 0.3 - 0.009, top + y), (x + dx, top + y - height), (x + dx * 0.3 + 0.009, top + y)]
                canvas.polygon(blade, detail, outline=False)
    elif scene.ground == "desert":
        canvas.polygon([(0, top + 0.03), (0.22, top - 0.07), (0.55, top + 0.04)], far, outline=False)
        canvas.polygon([(0.48, top + 0.04), (0.82, top - 0.09), (1.1, top + 0.04)], far, outline=False)
        canvas.rectangle(0, top + 0.03, 1.001, 1.001, near, outline=False)
        for x, y in ((0.08, 0.20), (0.40, 0.31), (0.70, 0.22)):
            canvas.line([(x, top + y), (x + 0.08, top + y - 0.02), (x + 0.2, top + y + 0.01)], detail, 0.012)
    elif scene.ground == "snow":
        canvas.ellipse(0.20, top + 0.06, 0.40, 0.11, far)
        canvas.ellipse(0.85, top + 0.06, 0.40, 0.10, far)
        canvas.ellipse(0.50, top + 0.52, 0.95, 0.44, near)
        for x, y, r in ((0.12, 0.24, 0.10), (0.86, 0.27, 0.10)):
            canvas.ellipse(x, top + y, r, 0.018, detail)
    else:
        canvas.rectangle(0, top, 1.001, top + 0.07, far, outline=False)
        for x, y in ((0.02, 0.15), (0.30, 0.27), (0.62, 0.20), (0.78, 0.31), (0.06, 0.36)):
            wave = [(x + i * 0.045, top + y - 0.016 * (i % 2)) for i in range(5)]
            canvas.line(wave, detail, 0.013)


def _draw_subject(canvas: _Canvas, scene: Scene) -> None:
    """The subject stands on the ground line `horizon + 0.15`; all offsets are in units of its size."""
    size, base = scene.size, scene.horizon + 0.15
    color = _lit(_main_color(scene.color), scene.sky, share=0.35)

    def at(dx: float, dy: float) -> tuple[float, float]:
        return scene.x + dx * size, base - dy * size

    def box(left, bottom, right, top, fill):
        canvas.polygon([at(left, top), at(right, top), at(right, bottom), at(left, bottom)], fill)

    canvas.ellipse(scene.x, base, 0.56 * size, 0.05, _lit(_GROUNDS[scene.ground][2], scene.sky, 1.0))
    {
        "cabin": _cabin, "castle": _castle, "tent": _tent, "pine tree": _pine, "windmill": _windmill, "boat": _boat,
    }[scene.subject](canvas, at, box, color, size)  # fmt: skip


def _cabin(canvas, at, box, color, size):
    box(0.22, 0.62, 0.36, 0.92, (150, 74, 60))  # chimney
    box(-0.47, 0.0, 0.47, 0.52, color)
    canvas.polygon([at(-0.57, 0.50), at(-0.30, 0.84), at(0.30, 0.84), at(0.57, 0.50)], _WOOD)
    box(-0.09, 0.0, 0.11, 0.30, (84, 54, 40))
    for left in (-0.34, 0.20):
        box(left, 0.20, left + 0.13, 0.34, (255, 236, 150))


def _castle(canvas, at, box, color, size):
    box(-0.30, 0.0, 0.30, 0.46, color)
    for left in (-0.30, -0.10, 0.10):
        box(left + 0.03, 0.46, left + 0.17, 0.55, color)
    for left in (-0.50, 0.26):
        box(left, 0.0, left + 0.24, 0.62, color)
        canvas.polygon([at(left - 0.04, 0.62), at(left + 0.12, 0.95), at(left + 0.28, 0.62)], (92, 96, 112))
        box(left + 0.08, 0.34, left + 0.16, 0.48, _OUTLINE)
    box(-0.11, 0.0, 0.11, 0.20, (64, 46, 44))
    x, y = at(0.0, 0.20)
    canvas.ellipse(x, y, 0.11 * size, 0.09 * size, (64, 46, 44))


def _tent(canvas, at, box, color, size):
    canvas.line([at(-0.07, 0.82), at(0.0, 0.70), at(0.07, 0.82)], _OUTLINE, 0.014)
    canvas.polygon([at(-0.54, 0.0), at(0.0, 0.74), at(0.54, 0.0)], color)
    canvas.polygon([at(-0.20, 0.0), at(0.0, 0.56), at(0.20, 0.0)], _CREAM)
    canvas.polygon([at(-0.10, 0.0), at(0.0, 0.40), at(0.10, 0.0)], (70, 54, 52))


def _pine(canvas, at, box, color, size):
    box(-0.08, 0.0, 0.08, 0.20, _WOOD)
    for bottom, half, height in ((0.12, 0.50, 0.38), (0.36, 0.42, 0.36), (0.60, 0.31, 0.37)):
        canvas.polygon([at(-half, bottom), at(0.0, bottom + height), at(half, bottom)], color)


def _windmill(canvas, at, box, color, size):
    canvas.polygon([at(-0.36, 0.0), at(-0.22, 0.66), at(0.22, 0.66), at(0.36, 0.0)], color)
    canvas.polygon([at(-0.26, 0.66), at(0.0, 0.86), at(0.26, 0.66)], _WOOD)
    box(-0.07, 0.0, 0.07, 0.20, (84, 54, 40))
    for angle in (45, 135, 225, 315):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        blade = ((0.06, -0.02), (0.50, -0.02), (0.50, 0.10), (0.06, 0.10))
        canvas.polygon([at(u * c - v * s, 0.62 + u * s + v * c) for u, v in blade], _CREAM)
    x, y = at(0.0, 0.62)
    canvas.ellipse(x, y, 0.05 * size, 0.05 * size, _WOOD, outline=True)


def _boat(canvas, at, box, color, size):
    canvas.line([at(0.0, 0.15), at(0.0, 0.92)], _WOOD, 0.022)
    canvas.polygon([at(0.04, 0.28), at(0.04, 0.90), at(0.46, 0.28)], _CREAM)
    canvas.polygon([at(-0.04, 0.28), at(-0.04, 0.76), at(-0.36, 0.28)], _CREAM)
    canvas.polygon([at(-0.54, 0.26), at(0.54, 0.26), at(0.38, -0.08), at(-0.38, -0.08)], color)
    canvas.line([at(-0.48, 0.15), at(0.48, 0.15)], _CREAM, 0.014)


def _pixel_art(picture: Image.Image) -> Image.Image:
    """Four pixels to a block and eight levels a channel."""
    small = picture.resize((PICTURE_SIZE // 4, PICTURE_SIZE // 4), Image.Resampling.BOX)
    small = small.point([round(round(v / 255 * 7) / 7 * 255) for v in range(256)] * 3)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _hatching() -> Image.Image:
    """Fixed diagonal pencil strokes, as a multiplier."""
    strokes = Image.new("L", (PICTURE_SIZE, PICTURE_SIZE), 255)
    draw = ImageDraw.Draw(strokes)
    for start in range(-PICTURE_SIZE, PICTURE_SIZE, 8):
        draw.line([(start, PICTURE_SIZE), (start + PICTURE_SIZE, 0)], fill=226, width=2)
    return Image.merge("RGB", [strokes] * 3)


def _pencil_sketch(large: Image.Image, picture: Image.Image) -> Image.Image:
    """Dark contours over a washed-out tint: a coloured-pencil drawing, in which every colour can still be told."""
    margin = 4  # the edge filters mistake the picture's own border for a contour
    edges = ImageOps.grayscale(large.filter(ImageFilter.SMOOTH).filter(ImageFilter.FIND_EDGES))
    edges = ImageOps.invert(edges.point([min(255, v * 3) for v in range(256)]))
    edges = ImageOps.expand(ImageOps.crop(edges, margin), margin, fill=255)
    contours = edges.resize(picture.size, Image.Resampling.LANCZOS)
    paper = Image.blend(picture, Image.new("RGB", picture.size, (255, 253, 246)), 0.34)
    shaded = ImageChops.multiply(paper, _hatching())
    dark = Image.new("RGB", picture.size, (60, 56, 66))
    return Image.composite(shaded, dark, contours.point([40 + round(v * 215 / 255) for v in range(256)]))


def render(scene: Scene) -> Image.Image:
    """Draws a scene as a 128×128 RGB picture.

    A blend of two colours is their mean, and a blend of two styles the mean of the two pictures.
    """
    if BLEND in scene.style:
        first, second = (render(dataclasses.replace(scene, style=style)) for style in scene.style.split(BLEND))
        return Image.blend(first, second, 0.5)
    canvas = _Canvas()
    _draw_sky(canvas, scene)
    _draw_extra(canvas, scene)
    _draw_ground(canvas, scene)
    _draw_subject(canvas, scene)
    picture = canvas.image.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    if scene.style == "pixel art":
        return _pixel_art(picture)
    if scene.style == "pencil sketch":
        return _pencil_sketch(canvas.image, picture)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="the picture to write, such as sheet.png")
    file = parser.parse_args().file
    if file.suffix.lower() not in Image.registered_extensions() or not file.parent.is_dir():
        parser.error(f"FILE is {file}; name a picture such as sheet.png in a folder that is there")
    rng, sheet = random.Random(0), Image.new("RGB", (8 * PICTURE_SIZE, 8 * PICTURE_SIZE))
    for index in range(64):
        sheet.paste(render(random_scene(rng)), (index % 8 * PICTURE_SIZE, index // 8 * PICTURE_SIZE))
    sheet.save(file)


if __name__ == "__main__":
    main()
