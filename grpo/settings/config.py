"""Settings: read from config.yaml, a settings file and flags, checked once, then frozen in a `Config`.

Flags override the --config file, which overrides config.yaml (with --resume: run.json). A setting that is still null
comes from the algorithm's row (grpo/algorithms.py). config.yaml holds every key with its default and a comment;
`Config` has the same keys in the same order and no defaults. Nothing here imports torch, so `--help` and a misspelled
flag answer at once.
"""

import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from grpo.algorithms import ALGORITHMS, CLIP_KEYS, CRITIC_SCRIPT, ROW_KEYS, filled
from grpo.errors import InputError, unreadable
from grpo.settings.rules import CRITIC_KEYS, MAY_BE_INFINITE, MAY_CHANGE_ON_RESUME, RULES, as_yaml, one_of, shown
from grpo.settings.sources import sources_of
from grpo.settings.synonyms import suggestion

DEFAULTS_FILE = Path(__file__).resolve().parents[2] / "config.yaml"


@dataclass(frozen=True)
class Config:
    """The settings of one run: the keys of config.yaml in the same order. config.yaml says what each key means."""

    # Algorithm
    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce", "reinforce_pp", "gspo", "cispo", "ppo"]

    # [1] Prompts and model
    model_name: str
    chat_template: str
    train_file: str
    eval_file: str
    max_prompt_length: int
    batch_size: int

    # [2] Rollout
    group_size: int
    max_completion_length: int
    temperature: float

    # [3] Rewards
    rewards: list[Any]
    max_resample_rounds: int

    # [4] Fixed terms (the KL penalty)
    kl_coeff: float
    kl_in: Literal["loss", "reward"]
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"]

    # [5] Advantages
    advantage_baseline: Literal["group", "leave_one_out", "batch", "none", "critic"]
    advantage_scale: Literal["group", "batch", "tokens", "none"]

    # [6] Update
    surrogate: Literal["clipped", "reinforce", "gspo", "cispo"]
    clip_range: float | None  # None: the surrogate has no such clip
    clip_range_high: float | None  # None: the same as clip_range
    loss_aggregation: Literal["sequence", "token", "constant"]
    num_iterations: int
    num_minibatches: int
    micro_batch_size: int
    learning_rate: float

    # [7] Record and length of the run
    num_train_steps: int
    eval_every: int
    output_dir: str
    seed: int
    device: Literal["auto", "cpu", "cuda", "mps"]

    # Advanced

    # Data
    system_prompt: str | None
    long_prompts: Literal["error", "drop"]
    prompt_column: str
    answer_column: str
    single_turn_ratio: float
    force_single_turn: bool
    datasets: list[Any] | None
    total_rows: int | None

    # The tiny base model
    base_seed: int
    base_steps: int

    # Larger models
    lora_rank: int
    lora_alpha: float
    lora_target_modules: str
    save_merged: bool
    quantization: Literal["none", "4bit", "8bit"]
    gradient_checkpointing: bool
    attn_implementation: str | None

    # Sampling
    top_p: float
    top_k: int
    stop_strings: list[Any]

    # Rewards of a completion
    combine: Literal["sum", "mean", "product"]
    reward_scaling: Literal["identity", "standardize", "clip"]
    reward_clip: float | None
    save_threshold: float | None

    # Terms of the loss
    dual_clip: float | None
    entropy_coeff: float
    mask_truncated_completions: bool
    ref_update_every: int

    # The critic (examples/train_ppo.py only)
    gamma: float
    gae_lambda: float
    value_clip_range: float
    critic_learning_rate: float | None

    # Optimizer (AdamW)
    lr_schedule: Literal["cosine", "linear", "constant"]
    warmup_steps: int
    max_grad_norm: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float

    # Memory and speed
    micro_batch_tokens: int
    shared_prefix: Literal["auto", "always", "never"]
    compile: bool
    dtype: Literal["auto", "float32", "bfloat16"]

    # Length of the run, best model, checkpoints
    num_train_epochs: float | None
    eval_metric: Literal["eval/accuracy", "eval/reward"]
    save_every: int
    keep_checkpoints: int

    @property
    def clip_kwargs(self) -> dict[str, Any]:
        """The clip settings that `surrogate` reads, as keyword arguments of its functions in grpo/loss.py."""
        return {key: getattr(self, key) for key in CLIP_KEYS[self.surrogate]}

    @property
    def stop_kwargs(self) -> dict[str, Any]:
        """What ends a completion, as keyword arguments of `generate_completions` and `evaluate_greedy`."""
        return {"max_completion_length": self.max_completion_length, "stop_strings": self.stop_strings}


