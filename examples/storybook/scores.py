# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores Storybook's components on fresh scenes and draws sheets of samples: a stage of `train.py`."""

import argparse
import dataclasses
import functools
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from components import COMPONENTS, decode, encode, load_component, scenes_by_description, to_pil, to_signed, write_text
from PIL import Image
from tqdm import tqdm
from training import draw, token_ids
from transformers import BlipProcessor, CLIPModel, CLIPProcessor
from world import ATTRIBUTES, Scene, describe, random_scene, restatement

from diffusers import DDIMInverseScheduler, StableDiffusionPipeline
from diffusers.utils import make_image_grid


def attributes_right(said: list[str], scenes: list[Scene]) -> dict[str, float]:
    """How often the whole caption is right, and each attribute in it."""
    stated = [scenes_by_description().get(text, {}) for text in said]
    rates = {
        name: np.mean([fields.get(name) == getattr(scene, name) for fields, scene in zip(stated, scenes, strict=True)])
        for name in ATTRIBUTES
    }
    whole = np.mean([text == describe(scene) for text, scene in zip(said, scenes, strict=True)])
    return {"all": float(whole)} | {name: float(rate) for name, rate in rates.items()}


@torch.no_grad()
def describe_pictures(captioner, processor: BlipProcessor, pictures: list[Image.Image]) -> list[str]:
    """What the captioner says, as a user would ask it."""
    said = []
    for start in range(0, len(pictures), 50):
        pixels = processor(images=pictures[start : start + 50], return_tensors="pt").pixel_values
        tokens = captioner.generate(pixel_values=pixels.to(captioner.device), max_new_tokens=30)
        said += processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.replace(" ,", ",").strip() for text in said]


@torch.no_grad()
def clip_retrieval(clip: CLIPModel, processor: CLIPProcessor, pictures: list, scenes: list[Scene]) -> float:
    """How often a picture's nearest caption among 64 is its own."""
    right = []
    for start in range(0, len(scenes) - 63, 64):
        texts = [describe(scene) for scene in scenes[start : start + 64]]
        batch = processor(text=texts, images=pictures[start : start + 64], padding=True, return_tensors="pt")
        nearest = clip(**batch.to(clip.device)).logits_per_image.argmax(1).tolist()
        right += [texts[found] == text for found, text in zip(nearest, texts, strict=True)]
    return float(np.mean(right))


def text_features(clip: CLIPModel, processor: CLIPProcessor, texts: list[str]) -> torch.Tensor:
    """`[N, 128]`, of unit length."""
    batch = processor(text=texts, padding=True, return_tensors="pt").to(clip.device)
    return F.normalize(clip.text_projection(clip.text_model(**batch).pooler_output), dim=-1)


@torch.no_grad()
def clip_near_misses(clip: CLIPModel, processor: CLIPProcessor, pictures: list, scenes: list[Scene]) -> dict:
    """By attribute, how often a picture is nearer to its own caption than to every one with another value of it."""
    rates = {}
    for name, values in ATTRIBUTES.items():
        right = []
        for picture, scene in zip(pictures, scenes, strict=True):
            texts = [describe(dataclasses.replace(scene, **{name: value})) for value in values]
            batch = processor(text=texts, images=picture, padding=True, return_tensors="pt").to(clip.device)
            right.append(values[clip(**batch).logits_per_image.argmax()] == getattr(scene, name))
        rates[name] = float(np.mean(right))
    return rates


