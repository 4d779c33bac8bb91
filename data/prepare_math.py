"""MATH (competition problems, 7,500 + 5,000) in our columns: data/math_train.jsonl and data/math_test.jsonl.

    pip install datasets
    python data/prepare_math.py                                  from the Hugging Face Hub
    python data/prepare_math.py --train a.parquet --test b.jsonl  from files with the same columns

A row has "problem" and "solution", whose last \\boxed{...} holds the answer. Here the problem is the "prompt", what the
box holds the "answer", and all other columns (level, type) stay. Rows whose answer is no integer are left out and
counted: the reward `boxed` judges integers.

Source: "Measuring Mathematical Problem Solving With the MATH Dataset" (2103.03874)
"""

from prepare import Task, main

from grpo.rewards.answers import boxed

TASK = Task(
    name="math",
    sources={
        "train": "DigitalLearningGmbH/MATH-lighteval:default:train",
        "test": "DigitalLearningGmbH/MATH-lighteval:default:test",
    },
    question="problem",
    solution="solution",
    find_answer=boxed,
)

if __name__ == "__main__":
    main(TASK, __doc__)
