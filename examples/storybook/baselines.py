# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What the benchmark compares with and diffusers has no pipeline for: VISII, DIA and Analogist."""

import torch
import torch.nn.functional as F
from PIL import Image

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.models.attention_processor import Attention
from diffusers.utils import make_image_grid


# The weights and the number of steps of VISII's paper (section 4) and the learning rate of its authors' configuration.
VISII_STEPS, VISII_LEARNING_RATE, VISII_LAMBDA_MSE, VISII_LAMBDA_CLIP = 1000, 1e-3, 4.0, 0.1


@torch.no_grad()
def clip_direction(pipe: DiffusionPipeline, before: Image.Image, after: Image.Image) -> torch.Tensor:
    """E(after) - E(before) of CLIP's features of unit length, as (1, dim)."""
    pixel_values = pipe.clip_processor(images=[before, after], return_tensors="pt").pixel_values.to(pipe.device)
    features = pipe.clip.visual_projection(pipe.clip.vision_model(pixel_values=pixel_values).pooler_output)
    first, second = F.normalize(features, dim=-1)
    return (second - first)[None]


@torch.no_grad()
def picture_latents(pipe: DiffusionPipeline, image: Image.Image) -> torch.Tensor:
    """The mean of the VAE's posterior, not scaled, as (1, 4, height / 8, width / 8)."""
    return pipe.vae.encode(pipe.image_processor.preprocess(image).to(pipe.device)).latent_dist.mean


def visii_instruction(
    pipe: DiffusionPipeline,
    instruct: StableDiffusionInstructPix2PixPipeline,
    before: Image.Image,
    after: Image.Image,
    generator: torch.Generator,
    steps: int = VISII_STEPS,
) -> torch.Tensor:
    """The instruction that turns `before` into `after`, learned as VISII does (Nguyen et al. 2023, section 3).

    The text encoder's output begins as that of the words which PEZ finds for `after`. InstructPix2Pix is to draw `after`
    from `before` with it, and CLIP's projection of its end token is to point where the pictures do. In 1000 steps each
    time step comes once.

    Returns:
        `torch.Tensor`: prompt embeddings, (1, tokens, dim).
    """
    words = pipe.hard_prompts([after], tolerance=None, num_revisions=0, generator=generator)  # PEZ's own
    ids = pipe.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    end = int((ids[0] == pipe.tokenizer.eos_token_id).nonzero()[0])
    with torch.no_grad():
        learned = pipe.text_encoder(ids.to(pipe.device))[0]
    learned.requires_grad_(True)
    optimizer = torch.optim.AdamW([learned], lr=VISII_LEARNING_RATE)
    scheduler = DDPMScheduler.from_config(instruct.scheduler.config)
    clean, picture = picture_latents(pipe, after) * pipe.vae.config.scaling_factor, picture_latents(pipe, before)
    direction = clip_direction(pipe, before, after)
    for step in range(steps):
        if step % scheduler.config.num_train_timesteps == 0:
            times = torch.randperm(scheduler.config.num_train_timesteps, generator=generator).to(pipe.device)
        time = times[step % len(times)]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noisy = scheduler.add_noise(clean, noise, time[None])
        predicted = instruct.unet(torch.cat([noisy, picture], dim=1), time, encoder_hidden_states=learned).sample
        mse = F.mse_loss(predicted, scheduler.get_velocity(clean, noise, time[None]))
        said = pipe.clip.text_projection(learned[:, end])
        clip = 1 - F.cosine_similarity(said, direction).mean()
        (VISII_LAMBDA_MSE * mse + VISII_LAMBDA_CLIP * clip).backward()
        optimizer.step()
        optimizer.zero_grad()
    return learned.detach()


# -------------------------------------------------------------------------------------------------------------- DIA

# Of its authors' published configuration, but for two numbers. That has 10 steps for the conditions, with which Storybook
# does not draw the picture again, and up to 10 of LBFGS for the noise, of which the first is enough here.
DIA_ROWS, DIA_BATCH_SIZE, DIA_LEARNING_RATE, DIA_STEPS = 10, 8, 0.01, 60
DIA_NOISE_STEPS, DIA_NOISE_LEARNING_RATE, DIA_ENOUGH = 1, 0.1, 8e-4
DIA_INFERENCE_STEPS = 10


