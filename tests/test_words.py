# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Which words are taken for the change: by what the UNet says of them, and not by what prompts say."""

import dataclasses
import functools
import logging

import pytest
import torch
from conftest import ROOT, STORYBOOK, analogy, forward_calls, logged, rows_of, seeded
from world import Scene, render

from diffusers.utils import load_image
from pipeline_difference_inversion import (
    DifferenceInversionPipeline,
    DifferenceTokens,
    WordSearch,
    shared_prompt,
    split_words,
    unshared_words,
)


@pytest.mark.parametrize(
    "before, after, shared",
    [
        ("a red tent on grass", "a red castle on grass", "a red on grass"),
        ("a tent, by day, pixel art", "Pixel Art of a tent at night", "a tent pixel art"),
        ("a tent with a moon, painting", "a tent, painting", "a tent, painting"),
        ("a tent with a moon", "a boat with a star", ""),  # function words alone say nothing
        ("<my-cat> on snow", "on snow, <my-cat>", "<my-cat> on snow"),
        ("a tent with a moon, painting", "a tent without a moon, painting", "a tent, painting"),
        ("a tent in snow, no red moon", "a tent with a red moon in snow", "a tent in snow"),
        ("not a tent but a boat", "a tent and a boat", "a boat"),
        ("", "a tent", ""),
    ],
)
def test_the_shared_prompt_is_what_both_prompts_say_in_any_order(before, after, shared):
    assert shared_prompt(before, after) == shared


def test_unshared_words_say_something_and_stand_in_one_prompt_only():
    assert unshared_words("a photo of a Red boat, red!", "a boat at night") == ["photo", "red"]
    assert unshared_words("a boat", "the boat") == []
    assert unshared_words("a boat with a moon", "a boat without a moon") == ["moon"]
    assert unshared_words("a boat without a moon", "a boat with a moon") == []


@pytest.mark.parametrize(
    "before, after, lost, gained",
    [
        ("a lamp that is off", "a lamp that is on", "off", "on"),
        ("a dog on a table", "a dog under a table", "on", "under"),
        ("a cat in the box", "a cat on a box", "in", "on"),
    ],
)
def test_a_preposition_counts_where_it_is_all_that_a_prompt_has_of_its_own(before, after, lost, gained):
    assert (unshared_words(before, after), unshared_words(after, before)) == ([lost], [gained])


# ---------------------------------------------------------------------------------------- the search, on a toy world

LOUDNESS = {"castle": 0.5, "cabin": 0.5, "storm": 0.04, "day": 0.04, "red": 0.2, "tall": 0.3}
SHOWN = ({"cabin", "day", "red", "tall"}, {"castle", "storm", "red", "tall"})  # what A shows, and A'


def toy_errors(phrases: list[str], picture: int) -> torch.Tensor:
    """A world in which a true word lowers a picture's error by its loudness and a false one raises it by twice that."""

    def error(phrase: str) -> float:
        words = dict.fromkeys(split_words(phrase))
        return 1.0 - sum(LOUDNESS.get(word, 0) * (1 if word in SHOWN[picture] else -2) for word in words)

    return torch.tensor([[error(phrase)] * 2 for phrase in phrases])


def search(*candidates: str, errors=toy_errors, said=(), most: int = 4) -> WordSearch:
    found = WordSearch(errors)
    found.run(candidates, may_be_shared=said, most=most)
    return found


def test_a_quiet_change_is_found_beside_a_loud_one():
    assert search("castle", "storm", "cabin", "day").found == (["cabin", "day"], ["castle", "storm"])


def test_no_more_words_are_found_than_asked_for():
    assert search("castle", "storm", "cabin", "day", most=1).found == (["cabin"], ["castle"])


def lucky_errors(phrases: list[str], picture: int) -> torch.Tensor:
    """As `toy_errors`, on noises under which "moon" seems to hold for A'."""
    luck = torch.tensor([[("moon" in phrase) * (0.5 if picture == 0 else -0.1)] for phrase in phrases])
    return toy_errors(phrases, picture) + luck


