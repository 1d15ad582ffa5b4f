# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
import math
from collections.abc import Callable

import pytest
import torch
from conftest import seeded

from pipeline_difference_inversion import (
    WordSearch,
    change_weights,
    clip_loss,
    contrast_loss,
    interpolated_delta,
    slerp,
    token_consistency_loss,
    weighted_errors,
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


def test_change_weights_are_large_where_the_pictures_differ_and_one_on_average():
    before = torch.randn(1, 4, 4, 4, generator=seeded())
    after = before.clone()
    after[..., 1:3, :2] += 1.0  # one place in four
    after[..., 1, 0] += 1.0  # and there twice as much
    weights = change_weights(before, after)
    assert weights.shape == (1, 1, 4, 4)
    assert float(weights.mean()) == pytest.approx(1)
    assert not weights[0, 0, 0].any() and not weights[..., 2:].any()
    assert float(weights[0, 0, 1, 0]) == pytest.approx(2 * float(weights[0, 0, 2, 1]))


def test_change_weights_of_a_batch_are_those_of_each_pair():
    before, after = torch.randn(2, 3, 4, 4, 4, generator=seeded())
    before[2] = after[2]  # nothing changed here
    together = change_weights(before, after)
    torch.testing.assert_close(together, torch.cat([change_weights(before[[i]], after[[i]]) for i in range(3)]))
    assert torch.equal(together[2], torch.ones(1, 4, 4))


def test_weighted_errors_look_only_where_the_weights_are():
    prediction, target = torch.randn(2, 2, 3, 4, 5, 5, generator=seeded())  # 2 images, 3 samples
    plain = weighted_errors(prediction, target, torch.ones(1, 1, 5, 5))
    torch.testing.assert_close(plain, (prediction - target).square().mean((-3, -2, -1)))
    corner = torch.zeros(1, 1, 5, 5)
    corner[..., 0, 0] = 25
    at_corner = (prediction - target)[..., 0, 0].square().mean(-1)
    torch.testing.assert_close(weighted_errors(prediction, target, corner), at_corner)


def test_contrast_loss_pays_for_what_helps_the_image_after_alone():
    gain, nothing = torch.tensor([0.3, 0.1]), torch.zeros(2)
    assert float(contrast_loss(gain, nothing, 1.0)) == pytest.approx(-0.2)
    assert float(contrast_loss(gain, gain, 1.0)) == pytest.approx(0)  # what both show
    assert float(contrast_loss(gain, gain, 0.0)) == pytest.approx(-0.2)
    assert float(contrast_loss(nothing, gain, 2.0)) == pytest.approx(0.4)


def test_contrast_loss_does_not_pay_for_harm_to_the_image_before():
    gain = torch.tensor([0.3, 0.1])
    assert float(contrast_loss(gain, -gain, 1.0)) == pytest.approx(-0.2)
    assert float(contrast_loss(gain, torch.tensor([-5.0, 0.1]), 1.0)) == pytest.approx(-0.15)  # sample by sample


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


# ------------------------------------------------------------------------------------------------- word search


def toy_world(gains: Callable[[str, set[str], int], float]) -> Callable[[list[str], int], torch.Tensor]:
    """The `errors` of a UNet that each word helps by `gains(word, other words, picture)`: 0.2 takes a fifth off the error."""

    def errors(phrases: list[str], picture: int) -> torch.Tensor:
        found = []
        for phrase in phrases:
            words = phrase.split()
            found.append(math.prod(1 - gains(word, set(words) - {word}, picture) for word in words))
        samples = torch.tensor([0.6, 1.0, 1.4])  # some noises are harder than others
        return torch.tensor(found)[:, None] * samples

    return errors


# What each word takes off the error on A and on A': red grass by day became yellow snow.
PLAIN = {
    "grass": (0.3, -0.3),
    "red": (0.2, -0.2),
    "snow": (-0.3, 0.3),
    "yellow": (-0.2, 0.2),
    "cabin": (0.2, 0.2),
    "day": (0.1, 0.1),
    "very": (0.0, 0.0),
    "boat": (-0.3, -0.3),  # false of both
    "faint": (-0.05, 0.05),  # too little to tell
    "harmful": (-0.3, -0.04),  # hurts A' as well
    "glaring": (-3.6, -0.066),  # so does this, however much worse it is for A
}


def plain(word: str, others: set[str], picture: int) -> float:
    return PLAIN[word][picture]


def search(gains, candidates, may_be_shared=(), most: int = 4) -> WordSearch:
    found = WordSearch(toy_world(gains))
    found.run(list(candidates), list(may_be_shared), most)
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_words_are_sorted_into_lost_gained_and_shared_and_others_are_refused(order):
    words = search(plain, list(PLAIN)[::order], may_be_shared=PLAIN)
    lost, gained = words.found
    assert set(lost) == {"grass", "red"} and set(gained) == {"snow", "yellow"}
    assert set(words.shared) == {"cabin", "day"}


def test_a_search_turned_round_finds_the_same_words_the_other_way_round():
    words = search(lambda word, others, picture: plain(word, others, 1 - picture), PLAIN)
    assert [set(side) for side in words.found] == [{"snow", "yellow"}, {"grass", "red"}]


@pytest.mark.parametrize("candidates", [[], ["very", "boat", "faint", "harmful", "glaring"]])
def test_where_no_word_is_true_none_is_found(candidates):
    words = search(plain, candidates, may_be_shared=candidates)
    assert words.found == ([], []) and words.shared == []


def misleading(word: str, others: set[str], picture: int) -> float:
    """Frost fits snow, and A too, once it is known to be of grass: it is in both pictures."""
    if word == "frost":
        return 0.35 if picture == 1 else (0.3 if "grass" in others else -0.2)
    return PLAIN[word][picture]


def test_a_word_that_looks_gained_until_the_lost_word_is_known_is_taken_back():
    assert search(misleading, ["frost"]).found == ([], ["frost"])
    lost, gained = search(misleading, ["frost", "grass", "snow"]).found
    assert lost == ["grass"] and gained == ["snow"]


def test_words_that_no_prompt_has_are_put_in_the_order_that_is_drawn_better():
    def errors(phrases: list[str], picture: int) -> torch.Tensor:
        return torch.tensor([[0.5 if phrase.endswith("yellow snow") else 0.7] for phrase in phrases])

    for found in (["yellow", "snow"], ["snow", "yellow"]):
        words = WordSearch(errors)
        words.found = ([], found)
        words.order(("a cabin", "a cabin on snow"))
        assert words.found == ([], ["yellow", "snow"])
