"""Means over few seeds: Student's t intervals, also for paired differences."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t, for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of the mean, mean -+ t * s / sqrt(n). With a single value the interval is infinite.

    >>> [round(bound, 3) for bound in t_interval([1.0, 2.0, 3.0, 4.0, 5.0])]
    [3.0, 1.037, 4.963]
    """
    if len(values) < 2:
        return values[0], -math.inf, math.inf
    half = T_95[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of first - second. The values of each pair belong to the same seed.

    >>> [round(bound, 3) for bound in paired_interval([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])]
    [0.1, 0.1, 0.1]
    """
    return t_interval([a - b for a, b in zip(first, second, strict=True)])
