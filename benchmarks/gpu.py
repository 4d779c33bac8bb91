"""Measure sampling and update of a model of realistic shape on a GPU: tokens per second, peak memory, MFU.

    python -m benchmarks.gpu                        on a CUDA device, about eight minutes; continues where it stopped
    python -m benchmarks.gpu --device cpu --tiny    the same code on a very small shape, to test the script

The model has the shape of Qwen2.5-0.5B and random float32 weights, with bfloat16 autocast if the device supports it. A
step is 8 prompts of 256 tokens with 8 completions of 256 tokens each; no completion ends early.

    sampling              grpo.rollout.generate_completions
    sampling-generate     Hugging Face's model.generate
    update-always         scoring, loss, backward and optimizer step; each prompt is computed once per group
    update-never          as update-always, but each prompt is computed once per completion
    update-full_logits    as update-never, but with benchmarks.logprobs.full_logits_logprobs
    train-full, train-lora, train-lora-checkpointing
                          whole steps: with all weights trained, with an adapter of rank 16, or with the adapter and
                          gradient checkpointing
    trl-step              TRL's GRPOTrainer on the same step: sampling, update and everything else; if TRL is installed

Each part runs in a fresh process, on a GPU that should be otherwise idle. Results go to
benchmarks/results/gpu-DEVICE.json after every part. MFU is the number of FLOPs that the part needs, divided by its time
and by the dense bfloat16 rate in the data sheet. It is left out for devices that are not in DENSE_BF16_TFLOPS.
"""

import argparse
import importlib.util
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from benchmarks import logprobs
from benchmarks.common import RESULTS, Results, in_fresh_process, interleaved, spread, synchronize
from benchmarks.logprobs import Scorer, full_logits_logprobs
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, loss_weights
from grpo.models.device import make_autocast
from grpo.models.loading import make_trainable
from grpo.models.optimizer import make_optimizer
from grpo.rollout import generate_completions
from grpo.settings.config import load_config

# By the name that torch gives a device, from NVIDIA's data sheets, without sparsity.
DENSE_BF16_TFLOPS = {
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
}
REPEATS = {"sampling": 3, "update": 5, "train": 3, "trl": 3}
CHECKS = "python -m pytest tests/fidelity/test_bfloat16.py"  # its CUDA tests are skipped on a machine without CUDA


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of a step."""

    vocab_size: int = 151_936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_key_value_heads: int = 2
    num_prompts: int = 8
    group_size: int = 8
    prompt_length: int = 256
    completion_length: int = 256
    micro_batch_size: int = 16  # completions, whole groups

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.group_size

    def prompts(self) -> list[list[int]]:
        """P random prompts as token ids."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            2, self.vocab_size, (self.num_prompts, self.prompt_length), generator=generator
        ).tolist()  # ids 0 and 1 are padding and eos


SHAPES = {
    "full": Shape(),
    "tiny": Shape(101, 16, 32, 2, 2, 1, 2, 4, prompt_length=6, completion_length=5, micro_batch_size=4),
}


def build_model(shape: Shape, device: torch.device) -> Qwen2ForCausalLM:
    """Random float32 weights, embedding and head tied, no stop token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        return Qwen2ForCausalLM(config)


def make_tokenizer(shape: Shape, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose texts are ids separated by spaces: id 7 is "t7"."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape.vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token=eos_token)


def forward_flops(model: PreTrainedModel, shape: Shape, *, is_shared: bool) -> float:
    """FLOPs of one forward pass over the tokens of a step. A backward pass takes twice as many.

    Every token needs 2 FLOPs per weight; the head's weights count only for predicted completion tokens. In addition,
    each layer needs 4 * hidden FLOPs per pair of a token and a token that it attends to. `is_shared`: whether a prompt
    counts once per group.
    """
    head = shape.vocab_size * shape.hidden_size
    body = sum(weight.numel() for weight in model.parameters()) - head
    prompts, rows = shape.num_prompts * (1 if is_shared else shape.group_size), shape.num_rows
    prompt_length, length = shape.prompt_length, shape.completion_length
    tokens = prompts * prompt_length + rows * length
    pairs = prompts * prompt_length * (prompt_length + 1) / 2 + rows * length * (prompt_length + (length + 1) / 2)
    attention = 4 * shape.num_layers * shape.hidden_size * pairs
    return 2 * body * tokens + 2 * head * rows * length + attention


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shape: Shape, device: torch.device) -> Tensor:
    """(B, C) ids from our sampler."""
    with make_autocast("auto", device)():
        rollout = generate_completions(
            model,
            tokenizer,
            shape.prompts(),
            group_size=shape.group_size,
            max_completion_length=shape.completion_length,
        )
    assert rollout.completion_mask.all(), "no completion ends early"
    return rollout.completion_ids


@torch.no_grad()
def generate(model: PreTrainedModel, shape: Shape, device: torch.device) -> Tensor:
    """(B, C) ids from Hugging Face's sampler."""
    input_ids = torch.tensor(shape.prompts(), device=device)
    with make_autocast("auto", device)():
        ids = model.eval().generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            num_return_sequences=shape.group_size,
            max_new_tokens=shape.completion_length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
        )
    return ids[:, shape.prompt_length :]


