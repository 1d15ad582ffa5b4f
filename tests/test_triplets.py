# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Triplets drawn from small sets in the layout of InstructPix2Pix's."""

import io
import random
import sys
from collections import Counter
from pathlib import Path

import evaluate
import make_triplets
import pyarrow
import pyarrow.parquet
import pytest
from make_triplets import Draw, Record
from PIL import Image


def picture(number: int, edited: bool, mode: str = "RGB", kind: str = "PNG") -> dict:
    """Its first pixel says which it is."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 255 * edited, 0)).convert(mode).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def record(number: int, instruction: str) -> dict:
    return {
        "original_prompt": f"before {number}",
        "original_image": picture(number, False),
        "edit_prompt": instruction,
        "edited_prompt": f"after {number}",
        "edited_image": picture(number, True),
    }


def write_set(folder: Path, *files: list[dict]) -> Path:
    folder.mkdir()
    for index, records in enumerate(files):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"train-{index:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Of 40 records 8 are alone, and 8 instructions have 4 each."""
    instructions = [f"make it {n % 8}" if n % 5 else f"only {n}" for n in range(40)]
    records = [record(n, instruction) for n, instruction in enumerate(instructions)]
    return write_set(tmp_path_factory.mktemp("set") / "whole", records[:25], records[25:])


def drawn(dataset: Path, output: Path, *options: str) -> list[dict]:
    """The triplets as `evaluate` reads them."""
    assert make_triplets.main(["--dataset", str(dataset), "--output", str(output), *options]) == 0
    return evaluate.read_triplets(output / "triplets.jsonl")


def numbers(triplet: dict) -> tuple[int, int]:
    """Those of A's record and B's, when pictures and prompts all agree on them."""
    a, b = int(triplet["before_prompt"].split()[1]), int(triplet["prompt"].split()[1])
    assert triplet["after_prompt"] == f"after {a}" and triplet["prompt"] == f"before {b}"
    assert triplet["answer_prompt"] == f"after {b}" and triplet["instruction"]
    pixels = []
    for name in ("before", "after", "image", "target"):
        with Image.open(triplet[name]) as image:
            assert image.format == "PNG"
            pixels.append(image.getpixel((0, 0)))
    assert pixels == [(a, 0, 0), (a, 255, 0), (b, 0, 0), (b, 255, 0)]
    return a, b


def test_b_is_another_record_with_as_instruction(whole, tmp_path, capsys):
    pairs = [numbers(triplet) for triplet in drawn(whole, tmp_path / "out")]
    assert all(a != b and a % 8 == b % 8 and a % 5 and b % 5 for a, b in pairs)
    assert len(pairs) == 16 and len({number for pair in pairs for number in pair}) == 32  # none is in two
    said = capsys.readouterr().out
    assert "16 triplets of 300 asked for" in said
    assert "40 records read, 8 instructions seen once, 0 records damaged" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert len(list((tmp_path / "out").iterdir())) == 4 * 16 + 1


