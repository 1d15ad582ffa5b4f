# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The trained Storybook model and the examples that a newcomer runs."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import benchmark
import benchmark_speed
import invert_many
import pytest
import torch
from analogies import BLENDS, Analogy, judge, random_analogy, random_wordless_analogy
from benchmark import (
    CEILING,
    Answer,
    Score,
    comparison_table,
    json_record,
    kind_table,
    load_pipeline,
    make_task,
    methods,
    newcombe,
    ours,
    parse_options,
    read_answers,
    summary_table,
)
from components import XL_COMPONENTS, decode, encode, save_component, to_pil, to_signed
from conftest import build_clip, build_pipeline, build_tokenizer, rows_of
from PIL import Image
from questions import draw_questions, with_fillers
from safetensors import safe_open
from safetensors.torch import load_file
from scores import clip_near_misses, clip_restated
from train import bf16_pays
from training import draw
from transformers import CLIPModel
from world import ATTRIBUTES, Scene, describe, random_scene, render

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import load_image
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


ON_CPUS = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
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
    """Of the scenes' pictures, in bfloat16 where that is quicker: it moves them by 54 dB, and the VAE itself by 30."""
    pictures = to_signed(torch.stack([torch.tensor(draw(s)) for s in scenes]).numpy())
    vae = copy.deepcopy(vae).to(memory_format=torch.channels_last)  # twice as quick
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_pays(torch.device("cpu"))):
        return to_pil(decode(vae, encode(vae, pictures)).float())


def successes(analogies, *answers: list) -> list[int]:
    """How many of each list of answers the judge finds right."""
    found = [
        [judge(picture, analogy).success for picture in pictures]
        for analogy, *pictures in zip(analogies, *answers, strict=True)
    ]
    return [sum(each) for each in zip(*found, strict=True)]


@pytest.mark.once
def test_judge_knows_the_target_and_the_query_through_the_vae(storybook):
    rng = random.Random("judge")
    analogies = [random_analogy(rng) for _ in range(200)]
    targets = reconstructions(storybook.vae, [analogy.target for analogy in analogies])
    queries = reconstructions(storybook.vae, [analogy.query for analogy in analogies])
    right, wrong = successes(analogies, targets, queries)
    assert right >= 0.98 * len(analogies) and wrong == 0


@pytest.mark.once
def test_judge_knows_wordless_targets_and_their_queries_through_the_vae(storybook):
    rng = random.Random("wordless judge")
    analogies = [random_wordless_analogy(rng, kind) for kind in BLENDS for _ in range(20)]
    targets = reconstructions(storybook.vae, [analogy.target for analogy in analogies])
    queries = reconstructions(storybook.vae, [analogy.query for analogy in analogies])
    right, wrong = successes(analogies, targets, queries)
    assert right >= 39 and wrong == 0


def test_captioner_describes_a_picture(storybook):
    rng = random.Random("captions")
    scenes = [random_analogy(rng).query for _ in range(20)]
    captions = storybook.caption([render(scene) for scene in scenes])
    right = sum(said == describe(scene) for said, scene in zip(captions, scenes, strict=True))
    assert right >= 17


@pytest.mark.slow
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


