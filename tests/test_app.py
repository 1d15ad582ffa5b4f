# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The page, in a browser."""

import copy
import io
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from analogies import EXAMPLES, judge
from conftest import ROOT
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from pipeline_difference_inversion import DifferenceTokens


CHROMIUM = shutil.which("chromium")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
LONG = 120_000  # milliseconds, for what a model does on a busy machine
EXAMPLE = "cabin → castle"


@contextmanager
def served(folder) -> Iterator[str]:
    """The address of a page that runs as readers start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "gradio"), "COLUMNS": "80"}
    command = [sys.executable, str(ROOT / "examples" / "app.py"), "--port", str(port)]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, server, folder / "log.txt")
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen, log) -> None:
    for _ in range(240):
        try:
            server.wait(0.5)
        except subprocess.TimeoutExpired:
            pass
        assert server.returncode is None, log.read_text()
        try:
            return urllib.request.urlopen(address).close()
        except urllib.error.URLError:
            pass
    raise TimeoutError(log.read_text())


@contextmanager
def opened(address: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *QUIET])
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def answer(page: Page) -> Image.Image:
    """B' as the page shows it."""
    (picture,) = page.locator(".answers img").all()
    return Image.open(io.BytesIO(page.request.get(picture.get_attribute("src")).body()))


def until_drawn(page: Page) -> None:
    expect(button(page, "Stop")).to_be_visible(timeout=LONG)
    expect(button(page, "Learn and draw")).to_be_visible(timeout=LONG)
    expect(page.get_by_text("Done.")).to_be_visible()


def test_what_a_file_says_is_shown_and_not_obeyed():
    from app_reports import in_readers_words  # here, since Gradio takes seconds to import

    shown = in_readers_words("`difference`: it was learned on `<img src=http://elsewhere>` and `strength` is 2")
    assert "<" not in shown and "elsewhere" in shown


def test_each_reader_has_a_stop_of_their_own():
    from app import Stop

    first = Stop()
    first.set()
    assert not copy.deepcopy(first).is_set()


@pytest.mark.once
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; Debian has it as a package of this name")
def test_a_reader_learns_a_change_and_draws_with_it_in_a_browser(tmp_path):
    """One story, since the page takes seconds to start, and to learn."""
    with served(tmp_path) as address, opened(address) as page:
        asked, failures = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failures.append(error))
        page.goto(address)

        # Nothing is there to draw with
        button(page, "Only draw").click()
        expect(page.get_by_text("There is no change yet.")).to_be_visible()

        # An example is learned from and answered
        page.locator(".examples .thumbnail-item", has_text=EXAMPLE).click()
        expect(page.locator(".queries img")).to_have_count(1)
        button(page, "Learn and draw").click()
        until_drawn(page)
        verdict = judge(answer(page), EXAMPLES[EXAMPLE])
        assert verdict.success and verdict.kept
        expect(page.locator(".losses canvas, .losses svg.marks")).to_be_visible()
        assert page.locator(".changes label").all_inner_texts() == [EXAMPLE]
        expect(page.get_by_text("Gained: castle")).to_be_visible()

        # Where it acts is shown over B
        page.get_by_text("Where the change acts in B").click()
        button(page, "Show it").click()
        until_drawn(page)
        expect(page.locator(".where img")).to_be_visible()

        # At a scale of zero B comes back, and nothing is learned for it
        drawn = page.locator(".answers img").get_attribute("src")
        page.get_by_label("number input for How much").fill("0")
        page.keyboard.press("Tab")
        expect(page.locator(".answers img")).not_to_have_attribute("src", drawn, timeout=LONG)
        verdict = judge(answer(page), EXAMPLES[EXAMPLE])
        assert verdict.kept and not verdict.success
        assert page.locator(".changes label").count() == 1

        # The difference is a file
        with page.expect_download() as download:
            button(page, "Download").click()
        assert download.value.suggested_filename == "cabin-to-castle.safetensors"
        tokens = DifferenceTokens.load(shutil.copy(download.value.path(), tmp_path / "downloaded.safetensors"))
        assert tokens.metadata["gained_phrases"] == "castle"

        # What is none is refused in plain words
        (tmp_path / "notes.txt").write_text("a castle")
        with page.expect_file_chooser() as chooser:
            button(page, "Upload").click()
        chooser.value.set_files(tmp_path / "notes.txt")
        message = page.get_by_text("This file cannot be used. notes.txt is not a safetensors file")
        expect(message).to_be_visible()
        assert str(tmp_path) not in message.inner_text() and "`" not in message.inner_text()

        # Nothing sticks out on a phone
        page.set_viewport_size({"width": 390, "height": 844})
        page.reload()
        expect(button(page, "Learn and draw")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert not failures
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
