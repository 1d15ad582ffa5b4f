# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learning that is ended, by whatever means, goes on where it was."""

import logging
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from conftest import build_captioner, build_pipeline, forward_calls, logged, picture, random_tokens, rows_of, seeded


STEPS = 12
KILLS = int(os.environ.get("KILLS", "6"))


def learn(pipe, pair, path=None, steps: int = STEPS, **options):
    settings = {"init": "random", "complete_prompts": False, "checkpoint": path, "checkpointing_steps": 5} | options
    return pipe.invert_difference(**pair, num_optimization_steps=steps, generator=seeded(), **settings)


class Crash(Exception):
    pass


def crash_at(step: int):
    def callback(pipe, now, values):
        if now == step:
            raise Crash

    return callback


@pytest.mark.parametrize(
    "options", [{}, {"objective": "contrast"}, {"projection": "hard"}, {"complete_prompts": True}]
)
def test_learning_goes_on_to_the_same_tokens_bit_for_bit(pair, tmp_path, options):
    expected = learn(build_pipeline(), pair, **options)
    for step in (0, 5, 11):
        path, seen = tmp_path / f"deep {step}" / "learning.ckpt", []
        with pytest.raises(Crash):
            learn(build_pipeline(), pair, path, **options, callback_on_optimization_step=crash_at(step))
        note = {"callback_on_optimization_step": lambda pipe, now, _, seen=seen: seen.append(now)}
        again = learn(build_pipeline(), pair, path, **options, **note)
        assert torch.equal(rows_of(again), rows_of(expected))
        assert again.metadata["loss"] == expected.metadata["loss"]
        assert seen == list(range(step // 5 * 5, STEPS))
        assert os.listdir(path.parent) == [path.name]


def test_a_call_goes_on_to_the_same_picture(pair, tmp_path):
    learning = {"init": "random", "complete_prompts": False, "num_optimization_steps": STEPS}
    query = {"image": picture("blue"), "prompt": "a blue cabin", "num_inference_steps": 3, "output_type": "latent"}

    def call(**more):
        return build_pipeline()(**pair, **query, learning_kwargs=learning | more, generator=seeded())

    expected, kept = call(), {"checkpoint": tmp_path / "c", "checkpointing_steps": 5}
    with pytest.raises(Crash):
        call(**kept, callback_on_optimization_step=crash_at(7))
    again = call(**kept)
    assert torch.equal(rows_of(again.difference), rows_of(expected.difference))
    assert torch.equal(again.images, expected.images)


def test_a_calls_checkpoint_is_looked_at_before_the_captioner_runs(pair, tmp_path):
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    (tmp_path / "text").write_text("a text")
    with forward_calls(captioner.vision_model, pipe.unet) as calls:
        for kept, message in (
            ({"checkpoint": tmp_path / "text"}, "`checkpoint`.*is no checkpoint"),
            ({"checkpointing_steps": 0}, "`checkpointing_steps` is 0"),
        ):
            with pytest.raises(ValueError, match=message):
                pipe(image=picture("blue"), **pair, learning_kwargs=kept)
    assert not calls


def test_several_pairs_go_on_together(pipe, pair, tmp_path):
    pairs = pair | {"before": [pair["before"], picture("blue")], "after": [pair["after"], picture("white")]}
    expected = rows_of(learn(pipe, pairs))
    with pytest.raises(Crash):
        learn(pipe, pairs, tmp_path / "c", callback_on_optimization_step=crash_at(7))
    assert torch.equal(rows_of(learn(pipe, pairs, tmp_path / "c")), expected)


def test_what_has_been_learned_is_not_learned_again(pipe, pair, tmp_path):
    first = learn(pipe, pair, tmp_path / "c")
    with forward_calls(pipe.unet) as calls, logged(level=logging.INFO) as lines:
        again = learn(pipe, pair, tmp_path / "c")
    assert torch.equal(rows_of(first), rows_of(again)) and not calls
    assert any("goes on from" in line and f"step {STEPS}" in line for line in lines)


def test_a_finished_checkpoint_is_only_read(pipe, pair, tmp_path):
    first = learn(pipe, pair, tmp_path / "c")
    written = (tmp_path / "c").stat().st_mtime_ns
    assert torch.equal(rows_of(learn(pipe, pair, tmp_path / "c")), rows_of(first))
    assert (tmp_path / "c").stat().st_mtime_ns == written


def test_a_checkpoint_of_another_version_is_refused_before_any_model_runs(pipe, pair, tmp_path):
    learn(pipe, pair, tmp_path / "c")
    state = torch.load(tmp_path / "c", weights_only=True)
    state["stand"] = state.pop("learner")
    torch.save(state, tmp_path / "c")
    with forward_calls(pipe.unet, pipe.text_encoder, pipe.clip.vision_model) as calls:
        with pytest.raises(ValueError, match="another version"):
            learn(pipe, pair, tmp_path / "c")
    assert not calls


@pytest.mark.parametrize(
    "other",
    [
        {"before": picture("white")},
        {"after_prompt": "another castle"},
        {"alpha": 0.5},
        {"steps": STEPS + 1},
        {"height": 16},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_checkpoint_of_another_call_is_refused_before_any_model_runs(pipe, pair, tmp_path, other):
    learn(pipe, pair, tmp_path / "c")
    other = dict(other)
    options = {name: other.pop(name) for name in ("alpha", "steps", "height") if name in other}
    with forward_calls(pipe.unet, pipe.vae.encoder, pipe.text_encoder) as calls:
        with pytest.raises(ValueError, match="`checkpoint`.*is of another call"):
            learn(pipe, pair | other, tmp_path / "c", **options)
    assert not calls


def test_what_is_no_checkpoint_is_refused(pipe, pair, tmp_path):
    (tmp_path / "text").write_text("a text")
    random_tokens().save(tmp_path / "difference.safetensors")
    learn(pipe, pair, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    for name in ("text", "difference.safetensors", "cut"):
        with pytest.raises(ValueError, match="`checkpoint`.*is (no checkpoint|of another call)"):
            learn(pipe, pair, tmp_path / name)
    with pytest.raises(ValueError, match="`checkpointing_steps` is 0"):
        learn(pipe, pair, tmp_path / "new", checkpointing_steps=0)


def learn_and_die(path, pair, steps: int):
    learn(build_pipeline(), pair, path, steps, checkpointing_steps=1)


def wait_for_a_write(process, path) -> None:
    def written():
        return path.stat().st_mtime_ns if path.is_file() else None

    at_first = written()
    while process.is_alive() and written() == at_first:
        time.sleep(0.002)


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(pair, tmp_path):
    """Each process goes on where the last one was killed, and the tokens are those of one that was left alone."""
    path, processes, delays, steps = tmp_path / "c", multiprocessing.get_context("fork"), random.Random(0), 40 * KILLS
    expected, reached = rows_of(learn(build_pipeline(), pair, steps=steps)), 0
    for life in range(KILLS):
        process = processes.Process(target=learn_and_die, args=(path, pair, steps))
        process.start()
        if life % 2:  # however slow the machine is, some get as far as to write
            wait_for_a_write(process, path)
        process.join(delays.uniform(0, 0.3))  # seconds
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if path.is_file():
            step = torch.load(path, weights_only=True)["learner"]["step"]
            assert step >= reached
            reached = step
    assert 0 < reached
    finished = learn(build_pipeline(), pair, path, steps, checkpointing_steps=1)
    assert torch.equal(rows_of(finished), expected)


def break_at(step: int):
    def callback(pipe, now, values):
        if now == step:
            with torch.no_grad():
                pipe.unet.conv_out.bias.fill_(float("nan"))

    return callback


def test_a_loss_that_is_not_finite_ends_learning_and_keeps_the_tokens_before_it(pipe, pair):
    seen = []

    def callback(pipe, step, values):
        seen.append(values["tokens"])
        break_at(6)(pipe, step, values)

    with logged() as lines:
        rows = rows_of(learn(pipe, pair, steps=20, learning_rate=0.02, callback_on_optimization_step=callback))
    assert len(seen) == 7  # and the eighth step was not taken
    assert any("step 8 of 20" in line and "torch.float32" in line and "learning_rate" in line for line in lines)
    assert any(torch.equal(rows, tokens) for tokens in seen)  # judged after five steps, a fourth of twenty


def test_gradients_that_overflow_are_said(pipe, pair):
    begun = rows_of(learn(pipe, pair, steps=0))

    def overflow(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    pipe.unet.register_forward_hook(lambda module, inputs, output: overflow(module, inputs, output.sample))
    with logged() as lines:
        rows = rows_of(learn(pipe, pair, steps=4, lambda_clip=0.0))
    assert torch.equal(rows, begun)
    assert any("overflowed" in line and "4 of 4 steps" in line for line in lines)
