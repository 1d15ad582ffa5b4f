# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The paper's evaluation: what is scored and how, which answers are drawn, and what an interrupted run keeps."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from statistics import mean, stdev

import evaluate
import pytest
import torch
from analogies import random_analogy
from common import as_arguments, parse_setting
from conftest import STORYBOOK, build_pipeline, picture, seeded
from evaluate import encoder_of, find_answers, interval, kept, load_encoder, read_triplets
from PIL import Image
from stock import load_instruct, load_sdedit
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)
from world import ATTRIBUTES, random_scene, render

from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.utils import load_image


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(STORYBOOK / "model" / "clip").eval()


@pytest.fixture(scope="module")
def encode(clip):
    return encoder_of(clip, AutoImageProcessor.from_pretrained(STORYBOOK / "model" / "clip_processor"))


def save_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    dino = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56))
    dino.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scores_of(folder: Path) -> dict[tuple[str, str, int], tuple[float, float]]:
    """By method, encoder and index."""
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    return {(line["method"], line["encoder"], line["index"]): (line["direction"], line["kept"]) for line in lines}


def test_a_right_answer_scores_above_a_wrong_one_and_no_change_at_nothing(tmp_path, capsys):
    analogy = random_analogy(random.Random("triplets"), "sky")
    for part in ("before", "after", "query", "target"):
        render(getattr(analogy, part)).save(tmp_path / f"{part}.png")
    for name, answer in (("right", "target"), ("wrong", "before")):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / f"{answer}.png", tmp_path / name / "00000.png")
    line = {"before": "before.png", "after": "after.png", "image": "query.png", "target": "target.png"}
    triplets = write_lines(tmp_path / "triplets.jsonl", [line])
    given = ["--triplets", str(triplets), "--output", str(tmp_path / "out")]
    given += ["--answers", f"right={tmp_path / 'right'}", f"wrong={tmp_path / 'wrong'}"]
    for encoder in ("the model's CLIP", str(save_dino(tmp_path / "dino"))):
        evaluate.main([*given, *(["--encoder", encoder] if encoder.startswith("/") else [])])
        scores = scores_of(tmp_path / "out")
        right, wrong, unchanged = (scores[name, encoder, 0] for name in ("right", "wrong", "no change"))
        assert right[0] > wrong[0] and unchanged == pytest.approx((0, 1), abs=1e-4)
        assert scores["target", encoder, 0] == pytest.approx(right)
        assert right[1] > scores["A'", encoder, 0][1]
        told = capsys.readouterr().out
        assert f"| right | {encoder} | 1 | {right[0]:.4f} [{right[0]:.4f}, {right[0]:.4f}] | {right[1]:.4f} [" in told
        assert "The paper's Table 1" in told


def test_what_is_kept_falls_when_things_move_or_more_than_asked_for_changes(encode):
    """On 24 analogies it was 0.86, 0.76, 0.66 and 0.24 in this order."""
    rng, found = random.Random("kept"), []
    for index in range(24):
        analogy = random_analogy(rng, list(ATTRIBUTES)[index % 6])
        other, right = random_scene(rng), analogy.target
        moved = dataclasses.replace(right, x=other.x, size=other.size, horizon=other.horizon)
        name = rng.choice([name for name in ATTRIBUTES if name != analogy.kind])
        value = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(right, name)])
        scenes = (analogy.query, right, moved, dataclasses.replace(right, **{name: value}), analogy.after)
        _, patches = encode([render(scene) for scene in (analogy.before, analogy.after, *scenes)])
        a, a2, b, *answers = patches
        found.append([kept(torch.stack([a, a2, b, answer])) for answer in (b, *answers)])
    unchanged, *rest = map(mean, zip(*found, strict=True))
    assert unchanged == pytest.approx(1, abs=1e-5)
    assert all(more > less + 0.05 for more, less in zip([unchanged, *rest], rest, strict=False)), rest


def test_registers_are_no_patches_and_a_picture_model_without_tokens_has_none():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)).eval()
    processor = BitImageProcessor(size={"shortest_edge": 56}, crop_size=56)
    features, patches = encoder_of(model, processor)([picture(), picture("blue")])
    assert features.shape == (2, 8) and patches.shape == (2, 16, 8)
    assert kept(None) is None and evaluate.cell([None, None]) == "–"


