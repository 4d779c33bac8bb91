"""The tiny base model of the default run: tokenizer, model and a short supervised warm-up. It needs no download.

GRPO can only reinforce answers that the base model already samples sometimes. So the warm-up shows two styles of
answer to the same problems:

    quick    "85"                    wrong in half of the cases
    worked   "7+8=15 4+3+1=8 85"     column arithmetic from the ones up, carries included, then the answer

The first part of the warm-up has mostly worked answers and teaches the arithmetic. The second part has nearly only
quick answers and makes them the habit. After the warm-up, the model gives a quick answer most of the time. Sometimes it
works the problem out, and then it is mostly correct.

The model is cached. The cache key is made of this file, the training problems, `base_seed` and `base_steps`, so any
change of the recipe builds a new model.
"""

import hashlib
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from grpo.data import Sample
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError
from grpo.logprobs import compute_logprobs
from grpo.models.saving import save_model

TRAIN_FILE = Path(__file__).resolve().parents[2] / "data" / "math_tasks_train.jsonl"

# The model: a standard Llama of about 0.15 M weights.
HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 4
INTERMEDIATE_SIZE = 256
INITIALIZER_RANGE = 0.08  # with the usual 0.02, a model of this width learns far more slowly

# The warm-up.
NUM_STEPS = 900
BATCH_SIZE = 64
LEARNING_RATE = 8e-3
SKILL_PHASE = 0.82  # the first part of the steps teaches the arithmetic, the rest sets the habits
WORKED_SHARE_SKILL = 0.7  # fraction of worked answers in the first part
WORKED_SHARE_HABIT = 0.02  # fraction of worked answers in the rest
DIFFERENCE_SHARE = 0.5  # of the examples; only 1/3 of the problems, but harder: borrowing needs a comparison
QUICK_ERROR_SHARE = 0.5  # fraction of quick answers that are wrong
QUICK_ERRORS = (-10, -1, 1, 10)  # a wrong answer differs by one of these

# A message is rendered as its content, with EOS after assistant messages. A single user message is the plain prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def tiny_base_model(base_seed: int, num_steps: int = NUM_STEPS) -> Path:
    """The folder of the tiny base model for `base_seed`. The model is built on first use, with a progress bar."""
    recipe = Path(__file__).read_bytes() + TRAIN_FILE.read_bytes() + f"{base_seed} {num_steps}".encode()
    cache = Path(os.environ.get("GRPO_CACHE") or Path.home() / ".cache" / "grpo")
    folder = cache / f"tiny-{base_seed}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)  # fail before the training, not after it
        except OSError as error:
            raise InputError(f"GRPO_CACHE: {cache} cannot be made: {error.strerror}") from error
        dataset = JSONLinesDataset(TRAIN_FILE)
        tokenizer = train_tokenizer([sample["prompt"] for sample in dataset])
        save_model(warm_up(dataset, tokenizer, base_seed, num_steps), tokenizer, folder, replace=False)
    return folder


def train_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the prompts: every digit is one token, any text can be encoded, pad is not eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast, base_seed: int) -> LlamaForCausalLM:
    """A standard Llama with random weights, a function of `base_seed`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=256,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base_seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return model


def warm_up(
    dataset: JSONLinesDataset, tokenizer: PreTrainedTokenizerFast, base_seed: int, num_steps: int
) -> LlamaForCausalLM:
    """Supervised next-token training on the training problems, answered in the two styles."""
    model = build_model(tokenizer, base_seed)
    # Muon for the matrices: in the same number of steps it learns arithmetic far better than AdamW (docs/NOTES.md).
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.dim() < 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    token_ids = encode_all(dataset, tokenizer)
    rng = random.Random(base_seed)
    sums = [sample for sample in dataset if "+" in sample["prompt"]]
    differences = [sample for sample in dataset if "-" in sample["prompt"]]
    bar = tqdm(
        range(num_steps), desc=f"building the tiny base model (base_seed {base_seed})", unit="step", mininterval=0.5
    )
    for step in bar:
        worked_share = WORKED_SHARE_SKILL if step < SKILL_PHASE * num_steps else WORKED_SHARE_HABIT
        samples = [rng.choice(differences if rng.random() < DIFFERENCE_SHARE else sums) for _ in range(BATCH_SIZE)]
        prompts = [token_ids[sample["prompt"]] for sample in samples]
        answers = [token_ids[styled_answer(sample, worked_share, rng)] for sample in samples]
        supervised_loss(model, prompts, answers, tokenizer.eos_token_id).backward()
        rate = LEARNING_RATE * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def encode_all(dataset: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of every text of the warm-up. Tokenising per batch took 1/6 of the warm-up's time."""
    prompts = [sample["prompt"] for sample in dataset]
    texts = [*prompts, *(worked_answer(*parse_problem(prompt)) for prompt in prompts)]
    answers = {int(sample["answer"]) for sample in dataset}
    texts += map(str, {abs(answer + error) for answer in answers for error in (0, *QUICK_ERRORS)})
    return dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))


def supervised_loss(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], eos_token_id: int
) -> torch.Tensor:
    """Mean negative log-likelihood per token of the answers, each followed by EOS, given their prompts."""
    prompt_ids = _padded(prompts, "left")
    answer_ids = _padded([[*answer, eos_token_id] for answer in answers], "right")
    is_token = answer_ids >= 0
    logps, _ = compute_logprobs(model, prompt_ids.clamp(min=0), prompt_ids >= 0, answer_ids.clamp(min=0), is_token)
    return -logps.sum() / is_token.sum()


def _padded(sequences: Sequence[list[int]], side: str) -> torch.Tensor:
    """Lists of token ids as one tensor, padded with -1."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=side)


def styled_answer(sample: Sample, worked_share: float, rng: random.Random) -> str:
    """An answer to a sample in a random style: worked with probability `worked_share`, else quick."""
    if rng.random() < worked_share:
        return worked_answer(*parse_problem(sample["prompt"]))
    error = rng.choice(QUICK_ERRORS) if rng.random() < QUICK_ERROR_SHARE else 0
    return str(abs(int(sample["answer"]) + error))


def parse_problem(prompt: str) -> tuple[int, str, int]:
    """ "What is 12 - 7? Answer with an integer." -> (12, "-", 7)."""
    _, _, a, operator, b, *_ = prompt.replace("?", " ").split()
    return int(a), operator, int(b)


def worked_answer(a: int, operator: str, b: int) -> str:
    """Column arithmetic, ones first. A carry is added to the tens; a borrow is subtracted from the upper tens.

    >>> worked_answer(47, "+", 38), worked_answer(52, "-", 27)
    ('7+8=15 4+3+1=8 85', '12-7=5 4-2=2 25')
    """
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if operator == "+":
        carry = int(a_ones + b_ones > 9)
        ones = f"{a_ones}+{b_ones}={a_ones + b_ones}"
        tens = f"{a_tens}+{b_tens}{'+1' if carry else ''}={a_tens + b_tens + carry}"
        return f"{ones} {tens} {a + b}"
    borrow = int(a_ones < b_ones)
    ones = f"{a_ones + 10 * borrow}-{b_ones}={a_ones + 10 * borrow - b_ones}"
    tens = f"{a_tens - borrow}-{b_tens}={a_tens - borrow - b_tens}"
    return f"{ones} {tens} {a - b}"
