# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
import functools
import io
import itertools
import logging
import re
import signal

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from conftest import (
    PIPELINE_FILE,
    SIDE,
    WIDTH,
    analogy,
    build_captioner,
    build_clip,
    build_components,
    build_pipeline,
    build_tokenizer,
    embedded,
    forward_calls,
    logged,
    picture,
    random_tokens,
    rows_of,
    seeded,
    watched,
)
from PIL import Image
from safetensors.torch import save_file

from diffusers import (
    AutoencoderTiny,
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks.group_offloading import ModuleGroup
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens, LearningConfig


STEPS = 6


def apply(pipe, **options) -> torch.Tensor:
    """The answer's latents, for a query image with a prompt unless something else is said."""
    defaults = {
        "image": picture("blue"),
        "prompt": "a blue cabin",
        "difference": random_tokens(),
        "complete_prompts": False,
        "num_inference_steps": STEPS,
        "strength": 1.0,
        "output_type": "latent",
        "generator": seeded(),
    }
    if options.get("image", True) is not None:
        defaults["guidance_scale"] = 1.5  # at which the tolerances below were measured, whatever the default is
    return pipe(**defaults | options).images


def draw(pipe, **options) -> torch.Tensor:
    """The latents of text to image."""
    return apply(pipe, **{"image": None} | options)


@torch.no_grad()
def latents_of(pipe, image) -> torch.Tensor:
    pixels = pipe.image_processor.preprocess(image).to(pipe.vae.dtype)
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


def stock_pipeline(**components) -> StableDiffusionPipeline:
    own = {name: part for name, part in build_components().items() if not name.startswith("clip")}
    stock = StableDiffusionPipeline(
        **own | components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def models_of(pipe) -> list[torch.nn.Module]:
    """The parts of all models whose calls a hook can count."""
    parts = [pipe.vae.encoder, pipe.vae.decoder, pipe.text_encoder, pipe.unet]
    if pipe.clip is not None:
        parts += [pipe.clip.text_model, pipe.clip.vision_model]
    if pipe.captioner is not None:
        parts += [pipe.captioner.vision_model]
    return parts


# ------------------------------------------------------------------------------------------- a query and a change


@torch.no_grad()
def reconstruction(pipe, image, prompt: str) -> torch.Tensor:
    """An image taken up DDIM's path and down again by stock schedulers, under its prompt."""
    embeds = embedded(pipe, [prompt])
    latents = latents_of(pipe, image)
    for family in (DDIMInverseScheduler, DDIMScheduler):
        scheduler = family.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            prediction = pipe.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.0])
def test_a_difference_of_zero_gives_the_query_back(either_pipe, guidance_scale):
    pipe, expected = either_pipe, latents_of(either_pipe, picture("blue"))
    none = apply(pipe, difference_scale=0, guidance_scale=guidance_scale)
    torch.testing.assert_close(none, expected, atol=1e-4, rtol=1e-4)
    some = apply(pipe, difference_scale=1, guidance_scale=guidance_scale)
    assert (some - expected).abs().mean() > 0.05


@pytest.mark.parametrize(
    "settings",
    [{"set_alpha_to_one": True}, {"steps_offset": 0}, {"set_alpha_to_one": True, "timestep_spacing": "trailing"}],
    ids=str,
)
def test_a_difference_of_zero_gives_the_query_back_whatever_the_schedule_ends_with(pipe, settings):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    expected = latents_of(pipe, picture("blue"))
    torch.testing.assert_close(apply(pipe, difference_scale=0), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, error", [(torch.float16, 0.005), (torch.bfloat16, 0.02)])
def test_a_difference_of_zero_gives_the_query_back_in_half_precision(pipe, dtype, error):
    """The errors were 0.0012 and 0.0052, of latents that spread by 0.26."""
    pipe.to(dtype)
    expected = latents_of(pipe, picture("blue"))
    none = apply(pipe, difference_scale=0, num_inference_steps=20)
    assert none.dtype == dtype
    assert (none.float() - expected.float()).square().mean().sqrt() < error


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.0])
def test_a_difference_of_zero_gives_the_query_back_as_ddim_inversion_does(either_pipe, guidance_scale):
    pipe, expected = either_pipe, reconstruction(either_pipe, picture("blue"), "a blue cabin")
    none = apply(pipe, difference_scale=0, guidance_scale=guidance_scale, inversion="ddim")
    torch.testing.assert_close(none, expected, atol=1e-4, rtol=1e-4)
    some = apply(pipe, difference_scale=1, guidance_scale=guidance_scale, inversion="ddim")
    assert (some - expected).abs().mean() > 0.05


def test_no_guidance_at_all_gives_the_query_back_too(pipe):
    none = apply(pipe, difference_scale=0)
    torch.testing.assert_close(apply(pipe, guidance_scale=0), none, atol=1e-4, rtol=1e-4)


def test_more_guidance_goes_further_from_the_query(pipe):
    none = apply(pipe, difference_scale=0)
    distances = [float((apply(pipe, guidance_scale=scale) - none).abs().mean()) for scale in (0.5, 1.0, 2.0)]
    assert distances == sorted(distances)
    assert distances[0] > 0.01


def test_a_negative_prompt_is_what_guidance_leads_away_from(pipe):
    own = apply(pipe, guidance_scale=3.0, negative_prompt="a blue cabin")
    torch.testing.assert_close(apply(pipe, guidance_scale=3.0), own)
    other = apply(pipe, guidance_scale=3.0, negative_prompt="a castle at night")
    assert (other - own).abs().max() > 0.01
    with logged() as lines:
        without_effect = apply(pipe, guidance_scale=1.0, negative_prompt="a castle at night")
    torch.testing.assert_close(without_effect, apply(pipe, guidance_scale=1.0))
    assert any("`negative_prompt` has no effect" in line for line in lines)


def test_a_guidance_of_one_is_the_limit_of_guidance_near_one_at_half_the_cost(pipe):
    with forward_calls(pipe.unet) as calls:
        exactly = apply(pipe, guidance_scale=1.0)
    assert sum(len(call[1][0]) for call in calls) == 2 * STEPS  # STEPS of inversion, and as many of drawing
    torch.testing.assert_close(apply(pipe, guidance_scale=1 + 1e-6), exactly, atol=1e-4, rtol=1e-4)


def test_an_empty_negative_prompt_is_not_the_querys_own(pipe):
    own = apply(pipe, guidance_scale=3.0)
    assert (apply(pipe, guidance_scale=3.0, negative_prompt="") - own).abs().max() > 0.01


def test_a_query_is_redrawn_by_words_alone_without_a_difference(pipe):
    words = {"source_prompt": "a blue cabin", "difference": None, "guidance_scale": 3.0}
    unchanged = apply(pipe, prompt="a blue cabin", **words)
    torch.testing.assert_close(unchanged, latents_of(pipe, picture("blue")), atol=1e-4, rtol=1e-4)
    assert (apply(pipe, prompt="a castle at night", **words) - unchanged).abs().mean() > 0.05
    out = pipe(image=picture("blue"), prompt="a castle", source_prompt="a cabin", num_inference_steps=1)
    assert out.difference is None
    assert out.images[0].size == (SIDE, SIDE)


def test_the_source_prompt_is_what_the_query_is_inverted_by_and_led_away_from(pipe):
    expected = reconstruction(pipe, picture("blue"), "a blue cabin")
    back = apply(pipe, prompt="a castle", source_prompt="a blue cabin", guidance_scale=0, inversion="ddim")
    torch.testing.assert_close(back, expected, atol=1e-4, rtol=1e-4)
    own = apply(pipe, prompt="a blue cabin", source_prompt="a blue cabin")
    torch.testing.assert_close(own, apply(pipe, prompt="a blue cabin"))


@torch.no_grad()
def one_step(pipe, noise: torch.Tensor, mixture: list[tuple[float, str, torch.Tensor | None]]) -> torch.Tensor:
    """What a stock scheduler's only step makes of noise and a mixture of the UNet's predictions.

    The mixture has a share, a prompt and its rows for each.
    """
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    embeds = [embedded(pipe, [prompt], rows) for _, prompt, rows in mixture]
    predictions = [pipe.unet(noise, t, encoder_hidden_states=each).sample for each in embeds]
    total = sum(share * each for (share, _, _), each in zip(mixture, predictions, strict=True))
    return scheduler.step(total, t, noise).prev_sample


def test_a_part_of_a_change_lies_as_far_on_the_straight_line_to_the_whole_change(either_pipe):
    """At no more cost than the whole."""
    query, whole = latents_of(either_pipe, picture("blue")), apply(either_pipe, guidance_scale=1.0)
    with forward_calls(either_pipe.unet) as calls:
        part = apply(either_pipe, guidance_scale=1.0, difference_scale=0.3)
    torch.testing.assert_close(part, 0.7 * query + 0.3 * whole, atol=1e-4, rtol=1e-4)
    assert sum(len(call[1][0]) for call in calls) == 2 * STEPS


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 3.0}, {"inversion": "ddim"}, {"inversion": "sdedit", "eta": 0.5}], ids=str
)
def test_a_part_of_a_change_lies_between_whatever_the_inversion_and_the_guidance(pipe, options):
    none, part, whole = (apply(pipe, **options, difference_scale=scale) for scale in (0, 0.3, 1))
    torch.testing.assert_close(part, 0.7 * none + 0.3 * whole, atol=1e-4, rtol=1e-4)


def test_more_than_a_whole_change_goes_further_than_the_whole(pipe):
    none, whole, more = (apply(pipe, difference_scale=scale) for scale in (0, 1, 1.2))
    assert (more - none).norm() > 1.05 * (whole - none).norm()


def test_of_two_differences_the_second_counts_for_as_far_as_its_scale_reaches(pipe):
    one, two = random_tokens(), random_tokens(num_tokens=3, seed=6)
    first, both = apply(pipe, difference=one), apply(pipe, difference=[one, two])
    between = apply(pipe, difference=[two, one], difference_scale=[0.5, 1.0])
    torch.testing.assert_close(between, (first + both) / 2, atol=1e-4, rtol=1e-4)


def test_a_callback_may_change_the_latents_of_a_part_of_a_change(pipe):
    """What it adds to the last of them is in the answer."""

    def brighten(pipe, i, t, tensors):
        return {"latents": tensors["latents"] + 0.5} if i == STEPS - 1 else {}

    part, brighter = (apply(pipe, difference_scale=0.3, callback_on_step_end=c) for c in (None, brighten))
    torch.testing.assert_close(brighter, part + 0.5, atol=1e-4, rtol=1e-4)


