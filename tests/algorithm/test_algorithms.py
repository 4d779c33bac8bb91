"""The algorithms as rows: what each row says, what fills a null, which choices contradict each other."""

import ast
import dataclasses
import inspect
import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.advantages import BASELINES, SCALES
from grpo.algorithms import ALGORITHMS, CLIP_KEYS, PAPERS, ROW_KEYS, filled, markdown_table, plain_table
from grpo.errors import InputError
from grpo.loss import AGGREGATIONS, KL_ESTIMATORS, SURROGATES
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import DEFAULTS_FILE, TYPES, Config, load_config, warnings_about
from grpo.settings.rules import check_critic
from tests.conftest import later_slow

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf
HERE = [name for name in ALGORITHMS if name != "ppo"]  # what train_grpo.py runs


def of(*overrides: str) -> Config:
    return load_config(None, overrides)


# The table

# As the papers have it: baseline, scale, surrogate, aggregation, lower and upper clip, where the KL is (None: nowhere)
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "grpo": ("group", "group", "clipped", "token", 0.2, 0.2, "loss"),
    "dr_grpo": ("group", "none", "clipped", "constant", 0.2, 0.2, None),
    "dapo": ("group", "group", "clipped", "token", 0.2, 0.28, None),
    "rloo": ("leave_one_out", "none", "reinforce", "constant", None, None, "reward"),
    "reinforce": ("none", "none", "reinforce", "constant", None, None, None),
    "reinforce_pp": ("none", "tokens", "clipped", "token", 0.2, 0.2, "reward"),
    "gspo": ("group", "group", "gspo", "sequence", 3e-4, 4e-4, None),
    "cispo": ("group", "group", "cispo", "token", None, 4.0, None),
    "ppo": ("critic", "tokens", "clipped", "token", 0.2, 0.2, "reward"),
}


@pytest.mark.parametrize("algorithm", PUBLISHED)
def test_every_row_resolves_to_what_its_paper_says(algorithm: str) -> None:
    config = of(f"algorithm={algorithm}")
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    assert (
        config.advantage_baseline,
        config.advantage_scale,
        config.surrogate,
        config.loss_aggregation,
        config.clip_range,
        high,
        config.kl_in if config.kl_coeff > 0 else None,
    ) == PUBLISHED[algorithm]
    assert config.kl_estimator == ("k1" if config.kl_in == "reward" else "k3_corrected")
    assert (config.max_resample_rounds > 0) == (algorithm == "dapo")
    assert config.entropy_coeff == 0
    assert config.dual_clip is None
    assert warnings_about(config) == []


def test_the_names_of_the_choices_are_those_of_the_functions_behind_them() -> None:
    allowed = {key: typing.get_args(TYPES[key]) for key in TYPES}
    assert allowed["algorithm"] == tuple(ALGORITHMS) == tuple(PUBLISHED) == tuple(PAPERS)
    assert allowed["surrogate"] == tuple(SURROGATES) == tuple(CLIP_KEYS)
    assert allowed["advantage_baseline"] == (*BASELINES, "critic")
    assert set(allowed["advantage_scale"]) == {*SCALES, "tokens"}
    assert set(allowed["loss_aggregation"]) == set(AGGREGATIONS)
    assert allowed["kl_estimator"] == KL_ESTIMATORS
    assert all(tuple(row) == ROW_KEYS for row in ALGORITHMS.values())


def test_a_surrogate_takes_the_clips_the_table_says_and_no_others() -> None:
    for name, surrogate in SURROGATES.items():
        parameters = inspect.signature(surrogate.loss).parameters.values()
        keywords = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        assert keywords == CLIP_KEYS[name]


def test_config_yaml_leaves_every_key_of_a_row_null() -> None:
    """A value there would silently be every algorithm's."""
    defaults = yaml.safe_load(DEFAULTS_FILE.read_text(encoding="utf-8"))
    assert [key for key in ROW_KEYS if defaults[key] is not None] == []
    assert defaults["algorithm"] == "grpo"


