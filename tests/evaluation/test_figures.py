from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from villa.errors import DataError
from villa.evaluation.figures import curves_figure, plot_curves
from villa.tracking import JsonLinesTracker

REFERENCES = {"majority": 0.373, "question_only": 0.67}


def _villa_log(path: Path) -> Path:
    tracker = JsonLinesTracker(path)
    for update in range(10, 51, 10):
        values = {"loss": 3 / update, "clean_loss": 1 / update, "learning_rate": 1e-5 * update}
        for step in range(3):
            values |= {f"pass{step}/loss": 1.1 / update, f"pass{step}/kl": math.nan if update == 30 else 0.01}
            values |= {f"pass{step}/text_delta": 0.02 * step, f"pass{step}/text_gradient": 5.0}
        tracker.log(update, "train", values)
        tracker.log(update, "val", {"loss": 2 / update, "accuracy": 0.9 if update == 40 else 0.5})
    tracker.log(50, "test", {"loss": 0.1, "accuracy": 0.875})
    tracker.close()
    return path


def _labels(axes: Axes) -> list[str]:
    return [str(line.get_label()) for line in axes.get_lines()]


def _panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_a_villa_run_gets_all_panels(tmp_path: Path) -> None:
    figure = curves_figure(_villa_log(tmp_path / "log.jsonl"), REFERENCES, title="villa")
    assert [axes.get_title() for axes in figure.axes] == [
        "Loss",
        "Validation",
        "Learning rate",
        "Perturbation size",
        "KL divergence to the clean prediction",
    ]
    assert all(axes.get_xlabel() == "update" and axes.get_ylabel() for axes in figure.axes)
    assert _labels(_panel(figure, "Loss")) == [
        "train, total",
        "train, clean",
        "validation",
        "pass 0",
        "pass 1",
        "pass 2",
    ]
    assert _labels(_panel(figure, "Perturbation size")) == ["text, pass 0", "text, pass 1", "text, pass 2"]


def test_scores_are_percent_with_best_test_and_references(tmp_path: Path) -> None:
    axes = _panel(curves_figure(_villa_log(tmp_path / "log.jsonl"), REFERENCES), "Validation")
    assert _labels(axes) == [
        "val accuracy\n(best 90.0 % at 40)",
        "test accuracy\n(87.5 %)",
        "question only\n(67.0 %)",
        "majority\n(37.3 %)",
    ]
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([50, 50, 50, 90, 50])


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path: Path) -> None:
    axes = _panel(curves_figure(_villa_log(tmp_path / "log.jsonl")), "KL divergence to the clean prediction")
    assert _labels(axes)[0] == "pass 0\n(1 not finite)"
    assert list(axes.get_lines()[0].get_xdata()) == [10, 20, 40, 50]


@pytest.mark.parametrize("update", [0, 1])
def test_one_record_is_enough(tmp_path: Path, update: int) -> None:
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    tracker.log(update, "train", {"loss": 1.0})
    tracker.log(update, "val", {"loss": math.inf})
    tracker.close()
    figure = curves_figure(tmp_path / "log.jsonl", REFERENCES)
    assert [axes.get_title() for axes in figure.axes] == ["Loss"]
    plot_curves(tmp_path / "log.jsonl", tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_legends_lie_inside_the_axes(tmp_path: Path) -> None:
    figure = curves_figure(_villa_log(tmp_path / "log.jsonl"), REFERENCES, title="villa", caption="n = 3")
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend, box = axes.get_legend(), axes.get_window_extent()
        if legend is None:
            assert len(axes.get_lines()) == 1
            continue
        inside = legend.get_window_extent()
        assert box.x0 <= inside.x0 < inside.x1 <= box.x1
        assert box.y0 <= inside.y0 < inside.y1 <= box.y1


def test_no_place_of_a_panel_is_empty(tmp_path: Path) -> None:
    figure = curves_figure(_villa_log(tmp_path / "log.jsonl"), REFERENCES)
    figure.draw_without_rendering()
    *rest, last = [axes.get_window_extent() for axes in figure.axes]
    assert last.width > 1.8 * rest[0].width


def test_losses_over_decades_get_a_logarithmic_axis(tmp_path: Path) -> None:
    for last, scale in ((1.0, "linear"), (0.01, "log"), (0.0, "linear")):
        tracker = JsonLinesTracker(tmp_path / f"{last}.jsonl")
        for update, loss in ((1, 2.0), (2, last)):
            tracker.log(update, "train", {"loss": loss, "learning_rate": loss})
        tracker.close()
        figure = curves_figure(tmp_path / f"{last}.jsonl")
        assert [axes.get_yscale() for axes in figure.axes] == [scale, "linear"]


def test_the_files_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    log = _villa_log(tmp_path / "log.jsonl")
    for name in ("a.png", "b.png"):
        plot_curves(log, tmp_path / "figures" / name, REFERENCES, title="villa")
    with Image.open(tmp_path / "figures" / "a.png") as image:
        image.load()
        assert image.size == (1690, 1378)
    for kind in ("png", "pdf"):
        files = [tmp_path / "figures" / f"{name}.{kind}" for name in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"%PDF")


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    log = _villa_log(tmp_path / "log.jsonl")
    script = (
        "import sys; from pathlib import Path; from villa.evaluation.figures import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_curves(Path({str(log)!r}), Path({str(tmp_path / 'x.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before = dict(mpl.rcParams)
    plot_curves(log, tmp_path / "y.png")
    assert dict(mpl.rcParams) == before


def test_a_log_without_values_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="has no training or validation values to draw"):
        plot_curves(path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_perturbations_at_several_points_have_a_line_each(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path / "log.jsonl")
    values = {"loss": 1.0} | {f"pass0/{key}_delta": 0.02 for key in ("text", "text.layer.3", "image.pixels")}
    tracker.log(1, "train", values)
    tracker.close()
    panel = _panel(curves_figure(tmp_path / "log.jsonl"), "Perturbation size")
    assert _labels(panel) == ["image.pixels, pass 0", "text, pass 0", "text.layer.3, pass 0"]
