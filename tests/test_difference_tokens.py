# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WIDTH, build_components, build_pipeline, embedded, random_tokens, rows_of, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers import StableDiffusionPipeline
from pipeline_difference_inversion import DifferenceTokens


@pytest.fixture
def tokens() -> DifferenceTokens:
    return random_tokens(num_tokens=3)


# -------------------------------------------------------------------------------------------------- arithmetic


def test_a_difference_can_be_scaled_from_either_side(tokens):
    torch.testing.assert_close(rows_of(0.5 * tokens), 0.5 * rows_of(tokens))
    torch.testing.assert_close(rows_of(tokens * 2), 2 * rows_of(tokens))


def test_a_negated_difference_is_the_change_undone(tokens):
    torch.testing.assert_close(rows_of(-tokens), -rows_of(tokens))
    undone = -tokens
    torch.testing.assert_close(rows_of(-undone), rows_of(tokens))


def test_a_negated_difference_tells_its_story_the_other_way_round():
    tokens = DifferenceTokens(
        {"<difference>": torch.ones(1, 4)}, {"before_prompt": "a cabin", "after_prompt": "a tent"}
    )
    assert "a tent → a cabin" in repr(-tokens)
    assert "a cabin → a tent" in repr(0.5 * tokens)


def test_a_sum_remembers_the_base_model_that_both_share():
    one, other = (DifferenceTokens({"<difference>": torch.ones(1, 4)}, {"base_model": "sd", "seed": s}) for s in "12")
    assert (one + other).metadata == {"base_model": "sd"}


def test_arithmetic_keeps_what_a_difference_takes_the_place_of():
    one, other = (
        DifferenceTokens({"<difference>": torch.ones(1, 4)}, {"lost_phrases": lost, "gained_phrases": gained})
        for lost, gained in (("cabin\nred", "castle"), ("by day", "at night"))
    )
    assert (one + other).metadata == {"lost_phrases": "cabin\nred\nby day", "gained_phrases": "castle\nat night"}
    assert (one + -0.5 * other).metadata["lost_phrases"] == "cabin\nred\nat night"
    assert (0 * one + other).metadata["lost_phrases"] == "by day"
    assert (-(0 * one + other)).metadata["lost_phrases"] == "at night"
    nothing = DifferenceTokens({"<difference>": torch.zeros(1, 4)}, dict(one.metadata))
    assert (nothing + other).metadata["lost_phrases"] == "by day"


def test_a_sum_of_two_ways_back_is_the_way_back_of_the_sum():
    one, other = (
        DifferenceTokens({"<difference>": torch.ones(1, 4)}, {"lost_phrases": lost, "gained_phrases": gained})
        for lost, gained in (("day", "night"), ("grass", "snow"))
    )
    assert (-one + -other).metadata == (-(one + other)).metadata
    assert "negated" not in (one + -other).metadata


def test_a_sum_has_the_rows_of_both_one_after_the_other(tokens):
    other = random_tokens(num_tokens=2, seed=6)
    torch.testing.assert_close(rows_of(tokens + other), torch.cat([rows_of(tokens), rows_of(other)]))
    assert list((tokens + other).embeddings) == ["<difference>"]


def test_arithmetic_leaves_its_operands_alone(tokens):
    rows, metadata = rows_of(tokens).clone(), dict(tokens.metadata)
    results = [0.5 * tokens, -tokens, tokens + tokens]
    for result in results:
        rows_of(result).zero_()
        result.metadata["before_prompt"] = "something else"
    assert torch.equal(rows_of(tokens), rows)
    assert tokens.metadata == metadata


