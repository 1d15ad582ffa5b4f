# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What the examples and the command share: what is checked first, pictures, lists of them, a model, and the sheet.

Where someone asks for what cannot be, these functions raise a ValueError that names the option, says what was given, and what
to give. `told_in_one_line` ends a script with it.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoProcessor, BlipForConditionalGeneration, CLIPModel, CLIPProcessor

from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image


HERE = Path(__file__).resolve().parent
if not __package__:  # a script of a clone, where nothing need be installed
    sys.path.insert(0, str(HERE.parent))

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


# ------------------------------------------------------------------------------------------------ what went wrong


@contextmanager
def told_in_one_line(options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Around a script's `main`: what cannot be done ends it with one line on stderr and exit status 1.

    Args:
        options: what messages call by the pipeline's own names, and the option that gives it.
    """
    try:
        yield
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        raise SystemExit(one_line(error, options or {})) from error


def one_line(error: Exception, options: Mapping[str, str]) -> str:
    return " ".join(re.sub(r"`(\w+)`", lambda name: options.get(name[1], name[0]), str(error)).split())


# --------------------------------------------------------------------------------------------------------- options


def parse_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, whose value is a number, a list and so on, or else a text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parse_named_folder(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder alone, whose name is then taken."""
    name, named, folder = text.partition("=")
    if not named or Path(text).is_dir():
        name, folder = Path(text).name, text
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}; give NAME=FOLDER or FOLDER")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} gives no name; give NAME=FOLDER")
    return name, Path(folder)


def read_settings(config: list[str] | None, known: tuple[str, ...]) -> dict:
    settings = dict(parse_setting(text) for text in config or [])
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"--config: there is no setting {unknown[0]!r}; known are {', '.join(dict.fromkeys(known))}")
    return settings


def as_arguments(settings: dict) -> dict:
    """Settings as a call of the pipeline takes them. Prompts are completed, or not, in learning and for the query."""
    learning = {name: value for name, value in settings.items() if name in LEARNING}
    others = {name: value for name, value in settings.items() if name not in LEARNING or name == "complete_prompts"}
    return others | {"learning_kwargs": learning}


def learning_settings(settings: dict) -> dict:
    LearningConfig(**settings)  # refuses what learning would refuse later
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


# ----------------------------------------------------------------------------------------------- files and folders


def make_folder(folder: Path, option: str = "--output") -> Path:
    """A folder that can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{option}: {folder} cannot be made a folder to write to; name another ({error.strerror})"
        ) from error
    return folder


def check_target(file: Path, option: str) -> Path:
    """A file that can be written, in a folder that is made if need be."""
    if file.is_dir():
        raise ValueError(f"{option}: {file} is a folder; name a file in it")
    make_folder(file.parent, option)
    return file


def check_picture_target(file: Path, option: str) -> Path:
    """Likewise, with an ending that says which kind of picture."""
    if file.suffix.lower() not in Image.registered_extensions():
        raise ValueError(
            f"{option}: {file} does not end in a kind of picture; name it such as {file.name or 'sheet'}.png"
        )
    return check_target(file, option)


def read_lines(file: Path, option: str) -> list[tuple[int, str]]:
    """The lines of a file of JSON lines, each behind its number; not those that are empty."""
    if not file.is_file():
        raise ValueError(f"{option}: there is no file {file}; give a file of JSON lines")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {file} is no text; give a file of JSON lines") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{option}: {file} is empty; give a file of JSON lines")
    return lines


def read_object(
    line: str,
    folder: Path,
    pictures: tuple[str, ...],
    more_pictures: tuple[str, ...] = (),
    texts: tuple[str, ...] = (),
) -> dict:
    """What a line of JSON says, with whole paths of its pictures, which are looked at and not yet decoded.

    Args:
        folder: what paths are relative to.
        pictures: names of paths that it must have.
        more_pictures: names of paths that it may have.
        texts: names of texts that it may have.

    Raises:
        ValueError: if it says anything else, or there is no picture at a path.
    """
    try:
        said = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"is no JSON object: {line}")
    missing = [name for name in pictures if name not in said]
    unknown = sorted(set(said) - {*pictures, *more_pictures, *texts})
    if missing or unknown:
        raise ValueError(f"missing {missing}, unknown {unknown}")
    wrong = [name for name, value in said.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is {said[wrong[0]]!r}; it should be a text")
    paths = [name for name in (*pictures, *more_pictures) if name in said]
    return said | {name: str(check_picture(folder / said[name])) for name in paths}


def check_picture(file: Path) -> Path:
    """By its first bytes, so that hundreds are checked in no time."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    try:
        Image.open(file).close()
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no picture: {error}") from error
    return file


def read_difference(name: str) -> DifferenceTokens:
    """The name of a file is not asked of the Hub, where it may be a repository's."""
    return (DifferenceTokens.load if name.endswith(".safetensors") else DifferenceTokens.from_pretrained)(name)


# -------------------------------------------------------------------------------------------------------- pictures


def read_picture(path: str, option: str) -> Image.Image:
    """An image in RGB, of a file or an address; what is transparent in it becomes white, as in the pipeline."""
    if not path.startswith(("http://", "https://")) and not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}; give a picture's path or address")
    try:
        picture = load_image(path, lambda image: flatten_image(image, path))
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option}: {path} cannot be read; give a picture such as a PNG or JPEG ({error})") from error
    if isinstance(picture, Image.Image):
        return picture
    return VaeImageProcessor.numpy_to_pil(picture.clip(0, 1))[0]  # it had more than 8 bits


def read(option: str, path: str) -> tuple[str, Image.Image]:
    """The name and the picture; opened before a model is loaded, which can take long."""
    return path, read_picture(path, option)


def fit_picture(picture: Image.Image, size: int, name: str) -> Image.Image:
    """The square that the model was trained on, cut from the middle."""
    if picture.size != (size, size):
        print(f"{name} is {picture.width}×{picture.height} and is cut and resized to {size}×{size}.")
    return ImageOps.fit(picture, (size, size))


def open_image(path: str, size: int) -> Image.Image:
    return fit_picture(read_picture(path, "the picture"), size, path)


# ----------------------------------------------------------------------------------------------------------- models


@contextmanager
def loading(
    option: str, name: str | Path, expected: str = "a Stable Diffusion's folder or Hub name"
) -> Iterator[None]:
    """Says in one line that a model does not load."""
    try:
        yield
    except Exception as error:  # each library has errors of its own for a folder that is none of its models
        # Others, such as a KeyError, say nothing to those who do not know the library's code.
        reason = f" ({error})" if isinstance(error, (ImportError, OSError, ValueError)) else ""
        raise ValueError(f"{option}: {name} cannot be loaded; give {expected}{reason}") from error


def check_model(model: str, option: str = "--model", files: tuple[str, ...] = ("model_index.json",)) -> None:
    """As far as it can be told without loading it; names of the Hub have one slash."""
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in files):
            raise ValueError(
                f"{option}: {folder} cannot be loaded: it has no {' or '.join(files)}; give a folder that diffusers saved"
            )
    elif folder.exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise ValueError(f"{option}: there is no folder {model}; give a model's folder or Hub name")


def load_pipeline(
    model: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> DifferenceInversionPipeline:
    """Storybook has all its parts in its folder; other models are joined by their CLIP and by a captioner."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    check_model(model)
    with loading("--model", model):
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


def picture_size(pipe: DiffusionPipeline) -> int:
    """Height and width of the squares that the model was trained on, in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


# ---------------------------------------------------------------------------------------- what a model does, and the sheet


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
