# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Every field of a base model's configuration: obeyed as stock pipelines obey it, or refused by its name.

The tables name all fields that the installed diffusers knows, so that a new one is looked at before it is admitted.
"""

import inspect

import pytest
import torch
from conftest import (
    build_components,
    build_pipeline,
    build_scheduler,
    build_unet,
    forward_calls,
    picture,
    random_tokens,
    rows_of,
    seeded,
)
from test_backbones import build as build_backbone
from test_backbones import stock as stock_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PretrainedConfig

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from pipeline_difference_inversion import DifferenceTokens


STEPS = 3

# What a field is for: the model's own code reads it, whoever calls the model (INSIDE); this pipeline reads it (OBEYED);
# or anything but the value that Stable Diffusion has is refused (REFUSED). The last two have a test below.
INSIDE, OBEYED, REFUSED = "inside", "obeyed", "refused"

UNET = {
    "sample_size": OBEYED,
    "in_channels": REFUSED,
    "out_channels": REFUSED,
    "center_input_sample": INSIDE,
    "flip_sin_to_cos": INSIDE,
    "freq_shift": INSIDE,
    "down_block_types": INSIDE,
    "mid_block_type": INSIDE,
    "up_block_types": INSIDE,
    "only_cross_attention": INSIDE,
    "block_out_channels": INSIDE,
    "layers_per_block": INSIDE,
    "downsample_padding": INSIDE,
    "mid_block_scale_factor": INSIDE,
    "dropout": INSIDE,
    "act_fn": INSIDE,
    "norm_num_groups": INSIDE,
    "norm_eps": INSIDE,
    "cross_attention_dim": REFUSED,
    "transformer_layers_per_block": INSIDE,
    "reverse_transformer_layers_per_block": INSIDE,
    "encoder_hid_dim": INSIDE,
    "encoder_hid_dim_type": REFUSED,
    "attention_head_dim": INSIDE,
    "num_attention_heads": INSIDE,
    "dual_cross_attention": INSIDE,
    "use_linear_projection": INSIDE,
    "class_embed_type": REFUSED,
    "addition_embed_type": REFUSED,
    "addition_time_embed_dim": REFUSED,
    "num_class_embeds": REFUSED,
    "upcast_attention": INSIDE,
    "resnet_time_scale_shift": INSIDE,
    "resnet_skip_time_act": INSIDE,
    "resnet_out_scale_factor": INSIDE,
    "time_embedding_type": INSIDE,
    "time_embedding_dim": INSIDE,
    "time_embedding_act_fn": INSIDE,
    "timestep_post_act": INSIDE,
    "time_cond_proj_dim": REFUSED,
    "conv_in_kernel": INSIDE,
    "conv_out_kernel": INSIDE,
    "projection_class_embeddings_input_dim": REFUSED,
    "attention_type": INSIDE,
    "class_embeddings_concat": INSIDE,
    "mid_block_only_cross_attention": INSIDE,
    "cross_attention_norm": INSIDE,
    "addition_embed_type_num_heads": INSIDE,
}
VAE = {
    "in_channels": INSIDE,
    "out_channels": INSIDE,
    "down_block_types": INSIDE,
    "up_block_types": INSIDE,
    "block_out_channels": OBEYED,
    "layers_per_block": INSIDE,
    "act_fn": INSIDE,
    "latent_channels": REFUSED,
    "norm_num_groups": INSIDE,
    "sample_size": INSIDE,
    "scaling_factor": OBEYED,
    "shift_factor": INSIDE,  # of Flux and SD3, whose pipelines alone read it
    "latents_mean": OBEYED,
    "latents_std": OBEYED,
    "force_upcast": OBEYED,
    "use_quant_conv": INSIDE,
    "use_post_quant_conv": INSIDE,
    "mid_block_add_attention": INSIDE,
}
SCHEDULER = {
    "num_train_timesteps": OBEYED,
    "beta_start": OBEYED,
    "beta_end": OBEYED,
    "beta_schedule": REFUSED,
    "trained_betas": OBEYED,
    "clip_sample": OBEYED,
    "set_alpha_to_one": OBEYED,
    "steps_offset": OBEYED,
    "prediction_type": REFUSED,
    "thresholding": OBEYED,
    "dynamic_thresholding_ratio": OBEYED,
    "clip_sample_range": OBEYED,
    "sample_max_value": OBEYED,
    "timestep_spacing": OBEYED,
    "rescale_betas_zero_snr": OBEYED,
}
TEXT_ENCODER = {
    "vocab_size": OBEYED,
    "hidden_size": OBEYED,
    "intermediate_size": INSIDE,
    "projection_dim": OBEYED,
    "num_hidden_layers": INSIDE,
    "num_attention_heads": INSIDE,
    "max_position_embeddings": REFUSED,
    "hidden_act": INSIDE,
    "layer_norm_eps": INSIDE,
    "attention_dropout": INSIDE,
    "initializer_range": INSIDE,
    "initializer_factor": INSIDE,
    "pad_token_id": INSIDE,  # prompts are padded with the tokenizer's
    "bos_token_id": INSIDE,
    "eos_token_id": INSIDE,  # at which SDXL's second encoder is pooled
    "use_attention_mask": OBEYED,  # of no encoder's own, and stock Stable Diffusion asks for it
}
# Of a tokenizer, what stock pipelines rely on.
TOKENIZER = {
    "model_max_length": OBEYED,
    "pad_token": OBEYED,
    "bos_token": OBEYED,
    "eos_token": OBEYED,
    "unk_token": INSIDE,
    "vocab": INSIDE,
    "merges": INSIDE,
}


@pytest.mark.parametrize(
    "family, table",
    [
        (UNet2DConditionModel, UNET),
        (AutoencoderKL, VAE),
        (DDIMScheduler, SCHEDULER),
        (CLIPTextConfig, TEXT_ENCODER),
        (CLIPTokenizer, TOKENIZER),
    ],
)
def test_the_tables_name_every_field(family, table):
    common = inspect.signature(PretrainedConfig.__init__).parameters if family is CLIPTextConfig else {}
    fields = set(inspect.signature(family.__init__).parameters) - {"self", "kwargs", *common}
    assert fields <= table.keys()


# ------------------------------------------------------------------------------------------ as stock pipelines draw


def stock_pipeline(parts: dict) -> StableDiffusionPipeline:
    parts = {name: part for name, part in parts.items() if not name.startswith("clip")}
    stock = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def change_unet(**fields):
    return lambda parts: parts["unet"].register_to_config(**fields)


def rebuild_unet(**fields):
    def change(parts):
        torch.manual_seed(3)
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, **fields).eval()

    return change


def change_vae(**fields):
    return lambda parts: parts["vae"].register_to_config(**fields)


def rebuild_scheduler(family=DDIMScheduler, **fields):
    def change(parts):
        parts["scheduler"] = family.from_config(parts["scheduler"].config, **fields)

    return change


def tiny_vae(parts):
    torch.manual_seed(2)
    widths, blocks = (8,) * 4, (1,) * 4
    parts["vae"] = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    ).eval()


def use_attention_mask(parts):
    parts["text_encoder"].config.use_attention_mask = True


def short_window(parts):
    parts["tokenizer"].model_max_length = 12


def padded_with(token: str):
    """Stable Diffusion 2's tokenizer pads with "!", and others with the end token."""
    return lambda parts: setattr(parts["tokenizer"], "pad_token", token)


