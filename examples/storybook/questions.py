# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The settings of the benchmark: which analogies it asks, and what is said of their pictures.

Everything is drawn from the setting's name, the seed and the question's number, so that every run and every process asks
the same.
"""

import dataclasses
import difflib
import random
from collections.abc import Callable

from analogies import BLENDS, Analogy, random_analogy, random_wordless_analogy
from world import ATTRIBUTES, Scene, describe, loose_caption


# What captioners of photographs say around a caption, and Storybook's captions never do. Its tokenizer spells these words
# letter by letter; the longest two still leave room for a whole caption and four tokens in the text encoder's window.
OPENINGS = (
    "a photo of", "there is", "an image of", "a picture of", "a close up of", "this is", "a view of", "arafed",
)  # fmt: skip
ENDINGS = ("with much detail", "on display", "at the back", "in the middle", "up close", "for sale")


@dataclasses.dataclass(frozen=True)
class Captions:
    """What is said of A, A', B and B'; None where the captioner writes it. The oracle alone is told of B'."""

    before: str | None = None
    after: str | None = None
    query: str | None = None
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way of asking.

    Attributes:
        say: writes the captions of an analogy.
        draw: draws analogies from a seed, `per_kind` × 6 of them; of fewer it draws the first ones.
        arguments: of the pipeline, which no configuration overrides.
        backwards: the query is the picture that has the change, and the answer the one that has not.
    """

    say: Callable[[Analogy, random.Random], Captions]
    draw: Callable[[int, int], list[Analogy]]
    arguments: dict[str, object] = dataclasses.field(default_factory=dict)
    backwards: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """One analogy as one setting asks it. If it is asked backwards, `analogy` has query and target in each other's place."""

    setting: str
    seed: int
    index: int
    analogy: Analogy
    captions: Captions

    @property
    def place(self) -> tuple[str, int, int]:
        return self.setting, self.seed, self.index

    @property
    def arguments(self) -> dict[str, object]:
        return SETTINGS[self.setting].arguments

    @property
    def prompts(self) -> dict[str, str]:
        """The pipeline's prompts that are given, by argument."""
        said = self.captions
        prompts = {"before_prompt": said.before, "after_prompt": said.after, "prompt": said.query}
        return {name: prompt for name, prompt in prompts.items() if prompt is not None}

    @property
    def change(self) -> tuple[Scene, Scene]:
        """The pair, in the order in which the query is to change."""
        pair = (self.analogy.before, self.analogy.after)
        return pair[::-1] if SETTINGS[self.setting].backwards else pair


# ----------------------------------------------------------------------------------------------------- analogies


def one_change(seed: int, per_kind: int) -> list[Analogy]:
    rng = random.Random(f"benchmark {seed}")
    return [random_analogy(rng, kind) for kind in list(ATTRIBUTES) * per_kind]


def two_changes(seed: int, per_kind: int) -> list[Analogy]:
    """Each attribute is as often the first of the two; the second is any other."""
    rng = random.Random(f"benchmark two {seed}")
    analogies = []
    for kind in list(ATTRIBUTES) * per_kind:
        second = rng.choice([other for other in ATTRIBUTES if other != kind])
        analogies.append(random_analogy(rng, kind, second))
    return analogies


