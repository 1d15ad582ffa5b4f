# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""InstructPix2Pix's UNet on Storybook's world, a baseline of the benchmark: stages of `train.py`."""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import random

import numpy as np
import torch
from components import (
    build_wider_unet,
    encode,
    need_component,
    save_component,
    to_signed,
    write_text,
)
from tqdm import tqdm
from training import draw, fit, load_scenes, made, token_ids, velocity_loss
from world import ATTRIBUTES, Scene, restatement

from diffusers import UNet2DConditionModel


def draw_edit_of(scene: Scene, seed: int) -> tuple[str, Scene]:
    """An instruction that changes one attribute of the scene, and the scene it asks for."""
    rng = random.Random(f"edit {seed}")
    attribute = rng.choice(list(ATTRIBUTES))
    value = rng.choice([value for value in ATTRIBUTES[attribute] if value != getattr(scene, attribute)])
    edited = dataclasses.replace(scene, **{attribute: value})
    return restatement(edited, attribute, scene, rng), edited


def draw_edit(job: tuple[Scene, int]) -> tuple[str, np.ndarray]:
    instruction, edited = draw_edit_of(*job)
    return instruction, draw(edited)


def stage_edits(options: argparse.Namespace) -> None:
    """Draws an edit of each of the first `--edits` training pictures and encodes it."""
    vae, scenes = need_component(options, "vae"), load_scenes(options)[: options.edits]
    instructions, latents = [], []
    with multiprocessing.get_context("spawn").Pool(options.threads or os.cpu_count()) as pool:
        drawn = pool.imap(draw_edit, zip(scenes, range(len(scenes)), strict=True), chunksize=64)
        for _ in tqdm(range(0, len(scenes), 64), desc="edits"):
            batch = list(itertools.islice(drawn, 64))
            instructions += [instruction for instruction, _ in batch]
            signed = to_signed(np.stack([picture for _, picture in batch]))
            latents.append((encode(vae, signed) * vae.config.scaling_factor).half().cpu())
    temporary = options.work_dir / "edits.tmp.npy"
    np.save(temporary, torch.cat(latents).numpy())
    os.replace(temporary, options.work_dir / "edits.npy")
    write_text(options.work_dir / "edits.json", json.dumps(instructions))


def stage_instruct(options: argparse.Namespace) -> None:
    """Trains InstructPix2Pix from Storybook's own weights, as its paper does from Stable Diffusion's (section 3.2)."""
    tokenizer, text_encoder = need_component(options, "tokenizer"), need_component(options, "text_encoder")
    instructions = json.loads(made(options, "edits.json").read_text())
    before, after = (torch.from_numpy(np.load(made(options, f"{name}.npy"))) for name in ("latents", "edits"))
    scale = need_component(options, "vae").config.scaling_factor
    model = build_wider_unet(options, 8)

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = rng.choices(range(len(after)), k=batch_size)
        clean = after[chosen].float().to(options.device)  # [N, 4, 16, 16]
        # Its pipeline gives the picture as the VAE has it, not scaled. Each condition, and both, is left out 5 % of times.
        picture = before[chosen].float().to(options.device) / scale
        kept_text, kept_picture = (torch.rand(2, batch_size) >= 0.05) & (torch.rand(batch_size) >= 0.05)
        picture = picture * kept_picture[:, None, None, None].to(options.device)
        said = [instructions[i] if kept else "" for i, kept in zip(chosen, kept_text.tolist(), strict=True)]
        with torch.no_grad():
            text = text_encoder(token_ids(tokenizer, said).to(options.device)).last_hidden_state  # [N, 40, 128]
        return {"loss": velocity_loss(model, clean, picture, encoder_hidden_states=text)}

    def export(average: UNet2DConditionModel, done: bool) -> None:
        save_component(average, options.work_dir / "instruct_unet")

    fit("instruct", model, options, losses, export)