SAMPLERS = ("sampling", "sampling-generate")


def measure_sampling(part: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Completion tokens per second of one of SAMPLERS."""
    model = build_model(shape, device)
    work: Callable[[], Tensor] = partial(generate, model, shape, device)
    if part == "sampling":
        work = partial(sample, model, make_tokenizer(shape), shape, device)
    assert work().shape == (shape.num_rows, shape.completion_length), "the same work on both sides"
    seconds = interleaved({part: work}, REPEATS["sampling"])[part]
    num_tokens = shape.num_rows * shape.completion_length
    return summary(seconds, num_tokens, forward_flops(model, shape, is_shared=part == "sampling"), device)


def random_rollout(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a scorer, (B, L) and (B, C). All tokens are kept; the rows of a group are consecutive."""
    generator = torch.Generator().manual_seed(1)
    prompt_ids = torch.tensor(shape.prompts()).repeat_interleave(shape.group_size, dim=0)  # (B, L)
    ids = torch.randint(2, shape.vocab_size, (shape.num_rows, shape.completion_length), generator=generator)  # (B, C)
    masks = torch.ones_like(prompt_ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    return prompt_ids.to(device), masks[0].to(device), ids.to(device), masks[1].to(device)


def scorers(shape: Shape) -> dict[str, Scorer]:
    """The scorers, by the names of the parts."""
    shared = {
        f"update-{choice}": partial(compute_logprobs, group_size=shape.group_size, shared_prefix=choice)
        for choice in ("always", "never")
    }
    return {**shared, "update-full_logits": full_logits_logprobs}


def accumulate(model: PreTrainedModel, scorer: Scorer, shape: Shape, device: torch.device) -> None:
    """Step [6] of train_grpo.py without the optimizer: the gradient of a step, in micro-batches of whole groups."""
    rollout = random_rollout(shape, device)
    mask = rollout[3]  # (B, C)
    weights = loss_weights(mask, "token", max_completion_length=shape.completion_length)  # (B, C)
    advantages = torch.linspace(-1, 1, shape.num_rows, device=device).unsqueeze(1)  # (B, 1)
    for start in range(0, shape.num_rows, shape.micro_batch_size):
        rows = slice(start, start + shape.micro_batch_size)
        with make_autocast("auto", device)():
            logps, _ = scorer(model, *(tensor[rows] for tensor in rollout))  # (b, C)
        per_token_loss = clipped_surrogate(logps, logps.detach(), advantages[rows], mask[rows], clip_range=0.2)
        (per_token_loss * weights[rows]).sum().backward()


def measure_update(part: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Tokens per second of one of the scorers. Prompt tokens are counted once per completion."""
    model, scorer = build_model(shape, device), scorers(shape)[part]
    optimizer = make_optimizer(model, load_config())

    def work() -> None:
        accumulate(model, scorer, shape, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved({part: work}, REPEATS["update"])[part]
    num_tokens = shape.num_rows * (shape.prompt_length + shape.completion_length)
    flops = 3 * forward_flops(model, shape, is_shared=part == "update-always")
    return summary(seconds, num_tokens, flops, device)


TRAINED = {
    "train-full": (),
    "train-lora": ("lora_rank=16",),
    "train-lora-checkpointing": ("lora_rank=16", "gradient_checkpointing=true"),
}


def measure_training(part: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Tokens per second of whole steps (sampling and update), training all weights or an adapter."""
    config = load_config(overrides=TRAINED[part])
    model, tokenizer = build_model(shape, device), make_tokenizer(shape)
    make_trainable(model, tokenizer, config)
    optimizer = make_optimizer(model, config)
    scorer: Scorer = partial(compute_logprobs, group_size=shape.group_size)

    def work() -> None:
        sample(model, tokenizer, shape, device)
        accumulate(model.train(), scorer, shape, device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleaved({part: work}, REPEATS["train"])[part]
    num_tokens = shape.num_rows * (shape.prompt_length + shape.completion_length)
    passes = 5 if config.gradient_checkpointing else 4  # sampling, forward, backward (2), recomputation
    return summary(seconds, num_tokens, passes * forward_flops(model, shape, is_shared=True), device)


def measure_trl(part: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Seconds of TRL's steps. They correspond to our sampling plus our update, plus rewards and logging."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Records the time at the end of every step. The clock starts after the first step, which is a warm-up."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            ends.append(time.perf_counter())

    model = build_model(shape, device)
    ends: list[float] = []
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        lengths.extend(map(len, completion_ids))
        return [float(row % 2) for row in range(len(completion_ids))]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=1 + REPEATS["trl"],
                per_device_train_batch_size=shape.micro_batch_size,
                gradient_accumulation_steps=shape.num_rows // shape.micro_batch_size,
                num_generations=shape.group_size,
                max_completion_length=shape.completion_length,
                generation_kwargs={"min_new_tokens": shape.completion_length},
                gradient_checkpointing=False,
                bf16=device.type == "cuda",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": " ".join(f"t{i}" for i in prompt)} for prompt in shape.prompts()]
            ),
            processing_class=make_tokenizer(shape, eos_token="t1"),
            callbacks=[Clock()],
        )
        trainer.train()
    assert lengths == [shape.completion_length] * shape.num_rows * (1 + REPEATS["trl"]), "the same work on both sides"
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    num_tokens = shape.num_rows * (shape.prompt_length + shape.completion_length)
    flops = 4 * forward_flops(model, shape, is_shared=False)  # sampling, then forward and backward
    return summary(seconds, num_tokens, flops, device)


MEASURES: dict[str, Callable[[str, Shape, torch.device], dict[str, Any]]] = {
    **dict.fromkeys(SAMPLERS, measure_sampling),
    **dict.fromkeys(scorers(Shape()), measure_update),
    **dict.fromkeys(TRAINED, measure_training),
    "trl-step": measure_trl,
}


def summary(seconds: Sequence[float], num_tokens: int, flops: float, device: torch.device) -> dict[str, Any]:
    """The result of a part, from its times. Memory and MFU are included if they are known."""
    times = spread(seconds)
    result = {"times": times, "tokens_per_second": num_tokens / times["median"], "teraflop": flops / 1e12}
    if device.type == "cuda":
        result["device_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if peak := DENSE_BF16_TFLOPS.get(device_name(device)):
        result["mfu"] = flops / times["median"] / (peak * 1e12)
    return result


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def child(part: str, size: str, device: torch.device) -> dict[str, Any]:
    """Measure one part, in this process."""
    try:
        return MEASURES[part](part, SHAPES[size], device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def bars(parts: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """The bars whose parts were measured: (name, the bar in words, measured value, whether it is met)."""
    done = {name: part for name, part in parts.items() if "times" in part}
    comparisons = [
        ("seconds of sampling: ours / generate", ["sampling"], ["sampling-generate"], seconds_of),
        ("seconds of the update: prompts shared / not", ["update-always"], ["update-never"], seconds_of),
        ("peak memory of the update: chunked / full logits", ["update-never"], ["update-full_logits"], memory_of),
        ("seconds of a step: ours / TRL", ["sampling", "update-always"], ["trl-step"], seconds_of),
    ]
    found = []
    for what, ours, theirs, measure in comparisons:
        if done.keys() >= {*ours, *theirs}:
            costs = [sum(measure(done[name]) for name in names) for names in (ours, theirs)]
            if costs[1]:  # memory is only known on CUDA
                ratio = costs[0] / costs[1]
                found.append((what, "<= 1", ratio, ratio <= 1))
    return found


def seconds_of(part: dict[str, Any]) -> float:
    return part["times"]["median"]


def memory_of(part: dict[str, Any]) -> float:
    return part.get("device_memory_gb", 0.0)


def open_results(folder: Path, size: str, device: torch.device) -> Results:
    """The file gpu-DEVICE.json. Each device has its own file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().removeprefix("nvidia "))
    name = f"gpu-{name}{'-tiny' if size == 'tiny' else ''}"
    return Results(__file__, name=name, folder=folder, data=[Path(logprobs.__file__)])  # has the baseline


def describe(part: str, result: dict[str, Any]) -> str:
    """The line to print for a part."""
    if "times" not in result:
        return f"{part}: out of memory"
    line = f"{part}: {result['times']['median']:.3f} s, {result['tokens_per_second']:,.0f} tokens/s"
    if "device_memory_gb" in result:
        line += f", {result['device_memory_gb']:.2f} GB"
    return line + (f", MFU {result['mfu']:.1%}" if "mfu" in result else "")


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a very small shape")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--child", choices=MEASURES, help="this part alone, in this process; for the script")
    arguments = parser.parse_args(command_line)
    device, size = torch.device(arguments.device), "tiny" if arguments.tiny else "full"
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none here", file=sys.stderr)
        raise SystemExit(2)
    if arguments.child:
        print(json.dumps(child(arguments.child, size, device)))
        return

    results = open_results(arguments.results, size, device)
    flags = ["--device", arguments.device, *["--tiny"] * arguments.tiny]
    for part in arguments.parts:
        if part == "trl-step" and importlib.util.find_spec("trl") is None:
            print("trl-step: TRL is not installed (pip install -r requirements-dev.txt)")
            continue
        if not results.has(part):
            result = in_fresh_process("benchmarks.gpu", *flags, "--child", part)
            del result["peak_memory_gb"]  # this is the host's memory
            results.save(part, {"device": device_name(device)} | result)
        print(describe(part, results.parts[part]), flush=True)
    for what, bar, value, is_met in bars(results.parts):
        print(f"{what}: {value:.3f} (bar {bar}: {'met' if is_met else 'NOT met'})")
    if device.type == "cuda":
        print(f"The tests that need a GPU: {CHECKS}")


if __name__ == "__main__":
    main()
