"""README.md and docs/ are true: numbers, tags, commands, flags, files, metric names, links. And they stay short."""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo.run.plots
from benchmarks.readme import BLOCKS, RESULTS, parts_of, rendered
from grpo.advantages import group_advantages
from grpo.models.loading import load_policy, load_skeleton
from grpo.models.tiny import build_model, train_tokenizer
from grpo.rollout import generate_completions
from grpo.settings.config import TYPES, Options, load_config
from grpo.settings.page import settings_page
from reward_model import load_rewards, score_completions
from tests.ppo.test_ppo import OF_THE_CRITIC
from tests.run.test_train import EVERY_EVALUATION, EVERY_STEP, small, train  # noqa: F401

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
# The README and the pages that continue it. The other pages of docs/ have tests of their own.
CONTINUED = ["ALGORITHM.md", "RESULTS.md", "DATA.md", "RUNS.md", "METRICS.md", "SETTINGS.md", "SPEED.md", "FAQ.md",
             "CODE_MAP.md"]  # fmt: skip
TEXT = "\n".join([README, *(DOCS[name] for name in CONTINUED)])
LINKED = {ROOT / "README.md": README, **{ROOT / "docs" / name: text for name, text in DOCS.items()}}
LINKED[ROOT / "benchmarks" / "README.md"] = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_readme_and_the_pages_are_short() -> None:
    assert len(README.splitlines()) <= 250
    assert {name: len(text.splitlines()) for name, text in DOCS.items() if len(text.splitlines()) > 300} == {}


def test_the_algorithm_and_fork_it_are_in_the_upper_half() -> None:
    headings = [line for line in README.splitlines()[:125] if line.startswith("## ")]
    assert {"## The algorithm on one screen", "## Fork it"} <= set(headings)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link of a page that does not leave the project."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", LINKED[path], flags=re.DOTALL)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", target):
            name, _, anchor = target.partition("#")
            found.append(((path.parent / name).resolve() if name else path, anchor))
    return found


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_resolves(path: Path) -> None:
    for target, anchor in links(path):
        assert target.exists(), target
        if anchor:
            assert anchor in anchors(LINKED[target]), (target, anchor)


def test_every_page_is_linked_from_another_page() -> None:
    linked = {target for path in LINKED for target, _ in links(path) if target != path}
    assert [name for name in DOCS if ROOT / "docs" / name not in linked] == []


def test_a_broken_link_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "docs" / "FAQ.md"
    for broken in ("[a](NOWHERE.md)", "[a](RUNS.md#nowhere)"):
        monkeypatch.setitem(LINKED, path, broken)
        with pytest.raises(AssertionError):
            test_every_link_resolves(path)


def test_the_settings_page_is_generated_from_config_yaml() -> None:
    assert DOCS["SETTINGS.md"] == settings_page()
    assert set(re.findall(r"^- \*\*`(\w+)`\*\*", DOCS["SETTINGS.md"], flags=re.MULTILINE)) == set(TYPES)


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_numbers_come_from_the_results(path: Path) -> None:
    assert rendered(path) == path.read_text(encoding="utf-8")


def test_a_typed_number_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: another result renders another text. docs/SETTINGS.md holds no results."""
    for results in RESULTS.glob("*.json"):
        changed = re.sub(
            r'"num_right": \d+,\s*"accuracy": [\d.]+', '"num_right": 1, "accuracy": 0.002', results.read_text()
        )
        changed = re.sub(r'"median": [\d.e-]+', '"median": 12.5', changed)
        (tmp_path / results.name).write_text(changed)
    monkeypatch.setattr("benchmarks.readme.RESULTS", tmp_path)
    for path in BLOCKS.keys() - {ROOT / "docs" / "SETTINGS.md"}:
        assert rendered(path) != path.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", range(10))
def test_what_it_says_of_the_controls_holds_for_every_seed(seed: int) -> None:
    runs = parts_of("toy")
    grpo, base = runs[f"grpo-{seed}"]["final"]["accuracy"], runs[f"grpo-{seed}"]["base"]["accuracy"]
    assert runs[f"shuffled-{seed}"]["final"]["accuracy"] < base + 0.05  # "accuracy does not rise"
    assert base + 0.05 < runs[f"rejection_sampling-{seed}"]["final"]["accuracy"] < grpo - 0.02  # "it rises, not as far"


def test_nothing_in_it_waits_to_be_filled_in() -> None:
    assert not re.findall(r"OUTPUT|TODO|XXX|lorem", TEXT)


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


OWN_FLAGS = {
    "train_grpo.py": {"config", "help", "help_all", *(field.name for field in dataclasses.fields(Options))},
    "examples/train_ppo.py": {"config", "help", "help_all", *(field.name for field in dataclasses.fields(Options))},
    "evaluate.py": {"config", "help", "help_all", "compare", "data", "k", "prompt", "output"},
    "-m grpo.run.plots": {"output", "help"},
    "-m grpo.models.merge_lora": {"dtype", "help"},
    "data/prepare_gsm8k.py": {"train", "test", "out", "help"},
    "-m reward_model": {"config", "help", "help_all", "data", "completions"},
}


def test_every_flag_it_names_exists() -> None:
    flags = set(re.findall(r"(?<![\w-])--(\w+)", TEXT)) - {"index"}  # pip's
    assert flags
    assert flags <= set(TYPES).union(*OWN_FLAGS.values())


def commands() -> list[tuple[str, list[str]]]:
    """Every line of a code block that starts with python: the script and its arguments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "python":
                script = " ".join(words[1:3]) if words[1] == "-m" else words[1]
                found.append((script, words[len(script.split()) + 1 :]))
    return found


