# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Trains Storybook, a tiny Stable Diffusion of the world in `world.py`, from nothing, on a CPU or a GPU.

    python examples/storybook/train.py STAGE [--work-dir DIR] [--model-dir DIR] [--steps N] ...

STAGE is one of the following, each of which needs the ones above it, or `all` for everything down to `evaluate`:

    pictures    draws the training pictures, once
    tokenizer   learns a byte-pair vocabulary from captions
    clip        text and image towers; the text tower is also the pipeline's text encoder
    vae         pictures to latents and back
    decoder     latents back to pictures, better; can also be run, or run on, when the UNet is already trained
    latents     encodes all pictures, once
    unet        the diffusion model, on the latents
    captioner   picture to full caption
    evaluate    scores whatever is there on fresh scenes and draws sheets of samples
    edits       draws one edited picture for each picture and encodes it, once
    instruct    InstructPix2Pix's UNet, on the edits; a baseline of the benchmark, which stays in the work folder
    inpaint     a UNet that fills one picture of a grid of four, two edits; Analogist's, which stays there as well
    dino        DINO, on the pictures; an encoder for the benchmark's scores, which stays there as well
    clip_2      Storybook-XL's second CLIP and text encoder, narrower than the first
    unet_xl     Storybook-XL's UNet, from Storybook's weights, on the latents; with `--xl-dir` as its folder