@pytest.mark.once
def test_benchmark_tries_configurations_on_the_same_analogies(tmp_path, capsys):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    quick = ["init=random", "complete_prompts=False", "num_optimization_steps=2", "num_inference_steps=2"]
    given = ["--per-kind", "1", "--config", *quick, "--config", *quick, "guidance_scale=1.5", "--sdedit", "0.1"]
    given += ["--output", str(tmp_path / "verdicts.jsonl")]
    given += ["--sheet", str(tmp_path / "sheet.png"), "--failures", str(tmp_path / "failures.png")]
    run = subprocess.run([*launch, benchmark.__file__, *given], capture_output=True, text=True, env=ON_CPUS)
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "verdicts.jsonl").read_text()
    lines = sorted((json.loads(line) for line in text.splitlines()), key=lambda line: line["index"])
    assert [line["kind"] for line in lines] == ["subject", "color", "ground", "sky", "extra", "style"]
    for line in lines:
        methods = line["methods"]
        assert len(methods) == 6  # two configurations, an oracle for each guidance scale, SDEdit, and no change
        assert line["setting"] == "captioner" and set(line["prompts"]) == {"before_prompt", "after_prompt", "prompt"}
        assert not methods["no change"]["success"] and methods["no change"]["kept"]
        assert methods["no change"]["direction"] == methods["no change"]["evaluations"] == 0
        # Learning: 4 noises in each of 2 steps, and 8 to judge the tokens by, before and after each; then 2 steps of inversion
        # and 2 of drawing, which guidance doubles.
        plain, guided = (methods[name]["evaluations"] for name in list(methods)[:2])
        assert plain == 2 * 4 + 3 * 8 + 4 and guided == plain + 2
        assert methods["oracle, num_inference_steps=2, guidance_scale=1.5"]["evaluations"] == 6
        assert line["far"] == all(
            line["query"][name] != line["before"][name]
            for name in ("subject", "ground", "sky")
            if name != line["kind"]
        )
    assert "| captioner | no change | 6 | 0.00 (0.00 to 0.39) | 1.00 (0.61 to 1.00) | 0.00 |" in run.stdout
    assert f"| setting | against {', '.join(quick)} | n |" in run.stdout
    assert load_image(str(tmp_path / "sheet.png")).size == (9 * 128, 6 * 128)
    wrong = sum(not line["methods"][next(iter(line["methods"]))]["success"] for line in lines)
    assert load_image(str(tmp_path / "failures.png")).size == (9 * 128, wrong * 128)

    # A run that was stopped goes on where it was, to the same tables.
    (tmp_path / "verdicts.jsonl").write_text(text[: text.rindex('"methods"')])
    benchmark.main(given)
    again = capsys.readouterr().out
    assert "5 were answered before" in again
    assert again.partition("\n")[2] == run.stdout.partition("\n")[2]
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 7  # with the broken one
    assert load_image(str(tmp_path / "sheet.png")).size == (9 * 128, 128)


QUICK = ["num_optimization_steps=2", "num_inference_steps=2"]


def some_answers(setting: str, options, successes: list[bool], later: list[bool] | None = None) -> list[Answer]:
    """To the first questions of a setting, right or wrong as said for the first method; for all others as `later`."""
    answers = []
    for question, first, second in zip(draw_questions(setting, [0], 1), successes, later or successes, strict=False):
        names = list(methods(question, options))
        read = None if setting == "wordless" else first
        scores = {name: Score(second, True, 22.0, read, 0.5, 8) for name in names}
        scores[names[0]] = Score(first, True, 20.0, read, 0.5, 40)
        said = dict.fromkeys(("before_prompt", "after_prompt", "prompt"), "a cabin") | question.prompts
        answers.append(Answer(question, said, scores, pictures={}))
    return answers


def test_benchmark_tables_have_rows_for_each_setting_and_kind():
    options = parse_options(["--setting", "two", "wordless"])
    answers = some_answers("two", options, [True, False]) + some_answers("wordless", options, [True, True])
    lines = summary_table(answers).splitlines()
    assert lines[0] == "| setting | method | n | success | kept | read | PSNR | direction | UNet |"
    assert lines[2] == "| two | default | 2 | 0.50 (0.09 to 0.91) | 1.00 (0.34 to 1.00) | 0.50 | 20.0 dB | 0.50 | 40 |"
    assert [line.split(" | ")[1] for line in lines[3:]] == ["oracle", "no change", "default", "ceiling", "no change"]
    assert lines[5].startswith("| wordless | default | 2 | 1.00") and "| – |" in lines[5]
    kinds = [tuple(line.split(" | ")[:2]) for line in kind_table(answers).splitlines()[2::3]]
    assert [kind for kind in kinds if kind[1] != "far"] == [
        ("| two", "subject"),
        ("| two", "color"),
        ("| wordless", "color"),
        ("| wordless", "style"),
    ]


