"""Measure time and memory of scoring and backward with a realistic vocabulary: in chunks and with all logits at once.

    python -m benchmarks.logprobs    about six minutes on two cores; continues where it stopped

The model is a random Llama with the vocabulary and the width of Qwen2.5-0.5B but only one layer. So the measurement
covers mostly the head, the softmax and their gradients, in float32. Every row has 256 completion tokens after a prompt
of 16 tokens.

    chunked        grpo.logprobs.compute_logprobs, which applies the LM head to some tokens at a time
    full_logits    the same formula on all logits at once; compute_logprobs worked like this before it had chunks

Times: both variants take turns in one process. Memory: the peak of a fresh process minus its memory after the model was
built. Variants that do not fit into memory are not run, and the output says so. The values for 16,384 tokens are
extrapolated linearly from the two largest measurements. Results go to benchmarks/results/logprobs.json after each part.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import (
    Results,
    available_memory_gb,
    forget_peak,
    in_fresh_process,
    interleaved,
    peak_memory_gb,
    spread,
)
from grpo.fast.layout import positions_from_mask
from grpo.logprobs import compute_logprobs

MEMORY_TOKENS = (1024, 4096, 8192)  # completion tokens; one fresh process for each number and variant
TIME_REPEATS = {1024: 3, 4096: 2}  # completion tokens -> turns; full logits of 8,192 tokens need too much memory
COMPUTED_TOKENS = 16_384
BAR_TOKENS, MEMORY_BAR, TIME_BAR = 4096, 1 / 4, 1.3  # maximum of chunked / full_logits
SHARE_OF_AVAILABLE = 0.9  # fraction of the free memory to use; swapping would make times meaningless

Scorer = Callable[..., tuple[Tensor, Tensor]]
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of its rows."""

    vocab_size: int = 151_936
    hidden_size: int = 896
    intermediate_size: int = 2048
    num_heads: int = 14
    num_key_value_heads: int = 2
    prompt_length: int = 16
    completion_length: int = 256


