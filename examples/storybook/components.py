# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Storybook's parts: how large they are, how they are built, and how they are written and read."""

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import ATTRIBUTES, PICTURE_SIZE, Scene, describe, random_scene

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


HERE = Path(__file__).parent
MAX_TOKENS = 40  # the longest varied caption fits; Stable Diffusion's 77 would only cost time
WIDTH = 128  # of CLIP, of its text encoder, and so of the UNet's cross-attention
WIDTH_2 = 96  # of Storybook-XL's second one
TIME_WIDTH = 32  # of each of the six numbers that tell SDXL's kind of UNet how large the picture is
TOWER = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
IMAGE_TOWER = {"num_hidden_layers": 4, "image_size": PICTURE_SIZE, "patch_size": 16}
IMAGE_SIZE = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}  # as processors want it
VAE_CHANNELS = (32, 64, 128, 128)
UNET_CHANNELS = (96, 128, 192)


# --------------------------------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_component(component, folder: Path) -> None:
    """`save_pretrained` in half precision. Files are moved into place whole, so a reader never meets half of one.

    Its configuration says single precision: transformers would else load a part in half, which diffusers loads in single.
    """
    if isinstance(component, torch.nn.Module):
        component = copy.deepcopy(component).cpu().half()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    component.save_pretrained(partial)
    settings = partial / "config.json"
    if settings.is_file():
        settings.write_text(settings.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


COMPONENTS = {
    "vae": ("diffusers", AutoencoderKL),
    "text_encoder": ("transformers", CLIPTextModel),
    "tokenizer": ("transformers", CLIPTokenizer),
    "unet": ("diffusers", UNet2DConditionModel),
    "scheduler": ("diffusers", DDIMScheduler),
    "clip": ("transformers", CLIPModel),
    "clip_processor": ("transformers", CLIPProcessor),
    "captioner": ("transformers", BlipForConditionalGeneration),
    "captioner_processor": ("transformers", BlipProcessor),
}


XL_COMPONENTS = {
    "tokenizer_2": ("transformers", CLIPTokenizer),
    "text_encoder_2": ("transformers", CLIPTextModelWithProjection),
    "clip_2": ("transformers", CLIPModel),
    "unet": ("diffusers", UNet2DConditionModel),
}


def load_component(options: argparse.Namespace, name: str, folder: Path | None = None):
    """A component in single precision, frozen, on the device; None where it has not been written yet."""
    components = COMPONENTS if folder is None else XL_COMPONENTS
    folder = (folder or options.model_dir) / name
    if not folder.is_dir():
        return None
    component = components[name][1].from_pretrained(folder)
    if isinstance(component, torch.nn.Module):
        component.float().eval().requires_grad_(False).to(options.device)
    return component


STAGE_OF = {"text_encoder": "clip", "text_encoder_2": "clip_2"}  # the others are written by stages of their own names


def need_component(options: argparse.Namespace, name: str, folder: Path | None = None):
    """Likewise, but the script ends where it has not been written yet."""
    component = load_component(options, name, folder)
    if component is None:
        option = "--model-dir" if folder is None else "--xl-dir"
        stage = STAGE_OF.get(name, name)
        raise SystemExit(f"{option}: {folder or options.model_dir} has no {name}; first run train.py {stage}")
    return component


def write_model_index(options: argparse.Namespace) -> None:
    """Tells diffusers which class loads which folder."""
    index = {"_class_name": "DifferenceInversionPipeline", "_diffusers_version": diffusers.__version__}
    for name, (library, component) in COMPONENTS.items():
        if (options.model_dir / name).is_dir():
            index[name] = [library, component.__name__]
    write_text(options.model_dir / "model_index.json", json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------ pictures


def to_signed(pictures: np.ndarray) -> torch.Tensor:
    """Bytes `[N, H, W, 3]` to the VAE's `[N, 3, H, W]` in -1 to 1; the strides stay channels-last."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_clip(signed: torch.Tensor) -> torch.Tensor:
    """The VAE's range to what CLIP's and BLIP's image processors hand to their models."""
    mean, std = (torch.tensor(v, device=signed.device)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (signed / 2 + 0.5 - mean) / std


def to_pil(signed: torch.Tensor) -> list[Image.Image]:
    pixels = ((signed.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


@torch.no_grad()
def encode(vae: AutoencoderKL, signed: torch.Tensor) -> torch.Tensor:
    """Means of the posteriors `[N, 4, H/8, W/8]`, not yet scaled."""
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean for batch in signed.split(16)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[N, 3, H, W]` from unscaled latents."""
    return torch.cat([vae.decode(batch).sample for batch in latents.split(16)])


# -------------------------------------------------------------------------------------------------------- models


def build_clip(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPModel:
    tower = TOWER | {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "max_position_embeddings": MAX_TOKENS,
        # CLIPTextModel pools at the first of these ids; without it, it would look for OpenAI's.
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | IMAGE_TOWER, projection_dim=width))


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=PICTURE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Convolutions alone at 16x16, where attention costs most; attention to the picture and the text below."""
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=WIDTH,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # in this class the number of heads, whatever its name says
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, with the velocity as what is predicted, as in Stable Diffusion 2."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
    )


def build_captioner_tokenizer() -> BertTokenizer:
    """Every word that a full caption can have, whole."""
    words = sorted({word for text in scenes_by_description() for word in text.replace(",", " , ").split()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    return BertTokenizer(vocab={word: index for index, word in enumerate(vocab)}, model_max_length=MAX_TOKENS)


@functools.cache
def scenes_by_description() -> dict[str, dict[str, str]]:
    """All full captions of the world, with the attributes that each one states."""
    layout = dataclasses.asdict(random_scene(random.Random(0)))
    combinations = (dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values()))
    return {describe(Scene(**layout | attributes)): attributes for attributes in combinations}


def build_captioner(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "encoder_hidden_size": WIDTH,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # CLIP's activation, because CLIP's image tower is the starting point.
    vision = TOWER | IMAGE_TOWER | {"hidden_act": "quick_gelu"}
    config = BlipConfig(text_config=TOWER | text, vision_config=vision, projection_dim=WIDTH)
    return BlipForConditionalGeneration(config)


def build_unet_xl(options: argparse.Namespace) -> UNet2DConditionModel:
    """Storybook's UNet, which begins as it was for the first text encoder's half, and deaf to what is new."""
    old = need_component(options, "unet")
    new = {
        "cross_attention_dim": WIDTH + WIDTH_2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": WIDTH_2 + 6 * TIME_WIDTH,
    }
    unet = UNet2DConditionModel.from_config(dict(old.config) | new)
    weights = old.state_dict()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name not in weights:
                if name.startswith("add_embedding.linear_2"):
                    parameter.zero_()
            elif parameter.shape == weights[name].shape:
                parameter.copy_(weights[name])
            else:
                parameter.zero_()[:, :WIDTH].copy_(weights[name])
    return unet.to(options.device)


def build_wider_unet(options: argparse.Namespace, channels: int) -> UNet2DConditionModel:
    """Storybook's UNet with so many input channels: 8 for InstructPix2Pix, 9 for inpainting. New weights begin at zero."""
    unet = need_component(options, "unet").requires_grad_(True)
    old = unet.conv_in
    unet.register_to_config(in_channels=channels)
    unet.conv_in = torch.nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding).to(options.device)
    with torch.no_grad():
        unet.conv_in.weight.zero_()[:, :4].copy_(old.weight)
        unet.conv_in.bias.copy_(old.bias)
    return unet
