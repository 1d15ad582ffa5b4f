# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""A DINO of Storybook's world, the second encoder of the paper's Table 1; a stage of `train.py`."""

import argparse
import copy
import random

import torch
import torch.nn.functional as F
from components import IMAGE_SIZE, PICTURE_SIZE, TOWER, save_component, to_clip, to_signed
from training import fit, jitter, load_pictures
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


PROTOTYPES = 512
LEAST_SIDE = 0.6  # of a view, as a share of the picture's side: smaller ones can miss the subject
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04  # as in DINO's paper, like the two rates
TEACHER_RATE, CENTER_RATE = 0.996, 0.9


class SelfDistillation(torch.nn.Module):
    """DINO (Caron et al. 2021): a student foretells what its own slow average, the teacher, says of another view."""

    def __init__(self):
        super().__init__()
        size = {"image_size": PICTURE_SIZE, "patch_size": 16, "num_hidden_layers": 4}
        width, heads = TOWER["hidden_size"], TOWER["num_attention_heads"]
        backbone = Dinov2Model(Dinov2Config(hidden_size=width, num_attention_heads=heads, **size))
        head = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width),
            torch.nn.GELU(),
            torch.nn.Linear(2 * width, 64),
        )
        prototypes = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, PROTOTYPES, bias=False))
        self.student = torch.nn.ModuleDict({"backbone": backbone, "head": head, "prototypes": prototypes})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(PROTOTYPES))

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Of two views [N, 3, H, W] of the same pictures."""
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 1 - TEACHER_RATE)
            said = [logits(self.teacher, view) for view in views]
            targets = [((one - self.center) / TEACHER_TEMPERATURE).softmax(dim=-1) for one in said]
            self.center.lerp_(torch.cat(said).mean(dim=0), 1 - CENTER_RATE)
        foretold = [(logits(self.student, view) / STUDENT_TEMPERATURE).log_softmax(dim=-1) for view in views]
        return -sum((a * b).sum(dim=-1).mean() for a, b in zip(targets, foretold[::-1], strict=True)) / 2


def logits(net: torch.nn.ModuleDict, view: torch.Tensor) -> torch.Tensor:
    return net["prototypes"](F.normalize(net["head"](net["backbone"](view).pooler_output), dim=-1))


def random_views(pictures: torch.Tensor) -> torch.Tensor:
    """A random part of each picture, as large as the picture."""
    side = LEAST_SIDE + (1 - LEAST_SIDE) * torch.rand(len(pictures), 1)
    corner = (1 - side) * (2 * torch.rand(len(pictures), 2) - 1)
    frames = torch.cat([torch.diag_embed(side.expand(-1, 2)), corner[..., None]], dim=-1)  # [N, 2, 3]
    places = F.affine_grid(frames, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, places.to(pictures.device), padding_mode="reflection", align_corners=False)


def stage_dino(options: argparse.Namespace) -> None:
    """Trains it on the pictures alone, from nothing; it never meets a caption."""
    pictures, model = load_pictures(options), SelfDistillation()

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = [rng.randrange(len(pictures)) for _ in range(batch_size)]
        signed = to_signed(pictures[chosen]).to(options.device)  # [N, 3, 128, 128]
        return {"loss": model.loss([to_clip(jitter(random_views(signed))) for _ in range(2)])}

    def export(average: SelfDistillation, done: bool) -> None:
        save_component(average.teacher["backbone"], options.work_dir / "dino")
        size = {"size": IMAGE_SIZE, "do_center_crop": False}
        normal = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}  # as CLIP's tower is given them
        BitImageProcessor(**size, **normal).save_pretrained(options.work_dir / "dino")

    fit("dino", model, options, losses, export)
