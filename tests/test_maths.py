# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from conftest import seeded

from pipeline_difference_inversion import (
    changed_phrases,
    clip_loss,
    common_phrases,
    interpolated_delta,
    slerp,
    token_consistency_loss,
    without_phrases,
)


@pytest.fixture
def directions() -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors, neither of unit length, at an angle of 70 degrees."""
    angle = math.radians(70)
    first = torch.tensor([3.0, 0.0, 0.0])
    second = 0.2 * torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    return first, second


def angle_between(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return math.degrees(torch.atan2(torch.linalg.cross(a, b).norm(), a @ b))


def test_slerp_ends_at_the_directions_it_is_given(directions):
    first, second = directions
    torch.testing.assert_close(slerp(first, second, 0.0), first / first.norm())
    torch.testing.assert_close(slerp(first, second, 1.0), second / second.norm())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_slerp_turns_by_its_fraction_of_the_angle_and_stays_at_unit_length(directions, fraction):
    first, second = directions
    between = slerp(first, second, fraction)
    assert float(between.norm()) == pytest.approx(1, abs=1e-6)
    assert angle_between(first, between) == pytest.approx(70 * fraction, abs=1e-3)
    assert angle_between(between, second) == pytest.approx(70 * (1 - fraction), abs=1e-3)


def test_slerp_takes_each_row_of_a_batch_by_itself():
    first, second = torch.randn(2, 5, 8, generator=seeded())
    rows = [slerp(a, b, 0.3) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(slerp(first, second, 0.3), torch.stack(rows))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("length", [1.0, 1e-3, 1e3])
def test_slerp_between_parallel_directions_is_that_direction(fraction, length):
    direction = torch.randn(8, generator=seeded())
    torch.testing.assert_close(slerp(direction, length * direction, fraction), direction / direction.norm())


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_slerp_between_opposite_directions_is_finite(fraction):
    direction = torch.randn(8, generator=seeded())
    between = slerp(direction, -2 * direction, fraction)
    assert torch.isfinite(between).all()
    assert float(between.norm()) <= 1 + 1e-6


def test_delta_goes_from_the_images_to_the_captions(directions):
    image_delta, text_delta = directions
    torch.testing.assert_close(interpolated_delta(image_delta, text_delta, 0.0), image_delta / image_delta.norm())
    torch.testing.assert_close(interpolated_delta(image_delta, text_delta, 1.0), text_delta / text_delta.norm())
    assert angle_between(image_delta, interpolated_delta(image_delta, text_delta, 0.8)) == pytest.approx(56, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_delta_of_equal_captions_is_the_images_and_the_other_way_round(directions, alpha):
    delta, _ = directions
    nothing = torch.zeros(3)
    torch.testing.assert_close(interpolated_delta(delta, nothing, alpha), delta / delta.norm())
    torch.testing.assert_close(interpolated_delta(nothing, delta, alpha), delta / delta.norm())


def test_delta_of_nothing_is_nothing():
    assert not interpolated_delta(torch.zeros(3), torch.zeros(3), 0.8).any()


def test_clip_loss_is_zero_along_the_delta_one_across_it_and_two_against_it():
    delta = torch.tensor([0.6, 0.8])
    assert float(clip_loss(5 * delta, delta)) == pytest.approx(0, abs=1e-6)
    assert float(clip_loss(torch.tensor([-0.8, 0.6]), delta)) == pytest.approx(1, abs=1e-6)
    assert float(clip_loss(-0.1 * delta, delta)) == pytest.approx(2, abs=1e-6)


def test_clip_loss_leads_towards_the_delta():
    delta = torch.tensor([0.6, 0.8])
    embedding = torch.tensor([1.0, 0.0], requires_grad=True)
    clip_loss(embedding, delta).backward()
    assert clip_loss(embedding - 0.1 * embedding.grad, delta) < clip_loss(embedding, delta)


@pytest.mark.parametrize("lambda_before", [0.0, 0.5, 1.0])
def test_token_consistency_loss_is_the_weighted_sum_of_the_two_mean_squared_errors(lambda_before):
    prediction, target = torch.randn(2, 2, 3, 4, 5, 5, generator=seeded())
    prediction[1] *= 5  # the two directions are not alike
    after, before = ((prediction[side] - target[side]).pow(2).sum() / (3 * 4 * 5 * 5) for side in (0, 1))
    loss = token_consistency_loss(prediction, target, lambda_before)
    torch.testing.assert_close(loss, after + lambda_before * before)
    torch.testing.assert_close(token_consistency_loss(prediction[:1], target[:1], lambda_before), after)


def test_token_consistency_loss_does_not_overflow_in_half_precision():
    prediction = torch.full((2, 1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert float(token_consistency_loss(prediction, torch.zeros_like(prediction), 1.0)) == 2 * 300**2


@pytest.mark.parametrize(
    "before, after, lost, gained",
    [
        ("a red tent on grass", "a red castle on grass", ["tent"], ["castle"]),
        ("a tent by day, pixel art", "A tent at night, painting", ["by day", "pixel art"], ["at night", "painting"]),
        ("a tent with a moon, painting", "a tent, painting", ["with a moon"], []),
        ("a tent", "a tent", [], []),
        ("a tent on grass", "the tent, on grass.", [], []),  # which says nothing of the picture
        ("a tent with a moon", "a tent and a star", ["moon"], ["star"]),
        ("", "a tent", [], ["a tent"]),
    ],
)
def test_changed_phrases_are_what_only_one_of_two_prompts_says(before, after, lost, gained):
    assert changed_phrases(before, after) == (lost, gained)
    assert changed_phrases(after, before) == (gained, lost)


def test_common_phrases_keep_the_words_that_every_pair_has():
    assert common_phrases([["castle on snow", "boat"], ["tent on", "snow"]]) == ["on snow"]
    assert common_phrases([["castle on snow", "boat"]]) == ["castle on snow", "boat"]
    assert common_phrases([["castle on snow"], ["castle in snow"]]) == ["castle", "snow"]


@pytest.mark.parametrize(
    "prompt, phrases, left",
    [
        ("a red tent on grass", ["tent"], "a red on grass"),
        ("a TENT, in a storm", ["tent", "in a storm"], "a ,"),
        ("a tent with tents", ["tent"], "a with tents"),
        ("a carpet on\n a hill", ["car pet", "on a hill"], "a carpet"),
        ("a cabin", ["", " "], "a cabin"),
        ("a cabin on a hill", ["red cabin"], "a cabin on a hill"),
        ("a cabin (old) by day", ["cabin ( old )"], "a by day"),
        ("a tent, with a moon", [", with a moon"], "a tent"),
        ("a moon, with a tent", ["moon ,"], "a with a tent"),
        ("a cabin", [], "a cabin"),
    ],
)
def test_without_phrases_leaves_out_whole_phrases_only(prompt, phrases, left):
    assert without_phrases(prompt, phrases) == left
