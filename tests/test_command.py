# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The command `difference-inversion`."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SIDE, WIDTH, build_pipeline, picture, random_tokens, seeded
from difference_inversion import command
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from typer.testing import CliRunner

from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


PROMPTS = ["--before-prompt", "a red cabin", "--after-prompt", "a yellow castle"]
QUICK = ["--config", "num_optimization_steps=1"]
FEW_STEPS = ["--config", "num_inference_steps=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder that the command runs in, with pictures and a difference."""
    monkeypatch.chdir(tmp_path)
    for name, color in (("a", "red"), ("a2", "yellow"), ("b", "blue"), ("c", "white")):
        picture(color).save(f"{name}.png")
    random_tokens().save("known.safetensors")
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(command.app, arguments)


def succeeded(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def pixels(path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_learning_saves_what_the_pipeline_learns(here, model):
    pair = ["--before", "a.png", "--after", "a2.png"]
    told = succeeded("learn", *pair, *PROMPTS, *QUICK, "--model", model, "--seed", "3", "-o", "new/d.safetensors")
    pipe = DifferenceInversionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe.invert_difference(
        picture("red"), picture("yellow"), PROMPTS[1], PROMPTS[3], generator=seeded(3), num_optimization_steps=1
    )
    learned = DifferenceTokens.load(told["difference"])
    assert torch.equal(*(d.embeddings["<difference>"] for d in (learned, expected)))
    assert told["difference"] == str(Path("new/d.safetensors")) and told["before_prompt"] == "a red cabin"
    assert told["loss"] == float(expected.metadata["loss"])


def test_applying_gives_the_answers_of_the_pipeline_whatever_else_is_asked(here, model):
    given = ["--image", "c.png", "--prompt", "a house", "--scale", "0.8", *FEW_STEPS, "--model", model, "-o", "out"]
    told = succeeded("apply", "known.safetensors", "b.png", *given)
    pipe = DifferenceInversionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for name, color in (("b", "blue"), ("c", "white")):
        asked = {"difference": "known.safetensors", "difference_scale": 0.8, "num_inference_steps": 2}
        expected = pipe(image=picture(color), prompt="a house", generator=seeded(), **asked).images[0]
        assert pixels(f"out/{name}_answer.png") == expected.tobytes()
    assert told["answers"] == [str(Path("out") / f"{name}_answer.png") for name in "bc"]
    assert Image.open(told["sheet"]).height > 2 * 256


def test_an_analogy_is_learned_and_then_applied(here, model):
    rest = ["--model", model, *FEW_STEPS]
    told = succeeded(
        "analogy", "a.png", "a2.png", "b.png", *PROMPTS, *QUICK, "--prompt", "a house", *rest, "-o", "one"
    )
    learned = ["learn", "--before", "a.png", "--after", "a2.png", *PROMPTS, *QUICK, "--model", model]
    succeeded(*learned)
    succeeded("apply", "difference.safetensors", "b.png", "--prompt", "a house", *rest, "-o", "two")
    assert pixels("one/b_answer.png") == pixels("two/b_answer.png")
    assert set(told) > {"difference", "answers", "sheet"} and Image.open(told["sheet"]).height > 2 * 256


def test_show_says_how_it_was_learned_and_the_nearest_words(here, model):
    told = succeeded("show", "known.safetensors", "--model", model)
    assert told["tokens"] == {"<difference>": [2, WIDTH]} and told["metadata"]["after_prompt"] == "a castle"
    assert [len(words) for words in told["nearest_words"]] == [3, 3]
    assert "nearest_words" not in succeeded("show", "known.safetensors")
    lines = run("show", "known.safetensors", "--model", model).stdout.splitlines()
    assert "  <difference>: 2, 16" in lines and "  after_prompt: a castle" in lines
    assert re.fullmatch(r"  \S+ 0\.\d\d, \S+ 0\.\d\d, \S+ 0\.\d\d", lines[-1])


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_pictures_lie_on_white_not_on_their_hidden_colours(here, model, mode):
    hidden = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (8, 8, 24, 24))
    hidden.convert(mode).save("hidden.png")
    seen = Image.new("RGB", (SIDE, SIDE), "white")
    seen.paste("blue", (8, 8, 24, 24))
    seen.save("seen.png")
    given = ["--prompt", "a house", *FEW_STEPS, "--model", model]
    succeeded("apply", "known.safetensors", "hidden.png", "seen.png", *given)
    assert pixels("outputs/hidden_answer.png") == pixels("outputs/seen_answer.png")


def test_pictures_of_other_sizes_and_depths_are_taken(here, model):
    picture("blue", size=(48, 40)).save("large.png")
    Image.new("I;16", (SIDE, SIDE), 40000).save("deep.png")
    result = run(
        "apply", "known.safetensors", "large.png", "deep.png", "--prompt", "a house", *FEW_STEPS, "--model", model
    )
    assert result.exit_code == 0, result.output
    assert "large.png is 48×40 and is cut and resized to 32×32." in result.stderr
    assert result.stdout.startswith("answers: ")


APPLY, LEARN = ["apply", "known.safetensors"], ["learn", "--before", "a.png", "--after", "a2.png"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["show", "none.safetensors"], "none.safetensors"),
        (["show", "a.png"], "a.png"),
        (["apply", "a.png", "b.png"], "a.png"),
        ([*APPLY, "b.png", "none.png"], "--image: there is no file none.png"),
        ([*APPLY, "known.safetensors"], "--image: known.safetensors cannot be read"),
        ([*APPLY, "b.png", "new/b.png"], "--image: b.png and new/b.png have one name"),
        ([*APPLY, "b.png", "--prompt", "a", "--prompt", "b"], "--prompt has 2 prompts for 1 images"),
        ([*APPLY, "b.png", "-o", "a.png"], "--output: a.png cannot be made a folder"),
        ([*APPLY, "b.png", "--config", "num_tokens=2"], "--config: there is no setting 'num_tokens'"),
        (["learn", "--before", "none.png", "--after", "a.png"], "--before: there is no file none.png"),
        (["learn", "--before", "a.png", "--after", "none.png"], "--after: there is no file none.png"),
        ([*LEARN, "-o", "."], "--output: . is a folder"),
        ([*LEARN, "--config", "num_tokens=0"], "--config num_tokens"),
        ([*LEARN, "--config", "tokens=2"], "--config: there is no setting 'tokens'"),
        (["analogy", "a.png", "none.png", "b.png"], "A2: there is no file none.png"),
        ([*LEARN, "--device", "nowhere"], "--device: nowhere cannot be used here"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_looked_for(here, arguments, complaint):
    Path("new").mkdir()
    picture().save("new/b.png")
    result = run(*arguments, *([] if arguments[0] == "show" else ["--model", "nowhere/none"]))
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("difference-inversion: ") and complaint in line and "nowhere/none" not in line


@pytest.mark.parametrize("arguments", [[*APPLY, "b.png"], LEARN, ["show", "known.safetensors"]])
def test_a_model_that_does_not_load_is_named_in_one_line(here, arguments):
    result = run(*arguments, "--model", str(here))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"--model: {here} cannot be loaded" in line


def test_what_the_pipeline_refuses_is_said_by_the_options_name(here, model):
    result = run(*LEARN, "--model", model)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(
        "difference-inversion: --before-prompt is"
    )
    result = run(*APPLY, "b.png", "--prompt", "a", "--config", "strength=2", "--model", model)
    assert result.exit_code == 1 and "--config strength" in result.stderr


def test_without_storybook_a_model_must_be_named(here, monkeypatch):
    monkeypatch.setattr(command, "STORYBOOK", here / "none")
    result = run(*LEARN)
    assert result.exit_code == 1 and result.stderr.startswith("difference-inversion: --model is needed")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["unlearn"], ["learn"], APPLY, [*LEARN, "--dtype", "int8"], [*LEARN, "--x"]]
)
def test_calls_that_it_does_not_know_are_usage_errors(here, arguments):
    assert run(*arguments).exit_code == 2


def press_ctrl_c(*_) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["learn", "analogy"])
def test_ctrl_c_keeps_what_was_learned(here, model, name):
    pictures = LEARN[1:] if name == "learn" else ["a.png", "a2.png", "b.png"]
    kept = Path("out.safetensors") / ("" if name == "learn" else "difference.safetensors")
    hook = register_optimizer_step_post_hook(press_ctrl_c)
    try:
        result = run(name, *pictures, *PROMPTS, "--model", model, "-o", "out.safetensors")
    finally:
        hook.remove()
    assert result.exit_code == 130 and result.stdout == ""
    assert DifferenceTokens.load(kept).embeddings
    assert result.stderr.splitlines()[-1].endswith(f"interrupted. What was learned until then is in {kept}.")


