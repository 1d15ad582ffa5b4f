# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The base models that the paper names: their real configurations, narrowed, with random weights."""

import copy
import functools
import re

import pytest
import torch
from backbones import build_backbone
from conftest import PIPELINE_FILE, analogy, embedded, forward_calls, logged, picture, seeded, watched
from safetensors.torch import load_file, save_file

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


SIDE = 64  # pixels
BACKBONES = ("sd15", "sd21", "sdxl")
STEPS = 3

cached_backbone = functools.cache(functools.partial(build_backbone, divide=32, sample_size=SIDE // 8))


def build(name: str, **components) -> DifferenceInversionPipeline:
    optional = dict.fromkeys(DifferenceInversionPipeline._optional_components)
    pipe = DifferenceInversionPipeline(**optional | copy.deepcopy(cached_backbone(name)) | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=BACKBONES)
def any_pipe(request) -> DifferenceInversionPipeline:
    return build(request.param)


@pytest.fixture
def xl() -> DifferenceInversionPipeline:
    return build("sdxl")


@pytest.fixture
def pair() -> dict:
    sizes = {"size": (SIDE, SIDE)}
    before, after = picture("red", **sizes), picture("yellow", **sizes)
    return {
        "before": before,
        "after": after,
        "before_prompt": "a red cabin",
        "after_prompt": "a yellow castle on snow",
    }


def stock(pipe: DifferenceInversionPipeline) -> DiffusionPipeline:
    """Diffusers' own pipeline with the same parts."""
    names = ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
    if pipe.text_encoder_2 is not None:
        parts = {name: getattr(pipe, name) for name in [*names, "text_encoder_2", "tokenizer_2"]}
        built = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts = {name: getattr(pipe, name) for name in names}
        built = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    built.set_progress_bar_config(disable=True)
    return built


def learn(pipe, pair, **options) -> DifferenceTokens:
    return pipe.invert_difference(**pair, **{"num_optimization_steps": 4, "generator": seeded()} | options)


def query() -> dict:
    return {
        "image": picture("blue", size=(SIDE, SIDE)),
        "prompt": "a red cabin by water",
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


def joined(embeddings: dict) -> torch.Tensor:
    return torch.cat(list(embeddings.values()), dim=-1)


def all_weights(pipe) -> list[torch.Tensor]:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [parameter.detach().clone() for model in models for parameter in model.parameters()]


# ---------------------------------------------------------------------------------------------- learn and apply


def test_a_difference_is_learned_and_changes_the_query_and_nothing_else(any_pipe, pair):
    pipe, weights = any_pipe, all_weights(any_pipe)
    difference = learn(pipe, pair)
    widths = [e.config.hidden_size for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None]
    assert [rows.shape for rows in difference.embeddings.values()] == [(4, width) for width in widths]
    assert all(rows.isfinite().all() and rows.any() for rows in difference.embeddings.values())
    changed, unchanged = (
        pipe(**query(), difference=difference, difference_scale=scale, generator=seeded()).images for scale in (1, 0)
    )
    assert changed.isfinite().all()
    assert (changed - unchanged).abs().max() > 1e-3
    assert all(torch.equal(old, new) for old, new in zip(weights, all_weights(pipe), strict=True))


def test_learning_lowers_the_loss_on_every_backbone(any_pipe, pair):
    begun, ended = (
        float(learn(any_pipe, pair, init="random", num_optimization_steps=steps, learning_rate=rate).metadata["loss"])
        for steps, rate in ((1, 1e-9), (20, 0.02))
    )
    assert ended < begun


def test_a_difference_of_zero_gives_the_query_back_on_every_backbone(any_pipe, pair):
    zero = 0.0 * learn(any_pipe, pair, num_optimization_steps=1)
    latents = any_pipe(**query(), difference=zero, strength=1.0, guidance_scale=2.0, generator=seeded()).images
    pixels = any_pipe.image_processor.preprocess(query()["image"])
    expected = any_pipe.vae.encode(pixels).latent_dist.mode() * any_pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


def test_the_users_log_is_quiet_on_every_backbone(any_pipe, pair):
    difference = learn(any_pipe, pair, num_optimization_steps=1)
    with logged("diffusers") as lines:
        for inversion in ("ddpm", "ddim", "sdedit"):
            any_pipe(**query(), difference=difference, inversion=inversion)
    assert not [line for line in lines if "not expected" in line]


def test_prompts_are_encoded_as_by_stock_diffusers(any_pipe):
    prompts = ["a red cabin on grass", ""]
    options = {"device": "cpu", "num_images_per_prompt": 2, "do_classifier_free_guidance": True}
    for negative in (None, "a boat"):
        ours = any_pipe.encode_prompt(prompts, **options, negative_prompt=negative)
        theirs = stock(any_pipe).encode_prompt(prompts, **options, negative_prompt=negative and [negative] * 2)
        if any_pipe.text_encoder_2 is None:
            theirs = (*theirs, None, None)
        for own, expected in zip(ours, theirs, strict=True):
            assert (own is None) == (expected is None)
            if own is not None:
                torch.testing.assert_close(own, expected)
    assert any_pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[1] is None


def test_text_to_image_is_stock_diffusers_with_the_difference_as_textual_inversion(any_pipe, pair, tmp_path):
    pipe = any_pipe
    difference = learn(pipe, pair, num_tokens=2)
    path = difference.save(tmp_path / "difference.safetensors")
    options = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 1.0}
    ours = pipe(prompt="a cabin", difference=str(path), **options, generator=seeded()).images
    theirs, told = stock(pipe), {"prompt": "a cabin <difference>"}
    if pipe.text_encoder_2 is None:
        theirs.load_textual_inversion(str(path))
    else:
        rows = load_file(path)
        for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
            parts = {part: getattr(theirs, f"{part}{suffix}") for part in ("text_encoder", "tokenizer")}
            theirs.load_textual_inversion(rows[name], token="<difference>", **parts)
        # Stock SDXL pools at the highest token id, which an added token has, and not at the end of the text.
        pooled = pipe.encode_prompt("a cabin", difference=difference)[2]
        embeds = theirs.encode_prompt(**told, device="cpu", do_classifier_free_guidance=False)[0]
        told = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    torch.testing.assert_close(ours, theirs(**told, **options, generator=seeded()).images, atol=1e-3, rtol=1e-3)


def test_differences_that_are_words_work_on_every_backbone(any_pipe, pair):
    difference = learn(any_pipe, pair, projection="hard")
    assert len(difference.to_text(any_pipe.tokenizer).split()) == 4
    said = any_pipe.encode_prompt(f"a cabin {difference.to_text(any_pipe.tokenizer)}")
    torch.testing.assert_close(any_pipe.encode_prompt("a cabin", difference=difference), said)


# ------------------------------------------------------------------------------------------------------- SDXL


def test_sdxl_learns_the_tokens_of_both_encoders_together(xl, pair):
    begun, ended = (learn(xl, pair, init="random", num_optimization_steps=s) for s in (1, 6))
    for name in ("clip_l", "clip_g"):
        assert (begun.embeddings[name] - ended.embeddings[name]).abs().max() > 1e-3


def test_sdxls_differences_add_whatever_the_order_that_a_file_has_them_in(xl, pair, tmp_path):
    difference = learn(xl, pair, num_optimization_steps=1)
    loaded = DifferenceTokens.load(difference.save(tmp_path / "d"))
    for total in (difference + loaded, loaded + difference):
        for name, rows in difference.embeddings.items():
            assert torch.equal(total.embeddings[name], torch.cat([rows, rows]))
    assert xl(**query(), difference=[difference, tmp_path / "d.safetensors"]).images.isfinite().all()
    with pytest.raises(ValueError, match="do not add"):
        difference + DifferenceTokens({"one": torch.zeros(1, 24), "two": torch.zeros(1, 40)})


def test_sdxl_is_told_the_size_of_the_picture(xl, pair):
    with forward_calls(xl.unet) as calls:
        xl(**query() | {"height": 32, "width": 64}, difference=learn(xl, pair, num_optimization_steps=1))
    _, _, keywords, _, _ = calls[-1]
    assert keywords["added_cond_kwargs"]["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]]


@pytest.mark.parametrize("given", [("clip",), ("clip_2",), ("clip", "clip_2")])
def test_sdxl_learns_with_the_clips_that_are_given(pair, given):
    pipe = build("sdxl", **{name: None for name in ("clip", "clip_2") if name not in given})
    losses = []
    learn(pipe, pair, callback_on_optimization_step=lambda pipe, step, values: losses.append(values["clip_loss"]))
    assert len(losses) == 4 and all(0 < loss < 2 for loss in losses)


def test_the_clip_loss_turns_each_encoders_tokens(pair):
    """Learned from one CLIP alone, the other encoder's tokens stay where they began."""
    pipe = build("sdxl", clip_2=None)
    options = {"lambda_tc": 0.0, "lambda_clip": 1.0, "init": "random"}
    begun = learn(pipe, pair, num_optimization_steps=1, learning_rate=1e-9, **options)
    ended = learn(pipe, pair, num_optimization_steps=6, learning_rate=0.02, **options)
    moved = {name: float((ended.embeddings[name] - begun.embeddings[name]).abs().max()) for name in begun.embeddings}
    assert moved["clip_l"] > 1e-2 and moved["clip_g"] < 1e-6


def test_sdxl_draws_away_from_zeros_unless_a_negative_prompt_is_given(xl, pair):
    difference, seen = learn(xl, pair, num_optimization_steps=1), []

    def note(pipe, step, t, tensors):
        seen.append(tensors)
        return {}

    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    options = {"prompt": "a cabin", "difference": difference, "num_inference_steps": 1, "output_type": "latent"}
    options |= {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
    xl(**options)
    xl(**options, negative_prompt="")
    without, with_empty = seen
    assert not without["negative_prompt_embeds"].any() and not without["negative_pooled_prompt_embeds"].any()
    assert with_empty["negative_prompt_embeds"].any() and with_empty["negative_pooled_prompt_embeds"].any()
    assert without["pooled_prompt_embeds"].any()


def test_a_callback_can_replace_sdxls_pooled_embeddings(xl, pair):
    difference = learn(xl, pair, num_optimization_steps=1)
    options = {**query(), "difference": difference}

    def silence(pipe, step, t, tensors):
        return {"pooled_prompt_embeds": torch.zeros_like(tensors["pooled_prompt_embeds"])}

    heard, unheard = (
        xl(
            **options,
            generator=seeded(),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["pooled_prompt_embeds"],
        ).images
        for callback in (lambda pipe, step, t, tensors: {}, silence)
    )
    assert (heard - unheard).abs().max() > 1e-5


def test_a_vae_that_overflows_in_half_precision_works_in_float32_meanwhile(xl, pair):
    xl.vae.to(torch.float16)
    seen = set()
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs: seen.add((module, inputs[0].dtype)))
        for part in (xl.vae.encoder, xl.vae.decoder)
    ]
    out = xl(**query() | {"output_type": "pil"}, difference=learn(xl, pair, num_optimization_steps=1))
    for hook in hooks:
        hook.remove()
    assert seen == {(xl.vae.encoder, torch.float32), (xl.vae.decoder, torch.float32)}
    assert xl.vae.dtype == torch.float16
    assert out.images[0].size == (SIDE, SIDE)


# ------------------------------------------------------------------------------------------- what does not fit


def test_the_clip_of_another_model_is_refused_by_its_values(any_pipe, pair):
    pipe = any_pipe
    table = pipe.clip.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=seeded(1)))
    with pytest.raises(ValueError, match=r"`clip` .*not the same.*another CLIP.*`clip="):
        learn(pipe, pair)


