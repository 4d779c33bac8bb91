"""The rows of the ladder as data. Each row adds one idea to another row, as flags of a training script.

The flags of a row are those of the row that it comes `after`, plus its own. Rows with equal settings are measured once.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from grpo.settings.config import load_config

GRPO, PPO = "train_grpo.py", "examples/train_ppo.py"
SHUFFLED = "[{name: math, weight: 0}, {name: 'benchmarks.toy:shuffled_math'}]"
KL = 0.005  # kl_coeff of the default run


@dataclass(frozen=True)
class Row:
    """One row of the table. `flags` and `mutant` are its changes; `idea` describes them in words."""

    name: str
    idea: str
    flags: dict[str, Any] = field(default_factory=dict)
    after: str | None = None  # the row to which this one adds one idea
    script: str = GRPO
    mutant: str | None = None  # a name in tests/mutant_list.py: the run uses a copy of the project with this bug
    rate_of: str | None = None  # uses the learning rate of this row; None = the best rate of its own grid
    equals: str | None = None  # the metrics of this row must be bit-identical to those of that row
    fits_budget: bool = False  # samples more completions per step than other rows, so each run gets fewer steps


def two(name: str) -> Row:
    """An algorithm with two optimizer steps per rollout. In the second step, ratios differ from 1."""
    row = _ALGORITHMS[name]
    return Row(
        f"{name}_two_updates",
        f"{name}, two minibatches",
        {"num_minibatches": 2},
        after=name,
        script=row.script,
        fits_budget=row.fits_budget,
    )


def group_of(size: int) -> Row:
    """Another group size, with the same number of completions per step."""
    flags = {"group_size": size, "batch_size": 256 // size}
    return Row(f"group_size_{size}", f"groups of {size}, {256 // size} prompts per step", flags, after="grpo")


_ALGORITHMS = {
    row.name: row
    for row in [
        Row("grpo", "--algorithm grpo, the default", {"algorithm": "grpo"}),
        Row("dr_grpo", "--algorithm dr_grpo", {"algorithm": "dr_grpo"}),
        Row("dapo", "--algorithm dapo", {"algorithm": "dapo"}, fits_budget=True),
        Row("dapo_without_resampling", "dapo, no dynamic sampling", {"algorithm": "dapo", "max_resample_rounds": 0}),
        Row("rloo", "--algorithm rloo", {"algorithm": "rloo"}),
        Row("reinforce_alone", "--algorithm reinforce", {"algorithm": "reinforce"}),
        Row("reinforce_pp", "--algorithm reinforce_pp", {"algorithm": "reinforce_pp"}),
        Row("gspo", "--algorithm gspo", {"algorithm": "gspo"}),
        Row("cispo", "--algorithm cispo", {"algorithm": "cispo"}),
        Row("ppo", "--algorithm ppo", {"algorithm": "ppo"}, script=PPO),
    ]
}

# With one update per rollout the ratio is 1, and `clipped` has the gradient of `reinforce`. So the surrogate changes in
# the row that adds the second update.
_SECOND_UPDATE = {"surrogate": "clipped", "clip_range": ".inf", "num_minibatches": 2}

_LADDER = [
    Row("reinforce", "REINFORCE, no baseline", {"algorithm": "reinforce", "loss_aggregation": "token"}),
    Row("batch_baseline", "minus the mean of the batch", {"advantage_baseline": "batch"}, after="reinforce"),
    Row("group_baseline", "minus the mean of the group", {"advantage_baseline": "group"}, after="batch_baseline"),
    Row(
        "leave_one_out", "minus the mean of the others", {"advantage_baseline": "leave_one_out"}, after="group_baseline"
    ),
    Row("group_std", "group mean, divided by its std", {"advantage_scale": "group"}, after="group_baseline"),
    Row("two_minibatches", "two updates per rollout, ratio not clipped", _SECOND_UPDATE, after="group_std"),
    Row("clip", "the ratio clipped at 0.2", {"clip_range": 0.2}, after="two_minibatches"),
]

_KL = [
    Row("kl_k1", "k1, a classic mistake", {"kl_coeff": KL, "kl_estimator": "k1"}, after="clip"),
    Row("kl_k2", "k2", {"kl_coeff": KL, "kl_estimator": "k2"}, after="clip"),
    Row("kl_k3", "k3", {"kl_coeff": KL, "kl_estimator": "k3"}, after="clip"),
    Row("kl_k3_corrected", "k3_corrected", {"kl_coeff": KL, "kl_estimator": "k3_corrected"}, after="clip"),
    # KL in the reward: if all rewards of a group are equal, only the KL differs, and advantage_scale group enlarges it.
    Row("unscaled", "no KL, not divided by the std", {"advantage_scale": "none"}, after="clip"),
    Row("kl_reward", "k1 in the reward", {"kl_coeff": KL, "kl_in": "reward"}, after="unscaled"),
    Row(
        "kl_reward_scaled", "k1 in the reward, then divided by the std", {"advantage_scale": "group"}, after="kl_reward"
    ),
]

_AGGREGATIONS = [
    Row("sequence", "mean of the completions' means", {"loss_aggregation": "sequence"}, after="clip"),
    Row("constant", "divided by a constant", {"loss_aggregation": "constant"}, after="clip"),
]

_MISTAKES = [
    Row("shuffled", "rewards dealt at random", {"rewards": SHUFFLED}, after="grpo"),
    Row("eos_masked", "EOS left out of the mask", after="grpo", mutant="EOS left out of the mask"),
    Row("max_for_min", "max for min, two minibatches", after="grpo_two_updates", mutant="clip: min -> max"),
    Row(
        "max_for_min_one_update",
        "max for min, one update",
        after="grpo",
        mutant="clip: min -> max",
        rate_of="grpo",
        equals="grpo",
    ),
]

ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        *_LADDER,
        *_KL,
        *_AGGREGATIONS,
        *_ALGORITHMS.values(),
        # With one update per rollout, two rates are equally good up to noise. Both are measured, so no comparison
        # depends on the choice.
        Row("grpo_lower_rate", "grpo at the rate of two updates", after="grpo", rate_of="grpo_two_updates"),
        *[two(name) for name in ("grpo", "dapo", "gspo", "cispo", "ppo")],
        *[group_of(size) for size in (2, 4, 8, 32)],
        Row("temperature_0.7", "temperature 0.7", {"temperature": 0.7}, after="grpo"),
        Row("temperature_1.3", "temperature 1.3", {"temperature": 1.3}, after="grpo"),
        *_MISTAKES,
    ]
}


@dataclass(frozen=True)
class Block:
    """Rows that are shown together, in one table of docs/ABLATIONS.md and one panel of the picture."""

    title: str
    rows: tuple[str, ...]


BLOCKS: dict[str, Block] = {
    "baselines": Block("From REINFORCE to GRPO", tuple(row.name for row in _LADDER)),
    "kl": Block("KL against the base", ("clip", *(row.name for row in _KL))),
    "aggregation": Block("How tokens are counted", ("clip", "sequence", "constant")),
    "algorithms": Block("Algorithms, one update per rollout", ("grpo", "grpo_lower_rate", *list(_ALGORITHMS)[1:])),
    "two_updates": Block(
        "Algorithms, two updates per rollout",
        tuple(f"{name}_two_updates" for name in ("grpo", "dapo", "gspo", "cispo", "ppo")),
    ),
    "group_size": Block(
        "Group size", ("group_size_2", "group_size_4", "group_size_8", "grpo", "grpo_lower_rate", "group_size_32")
    ),
    "temperature": Block("Temperature of the samples", ("temperature_0.7", "grpo", "temperature_1.3")),
    "mistakes": Block(
        "Classic mistakes",
        ("grpo", "kl_k1", "shuffled", "eos_masked", "grpo_two_updates", "max_for_min", "max_for_min_one_update"),
    ),
}

# The rows that docs/ALGORITHM.md shows, in its order.
TOP = (
    "reinforce", "group_baseline", "grpo_lower_rate", "clip", "grpo_two_updates", "sequence", "ppo", "group_size_8",
    "shuffled", "max_for_min",
)  # fmt: skip

# Comparisons of two rows: paired differences over the same seeds, first minus second.
COMPARISONS = (
    ("batch_baseline", "reinforce"),
    ("group_baseline", "batch_baseline"),
    ("leave_one_out", "group_baseline"),
    ("group_std", "group_baseline"),
    ("two_minibatches", "group_std"),
    ("two_minibatches", "group_baseline"),
    ("clip", "two_minibatches"),
    ("kl_k3_corrected", "clip"),
    ("kl_k1", "clip"),
    ("kl_k1", "kl_k3_corrected"),
    ("kl_reward", "unscaled"),
    ("kl_reward_scaled", "kl_reward"),
    ("sequence", "clip"),
    ("grpo_lower_rate", "grpo"),
    ("grpo_two_updates", "grpo_lower_rate"),
    ("dapo", "dapo_without_resampling"),
    ("dapo_two_updates", "grpo_two_updates"),
    ("gspo", "dapo_without_resampling"),
    ("gspo_two_updates", "grpo_two_updates"),
    ("reinforce_pp", "reinforce_alone"),
    ("ppo", "reinforce_pp"),
    ("ppo", "grpo"),
    ("ppo_two_updates", "grpo_two_updates"),
    ("group_size_2", "grpo"),
    ("group_size_4", "grpo"),
    ("group_size_8", "grpo_lower_rate"),
    ("group_size_32", "grpo_lower_rate"),
    ("max_for_min", "grpo_two_updates"),
    ("eos_masked", "grpo"),
)


def all_flags(row: Row) -> dict[str, Any]:
    """The flags of the row: those of the row it comes after, plus its own."""
    return (all_flags(ROWS[row.after]) if row.after else {}) | row.flags


def settings(row: Row) -> dict[str, Any]:
    """All settings of the row's runs, including those that `algorithm` sets."""
    return _resolved(tuple(f"{key}={value}" for key, value in all_flags(row).items()))


@functools.cache
def _resolved(overrides: tuple[str, ...]) -> dict[str, Any]:
    settings = dataclasses.asdict(load_config(overrides=overrides))
    del settings["algorithm"]
    return settings


def measured_as(row: Row) -> Row:
    """The first row with the same runs. Only this row is run, and the results have its name."""

    def runs(row: Row) -> tuple[Any, ...]:
        return settings(row), row.script, row.mutant, row.rate_of, row.fits_budget

    wanted = runs(row)
    return next(other for other in ROWS.values() if runs(other) == wanted)
