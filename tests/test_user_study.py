# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""The page that asks people, answered in a browser, and the count of its answers."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import user_study
from conftest import save_triplets
from PIL import Image


COLORS = ("red", "yellow", "blue")
METHODS = ("ours", "DIA", "Analogist", "VISII")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]


@pytest.fixture
def given(tmp_path) -> list[str]:
    """Options of `make` that name three triplets, and four methods, each with a colour of its own."""
    save_triplets(tmp_path, COLORS)
    for method, color in zip(METHODS, ("red", "lime", "blue", "gold"), strict=True):
        (tmp_path / method).mkdir()
        for index in range(len(COLORS)):
            Image.new("RGB", (40, 32), color).save(tmp_path / method / f"{index:05d}.png")
    methods = [f"{method}={tmp_path}/{method}" for method in METHODS]
    return ["make", "--triplets", str(tmp_path / "triplets.jsonl"), "--answers", *methods, "--output"]


@pytest.fixture
def page(given, tmp_path) -> Path:
    assert user_study.main([*given, str(tmp_path / "study.html")]) == 0
    return tmp_path / "study.html"


def places(page: Path, method: str) -> list[int]:
    """Where each question shows a method's answer, from 1."""
    return [order.index(method) + 1 for order in user_study.read_study(page)[1]]


def write_answers(path: Path, page: Path, choices: list, participant: str = "a", **others) -> Path:
    answers = {"study": user_study.read_study(page)[0], "participant": participant, "finished": "2026-01-01T00:00Z"}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(answers | {"choices": choices} | others))
    return path


def rows(printed: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert lines[0] == ["method", "choices", "preference (Wilson)", "other people and questions"]
    return {name: cells for name, *cells in lines[2:]}


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine; Debian's package is chromium")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.mark.once
def test_people_answer_by_keyboard_and_by_tap_and_hand_over_a_file(page, browser, tmp_path, capsys):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, has_touch=True)
    context.set_default_timeout(10_000)
    sheet, asked, complaints = context.new_page(), [], []
    sheet.on("request", lambda request: asked.append(request.url[:5]))
    sheet.on("console", lambda message: complaints.append(message.text))
    sheet.on("pageerror", lambda error: complaints.append(str(error)))
    ours = places(page, "ours")

    def is_at(place: str) -> None:
        sheet.get_by_text(place, exact=True).wait_for()

    sheet.goto(page.as_uri())
    sheet.get_by_role("button", name="Begin").click()
    is_at("1 of 3")
    sheet.keyboard.press("ArrowRight")  # not before there is an answer
    is_at("1 of 3")
    sheet.keyboard.press(str(ours[0] % 4 + 1))  # any other
    is_at("2 of 3")
    sheet.keyboard.press("ArrowLeft")
    is_at("1 of 3")
    sheet.keyboard.press(str(ours[0]))
    is_at("2 of 3")

    sheet.reload()
    is_at("2 of 3")
    assert sheet.get_by_role("button", name="Next").is_disabled()
    sheet.set_viewport_size({"width": 390, "height": 844})
    boxes = [option.bounding_box() for option in sheet.locator(".option").all()]
    assert len(boxes) == 4 and all(box["width"] > 150 and box["height"] > 150 for box in boxes)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844 for box in boxes)
    for place, then in zip(ours[1:], ("3 of 3", "Done"), strict=True):
        sheet.get_by_role("button", name=f"Option {place}").tap()
        is_at(then)
    with sheet.expect_download() as download:
        sheet.get_by_text("Download answers").tap()
    answers = tmp_path / download.value.suggested_filename
    download.value.save_as(answers)
    context.close()

    assert set(asked) <= {"file:", "data:", "blob:"} and not complaints
    assert re.fullmatch(r"answers-[0-9a-f]{16}\.json", answers.name)
    assert json.loads(answers.read_text())["choices"] == ours
    capsys.readouterr()
    assert user_study.main(["count", str(page), str(answers)]) == 0
    printed = capsys.readouterr().out
    assert "participants: 1, questions: 3, methods: 4, files left out: 0" in printed
    assert rows(printed)["ours"][0] == "3" and rows(printed)["VISII"][0] == "0"


# --------------------------------------------------------------------------------------------------------- make


def test_the_page_shows_each_answer_where_its_key_says_and_names_no_method(page):
    text = page.read_text()
    readable = re.sub(r"[A-Za-z0-9+/=]{40,}", "", text)  # base64 has every short word somewhere
    assert not any(method in readable for method in METHODS) and "://" not in readable
    assert "Difference" not in readable and text.startswith("<!doctype html>")
    study = json.loads(user_study.STUDY.search(text)[1])
    colors = {"ours": (255, 0, 0), "DIA": (0, 255, 0), "Analogist": (0, 0, 255), "VISII": (255, 215, 0)}
    orders = user_study.read_study(page)[1]
    for question, order in zip(study["questions"], orders, strict=True):
        for uri, method in zip(question["options"], order, strict=True):
            image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            assert image.size == (32, 32)  # cut, and not made larger
            assert max(abs(a - b) for a, b in zip(image.getpixel((16, 16)), colors[method], strict=True)) < 8


