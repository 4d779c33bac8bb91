"""Statistics of solved problems: confidence interval (Wilson), comparison of two models (McNemar), pass@k."""

import math

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of the hypothesis that two models are equally good.

    Only problems that exactly one of them solves count. Under the hypothesis, each of these is solved by the first
    model with probability 1/2.

    Args:
        only_first: number of problems that only the first model solves.
        only_second: number of problems that only the second model solves.

    Paper: McNemar, "Note on the sampling error of the difference between correlated proportions" (1947).

    >>> mcnemar(1, 9)
    0.021484375
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """95 % confidence interval of a fraction of correct answers.

    Unlike the textbook interval p +- 1.96 s, it stays in [0, 1] and has a width above 0 if none or all are correct.

    Paper: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= num_correct <= num_samples or num_samples == 0:
        raise ValueError(f"got {num_correct} correct of {num_samples} samples, expected 0 <= correct <= samples >= 1")
    fraction = num_correct / num_samples
    shrink = 1 / (1 + Z_95**2 / num_samples)
    centre = shrink * (fraction + Z_95**2 / (2 * num_samples))
    half_width = shrink * Z_95 * math.sqrt(fraction * (1 - fraction) / num_samples + Z_95**2 / (4 * num_samples**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct, from c of n >= k samples:

        pass@k = 1 - C(n - c, k) / C(n, k)

    Paper: "Evaluating Large Language Models Trained on Code" (2107.03374) eq. 1.

    >>> pass_at_k(num_samples=4, num_correct=1, k=2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: got {k}, allowed with {num_samples} samples: 1 … {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
