# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learns for three steps and applies for three on full-size Stable Diffusion models, and says what that takes.

    python examples/check_backbones.py                      # on a GPU: SD 1.5, SD 2.1 and SDXL in float16
    python examples/check_backbones.py --only sd15          # one of them

The weights are random, so the pictures are noise; the sizes, the time and the memory are the real ones. Without a GPU it
does SD 1.5 in float32 at 256×256, which took 6.5 GB of memory.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from backbones import CONFIGS, build_backbone
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline_difference_inversion import DifferenceInversionPipeline  # noqa: E402


def peak_memory() -> float:
    """In gigabytes, of the GPU or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def check(name: str, device: str) -> None:
    optional = dict.fromkeys(DifferenceInversionPipeline._optional_components)
    pipe = DifferenceInversionPipeline(**optional | build_backbone(name))
    pipe.to(device, torch.float16 if device == "cuda" else torch.float32)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor if device == "cuda" else 256
    before, after, query = (Image.new("RGB", (side, side), color) for color in ("red", "blue", "green"))
    prompts = {"before_prompt": "a red cabin", "after_prompt": "a blue cabin"}

    start = time.monotonic()
    difference = pipe.invert_difference(before=before, after=after, **prompts, num_optimization_steps=3)
    learned = time.monotonic()
    pipe(image=query, prompt="a castle", difference=difference, num_inference_steps=3, strength=1.0)
    applied = time.monotonic()
    print(
        f"{CONFIGS[name]['name']} at {side}×{side}: {difference!r}; three steps of learning {learned - start:.1f} s, "
        f"three steps of inverting and of drawing {applied - learned:.1f} s; {peak_memory():.1f} GB at most"
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CONFIGS), help="one model; by default all, or sd15 without a GPU")
    options = parser.parse_args()
    for name in [options.only] if options.only else list(CONFIGS) if device == "cuda" else ["sd15"]:
        check(name, device)


if __name__ == "__main__":
    main()
