"""A run that is killed forty times over leaves exactly what it leaves when nobody disturbs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.run.checkpoint import checkpoints
from tests.run import test_train as helpers
from tests.run.test_resume import assert_same_run
from tests.run.test_train import read

small = helpers.small  # the fixture

NUM_KILLS = 40


def killed_run(settings: dict[str, Any], folder: Path, kills: int) -> dict[str, Any]:
    """Settings go through a file; the report comes back."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(settings | {"output_dir": str(folder)}))
    command = [sys.executable, "-m", "tests.killed_run", str(file), "--kills", str(kills)]
    result = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each life is a forked process")
def test_forty_kills_lose_nothing(
    small: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The reference moves and is saved too; evaluations and best/ come in between."""
    settings = small | {"num_train_steps": 200, "save_every": 1, "eval_every": 3, "kl_coeff": 0.1}
    settings |= {"ref_update_every": 4, "num_iterations": 2}
    assert killed_run(settings, tmp_path / "whole", kills=0)["status"] == 0
    report = killed_run(settings, tmp_path / "run", kills=NUM_KILLS)
    record_property("inside_a_save", report["inside_a_save"])

    assert report["status"] == 0
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == list(range(201))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["finished"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000199", "step-000200"]
    assert not list((tmp_path / "run").glob(".*unfinished"))
    # Not an easy life: kills fell inside saves, and the run was still under way at the last one.
    assert report["inside_a_save"] >= 5, report
    assert len(report["after_rows"]) == NUM_KILLS
    assert max(report["after_rows"]) < 201, report
