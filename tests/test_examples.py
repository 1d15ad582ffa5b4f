# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The trained Storybook model and the examples that a newcomer runs."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from analogies import judge, random_analogy
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from safetensors import safe_open
from train import decode, draw, encode, to_pil, to_signed
from world import ATTRIBUTES, describe, render

from pipeline_difference_inversion import DifferenceInversionPipeline


ROOT = Path(__file__).resolve().parents[1]
STORYBOOK = ROOT / "examples" / "storybook" / "model"


@pytest.fixture(scope="module")
def storybook() -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(STORYBOOK, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reconstructions(vae, scenes) -> list:
    return to_pil(decode(vae, encode(vae, to_signed(torch.stack([torch.tensor(draw(s)) for s in scenes]).numpy()))))


def test_judge_knows_the_target_and_the_query_through_the_vae(storybook):
    rng = random.Random("judge")
    analogies = [random_analogy(rng) for _ in range(200)]
    targets = reconstructions(storybook.vae, [analogy.target for analogy in analogies])
    queries = reconstructions(storybook.vae, [analogy.query for analogy in analogies])
    found = sum(judge(picture, analogy).success for picture, analogy in zip(targets, analogies, strict=True))
    assert found >= 0.98 * len(analogies)
    assert not any(judge(picture, analogy).success for picture, analogy in zip(queries, analogies, strict=True))


def test_captioner_describes_a_picture(storybook):
    rng = random.Random("captions")
    scenes = [random_analogy(rng).query for _ in range(20)]
    captions = storybook.caption([render(scene) for scene in scenes])
    right = sum(said == describe(scene) for said, scene in zip(captions, scenes, strict=True))
    assert right >= 17


def test_quickstart_makes_a_sheet_and_a_difference(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "sheet.png") in run.stdout and str(tmp_path / "difference.safetensors") in run.stdout
    assert load_image(str(tmp_path / "sheet.png")).height > 4 * 256
    with safe_open(tmp_path / "difference.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "difference-tokens"
        assert "desert" in file.metadata()["after_prompt"]


def test_storybook_loads_as_a_custom_pipeline():
    pipe = DiffusionPipeline.from_pretrained(
        str(STORYBOOK), custom_pipeline=str(ROOT / "pipeline_difference_inversion.py"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "DifferenceInversionPipeline"
    assert pipe.clip is not None and pipe.captioner is not None


def test_text_encoder_is_clips_text_tower(storybook):
    encoder = storybook.text_encoder.state_dict()
    tower = storybook.clip.text_model.state_dict()
    assert len(encoder) > 10
    for name, weight in encoder.items():
        assert torch.equal(weight, tower[name.removeprefix("text_model.")]), name


def test_benchmark_writes_a_verdict_for_each_analogy(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "storybook" / "benchmark.py"), "--per-kind", "1"]
    command += ["--set", "num_optimization_steps=2", "--set", "num_inference_steps=2"]
    command += ["--output", str(tmp_path / "verdicts.jsonl"), "--sheet", str(tmp_path / "sheet.png")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["subject", "color", "ground", "sky", "extra", "style"]
    assert all(not line["no change"]["success"] and line["no change"]["kept"] for line in lines)


def test_learned_differences_change_other_pictures(storybook):
    """At least half of the answers, one of each kind of change, are nearer to the right picture than to the query;
    four of the six were when it was written."""
    rng = random.Random("transfer")
    nearer = []
    for kind in ATTRIBUTES:
        analogy = random_analogy(rng, kind)
        before, after, query = (render(getattr(analogy, part)) for part in ("before", "after", "query"))
        generator = torch.Generator().manual_seed(0)
        answer = storybook(image=query, before=before, after=after, generator=generator).images[0]
        unchanged = dataclasses.replace(analogy, target=analogy.query)
        nearer.append(judge(answer, analogy).psnr > judge(answer, unchanged).psnr)
    assert sum(nearer) >= 3, nearer