def test_the_table_is_printed_by_help_and_is_in_the_docs() -> None:
    for flag in ("--help", "--help_all"):
        command = [sys.executable, ROOT / "train_grpo.py", flag]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert plain_table() in shown
    assert [line.split()[0] for line in plain_table().splitlines()[1:]] == list(ALGORITHMS)
    page = (ROOT / "docs" / "ALGORITHM.md").read_text(encoding="utf-8")
    between = page.partition("<!-- algorithms -->")[2].partition("<!-- /algorithms -->")[0]
    assert between.strip() == markdown_table()


@pytest.mark.parametrize(
    ("algorithm", "cells"),
    [
        ("grpo", "grpo group group clipped token 0.2 / 0.2 in the loss 2402.03300"),
        ("dapo", "dapo group group clipped token 0.2 / 0.28 off dynamic sampling 2503.14476"),
        ("rloo", "rloo leave_one_out none reinforce constant – / – in the reward 2402.14740"),
        ("gspo", "gspo group group gspo sequence 0.0003 / 0.0004 off 2507.18071"),
        ("cispo", "cispo group group cispo token – / 4 off 2506.13585"),
        ("ppo", "ppo critic tokens clipped token 0.2 / 0.2 in the reward examples/train_ppo.py 1707.06347"),
    ],
)
def test_a_line_of_the_table_says_what_the_row_does(algorithm: str, cells: str) -> None:
    (line,) = [line for line in plain_table().splitlines() if line.split()[0] == algorithm]
    assert " ".join(line.split()) == cells


