"""Write the arithmetic problems of the default run, math_tasks_{train,eval,test}.jsonl. The output is deterministic.

    python data/make_math_tasks.py            # rewrites the three files next to this script

A problem is a sum a + b or a difference a - b >= 0 of numbers 0-99; there are 10,000 + 5,050 = 15,050 problems.
7 + 5 and 5 + 7 are one fact in two forms. Whole facts are first assigned to the three splits, so a model that has
memorised `train` has seen no evaluation problem in either form. The problems of each split are then drawn uniformly
from its facts. Problems that are not drawn are in no file.
"""

import json
import random
from pathlib import Path

SEED = 0
SHARES = {"train": 0.88, "eval": 0.06, "test": 0.06}  # fractions of the facts
SIZES = {"train": 8000, "eval": 500, "test": 500}  # problems drawn from each share

Problem = tuple[int, str, int]


def all_facts() -> list[list[Problem]]:
    """All facts: every problem once, together with its commuted form if it has one."""
    sums = [[(a, "+", b), (b, "+", a)] if a != b else [(a, "+", a)] for a in range(100) for b in range(a, 100)]
    differences = [[(a, "-", b)] for a in range(100) for b in range(a + 1)]
    return sums + differences


def as_sample(problem: Problem) -> dict[str, str]:
    """(12, "-", 7) -> {"prompt": "What is 12 - 7? Answer with an integer.", "answer": "5"}."""
    a, operator, b = problem
    answer = a + b if operator == "+" else a - b
    return {"prompt": f"What is {a} {operator} {b}? Answer with an integer.", "answer": str(answer)}


def draw_splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The samples of the three splits. Only random.random() is used, because Python guarantees its sequence."""
    rng = random.Random(seed)

    def shuffled(items: list) -> list:
        return sorted(items, key=lambda _: rng.random())

    facts = shuffled(all_facts())
    splits, start = {}, 0
    for name, share in SHARES.items():
        stop = start + round(share * len(facts))
        problems = [problem for fact in facts[start:stop] for problem in fact]
        splits[name] = [as_sample(problem) for problem in shuffled(problems)[: SIZES[name]]]
        start = stop
    return splits


def main() -> None:
    for name, samples in draw_splits().items():
        path = Path(__file__).parent / f"math_tasks_{name}.jsonl"
        path.write_bytes("".join(json.dumps(sample) + "\n" for sample in samples).encode())
        print(f"{path.name}: {len(samples)} problems")


if __name__ == "__main__":
    main()