def test_benchmark_compares_later_configurations_with_the_first_on_the_same_questions():
    options = parse_options(["--config", "--config", *QUICK])
    answers = some_answers("captioner", options, [True, False, False, False], [True, True, True, False])
    head, _, line = comparison_table(answers, ["default", ", ".join(QUICK)]).splitlines()
    assert head == "| setting | against default | n | success | PSNR |"
    assert line.startswith("| captioner | num_optimization_steps=2, num_inference_steps=2 | 4 | +0.50 (")
    assert line.endswith("| +2.0 ± 0.0 dB |")


def test_the_interval_of_a_paired_difference_is_newcombes():
    """The first of the examples that his paper gives for method 10."""
    table = {(True, True): 36, (True, False): 12, (False, True): 2, (False, False): 0}
    second, first = zip(*(pair for pair, count in table.items() for _ in range(count)), strict=True)
    assert newcombe(list(first), list(second)) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert newcombe([True, False], [True, False])[0] == 0


def test_benchmark_goes_on_with_what_a_file_has_of_the_same_questions(tmp_path):
    options, path = parse_options(["--setting", "loose", "--config", *QUICK]), tmp_path / "verdicts.jsonl"
    answers = some_answers("loose", options, [True, False, True, True])
    records = [json_record(a) for a in answers]
    records[1]["query"]["x"] = 0.5  # another analogy
    records[2]["prompts"]["prompt"] = "a castle"  # other prompts
    del records[3]["methods"]["no change"]
    records.append(records[0] | {"seed": 1})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"setting": "loose"')
    questions = draw_questions("loose", [0], 1)
    assert read_answers(path, questions, options) == answers[:1]
    assert read_answers(path, questions, parse_options(["--setting", "loose", "--paper"])) == []
    assert read_answers(path, draw_questions("unsaid", [0], 1), options) == []
    assert read_answers(tmp_path / "none.jsonl", questions, options) == read_answers(None, questions, options) == []


@pytest.fixture
def asked(monkeypatch) -> dict:
    """The arguments of the last call of a pipeline, which answers with the query."""
    arguments = {}

    def call(self, **given):
        arguments.clear()
        arguments.update(given)
        return SimpleNamespace(images=[given["image"]])

    monkeypatch.setattr(DifferenceInversionPipeline, "__call__", call)
    return arguments


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("silent", {"before_prompt": "", "after_prompt": ""}),
        ("reversed", {"difference_scale": -1}),
        ("random-rows", {"learning_kwargs": {"num_tokens": 2, "init": "random"}}),
    ],
)
def test_benchmark_gives_the_pipeline_what_the_setting_says(storybook, asked, setting, expected):
    question = draw_questions(setting, [0], 1)[0]
    options = parse_options(["--config", "num_tokens=2", "init=zeros"])
    own, task = methods(question, options), make_task(storybook, {}, question)
    own["num_tokens=2, init=zeros"](task)
    assert asked["image"] == render(question.analogy.query) and asked["before"] == render(question.analogy.before)
    expected = {"learning_kwargs": {"num_tokens": 2, "init": "zeros"}} | question.prompts | expected
    assert {name: asked[name] for name in expected} == expected
    assert ("prompt" in asked) == (setting != "silent")
    own["oracle"](task)
    assert asked["prompt"] == describe(question.analogy.target) and asked["source_prompt"] == task.said["prompt"]
    assert task.said["prompt"] == question.prompts.get("prompt", storybook.caption([task.query])[0])
    assert "learning_kwargs" not in asked and "difference_scale" not in asked


