# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The world that the embedded model was trained on, its questions and their judge; none of this needs the model."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
from analogies import BLENDS, candidates, judge, neighbours, random_analogy, random_wordless_analogy
from conftest import build_tokenizer
from PIL import Image
from questions import ENDINGS, OPENINGS, SETTINGS, draw_questions, with_fillers
from world import ATTRIBUTES, caption, describe, loose_caption, random_scene, render


LAYOUT = ("x", "size", "horizon")


def pixels(scene) -> np.ndarray:
    return np.asarray(render(scene), dtype=np.float32) / 255


def differing(one, other, names) -> list[str]:
    return [name for name in names if getattr(one, name) != getattr(other, name)]


# ---------------------------------------------------------------------------------------------------- the world


@pytest.mark.once
def test_every_attribute_shows_in_every_picture():
    """The closest pairs, a blue and a purple windmill drawn in pencil, are 0.001 apart, and to the eye quite distinct."""
    rng, closest = random.Random(0), {}
    for _ in range(200):
        scene = random_scene(rng)
        for name, values in ATTRIBUTES.items():
            pictures = {value: pixels(dataclasses.replace(scene, **{name: value})) for value in values}
            for one, other in itertools.combinations(values, 2):
                error = float(np.mean((pictures[one] - pictures[other]) ** 2))
                closest[name, one, other] = min(closest.get((name, one, other), 1.0), error)
    assert len(closest) == 15 + 4 * 6 + 3
    too_close = {pair: error for pair, error in closest.items() if error < 0.0007}
    assert not too_close


def test_the_layout_shows_too():
    scene = random_scene(random.Random(0))
    for change in ({"x": scene.x + 0.05}, {"size": scene.size + 0.04}, {"horizon": scene.horizon + 0.05}):
        assert np.mean((pixels(scene) - pixels(dataclasses.replace(scene, **change))) ** 2) > 0.001


def test_the_same_seed_draws_the_same_picture():
    one, other = (random_scene(random.Random(7)) for _ in range(2))
    assert one == other
    assert render(one).tobytes() == render(other).tobytes()
    assert render(one).size == (128, 128) and render(one).mode == "RGB"
    assert random_scene(random.Random(8)) != one


def test_random_scenes_have_every_value_of_every_attribute():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(300)]
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    for name in LAYOUT:
        assert len({getattr(scene, name) for scene in scenes}) == 300


def test_a_blend_of_colours_is_drawn_in_their_mean():
    scene = dataclasses.replace(random_scene(random.Random(0)), subject="castle", sky="day", style="painting")
    colors = {}
    for color in ("red", "blue", "red+blue", "blue+red"):
        picture = render(dataclasses.replace(scene, color=color, x=0.44, size=0.46, horizon=0.6))
        colors[color] = picture.getpixel((round(0.44 * 128), round((0.75 - 0.35 * 0.46) * 128)))  # the castle's wall
    mean = np.mean([colors["red"], colors["blue"]], axis=0)
    assert np.abs(np.array(colors["red"]) - colors["blue"]).max() > 100
    assert np.abs(colors["red+blue"] - mean).max() <= 1
    assert colors["red+blue"] == colors["blue+red"]


def test_a_blend_of_styles_is_the_mean_of_their_pictures():
    scene = random_scene(random.Random(0))
    one, other, blend = (
        pixels(dataclasses.replace(scene, style=style))
        for style in ("painting", "pencil sketch", "painting+pencil sketch")
    )
    assert np.abs(blend - (one + other) / 2).max() <= 1 / 255 + 1e-6


# ----------------------------------------------------------------------------------------------------- captions


def every_scene():
    layout = {name: getattr(random_scene(random.Random(0)), name) for name in LAYOUT}
    scene = random_scene(random.Random(0))
    for values in itertools.product(*ATTRIBUTES.values()):
        yield dataclasses.replace(scene, **layout, **dict(zip(ATTRIBUTES, values, strict=True)))