TYPES: dict[str, Any] = typing.get_type_hints(Config)


@dataclass(frozen=True)
class Options:
    """The flags of a training script that are not settings; at most one of them is true."""

    dry_run: bool = False  # print what the settings amount to, then stop
    preflight: bool = False  # sample some groups, then stop
    resume: bool = False  # continue the run in output_dir
    overwrite: bool = False  # delete the run in output_dir first


def load_config(
    path: str | Path | None = None, overrides: Iterable[str] = (), *, recorded: dict[str, Any] | None = None
) -> Config:
    """Read config.yaml, then the settings file at `path`, then `overrides`; later values replace earlier ones.

    Args:
        path: a YAML file with any of the keys; None = no file.
        overrides: "key=value", for example "learning_rate=1e-4".
        recorded: settings from a run.json; they replace those of config.yaml.

    Returns:
        The checked settings. Those of `ROW_KEYS` that are null have been filled from the algorithm's row.

    Raises:
        InputError: an unknown key, a wrong type or value, or a contradiction. The message says what to do.
    """
    settings = _read_yaml(DEFAULTS_FILE) | _known(recorded or {}, where="run.json")
    overrides = list(overrides)
    for wanted in (_asked_for(path, ()), _asked_for(None, overrides)):  # flags replace the file's settings
        epochs, steps = (wanted.get(key) for key in ("num_train_epochs", "num_train_steps"))
        if epochs is not None and steps is not None:
            raise InputError("num_train_epochs and num_train_steps are both set. Set only one of them.")
        settings |= ({"num_train_epochs": None} if steps is not None else {}) | wanted
    asked_for = {key: _checked(key, settings[key]) for key in TYPES}
    values = filled(asked_for) | {"chat_template": _template(asked_for["chat_template"])}
    _check_contradictions(values)
    _check_data_and_model(values)
    return Config(**values)


def _template(chat_template: str) -> str:
    """The chat template, read from its file if it is one: a later change of the file does not affect the run."""
    if chat_template in ("auto", "none") or "{" in chat_template:
        return chat_template
    path = Path(os.path.expanduser(chat_template))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat_template: {unreadable(path, error)}. Use auto, none, a Jinja file or a Jinja text."
        ) from error


