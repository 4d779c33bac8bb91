"""Intervals and tests for shares of problems solved: Wilson, McNemar, pass@k."""

import math

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models which disagree this often are equally good.

    Of the n problems that exactly one of them solves, each would be the first one's with probability 1/2.
    Paper: McNemar, "Note on the sampling error of the difference between correlated proportions" (1947).

    >>> mcnemar(1, 9)
    0.021484375
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
    """95 % interval of a share; unlike the textbook p +- 1.96 s it stays in [0, 1] and has a width at 0 and 1.

    Paper: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= num_right <= num_samples or num_samples == 0:
        raise ValueError(f"num_right, num_samples: got {num_right}, {num_samples}, expected 0 <= right <= samples >= 1")
    share = num_right / num_samples
    shrink = 1 / (1 + Z_95**2 / num_samples)
    centre = shrink * (share + Z_95**2 / (2 * num_samples))
    spread = math.sqrt(share * (1 - share) / num_samples + Z_95**2 / (4 * num_samples**2))
    return max(0.0, centre - shrink * Z_95 * spread), min(1.0, centre + shrink * Z_95 * spread)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased, from n >= k samples: 1 - C(n - c, k) / C(n, k).

    Paper: "Evaluating Large Language Models Trained on Code" (2107.03374) eq. 1.

    >>> pass_at_k(num_samples=4, num_right=1, k=2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: got {k}, allowed with {num_samples} samples: 1 … {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
