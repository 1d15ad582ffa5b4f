# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
import random
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import (
    STORYBOOK,
    WIDTH,
    analogy,
    build_captioner,
    build_pipeline,
    embedded,
    forward_calls,
    logged,
    picture,
    rows_of,
    seeded,
)
from world import random_scene, render

from diffusers import EulerDiscreteScheduler, PNDMScheduler
from pipeline_difference_inversion import DifferenceInversionPipeline, Learner, LearningConfig, Pair, _Draw


class Diary:
    """A callback that keeps what it was told, and may do something at one step."""

    def __init__(self, at: int = -1, do=None):
        self.entries, self.at, self.do = [], at, do

    def __call__(self, pipe, step, values):
        self.entries.append((step, values))
        if step == self.at:
            self.do(pipe)

    def values(self, name: str) -> list:
        return [values[name] for _, values in self.entries]


def learn(pipe, pair, steps: int = 4, seed: int = 0, **options):
    """Learns with settings that the numbers below were measured with, whatever the defaults are."""
    settings = {"objective": "consistency", "init": "zeros", "learning_rate": 0.02, "lambda_clip": 0.01}
    settings |= {"lambda_before": 1.0, "num_samples_per_step": 4, "complete_prompts": False} | options
    return pipe.invert_difference(**pair, num_optimization_steps=steps, generator=seeded(seed), **settings)


@torch.no_grad()
def latents_of(pipe, image) -> torch.Tensor:
    pixels = pipe.image_processor.preprocess(image)
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