def resumed_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The settings of the run in output_dir, with the changes that a resumed run may make.

    Raises:
        InputError: there is no run, or a file or flag changes a setting that is not in `MAY_CHANGE_ON_RESUME`.
    """
    overrides = list(overrides)
    output_dir = _checked("output_dir", (_read_yaml(DEFAULTS_FILE) | _asked_for(path, overrides))["output_dir"])
    recorded = read_run_json(Path(output_dir))["settings"] | {"output_dir": output_dir}
    before = load_config(recorded=recorded)

    def check(settings: dict[str, Any]) -> None:
        for key, new in settings.items():
            old = getattr(before, key)
            if old != new and key not in MAY_CHANGE_ON_RESUME:
                raise InputError(
                    f"--resume: {key}: {shown(new)}, but the run in {output_dir} has {shown(old)}. Leave {key} out, or "
                    f"start a new run in another output_dir. Only {', '.join(MAY_CHANGE_ON_RESUME)} can change."
                )

    if "num_train_steps" in _asked_for(path, overrides):  # the new number of steps replaces the run's epochs
        recorded["num_train_epochs"] = None
    # Settings that were asked for are checked first, so that an error names one of them. load_config could only report
    # that a new setting contradicts one of the run's.
    asked_for = {key: _checked(key, value) for key, value in _asked_for(path, overrides).items()}
    check({key: value for key, value in asked_for.items() if value is not None})
    now = load_config(path, overrides, recorded=recorded)
    check(vars(now))
    return now


def read_run_json(folder: Path) -> dict[str, Any]:
    """The contents of `folder`/run.json, with the types of its entries checked."""
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no run, because {path} does not exist. Check the name of the folder."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # ValueError also for a number with thousands of digits
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise InputError(
            f'{path}: no JSON object with "settings". The file is damaged, or of something else than a run.'
        )
    for key, kind in {"data_sha256": dict, "resumed": list, "examples": list}.items():
        if not isinstance(run.get(key, kind()), kind):
            raise InputError(f'{path}: "{key}": {shown(run[key])} is not a {kind.__name__}. The file is damaged.')
    for example in run.get("examples", []):
        if not (isinstance(example, dict) and type(example.get("index")) is int and "completion" in example):
            raise InputError(
                f'{path}: "examples": {shown(example)} lacks an index or a completion. The file is damaged.'
            )
    return run


def _asked_for(path: str | Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """The settings in a settings file and in the overrides. An unknown key raises InputError."""
    settings: dict[str, Any] = {}
    if path is not None:
        file = os.path.expanduser(path)
        if not os.path.lexists(file):
            raise InputError(f"--config: {_no_file(file)}")
        settings = _known(_read_yaml(Path(file)), where=str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"override {shown(override)} has no value. Write key=value.")
        # An unquoted value of a text setting is not parsed as YAML: a folder may be named 2024 or "a #1".
        is_text = TYPES.get(key) is str or (str in typing.get_args(TYPES.get(key)) and text not in ("", "null", "~"))
        is_text = is_text or (key == "stop_strings" and not text.startswith("[") and text not in ("", "null", "~"))
        is_plain_text = is_text and not text.startswith(("'", '"'))
        value = text if is_plain_text else _parse_yaml(text, where=key)
        if not text.strip() and not is_plain_text and key in TYPES:  # for example an empty shell variable
            raise InputError(f"{key}: the value is empty. Give one (null for none), or leave the setting out.")
        settings |= _known({key: value}, where="command line")
    return settings


def warn(config: Config) -> None:
    """Print `warnings_about(config)` to stderr."""
    for warning in warnings_about(config):
        print(f"warning: {warning}", file=sys.stderr)


def warnings_about(config: Config) -> list[str]:
    """One line for each choice that is allowed but is usually a mistake."""
    warnings = []
    if config.learning_rate > 0.1:
        warnings.append(
            f"learning_rate {config.learning_rate:g} is very high and will probably destroy the model; usual values "
            "are 1e-6 to 1e-3"
        )
    if config.num_train_steps == 0 and config.num_train_epochs is None:
        warnings.append("num_train_steps 0: nothing is trained; the base model is only evaluated and saved")
    if config.temperature != 1:
        warnings.append(
            f"temperature {config.temperature}: the log-probs that are trained are also computed at this temperature"
        )
    for key, off in (("top_p", 1.0), ("top_k", 0)):
        if getattr(config, key) != off:
            warnings.append(
                f"{key} {getattr(config, key)}: completions are sampled from another distribution than the one that "
                f"is trained; sampling/logp_difference shows the difference, {key} {off:g} removes it"
            )
    if config.kl_coeff > 0 and config.kl_in == "loss" and config.kl_estimator == "k1":
        warnings.append(
            "kl_estimator k1: as a loss its expected gradient is 0, so it does not keep the policy near the reference; "
            "use k3_corrected"
        )
    if config.kl_in == "reward" and config.advantage_scale == "group":
        warnings.append(
            "kl_in reward with advantage_scale group: in a group with equal rewards only the KL differs, and dividing "
            "by the group's standard deviation makes it as large as a real reward; use advantage_scale none, batch or "
            "tokens"
        )
    if config.ref_update_every > 0 and config.kl_coeff == 0:
        warnings.append(
            f"ref_update_every {config.ref_update_every} has no effect: kl_coeff is 0, so there is no reference to "
            "update"
        )
    for spec in config.rewards:
        arguments: dict[str, Any] = spec if isinstance(spec, dict) else {}
        target = arguments.get("target") if arguments.get("name") == "length" else None
        if type(target) is int and target > config.max_completion_length:
            warnings.append(
                f"rewards: length: its target of {target} tokens cannot be reached, because max_completion_length is "
                f"{config.max_completion_length}"
            )
        is_overlong = arguments.get("name") == "overlong"
        longest, cache = (arguments.get(key) if is_overlong else None for key in ("max_length", "cache"))
        if type(longest) is int and type(cache) is int and longest - cache >= config.max_completion_length:
            warnings.append(
                f"rewards: overlong has no effect: it starts above {longest - cache} tokens, and max_completion_length "
                f"is {config.max_completion_length}"
            )
    if config.reward_scaling == "standardize" and config.advantage_scale != "none" and config.kl_in == "loss":
        warnings.append(
            f"reward_scaling standardize has no effect: advantage_scale {config.advantage_scale} divides by the "
            "standard deviation anyway; use advantage_scale none, or a KL in the reward"
        )
    num_updates = config.num_iterations * config.num_minibatches
    if config.surrogate == "reinforce" and num_updates > 1:
        warnings.append(
            f"surrogate reinforce: it does not correct for off-policy updates, and num_iterations * num_minibatches "
            f"makes {num_updates} updates per rollout; use clipped, gspo or cispo"
        )
    return warnings


class Section(NamedTuple):
    """A heading in config.yaml and the settings below it."""

    title: str
    description: str  # the further lines of the heading; mostly empty
    is_advanced: bool  # it comes after the heading "# Advanced"
    settings: dict[str, tuple[str, str]]  # key -> (default, comment)


def documented_sections() -> list[Section]:
    """The sections of config.yaml, in the order of the file. An empty line ends a section."""
    sections: list[Section] = []
    is_advanced = False
    for block in DEFAULTS_FILE.read_text(encoding="utf-8").split("\n\n"):
        is_advanced = is_advanced or block.startswith("# Advanced")
        lines = re.findall(r"^(\w+):[ ]*(.*?)[ ]+# (.*)$", block, flags=re.MULTILINE)
        if lines:
            title, *description = re.findall(r"^# (.*)$", block, flags=re.MULTILINE)
            settings = {key: (default, comment) for key, default, comment in lines}
            sections.append(Section(title, " ".join(description), is_advanced, settings))
    return sections


def documented_defaults() -> dict[str, tuple[str, str]]:
    """key -> (default, comment), read from the lines of config.yaml."""
    return {key: value for section in documented_sections() for key, value in section.settings.items()}


class _Loader(yaml.SafeLoader):
    """YAML with three changes.

    - 1e-5 is a number (YAML 1.1 reads a text: it wants 1.0e-5).
    - A key that occurs twice is an error.
    - Aliases are errors: a few lines with aliases can expand to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: aliases are not supported. Write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is set twice. Delete one of the lines", key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # PyYAML raises a ValueError for 2024-13-45, an IndexError for !!int ""
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not valid YAML: {' '.join(problem.split())}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    settings = _parse_yaml(text, where=str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(
            f"{path}: a {type(settings).__name__} instead of settings. Write one setting per line: key: value"
        )
    return settings


def _known(settings: dict[str, Any], where: str) -> dict[str, Any]:
    for key in settings:
        if key not in TYPES:
            name = key if isinstance(key, str) else shown(key)
            raise InputError(f"{where}: {name}: not a setting{suggestion(name, TYPES)}")
    return settings


def _checked(key: str, value: Any) -> Any:
    """The value in the declared type of its key, or an InputError. An int may be a float; a bool is not a number."""
    expected = TYPES[key]
    options = typing.get_args(expected)
    if value is None and (key in ROW_KEYS or type(None) in options):  # null is filled from the row or is a value
        return None
    if isinstance(expected, types.UnionType):
        expected = options[0]
    if typing.get_origin(expected) is Literal:
        # YAML reads `none` as a text but `null`, `off` and `1` as other types, so the value is compared unchanged.
        if value not in options:
            raise InputError(f"{key}: {shown(value)} is not a valid choice. Use {one_of(options)}.")
        return value
    expected = typing.get_origin(expected) or expected
    if expected is float and type(value) is int and abs(value) < 2**1000:  # the largest float is about 2**1024
        value = float(value)
    if value == ".inf" and key in MAY_BE_INFINITE:  # run.json holds ".inf" because JSON has no infinity
        value = math.inf
    if key == "rewards" and isinstance(value, str) and re.search(r"[\s,]", value):
        raise InputError(f"{key}: {shown(value)} is not one name. Use a list, in brackets.{_quoting(key)}")
    if key in MAY_BE_ONE and isinstance(value, MAY_BE_ONE[key]) and value:
        value = [value]
    if type(value) is not expected or (expected is float and not math.isfinite(value) and key not in MAY_BE_INFINITE):
        raise InputError(_wrong_type(key, value, expected))
    if key in RULES and not RULES[key][0](value):
        raise InputError(f"{key}: {shown(value)} {RULES[key][1]}{_quoting(key)}")
    if expected is int and value >= 2**63:
        raise InputError(f"{key}: {shown(value)} is too large. Use a number below 2**63.")
    return _located(key, value)


def _located(key: str, value: Any) -> Any:
    """The value with ~ expanded in paths. A default data file that is not in the current folder is the project's."""
    if key == "datasets" and value is not None:
        return [_entry_with_home(entry) if isinstance(entry, dict) else entry for entry in value]
    if key in ("train_file", "eval_file", "output_dir"):
        value = os.path.expanduser(value)
    if key in ("train_file", "eval_file") and not os.path.exists(value) and value == _read_yaml(DEFAULTS_FILE)[key]:
        beside = DEFAULTS_FILE.parent / value
        return str(beside) if beside.is_file() else value
    return value


def _entry_with_home(entry: dict[str, Any]) -> dict[str, Any]:
    paths = {key: entry[key] for key in ("path", "eval_path") if isinstance(entry.get(key), str)}
    return entry | {key: os.path.expanduser(path) for key, path in paths.items()}


def check_data_files(config: Config) -> None:
    """Raise an InputError if a data file of the config does not exist. A Hub dataset is not looked up."""
    for source in sources_of(vars(config)):
        for key, path in (("train_file", source.path), ("eval_file", source.eval_path)):
            if path is None or Path(path).suffix not in DATA_SUFFIXES or os.path.lexists(path):
                continue
            raise InputError(f"{key if config.datasets is None else 'datasets'}: {_no_file(path)}")


def _no_file(path: str | Path) -> str:
    """What to say about a path at which there is no file."""
    is_absolute = Path(path).is_absolute()
    advice = "Check the path." if is_absolute else f"Relative paths start at the current folder, {os.getcwd()}."
    return f"no file named {shown(str(path))}. {advice}"


# A single value of these types is taken as a list of one.
MAY_BE_ONE: dict[str, tuple[type, ...]] = {"rewards": (str, dict), "stop_strings": (str,)}

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}