def test_the_seed_draws_the_questions_and_the_order(given, tmp_path):
    def made(name: str, *options: str) -> tuple:
        user_study.main([*given, str(tmp_path / name), *options])
        study = json.loads(user_study.STUDY.search((tmp_path / name).read_text())[1])
        return study["id"], [question["after"] for question in study["questions"]], study["key"]

    first = made("first", "--count", "2", "--seed", "1")
    assert len(first[1]) == 2 and first == made("again", "--count", "2", "--seed", "1")
    others = [made(f"{seed}", "--count", "2", "--seed", f"{seed}") for seed in range(2, 8)]
    assert len({other[0] for other in others}) == 6 and len({tuple(other[1]) for other in others}) > 1


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["there.html"], "there.html is there already, and answers to it may be out"),
        (["new.html", "--count", "4"], "--count 4 is more than the 3 triplets"),
        (["new.html", "--answers", "ours"], "--answers takes two to four methods, and has 1"),
        (
            ["new.html", "--answers", "ours", "DIA", "again=ours", "VISII", "Analogist"],
            "two to four methods, and has 5",
        ),
        (["new.html", "--answers", "ours", "ours"], "ours, ours are not names that differ"),
        (
            ["new.html", "--answers", "ours", "empty"],
            "--answers: empty, for empty, has no answer 00000.png, and 3 are missing",
        ),
    ],
)
def test_what_no_page_can_be_made_of_is_said_in_a_line_and_nothing_is_written(
    given, tmp_path, monkeypatch, options, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.html").write_text("an earlier page")
    with pytest.raises(SystemExit, match=complaint) as raised:
        user_study.main([*given, *options])
    assert "\n" not in str(raised.value)
    assert (tmp_path / "there.html").read_text() == "an earlier page" and not (tmp_path / "new.html").exists()


# -------------------------------------------------------------------------------------------------------- count


def test_choices_are_counted_by_method_with_intervals(page, tmp_path, capsys):
    ours, visii = places(page, "ours"), places(page, "VISII")
    for number, choices in enumerate((ours, ours, ours, [*ours[:2], visii[2]])):
        write_answers(tmp_path / "answers" / f"{number}.json", page, choices, participant=str(number))
    capsys.readouterr()
    assert user_study.main(["count", str(page), str(tmp_path / "answers")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "participants: 4, questions: 3, methods: 4, files left out: 0" in printed.out
    counted = rows(printed.out)
    assert next(iter(counted)) == "ours"
    assert counted["ours"][:2] == ["11", "0.92 (0.65 to 0.99)"] and counted["VISII"][:2] == [
        "1",
        "0.08 (0.01 to 0.35)",
    ]
    assert counted["DIA"] == counted["Analogist"] == ["0", "0.00 (0.00 to 0.24)", "0.00 to 0.00"]
    low, high = map(float, counted["ours"][2].split(" to "))
    assert low < 0.92 < high == 1.0


def test_participants_who_agree_say_less_than_as_many_choices_that_are_independent():
    """Twenty people choose the first method in the same five of ten questions: ten are the evidence, not 200."""
    votes = np.zeros((20, 10, 2), bool)
    votes[:, :5, 0] = votes[:, 5:, 1] = True
    low, high = user_study.resampled(votes)
    assert 0.15 < low[0] < 0.3 and 0.7 < high[0] < 0.85  # 0.5 ± 1.96 × (0.25 / 10) ** 0.5 is 0.19 to 0.81
    assert low + high[::-1] == pytest.approx(1)


def test_files_that_cannot_be_counted_are_left_out_and_told(page, tmp_path, capsys):
    ours, folder = places(page, "ours"), tmp_path / "answers"
    write_answers(folder / "good.json", page, ours)
    write_answers(folder / "sooner.json", page, [1, 1, 1], finished="2025-12-31T00:00Z")  # by the same participant
    write_answers(folder / "other.json", page, ours, "b", study="another")
    write_answers(folder / "short.json", page, ours[:2], "c")
    write_answers(folder / "gap.json", page, [*ours[:2], None], "d")
    write_answers(folder / "five.json", page, [*ours[:2], 5], "e")
    (folder / "list.json").write_text("[]")
    (folder / "broken.json").write_text('{"study')
    capsys.readouterr()
    given = [str(folder), str(folder / "good.json")]  # once more
    assert user_study.main(["count", str(page), *given]) == 1
    printed = capsys.readouterr()
    told = dict(line.split(" is left out: ") for line in printed.err.splitlines())
    told = {Path(path).name: fault for path, fault in told.items()}
    study = user_study.read_study(page)[0]
    assert told.pop("broken.json").startswith("it is no JSON: ")
    assert told == {
        "sooner.json": f"its participant finished {folder / 'good.json'} later",
        "other.json": f"it answers another page, another; this one is {study}",
        "short.json": "it answers 2 of 3 questions",
        "gap.json": "it answers 2 of 3 questions",
        "five.json": "it answers 2 of 3 questions",
        "list.json": "it is no file of answers",
    }
    assert "participants: 1, questions: 3, methods: 4, files left out: 7" in printed.out
    assert rows(printed.out)["ours"][0] == "3"


def test_what_cannot_be_counted_at_all_is_said_in_a_line(page, tmp_path):
    (tmp_path / "empty").mkdir()
    bad = write_answers(tmp_path / "bad.json", page, [1], "a")
    for options, complaint in (
        ([page, tmp_path / "nowhere"], "there is no .*nowhere; give files of answers"),
        ([page, tmp_path / "empty"], "no files of answers .* in .*empty"),
        ([tmp_path / "nowhere.html", bad], "nowhere.html is no page that `make` wrote: .*No such file"),
        ([bad, bad], "bad.json is no page that `make` wrote"),
        ([page, bad], "none of the 1 files of answers can be counted"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            user_study.main(["count", *map(str, options)])
