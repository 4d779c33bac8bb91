"""Compare the speed of `generate_completions` with Hugging Face's `model.generate` for the completions of a rollout.

    python -m benchmarks.sampler                                       all cases, about five minutes on two cores
    python -m benchmarks.sampler --cases "tiny equal" "tiny ragged"    some cases

The models are Llamas with random float32 weights, so nothing is downloaded: a tiny model and one with 110 M weights.
There are three kinds of cases:

    equal        no completion stops before the maximum length
    ragged       completions stop by themselves, at a quarter of the maximum on average
    long prompt  one prompt of 512 tokens; all completions have 32 tokens, the maximum

`generate` is used in its fastest way without a custom loop: one batch, left-padded prompts, KV cache,
num_return_sequences, and neither top-k nor top-p, which would cost time. It returns only ids. Our sampler also returns
log-probs and texts, and their cost is part of its time.

Both samplers stop with the same probability: a bias of the head makes the stop token's logit constant, so the stop
token has the same probability at every position, for any text. The lengths then have a geometric distribution for both
samplers. Each call has its own seed, so the result does not depend on a single draw of lengths. The mean lengths are
stored with the times.

Results go to benchmarks/results/sampler.json after every case. Cases measured with the current code are skipped.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.common import Results, interleaved, spread
from grpo.rollout import generate_completions

PAD_ID, EOS_ID = 0, 1
NEVER = -1e4  # a logit whose probability is exactly 0 in float32


@dataclass(frozen=True)
class Size:
    """The sizes of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int


@dataclass(frozen=True)
class Case:
    """One comparison: P prompts with G completions each, and the required ratio of seconds."""

    size: Size
    num_prompts: int
    group_size: int
    prompt_lengths: tuple[int, int]  # shortest and longest, in tokens
    max_completion_length: int
    repeats: int
    bar: float
    mean_length: float | None = None  # of the completions; None = they never stop


TINY = Size(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
LARGE = Size(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=16384)

CASES = {
    "tiny equal": Case(TINY, 16, 16, (16, 32), 64, repeats=15, bar=1.1),
    "tiny ragged": Case(TINY, 16, 16, (16, 32), 64, repeats=15, bar=1.5, mean_length=16),
    "large equal": Case(LARGE, 4, 16, (16, 32), 32, repeats=5, bar=1.1),
    "large ragged": Case(LARGE, 4, 16, (16, 32), 64, repeats=5, bar=1.5, mean_length=16),
    "large long prompt": Case(LARGE, 1, 16, (512, 512), 32, repeats=5, bar=1.5),
}

Sampler = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[list[int]], Case, int], tuple[Tensor, Tensor]]


