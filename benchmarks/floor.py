"""Compare the time of a training step with its floor: the time of the model calls alone.

    python -m benchmarks.floor      about two minutes on two cores

The script trains the default run and records every forward pass: its rows, its new and cached tokens, and whether a
backward pass follows. Then it repeats the same calls in the same order, with random tokens and a cache without cost,
followed by AdamW. The difference is our overhead: sampling, rewards, advantages, masks, the loss, metrics and files.

    made     the calls of the run itself: prompts and completions that occur several times are computed once
    plain    the calls of a run without sharing: every completion has its own row in every pass, padded to the longest;
             finished completions leave the batch

The bar for both is at most 1.25 times the floor. Results: benchmarks/results/floor.json.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import grpo.run.setup
from benchmarks.common import ROOT, Results, spread
from benchmarks.vs_trl import Training, default_run, train
from grpo.fast.capabilities import find_head
from grpo.fast.lm_head import Head
from grpo.models.loading import frozen_copy, load_policy
from grpo.models.optimizer import make_optimizer
from grpo.rollout import Rollout
from grpo.settings.config import Config, load_config

SEEDS = (0, 1, 2)
MAX_OVER_FLOOR = 1.25


@dataclass
class Call:
    """One forward pass."""

    rows: int
    new: int  # new tokens per row
    cached: int  # tokens per row that are already in the cache
    scored: int  # number of tokens in all rows whose logits are needed
    has_block_mask: bool  # a 4-D mask; otherwise one of 0 and 1 for the padding
    has_backward: bool
    is_sampling: bool


@dataclass
class RecordedTraining(Training):
    """A training run that records the model calls and the rollout of each step."""

    calls: list[list[Call]] = field(default_factory=list)
    shapes: list[tuple[int, list[int]]] = field(default_factory=list)  # (L, B completion lengths)

    def start_clock(self) -> None:
        """Called when a step begins."""
        self.calls.append([])
        super().start_clock()


@contextlib.contextmanager
def recording(training: RecordedTraining, trunk_class: Any) -> Iterator[None]:
    """A context in which every forward pass of a model of this class is recorded."""
    forward, log_probs, sample = trunk_class.forward, Head.log_probs, grpo.run.setup.generate_completions

    def noted_forward(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if training.calls:
            training.calls[-1].append(
                Call(
                    rows=input_ids.shape[0],
                    new=input_ids.shape[1],
                    cached=cache.get_seq_length() if cache is not None else 0,
                    scored=input_ids.shape[0],
                    has_block_mask=attention_mask is not None and attention_mask.dim() == 4,
                    has_backward=torch.is_grad_enabled(),
                    is_sampling=bool(kwargs.get("use_cache")),
                )
            )
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def noted_log_probs(self: Head, hidden: Tensor, targets: Tensor, temperature: float, **options: bool) -> Any:
        if training.calls:
            training.calls[-1][-1].scored = len(hidden)
        return log_probs(self, hidden, targets, temperature, **options)

    def noted_sample(*args: Any, **kwargs: Any) -> Rollout:
        rollout = sample(*args, **kwargs)
        if training.calls:
            training.shapes.append((rollout.prompt_ids.shape[1], rollout.completion_mask.sum(1).tolist()))
        return rollout

    with (
        mock.patch.object(trunk_class, "forward", noted_forward),
        mock.patch.object(Head, "log_probs", noted_log_probs),
        mock.patch.object(grpo.run.setup, "generate_completions", noted_sample),
    ):
        yield


def plain_calls(prompt_length: int, lengths: list[int], group_size: int) -> list[Call]:
    """The calls of a step without sharing: prefill, one decode call per token, the reference, the update."""
    rows, longest = len(lengths), max(lengths)
    calls = [Call(rows // group_size, prompt_length, 0, rows // group_size, False, False, True)]
    for t in range(1, longest):
        writing = sum(length > t for length in lengths)
        calls.append(Call(writing, 1, prompt_length + t - 1, writing, False, False, True))
    for has_backward in (False, True):
        calls.append(Call(rows, prompt_length + longest, 0, sum(lengths), False, has_backward, False))
    return calls


class FixedLayer(DynamicLayer):
    """A cache with fixed keys and values. New keys and values are discarded."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """The number of tokens before this call. The new token has the last position."""
        return self.keys.shape[-2] - 1

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Replay:
    """The policy and the reference model, with a method that repeats recorded calls."""

    def __init__(self, config: Config) -> None:
        self.policy, _ = load_policy(config.model_name, base_seed=config.base_seed, device=torch.device("cpu"))
        self.policy.train()
        self.reference = frozen_copy(self.policy)
        self.optimizer = make_optimizer(self.policy, config)

    def prepare(self, call: Call) -> Callable[[], None]:
        """A function that repeats the call, with inputs prepared in advance."""
        model = self.policy if call.is_sampling or call.has_backward else self.reference
        ids = torch.randint(self.policy.config.vocab_size, (call.rows, call.new))
        positions = torch.arange(call.cached, call.cached + call.new).expand(call.rows, -1)
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        if call.has_block_mask:
            inputs["attention_mask"] = torch.zeros(call.rows, 1, call.new, call.new)
        else:
            inputs["attention_mask"] = torch.ones(call.rows, call.cached + call.new, dtype=torch.long)
            inputs["attention_mask"][0, 0] = 0  # transformers would drop a mask of only ones, and with it its cost
        if call.is_sampling:
            return lambda: self._decode(inputs, self._cache(call) if call.cached else None)
        return lambda: self._score(model, inputs, call)

    def _cache(self, call: Call) -> Cache:
        config = self.policy.config
        shape = (call.rows, config.num_key_value_heads, call.cached + 1, config.head_dim)
        return Cache(layers=[FixedLayer(*torch.zeros(2, *shape)) for _ in range(config.num_hidden_layers)])

    @torch.no_grad()
    def _decode(self, inputs: dict[str, Tensor], cache: Cache | None) -> None:
        self.policy(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _score(self, model: PreTrainedModel, inputs: dict[str, Tensor], call: Call) -> None:
        head = find_head(model)
        assert head is not None
        with torch.set_grad_enabled(call.has_backward):
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            logits = head.logits(hidden.flatten(0, 1)[: call.scored])
        if call.has_backward:
            logits.backward(torch.ones_like(logits))

    def step(self, calls: list[Call]) -> float:
        """The seconds of the calls of one training step."""
        prepared = [self.prepare(call) for call in calls]
        start = time.perf_counter()
        for call in prepared:
            call()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def measure(settings: dict[int, list[str]]) -> dict[str, Any]:
    """Measure whole runs and their replays, in turns."""
    seconds: dict[str, list[float]] = {"ours": [], "made": [], "plain": []}
    num_calls: list[int] = []
    for number, changes in enumerate(settings.values()):
        config = load_config(None, changes)
        replay = Replay(config)
        training = RecordedTraining(config.num_train_steps)
        with recording(training, type(replay.policy.base_model)):
            train("ours", changes, training)
        steps = range(1, len(training.step_seconds))  # the first step is a warm-up
        seconds["ours"] += [training.step_seconds[step] for step in steps]
        seconds["made"] += [replay.step(training.calls[step]) for step in steps]
        plain = [plain_calls(*training.shapes[step], config.group_size) for step in steps]
        seconds["plain"] += [replay.step(calls) for calls in plain]
        num_calls += [len(training.calls[step]) for step in steps]
        print(f"{number + 1} of {len(settings)} runs", flush=True)
    return summary(seconds, num_calls)


def summary(seconds: dict[str, list[float]], num_calls: list[int]) -> dict[str, Any]:
    """The content of the result file, from the seconds per step of each kind."""
    over = {
        f"over_{name}": spread([ours / bare for ours, bare in zip(seconds["ours"], seconds[name], strict=True)])
        for name in ("made", "plain")
    }
    return {
        **{name: spread(values) for name, values in seconds.items()},
        **over,
        "floor_seconds": statistics.median(seconds["made"]),
        "calls": statistics.mean(num_calls),
    }


def bars(parts: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """The bars: (name, the bar in words, measured value, whether it is met)."""
    found = []
    for name, calls in (("plain", "what a step needs that shares nothing"), ("made", "the calls it makes")):
        if "step" in parts:
            ratio = parts["step"][f"over_{name}"]["median"]
            found.append((f"a step, over {calls}", f"<= {MAX_OVER_FLOOR}", ratio, ratio <= MAX_OVER_FLOOR))
    return found


def describe(parts: dict[str, Any]) -> str:
    """The results as text, one line per measurement."""
    part = parts["step"]
    lines = [f"{name:6} {1000 * part[name]['median']:6.1f} ms a step (median)" for name in ("ours", "made", "plain")]
    return "\n".join([*lines, f"{part['calls']:.0f} calls a step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    config = load_config()
    results = Results(__file__, data=[ROOT / config.train_file, ROOT / config.eval_file, ROOT / "benchmarks/vs_trl.py"])
    if not results.has("step"):
        results.save("step", measure({seed: default_run(seed) for seed in SEEDS}))
    print(describe(results.parts))
    for what, bar, value, is_met in bars(results.parts):
        print(f"{what}: {value:.2f}, bar {bar}: {'met' if is_met else 'NOT met'}")


if __name__ == "__main__":
    main()
