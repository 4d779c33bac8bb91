"""What a run writes down."""

import json
from pathlib import Path

import torch

from grpo.records import TokenMeans, append_jsonl


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
