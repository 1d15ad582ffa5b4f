# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What diffusers asks of every pipeline of its own: that its parts, savers of memory, schedulers, files and callbacks do here
what they do in any other."""

import inspect

import pytest
import torch
from conftest import (
    build_captioner,
    build_components,
    build_pipeline,
    picture,
    random_tokens,
    rows_of,
    seeded,
    watched,
)
from test_backbones import build as build_backbone
from test_backbones import stock as stock_of
from test_pipeline import apply, draw, offload_layers, stock_pipeline

import diffusers
from diffusers import (
    AsymmetricAutoencoderKL,
    ConsistencyDecoderVAE,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from pipeline_difference_inversion import DifferenceInversionPipeline


STEPS = 2
CLIP = ("clip", "clip_processor")


def outcome(pipe, pair) -> list[torch.Tensor]:
    """What is learned in one step, how well it fits, and a query's answer."""
    options = {"num_optimization_steps": 1, "init": "zeros", "complete_prompts": False, "generator": seeded()}
    learned = pipe.invert_difference(**pair, **options)
    loss = torch.tensor(float(learned.metadata["loss"]))
    return [rows_of(learned), loss, apply(pipe, num_inference_steps=STEPS, output_type="pt")]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-4) -> None:
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, atol=atol, rtol=0)


