# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The trained Storybook model and the examples that a newcomer runs."""

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from analogies import judge, random_analogy
from baselines import load_instruct, picture_latents, visii_instruction
from benchmark import load_pipeline
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import load_image
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from train import build_instruct_unet, clip_near_misses, clip_restated, decode, draw, encode, to_pil, to_signed
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from world import ATTRIBUTES, Scene, describe, random_scene, render

from pipeline_difference_inversion import DifferenceInversionPipeline


ROOT = Path(__file__).resolve().parents[1]
STORYBOOK = ROOT / "examples" / "storybook" / "model"


@pytest.fixture(scope="module")
def storybook() -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(STORYBOOK, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def storybook_xl() -> DifferenceInversionPipeline:
    return load_pipeline(STORYBOOK, torch.device("cpu"), STORYBOOK.with_name("model_xl"))


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


def test_clip_tells_near_misses_apart_and_hears_what_a_prompts_end_revises(storybook):
    """Every attribute, the subject too: difference tokens are a prompt's end, and CLIP is what says where they lead."""
    rng = random.Random("near misses")
    scenes = [random_scene(rng) for _ in range(40)]
    clip, processor = storybook.clip, storybook.clip_processor
    assert min(clip_near_misses(clip, processor, [render(scene) for scene in scenes], scenes).values()) >= 0.9
    assert min(clip_restated(clip, processor, scenes).values()) >= 0.9


def test_benchmark_tries_configurations_on_the_same_analogies(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [sys.executable, *launch, str(ROOT / "examples" / "storybook" / "benchmark.py"), "--per-kind", "1"]
    quick = ["num_optimization_steps=2", "num_inference_steps=2"]
    command += ["--config", *quick, "--config", *quick, "guidance_scale=1.5", "--sdedit", "0.1"]
    command += ["--output", str(tmp_path / "verdicts.jsonl")]
    command += ["--sheet", str(tmp_path / "sheet.png"), "--failures", str(tmp_path / "failures.png")]
    on_cpus = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=on_cpus)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: line["index"])
    assert [line["kind"] for line in lines] == ["subject", "color", "ground", "sky", "extra", "style"]
    for line in lines:
        methods = line["methods"]
        assert len(methods) == 6  # two configurations, an oracle for each guidance scale, SDEdit, and no change
        assert not methods["no change"]["success"] and methods["no change"]["kept"]
        assert methods["no change"]["direction"] == methods["no change"]["evaluations"] == 0
        # Learning: 2 steps of 2 latents, and 3 sets of 8 to judge tokens by (the first, and each step's); applying: 2
        # steps of inversion and 2 of drawing, which guidance doubles.
        assert methods["num_optimization_steps=2, num_inference_steps=2"]["evaluations"] == 4 + 24 + 4
        assert methods["oracle, num_inference_steps=2, guidance_scale=1.5"]["evaluations"] == 6
        assert line["far"] == all(
            line["query"][name] != line["before"][name]
            for name in ("subject", "ground", "sky")
            if name != line["kind"]
        )
    assert "| all | 6 | no change | 0.00 (0.00 to 0.39) | 1.00 (0.61 to 1.00) | 0.00 |" in run.stdout
    assert load_image(str(tmp_path / "sheet.png")).size == (9 * 128, 6 * 128)
    wrong = sum(not line["methods"][next(iter(line["methods"]))]["success"] for line in lines)
    assert load_image(str(tmp_path / "failures.png")).size == (9 * 128, wrong * 128)


def test_instruct_pix2pix_starts_as_storybook_and_learns_to_look_at_the_picture(storybook):
    """Its new channels begin at zero, and have a gradient from the first step on."""
    options = SimpleNamespace(model_dir=STORYBOOK, device=torch.device("cpu"))
    unet = build_instruct_unet(options)
    latents, picture = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = storybook.encode_prompt(["a red cabin", "a castle"])
    predicted = unet(torch.cat([latents, picture], dim=1), 500, text).sample
    torch.testing.assert_close(predicted, storybook.unet(latents, 500, text).sample, atol=1e-4, rtol=1e-4)
    predicted.square().mean().backward()
    assert unet.conv_in.weight.grad[:, 4:].any()