def sample_ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], case: Case, seed: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask of the completions from our sampler, (B, C) each."""
    rollout = generate_completions(
        model,
        tokenizer,
        prompts,
        group_size=case.group_size,
        max_completion_length=case.max_completion_length,
        seed=seed,
    )
    return rollout.completion_ids, rollout.completion_mask


def sample_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], case: Case, seed: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask of the completions from `model.generate`, (B, C) each."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=case.group_size,
        max_new_tokens=case.max_completion_length,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    ids = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
    ids = ids[:, batch["input_ids"].shape[1] :]  # (B, C)
    is_stop = ids == tokenizer.eos_token_id
    return ids, is_stop.int().cumsum(1) - is_stop.int() == 0  # counts stops, as a random model may sample padding


SAMPLERS: dict[str, Sampler] = {"ours": sample_ours, "generate": sample_generate}


def measure(case: Case) -> dict[str, Any]:
    """Seconds, lengths and tokens per second of both samplers, which take turns with the seeds 0, 1, 2, ..."""
    model = random_llama(case.size)
    set_stop_probability(
        model, stop_probability(case.mean_length, case.max_completion_length) if case.mean_length else 0.0
    )
    tokenizer = make_tokenizer(case.size.vocab_size)
    prompts = random_prompts(case.num_prompts, case.prompt_lengths, case.size.vocab_size)
    num_tokens: dict[str, list[int]] = {name: [] for name in SAMPLERS}

    def candidate(name: str) -> Callable[[], None]:
        def sample() -> None:
            _, mask = SAMPLERS[name](model, tokenizer, prompts, case, len(num_tokens[name]))
            num_tokens[name].append(int(mask.sum()))

        return sample

    seconds = interleaved({name: candidate(name) for name in SAMPLERS}, case.repeats)
    return {
        "case": asdict(case),
        "num_weights": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "samplers": {
            name: {
                **spread(seconds[name]),
                "mean_length": mean(num_tokens[name][1:]) / (case.num_prompts * case.group_size),  # [0] is the warm-up
                "tokens_per_second": sum(num_tokens[name][1:]) / sum(seconds[name]),
            }
            for name in SAMPLERS
        },
    }


def random_llama(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """Random float32 weights from a fixed seed, in eval mode."""
    torch.manual_seed(seed)
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    config = LlamaConfig(**asdict(size), **special, max_position_embeddings=1024, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def set_stop_probability(model: LlamaForCausalLM, probability: float) -> None:
    """Make every token the stop token with this probability; 0 = never.

    With b the stop token's logit and Z the sum of exp(logit) of all others, p = exp(b) / (exp(b) + Z). With random
    weights Z hardly depends on the text, so one constant b = log(p / (1 - p)) + log Z is sufficient.
    """
    head = model.lm_head
    head.weight[EOS_ID] = 0.0
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias[EOS_ID] = NEVER
    if probability > 0:
        ids = torch.tensor(random_prompts(4, (64, 64), head.out_features))
        log_sums = torch.logsumexp(model(ids).logits, dim=-1)  # (4, 64), without the stop token
        head.bias[EOS_ID] = torch.logit(torch.tensor(probability)) + log_sums.mean()


def stop_probability(mean_length: float, max_length: int) -> float:
    """The p for which geometric lengths, truncated at max_length, have this mean: (1 - (1 - p)^max_length) / p.

    >>> round(stop_probability(1.5, 2), 6)
    0.5
    """
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection, because the mean falls as p grows
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** max_length) / p > mean_length else (low, p)
    return p


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word per id: "<pad>", "<eos>", "2", "3", ..."""
    words = ["<pad>", "<eos>", *map(str, range(2, vocab_size))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def random_prompts(num_prompts: int, lengths: tuple[int, int], vocab_size: int) -> list[list[int]]:
    """Prompts of random ids (no padding or stop token) from a fixed seed, with evenly spaced lengths, longest first."""
    generator = torch.Generator().manual_seed(0)
    shortest, longest = lengths
    counts = torch.linspace(longest, shortest, num_prompts).round().int().tolist()
    return [torch.randint(2, vocab_size, (count,), generator=generator).tolist() for count in counts]


def ratio(part: dict[str, Any]) -> float:
    """The speedup: median seconds of generate / median seconds of our sampler."""
    return part["samplers"]["generate"]["median"] / part["samplers"]["ours"]["median"]


def bars(parts: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """The bars of the measured cases: (name, the bar in words, measured value, whether it is met)."""
    rows = []
    for name, case in CASES.items():
        if name in parts:
            value = ratio(parts[name])
            rows.append((f"{name}: seconds of generate / ours", f">= {case.bar}", value, value >= case.bar))
    return rows


def report(parts: dict[str, Any], cases: Sequence[str]) -> str:
    """A table with one row per case and sampler, followed by the bars."""
    lines = ["case               weights    sampler    median s  quartiles s       mean length  tokens/s"]
    for name in cases:
        for sampler, row in parts[name]["samplers"].items():
            quartiles = f"{row['quartile_low']:.3f} - {row['quartile_high']:.3f}"
            lines.append(
                f"{name:<17}  {parts[name]['num_weights']:>11,}  {sampler:<8}  {row['median']:>8.3f}  {quartiles:<16}  "
                f"{row['mean_length']:>11.1f}  {row['tokens_per_second']:>8.0f}"
            )
    lines += ["", "bars"]
    for what, bar, value, met in bars({name: parts[name] for name in cases}):
        lines.append(f"  {what:<48}  {bar:<7} measured {value:.2f}  {'met' if met else 'NOT met'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    results = Results(__file__)
    for name in arguments.cases:
        if not results.has(name):
            results.save(name, measure(CASES[name]))
            print(f"{name}: generate takes {ratio(results.parts[name]):.2f} times as long as ours", flush=True)
    print(report(results.parts, arguments.cases))


if __name__ == "__main__":
    main()
