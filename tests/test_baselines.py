# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The methods that the benchmark compares with, and what they are trained from."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
import torch
import train
from baselines import (
    DIA_INFERENCE_STEPS,
    AnalogistAttention,
    analogist,
    dia_condition,
    dia_noise,
    grid_cells,
    picture_latents,
    visii_instruction,
)
from benchmark import load_others, make_task, methods, parse_options
from components import build_wider_unet
from evaluate import directional_score, load_encoder
from PIL import Image
from questions import draw_questions
from stock import load_instruct, stock
from train_inpaint import as_grid
from training import draw
from world import Scene, render

from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from pipeline_difference_inversion import DifferenceInversionPipeline


STORYBOOK = Path(__file__).resolve().parents[1] / "examples" / "storybook" / "model"
DAY = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
NIGHT = dataclasses.replace(DAY, sky="night")


@pytest.fixture(scope="module")
def storybook() -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(STORYBOOK)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def drawing_error(unet, scheduler, clean, text, beside=None) -> float:
    """How badly a UNet that is told `text` draws the picture of these latents."""
    times = torch.arange(20, 1000, 49)
    noise = torch.randn(len(times), *clean.shape[1:], generator=seeded(1))
    noisy = scheduler.add_noise(clean, noise, times)
    if beside is not None:
        noisy = torch.cat([noisy, beside.expand_as(noise)], dim=1)
    predicted = unet(noisy, times, text.expand(len(times), -1, -1)).sample
    return float((predicted - scheduler.get_velocity(clean, noise, times)).square().mean())


@pytest.mark.parametrize("channels", [8, 9])
def test_a_wider_unet_starts_as_storybook_and_learns_to_look_at_what_is_new(storybook, channels):
    """Its new channels begin at zero, and have a gradient from the first step on."""
    unet = build_wider_unet(SimpleNamespace(model_dir=STORYBOOK, device=torch.device("cpu")), channels)
    latents = torch.randn(2, channels, 16, 16, generator=seeded(0))
    text = storybook.encode_prompt(["a red cabin", "a castle"])[0].detach()
    predicted = unet(latents, 500, text).sample
    torch.testing.assert_close(predicted, storybook.unet(latents[:, :4], 500, text).sample, atol=1e-4, rtol=1e-4)
    predicted.square().mean().backward()
    assert unet.conv_in.weight.grad[:, 4:].any()


@pytest.mark.once
def test_visii_makes_of_a_prompt_an_instruction_that_draws_after_from_before_better(storybook, tmp_path):
    build_wider_unet(SimpleNamespace(model_dir=STORYBOOK, device=torch.device("cpu")), 8).save_pretrained(tmp_path)
    instruct, pair = load_instruct(storybook, tmp_path), [render(DAY), render(NIGHT)]
    start, end = (visii_instruction(storybook, instruct, *pair, seeded(0), steps) for steps in (0, 30))
    assert start.shape == end.shape == (1, 40, 128)
    picture, clean = (picture_latents(storybook, image) for image in pair)
    clean = clean * storybook.vae.config.scaling_factor
    errors = [drawing_error(instruct.unet, instruct.scheduler, clean, text, picture) for text in (end, start)]
    assert errors[0] < errors[1]
    asked = {"image": pair[0], "num_inference_steps": 2, "guidance_scale": 1.5, "image_guidance_scale": 1.0}
    assert instruct(prompt_embeds=end, **asked).images[0].size == (128, 128)


@pytest.mark.once
def test_dia_finds_a_condition_and_a_noise_that_draw_the_picture(storybook):
    before = {name: p.detach().clone() for name, p in storybook.text_encoder.named_parameters()}
    picture = render(DAY)
    clean = picture_latents(storybook, picture) * storybook.vae.config.scaling_factor
    start, end = (dia_condition(storybook, picture, seeded(0), steps) for steps in (0, 30))
    torch.testing.assert_close(start, storybook.encode_prompt("")[0])
    errors = [drawing_error(storybook.unet, storybook.scheduler, clean, text) for text in (end, start)]
    assert errors[0] < errors[1]

    def far(steps: int) -> float:
        noise = dia_noise(storybook, picture, end, seeded(0), steps)
        asked = {"num_inference_steps": DIA_INFERENCE_STEPS, "guidance_scale": 1.0, "latents": noise}
        drawn = stock(StableDiffusionPipeline, storybook)(prompt_embeds=end, **asked, output_type="latent").images
        return float((drawn - clean).square().mean())

    assert far(1) < far(0)
    now = dict(storybook.text_encoder.named_parameters())
    assert all(torch.equal(now[name], weight) and now[name].grad is None for name, weight in before.items())


def attention(told: int | None = None) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=32, cross_attention_dim=told, heads=4, dim_head=8).requires_grad_(False)


def test_analogists_grid_has_its_cells_where_its_training_puts_them():
    cells = torch.arange(4 * 2 * 2).view(1, 4, 1, 2, 2)
    grid = as_grid(cells)[0, 0]
    assert grid.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    for cell, places in zip(cells[0, :, 0], grid_cells(16), strict=True):
        assert grid.flatten()[places].tolist() == cell.flatten().tolist()


