# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Prompts that nobody gave: captioners of several kinds, and PEZ."""

import pytest
import torch
from conftest import (
    SIDE,
    TOWER,
    VISION,
    WIDTH,
    analogy,
    build_captioner,
    build_chat_captioner,
    build_pipeline,
    forward_calls,
    picture,
    rows_of,
    seeded,
    with_image_token,
)
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
)


PICTURES = [picture("red"), picture("yellow"), picture("blue", "white")]


def build_blip_2() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    torch.manual_seed(7)
    tokenizer = with_image_token()
    text = {"model_type": "opt", "vocab_size": len(tokenizer), "word_embed_proj_dim": 16, "ffn_dim": 32}
    text |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "init_std": 1.0}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=TOWER | {"encoder_hidden_size": 16, "vocab_size": 10},
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = Blip2Processor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, num_query_tokens=4)
    return Blip2ForConditionalGeneration(config).eval(), processor


CAPTIONERS = {"BLIP": build_captioner, "BLIP-2": build_blip_2, "a model that converses": build_chat_captioner}


@pytest.mark.parametrize("build", CAPTIONERS.values(), ids=CAPTIONERS)
def test_any_captioner_describes_images_and_learning_uses_what_it_says(build, pair):
    captioner, processor = build()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    captions = pipe.caption(PICTURES)
    assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)
    assert captions == [pipe.caption([image])[0] for image in PICTURES]
    images = {"before": PICTURES[0], "after": PICTURES[1]}
    difference = pipe.invert_difference(**images, num_optimization_steps=1, generator=seeded())
    assert [difference.metadata[name] for name in ("before_prompt", "after_prompt")] == captions[:2]


def test_a_captioner_that_converses_is_asked_the_question_and_says_only_its_answer():
    captioner, processor = build_chat_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    with forward_calls(captioner) as calls:
        (caption,) = pipe.caption([PICTURES[0]], question="what is red", max_new_tokens=5)
    asked = processor.batch_decode(calls[0][2]["input_ids"])[0]
    assert "what is red" in asked and "assistant" in asked
    assert "what is red" not in caption and "assistant" not in caption
    with forward_calls(captioner) as calls:
        pipe.caption(PICTURES, question="where is it", max_new_tokens=3)
    asked = [processor.batch_decode(keywords["input_ids"])[0] for _, _, keywords, _, _ in calls]
    assert sum("where is it" in text for text in asked) == 3


def test_the_query_is_described_before_learning_and_a_pairs_pictures_together():
    captioner, processor = build_captioner()
    pipe = build_pipeline(captioner=captioner, captioner_processor=processor)
    images = {"image": PICTURES[2], "before": PICTURES[0], "after": PICTURES[1]}
    with forward_calls(captioner.vision_model) as calls:
        out = analogy(pipe, **images, num_optimization_steps=1, num_inference_steps=1)
    assert [len(keywords["pixel_values"]) for _, _, keywords, _, _ in calls] == [1, 2]
    prompts = [out.difference.metadata[name] for name in ("before_prompt", "after_prompt")]
    assert prompts == pipe.caption(PICTURES[:2])


# ------------------------------------------------------------------------------------------------------------ PEZ


