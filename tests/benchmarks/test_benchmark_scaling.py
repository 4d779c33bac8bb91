"""The candidates of one point do the same work, memory is one call's own, and the rule of auto is judged fairly."""

import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling
from benchmarks.common import Results
from benchmarks.sampler import random_llama
from benchmarks.scaling import (
    AXES,
    BASE,
    GRID,
    GRID_WORK,
    MODEL,
    Point,
    bars,
    cells_auto_is_right,
    child,
    measure_grid,
    measure_memory,
    measure_times,
    part_name,
    points_of,
    random_tokens,
    rollout_work,
    scoring_work,
    slowdown,
)

SMALL = Point(num_prompts=2, group_size=4, prompt_length=12, completion_length=8, vocab_size=64)


def test_tokens_are_ragged_groups_behind_one_prompt_each() -> None:
    prompt_ids, prompt_mask, completion_ids, completion_mask = random_tokens(SMALL)
    assert prompt_ids.shape == prompt_mask.shape == (8, 12)
    assert completion_ids.shape == completion_mask.shape == (8, 8)
    assert prompt_mask.sum(1).tolist() == [12] * 4 + [9] * 4
    assert prompt_mask[:, -1].all()  # padded on the left
    assert completion_mask[:, 0].all()  # and on the right
    assert completion_mask.sum(1).unique().tolist() == [6, 7, 8]
    for group in (slice(0, 4), slice(4, 8)):
        assert (prompt_ids[group] == prompt_ids[group][0]).all()
    assert not torch.equal(prompt_ids[0], prompt_ids[4])
    assert len(completion_ids.unique(dim=0)) == 8  # a repeated completion could be scored once


def test_never_always_and_auto_do_the_same_work() -> None:
    model = random_llama(replace(MODEL, vocab_size=64))
    logps, gradients = {}, {}
    for name in GRID_WORK:
        call = scoring_work(model, SMALL, name)
        call()
        logps[name] = call()  # once more: gradients must not add up
        gradients[name] = model.lm_head.weight.grad
    for name in GRID_WORK:
        torch.testing.assert_close(logps[name], logps["never"], rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients[name], gradients["never"], rtol=1e-4, atol=1e-4)
    assert (logps["never"] < -1).sum() == random_tokens(SMALL)[3].sum()  # of random weights: near -log 64


def test_sharing_or_not_changes_what_the_model_is_fed() -> None:
    """The candidates differ in what they are named for: never gives every completion its own row."""
    model = random_llama(replace(MODEL, vocab_size=64))
    fed: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0].numel()))
    never, always = (scoring_work(model, SMALL, name) for name in ("never", "always"))
    never()
    fed.clear()  # the first call may look at the model
    never()
    always()
    assert fed[0] == 8 * (12 + 8)
    assert fed[1] < fed[0]


def test_a_rollout_runs_to_its_maximum() -> None:
    rollout = rollout_work(random_llama(replace(MODEL, vocab_size=64)), SMALL)()
    assert rollout.completion_mask.shape == (8, 8)
    assert rollout.completion_mask.all()


@pytest.mark.slow
def test_memory_is_that_of_the_call() -> None:
    """Neither the parent's nor the imports'."""
    ballast = bytearray(b"1") * 500_000_000
    assert 0.001 < measure_memory("never", SMALL) < 0.2
    del ballast


def test_memory_grows_with_the_work() -> None:
    large = replace(SMALL, completion_length=256, prompt_length=256)
    assert child("never", large)["work_gb"] > child("never", SMALL)["work_gb"]


def test_an_axis_changes_one_size_and_meets_the_base() -> None:
    for axis, values in AXES.items():
        points = points_of(axis)
        assert BASE in points
        assert [asdict(point) | {axis: None} for point in points] == [asdict(BASE) | {axis: None}] * len(values)
        assert [asdict(point)[axis] for point in points] == sorted(values)
    assert len({part_name(point) for axis in AXES for point in points_of(axis)}) == sum(map(len, AXES.values())) - 3


def test_every_cell_of_the_grid_has_as_many_completions() -> None:
    assert {point.num_prompts * point.group_size for point in GRID} == {16}
    assert len(set(GRID)) == 27


def test_times_have_so_many_turns() -> None:
    times = measure_times(("rollout", "never"), SMALL, 3)
    assert list(times) == ["rollout", "never"]
    assert all(row["n"] == 3 and row["median"] > 0 for row in times.values())


def test_a_small_cell_gets_more_turns() -> None:
    grid = measure_grid([SMALL, replace(SMALL, prompt_length=40)], num_tokens=8 * 20 * 6)
    assert [{row["n"] for row in cell["seconds"].values()} for cell in grid["cells"]] == [{6}, {3}]
    assert [cell["point"]["prompt_length"] for cell in grid["cells"]] == [12, 40]


def cell(never: float, always: float, auto: float) -> dict[str, Any]:
    medians = {"never": never, "always": always, "auto": auto}
    return {"point": asdict(SMALL), "seconds": {name: {"median": seconds} for name, seconds in medians.items()}}


def test_auto_is_held_against_the_better_of_the_two() -> None:
    cells = [cell(1.0, 2.0, 1.09), cell(2.0, 1.0, 1.09), cell(1.0, 2.0, 1.9), cell(2.0, 1.0, 1.2), cell(1.0, 1.0, 0.8)]
    assert [slowdown(one) <= 1.1 for one in cells] == [True, True, False, False, True]
    assert cells_auto_is_right(cells) == (3, 5)
    assert cells_auto_is_right(cells, tolerance=0.3) == (4, 5)


def test_there_are_no_bars() -> None:
    assert bars({"grid": {"cells": [cell(1.0, 2.0, 9.0)]}}) == []


@pytest.mark.slow
def test_main_measures_what_is_missing_and_prints_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "BASE", SMALL)
    monkeypatch.setattr(scaling, "AXES", {"group_size": (2, 4), "vocab_size": (32, 64)})
    monkeypatch.setattr(scaling, "GRID", [SMALL])
    monkeypatch.setattr(scaling, "GRID_TOKENS", 1)
    monkeypatch.setattr(scaling, "Results", partial(Results, folder=tmp_path))
    asked = []
    monkeypatch.setattr(scaling, "measure_memory", lambda name, point: asked.append((name, point)) or 0.125)
    monkeypatch.setattr(sys, "argv", ["scaling"])
    scaling.main()
    assert len(asked) == 3 * 3  # three kinds of work at three points: the base is on both axes
    printed = capsys.readouterr().out
    assert "group_size (num_prompts 2, prompt_length 12" in printed
    assert printed.count("0.125") == 4 * 3
    assert "of 1 cells" in printed

    scaling.main()
    assert len(asked) == 9  # nothing is measured twice
    assert "of 1 cells" in capsys.readouterr().out
