"""Settings: one place of defaults, precedence, types, and errors that help."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.algorithms import ALGORITHMS, CLIP_KEYS, ROW_KEYS
from grpo.errors import InputError
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import (
    DEFAULTS_FILE,
    TYPES,
    Config,
    documented_defaults,
    documented_sections,
    load_config,
    warnings_about,
)
from grpo.settings.sources import sources_of
from grpo.settings.synonyms import DIFFERENCES, SYNONYMS, suggestion

ROOT = Path(__file__).resolve().parents[2]
FIRST_HALF = [key for section in documented_sections() if not section.is_advanced for key in section.settings]
COMMANDS = [["train_grpo.py"], ["examples/train_ppo.py"], ["evaluate.py"], ["-m", "reward_model"]]


def test_config_yaml_and_the_dataclass_have_the_same_keys_and_no_second_defaults() -> None:
    defaults = yaml.safe_load(DEFAULTS_FILE.read_text())
    assert list(defaults) == [field.name for field in dataclasses.fields(Config)]
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(Config))


def test_the_first_half_of_config_yaml_follows_the_loop_and_has_all_that_an_algorithm_fills() -> None:
    titles = [section.title for section in documented_sections()]
    tags = [match.groups() for title in titles if (match := re.match(r"\[(\d)\] (\w+)", title))]
    loop = re.findall(r"^ +# \[(\d)\] (\w+)", (ROOT / "train_grpo.py").read_text(), flags=re.MULTILINE)
    assert tags == loop
    is_advanced = [section.is_advanced for section in documented_sections()]
    assert is_advanced == sorted(is_advanced)
    assert titles.index("Algorithm") == 0
    assert not any(title.startswith("[") for title, advanced in zip(titles, is_advanced, strict=True) if advanced)
    assert 25 <= len(FIRST_HALF) <= 35
    assert set(ROW_KEYS) < set(FIRST_HALF) < set(TYPES)


def test_the_first_half_ends_at_the_heading_advanced() -> None:
    text = DEFAULTS_FILE.read_text(encoding="utf-8")
    before, heading, after = text.partition("\n# Advanced")
    assert heading
    assert list(yaml.safe_load(before)) == FIRST_HALF
    assert [*FIRST_HALF, *yaml.safe_load(after.partition("\n")[2])] == list(TYPES)


def test_the_comment_of_a_key_that_the_algorithm_fills_begins_with_the_value_for_grpo() -> None:
    documented = documented_defaults()
    for key, value in ALGORITHMS["grpo"].items():
        shown = {None: "same as clip_range"}.get(value, str(value))
        assert (documented[key][0], documented[key][1].partition("; ")[0]) == ("null", f"grpo: {shown}")
    assert load_config().clip_range_high is None
    assert {key for key, (_, comment) in documented.items() if comment.startswith("grpo: ")} == set(ROW_KEYS)


def flags_in(help_text: str) -> list[str]:
    return re.findall(r"^  --(\w+) X\b", help_text, flags=re.MULTILINE)


def test_every_key_has_a_comment_and_stands_in_help_all() -> None:
    documented = documented_defaults()
    assert list(documented) == list(TYPES)
    assert all(comment for _, comment in documented.values())
    command = [sys.executable, ROOT / "train_grpo.py", "--help_all"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    text = "".join(run.stdout.split())  # lines are broken anywhere, also within "all-linear"
    for key, (default, comment) in documented.items():
        assert f"--{key}X" in text
        assert "".join(f"{comment} (default: {default})".split()) in text
    assert flags_in(run.stdout) == list(TYPES)


def test_help_shows_the_first_half_with_its_comments_and_names_help_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_command_line("What this script does.", ["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert flags_in(shown) == FIRST_HALF
    text = "".join(shown.split())
    for key, (default, comment) in documented_defaults().items():
        assert ("".join(f"{comment} (default: {default})".split()) in text) == (key in FIRST_HALF)
    assert "What this script does." in shown
    assert re.findall(r"^  --(\w+)\b", shown, flags=re.MULTILINE) == [
        "help_all", "config", "dry_run", "preflight", "resume", "overwrite", *FIRST_HALF, "help_all",
    ]  # fmt: skip
    assert "  --help_all lists every setting.\n" in shown


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_both_helps_and_neither_imports_torch(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for flag, keys in (("--help", FIRST_HALF), ("--help_all", list(TYPES))):
        whole = [sys.executable, *command, flag]
        run = subprocess.run(whole, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        assert flags_in(run.stdout) == keys
        assert ("--help_all lists every setting." in run.stdout) == (flag == "--help")


@pytest.mark.parametrize(
    ("flag", "nearest"), [("--group_sise=3", "group_size"), ("--adam_beta3=3", "adam_beta"), ("--help_al", "help_all")]
)
def test_a_misspelt_flag_does_not_import_torch_and_is_told_the_nearest_of_all(
    tmp_path: Path, flag: str, nearest: str
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train_grpo.py", flag]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2, run.stderr
    assert "torch was imported" not in run.stderr
    assert f"did you mean --{nearest}" in run.stderr


@pytest.mark.parametrize("key", TYPES)
def test_every_key_is_a_flag_whether_help_shows_it_or_not(key: str) -> None:
    default = documented_defaults()[key][0]
    parsed, _ = parse_command_line("", [f"--{key}={default}"])
    assert parsed == load_config()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm=grpo"], {"clip_range": 0.2, "clip_range_high": None, "dual_clip": None}),
        (["algorithm=dapo", "dual_clip=3"], {"clip_range": 0.2, "clip_range_high": 0.28, "dual_clip": 3.0}),
        (["algorithm=rloo"], {}),
        (["algorithm=gspo", "clip_range=0.1"], {"clip_range": 0.1, "clip_range_high": 4e-4}),
        (["algorithm=cispo"], {"clip_range_high": 4.0}),
    ],
)
def test_clip_kwargs_are_the_clips_that_the_surrogate_reads(overrides: list[str], expected: dict[str, object]) -> None:
    config = load_config(None, overrides)
    assert config.clip_kwargs == expected
    assert tuple(config.clip_kwargs) == CLIP_KEYS[config.surrogate]


def test_stop_kwargs_are_what_ends_a_completion() -> None:
    config = load_config(None, ["max_completion_length=7", "stop_strings=[a, b]"])
    assert config.stop_kwargs == {"max_completion_length": 7, "stop_strings": ["a", "b"]}
    assert load_config().stop_kwargs == {"max_completion_length": 28, "stop_strings": []}


def test_precedence_is_defaults_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("group_size: 4\nlearning_rate: 1e-5\n")
    assert load_config().group_size == 16
    assert load_config(file).group_size == 4
    assert load_config(file).learning_rate == 1e-5  # YAML 1.1 would read a text
    assert load_config(file, ["group_size=8"]).group_size == 8
    parsed, _ = parse_command_line("", ["--config", str(file), "--group_size=2", "--rewards", "[math]"])
    assert (parsed.group_size, parsed.learning_rate, parsed.rewards) == (2, 1e-5, ["math"])


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("1E3", 1000.0), ("-2e+1", -20.0), ("1.5e-3", 1.5e-3)])
def test_scientific_notation_is_a_number(text: str, number: float) -> None:
    if number < 0:
        with pytest.raises(InputError, match=r"learning_rate: -20.0 is negative. Use 0 or more."):
            load_config(None, [f"learning_rate={text}"])
    else:
        assert load_config(None, [f"learning_rate={text}"]).learning_rate == number


def test_a_file_may_be_empty(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing differs\n")
    assert load_config(file) == load_config()


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.name)
def test_every_file_in_configs_loads_and_differs_in_every_line(file: Path) -> None:
    config, defaults = load_config(file), load_config()
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert settings
    assert all(getattr(config, key) != getattr(defaults, key) for key in settings)


def test_files_named_in_config_yaml_exist() -> None:
    named = re.findall(r"[\w/]+\.(?:yaml|jsonl)", DEFAULTS_FILE.read_text(encoding="utf-8"))
    assert "configs/paper_grpo.yaml" in named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("group_sise=4", "group_sise: not a setting; did you mean group_size?"),
        ("lr=1", "lr: not a setting; did you mean learning_rate?"),
        ("group_size=many", 'group_size: "many" is not a whole number. Use a number such as 16.'),
        ("group_size=2.5", "group_size: 2.5 is not a whole number."),
        ("group_size=true", "group_size: true is not a whole number."),
        ("group_size=", "group_size: the value is empty. Give one"),
        ("group_size=null", "group_size: null is not a whole number."),
        ("group_size=0", "group_size: 0 is too small. Use 1 or more."),
        (
            "group_size=1",
            'group_size: 1 is too small for advantage_baseline "group", which compares completions of one prompt. Us',
        ),
        ("micro_batch_tokens=0", "micro_batch_tokens: 0 is too small. Use 1 or more."),
        ("shared_prefix=sometimes", 'shared_prefix: "sometimes" is not a valid choice. Use auto, always or never.'),
        ("compile=1", "compile: 1 is not true or false. Use one of the two."),
        ("batch_size=0", "batch_size: 0 is too small. Use 1 or more."),
        ("temperature=0", "temperature: 0.0 makes all completions of a prompt the same"),
        ("top_p=0", "top_p: 0.0 is out of range. Use a number above 0 and up to 1"),
        ("top_p=1.1", "top_p: 1.1 is out of range. Use a number above 0 and up to 1"),
        ("top_k=-1", "top_k: -1 is negative. Use 1 or more, or 0 to switch it off."),
        ("seed=-1", "seed: -1 is no valid seed. Use a whole number from 0 to 2**63 - 1."),
        ("base_seed=9223372036854775808", "base_seed: 9223372036854775808 is no valid seed. Use a whole number from 0"),
        ("clip_range=1", "clip_range: 1.0 is out of range. Use a number between 0 and 1, or .inf"),
        ("kl_coeff=-1", "kl_coeff: -1.0 is negative. Use 0 or more."),
        ("learning_rate=.inf", "learning_rate: inf is not finite. Use a number such as 0.0005."),
        ("kl_coeff=.nan", "kl_coeff: nan is not finite. Use a number such as 0.005."),
        ("kl_estimator=k4", 'kl_estimator: "k4" is not a valid choice. Use k1, k2, k3 or k3_corrected.'),
        ("loss_aggregation=mean", 'loss_aggregation: "mean" is not a valid choice. Use sequence, token or constant.'),
        ("gamma=0.99", 'gamma: 0.99 has no effect with advantage_baseline "group", which has no critic. Leave it out'),
        ("gamma=0", "gamma: 0.0 is out of range. Use a number above 0 and up to 1."),
        ("gae_lambda=1.1", "gae_lambda: 1.1 is not a fraction. Use a number from 0 to 1."),
        (
            "advantage_baseline=none",
            '"group" does not work with advantage_baseline "none", which does not compare within groups. Use batch',
        ),
        ("num_minibatches=3", "num_minibatches: 3 does not divide batch_size 16. Change one of them."),
        ("rewards=[]", "rewards: [] is not a usable list. Use a list of at least one reward"),
        (
            "rewards=5",
            "rewards: 5 is not a list. Use one such as [math, format]. On the command line: --rewards '[math, format]'",
        ),
        (
            "rewards=math,format",
            """"math,format" is not one name. Use a list, in brackets. On the command line: --rew""",
        ),
        ("rewards=math format", """On the command line: --rewards '[math, format]'"""),
        ("stop_strings=[5]", """Use texts in quotes, such as ["Q:"]. On the command line: --stop_strings '["Q:\""""),
        ("rewards=[math", "rewards, line 1: not valid YAML: expected"),
        ("mask_truncated_completions=1", "mask_truncated_completions: 1 is not true or false. Use one of the two."),
        (
            "eval_metric=eval/mean_length",
            'eval_metric: "eval/mean_length" is not a valid choice. Use eval/accuracy or eval/reward.',
        ),
        ("output_dir=", 'output_dir: "" is not a valid folder name.'),
        (f"output_dir={'a' * 300}", "is not a valid folder name. Use a folder that exists or can be created."),
        ("train_file=a\0", r'train_file: "a\x00" is not a valid file name.'),
        (r'model_name="\ud800"', r'model_name: "\ud800" is not a valid file name.'),
        (
            f"group_size=0x{'f' * 5000}",
            "group_size: this int, which is too long to show, is too large. Use a number below 2**63.",
        ),
        (
            "rewards=[2024-01-01]",
            "rewards: [datetime.date(2024, 1, 1)] is not a usable list. Use a list of at least one reward, without",
        ),
        ("rewards=&a [*a]", "rewards, line 1: not valid YAML: *a: aliases are not supported. Write the value out"),
        ("seed=!!bool x", "seed: not valid YAML: 'x'"),
        ("a\nb=1", r"command line: a\nb: not a setting"),
        ("group_size", 'override "group_size" has no value. Write key=value.'),
    ],
)
def test_wrong_input_says_what_is_wrong_and_what_to_do(override: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(None, [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_group_of_one_is_allowed_without_siblings_to_compare() -> None:
    config = load_config(None, ["group_size=1", "advantage_baseline=batch", "advantage_scale=none"])
    assert config.group_size == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("group_sise: 4", "mine.yaml: group_sise: not a setting; did you mean group_size?"),
        ("- 1", "mine.yaml: a list instead of settings. Write one setting per line: key: value"),
        ("a: [", "mine.yaml, line 1: not valid YAML: expected"),
        ("1: 2", "mine.yaml: 1: not a setting"),
        (
            "seed: 1\ngroup_size: 4\nseed: 2",
            "mine.yaml, line 3: not valid YAML: seed is set twice. Delete one of the lines",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as raised:
        load_config(file)
    assert message in str(raised.value)


def test_a_wrong_flag_ends_with_status_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["--learning_rat", "1"], "error: --learning_rat: not a setting; did you mean --learning_rate?"),
        (
            ["--config", "missing.yaml"],
            'error: --config: no file named "missing.yaml". Relative paths start at the current folder, /',
        ),
        (["--clip_range", "-.inf"], "error: --clip_range: the value is missing. Write --clip_range VALUE, or --clip_"),
        (["surplus"], "error: surplus: not a flag. Put a value with spaces in quotes: --rewards '[math, format]'"),
    ]:
        with pytest.raises(SystemExit) as raised:
            parse_command_line("", arguments)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rewards=math", "rewards", ["math"]),
        ("rewards={name: math, weight: 2}", "rewards", [{"name": "math", "weight": 2}]),
        ("rewards=my.module:fn", "rewards", ["my.module:fn"]),
        ("stop_strings=Q:", "stop_strings", ["Q:"]),
        ("stop_strings=5", "stop_strings", ["5"]),
        ("stop_strings='a b'", "stop_strings", ["a b"]),
        ('stop_strings="\\n"', "stop_strings", ["\n"]),
        ("stop_strings=[a, b]", "stop_strings", ["a", "b"]),
    ],
)
def test_a_single_value_is_a_list_of_one(override: str, key: str, value: list[Any]) -> None:
    assert getattr(load_config(None, [override]), key) == value