def errors_with_harm(word: str, harm: float):
    """As `toy_errors`, on other noises, under which a word is as bad as this for its own picture, A'."""
    own = 1 - toy_errors([word], 1)[0, 0]

    def errors(phrases: list[str], picture: int) -> torch.Tensor:
        worse = torch.tensor([[float(picture == 1 and word in phrase)] for phrase in phrases])
        return toy_errors(phrases, picture) + worse * (own + harm)

    return errors


def test_a_word_that_was_lucky_is_taken_back_and_the_others_stay():
    found = search("castle", "moon", "cabin", errors=lucky_errors)
    assert found.found == (["cabin"], ["castle", "moon"])
    found.verify(toy_errors)
    assert found.found == (["cabin"], ["castle"])


@pytest.mark.parametrize("harm, stays", [(0.05, False), (0.01, True)])
def test_a_word_that_harms_the_other_picture_very_much_may_harm_its_own_a_little(harm, stays):
    """A castle harms A by all of the error without words."""
    found = search("castle", "cabin")
    found.verify(errors_with_harm("castle", harm))
    assert found.found == (["cabin"], ["castle"] if stays else [])


def test_a_word_that_helps_both_pictures_is_taken_back():
    found = search("castle", "cabin")
    found.found[1].append("red")
    found.verify(toy_errors)
    assert found.found == (["cabin"], ["castle"])


def hiding_errors(phrases: list[str], picture: int) -> torch.Tensor:
    """As `toy_errors`, with words of A' that hardly tell the two apart, or do so only where nothing else is said."""

    def more(phrase: str) -> float:
        words, error = split_words(phrase), 0.0
        if "fog" in words and picture == 1:
            error -= 0.12
        if "dusk" in words and len(words) == 1 and picture == 0:
            error += 0.8
        if "noon" in words:  # loud alone, and false beside others
            error += 0.05 if len(words) > 1 else 0.8 * (picture == 0)
        return error

    return toy_errors(phrases, picture) + torch.tensor([[more(phrase)] for phrase in phrases])


@pytest.mark.parametrize(
    "likely, gained",
    [("fog", ["castle", "fog"]), ("dusk", ["castle", "dusk"]), ("noon", ["castle"]), ("red", ["castle"])],
)
def test_a_word_that_is_likely_is_found_though_louder_ones_hide_it(likely, gained):
    found = WordSearch(hiding_errors)
    found.run(["castle", "cabin"], may_be_shared=(), most=4)
    found.look_again([["moon"], [likely]], most=4)
    assert found.found == (["cabin"], gained)
    found.verify(hiding_errors)
    assert found.found == (["cabin"], gained)


def test_a_likely_word_is_not_taken_for_the_other_side_nor_where_there_is_no_room():
    found = WordSearch(hiding_errors)
    found.run(["castle", "cabin"], may_be_shared=(), most=4)
    found.look_again([["fog"], []], most=4)
    found.look_again([[], ["fog"]], most=1)
    assert found.found == (["cabin"], ["castle"])


def test_words_stand_in_the_order_of_their_prompt():
    found = WordSearch(toy_errors)
    found.found[1].extend(["art", "pixel"])
    found.order(("a boat", "a boat, pixel art"))
    assert found.found[1] == ["pixel", "art"]


# ------------------------------------------------------------------------------------------------- on Storybook