def test_the_right_clip_in_half_precision_matches_and_so_does_a_fine_tuned_text_encoder(any_pipe, pair):
    any_pipe.clip.to(torch.float16)
    assert learn(any_pipe, pair, num_optimization_steps=1).embeddings
    any_pipe.clip.to(torch.float32)
    with torch.no_grad():
        table = any_pipe.text_encoder.get_input_embeddings().weight
        table += 0.1 * table.std() * torch.randn(table.shape, generator=seeded(1))
    assert learn(any_pipe, pair, num_optimization_steps=1).embeddings


def test_sdxls_clips_the_wrong_way_round_are_told_apart(xl, pair):
    xl.register_modules(clip=xl.clip_2, clip_2=None)
    with pytest.raises(ValueError, match="`clip` .*give it as `clip_2`"):
        learn(xl, pair)


def test_sdxl_without_any_clip_says_which_two_there_are(pair):
    with pytest.raises(ValueError, match="`clip` is missing.*`clip=`.*`clip_2=`"):
        learn(build("sdxl", clip=None, clip_2=None), pair)


def tokens(**widths: int) -> DifferenceTokens:
    return DifferenceTokens({name: torch.zeros(2, width) for name, width in widths.items()})


WRONG_TOKENS = {
    "two encoders' tokens in Stable Diffusion": ("sd15", tokens(clip_l=24, clip_g=40), "2 text encoders.*has one"),
    "one encoder's tokens in SDXL": ("sdxl", tokens(cat=24), "1 text encoders.*has two.*clip_l and clip_g"),
    "two names that SDXL does not know": ("sdxl", tokens(one=24, two=40), "2 text encoders.*clip_l and clip_g"),
    "SDXL's names the wrong way round": ("sdxl", tokens(clip_l=40, clip_g=24), "size 40.*24.*another base model"),
    "SD 2.1's tokens in SD 1.5": ("sd15", tokens(cat=32), "size 32.*24.*another base model"),
    "more rows for one of SDXL's encoders": (
        "sdxl",
        DifferenceTokens({"clip_l": torch.zeros(1, 24), "clip_g": torch.zeros(2, 40)}),
        "not as many rows",
    ),
}