def test_the_seed_says_which_triplets_are_drawn(whole, tmp_path):
    def draw(name: str, seed: int) -> list[tuple[int, int]]:
        return [numbers(t) for t in drawn(whole, tmp_path / name, "--count", "5", "--seed", str(seed))]

    assert len(draw("first", 0)) == 5
    assert draw("again", 0) == [numbers(t) for t in evaluate.read_triplets(tmp_path / "first" / "triplets.jsonl")]
    assert draw("other", 1) != draw("more", 0)
    files = [sorted((tmp_path / name).iterdir()) for name in ("first", "again")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_it_stops_after_as_many_records_as_asked_for(whole, tmp_path, capsys):
    pairs = [numbers(triplet) for triplet in drawn(whole, tmp_path / "out", "--records", "20")]
    assert pairs and max(max(pair) for pair in pairs) < 20
    assert "20 records read" in capsys.readouterr().out


def test_every_pair_is_as_likely_and_few_records_are_held():
    """Of 40 pairs and 80 records that are alone 4 pairs are drawn, 120 times, while at most 20 records wait."""
    pixels = picture(0, False)["bytes"]
    stream = [*range(120), *range(40)]
    random.Random(0).shuffle(stream)
    records = [Record(str(i), str(n), "", pixels + bytes([i]), pixels) for i, n in enumerate(stream)]
    counts, first, most = Counter(), Counter(), 0
    for seed in range(120):
        draw = Draw(4, 20, random.Random(seed))
        for one in records:
            draw.add(one)
            most = max(most, len(draw.waiting))
        counts.update(a.edit_prompt for _, a, _ in draw.pairs)
        first.update(int(a.original_prompt) < int(b.original_prompt) for _, a, b in draw.pairs)
    drawn = sum(counts.values())
    assert most <= 20 and len(counts) == 40
    expected = drawn / 40
    assert sum((counts[str(n)] - expected) ** 2 / expected for n in range(40)) < 72.1  # chi-squared of 39, p = 0.001
    assert abs(first[True] / drawn - 0.5) < 0.06


def test_damaged_records_are_skipped_and_told_at_the_end(tmp_path, capsys):
    records = [record(n, "make it snow") for n in range(9)]
    records[1]["edited_image"] = None
    records[2]["original_image"] = {"bytes": b"no picture", "path": None}
    records[3]["original_image"]["bytes"] = records[3]["original_image"]["bytes"][:50]
    records[4]["edit_prompt"] = None
    records[5]["edit_prompt"] = " "
    records[6] |= {name: records[0][name] for name in ("original_image", "edited_image")}  # record 0 again
    lacking = [{name: value for name, value in record(9, "make it snow").items() if name != "edited_prompt"}]
    dataset = write_set(tmp_path / "set", records, lacking)
    assert make_triplets.main(["--dataset", str(dataset), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    complaints = [line for line in said.err.splitlines() if line.startswith("record ")]
    assert [line.partition(": ")[::2] for line in complaints[:2] + complaints[3:]] == [
        ("record 2", "`edited_image` is missing"),
        ("record 3", "`original_image` is no picture"),
        ("record 5", "`edit_prompt` is missing"),
        ("record 6", "`edit_prompt` is empty"),
        ("record 10", "`edited_prompt` is missing"),
    ]
    assert complaints[2].startswith("record 4: `original_image` does not open: ")
    assert "10 records read, 0 instructions seen once, 6 records damaged" in said.out
    (triplet,) = evaluate.read_triplets(tmp_path / "out" / "triplets.jsonl")
    assert set(numbers(triplet)) == {0, 7}


def test_pictures_that_png_lacks_a_mode_for_are_converted_and_transparent_ones_stay_so(tmp_path):
    records = [record(n, "make it snow") for n in range(2)]
    for one in records:
        one["original_image"] = picture(int(one["original_prompt"][-1]) * 100, False, "CMYK", "JPEG")
        one["edited_image"] = picture(0, True, "RGBA")
    (triplet,) = drawn(write_set(tmp_path / "set", records), tmp_path / "out")
    modes = [Image.open(triplet[name]).mode for name in ("before", "after", "image")]
    assert modes == ["RGB", "RGBA", "RGB"]


def lonely(folder: Path) -> None:
    write_set(folder, [record(n, f"only {n}") for n in range(3)])


def without_a_column(folder: Path) -> None:
    whole = record(0, "make it snow")
    del whole["edit_prompt"]
    write_set(folder, [whole])


def of_other_types(folder: Path) -> None:
    write_set(folder, [record(n, "make it snow") | {"edited_prompt": n} for n in range(2)])


def of_two_layouts(folder: Path) -> None:
    write_set(folder, [record(0, "make it snow")], [record(1, "make it snow") | {"original_image": "1.png"}])


def cut_short(folder: Path) -> None:
    (file,) = write_set(folder, [record(0, "make it snow")]).iterdir()
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda folder: None, "there is no folder .*; --dataset is a folder"),
        (lambda folder: folder.mkdir(), "--dataset .* cannot be read: .*data files"),
        (lambda folder: write_set(folder, [record(0, "")][:0]), "--dataset .* cannot be read"),
        (lonely, "no two of the 3 records of --dataset make a triplet, 0 damaged"),
        (without_a_column, "--dataset .* cannot be read: it has no column edit_prompt"),
        (of_other_types, "no two of the 2 records of --dataset make a triplet, 2 damaged"),
        (of_two_layouts, "--dataset .* cannot be read"),
        (cut_short, "--dataset .* cannot be read"),
    ],
)
def test_what_no_triplet_can_be_drawn_from_is_said_in_a_line_and_nothing_is_written(tmp_path, make, complaint):
    make(tmp_path / "set")
    with pytest.raises(SystemExit, match=complaint) as raised:
        make_triplets.main(["--dataset", str(tmp_path / "set"), "--output", str(tmp_path / "out")])
    assert "\n" not in str(raised.value) and {path.name for path in tmp_path.iterdir()} <= {"set"}


def test_without_datasets_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as Python marks what cannot be imported
    with pytest.raises(SystemExit, match=r'pip install -e "\.\[evaluation\]"'):
        make_triplets.main(["--dataset", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_without_a_folder_the_hub_is_asked(tmp_path):
    """Which is offline in tests, so that all there is to see is the name."""
    with pytest.raises(SystemExit, match=f"{make_triplets.HUB}, which --dataset .* cannot be read"):
        make_triplets.main(["--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(whole, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="is there already; --output is a new folder"):
        make_triplets.main(["--dataset", str(whole), "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_is_written_whole_or_not_at_all(whole, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def save_until_the_disk_is_full(self, path) -> None:
        if len(saved) == 5:
            raise OSError("no space left")
        saved.append(save(self, path))

    monkeypatch.setattr(Image.Image, "save", save_until_the_disk_is_full)
    with pytest.raises(OSError, match="no space left"):
        make_triplets.main(["--dataset", str(whole), "--output", str(tmp_path / "out")])
    assert len(saved) == 5 and not list(tmp_path.iterdir())