def test_the_full_sentence_reads_as_documented():
    scene = dataclasses.replace(
        random_scene(random.Random(0)),
        **dict(zip(ATTRIBUTES, ("cabin", "red", "grass", "sunset", "rainbow", "pixel art"), strict=True)),
    )
    assert describe(scene) == "a red cabin on grass at sunset with a rainbow, pixel art"
    assert describe(dataclasses.replace(scene, extra="nothing")) == "a red cabin on grass at sunset, pixel art"


def test_the_full_sentence_tells_all_scenes_apart_and_leaves_the_layout_out():
    scenes = list(every_scene())
    assert len({describe(scene) for scene in scenes}) == len(scenes) == 6 * 4 * 4 * 4 * 4 * 3
    moved = dataclasses.replace(scenes[0], x=0.4, size=0.45, horizon=0.6)
    assert describe(moved) == describe(scenes[0])


def test_the_full_sentence_leaves_room_for_a_difference_in_the_text_encoders_window():
    tokenizer = build_tokenizer()
    longest = max(len(tokenizer(describe(scene)).input_ids) for scene in every_scene())
    assert longest <= tokenizer.model_max_length - 16


MENTIONS = {
    "subject": {name: name for name in ATTRIBUTES["subject"]},
    "color": {name: name for name in ATTRIBUTES["color"]},
    "ground": {name: f"on {name}" for name in ATTRIBUTES["ground"]},
    "sky": {"day": "by day", "sunset": "at sunset", "night": "at night", "storm": "in a storm"},
    "extra": {
        "nothing": "with nothing|without a",
        "rainbow": "with a rainbow",
        "moon": "with a moon",
        "balloon": "with a balloon",
    },
    "style": {name: name for name in ATTRIBUTES["style"]},
}


def mentioned(text: str, attribute: str) -> list[str]:
    """The values of an attribute that a caption names, in its order."""
    found = [
        (match.start(), value)
        for value, pattern in MENTIONS[attribute].items()
        for match in re.finditer(rf"\b({pattern})\b", text)
    ]
    return [value for _, value in sorted(found)]


def test_the_full_sentence_names_each_attribute_once():
    for scene in itertools.islice(every_scene(), 0, None, 7):
        for name in ATTRIBUTES:
            said = [] if getattr(scene, name) == "nothing" else [getattr(scene, name)]
            assert mentioned(describe(scene), name) == said


def test_in_a_training_caption_the_last_mention_is_right_and_many_revise_themselves():
    rng, revised = random.Random(0), 0
    for _ in range(2000):
        scene = random_scene(rng)
        text = caption(scene, rng)
        said = {name: mentioned(text, name) for name in ATTRIBUTES}
        assert all(values[-1] == getattr(scene, name) for name, values in said.items() if values), text
        revised += any(len(set(values)) > 1 for values in said.values())
    assert 0.3 < revised / 2000 < 0.5


def test_training_captions_leave_things_out_and_vary_their_order():
    rng = random.Random(0)
    scene = random_scene(rng)
    texts = {caption(scene, rng) for _ in range(200)}
    assert len(texts) > 100
    for name in set(ATTRIBUTES) - {"extra"}:
        assert any(not mentioned(text, name) for text in texts)


def test_loose_captions_say_nothing_wrong_and_leave_anything_out():
    rng = random.Random(0)
    scene = dataclasses.replace(random_scene(rng), extra="moon")
    texts = [loose_caption(scene, rng) for _ in range(500)]
    for name in ATTRIBUTES:
        said = [mentioned(text, name) for text in texts]
        assert all(values in ([], [getattr(scene, name)]) for values in said)
        assert 0.02 < said.count([]) / len(texts) < 0.4


# ---------------------------------------------------------------------------------------- analogies and their judge


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_an_analogy_changes_one_attribute_of_two_scenes_in_the_same_way(kind):
    rng = random.Random(0)
    for _ in range(50):
        analogy = random_analogy(rng, kind)
        assert analogy.kind == kind
        assert differing(analogy.before, analogy.after, (*ATTRIBUTES, *LAYOUT)) == [kind]
        assert differing(analogy.query, analogy.target, (*ATTRIBUTES, *LAYOUT)) == [kind]
        assert getattr(analogy.query, kind) == getattr(analogy.before, kind)
        assert getattr(analogy.target, kind) == getattr(analogy.after, kind)
        assert differing(analogy.query, analogy.before, ATTRIBUTES)
        assert differing(analogy.query, analogy.before, LAYOUT) == list(LAYOUT)