@pytest.mark.parametrize("name, difference, message", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_tokens_of_another_kind_of_model_are_refused_and_the_pipeline_goes_on_working(name, difference, message):
    pipe = build(name)
    with forward_calls(pipe.unet) as calls:
        with pytest.raises(ValueError, match=f"`difference`.*{message}"):
            pipe(**query(), difference=difference)
        assert not calls
    widths = {"clip_l": 24, "clip_g": 40} if name == "sdxl" else {"cat": 24}
    assert pipe(**query(), difference=tokens(**widths)).images.isfinite().all()


def test_sdxl_without_its_second_encoder_is_refused(pair):
    pipe = build("sdxl", text_encoder_2=None, tokenizer_2=None, clip_2=None)
    for act in (lambda: learn(pipe, pair), lambda: pipe(**query(), difference=tokens(cat=24))):
        with pytest.raises(ValueError, match="`text_encoder_2`.*missing.*SDXL"):
            act()


def test_sdxls_refiner_is_refused(xl, pair):
    xl.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="`text_encoder` is missing.*refiner"):
        learn(xl, pair)


def test_stable_diffusions_callbacks_have_no_pooled_embeddings(pair):
    options = {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds"]}
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs`.*pooled_prompt_embeds"):
        build("sd15")(**query(), difference=tokens(cat=24), **options)


def test_callbacks_get_every_tensor_that_the_pipeline_says_it_has(any_pipe, pair):
    seen, names = [], any_pipe._callback_tensor_inputs

    def keep(pipe, step, t, tensors):
        seen.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return tensors

    options = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 2.0}
    any_pipe(**query(), difference=learn(any_pipe, pair, num_optimization_steps=1), **options)
    assert list(seen[0]) == names and {"latents", "prompt_embeds", "negative_prompt_embeds"} <= set(names)


# -------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", BACKBONES)
def test_a_stock_checkpoint_loads_unmodified_with_its_clip(name, pair, tmp_path):
    expected = build(name)
    stock(expected).save_pretrained(tmp_path)
    clips = {part: getattr(expected, part) for part in ("clip", "clip_2", "clip_processor")}
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path,
        custom_pipeline=str(PIPELINE_FILE),
        trust_remote_code=True,
        **{part: given for part, given in clips.items() if given is not None},
    )
    pipe.set_progress_bar_config(disable=True)
    learned, again = (joined(learn(each, pair).embeddings) for each in (expected, pipe))
    torch.testing.assert_close(again, learned, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", BACKBONES)
def test_from_pipe_shares_every_encoder_of_a_stock_pipeline(name, pair):
    parts = build(name)
    source = stock(parts).to(torch.bfloat16)
    clips = {part: getattr(parts, part) for part in ("clip", "clip_2", "clip_processor")}
    pipe = DifferenceInversionPipeline.from_pipe(source, dtype=source.dtype, **clips)
    for part in ("vae", "unet", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])):
        assert getattr(pipe, part) is getattr(source, part)
        assert getattr(source, part).dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    assert joined(learn(pipe, pair).embeddings).isfinite().all()


def test_from_pipe_leaves_a_model_of_two_types_as_it_is():
    source = stock(build("sd15")).to(torch.float16)
    source.unet.time_embedding.to(torch.float32)
    dtypes = [tensor.dtype for tensor in source.unet.state_dict().values()]
    DifferenceInversionPipeline.from_pipe(source)
    assert [tensor.dtype for tensor in source.unet.state_dict().values()] == dtypes


def test_sdxls_encoders_and_its_unet_take_turns_on_the_device(xl, pair):
    learning = {**pair, "num_optimization_steps": 2}
    expected = analogy(xl, **query(), **learning, generator=seeded())
    offloaded = build("sdxl")
    offloaded.enable_model_cpu_offload(device="cpu")
    with watched(offloaded) as history:
        out = analogy(offloaded, **query(), **learning, generator=seeded())
    both = {"text_encoder", "text_encoder_2"}
    assert both in history and all(present == both or len(present) <= 1 or present < both for present in history)
    for name, rows in expected.difference.embeddings.items():
        torch.testing.assert_close(out.difference.embeddings[name], rows)
    torch.testing.assert_close(out.images, expected.images)


@pytest.mark.parametrize("name", BACKBONES)
def test_learning_in_half_precision_is_finite_on_every_backbone(name, pair):
    pipe = build(name).to(torch.float16)
    difference = learn(pipe, pair)
    assert all(rows.dtype == torch.float32 and rows.isfinite().all() for rows in difference.embeddings.values())
    assert pipe(**query(), difference=difference).images.isfinite().all()


# ------------------------------------------------------------------------------- what diffusers' own loaders bring


def random_lora(pipe, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights as a LoRA's file has them, for each text encoder's and the UNet's queries."""
    weights = {}
    for prefix in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in getattr(pipe, prefix).named_modules() if getattr(pipe, prefix) else ():
            if name.endswith(("to_q", "q_proj")):
                own = {"lora_A": torch.randn(2, module.in_features), "lora_B": torch.randn(module.out_features, 2)}
                weights |= {f"{prefix}.{name}.{part}.weight": scale * matrix for part, matrix in own.items()}
    return weights


def test_a_lora_counts_in_drawing_and_in_learning_and_is_gone_when_it_is_unloaded(any_pipe, pair):
    pytest.importorskip("peft")
    pipe = any_pipe
    learning = {"init": "random", "lambda_clip": 0.0, "learning_rate": 0.02}

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        learned = joined(learn(pipe, pair, **learning).embeddings)
        widths = [encoder.config.hidden_size for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder]
        names = ("clip_l", "clip_g") if len(widths) == 2 else ("cat",)
        fixed = DifferenceTokens({n: torch.ones(2, width) for n, width in zip(names, widths, strict=True)})
        drawing = {"prompt": "a cabin", "num_inference_steps": STEPS, "output_type": "latent"}
        return learned, pipe(**drawing, difference=fixed, generator=seeded()).images

    torch.manual_seed(8)
    plain = outcome()
    lora = random_lora(pipe)
    pipe.load_lora_weights(lora, adapter_name="lora")
    adapted = outcome()
    pipe.unload_lora_weights()
    for before, during, after in zip(plain, adapted, outcome(), strict=True):
        assert (before - during).abs().max() > 1e-3
        torch.testing.assert_close(before, after)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    for active, fused in zip(adapted, outcome(), strict=True):
        torch.testing.assert_close(active, fused, atol=1e-3, rtol=1e-3)


def test_learning_leaves_a_lora_trainable_as_it_was(pair):
    pytest.importorskip("peft")
    pipe = build("sd15")
    pipe.load_lora_weights(random_lora(pipe))
    before = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    learn(pipe, pair, num_optimization_steps=1)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == before


def test_a_textual_inversion_of_one_of_sdxls_encoders_is_no_word_to_begin_at(xl, pair):
    rows = torch.randn(1, 24, generator=seeded())
    xl.load_textual_inversion(rows, token="<cat>", text_encoder=xl.text_encoder, tokenizer=xl.tokenizer)
    assert joined(learn(xl, pair | {"after_prompt": "a red <cat>"}).embeddings).isfinite().all()


def test_a_textual_inversion_does_not_make_the_base_model_another(pair):
    pipe = build("sd15")
    difference = learn(pipe, pair, num_optimization_steps=1)
    pipe.load_textual_inversion({"<cat>": torch.randn(2, 24, generator=seeded())})
    with logged() as lines:
        pipe(**query(), difference=difference)
    assert not [line for line in lines if "another base model" in line]


def test_a_difference_learned_in_bfloat16_is_of_the_same_base_model(pair):
    pipe = build("sd15").to(torch.bfloat16)
    difference = learn(pipe, pair, num_optimization_steps=1)
    with logged() as lines:
        pipe.to(torch.float32)(**query(), difference=difference)
    assert not [line for line in lines if "another base model" in line]


def test_textual_inversions_are_understood_in_prompts_and_do_not_unsettle_clip(pair):
    pipe, theirs = build("sd15"), stock(build("sd15"))
    cat = {"<cat>": torch.randn(2, 24, generator=seeded())}
    for each in (pipe, theirs):
        each.load_textual_inversion(cat)
    prompts = ["a red <cat> on grass"]
    expected, _ = theirs.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(embedded(pipe, prompts), expected)
    assert (expected - embedded(pipe, ["a red on grass"])).abs().max() > 0.1
    difference = learn(pipe, pair | {"after_prompt": "a red <cat>"}, projection="soft")
    assert joined(difference.embeddings).isfinite().all()


# How the files of one piece, which many checkpoints come as, name what diffusers names otherwise; in this order. They count
# all layers on end, of which each block here has one going down, and then the step down, and two coming up.
SINGLE_FILE_NAMES = {
    "unet": [
        (r"^time_embedding.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (
            r"^down_blocks.(\d).(resnets|attentions).(\d)",
            lambda m: f"input_blocks.{2 * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
        ),
        (r"^down_blocks.(\d).downsamplers.0.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
        (
            r"^up_blocks.(\d).(resnets|attentions).(\d)",
            lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}",
        ),
        (
            r"^up_blocks.(\d).upsamplers.0",
            lambda m: f"output_blocks.{2 * int(m[1]) + 1}.{1 if m[1] == '0' else 2}",
        ),
        (r"^mid_block.resnets.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block.attentions.0", "middle_block.1"),
    ],
    "vae": [
        (r"down_blocks.(\d).resnets.(\d)", r"down.\1.block.\2"),
        (r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample"),
        (r"up_blocks.(\d).resnets.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks.(\d).upsamplers.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"mid_block.resnets.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block.attentions.0", "mid.attn_1"),
        (r"attn_1.group_norm", "attn_1.norm"),
        (r"attn_1.to_([qkv])", r"attn_1.\1"),
        (r"attn_1.to_out.0", "attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ],
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def single_file(pipe) -> dict[str, torch.Tensor]:
    """The weights under the names of a checkpoint in one file."""
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    weights = {}
    for part, rules in SINGLE_FILE_NAMES.items():
        for name, weight in getattr(pipe, part).state_dict().items():
            if part == "unet" and ".resnets." in name:
                name = re.sub(r"(?<=\d\.)(\w+)(?=\.\w+$)", lambda m: RESNET_NAMES[m[1]], name)
            for pattern, written in rules:
                name = re.sub(pattern, written, name)
            if "attn_1" in name and name.endswith("weight") and weight.ndim == 2:
                weight = weight[:, :, None, None]
            weights[prefixes[part] + name] = weight.contiguous()
    for name, weight in pipe.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    return weights


def test_a_checkpoint_in_one_file_loads(pair, tmp_path):
    expected = build("sd15")
    stock(expected).save_pretrained(tmp_path / "config")
    save_file(single_file(expected), tmp_path / "model.safetensors")
    clips = {"clip": expected.clip, "clip_processor": expected.clip_processor}
    pipe = DifferenceInversionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True, **clips
    )
    pipe.set_progress_bar_config(disable=True)
    learned, again = (learn(each, pair) for each in (expected, pipe))
    torch.testing.assert_close(joined(again.embeddings), joined(learned.embeddings), atol=1e-3, rtol=1e-3)
    options = {**query(), "difference": learned, "inversion": "sdedit"}
    ours, theirs = (each(**options, generator=seeded()).images for each in (pipe, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
