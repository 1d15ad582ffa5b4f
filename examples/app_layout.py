# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""What stands on the page, and where; app.py says what happens there."""

import html
import re

import gradio as gr
import pandas as pd
from common import fit_picture, read_picture
from PIL import Image

from pipeline_difference_inversion import DifferenceInversionPipeline, DifferenceTokens


FONT = ["system-ui", "sans-serif"]  # of the reader's device: the page asks no other server for anything
NONE_YET = "None yet. Learn one, or upload a difference file."
ALONE = "nothing else"  # stands for no second change
INTRO = """# Difference Inversion
Show what changed from **A** to **A′**, and have the same change made to **B**, which is one picture or several. {model} Every picture is cut to a square \
from its middle."""
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto !important; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.picture .grid-container {
  align-content: start;
  grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-auto-rows: min-content;
}
.picture .thumbnail-item { height: auto; aspect-ratio: 1; }
.examples .grid-wrap { min-height: 0; }
.status { min-height: 3em; }
.status .track { height: 4px; margin-top: 6px; border-radius: 2px; background: var(--border-color-primary); }
.status .done { height: 100%; border-radius: 2px; background: var(--color-accent); transition: width .2s; }
.changes label { width: 100%; }
@media (max-width: 640px) {
  .gradio-container { max-width: 100vw !important; }
  .picture { height: 180px !important; }
  .first { flex-basis: 100% !important; }
  .examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
}
"""


class Layout:
    """The page's parts.

    Args:
        examples: for each a name, and the files of A, A' and each B.
        names: of the changes that everyone finds.
        size: of the model's pictures, in pixels.
        about: a sentence on the model, in Markdown.
    """

    def __init__(self, examples: list[tuple[str, list[str]]], names: list[str], size: int, about: str):
        self.examples, self.size = examples, size
        with gr.Blocks(
            title="Difference Inversion", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as self.blocks:
            gr.Markdown(INTRO.format(model=about))
            with gr.Row():
                self.lay_out_analogy()
            with gr.Row():
                with gr.Column():
                    self.lay_out_controls()
                with gr.Column():
                    self.lay_out_losses()
            if examples:
                self.lay_out_examples()
            with gr.Row():
                with gr.Column():
                    self.lay_out_changes(names)
                with gr.Column():
                    self.lay_out_details()

    def lay_out_analogy(self) -> None:
        panel = {"height": 290, "min_width": 140}
        several = panel | {"columns": 2, "object_fit": "contain"}
        self.before = picture_box(label="A", elem_classes="picture", buttons=[], **panel)
        self.after = picture_box(label="A′", elem_classes="picture", buttons=[], **panel)
        self.queries = gr.Gallery(
            label="B", file_types=["image"], elem_classes="picture queries", buttons=[], **several
        )
        shown = {"interactive": False, "format": "png", "buttons": ["download"]}
        self.answers = gr.Gallery(label="B′", elem_classes="picture answers", **shown, **several)

    def lay_out_controls(self) -> None:
        with gr.Row():
            self.learn_button = gr.Button("Learn and draw", variant="primary", min_width=170, elem_classes="first")
            self.stop_button = gr.Button("Stop", variant="stop", visible=False, min_width=170, elem_classes="first")
            self.draw_button = gr.Button("Only draw", min_width=100)
            self.again_button = gr.Button("Use B′ as B", min_width=100)
        self.status = gr.HTML(status_line("Choose an example below, or give pictures of your own."))
        with gr.Group():
            self.scale = gr.Slider(0, 2, 1, step=0.05, label="How much", info="0 is B itself, 1 the whole change")
            self.guidance = gr.Slider(0.5, 5, 1, step=0.1, label="Guidance", info="more exaggerates the change")
            self.backwards = gr.Checkbox(label="Backwards", info="takes the change back, from a B that has it")

    def lay_out_losses(self) -> None:
        colors = {"each step": "#fdba74", "smoothed": "#c2410c"}
        titles = {"x_title": "steps of learning", "y_title": "loss", "color_title": " "}
        look = {"x_axis_labels_visible": False, "height": 285, "buttons": [], "elem_classes": "losses"}
        self.losses = gr.LinePlot(x="step", y="loss", color="of", color_map=colors, **titles, **look)

    def lay_out_examples(self) -> None:
        pictures = [(self.square(paths), name) for name, paths in self.examples]
        fixed = {"interactive": False, "allow_preview": False, "buttons": []}
        self.gallery = gr.Gallery(
            pictures, label="Examples", columns=6, height="auto", elem_classes="examples", **fixed
        )

    def lay_out_changes(self, names: list[str]) -> None:
        with gr.Accordion("Changes that you have"):
            self.chosen = gr.Radio(names, show_label=False, container=False, elem_classes="changes")
            self.words = gr.Markdown(NONE_YET)
            with gr.Row():
                self.upload_button = gr.UploadButton("Upload", min_width=100)
                self.download_button = gr.DownloadButton("Download", min_width=100, interactive=False)
        with gr.Accordion("Two changes at once", open=False):
            self.second = gr.Dropdown([ALONE, *names], value=ALONE, label="Together with")
            self.second_scale = gr.Slider(-2, 2, 1, step=0.05, label="How much of it", info="negative: backwards")

    def lay_out_details(self) -> None:
        with gr.Accordion("Change only a part of B", open=False) as self.painting:
            gr.Markdown("Paint what may change in the first B. The rest of it stays as it is, to the pixel.")
            brush = gr.Brush(colors=[("#f97316", 0.6)], color_mode="fixed", default_size=max(8, self.size // 8))
            still = {"sources": (), "transforms": (), "layers": False, "show_label": False}
            self.mask = gr.ImageMask(type="pil", brush=brush, **still)
        with gr.Accordion("Where the change acts in B", open=False):
            gr.Markdown("The brighter a place of the first B, the more the change acts there.")
            self.where_button = gr.Button("Show it")
            self.where = gr.Image(
                show_label=False, interactive=False, elem_classes="picture where", buttons=[], height=290
            )
        with gr.Accordion("What the pictures show", open=False):
            gr.Markdown("A sentence each. Left empty, the model writes them itself.")
            self.before_prompt = gr.Textbox(label="What A shows")
            self.after_prompt = gr.Textbox(label="What A′ shows")
            self.prompt = gr.Textbox(label="What B shows")
        with gr.Accordion("Settings", open=False):
            begin = [("words", "words"), ("random rows, for what no word says", "random")]
            self.init = gr.Radio(begin, value="words", label="Learning begins with")
            self.num_tokens = gr.Slider(1, 16, 4, step=1, label="Tokens", info="the most that are learned")
            self.learning_steps = gr.Slider(
                0,
                300,
                0,
                step=1,
                label="Steps of learning",
                info="0 leaves it to the project: 8, or 60 for random rows",
            )
            self.steps = gr.Slider(5, 100, 50, step=1, label="Steps of drawing")
            self.strength = gr.Slider(0.05, 1, 0.9, step=0.05, label="Strength", info="less keeps more of B")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)

    def square(self, paths: list[str]) -> Image.Image:
        """A and A' above the first B, and a place for B'."""
        side, gap = self.size, max(2, self.size // 32)
        square = Image.new("RGB", (2 * side + gap, 2 * side + gap), "white")
        for i, path in enumerate(paths[:3]):
            place = (i % 2 * (side + gap), i // 2 * (side + gap))
            square.paste(fit_picture(read_picture(path, "the example"), side, path), place)
        return square


def picture_box(**options) -> gr.Image:
    """Hands on the file, whatever is in it, so that a bad one is answered in the reader's words."""
    box = gr.Image(sources=["upload"], **options)
    box.preprocess = lambda given: given and given.path
    return box


