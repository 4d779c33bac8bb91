"""benchmarks/floor.py: what it notes of a step's model calls."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaModel

import grpo.run.plots
from benchmarks.floor import RecordedTraining, recording
from benchmarks.vs_trl import train_ours
from grpo.settings.config import load_config
from tests.run import test_train as helpers

small = helpers.small  # the fixture


def test_the_calls_of_each_step_are_noted(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, one call per further token, the reference, the update; and what the LM head was applied to."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
    config = load_config(None, [f"{key}={value}" for key, value in (small | {"output_dir": tmp_path / "run"}).items()])
    (tmp_path / "run").mkdir()
    training = RecordedTraining(config.num_train_steps)
    with recording(training, LlamaModel):
        train_ours(config, training)
    assert len(training.step_seconds) == 2
    calls, (prompt_length, lengths) = training.calls[0], training.shapes[0]  # of step 1; step 2 has an evaluation in it
    sampling = [call for call in calls if call.is_sampling]
    scoring = [call for call in calls if not call.is_sampling][-2:]  # before them the model's capabilities are tried
    assert len(lengths) == 16
    assert [call.new for call in sampling] == [prompt_length] + [1] * (max(lengths) - 1)
    assert [call.has_backward for call in scoring] == [False, True]
    assert all(0 < call.scored <= sum(lengths) for call in scoring)  # equal completions are scored once