def test_analogist_lets_the_prompt_be_heard_in_the_missing_picture_alone():
    asked, places = attention(told=16), torch.randn(1, 16, 32, generator=seeded(0))
    texts = torch.randn(2, 1, 5, 16, generator=seeded(1))
    plain = [asked(places, text) for text in texts]
    asked.set_processor(AnalogistAttention())
    first, second = (asked(places, text) for text in texts)
    a, a2, b, b2 = grid_cells(16)
    elsewhere = torch.cat([a, a2, b])
    torch.testing.assert_close(first[:, elsewhere], second[:, elsewhere])
    torch.testing.assert_close(first[:, b2], plain[0][:, b2])
    assert not torch.allclose(first[:, b2], second[:, b2])


def test_analogist_clones_what_the_two_pictures_before_have_to_do_with_each_other():
    """Where A' looks like A and B' like B, cloning changes nothing; else B' attends to A' as B does to A."""
    asked = attention()
    a, a2, b, b2 = grid_cells(16)
    places = torch.randn(1, 16, 32, generator=seeded(0))
    other = places.clone()
    places[:, a2], places[:, b2] = places[:, a], places[:, b]
    plain, plain_other = asked(places), asked(other)
    asked.set_processor(AnalogistAttention(cloning=1.0))
    torch.testing.assert_close(asked(places), plain)
    cloned = asked(other)
    torch.testing.assert_close(cloned[:, torch.cat([a, b])], plain_other[:, torch.cat([a, b])])
    assert not torch.allclose(cloned[:, b2], plain_other[:, b2])
    asked.set_processor(AnalogistAttention(cloning=1e4))
    # So sure, each place of B' takes what one place of A' holds: that which B took of A.
    query, key = asked.head_to_batch_dim(asked.to_q(other)), asked.head_to_batch_dim(asked.to_k(other))
    scores = (query @ key.transpose(1, 2))[:, b[:, None], a]  # [heads, 4, 4]
    best, second = scores.topk(2, dim=-1).values.unbind(dim=-1)
    sure = ((best > 0.02) & (best - second > 0.01)).all(dim=0)
    value = asked.head_to_batch_dim(asked.to_v(other))[:, a2]
    taken = torch.stack([one[best] for one, best in zip(value, scores.argmax(dim=-1), strict=True)])
    expected = asked.to_out[0](asked.batch_to_head_dim(taken))
    assert sure.any()
    torch.testing.assert_close(asked(other)[:, b2[sure]], expected[:, sure], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """What the earlier stages of training leave, of four pictures."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    scenes = [dataclasses.replace(DAY, color=color) for color in ("red", "blue", "yellow", "purple")]
    (folder / "scenes.json").write_text(json.dumps([dataclasses.asdict(scene) for scene in scenes]))
    np.save(folder / "pictures.npy", np.stack([draw(scene) for scene in scenes]))
    for name in ("latents", "edits"):
        np.save(folder / f"{name}.npy", rng.standard_normal((4, 4, 16, 16)).astype(np.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep_memory", lambda: None)  # which starts the process anew
        patch.setattr("training.write_model_index", lambda options: None)  # into the repository's own model
        for stage in ("inpaint", "dino"):
            train.main([stage, "--work-dir", str(folder), "--steps", "1", "--batch-size", "2"])
    return folder


def test_analogist_paints_with_the_unet_that_its_training_writes(storybook, workshop, monkeypatch):
    monkeypatch.setitem(benchmark.ANALOGIST, "num_inference_steps", 4)
    options = parse_options(["--inpaint", str(workshop / "inpaint_unet"), "--others-only"])
    question = draw_questions("loose", [0], 1)[0]
    asked = methods(question, options)
    assert list(asked) == ["Analogist", "no change"]
    task = make_task(storybook, load_others(storybook, options), question)
    answer = asked["Analogist"](task)
    assert answer.size == task.query.size and answer != task.query
    # The prompt is told of the missing picture alone, and what is asked there shows.
    inpaint, pictures = task.others["inpaint"], (task.before, task.after, task.query)
    few = {"num_inference_steps": 4, "guidance_scale": 3.0}
    drawn = [analogist(inpaint, *pictures, text, **few, generator=seeded(0)) for text in ("a cabin", "at night")]
    assert drawn[0] != drawn[1]
    assert storybook.unet.config.in_channels == 4


def test_the_dino_that_training_writes_scores_directions(workshop):
    encode = load_encoder(str(workshop / "dino"), torch.device("cpu"))
    day, night = render(DAY), render(NIGHT)
    assert encode([day])[0].shape == (1, 128)
    assert directional_score(encode, day, night, day, night) == pytest.approx(1, abs=1e-5)
    black = Image.new("RGB", day.size)
    assert directional_score(encode, day, night, day, black) < 1


def test_the_benchmark_has_a_column_for_dino_and_asks_again_what_it_did_not_score(
    storybook, workshop, tmp_path, capsys
):
    given = ["--others-only", "--per-kind", "1", "--output", str(tmp_path / "answers.jsonl")]
    benchmark.main(given)
    without = capsys.readouterr().out
    assert "DINO" not in without
    benchmark.main([*given, "--dino", str(workshop / "dino")])
    table = capsys.readouterr().out
    assert "0 were answered before" in table
    head, _, row = table.splitlines()[2:5]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert float(cells["DINO"]) == 0 and cells["direction"] == "0.00"  # of no change
    benchmark.main([*given, "--dino", str(workshop / "dino")])
    assert "6 were answered before" in capsys.readouterr().out
