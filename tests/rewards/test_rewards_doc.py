"""docs/REWARDS.md tells the truth: the table, the example, the numbers."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reward_model import REWARDS, load_rewards, score_completions
from tests.attacks import attacks
from tests.rewards.test_attacks import ALL
from tests.run.test_train import ROOT

TEXT = (ROOT / "docs" / "REWARDS.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """name -> the cells of its row of the table."""
    table = TEXT.split("| name | formula |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row for row in cells}


def test_the_table_has_every_reward() -> None:
    assert list(rows()) == [*REWARDS, "module:function"]
    assert {len(row) for row in rows().values()} == {6}


@pytest.mark.parametrize("name", REWARDS)
def test_its_arguments_and_defaults_are_those_of_the_factory(name: str) -> None:
    cell = rows()[name][5]
    parameters = inspect.signature(REWARDS[name]).parameters
    assert set(re.findall(r"`(\w+)`", cell)) == set(parameters)
    for argument, default in re.findall(r"`(\w+)` \(([^)]*)\)", cell):
        stated = yaml.safe_load(default.split(" = ")[0].removesuffix(" s").replace("−", "-"))
        actual = parameters[argument].default
        if argument == "tags":
            assert stated == ["reasoning", "answer"]
            assert actual in (("reasoning", "answer"), None)
        elif argument != "reads":
            assert stated == actual, argument


@pytest.mark.parametrize("name", REWARDS)
def test_its_full_marks_and_columns_are_those_of_the_function(name: str) -> None:
    if name == "classifier":
        return
    arguments = {"length": {"target": 5, "slope": 1}, "overlong": {"max_length": 5, "cache": 2}}.get(name, {})
    (reward,) = load_rewards([{"name": name, **arguments}])
    full_mark, columns = rows()[name][3], set(re.findall(r"`(\w+)`", rows()[name][4]))
    assert (reward.full_mark is None) == (full_mark == "–")
    assert columns == {column for column in ("answer", "tests") if column in inspect.signature(reward.fn).parameters}


def test_the_reward_in_ten_lines_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    code = "\n\n".join(block for block in blocks if "counts_to" in block)
    lines = blocks[0].partition("def ")[2].strip().splitlines()
    assert len(lines) <= 11  # the def line, and ten
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # the README has one, too
    rewards = load_rewards(["my_rewards:counts_to"])
    texts = ["1 2 3", "1 2", "", "1 2 3 4", "3 2 1", "1 3 2"]
    scores = score_completions(rewards, [{"prompt": "p", "answer": 3}] * 6, texts, [[1]] * 6)
    assert scores.combined.tolist() == pytest.approx([1, 2 / 3, 0, 0, 0, 1 / 3])
    assert scores.is_correct.tolist() == [1, 0, 0, 0, 0, 0]
    assert scores.has_answer.tolist() == [True, True, False, True, True, True]
    message = [{"role": "user", "content": "p"}]
    for prompt in ("p", message):
        samples = [{"prompt": prompt, "answer": answer} for answer in ("0", -3, "2")]
        assert score_completions(rewards, samples, ["", "-3", "1 2"], [[1]] * 3).combined.tolist() == [0, 0, 1]


def test_its_config_is_one() -> None:
    from grpo.settings.config import load_config

    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    settings = yaml.safe_load(block)
    config = load_config(overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()])
    rewards = load_rewards(config.rewards, config.combine)
    assert [reward.name for reward in rewards] == ["correctness", "strict_format", "overlong"]


def test_its_numbers_are_the_tests() -> None:
    assert "over three hundred completions, and with the programs" in TEXT
    assert "some four hundred" in TEXT
    assert 300 < len(dict(attacks("p", "1"))) < 350
    assert 350 <= len(ALL) <= 480


@pytest.mark.slow
def test_its_table_of_scores_is_what_the_command_prints(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```text\n(  row .*?\n)```\n", TEXT, flags=re.DOTALL)
    (command,) = re.findall(r"^python -m reward_model .*$", TEXT, flags=re.MULTILINE)
    data = re.search(r"--data (\S+)", command)
    assert data is not None
    (lines,) = re.findall(r"```json\n(\{\"completion\".*?)\n```\n", TEXT, flags=re.DOTALL)
    (tmp_path / "my_completions.jsonl").write_text(lines)
    arguments = ["--data", data[1], "--completions", str(tmp_path / "my_completions.jsonl"), "--rewards", "[code]"]
    done = subprocess.run([sys.executable, "-m", "reward_model", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == shown