@pytest.fixture(scope="module")
def storybook() -> DifferenceInversionPipeline:
    pipe = DifferenceInversionPipeline.from_pretrained(STORYBOOK / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def grass_to_desert() -> dict:
    return {name: load_image(str(ROOT / "examples" / "images" / f"{name}.png")) for name in ("before", "after")}


CAPTIONS = {
    "whole": ("a red cabin on grass by day, painting", "a red cabin on desert by day, painting"),
    "loose": ("painting of a cabin by day", "something red on desert"),
    "wrong of before": ("a red cabin on grass by day, pixel art", "a red cabin on desert by day, painting"),
    "wrong of after": ("a red cabin on grass by day, painting", "a blue cabin on desert by day, painting"),
    "with fillers": ("a photo of a red cabin on grass", "there is a red cabin on desert for sale"),
    "silent": ("", ""),
}


def find(pipe, pair: dict, captions: str, **options):
    before_prompt, after_prompt = CAPTIONS[captions]
    prompts = {"before_prompt": before_prompt, "after_prompt": after_prompt}
    return pipe.invert_difference(**pair, **prompts, num_optimization_steps=0, generator=seeded(0), **options)


@pytest.fixture(scope="module")
def found(storybook, grass_to_desert):
    """As `find`, and each question is asked once."""
    return functools.cache(functools.partial(find, storybook, grass_to_desert))


IN_EVERY_RUN = ("loose", "wrong of before", "with fillers")


@pytest.mark.parametrize(
    "captions",
    [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in CAPTIONS],
)
def test_the_change_is_found_and_nothing_else_whatever_the_captions_say(found, captions):
    difference = found(captions)
    assert difference.metadata["gained_phrases"] == "desert"
    assert difference.metadata["lost_phrases"] == "grass"


LAYOUT = {"x": 0.4, "size": 0.45, "horizon": 0.6}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shown, change, lost, gained",
    [
        (("cabin", "red", "water", "day", "nothing", "pixel art"), {"extra": "moon"}, "", "moon"),
        (("windmill", "purple", "snow", "night", "moon", "pixel art"), {"subject": "cabin"}, "windmill", "cabin"),
        (("castle", "red", "grass", "night", "moon", "pencil sketch"), {"subject": "boat"}, "castle", "boat"),
    ],
)
def test_without_captions_the_change_is_found_beside_what_clip_sees_in_both_pictures(
    storybook, shown, change, lost, gained
):
    """Judged alone, with nothing beside them, other words passed for a part of the last two."""
    before = Scene(*shown, **LAYOUT)
    pair = {"before": render(before), "after": render(dataclasses.replace(before, **change))}
    metadata = find(storybook, pair, "silent").metadata
    assert (metadata["lost_phrases"], metadata["gained_phrases"]) == (lost, gained)


def test_what_a_caption_denies_is_not_taken_for_what_both_pictures_show(storybook):
    before = Scene("cabin", "red", "grass", "day", "balloon", "painting", **LAYOUT)
    pair = {"before": render(before), "after": render(dataclasses.replace(before, extra="nothing"))}
    prompts = {"before_prompt": "a red cabin with a balloon", "after_prompt": "a red cabin without a balloon"}
    metadata = storybook.invert_difference(**pair, **prompts, num_optimization_steps=0, generator=seeded()).metadata
    assert (metadata["lost_phrases"], metadata["gained_phrases"]) == ("balloon", "")


def test_what_the_pair_lost_is_no_news_of_the_query(storybook, grass_to_desert):
    """It is said at the end of the query's prompt anyway, and is not sought a second time."""
    table = storybook.text_encoder.get_input_embeddings().weight.detach()
    ids = storybook.tokenizer("desert", add_special_tokens=False).input_ids
    added = []
    for metadata in ({}, {"lost_phrases": "grass"}):
        difference = DifferenceTokens({"<difference>": table[ids]}, metadata)
        with logged(level=logging.INFO) as lines:
            storybook(image=grass_to_desert["before"], prompt="a cabin", difference=difference, num_inference_steps=1)
        (line,) = (line for line in lines if "completed" in line)
        added.append(set(line.split("to 'a cabin ")[1].rstrip(".'").split()))
    assert added == [{"painting", "red", "grass"}, {"painting", "red"}]