A stage that trains writes a log, and a checkpoint every few minutes; after an interruption the same command goes on
from the checkpoint, and with a larger `--steps` it trains on. Every checkpoint also writes the component, in half
precision and with averaged weights, to the model folder, so that a half-trained model can be tried.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from components import (
    HERE,
    IMAGE_SIZE,
    MAX_TOKENS,
    WIDTH_2,
    build_captioner,
    build_captioner_tokenizer,
    build_clip,
    build_scheduler,
    build_unet,
    build_unet_xl,
    build_vae,
    decode,
    encode,
    need_component,
    save_component,
    to_clip,
    to_signed,
    write_model_index,
    write_text,
)
from scores import psnr, stage_evaluate
from tqdm import tqdm
from train_dino import stage_dino
from train_inpaint import stage_inpaint
from train_instruct import stage_edits, stage_instruct
from training import begin, draw, fit, jitter, load_pictures, load_scenes, made, token_ids, unet_caption, velocity_loss
from transformers import (
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from world import ATTRIBUTES, PICTURE_SIZE, caption, describe, random_scene

from diffusers import AutoencoderKL, UNet2DConditionModel


sys.path.insert(0, str(HERE.parent))

from common import make_folder, told_in_one_line  # noqa: E402


VOCABULARY_SIZE = 500
CROP = 64  # the VAE is convolutional: it learns on crops, at a quarter of the cost


# ------------------------------------------------------------------------------------------------------ pictures


def stage_pictures(options: argparse.Namespace) -> None:
    """Draws the training pictures into one array on disk."""
    pictures_path, scenes_path = options.work_dir / "pictures.npy", options.work_dir / "scenes.json"
    if pictures_path.exists() and scenes_path.exists() and len(load_scenes(options)) == options.scenes:
        print(f"{pictures_path} has its {options.scenes} pictures; delete it to draw them anew")
        return
    rng = random.Random(f"training {options.seed}")
    scenes = [random_scene(rng) for _ in range(options.scenes)]
    temporary = options.work_dir / "pictures.tmp.npy"
    shape = (len(scenes), PICTURE_SIZE, PICTURE_SIZE, 3)
    pictures = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
    # Fresh interpreters, because a forked copy of a process that has run torch can deadlock in its thread pools.
    with multiprocessing.get_context("spawn").Pool(options.threads or os.cpu_count()) as pool:
        drawn = pool.imap(draw, scenes, chunksize=64)
        for index, picture in enumerate(tqdm(drawn, total=len(scenes), desc="pictures")):
            pictures[index] = picture
    pictures.flush()
    write_text(scenes_path, json.dumps([dataclasses.asdict(scene) for scene in scenes]))
    os.replace(temporary, pictures_path)


# ----------------------------------------------------------------------------------------------------- tokenizer


def stage_tokenizer(options: argparse.Namespace) -> None:
    """Learns CLIP's kind of byte-pair vocabulary from captions, so that every frequent word is one token."""
    folder = options.model_dir / "tokenizer"
    if folder.is_dir():
        # Byte-pair training breaks ties at random, and a new numbering would make trained text encoders useless.
        print(f"{folder} exists and is kept; delete it, and all that was trained with it, to learn a new one")
        return
    rng = random.Random(f"tokenizer {options.seed}")
    captions = [caption(random_scene(rng), rng) for _ in range(100_000)]
    tokenizer = CLIPTokenizer(**learn_byte_pairs(captions), model_max_length=MAX_TOKENS)
    save_component(tokenizer, folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which transformers 4 reads
    check_tokenizer(CLIPTokenizer.from_pretrained(folder), captions[:1000])
    write_model_index(options)


def learn_byte_pairs(captions: list[str]) -> dict:
    """`vocab` and `merges` for a `CLIPTokenizer`: letters and signs, the same at a word's end, merges, then the two
    special tokens, in CLIP's order."""
    alphabet = sorted({chr(code).lower() for code in range(33, 127)})
    blank = CLIPTokenizer().backend_tokenizer  # for CLIP's own normalisation and splitting into words
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    # Each sign once as a word of its own, so that words that no caption has can still be spelled.
    learner.train_from_iterator(itertools.chain(captions, alphabet), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"] | {"<|startoftext|>": len(learned["vocab"]), "<|endoftext|>": len(learned["vocab"]) + 1}
    return {"vocab": vocab, "merges": [tuple(pair) for pair in learned["merges"]]}


def check_tokenizer(tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    ids = tokenizer(captions).input_ids
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert all(tokenizer.eos_token_id not in row[1:-1] for row in ids), "a caption has unknown signs"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id
    print(f"{len(tokenizer)} tokens; the longest of {len(ids)} captions has {max(map(len, ids))} of {MAX_TOKENS}")


# ---------------------------------------------------------------------------------------------------------- clip


def contrastive_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Cross-entropy both ways over `[N, N]` logits, where all pairs that are the `same` share the target."""
    targets = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def similar_scenes(values: np.ndarray, count: int, rng: random.Random) -> list[int]:
    """Indices of scenes that agree in three to five attributes, and so can only be told apart by the others.

    The subject is always among the others. It is the one attribute that is a shape and not a colour or a texture, and
    an image tower that can tell most scenes apart without it does not learn to see it.
    """
    subject = list(ATTRIBUTES).index("subject")
    others = [column for column in range(values.shape[1]) if column != subject]
    anchor, shared = rng.randrange(len(values)), rng.sample(others, rng.choice((3, 4, 5)))
    candidates = np.flatnonzero((values[:, shared] == values[anchor, shared]).all(axis=1))
    return [int(rng.choice(candidates)) for _ in range(count)]


def stage_clip(options: argparse.Namespace) -> None:
    """Trains CLIP, whose text tower is also the text encoder."""
    made(options, "pictures.npy")  # before anything is written
    tokenizer = need_component(options, "tokenizer")
    images = CLIPImageProcessor(size={"shortest_edge": PICTURE_SIZE}, crop_size=IMAGE_SIZE)
    save_component(CLIPProcessor(images, tokenizer), options.model_dir / "clip_processor")

    def export(average: CLIPModel, done: bool) -> None:
        save_component(average, options.model_dir / "clip")
        # Read back from CLIP's folder: the text encoder is the same weights, under the names of CLIP's text tower.
        save_component(CLIPTextModel.from_pretrained(options.model_dir / "clip"), options.model_dir / "text_encoder")

    train_clip("clip", begin("clip", functools.partial(build_clip, tokenizer), options), tokenizer, options, export)


def train_clip(stage: str, model: CLIPModel, tokenizer: CLIPTokenizer, options, export: Callable) -> None:
    """With many near misses in each batch."""
    pictures, scenes = load_pictures(options), load_scenes(options)
    values = np.array([[ATTRIBUTES[name].index(getattr(scene, name)) for name in ATTRIBUTES] for scene in scenes])

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = similar_scenes(values, batch_size // 2, rng)
        chosen += rng.choices(range(len(scenes)), k=batch_size - len(chosen))
        texts = [describe(scenes[i]) if rng.random() < 0.5 else caption(scenes[i], rng) for i in chosen]
        pixels = jitter(to_signed(pictures[chosen]).to(options.device))  # [N, 3, 128, 128]
        # Padded to the longest only: the tower is causal and pools at the end token, so more padding changes nothing.
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(options.device)
        output = model(input_ids=ids, pixel_values=to_clip(pixels))
        scale = model.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * output.image_embeds.float() @ output.text_embeds.float().T
        same = torch.from_numpy((values[chosen, None] == values[None, chosen]).all(axis=-1)).to(logits.device)
        right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return {"loss": contrastive_loss(logits.float(), same), "right": right}

    fit(stage, model, options, losses, export)


# ----------------------------------------------------------------------------------------------------------- vae


def random_crops(pictures: np.ndarray, count: int, rng: random.Random) -> np.ndarray:
    """`[count, 64, 64, 3]` bytes.

    Crops start where latent cells do: whole pictures, too, meet the blocks of pixel art and the strokes of a pencil
    sketch, which repeat every 4 and 8 pixels, at that phase only, and need not spend latents on any other.
    """
    crops = []
    for _ in range(count):
        index = rng.randrange(len(pictures))
        top, left = (8 * rng.randrange((PICTURE_SIZE - CROP) // 8 + 1) for _ in range(2))
        crops.append(pictures[index, top : top + CROP, left : left + CROP])
    return np.stack(crops)


def stage_vae(options: argparse.Namespace) -> None:
    """Trains the autoencoder on crops; whole held-out pictures judge it."""
    train_vae("vae", begin("vae", build_vae, options), options)


def stage_decoder(options: argparse.Namespace) -> None:
    """Trains the decoder on; the encoder stays as it is, and with it the latents and all that was learned on them."""
    vae = need_component(options, "vae")
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    train_vae("decoder", vae, options)


def train_vae(stage: str, model: AutoencoderKL, options: argparse.Namespace) -> None:
    pictures = load_pictures(options)
    rng = random.Random("validation")
    held_out = to_signed(np.stack([draw(random_scene(rng)) for _ in range(64)])).to(options.device)

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        crops = to_signed(random_crops(pictures, batch_size, rng)).to(options.device)  # [N, 3, 64, 64]
        posterior = model.encode(crops).latent_dist
        error = model.decode(posterior.sample()).sample.float() - crops
        mse, l1, kl = error.square().mean(), error.abs().mean(), posterior.kl().float().mean()
        return {"loss": mse + 0.05 * l1 + 1e-6 * kl, "mse": mse, "l1": l1, "kl": kl}

    def measure(average: AutoencoderKL) -> dict[str, float]:
        return {"psnr": float(psnr(decode(average, encode(average, held_out)), held_out).mean())}

    def export(average: AutoencoderKL, done: bool) -> None:
        if stage == "vae":
            # Scaled latents have unit variance, which is what the noise schedule supposes.
            spread = encode(average, to_signed(pictures[: 1000 if done else 100])).std()
            average.register_to_config(scaling_factor=1 / float(spread))
        save_component(average, options.model_dir / "vae")

    fit(stage, model, options, losses, export, measure)


def stage_latents(options: argparse.Namespace) -> None:
    """Encodes every picture with the VAE as it was saved."""
    vae, pictures = need_component(options, "vae"), load_pictures(options)
    latents = np.empty((len(pictures), 4, PICTURE_SIZE // 8, PICTURE_SIZE // 8), dtype=np.float16)
    for start in tqdm(range(0, len(pictures), 64), desc="latents"):
        batch = encode(vae, to_signed(pictures[start : start + 64])) * vae.config.scaling_factor
        latents[start : start + 64] = batch.cpu().numpy()
    temporary = options.work_dir / "latents.tmp.npy"
    np.save(temporary, latents)
    os.replace(temporary, options.work_dir / "latents.npy")


# ---------------------------------------------------------------------------------------------------------- unet


def stage_unet(options: argparse.Namespace) -> None:
    """Trains the diffusion model on cached latents."""
    tokenizer, text_encoder = need_component(options, "tokenizer"), need_component(options, "text_encoder")
    save_component(build_scheduler(), options.model_dir / "scheduler")

    def told(captions: list[str]) -> dict[str, torch.Tensor]:
        ids = token_ids(tokenizer, captions).to(options.device)
        return {"encoder_hidden_states": text_encoder(ids).last_hidden_state}  # [N, 40, 128]

    train_unet("unet", begin("unet", build_unet, options), told, options, options.model_dir)


def train_unet(stage: str, model: UNet2DConditionModel, told: Callable, options, folder: Path) -> None:
    """On cached latents, told captions as the UNet's keyword arguments."""
    latents, scenes = torch.from_numpy(np.load(made(options, "latents.npy"))), load_scenes(options)

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = rng.choices(range(len(scenes)), k=batch_size)
        clean = latents[chosen].float().to(options.device)  # [N, 4, 16, 16]
        captions = [unet_caption(scenes[i], rng) for i in chosen]
        with torch.no_grad():
            text = told(captions)
        return {"loss": velocity_loss(model, clean, **text)}

    def export(average: UNet2DConditionModel, done: bool) -> None:
        save_component(average, folder / "unet")

    fit(stage, model, options, losses, export)


# ----------------------------------------------------------------------------------------------------- captioner


@torch.no_grad()
def copy_image_tower(clip: CLIPModel, captioner: BlipForConditionalGeneration, signed: torch.Tensor) -> None:
    """CLIP's image tower into BLIP's, which has one matrix for query, key and value and no norm before its layers.

    That norm mostly rescales, so its gain on these pictures goes into the embeddings.
    """
    source, target = clip.vision_model, captioner.vision_model
    gain = source.pre_layrnorm.weight / source.embeddings(to_clip(signed)).std()
    patches, positions = source.embeddings.patch_embedding.weight, source.embeddings.position_embedding.weight
    target.embeddings.class_embedding.copy_(gain * source.embeddings.class_embedding)
    target.embeddings.patch_embedding.weight.copy_(gain[:, None, None, None] * patches)
    target.embeddings.patch_embedding.bias.copy_(source.pre_layrnorm.bias)
    target.embeddings.position_embedding.copy_(gain * positions)
    target.post_layernorm.load_state_dict(source.post_layernorm.state_dict())
    for old, new in zip(source.encoder.layers, target.encoder.layers, strict=True):
        heads = (old.self_attn.q_proj, old.self_attn.k_proj, old.self_attn.v_proj)
        new.self_attn.qkv.weight.copy_(torch.cat([head.weight for head in heads]))
        new.self_attn.qkv.bias.copy_(torch.cat([head.bias for head in heads]))
        new.self_attn.projection.load_state_dict(old.self_attn.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(new, name).load_state_dict(getattr(old, name).state_dict())


def stage_captioner(options: argparse.Namespace) -> None:
    """Trains BLIP to say the full caption of a picture."""
    pictures, scenes = load_pictures(options), load_scenes(options)
    tokenizer = build_captioner_tokenizer()
    model = build_captioner(tokenizer).to(options.device)
    copy_image_tower(need_component(options, "clip"), model, to_signed(pictures[:64]).to(options.device))

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = rng.choices(range(len(scenes)), k=batch_size)
        pixels = jitter(to_signed(pictures[chosen]).to(options.device))  # [N, 3, 128, 128]
        texts = tokenizer([describe(scenes[i]) for i in chosen], padding=True, return_tensors="pt").to(options.device)
        labels = texts.input_ids.masked_fill(texts.attention_mask == 0, -100)
        output = model(to_clip(pixels), texts.input_ids, attention_mask=texts.attention_mask, labels=labels)
        return {"loss": output.loss}

    def export(average: BlipForConditionalGeneration, done: bool) -> None:
        save_component(average, options.model_dir / "captioner")

    processor = BlipProcessor(BlipImageProcessor(size=IMAGE_SIZE), tokenizer)
    save_component(processor, options.model_dir / "captioner_processor")
    fit("captioner", model, options, losses, export)


# -------------------------------------------------------------------------------------------------- storybook-xl


def stage_clip_2(options: argparse.Namespace) -> None:
    """Trains Storybook-XL's second CLIP; its text tower, with the projection, is the second text encoder."""
    made(options, "pictures.npy")  # before anything is written
    tokenizer = need_component(options, "tokenizer")
    model = build_clip(tokenizer, WIDTH_2)
    save_component(tokenizer, options.xl_dir / "tokenizer_2")
    tokenizer.backend_tokenizer.model.save(str(options.xl_dir / "tokenizer_2"))

    def export(average: CLIPModel, done: bool) -> None:
        save_component(average, options.xl_dir / "clip_2")
        encoder = CLIPTextModelWithProjection.from_pretrained(options.xl_dir / "clip_2")
        save_component(encoder, options.xl_dir / "text_encoder_2")

    train_clip("clip_2", model, tokenizer, options, export)


def stage_unet_xl(options: argparse.Namespace) -> None:
    """Trains the UNet to hear two text encoders, as SDXL's does: one layer early, and the second's pooled as well."""
    tokenizer, text_encoder = need_component(options, "tokenizer"), need_component(options, "text_encoder")
    text_encoder_2 = need_component(options, "text_encoder_2", options.xl_dir)

    def told(captions: list[str]) -> dict[str, Any]:
        ids = token_ids(tokenizer, captions).to(options.device)
        first, second = (encoder(ids, output_hidden_states=True) for encoder in (text_encoder, text_encoder_2))
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)  # [N, 40, 224]
        # An empty caption is zeros, as force_zeros_for_empty_prompt has it.
        said = torch.tensor([bool(words) for words in captions], device=options.device)[:, None]
        size = torch.tensor([PICTURE_SIZE, PICTURE_SIZE, 0, 0, PICTURE_SIZE, PICTURE_SIZE], device=options.device)
        added = {"text_embeds": second.text_embeds * said, "time_ids": size.float().expand(len(captions), -1)}
        return {"encoder_hidden_states": text * said[:, None], "added_cond_kwargs": added}

    train_unet("unet_xl", build_unet_xl(options), told, options, options.xl_dir)


# ---------------------------------------------------------------------------------------------------------- main


STAGES = {
    "pictures": stage_pictures,
    "tokenizer": stage_tokenizer,
    "clip": stage_clip,
    "vae": stage_vae,
    "decoder": stage_decoder,
    "latents": stage_latents,
    "unet": stage_unet,
    "captioner": stage_captioner,
    "evaluate": stage_evaluate,
    "edits": stage_edits,
    "instruct": stage_instruct,
    "inpaint": stage_inpaint,
    "dino": stage_dino,
    "clip_2": stage_clip_2,
    "unet_xl": stage_unet_xl,
}


ALL = list(STAGES)[: list(STAGES).index("evaluate") + 1]


def keep_memory() -> None:
    """Starts this process anew with glibc told to keep memory that it has once got.

    By default it hands the large tensors of a step back to the system and asks for them again in the next step, which
    can cost a third of the time. It reads these settings when a process starts, so setting them now would be too late.
    """
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    if sys.platform == "linux" and any(name not in os.environ for name in settings):
        os.execve(sys.executable, sys.orig_argv, os.environ | settings)


def bf16_pays(device: torch.device) -> bool:
    """True where bfloat16 arithmetic is faster: on a CPU with AVX-512's alone the UNet took half as long again."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("amx_bf16"))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work-dir", type=Path, default=HERE / "runs", help="pictures, logs, checkpoints, sheets")
    parser.add_argument("--model-dir", type=Path, default=HERE / "model", help="the components")
    parser.add_argument("--xl-dir", type=Path, default=HERE / "model_xl", help="what Storybook-XL has of its own")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch's own choice")
    parser.add_argument("--scenes", type=int, default=24000, help="training pictures")
    parser.add_argument("--edits", type=int, default=24000, help="edited pictures, at most one for each picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="total, counted from the start of the stage")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--from-model", action="store_true", help="where there is no checkpoint, train the model folder's weights on"
    )
    parser.add_argument("--learning-rate", type=float, help="at its highest")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the training steps")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of evaluation's text to image")
    parser.add_argument("--evaluation-scenes", type=int, default=200)
    options = parser.parse_args(arguments)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.bf16 = bf16_pays(options.device) if options.precision == "auto" else options.precision == "bf16"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    with told_in_one_line():
        make_folder(options.work_dir, "--work-dir")
        make_folder(options.model_dir, "--model-dir")
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for stage in ALL if options.stage == "all" else [options.stage]:
        torch.manual_seed(options.seed)
        STAGES[stage](options)


if __name__ == "__main__":
    main()
