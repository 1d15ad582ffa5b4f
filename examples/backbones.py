# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 1.5, 2.1 and SDXL by their real configurations, with random weights, at full size or narrow and shallow.

The configurations are in tests/backbones, as they are on the Hub. The tokenizer is Storybook's, whose ids are in the same
places: start and end of text are its last two.
"""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "tests" / "backbones").glob("*.json"))}
CLIP_IMAGE = 224  # pixels
SHALLOW = 4  # layers of a text encoder


def build_tokenizer(pad_token: str) -> CLIPTokenizer:
    folder = ROOT / "examples" / "storybook" / "model" / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


def build_clip(config: dict, vocab_size: int, divide: int, layers: int) -> CLIPModel:
    """A CLIP with the text tower of a base model's text encoder; its picture tower is small, as nothing else sees it."""
    text = narrowed(config, divide) | {"vocab_size": vocab_size, "max_position_embeddings": 77, "bos_token_id": 0}
    text["num_hidden_layers"] = layers
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": CLIP_IMAGE, "patch_size": 32, "projection_dim": text["projection_dim"]}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])).eval()


def build_text_encoder(clip: CLIPModel, layers: int, with_projection: bool) -> torch.nn.Module:
    """The first layers of CLIP's text tower, with the same weights."""
    config = clip.config.text_config.__class__(**clip.config.text_config.to_dict() | {"num_hidden_layers": layers})
    encoder = (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)
    tower = {name.removeprefix("text_model."): weight for name, weight in clip.state_dict().items()}
    own = {name: tower[name.removeprefix("text_model.")] for name in encoder.state_dict()}
    encoder.load_state_dict(own)
    return encoder.eval()


def narrowed(config: dict, divide: int) -> dict:
    """A text encoder's configuration with its widths divided, and half as wide heads or less."""
    widths = ("hidden_size", "intermediate_size", "projection_dim")
    narrow = config | {name: config[name] // divide for name in widths}
    heads = config["num_attention_heads"]
    narrow["num_attention_heads"] = heads if divide == 1 else 2
    return narrow


def build_unet(config: dict, divide: int, sample_size: int | None) -> UNet2DConditionModel:
    config = dict(config)
    if divide > 1:
        config["block_out_channels"] = [width // divide for width in config["block_out_channels"]]
        config["cross_attention_dim"] //= divide
        config["attention_head_dim"] = 2
        config["layers_per_block"] = 1
        layers = config.get("transformer_layers_per_block", 1)
        config["transformer_layers_per_block"] = [min(n, 2) for n in layers] if isinstance(layers, list) else layers
        config["norm_num_groups"] = 2
        if "projection_class_embeddings_input_dim" in config:
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                config[name] //= divide
    return UNet2DConditionModel(**config | {"sample_size": sample_size or config["sample_size"]}).eval()


def build_vae(config: dict, divide: int) -> AutoencoderKL:
    blocks = len(config["block_out_channels"])
    widths = [width // divide for width in config["block_out_channels"]]
    groups = {"norm_num_groups": 32 if divide == 1 else 2, "layers_per_block": 2 if divide == 1 else 1}
    down, up = (["DownEncoderBlock2D"] * blocks, ["UpDecoderBlock2D"] * blocks)
    return AutoencoderKL(
        **config | groups | {"block_out_channels": widths, "latent_channels": 4},
        down_block_types=down,
        up_block_types=up,
    ).eval()


def build_backbone(name: str, divide: int = 1, sample_size: int | None = None, seed: int = 0) -> dict:
    """The components of a base model, and the CLIPs of its text encoders.

    Args:
        name: `"sd15"`, `"sd21"` or `"sdxl"`.
        divide: all widths by this; 1, 16 or 32. Above 1 the models are also shallow, with as many kinds of layers.
        sample_size: latents high and wide, instead of the configuration's.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name]
    scheduler, settings = config["scheduler"]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = {"tokenizer": build_tokenizer(config["pad_token"])}
    vocab_size = 49408 if divide == 1 else len(parts["tokenizer"])
    encoders = {"": "text_encoder"} | ({"_2": "text_encoder_2"} if "text_encoder_2" in config else {})
    for suffix, encoder in encoders.items():
        layers = config[encoder]["num_hidden_layers"]
        beyond = (
            config.get("clip_layers", layers) - layers
        )  # Stable Diffusion 2's text encoder lacks CLIP's last layer
        layers = layers if divide == 1 else min(layers, SHALLOW)
        clip = build_clip(config[encoder], vocab_size, divide, layers + beyond)
        parts |= {f"clip{suffix}": clip, encoder: build_text_encoder(clip, layers, with_projection=suffix == "_2")}
        parts[f"tokenizer{suffix}"] = build_tokenizer(config[f"pad_token{suffix}"])
    size = {"height": CLIP_IMAGE, "width": CLIP_IMAGE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": CLIP_IMAGE}, crop_size=size)
    return parts | {
        "vae": build_vae(config["vae"], divide),
        "unet": build_unet(config["unet"], divide, sample_size),
        "scheduler": getattr(diffusers, scheduler)(**betas, **settings),
        "clip_processor": CLIPProcessor(image_processor, parts["tokenizer"]),
    }