@torch.no_grad()
def clip_restated(clip: CLIPModel, processor: CLIPProcessor, scenes: list[Scene]) -> dict[str, float]:
    """By attribute, how often a caption that its end revises is nearer to what it then says than to what it said first.

    A difference is such an end, so this bounds what difference tokens can say to the text encoder.
    """
    rng, rates = random.Random("restated"), {}
    for name, values in ATTRIBUTES.items():
        new = [
            dataclasses.replace(s, **{name: rng.choice([v for v in values if v != getattr(s, name)])}) for s in scenes
        ]
        revised = [f"{describe(s)}, {restatement(n, name, s, rng)}" for s, n in zip(scenes, new, strict=True)]
        texts = [[describe(n) for n in new], [describe(s) for s in scenes], revised]
        after, before, said = (text_features(clip, processor, lines) for lines in texts)
        rates[name] = float(((said * after).sum(-1) > (said * before).sum(-1)).float().mean())
    return rates


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Decibels per picture, between batches in -1 to 1, as `[N]`."""
    error = (first.clamp(-1, 1) - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def text_to_image(pipeline: StableDiffusionPipeline, texts: list[str], options) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for start in tqdm(range(0, len(texts), 25), desc="text to image"):
        batch, guidance = texts[start : start + 25], options.guidance_scale
        pictures += pipeline(batch, num_inference_steps=50, guidance_scale=guidance, generator=generator).images
    return pictures


@torch.no_grad()
def invert_and_return(pipeline: StableDiffusionPipeline, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Latents `[N, 4, 16, 16]` to noise by DDIM inversion and back by DDIM, 50 steps each way, without guidance."""
    ids = token_ids(pipeline.tokenizer, texts).to(latents.device)
    text = pipeline.text_encoder(ids).last_hidden_state
    for scheduler in (DDIMInverseScheduler.from_config(pipeline.scheduler.config), pipeline.scheduler):
        scheduler.set_timesteps(50)
        for time_step in tqdm(scheduler.timesteps, desc="inversion"):
            predicted = pipeline.unet(latents, time_step, text).sample
            latents = scheduler.step(predicted, time_step, latents).prev_sample
    return latents


def save_sheet(pictures: list[Image.Image], path: Path) -> None:
    """The first pictures, eight to a row, up to 64."""
    rows = min(8, len(pictures) // 8)
    make_image_grid(pictures[: 8 * rows], rows, 8).save(path)


def stage_evaluate(options: argparse.Namespace) -> None:
    """Scores the saved components, which a user would load, on scenes that no training stage has drawn."""
    rng = random.Random("evaluation")
    scenes = [random_scene(rng) for _ in range(options.evaluation_scenes)]
    texts, signed = [describe(scene) for scene in scenes], to_signed(np.stack([draw(scene) for scene in scenes]))
    signed, pictures = signed.to(options.device), to_pil(signed)
    parts = {name: load_component(options, name) for name in COMPONENTS}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        print("Not there yet, so what needs them is skipped:", ", ".join(missing))
    save_sheet(pictures, options.work_dir / "scenes.png")

    def have(*names: str) -> bool:
        return not set(names) & set(missing)

    scores = {"scenes": len(scenes), "guidance_scale": options.guidance_scale}
    if have("vae"):
        latents = encode(parts["vae"], signed)
        rebuilt = decode(parts["vae"], latents)
        scores["vae_psnr"] = float(psnr(rebuilt, signed).mean())
        save_sheet(to_pil(rebuilt), options.work_dir / "reconstructions.png")
    if have("clip", "clip_processor") and len(scenes) >= 64:
        both = parts["clip"], parts["clip_processor"]
        scores["clip_retrieval_among_64"] = clip_retrieval(*both, pictures, scenes)
        scores["clip_near_misses"] = clip_near_misses(*both, pictures, scenes)
        scores["clip_restated"] = clip_restated(*both, scenes)
    if have("captioner", "captioner_processor"):
        reader = functools.partial(describe_pictures, parts["captioner"], parts["captioner_processor"])
        scores["captioner_right"] = attributes_right(reader(pictures), scenes)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    if have(*names):
        extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**{name: parts[name] for name in names}, **extras)
        pipeline.set_progress_bar_config(disable=True)
        factor = pipeline.vae.config.scaling_factor
        returned = decode(pipeline.vae, invert_and_return(pipeline, latents * factor, texts) / factor)
        scores["inversion_psnr"] = float(psnr(returned, signed).mean())
        save_sheet(to_pil(returned), options.work_dir / "inversions.png")
        drawn = text_to_image(pipeline, texts, options)
        save_sheet(drawn, options.work_dir / "text_to_image.png")
        if have("captioner", "captioner_processor"):
            scores["text_to_image_right"] = attributes_right(reader(drawn), scenes)
    write_text(options.work_dir / "evaluation.json", json.dumps(scores, indent=2) + "\n")
    print_scores(scores)


def print_scores(scores: dict) -> None:
    print("| measure | score |\n|---|---|")
    for name, value in scores.items():
        rows = {f"{name}: {part}": rate for part, rate in value.items()} if isinstance(value, dict) else {name: value}
        for row, number in rows.items():
            print(f"| {row} | {number:.4g} |")