def test_analogies_are_of_every_kind_and_repeatable():
    one, other = random.Random(0), random.Random(0)
    analogies = [random_analogy(one) for _ in range(60)]
    assert {analogy.kind for analogy in analogies} == set(ATTRIBUTES)
    assert analogies == [random_analogy(other) for _ in range(60)]


def some_analogies(each: int, seed: int = 0) -> list:
    rng = random.Random(seed)
    return [random_analogy(rng, kind) for kind in ATTRIBUTES for _ in range(each)]


def test_the_judge_finds_the_target_right_and_the_query_wrong():
    for analogy in some_analogies(each=3):
        right, unchanged = judge(render(analogy.target), analogy), judge(render(analogy.query), analogy)
        assert right.success and right.kept
        assert not unchanged.success and unchanged.kept
        assert right.psnr == pytest.approx(100)
        assert unchanged.psnr < 30


def test_the_judge_finds_a_blurred_and_noisy_target_right():
    noise = np.random.default_rng(0)
    for analogy in some_analogies(each=2, seed=1):
        image = pixels(analogy.target) + noise.normal(0, 0.1, (128, 128, 3))
        image = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).reduce(2).resize((128, 128))
        verdict = judge(image, analogy)
        assert verdict.success and verdict.kept


def test_the_judge_sees_when_something_else_has_changed():
    rng = random.Random(0)
    for analogy in some_analogies(each=2, seed=2):
        spoiled = [
            scene for scene in neighbours(analogy.target) if not differing(scene, analogy.target, [analogy.kind])
        ]
        verdict = judge(render(rng.choice(spoiled)), analogy)
        assert not verdict.success and not verdict.kept
        assert verdict.psnr < 32


def test_the_judge_sees_a_change_to_a_third_value():
    rng = random.Random(0)
    for analogy in some_analogies(each=2, seed=3):
        used = {getattr(analogy.query, analogy.kind), getattr(analogy.target, analogy.kind)}
        third = rng.choice([value for value in ATTRIBUTES[analogy.kind] if value not in used])
        verdict = judge(render(dataclasses.replace(analogy.query, **{analogy.kind: third})), analogy)
        assert not verdict.success and verdict.kept


def test_neighbours_are_all_scenes_one_attribute_away():
    scene = random_scene(random.Random(0))
    around = neighbours(scene)
    assert len(around) == len(set(around)) == 5 + 3 + 3 + 3 + 3 + 2
    assert all(len(differing(scene, other, (*ATTRIBUTES, *LAYOUT))) == 1 for other in around)


def test_the_judge_refuses_a_picture_of_another_size():
    with pytest.raises(ValueError, match="`image`.*64×128.*128×128"):
        judge(Image.new("RGB", (64, 128)), some_analogies(each=1)[0])


@pytest.mark.parametrize("kind, second", [("subject", "sky"), ("style", "color"), ("extra", "ground")])
def test_an_analogy_may_change_two_attributes(kind, second):
    rng = random.Random(0)
    for _ in range(20):
        analogy = random_analogy(rng, kind, second)
        assert (analogy.kind, analogy.kinds) == (kind, (kind, second))
        for one, other in ((analogy.before, analogy.after), (analogy.query, analogy.target)):
            assert set(differing(one, other, (*ATTRIBUTES, *LAYOUT))) == {kind, second}
        for name in (kind, second):
            assert getattr(analogy.query, name) == getattr(analogy.before, name)
            assert getattr(analogy.target, name) == getattr(analogy.after, name)
        assert differing(analogy.query, analogy.before, ATTRIBUTES)


def test_the_kinds_of_an_analogy_are_its_kind_if_nothing_else_is_said():
    analogy = random_analogy(random.Random(0), "sky")
    assert analogy.kinds == ("sky",)
    assert type(analogy)("sky", analogy.before, analogy.after, analogy.query, analogy.target) == analogy