def test_ctrl_c_leaves_the_answers_before_it(here, model):
    hook = register_module_forward_hook(lambda *_: press_ctrl_c() if Path("outputs/b_answer.png").exists() else None)
    try:
        result = run(*APPLY, "b.png", "c.png", "--prompt", "a", *FEW_STEPS, "--model", model)
    finally:
        hook.remove()
    assert result.exit_code == 130 and result.stderr.splitlines() == ["difference-inversion: interrupted."]
    assert os.listdir("outputs") == ["b_answer.png"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal_say_what_is_done_and_to_which_picture(here, monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    pictures, answers = [picture("blue"), picture("white")], [here / "one.png", here / "two.png"]
    settings = {"num_inference_steps": 2}
    command.answer_each(build_pipeline(), pictures, random_tokens(), answers, ["a house"] * 2, 0, settings)
    for stage in ("Inverting", "Drawing"):
        places = re.findall(rf"{stage}: 100%.*?, (\d of \d)\]", shown.getvalue())
        assert list(dict.fromkeys(places)) == ["1 of 2", "2 of 2"]


@pytest.mark.slow
def test_the_installed_command_works_and_shows_no_progress_in_a_pipe(here, model):
    """Each process takes seconds to import torch, so that there is one."""
    installed = Path(sys.executable).with_name("difference-inversion")
    given = ["analogy", "a.png", "a2.png", "b.png", *PROMPTS, *QUICK, "--prompt", "a", *FEW_STEPS, "--model", model]
    done = subprocess.run([installed, *given, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert Path(json.loads(done.stdout)["answers"][0]).exists()
