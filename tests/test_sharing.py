# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Differences and pipelines as people share them: folders, repositories of the Hub, other programs' files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PIPELINE_FILE, ROOT, WIDTH, build_pipeline, picture, random_tokens, rows_of, seeded
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from pipeline_difference_inversion import DifferenceTokens


EXAMPLES = ROOT / "examples"


def put_on_the_hub(cache: Path, repo_id: str, folder: Path, revision: str = "main") -> None:
    """Lays a folder into the Hub's cache, as a download leaves it."""
    repository, commit = cache / f"models--{repo_id.replace('/', '--')}", "0" * 39 + str(len(revision) % 10)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def run_alone(code: str, folder: Path, **environment: str) -> str:
    """What a fresh process prints that is offline, knows no modules yet, and does not stand in the project."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **settings},
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# ---------------------------------------------------------------------------------------------- folders and the Hub


def test_a_folder_of_a_difference_loads_as_it_was_and_has_a_card(pipe, pair, tmp_path):
    difference = pipe.invert_difference(**pair, num_optimization_steps=1, generator=seeded())
    difference.metadata["base_model"] = "someone/a-model"
    folder = difference.save_pretrained(tmp_path / "yellow-castle", pair["before"], pair["after"])
    loaded = pipe.load_difference(folder)
    assert torch.equal(rows_of(loaded), rows_of(difference)) and loaded.metadata == difference.metadata
    assert Image.open(folder / "before.png").tobytes() == pair["before"].tobytes()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/a-model"
    assert {"diffusers", "textual-inversion", "difference-tokens"} <= set(card.data.tags)
    for said in (
        "a red cabin → a yellow castle on snow",
        "![before](before.png)",
        '"yellow-castle"',
        "| alpha | 0.8 |",
    ):
        assert said in card.content


def test_a_card_does_without_pictures_and_without_a_story(tmp_path):
    folder = DifferenceTokens({"<cat>": torch.zeros(1, 4)}).save_pretrained(tmp_path / "cat", repo_id="someone/cat")
    card = ModelCard.load(folder / "README.md")
    assert "# someone/cat" in card.content and ".png" not in card.content
    assert card.data.base_model is None


def test_pictures_of_a_card_are_looked_at_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="`after`.*ndarray|`after`.*Tensor"):
        random_tokens().save_pretrained(tmp_path / "new", after=torch.zeros(3, 8, 8))
    assert not (tmp_path / "new").exists()


def test_a_difference_may_be_given_as_its_folder(pipe, tmp_path):
    random_tokens().save_pretrained(tmp_path / "d")
    options = {"image": picture("blue"), "prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    ours, theirs = (
        pipe(**options, difference=d, generator=seeded()).images for d in (random_tokens(), tmp_path / "d")
    )
    torch.testing.assert_close(ours, theirs)


def test_the_only_file_of_a_folder_is_its_difference_and_of_several_one_is_named(pipe, tmp_path):
    random_tokens(seed=1).save(tmp_path / "one.safetensors")
    assert torch.equal(rows_of(pipe.load_difference(tmp_path)), rows_of(random_tokens(seed=1)))
    random_tokens(seed=2).save(tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match="2 safetensors files.*`weight_name`"):
        pipe.load_difference(tmp_path)
    named = pipe.load_difference(tmp_path, weight_name="two.safetensors")
    assert torch.equal(rows_of(named), rows_of(random_tokens(seed=2)))


def test_a_difference_on_the_hub_is_found_by_repository_revision_and_name(pipe, tmp_path):
    cache = tmp_path / "cache"
    random_tokens(seed=1).save_pretrained(tmp_path / "first")
    random_tokens(seed=2).save(tmp_path / "second" / "other.safetensors")
    put_on_the_hub(cache, "someone/castle", tmp_path / "first")
    put_on_the_hub(cache, "someone/castle", tmp_path / "second", revision="v2")
    first = pipe.load_difference("someone/castle", cache_dir=cache)
    assert torch.equal(rows_of(first), rows_of(random_tokens(seed=1)))
    options = {"revision": "v2", "weight_name": "other.safetensors", "cache_dir": cache}
    assert torch.equal(rows_of(pipe.load_difference("someone/castle", **options)), rows_of(random_tokens(seed=2)))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("nowhere/at/all", FileNotFoundError, "nowhere/at/all.*neither a file, nor a folder, nor a repository"),
        ("someone/castle", OSError, "someone/castle.*Hub cannot be reached.*difference.safetensors"),
        ("", FileNotFoundError, "safetensors files|neither a file"),
    ],
)
def test_what_is_nowhere_is_said_to_be_and_the_pipeline_goes_on_working(
    pipe, tmp_path, monkeypatch, name, error, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        pipe.load_difference(name, cache_dir=tmp_path / "cache")
    options = {"image": picture("blue"), "prompt": "a", "num_inference_steps": 1}
    assert pipe(**options, difference=random_tokens()).images


def test_a_loaded_difference_must_fit_the_model(pipe, tmp_path):
    random_tokens(width=8).save_pretrained(tmp_path / "d")
    with pytest.raises(ValueError, match=f"`difference`.*size 8.*{WIDTH}"):
        pipe.load_difference(tmp_path / "d")


def test_pushing_without_the_hub_is_an_error_and_not_silence():
    with pytest.raises((ConnectionError, OSError)):
        random_tokens().push_to_hub("someone/castle", token="hf_none")


def test_the_way_back_can_be_saved_for_programs_that_know_no_sign(pipe, pair, tmp_path):
    difference = pipe.invert_difference(**pair, num_optimization_steps=1, generator=seeded())
    loaded = DifferenceTokens.load(difference.negated().save(tmp_path / "back"))
    assert torch.equal(rows_of(loaded), -rows_of(difference))
    assert loaded.metadata["before_prompt"] == difference.metadata["after_prompt"]


# -------------------------------------------------------------------------------------------- other programs' files


FOREIGN = {
    "diffusers, one vector": ({"<cat>": torch.arange(4.0)}, (1, 4)),
    "diffusers, several vectors": ({"<cat>": torch.ones(3, 4)}, (3, 4)),
    "A1111's safetensors": ({"emb_params": torch.ones(2, 4)}, (2, 4)),
    "A1111's, flattened": (
        {"string_to_param.*": torch.ones(2, 4), "string_to_token.*": torch.tensor([265])},
        (2, 4),
    ),
}


@pytest.mark.parametrize("tensors, shape", FOREIGN.values(), ids=FOREIGN)
def test_embeddings_of_other_programs_are_differences(tensors, shape, tmp_path):
    save_file(tensors, tmp_path / "cat.safetensors")
    (rows,) = DifferenceTokens.load(tmp_path / "cat.safetensors").embeddings.values()
    assert rows.shape == shape


def test_embeddings_for_sdxl_have_comfyuis_names(tmp_path):
    save_file({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)}, tmp_path / "cat.safetensors")
    embeddings = DifferenceTokens.load(tmp_path / "cat.safetensors").embeddings
    assert {name: tuple(rows.shape) for name, rows in embeddings.items()} == {"clip_l": (2, 4), "clip_g": (2, 6)}


# ------------------------------------------------------------------------------------------------ ways of loading


DRAW = """
import torch
from PIL import Image
pipe.set_progress_bar_config(disable=True)
rows = torch.nn.functional.one_hot(torch.arange(2), pipe.text_encoder.config.hidden_size).float()
tokens = type("Tokens", (), {"embeddings": {"<difference>": rows}, "metadata": {}})()
options = {"prompt": "a cabin", "difference": tokens, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
print(pipe(image=Image.new("RGB", (32, 32), "blue"), **options, output_type="latent").images.sum().item())
"""

WAYS = {
    "a local file": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("model", custom_pipeline={file!r}, trust_remote_code=True)
""",
    "a folder with pipeline.py": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("model", custom_pipeline="code", trust_remote_code=True)
""",
    "importing": """
import sys
sys.path.insert(0, {root!r})
from pipeline_difference_inversion import DifferenceInversionPipeline
pipe = DifferenceInversionPipeline.from_pretrained("model")
""",
    "from_pipe": """
import sys
sys.path.insert(0, {root!r})
from diffusers import StableDiffusionPipeline
from pipeline_difference_inversion import DifferenceInversionPipeline
sd = StableDiffusionPipeline.from_pretrained("model", safety_checker=None)
pipe = DifferenceInversionPipeline.from_pipe(sd, dtype=sd.dtype)
assert pipe.unet is sd.unet and pipe.clip is None
""",
    "half-precision variants": """
from diffusers import DiffusionPipeline
import torch
pipe = DiffusionPipeline.from_pretrained("half", variant="fp16", custom_pipeline={file!r}, trust_remote_code=True)
pipe.to(torch.float32)
""",
    "one folder with code and weights": """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("whole", trust_remote_code=True)
""",
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A checkpoint, one in half precision, one with its code, and the code alone."""
    folder = tmp_path_factory.mktemp("shelf")
    pipe = build_pipeline(clip=None, clip_processor=None)
    pipe.save_pretrained(folder / "model")
    pipe.save_pretrained(folder / "whole")
    pipe.to(torch.float16).save_pretrained(folder / "half", variant="fp16")
    for name in ("code", "whole"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "pipeline.py").write_text(PIPELINE_FILE.read_text())
    index = folder / "whole" / "model_index.json"
    index.write_text(
        index.read_text().replace('"DifferenceInversionPipeline"', '["pipeline", "DifferenceInversionPipeline"]')
    )
    return folder


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_loading_draws_the_same_in_a_fresh_process(shelf, way):
    code = way.format(file=str(PIPELINE_FILE), root=str(ROOT)) + DRAW
    drawn = float(run_alone(code, shelf).split()[-1])
    pipe = build_pipeline()
    rows = torch.nn.functional.one_hot(torch.arange(2), WIDTH).float()
    options = {"prompt": "a cabin", "difference": DifferenceTokens({"<difference>": rows}), "num_inference_steps": 2}
    expected = pipe(image=Image.new("RGB", (32, 32), "blue"), **options, output_type="latent", generator=seeded())
    assert drawn == pytest.approx(float(expected.images.sum()), abs=0.3)


# ------------------------------------------------------------------------------------------------------- publishing


def publish(what: str, repo_id: str, folder: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "publish.py"), what, repo_id, "--dry-run", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_published_storybook_loads_by_itself_in_a_fresh_process(tmp_path):
    publish("storybook", "someone/storybook", tmp_path / "storybook")
    code = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("storybook", trust_remote_code=True)
print(type(pipe).__name__, pipe.clip is not None, pipe.captioner is not None)
"""
    assert run_alone(code, tmp_path).split()[-3:] == ["DifferenceInversionPipeline", "True", "True"]
    assert ModelCard.load(tmp_path / "storybook" / "README.md").data.library_name == "diffusers"


def test_the_published_pipeline_loads_beside_any_checkpoint(shelf, tmp_path):
    publish("pipeline", "someone/difference-inversion", tmp_path / "code")
    code = f"""
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(shelf / "model")!r}, custom_pipeline="code", trust_remote_code=True)
print(type(pipe).__name__)
"""
    assert run_alone(code, tmp_path).split()[-1] == "DifferenceInversionPipeline"
    card = (tmp_path / "code" / "README.md").read_text()
    assert 'custom_pipeline="someone/difference-inversion"' in card and PIPELINE_FILE.name not in card
