"""Measure how the cost of a rollout and of a training pass grows with groups, prompts, completions and vocabulary.

    python -m benchmarks.scaling                 all parts, four to five minutes on two cores
    python -m benchmarks.scaling --parts grid    one part

Three kinds of work on a small Llama with random float32 weights:

    rollout         `generate_completions`, in which every completion has the maximum length
    score never     `compute_logprobs` and backward, with one copy of the prompt per completion
    score auto      as score never, but with one copy of the prompt per group if the rule of `shared_prefix: auto` is
                    met

"axes" changes one size at a time around a base point. It measures the median seconds of calls that take turns, and the
memory of one call in a separate process: its peak minus its memory after the model was built.

"grid" tests the rule of auto on a grid of prompt length x completion length x group size. All cells have the same
number of completions, scored with never, always and auto in turns. The rule is correct in a cell if auto is at most
slightly slower than the better of the other two.

Lengths vary between three quarters of a size and the whole size, as in training, so attention uses its masked path.
This benchmark has no bars. Results go to benchmarks/results/scaling.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import sampler
from benchmarks.common import Results, forget_peak, in_fresh_process, interleaved, peak_memory_gb, spread
from benchmarks.sampler import Size, make_tokenizer, random_llama, random_prompts, set_stop_probability
from grpo.logprobs import compute_logprobs
from grpo.rollout import generate_completions


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement: P prompts, G completions each."""

    num_prompts: int = 2
    group_size: int = 8
    prompt_length: int = 64  # of the longest
    completion_length: int = 64  # of the longest
    vocab_size: int = 4096


MODEL = Size(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=4096)
BASE = Point()
AXES: dict[str, tuple[int, ...]] = {
    "group_size": (2, 8, 32),
    "prompt_length": (8, 64, 512),
    "completion_length": (16, 64, 256),
    "vocab_size": (512, 4096, 50_000),
}
AXES_WORK = {"rollout": "rollout", "never": "score never", "auto": "score auto"}  # work -> its title in the tables
AXES_REPEATS = 5

