# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learns many differences, on as many devices as there are.

    python examples/invert_many.py --pairs pairs.jsonl --output differences
    accelerate launch examples/invert_many.py --pairs pairs.jsonl --output differences

Each line of the file is an object with the paths `before` and `after`, relative to the file or whole. It may have the
prompts `before_prompt` and `after_prompt`, which the captioner otherwise writes, and a `name`: the difference is saved as
`NAME.safetensors`, by default under the line's number.

With `--at-once N` each process learns N differences at a time, whose UNet calls are joined; what is learned is the same but
for rounding. It is meant for large GPUs, and takes about N times the memory of one, without the weights.

`accelerate launch` shares the pairs out between the processes that it starts, one for each GPU; with `--num_processes 8`, or
`--num_machines 2` and what else its help says, between as many. On CPUs it takes `--multi_gpu --num_processes N` all the
same, with OMP_NUM_THREADS=1.

What the folder already has is not learned again, so that after an interruption the same command goes on. Files are written
whole or not at all. A pair that cannot be learned from does not stop the others: all such pairs are listed at the end with
their reasons, and the exit status is then 1.
"""

import argparse
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common import (
    LEARNING,
    STORYBOOK,
    check_model,
    fit_picture,
    learning_settings,
    load_pipeline,
    make_folder,
    parse_setting,
    picture_size,
    positive,
    read_lines,
    read_object,
    read_picture,
    told_in_one_line,
)
from joined import joined
from PIL import Image
from tqdm import tqdm


PICTURES, PROMPTS = ("before", "after"), ("before_prompt", "after_prompt")


@dataclass
class Job:
    """A line of the file: what to learn from and where to save it, or what is wrong with it."""

    number: int
    name: str
    said: dict = field(default_factory=dict)
    fault: str | None = None


def read_jobs(path: Path) -> list[Job]:
    jobs = [read_job(number, line, path.parent) for number, line in read_lines(path, "--pairs")]
    names = [job.name for job in jobs]
    for index, job in enumerate(jobs):
        if job.name in names[:index]:
            job.fault = f"the name {job.name!r} is taken by an earlier line"
    return jobs


def read_job(number: int, line: str, folder: Path) -> Job:
    job = Job(number, f"{number:05d}")
    try:
        said = read_object(line, folder, PICTURES, texts=(*PROMPTS, "name"))
    except ValueError as error:
        job.fault = str(error)
        return job
    job.name = said.pop("name", job.name)
    if Path(job.name).name != job.name:
        job.fault = f"`name` is {job.name!r}; it becomes a file's name, without a folder"
    else:
        job.said = said
    return job


def learn_all(pipe, jobs: list[Job], options: argparse.Namespace, shows: bool) -> list[tuple[int, str]]:
    """Learns the jobs' differences; returns the numbers of those that can't be learned, and why."""
    left = tqdm(jobs, disable=not shows)
    if options.at_once == 1:
        found = [learn(pipe, options, job) for job in left]
    else:
        joint, pipes = joined(pipe, min(options.at_once, len(jobs)))
        found = joint.run(left, [partial(learn, one, options) for one in pipes])
    return [(number, fault) for number, fault in found if fault]


def learn(pipe, options: argparse.Namespace, job: Job) -> tuple[int, str | None]:
    """Saves the job's difference; returns the job's number, and why it can't be learned."""
    generator = torch.Generator().manual_seed(options.seed)
    try:
        pictures = {name: open_picture(job.said[name], picture_size(pipe)) for name in PICTURES}
        difference = pipe.invert_difference(**job.said | pictures, generator=generator, **dict(options.config))
        if pipe._stopped:  # by Ctrl-C: these tokens are not what the whole run would have learned
            raise KeyboardInterrupt
        difference.save(target(job, options))
    except (OSError, TypeError, ValueError) as error:
        return job.number, str(error)
    return job.number, None


def open_picture(path: str, size: int) -> Image.Image:
    return fit_picture(read_picture(path, "--pairs"), size, path)


def target(job: Job, options: argparse.Namespace) -> Path:
    return options.output / f"{job.name}.safetensors"


def learning_setting(text: str) -> tuple[str, object]:
    name, value = parse_setting(text)
    if name not in LEARNING:
        raise argparse.ArgumentTypeError(f"there is no setting {name!r} of learning")
    return name, value


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--output", type=Path, default=Path("differences"), help="folder for the difference files")
    parser.add_argument("--model", default=str(STORYBOOK), help="a Stable Diffusion 1.x or 2.x folder or Hub name")
    parser.add_argument(
        "--at-once", type=positive, default=1, metavar="N", help="differences learned together on each device"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same for every pair, wherever it is learned")
    parser.add_argument(
        "--config",
        nargs="*",
        type=learning_setting,
        default=[],
        metavar="NAME=VALUE",
        help="how differences are learned",
    )
    return parser.parse_args(arguments)


@told_in_one_line({name: f"--config {name}" for name in LEARNING})
def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    learning_settings(dict(options.config))
    jobs = read_jobs(options.pairs)
    make_folder(options.output)
    check_model(options.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    faults = [(job.number, job.fault) for job in jobs if job.fault]
    left = [job for job in jobs if not job.fault and not target(job, options).exists()]
    state.wait_for_everyone()  # all have looked before anyone writes
    pipe = load_pipeline(options.model, state.device) if left else None
    with state.split_between_processes(left) as mine:
        failed = gather_object(learn_all(pipe, mine, options, shows=state.is_main_process) if mine else [])
    if state.is_main_process:
        for number, fault in sorted(faults + failed):
            print(f"{options.pairs}, line {number}: {fault}", file=sys.stderr)
        there = len(jobs) - len(faults) - len(left)
        print(f"{len(left) - len(failed)} learned, {there} were there before, {len(faults + failed)} failed")
    state.destroy_process_group()
    return int(bool(faults or failed))


if __name__ == "__main__":
    sys.exit(main())