def wordless_changes(seed: int, per_kind: int) -> list[Analogy]:
    rng = random.Random(f"benchmark wordless {seed}")
    return [random_wordless_analogy(rng, kind) for kind in list(BLENDS) * (per_kind * len(ATTRIBUTES) // len(BLENDS))]


# ------------------------------------------------------------------------------------------------------ captions


def say_nothing(analogy: Analogy, rng: random.Random) -> Captions:
    return Captions(answer=describe(analogy.target))


def say_nothing_of_a_blend(analogy: Analogy, rng: random.Random) -> Captions:
    """Not to an oracle either, since no caption is true."""
    return Captions()


def say_loosely(analogy: Analogy, rng: random.Random) -> Captions:
    """Each picture as if by someone who has not seen the others: things are left out, and in any order."""
    said = [loose_caption(scene, rng) for scene in (analogy.before, analogy.after, analogy.query)]
    return Captions(*said, answer=describe(analogy.target))


def say_wrongly(analogy: Analogy, rng: random.Random) -> Captions:
    """The whole truth, but for one attribute of A or of A' that does not change."""
    name = rng.choice([name for name in ATTRIBUTES if name not in analogy.kinds])
    truth = getattr(analogy.before, name)
    # "nothing" is no wrong word but a missing one.
    wrong = {name: rng.choice([value for value in ATTRIBUTES[name] if value not in (truth, "nothing")])}
    before, after = analogy.before, analogy.after
    if rng.random() < 0.5:
        before = dataclasses.replace(before, **wrong)
    else:
        after = dataclasses.replace(after, **wrong)
    return Captions(*map(describe, (before, after, analogy.query, analogy.target)))


def say_with_fillers(analogy: Analogy, rng: random.Random) -> Captions:
    """The whole truth among a captioner's idle words, which are others for each picture.

    Storybook never met these words. So that they alone cost the oracle nothing that they do not cost us, its caption of
    the answer has those of the query's.
    """
    before, after, query = (random_fillers(rng) for _ in range(3))
    return Captions(
        before=with_fillers(describe(analogy.before), before),
        after=with_fillers(describe(analogy.after), after),
        query=with_fillers(describe(analogy.query), query),
        answer=with_fillers(describe(analogy.target), query),
    )


def random_fillers(rng: random.Random) -> tuple[str, str]:
    """An opening and an ending, each of them empty half of the time."""
    opening, ending = (rng.choice(fillers) if rng.random() < 0.5 else "" for fillers in (OPENINGS, ENDINGS))
    return opening, ending


def with_fillers(caption: str, fillers: tuple[str, str]) -> str:
    opening, ending = fillers
    return " ".join(filter(None, (opening, caption, ending)))


def leave_the_change_unsaid(analogy: Analogy, rng: random.Random) -> Captions:
    """What the true captions before and after the change have in common, of the pair and of the query."""
    pair = common_words(describe(analogy.before), describe(analogy.after))
    query = common_words(describe(analogy.query), describe(analogy.target))
    return Captions(pair, pair, query, answer=describe(analogy.target))


def common_words(before: str, after: str) -> str:
    before, after = before.split(), after.split()
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return " ".join(word for block in blocks for word in before[block.a : block.a + block.size])


def say_nothing_of_the_pair(analogy: Analogy, rng: random.Random) -> Captions:
    return Captions(before="", after="", answer=describe(analogy.target))


# ------------------------------------------------------------------------------------------------------ settings


SETTINGS = {
    "captioner": Setting(say_nothing, one_change),
    "loose": Setting(say_loosely, one_change),
    "wrong": Setting(say_wrongly, one_change),
    "chance": Setting(say_with_fillers, one_change),
    "unsaid": Setting(leave_the_change_unsaid, one_change),
    "silent": Setting(say_nothing_of_the_pair, one_change),
    "two": Setting(say_nothing, two_changes),
    "two-unsaid": Setting(leave_the_change_unsaid, two_changes),
    "reversed": Setting(say_loosely, one_change, {"difference_scale": -1}, backwards=True),
    "random-rows": Setting(say_loosely, one_change, {"init": "random"}),
    "wordless": Setting(say_nothing_of_a_blend, wordless_changes),
}


def draw_questions(setting: str, seeds: list[int], per_kind: int) -> list[Question]:
    """A setting's questions from each seed in turn, every kind in turn, so that the first few have some of each."""
    return [
        ask(setting, seed, index, analogy)
        for seed in seeds
        for index, analogy in enumerate(SETTINGS[setting].draw(seed, per_kind))
    ]


def ask(setting: str, seed: int, index: int, analogy: Analogy) -> Question:
    if SETTINGS[setting].backwards:
        analogy = dataclasses.replace(analogy, query=analogy.target, target=analogy.query)
    captions = SETTINGS[setting].say(analogy, random.Random(f"{setting} {seed} {index}"))
    return Question(setting, seed, index, analogy, captions)
