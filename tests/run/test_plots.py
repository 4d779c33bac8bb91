"""The pictures: what is on them, and that they can be drawn from the rows of any run."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

import grpo.run.plots
from grpo.errors import InputError, RunError
from grpo.run.plots import draw_comparison, draw_curves
from tests.conftest import later_slow

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"

EVALUATION = {
    "eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6, "eval/reward": 0.5,
    "eval/mean_length": 7.0, "eval/clipped_ratio": 0.0, "eval/time": 1.0,
}  # fmt: skip
STEP = {
    "loss": 0.1, "reward": 0.3, "reward_std": 0.4, "frac_reward_zero_std": 0.25, "completions/mean_length": 9.0,
    "completions/clipped_ratio": 0.1, "kl": 0.01, "entropy": 1.5, "grad_norm": 2.0, "learning_rate": 1e-4,
    "answers/right": 0.3, "answers/wrong": 0.4, "answers/none": 0.2, "answers/truncated": 0.1,
}  # fmt: skip


def rows_of(num_steps: int, **changes: object) -> list[dict[str, Any]]:
    """Of a run that is evaluated at every second step."""
    rows: list[dict[str, Any]] = [{"step": 0} | EVALUATION]
    for step in range(1, num_steps + 1):
        rows.append({"step": step} | STEP | (EVALUATION if step % 2 == 0 else {}) | changes)
    return rows


def without(rows: list[dict[str, Any]], *prefixes: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(prefixes)} for row in rows]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What would have been written."""
    caught: list[Figure] = []
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: caught.append(figure))
    return caught


def panel(figure: Figure, word: str) -> Axes:
    return next(axis for axis in figure.axes if word in axis.get_title())


def labels_in(axis: Axes) -> list[str]:
    legend = axis.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def data_of(axis: Axes) -> list[list[list[float]]]:
    return [[[float(value) for value in values] for values in line.get_data()] for line in axis.get_lines()]


RUNS = {
    "whole": rows_of(6),
    "only the base": rows_of(0),
    "one step": rows_of(1),
    "no kl": without(rows_of(4), "kl"),
    "no accuracy": without(rows_of(4), "eval/accuracy"),
    "no answers": without(rows_of(4), "answers/"),
    "nothing but steps": [{"step": 0}, {"step": 1}],
    "no rows": [],
    "null": rows_of(4, reward=None, loss=None, kl=None, grad_norm=None),
    "an accuracy that is null": [row | dict.fromkeys(EVALUATION) for row in rows_of(4)],
}


@pytest.mark.parametrize("name", later_slow(RUNS, 3))
def test_any_run_gives_a_picture_that_replaces_the_earlier_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "training_curves.png"
    path.write_text("an old one")
    draw_curves(RUNS[name], path)
    assert path.read_bytes().startswith(PNG)
    assert imread(path).shape == (700, 1100, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["training_curves.png"]


def test_all_runs_of_any_kind_fit_into_one_picture(tmp_path: Path) -> None:
    draw_comparison(RUNS, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


def test_every_panel_says_what_it_shows(figures: list[Figure]) -> None:
    for rows in RUNS.values():
        draw_curves(rows, Path("nowhere.png"))
    draw_comparison(RUNS, Path("nowhere.png"))
    assert len(figures) == len(RUNS) + 1
    for figure in figures:
        titled = [axis for axis in figure.axes if axis.get_title()]
        assert len({axis.get_title() for axis in titled}) == 6
        assert {axis.get_xlabel() for axis in titled} == {"step"}
        for axis in figure.axes:  # the right-hand scale of a panel has no title of its own
            assert axis in titled or axis.get_position().bounds in {other.get_position().bounds for other in titled}


def test_a_run_with_a_critic_shows_it_where_others_show_groups(figures: list[Figure]) -> None:
    rows = [row | {"value_loss": 0.1, "value/explained_variance": 0.2} for row in rows_of(4)]
    for row in rows:
        row.pop("frac_reward_zero_std", None)
    draw_curves(rows, Path("nowhere.png"))
    values = [line[1][0] for line in data_of(panel(figures[0], "critic"))]
    assert values == [0.1, 0.2]
    assert not any("signal" in axis.get_title() for axis in figures[0].axes)


def test_the_lines_are_the_numbers(figures: list[Figure]) -> None:
    rows = rows_of(4)
    rows[3]["reward"] = 0.9
    draw_curves(rows, Path("nowhere.png"))
    reward = panel(figures[0], "Reward")
    assert data_of(reward) == [[[1, 2, 3, 4], [0.3, 0.3, 0.9, 0.3]], [[0, 2, 4], [0.5, 0.5, 0.5]]]
    band = reward.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.4, 0.6)
    assert data_of(panel(figures[0], "signal")) == [[[1, 2, 3, 4], [0.75] * 4]]
    areas = panel(figures[0], "answers").collections
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in areas]
    assert tops == pytest.approx([0.3, 0.7, 0.9, 1.0])  # right, wrong, none, truncated, on top of each other


