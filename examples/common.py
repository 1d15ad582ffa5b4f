# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What the examples and the command share: loading a model, opening pictures, learning, answering, and the sheet."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoProcessor, BlipForConditionalGeneration, CLIPModel, CLIPProcessor

import diffusers
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for a clone into which nothing was installed

from pipeline_difference_inversion import (  # noqa: E402
    MATCHING_CLIP,
    DifferenceInversionPipeline,
    DifferenceTokens,
    LearningConfig,
    flatten_image,
)


STORYBOOK = HERE / "storybook" / "model"
IMAGES = HERE / "images"
LEARNING = tuple(LearningConfig.__dataclass_fields__)  # settings of learning, by name, and of applying
APPLYING = ("num_inference_steps", "guidance_scale", "inversion", "strength", "eta")
DRAWING = (*APPLYING, "replace_phrases", "complete_prompts")
TILE, MARGIN, LABEL = 256, 16, 34  # of the sheet, in pixels


def parse_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, whose value is a number, a list and so on, or else a text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def read_settings(config: list[str] | None, known: tuple[str, ...]) -> dict:
    settings = dict(parse_setting(text) for text in config or [])
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"--config: there is no setting {unknown[0]!r}; known are {', '.join(dict.fromkeys(known))}")
    return settings


def prompt_for_each(prompts: list[str] | None, count: int) -> list[str | None]:
    """One for each image; one alone is for all of them, and without any the captioner writes them."""
    if prompts and len(prompts) not in (1, count):
        raise ValueError(f"--prompt has {len(prompts)} prompts for {count} images; give one for each")
    return list(prompts) if prompts and len(prompts) == count else [prompts[0] if prompts else None] * count


def check_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        torch.zeros(1, device=name).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device: {name} cannot be used here; give another, such as cpu ({error})") from error
    return torch.device(name)


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Says it in one line if a model does not load, and shows progress only to someone who watches."""
    for library in (diffusers, transformers):
        switch = library.utils.logging
        switch.enable_progress_bar() if sys.stderr.isatty() else switch.disable_progress_bar()
    try:
        yield
    except Exception as error:  # each library has errors of its own for a folder that is none of its models
        raise ValueError(
            f"--model: {model} cannot be loaded; give a Stable Diffusion's folder or Hub name ({error})"
        ) from error


def load_pipeline(
    model: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> DifferenceInversionPipeline:
    """Storybook has all its parts in its folder; other models are joined by their CLIP and by a captioner."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    pipe = DifferenceInversionPipeline.from_pretrained(model, dtype=dtype)
    if pipe.clip is None:
        clip = MATCHING_CLIP[pipe.text_encoder.config.hidden_size]
        captioner = "Salesforce/blip-image-captioning-large"
        pipe.register_modules(
            clip=CLIPModel.from_pretrained(clip, dtype=dtype),
            clip_processor=CLIPProcessor.from_pretrained(clip),
            captioner=BlipForConditionalGeneration.from_pretrained(captioner, dtype=dtype),
            captioner_processor=AutoProcessor.from_pretrained(captioner),
        )
    return pipe.to(device)


def picture_size(pipe: DifferenceInversionPipeline) -> int:
    """Height and width of the squares that the model was trained on, in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def read_picture(path: str) -> Image.Image:
    """An image in RGB; what is transparent in it becomes white, as in the pipeline."""
    picture = load_image(path, lambda image: flatten_image(image, path))
    if isinstance(picture, Image.Image):
        return picture
    return VaeImageProcessor.numpy_to_pil(picture.clip(0, 1))[0]  # it had more than 8 bits


def read(option: str, path: str) -> tuple[str, Image.Image]:
    """The name and the picture; opened before a model is loaded, which can take long."""
    if not path.startswith(("http://", "https://")) and not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}; give a picture's path or address")
    try:
        return path, read_picture(path)
    except (OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option}: {path} cannot be read; give a picture such as a PNG or JPEG ({error})") from error


def fit_picture(picture: Image.Image, size: int, name: str) -> Image.Image:
    """The square that the model was trained on, cut from the middle."""
    if picture.size != (size, size):
        print(f"{name} is {picture.width}×{picture.height} and is cut and resized to {size}×{size}.")
    return ImageOps.fit(picture, (size, size))


def open_image(path: str, size: int) -> Image.Image:
    return fit_picture(read_picture(path), size, path)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: {folder} cannot be made a folder; name another ({error.strerror})") from error


def read_difference(name: str) -> DifferenceTokens:
    """The name of a file is not asked of the Hub, where it may be a repository's."""
    return (DifferenceTokens.load if name.endswith(".safetensors") else DifferenceTokens.from_pretrained)(name)


def learn(
    pipe: DifferenceInversionPipeline, before: Image.Image, after: Image.Image, path: Path, seed: int, **settings
) -> tuple[DifferenceTokens, Path]:
    """A difference and the file that it was saved to."""
    generator = torch.Generator().manual_seed(seed)
    difference = pipe.invert_difference(before, after, generator=generator, **settings)
    return difference, difference.save(path)


def answer(
    pipe: DifferenceInversionPipeline, query: Image.Image, difference: DifferenceTokens, seed: int, **settings
) -> Image.Image:
    """One query at a time: it needs no more memory than one, and has the same answer whatever else is asked."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(image=query, difference=difference, generator=generator, **settings).images[0]


def save_sheet(
    path: Path, queries: list[Image.Image], answers: list[Image.Image], pair: tuple[Image.Image, ...] = ()
) -> Path:
    """The pair, if there is one, and below it each query with its answer."""
    rows = [list(zip(("A", "A'"), pair, strict=True))] if pair else []
    rows += [[(f"B{i}", b), (f"B{i}'", b2)] for i, (b, b2) in enumerate(zip(queries, answers, strict=True), 1)]
    make_sheet(rows).save(path)
    return path


def make_sheet(rows: list[list[tuple[str, Image.Image]]], tile: int = TILE) -> Image.Image:
    """Rows of labelled pictures, each drawn as a square of `tile` pixels."""
    width = MARGIN + max(len(row) for row in rows) * (tile + MARGIN)
    sheet = Image.new("RGB", (width, len(rows) * (tile + LABEL + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    for i, row in enumerate(rows):
        for j, (label, image) in enumerate(row):
            left, top = MARGIN + j * (tile + MARGIN), MARGIN + i * (tile + LABEL + MARGIN)
            draw.text((left, top), label, fill="black", font=font)
            sheet.paste(image.resize((tile, tile), Image.Resampling.LANCZOS), (left, top + LABEL))
    return sheet