def test_differences_for_different_numbers_of_text_encoders_do_not_add(tokens):
    other = DifferenceTokens({"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(2, 16)})
    with pytest.raises(ValueError, match="text encoders"):
        tokens + other


def test_differences_of_other_widths_do_not_add(tokens):
    with pytest.raises(ValueError, match="different base models"):
        DifferenceTokens({"<cat>": torch.ones(1, 8)}) + DifferenceTokens({"<dog>": torch.ones(1, 4)})


def test_a_number_in_a_name_is_no_ending(tokens, tmp_path):
    assert tokens.save(tmp_path / "castle_0.7").name == "castle_0.7.safetensors"


def test_to_gives_a_copy_in_another_type(tokens):
    half = tokens.to(dtype=torch.float16)
    assert rows_of(half).dtype == torch.float16
    assert rows_of(tokens).dtype == torch.float32
    assert half.metadata == tokens.metadata


def test_repr_says_name_shape_and_prompts_and_no_numbers():
    text = repr(random_tokens(num_tokens=3))
    for part in ("DifferenceTokens", "<difference>", f"(3, {WIDTH})", "a cabin", "a castle"):
        assert part in text
    assert "tensor" not in text
    assert "\n" not in text


def test_repr_does_without_prompts():
    assert repr(DifferenceTokens({"<difference>": torch.zeros(1, 4)})) == "DifferenceTokens(<difference> (1, 4))"


# ------------------------------------------------------------------------------------------------------ saving


def test_nearest_words_names_what_tokens_are_words_for(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    ids = pipe.tokenizer("castle snow", add_special_tokens=False).input_ids
    castle, snow = table[ids]
    tokens = DifferenceTokens({"<difference>": torch.stack([castle, 3 * snow, castle + snow])})
    words = tokens.nearest_words(pipe.tokenizer, pipe.text_encoder, count=2)
    assert [len(found) for found in words] == [2, 2, 2]
    assert words[0][0] == ("castle", pytest.approx(1, abs=1e-5)) and words[1][0] == (
        "snow",
        pytest.approx(1, abs=1e-5),
    )
    assert {word for word, _ in words[2]} == {"castle", "snow"}
    assert all(first[1] >= second[1] for first, second in words)


def test_nearest_words_never_names_a_special_token(pipe):
    start = pipe.text_encoder.get_input_embeddings().weight.detach()[[pipe.tokenizer.bos_token_id]]
    (words,) = DifferenceTokens({"<difference>": start}).nearest_words(pipe.tokenizer, pipe.text_encoder, count=10**6)
    assert len(words) == len(pipe.tokenizer) - len(set(pipe.tokenizer.all_special_ids))
    assert not {word for word, _ in words} & set(pipe.tokenizer.all_special_tokens)


@pytest.mark.parametrize("width, count, complaint", [(8, 1, "`text_encoder`.*of size 16"), (WIDTH, 0, "`count` is 0")])
def test_nearest_words_says_what_does_not_fit(pipe, width, count, complaint):
    tokens = DifferenceTokens({"<difference>": torch.ones(2, width)})
    with pytest.raises(ValueError, match=complaint):
        tokens.nearest_words(pipe.tokenizer, pipe.text_encoder, count)


def test_words_are_text_until_they_are_scaled(pipe):
    def words(text: str) -> DifferenceTokens:
        ids = pipe.tokenizer(text, add_special_tokens=False).input_ids
        rows = pipe.text_encoder.get_input_embeddings().weight.detach()[ids]
        return DifferenceTokens({"<difference>": rows}, {"token_ids": " ".join(map(str, ids))})

    castle, night = words("castle"), words("night")
    assert castle.to_text(pipe.tokenizer) == "castle"
    assert (castle + 1.0 * night).to_text(pipe.tokenizer) == "castle night"
    for other in (-castle, 0.5 * castle, castle + random_tokens()):
        with pytest.raises(ValueError, match="not made of words.*hard"):
            other.to_text(pipe.tokenizer)


def test_a_saved_difference_loads_as_it_was(tokens, tmp_path):
    path = tokens.save(tmp_path / "cabin_to_castle.safetensors")
    loaded = DifferenceTokens.load(path)
    assert list(loaded.embeddings) == ["<difference>"]
    assert torch.equal(rows_of(loaded), rows_of(tokens))
    assert tokens.metadata.items() <= loaded.metadata.items()
    assert repr(loaded) == repr(tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_is_kept(tokens, tmp_path, dtype):
    loaded = DifferenceTokens.load(tokens.to(dtype=dtype).save(tmp_path / "d.safetensors"))
    assert torch.equal(rows_of(loaded), rows_of(tokens).to(dtype))


def test_a_file_for_two_text_encoders_loads_as_it_was(tmp_path):
    both = DifferenceTokens({"clip_l": torch.randn(2, 8), "clip_g": torch.randn(2, 16)})
    loaded = DifferenceTokens.load(both.save(tmp_path / "two.safetensors"))
    assert set(loaded.embeddings) == {"clip_l", "clip_g"}
    for name, rows in both.embeddings.items():
        assert torch.equal(loaded.embeddings[name], rows)


def test_the_file_says_what_it_is(tokens, tmp_path):
    with safe_open(tokens.save(tmp_path / "d.safetensors"), framework="pt") as file:
        assert file.metadata()["format"] == "difference-tokens"
        assert file.metadata()["format_version"] == "1"
        assert list(file.keys()) == [file.metadata()["token"]] == ["<d>"]


def test_a_saved_difference_takes_the_name_that_it_is_given(tokens, tmp_path):
    path = tokens.save(tmp_path / "d.safetensors", token="castle*")
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["castle*"]
    assert torch.equal(rows_of(DifferenceTokens.load(path)), rows_of(tokens))


def test_a_foreign_file_saved_again_says_that_it_is_ours(tmp_path):
    save_file({"<cat>": torch.randn(2, WIDTH)}, tmp_path / "cat.safetensors", metadata={"format": "pt"})
    path = DifferenceTokens.load(tmp_path / "cat.safetensors").save(tmp_path / "again.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "difference-tokens"


def test_a_name_without_ending_gets_one_and_folders_are_made(tokens, tmp_path):
    path = tokens.save(str(tmp_path / "new" / "folder" / "cabin_to_castle"))
    assert path == tmp_path / "new" / "folder" / "cabin_to_castle.safetensors"
    assert torch.equal(rows_of(DifferenceTokens.load(str(path))), rows_of(tokens))


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(tokens, tmp_path):
    tokens.save(tmp_path / "d.safetensors")
    (-tokens).save(tmp_path / "d.safetensors")
    assert torch.equal(rows_of(DifferenceTokens.load(tmp_path / "d.safetensors")), -rows_of(tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_saved_file_can_be_read_by_whom_the_umask_says(tokens, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        assert tokens.save(tmp_path / "d.safetensors").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_metadata_of_any_kind_is_saved_as_text(tmp_path):
    tokens = DifferenceTokens({"<difference>": torch.zeros(2, 4)}, {"seed": 7, "title": None})
    metadata = DifferenceTokens.load(tokens.save(tmp_path / "d")).metadata
    assert (metadata["seed"], metadata["title"]) == ("7", "None")


def test_loaded_tokens_do_not_need_their_file_any_more(tmp_path):
    """In a process of its own, which would die by a signal if they were still the file."""
    path = DifferenceTokens({"<difference>": torch.ones(400, 768)}).save(tmp_path / "d.safetensors")
    code = (
        "import sys; from pipeline_difference_inversion import DifferenceTokens\n"
        "tokens = DifferenceTokens.load(sys.argv[1]); open(sys.argv[1], 'r+b').truncate(0)\n"
        "print(float(tokens.embeddings['<difference>'].sum()))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout.strip()) == (0, str(400.0 * 768)), run.stderr


@pytest.mark.parametrize("name", ["<Cabin-To-Castle>", "two words"])
def test_names_that_diffusers_does_not_know_are_refused_before_anything_is_written(name, tokens, tmp_path):
    with pytest.raises(ValueError, match=f"`token`.*lower case.*{name}"):
        tokens.save(tmp_path / "d.safetensors", token=name)
    two = DifferenceTokens({"clip_l": torch.zeros(2, 4), "clip_g": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match="`token`.*when they are loaded"):
        two.save(tmp_path / "d.safetensors", token="<cabin>")
    assert not list(tmp_path.iterdir())


def shared_memory() -> DifferenceTokens:
    rows = torch.zeros(2, 4)
    return DifferenceTokens({"<one>": rows, "<two>": rows})


def test_a_difference_that_cannot_be_written_leaves_the_old_file_whole(tokens, tmp_path):
    path = tokens.save(tmp_path / "d.safetensors")
    old = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017 - safetensors' own, which differs by version
        shared_memory().save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_leaves_the_old_file_whole(tokens, tmp_path):
    path = tokens.save(tmp_path / "d.safetensors")
    old = path.read_bytes()
    large = DifferenceTokens({"<difference>": torch.randn(40, 1024)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            large.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_the_file_is_left_alone(tokens, tmp_path):
    folder = tmp_path / "d.safetensors"
    folder.mkdir()
    with pytest.raises(OSError):
        tokens.save(folder)
    assert list(tmp_path.iterdir()) == [folder]


# ----------------------------------------------------------------------------------------------------- loading


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="`difference`.*nowhere.safetensors"):
        DifferenceTokens.load(tmp_path / "nowhere.safetensors")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_is_refused_by_name_and_does_not_run(write, tmp_path):
    path, mark = tmp_path / "trap.safetensors", tmp_path / "it_ran"
    write({"<difference>": torch.zeros(2, 4), "trap": Trap(mark)}, path)
    with pytest.raises(ValueError, match="`difference`.*trap.safetensors.*pickle"):
        DifferenceTokens.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_called_damaged(keep, tokens, tmp_path):
    path = tokens.save(tmp_path / "d.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="`difference`.*d.safetensors.*damaged"):
        DifferenceTokens.load(path)


def test_a_picture_is_no_difference(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="`difference`.*picture.png.*not a safetensors file"):
        DifferenceTokens.load(path)


WRONG_TENSORS = {
    "three dimensions": ({"<difference>": torch.zeros(1, 2, 4)}, r"\(1, 2, 4\).*matrices"),
    "integers": ({"<difference>": torch.zeros(2, 4, dtype=torch.int64)}, "int64.*floating-point"),
    "not a number": ({"<difference>": torch.tensor([[0.0, float("nan")]])}, "not finite"),
    "infinite": ({"<difference>": torch.tensor([[0.0, float("inf")]])}, "not finite"),
    "no tensor": ({}, "no tensor"),
}


@pytest.mark.parametrize("tensors, message", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_that_are_no_difference_are_refused(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=f"`difference`.*{message}"):
        DifferenceTokens.load(tmp_path / "d.safetensors")


def test_a_file_of_ours_with_a_vector_in_place_of_a_matrix_is_refused(tmp_path):
    save_file({"<difference>": torch.zeros(4)}, tmp_path / "d.safetensors", metadata={"format": "difference-tokens"})
    with pytest.raises(ValueError, match=r"`difference`.*\(4,\).*matrices"):
        DifferenceTokens.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("version", ["2", "17", "1.5", "next"])
def test_a_newer_format_is_refused_with_the_remedy(version, tmp_path):
    metadata = {"format": "difference-tokens", "format_version": version}
    save_file({"<difference>": torch.zeros(2, 4)}, tmp_path / "d.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=f"`difference`.*format_version '{version}'.*[Uu]pdate"):
        DifferenceTokens.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_textual_inversion_from_elsewhere_is_accepted(metadata, tmp_path):
    rows = torch.randn(2, WIDTH, generator=seeded())
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors", metadata=metadata)
    loaded = DifferenceTokens.load(tmp_path / "cat.safetensors")
    assert torch.equal(loaded.embeddings["<cat>"], rows)


# ---------------------------------------------------------------------------------------- in stock Stable Diffusion


def stock_pipeline() -> StableDiffusionPipeline:
    own = {name: part for name, part in build_components().items() if not name.startswith("clip")}
    return StableDiffusionPipeline(**own, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def test_stock_stable_diffusion_loads_a_learned_difference_and_understands_it_as_we_do(pair, tmp_path):
    pipe = build_pipeline()
    difference = pipe.invert_difference(**pair, num_tokens=3, num_optimization_steps=3, generator=seeded())
    path = difference.save(tmp_path / "difference.safetensors")
    stock = stock_pipeline()

    stock.load_textual_inversion(str(path))

    theirs, _ = stock.encode_prompt("a blue cabin <difference>", "cpu", 1, False)
    ours = embedded(pipe, ["a blue cabin"], rows_of(difference))
    torch.testing.assert_close(ours, theirs)
    without = embedded(pipe, ["a blue cabin"])
    assert (ours - without).abs().max() > 0.1


def test_two_saved_differences_load_into_one_stock_pipeline(tmp_path):
    differences = {"Cabin to castle": random_tokens(num_tokens=3), "grass_to_snow": random_tokens(num_tokens=1)}
    stock = stock_pipeline()
    for name, difference in differences.items():
        stock.load_textual_inversion(str(difference.save(tmp_path / name)))
    table = stock.text_encoder.get_input_embeddings().weight
    ids = stock.tokenizer(stock.maybe_convert_prompt("<cabin-to-castle> <grass_to_snow>", stock.tokenizer)).input_ids[
        1:-1
    ]
    torch.testing.assert_close(table[ids], torch.cat([rows_of(d) for d in differences.values()]))


def test_the_file_holds_the_bare_matrix_that_other_programs_read(tokens, tmp_path):
    tensors = load_file(tokens.save(tmp_path / "d.safetensors"))
    assert {name: tuple(rows.shape) for name, rows in tensors.items()} == {"<d>": (3, WIDTH)}
