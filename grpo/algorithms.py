"""The algorithm family: one row per algorithm, with the choices in which the algorithms differ.

GRPO consists of four independent choices. The other algorithms choose differently in some of them.

    advantage     advantage_baseline, advantage_scale     what a reward is compared with, and in which unit
    surrogate     surrogate, clip_range, clip_range_high  the objective per token, and where its gradient stops
    aggregation   loss_aggregation                        how much the tokens of long and of short completions count
    KL            kl_coeff, kl_in, kl_estimator           the penalty for leaving the reference, and where it is added

`algorithm` names a row. The row fills the settings that are null, so each choice can also be made separately. The
functions behind the names are in grpo/advantages.py and grpo/loss.py. `python -m grpo.algorithms` prints the table.
"""

from typing import Any

# clip_range: None = no lower clip. clip_range_high: None = the same as clip_range.
# kl_estimator: a KL in the reward is not differentiated, so the plain estimator k1 is used there.
# max_resample_rounds: more than 0 = dynamic sampling.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": dict(
        advantage_baseline="group", advantage_scale="group", max_resample_rounds=0,
        surrogate="clipped", clip_range=0.2, clip_range_high=None, loss_aggregation="token",
        kl_coeff=0.005, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "dr_grpo": dict(
        advantage_baseline="group", advantage_scale="none", max_resample_rounds=0,
        surrogate="clipped", clip_range=0.2, clip_range_high=None, loss_aggregation="constant",
        kl_coeff=0.0, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "dapo": dict(
        advantage_baseline="group", advantage_scale="group", max_resample_rounds=3,
        surrogate="clipped", clip_range=0.2, clip_range_high=0.28, loss_aggregation="token",
        kl_coeff=0.0, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "rloo": dict(
        advantage_baseline="leave_one_out", advantage_scale="none", max_resample_rounds=0,
        surrogate="reinforce", clip_range=None, clip_range_high=None, loss_aggregation="constant",
        kl_coeff=0.005, kl_in="reward", kl_estimator="k1",
    ),
    "reinforce": dict(
        advantage_baseline="none", advantage_scale="none", max_resample_rounds=0,
        surrogate="reinforce", clip_range=None, clip_range_high=None, loss_aggregation="constant",
        kl_coeff=0.0, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "reinforce_pp": dict(
        advantage_baseline="none", advantage_scale="tokens", max_resample_rounds=0,
        surrogate="clipped", clip_range=0.2, clip_range_high=None, loss_aggregation="token",
        kl_coeff=0.005, kl_in="reward", kl_estimator="k1",
    ),
    "gspo": dict(
        advantage_baseline="group", advantage_scale="group", max_resample_rounds=0,
        surrogate="gspo", clip_range=3e-4, clip_range_high=4e-4, loss_aggregation="sequence",
        kl_coeff=0.0, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "cispo": dict(
        advantage_baseline="group", advantage_scale="group", max_resample_rounds=0,
        surrogate="cispo", clip_range=None, clip_range_high=4.0, loss_aggregation="token",
        kl_coeff=0.0, kl_in="loss", kl_estimator="k3_corrected",
    ),
    "ppo": dict(
        advantage_baseline="critic", advantage_scale="tokens", max_resample_rounds=0,
        surrogate="clipped", clip_range=0.2, clip_range_high=None, loss_aggregation="token",
        kl_coeff=0.005, kl_in="reward", kl_estimator="k1",
    ),
}  # fmt: skip

ROW_KEYS = tuple(ALGORITHMS["grpo"])  # the settings that a row fills

# The clip settings that each surrogate reads. Setting another one is an error, because it would have no effect.
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

CRITIC_SCRIPT = "examples/train_ppo.py"  # runs ppo, the only algorithm that learns its baseline

# The value of each of these settings depends on another setting. If that one differs from the row, the value is taken
# from the first row that has the same choice, and stays null if no row has it.
_GOES_WITH = {"clip_range": "surrogate", "clip_range_high": "surrogate", "kl_estimator": "kl_in"}


def filled(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those that are null filled from the algorithm's row.

    A clip range depends on the surrogate: `--surrogate gspo` uses GSPO's clip ranges with every algorithm. If kl_coeff
    is 0, kl_in is "loss" unless it is set, because the KL is not added anywhere.

    >>> settings = dict.fromkeys(ROW_KEYS) | {"algorithm": "grpo", "surrogate": "gspo"}
    >>> [filled(settings)[key] for key in ("advantage_baseline", "surrogate", "clip_range", "clip_range_high")]
    ['group', 'gspo', 0.0003, 0.0004]
    """
    row = ALGORITHMS[settings["algorithm"]]
    chosen = {key: row[key] if settings[key] is None else settings[key] for key in ROW_KEYS}
    if settings["kl_in"] is None and chosen["kl_coeff"] == 0:
        chosen["kl_in"] = "loss"
    for key, choice in _GOES_WITH.items():
        donor = next((other for other in (row, *ALGORITHMS.values()) if other[choice] == chosen[choice]), {})
        chosen[key] = donor.get(key) if settings[key] is None else settings[key]
    return settings | chosen


def table() -> list[list[str]]:
    """The rows as text cells for people to read. The first line is the heading."""
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
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table(), strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table())


def markdown_table() -> str:
    """The table for docs/ALGORITHM.md, as `python -m grpo.algorithms` prints it."""
    heading, *rows = [f"| {' | '.join(line)} |" for line in table()]
    return "\n".join([heading, "|" + "---|" * len(table()[0]), *rows])


if __name__ == "__main__":
    print(markdown_table())
