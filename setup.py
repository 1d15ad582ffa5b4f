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
    # The command and what it shares with the other examples lie in examples/.
    py_modules=["pipeline_difference_inversion", "difference_inversion.command", "difference_inversion.common"],
    package_dir={"difference_inversion": "examples"},
    entry_points={"console_scripts": ["difference-inversion = difference_inversion.command:app"]},
    # The tests pass on the oldest of these too, all of them together, but for torch, of which they are only run on 2.13. Before
    # diffusers 0.40 `from_pretrained` ignored `dtype`, and 0.40 offloads groups on a GPU alone.
    install_requires=[
        "diffusers>=0.41.0",
        "transformers>=5.0.0",
        "torch>=2.6",
        "accelerate>=1.10.0",
        "safetensors>=0.8.0",
        "huggingface_hub>=1.32.0",
        "pillow>=10.1.0",
    ],
    extras_require={
        # The command is written with Typer. transformers brings it along today, and need not tomorrow.
        "cli": ["typer>=0.26.0"],
        # diffusers loads LoRAs with it.
        "lora": ["peft>=0.18.0"],
        # examples/make_triplets.py streams the paper's evaluation data with it.
        "evaluation": ["datasets>=4.0.0"],
        # examples/app.py is a page in Gradio, which brings pandas; its Stop button never shows in 6.10. examples/figures.py
        # plots losses with matplotlib, whose older releases call what pyparsing has deprecated.
        "demo": ["gradio>=6.20.0", "matplotlib>=3.10.8"],
        # pytest runs the tests, with xdist on all cores; hypothesis makes up inputs; some tests load a LoRA, and some
        # run the command, stream a data set, open the page, or plot losses; nbclient runs the notebook, which nbformat
        # reads, in a kernel of ipykernel; playwright opens pages in a Chromium, where there is one; ruff checks the
        # style. tqdm and numpy come with the packages above.
        "test": [
            "pytest>=8.0.0",
            "pytest-xdist>=3.5.0",
            "hypothesis>=6.100.0",
            "ruff>=0.14.0",
            "peft>=0.18.0",
            "typer>=0.26.0",
            "datasets>=4.0.0",
            "gradio>=6.20.0",
            "matplotlib>=3.10.8",
            "nbclient>=0.10.2",
            "nbformat>=5.10.4",
            "ipykernel>=7.0.1",
            "playwright>=1.50.0",
        ],
    },
)
