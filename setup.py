# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

from setuptools import setup


setup(
    name="difference-inversion",
    version="0.1.0",
    description="Image analogies with ordinary Stable Diffusion: learn what changed once, apply it to any image.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    py_modules=["pipeline_difference_inversion"],
    install_requires=[
        "diffusers>=0.35.1",
        "transformers>=4.57.1",
        "torch>=2.4",
        "accelerate>=1.0",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.34.0",
        "pillow>=10.0",
    ],
    extras_require={
        # diffusers loads LoRAs with it.
        "lora": ["peft>=0.17"],
        # pytest runs the tests, with xdist on all cores; hypothesis makes up inputs; some tests load a LoRA; ruff checks the
        # style. tqdm and numpy come with the packages above.
        "test": ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.14", "peft>=0.17"],
    },
)