def complete_pipeline() -> DifferenceInversionPipeline:
    captioner, processor = build_captioner()
    return build_pipeline(captioner=captioner, captioner_processor=processor)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def models(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


# ------------------------------------------------------------------------------------------------------- the call


USUAL = {
    "image",
    "mask_image",
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "strength",
    "num_inference_steps",
    "guidance_scale",
    "eta",
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
}


def test_a_call_knows_the_usual_arguments_and_needs_none_of_them():
    parameters = inspect.signature(DifferenceInversionPipeline.__call__).parameters
    assert not USUAL - parameters.keys()
    assert [n for n, p in parameters.items() if p.default is inspect.Parameter.empty] == ["self"]


@pytest.mark.parametrize("run", [apply, draw])
def test_a_callback_may_raise_the_guidance_at_every_step(pipe, run):
    def raise_guidance(pipe, step, t, tensors):
        pipe._guidance_scale += 1
        return tensors

    options = {"guidance_scale": 1.5, "num_inference_steps": 4}
    constant = run(pipe, **options)
    rising = run(pipe, **options, callback_on_step_end=raise_guidance)
    assert pipe.guidance_scale == 1.5 + pipe.num_timesteps == 5.5
    assert (rising - constant).abs().max() > 0.01


LONG = "a red cabin on snow at night " * 9


def test_a_prompt_that_is_too_long_leaves_the_others_of_its_batch_alone(pipe):
    prompts, noise = ["a blue cabin", LONG, "a boat"], torch.randn(3, 4, 4, 4, generator=seeded())
    options = {"num_inference_steps": STEPS}
    together = draw(pipe, prompt=prompts, latents=noise, **options)
    alone = [draw(pipe, prompt=p, latents=own[None], **options) for p, own in zip(prompts, noise, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    queries = [picture("blue"), picture("red"), picture("white", "black")]
    together = apply(pipe, image=queries, prompt=prompts, generator=[seeded(i) for i in range(3)], **options)
    alone = [apply(pipe, image=queries[i], prompt=prompts[i], generator=seeded(i), **options) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ schedulers and VAEs


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # of diffusers' own schedulers
@pytest.mark.parametrize("name", [kind.name for kind in KarrasDiffusionSchedulers])
def test_every_scheduler_draws_as_in_stock_stable_diffusion_and_answers_a_query(pipe, name):
    """Some ask the UNet twice a step, and have nearly twice as many time steps."""
    expected = apply(pipe, num_inference_steps=STEPS)
    try:  # the seed is for the one that draws noise and does not ask the generator
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, noise_sampler_seed=1)
    except ImportError as error:  # of SciPy or torchsde, which this project does without
        pytest.skip(str(error).strip())
    torch.testing.assert_close(apply(pipe, num_inference_steps=STEPS), expected)
    steps, options = [], {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    note = {"callback_on_step_end": lambda pipe, step, t, tensors: steps.append(step) or {}}
    ours = draw(pipe, difference=random_tokens(scale=0.0), generator=seeded(1), **options, **note)
    stock = stock_pipeline(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    theirs = stock("a blue cabin", generator=seeded(1), **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(steps) == pipe.num_timesteps == stock.num_timesteps


def build_asymmetric_vae() -> AsymmetricAutoencoderKL:
    torch.manual_seed(2)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"down_block_out_channels": [4] * 4, "up_block_out_channels": [8] * 4, "norm_num_groups": 2}
    return AsymmetricAutoencoderKL(**blocks, **widths, scaling_factor=1.3).eval()


def build_consistency_vae() -> ConsistencyDecoderVAE:
    """Its decoder draws noise."""
    torch.manual_seed(2)
    return ConsistencyDecoderVAE(
        encoder_block_out_channels=[4] * 4,
        encoder_norm_num_groups=2,
        encoder_layers_per_block=1,
        decoder_block_out_channels=[4, 8],
        decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2,
        decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2,
        decoder_norm_num_groups=2,
        decoder_layers_per_block=1,
        scaling_factor=1.3,
    ).eval()


@pytest.mark.parametrize("build", [build_asymmetric_vae, build_consistency_vae])
def test_other_vaes_learn_and_draw_as_in_stock_stable_diffusion_and_repeat_by_seed(pair, build):
    pipe, stock = build_pipeline(vae=build()), stock_pipeline(vae=build())
    assert all(each.isfinite().all() and each.any() for each in outcome(pipe, pair))
    options = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "pt"}
    ours = draw(pipe, difference=random_tokens(scale=0.0), generator=seeded(1), **options)
    theirs = stock("a blue cabin", generator=seeded(1), **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    first, again = (apply(pipe, **options, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, again) and first.std() > 0.01


# -------------------------------------------------------------------------------------------------- what saves memory


def test_enabling_model_offloading_again_changes_no_answer(pipe, pair):
    expected = outcome(pipe, pair)
    for _ in range(2):
        pipe.enable_model_cpu_offload(device="cpu")
        with watched(pipe) as history:
            assert_same(outcome(pipe, pair), expected)
        assert max(map(len, history)) == 1


def test_enabling_offloading_of_layers_again_changes_no_answer(pipe, pair):
    expected = outcome(pipe, pair)
    for _ in range(2):
        offload_layers(pipe)
        assert_same(outcome(pipe, pair), expected)
        assert pipe.unet.conv_in.weight.is_meta


def test_freeu_changes_the_answer_until_it_is_disabled(pipe):
    for run in (apply, draw):
        plain = run(pipe, num_inference_steps=STEPS)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        changed = run(pipe, num_inference_steps=STEPS)
        pipe.disable_freeu()
        assert (changed - plain).abs().max() > 1e-3
        assert torch.equal(run(pipe, num_inference_steps=STEPS), plain)


def test_fused_projections_learn_and_draw_the_same(pipe, pair):
    expected = outcome(pipe, pair)
    pipe.fuse_qkv_projections()
    for model in (pipe.unet, pipe.vae):
        assert all(type(processor).__name__.startswith("Fused") for processor in model.attn_processors.values())
    assert_same(outcome(pipe, pair), expected)
    pipe.unfuse_qkv_projections()
    assert_same(outcome(pipe, pair), expected, atol=0)


# ----------------------------------------------------------------------------------------------- other pipelines' parts


def stock_sdxl() -> StableDiffusionXLPipeline:
    stock = stock_of(build_backbone("sdxl"))
    stock.register_to_config(force_zeros_for_empty_prompt=False)
    return stock


@pytest.mark.parametrize("build", [stock_pipeline, stock_sdxl])
def test_the_way_from_a_stock_pipeline_to_this_one_and_back_keeps_its_settings(build):
    stock = build()
    pipe = DifferenceInversionPipeline.from_pipe(stock)
    back = type(stock).from_pipe(pipe, **dict.fromkeys(stock.components.keys() - pipe.components.keys()))
    assert {name: value for name, value in back.config.items() if not name.startswith("_")} == stock.config


def test_a_stock_pipeline_draws_as_before_after_its_parts_were_used_here(pair):
    stock, own = stock_pipeline(), build_components()
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    processors = [type(each) for each in stock.unet.attn_processors.values()]
    before = stock("a cabin", **options, generator=seeded()).images
    pipe = quiet(DifferenceInversionPipeline.from_pipe(stock, **{name: own[name] for name in CLIP}))
    found = outcome(pipe, pair)
    assert torch.equal(stock("a cabin", **options, generator=seeded()).images, before)
    assert [type(each) for each in stock.unet.attn_processors.values()] == processors
    assert_same(found, outcome(build_pipeline(), pair))


def test_encoded_prompts_serve_a_stock_pipeline_without_text_encoder_and_tokenizer(pipe):
    stock, alone = stock_pipeline(), stock_pipeline(text_encoder=None, tokenizer=None)
    encoder = DifferenceInversionPipeline(**pipe.components | {"scheduler": None, "clip_processor": None})
    embeds, negative_embeds, _, _ = encoder.encode_prompt("a blue cabin", negative_prompt="a boat")
    options = {"num_inference_steps": STEPS, "output_type": "pt"}
    guided = {"guidance_scale": 3.0, "prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
    for told, given in (
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0, "prompt_embeds": embeds}),
        ({"guidance_scale": 3.0, "negative_prompt": "a boat"}, guided),
    ):
        expected = stock("a blue cabin", **told, **options, generator=seeded()).images
        found = alone(**given, **options, generator=seeded()).images
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- loading and types


def test_a_pipeline_loaded_onto_a_device_learns_and_draws(pipe, pair, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DifferenceInversionPipeline.from_pretrained(tmp_path, device_map="cpu"))
    assert loaded.hf_device_map == "cpu"
    assert_same(outcome(loaded, pair), outcome(pipe, pair), atol=1e-3)


def test_from_pipe_of_a_pipeline_loaded_onto_a_device_learns_and_draws(pair, tmp_path):
    stock_pipeline().save_pretrained(tmp_path)
    stock, own = StableDiffusionPipeline.from_pretrained(tmp_path, device_map="cpu"), build_components()
    assert stock.hf_device_map == "cpu"
    pipe = quiet(DifferenceInversionPipeline.from_pipe(stock, **{name: own[name] for name in CLIP}))
    assert_same(outcome(pipe, pair), outcome(build_pipeline(), pair), atol=1e-3)


def test_from_pipe_brings_what_is_given_to_the_device_that_the_others_were_loaded_onto():
    """The device "meta" stands in for a GPU, onto which `device_map="cuda"` loads."""
    stock, own = stock_pipeline().to("meta"), build_components()
    stock.hf_device_map = "meta"
    pipe = DifferenceInversionPipeline.from_pipe(stock, **{name: own[name] for name in CLIP})
    assert {model.device.type for model in models(pipe).values()} == {"meta"}


TYPES = {
    "bfloat16 UNet": {"unet": torch.bfloat16, "default": torch.float32},
    "float16 UNet": {"unet": torch.float16, "default": torch.float32},
    "float32 UNet": {"unet": torch.float32, "default": torch.float16},
}


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_each_model_is_loaded_in_its_own_type_and_they_learn_and_draw_together(pair, tmp_path, dtype):
    complete_pipeline().save_pretrained(tmp_path)
    pipe = quiet(DifferenceInversionPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert {name: model.dtype for name, model in models(pipe).items()} == {
        name: dtype.get(name, dtype["default"]) for name in models(pipe)
    }
    assert all(each.isfinite().all() and each.any() for each in outcome(pipe, pair))


def test_half_precision_is_saved_and_loaded_as_it_is_and_draws_as_before(tmp_path):
    pipe = complete_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DifferenceInversionPipeline.from_pretrained(tmp_path, dtype=torch.float16))
    for name, model in models(pipe).items():
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
        assert model.dtype == getattr(loaded, name).dtype == torch.float16
    # Not bit for bit: a file's weights lie elsewhere in memory, and processors round by that.
    torch.testing.assert_close(apply(loaded), apply(pipe), atol=0.02, rtol=0.02)


def test_a_change_of_type_reaches_every_model_and_so_does_the_way_back():
    pipe = complete_pipeline()
    assert models(pipe).keys() == {"vae", "text_encoder", "unet", "clip", "captioner"}
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype)
        parameters = [parameter for model in models(pipe).values() for parameter in model.parameters()]
        assert {parameter.dtype for parameter in parameters} == {dtype}


def test_a_variant_is_saved_and_loaded_by_its_name(tmp_path):
    pipe = complete_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    files = [file.name for file in tmp_path.glob("*/*.safetensors")]
    assert len(files) == len(models(pipe)) and all(".fp16." in name for name in files)
    loaded = DifferenceInversionPipeline.from_pretrained(tmp_path, variant="fp16")
    for name, model in models(pipe).items():
        weights = getattr(loaded, name).state_dict()
        assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


def test_a_variant_that_is_not_there_is_said_by_its_name(tmp_path):
    build_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant.*fp16"):
        DifferenceInversionPipeline.from_pretrained(tmp_path, variant="fp16")