def test_a_single_value_in_a_settings_file_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('rewards: math\nstop_strings: "Q:"\n')
    config = load_config(tmp_path / "mine.yaml")
    assert (config.rewards, config.stop_strings) == (["math"], ["Q:"])
    entries = "datasets=[{path: a.jsonl, eval_path: b.jsonl, rewards: gsm8k}]"
    assert sources_of(vars(load_config(None, [entries])))[0].rewards == ["gsm8k"]


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 5\ntrain_file: ~/a.jsonl\n")
    config = load_config("~/mine.yaml", ["output_dir=~/runs/a", "eval_file=~/b.jsonl"])
    home = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "runs/a")]
    assert [config.train_file, config.eval_file, config.output_dir] == home
    assert config.seed == 5
    config = load_config(None, ["datasets=[{path: ~/a.jsonl, eval_path: ~/b.jsonl, weight: 2}]"])
    assert config.datasets == [{"path": home[0], "eval_path": home[1], "weight": 2}]
    assert load_config(None, ["output_dir=a~b"]).output_dir == "a~b"


def test_default_data_is_found_beside_the_project_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_config()
    assert (here.train_file, here.eval_file) == ("data/math_tasks_train.jsonl", "data/math_tasks_eval.jsonl")
    monkeypatch.chdir(tmp_path)
    there = load_config()
    assert there.train_file == str(ROOT / "data/math_tasks_train.jsonl")
    assert there.eval_file == str(ROOT / "data/math_tasks_eval.jsonl")
    assert load_config(recorded=dataclasses.asdict(here)) == there  # a run that was started elsewhere
    assert load_config(recorded=dataclasses.asdict(there)) == there
    load_config(None, ["datasets=[{path: a.jsonl, eval_path: b.jsonl}]"])  # the defaults do not contradict it
    (tmp_path / "data").mkdir()
    (tmp_path / "data/math_tasks_train.jsonl").write_text("")
    assert load_config().train_file == "data/math_tasks_train.jsonl"  # the current folder comes first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file=no/such.jsonl"], 'train_file: no file named "no/such.jsonl". Relative paths start at the cur'),
        (["--eval_file=/no/such.csv"], 'eval_file: no file named "/no/such.csv". Check the path.'),
        (["--datasets=[{path: a.json, eval_path: b.json}]"], 'datasets: no file named "a.json". Relative paths start'),
    ],
)
def test_a_missing_data_file_says_where_relative_paths_start(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        parse_command_line("", arguments)
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert (str(tmp_path) in said) == ("Relative" in message)


def test_a_synonym_leads_to_real_settings_and_is_none_itself() -> None:
    for name, keys in SYNONYMS.items():
        assert name not in TYPES
        assert keys
        assert set(keys) <= set(TYPES), name
        assert name == name.replace("-", "_").lower()
    assert set(DIFFERENCES) <= set(SYNONYMS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beta", "kl_coeff?"),
        ("num_generations", "group_size?"),
        ("steps", "num_train_steps?"),
        ("max_steps", "num_train_steps?"),
        ("max_new_tokens", "max_completion_length?"),
        ("loss_type", "{}loss_aggregation or {}algorithm? loss_aggregation averages"),
        ("lr", "learning_rate?"),
        ("epsilon", "clip_range?"),
        ("reward_funcs", "rewards?"),
        ("gradient_accumulation_steps", "{}micro_batch_size or {}num_minibatches? Gradients are always accumulated"),
        ("num-train-steps", "num_train_steps?"),
        ("Max-Steps", "num_train_steps?"),
    ],
)
def test_names_from_elsewhere_are_answered_with_ours_in_flags_and_files(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message if message.startswith("{}") else "{}" + message
    with pytest.raises(SystemExit):
        parse_command_line("", [f"--{name}", "5"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: --{name}: not a setting; did you mean {message.format('--', '--')}")
    assert said.count("\n") == 1
    (tmp_path / "mine.yaml").write_text(f"{name}: 5\n")
    with pytest.raises(InputError) as raised:
        load_config(tmp_path / "mine.yaml")
    assert f"mine.yaml: {name}: not a setting; did you mean {message.format('', '')}" in str(raised.value)


def test_a_synonym_of_a_setting_that_is_not_offered_falls_back_to_the_spelling() -> None:
    assert suggestion("steps", ["step"]) == "; did you mean step?"
    assert suggestion("zzz", TYPES) == ""


def test_what_is_seldom_meant_is_warned_about() -> None:
    assert warnings_about(load_config()) == []
    for override, word in [
        ("top_k=2", "top_k 2"),
        ("top_p=0.9", "top_p 0.9"),
        ("temperature=0.7", "temperature 0.7"),
        ("kl_estimator=k1", "expected gradient is 0"),
        ("learning_rate=5", "learning_rate 5 is very high"),
        ("num_train_steps=0", "num_train_steps 0: nothing is trained"),
    ]:
        (warning,) = warnings_about(load_config(None, [override]))
        assert word in warning
    for overrides in (["kl_estimator=k1", "kl_coeff=0"], ["learning_rate=0.1"], ["num_train_epochs=1"]):
        assert warnings_about(load_config(None, overrides)) == []
    (warning,) = warnings_about(load_config(None, ["ref_update_every=2", "kl_coeff=0"]))
    assert "no reference to update" in warning
    for max_length, warned in ((35, False), (36, True)):  # 28 tokens at most; nothing is punished up to max_length - 8
        rewards = f"rewards=[math, {{name: overlong, max_length: {max_length}, cache: 8}}]"
        assert (len(warnings_about(load_config(None, [rewards]))) == 1) == warned