def test_visii_makes_of_a_prompt_an_instruction_that_draws_after_from_before_better(storybook, tmp_path):
    build_instruct_unet(SimpleNamespace(model_dir=STORYBOOK, device=torch.device("cpu"))).save_pretrained(tmp_path)
    instruct = load_instruct(storybook, tmp_path)
    before = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = [render(before), render(dataclasses.replace(before, sky="night"))]
    start, end = (
        visii_instruction(storybook, instruct, *pair, torch.Generator().manual_seed(0), steps) for steps in (0, 30)
    )
    assert start.shape == end.shape == (1, 40, 128)
    scheduler, times = instruct.scheduler, torch.arange(20, 1000, 49)
    noise = torch.randn(len(times), 4, 16, 16, generator=torch.Generator().manual_seed(1))
    picture, clean = (picture_latents(storybook, image) for image in pair)
    clean = clean * storybook.vae.config.scaling_factor

    @torch.no_grad()
    def error(instruction) -> float:
        noisy = torch.cat([scheduler.add_noise(clean, noise, times), picture.expand_as(noise)], dim=1)
        predicted = instruct.unet(noisy, times, instruction.expand(len(times), -1, -1)).sample
        return float((predicted - scheduler.get_velocity(clean, noise, times)).square().mean())

    assert error(end) < error(start)
    asked = {"image": pair[0], "num_inference_steps": 2, "guidance_scale": 1.5, "image_guidance_scale": 1.0}
    assert instruct(prompt_embeds=end, **asked).images[0].size == (128, 128)


@pytest.mark.parametrize(
    "given, missing",
    [
        (["--visii"], "--instruct"),
        (["--others-only", "--paper"], "--paper"),
    ],
)
def test_benchmark_refuses_options_that_do_not_go_together(given, missing):
    command = [sys.executable, str(ROOT / "examples" / "storybook" / "benchmark.py"), *given]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and missing in run.stderr.splitlines()[-1]


def test_benchmark_refuses_a_setting_that_the_pipeline_does_not_have():
    command = [sys.executable, str(ROOT / "examples" / "storybook" / "benchmark.py"), "--config", "num_token=8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "no argument 'num_token'" in run.stderr


def write_triplets(folder: Path, answers: list[str]) -> Path:
    """One analogy's pictures, and a line for each of its `answers`, by the name of the scene that is answered."""
    analogy = random_analogy(random.Random("triplets"), "sky")
    for part in ("before", "after", "query", "target"):
        render(getattr(analogy, part)).save(folder / f"{part}.png")
    lines = [
        {"before": "before.png", "after": "after.png", "image": "query.png", "answer": f"{name}.png"}
        for name in answers
    ]
    path = folder / "triplets.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_evaluate_scores_a_right_answer_above_a_wrong_one_and_an_unchanged_query_at_nothing(tmp_path):
    dino = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56))
    dino.save_pretrained(tmp_path / "dino")
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=56).save_pretrained(tmp_path / "dino")
    triplets = write_triplets(tmp_path, ["target", "before", "query"])
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--triplets", str(triplets)]
    for encoder in ([], ["--encoder", str(tmp_path / "dino")]):
        run = subprocess.run([*command, "--output", str(tmp_path), *encoder], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
        right, wrong, unchanged = (line[name] for line in scores for name in set(line) - {"index"})
        assert right > wrong and unchanged == pytest.approx(0, abs=1e-4)
        assert "| 3 |" in run.stdout


def test_evaluate_answers_a_triplet_that_has_no_answer(tmp_path):
    triplets = write_triplets(tmp_path, ["query"])
    (line,) = (json.loads(line) for line in triplets.read_text().splitlines())
    triplets.write_text(json.dumps({name: path for name, path in line.items() if name != "answer"}))
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--triplets", str(triplets)]
    run = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert load_image(str(tmp_path / "out" / "00000.png")).size == (128, 128)
    (scores,) = (json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines())
    assert scores["the model's CLIP"] > 0  # towards what changed, and not away from it


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"before": "a.png", "after": "a.png"}', "missing ['image']"),
        ('{"before": "a.png", "after": "a.png", "image": "no.png"}', "there is no file"),
        ("before, after", "is no JSON"),
        ("3", "is no JSON object"),
    ],
)
def test_evaluate_says_what_is_wrong_with_a_list_of_triplets(tmp_path, line, complaint):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "triplets.jsonl").write_text(line)
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--triplets", str(tmp_path / "triplets.jsonl")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "line 1" in run.stderr and complaint in run.stderr


@pytest.mark.parametrize(
    "kind, value", [("ground", "snow"), ("sky", "night"), ("color", "yellow"), ("subject", "boat")]
)
def test_tokens_that_no_prompt_explains_begin_at_the_word_for_what_changed(storybook, kind, value):
    scene = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = {"before": render(scene), "after": render(dataclasses.replace(scene, **{kind: value}))}
    settings = {"init": "clip", "num_tokens": 1, "num_optimization_steps": 1, "learning_rate": 1e-9}
    difference = storybook.invert_difference(**pair, before_prompt="", after_prompt="", **settings)
    (row,) = difference.embeddings["<difference>"]
    table = storybook.text_encoder.get_input_embeddings().weight
    assert storybook.tokenizer.decode(torch.cdist(row[None], table).argmin()).strip() == value


