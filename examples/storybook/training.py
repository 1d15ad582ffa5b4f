# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What all stages of Storybook's training share: their recipes, their data and the loop."""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from components import MAX_TOKENS, build_scheduler, load_component, write_model_index
from tqdm import tqdm
from transformers import CLIPTokenizer
from world import Scene, caption, describe, render

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel


CHECKPOINT_SECONDS = 180
LOG_EVERY, MEASURE_EVERY = 50, 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training stage uses where the command line says nothing."""

    steps: int
    batch_size: int
    learning_rate: float


RECIPES = {
    "clip": Recipe(9000, 64, 1e-3),
    "vae": Recipe(6000, 8, 1e-3),
    "decoder": Recipe(2200, 8, 4e-4),
    "unet": Recipe(21000, 32, 6e-4),
    "captioner": Recipe(1600, 64, 1e-3),
    "instruct": Recipe(4500, 32, 3e-4),
    "inpaint": Recipe(2000, 8, 3e-4),
    "dino": Recipe(2000, 32, 5e-4),
    "clip_2": Recipe(3000, 64, 1e-3),
    "unet_xl": Recipe(2000, 32, 4e-4),
}


# ---------------------------------------------------------------------------------------------------------- data


def draw(scene: Scene) -> np.ndarray:
    """One picture as `[128, 128, 3]` bytes."""
    return np.asarray(render(scene).convert("RGB"))


def made(options: argparse.Namespace, name: str) -> Path:
    """A file that an earlier stage leaves in the work folder; the script ends where it is not there yet."""
    file = options.work_dir / name
    if not file.is_file():
        stage = {"scenes": "pictures"}.get(file.stem, file.stem)
        raise SystemExit(f"--work-dir: {options.work_dir} has no {name}; first run train.py {stage}")
    return file


def load_scenes(options: argparse.Namespace) -> list[Scene]:
    return [Scene(**fields) for fields in json.loads(made(options, "scenes.json").read_text())]


def load_pictures(options: argparse.Namespace) -> np.ndarray:
    return np.load(made(options, "pictures.npy"), mmap_mode="r")


def jitter(signed: torch.Tensor) -> torch.Tensor:
    """A little brightness a picture and noise a pixel, against learning the renderer's exact values."""
    return signed + 0.1 * torch.randn_like(signed[:, :1, :1, :1]) + 0.03 * torch.randn_like(signed)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """`[N, 40]`, padded as StableDiffusionPipeline pads."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return ids.input_ids


def spread_times(count: int) -> torch.Tensor:
    """One random time step in each of `count` equal stretches: less variance than as many independent ones."""
    return ((torch.arange(count) + torch.rand(count)) * 1000 / count).long().clamp(max=999)


def unet_caption(scene: Scene, rng: random.Random) -> str:
    """One in ten is empty, which is what classifier-free guidance compares with."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    return describe(scene) if draw < 0.5 else caption(scene, rng)


def velocity_loss(
    model: UNet2DConditionModel, clean: torch.Tensor, beside: torch.Tensor | None = None, **told
) -> torch.Tensor:
    """The error of the velocity that the model foretells for noised latents.

    Args:
        clean: [N, 4, H, W], scaled latents.
        beside: [N, C, H, W], channels that the model sees as they are; none if not given.
        told: the model's other arguments.
    """
    scheduler = build_scheduler()
    times, noise = spread_times(len(clean)).to(clean.device), torch.randn_like(clean)
    seen = scheduler.add_noise(clean, noise, times)
    if beside is not None:
        seen = torch.cat([seen, beside], dim=1)
    predicted = model(seen, times, **told).sample
    return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, times))


# ------------------------------------------------------------------------------------------------------ the loop


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then constant, then linearly to zero over the last quarter. It depends on nothing but the step, so a
    finished run that is given more steps simply returns to the constant part."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (0.25 * steps))


