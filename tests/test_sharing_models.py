# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What several callers of the same models, or hooks and compilers upon them, must not change."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import WIDTH, analogy, build_pipeline, embedded, picture, random_tokens, rows_of, seeded

from pipeline_difference_inversion import DifferenceInversionPipeline, inserted_rows


@pytest.fixture(autouse=True)
def eager_threads():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def draw(pipe, seed: int, scale: float = 1.5) -> torch.Tensor:
    options = {"image": picture("blue"), "prompt": "a blue cabin", "complete_prompts": False}
    options |= {"guidance_scale": scale, "num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    return pipe(difference=random_tokens(num_tokens=2 + seed, seed=seed), **options).images


def learn(pipe, pair) -> torch.Tensor:
    options = {"init": "random", "num_optimization_steps": 3, "complete_prompts": False, "generator": seeded()}
    return rows_of(pipe.invert_difference(**pair, **options))


def in_threads(*calls) -> list[torch.Tensor]:
    """Each call's result of three, which must be the same."""
    with ThreadPoolExecutor(len(calls)) as threads:
        turns = [[threads.submit(call) for call in calls] for _ in range(3)]
    results = [[turn[i].result() for turn in turns] for i in range(len(calls))]
    for first, *others in results:
        assert all(torch.equal(first, other) for other in others)
    return [first for first, *_ in results]


def test_threads_with_one_pipeline_get_what_each_asked_for(pipe):
    asked = [(seed, 1.0 + seed) for seed in range(3)]
    expected = [draw(pipe, *one) for one in asked]
    got = in_threads(*(lambda one=one: draw(pipe, *one) for one in asked))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_pipeline_learns_while_another_over_the_same_models_draws(pipe, pair):
    other = DifferenceInversionPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)

    def encode() -> torch.Tensor:
        return torch.cat([embedded(other, ["a cabin"]) for _ in range(20)])

    expected = [learn(pipe, pair), draw(pipe, 1), encode()]
    got = in_threads(lambda: learn(pipe, pair), lambda: draw(other, 1), encode)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_callback_may_use_the_pipeline(pipe):
    seen = []

    def look(pipe, step, t, tensors):
        seen.append(embedded(pipe, ["a castle"]))
        return {}

    options = {"prompt": "a cabin", "difference": random_tokens(), "num_inference_steps": 2, "output_type": "latent"}
    pipe(**options, callback_on_step_end=look)
    assert torch.equal(seen[0], embedded(pipe, ["a castle"]))


def test_another_threads_call_of_the_text_encoder_has_no_rows(pipe):
    embedding, ids = pipe.text_encoder.get_input_embeddings(), torch.tensor([[1, 2, 3]])
    with inserted_rows(embedding, torch.tensor([[False, True, False]]), torch.ones(1, 1, WIDTH)):
        inserted, theirs = embedding(ids), []
        stock = threading.Thread(target=lambda: theirs.append(embedding(ids)))
        stock.start()
        stock.join()
    assert torch.equal(theirs[0], embedding.weight[ids])
    assert torch.equal(inserted[0, 1], torch.ones(WIDTH))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_text_encoder_that_was_compiled_before_takes_the_rows(pipe, in_place):
    rows = torch.randn(2, WIDTH, generator=seeded())
    expected = embedded(pipe, ["a cabin"], rows)
    if in_place:
        pipe.text_encoder.compile(backend="eager")
    else:
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    pipe.text_encoder(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(embedded(pipe, ["a cabin"], rows), expected)


def test_a_text_encoder_that_ignores_the_rows_is_refused(pipe):
    table = pipe.text_encoder.get_input_embeddings()
    with pytest.raises(RuntimeError, match="took no difference tokens.*compiled"):
        with inserted_rows(table, torch.tensor([[False, True]]), torch.ones(1, 1, WIDTH)):
            table.forward(torch.tensor([[1, 2]]))  # as a graph does that knows of no hook


@pytest.mark.once
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_a_compiled_unet_learns_and_draws_the_same_and_is_not_compiled_again(pipe, pair, part):
    """The backend "eager" makes the graphs that the others make, and runs them as they are."""

    def ask(pipe, color: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked = pair | {"after": picture(color), "image": picture("blue"), "prompt": f"a {color} boat by night"}
        options = {"init": "random", "num_optimization_steps": 2, "num_inference_steps": 3, "output_type": "latent"}
        output = analogy(pipe, **asked, **options, generator=seeded())
        return output.images, rows_of(output.difference)

    expected = [ask(pipe, color) for color in ("yellow", "green")]
    pipe.unet.requires_grad_(False)
    if part == "whole":
        pipe.unet = torch.compile(pipe.unet, backend="eager", dynamic=True)
    else:
        pipe.unet.compile_repeated_blocks(backend="eager", dynamic=True)
    try:
        first = ask(pipe, "yellow")
        with torch.compiler.set_stance("fail_on_recompile"):
            second = ask(pipe, "green")
    finally:
        torch.compiler.reset()
    torch.testing.assert_close([*first, *second], [*expected[0], *expected[1]], atol=1e-4, rtol=1e-4)


def test_weights_kept_in_eight_bits_learn_as_the_same_weights_in_full(pair):
    pipes = [build_pipeline() for _ in range(2)]
    pipes[0].unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {p.dtype for p in pipes[0].unet.parameters()}
    rounded = {name: p.float() for name, p in copy.deepcopy(pipes[0].unet.state_dict()).items()}
    pipes[1].unet.load_state_dict(rounded)
    cast, full = (learn(pipe, pair) for pipe in pipes)
    torch.testing.assert_close(cast, full)
    assert torch.float8_e4m3fn in {p.dtype for p in pipes[0].unet.parameters()}
    assert torch.equal(draw(pipes[0], 1), draw(pipes[1], 1))


def test_models_that_refuse_to_be_moved_or_cast_learn_and_draw_the_same(pair):
    """As those do whose weights have eight bits or four."""
    options = {"image": picture("blue"), "prompt": "a cabin", "num_inference_steps": 2, "output_type": "latent"}
    plain, stubborn = build_pipeline(), build_pipeline()

    def refuse(*arguments, **options):
        raise ValueError("`.to` is not supported for 4-bit or 8-bit models.")

    for part in (stubborn.unet, stubborn.text_encoder, stubborn.vae, stubborn.clip):
        part.to = refuse
    expected, found = (
        analogy(pipe, **pair, **options, num_optimization_steps=2, generator=seeded()) for pipe in (plain, stubborn)
    )
    assert torch.equal(rows_of(found.difference), rows_of(expected.difference))
    assert torch.equal(found.images, expected.images)


def test_under_autocast_tokens_stay_in_float32_and_answers_nearly_the_same(pair):
    """Pictures were 0.05 apart at most when this was written, from random rows that hardly move in two steps."""
    options = {"image": picture("blue"), "prompt": "a cabin", "num_inference_steps": 2, "output_type": "pt"}
    options |= pair | {"num_optimization_steps": 2, "init": "random"}
    expected = analogy(build_pipeline(), **options, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = analogy(build_pipeline(), **options, generator=seeded())
    assert rows_of(found.difference).dtype == torch.float32
    torch.testing.assert_close(rows_of(found.difference), rows_of(expected.difference), atol=0.1, rtol=0)
    torch.testing.assert_close(found.images.float(), expected.images, atol=0.15, rtol=0)
