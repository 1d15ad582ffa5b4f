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
    clip_2      Storybook-XL's second CLIP and text encoder, narrower than the first
    unet_xl     Storybook-XL's UNet, from Storybook's weights, on the latents; with `--xl-dir` as its folder

A stage that trains writes a log, and a checkpoint every few minutes; after an interruption the same command goes on
from the checkpoint, and with a larger `--steps` it trains on. Every checkpoint also writes the component, in half
precision and with averaged weights, to the model folder, so that a half-trained model can be tried.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import ATTRIBUTES, PICTURE_SIZE, Scene, caption, describe, random_scene, render, restatement


HERE = Path(__file__).parent
MAX_TOKENS = 40  # the longest varied caption fits; Stable Diffusion's 77 would only cost time
VOCABULARY_SIZE = 500
WIDTH = 128  # of CLIP, of its text encoder, and so of the UNet's cross-attention
WIDTH_2 = 96  # of Storybook-XL's second one
TIME_WIDTH = 32  # of each of the six numbers that tell SDXL's kind of UNet how large the picture is
CROP = 64  # the VAE is convolutional: it learns on crops, at a quarter of the cost
TOWER = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
IMAGE_TOWER = {"num_hidden_layers": 4, "image_size": PICTURE_SIZE, "patch_size": 16}
IMAGE_SIZE = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}  # as processors want it
VAE_CHANNELS = (32, 64, 128, 128)
UNET_CHANNELS = (96, 128, 192)
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
    "clip_2": Recipe(3000, 64, 1e-3),
    "unet_xl": Recipe(2000, 32, 4e-4),
}


# ------------------------------------------------------------------------------------------ pictures and scenes


def draw(scene: Scene) -> np.ndarray:
    """One picture as `[128, 128, 3]` bytes."""
    return np.asarray(render(scene).convert("RGB"))


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


def load_scenes(options: argparse.Namespace) -> list[Scene]:
    return [Scene(**fields) for fields in json.loads((options.work_dir / "scenes.json").read_text())]


def load_pictures(options: argparse.Namespace) -> np.ndarray:
    return np.load(options.work_dir / "pictures.npy", mmap_mode="r")


