# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The world that the embedded model was trained on, its questions and their judge; none of this needs the model."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
from analogies import judge, neighbours, random_analogy
from conftest import build_tokenizer
from PIL import Image
from world import ATTRIBUTES, caption, describe, random_scene, render


LAYOUT = ("x", "size", "horizon")


def pixels(scene) -> np.ndarray:
    return np.asarray(render(scene), dtype=np.float32) / 255


def differing(one, other, names) -> list[str]:
    return [name for name in names if getattr(one, name) != getattr(other, name)]


# ---------------------------------------------------------------------------------------------------- the world


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