def test_the_interval_of_a_mean_is_that_of_its_samples():
    """Of many values of any spread it comes near the normal distribution's, of equal values it is a point."""
    values = torch.rand(400, generator=seeded()).tolist()
    low, high = interval(values)
    half = 1.96 * stdev(values) / 20
    assert (low, high) == pytest.approx((mean(values) - half, mean(values) + half), abs=half / 10)
    assert interval(values) == (low, high) and interval([0.25] * 5) == (0.25, 0.25)


# --------------------------------------------------------------------------------------------------------- drawing


TEXTS = {
    "before_prompt": "a red cabin",
    "after_prompt": "a yellow castle",
    "prompt": "a blue cabin",
    "answer_prompt": "a blue castle",
    "instruction": "make it a castle",
}
METHODS = ["ours", "sdedit", "instruct"]
FEW = {
    "ours": ("init=random", "complete_prompts=False", "num_optimization_steps=1", "num_inference_steps=2"),
    "sdedit": ("num_inference_steps=2", "strength=0.5"),
    "instruct": ("num_inference_steps=2",),
}
CONFIG = ["--config", *(f"{method}.{setting}" for method, settings in FEW.items() for setting in settings)]


def instruct_unet() -> UNet2DConditionModel:
    torch.manual_seed(6)
    return UNet2DConditionModel.from_config(build_pipeline().unet.config, in_channels=8)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Models, and three triplets of which the queries differ."""
    folder = tmp_path_factory.mktemp("shelf")
    build_pipeline().save_pretrained(folder / "model")
    instruct_unet().save_pretrained(folder / "instruct")
    for name, color in {"a": "red", "a2": "yellow", "b": "blue", "c": "white", "d": "black"}.items():
        picture(color).save(folder / f"{name}.png")
    pair = {"before": "a.png", "after": "a2.png"} | TEXTS
    write_lines(folder / "triplets.jsonl", [pair | {"image": f"{query}.png"} for query in "bcd"])
    return folder


def asked(shelf: Path, output: Path, *more: str) -> list[str]:
    given = ["--triplets", str(shelf / "triplets.jsonl"), "--output", str(output), "--model", str(shelf / "model")]
    return [*given, "--instruct-model", str(shelf / "instruct"), *more]


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files of answers, with what is in them and when they were written."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent != folder]
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def evaluated(shelf, tmp_path_factory) -> Path:
    """The output of one whole run."""
    output = tmp_path_factory.mktemp("evaluated")
    evaluate.main(asked(shelf, output, "--method", *METHODS, *CONFIG))
    return output


def test_each_method_answers_every_triplet_with_what_it_is_told(shelf, evaluated):
    pipe = build_pipeline()
    query, seed = {"image": picture("white")}, {"generator": seeded()}
    learned = as_arguments(dict(map(parse_setting, FEW["ours"])))
    texts = {name: TEXTS[name] for name in ("before_prompt", "after_prompt", "prompt")}
    few = {"num_inference_steps": 2}
    expected = {
        "ours": pipe(**query, before=picture("red"), after=picture("yellow"), **texts, **learned, **seed),
        "sdedit": load_sdedit(pipe)(**query, prompt="a blue castle", strength=0.5, **few, generator=seeded()),
        "instruct": load_instruct(pipe, shelf / "instruct")(
            **query, prompt="make it a castle", **few, generator=seeded()
        ),
    }
    for method, out in expected.items():
        assert load_image(str(evaluated / method / "00001.png")).tobytes() == out.images[0].tobytes(), method
    assert set(written(evaluated)) == {f"{method}/{index:05d}.png" for method in METHODS for index in range(3)}
    scores = scores_of(evaluated)
    assert len(scores) == (len(METHODS) + 2) * 3 and all(-1 <= d <= 1 and k <= 1 + 1e-6 for d, k in scores.values())


def test_an_interrupted_run_goes_on_to_the_same_answers(shelf, evaluated, tmp_path):
    def stop(*_) -> None:
        if (tmp_path / "sdedit" / "00001.png").exists():
            raise KeyboardInterrupt

    given = asked(shelf, tmp_path, "--method", *METHODS, *CONFIG)
    hook = register_module_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(given)
    finally:
        hook.remove()
    early = written(tmp_path)
    assert set(early) == {f"ours/{index:05d}.png" for index in range(3)} | {"sdedit/00000.png", "sdedit/00001.png"}
    (half := tmp_path / "sdedit" / ".00002.png.0123").write_bytes(b"half")  # as a killed process may leave it
    evaluate.main(given)
    half.unlink()
    late, whole = written(tmp_path), written(evaluated)
    assert {name: late[name] for name in early} == early  # neither drawn again nor touched
    assert {name: content for name, (content, _) in late.items()} == {
        name: content for name, (content, _) in whole.items()
    }
    assert scores_of(tmp_path) == scores_of(evaluated)


def test_what_is_all_there_is_scored_without_the_model_that_drew_it(shelf, evaluated, tmp_path, capsys):
    for name in ("model", "instruct"):
        (shelf / name).rename(shelf / f"{name} elsewhere")
        (shelf / name).mkdir()
        (shelf / name / "model_index.json").write_text("{}")  # a model that would not load
    before = written(evaluated)
    try:
        encoder = str(save_dino(tmp_path / "dino"))
        evaluate.main(asked(shelf, evaluated, "--method", *METHODS, *CONFIG, "--encoder", encoder))
    finally:
        for name in ("model", "instruct"):
            shutil.rmtree(shelf / name)
            (shelf / f"{name} elsewhere").rename(shelf / name)
    assert written(evaluated) == before
    assert capsys.readouterr().out.count(f" | {encoder} | 3 | ") == len(METHODS) + 2


@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--seed", "1"], "answers of ours with --seed 0, and now it is 1"),
        (["--config", "ours.num_tokens=2"], "answers of ours with --config {"),
        (["--model", "instruct"], "answers of ours with --model "),
        (["--method", "instruct", "--instruct-model", "model"], "answers of instruct with --instruct-model "),
        (["--triplets", "other.jsonl"], "answers to other triplets than --triplets"),
    ],
)
def test_answers_of_other_settings_are_refused_by_the_settings_name(shelf, evaluated, monkeypatch, given, complaint):
    monkeypatch.chdir(shelf)
    shutil.copy(shelf / "instruct" / "config.json", shelf / "instruct" / "model_index.json")
    (shelf / "other.jsonl").write_text((shelf / "triplets.jsonl").read_text().replace("castle", "tent"))
    before = written(evaluated)
    with pytest.raises(SystemExit, match="name another folder") as stopped:
        evaluate.main(asked(shelf, evaluated, "--method", "ours", *CONFIG[:5], *given))
    (shelf / "instruct" / "model_index.json").unlink()
    assert complaint in str(stopped.value) and written(evaluated) == before


def test_answers_that_nothing_is_known_of_are_refused(shelf, evaluated, tmp_path):
    shutil.copytree(evaluated / "ours", tmp_path / "ours")
    with pytest.raises(SystemExit, match="does not say how they were drawn"):
        evaluate.main(asked(shelf, tmp_path))


def test_answers_to_other_pictures_of_the_same_names_are_refused(shelf, evaluated):
    query = shelf / "c.png"
    before = query.read_bytes()
    picture("green").save(query)
    try:
        with pytest.raises(SystemExit, match="has answers to other triplets"):
            evaluate.main(asked(shelf, evaluated, "--method", *METHODS, *CONFIG))
    finally:
        query.write_bytes(before)


def test_an_encoder_whose_features_would_be_random_is_refused(tmp_path):
    vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTModel(vit, add_pooling_layer=False).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--encoder: .*its weights lack pooler"):
        load_encoder(str(tmp_path), torch.device("cpu"))


def test_a_model_that_is_found_not_to_load_may_be_corrected(shelf, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    given = ["--method", "ours", "instruct", *CONFIG[:5]]
    with pytest.raises(SystemExit, match="--instruct-model: .* cannot be loaded"):
        evaluate.main(asked(shelf, tmp_path / "out", *given, "--instruct-model", str(tmp_path / "bad")))
    assert not written(tmp_path / "out")  # not even ours, which would have taken long
    evaluate.main(asked(shelf, tmp_path / "out", "--method", "ours", *CONFIG[:5]))
    assert len(written(tmp_path / "out")) == 3


def test_instruct_pix2pix_is_a_whole_pipeline_or_a_unet(shelf, tmp_path):
    pipe = build_pipeline()
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionInstructPix2PixPipeline(**parts, unet=instruct_unet(), **checks).save_pretrained(tmp_path)
    told = {"image": picture("blue"), "prompt": "make it a castle", "num_inference_steps": 2}
    whole, joined = (
        load_instruct(pipe, f)(**told, generator=seeded()).images[0] for f in (tmp_path, shelf / "instruct")
    )
    assert whole.tobytes() == joined.tobytes()


def test_told_nothing_ours_is_answered_by_the_captioners_words(tmp_path):
    """Storybook's own, whose answer changes as the pair did, whatever nonsense the triplet says."""
    analogy = random_analogy(random.Random("triplets"), "sky")
    for part in ("before", "after", "query"):
        render(getattr(analogy, part)).save(tmp_path / f"{part}.png")
    line = {"before": "before.png", "after": "after.png", "image": "query.png"} | TEXTS
    triplets = write_lines(tmp_path / "triplets.jsonl", [line])
    config = [f"ours-captioned.{setting}" for setting in ("num_optimization_steps=0", "num_inference_steps=10")]
    given = ["--triplets", str(triplets), "--output", str(tmp_path / "out"), "--method", "ours-captioned"]
    evaluate.main([*given, "--config", *config])
    assert load_image(str(tmp_path / "out" / "ours-captioned" / "00000.png")).size == (128, 128)
    direction, stayed = scores_of(tmp_path / "out")["ours-captioned", "the model's CLIP", 0]
    assert direction > 0.5 and stayed > 0.5


