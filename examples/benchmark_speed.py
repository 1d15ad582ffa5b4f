# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What learning and drawing cost beside the UNet alone, in time and memory.

    python examples/benchmark_speed.py                                    # Storybook
    python examples/benchmark_speed.py --model sd15 --size 256 --dtype float32
    python examples/benchmark_speed.py --model sdxl --device cuda --dtype bfloat16

`sd15`, `sd21` and `sdxl` are built by their real configurations with random weights, so what they draw is noise; their
sizes, times and memory are the real ones. Anything else is a folder, loaded as users load it, in the type that it asks for
unless `--dtype` says another.

Four tables come out, in Markdown:

1. A learning step, beside the UNet's own forward and backward on the inputs that it had in that step, without the judging
   of tokens, which the third table has; and a drawing, with the way up to where it begins, beside the UNet's forward on the
   same inputs. Each is repeated, in turns with the bare UNet, after a first time that does not count: the median, the
   range, and the ratio of the medians.
2. The most memory during each of these, with the weights: of the GPU, or of this process where there is none.
3. One analogy from its pictures to its answer, by stage, with the latents that each sends through the UNet. A stage
   inside another counts for itself alone. It is the second where the UNet is compiled, so that it is so before.
4. The machine and the versions.
"""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from backbones import CONFIGS, build_backbone
from common import STORYBOOK, check_device, check_model, loading, positive, told_in_one_line
from PIL import Image, ImageDraw

import diffusers
from pipeline_difference_inversion import FROM_WORDS, DifferenceInversionPipeline, Learner


STAGES = {
    "captions": "caption",
    "encoding": "_encode_images",
    "words": "_find_words",
    "learning": "_optimize",
    "completing the query's prompt": "_completed",
    "inversion": "_begin",
    "drawing": "_denoise",
    "decoding": "_pictures",
}
PAIR = {"before_prompt": "a red cabin on grass, painting", "after_prompt": "a red cabin on snow, painting"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(options: argparse.Namespace) -> DifferenceInversionPipeline:
    if options.model in CONFIGS:
        optional = dict.fromkeys(DifferenceInversionPipeline._optional_components)
        pipe = DifferenceInversionPipeline(**optional | build_backbone(options.model))
    else:
        check_model(options.model)
        with loading("--model", options.model, f"a Stable Diffusion's folder, or {', '.join(CONFIGS)}"):
            pipe = DifferenceInversionPipeline.from_pretrained(options.model)
    pipe.to(options.device, dtype=DTYPES.get(options.dtype))
    pipe.set_progress_bar_config(disable=True)
    if options.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if options.compile:
        pipe.unet.requires_grad_(False)  # as in learning, which would otherwise need graphs of its own
    if options.compile == "whole":
        pipe.unet = torch.compile(pipe.unet, dynamic=True)
    elif options.compile == "blocks":
        pipe.unet.compile_repeated_blocks(dynamic=True)
    return pipe


def house(color: str, ground: str, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, side * 5 // 8, side, side), fill=ground)
    draw.rectangle((side // 4, side // 3, side * 3 // 4, side * 3 // 4), fill=color)
    return image


def pictures(pipe: DifferenceInversionPipeline, size: int | None) -> tuple[Image.Image, Image.Image, Image.Image]:
    """A, A' and B."""
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    return house("red", "green", side), house("red", "white", side), house("blue", "green", side)


# ------------------------------------------------------------------------------------------- the pipeline's two loops


def learn(pipe: DifferenceInversionPipeline, options: argparse.Namespace, after_step: Callable, steps: int) -> None:
    """The default way to learn, from words that are known: `after_step` is called after each step."""
    before, after, _ = pictures(pipe, options.size)
    settings = {} if pipe.clip is not None else {"lambda_clip": 0.0}
    if options.model in CONFIGS:  # random weights know no words: these are the steps that would follow them
        settings |= FROM_WORDS | {"init": "random", "complete_prompts": False}
    settings["num_optimization_steps"] = steps
    pipe.invert_difference(
        before, after, **PAIR, **settings, callback_on_optimization_step=lambda *_: after_step(), generator=seeded()
    )