def test_without_a_query_a_scale_mixes_what_the_unet_predicts_without_the_difference_and_with_it(either_pipe):
    pipe, noise, rows = either_pipe, torch.randn(1, 4, 4, 4, generator=seeded(3)), rows_of(random_tokens())
    for scale in (0, 0.5, 1, 1.5):
        answer = draw(pipe, latents=noise, difference_scale=scale, num_inference_steps=1, guidance_scale=1.0)
        mixture = [(1 - scale, "a blue cabin", None), (scale, "a blue cabin", rows)]
        torch.testing.assert_close(answer, one_step(pipe, noise, mixture), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale, evaluations", [(0, 1), (1, 1), (0.5, 2)])
def test_without_a_query_only_a_part_of_a_change_costs_more(pipe, scale, evaluations):
    with forward_calls(pipe.unet) as calls:
        draw(pipe, difference_scale=scale, guidance_scale=1.0)
    assert [len(call[1][0]) for call in calls] == [evaluations] * STEPS


@pytest.mark.parametrize("swapped", [False, True])
def test_several_differences_are_mixed_as_far_as_each_ones_scale_reaches(pipe, swapped):
    """The greater scale comes first. What the other takes the place of is said until it does."""
    one, noise = random_tokens(), torch.randn(1, 4, 4, 4, generator=seeded(3))
    two = DifferenceTokens(random_tokens(num_tokens=3, seed=6).embeddings, {"lost_phrases": "by day"})
    options = {"prompt": "a blue cabin by day with a moon", "latents": noise, "num_inference_steps": 1}
    given, scales = ([two, one], [0.5, 1.0]) if swapped else ([one, two], [1.0, 0.5])
    answer = draw(pipe, **options, difference=given, difference_scale=scales, guidance_scale=1.0)
    mixture = [
        (0.5, "a blue cabin with a moon by day", rows_of(one)),
        (0.5, "a blue cabin with a moon", torch.cat([rows_of(one), rows_of(two)])),
    ]
    torch.testing.assert_close(answer, one_step(pipe, noise, mixture), atol=1e-5, rtol=1e-5)


def test_differences_at_full_scale_are_their_sum_and_one_at_scale_zero_is_none(pipe):
    one, two = random_tokens(), random_tokens(num_tokens=3, seed=6)
    torch.testing.assert_close(apply(pipe, difference=[one, two]), apply(pipe, difference=one + two))
    alone = apply(pipe, difference=[one, two], difference_scale=[1, 0])
    torch.testing.assert_close(alone, apply(pipe, difference=one))


def test_the_way_back_of_a_difference_without_words_is_by_its_negated_rows(pipe):
    tokens = random_tokens()
    torch.testing.assert_close(apply(pipe, difference=tokens, difference_scale=-1), apply(pipe, difference=-tokens))
    torch.testing.assert_close(apply(pipe, difference=-tokens, difference_scale=-1), apply(pipe, difference=tokens))
    assert (apply(pipe, difference=-tokens) - apply(pipe, difference=tokens)).abs().max() > 0.01


def test_what_was_applied_is_given_back_without_its_scales(pipe):
    one, two = random_tokens(), random_tokens(num_tokens=3, seed=6)
    options = {"image": picture("blue"), "prompt": "a blue cabin", "num_inference_steps": 1}
    out = pipe(**options, difference=[one, two], difference_scale=[1.0, -0.5])
    assert torch.equal(rows_of(out.difference), torch.cat([rows_of(one), rows_of(two)]))


@pytest.mark.parametrize("as_given", [str, lambda path: path])
def test_a_difference_may_be_a_file(pipe, tmp_path, as_given):
    path = random_tokens().save(tmp_path / "difference.safetensors")
    torch.testing.assert_close(apply(pipe, difference=as_given(path)), apply(pipe))


def test_a_textual_inversion_from_elsewhere_may_be_the_difference(pipe, tmp_path):
    save_file({"<cat>": rows_of(random_tokens())}, tmp_path / "cat.safetensors")
    torch.testing.assert_close(apply(pipe, difference=tmp_path / "cat.safetensors"), apply(pipe))


def test_a_difference_of_another_base_of_the_same_size_is_applied_with_a_warning(pipe, pair):
    other = build_pipeline(text_encoder=build_pipeline().text_encoder)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight.mul_(1.5)
    difference = other.invert_difference(**pair, num_optimization_steps=1, lambda_clip=0)
    with logged() as lines:
        apply(pipe, difference=difference)
    assert any("another base model" in line for line in lines)
    with logged() as lines:
        apply(other, difference=difference)
    assert not any("another base model" in line for line in lines)


def test_learning_and_applying_in_one_call_is_learning_and_then_applying(pipe, pair):
    learning = {"num_tokens": 3, "num_optimization_steps": 3}
    query = {"image": picture("blue"), "prompt": "a blue cabin", "num_inference_steps": STEPS, "output_type": "np"}
    steps, generator = [], seeded()
    at_once = analogy(
        pipe,
        **pair | learning | query,
        generator=seeded(),
        callback_on_optimization_step=lambda pipe, step, values: steps.append(step),
    )
    difference = pipe.invert_difference(**pair | learning, generator=generator)
    assert steps == [0, 1, 2]
    assert torch.equal(rows_of(at_once.difference), rows_of(difference))
    applied = pipe(**query, difference=difference, generator=generator)
    np.testing.assert_allclose(at_once.images, applied.images, atol=1e-5)


def test_interrupted_learning_still_gives_a_picture(pipe, pair):
    def interrupt(pipe, step, values):
        pipe._interrupt = True

    steps = []
    out = pipe(
        image=picture("blue"),
        prompt="a blue cabin",
        **pair,
        learning_kwargs={"callback_on_optimization_step": interrupt},
        num_inference_steps=STEPS,
        strength=1.0,
        callback_on_step_end=lambda pipe, step, t, tensors: steps.append(step) or tensors,
    )
    assert len(out.images) == 1
    assert steps == list(range(STEPS))


def test_the_captioner_writes_the_querys_prompt():
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    (caption,) = pipe.caption([picture("blue")])
    torch.testing.assert_close(apply(pipe, prompt=None), apply(pipe, prompt=caption))
    assert (apply(pipe, prompt=None) - apply(pipe, prompt="a castle")).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("prompt", ["", "a red cabin on snow", "a red cabin on snow at night " * 70])
def test_rows_stand_whole_between_the_prompt_and_its_end(pipe, prompt):
    """The last prompt has 490 words; the text encoder's window has 40 tokens."""
    rows = rows_of(random_tokens(num_tokens=5))
    embeddings = pipe.text_encoder.text_model.embeddings if hasattr(pipe.text_encoder, "text_model") else None
    embeddings = embeddings or pipe.text_encoder.embeddings
    with forward_calls(embeddings) as calls:
        embedded(pipe, [prompt], rows)
    window = (calls[0][3] - embeddings.position_embedding.weight).detach()[0]  # what stands at each position
    words = pipe.tokenizer(prompt, add_special_tokens=False).input_ids[: 40 - 2 - 5]
    vocabulary = pipe.text_encoder.get_input_embeddings().weight.detach()
    expected = torch.cat(
        [
            vocabulary[[pipe.tokenizer.bos_token_id, *words]],
            rows,
            vocabulary[[pipe.tokenizer.eos_token_id] * (40 - 1 - len(words) - 5)],
        ]
    )
    torch.testing.assert_close(window, expected, atol=1e-5, rtol=1e-5)


def embeddings_seen(pipe, **options) -> dict[str, torch.Tensor]:
    """What a callback sees of the prompts after the first step."""
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors)
        return {}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    apply(pipe, **options, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    return seen[0]


CASTLE = {"lost_phrases": "cabin\non snow", "gained_phrases": "castle\non grass"}


@pytest.mark.parametrize(
    "options, changed, own",
    [
        ({}, "a blue by day", "a blue by day cabin on snow"),
        ({"prompt": "a Cabin on snow"}, "a", "a cabin on snow"),
        ({"prompt": "cabins on ice"}, "cabins on ice", "cabins on ice cabin on snow"),
        ({"image": None}, "a blue by day", ""),
        ({"replace_phrases": False}, "a blue cabin by day", "a blue cabin by day"),
        ({"difference_scale": 0.5}, "a blue by day", "a blue by day cabin on snow"),
        ({"difference_scale": 0.0}, "a blue cabin by day", "a blue cabin by day"),
    ],
)
def test_a_difference_takes_the_place_of_what_the_prompt_of_the_image_before_said(pipe, options, changed, own):
    """The query itself is described by what will be replaced, where the tokens will stand."""
    tokens = DifferenceTokens(random_tokens().embeddings, dict(CASTLE))
    seen = embeddings_seen(pipe, **{"prompt": "a blue cabin by day", "difference": tokens} | options)
    torch.testing.assert_close(seen["prompt_embeds"], embedded(pipe, [changed], rows_of(tokens)))
    torch.testing.assert_close(seen["negative_prompt_embeds"], embedded(pipe, [own]))


def test_the_log_says_how_a_prompt_is_changed(pipe):
    tokens = DifferenceTokens(random_tokens().embeddings, dict(CASTLE))
    with logged(level=logging.INFO) as lines:
        apply(pipe, difference=tokens, prompt="a blue cabin by day")
    given = "The prompt 'a blue cabin by day' is read as"
    assert f"{given} 'a blue by day cabin on snow' after 0 of 1 changes." in lines
    assert f"{given} 'a blue by day' after 1 of 1 changes." in lines


def test_the_way_back_puts_the_lost_words_in_the_place_of_the_gained_ones(pipe):
    tokens = DifferenceTokens(random_tokens().embeddings, dict(CASTLE))
    for options in ({"difference": tokens, "difference_scale": -1}, {"difference": -tokens}):
        seen = embeddings_seen(pipe, **options, prompt="a blue castle by day")
        torch.testing.assert_close(seen["prompt_embeds"], embedded(pipe, ["a blue by day cabin on snow"]))
        torch.testing.assert_close(seen["negative_prompt_embeds"], embedded(pipe, ["a blue by day castle on grass"]))


def test_a_difference_of_zeros_takes_its_words_out_of_the_prompt_and_adds_nothing(pipe):
    tokens = DifferenceTokens({"<difference>": torch.zeros(1, WIDTH)}, {"lost_phrases": "by day"})
    seen = embeddings_seen(pipe, difference=tokens, prompt="a blue cabin by day")
    torch.testing.assert_close(seen["prompt_embeds"], embedded(pipe, ["a blue cabin"]))
    torch.testing.assert_close(seen["negative_prompt_embeds"], embedded(pipe, ["a blue cabin by day"]))


def test_a_caption_of_500_words_does_not_push_the_difference_out(pipe):
    prompt = " ".join(["cabin", "castle", "snow", "night", "boat"] * 100)
    changed, unchanged = apply(pipe, prompt=prompt), apply(pipe, prompt=prompt, difference_scale=0)
    assert (changed - unchanged).abs().mean() > 0.05


def test_shortening_a_prompt_is_said(pipe):
    long = "a red cabin on snow " * 9 + "at night"
    with logged() as lines:
        apply(pipe, prompt=long)
    assert [
        line
        for line in lines
        if "shortened" in line and line.endswith("'red cabin on snow a red cabin on snow at night'.")
    ]
    with logged() as lines:
        pipe.invert_difference(picture("red"), picture("blue"), long, "a boat", num_optimization_steps=2)
    assert len([line for line in lines if "shortened" in line]) == 1
    with logged() as lines:
        apply(pipe, prompt="a red cabin on snow", negative_prompt=long)
    assert len([line for line in lines if "shortened" in line]) == 1
    with logged() as lines:
        apply(pipe, prompt="a red cabin on snow")
    assert not any("shortened" in line for line in lines)


def test_prompts_are_encoded_with_the_text_encoder_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    alone = DifferenceInversionPipeline.from_pretrained(tmp_path, unet=None, vae=None, clip=None)
    torch.testing.assert_close(embedded(alone, "a red cabin"), embedded(pipe, "a red cabin"))
    with pytest.raises(ValueError, match="`unet` is missing"):
        apply(alone)


def test_a_prompt_without_rows_is_encoded_as_by_stock_stable_diffusion(pipe):
    prompts = ["a red cabin on snow", "a boat", ""]
    theirs, _ = stock_pipeline().encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(embedded(pipe, prompts), theirs)


def test_each_prompt_of_a_batch_has_its_own_rows(pipe):
    prompts, rows = ["a red cabin on snow", "a boat"], torch.randn(2, 3, WIDTH, generator=seeded())
    alone = [embedded(pipe, [prompt], own) for prompt, own in zip(prompts, rows, strict=True)]
    torch.testing.assert_close(pipe._condition(prompts, rows).prompt_embeds, torch.cat(alone))


# --------------------------------------------------------------------------------------------- what comes out


def test_output_types_are_the_same_picture(pipe):
    pil, array, tensor, latents = (
        pipe(
            image=picture("blue", size=(40, 32)),
            prompt="a blue cabin",
            difference=random_tokens(),
            num_inference_steps=2,
            output_type=output_type,
            generator=seeded(),
        ).images
        for output_type in ("pil", "np", "pt", "latent")
    )
    assert pil[0].size == (40, 32) and pil[0].mode == "RGB"
    assert array.shape == (1, 32, 40, 3)
    assert tensor.shape == (1, 3, 32, 40)
    assert latents.shape == (1, 4, 4, 5)
    assert 0 <= array.min() < array.max() <= 1
    np.testing.assert_allclose(np.asarray(pil[0]) / 255, array[0], atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(tensor, (decoded / 2 + 0.5).clamp(0, 1))


def test_return_dict_false_gives_images_and_difference(pipe):
    options = {"image": picture("blue"), "prompt": "a blue cabin", "num_inference_steps": 2, "output_type": "np"}
    options |= {"difference": random_tokens(), "difference_scale": 0.5}
    out = pipe(**options, generator=seeded())
    images, difference = pipe(**options, generator=seeded(), return_dict=False)
    assert np.array_equal(images, out.images)
    assert torch.equal(rows_of(difference), rows_of(out.difference))
    assert torch.equal(rows_of(difference), rows_of(random_tokens()))


@pytest.mark.parametrize("inversion", ["ddpm", "sdedit"])
def test_the_same_generator_gives_the_same_picture_and_another_seed_another(pipe, inversion):
    first, again, other = (apply(pipe, inversion=inversion, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_ddim_inversion_draws_no_noise(pipe):
    first, other = (apply(pipe, inversion="ddim", generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(first, other)


def test_eta_adds_noise_from_the_generator(pipe):
    options = {"inversion": "ddim", "eta": 1.0}
    first, again, other = (apply(pipe, **options, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_several_queries_are_answered_as_each_alone(pipe):
    queries, prompts = [picture("blue"), picture("white", "black")], ["a blue cabin", "a boat at night"]
    together = apply(pipe, image=queries, prompt=prompts, generator=[seeded(0), seeded(1)])
    alone = [
        apply(pipe, image=query, prompt=prompt, generator=seeded(seed))
        for seed, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_one_prompt_serves_several_queries(pipe):
    queries = [picture("blue"), picture("white", "black")]
    torch.testing.assert_close(
        apply(pipe, image=queries, prompt="a cabin"), apply(pipe, image=queries, prompt=["a cabin", "a cabin"])
    )


def test_queries_of_several_sizes_are_brought_to_the_first_ones(pipe):
    latents = apply(pipe, image=[picture("blue", size=(40, 32)), picture("red", size=(64, 64))])
    assert latents.shape == (2, 4, 4, 5)


@pytest.mark.parametrize("inversion", ["ddpm", "sdedit"])
def test_num_images_per_prompt_draws_each_query_several_times(pipe, inversion):
    options = {"image": [picture("blue"), picture("red")], "inversion": inversion, "num_images_per_prompt": 2}
    latents = apply(pipe, **options, generator=seeded())
    assert latents.shape == (4, 4, 4, 4)
    assert (latents[0] - latents[1]).abs().max() > 0.1
    listed = apply(pipe, **options, generator=[seeded(seed) for seed in (1, 2, 3, 4)])
    alone = apply(pipe, image=picture("red"), inversion=inversion, generator=seeded(3))
    torch.testing.assert_close(listed[2:3], alone, atol=1e-4, rtol=1e-4)


def test_num_images_per_prompt_repeats_the_one_answer_where_no_noise_is_drawn(pipe):
    latents = apply(pipe, image=[picture("blue"), picture("red")], inversion="ddim", num_images_per_prompt=2)
    torch.testing.assert_close(latents[0], latents[1])
    alone = apply(pipe, image=picture("red"), inversion="ddim")
    torch.testing.assert_close(latents[2:3], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inversion", ["ddpm", "ddim", "sdedit"])
def test_less_strength_keeps_more_of_the_query_and_takes_fewer_steps(pipe, inversion):
    query, distances = latents_of(pipe, picture("blue")), []
    for strength, steps in ((0.1, 1), (0.5, 5), (1.0, 10)):
        seen = []
        latents = apply(
            pipe,
            inversion=inversion,
            strength=strength,
            num_inference_steps=10,
            generator=seeded(),
            callback_on_step_end=lambda pipe, step, t, tensors, seen=seen: seen.append(step) or tensors,
        )
        distances.append(float((latents - query).abs().mean()))
        assert len(seen) == steps
    assert distances == sorted(distances)


def test_without_inversion_a_query_gives_its_prompt_and_size_only(pipe):
    options = {"image": picture("blue", size=(40, 32)), "inversion": None}
    first, again, other = (apply(pipe, **options, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first.shape == (1, 4, 4, 5)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    noise = torch.randn(1, 4, 4, 5, generator=seeded(0))
    torch.testing.assert_close(apply(pipe, **options, latents=noise), first)


# ----------------------------------------------------------------------------------------------------- callbacks


def test_the_callback_sees_each_step(pipe):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    apply(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    timesteps = [timestep for _, timestep, _ in seen]
    assert timesteps == sorted(timesteps, reverse=True)
    assert seen[0][2] == {
        "latents": (1, 4, 4, 4),
        "prompt_embeds": (1, 40, WIDTH),
        "negative_prompt_embeds": (1, 40, WIDTH),
    }
    assert pipe.num_timesteps == STEPS


def test_the_callback_sees_latents_alone_unless_told_otherwise(pipe):
    seen = []
    apply(pipe, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(sorted(tensors)) or tensors)
    assert seen == [["latents"]] * STEPS


def test_the_callback_can_replace_latents(pipe):
    def clear_at_the_end(pipe, step, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert not apply(pipe, callback_on_step_end=clear_at_the_end).any()


def test_the_callback_can_replace_prompt_embeddings(pipe):
    def drop_the_difference(pipe, step, t, tensors):
        return {"prompt_embeds": tensors["negative_prompt_embeds"]}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    after_one_step = apply(
        pipe, callback_on_step_end=drop_the_difference, callback_on_step_end_tensor_inputs=names, guidance_scale=3.0
    )
    undisturbed, unchanged = apply(pipe, guidance_scale=3.0), apply(pipe, difference_scale=0)
    assert (after_one_step - undisturbed).abs().max() > 0.01
    assert (after_one_step - unchanged).abs().mean() < (undisturbed - unchanged).abs().mean()


def test_diffusers_own_callback_ends_guidance_and_not_the_difference(pipe):
    """Guided until it ends, and after that drawn by the prompt with the difference alone."""

    def end_guidance(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
        return {}

    theirs = apply(pipe, guidance_scale=2.0, callback_on_step_end=SDCFGCutoffCallback(None, 2))
    torch.testing.assert_close(theirs, apply(pipe, guidance_scale=2.0, callback_on_step_end=end_guidance))


def test_the_callback_can_stop_the_drawing(pipe):
    seen = []

    def stop(pipe, step, t, tensors):
        seen.append(step)
        pipe._interrupt = step == 2
        return tensors

    assert apply(pipe, callback_on_step_end=stop).shape == (1, 4, 4, 4)
    assert seen == [0, 1, 2]


# ----------------------------------------------------------------------------------------- schedulers, text to image


SCHEDULERS = {
    "pndm": PNDMScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler, linspace": functools.partial(EulerDiscreteScheduler.from_config, timestep_spacing="linspace"),
    "euler, trailing": functools.partial(EulerDiscreteScheduler.from_config, timestep_spacing="trailing"),
    "euler ancestral": EulerAncestralDiscreteScheduler.from_config,
    "ddpm": DDPMScheduler.from_config,
}


def scheduler_state(scheduler) -> dict:
    return {name: repr(value) for name, value in vars(scheduler).items()}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_query_is_answered_whatever_the_scheduler_and_leaves_it_as_it_was(pipe, make):
    expected = apply(pipe)
    pipe.scheduler = make(pipe.scheduler.config)
    scheduler, state = pipe.scheduler, scheduler_state(pipe.scheduler)
    latents = apply(pipe)
    assert latents.shape == expected.shape and torch.isfinite(latents).all()
    assert pipe.scheduler is scheduler
    assert scheduler_state(scheduler) == state
    if scheduler.config.timestep_spacing == "leading":  # the spacing of the scheduler that it replaces
        torch.testing.assert_close(latents, expected)


def distance_of_a_round_trip(pipe, **options) -> float:
    """How far a query comes back from itself, relatively, through a model that predicts little noise.

    Such a model is inverted nearly exactly, if the ways up and down go by the same time steps.
    """
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.05)
    query = latents_of(pipe, picture("blue"))
    back = apply(pipe, difference_scale=0, num_inference_steps=50, **options)
    return float((back - query).abs().mean() / query.abs().mean())


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_query_is_taken_up_and_down_the_same_way_whatever_the_scheduler(pipe, make):
    pipe.scheduler = make(pipe.scheduler.config)
    assert distance_of_a_round_trip(pipe) < 0.05


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.77])
def test_a_query_taken_part_of_the_way_comes_back_by_it(pipe, strength):
    assert distance_of_a_round_trip(pipe, strength=strength) < 0.02


@pytest.mark.parametrize("make", [DDIMScheduler.from_config, *SCHEDULERS.values()], ids=["ddim", *SCHEDULERS])
def test_text_to_image_is_stock_stable_diffusion_with_the_difference_as_textual_inversion(pipe, make, tmp_path):
    path = random_tokens().save(tmp_path / "difference.safetensors")
    pipe.scheduler = make(pipe.scheduler.config)
    stock = stock_pipeline(scheduler=make(pipe.scheduler.config))
    stock.load_textual_inversion(str(path))
    state = scheduler_state(pipe.scheduler)
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "latents": noise, "output_type": "latent"}
    theirs = stock("a blue cabin <difference>", generator=seeded(1), **options).images
    ours = pipe(prompt="a blue cabin", difference=path, generator=seeded(1), **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert scheduler_state(pipe.scheduler) == state


@pytest.mark.parametrize("make", [DDIMScheduler.from_config, *SCHEDULERS.values()], ids=["ddim", *SCHEDULERS])
def test_text_to_image_is_repeatable_by_its_generator(pipe, make):
    pipe.scheduler = make(pipe.scheduler.config)
    first, again, other = (draw(pipe, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_text_to_image_has_the_models_size_unless_told_otherwise(pipe):
    assert pipe(prompt="a cabin", difference=random_tokens(), num_inference_steps=1).images[0].size == (SIDE, SIDE)
    assert draw(pipe, height=24, width=48).shape == (1, 4, 3, 6)


def test_a_unet_may_have_two_sides_or_none(pipe):
    pipe.unet.register_to_config(sample_size=[4, 6])
    assert draw(pipe).shape == (1, 4, 4, 6)
    pipe.unet.register_to_config(sample_size=None)
    assert draw(pipe, height=24, width=48).shape == (1, 4, 3, 6)
    assert apply(pipe).shape[-2:] == (4, 4)  # as the query is
    with pytest.raises(ValueError, match="`height` and `width` are needed"):
        draw(pipe, width=48)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"learning_kwargs": {"num_tokens": -5}}, ValueError, "`num_tokens`.*-5"),
        ({"learning_kwargs": {"init": "nonsense"}}, ValueError, "`init`.*'nonsense'"),
        ({"learning_kwargs": {"alpha": float("nan")}}, ValueError, "`alpha`.*nan"),
        ({"learning_kwargs": {"num_token": 4}}, ValueError, "`learning_kwargs`.*'num_token'.*'num_tokens'"),
        ({"learning_kwargs": LearningConfig()}, TypeError, "`learning_kwargs`.*dictionary.*LearningConfig"),
        ({"generator": 3}, TypeError, "`generator`.*3"),
        ({"generator": [3]}, TypeError, "`generator`.*3"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_not_needed_too(pipe, bad, error, message):
    with forward_calls(*models_of(pipe)) as calls, pytest.raises(error, match=message):
        apply(pipe, **bad)
    assert not calls


def test_text_to_image_draws_several_prompts_several_times(pipe):
    prompts = ["a cabin", "a boat at night"]
    latents = draw(pipe, prompt=prompts, num_images_per_prompt=2, generator=seeded())
    assert latents.shape == (4, 4, 4, 4)
    noise = torch.randn(4, 4, 4, 4, generator=seeded())
    alone = draw(pipe, prompt="a boat at night", latents=noise[2:3])
    torch.testing.assert_close(latents[2:3], alone, atol=1e-4, rtol=1e-4)


def test_text_to_image_is_guided_away_from_the_empty_prompt(pipe):
    empty = draw(pipe, generator=seeded(), negative_prompt="")
    torch.testing.assert_close(draw(pipe, generator=seeded()), empty)
    assert (draw(pipe, generator=seeded(), negative_prompt="a castle") - empty).abs().max() > 0.01


def test_a_negative_difference_is_what_guidance_leads_away_from(pipe):
    """Away from the change to the other side: the other way round it is the change itself, led away from nothing."""
    zero, tokens = random_tokens(scale=0.0), random_tokens()
    towards, away = (
        draw(pipe, difference=first, negative_difference=second, negative_prompt="a blue cabin", guidance_scale=scale)
        for first, second, scale in ((tokens, zero, 3.0), (zero, tokens, -2.0))
    )
    torch.testing.assert_close(towards, away, atol=1e-4, rtol=1e-4)
    assert (towards - draw(pipe, difference=zero, guidance_scale=3.0)).abs().max() > 1e-2


def test_a_negative_difference_needs_no_other(pipe):
    options = {"negative_difference": random_tokens(), "guidance_scale": 3.0}
    alone, beside = draw(pipe, difference=None, **options), draw(pipe, difference=random_tokens(scale=0.0), **options)
    assert alone.isfinite().all() and beside.isfinite().all()
    assert (alone - draw(pipe, difference=random_tokens(scale=0.0), guidance_scale=3.0)).abs().max() > 1e-2


def test_a_negative_difference_without_guidance_is_said_to_do_nothing(pipe):
    with logged() as lines:
        apply(pipe, negative_difference=random_tokens(), guidance_scale=1.0)
    assert any("`negative_difference` has no effect" in line for line in lines)


def test_it_is_said_that_settings_of_learning_have_no_effect_without_a_pair(pipe):
    with logged() as lines:
        apply(pipe, learning_kwargs={"num_tokens": 2})
    assert any("`learning_kwargs` has no effect" in line for line in lines)


def test_a_preview_while_learning_leaves_the_calls_own_guidance(pipe, pair):
    def preview(pipe, step, values):
        apply(pipe, guidance_scale=1.0)

    query = {"image": picture("blue"), "prompt": "a blue cabin", "num_inference_steps": 2, "output_type": "latent"}
    options = {**pair, **query, "num_optimization_steps": 2, "guidance_scale": 3.0}
    expected, previewed = (
        analogy(pipe, **options, callback_on_optimization_step=callback, generator=seeded()).images
        for callback in (None, preview)
    )
    assert torch.equal(expected, previewed)


def test_text_to_image_may_learn_its_difference_in_the_same_call(pipe, pair):
    out = analogy(
        pipe, prompt="a blue cabin", **pair, num_optimization_steps=4, num_inference_steps=2, generator=seeded()
    )
    assert out.images[0].size == (SIDE, SIDE)
    assert rows_of(out.difference).any()


# ---------------------------------------------------------------------------------------------------------- masks


def half_mask(left: int = 0, right: int = 255) -> np.ndarray:
    """Two halves, as grey values."""
    mask = np.full((SIDE, SIDE), right, dtype=np.uint8)
    mask[:, : SIDE // 2] = left
    return mask


def pixels(pipe, **options) -> np.ndarray:
    return np.asarray(apply(pipe, output_type="pil", difference=random_tokens(scale=2.0), **options)[0], dtype=int)


@pytest.mark.parametrize("inversion", ["ddpm", "ddim", "sdedit"])
def test_black_of_a_mask_stays_as_it_was_to_the_pixel_and_white_changes(pipe, inversion):
    before = np.asarray(picture("blue"), dtype=int)
    after = pixels(pipe, mask_image=Image.fromarray(half_mask()), inversion=inversion)
    assert (after[:, : SIDE // 2] == before[:, : SIDE // 2]).all()
    assert np.abs(after - before)[:, SIDE // 2 :].max() > 10


def test_a_white_mask_is_none(pipe):
    assert (pixels(pipe, mask_image=Image.new("L", (SIDE, SIDE), 255)) == pixels(pipe)).all()


def test_a_mask_acts_while_drawing_and_not_only_on_the_pixels(pipe):
    latents = apply(pipe, mask_image=Image.fromarray(half_mask()))
    own = latents_of(pipe, picture("blue"))
    torch.testing.assert_close(latents[..., : SIDE // 16], own[..., : SIDE // 16])
    assert (latents - own)[..., SIDE // 16 :].abs().max() > 1e-2


MASKS = {
    "RGB": lambda: Image.fromarray(half_mask()).convert("RGB"),
    "1": lambda: Image.fromarray(half_mask()).convert("1"),
    "P": lambda: Image.fromarray(half_mask()).convert("P"),
    "greys on either side of the middle": lambda: Image.fromarray(half_mask(100, 150)),
    "another size": lambda: Image.fromarray(half_mask()).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST),
    "truths": lambda: half_mask() > 0,
    "bytes": half_mask,
    "numbers": lambda: (half_mask() > 0).astype(np.float32),
    "a tensor": lambda: torch.from_numpy(half_mask() > 0),
    "a tensor with a channel": lambda: torch.from_numpy(half_mask() > 0)[None].float(),
    "a list": lambda: [Image.fromarray(half_mask())],
    "a stack": lambda: half_mask()[None, None],
    "bytes of 0 and 1": lambda: (half_mask() > 0).astype(np.uint8),
    "whole numbers of 0 to 255": lambda: half_mask().astype(np.int64),
    "one with transparency": lambda: np.stack([np.full((SIDE, SIDE), 255, np.uint8)] * 3 + [half_mask()], axis=-1),
    "a view": lambda: half_mask(255, 0)[:, ::-1],
    "F": lambda: Image.fromarray((half_mask() > 0).astype(np.float32)),
    "white on nothing": lambda: Image.merge("LA", [Image.new("L", (SIDE, SIDE), 255), Image.fromarray(half_mask())]),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_masks_may_be_of_any_kind(pipe, make):
    assert (pixels(pipe, mask_image=make()) == pixels(pipe, mask_image=Image.fromarray(half_mask()))).all()


@pytest.mark.parametrize("stacked", [False, True])
def test_each_query_may_have_its_own_mask(pipe, stacked):
    masks = [Image.fromarray(half_mask()), Image.fromarray(half_mask(255, 0))]
    if stacked:
        masks = np.stack([np.asarray(mask) for mask in masks])
    query = np.asarray(picture("blue"), dtype=int)
    options = {"image": [picture("blue")] * 2, "num_images_per_prompt": 2, "output_type": "pil"}
    answers = [np.asarray(answer, dtype=int) for answer in apply(pipe, **options, mask_image=masks)]
    kept = [(answer == query).all(axis=(0, 2)) for answer in answers]
    assert all(columns[: SIDE // 2].all() and not columns[SIDE // 2 :].all() for columns in kept[:2])
    assert all(columns[SIDE // 2 :].all() and not columns[: SIDE // 2].all() for columns in kept[2:])


def test_a_stack_of_three_masks_is_one_for_each_of_three_queries(pipe):
    masks = torch.zeros(3, SIDE, SIDE)
    for index in range(3):
        masks[index, :, 8 * index : 8 * index + 8] = 1
    answers = apply(pipe, image=[picture("blue")] * 3, mask_image=masks, output_type="pil")
    listed = apply(pipe, image=[picture("blue")] * 3, mask_image=list(masks), output_type="pil")
    for answer, other in zip(answers, listed, strict=True):
        assert (np.asarray(answer) == np.asarray(other)).all()
        assert (np.asarray(answer) != np.asarray(picture("blue"))).any()


def test_an_automatic_mask_keeps_all_of_a_query_that_nothing_changes(pipe):
    options = {"mask_image": "auto", "output_type": "pil"}
    (unchanged,) = apply(pipe, difference=random_tokens(scale=0.0), **options)
    assert (np.asarray(unchanged) == np.asarray(picture("blue"))).all()
    (changed,) = apply(pipe, difference=random_tokens(scale=2.0), **options)
    assert (np.asarray(changed) != np.asarray(picture("blue"))).any()


# ------------------------------------------------------------------------------------------------ kinds of images


def rounded(image: Image.Image) -> Image.Image:
    """The picture with a transparent frame of which half is half transparent."""
    image = image.convert("RGBA")
    alpha = np.full((image.height, image.width), 255, dtype=np.uint8)
    alpha[:4], alpha[4:8] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image


def on_white(image: Image.Image) -> Image.Image:
    image = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = image[..., 3:] / 255
    return Image.fromarray(np.round(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))


def reopened(image: Image.Image, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    file.seek(0)
    return Image.open(file)


def few_colors(size=(SIDE, SIDE)) -> Image.Image:
    return picture("blue", size=size).quantize(4)


def turned_by_exif() -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right
    return reopened(picture("blue", size=(48, 32)).transpose(Image.Transpose.ROTATE_90), exif=exif)


KINDS = {
    "RGBA": lambda: (rounded(picture("blue")), on_white(rounded(picture("blue")))),
    "LA": lambda: (rounded(picture("blue")).convert("LA"), on_white(rounded(picture("blue")).convert("LA"))),
    "P": lambda: (few_colors(), few_colors().convert("RGB")),
    "P with a transparent colour": lambda: (
        reopened(few_colors(), transparency=0),
        on_white(reopened(few_colors(), transparency=0)),
    ),
    "RGB with a transparent colour": lambda: (
        reopened(picture("blue"), transparency=(0, 0, 255)),
        picture("white"),
    ),
    "L": lambda: (picture("blue").convert("L"), picture("blue").convert("L").convert("RGB")),
    "1": lambda: (picture("white").convert("1"), picture("white").convert("1").convert("RGB")),
    "CMYK": lambda: (picture("blue").convert("CMYK"), picture("blue")),
    "turned by EXIF": lambda: (turned_by_exif(), picture("blue", size=(48, 32))),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_images_of_every_kind_are_taken_upright_in_colour_and_on_white(pipe, make):
    image, expected = make()
    torch.testing.assert_close(apply(pipe, image=image), apply(pipe, image=expected), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_learning_takes_images_of_every_kind_likewise(pipe, pair, make):
    image, expected = make()
    with forward_calls(pipe.vae.encoder) as calls:
        pipe.invert_difference(**pair | {"before": image, "after": image}, num_optimization_steps=1)
    seen = torch.cat([arguments[0] for _, arguments, _, _, _ in calls])
    assert len(seen) == 2
    expected = pipe.image_processor.preprocess(expected).expand(2, -1, -1, -1)
    torch.testing.assert_close(seen, expected, atol=4 / 255, rtol=0)


@pytest.mark.parametrize(
    "kind, factor, mode",
    [(np.uint16, 257, "I;16"), (np.int32, 257, "I"), (np.int32, 1, "I"), (np.float32, 1 / 255, "F")],
)
def test_grey_images_may_have_more_than_8_bits(pipe, kind, factor, mode):
    grey = picture("blue").convert("L")
    deep = Image.fromarray((np.asarray(grey, dtype=np.float64) * factor).astype(kind))
    assert deep.mode == mode
    torch.testing.assert_close(apply(pipe, image=deep), apply(pipe, image=grey), atol=0.02, rtol=0.02)


def test_a_dark_16_bit_picture_stays_dark(pipe):
    dark = Image.fromarray(np.full((SIDE, SIDE), 200, dtype=np.uint16))
    black = Image.new("L", (SIDE, SIDE), 200 // 257)
    torch.testing.assert_close(apply(pipe, image=dark), apply(pipe, image=black), atol=0.02, rtol=0.02)


def test_floating_point_images_beyond_1_are_refused(pipe):
    with pytest.raises(ValueError, match="`image` has values from 255 to 255.*from 0 to 1"):
        apply(pipe, image=Image.fromarray(np.full((32, 32), 255, dtype=np.float32)))


ARRAYS = {
    "bytes": lambda image: np.asarray(image),
    "batch of bytes": lambda image: np.asarray(image)[None],
    "tensor of bytes": lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    "whole numbers": lambda image: np.asarray(image).astype(np.int64),
    "tensor of whole numbers": lambda image: torch.from_numpy(np.asarray(image).astype(np.int64)).permute(2, 0, 1),
    "floats": lambda image: np.asarray(image, dtype=np.float32) / 255,
    "batch of floats": lambda image: np.asarray(image, dtype=np.float32)[None] / 255,
    "tensor": lambda image: torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1),
    "batch of tensors": lambda image: torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)[None],
    "list of tensors": lambda image: [torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)],
}


@pytest.mark.parametrize("convert", ARRAYS.values(), ids=ARRAYS)
def test_arrays_and_tensors_are_images_too(pipe, convert):
    image = picture("blue", size=(48, 32))
    torch.testing.assert_close(apply(pipe, image=convert(image)), apply(pipe, image=image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("convert", ARRAYS.values(), ids=ARRAYS)
def test_learning_takes_arrays_and_tensors_and_captions_them(convert):
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    options = {"num_optimization_steps": 1, "generator": seeded()}
    before, after = picture("red", size=(48, 32)), picture("yellow", size=(48, 32))
    difference = pipe.invert_difference(before=convert(before), after=convert(after), **options)
    assert difference.metadata["before_prompt"] == pipe.caption([before])[0]


def test_sizes_that_are_no_whole_latents_are_resized_and_it_is_said(pipe):
    query = picture("blue", size=(45, 37))
    with logged() as lines:
        latents = apply(pipe, image=query)
    assert latents.shape == (1, 4, 4, 5)
    assert any("`image`" in line and "resized" in line and "32×40" in line for line in lines)
    resized = query.resize((40, 32), Image.Resampling.LANCZOS)
    torch.testing.assert_close(latents, apply(pipe, image=resized), atol=1e-4, rtol=1e-4)
    with logged() as lines:
        apply(pipe, image=resized)
    assert not any("resized" in line for line in lines)


def test_height_and_width_resize_the_query(pipe):
    assert apply(pipe, height=48, width=24).shape == (1, 4, 6, 3)
    out = pipe(
        image=picture("blue"), prompt="a", difference=random_tokens(), height=50, width=27, num_inference_steps=1
    )
    assert out.images[0].size == (24, 48)


# ----------------------------------------------------------------------------------------------------- bad input


def wide_tokens() -> DifferenceTokens:
    return random_tokens(width=WIDTH + 1)


BAD_APPLYING = {
    "no image and no prompt": ({"image": None, "prompt": None}, ValueError, "`image`.*`prompt`"),
    "a path as image": ({"image": "query.png"}, TypeError, "`image`.*str.*load_image"),
    "a list with a hole": ({"image": [picture(), None]}, TypeError, "`image`.*NoneType"),
    "no images in the list": ({"image": []}, ValueError, "`image`"),
    "an image of a few pixels": ({"image": picture(size=(7, 40))}, ValueError, "`image`.*8 pixels"),
    "no prompt and no captioner": ({"prompt": None}, ValueError, "`prompt`.*`captioner`"),
    "a number as prompt": ({"prompt": 3}, TypeError, "`prompt`"),
    "three prompts for one image": ({"prompt": ["a", "b", "c"]}, ValueError, "`prompt`.*3"),
    "no prompts in the list": ({"prompt": []}, ValueError, "`prompt`"),
    "two negative prompts for one image": ({"negative_prompt": ["a", "b"]}, ValueError, "`negative_prompt`.*2"),
    "neither difference nor pair": ({"difference": None}, ValueError, "`difference`.*`before`.*`after`"),
    "before without after": ({"difference": None, "before": picture()}, ValueError, "`after`"),
    "after without before": ({"difference": None, "after": picture()}, ValueError, "`before`"),
    "difference and pair": ({"before": picture(), "after": picture()}, ValueError, "`difference`"),
    "no differences in the list": ({"difference": []}, ValueError, "`difference`.*empty"),
    "a missing file": ({"difference": "nowhere.safetensors"}, FileNotFoundError, "`difference`.*nowhere"),
    "a file that is none": ({"difference": PIPELINE_FILE}, ValueError, "`difference`.*not a safetensors file"),
    "a number as difference": ({"difference": 3.0}, TypeError, "`difference`.*float"),
    "a bare tensor as difference": ({"difference": torch.zeros(2, WIDTH)}, TypeError, "`difference`.*Tensor"),
    "a difference of another width": (
        {"difference": wide_tokens()},
        ValueError,
        f"`difference`.*size {WIDTH + 1}.*{WIDTH}",
    ),
    "a difference that is not finite": ({"difference": random_tokens() * float("nan")}, ValueError, "`difference`"),
    "a difference for two encoders": (
        {"difference": DifferenceTokens({"clip_l": torch.zeros(2, WIDTH), "clip_g": torch.zeros(2, WIDTH)})},
        ValueError,
        "`difference`.*clip_l, clip_g",
    ),
    "a negative difference that does not fit": (
        {"negative_difference": random_tokens(width=8)},
        ValueError,
        "`negative_difference`.*size 8",
    ),
    "a negative difference that is nowhere": (
        {"negative_difference": "nowhere.safetensors"},
        FileNotFoundError,
        "`negative_difference`.*nowhere",
    ),
    "no prompt of no image": ({"image": None, "prompt": []}, ValueError, "`prompt`.*empty"),
    "a negative difference that is none": ({"negative_difference": 3}, TypeError, "`negative_difference`.*int"),
    "more rows than fit": ({"difference": random_tokens(num_tokens=39)}, ValueError, "`difference`.*39.*38"),
    "two scales for one difference": ({"difference_scale": [1.0, 2.0]}, ValueError, "`difference_scale`.*2"),
    "an array that is channels first": (
        {"image": np.zeros((3, SIDE, SIDE), np.uint8)},
        ValueError,
        r"`image`.*\(3, 32, 32\).*, 3\)",
    ),
    "an image of two channels": ({"image": torch.zeros(2, SIDE, SIDE)}, ValueError, r"`image`.*\(2, 32, 32\).*\(3, "),
    "an array of four channels": ({"image": np.zeros((SIDE, SIDE, 4))}, ValueError, r"`image`.*\(32, 32, 4\).*, 3\)"),
    "a mask of no image": ({"image": None, "mask_image": "auto"}, ValueError, "`mask_image`.*`image`"),
    "a mask without inversion": ({"inversion": None, "mask_image": "auto"}, ValueError, "`mask_image`.*`inversion`"),
    "an unknown mask": ({"mask_image": "mask.png"}, ValueError, "`mask_image`.*mask.png.*auto"),
    "a mask that is no image": ({"mask_image": 3}, TypeError, "`mask_image`.*int"),
    "two masks for one image": ({"mask_image": [picture(), picture()]}, ValueError, "`mask_image`.*2 masks.*1"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "`num_inference_steps`.*0"),
    "too many steps": ({"num_inference_steps": 1000}, ValueError, "`num_inference_steps`.*1000"),
    "half a step": ({"num_inference_steps": 2.5}, ValueError, "`num_inference_steps`.*2.5.*whole"),
    "a scale that is no number": ({"difference_scale": float("nan")}, ValueError, "`difference_scale`.*nan.*finite"),
    "no scale": ({"difference_scale": None}, ValueError, "`difference_scale`.*None.*finite"),
    "guidance without end": ({"guidance_scale": float("inf")}, ValueError, "`guidance_scale`.*inf.*finite"),
    "next to no noise for ddpm": ({"eta": 1e-4}, ValueError, "`eta` is 0.0001.*at least 0.01"),
    "an array of 16 bits": (
        {"image": np.full((SIDE, SIDE, 3), 30000, np.uint16)},
        ValueError,
        "`image`.* to 30000.*whole numbers.*from 0 to 255",
    ),
    "a tensor of 16 bits": (
        {"image": torch.full((3, SIDE, SIDE), 256, dtype=torch.uint16)},
        ValueError,
        "`image`.* to 256.*whole numbers.*from 0 to 255",
    ),
    "an array of 0.0 to 255.0": (
        {"image": np.full((SIDE, SIDE, 3), 255.0)},
        ValueError,
        "`image`.* to 255.*from 0 to 1",
    ),
    "a negative difference that is not finite": (
        {"negative_difference": random_tokens() * float("nan")},
        ValueError,
        "`negative_difference`.*not finite",
    ),
    "an unknown output_type": ({"output_type": "jpeg"}, ValueError, "`output_type`.*jpeg.*pil"),
    "a source_prompt of no image": ({"image": None, "source_prompt": "a"}, ValueError, "`source_prompt`.*`image`"),
    "an unknown inversion": ({"inversion": "magic"}, ValueError, "`inversion`.*magic.*ddim"),
    "no noise for ddpm": ({"eta": 0.0}, ValueError, '`eta` is 0.*`inversion="ddim"`'),
    "no strength": ({"strength": 0.0}, ValueError, "`strength`"),
    "too much strength": ({"strength": 1.5}, ValueError, "`strength`.*1.5"),
    "eta above 1": ({"eta": 2.0}, ValueError, "`eta`.*2"),
    "a negative eta": ({"eta": -0.5}, ValueError, "`eta`.*-0.5"),
    "two source prompts for one image": ({"source_prompt": ["a", "b"]}, ValueError, "`source_prompt`.*2"),
    "no images of a prompt": ({"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt`"),
    "a small height": ({"height": 7}, ValueError, "`height`.*7"),
    "a small width": ({"width": 0}, ValueError, "`width`.*0"),
    "two generators for one image": ({"generator": [seeded(), seeded()]}, ValueError, "`generator`.*2"),
    "latents and inversion": ({"latents": torch.zeros(1, 4, 4, 4)}, ValueError, "`latents`.*`inversion"),
    "latents of another shape": (
        {"image": None, "latents": torch.zeros(1, 4, 5, 4)},
        ValueError,
        r"`latents`.*\(1, 4, 5, 4\).*\(1, 4, 4, 4\)",
    ),
    "a callback that wants what there is not": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        ValueError,
        "`callback_on_step_end_tensor_inputs`.*noise.*latents",
    ),
}


@pytest.mark.parametrize("bad, error, message", BAD_APPLYING.values(), ids=BAD_APPLYING)
def test_what_cannot_be_applied_is_refused_by_name_before_any_model_runs(pipe, bad, error, message):
    good = {"image": picture("blue"), "prompt": "a blue cabin", "difference": random_tokens()}
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(error, match=message):
            pipe(**good | {"num_inference_steps": 2} | bad)
        assert not calls
        pipe(**good, num_inference_steps=2)
        assert calls


BAD_LEARNING = {
    "no before": ({"before": None}, ValueError, "`before`"),
    "no after": ({"after": None}, ValueError, "`after`"),
    "no pairs in the lists": ({"before": [], "after": []}, ValueError, "`before`"),
    "two befores and one after": ({"before": [picture(), picture()]}, ValueError, "`before`.*2.*`after`.*1"),
    "a path as before": ({"before": "before.png"}, TypeError, "`before`.*str"),
    "a number as after": ({"after": [3]}, TypeError, "`after`.*int"),
    "a before of a few pixels": ({"before": picture(size=(40, 5))}, ValueError, "`before`.*8 pixels"),
    "no before_prompt and no captioner": ({"before_prompt": None}, ValueError, "`before_prompt`.*`captioner`"),
    "no after_prompt and no captioner": ({"after_prompt": None}, ValueError, "`after_prompt`.*`captioner`"),
    "two prompts for one pair": ({"after_prompt": ["a", "b"]}, ValueError, "`after_prompt`.*2"),
    "a number as prompt": ({"before_prompt": 3}, TypeError, "`before_prompt`"),
    "alpha below 0": ({"alpha": -0.1}, ValueError, "`alpha`.*-0.1"),
    "alpha above 1": ({"alpha": 1.1}, ValueError, "`alpha`.*1.1"),
    "alpha that is no number": ({"alpha": float("nan")}, ValueError, "`alpha`"),
    "a negative lambda_clip": ({"lambda_clip": -1.0}, ValueError, "`lambda_clip`.*-1"),
    "a negative lambda_before": ({"lambda_before": -1.0}, ValueError, "`lambda_before`.*-1"),
    "a negative lambda_tc": ({"lambda_tc": -1.0}, ValueError, "`lambda_tc`.*-1"),
    "no loss at all": ({"lambda_clip": 0.0, "lambda_tc": 0.0}, ValueError, "`lambda_clip`.*`lambda_tc`"),
    "fewer than no steps": ({"num_optimization_steps": -1}, ValueError, "`num_optimization_steps`.*-1.*at least 0"),
    "steps in floating point": ({"num_optimization_steps": 1e1}, ValueError, "`num_optimization_steps`.*10.0.*whole"),
    "tokens in floating point": ({"num_tokens": 4.0}, ValueError, "`num_tokens`.*4.0.*whole"),
    "a weight that is no number": ({"lambda_clip": float("nan")}, ValueError, "`lambda_clip`.*nan.*finite"),
    "a rate that is no number": ({"learning_rate": float("nan")}, ValueError, "`learning_rate`.*nan.*finite"),
    "no tokens": ({"num_tokens": 0}, ValueError, "`num_tokens`.*0"),
    "more tokens than fit": ({"num_tokens": 39}, ValueError, "`num_tokens`.*39.*38"),
    "no learning rate": ({"learning_rate": 0.0}, ValueError, "`learning_rate`"),
    "an unknown projection": ({"projection": "medium"}, ValueError, "`projection`.*medium.*hard"),
    "an unknown init": ({"init": "ones"}, ValueError, "`init`.*ones.*words.*zeros"),
    "an unknown objective": ({"objective": "fun"}, ValueError, "`objective`.*fun.*contrast.*consistency"),
    "a negative lambda_contrast": ({"lambda_contrast": -1.0}, ValueError, "`lambda_contrast`.*-1"),
}
BAD_LEARNING_ALONE = {
    "no samples": ({"num_samples_per_step": 0}, ValueError, "`num_samples_per_step`.*0"),
    "a small height": ({"height": 7}, ValueError, "`height`.*7"),
    "a small width": ({"width": 7}, ValueError, "`width`.*7"),
}


@pytest.mark.parametrize(
    "bad, error, message",
    [*BAD_LEARNING.values(), *BAD_LEARNING_ALONE.values()],
    ids=[*BAD_LEARNING, *BAD_LEARNING_ALONE],
)
def test_what_cannot_be_learned_is_refused_by_name_before_any_model_runs(pipe, pair, bad, error, message):
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(error, match=message):
            pipe.invert_difference(**pair | {"num_optimization_steps": 1} | bad)
        assert not calls


def test_learning_where_gradients_are_forbidden_is_refused_and_applying_is_not(pipe, pair):
    with torch.inference_mode():
        with forward_calls(*models_of(pipe)) as calls, pytest.raises(ValueError, match="`before`.*inference_mode"):
            pipe.invert_difference(**pair)
        assert not calls
        assert apply(pipe).isfinite().all()


def test_hard_prompts_where_gradients_are_forbidden_are_refused(pipe):
    with torch.inference_mode(), forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(ValueError, match="`images`.*PEZ.*inference_mode"):
            pipe.hard_prompts([picture()])
        assert not calls


def test_a_unet_for_inpainting_is_refused_by_name(pipe, pair):
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    for call in (lambda: apply(pipe), lambda: pipe.invert_difference(**pair)):
        with pytest.raises(ValueError, match="`unet` has 9 input channels.*4.*inpainting"):
            call()


def test_height_and_width_are_the_pairs_size_too(pipe, pair):
    options = {"image": picture("blue"), "prompt": "a", **pair, "num_optimization_steps": 1, "num_inference_steps": 1}
    with forward_calls(pipe.vae.encoder) as calls:
        analogy(pipe, **options, height=24, width=16)
    assert sum(len(arguments[0]) for _, arguments, *_ in calls) >= 3  # before, after and the query
    assert {tuple(arguments[0].shape[-2:]) for _, arguments, *_ in calls} == {(24, 16)}


@pytest.mark.parametrize("bad, error, message", BAD_LEARNING.values(), ids=BAD_LEARNING)
def test_what_cannot_be_learned_is_refused_by_a_call_too(pipe, pair, bad, error, message):
    options = {"image": picture("blue"), "prompt": "a blue cabin", "num_optimization_steps": 1}
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(error, match=message):
            analogy(pipe, **options | pair | bad)
        assert not calls


BAD_APPLYING_OF_ANY_DIFFERENCE = {
    name: case for name, case in BAD_APPLYING.items() if not case[0].keys() & {"difference", "before", "after"}
}


@pytest.mark.parametrize(
    "bad, error, message", BAD_APPLYING_OF_ANY_DIFFERENCE.values(), ids=BAD_APPLYING_OF_ANY_DIFFERENCE
)
def test_what_cannot_be_applied_is_refused_before_a_difference_is_learned_for_it(pipe, pair, bad, error, message):
    options = {"image": picture("blue"), "prompt": "a blue cabin", "num_optimization_steps": 1}
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(error, match=message):
            analogy(pipe, **options | pair | bad)
        assert not calls


@pytest.mark.parametrize("missing", ["clip", "clip_processor"])
def test_learning_without_clip_says_which_one_to_load(pair, missing):
    pipe = build_pipeline(**{missing: None})
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(ValueError, match=f"`{missing}`.*width {WIDTH}.*`lambda_clip=0`"):
            pipe.invert_difference(**pair, num_optimization_steps=1)
        assert not calls
    learned = pipe.invert_difference(**pair, num_optimization_steps=1, lambda_clip=0, generator=seeded())
    assert rows_of(learned).any()


def test_the_clip_of_another_model_is_refused(pair):
    pipe = build_pipeline(clip=build_clip(build_tokenizer(), width=8))
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(ValueError, match="`clip`.*another CLIP"):
            pipe.invert_difference(**pair, num_optimization_steps=1)
        assert not calls


OTHER_SCHEDULERS = {
    "flow_prediction": lambda: DDIMScheduler(prediction_type="flow_prediction"),
    "FlowMatchEuler": FlowMatchEulerDiscreteScheduler,
    "EDMEuler": EDMEulerScheduler,
}


@pytest.mark.parametrize("named, build", OTHER_SCHEDULERS.items(), ids=OTHER_SCHEDULERS)
def test_a_model_that_was_trained_for_something_else_is_refused(pipe, pair, named, build):
    pipe.scheduler = build()
    with forward_calls(*models_of(pipe)) as calls:
        with pytest.raises(ValueError, match=f"`scheduler`.*{named}"):
            pipe.invert_difference(**pair, num_optimization_steps=1)
        with pytest.raises(ValueError, match=f"`scheduler`.*{named}"):
            apply(pipe)
        assert not calls


# -------------------------------------------------------------------------------------------------------- loading


def assert_same_answer(pipe, other) -> None:
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
    # Not bit for bit: a file's weights lie elsewhere in memory, and processors round by that.
    torch.testing.assert_close(apply(pipe), apply(other), atol=1e-3, rtol=1e-3)


def load_by_class(folder, **components):
    return DifferenceInversionPipeline.from_pretrained(folder, **components)


def load_as_custom_pipeline(folder, **components):
    return DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(PIPELINE_FILE), trust_remote_code=True, **components
    )


LOADERS = pytest.mark.parametrize("load", [load_by_class, load_as_custom_pipeline])


@LOADERS
def test_a_saved_pipeline_gives_the_same_picture(tmp_path, load, pair):
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_answer(loaded, pipe)
    assert loaded.caption([picture("blue")]) == pipe.caption([picture("blue")])
    learning = {"num_optimization_steps": 2, "generator": seeded()}
    again = loaded.invert_difference(before=pair["before"], after=pair["after"], **learning)
    learning = {"num_optimization_steps": 2, "generator": seeded()}
    torch.testing.assert_close(
        rows_of(again), rows_of(pipe.invert_difference(before=pair["before"], after=pair["after"], **learning))
    )


@LOADERS
def test_applying_does_without_the_optional_components(tmp_path, load):
    pipe = build_pipeline(clip=None, clip_processor=None)
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.clip is None and loaded.captioner is None
    assert_same_answer(loaded, build_pipeline())


@LOADERS
def test_optional_components_can_be_added_to_a_stock_checkpoint(tmp_path, load, pair):
    stock_pipeline().save_pretrained(tmp_path)
    own = build_components()
    loaded = load(tmp_path, clip=own["clip"], clip_processor=own["clip_processor"])
    assert loaded.clip is own["clip"]
    assert_same_answer(loaded, build_pipeline())
    assert rows_of(loaded.invert_difference(**pair, num_optimization_steps=4, generator=seeded())).any()


@LOADERS
def test_a_component_that_is_given_wins_over_the_folders(tmp_path, load):
    captioner, processor = build_captioner()
    build_pipeline(captioner=captioner, captioner_processor=processor).save_pretrained(tmp_path)
    clip = build_clip(build_tokenizer(), seed=9)
    assert load(tmp_path, clip=clip).clip is clip
    bare = load(tmp_path, clip=None, captioner=None)
    assert bare.clip is None and bare.captioner is None
    assert bare.clip_processor is not None


def test_a_clip_registered_after_loading_replaces_the_folders(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    clip = build_clip(build_tokenizer(), seed=9)
    loaded = load_as_custom_pipeline(tmp_path)
    loaded.register_modules(clip=clip)
    assert loaded.clip is clip


def test_the_tokens_of_a_module_loaded_twice_are_understood(tmp_path, pipe, pair):
    pipe.save_pretrained(tmp_path)
    loaded = load_as_custom_pipeline(tmp_path)
    theirs = loaded.invert_difference(**pair, num_optimization_steps=1, generator=seeded())
    assert not isinstance(theirs, DifferenceTokens)
    ours = DifferenceTokens(dict(theirs.embeddings), dict(theirs.metadata))
    # Not bit for bit, as with any two copies of the weights.
    torch.testing.assert_close(apply(pipe, difference=theirs), apply(loaded, difference=ours), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(apply(pipe, difference=[theirs, ours]), apply(pipe, difference=ours + ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("said", [True, False])
def test_from_pipe_shares_the_weights_of_a_stock_pipeline(dtype, said, pair):
    stock, own = stock_pipeline().to(dtype), build_components()
    options = {"dtype": stock.dtype} if said else {}
    own["clip"].to(dtype)
    pipe = DifferenceInversionPipeline.from_pipe(
        stock, clip=own["clip"], clip_processor=own["clip_processor"], **options
    )
    assert pipe.clip.dtype == dtype
    for name in ("vae", "text_encoder", "unet"):
        assert getattr(pipe, name) is getattr(stock, name)
        assert getattr(stock, name).dtype == dtype
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(apply(pipe)).all()
    assert rows_of(pipe.invert_difference(**pair, num_optimization_steps=4, generator=seeded())).any()


def test_from_pipe_says_what_another_pipeline_lacks(pipe):
    other = DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match=r"DDIMPipeline and has no \['text_encoder', 'tokenizer', 'vae'\]"):
        DifferenceInversionPipeline.from_pipe(other)
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "vae")}
    assert DifferenceInversionPipeline.from_pipe(other, **parts).unet is pipe.unet


def test_prompts_to_encode_are_checked(pipe):
    with pytest.raises(ValueError, match="`negative_prompt` has 3 prompts for 2"):
        pipe.encode_prompt(["a boat", "a tent"], negative_prompt=["a"] * 3)
    with pytest.raises(TypeError, match="`prompt` must be a string"):
        pipe.encode_prompt([3])
    with pytest.raises(ValueError, match="`difference` has 60 tokens"):
        pipe.encode_prompt("a boat", difference=random_tokens(num_tokens=60))
    with logged() as lines:
        pipe.encode_prompt("a boat " * 60)
    assert any("shortened" in line for line in lines)


def test_several_differences_are_encoded_one_after_the_other_and_zeros_not_at_all(pipe):
    one, two = random_tokens(), random_tokens(num_tokens=3, seed=6)
    both = pipe.encode_prompt("a boat", difference=[one, two])[0]
    torch.testing.assert_close(both, embedded(pipe, "a boat", torch.cat([rows_of(one), rows_of(two)])))
    torch.testing.assert_close(pipe.encode_prompt("a boat", difference=0 * one)[0], embedded(pipe, "a boat"))


def test_from_pipe_of_an_offloaded_pipeline_is_offloaded_too(pair):
    stock, own = stock_pipeline(), build_components()
    stock.enable_model_cpu_offload(device="cpu")
    clip = {name: own[name] for name in ("clip", "clip_processor")}
    pipe = DifferenceInversionPipeline.from_pipe(stock, **clip)
    pipe.set_progress_bar_config(disable=True)
    with watched(pipe) as history:
        assert rows_of(pipe.invert_difference(**pair, num_optimization_steps=2, generator=seeded())).any()
        answer = apply(pipe)
    assert max(map(len, history)) == 1
    torch.testing.assert_close(answer, apply(build_pipeline()))
    assert stock("a", num_inference_steps=1).images


def test_from_pipe_of_a_pipeline_whose_layers_are_offloaded_leaves_clip_its_weights():
    stock, own = stock_pipeline(), build_components()
    stock.enable_sequential_cpu_offload(device="cpu")
    DifferenceInversionPipeline.from_pipe(stock, clip=own["clip"], clip_processor=own["clip_processor"])
    assert not any(weight.is_meta for weight in own["clip"].parameters())


def asked_by_pez(pipe, pair: dict, query) -> dict:
    """Arguments of a call whose three prompts are hard prompts."""
    images = [query, pair["before"], pair["after"]]
    prompts = pipe.hard_prompts(images, num_tokens=4, num_steps=2, num_revisions=1, generator=seeded())
    names = ("prompt", "before_prompt", "after_prompt")
    return {"before": images[1], "after": images[2], "image": query, **dict(zip(names, prompts, strict=True))}


def asked_of_captioner(pipe, pair: dict, query) -> dict:
    """Arguments of a call whose three prompts are left to the captioner."""
    return {"before": pair["before"], "after": pair["after"], "image": query}


PROMPTS = {"caption": asked_of_captioner, "pez": asked_by_pez}


@pytest.mark.parametrize("method", PROMPTS)
def test_offloaded_models_take_turns_on_the_device(pair, method):
    """Also the text encoder, CLIP and the UNet while learning goes backwards through them."""
    captioner, processor = build_captioner()
    options = {"num_optimization_steps": 2, "lambda_before": 1.0, "num_inference_steps": STEPS}
    plain, offloaded = (build_pipeline(captioner=captioner, captioner_processor=processor) for _ in range(2))
    ask = PROMPTS[method]
    expected = analogy(plain, **ask(plain, pair, picture("blue")), **options, generator=seeded())
    offloaded.enable_model_cpu_offload(device="cpu")
    with watched(offloaded) as history:
        out = analogy(offloaded, **ask(offloaded, pair, picture("blue")), **options, generator=seeded())
    assert set().union(*history) == {"vae", "text_encoder", "unet", "clip"} | (
        {"captioner"} if method == "caption" else set()
    )
    assert max(map(len, history)) == 1
    torch.testing.assert_close(rows_of(out.difference), rows_of(expected.difference))
    assert out.images[0].tobytes() == expected.images[0].tobytes()


def offload_layers(pipe) -> None:
    """Sequential offloading, on a processor alone: layers wait on "meta" and are brought to "cpu".

    Diffusers says "cpu:0", at which accelerate makes of a parameter something else.
    """
    pipe.enable_sequential_cpu_offload(device="cpu")
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    hooks = [getattr(part, "_hf_hook", None) for model in models for part in model.modules()]
    for hook in hooks:
        for each in getattr(hook, "hooks", [hook]):
            if isinstance(each, AlignDevicesHook):
                each.execution_device = torch.device("cpu")


@pytest.mark.parametrize("method", ["given", "pez"])
def test_layers_that_are_offloaded_one_by_one_learn_and_draw_the_same(pair, method, tmp_path):
    ask = {"pez": asked_by_pez, "given": lambda pipe, pair, query: {"image": query, "prompt": "a", **pair}}[method]
    options = {"num_optimization_steps": 2, "lambda_before": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    plain, offloaded = build_pipeline(), build_pipeline()
    expected = analogy(plain, **ask(plain, pair, picture("blue")), **options, generator=seeded())
    offload_layers(offloaded)
    offloaded.unet.conv_in.requires_grad_(False)
    wanted = {name: weight.requires_grad for name, weight in offloaded.unet.named_parameters()}
    out = analogy(offloaded, **ask(offloaded, pair, picture("blue")), **options, generator=seeded())
    assert {name: weight.requires_grad for name, weight in offloaded.unet.named_parameters()} == wanted
    weights = [offloaded.unet.conv_in.weight, offloaded.text_encoder.get_input_embeddings().weight]
    assert all(weight.is_meta for weight in weights)
    torch.testing.assert_close(rows_of(out.difference), rows_of(expected.difference))
    torch.testing.assert_close(out.images, expected.images)
    saved = offloaded.load_difference(expected.difference.save(tmp_path / "difference"))
    assert saved.metadata == expected.difference.metadata


@pytest.fixture
def forgetful_groups(monkeypatch):
    """Group offloading as between two devices: weights that are away are no numbers, and what holds them finds none.

    But for token embeddings, whose rows may be read wherever they are: tests put these into the set.
    """
    real, readable = {}, set()

    def weights(group):
        found = [weight for module in group.modules for weight in module.parameters()] + list(group.parameters)
        return [weight for weight in found if weight not in readable]

    def onload(group):
        for weight in weights(group):
            weight.data = real.get(weight, weight.data)

    def offload(group):
        for weight in weights(group):
            real.setdefault(weight, weight.data)
            weight.data = torch.full_like(weight.data, float("nan"))

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    return readable


# How models are offloaded, and which of them stay on the device.
GROUPS = {
    "layers": ({"offload_type": "leaf_level"}, set()),
    "blocks": ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"clip", "captioner"}),
    "blocks of some": ({"num_blocks_per_group": 2, "exclude_modules": "vae"}, {"clip", "captioner", "vae"}),
}


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("groups, staying", GROUPS.values(), ids=GROUPS)
def test_models_that_are_offloaded_by_groups_learn_and_draw_the_same(forgetful_groups, pair, method, groups, staying):
    captioner, processor = build_captioner()
    options = {"num_optimization_steps": 2, "lambda_before": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    plain, offloaded = (build_pipeline(captioner=captioner, captioner_processor=processor) for _ in range(2))
    ask = PROMPTS[method]
    expected = analogy(plain, **ask(plain, pair, picture("blue")), **options, generator=seeded())
    forgetful_groups.add(offloaded.text_encoder.get_input_embeddings().weight)
    forgetful_groups.add(offloaded.clip.text_model.embeddings.token_embedding.weight)
    offloaded.enable_group_offload("cpu", torch.device("cpu"), **groups)
    out = analogy(offloaded, **ask(offloaded, pair, picture("blue")), **options, generator=seeded())
    left = {
        name
        for name, model in offloaded.components.items()
        if isinstance(model, torch.nn.Module)
        and all(weight.isnan().all() for weight in model.parameters() if weight not in forgetful_groups)
    }
    assert left == {"vae", "text_encoder", "unet", "clip", "captioner"} - staying
    assert out.difference.metadata["before_prompt"] == expected.difference.metadata["before_prompt"]
    torch.testing.assert_close(rows_of(out.difference), rows_of(expected.difference))
    torch.testing.assert_close(out.images, expected.images)


SAVERS = {
    "sliced attention": lambda pipe: pipe.enable_attention_slicing(),
    "gradient checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_what_saves_memory_changes_neither_what_is_learned_nor_what_is_drawn(pipe, pair, save):
    options = {"image": picture("blue"), "prompt": "a", **pair, "num_optimization_steps": 2, "num_inference_steps": 2}
    expected = analogy(pipe, **options, output_type="latent", generator=seeded())
    save(pipe)
    saved = analogy(pipe, **options, output_type="latent", generator=seeded())
    torch.testing.assert_close(rows_of(saved.difference), rows_of(expected.difference), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(saved.images, expected.images, atol=1e-4, rtol=1e-4)


def test_a_sliced_vae_takes_queries_one_by_one_and_gives_the_same_pictures(pipe):
    queries = {"image": [picture("blue"), picture("red"), picture("white", "black")], "prompt": "a cabin"}
    expected = apply(pipe, **queries, output_type="pt")
    pipe.vae.enable_slicing()
    with forward_calls(pipe.vae.encoder, pipe.vae.decoder) as calls:
        found = apply(pipe, **queries, output_type="pt")
    assert [len(arguments[0]) for _, arguments, *_ in calls] == [1] * 6
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_tiled_vae_takes_a_large_query_in_tiles_and_gives_it_back_as_the_vae_alone_does(pipe):
    """A random VAE draws tiles as other pictures, 0.12 away in the mean."""
    query = {"image": picture("blue", size=(2 * SIDE, 2 * SIDE)), "difference_scale": 0, "output_type": "pt"}
    whole = apply(pipe, **query)
    pipe.vae.enable_tiling()
    with forward_calls(pipe.vae.encoder, pipe.vae.decoder) as calls:
        found = apply(pipe, **query)
    assert all([module for module, *_ in calls].count(part) > 1 for part in (pipe.vae.encoder, pipe.vae.decoder))
    expected = pipe.vae.decode(latents_of(pipe, query["image"]) / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=1e-3)
    assert (found - whole).abs().mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_learning_in_half_precision_is_finite_and_keeps_its_tokens_in_float32(pipe, pair, dtype):
    pipe.to(dtype)
    rows = rows_of(pipe.invert_difference(**pair, num_optimization_steps=4, learning_rate=0.02, generator=seeded()))
    assert rows.dtype == torch.float32
    assert torch.isfinite(rows).all() and rows.any()
    assert pipe.unet.dtype == pipe.text_encoder.dtype == dtype


def test_a_small_vae_learns_and_draws(pair):
    widths, blocks = (4,) * 4, (1,) * 4
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        scaling_factor=10.0,  # to the spread that latents have
    )
    pipe = build_pipeline(vae=vae)
    out = analogy(pipe, image=picture("blue"), prompt="a", **pair, num_optimization_steps=1, num_inference_steps=2)
    assert out.images[0].size == (SIDE, SIDE) and rows_of(out.difference).any()


def test_a_vae_in_float32_beside_a_half_precision_unet_learns_and_draws(pipe, pair):
    pipe.to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    out = analogy(pipe, image=picture("blue"), prompt="a", **pair, num_optimization_steps=1, num_inference_steps=2)
    assert out.images[0].size == (SIDE, SIDE)


def test_half_precision_draws_nearly_the_same_picture(pipe):
    expected = apply(pipe)
    pipe.to(torch.bfloat16)
    latents = apply(pipe).float()
    assert (latents - expected).abs().mean() < 0.25 * expected.abs().mean()


# ------------------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("width, told", [(SIDE, False), (2 * SIDE, False), (3 * SIDE, True), (SIDE // 4, True)])
def test_a_size_far_from_that_of_training_is_told(pipe, width, told):
    with logged() as lines:
        apply(pipe, image=picture(size=(width, SIDE)))
    assert [f"is used at {SIDE}×{width}" in line for line in lines] == [True] * told


def test_every_stage_shows_a_progress_bar_by_its_name_that_can_be_turned_off(pipe, pair, capsys):
    pipe.captioner, pipe.captioner_processor = build_captioner()
    asked = pair | {"image": picture("blue"), "num_inference_steps": 4}

    def shown(**config) -> str:
        pipe.set_progress_bar_config(**config)
        analogy(pipe, **asked, num_optimization_steps=3)
        return capsys.readouterr().err

    assert shown(disable=True) == ""
    stages = shown()
    names = [name for name, _ in itertools.groupby(re.findall(r"(?:^|[\r\n])([A-Z][a-z ]+): 100%", stages))]
    completing = "Completing prompts"  # of the pair, and later of the query
    assert names == ["Captioning", completing, "Learning", completing, "Inverting", "Drawing"]
    assert re.search(r"Learning: 100%\S* 3/3", stages) and re.search(r"Drawing: 100%\S* 4/4", stages)
    assert "loss=" in stages and re.search(r"Trying words: \d\d+it", stages)
    assert set(re.findall(r"[\r\n]([A-Z][a-z]+): 100%", "\n" + shown(desc="Mine"))) == {"Mine"}


def stop_with_ctrl_c(pipe, step, t, tensors):
    if step == 1:
        signal.raise_signal(signal.SIGINT)
    return tensors


@pytest.mark.parametrize("callback, error", [(None, None), (stop_with_ctrl_c, KeyboardInterrupt)])
def test_applying_changes_neither_the_components_nor_the_difference(pipe, callback, error):
    tokens, scheduler = random_tokens(), scheduler_state(pipe.scheduler)
    parts = [part for model in models_of(pipe) for part in model.modules()]
    weights = [parameter.clone() for model in models_of(pipe) for parameter in model.parameters()]
    if error:
        with pytest.raises(error):
            apply(pipe, difference=tokens, callback_on_step_end=callback)
    else:
        apply(pipe, difference=tokens)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    parameters = [parameter for model in models_of(pipe) for parameter in model.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(weights, parameters, strict=True))
    assert all(parameter.requires_grad for parameter in parameters)
    assert scheduler_state(pipe.scheduler) == scheduler
    assert torch.equal(rows_of(tokens), rows_of(random_tokens()))
    assert len(pipe.tokenizer) == len(build_tokenizer())
