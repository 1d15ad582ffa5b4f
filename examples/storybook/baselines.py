# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What the benchmark compares with and diffusers has no pipeline for: VISII."""

import torch
import torch.nn.functional as F
from PIL import Image

from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionInstructPix2PixPipeline


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