def to_signed(pictures: np.ndarray) -> torch.Tensor:
    """Bytes `[N, H, W, 3]` to the VAE's `[N, 3, H, W]` in -1 to 1; the strides stay channels-last."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_clip(signed: torch.Tensor) -> torch.Tensor:
    """The VAE's range to what CLIP's and BLIP's image processors hand to their models."""
    mean, std = (torch.tensor(v, device=signed.device)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (signed / 2 + 0.5 - mean) / std


def jitter(signed: torch.Tensor) -> torch.Tensor:
    """A little brightness a picture and noise a pixel, against learning the renderer's exact values."""
    return signed + 0.1 * torch.randn_like(signed[:, :1, :1, :1]) + 0.03 * torch.randn_like(signed)


# ------------------------------------------------------------------------------------------------- writing files


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


def begin(name: str, build: Callable[[], torch.nn.Module], options: argparse.Namespace) -> torch.nn.Module:
    """A model to train: new, or with `--from-model` the one in the model folder."""
    trained = load_component(options, name) if options.from_model else None
    return build() if trained is None else trained.train().requires_grad_(True)


def write_model_index(options: argparse.Namespace) -> None:
    """Tells diffusers which class loads which folder."""
    index = {"_class_name": "DifferenceInversionPipeline", "_diffusers_version": diffusers.__version__}
    for name, (library, component) in COMPONENTS.items():
        if (options.model_dir / name).is_dir():
            index[name] = [library, component.__name__]
    write_text(options.model_dir / "model_index.json", json.dumps(index, indent=2) + "\n")


# --------------------------------------------------------------------------------------------- the training loop


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


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """`[N, 40]`, padded as StableDiffusionPipeline pads."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return ids.input_ids


# ---------------------------------------------------------------------------------------------------------- clip


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
    tokenizer = load_component(options, "tokenizer")
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


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Decibels per picture, between batches in -1 to 1, as `[N]`."""
    error = (first.clamp(-1, 1) - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


@torch.no_grad()
def encode(vae: AutoencoderKL, signed: torch.Tensor) -> torch.Tensor:
    """Means of the posteriors `[N, 4, H/8, W/8]`, not yet scaled."""
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean for batch in signed.split(16)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[N, 3, H, W]` from unscaled latents."""
    return torch.cat([vae.decode(batch).sample for batch in latents.split(16)])


def stage_vae(options: argparse.Namespace) -> None:
    """Trains the autoencoder on crops; whole held-out pictures judge it."""
    train_vae("vae", begin("vae", build_vae, options), options)


def stage_decoder(options: argparse.Namespace) -> None:
    """Trains the decoder on; the encoder stays as it is, and with it the latents and all that was learned on them."""
    vae = load_component(options, "vae")
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
    vae, pictures = load_component(options, "vae"), load_pictures(options)
    latents = np.empty((len(pictures), 4, PICTURE_SIZE // 8, PICTURE_SIZE // 8), dtype=np.float16)
    for start in tqdm(range(0, len(pictures), 64), desc="latents"):
        batch = encode(vae, to_signed(pictures[start : start + 64])) * vae.config.scaling_factor
        latents[start : start + 64] = batch.cpu().numpy()
    temporary = options.work_dir / "latents.tmp.npy"
    np.save(temporary, latents)
    os.replace(temporary, options.work_dir / "latents.npy")


# ---------------------------------------------------------------------------------------------------------- unet


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


def unet_caption(scene: Scene, rng: random.Random) -> str:
    """One in ten is empty, which is what classifier-free guidance compares with."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    return describe(scene) if draw < 0.5 else caption(scene, rng)


def spread_times(count: int) -> torch.Tensor:
    """One random time step in each of `count` equal stretches: less variance than as many independent ones."""
    return ((torch.arange(count) + torch.rand(count)) * 1000 / count).long().clamp(max=999)


def stage_unet(options: argparse.Namespace) -> None:
    """Trains the diffusion model on cached latents."""
    tokenizer, text_encoder = load_component(options, "tokenizer"), load_component(options, "text_encoder")
    save_component(build_scheduler(), options.model_dir / "scheduler")

    def told(captions: list[str]) -> dict[str, torch.Tensor]:
        ids = token_ids(tokenizer, captions).to(options.device)
        return {"encoder_hidden_states": text_encoder(ids).last_hidden_state}  # [N, 40, 128]

    train_unet("unet", begin("unet", build_unet, options), told, options, options.model_dir)


def train_unet(stage: str, model: UNet2DConditionModel, told: Callable, options, folder: Path) -> None:
    """On cached latents, told captions as the UNet's keyword arguments."""
    latents, scenes = torch.from_numpy(np.load(options.work_dir / "latents.npy")), load_scenes(options)
    scheduler = build_scheduler()

    def losses(rng: random.Random, batch_size: int) -> dict[str, torch.Tensor]:
        chosen = rng.choices(range(len(scenes)), k=batch_size)
        clean = latents[chosen].float().to(options.device)  # [N, 4, 16, 16]
        captions = [unet_caption(scenes[i], rng) for i in chosen]
        with torch.no_grad():
            text = told(captions)
        times, noise = spread_times(batch_size).to(options.device), torch.randn_like(clean)
        velocity = scheduler.get_velocity(clean, noise, times)
        predicted = model(scheduler.add_noise(clean, noise, times), times, **text).sample
        return {"loss": F.mse_loss(predicted.float(), velocity)}

    def export(average: UNet2DConditionModel, done: bool) -> None:
        save_component(average, folder / "unet")

    fit(stage, model, options, losses, export)


# ----------------------------------------------------------------------------------------------------- captioner


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
    copy_image_tower(load_component(options, "clip"), model, to_signed(pictures[:64]).to(options.device))

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


@torch.no_grad()
def describe_pictures(captioner, processor: BlipProcessor, pictures: list[Image.Image]) -> list[str]:
    """What the captioner says, as a user would ask it."""
    said = []
    for start in range(0, len(pictures), 50):
        pixels = processor(images=pictures[start : start + 50], return_tensors="pt").pixel_values
        tokens = captioner.generate(pixel_values=pixels.to(captioner.device), max_new_tokens=30)
        said += processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.replace(" ,", ",").strip() for text in said]


# --------------------------------------------------------------------------------------------- InstructPix2Pix


def draw_edit(job: tuple[Scene, int]) -> tuple[str, np.ndarray]:
    """An instruction that changes one attribute of the scene, and the picture it asks for."""
    scene, seed = job
    rng = random.Random(f"edit {seed}")
    attribute = rng.choice(list(ATTRIBUTES))
    value = rng.choice([value for value in ATTRIBUTES[attribute] if value != getattr(scene, attribute)])
    edited = dataclasses.replace(scene, **{attribute: value})
    return restatement(edited, attribute, scene, rng), draw(edited)


def stage_edits(options: argparse.Namespace) -> None:
    """Draws an edit of each of the first `--edits` training pictures and encodes it."""
    vae, scenes = load_component(options, "vae"), load_scenes(options)[: options.edits]
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


def build_instruct_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    """Storybook's UNet with four more input channels, for the picture to edit, whose weights begin at zero."""
    unet = load_component(options, "unet").requires_grad_(True)
    old = unet.conv_in
    unet.register_to_config(in_channels=8)
    unet.conv_in = torch.nn.Conv2d(8, old.out_channels, old.kernel_size, padding=old.padding).to(options.device)
    with torch.no_grad():
        unet.conv_in.weight.zero_()[:, :4].copy_(old.weight)
        unet.conv_in.bias.copy_(old.bias)
    return unet


def stage_instruct(options: argparse.Namespace) -> None:
    """Trains InstructPix2Pix from Storybook's own weights, as its paper does from Stable Diffusion's (section 3.2)."""
    tokenizer, text_encoder = load_component(options, "tokenizer"), load_component(options, "text_encoder")
    instructions = json.loads((options.work_dir / "edits.json").read_text())
    before, after = (torch.from_numpy(np.load(options.work_dir / f"{name}.npy")) for name in ("latents", "edits"))
    scale = load_component(options, "vae").config.scaling_factor
    scheduler, model = build_scheduler(), build_instruct_unet(options)

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
        times, noise = spread_times(batch_size).to(options.device), torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, times)
        predicted = model(torch.cat([noisy, picture], dim=1), times, text).sample
        return {"loss": F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, times))}

    def export(average: UNet2DConditionModel, done: bool) -> None:
        save_component(average, options.work_dir / "instruct_unet")

    fit("instruct", model, options, losses, export)


# ------------------------------------------------------------------------------------------------- storybook-xl


def stage_clip_2(options: argparse.Namespace) -> None:
    """Trains Storybook-XL's second CLIP; its text tower, with the projection, is the second text encoder."""
    tokenizer = load_component(options, "tokenizer")
    model = build_clip(tokenizer, WIDTH_2)
    save_component(tokenizer, options.xl_dir / "tokenizer_2")
    tokenizer.backend_tokenizer.model.save(str(options.xl_dir / "tokenizer_2"))

    def export(average: CLIPModel, done: bool) -> None:
        save_component(average, options.xl_dir / "clip_2")
        encoder = CLIPTextModelWithProjection.from_pretrained(options.xl_dir / "clip_2")
        save_component(encoder, options.xl_dir / "text_encoder_2")

    train_clip("clip_2", model, tokenizer, options, export)


def build_unet_xl(options: argparse.Namespace) -> UNet2DConditionModel:
    """Storybook's UNet, which begins as it was for the first text encoder's half, and deaf to what is new."""
    old = load_component(options, "unet")
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


def stage_unet_xl(options: argparse.Namespace) -> None:
    """Trains the UNet to hear two text encoders, as SDXL's does: one layer early, and the second's pooled as well."""
    tokenizer, text_encoder = load_component(options, "tokenizer"), load_component(options, "text_encoder")
    text_encoder_2 = load_component(options, "text_encoder_2", options.xl_dir)

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


# ------------------------------------------------------------------------------------------------------ evaluate


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


def to_pil(signed: torch.Tensor) -> list[Image.Image]:
    pixels = ((signed.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


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


def parse_options() -> argparse.Namespace:
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
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.bf16 = bf16_pays(options.device) if options.precision == "auto" else options.precision == "bf16"
    return options


def main() -> None:
    options = parse_options()
    keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in (options.work_dir, options.model_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for stage in ALL if options.stage == "all" else [options.stage]:
        torch.manual_seed(options.seed)
        STAGES[stage](options)


if __name__ == "__main__":
    main()
