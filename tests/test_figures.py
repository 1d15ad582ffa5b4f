# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Pictures that explain a difference. Where one acts on Storybook is seen in test_notebook.py."""

from pathlib import Path

import figures
import pytest
import torch
from conftest import SIDE, WIDTH, build_pipeline, picture, random_tokens, seeded
from figures import LEAST_MOVED, places, plot_losses, show_where, sweep, sweep_row
from PIL import Image

from pipeline_difference_inversion import DifferenceTokens


QUICK = {"prompt": "a house", "num_inference_steps": 2}


def test_a_sweep_shows_the_query_and_the_pipelines_answers(pipe):
    difference, query, scales = random_tokens(), picture("blue"), (0.5, 1.0)
    (_, first), *answers = sweep_row(pipe, query, difference, "difference_scale", scales, seed=3, **QUICK)
    assert first == query
    for (label, answer), scale in zip(answers, scales, strict=True):
        asked = {"difference": difference, "difference_scale": scale, "generator": seeded(3), **QUICK}
        assert label == f"difference_scale {scale}" and answer == pipe(image=query, **asked).images[0]
    assert sweep(pipe, query, difference, "inversion", ("ddim", "sdedit"), **QUICK).width == 16 + 3 * 272


def test_places_are_those_that_one_step_with_the_difference_changes(either_pipe):
    asked = {"difference": random_tokens(), "prompt": "a house", "num_inference_steps": 1, "guidance_scale": 30.0}
    latents = [
        either_pipe(image=picture(), generator=seeded(), difference_scale=scale, output_type="latent", **asked).images[
            0
        ]
        for scale in (0, 1)
    ]
    moved = (latents[1] - latents[0]).abs().mean(0)
    assert moved.max() > LEAST_MOVED
    assert torch.allclose(places(either_pipe, picture(), **asked), moved / moved.max(), atol=1e-3)


def test_a_difference_that_changes_nothing_acts_nowhere(pipe):
    nothing, something = DifferenceTokens({"<difference>": torch.zeros(2, WIDTH)}), random_tokens()
    assert places(pipe, picture(), nothing, **QUICK).max() < 0.01
    dark, bright = (show_where(pipe, picture(), difference, **QUICK) for difference in (nothing, something))
    assert dark.size == bright.size == (SIDE, SIDE)
    assert dark.convert("L").getextrema()[1] < 128 < bright.convert("L").getextrema()[1]


def test_what_is_stopped_shows_the_steps_until_then(pipe):
    asked = []
    places(
        pipe,
        picture(),
        random_tokens(),
        stopped=lambda: asked.append(1) or len(asked) == 2,
        **QUICK | {"num_inference_steps": 8},
    )
    assert len(asked) == 2


def test_losses_are_drawn_in_the_size_that_is_asked_for():
    losses = [{"loss": 2 / step, "clip_loss": 1 / step, "tokens": torch.zeros(1, 4)} for step in range(1, 9)]
    drawn = plot_losses(losses, (600, 200))
    assert drawn.size == (600, 200) and drawn != plot_losses(losses[:3], (600, 200))
    for left in (0, 300):  # one panel for each loss, with its line
        colors = [color for _, color in drawn.crop((left, 0, left + 300, 200)).getcolors(maxcolors=60_000)]
        assert (38, 70, 83) in colors and (244, 162, 97) in colors
    with pytest.raises(ValueError, match="took no step"):
        plot_losses([])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder that the script runs in, with a model, pictures and a difference."""
    monkeypatch.chdir(tmp_path)
    build_pipeline().save_pretrained("model")
    for name, color in (("a", "red"), ("a2", "yellow"), ("b", "blue")):
        picture(color).save(f"{name}.png")
    random_tokens().save("d.safetensors")
    return tmp_path


GIVEN = ["--image", "b.png", "--prompt", "a house", "--sweep", "strength=0.5,0.9", "inversion=ddim"]


def test_the_script_draws_a_known_difference(here, capsys):
    steps = ["--config", "num_inference_steps=2"]
    figures.main(["--difference", "d.safetensors", *GIVEN, *steps, "--model", "model", "--output", "new/out"])
    written = capsys.readouterr().out.split()
    assert written == [
        str(here / "new" / "out" / f"{name}.png") for name in ("strength", "inversion", "where", "explained")
    ]
    assert Image.open(written[-1]).size == (16 + 3 * 272, 3 * 322)


def test_the_script_learns_and_draws_the_losses(here, capsys):
    pair = ["--before", "a.png", "--after", "a2.png", "--before-prompt", "a cabin", "--after-prompt", "a castle"]
    settings = ["--config", "num_inference_steps=2", "init=random", "num_optimization_steps=2"]
    figures.main([*pair, *GIVEN, *settings, "--model", "model"])
    assert {path.name for path in Path("outputs").iterdir()} == {
        "difference.safetensors",
        *(f"{name}.png" for name in ("strength", "inversion", "where", "losses", "explained")),
    }
    assert DifferenceTokens.load("outputs/difference.safetensors").metadata["steps"] == "2"
    assert Image.open("outputs/explained.png").width == 288 + Image.open("outputs/losses.png").width


KNOWN = ["--difference", "d.safetensors"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([*KNOWN, "--image", "none.png"], "--image: there is no file none.png"),
        (["--difference", "none.safetensors"], "none.safetensors"),
        (["--difference", "a.png"], "a.png"),
        ([*KNOWN, "--before", "a.png"], "--difference is learned already"),
        (["--before", "a.png"], "--before and --after belong together"),
        (["--before", "none.png", "--after", "a.png"], "--before: there is no file none.png"),
        ([*KNOWN, "--output", "a.png"], "--output: a.png cannot be made a folder"),
        ([*KNOWN, "--sweep", "num_tokens=1,2"], "--sweep: there is no parameter 'num_tokens'"),
        ([*KNOWN, "--sweep", "strength"], "--sweep: give strength its values"),
        ([*KNOWN, "--config", "init=random"], "--config: there is no setting 'init'"),
        (["--config", "num_tokens=0"], "num_tokens"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_looked_for(here, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        figures.main([*arguments, "--model", "nowhere/none"])
    assert complaint in stop.value.code
    assert "\n" not in stop.value.code and "nowhere/none" not in stop.value.code


def test_a_model_that_does_not_load_is_named_in_one_line(here):
    with pytest.raises(SystemExit, match=r"^--model: \S+ cannot be loaded[^\n]*$"):
        figures.main([*KNOWN, "--model", str(here)])
