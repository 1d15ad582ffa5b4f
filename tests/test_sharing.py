# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Differences and pipelines as people share them: folders, repositories of the Hub, other programs' files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import publish
import pytest
import torch
from conftest import PIPELINE_FILE, ROOT, WIDTH, build_pipeline, picture, random_tokens, rows_of, seeded
from hub import Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from pipeline_difference_inversion import DifferenceTokens


def run_alone(code: str, folder: Path, **environment: str) -> str:
    """What a fresh process prints that knows no modules yet, does not stand in the project, and by default is offline."""
    caches = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    settings = {"HF_HUB_OFFLINE": "1", **caches, **environment}
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **settings},
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


EACH_ALONE = """
import multiprocessing, diffusers, torch, transformers
for code in {codes}:
    process = multiprocessing.get_context("fork").Process(target=exec, args=(code, {{}}))
    process.start()
    process.join()
    assert process.exitcode == 0
"""


def run_each_alone(codes: list[str], folder: Path, **environment: str) -> list[str]:
    """As `run_alone`, the last line of each; processes that know libraries, but none of the pipeline's modules."""
    return run_alone(EACH_ALONE.format(codes=codes), folder, **environment).splitlines()[-len(codes) :]


# ---------------------------------------------------------------------------------------------- folders and the Hub


def test_a_published_difference_loads_as_it_was_and_has_a_card(pipe, pair, tmp_path):
    difference = pipe.invert_difference(**pair, num_optimization_steps=1, generator=seeded())
    difference.metadata["base_model"] = "someone/a-model"
    file, folder = difference.save(tmp_path / "difference"), tmp_path / "yellow-castle"
    for name in ("before", "after"):
        pair[name].save(tmp_path / f"{name}.png")
    pictures = [f"--{name}={tmp_path / name}.png" for name in ("before", "after")]
    publish.main(["difference", "someone/yellow-castle", f"--file={file}", *pictures, "--dry-run", str(folder)])
    loaded = pipe.load_difference(folder)
    assert torch.equal(rows_of(loaded), rows_of(difference)) and loaded.metadata == difference.metadata
    assert Image.open(folder / "before.png").tobytes() == pair["before"].tobytes()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/a-model"
    assert {"diffusers", "textual-inversion", "difference-tokens"} <= set(card.data.tags)
    for said in (
        "a red cabin → a yellow castle on snow",
        "![before](before.png)",
        '"someone/yellow-castle"',
        "| alpha | 0.0 |",
    ):
        assert said in card.content


def test_a_card_does_without_pictures_and_without_a_story(tmp_path):
    file = DifferenceTokens({"<cat>": torch.zeros(1, 4)}).save(tmp_path / "cat")
    publish.main(["difference", "someone/cat", f"--file={file}", "--dry-run", str(tmp_path / "cat")])
    card = ModelCard.load(tmp_path / "cat" / "README.md")
    assert "# someone/cat" in card.content and ".png" not in card.content
    assert card.data.base_model is None


def test_the_card_of_an_sdxl_difference_shows_both_calls(tmp_path):
    file = DifferenceTokens({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(1, 8)}).save(tmp_path / "two")
    publish.main(["difference", "someone/two", f"--file={file}", "--dry-run", str(tmp_path / "two")])
    card = (tmp_path / "two" / "README.md").read_text()
    assert "clip_g" in card and "text_encoder_2" in card and "weight_name=" not in card