def test_clip_reads_its_vocabulary_once_a_call_and_not_where_it_has_no_words(pipe, pair, monkeypatch):
    asked = pair | {"image": pair["before"], "prompt": "a cabin", "after_prompt": "a yellow cabin"}
    asked |= {"num_inference_steps": 2, "num_optimization_steps": 1}
    batches = []
    for vocabulary in (pipe.tokenizer.get_vocab(), {}):
        monkeypatch.setattr(pipe.tokenizer, "get_vocab", lambda own=vocabulary: own)
        with forward_calls(pipe.clip.text_model) as calls:
            analogy(pipe, **asked)
        sizes = [keywords["input_ids"].shape for _, _, keywords, *_ in calls]
        batches.append([batch for batch, length in sizes if length == 3 and batch > 1])  # words alone, many at once
    assert len(batches[0]) == 1 and not batches[1]


def test_tokens_begin_as_the_words_that_were_gained(storybook, found):
    ids = storybook.tokenizer("desert", add_special_tokens=False).input_ids
    table = storybook.text_encoder.get_input_embeddings().weight.detach()
    torch.testing.assert_close(rows_of(found("silent")), table[ids])


def test_hard_tokens_are_those_words(storybook, grass_to_desert):
    difference = find(storybook, grass_to_desert, "silent", projection="hard")
    assert difference.to_text(storybook.tokenizer) == "desert"


def test_several_pairs_are_judged_together(storybook, grass_to_desert):
    pairs = {name: [image, image] for name, image in grass_to_desert.items()}
    assert find(storybook, pairs, "loose").metadata["gained_phrases"] == "desert"


def test_words_are_learned_from_more_carefully_than_random_rows(found):
    """The default for random rows would take words out of their places, and that for words would leave random rows."""
    rates = [float(found("silent", **start).metadata["learning_rate"]) for start in ({}, {"init": "random"})]
    assert rates[0] < rates[1]


@pytest.mark.parametrize(
    "options, completed",
    [
        ({"init": "random"}, ["painting of a cabin by day"]),
        ({"init": "random", "objective": "contrast"}, list(CAPTIONS["loose"])),
        ({"init": "random", "complete_prompts": False}, []),
        ({}, []),
    ],
)
def test_prompts_of_the_pair_are_completed_for_tokens_that_do_not_begin_as_words(
    storybook, grass_to_desert, options, completed
):
    """The loose prompt of A says nothing of red and grass, and that of A' says neither cabin nor painting."""
    with logged(level=logging.INFO) as lines:
        metadata = find(storybook, grass_to_desert, "loose", **options).metadata
    lines = [line for line in lines if "completed" in line]
    assert len(lines) == len(completed)
    for line, prompt, missing in zip(lines, completed, ("red grass", "cabin painting"), strict=False):
        assert repr(prompt) in line and set(missing.split()) <= set(split_words(line))
    assert (metadata["before_prompt"], metadata["after_prompt"]) == CAPTIONS["loose"]


@pytest.mark.parametrize(
    "prompt, added",
    [
        ("a cabin", {"painting", "red", "grass"}),
        ("something red", {"cabin", "painting", "grass"}),
        ("a photo of a cabin", {"painting", "red", "grass"}),
        ("a red cabin on grass by day, painting", set()),
    ],
)
def test_a_query_s_prompt_is_completed_by_what_is_true_of_it_and_the_log_says_so(
    storybook, grass_to_desert, prompt, added
):
    """The query is a red cabin on grass by day, a painting. That it is day is no news to the model, and was not added."""
    zero = DifferenceTokens({"<difference>": torch.zeros(1, storybook.text_encoder.config.hidden_size)})
    with logged(level=logging.INFO) as lines:
        storybook(image=grass_to_desert["before"], prompt=prompt, difference=zero, num_inference_steps=1)
    lines = [line for line in lines if "completed" in line]
    assert len(lines) == bool(added)
    for line in lines:
        assert repr(prompt) in line
        assert set(line.split(f"to '{prompt} ")[1].rstrip(".'").split()) == added