def test_the_unet_finds_words_for_a_picture_that_clip_does_not_miss(storybook):
    """Of the 24 attributes of four pictures, 16 were named without its revisions, and 19 with them."""
    rng = random.Random("words")
    scenes = [random_scene(rng) for _ in range(4)]
    named = []
    for revisions in (0, 6):
        options = {"num_steps": 100, "num_revisions": revisions, "generator": torch.Generator().manual_seed(0)}
        said = [set(prompt.split()) for prompt in storybook.hard_prompts(list(map(render, scenes)), **options)]
        pairs = list(zip(said, scenes, strict=True))
        named.append(sum(bool(words & set(getattr(s, name).split())) for words, s in pairs for name in ATTRIBUTES))
    assert named[1] > named[0], named


@pytest.mark.parametrize("kind, value, lost", [("sky", "night", "day"), ("subject", "tent", "castle")])
def test_prompts_of_pez_take_what_was_gained_and_what_was_lost_from_the_pictures(storybook, kind, value, lost):
    before = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = {"before": render(before), "after": render(dataclasses.replace(before, **{kind: value}))}
    options = {"prompt_method": "pez", "prompt_kwargs": {"num_steps": 20}, "num_optimization_steps": 1}
    difference = storybook.invert_difference(**pair, **options, generator=torch.Generator().manual_seed(0))
    assert [difference.metadata[f"{side}_phrases"] for side in ("lost", "gained")] == [lost, value]


def test_words_are_kept_although_their_way_back_is_worse_than_that_of_no_tokens(storybook):
    """A word of A' that is negated draws A worse than zeros do, and zeros change nothing."""
    before = Scene("cabin", "yellow", "snow", "night", "rainbow", "painting", 0.38, 0.47, 0.65)
    after = dataclasses.replace(before, ground="desert")
    pair = {"before": render(before), "after": render(after)}
    pair |= {"before_prompt": describe(before), "after_prompt": describe(after)}
    generator = torch.Generator().manual_seed(0)
    difference = storybook.invert_difference(
        **pair, lambda_before=1.0, num_optimization_steps=1, learning_rate=1e-9, generator=generator
    )
    words = difference.nearest_words(storybook.tokenizer, storybook.text_encoder, count=1)
    assert words[-1][0] == ("desert", pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize("model", ["storybook", "storybook_xl"])
def test_learned_differences_change_other_pictures(model, request):
    """Four answers, one of each kind of change, are nearer to the right picture than to the query; of the six five were
    with Storybook when it was written, and all with Storybook-XL."""
    pipe, rng, nearer = request.getfixturevalue(model), random.Random("transfer"), []
    for kind in ATTRIBUTES:
        analogy = random_analogy(rng, kind)
        before, after, query = (render(getattr(analogy, part)) for part in ("before", "after", "query"))
        answer = pipe(image=query, before=before, after=after, generator=torch.Generator().manual_seed(0)).images[0]
        unchanged = dataclasses.replace(analogy, target=analogy.query)
        nearer.append(judge(answer, analogy).psnr > judge(answer, unchanged).psnr)
    assert sum(nearer) >= 4, nearer


def stock_storybook(pipe, difference: Path) -> DiffusionPipeline:
    """Stock diffusers with the parts of one of ours, and a saved difference under the name <difference>."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in names}
    if pipe.text_encoder_2 is None:
        stock = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        stock.load_textual_inversion(difference)
    else:
        parts |= {name: copy.deepcopy(getattr(pipe, name)) for name in ("text_encoder_2", "tokenizer_2")}
        stock = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        rows = load_file(difference)
        for name, end in (("clip_l", ""), ("clip_g", "_2")):
            own = {part: parts[f"{part}{end}"] for part in ("text_encoder", "tokenizer")}
            stock.load_textual_inversion(rows[name], token="<difference>", **own)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize("model", ["storybook", "storybook_xl"])
def test_stock_diffusers_draws_what_a_saved_difference_says(model, request, tmp_path):
    """All four pictures were of a desert, and none without the difference, when it was written."""
    pipe = request.getfixturevalue(model)
    before = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = {"before": render(before), "after": render(dataclasses.replace(before, ground="desert"))}
    difference = pipe.invert_difference(**pair, num_optimization_steps=10, generator=torch.Generator().manual_seed(0))
    stock, said = stock_storybook(pipe, difference.save(tmp_path / "difference.safetensors")), {}
    for end in ("", ", <difference>"):
        prompt = f"a blue windmill on grass at night with a moon, pixel art{end}"
        options = {"num_inference_steps": 25, "guidance_scale": 2.0, "num_images_per_prompt": 4}
        options |= {"height": 128, "width": 128, "generator": torch.Generator().manual_seed(0)}
        said[end] = sum("desert" in text for text in pipe.caption(stock(prompt, **options).images))
    assert said[""] == 0 and said[", <difference>"] >= 3, said
    theirs = stock.encode_prompt(
        "a blue windmill, <difference>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    rows = torch.cat([difference.embeddings[name] for name in difference.embeddings], dim=-1)
    ours = pipe.encode_prompt(["a blue windmill,"], rows[None])
    torch.testing.assert_close(ours[0] if isinstance(ours, tuple) else ours, theirs)