def rebuild_text_encoder(**fields):
    def change(parts):
        torch.manual_seed(5)
        config = CLIPTextConfig(**parts["text_encoder"].config.to_dict() | fields)
        parts["text_encoder"] = CLIPTextModel(config).eval()

    return change


AS_STOCK = {
    "unet sample_size": change_unet(sample_size=6),
    "unet sample_size of two sides": change_unet(sample_size=[4, 6]),
    "unet sample_size of before 0.9": change_unet(sample_size=2, _diffusers_version="0.6.0"),
    "unet center_input_sample": rebuild_unet(center_input_sample=True),
    "unet flip_sin_to_cos": rebuild_unet(flip_sin_to_cos=False),
    "unet freq_shift": rebuild_unet(freq_shift=1),
    "unet encoder_hid_dim": rebuild_unet(
        encoder_hid_dim=16, encoder_hid_dim_type="text_proj", cross_attention_dim=8, attention_head_dim=4
    ),
    "vae scaling_factor": change_vae(scaling_factor=0.5),
    "vae latents_mean and latents_std": change_vae(latents_mean=[1.0] * 4, latents_std=[2.0] * 4),
    "vae shift_factor": change_vae(shift_factor=0.5),
    "vae of another class": tiny_vae,
    "text encoder use_attention_mask": use_attention_mask,
    "text encoder layers": rebuild_text_encoder(num_hidden_layers=1, num_attention_heads=4, intermediate_size=8),
    "text encoder hidden_act": rebuild_text_encoder(hidden_act="gelu", layer_norm_eps=0.1),
    "text encoder eos_token_id": rebuild_text_encoder(eos_token_id=2),
    "tokenizer model_max_length": short_window,
    "tokenizer pad_token": padded_with("!"),
    "scheduler num_train_timesteps": rebuild_scheduler(num_train_timesteps=500),
    "scheduler betas": rebuild_scheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear"),
    "scheduler trained_betas": rebuild_scheduler(trained_betas=[0.002] * 1000),
    "scheduler clip_sample": rebuild_scheduler(clip_sample=True),
    "scheduler clip_sample of PNDM": rebuild_scheduler(PNDMScheduler, skip_prk_steps=True),
    "scheduler set_alpha_to_one": rebuild_scheduler(set_alpha_to_one=True),
    "scheduler steps_offset": rebuild_scheduler(steps_offset=0),
    "scheduler steps_offset of PNDM": rebuild_scheduler(PNDMScheduler, skip_prk_steps=True, steps_offset=0),
    "scheduler prediction_type": rebuild_scheduler(prediction_type="v_prediction"),
    "scheduler prediction_type sample": rebuild_scheduler(prediction_type="sample"),
    "scheduler thresholding": rebuild_scheduler(thresholding=True),
    "scheduler timestep_spacing": rebuild_scheduler(timestep_spacing="trailing"),
    "scheduler rescale_betas_zero_snr": rebuild_scheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
}


