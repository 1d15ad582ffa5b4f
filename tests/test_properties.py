# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Whatever people put in comes out right or is refused by name: pictures, numbers, prompts and files that hypothesis makes up.

`HYPOTHESIS_PROFILE=many pytest tests/test_properties.py` tries many more than the few hundred that are tried by default.
"""

import math
import os
import socket

import numpy as np
import pytest
import torch
from conftest import build_pipeline, random_tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline_difference_inversion import (
    DifferenceTokens,
    LearningConfig,
    as_pictures,
    shared_prompt,
    split_words,
    without_phrases,
)


common = {"deadline": None, "derandomize": True, "database": None}
settings.register_profile("few", max_examples=60, **common)
settings.register_profile("many", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(autouse=True)
def no_connections(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# ------------------------------------------------------------------------------------------------ difference files


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory) -> bytes:
    tokens = random_tokens(num_tokens=3)
    tokens.metadata["lost_phrases"] = "pine tree\nday"
    return tokens.save(tmp_path_factory.mktemp("whole") / "d.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def loads_or_is_refused(folder, content: bytes) -> None:
    path = folder / "d.safetensors"
    path.write_bytes(content)
    try:
        tokens = DifferenceTokens.load(path)
    except ValueError as error:
        assert str(error).startswith("`difference`: ")
    else:
        assert all(rows.ndim == 2 and rows.isfinite().all() for rows in tokens.embeddings.values())
        assert all(isinstance(value, str) for value in tokens.metadata.values())
    assert list(folder.iterdir()) == [path]


@given(data=st.data())
def test_a_file_that_was_cut_is_refused(whole_file, folder, data):
    loads_or_is_refused(folder, whole_file[: data.draw(st.integers(0, len(whole_file) - 1))])


@given(data=st.data())
def test_a_file_with_other_bytes_in_it_is_read_or_refused(whole_file, folder, data):
    content = bytearray(whole_file)
    # The header says what the rest is, and comes first.
    places = st.one_of(st.integers(0, 300), st.integers(0, len(content) - 1))
    for place, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8)):
        content[place] ^= 1 << bit
    loads_or_is_refused(folder, bytes(content))


@given(content=st.binary(max_size=200))
def test_other_files_are_refused(folder, content):
    loads_or_is_refused(folder, content)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@given(rows=st.integers(1, 4), metadata=st.dictionaries(names, st.one_of(st.none(), st.integers(), names), max_size=5))
def test_what_is_saved_is_what_is_loaded(folder, rows, metadata):
    assume(not {"token", "format", "format_version"} & metadata.keys())
    tokens = random_tokens(num_tokens=rows)
    loaded = DifferenceTokens.load(DifferenceTokens(tokens.embeddings, metadata).save(folder / "d.safetensors"))
    assert torch.equal(loaded.embeddings["<difference>"], tokens.embeddings["<difference>"])
    assert {name: loaded.metadata[name] for name in metadata} == {name: str(value) for name, value in metadata.items()}


# --------------------------------------------------------------------------------------------------------- numbers


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 2000),
    st.floats(),
    st.floats(-1, 2),
    st.complex_numbers(),
    st.decimals(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.sampled_from(["words", "random", "zeros", "soft", "hard", "contrast", "consistency", "ddpm", "ddim", "sdedit"]),
    st.sampled_from([np.float32(0.5), np.int64(3), np.array([1, 2]), torch.tensor(0.5), {}, object(), 10**400]),
)


@given(name=st.sampled_from(list(LearningConfig.__dataclass_fields__)), value=anything)
def test_a_setting_of_learning_is_taken_or_refused_by_its_name(name, value):
    try:
        config = LearningConfig(**{name: value})
    except (ValueError, TypeError) as error:
        assert f"`{name}`" in str(error)
    else:
        taken = getattr(config, name)
        assert taken is None or isinstance(taken, (bool, str)) or math.isfinite(taken)


DRAWING = ("num_inference_steps", "guidance_scale", "strength", "eta", "num_images_per_prompt", "difference_scale")
CHOICES = ("height", "width", "inversion", "output_type", "generator", "prompt", "source_prompt", "negative_prompt")


@given(name=st.sampled_from([*DRAWING, *CHOICES]), value=anything)
def test_an_argument_of_a_call_draws_a_picture_or_is_refused_by_its_name(pipe, name, value):
    small = {"num_inference_steps", "num_images_per_prompt", "height", "width"}
    assume(not (name in small and isinstance(value, int) and value > 64))  # is right, and takes its time
    given = {"image": Image.new("RGB", (16, 16), "red"), "prompt": "a boat", "difference": random_tokens()}
    given |= {"num_inference_steps": 1, "output_type": "latent", "complete_prompts": False}
    try:
        images = pipe(**given | {name: value}).images
    except (ValueError, TypeError) as error:
        assert f"`{name}`" in str(error) or f"`{name}" in str(error)
    else:
        assert len(images) >= 1


# -------------------------------------------------------------------------------------------------------- pictures


MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "La",
    "RGBa",
)
sides, whole_latents = st.integers(1, 24), st.sampled_from([8, 16, 40])


def pixels_of(pipe, given, size: tuple[int, int]) -> torch.Tensor | None:
    """What the VAE is given for one picture or several, or None if they are refused by their name."""
    try:
        pictures = as_pictures(given, "image")
    except (ValueError, TypeError) as error:
        assert "`image`" in str(error)
        return None
    pixels = pipe._pixels(pictures, size)
    assert pixels.shape == (len(pictures), 3, *size) and pixels.dtype == torch.float32
    assert pixels.isfinite().all() and pixels.abs().max() <= 1.03  # floats may end at 1.01
    return pixels


@given(mode=st.sampled_from(MODES), width=whole_latents, height=whole_latents, seed=st.integers(0, 2**32 - 1))
def test_a_picture_of_any_mode_is_what_pillow_makes_of_it(pipe, mode, width, height, seed):
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode in ("La", "RGBa"):
        image = colours.convert(mode.upper()).convert(mode)
    elif mode == "PA":
        image = colours.convert("P").convert("PA")
    elif mode == "LAB":
        image = Image.merge("LAB", colours.split())
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(colours.convert("L")).astype(np.float32) / 255)
    else:
        image = colours.convert(mode)
    assert image.mode == mode
    straight = colours.convert("L") if mode in ("I", "F", "I;16", "La") else image
    expected = pipe._pixels([straight.convert("RGB")], (height, width))
    torch.testing.assert_close(pixels_of(pipe, image, (height, width)), expected, atol=0.03, rtol=0)


dtypes = st.sampled_from(
    ["uint8", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]
)
shapes = st.lists(st.integers(0, 6), min_size=0, max_size=5) | st.tuples(sides, sides, st.sampled_from([1, 2, 3, 4]))


# diffusers warns of floats below 0, which it still accepts.
@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")
@given(
    dtype=dtypes, shape=shapes, low=st.floats(-2, 2), high=st.floats(0, 400), seed=st.integers(0, 9), bad=st.booleans()
)
def test_an_array_or_tensor_is_a_picture_or_is_refused_by_its_name(pipe, dtype, shape, low, high, seed, bad):
    array = np.random.default_rng(seed).uniform(min(low, high), max(low, high), tuple(shape))
    if bad and array.size:
        array.flat[0] = math.nan
    with np.errstate(all="ignore"):
        array = array.astype(dtype)
    pixels_of(pipe, array, (16, 24))
    first = np.moveaxis(array, -1, 0) if array.ndim == 3 else array
    if dtype != "uint16":
        pixels_of(pipe, torch.from_numpy(np.ascontiguousarray(first)), (16, 24))


# --------------------------------------------------------------------------------------------------------- prompts


prompts = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from("a red pine tree , . on <cat> snow RED not without café 🦊 日本語".split(" ")), max_size=90
    ).map(" ".join),
)


@given(prompt=prompts)
def test_any_prompt_is_encoded_as_stock_encodes_it(pipe, prompt):
    ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids)[0]
    torch.testing.assert_close(pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0], expected)


@given(prompt=prompts, other=prompts)
def test_what_two_prompts_share_is_said_by_both(prompt, other):
    shared = split_words(shared_prompt(prompt, other))
    assert set(shared) <= set(split_words(prompt)) & set(split_words(other))


@given(prompt=prompts, phrases=st.lists(prompts, max_size=3))
def test_taking_phrases_out_of_a_prompt_adds_nothing_to_it(prompt, phrases):
    left = without_phrases(prompt, phrases)
    rest = iter(prompt)
    assert all(letter in rest for letter in left)
    assert without_phrases(prompt, []) == prompt.strip()
