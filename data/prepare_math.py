"""Write MATH (7,500 + 5,000 competition problems) as data/math_train.jsonl and data/math_test.jsonl.

    pip install datasets
    python data/prepare_math.py                                  from the Hugging Face Hub
    python data/prepare_math.py --train a.parquet --test b.jsonl  from files with the same columns

A row of MATH has a "problem" and a "solution", whose last \\boxed{...} contains the answer. In our files the problem is
the "prompt" and the content of the box is the "answer". All other columns (level, type) are kept. The reward `boxed`
compares numbers as numbers. It compares formulas with math-verify if that is installed, and as text otherwise.

Source: "Measuring Mathematical Problem Solving With the MATH Dataset" (2103.03874)
"""

from prepare import Task, main

from grpo.rewards.reading.answers import boxed
from grpo.rewards.reading.numerals import only_integer


def answer_of(solution: str) -> str | None:
    """The content of the last box. An integer is returned in canonical digits: 1,000 as 1000."""
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