def test_the_judge_knows_scenes_half_way_through_two_changes():
    rng = random.Random(0)
    for kind, second in (("subject", "sky"), ("style", "color"), ("ground", "extra")):
        analogy = random_analogy(rng, kind, second)
        right, unchanged = judge(render(analogy.target), analogy), judge(render(analogy.query), analogy)
        assert right.success and right.kept and not unchanged.success and unchanged.kept
        for name in (kind, second):
            half_way = dataclasses.replace(analogy.query, **{name: getattr(analogy.target, name)})
            assert half_way in candidates(analogy)
            verdict = judge(render(half_way), analogy)
            assert not verdict.success and verdict.kept
        other = next(name for name in ATTRIBUTES if name not in analogy.kinds)
        value = next(value for value in ATTRIBUTES[other] if value != getattr(analogy.query, other))
        verdict = judge(render(dataclasses.replace(analogy.target, **{other: value})), analogy)
        assert not verdict.success and not verdict.kept


@pytest.mark.parametrize("kind", BLENDS)
def test_a_wordless_analogy_goes_from_a_plain_value_to_a_blend(kind):
    rng = random.Random(0)
    for _ in range(20):
        analogy = random_wordless_analogy(rng, kind)
        assert analogy.kind == kind and analogy.kinds == (kind,)
        assert getattr(analogy.before, kind) in ATTRIBUTES[kind] and getattr(analogy.after, kind) in BLENDS[kind]
        for one, other in ((analogy.before, analogy.after), (analogy.query, analogy.target)):
            assert differing(one, other, (*ATTRIBUTES, *LAYOUT)) == [kind]
        assert getattr(analogy.query, kind) == getattr(analogy.before, kind)
        assert getattr(analogy.target, kind) == getattr(analogy.after, kind)


@pytest.mark.parametrize("kind", BLENDS)
def test_the_judge_tells_a_blend_from_other_blends_and_from_plain_values(kind):
    analogy = random_wordless_analogy(random.Random(1), kind)
    assert judge(render(analogy.target), analogy).success
    others = {*ATTRIBUTES[kind], *BLENDS[kind]} - {getattr(analogy.target, kind)}
    for value in others:
        verdict = judge(render(dataclasses.replace(analogy.target, **{kind: value})), analogy)
        assert not verdict.success and verdict.kept


# ---------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_asks_the_same_questions_every_time_and_few_are_the_first_of_many(setting):
    questions = draw_questions(setting, [3, 4], 2)
    assert questions == draw_questions(setting, [3, 4], 2)
    assert questions[:6] == draw_questions(setting, [3], 1)
    assert [question.place for question in questions] == [(setting, s, i) for s in (3, 4) for i in range(12)]
    assert len({question.analogy for question in questions}) == 24


def test_settings_ask_the_same_analogies():
    asked = {setting: [q.analogy for q in draw_questions(setting, [3], 1)] for setting in SETTINGS}
    for setting in ("loose", "wrong", "chance", "unsaid", "silent", "random-rows"):
        assert asked[setting] == asked["captioner"]
    assert asked["two"] == asked["two-unsaid"]
    for forwards, backwards in zip(asked["captioner"], asked["reversed"], strict=True):
        assert (backwards.query, backwards.target) == (forwards.target, forwards.query)
        assert (backwards.before, backwards.after) == (forwards.before, forwards.after)
    assert [analogy.kind for analogy in asked["two"]] == list(ATTRIBUTES)
    assert [analogy.kind for analogy in asked["wordless"]] == ["color", "style"] * 3


def test_prompts_are_given_where_the_captioner_does_not_write_them():
    given = {setting: set(draw_questions(setting, [3], 1)[0].prompts) for setting in SETTINGS}
    assert given.pop("captioner") == given.pop("two") == given.pop("wordless") == set()
    assert given.pop("silent") == {"before_prompt", "after_prompt"}
    assert all(names == {"before_prompt", "after_prompt", "prompt"} for names in given.values())


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in ("chance", "wordless")])
def test_the_oracle_is_told_the_right_answer(setting):
    assert all(q.captions.answer == describe(q.analogy.target) for q in draw_questions(setting, [3], 2))


