"""The README tells the truth: its numbers, tags, commands, flags, files and metric names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import BLOCKS, TOY, rendered
from grpo.config import TYPES
from tests.test_train import EVERY_EVALUATION, EVERY_STEP

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_numbers_come_from_the_results(path: Path) -> None:
    assert rendered(path) == path.read_text(encoding="utf-8")


def test_a_typed_number_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: another result renders another text."""
    changed = tmp_path / "toy.json"
    changed.write_text(
        re.sub(r'"num_right": \d+,\s*"accuracy": [\d.]+', '"num_right": 1, "accuracy": 0.002', TOY.read_text())
    )
    monkeypatch.setattr("benchmarks.readme.TOY", changed)
    for path in BLOCKS:
        assert rendered(path) != path.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(10))
def test_what_it_says_of_the_controls_holds_for_every_seed(seed: int) -> None:
    runs = json.loads(TOY.read_text())["runs"]
    grpo, base = runs[f"grpo-{seed}"]["final"]["accuracy"], runs[f"grpo-{seed}"]["base"]["accuracy"]
    assert runs[f"shuffled-{seed}"]["final"]["accuracy"] < base + 0.05  # "accuracy does not rise"
    assert base + 0.05 < runs[f"rejection_sampling-{seed}"]["final"]["accuracy"] < grpo - 0.02  # "it rises, not as far"


def test_nothing_in_it_waits_to_be_filled_in() -> None:
    assert not re.findall(r"OUTPUT|TODO|XXX|lorem", README)


def test_the_algorithm_box_and_the_loop_carry_the_same_tags() -> None:
    box = README.split("## The algorithm on one screen")[1].split("```")[1]
    tags = re.findall(r"^  \[(\d)\] (\w+)", box, flags=re.MULTILINE)
    loop = re.findall(r"^        # \[(\d)\] (\w+)", (ROOT / "train_grpo.py").read_text(), flags=re.MULTILINE)
    assert [number for number, _ in tags] == list("1234567")
    assert [(number, word.lower()) for number, word in loop] == [(number, word.lower()) for number, word in tags]


def test_its_two_commands_are_the_ones_ci_runs() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python train_grpo.py",
        "python3 -m venv .venv && .venv/bin/pip install -r requirements-dev.txt && .venv/bin/python -m pytest",
    ]


def test_every_flag_it_names_exists() -> None:
    flags = set(re.findall(r"--(\w+)", README)) - {"help", "config"}
    assert flags
    assert flags <= set(TYPES)


def test_every_command_it_shows_is_accepted() -> None:
    commands = re.findall(r"^python train_grpo.py (.*?)(?: +#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 3
    for arguments in commands:
        code = f"import shlex; from grpo.config import parse_command_line as p; p('', shlex.split({arguments!r}))"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_every_file_it_names_exists() -> None:
    names = set(re.findall(r"\b(?:grpo|data|benchmarks|docs)/[\w./]*\w", README))
    names |= set(re.findall(r"[\w-]+\.(?:py|yaml|txt)\b", README))
    names -= {path.name for folder in ("grpo", "data", "benchmarks") for path in (ROOT / folder).iterdir()}
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_core_file_says_where_it_stands_in_the_reading_order() -> None:
    order = ["train_grpo.py", "grpo/data.py", "grpo/rollout.py", "reward_model.py", "grpo/advantages.py",
             "grpo/logprobs.py", "grpo/loss.py"]  # fmt: skip
    text = re.sub(r"\s+", " ", README)
    assert " → ".join(f"`{name}`" for name in order[1:]) in text
    for name in order:
        head = (ROOT / name).read_text().split('"""')[1]
        assert "Reading order:" in head
        assert f"[{name}]" in head


def test_every_metric_is_defined() -> None:
    glossary = README.split("| metric | meaning |")[1].split("## Files")[0]
    named = set()
    for row in glossary.splitlines():
        last = ""
        for name in re.findall(r"`([^`]+)`", row.split("|")[1] if row.startswith("|") else ""):
            if name.startswith("…_"):
                name = last.rsplit("accuracy", 1)[0] + "accuracy" + name[1:]
            elif name.startswith("…/"):
                name = last.rsplit("/", 1)[0] + name[1:]
            last = name
            named.add(name.replace("{name}", "math"))
    assert named | {"step"} == EVERY_STEP | EVERY_EVALUATION
