# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Preferences of a vision language model, which is small and random here, and of the captioner in its place."""

import json
import random
from pathlib import Path

import compare
import pytest
from analogies import random_analogy
from compare import QUESTION, STAND_IN, choice_of
from conftest import build_chat_captioner, build_pipeline, forward_calls, picture, save_triplets
from PIL import Image, ImageColor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from world import render


COLORS = ("red", "yellow", "blue", "white")
SPECIAL = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}


def save_model(folder: Path, *words: str) -> str:
    """A model that replies with one of these words, by the picture that it is shown; returns its name."""
    known = dict.fromkeys([*SPECIAL.values(), *words, *(w for w, _ in Whitespace().pre_tokenize_str(QUESTION))])
    spelled = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    spelled.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled, **SPECIAL)
    model, processor = build_chat_captioner(tokenizer)
    end, ids = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(list(words))
    settings = model.generation_config
    settings.eos_token_id = end
    settings.sequence_bias = [[[word], 1e3] for word in ids] + [[[word, end], 1e4] for word in ids]
    settings.do_sample = True  # as Llama-Vision and Qwen-VL have it; a judge does not guess
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def given(tmp_path) -> list[str]:
    """Options that name four triplets, and the answers of three methods."""
    save_triplets(tmp_path, COLORS)
    for number, name in enumerate(("mine", "theirs", "none")):
        (tmp_path / name).mkdir()
        for index in range(len(COLORS)):
            picture(COLORS[index - number], "gray", (40, 32)).save(tmp_path / name / f"{index:05d}.png")
    options = ["--triplets", str(tmp_path / "triplets.jsonl"), "--output", str(tmp_path / "replies.jsonl")]
    return [*options, "--answers", f"ours={tmp_path}/mine", "--against", str(tmp_path / "theirs")]


def replies(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]


