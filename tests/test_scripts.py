# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What the scripts in examples/ say to someone who makes a mistake, and that they run from a clone as it is."""

import subprocess
import sys
from pathlib import Path

import benchmark
import benchmark_speed
import evaluate
import gallery
import invert_many
import publish
import pytest
import quickstart
import train
from conftest import ROOT, picture, random_tokens
from PIL import Image


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder that scripts run in: pictures, what is none, lists of pictures, and a model that would not load."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        picture().save(f"{name}.png")
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:60])
    Path("empty.jsonl").write_text("\n")
    Path("binary.jsonl").write_bytes(bytes(range(200, 256)))
    Path("pairs.jsonl").write_text('{"before": "a.png", "after": "b.png"}')
    Path("triplets.jsonl").write_text('{"before": "a.png", "after": "b.png", "image": "a.png"}')
    random_tokens().save("known.safetensors")
    for name in ("broken", "folder"):
        Path(name).mkdir()
    Path("broken/model_index.json").write_text("{}")
    monkeypatch.setattr(gallery, "STORYBOOK", Path("broken"))
    return tmp_path


MODEL, PAIRS, TRIPLETS = ["--model", "broken"], ["--pairs", "pairs.jsonl"], ["--triplets", "triplets.jsonl"]
NO_FOLDER = "cannot be made a folder to write to; name another"


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        (quickstart, ["--before", "none.png", *MODEL], "--before: there is no file none.png"),
        (quickstart, ["--after", "text.png", *MODEL], "--after: text.png cannot be read"),
        (quickstart, ["--image", "a.png", "folder", *MODEL], "--image: there is no file folder"),
        (quickstart, ["--image", "cut.png", *MODEL], "--image: cut.png cannot be read"),
        (quickstart, ["--prompt", "a", "b", *MODEL], "--prompt has 2 prompts for 3 images"),
        (quickstart, ["--output", "a.png", *MODEL], f"--output: a.png {NO_FOLDER}"),
        (quickstart, ["--output", "/proc", *MODEL], f"--output: /proc {NO_FOLDER}"),
        (quickstart, ["--model", "folder"], "--model: folder cannot be loaded: it has no model_index.json"),
        (quickstart, ["--model", "none"], "--model: there is no folder none"),
        (quickstart, ["--model", "./no/model"], "--model: there is no folder ./no/model"),
        (quickstart, ["--model", "a.png"], "--model: there is no folder a.png"),
        (quickstart, MODEL, "--model: broken cannot be loaded; give a Stable Diffusion's folder or Hub name"),
        (gallery, ["folder"], "FILE: folder does not end in a kind of picture"),
        (gallery, ["a.png/sheet.png"], f"FILE: a.png {NO_FOLDER}"),
        (publish, ["difference", "you/d", "--file", "none.safetensors"], "--file: none.safetensors cannot be loaded"),
        (publish, ["difference", "you/d", "--file", "a.png"], "--file: a.png cannot be loaded"),
        (publish, ["difference", "you/d", "--file", "known.safetensors", "--after", "text.png"], "--after: text.png"),
        (publish, ["pipeline", "you/code", "--dry-run", "a.png"], f"--dry-run: a.png {NO_FOLDER}"),
        (publish, ["pipeline", "you/and/me", "--dry-run", "new"], "USER/NAME: Repo id must be"),
        (publish, ["pipeline", "you/code"], "offline mode is enabled"),
        (invert_many, ["--pairs", "none"], "--pairs: there is no file none"),
        (invert_many, ["--pairs", "empty.jsonl"], "--pairs: empty.jsonl is empty"),
        (invert_many, ["--pairs", "binary.jsonl"], "--pairs: binary.jsonl is no text"),
        (invert_many, [*PAIRS, *MODEL, "--output", "a.png"], f"--output: a.png {NO_FOLDER}"),
        (invert_many, [*PAIRS, *MODEL, "--config", "num_tokens=0"], "--config num_tokens is 0"),
        (evaluate, ["--triplets", "folder"], "--triplets: there is no file folder"),
        (evaluate, [*TRIPLETS, *MODEL, "--output", "a.png"], f"--output: a.png {NO_FOLDER}"),
        (evaluate, [*TRIPLETS, *MODEL, "--encoder", "folder"], "--encoder: folder cannot be loaded"),
        (evaluate, [*TRIPLETS, "--model", "none"], "--model: there is no folder none"),
        (benchmark, ["--output", "folder", *MODEL], "--output: folder is a folder"),
        (benchmark, ["--sheet", "sheet", *MODEL], "--sheet: sheet does not end in a kind of picture"),
        (benchmark, ["--failures", "a.png/x.png", *MODEL], f"--failures: a.png {NO_FOLDER}"),
        (benchmark, ["--instruct", "none", *MODEL], "--instruct: there is no folder none"),
        (benchmark, ["--inpaint", "folder", *MODEL], "--inpaint: folder cannot be loaded: it has no config.json"),
        (benchmark, ["--dino", "none", *MODEL], "--dino: there is no folder none"),
        (benchmark, ["--xl", "folder"], "--xl: folder cannot be loaded: it has no unet/config.json"),
        (benchmark, MODEL, "--model: broken cannot be loaded"),
        (benchmark_speed, ["--model", "folder"], "--model: folder cannot be loaded: it has no model_index.json"),
        (benchmark_speed, ["--device", "nowhere", *MODEL], "--device: nowhere cannot be used here"),
        (train, ["clip", "--work-dir", "a.png"], f"--work-dir: a.png {NO_FOLDER}"),
        (train, ["clip", "--work-dir", "new", "--model-dir", "a.png"], f"--model-dir: a.png {NO_FOLDER}"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_option_before_a_model_is_loaded(
    here, script, arguments, complaint
):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    told = stopped.value.code
    assert isinstance(told, str) and len(told.splitlines()) == 1 and complaint in told
    assert "broken" in complaint or "broken" not in told
    assert "_class_name" not in told  # what diffusers misses in the broken model


@pytest.mark.parametrize(
    "stage, complaint",
    [
        ("clip", "--work-dir: work has no pictures.npy; first run train.py pictures"),
        ("latents", "--model-dir: models has no vae; first run train.py vae"),
        ("decoder", "--model-dir: models has no vae; first run train.py vae"),
        ("edits", "--model-dir: models has no vae; first run train.py vae"),
        ("vae", "--work-dir: work has no pictures.npy; first run train.py pictures"),
        ("unet", "--model-dir: models has no tokenizer; first run train.py tokenizer"),
        ("inpaint", "--model-dir: models has no tokenizer; first run train.py tokenizer"),
        ("dino", "--work-dir: work has no pictures.npy; first run train.py pictures"),
    ],
)
def test_a_stage_of_training_names_the_one_that_it_needs(here, monkeypatch, stage, complaint):
    monkeypatch.setattr(train, "keep_memory", lambda: None)  # which starts the process anew
    with pytest.raises(SystemExit) as stopped:
        train.main([stage, "--work-dir", "work", "--model-dir", "models"])
    assert stopped.value.code == complaint


HELP = """
import os, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
path, folders = sys.path[1:], {folders!r}
for script in sys.argv[1:]:
    own = [name for name, module in sys.modules.items() if os.path.dirname(getattr(module, "__file__", "") or "") in folders]
    for name in own:
        del sys.modules[name]
    sys.argv, sys.path[:] = [script, "--help"], [os.path.dirname(script), *path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, script
"""


@pytest.mark.once
def test_every_script_has_help_with_an_example_and_needs_no_install(tmp_path):
    """All in one process, since each takes seconds to import torch; as if the project were not installed."""
    folders = [ROOT, ROOT / "examples", ROOT / "examples" / "storybook"]
    found = [file for folder in folders[1:] for file in sorted(folder.glob("*.py"))]
    scripts = [str(file) for file in found if "__main__" in file.read_text() and file.name != "command.py"]
    assert len(scripts) >= 9
    command = [sys.executable, "-c", HELP.format(folders=[str(folder) for folder in folders]), *scripts]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for script in scripts:
        assert f"usage: {Path(script).name}" in run.stdout
        assert f"python {Path(script).relative_to(ROOT)}" in run.stdout


def test_a_published_picture_lies_on_white_not_on_its_hidden_colours(here):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save("hidden.png")
    given = ["--file", "known.safetensors", "--before", "hidden.png", "--dry-run", "card"]
    publish.main(["difference", "you/difference", *given])
    assert Image.open("card/before.png").convert("RGBA").getcolors() == [(64, (255, 255, 255, 255))]