def test_loose_prompts_sometimes_do_not_say_what_changes_and_differ_by_more_than_that():
    questions = draw_questions("loose", [0], 30)
    silent = sum(not mentioned(q.captions.after, q.analogy.kind) for q in questions)
    assert 0.1 < silent / len(questions) < 0.5
    names = [[name for name in ATTRIBUTES if mentioned(q.captions.before, name)] for q in questions]
    others = [[name for name in ATTRIBUTES if mentioned(q.captions.after, name)] for q in questions]
    assert sum(one != other for one, other in zip(names, others, strict=True)) > 0.5 * len(questions)


def test_a_wrong_prompt_is_wrong_about_one_other_attribute_of_a_or_of_a2():
    sides = set()
    for question in draw_questions("wrong", [0], 10):
        analogy, said, wrong = question.analogy, question.captions, []
        for side, text, scene in (("A", said.before, analogy.before), ("A'", said.after, analogy.after)):
            for name in ATTRIBUTES:
                truth = [] if getattr(scene, name) == "nothing" else [getattr(scene, name)]
                if mentioned(text, name) != truth:
                    assert len(mentioned(text, name)) == 1 and name != analogy.kind
                    wrong.append(side)
        assert len(wrong) == 1
        sides.update(wrong)
        assert said.query == describe(analogy.query)
    assert sides == {"A", "A'"}


def test_chance_prompts_are_whole_captions_among_fillers_and_the_oracles_has_the_querys():
    assert len(OPENINGS) + len(ENDINGS) >= 10
    found, alike = set(), 0
    for question in draw_questions("chance", [0], 20):
        analogy, said = question.analogy, question.captions
        fillers = []
        for text, scene in ((said.before, analogy.before), (said.after, analogy.after), (said.query, analogy.query)):
            opening, caption_, ending = text.partition(describe(scene))
            assert caption_
            fillers.append((opening.strip(), ending.strip()))
            assert fillers[-1][0] in ("", *OPENINGS) and fillers[-1][1] in ("", *ENDINGS)
        found.update(sum(fillers, ()))
        alike += fillers[0] == fillers[1]
        assert said.answer == with_fillers(describe(analogy.target), fillers[2])
    assert found == {"", *OPENINGS, *ENDINGS}
    assert alike < 30


def test_fillers_leave_room_for_a_difference_in_the_text_encoders_window():
    tokenizer = build_tokenizer()
    opening, ending = (max(fillers, key=lambda x: len(tokenizer(x).input_ids)) for fillers in (OPENINGS, ENDINGS))
    scene = dataclasses.replace(random_scene(random.Random(0)), subject="pine tree", extra="moon", sky="storm")
    text = with_fillers(describe(dataclasses.replace(scene, style="pencil sketch")), (opening, ending))
    assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length - 4


@pytest.mark.parametrize("setting", ["unsaid", "two-unsaid"])
def test_prompts_without_the_change_name_what_stays_and_not_what_changes(setting):
    for question in draw_questions(setting, [0], 10):
        analogy, said = question.analogy, question.captions
        assert said.before == said.after
        for text, scenes in (
            (said.before, (analogy.before, analogy.after)),
            (said.query, (analogy.query, analogy.target)),
        ):
            for name in ATTRIBUTES:
                values = set(mentioned(text, name))
                assert not values if name in analogy.kinds else values <= {getattr(scenes[0], name)}


def test_a_question_asked_backwards_changes_as_the_pair_does_from_its_end():
    forwards, backwards = (draw_questions(setting, [3], 1)[0] for setting in ("loose", "reversed"))
    assert forwards.change == (forwards.analogy.before, forwards.analogy.after)
    assert backwards.change == (backwards.analogy.after, backwards.analogy.before)
    assert backwards.arguments == {"difference_scale": -1}
    assert judge(render(backwards.analogy.target), backwards.analogy).success
