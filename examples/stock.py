# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What this project is compared with, by diffusers' own pipelines."""

from pathlib import Path

from common import loading

from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)


INSTRUCT_MODEL = "timbrooks/instruct-pix2pix"
UNCHECKED = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}  # it blackens answers


def load_sdedit(pipe: DiffusionPipeline) -> StableDiffusionImg2ImgPipeline:
    """Image to image with the parts of `pipe`, which is no SDXL."""
    return stock(StableDiffusionImg2ImgPipeline, pipe)


def load_instruct(
    pipe: DiffusionPipeline, model: str | Path, option: str = "--instruct-model"
) -> StableDiffusionInstructPix2PixPipeline:
    """InstructPix2Pix, where and as precise as `pipe` is.

    Args:
        model: its folder or Hub name; or the folder of its UNet alone, such as `train.py instruct` writes for Storybook, which
            is joined to the other parts of `pipe`.
        option: what names `model` on the command line.
    """
    with loading(option, model, "the folder or Hub name of an InstructPix2Pix, or the folder of its UNet"):
        if not (Path(model) / "config.json").is_file():
            given = {"dtype": pipe.dtype, **UNCHECKED}
            return quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(model, **given).to(pipe.device))
        return with_unet(StableDiffusionInstructPix2PixPipeline, pipe, model)


def load_inpaint(pipe: DiffusionPipeline, folder: Path, option: str) -> StableDiffusionInpaintPipeline:
    """Inpainting with the UNet that lies in a folder, such as `train.py inpaint` writes, and the other parts of `pipe`."""
    with loading(option, folder, "the folder of an inpainting UNet"):
        return with_unet(StableDiffusionInpaintPipeline, pipe, folder)


def with_unet(pipeline: type[DiffusionPipeline], pipe: DiffusionPipeline, folder: str | Path) -> DiffusionPipeline:
    unet = UNet2DConditionModel.from_pretrained(folder).to(pipe.device, pipe.dtype)
    return stock(pipeline, pipe, unet=unet.requires_grad_(False).eval())


def stock(pipeline: type[DiffusionPipeline], pipe: DiffusionPipeline, **parts) -> DiffusionPipeline:
    """A pipeline of diffusers with the parts of `pipe`, but for those given."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")} | parts
    return quiet(pipeline(**parts, **UNCHECKED))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