def signal_and_noise(pipe, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the latents and how much of the noise is in noisy latents."""
    alphas = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


@torch.no_grad()
def error_by_hand(pipe, image, prompt, rows, noise, timesteps) -> torch.Tensor:
    """The UNet's mean squared error on an image under a prompt that ends in rows (equations 7 and 8)."""
    latents = latents_of(pipe, image)
    signal, spread = signal_and_noise(pipe, timesteps)
    embeds = embedded(pipe, [prompt], rows).expand(len(timesteps), -1, -1)
    prediction = pipe.unet(signal * latents + spread * noise, timesteps, encoder_hidden_states=embeds).sample
    velocity = signal * noise - spread * latents
    target = velocity if pipe.scheduler.config.prediction_type == "v_prediction" else noise
    return (prediction - target).square().mean()


def loss_on_a_fixed_set(pipe, pair, rows) -> float:
    noise, timesteps = torch.randn(16, 4, 4, 4, generator=seeded(99)), torch.arange(30, 1000, 61)
    after = error_by_hand(pipe, pair["after"], pair["before_prompt"], rows, noise, timesteps)
    before = error_by_hand(pipe, pair["before"], pair["after_prompt"], -rows, noise, timesteps)
    return float(after + before)


# ---------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("step", [0, 1])
def test_prompts_are_crossed_and_the_difference_is_turned_round_for_the_image_before(either_pipe, pair, step):
    """The loss that the callback is told is recomputed by hand from the noise and time steps of that very step."""
    pipe, diary = either_pipe, Diary()
    with forward_calls(pipe.unet) as calls:
        learn(pipe, pair, steps=2, num_samples_per_step=2, callback_on_optimization_step=diary)
    _, (noisy, timesteps), _, _, _ = [call for call in calls if call[4]][step]  # those with gradients
    timesteps = timesteps.chunk(2)[0]
    signal, spread = signal_and_noise(pipe, timesteps)
    noisy_after, noisy_before = noisy.detach().chunk(2)
    noise = (noisy_after - signal * latents_of(pipe, pair["after"])) / spread
    noise_before = (noisy_before - signal * latents_of(pipe, pair["before"])) / spread
    torch.testing.assert_close(noise, noise_before, atol=1e-4, rtol=1e-4)

    # These tokens start at zero; those of the second step are what the callback saw after the first.
    rows = torch.zeros_like(diary.values("tokens")[0]) if step == 0 else diary.values("tokens")[0]
    reported = diary.values("token_consistency_loss")[step]

    def by_hand(prompt_for_after, rows_for_after, prompt_for_before, rows_for_before) -> float:
        after = error_by_hand(pipe, pair["after"], prompt_for_after, rows_for_after, noise, timesteps)
        before = error_by_hand(pipe, pair["before"], prompt_for_before, rows_for_before, noise, timesteps)
        return float(after + before)

    crossed = by_hand(pair["before_prompt"], rows, pair["after_prompt"], -rows)
    straight = by_hand(pair["after_prompt"], rows, pair["before_prompt"], -rows)
    assert reported == pytest.approx(crossed, rel=1e-5)
    assert reported != pytest.approx(straight, rel=1e-4)
    if step == 1:
        turned = by_hand(pair["before_prompt"], -rows, pair["after_prompt"], rows)
        assert reported != pytest.approx(turned, rel=1e-4)


def test_without_a_weight_the_way_back_is_neither_drawn_nor_counted(pipe, pair):
    diary = Diary()
    with forward_calls(pipe.unet) as calls:
        learn(pipe, pair, steps=1, lambda_before=0.0, callback_on_optimization_step=diary)
    _, (noisy, timesteps), _, _, _ = next(call for call in calls if call[4])
    signal, spread = signal_and_noise(pipe, timesteps)
    assert len(noisy) == 4
    noise = (noisy.detach() - signal * latents_of(pipe, pair["after"])) / spread
    rows = torch.zeros_like(diary.values("tokens")[0])
    by_hand = float(error_by_hand(pipe, pair["after"], pair["before_prompt"], rows, noise, timesteps))
    assert diary.values("token_consistency_loss")[0] == pytest.approx(by_hand, rel=1e-5)


def test_a_learner_needs_no_pipeline():
    """Of a model that can be worked out by hand: it predicts the mean of its rows everywhere, and what is right is 3."""
    shape = (1, 1, 2, 2)
    pair = Pair(None, None, "", "", torch.zeros(shape), torch.ones(shape))

    def predict(latents, prompts, rows, draw):
        prediction = rows.mean((1, 2)).view(-1, 1, 1, 1, 1).expand(-1, len(draw.timesteps), *latents.shape[1:])
        return prediction, torch.full_like(prediction, 3.0)

    def draw(latents, samples, generator, jitter=True, stretch=(0, 1)):
        return _Draw(torch.zeros(samples, *latents.shape[1:]), torch.zeros(samples, dtype=torch.long))

    config = LearningConfig(lambda_clip=0, lambda_tc=2, num_optimization_steps=100, learning_rate=0.1)
    config = replace(config, objective="consistency", num_samples_per_step=4)
    models = {"predict": predict, "clip_features": None, "draw": draw, "backward": torch.Tensor.backward}
    learner = Learner(torch.zeros(2, 5), [pair], [], config, **models)
    learner.prepare()
    learner.judge()
    assert learner.best()[1] == pytest.approx(2 * 3**2)
    for _ in range(100):
        learner.take_step()
        if learner.is_to_judge:
            learner.judge()
    tokens, loss = learner.best()
    assert float(tokens.mean()) == pytest.approx(3, abs=0.05)
    assert loss == pytest.approx(2 * float(3 - tokens.mean()) ** 2, abs=1e-6)


@pytest.mark.parametrize("objective", ["contrast", "consistency"])
def test_samples_that_go_through_the_unet_in_turns_are_learned_from_as_if_together(pipe, pair, objective, monkeypatch):
    module, found = sys.modules[type(pipe).__module__], []
    for at_once in (4, 100):
        monkeypatch.setattr(module, "MOST_LEARNED_AT_ONCE", at_once)
        diary = Diary()
        with forward_calls(pipe.unet) as calls:
            options = {"objective": objective, "init": "random", "callback_on_optimization_step": diary}
            rows = rows_of(learn(pipe, pair, num_samples_per_step=6, **options))
        assert max(len(call[1][0]) for call in calls if call[4]) == min(at_once, 12)
        found.append((rows, torch.tensor(diary.values("loss"))))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_the_callback_sees_steps_losses_and_tokens(pipe, pair):
    diary = Diary()
    learn(pipe, pair, steps=3, num_tokens=5, lambda_clip=0.5, lambda_tc=2.0, callback_on_optimization_step=diary)
    assert [step for step, _ in diary.entries] == [0, 1, 2]
    for _, values in diary.entries:
        assert values["loss"] == pytest.approx(0.5 * values["clip_loss"] + 2 * values["token_consistency_loss"])
        assert values["tokens"].shape == (5, WIDTH)
    first, second, _ = diary.values("tokens")
    assert not torch.equal(first, second)


def test_learning_lowers_the_loss_on_a_fixed_set_of_noises_and_time_steps(either_pipe, pair):
    rows = rows_of(learn(either_pipe, pair, steps=40))
    at_first = loss_on_a_fixed_set(either_pipe, pair, torch.zeros_like(rows))
    assert loss_on_a_fixed_set(either_pipe, pair, rows) < 0.98 * at_first


def test_learning_by_clip_alone_turns_the_tokens_towards_the_delta(pipe, pair):
    diary = Diary()
    learn(pipe, pair, steps=30, lambda_clip=1.0, lambda_tc=0.0, callback_on_optimization_step=diary)
    assert diary.values("clip_loss")[-1] < 0.5 * diary.values("clip_loss")[0]


def test_alpha_chooses_between_images_and_captions(pipe, pair):
    options = {"lambda_clip": 1.0, "lambda_tc": 0.0}
    by_images, by_captions = (rows_of(learn(pipe, pair, alpha=alpha, **options)) for alpha in (0.0, 1.0))
    other_captions = pair | {"after_prompt": "a boat on water"}
    other_pictures = pair | {"after": picture("blue", "white")}

    def apart(other_pair, alpha, rows) -> float:
        return float((rows_of(learn(pipe, other_pair, alpha=alpha, **options)) - rows).abs().max())

    assert apart(other_captions, 0.0, by_images) < 1e-5
    assert apart(other_captions, 1.0, by_captions) > 1e-2
    assert apart(other_pictures, 1.0, by_captions) < 1e-5
    assert apart(other_pictures, 0.0, by_images) > 1e-2


def test_learning_that_goes_wrong_gives_nothing_worse_than_no_difference(pipe, pair):
    rows = rows_of(learn(pipe, pair, steps=10, learning_rate=100.0))
    at_first = loss_on_a_fixed_set(pipe, pair, torch.zeros_like(rows))
    assert loss_on_a_fixed_set(pipe, pair, rows) <= 1.01 * at_first


def test_learning_without_one_finite_loss_is_said_and_gives_back_what_it_began_with(pipe, pair):
    begun = rows_of(learn(pipe, pair, init="random", steps=0))
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with logged() as lines:
        difference = learn(pipe, pair, init="random")
    torch.testing.assert_close(rows_of(difference), begun)
    assert any("finite" in line and "float32" in line for line in lines)


@torch.no_grad()
def contrast_by_hand(pipe, pair, rows, noise, timesteps, weights) -> float:
    """What the tokens gain on A where that is more than nothing, less what they gain on A', under what both prompts say: nothing."""

    def errors(image, tokens) -> torch.Tensor:
        latents = latents_of(pipe, image)
        signal, spread = signal_and_noise(pipe, timesteps)
        embeds = embedded(pipe, [""], tokens).expand(len(timesteps), -1, -1)
        prediction = pipe.unet(signal * latents + spread * noise, timesteps, encoder_hidden_states=embeds).sample
        return ((prediction - noise).square().mean(1) * weights).mean((1, 2))

    gains = {name: 1 - errors(pair[name], rows) / errors(pair[name], rows[:0]) for name in ("before", "after")}
    return float((gains["before"].clamp(min=0) - gains["after"]).mean())


def test_the_contrast_counts_what_tokens_do_for_the_image_after_and_not_for_the_one_before(pipe, pair):
    diary = Diary()
    with forward_calls(pipe.unet) as calls:
        options = {"objective": "contrast", "init": "random", "num_samples_per_step": 2}
        learn(pipe, pair, steps=1, **options, callback_on_optimization_step=diary)
        rows = rows_of(learn(pipe, pair, steps=0, objective="contrast", init="random"))
    _, (noisy, timesteps), _, _, _ = next(call for call in calls if call[4])  # the one with gradients
    noisy_before, noisy_after = noisy.detach().chunk(2)
    timesteps = timesteps.chunk(2)[0]
    signal, spread = signal_and_noise(pipe, timesteps)
    before, after = latents_of(pipe, pair["before"]), latents_of(pipe, pair["after"])
    noise = (noisy_after - signal * after) / spread
    torch.testing.assert_close((noisy_before - signal * before) / spread, noise, atol=1e-4, rtol=1e-4)
    distance = (after - before).square().mean(1).sqrt()
    reported = diary.values("contrast_loss")[0]
    by_hand = contrast_by_hand(pipe, pair, rows, noise, timesteps, distance / distance.mean())
    assert reported == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_learning_lowers_the_contrast(pipe, pair):
    options = {"objective": "contrast", "init": "random", "lambda_clip": 0, "num_samples_per_step": 8}
    begun, ended = (float(learn(pipe, pair, steps=steps, **options).metadata["loss"]) for steps in (0, 30))
    assert ended < begun


# ------------------------------------------------------------------------------------------- what can be chosen


def test_zero_tokens_start_at_zero_and_move_by_the_learning_rate(pipe, pair):
    diary = Diary()
    learn(pipe, pair, steps=2, learning_rate=1e-5, callback_on_optimization_step=diary)
    assert diary.values("tokens")[0].abs().max() <= 1.01e-5
    assert diary.values("tokens")[0].any()


def test_random_tokens_start_anywhere_by_the_seed(pipe, pair):
    starts = []
    for seed in (0, 1):
        diary = Diary()
        options = {"init": "random", "learning_rate": 1e-5, "callback_on_optimization_step": diary}
        learn(pipe, pair, steps=1, seed=seed, **options)
        starts.append(diary.values("tokens")[0])
    vocabulary = pipe.text_encoder.get_input_embeddings().weight
    assert all(0.7 < start.std() / vocabulary.std() < 1.3 for start in starts)
    assert (starts[0] - starts[1]).abs().max() > 0.05


def first_tokens(pipe, pair, **options) -> torch.Tensor:
    """The tokens after a step too small to be seen."""
    diary = Diary()
    learn(pipe, pair, steps=1, learning_rate=1e-6, callback_on_optimization_step=diary, **options)
    return diary.values("tokens")[0]


def words_of(pipe, words: str) -> torch.Tensor:
    ids = pipe.tokenizer(words, add_special_tokens=False).input_ids
    return pipe.text_encoder.get_input_embeddings().weight.detach()[ids]


def test_nothing_is_learned_in_no_steps(pipe, pair):
    diary = Diary()
    rows = rows_of(learn(pipe, pair, init="random", steps=0, callback_on_optimization_step=diary))
    torch.testing.assert_close(rows, first_tokens(pipe, pair, init="random"), atol=1e-5, rtol=0)
    assert not diary.entries


def test_of_more_words_than_tokens_the_last_stay(pipe):
    torch.testing.assert_close(pipe._word_rows(["yellow", "castle", "snow"], 2), words_of(pipe, "castle snow"))
    torch.testing.assert_close(pipe._word_rows(["snow"], 2), words_of(pipe, "snow"))


def test_hard_tokens_begin_as_whole_words_of_the_vocabulary_only(pipe):
    assert len(pipe.tokenizer("castles", add_special_tokens=False).input_ids) > 1
    rows = pipe._word_rows(["3", "castles", "snow"], 4, pipe._vocabulary_words())
    torch.testing.assert_close(rows, words_of(pipe, "snow"))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_pair_that_only_loses_a_word_is_learned_without_complaint(steps):
    """Leaving out what was lost is the change: the one row begins at zero, and may stay there."""
    model = STORYBOOK / "model"
    pipe = DifferenceInversionPipeline.from_pretrained(model, clip=None, clip_processor=None, dtype=torch.float32)
    scene = replace(random_scene(random.Random(3)), subject="cabin", color="red", ground="grass")
    pair = {"before": render(scene), "after": render(replace(scene, ground="snow"))}
    pair = {name: image.resize((64, 64)) for name, image in pair.items()}
    pair |= {"before_prompt": "a red cabin on grass", "after_prompt": "a red cabin"}
    with logged() as lines:
        difference = learn(pipe, pair, steps=steps, init="words", objective="contrast", lambda_clip=0)
    assert difference.metadata["lost_phrases"] == "grass" and difference.metadata["gained_phrases"] == ""
    (line,) = lines
    assert len(rows_of(difference)) == 1 and "`before` is used at 64×64" in line
    assert steps > 0 or not rows_of(difference).any()


@pytest.mark.parametrize("init", ["words", "random"])
def test_hard_tokens_are_words_that_say_the_same_as_text(pipe, pair, init):
    difference = learn(pipe, pair, init=init, projection="hard", num_tokens=3)
    text = difference.to_text(pipe.tokenizer)
    written = embedded(pipe, [f"a red cabin {text}"])
    torch.testing.assert_close(embedded(pipe, ["a red cabin"], rows_of(difference)), written)


def test_hard_tokens_are_words_while_they_are_learned_too(pipe, pair):
    """The loss that chose them is that of the words, which they move between."""
    options = {"init": "random", "projection": "hard", "num_tokens": 2, "learning_rate": 0.5}
    with logged() as lines:
        difference = learn(pipe, pair, steps=40, **options)
    begun = learn(pipe, pair, steps=1, **options | {"learning_rate": 1e-9})
    assert difference.to_text(pipe.tokenizer) != begun.to_text(pipe.tokenizer)
    assert float(difference.metadata["loss"]) < float(begun.metadata["loss"])
    again = learn(pipe, pair, steps=1, **options | {"learning_rate": 1e-9})
    assert begun.metadata["loss"] == again.metadata["loss"] and not lines


def test_the_callback_of_hard_tokens_sees_words(pipe, pair):
    diary = Diary()
    learn(pipe, pair, init="random", projection="hard", num_tokens=2, callback_on_optimization_step=diary)
    table = pipe.text_encoder.get_input_embeddings().weight
    for rows in diary.values("tokens"):
        assert all(torch.isclose(row, table, atol=1e-6).all(dim=1).any() for row in rows)


def test_the_same_seed_learns_the_same_tokens_and_another_seed_others(pipe, pair):
    first, again, other = (rows_of(learn(pipe, pair, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_difference_says_how_it_was_learned(pipe, pair):
    metadata = learn(pipe, pair, steps=3, seed=7, num_tokens=2, alpha=0.25, learning_rate=0.01).metadata
    expected = {
        "format": "difference-tokens",
        "format_version": "1",
        "token": "<difference>",
        "num_tokens": "2",
        "steps": "3",
        "alpha": "0.25",
        "learning_rate": "0.01",
        "init": "zeros",
        "objective": "consistency",
        "seed": "7",
        "before_prompt": "a red cabin",
        "after_prompt": "a yellow castle on snow",
        "prediction_type": "epsilon",
    }
    assert expected.items() <= metadata.items()
    assert float(metadata["loss"]) > 0
    for name in (
        "base_model",
        "lambda_clip",
        "lambda_tc",
        "lambda_before",
        "embedding_fingerprint",
        "torch",
        "diffusers",
        "created",
    ):
        assert name in metadata
    assert all(isinstance(value, str) for value in metadata.values())


def test_several_pairs_give_one_difference_that_serves_them_all(pipe, pair):
    pairs = {
        "before": [picture("red"), picture("blue", "white")],
        "after": [picture("yellow"), picture("purple", "white")],
        "before_prompt": ["a red cabin", "a blue boat"],
        "after_prompt": ["a yellow castle on snow", "a purple boat by day"],
    }
    difference = learn(pipe, pairs, steps=40)
    assert rows_of(difference).shape[1] == WIDTH
    for i in range(2):
        one = {name: values[i] for name, values in pairs.items()}
        at_first = loss_on_a_fixed_set(pipe, one, torch.zeros_like(rows_of(difference)))
        assert loss_on_a_fixed_set(pipe, one, rows_of(difference)) < at_first


def test_each_of_several_pairs_is_learned_from(pipe, pair):
    other = {
        "before": picture("blue", "white"),
        "after": picture("purple", "white"),
        "before_prompt": "a blue boat",
        "after_prompt": "a purple boat by day",
    }
    ends = []
    for second in (pair, other):
        diary = Diary()
        pairs = {name: [pair[name], second[name]] for name in pair}
        learn(pipe, pairs, lambda_clip=0, callback_on_optimization_step=diary)
        ends.append(diary.values("tokens")[-1])
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_one_prompt_serves_several_pairs(pipe):
    images = {"before": [picture("red"), picture("blue")], "after": (picture("yellow"), picture("purple"))}
    once = learn(pipe, images, before_prompt="a cabin", after_prompt="a castle")
    twice = learn(pipe, images, before_prompt=["a cabin"] * 2, after_prompt=["a castle"] * 2)
    assert torch.equal(rows_of(once), rows_of(twice))


def test_images_before_and_after_may_have_two_sizes(pipe, pair):
    with logged() as lines:
        difference = learn(pipe, pair | {"after": picture("yellow", size=(48, 40))})
    assert torch.isfinite(rows_of(difference)).all()
    assert any("`after`" in line and "48" in line and "resized" in line for line in lines)


def test_height_and_width_say_at_which_size_to_learn(pipe, pair):
    with forward_calls(pipe.unet) as calls:
        learn(pipe, pair, steps=1, height=24, width=40)
    assert {tuple(arguments[0].shape[1:]) for _, arguments, _, _, _ in calls} == {(4, 3, 5)}


def test_the_captioner_writes_prompts_that_are_not_given(pair):
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    captions = pipe.caption([pair["before"], pair["after"]])
    assert all(captions) and captions[0] != captions[1]
    difference = learn(pipe, {"before": pair["before"], "after": pair["after"]})
    assert difference.metadata["before_prompt"] == captions[0]
    assert difference.metadata["after_prompt"] == captions[1]
    given = learn(pipe, pair | {"before_prompt": captions[0], "after_prompt": captions[1]})
    assert torch.equal(rows_of(difference), rows_of(given))


def test_equal_captions_leave_it_to_the_images(pipe, pair):
    difference = learn(pipe, pair | {"after_prompt": pair["before_prompt"]})
    assert torch.isfinite(rows_of(difference)).all()
    assert rows_of(difference).any()


@pytest.mark.parametrize("objective", ["contrast", "consistency"])
def test_equal_images_are_said_to_be_equal_and_change_nothing(pipe, pair, objective):
    """Whatever the prompts say."""
    with logged() as lines:
        difference = learn(pipe, pair | {"after": pair["before"]}, init="words", objective=objective)
    assert not rows_of(difference).any()
    assert any("look alike" in line for line in lines)


def test_learning_without_a_clip_loss_needs_no_clip(pair):
    pipe = build_pipeline(clip=None, clip_processor=None)
    assert rows_of(learn(pipe, pair, lambda_clip=0)).any()


@pytest.mark.parametrize("family", [PNDMScheduler, EulerDiscreteScheduler])
def test_the_users_scheduler_does_not_change_what_is_learned(pipe, pair, family):
    expected = rows_of(learn(pipe, pair))
    pipe.scheduler = family.from_config(pipe.scheduler.config)
    torch.testing.assert_close(rows_of(learn(pipe, pair)), expected)


def test_learning_works_in_half_precision_and_keeps_float32_tokens(pipe, pair):
    pipe.to(torch.bfloat16)
    difference = learn(pipe, pair)
    assert rows_of(difference).dtype == torch.float32
    assert torch.isfinite(rows_of(difference)).all()
    assert rows_of(difference).any()


# -------------------------------------------------------------------------------------------- stopping, and after


def interrupt(pipe):
    pipe._interrupt = True


@contextmanager
def ctrl_c_is_handled():
    """Lets a test fail, and not pytest stop, where the pipeline lets Ctrl-C through."""
    try:
        yield
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C ended learning without a result.")


def press_ctrl_c(pipe):
    signal.raise_signal(signal.SIGINT)


def fail(pipe):
    raise RuntimeError("a callback of the user's")


@pytest.mark.parametrize("stop", [interrupt, press_ctrl_c])
def test_stopping_early_keeps_the_best_tokens_so_far(pipe, pair, stop):
    diary = Diary(at=5, do=stop)
    with ctrl_c_is_handled():
        rows = rows_of(learn(pipe, pair, steps=40, callback_on_optimization_step=diary))
    assert len(diary.entries) == 6
    assert any(torch.equal(rows, seen) for seen in diary.values("tokens"))
    assert loss_on_a_fixed_set(pipe, pair, rows) < loss_on_a_fixed_set(pipe, pair, torch.zeros_like(rows))


@pytest.mark.parametrize("moment", [0.25, 0.5, 1.0])
def test_ctrl_c_at_any_moment_keeps_the_best_tokens_so_far(pipe, pair, moment):
    """From the second step to the very last call of the model, in the middle of that call."""
    with forward_calls(pipe.unet) as calls:
        learn(pipe, pair, steps=5)
    before, total = state_of(pipe), len(calls)
    calls = []

    def press(module, arguments, output):
        calls.append(output)
        if len(calls) == round(moment * total):
            hook.remove()
            signal.raise_signal(signal.SIGINT)

    hook = pipe.unet.register_forward_hook(press)
    with ctrl_c_is_handled():
        rows = rows_of(learn(pipe, pair, steps=5))
    assert len(calls) == round(moment * total)
    assert loss_on_a_fixed_set(pipe, pair, rows) < loss_on_a_fixed_set(pipe, pair, torch.zeros_like(rows))
    assert state_of(pipe) == before


def test_ctrl_c_while_a_call_learns_ends_the_call_and_keeps_what_was_learned(pipe, pair):
    diary = Diary(at=5, do=press_ctrl_c)
    draws = []
    with pytest.raises(KeyboardInterrupt, match="interrupted_difference"):
        analogy(
            pipe,
            image=pair["before"],
            prompt="a cabin",
            **pair,
            num_optimization_steps=40,
            init="random",
            callback_on_optimization_step=diary,
            callback_on_step_end=lambda *given: draws.append(given) or {},
        )
    assert len(diary.entries) == 6 and not draws
    rows = rows_of(pipe.interrupted_difference)
    assert any(torch.equal(rows, seen) for seen in diary.values("tokens"))


def test_ctrl_c_while_a_call_draws_keeps_what_was_learned_and_an_ended_call_keeps_nothing(pipe, pair):
    options = {"image": pair["before"], "prompt": "a cabin", **pair, "num_optimization_steps": 1}
    options["num_inference_steps"] = 2
    with pytest.raises(KeyboardInterrupt):
        analogy(pipe, **options, generator=seeded(), callback_on_step_end=lambda pipe, *_: press_ctrl_c(pipe))
    kept = rows_of(pipe.interrupted_difference)
    assert torch.equal(kept, rows_of(analogy(pipe, **options, generator=seeded()).difference))
    assert pipe.interrupted_difference is None


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 6, 7, 8, 20])
def test_a_step_takes_samples_that_differ_and_eight_steps_take_them_all(samples):
    turns = [Learner.samples_of_turn(turn, samples, 8).tolist() for turn in range(8)]
    assert all(len(set(turn)) == len(turn) == min(samples, 8) for turn in turns)
    assert set().union(*turns) == set(range(8))


def test_noises_and_time_steps_are_drawn_where_the_latents_are_whatever_the_default_device(pipe):
    latents = torch.zeros(1, 4, 4, 4)
    with torch.device("meta"):  # which stands for a device that the latents are not on
        draw = pipe._draw(latents, 2, None)
    assert draw.timesteps.device == draw.noise.device == latents.device
    assert 0 <= draw.timesteps[0] < 500 <= draw.timesteps[1] < 1000


def test_learning_can_go_on_after_an_interruption(pipe, pair):
    learn(pipe, pair, callback_on_optimization_step=Diary(at=0, do=interrupt))
    diary = Diary()
    learn(pipe, pair, steps=4, callback_on_optimization_step=diary)
    assert len(diary.entries) == 4


def state_of(pipe) -> dict:
    """Everything about the components that learning could leave changed."""
    state = {"vocabulary": len(pipe.tokenizer)}
    for component in ("vae", "unet", "text_encoder", "clip"):
        module = getattr(pipe, component)
        for name, part in module.named_modules():
            state[component, name, "training"] = part.training
            state[component, name, "hooks"] = len(part._forward_hooks) + len(part._forward_pre_hooks)
        for name, parameter in module.named_parameters():
            state[component, name, "requires_grad"] = parameter.requires_grad
            state[component, name, "grad"] = parameter.grad
            state[component, name, "value"] = parameter.detach().numpy().tobytes()
    return state


def test_ctrl_c_before_there_is_anything_to_keep_ends_learning(pipe, pair):
    """It is pressed when the UNet is first called, to know its errors without tokens."""
    handle = pipe.unet.register_forward_pre_hook(lambda *_: press_ctrl_c(pipe))
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(pipe, pair, objective="contrast", init="random")
    finally:
        handle.remove()


@pytest.mark.parametrize("do", [None, interrupt, press_ctrl_c, fail])
def test_components_come_back_as_they_were(pipe, pair, do):
    pipe.unet.train()
    pipe.text_encoder.train()
    pipe.text_encoder.get_input_embeddings().eval()
    pipe.unet.conv_in.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    before = state_of(pipe)
    assert {before["unet", "conv_in", "training"], before["vae", "encoder", "training"]} == {True, False}
    diary = Diary(at=1, do=do) if do else None
    if do is fail:
        with pytest.raises(RuntimeError, match="a callback of the user's"):
            learn(pipe, pair, callback_on_optimization_step=diary)
    else:
        with ctrl_c_is_handled():
            learn(pipe, pair, callback_on_optimization_step=diary)
    after = state_of(pipe)
    assert {key for key in before if before[key] != after[key]} == set()
    assert before.keys() == after.keys()