def test_a_value_that_is_null_leaves_a_gap(figures: list[Figure]) -> None:
    rows = rows_of(4)
    rows[2]["reward"] = None
    draw_curves(rows, Path("nowhere.png"))
    steps, values = data_of(panel(figures[0], "Reward"))[0]
    assert steps == [1, 2, 3, 4]
    assert [math.isnan(value) for value in values] == [False, True, False, False]


def test_what_a_run_lacks_has_no_line_and_no_name(figures: list[Figure]) -> None:
    for name in ("whole", "no kl", "no accuracy", "only the base"):
        draw_curves(RUNS[name], Path("nowhere.png"))
    whole, no_kl, no_accuracy, base = figures
    assert len(labels_in(panel(whole, "KL"))) == 2
    assert labels_in(panel(no_kl, "KL")) == ["entropy"]
    assert len(labels_in(panel(whole, "Reward"))) == 2
    assert labels_in(panel(no_accuracy, "Reward")) == ["samples"]
    assert len(labels_in(panel(base, "Reward"))) == 1
    assert labels_in(panel(base, "KL")) == []


def test_loss_and_gradient_norm_share_a_panel_and_a_legend(figures: list[Figure]) -> None:
    draw_curves(RUNS["whole"], Path("nowhere.png"))
    loss = panel(figures[0], "Loss")
    twins = [axis for axis in figures[0].axes if axis.get_position().bounds == loss.get_position().bounds]
    assert len(twins) == 2
    assert sorted(label for axis in twins for label in labels_in(axis)) == ["gradient norm, right axis", "loss"]


def test_nine_runs_can_be_told_apart(figures: list[Figure], tmp_path: Path) -> None:
    runs = {f"run {number}": rows_of(3, reward=number / 10) for number in range(9)}
    draw_comparison(runs, Path("nowhere.png"))
    for axis in figures[0].axes:
        looks = {(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}
        assert len(looks) == len(axis.get_lines()) == 9
    assert [labels_in(axis) for axis in figures[0].axes] == [list(runs)] * 6
    values = [values[0] for _, values in data_of(panel(figures[0], "Reward of the samples"))]
    assert values == [number / 10 for number in range(9)]


def test_a_run_looks_alike_in_every_panel(figures: list[Figure]) -> None:
    """Also where another run lacks a metric."""
    draw_comparison({"a": RUNS["no kl"], "b": RUNS["whole"]}, Path("nowhere.png"))
    colours = {axis.get_title(): [line.get_color() for line in axis.get_lines()] for axis in figures[0].axes}
    kl = colours.pop(next(title for title in colours if "KL" in title))
    (a, b), *others = colours.values()
    assert all(pair == [a, b] for pair in others)
    assert kl == [b]


def test_a_picture_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"picture\.png cannot be written: No such file"):
        draw_curves(RUNS["whole"], tmp_path / "missing" / "picture.png")


# python -m grpo.run.plots


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo.run.plots", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_two_runs_are_drawn_into_one_file(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, rows_of(4)) for name in ("a", "b")]
    result = command(*runs, "--output", tmp_path / "both.png")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'both.png'}\n"), result.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "a" / "training_curves.png").exists()


def test_one_run_gets_its_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a", rows_of(4))
    monkeypatch.setattr(sys, "argv", ["plots", str(folder)])
    grpo.run.plots.main()
    assert capsys.readouterr().out == f"{folder / 'training_curves.png'}\n"
    assert (folder / "training_curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, ": cannot be read: No such file or directory"),
        ("half a line\n", ", line 1: not JSON: "),
        ('{"loss": 1}\n', ': not the metrics of a run: expected JSON objects with "step"'),
        ("[1]\n", ": not the metrics of a run"),
        ("", ": not the metrics of a run"),
    ],
)
def test_a_run_that_cannot_be_read_ends_in_one_line(
    tmp_path: Path, text: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = write_run(tmp_path / "good", rows_of(2)), tmp_path / "bad"
    if text is not None:
        bad.mkdir()
        (bad / "metrics.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["plots", str(good), str(bad), "--output", str(tmp_path / "both.png")])
    with pytest.raises(InputError, match=re.escape(f"{bad / 'metrics.jsonl'}{problem}")):
        grpo.run.plots.main()
    assert not (tmp_path / "both.png").exists()


def test_a_run_that_is_still_writing_its_last_line_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", rows_of(2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    monkeypatch.setattr("sys.argv", ["plots", str(folder)])
    grpo.run.plots.main()
    assert (folder / "training_curves.png").read_bytes().startswith(PNG)