# ------------------------------------------------------------------------------------------ what is said beforehand


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"before": "a.png", "after": "a.png"}', "missing ['image']"),
        ('{"before": "a.png", "after": "a.png", "image": "a.png", "answer": "a.png"}', "unknown ['answer']"),
        ('{"before": "a.png", "after": "a.png", "image": "no.png"}', "there is no file"),
        ('{"before": "a.png", "after": "a.png", "image": "text.png"}', "text.png is no picture"),
        ('{"before": "a.png", "after": "a.png", "image": 3}', "'image' is 3; it should be a text"),
        ("before, after", "is no JSON"),
        ("3", "is no JSON object"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, line, complaint):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "triplets.jsonl").write_text(f"\n{line}")
    with pytest.raises(SystemExit, match="--triplets: .*, line 2: ") as stopped:
        evaluate.main(["--triplets", str(tmp_path / "triplets.jsonl")])
    assert complaint in str(stopped.value)


@pytest.mark.parametrize(
    "names, first", [(["00000", "00001", "00002"], "00000.png"), (["b", "c", "d"], "b.png"), (["b", "c"], None)]
)
def test_answers_from_elsewhere_are_found_by_number_or_by_the_querys_name(shelf, tmp_path, names, first):
    for name in names:
        picture().save(tmp_path / f"{name}.png")
    triplets = read_triplets(shelf / "triplets.jsonl")
    if first:
        assert [file.stem for file in find_answers("theirs", tmp_path, triplets)] == names
    else:
        with pytest.raises(ValueError, match="--answers: .*for theirs, has no answer d.png"):
            find_answers("theirs", tmp_path, triplets)