def rows(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert lines[0] == "| judge | methods | triplets | won | lost | ties | refusals | preference | option 1 |"
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_both_orders_are_asked_and_counted(given, tmp_path, capsys):
    choices = {"1": 1, "first": 1, "2": 2, "second": 2}
    name = save_model(tmp_path / "model", *choices)
    asked = ["--question", "Option 1 or Option 2"]  # pictures count for less among more words
    compare.main([*given, str(tmp_path / "none"), "--model", name, *asked])
    said = replies(tmp_path)
    assert {reply["choice"] for reply in said} == {1, 2}
    assert all(reply["choice"] == choices[reply["said"]] and reply["judge"] == name for reply in said)
    asked = [(reply["index"], *reply["options"]) for reply in said]
    pairs = [("ours", "theirs"), ("theirs", "ours"), ("ours", "none"), ("none", "ours")]
    assert sorted(asked) == sorted((index, *pair) for index in range(4) for pair in pairs)
    for line, other in zip(rows(capsys.readouterr().out), ("theirs", "none"), strict=True):
        own = [reply for reply in said if other in reply["options"]]
        chosen = [[reply["options"][reply["choice"] - 1] for reply in own if reply["index"] == i] for i in range(4)]
        won, lost = chosen.count(["ours"] * 2), chosen.count([other] * 2)
        assert line[:7] == [name, f"ours against {other}", "4", str(won), str(lost), str(4 - won - lost), "0"]
        assert line[7].startswith(f"{won / (won + lost):.2f} (" if won + lost else "–")
        assert line[8] == f"{sum(reply['choice'] == 1 for reply in own) / 8:.2f}"


def test_a_model_that_minds_the_place_ties_and_one_that_says_something_else_refuses(given, tmp_path, capsys):
    compare.main([*given, "--model", save_model(tmp_path / "first", "1")])
    (tied,) = rows(capsys.readouterr().out)
    compare.main([*given, "--model", save_model(tmp_path / "dreamer", "cabin", "castle")])
    (refused,) = rows(capsys.readouterr().out)
    assert tied[3:] == ["0", "0", "4", "0", "–", "1.00"]
    assert refused[3:] == ["0", "0", "0", "4", "–", "–"]
    assert len(replies(tmp_path)) == 16  # one file holds both


def test_the_model_is_asked_the_question_about_one_square_picture_of_all(tmp_path):
    paths = {color: tmp_path / f"{color}.png" for color in ("red", "lime", "blue", "aqua", "gold")}
    for color, path in paths.items():
        Image.new("RGB", (48, 32), color).save(path)
    question = compare.Question(0, ("ours", "theirs"), tuple(paths.values()))
    sheet = compare.draw_sheet(question)
    assert sheet.width == sheet.height  # so that no processor cuts a part of it off
    third = sheet.width // 3
    rows = [
        [sheet.getpixel((x + third // 2, y)) for x in (0, third, 2 * third)] for y in (sheet.height // 3, 2 * third)
    ]
    assert rows == [
        [ImageColor.getrgb(c) for c in row] for row in (("red", "lime", "blue"), ("aqua", "gold", "white"))
    ]

    pipe = compare.pipeline_of(*compare.load_model(save_model(tmp_path / "model", "1", "2")))
    with forward_calls(pipe.captioner) as calls:
        reply = compare.ask_model(pipe, question, "Which Option 1 or Option 2")
    assert reply.choice == int(reply.said)
    assert "Which Option 1 or Option 2" in pipe.captioner_processor.batch_decode(calls[0][2]["input_ids"])[0]


def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(given, tmp_path, capsys):
    begun = []

    def stop(module, inputs):
        if isinstance(module, LlavaForConditionalGeneration):
            begun.append(module)
            if len(begun) > 6:  # in the fourth question; each has a word and its end
                raise KeyboardInterrupt

    name = save_model(tmp_path / "model", "1")
    hook = register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.main([*given, "--model", name])
    finally:
        hook.remove()
    kept = replies(tmp_path)
    assert len(kept) == 3

    save_model(tmp_path / "model", "2")  # so that new replies are seen
    compare.main([*given, "--model", name])
    assert replies(tmp_path)[:3] == kept and [reply["said"] for reply in replies(tmp_path)] == ["1"] * 3 + ["2"] * 5
    assert "5 questions asked, 3 were answered before" in capsys.readouterr().out

    picture("white").save(tmp_path / "theirs" / "00003.png")
    compare.main([*given, "--model", name])
    assert "2 questions asked, 6 were answered before" in capsys.readouterr().out
    compare.main([*given, "--model", name, "--question", "Option 1 or Option 2?"])
    assert "8 questions asked, 0 were answered before" in capsys.readouterr().out
    assert not list(tmp_path.glob(".replies*"))


def test_the_captioner_prefers_what_changes_in_the_same_words_and_says_what_it_is(tmp_path, capsys):
    rng = random.Random("stand-in")
    for name in ("right", "same", "unchanged"):
        (tmp_path / name).mkdir()
    with open(tmp_path / "triplets.jsonl", "w") as lines:
        for index, kind in enumerate(("ground", "style")):
            analogy = random_analogy(rng, kind)
            scenes = {"before": analogy.before, "after": analogy.after, "image": analogy.query}
            for name, scene in scenes.items():
                render(scene).save(tmp_path / f"{index}_{name}.png")
            lines.write(json.dumps({name: f"{index}_{name}.png" for name in scenes}) + "\n")
            for name, scene in (("right", analogy.target), ("same", analogy.target), ("unchanged", analogy.query)):
                render(scene).save(tmp_path / name / f"{index:05d}.png")
    folders = [str(tmp_path / name) for name in ("right", "unchanged", "same")]
    given = ["--triplets", str(tmp_path / "triplets.jsonl"), "--output", str(tmp_path / "replies.jsonl")]
    compare.main([*given, "--answers", folders[0], "--against", *folders[1:], "--judge", "captioner"])
    printed = capsys.readouterr().out
    better, alike = rows(printed)
    assert better[:7] == ["captioner (a stand-in)", "right against unchanged", "2", "2", "0", "0", "0"]
    assert alike[1:] == ["right against same", "2", "0", "0", "0", "2", "–", "–"]
    assert printed.rstrip().endswith(STAND_IN)


@pytest.mark.parametrize(
    "said, choice",
    [
        ("Option 1", 1),
        ("**Option 2**.", 2),
        ("1", 1),
        ("(2)", 2),
        ("Option one", 1),
        ("The first", 1),
        ("the second option", 2),
        ("Option 1.\n\nOption 2 loses the boat.", 1),
        ("Option 1, because Option 2 changes the sky.", 1),
        ("I would choose Option 2 over Option 1.", 2),
        ("Option 2 is better than Option 1.", 2),
        ("I think that it is Option 2", 2),
        ("In Option 1 the boat is blue. In Option 2 it is red.\n\nFinal answer: Option 2", 2),
        ("<think>Option 1? No, Option 2.</think>\nOption 1", 1),
        ("", None),
        ("A castle.", None),
        ("The first row shows a cabin.", None),
        ("Option 1 keeps the cabin. Option 2 keeps the sky.", None),
        ("1. Option 1 keeps the cabin.\n2. Option 2 does not.", None),
        ("Option 1 is worse than Option 2.", None),
        ("Neither Option 1 nor Option 2.", None),
        ("I would not choose Option 1.", None),
        ("I can’t choose between Option 1 and Option 2.", None),
        ("Option 1. Option 2.", None),
        ("Option 12", None),
        ("<think>Option 1 has", None),
    ],
)
def test_a_choice_is_a_reply_that_plainly_names_one_option(said, choice):
    assert choice_of(said) == choice


def two_of_a_name(folder: Path, given: list[str]) -> list[str]:
    return [*given, f"ours={folder}/none"]


def a_missing_answer(folder: Path, given: list[str]) -> list[str]:
    (folder / "theirs" / "00002.png").unlink()
    return given


def no_picture(folder: Path, given: list[str]) -> list[str]:
    (folder / "mine" / "00001.png").write_text("no picture")
    return given


def a_picture_cut_short(folder: Path, given: list[str]) -> list[str]:
    path = folder / "mine" / "00001.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    return given


def another_file(folder: Path, given: list[str]) -> list[str]:
    (folder / "replies.jsonl").write_text('{"index": 0}\n')
    return given


def a_model_that_does_not_converse(folder: Path, given: list[str]) -> list[str]:
    pipe = build_pipeline()
    pipe.clip.save_pretrained(folder / "clip")
    pipe.clip_processor.save_pretrained(folder / "clip")
    return [*given, "--model", str(folder / "clip")]


@pytest.mark.parametrize(
    "make, complaint",
    [
        (two_of_a_name, "--answers or --against: ours, theirs, ours are not names that differ"),
        (a_missing_answer, "theirs, has no answer 00002.png, and 1 are missing"),
        (no_picture, "00001.png is no picture"),
        (a_picture_cut_short, "00001.png is a damaged picture"),
        (another_file, "--output .*replies.jsonl is there, but is no file of replies"),
        (a_model_that_does_not_converse, "--model: .*clip cannot be loaded; .*does not converse"),
        (lambda folder, given: given, "--model: nowhere/there cannot be loaded"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(given, tmp_path, make, complaint):
    with pytest.raises(SystemExit, match=complaint) as raised:
        compare.main(["--model", "nowhere/there", *make(tmp_path, given)])
    assert "\n" not in str(raised.value)


def test_options_that_do_not_go_together_are_said(given, tmp_path, capsys):
    for wrong, complaint in (
        (given, "give either --model NAME, the model that judges, or --judge captioner"),
        ([*given, "--model", "x", "--judge", "captioner"], "give either --model NAME"),
        ([*given, str(tmp_path / "nowhere"), "--model", "x"], "argument --against: there is no folder"),
    ):
        with pytest.raises(SystemExit):
            compare.main(wrong)
        assert complaint in capsys.readouterr().err