GRID_ROWS = 16  # completions in every cell, for all group sizes
GRID = [
    Point(GRID_ROWS // group_size, group_size, prompt_length, completion_length, vocab_size=512)
    for prompt_length, completion_length, group_size in product((8, 64, 512), (16, 64, 256), (2, 4, 16))
]
GRID_WORK = ("never", "always", "auto")
GRID_TOKENS = 20_000  # tokens that each candidate scores per cell; smaller batches get more turns
TOLERANCE = 0.1  # auto may be slower by this fraction than the better of never and always

# ---------------------------------------------------------------------------------------------------------- the work


def rollout_work(model: LlamaForCausalLM, point: Point) -> Callable[[], Any]:
    """One rollout, in which no completion stops before the maximum length."""
    set_stop_probability(model, 0.0)
    tokenizer = make_tokenizer(point.vocab_size)
    prompts = random_prompts(point.num_prompts, _lengths(point.prompt_length), point.vocab_size)
    return lambda: generate_completions(
        model, tokenizer, prompts, group_size=point.group_size, max_completion_length=point.completion_length
    )


def scoring_work(model: LlamaForCausalLM, point: Point, shared_prefix: str) -> Callable[[], Tensor]:
    """Scoring and backward of one batch of random tokens. Returns the log-probs."""
    tokens = random_tokens(point)

    def score() -> Tensor:
        model.zero_grad()
        logps, _ = compute_logprobs(model, *tokens, group_size=point.group_size, shared_prefix=shared_prefix)
        logps.sum().backward()
        return logps.detach()

    return score


def work(name: str, model: LlamaForCausalLM, point: Point) -> Callable[[], Any]:
    """The work of this name: a rollout, or scoring with shared_prefix = name."""
    return rollout_work(model, point) if name == "rollout" else scoring_work(model, point, name)


def random_tokens(point: Point) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments of `compute_logprobs`: padded prompts, each repeated for its group, and completions."""
    num_rows, vocab_size = point.num_prompts * point.group_size, point.vocab_size
    completions = random_prompts(num_rows, _lengths(point.completion_length), vocab_size)
    prompts = random_prompts(point.num_prompts, _lengths(point.prompt_length), vocab_size)
    repeated = [prompt for prompt in prompts for _ in range(point.group_size)]
    tokenizer = make_tokenizer(vocab_size)
    left = tokenizer.pad({"input_ids": repeated}, padding_side="left", return_tensors="pt")
    right = tokenizer.pad({"input_ids": completions}, padding_side="right", return_tensors="pt")
    return left["input_ids"], left["attention_mask"].bool(), right["input_ids"], right["attention_mask"].bool()


def _lengths(longest: int) -> tuple[int, int]:
    return max(1, longest * 3 // 4), longest


# --------------------------------------------------------------------------------------------------- time and memory


def measure_times(names: Sequence[str], point: Point, repeats: int) -> dict[str, dict[str, float]]:
    """The median seconds of several kinds of work, which take turns."""
    model = random_llama(replace(MODEL, vocab_size=point.vocab_size))
    times = interleaved({name: work(name, model, point) for name in names}, repeats)
    return {name: spread(times[name]) for name in names}


def measure_memory(name: str, point: Point) -> float:
    """The peak memory of one call in GB, measured in a separate process."""
    result = in_fresh_process("benchmarks.scaling", "--child", json.dumps([name, asdict(point)]))
    return result["work_gb"]


def child(name: str, point: Point) -> dict[str, float]:
    """The code of the separate process of `measure_memory`."""
    call = work(name, random_llama(replace(MODEL, vocab_size=point.vocab_size)), point)
    # Imports and building may have used more memory than is used now. This peak would hide that of the work.
    before = forget_peak()
    call()
    return {"work_gb": peak_memory_gb() - before}


def measure_point(point: Point, repeats: int) -> dict[str, Any]:
    """Seconds and memory of rollout and scoring at one point of an axis."""
    times = measure_times(tuple(AXES_WORK), point, repeats)
    return {
        "point": asdict(point),
        "threads": torch.get_num_threads(),
        "work": {name: {**times[name], "memory_gb": measure_memory(name, point)} for name in AXES_WORK},
    }


def measure_grid(points: Sequence[Point], num_tokens: int) -> dict[str, Any]:
    """Seconds of never, always and auto in every cell. The number of turns, 3 to 21, scores about `num_tokens`."""
    cells = []
    for point in points:
        batch_tokens = point.num_prompts * point.group_size * (point.prompt_length + point.completion_length)
        times = measure_times(GRID_WORK, point, repeats=min(max(num_tokens // batch_tokens, 3), 21))
        cells.append({"point": asdict(point), "seconds": times})
        print(grid_row(cells[-1]), flush=True)
    return {"threads": torch.get_num_threads(), "cells": cells}


# ------------------------------------------------------------------------------------------------------- the results


def part_name(point: Point) -> str:
    """The name of a point's result. The base point has one name on all axes, so it is measured once."""
    sizes = zip("PGLCV", asdict(point).values(), strict=True)
    return " ".join(f"{letter}{size}" for letter, size in sizes)


def points_of(axis: str) -> list[Point]:
    """The points of one axis: the base point with this size changed."""
    return [replace(BASE, **{axis: value}) for value in AXES[axis]]


def slowdown(cell: dict[str, Any]) -> float:
    """Seconds of auto / seconds of the better of never and always; 1 up to noise if the choice was correct."""
    median = {name: cell["seconds"][name]["median"] for name in GRID_WORK}
    return median["auto"] / min(median["never"], median["always"])


def cells_auto_is_right(cells: list[dict[str, Any]], tolerance: float = TOLERANCE) -> tuple[int, int]:
    """The number of cells in which auto is within the tolerance of the better of the two, and the number of cells."""
    return sum(slowdown(cell) <= 1 + tolerance for cell in cells), len(cells)


def bars(parts: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """The bars: there are none, because the results are tables to read."""
    return []


def axis_table(parts: dict[str, Any], axis: str) -> str:
    """A table with one row per value: seconds and GB of each kind of work."""
    fixed = ", ".join(f"{name} {value}" for name, value in asdict(BASE).items() if name != axis)
    lines = [f"{axis} ({fixed})", " " * 17 + "".join(f"{title:>19}" for title in AXES_WORK.values())]
    lines += [f"{axis:>17}" + "         s       GB" * len(AXES_WORK)]
    for value, point in zip(AXES[axis], points_of(axis), strict=True):
        rows = [parts[part_name(point)]["work"][name] for name in AXES_WORK]
        lines.append(f"{value:>17}" + "".join(f"  {row['median']:>8.3f}  {row['memory_gb']:>7.3f}" for row in rows))
    return "\n".join(lines)


GRID_HEADER = "  prompt  completion  group    never s  always s    auto s  auto / better"


def grid_row(cell: dict[str, Any]) -> str:
    """The text of one cell."""
    point, seconds = cell["point"], [cell["seconds"][name]["median"] for name in GRID_WORK]
    never, always, auto = (f"{median:>8.4f}" for median in seconds)
    return (
        f"  {point['prompt_length']:>6}  {point['completion_length']:>10}  {point['group_size']:>5}   {never}  {always}"
        f"  {auto}  {slowdown(cell):>13.2f}"
    )


def grid_table(cells: list[dict[str, Any]]) -> str:
    """A table with one row per cell, which shows whether the rule was correct."""
    right, total = cells_auto_is_right(cells)
    verdict = f"auto is within {TOLERANCE:.0%} of the better of never and always on {right} of {total} cells"
    return "\n".join([GRID_HEADER, *map(grid_row, cells), verdict])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("axes", "grid"), default=["axes", "grid"])
    parser.add_argument("--child", type=json.loads, metavar="JSON", help="one measurement of memory; for the script")
    arguments = parser.parse_args()
    if arguments.child:
        name, point = arguments.child
        print(json.dumps(child(name, Point(**point))))
        return

    results = Results(__file__, data=[Path(sampler.__file__)])  # has the models and prompts
    if "axes" in arguments.parts:
        for axis in AXES:
            for point in points_of(axis):
                if not results.has(part_name(point)):
                    results.save(part_name(point), measure_point(point, AXES_REPEATS))
                    print(f"{part_name(point)}: measured", flush=True)
        for axis in AXES:
            print(f"\n{axis_table(results.parts, axis)}")
    if "grid" in arguments.parts:
        if not results.has("grid"):
            print(f"\n{GRID_HEADER}")
            results.save("grid", measure_grid(GRID, GRID_TOKENS))
        print(f"\n{grid_table(results.parts['grid']['cells'])}")


if __name__ == "__main__":
    main()