def test_benchmarks_ceiling_is_learned_from_the_answer_itself(storybook, asked):
    question = draw_questions("wordless", [0], 1)[0]
    options = parse_options(["--sdedit", "0.5", "--inpaint", "folder"])
    options.configs = [{"strength": 0.8, "num_tokens": 2}]
    own = methods(question, options)
    assert list(own) == ["strength=0.8, num_tokens=2", "ceiling", "no change"]
    own["ceiling"](make_task(storybook, {}, question))
    assert asked["image"] == asked["before"] == render(question.analogy.query)
    assert asked["after"] == render(question.analogy.target)
    assert asked["learning_kwargs"] == CEILING and asked["strength"] == 0.8


def test_benchmark_takes_a_configuration_that_learns_nothing():
    options = parse_options(["--config", "num_optimization_steps=0", "--setting", "loose", "loose", "wrong"])
    assert options.configs == [{"num_optimization_steps": 0}] and options.setting == ["loose", "wrong"]


def test_storybook_answers_in_bfloat16():
    pipe = load_pipeline(STORYBOOK, torch.device("cpu"), dtype=torch.bfloat16)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert all(part.dtype == torch.bfloat16 for part in parts)
    task = make_task(pipe, {}, draw_questions("captioner", [0], 1)[0])
    assert ours(task, {"num_optimization_steps": 1, "num_inference_steps": 2}).size == (128, 128)


@pytest.mark.parametrize(
    "given, missing",
    [
        (["--visii"], "--instruct"),
        (["--others-only", "--paper"], "--paper"),
        (["--visii", "--instruct", "folder", "--dtype", "bfloat16"], "--dtype"),
        (["--dia", "--dtype", "bfloat16"], "--dtype"),
        (["--setting", "loos"], "'loos'"),
    ],
)
def test_benchmark_refuses_options_that_do_not_go_together(given, missing, capsys):
    with pytest.raises(SystemExit):
        parse_options(given)
    assert missing in capsys.readouterr().err.splitlines()[-1]


def test_benchmark_refuses_an_argument_that_the_pipeline_does_not_have(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--config", "num_token=8"])
    assert "no argument 'num_token'" in capsys.readouterr().err


def test_many_differences_are_learned_once_and_bad_pairs_are_told_at_the_end(tmp_path, capsys):
    build_pipeline().save_pretrained(tmp_path / "model")
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    pair = {"before": "red.png", "after": "blue.png", "before_prompt": "a red cabin", "after_prompt": "a blue cabin"}
    jobs = [
        pair | {"name": "to blue"},
        pair | {"after": "none.png"},
        {"before": "red.png"},
        pair,
        pair | {"name": "../up"},
    ]
    lines = [*map(json.dumps, jobs), "no JSON", json.dumps(pair | {"name": "to blue"})]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    given = [
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--output",
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "model"),
    ]
    given += ["--config", "num_optimization_steps=1"]
    assert invert_many.main(given) == 1
    told = capsys.readouterr()
    complaints = ("none.png", "missing ['after']", "without a folder", "is no JSON", "taken by an earlier line")
    for number, complaint in zip((2, 3, 5, 6, 7), complaints, strict=True):
        assert any(f"line {number}:" in line and complaint in line for line in told.err.splitlines()), told.err
    assert "2 learned, 0 were there before, 5 failed" in told.out
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["00004.safetensors", "to blue.safetensors"]
    assert DifferenceTokens.load(files[1]).metadata["after_prompt"] == "a blue cabin"
    written = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert invert_many.main(given) == 1 and "1 learned, 1 were there before" in capsys.readouterr().out
    assert files[0].exists() and files[1].stat().st_mtime_ns == written[1]


