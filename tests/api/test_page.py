"""The page that a trained model answers on: what it shows is what the model says, clicked in a real browser."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved_runs import COMMON, train, write_lines

import villa
from villa.api.page import Demo
from villa.cli.demo import main
from villa.cli.run import main as run
from villa.datasets.synthetic.pictures import COLOURS, draw_shape
from villa.errors import ConfigError, DataError

QUESTION = "What is the colour of the shape?"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on drawn pictures, which has learned little."""
    folder, random = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    for colour in COLOURS:
        draw_shape(colour, "circle", random).save(folder / f"{colour}.png")
    records = [{"image": f"{colour}.png", "question": QUESTION, "answer": colour} for colour in COLOURS] * 3
    file = write_lines(folder / "questions.jsonl", records)
    data = ["dataset=jsonl", "run_type=train", "evaluation.split=null", f"dataset.train={file}"]
    model = ["model=uniter", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"]
    assert run([*model, *data, *COMMON, f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


def test_what_is_shown_is_what_the_model_says(trained: Path) -> None:
    model = villa.from_pretrained(trained, device="cpu")
    demo, image = Demo(model), Image.open(trained.parent / "red.png")
    assert demo.modalities == ["text", "image", "both"]
    shown = demo.show(image, f" {QUESTION} ", 0.0, "both")
    expected = model.predict(image=image, text=QUESTION)
    assert next(iter(shown.answers.items())) == (expected["answer"], pytest.approx(expected["score"]))
    assert sum(shown.answers.values()) == pytest.approx(1)
    assert (shown.attacked, shown.moved, shown.change) == (None, None, "")
    assert shown.attention is not None
    for modality in demo.modalities:
        attacked = demo.show(image, QUESTION, 0.3, modality)
        found = model.attack(image=image, text=QUESTION, radius=0.3, modality=modality)
        assert (attacked.answers, attacked.attacked) == (shown.answers, found.after)
        assert attacked.attacked is not None
        assert attacked.attacked.get(expected["answer"], 0.0) < expected["score"]
        assert attacked.moved is not None
        assert attacked.change == found.movement.change
        assert bool(found.movement.tokens) == (modality != "image")
        assert bool(found.movement.regions) == (modality != "text")
    with pytest.raises(DataError, match="there is no question"):
        demo.show(image, " ", 0.0, "both")
    with pytest.raises(DataError, match="there is no image"):
        demo.show(None, QUESTION, 0.0, "both")
    with pytest.raises(ConfigError, match="modality 'sound': the model can be perturbed in text, image"):
        model.attack(image=image, text=QUESTION, radius=0.1, modality="sound")


def test_a_larger_perturbation_hurts_no_less(trained: Path) -> None:
    model, image = villa.from_pretrained(trained, device="cpu"), trained.parent / "red.png"
    answer, score = next(iter(model.scores(image=image, text=QUESTION).items()))
    for radius in (0.01, 0.1, 1.0):
        found = model.attack(image=image, text=QUESTION, radius=radius).after.get(answer, 0.0)
        assert found < score
        score = found


def test_a_model_of_text_has_no_image(tmp_path: Path) -> None:
    model = villa.from_pretrained(train("text_classifier", tmp_path / "data"), device="cpu")
    demo = Demo(model)
    assert (demo.regions, demo.modalities) == ("none", ["text"])
    shown = demo.show(None, "is it red?", 0.5, "text")
    assert shown.answers == model.scores(text="is it red?")
    assert shown.attention is None


def test_mistakes_are_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([str(trained)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'villa[gradio]'" in error


@pytest.fixture
def served(trained: Path) -> Iterator[str]:
    """The address of the page, served by the command in a process of its own."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "villa.cli.demo", str(trained), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().removesuffix(" (Ctrl-C ends it)\n")
        assert address.startswith("http://127.0.0.1:")
        yield address
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=600)
    assert errors == "", errors
    assert (server.returncode, output) == (130, "ended by SIGINT\n")


def test_a_taken_port_is_one_line(trained: Path, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.rstrip("/").rpartition(":")[2]
    assert main([str(trained), "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cannot be served at 127.0.0.1:{port}" in error
    assert main([str(trained), "--port", "70000"]) == 2
    assert "port=70000: give 0 to 65535" in capsys.readouterr().err


def test_in_a_browser(trained: Path, served: str) -> None:
    """The page asks nobody but its own server."""
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    image = trained.parent / "red.png"
    model = villa.from_pretrained(trained, device="cpu")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.get_by_role("button", name="Answer").click()
        page.get_by_text("there is no question; write one").wait_for()
        page.set_input_files("input[type=file]", str(image))
        page.get_by_label("Question").fill(QUESTION)
        page.locator("img[src*=red]").first.wait_for()
        page.get_by_role("button", name="Answer").click()
        answers = model.scores(image=image, text=QUESTION)
        labels = page.locator("[data-testid=label-output-value]")
        labels.first.wait_for()
        assert labels.all_inner_texts() == [next(iter(answers))]
        for modality, name in (("both", None), ("text", "Text")):
            slider = page.get_by_role("slider")
            if name is None:
                slider.fill("0.3")
                slider.dispatch_event("pointerup")
            else:
                page.get_by_role("radio", name=name).check()
            found = model.attack(image=image, text=QUESTION, radius=0.3, modality=modality)
            page.get_by_text(found.movement.change, exact=True).wait_for()
            assert labels.all_inner_texts() == [next(iter(answers)), next(iter(found.after))]
        assert page.locator("img[src*='/file=']").count() >= 3
        browser.close()
    own = (served, "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
