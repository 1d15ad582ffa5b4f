# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Lets the page follow what the pipeline does: its progress, its warnings and its errors, in the reader's words."""

import html
import logging
import queue
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import gradio as gr
import torch
from common import answer
from PIL import Image

import pipeline_difference_inversion as pipeline_file
from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


logger = logging.getLogger(__name__)
PREVIEW_STEPS = 10  # of a preview's drawing


LABELS = {  # what the pipeline's messages call by its own names
    "before": "A",
    "after": "A'",
    "image": "B",
    "before_prompt": "“What A shows”",
    "after_prompt": "“What A' shows”",
    "prompt": "“What B shows”",
    "difference": "the change",
    "difference.save(...)": "this page",
    "difference_scale": "“How much”",
    "guidance_scale": "“Guidance”",
    "num_tokens": "“Tokens”",
    "num_optimization_steps": "“Steps of learning”",
}


class Reporter(logging.Handler):
    """Passes on what the pipeline says in a thread, as its progress bars' file and its log's handler."""

    BAR_FORMAT = "{desc}\t{n_fmt}\t{total_fmt}"

    def __init__(self):
        super().__init__(logging.WARNING)
        self.listener = threading.local()

    def report(self, kind: str, value) -> None:
        if hasattr(self.listener, "put"):
            self.listener.put((kind, value))

    def write(self, text: str) -> None:
        if text.count("\t") == 2:
            self.report("progress", text.strip("\r\n").split("\t"))

    def emit(self, record: logging.LogRecord) -> None:
        self.report("warning", in_readers_words(record.getMessage()))

    def follow(self, work: Callable, stop: threading.Event) -> Iterator[tuple]:
        """Does the work in a thread, yields what is reported in it, and returns its result."""
        news = queue.SimpleQueue()

        def run():
            self.listener.put = news.put
            try:
                news.put(("result", work()))
            except Exception as error:
                news.put(("error", error))

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                kind, value = news.get()
                if kind == "result":
                    return value
                if kind == "error":
                    raise as_message(value)
                yield kind, value
        except GeneratorExit:  # the reader has left
            stop.set()
            raise


def complaint(message: str) -> gr.Error:
    """What the reader has to mend, which is no failure to print in the terminal."""
    return gr.Error(message, print_exception=False)


def in_readers_words(message: str) -> str:
    message = re.sub(r"^`difference`: ", "", message)
    message = re.sub(r"`([^`]+)`", lambda name: LABELS.get(name[1], name[1]), message)
    return html.escape(message, quote=False)  # it may quote a file that anyone wrote, and Gradio shows markup


def as_message(error: Exception) -> gr.Error:
    """What the pipeline itself complains of is for the reader; what happens in libraries is for the terminal."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, (TypeError, ValueError)) and place == pipeline_file.__file__:
        return complaint(in_readers_words(str(error)))
    if isinstance(error, torch.OutOfMemoryError):
        return complaint(
            "There is not enough memory for this. Give fewer pictures, or wait until others have finished."
        )
    logger.error("The page could not do something.", exc_info=error)
    return complaint(
        "Something went wrong here, and the reason is in the page's terminal. Try again, or other pictures."
    )


class Preview:
    """Draws B roughly while a change is being learned, in a third of the time at most."""

    def __init__(self, pipe: DifferenceInversionPipeline, query: Image.Image, prompt: str | None, seed: int):
        self.pipe, self.query, self.prompt, self.seed = pipe, query, prompt, seed
        self.due = 0.0

    def draw(self, tokens: torch.Tensor) -> Image.Image | None:
        """B with tokens (num_tokens, dim), or None if it is too early for another preview."""
        start = time.monotonic()
        if start < self.due:
            return None
        self.prompt = self.prompt or self.pipe.caption([self.query])[0]
        settings = {"num_inference_steps": PREVIEW_STEPS, "complete_prompts": False, "prompt": self.prompt}
        image = answer(self.pipe, self.query, as_difference(self.pipe, tokens), self.seed, **settings)
        self.due = time.monotonic() + 2 * (time.monotonic() - start)
        return image


def as_difference(pipe: DifferenceInversionPipeline, tokens: torch.Tensor) -> DifferenceTokens:
    """A difference of what learning's callback is given: the tokens of SDXL's two encoders lie side by side."""
    encoders = [encoder for encoder in (pipe.text_encoder, pipe.text_encoder_2) if encoder is not None]
    names = pipeline_file.TWO_ENCODER_TOKENS if len(encoders) == 2 else [pipeline_file.DEFAULT_TOKEN]
    rows = tokens.cpu().split([encoder.config.hidden_size for encoder in encoders], dim=1)
    return DifferenceTokens(dict(zip(names, rows, strict=True)))