class Training:
    """All that changes while a model trains, and what a checkpoint must therefore hold."""

    def __init__(self, stage: str, model: torch.nn.Module, options: argparse.Namespace):
        self.path = options.work_dir / f"{stage}.pt"
        self.model = model.to(options.device, memory_format=torch.channels_last).train()
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(wanted, weight_decay=1e-2, fused=True)
        self.ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
        self.rng = random.Random(f"{stage} {options.seed}")
        self.step = 0
        if self.path.exists():
            self.load(options.device)

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "ema")}
        randomness = {"python": self.rng.getstate(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            randomness["cuda"] = torch.cuda.get_rng_state()
        temporary = self.path.with_name(self.path.name + ".tmp")
        torch.save({**parts, "step": self.step, "randomness": randomness}, temporary)
        os.replace(temporary, self.path)

    def load(self, device: torch.device) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name in ("model", "optimizer", "ema"):
            getattr(self, name).load_state_dict(state[name])
        self.ema.to(device)
        self.step = state["step"]
        self.rng.setstate(state["randomness"]["python"])
        torch.set_rng_state(state["randomness"]["torch"])
        if "cuda" in state["randomness"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["randomness"]["cuda"])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The model with its averaged weights, for measuring and exporting."""
        parameters = list(self.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.ema.restore(parameters)
            self.model.train()


def begin(name: str, build: Callable[[], torch.nn.Module], options: argparse.Namespace) -> torch.nn.Module:
    """A model to train: new, or with `--from-model` the one in the model folder."""
    trained = load_component(options, name) if options.from_model else None
    return build() if trained is None else trained.train().requires_grad_(True)


def fit(
    stage: str,
    model: torch.nn.Module,
    options: argparse.Namespace,
    losses: Callable[[random.Random, int], dict[str, torch.Tensor]],
    export: Callable[[torch.nn.Module, bool], None],
    measure: Callable[[torch.nn.Module], dict[str, float]] | None = None,
) -> None:
    """Trains `model` to `--steps`, from its checkpoint if there is one.

    `losses(rng, batch_size)` draws a batch and returns named losses, of which `loss` is minimised. `export(model,
    done)` writes the averaged model; `measure(model)` scores it now and then.
    """
    recipe = RECIPES[stage]
    steps, batch_size = options.steps or recipe.steps, options.batch_size or recipe.batch_size
    peak = options.learning_rate or recipe.learning_rate
    training = Training(stage, model, options)
    with open(options.work_dir / f"{stage}.log", "a", buffering=1) as log:
        print(f"# from step {training.step} to {steps}, batch {batch_size}, bf16 {options.bf16}", file=log)
        bar = tqdm(total=steps, initial=training.step, desc=stage, mininterval=1)
        history, saved_at = [], time.monotonic()
        while training.step < steps:
            began, rate = time.monotonic(), learning_rate(training.step, steps, peak)
            named = train_step(training, losses, batch_size, rate, options)
            named = {name: float(value.detach()) for name, value in named.items()}
            history.append(named | {"lr": rate, "s/step": time.monotonic() - began})
            training.step += 1
            bar.update()
            if training.step % LOG_EVERY == 0:
                means = {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}
                print(log_line(training.step, means), file=log)
                bar.set_postfix_str(log_line(training.step, means))
                history.clear()
            if measure and training.step % MEASURE_EVERY == 0:
                with training.averaged() as average:
                    print(log_line(training.step, measure(average)), file=log)
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                finish(training, export, options, done=False)
                saved_at = time.monotonic()
        bar.close()
    finish(training, export, options, done=True)


def train_step(training: Training, losses: Callable, batch_size: int, rate: float, options) -> dict[str, torch.Tensor]:
    """One step of the optimizer and of the average."""
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bf16):
        named = losses(training.rng, batch_size)
    named["loss"].backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.ema.step(training.model.parameters())
    return named


def log_line(step: int, values: dict[str, float]) -> str:
    return f"step {step}  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items())


def finish(training: Training, export: Callable, options: argparse.Namespace, done: bool) -> None:
    """Writes the checkpoint and the component."""
    training.save()
    with training.averaged() as average, torch.no_grad():
        export(average, done)
    write_model_index(options)
