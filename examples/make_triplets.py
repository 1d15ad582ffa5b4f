# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Draws triplets from the InstructPix2Pix data set, as the paper does for its evaluation.

    pip install -e ".[evaluation]"
    python examples/make_triplets.py --output triplets
    python examples/make_triplets.py --dataset FOLDER --count 100 --records 50000 --output triplets
    python examples/evaluate.py --triplets triplets/triplets.jsonl

A and A' are the pictures before and after of one record, and B is the picture before of another record with the same
instruction, whose picture after is kept as the `target`, a right answer. The records are streamed from the Hub
(timbrooks/instructpix2pix-clip-filtered), or from a folder of parquet files with the same columns: `original_prompt`,
`original_image`, `edit_prompt`, `edited_prompt` and `edited_image`.

How they are drawn: records with the same instruction are paired in the order in which they come, the first with the
second, the third with the fourth, and so on, so that no record is in two triplets. Every pair is as likely to be drawn as
any other, and a coin says which of the two is A. The whole stream is read for it; `--records` stops after so many records,
and draws among the pairs of these. The same seed and the same records give the same triplets.

Records are held only while they may still be drawn, and only the pictures of these are opened. A damaged record is skipped.
Those that were found are listed at the end with their numbers and reasons, and the exit status is then 1. The output folder
is written whole or not at all.
"""

import argparse
import io
import json
import random
import sys
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from common import positive
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm


HUB = "timbrooks/instructpix2pix-clip-filtered"
PROMPTS, PICTURES = ("original_prompt", "edit_prompt", "edited_prompt"), ("original_image", "edited_image")
COLUMNS = (*PROMPTS, *PICTURES)


class Damaged(ValueError):
    """A record is of no use, and why."""


@dataclass
class Record:
    """A row of the data set, its pictures encoded as they came."""

    original_prompt: str
    edit_prompt: str
    edited_prompt: str
    original_image: bytes
    edited_image: bytes

    def check_pictures(self) -> None:
        for name in PICTURES:
            try:
                decode(getattr(self, name))
            except UnidentifiedImageError as error:
                raise Damaged(f"`{name}` is no picture") from error
            except Exception as error:  # Pillow's readers raise errors of many kinds
                raise Damaged(f"`{name}` does not open: {error}") from error


def read_record(row: dict) -> Record:
    """Checks everything but whether the pictures open, which takes longer than all else."""
    pictures = {name: (row.get(name) or {}).get("bytes") for name in PICTURES}
    values = {name: row.get(name) for name in PROMPTS} | pictures
    for name, value in values.items():
        expected = bytes if name in PICTURES else str
        if value is None:
            raise Damaged(f"`{name}` is missing")
        if not isinstance(value, expected):
            raise Damaged(f"`{name}` is of type {type(value).__name__}, and should be {expected.__name__}")
    if not values["edit_prompt"].strip():
        raise Damaged("`edit_prompt` is empty")
    return Record(**values)


def decode(encoded: bytes) -> Image.Image:
    """A picture in a mode that PNG has; what is transparent stays so."""
    with Image.open(io.BytesIO(encoded)) as picture:
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


@dataclass
class Draw:
    """Draws `count` pairs of records with the same instruction in one pass, uniformly among all pairs.

    Each pair has a random key, and those with the smallest keys are drawn. The key is chosen when the pair's first record
    comes: one whose key is too large to be drawn need not be held until its partner comes.
    """

    count: int
    most_waiting: int
    rng: random.Random
    pairs: list[tuple[float, Record, Record]] = field(default_factory=list)  # key, A and B, by key
    waiting: dict[str, tuple[float, Record]] = field(default_factory=dict)  # by instruction
    seen: Counter = field(default_factory=Counter)  # records by instruction
    limit: float = 1.0  # keys from here on are not drawn

    def add(self, record: Record) -> None:
        instruction = record.edit_prompt
        if instruction in self.waiting:
            key, first = self.waiting[instruction]
            if record.original_image == first.original_image:
                return  # B would be A
            record.check_pictures()
            del self.waiting[instruction]
            self.keep(key, first, record)
        elif self.seen[instruction] % 2 == 0:
            key = self.rng.random()
            if key < self.limit:
                record.check_pictures()
                self.waiting[instruction] = key, record
        self.seen[instruction] += 1
        if len(self.waiting) > self.most_waiting:
            self.lower_limit(median(key for key, _ in self.waiting.values()))

    def keep(self, key: float, *pair: Record) -> None:
        insort(self.pairs, (key, *self.rng.sample(pair, 2)), key=itemgetter(0))
        del self.pairs[self.count :]
        if len(self.pairs) == self.count:
            self.lower_limit(self.pairs[-1][0])

    def lower_limit(self, limit: float) -> None:
        self.limit = min(self.limit, limit)
        self.waiting = {name: held for name, held in self.waiting.items() if held[0] < self.limit}


@contextmanager
def told_in_a_line(folder: Path | None) -> Iterator[None]:
    """What goes wrong while the data set is read: an error of datasets, of Arrow, or of the network."""
    try:
        yield
    except Exception as error:
        source = f"--dataset {folder}" if folder else f"{HUB}, which --dataset FOLDER takes the place of,"
        raise SystemExit(f"{source} cannot be read: {' '.join(str(error).split())}") from error


def open_dataset(folder: Path | None) -> Iterable[dict]:
    """A stream of rows, with their pictures as they are encoded."""
    try:
        from datasets import Image as Picture
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(f'datasets cannot be imported ({error}); pip install -e ".[evaluation]"') from error
    if folder and not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}; --dataset is a folder of parquet files")
    with told_in_a_line(folder):
        dataset = load_dataset(str(folder or HUB), split="train", streaming=True)
        missing = [name for name in COLUMNS if name not in (dataset.column_names or COLUMNS)]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}")
        for name in PICTURES:
            dataset = dataset.cast_column(name, Picture(decode=False))
        return dataset


def read_rows(options: argparse.Namespace) -> Iterator[dict]:
    dataset = open_dataset(options.dataset)
    with told_in_a_line(options.dataset):
        yield from tqdm(islice(dataset, options.records), unit=" records")


def draw_triplets(rows: Iterator[dict], draw: Draw) -> tuple[int, dict[int, str]]:
    """How many records were read, and what is wrong with those that are damaged, by number from 1."""
    read, damaged = 0, {}
    for read, row in enumerate(rows, 1):
        try:
            draw.add(read_record(row))
        except Damaged as error:
            damaged[read] = str(error)
    return read, damaged


def write_triplets(pairs: list[tuple[float, Record, Record]], output: Path) -> None:
    """In a temporary folder, which is renamed when all is there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as place:
        folder = Path(place) / output.name
        folder.mkdir()
        lines = [write_triplet(folder, index, a, b) for index, (_, a, b) in enumerate(pairs)]
        (folder / "triplets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder.rename(output)


def write_triplet(folder: Path, index: int, a: Record, b: Record) -> dict[str, str]:
    """Saves four pictures, and returns the line that evaluate.py reads."""
    pictures = {
        "before": a.original_image,
        "after": a.edited_image,
        "image": b.original_image,
        "target": b.edited_image,
    }
    paths = {name: f"{index:05d}_{name}.png" for name in pictures}
    for name, encoded in pictures.items():
        decode(encoded).save(folder / paths[name])
    return paths | {
        "before_prompt": a.original_prompt,
        "after_prompt": a.edited_prompt,
        "prompt": b.original_prompt,
        "answer_prompt": b.edited_prompt,
        "instruction": b.edit_prompt,
    }


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, metavar="FOLDER", help=f"of parquet files, in place of {HUB}")
    parser.add_argument("--count", type=positive, default=300, help="how many triplets; 300 as in the paper")
    parser.add_argument("--records", type=positive, help="stop after so many records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("triplets"), help="folder, which must not be there yet")
    parser.add_argument(
        "--waiting",
        type=positive,
        default=10_000,
        help="how many records may be held until one with the same instruction comes; beyond that some pairs, chosen at "
        "random, cannot be drawn",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.output.exists():
        raise SystemExit(f"{options.output} is there already; --output is a new folder")
    draw = Draw(options.count, options.waiting, random.Random(options.seed))
    read, damaged = draw_triplets(read_rows(options), draw)
    for number, fault in damaged.items():
        print(f"record {number}: {fault}", file=sys.stderr)
    if not draw.pairs:
        raise SystemExit(f"no two of the {read} records of --dataset make a triplet, {len(damaged)} damaged")
    write_triplets(draw.pairs, options.output)
    once = sum(count == 1 for count in draw.seen.values())
    print(f"{len(draw.pairs)} triplets of {options.count} asked for: {(options.output / 'triplets.jsonl').resolve()}")
    print(f"{read} records read, {once} instructions seen once, {len(damaged)} records damaged")
    return int(bool(damaged))


if __name__ == "__main__":
    sys.exit(main())