@pytest.mark.parametrize(
    "what, options", [("difference", []), ("storybook", ["--file=d.safetensors"]), ("pipeline", ["--before=a.png"])]
)
def test_a_file_is_published_as_a_difference_and_nothing_else_is(tmp_path, capsys, what, options):
    with pytest.raises(SystemExit):
        publish.main([what, "someone/thing", *options, "--dry-run", str(tmp_path / "new")])
    assert "--file is the difference" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_difference_is_published_with_its_card_once_its_pictures_are_opened(hub, tmp_path):
    file = random_tokens().save(tmp_path / "d")
    picture("red").save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="none.png"):
        publish.main(["difference", "someone/thing", f"--file={file}", f"--after={tmp_path / 'none.png'}"])
    assert "someone/thing" not in hub.repositories
    publish.main(["difference", "someone/thing", f"--file={file}", f"--after={tmp_path / 'a.png'}"])
    assert set(hub.repositories["someone/thing"]["main"]) == {"README.md", "after.png", "difference.safetensors"}


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


def test_a_pushed_difference_is_found_by_repository_revision_and_name(hub, tmp_path):
    difference = DifferenceTokens({"<difference>": torch.ones(2, 4)})
    url = difference.push_to_hub("someone/castle")
    assert url.startswith(f"{hub.url}/someone/castle/commit/")
    assert set(hub.repositories["someone/castle"]["main"]) == {"difference.safetensors"}
    DifferenceTokens({"<difference>": torch.full((1, 4), 3.0)}).save(tmp_path / "v2" / "other.safetensors")
    hub.put("someone/castle", tmp_path / "v2", revision="v2")

    def load(*where, **options) -> DifferenceTokens:
        return DifferenceTokens.from_pretrained(*where, **options, cache_dir=tmp_path / "cache")

    assert torch.equal(rows_of(load("someone/castle")), torch.ones(2, 4))
    other = load("someone/castle", revision="v2", weight_name="other.safetensors")
    assert torch.equal(rows_of(other), torch.full((1, 4), 3.0))
    where = "`path_or_repo_id`: 'someone/"
    for asked, complaint in (
        (
            {"weight_name": "other.safetensors"},
            f"{where}castle' has no file 'other.safetensors'; give another `weight_name`.",
        ),
        ({"revision": "v9"}, f"{where}castle' has no revision 'v9'."),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(complaint)):
            load("someone/castle", **asked)
    with pytest.raises(
        FileNotFoundError, match=f"{where}nothing' is neither a file, nor a folder, nor a repository of the"
    ):
        load("someone/nothing")


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


@pytest.mark.slow
def test_every_way_of_loading_draws_the_same_in_a_fresh_process(shelf):
    codes = [way.format(file=str(PIPELINE_FILE), root=str(ROOT)) + DRAW for way in WAYS.values()]
    drawn = dict(zip(WAYS, map(float, run_each_alone(codes, shelf)), strict=True))
    pipe = build_pipeline(clip=None, clip_processor=None)  # as on the shelf: a CLIP would complete the prompt
    rows = torch.nn.functional.one_hot(torch.arange(2), WIDTH).float()
    options = {"prompt": "a cabin", "difference": DifferenceTokens({"<difference>": rows}), "num_inference_steps": 2}
    expected = pipe(image=Image.new("RGB", (32, 32), "blue"), **options, output_type="latent", generator=seeded())
    assert drawn == pytest.approx(dict.fromkeys(WAYS, float(expected.images.sum())), abs=0.3)


# ------------------------------------------------------------------------------------------------------- publishing


def online(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}