@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--method", "sdedit"], "sdedit is told the 'answer_prompt' of each triplet"),
        (["--method", "instruct"], "instruct is told the 'instruction' of each triplet"),
        (["--config", "ours.num_tokens=0"], "--config: ours: `num_tokens` is 0"),
        (["--config", "ours.strength=2"], "--config: ours.strength is 2"),
        (["--answers", "theirs=named", "theirs=named"], "--answers: two of theirs, theirs have one name"),
    ],
)
def test_what_a_method_lacks_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, given, complaint):
    monkeypatch.chdir(tmp_path)
    Path("named").mkdir()
    for path in ("a.png", "named/00000.png"):
        picture().save(path)
    triplets = write_lines(tmp_path / "t.jsonl", [dict.fromkeys(("before", "after", "image"), "a.png")])
    (tmp_path / "model").mkdir()  # which would not load
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(
            ["--triplets", str(triplets), "--output", str(tmp_path / "out"), "--model", str(tmp_path), *given]
        )
    assert complaint in str(stopped.value)


@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--config", "ours.num_token=2"], "ours has no setting 'num_token'"),
        (["--config", "num_tokens=2"], "is not METHOD.NAME=VALUE"),
        (["--config", "sdedit.strength=0.5"], "sdedit, which is not a --method"),
        (["--answers", "theirs=none"], "argument --answers: there is no folder none"),
        (["--answers", "none"], "argument --answers: there is no folder none"),
        (["--answers", "="], "argument --answers: '=' gives no name"),
        (["--answers", f"ours={STORYBOOK}"], "'ours' is the name of another row"),
    ],
)
def test_calls_that_it_does_not_know_are_usage_errors(given, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--triplets", "none", *given])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]