@pytest.mark.parametrize("objective", ["contrast", "consistency"])
def test_differences_that_are_learned_together_are_those_of_one_at_a_time_in_fewer_calls(tmp_path, capsys, objective):
    model = build_pipeline()
    model.save_pretrained(tmp_path / "model")
    for color in ("red", "blue", "white", "black"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    (tmp_path / "bad.png").write_text("no picture")
    pair = {"before": "red.png", "before_prompt": "a red cabin", "after_prompt": "a castle"}
    lines = [pair | {"after": f"{name}.png", "name": name} for name in ("blue", "bad", "white", "black")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model"), "--config", "init=random"]
    given += [f"objective={objective}", "num_optimization_steps=4", "learning_rate=0.001", "--output"]
    latents = {}
    for way, at_once in (("alone", "1"), ("together", "3")):
        latents[way] = []
        with at_every_unet_call(latents[way].append):
            assert invert_many.main([*given, str(tmp_path / way), "--at-once", at_once]) == 1
        told = capsys.readouterr()
        assert (
            "line 2:" in told.err and "bad.png" in told.err and "3 learned, 0 were there before, 1 failed" in told.out
        )
    assert sum(latents["together"]) == sum(latents["alone"])
    assert len(latents["together"]) < 0.5 * len(latents["alone"])
    for name in ("blue", "white", "black"):
        one, other = (DifferenceTokens.load(tmp_path / way / f"{name}.safetensors") for way in latents)
        torch.testing.assert_close(rows_of(other), rows_of(one), atol=1e-5, rtol=1e-4)
        losses = [float(difference.metadata.pop("loss")) for difference in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert one.metadata | {"created": other.metadata["created"]} == other.metadata


@contextmanager
def at_every_unet_call(do):
    """Calls `do` with the batch size of each call of any UNet while it is open."""

    def note(module, inputs, output):
        if isinstance(module, UNet2DConditionModel):
            do(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("at_once, call", [("1", 20), ("2", 5)])  # while the second is learned, and the first two
def test_ctrl_c_while_many_differences_are_learned_leaves_whole_ones_alone(tmp_path, at_once, call):
    build_pipeline().save_pretrained(tmp_path / "model")
    for color in ("red", "blue", "white"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    pair = {"before": "red.png", "before_prompt": "a red cabin", "after_prompt": "a castle"}
    lines = [pair | {"after": f"{name}.png", "name": name} for name in ("blue", "white", "blue again", "white again")]
    lines = [line | {"after": f"{line['name'].split()[0]}.png"} for line in lines]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model")]
    given += ["--output", str(tmp_path / "out"), "--at-once", at_once]
    given += ["--config", "init=random", "complete_prompts=False", "num_optimization_steps=10"]
    calls, threads = [], threading.active_count()

    def press(batch_size):
        calls.append(batch_size)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)

    with at_every_unet_call(press), pytest.raises(KeyboardInterrupt):
        invert_many.main(given)
    whole = {path.name for path in (tmp_path / "out").iterdir()}
    assert whole == ({"blue.safetensors"} if at_once == "1" else set())
    assert threading.active_count() == threads
    assert invert_many.main(given) == 0
    files = [DifferenceTokens.load(path) for path in (tmp_path / "out").iterdir()]
    assert len(files) == 4 and all(rows_of(difference).isfinite().all() for difference in files)


@pytest.mark.slow
def test_many_differences_by_two_processes_are_those_of_one(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "model")
    for color in ("red", "blue", "white"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    pairs = [
        {"before": "red.png", "after": f"{color}.png", "before_prompt": "a", "after_prompt": "b"}
        for color in ("blue", "white")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    given = ["--pairs", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model")]
    given += ["--config", "num_optimization_steps=1", "--output"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        invert_many.__file__,
    ]
    run = subprocess.run([*launch, *given, str(tmp_path / "two")], capture_output=True, text=True, env=ON_CPUS)
    assert run.returncode == 0, run.stderr
    assert "2 learned, 0 were there before, 0 failed" in run.stdout
    assert invert_many.main([*given, str(tmp_path / "one")]) == 0
    for name in ("00001", "00002"):
        one, two = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("one", "two"))
        # To the bit on some processors only: others round by how many threads there are.
        torch.testing.assert_close(one, two)


def test_the_speed_benchmark_counts_every_latent_of_an_analogy_once(tmp_path, capsys):
    build_pipeline(clip=None, clip_processor=None).save_pretrained(tmp_path)
    benchmark_speed.main(["--model", str(tmp_path), "--repeats", "1", "--inference-steps", "10"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    timed = {row[0]: row for row in rows if len(row) == 5}
    assert all(float(timed[name][4]) > 0 for name in ("a learning step", "drawing"))
    latents = {row[0]: int(row[2]) for row in rows if len(row) == 3 and row[2].isdigit()}
    # No words are found, so sixty steps of four samples, judged on eight at first and after each quarter; nine steps each way.
    assert latents["learning"] == 60 * 4 and latents["judging"] == 5 * 8
    assert latents["inversion"] == latents["drawing"] == 9 and latents["captions"] == latents["the rest"] == 0
    assert latents.pop("**all**") == sum(latents.values())


@pytest.mark.once
@pytest.mark.parametrize(
    "kind, value", [("ground", "snow"), ("sky", "night"), ("color", "yellow"), ("subject", "boat")]
)
def test_tokens_that_no_prompt_explains_begin_at_the_word_for_what_changed(storybook, kind, value):
    scene = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = {"before": render(scene), "after": render(dataclasses.replace(scene, **{kind: value}))}
    settings = {"num_optimization_steps": 0, "generator": torch.Generator().manual_seed(0)}
    difference = storybook.invert_difference(**pair, before_prompt="", after_prompt="", **settings)
    (row,) = difference.embeddings["<difference>"]
    table = storybook.text_encoder.get_input_embeddings().weight
    assert storybook.tokenizer.decode(torch.cdist(row[None], table).argmin()).strip() == value


@pytest.mark.once
def test_the_unet_finds_words_for_a_picture_that_clip_does_not_miss(storybook):
    """Of the 24 attributes of four pictures, 16 were named without its revisions, and 19 with them."""
    rng = random.Random("words")
    scenes = [random_scene(rng) for _ in range(4)]
    named = []
    for revisions in (0, 4):
        options = {"num_steps": 40, "num_revisions": revisions, "generator": torch.Generator().manual_seed(0)}
        said = [set(prompt.split()) for prompt in storybook.hard_prompts(list(map(render, scenes)), **options)]
        pairs = list(zip(said, scenes, strict=True))
        named.append(sum(bool(words & set(getattr(s, name).split())) for words, s in pairs for name in ATTRIBUTES))
    assert named[1] > named[0], named


@pytest.mark.once
@pytest.mark.parametrize("kind, value, lost", [("sky", "night", "day"), ("subject", "tent", "castle")])
def test_prompts_of_pez_take_what_was_gained_and_what_was_lost_from_the_pictures(storybook, kind, value, lost):
    before = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
    pair = {"before": render(before), "after": render(dataclasses.replace(before, **{kind: value}))}
    said = storybook.hard_prompts([*pair.values()], num_steps=20, generator=torch.Generator().manual_seed(0))
    pair |= dict(zip(("before_prompt", "after_prompt"), said, strict=True))
    options = {"num_optimization_steps": 1, "generator": torch.Generator().manual_seed(0)}
    difference = storybook.invert_difference(**pair, **options)
    assert difference.metadata["lost_phrases"] == lost
    # The night's castle may pass for a cabin, which a prompt of PEZ's says.
    assert difference.metadata["gained_phrases"].splitlines()[0] == value


def test_words_are_kept_although_their_way_back_is_worse_than_that_of_no_tokens(storybook):
    """A word of A' that is negated draws A worse than zeros do, and zeros change nothing."""
    before = Scene("cabin", "yellow", "snow", "night", "rainbow", "painting", 0.38, 0.47, 0.65)
    after = dataclasses.replace(before, ground="desert")
    pair = {"before": render(before), "after": render(after)}
    pair |= {"before_prompt": describe(before), "after_prompt": describe(after)}
    generator = torch.Generator().manual_seed(0)
    difference = storybook.invert_difference(
        **pair,
        objective="consistency",
        lambda_before=1.0,
        num_optimization_steps=1,
        learning_rate=1e-9,
        generator=generator,
    )
    words = difference.nearest_words(storybook.tokenizer, storybook.text_encoder, count=1)
    assert words[-1][0] == ("desert", pytest.approx(1, abs=1e-3))


DAY = Scene("castle", "red", "grass", "day", "nothing", "painting", 0.44, 0.46, 0.6)
NIGHT = dataclasses.replace(DAY, sky="night")
CABIN = Scene("cabin", "blue", "snow", "day", "rainbow", "painting", 0.56, 0.4, 0.55)
NIGHTFALL = Analogy("sky", DAY, NIGHT, CABIN, dataclasses.replace(CABIN, sky="night"))


def from_day_to_night(pipe, before_prompt: str, after_prompt: str):
    pair = {
        "before": render(DAY),
        "after": render(NIGHT),
        "before_prompt": before_prompt,
        "after_prompt": after_prompt,
    }
    return pipe.invert_difference(
        **pair, num_optimization_steps=0, lambda_clip=0, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "before_prompt, after_prompt",
    [
        ("a red castle by day", "grass, painting"),
        (describe(dataclasses.replace(DAY, color="blue")), describe(NIGHT)),
        (describe(DAY), describe(dataclasses.replace(NIGHT, ground="snow"))),
        (with_fillers(describe(DAY), ("a photo of", "")), with_fillers(describe(NIGHT), ("arafed", "up close"))),
    ],
    ids=["loose", "before is wrong", "after is wrong", "fillers"],
)
def test_the_words_of_a_difference_are_what_changed_whatever_else_the_prompts_say(
    storybook, before_prompt, after_prompt
):
    metadata = from_day_to_night(storybook, before_prompt, after_prompt).metadata
    assert (metadata["lost_phrases"], metadata["gained_phrases"]) == ("day", "night")


def test_all_parts_of_storybook_load_in_one_type():
    xl = {
        name: part.from_pretrained(STORYBOOK.with_name("model_xl") / name) for name, (_, part) in XL_COMPONENTS.items()
    }
    for own in ({}, xl):
        parts = DifferenceInversionPipeline.from_pretrained(STORYBOOK, **own).components.values()
        assert {part.dtype for part in parts if isinstance(part, torch.nn.Module)} == {torch.float32}


def test_a_part_that_training_writes_loads_in_single_precision(tmp_path):
    save_component(build_clip(build_tokenizer()), tmp_path / "clip")
    assert load_file(tmp_path / "clip" / "model.safetensors")["logit_scale"].dtype == torch.float16
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.float32


def test_tokens_begin_as_a_textual_inversion_that_tells_what_was_gained():
    pipe = DifferenceInversionPipeline.from_pretrained(STORYBOOK, dtype=torch.float32, clip=None)
    pipe.set_progress_bar_config(disable=True)
    (night,) = pipe.tokenizer("night", add_special_tokens=False).input_ids
    row = pipe.text_encoder.get_input_embeddings().weight[[night]].detach().clone()
    pipe.load_textual_inversion({"<dark>": row})
    difference = from_day_to_night(pipe, "a red castle by day", "a red castle at <dark>")
    assert difference.metadata["gained_phrases"] == "<dark>"
    torch.testing.assert_close(difference.embeddings["<difference>"], row)


@pytest.fixture(scope="module")
def nightfall(storybook):
    return from_day_to_night(storybook, describe(DAY), describe(NIGHT))


def answer_to(pipe, analogy: Analogy, **options) -> Image.Image:
    options = {"num_inference_steps": 25, "generator": torch.Generator().manual_seed(0)} | options
    return pipe(image=render(analogy.query), **options).images[0]


def test_a_difference_is_taken_back_on_the_picture_that_has_it(storybook, nightfall):
    backwards = dataclasses.replace(NIGHTFALL, query=NIGHTFALL.target, target=NIGHTFALL.query)
    options = {"prompt": describe(backwards.query), "difference": nightfall, "difference_scale": -1}
    assert judge(answer_to(storybook, backwards, **options), backwards).success


def test_half_of_a_difference_lies_between_none_and_all_of_it(storybook, nightfall):
    """From the right answer they were 7.6, 12.4 and 22.7 dB away, and from the query 27.4, 13.9 and 8.1."""
    options = {"prompt": describe(CABIN), "difference": nightfall}
    answers = [answer_to(storybook, NIGHTFALL, **options, difference_scale=scale) for scale in (0, 0.5, 1)]
    unchanged = dataclasses.replace(NIGHTFALL, target=CABIN)
    to_target, to_query = ([judge(answer, a).psnr for answer in answers] for a in (NIGHTFALL, unchanged))
    assert to_target[0] + 2 < to_target[1] < to_target[2] - 2
    assert to_query[0] - 2 > to_query[1] > to_query[2] + 2
    assert judge(answers[2], NIGHTFALL).success and judge(answers[0], unchanged).success


def test_what_a_short_prompt_leaves_unsaid_of_the_query_is_said_and_stays(storybook, nightfall):
    """22.9 dB from the right answer with the words that are added to the prompt, and 13.7 dB without."""
    options = {"prompt": "a cabin", "difference": nightfall}
    completed, as_it_is = (
        judge(answer_to(storybook, NIGHTFALL, **options, complete_prompts=complete), NIGHTFALL)
        for complete in (True, False)
    )
    assert completed.success
    assert completed.psnr > as_it_is.psnr + 3


@pytest.mark.once
def test_a_change_is_learned_from_random_rows_under_loose_captions(storybook):
    """Nothing but learning says here what changed: 22.2 dB from the right answer, and 7.6 dB with nothing learned."""
    pair = {"before": render(DAY), "after": render(NIGHT), "prompt": "a blue cabin on snow"}
    pair |= {"before_prompt": "a red castle", "after_prompt": "grass, painting"}
    ways = [{"init": "random"} | more for more in ({}, {"num_optimization_steps": 0})]
    learned, begun = (judge(answer_to(storybook, NIGHTFALL, **pair, learning_kwargs=w), NIGHTFALL) for w in ways)
    assert learned.success and not begun.success
    assert learned.psnr > begun.psnr + 3


@pytest.mark.once
@pytest.mark.parametrize(
    "model, kinds, least", [("storybook", tuple(ATTRIBUTES), 4), ("storybook_xl", ("color", "sky", "style"), 2)]
)
def test_learned_differences_change_other_pictures(model, kinds, least, request):
    """Answers are nearer to the right picture than to the query; all were when it was written."""
    pipe, rng, nearer = request.getfixturevalue(model), random.Random("transfer"), []
    for kind in kinds:
        analogy = random_analogy(rng, kind)
        pair = {name: render(getattr(analogy, name)) for name in ("before", "after")}
        unchanged = dataclasses.replace(analogy, target=analogy.query)
        answer = answer_to(pipe, analogy, **pair)
        nearer.append(judge(answer, analogy).psnr > judge(answer, unchanged).psnr)
    assert sum(nearer) >= least, nearer


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


@pytest.mark.slow
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
        options = {"num_inference_steps": 10, "guidance_scale": 2.0, "num_images_per_prompt": 4}
        options |= {"height": 128, "width": 128, "generator": torch.Generator().manual_seed(0)}
        said[end] = sum("desert" in text for text in pipe.caption(stock(prompt, **options).images))
    assert said[""] == 0 and said[", <difference>"] >= 3, said
    theirs = stock.encode_prompt(
        "a blue windmill, <difference>", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    ours = pipe.encode_prompt("a blue windmill,", difference=difference)[0]
    torch.testing.assert_close(ours, theirs)
