"""Write GSM8K (7,473 + 1,319 grade-school word problems) as data/gsm8k_train.jsonl and data/gsm8k_test.jsonl.

    pip install datasets
    python data/prepare_gsm8k.py                                  from the Hugging Face Hub
    python data/prepare_gsm8k.py --train a.parquet --test b.jsonl  from files with the same columns

A row of GSM8K has a "question" and an "answer", which is a worked solution that ends with "#### 72". In our files the
question is the "prompt", 72 is the "answer", and the worked solution is the "solution".

Source: "Training Verifiers to Solve Math Word Problems" (2110.14168), https://huggingface.co/datasets/openai/gsm8k
"""

from prepare import Task, main

from grpo.rewards.reading.answers import after_mark
from grpo.rewards.reading.numerals import only_integer

TASK = Task(
    name="gsm8k",
    sources={"train": "openai/gsm8k:main:train", "test": "openai/gsm8k:main:test"},
    question="question",
    solution="answer",
    find_answer=lambda solution: only_integer(after_mark(solution) or ""),
)

if __name__ == "__main__":
    main(TASK, __doc__)