def cosines(pipe, images, prompts) -> torch.Tensor:
    inputs = pipe.clip_processor(images=images, text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = pipe.clip(**inputs)
    return (out.image_embeds * out.text_embeds).sum(-1)


def test_hard_prompts_are_words_that_clip_finds_nearer_to_the_image_the_longer_it_looks(pipe):
    begun, ended = (pipe.hard_prompts(PICTURES, num_steps=steps, generator=seeded()) for steps in (1, 60))
    assert (cosines(pipe, PICTURES, ended) > cosines(pipe, PICTURES, begun) + 0.05).all()
    vocabulary = pipe.tokenizer.get_vocab()
    for prompt in ended:
        ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
        assert 1 <= len(ids) <= 16
        assert all(f"{word}</w>" in vocabulary for word in prompt.split())


def test_hard_prompts_of_several_images_are_those_of_each_alone(pipe):
    """The first image's start is drawn first, so it is the same whoever comes after it."""
    together = pipe.hard_prompts(PICTURES, num_tokens=3, num_steps=20, generator=seeded())
    alone = pipe.hard_prompts(PICTURES[:1], num_tokens=3, num_steps=20, generator=seeded())
    assert together[:1] == alone


def test_hard_prompts_are_repeatable_and_as_long_as_asked(pipe):
    options = {"num_tokens": 5, "num_steps": 5, "tolerance": None, "num_revisions": 0}
    first, again, other = (pipe.hard_prompts(PICTURES[:1], **options, generator=seeded(s)) for s in (0, 0, 1))
    assert first == again != other
    assert len(first[0].split()) == 5


def test_words_that_serve_nothing_are_left_out_of_hard_prompts(pipe):
    options = {"num_tokens": 6, "num_steps": 1, "num_revisions": 0}  # words of which few serve
    whole, needed, one = (
        pipe.hard_prompts(PICTURES, **options, tolerance=tolerance, generator=seeded()) for tolerance in (None, 0, 2)
    )
    assert (cosines(pipe, PICTURES, needed) >= cosines(pipe, PICTURES, whole) - 1e-5).all()
    assert [len(prompt.split()) for prompt in one] == [1] * len(PICTURES)
    for prompt, longer in zip(needed, whole, strict=True):
        assert len(prompt.split()) < 6
        rest = iter(longer.split())
        assert all(word in rest for word in prompt.split())  # in the order that they had


def test_revised_hard_prompts_keep_to_their_length_and_words(pipe):
    options = {"num_tokens": 4, "num_steps": 5}
    first, again = (pipe.hard_prompts(PICTURES, **options, num_revisions=3, generator=seeded()) for _ in range(2))
    assert first == again != pipe.hard_prompts(PICTURES, **options, num_revisions=0, generator=seeded())
    for prompt in first:
        ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
        assert 1 <= len(ids) == len(prompt.split()) <= 4


def test_pez_shows_the_unet_pictures_at_the_size_that_is_asked_for(pipe):
    pictures = {"before": picture("red", size=(72, 56)), "after": picture("yellow", size=(6, 5))}
    with forward_calls(pipe.unet) as calls:
        pipe.hard_prompts(list(pictures.values()), num_tokens=2, num_steps=1, height=32, width=40)
    assert {tuple(arguments[0].shape[-2:]) for _, arguments, *_ in calls} == {(4, 5)}
    with forward_calls(pipe.clip, pipe.clip.vision_model) as calls:
        with pytest.raises(ValueError, match="`images` is 5×6.*`height`"):
            pipe.hard_prompts([pictures["after"]])
        assert not calls


def test_pez_leaves_the_components_as_they_were(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight.clone()
    pipe.clip.train()
    pipe.hard_prompts(PICTURES[:1], num_steps=2)
    assert pipe.clip.training and all(p.requires_grad and p.grad is None for p in pipe.clip.parameters())
    assert torch.equal(table, pipe.text_encoder.get_input_embeddings().weight)
    assert rows_of(pipe.invert_difference(PICTURES[0], PICTURES[1], "a", "b", num_optimization_steps=1)).shape == (
        4,
        WIDTH,
    )


def test_prompts_that_nothing_can_write_are_asked_for_before_any_model_runs(pipe):
    with forward_calls(pipe.unet, pipe.text_encoder, pipe.vae.encoder) as calls:
        with pytest.raises(ValueError, match="`before_prompt`.*captioner"):
            pipe.invert_difference(PICTURES[0], PICTURES[1])
        with pytest.raises(ValueError, match="`prompt`.*captioner"):
            pipe(image=PICTURES[2], before=PICTURES[0], after=PICTURES[1])
        assert not calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_tokens": 0}, "`num_tokens` is 0.*at most 38"),
        ({"num_tokens": 39}, "`num_tokens` is 39.*at most 38"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0.*above 0"),
        ({"tolerance": -0.1}, "`tolerance` is -0.1; .*at least 0 and at most 2.*None"),
        ({"num_revisions": -1}, "`num_revisions` is -1"),
        ({"num_revisions": 1.5}, "`num_revisions` is 1.5.*whole"),
    ],
)
def test_hard_prompts_that_cannot_be_are_refused_by_name(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.hard_prompts(PICTURES, **options)


def test_pictures_that_are_missing_are_no_prompts(pipe):
    captioner, processor = build_captioner()
    for describe in (pipe.hard_prompts, build_pipeline(captioner=captioner, captioner_processor=processor).caption):
        with pytest.raises(TypeError, match="`images`.*NoneType"):
            describe(None)
        with pytest.raises(ValueError, match="`images` is an empty list"):
            describe([])


def test_hard_prompts_are_refused_by_name_before_any_model_runs(pipe):
    with forward_calls(pipe.clip, pipe.clip.vision_model, pipe.unet) as calls:
        with pytest.raises(TypeError, match="`generator`.*3"):
            pipe.hard_prompts(PICTURES, generator=3)
        pipe.vae = None
        with pytest.raises(ValueError, match="`vae` is missing"):
            pipe.hard_prompts(PICTURES)
        assert not calls


def test_asking_for_prompts_without_the_model_for_it_says_what_to_load(pair):
    pipe = build_pipeline(clip=None)
    with pytest.raises(ValueError, match="`clip` is missing"):
        pipe.hard_prompts(PICTURES)
    with pytest.raises(ValueError, match="no captioner.*`captioner_processor`"):
        pipe.caption(PICTURES)