def build_changed(change) -> tuple[dict, dict]:
    """The same changed parts twice, since a stock pipeline may put its own right."""
    both = build_components(), build_components()
    for parts in both:
        change(parts)
    for name in ("unet", "vae", "text_encoder"):
        both[1][name].load_state_dict(both[0][name].state_dict())
    return both


@pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")  # which stock puts right, and says so
@pytest.mark.parametrize("change", AS_STOCK.values(), ids=AS_STOCK)
def test_text_to_image_is_as_stock_draws_it(change, tmp_path):
    theirs, ours = build_changed(change)
    path = random_tokens().save(tmp_path / "difference.safetensors")
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
    pipe = build_pipeline(**ours)
    found = pipe(prompt="a blue cabin", difference=path, generator=seeded(), **options).images
    stock = stock_pipeline(theirs)
    stock.load_textual_inversion(str(path))
    expected = stock("a blue cabin <difference>", generator=seeded(), **options).images
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


NOT_UNDONE = (
    "prediction_type sample",
    "of before 0.9",
)  # a query does not ask for a size; see the next test for the other


@pytest.mark.parametrize("change", [pytest.param(c, id=n) for n, c in AS_STOCK.items() if not n.endswith(NOT_UNDONE)])
def test_no_change_gives_the_query_back(change):
    _, parts = build_changed(change)
    pipe = build_pipeline(**parts)
    options = {"num_inference_steps": STEPS, "prompt": "a blue cabin", "generator": seeded(), "output_type": "pt"}
    image = picture("blue")
    found = pipe(image=image, difference=random_tokens(), difference_scale=0, **options).images
    with torch.no_grad():
        encoded = pipe.vae.encode(pipe.image_processor.preprocess(image))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        expected = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pt")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_learning_obeys_betas_that_a_scheduler_has_by_default(pair):
    """LCM's are Stable Diffusion's. DDPM's, whose noise is learned on, are others."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    learned = [
        build_pipeline(scheduler=scheduler).invert_difference(
            **pair, init="random", num_optimization_steps=2, generator=seeded()
        )
        for scheduler in (LCMScheduler(), DDIMScheduler(**betas), DDIMScheduler())
    ]
    first, same, other = (rows_of(difference) for difference in learned)
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, other, atol=1e-4)


def xl_tokens(pipe, value: float) -> DifferenceTokens:
    encoders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2}
    rows = {name: torch.full((1, encoder.config.hidden_size), value) for name, encoder in encoders.items()}
    return DifferenceTokens(rows)


STATISTICS = {"latents_mean": [0.5, -0.5, 0.1, 0.2], "latents_std": [2.0, 1.5, 0.5, 1.0]}


@pytest.mark.parametrize("vae", [{}, STATISTICS], ids=["plain", "mean and std"])
@pytest.mark.parametrize("force_zeros", [True, False])
def test_text_to_image_is_as_stock_sdxl_draws_it(vae, force_zeros):
    ours = build_backbone("sdxl", force_zeros_for_empty_prompt=force_zeros)
    ours.vae.register_to_config(**vae)
    stock = stock_of(ours)
    stock.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    options = {"prompt": "a blue cabin", "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
    found = ours(difference=xl_tokens(ours, 0.0), generator=seeded(), **options).images
    expected = stock(generator=seeded(), **options).images
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_sdxls_latents_are_those_that_its_vae_says_in_both_directions():
    pipe = build_backbone("sdxl")
    image = picture("blue", size=(64, 64))
    query = {"image": image, "prompt": "a cabin", "num_inference_steps": STEPS, "difference_scale": 0}
    query["difference"] = xl_tokens(pipe, 1.0)
    plain = pipe(**query, output_type="latent", generator=seeded()).images
    mean, std = (
        torch.tensor([0.5, -0.5, 0.1, 0.2]).view(1, 4, 1, 1),
        torch.tensor([2.0, 1.5, 0.5, 1.0]).view(1, 4, 1, 1),
    )
    pipe.vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    factor = pipe.vae.config.scaling_factor
    expected = (plain / factor - mean) * factor / std
    found = pipe(**query, output_type="latent", generator=seeded()).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- refused


def register(part: str, **fields):
    return lambda pipe: getattr(pipe, part).register_to_config(**fields)


def set_attribute(part: str, name: str, value):
    return lambda pipe: setattr(getattr(pipe, part), name, value)


def narrow_unet(pipe):
    pipe.unet = build_unet(width=8)


def another_unet(pipe):
    pipe.unet = UNet2DModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(4,),
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
    )


def flow_scheduler(pipe):
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")


REFUSED_BY_NAME = {
    "in_channels": (register("unet", in_channels=9), "`unet` has 9 input channels"),
    "latent_channels": (register("vae", latent_channels=16), "`unet` has 4 input channels for latents of 16"),
    "out_channels": (register("unet", out_channels=8), "`unet` has out_channels 8"),
    "cross_attention_dim": (narrow_unet, "`unet` attends to prompts of width 8, and the text encoders give 16"),
    "encoder_hid_dim_type": (
        register("unet", encoder_hid_dim_type="ip_image_proj"),
        "'ip_image_proj'.*unload_ip_adapter",
    ),
    "class_embed_type": (register("unet", class_embed_type="timestep"), "class_embed_type 'timestep'.*upscalers"),
    "num_class_embeds": (register("unet", num_class_embeds=1000), "num_class_embeds 1000.*upscalers"),
    "addition_embed_type": (register("unet", addition_embed_type="image"), "addition_embed_type 'image'"),
    "time_cond_proj_dim": (register("unet", time_cond_proj_dim=256), "time_cond_proj_dim 256.*distilled"),
    "a UNet of another class": (another_unet, "`unet` is a UNet2DModel, and a UNet2DConditionModel is what to load"),
    "prediction_type": (flow_scheduler, "`scheduler` is DDIMScheduler with prediction_type 'flow_prediction'"),
    "model_max_length": (
        set_attribute("tokenizer", "model_max_length", 10**30),
        "`tokenizer` has model_max_length 10.*Set `pipe.tokenizer.model_max_length = ",
    ),
    "pad_token": (set_attribute("tokenizer", "pad_token", None), "`tokenizer` has no pad_token"),
}


@pytest.mark.parametrize("change, message", REFUSED_BY_NAME.values(), ids=REFUSED_BY_NAME)
def test_what_this_pipeline_cannot_obey_is_refused_by_name_before_any_model_runs(pipe, pair, change, message):
    change(pipe)
    calls = (
        lambda: pipe(image=picture("blue"), prompt="a", difference=random_tokens()),
        lambda: pipe(prompt="a", difference=random_tokens()),
        lambda: pipe.invert_difference(**pair),
    )
    with forward_calls(pipe.unet, pipe.vae.encoder, pipe.text_encoder) as made:
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
    assert not made


def test_sdxls_refiner_and_others_that_are_told_other_numbers_are_refused():
    pipe = build_backbone("sdxl")
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=7)
    with pytest.raises(ValueError, match="told of a picture in 7 numbers"):
        pipe(prompt="a cabin", source_prompt="a boat", image=picture(size=(64, 64)))
    pipe.unet.register_to_config(addition_time_embed_dim=3)
    with pytest.raises(ValueError, match="told of a picture in 7 numbers"):
        pipe(prompt="a cabin", source_prompt="a boat", image=picture(size=(64, 64)))


def test_a_scheduler_without_betas_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler` is FlowMatchEulerDiscreteScheduler"):
        pipe(prompt="a cabin", difference=random_tokens())
    pipe.scheduler = build_scheduler()
    assert pipe(prompt="a cabin", difference=random_tokens(), num_inference_steps=1).images