def _wrong_type(key: str, value: Any, expected: type) -> str:
    """The error message about a value of another type than `expected`."""
    kind = "finite" if type(value) is float and expected is float else _TYPE_NAMES[expected]
    example = _read_yaml(DEFAULTS_FILE)[key] or ALGORITHMS["grpo"].get(key)
    if expected is str:
        advice = "Put it in quotes."
    elif expected is bool:
        advice = "Use one of the two."
    elif expected is list:
        advice = f"Use one such as [{_EXAMPLES.get(key, '…')}]."
    else:
        advice = f"Use a number such as {0.5 if example is None else example}."
    return f"{key}: {shown(value)} is not {kind}. {advice}{_quoting(key)}"


def _quoting(key: str) -> str:
    """How a shell wants the list of `key`, as the end of an error message."""
    return f" On the command line: --{key} '[{_EXAMPLES[key]}]'" if key in _EXAMPLES else ""


_EXAMPLES = {"rewards": "math, format", "stop_strings": '"Q:", "User:"'}


def _check_contradictions(settings: dict[str, Any]) -> None:
    """Raise an InputError if two settings of the algorithm contradict each other."""
    algorithm = settings["algorithm"]
    baseline, scale, surrogate = (settings[key] for key in ("advantage_baseline", "advantage_scale", "surrogate"))
    compares_siblings = baseline in ("group", "leave_one_out")
    learns_baseline = ALGORITHMS[algorithm]["advantage_baseline"] == "critic"
    if learns_baseline and baseline != "critic":
        raise InputError(
            f'advantage_baseline: "{baseline}" does not work with algorithm "{algorithm}", which trains a critic. '
            "Use critic, or another algorithm."
        )
    if baseline == "critic" and not learns_baseline:
        raise InputError(
            f'advantage_baseline: "critic" does not work with algorithm "{algorithm}", which trains no critic. '
            f"Use group, leave_one_out, batch or none, or run python {CRITIC_SCRIPT}."
        )
    if baseline == "batch" and settings["batch_size"] * settings["group_size"] < 2:
        raise InputError(
            'batch_size: 1 with group_size 1 is too small for advantage_baseline "batch", which compares the '
            "completions of a step. Make one of them 2 or more."
        )
    if compares_siblings and settings["group_size"] < 2:
        raise InputError(
            f'group_size: 1 is too small for advantage_baseline "{baseline}", which compares completions of one '
            "prompt. Use 2 or more."
        )
    if settings["max_resample_rounds"] > 0 and not compares_siblings:
        raise InputError(
            f"max_resample_rounds: {settings['max_resample_rounds']} has no use with advantage_baseline "
            f'"{baseline}", where a group with equal rewards still has a signal. Use 0.'
        )
    if scale == "group" and not compares_siblings:
        others = ["tokens", "none"] if baseline == "critic" else ["batch", "tokens", "none"]
        raise InputError(
            f'advantage_scale: "group" does not work with advantage_baseline "{baseline}", which does not compare '
            f"within groups. Use {one_of(others)}."
        )
    for key in ("clip_range", "clip_range_high", "dual_clip"):
        if settings[key] is not None and key not in CLIP_KEYS[surrogate]:
            owners = [name for name, keys in CLIP_KEYS.items() if key in keys]
            raise InputError(
                f'{key}: {settings[key]} has no effect with surrogate "{surrogate}". Leave it out, or use surrogate '
                f"{one_of(owners)}."
            )
    if settings["kl_in"] == "reward" and settings["kl_coeff"] == 0:
        raise InputError(
            'kl_in: "reward" has no effect, because kl_coeff is 0. Use a kl_coeff above 0, or leave kl_in out.'
        )
    if settings["kl_in"] == "reward" and settings["kl_estimator"] != "k1":
        raise InputError(
            f'kl_estimator: "{settings["kl_estimator"]}" does not work with kl_in "reward", which always uses k1. '
            "Leave kl_estimator out."
        )
    if settings["reward_clip"] is None and settings["reward_scaling"] == "clip":
        raise InputError('reward_clip: needed for reward_scaling "clip". Use a number above 0.')
    if settings["reward_clip"] is not None and settings["reward_scaling"] != "clip":
        raise InputError(
            f'reward_clip: {settings["reward_clip"]} has no effect with reward_scaling "{settings["reward_scaling"]}". '
            "Use reward_scaling clip, or leave reward_clip out."
        )
    if baseline != "critic":
        defaults = _read_yaml(DEFAULTS_FILE)
        for key in CRITIC_KEYS:
            if settings[key] != defaults[key]:
                raise InputError(
                    f'{key}: {settings[key]} has no effect with advantage_baseline "{baseline}", which has no critic. '
                    f"Leave it out, or run python {CRITIC_SCRIPT}."
                )
    if settings["batch_size"] % settings["num_minibatches"]:
        raise InputError(
            f"num_minibatches: {settings['num_minibatches']} does not divide batch_size {settings['batch_size']}. "
            "Change one of them."
        )