def test_it_shows_every_command() -> None:
    assert {script for script, _ in commands()} == set(OWN_FLAGS)
    assert len(commands()) > 12


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_every_command_it_shows_is_accepted(script: str, arguments: list[str]) -> None:
    """Flags exist for this script, settings have allowed values, files exist."""
    own = OWN_FLAGS[script]
    flags = [word.removeprefix("--") for word in arguments if word.startswith("--")]
    assert set(flags) <= own | (set(TYPES) if "config" in own else set())
    pairs = dict(itertools.pairwise(arguments))
    overrides = [f"{flag}={pairs[f'--{flag}']}" for flag in flags if flag in TYPES]
    config = load_config(pairs.get("--config"), overrides, recorded={"algorithm": "ppo"} if "ppo" in script else None)
    assert (config.advantage_baseline == "critic") == ("ppo" in script)
    made = {f"data/gsm8k_{split}.jsonl" for split in ("train", "test")}  # by a command above
    assert all((ROOT / path).exists() or path in made for path in (config.train_file, config.eval_file))
    assert "--data" not in pairs or (ROOT / pairs["--data"]).is_file()


def test_the_snippet_that_loads_the_trained_model_answers(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = [code for code in python_blocks() if "from_pretrained" in code]
    assert snippet.count('"checkpoints/final"') == 2
    monkeypatch.chdir(tmp_path)
    train(small | {"num_train_steps": 1}, tmp_path / "checkpoints")
    capsys.readouterr()
    exec(snippet, {})
    answer = capsys.readouterr().out
    model, tokenizer = load_policy("checkpoints/final", base_seed=0, device=torch.device("cpu"))
    (expected,) = generate_completions(
        model, tokenizer, ["What is 47 + 38? Answer with an integer."], group_size=1, max_completion_length=28,
        temperature=0.0,
    ).completions  # fmt: skip
    assert answer == expected + "\n"


@pytest.mark.slow
def test_the_notebook_trains_and_evaluates(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for the model and the data: those of the other tests, whose base need not be built."""
    (snippet,) = [code for code in python_blocks() if "evaluate_model" in code]
    assert '["num_train_steps=10", "output_dir=checkpoints-notebook"]' in snippet
    others = "".join(f', "{key}={small[key]}"' for key in small.keys() - {"num_train_steps"})
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
    exec(
        snippet.replace('"output_dir=checkpoints-notebook"]', f'"output_dir={tmp_path}/checkpoints-notebook"{others}]')
        .replace('"configs/', f'"{ROOT}/configs/')
        .replace('"checkpoints-notebook/', f'"{tmp_path}/checkpoints-notebook/'),
        {},
    )
    accuracy, low, high = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert 0 <= low <= accuracy <= high <= 1


def test_the_reward_it_shows_runs_with_the_command_it_shows(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [code for code in python_blocks() if "def brevity" in code]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # docs/REWARDS.md has one, too
    (rewards,) = [dict(itertools.pairwise(a))["--rewards"] for _, a in commands() if "my_rewards" in " ".join(a)]
    rows = train(small | {"num_train_steps": 1, "rewards": rewards}, tmp_path / "run")
    assert "rewards/my_rewards:brevity/mean" in rows[1]
    scores = score_completions(
        load_rewards(["my_rewards:brevity"]),
        [{"prompt": "p", "answer": "85"}] * 3,
        ["85", "7+8=15 85", "185"],
        [[1]] * 3,
    )
    assert scores.combined.tolist() == pytest.approx([1.0, 0.86, 0.0])


def test_the_numbers_it_types_are_the_settings() -> None:
    config = load_config()
    assert f"(`kl_coeff` {config.kl_coeff})" in DOCS["ALGORITHM.md"]
    assert f"max_new_tokens={config.max_completion_length}" in DOCS["RUNS.md"]
    assert config.learning_rate == 5e-4
    assert "toy's 5e-4" in DOCS["RESULTS.md"]
    assert inspect.signature(group_advantages).parameters["eps"].default == 1e-4
    assert "+ 1e-4)" in README
    assert build_model(train_tokenizer(["What is 1 + 2?"]), 0).config.num_hidden_layers == 2
    weights = load_skeleton("tiny")[0].num_parameters()
    for text in (README, DOCS["RESULTS.md"]):
        assert f"Llama of {weights / 1e6:.2f} M weights" in text


def test_it_names_the_version_of_trl_that_the_tests_use() -> None:
    (version,) = re.findall(r"^trl>=([\d.]+),", (ROOT / "requirements-dev.txt").read_text(), flags=re.MULTILINE)
    assert f"GRPOTrainer {version})" in README
    assert len(re.findall(rf"(?<![\d.]){re.escape(version)}(?![\d.])", TEXT)) == 1


def functions_of_the_algorithm() -> list[tuple[str, str]]:
    """(name, file) of every row of the equation table."""
    return re.findall(r"\| `(\w+)` in `([\w/.]+)`", README)


def test_every_function_of_the_algorithm_is_where_it_says() -> None:
    assert len(functions_of_the_algorithm()) == 9
    for name, path in functions_of_the_algorithm():
        text = (ROOT / path).read_text()
        assert re.search(rf"^ *def {name}\(|^{name} = ", text, flags=re.MULTILINE), name


def test_the_loop_calls_every_function_of_the_algorithm_by_its_name() -> None:
    (train,) = [
        node for node in ast.parse((ROOT / "train_grpo.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]  # fmt: skip
    names = {node.id for node in ast.walk(train) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(train) if isinstance(node, ast.Attribute)}
    assert {name for name, _ in functions_of_the_algorithm()} <= names


def test_its_picture_is_there_and_small() -> None:
    (path,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")
    assert (ROOT / path).stat().st_size < 150_000


def test_it_answers_the_twelve_questions() -> None:
    assert re.findall(r"^(\d+)\. \*\*", DOCS["FAQ.md"], flags=re.MULTILINE) == [str(n) for n in range(1, 13)]


def test_every_file_it_names_exists() -> None:
    names = set(re.findall(r"(?<![\w/])(?:grpo|data|benchmarks|docs|configs|examples)/[\w./]*\w", TEXT))
    names |= set(re.findall(r"[\w-]+\.(?:py|yaml|txt)\b", TEXT)) - {"my_rewards.py"}
    folders = ("grpo", *(f"grpo/{path.name}" for path in (ROOT / "grpo").iterdir() if path.is_dir()))
    folders += ("data", "benchmarks", "configs", "examples")
    names -= {path.name for folder in folders for path in (ROOT / folder).iterdir()}
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_core_file_says_where_it_stands_in_the_reading_order() -> None:
    order = ["train_grpo.py", "grpo/data.py", "grpo/rollout.py", "reward_model.py", "grpo/batch.py",
             "grpo/logprobs.py", "grpo/advantages.py", "grpo/loss.py"]  # fmt: skip
    for text in (README, DOCS["CODE_MAP.md"]):
        assert " → ".join(f"`{name}`" for name in order) in re.sub(r"\s+", " ", text)
    for name in order:
        head = (ROOT / name).read_text().split('"""')[1]
        assert "Reading order:" in head
        assert f"[{name}]" in head


OF_A_MIXTURE = {"datasets/math/reward", "datasets/math/right", "eval/math/n", "eval/math/reward", "eval/math/accuracy"}
LENIENT = {"eval/accuracy_lenient", "eval/accuracy_lenient_low", "eval/accuracy_lenient_high"}


def test_every_metric_is_defined() -> None:
    rows = [row for row in DOCS["METRICS.md"].splitlines() if row.startswith("| `")]
    named = set()
    for row in rows:
        last = ""
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            if name.startswith("…/"):
                name = last.rsplit("/", 1)[0] + name[1:]
            last = name
            named.add(name.replace("{name}", "math"))
    assert named == EVERY_STEP | EVERY_EVALUATION | OF_THE_CRITIC | OF_A_MIXTURE | LENIENT


def test_every_test_that_correctness_names_exists() -> None:
    text = (ROOT / "docs" / "CORRECTNESS.md").read_text(encoding="utf-8")
    defined = {
        name for file in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"^def (\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"\btest_\w+(?!\w*\.py)\b", re.sub(r"tests/\S+", "", text)))
    assert len(named) > 60
    assert named <= defined
    for path in re.findall(r"`(tests/\S+\.py)`", text):
        assert (ROOT / path).is_file(), path


def test_every_trap_has_a_test() -> None:
    """A row of a table of CORRECTNESS.md without a test would be a promise."""
    text = (ROOT / "docs" / "CORRECTNESS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!-|trap|promise|oracle).*\|$", text.replace("|---", "|-"), flags=re.MULTILINE)
    assert len(rows) > 45
    assert [row for row in rows if "test_" not in row.split("|")[-2]] == []
