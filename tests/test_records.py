"""What a run writes down."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from grpo.config import InputError, load_config
from grpo.records import TokenMeans, append_jsonl, start_run


def test_token_means_do_not_depend_on_micro_batches() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    whole, parts = TokenMeans(), TokenMeans()
    whole.add(mask, {"kl/mean": values}, maxima=["kl/mean"])
    for row in range(2):
        parts.add(mask[row : row + 1], {"kl/mean": values[row : row + 1]}, maxima=["kl/mean"])
    # (1 + 2 + 3 + 10) / 4; a mean of the micro-batches' means would be (2 + 10) / 2 = 6
    assert whole.metrics() == parts.metrics() == {"kl/mean": 4.0, "kl/max": 10.0}


def test_token_means_ignore_nan_in_padding_and_survive_an_empty_mask() -> None:
    means, empty = TokenMeans(), TokenMeans()
    means.add(torch.tensor([[True, False]]), {"kl": torch.tensor([[2.0, torch.nan]])})
    assert means.metrics() == {"kl": 2.0}
    empty.add(torch.zeros(1, 2, dtype=torch.bool), {"kl": torch.ones(1, 2)})
    assert empty.metrics() == {"kl": 0.0}


def test_jsonl_has_one_object_a_line_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": float("nan"), "b": {"c": float("inf")}, "d": "é\n"}])
    append_jsonl(path, [{"a": 1.5}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"a": None, "b": {"c": None}, "d": "é\n"}, {"a": 1.5}]


def test_run_json_says_how_the_run_was_made(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'run'}", "seed=7"])
    run = json.loads((start_run(config) / "run.json").read_text())
    assert run["settings"]["seed"] == 7
    assert run["versions"]["torch"] == torch.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run["commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_an_earlier_run_is_moved_aside_not_mixed_into(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'run'}"])
    append_jsonl(start_run(config) / "metrics.jsonl", [{"step": 0}])
    assert not (start_run(config) / "metrics.jsonl").exists()
    (aside,) = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert (aside / "metrics.jsonl").exists()


def test_two_runs_of_one_second_both_survive(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'run'}"])
    for number in range(4):
        append_jsonl(start_run(config) / "metrics.jsonl", [{"run": number}])
    assert len(list(tmp_path.glob("run*/metrics.jsonl"))) == 4


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, is_file: bool) -> None:
    mine = tmp_path / "mine"
    if is_file:
        mine.write_text("precious")
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="output_dir"):
        start_run(load_config(None, [f"output_dir={mine}"]))
    assert (mine if is_file else mine / "thesis.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .*file/run cannot be used: Not a directory"):
        start_run(load_config(None, [f"output_dir={tmp_path / 'file' / 'run'}"]))