def full_logits_logprobs(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The baseline: `compute_logprobs` with several copies of the logits of all completion tokens in memory."""
    length = completion_ids.shape[1]
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, L + C)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, L + C)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions_from_mask(attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits = output.logits[:, -(length + 1) : -1]  # (B, C, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    all_logps = torch.log_softmax(logits, dim=-1)  # (B, C, V)
    logps = all_logps.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, C)
    with torch.no_grad():
        entropies = torch.special.entr(all_logps.exp()).sum(-1)  # (B, C)
    is_token = completion_mask.bool()
    return torch.where(is_token, logps, 0.0), torch.where(is_token, entropies, 0.0)


VARIANTS: dict[str, Scorer] = {"chunked": compute_logprobs, "full_logits": full_logits_logprobs}


def build_model(sizes: Sizes) -> LlamaForCausalLM:
    """One layer, random weights, embedding and head tied."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_key_value_heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def random_rows(num_tokens: int, sizes: Sizes) -> Rows:
    """The arguments of a scorer: rows with `num_tokens` completion tokens in total, all of them kept."""
    assert num_tokens % sizes.completion_length == 0, "whole rows"
    num_rows = num_tokens // sizes.completion_length
    generator = torch.Generator().manual_seed(0)
    prompt_shape, completion_shape = (num_rows, sizes.prompt_length), (num_rows, sizes.completion_length)
    prompt_ids = torch.randint(sizes.vocab_size, prompt_shape, generator=generator)
    completion_ids = torch.randint(sizes.vocab_size, completion_shape, generator=generator)
    return (
        prompt_ids,
        torch.ones(prompt_shape, dtype=torch.bool),
        completion_ids,
        torch.ones(completion_shape, dtype=torch.bool),
    )


def score_and_backward(scorer: Scorer, model: LlamaForCausalLM, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The measured work. Returns log-probs, entropies and a gradient that depends on the whole head."""
    model.zero_grad()
    logps, entropies = scorer(model, *rows)
    (-logps.mean()).backward()
    gradient = model.model.norm.weight.grad
    assert gradient is not None
    return logps.detach(), entropies, gradient


def measure_time(num_tokens: int, repeats: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds of both variants, taking turns on one model."""
    model, rows = build_model(sizes), random_rows(num_tokens, sizes)
    outcomes: dict[str, tuple[Tensor, ...]] = {}

    def work(variant: str) -> None:
        outcomes[variant] = score_and_backward(VARIANTS[variant], model, rows)

    seconds = interleaved({variant: partial(work, variant) for variant in VARIANTS}, repeats)
    torch.testing.assert_close(outcomes["chunked"], outcomes["full_logits"], rtol=1e-4, atol=1e-4)  # the same work
    return {variant: spread(times) for variant, times in seconds.items()}


def measure_memory(variant: str, num_tokens: int, sizes: Sizes) -> dict[str, Any]:
    """Peak memory and seconds of one call of one variant, in a separate process."""
    request = {"variant": variant, "num_tokens": num_tokens, "sizes": asdict(sizes)}
    result = in_fresh_process("benchmarks.logprobs", "--child", json.dumps(request))
    return {key: result[key] for key in ("model_gb", "peak_gb", "net_gb", "work_seconds")}


def child(variant: str, num_tokens: int, sizes: dict[str, int]) -> dict[str, float]:
    """The code of the separate process of `measure_memory`."""
    model, rows = build_model(Sizes(**sizes)), random_rows(num_tokens, Sizes(**sizes))
    # Building needs more memory than the finished model. This peak is reset, because it would hide that of the work.
    model_gb = forget_peak()
    start = time.perf_counter()
    score_and_backward(VARIANTS[variant], model, rows)
    seconds, peak_gb = time.perf_counter() - start, peak_memory_gb()
    return {"model_gb": model_gb, "peak_gb": peak_gb, "net_gb": peak_gb - model_gb, "work_seconds": seconds}


def measured(parts: dict[str, Any], variant: str) -> dict[int, dict[str, Any]]:
    """Completion tokens -> memory result, for all parts that were run."""
    found = {tokens: parts.get(f"memory-{variant}-{tokens}", {}) for tokens in MEMORY_TOKENS}
    return {tokens: part for tokens, part in found.items() if "net_gb" in part}


def extrapolate(parts: dict[str, Any], variant: str, num_tokens: int) -> dict[str, Any]:
    """Memory and seconds, extrapolated linearly from the variant's two largest measurements."""
    points = measured(parts, variant)
    low, high = sorted(points)[-2:]

    def line(key: str) -> float:
        slope = (points[high][key] - points[low][key]) / (high - low)
        return points[high][key] + slope * (num_tokens - high)

    return {"computed_from": [low, high]} | {key: line(key) for key in ("peak_gb", "net_gb", "work_seconds")}


def needed_gb(parts: dict[str, Any], variant: str, num_tokens: int) -> float:
    """The expected peak memory, in proportion to the largest measurement (a slight overestimate); 0 = unknown."""
    points = measured(parts, variant)
    if not points:
        return 0.0
    largest = max(points)
    return points[largest]["model_gb"] + points[largest]["net_gb"] * num_tokens / largest


def bars(parts: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """The bars whose parts were measured: (name, the bar in words, measured value, whether it is met)."""
    found = []
    memory = {variant: measured(parts, variant).get(BAR_TOKENS) for variant in VARIANTS}
    if memory["chunked"] and memory["full_logits"]:
        ratio = memory["chunked"]["net_gb"] / memory["full_logits"]["net_gb"]
        what = f"peak memory of scoring and backward, {BAR_TOKENS:,} tokens: chunked / full logits"
        found.append((what, f"<= {MEMORY_BAR:.2f}", ratio, ratio <= MEMORY_BAR))
    if seconds := parts.get(f"time-{BAR_TOKENS}"):
        ratio = seconds["chunked"]["median"] / seconds["full_logits"]["median"]
        what = f"time of scoring and backward, {BAR_TOKENS:,} tokens: chunked / full logits"
        found.append((what, f"<= {TIME_BAR}", ratio, ratio <= TIME_BAR))
    return found


def run(results: Results, sizes: Sizes) -> None:
    """Measure every missing part. Memory comes first, because it shows what fits."""
    for num_tokens in MEMORY_TOKENS:
        for variant in VARIANTS:
            part = f"memory-{variant}-{num_tokens}"
            if results.has(part):
                continue
            needed, available = needed_gb(results.parts, variant, num_tokens), available_memory_gb()
            if needed > SHARE_OF_AVAILABLE * available:
                results.save(part, {"does_not_fit": True, "needed_gb": needed, "available_gb": available})
                print(f"{part}: does not fit, {needed:.1f} GB of {available:.1f} GB", flush=True)
                continue
            result = measure_memory(variant, num_tokens, sizes)
            results.save(part, result)
            print(f"{part}: {result['net_gb']:.2f} GB in {result['work_seconds']:.1f} s", flush=True)
    for variant in VARIANTS:
        if len(measured(results.parts, variant)) < 2:
            continue
        result = extrapolate(results.parts, variant, COMPUTED_TOKENS)
        results.save(f"memory-{variant}-{COMPUTED_TOKENS}", result)
        print(f"memory-{variant}-{COMPUTED_TOKENS}: {result['net_gb']:.2f} GB, computed", flush=True)
    for num_tokens, repeats in TIME_REPEATS.items():
        part = f"time-{num_tokens}"
        fits = all(num_tokens in measured(results.parts, variant) for variant in VARIANTS)
        if results.has(part) or not fits:
            continue
        seconds = measure_time(num_tokens, repeats, sizes)
        results.save(part, seconds)
        medians = ", ".join(f"{variant} {times['median']:.2f} s" for variant, times in seconds.items())
        print(f"{part}: {medians}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=json.loads, metavar="JSON", help="one measurement of memory; for the script")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(**arguments.child)))
        return
    results = Results(__file__)
    run(results, Sizes())
    for what, bar, value, is_met in bars(results.parts):
        print(f"{what}: {value:.3f} (bar {bar}: {'met' if is_met else 'NOT met'})")


if __name__ == "__main__":
    main()