def _check_data_and_model(settings: dict[str, Any]) -> None:
    """Raise an InputError if two settings of the data or of the model contradict each other."""
    sources_of(settings)
    defaults = _read_yaml(DEFAULTS_FILE)
    for key in ("train_file", "eval_file"):
        if settings["datasets"] is not None and settings[key] != _located(key, defaults[key]):
            raise InputError(
                f'{key}: "{settings[key]}" has no effect, because datasets replaces it. Set only one of the two.'
            )
    if settings["total_rows"] is not None and settings["datasets"] is None:
        raise InputError(
            f"total_rows: {settings['total_rows']} has no effect without datasets. Leave it out, or set datasets."
        )
    if settings["lora_rank"] > 0 and settings["ref_update_every"] > 0:
        raise InputError(
            f"ref_update_every: {settings['ref_update_every']} does not work with lora_rank {settings['lora_rank']}, "
            "where the reference is the base model without the adapter. Use 0."
        )
    for key, off in (("save_merged", False), ("quantization", "none")):
        if settings[key] != off and settings["lora_rank"] == 0:
            raise InputError(
                f"{key}: {shown(settings[key])} needs a LoRA adapter, but lora_rank is 0. Set lora_rank, or use "
                f"{key} {as_yaml(off)}."
            )
    if settings["system_prompt"] is not None and settings["chat_template"] == "none":
        raise InputError(
            'system_prompt: needs a chat template, but chat_template is "none". Use chat_template auto, or leave '
            "system_prompt out."
        )
    if settings["force_single_turn"] and settings["single_turn_ratio"] > 0:
        raise InputError(
            f"single_turn_ratio: {settings['single_turn_ratio']} has no effect, because force_single_turn already "
            "reduces every conversation. Set only one of the two."
        )