def curves(losses: list[float]) -> pd.DataFrame:
    """Each step has noises of its own, and its loss jumps with them."""
    each = pd.Series(losses, range(1, len(losses) + 1), name="loss")
    return pd.concat({"each step": each, "smoothed": each.ewm(alpha=0.3).mean()}, names=["of", "step"]).reset_index()


def status_line(text: str, done: str = "", total: str = "") -> str:
    """What is going on, with a bar if it is known how long it takes."""
    if not total.isdigit():  # the search for words ends when it has found all
        return f'<div class="status">{html.escape(text)}{f" · {done}" if done else ""}</div>'
    bar = (
        f'<div class="track"><div class="done" style="width: {100 * int(done) / max(int(total), 1):.0f}%"></div></div>'
    )
    return f'<div class="status">{html.escape(text)} · {done} of {total}{bar}</div>'


def description(tokens: DifferenceTokens, pipe: DifferenceInversionPipeline) -> str:
    """Markdown; words are shown as code, since a file may hold anything."""
    lines = []
    for way in ("gained", "lost"):
        phrases = tokens.metadata.get(f"{way}_phrases", "").splitlines()
        lines.append(f"**{way.capitalize()}:** " + (", ".join(map(as_code, phrases)) or "no words"))
    for i, words in enumerate(tokens.nearest_words(pipe.tokenizer, pipe.text_encoder), 1):
        nearest = ", ".join(f"{as_code(word)} {cosine:.2f}" for word, cosine in words)
        lines.append(f"**Token {i}** is nearest to {nearest}")
    return "  \n".join(lines)


def as_code(text: str) -> str:
    return "`" + re.sub(r"[`|\s]+", " ", text).strip() + "`"
