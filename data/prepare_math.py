"""MATH (competition problems, 7,500 + 5,000) in our columns: data/math_train.jsonl and data/math_test.jsonl.

    pip install datasets
    python data/prepare_math.py                                  from the Hugging Face Hub
    python data/prepare_math.py --train a.parquet --test b.jsonl  from files with the same columns

A row has "problem" and "solution", whose last \\boxed{...} holds the answer. Here the problem is the "prompt", what the
box holds the "answer", and all other columns (level, type) stay. Numbers are judged as numbers; for formulas the reward
`boxed` uses math-verify where it is installed, and compares texts where it is not.

Source: "Measuring Mathematical Problem Solving With the MATH Dataset" (2103.03874)
"""

from prepare import Task, main

from grpo.rewards.reading.answers import boxed
from grpo.rewards.reading.numerals import only_integer


def answer_of(solution: str) -> str | None:
    """What the last box holds; 1,000 as 1000."""
    answer = boxed(solution)
    return answer and (only_integer(answer) or answer)


TASK = Task(
    name="math",
    sources={
        "train": "DigitalLearningGmbH/MATH-lighteval:default:train",
        "test": "DigitalLearningGmbH/MATH-lighteval:default:test",
    },
    question="problem",
    solution="solution",
    find_answer=answer_of,
)

if __name__ == "__main__":
    main(TASK, __doc__)