LOAD = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({}, trust_remote_code=True)
print(type(pipe).__name__, pipe.clip is not None, pipe.captioner is not None, hasattr(pipe, "pinned"))
"""


@pytest.mark.slow
def test_the_published_storybook_loads_by_itself_in_a_fresh_process(tmp_path):
    publish.main(["storybook", "someone/storybook", "--dry-run", str(tmp_path / "storybook")])
    said = run_alone(LOAD.format("'storybook'"), tmp_path)
    assert said.split()[-4:] == ["DifferenceInversionPipeline", "True", "True", "False"]
    assert ModelCard.load(tmp_path / "storybook" / "README.md").data.library_name == "diffusers"


@pytest.mark.slow
def test_the_published_pipeline_loads_beside_any_checkpoint(shelf, tmp_path):
    publish.main(["pipeline", "someone/difference-inversion", "--dry-run", str(tmp_path / "code")])
    said = run_alone(LOAD.format(f"{str(shelf / 'model')!r}, custom_pipeline='code'"), tmp_path)
    assert said.split()[-4:] == ["DifferenceInversionPipeline", "False", "False", "False"]
    card = (tmp_path / "code" / "README.md").read_text()
    assert 'custom_pipeline="someone/difference-inversion"' in card and PIPELINE_FILE.name not in card


def links(text: str) -> list[str]:
    """Where a Markdown text leads, but for addresses."""
    code = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", code.sub("", text))
    return [link for link in found if not link.startswith(("https://", "http://"))]


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(file: Path) -> list[str]:
    text, broken = file.read_text(), []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def test_no_link_of_a_document_or_a_published_card_breaks(tmp_path):
    """A published card has nothing around it but what goes up with it."""
    random_tokens().save(tmp_path / "d.safetensors")
    picture().save(tmp_path / "a.png")
    story = [f"--file={tmp_path / 'd.safetensors'}", f"--before={tmp_path / 'a.png'}"]
    for what, more in {"pipeline": [], "storybook": [], "difference": story}.items():
        publish.main([what, "someone/thing", *more, "--dry-run", str(tmp_path / what)])
    cards = [tmp_path / what / "README.md" for what in ("pipeline", "storybook", "difference")]
    documents = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    assert {file: broken for file in [*cards, *documents] if (broken := broken_links(file))} == {}
    assert links(cards[1].read_text()) == ["text_to_image.png"] and links(cards[2].read_text()) == ["before.png"]
    assert "someone/thing" in cards[1].read_text() and "examples/storybook/model" not in cards[1].read_text()


def put_pinned(hub: Hub, repo_id: str) -> None:
    """Another revision of a published repository, whose pipeline can be told from the first's."""
    main = hub.repositories[repo_id]["main"]
    pinned = main["pipeline.py"] + b"\n\nDifferenceInversionPipeline.pinned = True\n"
    hub.repositories[repo_id]["v1"] = {**main, "pipeline.py": pinned}


@pytest.mark.slow
def test_storybook_is_published_and_loads_from_the_hub_at_any_revision(hub, tmp_path):
    publish.main(["storybook", "someone/storybook"])
    put_pinned(hub, "someone/storybook")
    codes = [LOAD.format(f"'someone/storybook'{pin}") for pin in ("", ", revision='v1'")]
    newest, pinned = run_each_alone(codes, tmp_path, **online(hub))
    assert newest.split() == ["DifferenceInversionPipeline", "True", "True", "False"]
    assert pinned.split() == ["DifferenceInversionPipeline", "True", "True", "True"]


@pytest.mark.slow
def test_the_pipeline_is_published_and_loads_from_the_hub_at_any_revision(hub, shelf, tmp_path):
    publish.main(["pipeline", "someone/code"])
    put_pinned(hub, "someone/code")
    beside = f"{str(shelf / 'model')!r}, custom_pipeline='someone/code'"
    codes = [LOAD.format(f"{beside}{pin}") for pin in ("", ", custom_revision='v1'")]
    newest, pinned = run_each_alone(codes, tmp_path, **online(hub))
    assert newest.split() == ["DifferenceInversionPipeline", "False", "False", "False"]
    assert pinned.split() == ["DifferenceInversionPipeline", "False", "False", "True"]


@pytest.mark.slow
def test_who_allows_no_remote_code_is_obeyed(shelf):
    code = "import pytest\nwith pytest.raises(ValueError, match='DIFFUSERS_DISABLE_REMOTE_CODE'):"
    code += LOAD.format("'whole'").replace("\n", "\n    ").rstrip()
    run_alone(code, shelf, DIFFUSERS_DISABLE_REMOTE_CODE="1")
