"""The algorithm family as rows of one table: GRPO is four independent choices, its relatives make some otherwise.

    advantage     advantage_baseline, advantage_scale   what a reward is compared with, and in which unit
    surrogate     surrogate and its clip ranges         what is differentiated
    aggregation   loss_aggregation                      how tokens of long and of short completions count
    KL            kl_coeff, kl_in, kl_estimator         what holds the policy near the reference, and where it is added

`algorithm` names a row. The row fills the settings that are null; each of them may be set by itself. The functions
behind the names: grpo/advantages.py and grpo/loss.py.
"""

from typing import Any

# What a row decides. max_resample_rounds is dynamic sampling.
ROW_KEYS = (
    "advantage_baseline", "advantage_scale", "surrogate", "loss_aggregation", "clip_range", "clip_range_high",
    "kl_coeff", "kl_in", "max_resample_rounds", "kl_estimator",
)  # fmt: skip

# baseline, scale, surrogate, aggregation, lower and upper clip (None above = as below), KL, where, resampling rounds
_ROWS: dict[str, tuple[Any, ...]] = {
    "grpo":         ("group",         "group",  "clipped",   "token",    0.2,  None, 0.005, "loss",   0),
    "dr_grpo":      ("group",         "none",   "clipped",   "constant", 0.2,  None, 0.0,   "loss",   0),
    "dapo":         ("group",         "group",  "clipped",   "token",    0.2,  0.28, 0.0,   "loss",   3),
    "rloo":         ("leave_one_out", "none",   "reinforce", "constant", None, None, 0.005, "reward", 0),
    "reinforce":    ("none",          "none",   "reinforce", "constant", None, None, 0.0,   "loss",   0),
    "reinforce_pp": ("none",          "tokens", "clipped",   "token",    0.2,  None, 0.005, "reward", 0),
    "gspo":         ("group",         "group",  "gspo",      "sequence", 3e-4, 4e-4, 0.0,   "loss",   0),
    "cispo":        ("group",         "group",  "cispo",     "token",    None, 4.0,  0.0,   "loss",   0),
    "ppo":          ("critic",        "tokens", "clipped",   "token",    0.2,  None, 0.005, "reward", 0),
}  # fmt: skip
_ESTIMATOR = {"loss": "k3_corrected", "reward": "k1"}  # in the reward nothing is differentiated: k1 is exact there

ALGORITHMS: dict[str, dict[str, Any]] = {
    name: dict(zip(ROW_KEYS, (*row, _ESTIMATOR[row[-2]]), strict=True)) for name, row in _ROWS.items()
}

# Which settings a surrogate reads; any other clip would be passed over in silence.
CLIP_KEYS = {
    "clipped": ("clip_range", "clip_range_high", "dual_clip"),
    "reinforce": (),
    "gspo": ("clip_range", "clip_range_high"),
    "cispo": ("clip_range_high",),
}

PAPERS = {
    "grpo": "2402.03300",
    "dr_grpo": "2503.20783",
    "dapo": "2503.14476",
    "rloo": "2402.14740",
    "reinforce": "Williams 1992",
    "reinforce_pp": "2501.03262",
    "gspo": "2507.18071",
    "cispo": "2506.13585",
    "ppo": "1707.06347",
}

CRITIC_SCRIPT = "examples/train_ppo.py"  # of the one row whose baseline is learned

# These go with a choice: chosen otherwise than in the row, they come from the first row with that choice.
_GOES_WITH = {"clip_range": "surrogate", "clip_range_high": "surrogate", "kl_estimator": "kl_in"}


def filled(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the algorithm's where they are null.

    A clip belongs to its surrogate: `--surrogate gspo` takes GSPO's ranges whatever the row. And where kl_coeff is 0 a
    row's kl_in does not matter.

    >>> settings = dict.fromkeys(ROW_KEYS) | {"algorithm": "grpo", "surrogate": "gspo"}
    >>> [filled(settings)[key] for key in ("advantage_baseline", "surrogate", "clip_range", "clip_range_high")]
    ['group', 'gspo', 0.0003, 0.0004]
    """
    row = ALGORITHMS[settings["algorithm"]]
    chosen = {key: row[key] if settings[key] is None else settings[key] for key in ROW_KEYS}
    if settings["kl_in"] is None and chosen["kl_coeff"] == 0:
        chosen["kl_in"] = "loss"
    for key, choice in _GOES_WITH.items():
        donor = next(other for other in (row, *ALGORITHMS.values()) if other[choice] == chosen[choice])
        chosen[key] = donor[key] if settings[key] is None else settings[key]
    return settings | chosen


def table() -> list[list[str]]:
    """The rows as people read them; the first one is the heading."""
    heading = [
        "algorithm", "baseline", "scale", "surrogate", "aggregation", "clip low / high", "KL", "besides", "paper",
    ]  # fmt: skip
    return [heading, *([name, *_cells(row), PAPERS[name]] for name, row in ALGORITHMS.items())]


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["clip_range"], row["clip_range_high"]
    clip = [f"{value:g}" if value is not None else "–" for value in (low, low if high is None else high)]
    choices = [row[key] for key in ("advantage_baseline", "advantage_scale", "surrogate", "loss_aggregation")]
    besides = "dynamic sampling" if row["max_resample_rounds"] > 0 else ""
    if row["advantage_baseline"] == "critic":
        besides = CRITIC_SCRIPT
    return [*choices, " / ".join(clip), f"in the {row['kl_in']}" if row["kl_coeff"] > 0 else "off", besides]


def plain_table() -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*table(), strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table())


def markdown_table() -> str:
    """For the README: `python -m grpo.algorithms`."""
    heading, *rows = [f"| {' | '.join(line)} |" for line in table()]
    return "\n".join([heading, "|" + "---|" * len(table()[0]), *rows])


if __name__ == "__main__":
    print(markdown_table())