def dia_condition(
    pipe: DiffusionPipeline, image: Image.Image, generator: torch.Generator, steps: int = DIA_STEPS
) -> torch.Tensor:
    """What the text encoder would say of a picture, inverted as DIA does (Šubrtová et al. 2023).

    The first rows of the empty prompt are learned, so that the UNet draws the picture with them. Every step asks at the same
    time steps, those of the drawing, with other noise.

    Returns:
        `torch.Tensor`: prompt embeddings, (1, tokens, dim).
    """
    scheduler = ddim(pipe)
    clean = picture_latents(pipe, image) * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(pipe.device)
    embedding = pipe.text_encoder.get_input_embeddings()
    rows = embedding.weight[ids].detach()
    learned = rows[:, :DIA_ROWS].clone().requires_grad_(True)

    def said() -> torch.Tensor:
        instead = torch.cat([learned, rows[:, DIA_ROWS:]], dim=1)
        hook = embedding.register_forward_hook(lambda module, inputs, output: instead)
        try:
            return pipe.text_encoder(ids)[0]
        finally:
            hook.remove()

    optimizer = torch.optim.AdamW([learned], lr=DIA_LEARNING_RATE)
    order = torch.randperm(len(scheduler.timesteps), generator=generator)
    times = scheduler.timesteps[order[:DIA_BATCH_SIZE]].to(pipe.device)
    for _ in range(steps):
        noise = torch.randn(len(times), *clean.shape[1:], generator=generator).to(clean)
        noisy = scheduler.add_noise(clean.expand_as(noise), noise, times)
        text = said().expand(len(times), -1, -1)
        predicted = pipe.unet(noisy, times, encoder_hidden_states=text).sample
        F.mse_loss(predicted, scheduler.get_velocity(clean.expand_as(noise), noise, times)).backward(inputs=[learned])
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return said()


def dia_noise(
    pipe: DiffusionPipeline,
    image: Image.Image,
    condition: torch.Tensor,
    generator: torch.Generator,
    steps: int = DIA_NOISE_STEPS,
) -> torch.Tensor:
    """The noise from which the condition draws the picture, (1, 4, height / 8, width / 8), sought through all of the drawing."""
    scheduler = ddim(pipe)
    pixels = pipe.image_processor.preprocess(image).to(pipe.device)
    scale = pipe.vae.config.scaling_factor
    clean = picture_latents(pipe, image) * scale
    first = scheduler.timesteps[:1]
    noise = scheduler.add_noise(clean, torch.randn(clean.shape, generator=generator).to(clean), first)
    learned = noise.flatten().requires_grad_(True)  # LBFGS fails on gradients in `channels_last`
    optimizer, errors = torch.optim.LBFGS([learned], lr=DIA_NOISE_LEARNING_RATE), []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        latents = learned.view(noise.shape)
        for time in scheduler.timesteps:
            predicted = pipe.unet(latents, time, encoder_hidden_states=condition).sample
            latents = scheduler.step(predicted, time, latents).prev_sample
        error = F.mse_loss(latents, clean) + F.mse_loss(pipe.vae.decode(latents / scale).sample, pixels)
        error.backward(inputs=[learned])
        errors.append(error.item())
        return error

    for _ in range(steps):
        optimizer.step(closure)
        if errors[-1] < DIA_ENOUGH:
            break
    return learned.detach().view(noise.shape)


def ddim(pipe: DiffusionPipeline) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(DIA_INFERENCE_STEPS)
    return scheduler


# -------------------------------------------------------------------------------------------------------- Analogist

ANALOGIST_CLONING, ANALOGIST_STRENGTH = 1.3, 0.98  # of its authors' published script


class AnalogistAttention:
    """What Analogist does to attention in a grid of A, A', B and B' (Gu et al. 2024): an attention processor.

    What A and B have to do with each other is cloned for A' and B', in self-attention, both ways, before the softmax. The
    prompt is heard in B' alone.

    Args:
        cloning: what the cloned scores are multiplied by.
    """

    def __init__(self, cloning: float = ANALOGIST_CLONING):
        self.cloning = cloning

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, **ignored) -> torch.Tensor:
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(layer(told)) for layer in (attn.to_k, attn.to_v))
        scores = attn.scale * query @ key.transpose(1, 2)
        a, a2, b, b2 = grid_cells(hidden_states.shape[1])
        if encoder_hidden_states is None:
            scores[:, a2[:, None], b2] = self.cloning * scores[:, a[:, None], b]
            scores[:, b2[:, None], a2] = self.cloning * scores[:, b[:, None], a]
        weights = scores.softmax(dim=-1)
        if encoder_hidden_states is not None:
            weights[:, torch.cat([a, a2, b])] = 0
        output, dropout = attn.to_out
        return dropout(output(attn.batch_to_head_dim(weights @ value)))


def grid_cells(places: int) -> list[torch.Tensor]:
    """Which of the places, row by row of a square grid, lie in its top left, top right, bottom left and bottom right."""
    half = round(places**0.5) // 2
    numbers = torch.arange(places).unflatten(0, (2 * half, 2 * half))
    return [numbers[y : y + half, x : x + half].flatten() for y in (0, half) for x in (0, half)]


def analogist(
    inpaint: StableDiffusionInpaintPipeline,
    before: Image.Image,
    after: Image.Image,
    query: Image.Image,
    prompt: str,
    **asked,
) -> Image.Image:
    """Has the picture beside the query painted, which begins as the query; the prompt describes the answer.

    Args:
        inpaint: whose UNet attends by [`AnalogistAttention`].
        asked: other arguments of the pipeline.
    """
    width, height = query.size
    grid = make_image_grid([before, after, query, query], rows=2, cols=2)
    hole = Image.new("L", grid.size)
    hole.paste(255, (width, height, *grid.size))
    given = {"image": grid, "mask_image": hole, "width": grid.width, "height": grid.height}
    painted = inpaint(prompt=prompt, strength=ANALOGIST_STRENGTH, **given, **asked).images[0]
    return painted.crop((width, height, *grid.size))
