# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""An inpainting UNet of Storybook's world, which Analogist needs; a stage of `train.py`."""

import argparse
import random

import numpy as np
import torch
from components import build_wider_unet, encode, need_component, save_component
from train_instruct import draw_edit_of
from training import fit, load_scenes, made, token_ids, unet_caption, velocity_loss
from world import PICTURE_SIZE

from diffusers import UNet2DConditionModel


CELL = PICTURE_SIZE // 8  # latents to a side of one picture


def as_grid(cells: torch.Tensor) -> torch.Tensor:
    """[N, 4, C, H, W] as [N, C, 2 H, 2 W]: two pictures above two others."""
    top, bottom = (torch.cat(row.unbind(1), dim=-1) for row in cells.split(2, dim=1))
    return torch.cat([top, bottom], dim=-2)


def stage_inpaint(options: argparse.Namespace) -> None:
    """Trains an inpainting model from Storybook's own weights, as Stable Diffusion's was, but on 2x2 grids.

    Each row of a grid is a training picture beside its edit, in any order. One of the four cells is missing, and its caption
    is told. The two edits of a grid have nothing to do with each other: no analogy is ever shown.
    """
    tokenizer, text_encoder = need_component(options, "tokenizer"), need_component(options, "text_encoder")
    vae = need_component(options, "vae")
    latents = [torch.from_numpy(np.load(made(options, f"{name}.npy"))) for name in ("latents", "edits")]
    scenes = load_scenes(options)[: len(latents[1])]
    both = [(scene, draw_edit_of(scene, index)[1]) for index, scene in enumerate(scenes)]
    gray = torch.zeros(1, 3, PICTURE_SIZE, PICTURE_SIZE, device=options.device)  # what a pipeline puts in the hole
    hole = encode(vae, gray)[0] * vae.config.scaling_factor
    model = build_wider_unet(options, 9)

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        cells, said = [], []
        missing = torch.zeros(batch_size, 4, 1, CELL, CELL, device=options.device)
        for grid in missing:
            places = [(index, side) for index in rng.sample(range(len(both)), 2) for side in rng.sample((0, 1), 2)]
            cells.append(torch.stack([latents[side][index] for index, side in places]))
            cell = rng.randrange(4)
            grid[cell] = 1
            said.append(unet_caption(both[places[cell][0]][places[cell][1]], rng))
        cells = torch.stack(cells).float().to(options.device)  # [N, 4, 4, 16, 16]
        shown = torch.where(missing.bool(), hole, cells)
        with torch.no_grad():
            text = text_encoder(token_ids(tokenizer, said).to(options.device)).last_hidden_state  # [N, 40, 128]
        beside = torch.cat([as_grid(missing), as_grid(shown)], dim=1)  # [N, 5, 32, 32]
        return {"loss": velocity_loss(model, as_grid(cells), beside, encoder_hidden_states=text)}

    def export(average: UNet2DConditionModel, done: bool) -> None:
        save_component(average, options.work_dir / "inpaint_unet")

    fit("inpaint", model, options, losses, export)