def draw(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> None:
    """From the query's latents to the answer's."""
    *_, query = pictures(pipe, options.size)
    prompts = {"prompt": "a blue cabin on snow, painting", "source_prompt": "a blue cabin on grass, painting"}
    steps = {"num_inference_steps": options.inference_steps, "output_type": "latent"}
    pipe(image=query, **prompts, **steps, complete_prompts=False, generator=seeded())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------------------------- the UNet alone


@contextmanager
def recorded(unet: torch.nn.Module) -> Iterator[list[tuple]]:
    """While open, the inputs of each call of the UNet join the list, and whether gradients were to come back."""
    calls = []

    def record(module, arguments, keywords):
        learns = torch.is_grad_enabled() and keywords["encoder_hidden_states"].requires_grad
        keywords = {name: detached(value) for name, value in keywords.items()}
        calls.append(([detached(value) for value in arguments], keywords, learns))

    hook = unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def detached(value):
    if isinstance(value, dict):
        return {name: detached(part) for name, part in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


def replay(unet: torch.nn.Module, calls: list[tuple]) -> None:
    """The same calls, with nothing around them; gradients come back as far as to the text, as in learning."""
    for arguments, keywords, learns in calls:
        with torch.set_grad_enabled(learns):
            text = keywords["encoder_hidden_states"].detach().requires_grad_(learns)
            output = unet(*arguments, **keywords | {"encoder_hidden_states": text}).sample
            if learns:
                torch.autograd.grad(output.float().square().mean(), text)


# ---------------------------------------------------------------------------------------------- time and memory


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    synchronize()
    return time.perf_counter()


def seconds(function: Callable, *arguments) -> float:
    start = now()
    function(*arguments)
    return now() - start


def peak_memory(function: Callable, *arguments) -> float:
    """Gigabytes, with what was there before. Linux forgets the earlier peak of a process when it is asked to."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function(*arguments)
        return torch.cuda.max_memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")
    function(*arguments)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e6


def time_steps(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of learning steps, and of the UNet alone on the inputs of each, which takes its turn after it."""
    steps, bare, started, count = [], [], [], options.repeats + 2

    def after_step() -> None:
        steps.append(now() - started.pop() if started else 0.0)
        own = [call for call in calls if call[2]]  # the judging before the first step is left out
        calls.clear()
        with unrecorded(pipe.unet):
            bare.append(seconds(replay, pipe.unet, own))
        pipe._interrupt = len(steps) == count
        started.append(now())

    with recorded(pipe.unet) as calls:
        learn(pipe, options, after_step, 4 * (count + 1))  # stopped before tokens are judged, after a quarter of them
    return steps[2:], bare[2:]  # the first has no start, and the second was the first whole one


def compiled_before() -> AbstractContextManager:
    """While open, it is an error to compile anything."""
    return torch.compiler.set_stance("fail_on_recompile")


@contextmanager
def unrecorded(unet: torch.nn.Module) -> Iterator[None]:
    hooks = dict(unet._forward_pre_hooks)
    unet._forward_pre_hooks.clear()
    try:
        yield
    finally:
        unet._forward_pre_hooks.update(hooks)


def time_drawing(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the way up and down, without the VAE and the text encoder, and of the UNet alone on the same inputs."""
    with recorded(pipe.unet) as calls:
        draw(pipe, options)
    drawn, bare = [], []
    for _ in range(options.repeats):
        with staged(pipe) as spent, compiled_before():
            draw(pipe, options)
        drawn.append(spent["inversion"][0] + spent["drawing"][0])
        bare.append(seconds(replay, pipe.unet, calls))
    return drawn, bare


@contextmanager
def staged(pipe: DifferenceInversionPipeline) -> Iterator[dict[str, list]]:
    """While open, the seconds and the UNet's latents of each stage add up; a stage inside another counts for itself alone."""
    spent = {name: [0.0, 0] for name in [*STAGES, "judging", "the rest"]}
    open_stages, since = ["the rest"], [now()]

    def turn() -> None:
        moment = now()
        spent[open_stages[-1]][0] += moment - since[0]
        since[0] = moment

    def watched(name: str, method: Callable) -> Callable:
        def call(*arguments, **keywords):
            turn()
            open_stages.append(name)
            try:
                return method(*arguments, **keywords)
            finally:
                turn()
                open_stages.pop()

        return call

    def count(module, arguments, output) -> None:
        spent[open_stages[-1]][1] += len(arguments[0])

    methods = [(pipe, method, name) for name, method in STAGES.items()] + [(Learner, "judge", "judging")]
    patches = [mock.patch.object(owner, m, watched(name, getattr(owner, m))) for owner, m, name in methods]
    hook = pipe.unet.register_forward_hook(count)
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        turn()
        hook.remove()
        for patch in patches:
            patch.stop()


def analogy(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> dict[str, list]:
    before, after, query = pictures(pipe, options.size)
    prompts = {} if pipe.captioner is not None else PAIR | {"prompt": "a blue cabin on grass, painting"}
    learning = {} if pipe.clip is not None else {"lambda_clip": 0.0}
    steps = {"num_inference_steps": options.inference_steps}
    with staged(pipe) as spent:
        pipe(image=query, before=before, after=after, **prompts, **steps, learning_kwargs=learning, generator=seeded())
    return spent


# -------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *rows])


def times_row(name: str, whole: list[float], bare: list[float]) -> list[str]:
    shown = [f"{statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})" for t in (whole, bare)]
    return [name, len(whole), *shown, f"{statistics.median(whole) / statistics.median(bare):.2f}"]


def times_table(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> str:
    rows = [
        times_row("a learning step", *time_steps(pipe, options)),
        times_row("drawing", *time_drawing(pipe, options)),
    ]
    return table(["", "repeats", "median and range", "the UNet alone", "ratio"], rows)


def memory_table(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> str:
    with recorded(pipe.unet) as calls:
        peaks = {"learning": peak_memory(learn, pipe, options, lambda: None, 1)}
    learned = [call for call in calls if call[2]]
    peaks["the UNet alone, there and back"] = peak_memory(replay, pipe.unet, learned)
    peaks["drawing"] = peak_memory(draw, pipe, options)
    return table(["most memory, with the weights", "GB"], [[name, f"{peak:.2f}"] for name, peak in peaks.items()])


def stages_table(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> str:
    if options.compile:
        analogy(pipe, options)
    with compiled_before():
        spent = analogy(pipe, options)
    rows = [[name, f"{taken:.2f} s", latents] for name, (taken, latents) in spent.items()]
    taken, latents = map(sum, zip(*spent.values(), strict=True))
    rows.append(["**all**", f"{taken:.2f} s", latents])
    return table(["stage of one analogy", "time", "UNet latents"], rows)


TABLES = {"times": times_table, "memory": memory_table, "stages": stages_table}


def report(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> Iterator[str]:
    for name in options.tables:
        yield TABLES[name](pipe, options)
    yield table(["", ""], [[name, value] for name, value in surroundings(pipe, options).items()])


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


def surroundings(pipe: DifferenceInversionPipeline, options: argparse.Namespace) -> dict[str, str]:
    types = {f"{name} {part.dtype}" for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before, *_ = pictures(pipe, options.size)
    return {
        "model": f"{options.model}, at {before.width}×{before.height}",
        "types": ", ".join(sorted(types)).replace("torch.", ""),
        "options": f"gradient checkpointing {options.gradient_checkpointing}, compiled: {options.compile or 'nothing'}",
        "machine": processor(),
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}",
    }


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(STORYBOOK), help=f"{', '.join(CONFIGS)}, or a folder; Storybook by default"
    )
    parser.add_argument("--size", type=int, help="of the pictures, in pixels; the model's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of all models; by default as they are loaded")
    parser.add_argument("--repeats", type=positive, default=8, help="that count, of a learning step and of a drawing")
    parser.add_argument("--inference-steps", type=int, default=50, help="of the whole schedule")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="all by default")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the UNet: slower, in less memory")
    parser.add_argument(
        "--compile",
        choices=("whole", "blocks"),
        help="the UNet by torch.compile: all of it, or each of its transformer blocks, which takes far less time",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    with told_in_one_line():
        check_device(options.device)
        pipe = build(options)
    for text in report(pipe, options):
        print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