def test_the_family_imports_nothing_but_the_standard_library() -> None:
    tree = ast.parse((ROOT / "grpo" / "algorithms.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def names_algorithm(node: ast.expr) -> bool:
    """config.algorithm, settings["algorithm"], algorithm."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "algorithm"
    return (getattr(node, "attr", None) or getattr(node, "id", None)) == "algorithm"


def branches_on_the_algorithm(source: str) -> list[int]:
    """Lines that ask which algorithm it is: a comparison, a match, or an if on it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            asked = [node.test]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # algorithm.startswith("re")
            asked = [node.func.value]
        lines += [node.lineno for _ in filter(names_algorithm, asked)]
    return lines


def test_nothing_asks_which_algorithm_it_is() -> None:
    """Everything follows from the choices, so that a choice made by itself does what it does in a row."""
    files = [ROOT / "train_grpo.py", ROOT / "reward_model.py", *sorted((ROOT / "grpo").rglob("*.py"))]
    assert {file: branches_on_the_algorithm(file.read_text(encoding="utf-8")) for file in files} == {
        file: [] for file in files
    }


@pytest.mark.parametrize(
    "line",
    [
        "if config.algorithm == 'dapo': pass",
        "x = 1 if 'grpo' != settings['algorithm'] else 2",
        "x = algorithm in ('rloo', 'reinforce')",
        "match config.algorithm:\n    case 'grpo': pass",
        "x = config.algorithm.startswith('re')",
    ],
)
def test_it_would_be_noticed(line: str) -> None:
    assert branches_on_the_algorithm(line) == [1]


# What fills a null


def test_precedence_is_row_then_file_then_flag_and_null_is_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm: dapo\nclip_range_high: 0.5\nkl_coeff: 0.01\n")
    assert of("algorithm=dapo").clip_range_high == 0.28
    assert load_config(file).clip_range_high == 0.5
    assert load_config(file, ["clip_range_high=0.7"]).clip_range_high == 0.7
    assert load_config(file, ["clip_range_high=null"]).clip_range_high == 0.28
    assert load_config(file).kl_coeff == 0.01
    assert load_config(file, ["kl_coeff=null"]).kl_coeff == 0.0
    # the row is the one that stands in the end, and what the file says outlives it
    other = load_config(file, ["algorithm=grpo"])
    assert (other.max_resample_rounds, other.clip_range_high, other.kl_coeff) == (0, 0.5, 0.01)
    config, _ = parse_command_line("", ["--algorithm", "dr_grpo", "--advantage_scale", "batch"])
    assert (config.loss_aggregation, config.advantage_scale) == ("constant", "batch")


CHOICES = {
    "advantage_baseline": "batch", "advantage_scale": "batch", "loss_aggregation": "sequence", "kl_coeff": 0.125,
    "clip_range": 0.125, "clip_range_high": 0.375, "max_resample_rounds": 7,
}  # fmt: skip


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_may_be_made_by_itself(key: str) -> None:
    changes = {key: CHOICES[key]}
    if key == "advantage_baseline":  # which excludes two of the row's other choices
        changes |= {"advantage_scale": "none", "max_resample_rounds": 0}
    before, after = of("algorithm=dapo"), of("algorithm=dapo", *(f"{key}={value}" for key, value in changes.items()))
    assert dataclasses.replace(before, **changes) == after  # and nothing else moves
    assert before != after


@pytest.mark.parametrize(
    ("overrides", "clip_range", "clip_range_high"),
    [
        ("surrogate=gspo", 3e-4, 4e-4),
        ("surrogate=cispo", None, 4.0),
        ("surrogate=reinforce", None, None),
        ("surrogate=gspo clip_range=0.1", 0.1, 4e-4),
        ("algorithm=rloo surrogate=clipped", 0.2, None),
        ("algorithm=gspo surrogate=clipped", 0.2, None),
        ("algorithm=dapo surrogate=clipped", 0.2, 0.28),  # the row's own surrogate keeps the row's own clips
        ("algorithm=dapo clip_range=0.1", 0.1, 0.28),
        ("clip_range=0.1", 0.1, None),  # None: as clip_range
        ("clip_range=.inf", INF, None),
        ("clip_range=0.1 clip_range_high=.inf", 0.1, INF),
    ],
)
def test_a_clip_follows_its_surrogate(overrides: str, clip_range: float, clip_range_high: float) -> None:
    config = of(*overrides.split())
    assert (config.clip_range, config.clip_range_high) == (clip_range, clip_range_high)


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce_pp"])
def test_without_a_kl_it_does_not_matter_where_it_would_be(algorithm: str) -> None:
    config = of(f"algorithm={algorithm}", "kl_coeff=0")
    assert (config.kl_coeff, config.kl_in, config.kl_estimator) == (0.0, "loss", "k3_corrected")


def test_the_kl_estimator_follows_the_place_of_the_kl() -> None:
    assert of("kl_in=reward").kl_estimator == "k1"
    assert of("algorithm=rloo", "kl_in=loss").kl_estimator == "k3_corrected"
    assert of("algorithm=rloo", "kl_in=loss", "kl_estimator=k2").kl_estimator == "k2"


def test_without_siblings_to_compare_one_completion_a_prompt_is_enough() -> None:
    assert of("algorithm=reinforce", "group_size=1").group_size == 1
    assert of("algorithm=reinforce_pp", "group_size=1").group_size == 1


def test_filling_leaves_what_it_is_given_as_it_was() -> None:
    settings = dict.fromkeys(ROW_KEYS) | {"algorithm": "dapo", "seed": 3}
    before = dict(settings)
    assert filled(settings)["seed"] == 3
    assert settings == before


def on_record(config: Config) -> dict[str, Any]:
    """The settings as run.json holds them: JSON has no infinity."""
    settings = {key: ".inf" if value == INF else value for key, value in dataclasses.asdict(config).items()}
    return json.loads(json.dumps(settings, allow_nan=False))


@pytest.mark.parametrize("algorithm", later_slow(PUBLISHED, 3))
def test_what_a_run_recorded_means_the_same_again(algorithm: str) -> None:
    """Filling the filled changes nothing, whatever was chosen besides: else --resume would refuse its own run."""
    changes: list[list[str]] = [[], ["kl_coeff=0"], ["kl_coeff=0.1"], ["kl_coeff=0.1", "kl_in=loss"], ["seed=7"]]
    changes += [[f"surrogate={name}"] for name in SURROGATES]
    changes += [[f"surrogate={name}", "clip_range_high=.inf"] for name in ("clipped", "gspo", "cispo")]
    changes += [["surrogate=clipped", "clip_range=.inf", "dual_clip=3"]]
    for change in changes:
        config = of(f"algorithm={algorithm}", *change)
        assert load_config(recorded=on_record(config)) == config
        assert load_config(None, ["num_train_steps=9"], recorded=on_record(config)) == dataclasses.replace(
            config, num_train_steps=9
        )


# Contradictions

BAD = [
    ("--advantage_baseline leave_one_out --group_size 1", ["group_size: 1 is too small", '"leave_one_out"']),
    ("--algorithm rloo --group_size 1", ["group_size: 1 is too small", '"leave_one_out"']),
    ("--surrogate reinforce --clip_range 0.2", ["clip_range: 0.2", 'surrogate "reinforce"', "clipped or gspo"]),
    ("--surrogate reinforce --clip_range_high 0.2", ["clip_range_high: 0.2", 'surrogate "reinforce"']),
    ("--algorithm rloo --clip_range 0.2", ["clip_range: 0.2", 'surrogate "reinforce"', "clipped or gspo"]),
    ("--algorithm reinforce --dual_clip 3", ["dual_clip: 3.0", 'surrogate "reinforce"', "surrogate clipped."]),
    ("--algorithm cispo --clip_range 0.2", ["clip_range: 0.2", 'surrogate "cispo"', "clipped or gspo"]),
    ("--algorithm gspo --dual_clip 3", ["dual_clip: 3.0", 'surrogate "gspo"', "or use surrogate clipped."]),
    ("--kl_in reward --kl_coeff 0", ['kl_in: "reward" has no effect', "kl_coeff is 0"]),
    ("--algorithm dapo --kl_in reward", ['kl_in: "reward" has no effect', "kl_coeff is 0"]),
    ("--kl_in reward --kl_estimator k3", ['kl_estimator: "k3"', 'kl_in "reward"']),
    ("--gamma 0.99", ["gamma: 0.99", 'advantage_baseline "group"', "examples/train_ppo.py"]),
    ("--gae_lambda 0.9", ["gae_lambda: 0.9", 'advantage_baseline "group"', "examples/train_ppo.py"]),
    ("--value_clip_range .inf", ["value_clip_range: inf", 'advantage_baseline "group"', "examples/train_ppo.py"]),
    ("--critic_learning_rate 1e-4", ["critic_learning_rate: 0.0001", 'advantage_baseline "group"', "Leave it out"]),
    ("--algorithm ppo", ['algorithm: "ppo" trains a critic', "python examples/train_ppo.py", "grpo, dr_grpo"]),
    ("--advantage_baseline critic", ['advantage_baseline: "critic"', 'algorithm "grpo"', "examples/train_ppo.py"]),
    ("--advantage_baseline none", ['advantage_scale: "group"', 'advantage_baseline "none"', "batch, tokens or none"]),
    ("--advantage_baseline batch --advantage_scale group", ['advantage_scale: "group"', 'advantage_baseline "batch"']),
    ("--algorithm dapo --advantage_baseline batch --advantage_scale none", ["max_resample_rounds: 3", '"batch"']),
    ("--algorithm trpo", ['algorithm: "trpo"', "grpo, dr_grpo, dapo, rloo"]),
    ("--algorithm null", ["algorithm: null", "grpo, dr_grpo, dapo, rloo"]),
    ("--dual_clip 1", ["dual_clip: 1.0 is too small", "above 1"]),
    ("--dual_clip .inf", ["dual_clip: inf is not finite"]),
    ("--clip_range 1.5", ["clip_range: 1.5", "between 0 and 1, or .inf"]),
    ("--clip_range -.inf", ["clip_range: -inf", "between 0 and 1, or .inf"]),
    ("--clip_range .nan", ["clip_range: nan", "between 0 and 1, or .inf"]),
    ("--entropy_coeff -0.1", ["entropy_coeff: -0.1 is negative", "Use 0 or more."]),
    ("--max_resample_rounds -1", ["max_resample_rounds: -1 is negative", "Use 0 or more."]),
    ("--kl_in advantage", ['kl_in: "advantage"', "Use loss or reward."]),
]  # fmt: skip


# What a run with a critic does not support: override -> error message
NOT_WITH_A_CRITIC = {
    "advantage_scale=batch": 'advantage_scale: "batch" does not work with a critic. Use tokens or none.',
    "surrogate=gspo": 'surrogate: "gspo" does not work with a critic. Use clipped.',
    "surrogate=reinforce": 'surrogate: "reinforce" does not work with a critic. Use clipped.',
    "surrogate=cispo": 'surrogate: "cispo" does not work with a critic. Use clipped.',
    "kl_in=loss": 'kl_in: "loss" does not work with a critic. Use reward.',
    "combine=mean": 'combine: "mean" does not work with a critic. Use sum.',
    "reward_scaling=standardize": 'reward_scaling: "standardize" does not work with a critic. Use identity.',
    "lora_rank=8": "lora_rank: 8 does not work with a critic. Use 0.",
    "gradient_checkpointing=true": "gradient_checkpointing: true does not work with a critic. Use false.",
    "datasets=[{path: a.jsonl, eval_path: b.jsonl}]": (
        "datasets: [{'path': 'a.jsonl', 'eval_path': 'b.jsonl'}] does not work with a critic. Use null."
    ),
}


@pytest.mark.parametrize("override", NOT_WITH_A_CRITIC)
def test_what_a_critic_does_not_support_is_an_error(override: str) -> None:
    """In examples/train_ppo.py. evaluate.py may judge its model by other rewards, so `load_config` accepts it."""
    config = of("algorithm=ppo", override)
    with pytest.raises(InputError) as raised:
        check_critic(vars(config))
    assert str(raised.value) == NOT_WITH_A_CRITIC[override]


def test_what_a_critic_supports_is_no_error() -> None:
    for overrides in ([], ["advantage_scale=none"], ["kl_coeff=0"], ["kl_coeff=0", "kl_in=loss"], ["dual_clip=3"]):
        config = of("algorithm=ppo", *overrides)
        check_critic(vars(config))
        assert load_config(recorded=on_record(config)) == config  # evaluate.py reads the settings of a run so
    assert of("algorithm=ppo", "kl_coeff=0").kl_in == "loss"


@pytest.mark.parametrize("algorithm", HERE)
def test_an_algorithm_without_a_critic_is_refused_where_there_is_one(algorithm: str) -> None:
    config = of(f"algorithm={algorithm}")
    with pytest.raises(InputError) as raised:
        check_critic(vars(config))
    baseline = config.advantage_baseline
    assert str(raised.value) == f'advantage_baseline: "{baseline}" does not work with a critic. Use critic.'


@pytest.mark.parametrize(("flags", "parts"), BAD, ids=[flags for flags, _ in BAD])
def test_a_contradiction_names_both_keys_and_ends_with_status_2(
    flags: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--{pair.replace(' ', '=')}" for pair in flags.removeprefix("--").split(" --")]
    with pytest.raises(SystemExit) as raised:
        parse_command_line("", arguments)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_what_belongs_to_the_critic_may_be_said_as_it_is() -> None:
    """A settings file that spells the defaults out is no mistake."""
    of("gamma=1", "gae_lambda=0.95", "value_clip_range=0.2", "critic_learning_rate=null")


@pytest.mark.parametrize("flags", [["--algorithm=ppo"], ["--algorithm=gspo", "--dual_clip=3"]])
def test_a_contradiction_ends_the_command_before_torch_is_imported(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, ROOT / "train_grpo.py", *flags, f"--output_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "is_warned"),
    [
        ("surrogate=reinforce num_iterations=2", True),
        ("surrogate=reinforce num_minibatches=2", True),
        ("algorithm=rloo num_iterations=3", True),
        ("surrogate=reinforce", False),
        ("surrogate=clipped num_iterations=2", False),
        ("surrogate=gspo num_minibatches=2", False),
        ("surrogate=cispo num_minibatches=2", False),
    ],
)
def test_reinforce_off_policy_is_warned_about(overrides: str, is_warned: bool) -> None:
    warnings = warnings_about(of(*overrides.split()))
    assert len(warnings) == is_warned
    assert all(warning.startswith("surrogate reinforce: ") and "num_iterations" in warning for warning in warnings)


def test_k1_is_warned_about_as_a_loss_alone() -> None:
    (warning,) = warnings_about(of("kl_estimator=k1"))
    assert warning.startswith("kl_estimator k1: as a loss")
    assert warnings_about(of("kl_in=reward", "kl_estimator=k1", "advantage_scale=none")) == []
    (warning,) = warnings_about(of("kl_in=reward"))
    assert warning.startswith("kl_in reward with advantage_scale group")


def test_wrong_input_is_an_input_error_wherever_the_settings_come_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("surrogate: cispo\nclip_range: 0.2\n")
    with pytest.raises(InputError, match=r'^clip_range: 0.2 has no effect with surrogate "cispo"'):
        load_config(file)
    with pytest.raises(InputError, match=r'^clip_range: 0.2 has no effect with surrogate "cispo"'):
        load_config(recorded={"surrogate": "cispo", "clip_range": 0.2})
