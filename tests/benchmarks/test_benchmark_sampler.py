"""Both samplers do the same work: the same prompts, the same law of lengths, the whole distribution."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sampler
from benchmarks.common import Results
from benchmarks.sampler import (
    EOS_ID,
    LARGE,
    PAD_ID,
    SAMPLERS,
    TINY,
    Case,
    Size,
    bars,
    make_tokenizer,
    measure,
    random_llama,
    random_prompts,
    ratio,
    set_stop_probability,
    stop_probability,
)

EQUAL = Case(TINY, num_prompts=3, group_size=4, prompt_lengths=(2, 7), max_completion_length=6, repeats=2, bar=1.0)
RAGGED = replace(EQUAL, num_prompts=8, group_size=128, max_completion_length=16, mean_length=4)


def draw(name: str, case: Case, probability: float, seed: int = 0) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Ids and mask of one call, and the (rows, columns) that were fed to the model, call by call."""
    model = random_llama(case.size)
    set_stop_probability(model, probability)
    fed: list[tuple[int, int]] = []

    def note(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        fed.append(tuple(arguments["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    prompts = random_prompts(case.num_prompts, case.prompt_lengths, case.size.vocab_size)
    return *SAMPLERS[name](model, make_tokenizer(case.size.vocab_size), prompts, case, seed), fed


def test_what_never_stops_runs_to_the_maximum_in_both_and_is_cached_in_both() -> None:
    masks, fed = {}, {}
    for name in SAMPLERS:
        ids, masks[name], fed[name] = draw(name, EQUAL, 0.0)
        assert ids.shape == masks[name].shape == (12, 6)
        assert masks[name].all()
    assert fed["ours"] == [(3, 7)] + [(12, 1)] * 5
    assert fed["generate"] == [(12, 7)] + [(12, 1)] * 5  # it has no shared prefill: what the comparison is about


def test_mean_lengths_agree() -> None:
    p = stop_probability(4, 16)
    for name in SAMPLERS:
        ids, mask, _ = draw(name, RAGGED, p)
        lengths = mask.sum(1)
        assert lengths.float().mean() == pytest.approx(4, rel=0.1)
        assert (lengths == 1).float().mean() == pytest.approx(p, abs=0.05)
        is_last = torch.arange(ids.shape[1]) == lengths.unsqueeze(1) - 1
        ended = lengths < 16
        assert (ids[is_last][ended] == EOS_ID).all()
        assert not (mask & ~is_last & (ids == EOS_ID)).any()


def test_the_mean_would_notice_another_stop_probability() -> None:
    for name in SAMPLERS:
        assert draw(name, RAGGED, 1.5 * stop_probability(4, 16))[1].sum(1).float().mean() < 3.6


def test_each_call_is_another_draw() -> None:
    for name in SAMPLERS:
        ids = [draw(name, EQUAL, 0.0, seed)[0] for seed in (0, 0, 1)]
        assert torch.equal(ids[0], ids[1])
        assert not torch.equal(ids[0], ids[2])


def test_neither_cuts_the_distribution() -> None:
    """generate's own default is the 50 likeliest tokens: less work, and another distribution."""
    case = replace(EQUAL, num_prompts=1, group_size=256, max_completion_length=1)
    for name in SAMPLERS:
        ids, _, _ = draw(name, case, 0.0)
        assert len(ids.unique()) > 100


@pytest.mark.parametrize("wanted", [0.0, 0.06, 0.5])
def test_every_token_stops_with_the_same_probability(wanted: float) -> None:
    model = random_llama(TINY)
    set_stop_probability(model, wanted)
    ids = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probabilities = model(ids).logits.softmax(-1)[..., EOS_ID]
    torch.testing.assert_close(probabilities, torch.full((4, 32), wanted), rtol=0.1, atol=0)


@pytest.mark.parametrize(("mean_length", "max_length"), [(16, 64), (4, 16), (1, 8)])
def test_stop_probability_gives_the_mean(mean_length: float, max_length: int) -> None:
    p = stop_probability(mean_length, max_length)
    mean = sum(t * p * (1 - p) ** (t - 1) for t in range(1, max_length)) + max_length * (1 - p) ** (max_length - 1)
    assert mean == pytest.approx(mean_length)


def test_prompts_are_ragged_and_ours_are_the_same_as_theirs() -> None:
    prompts = random_prompts(4, (16, 32), 512)
    assert [len(prompt) for prompt in prompts] == [32, 27, 21, 16]
    assert not {PAD_ID, EOS_ID} & {token for prompt in prompts for token in prompt}
    batch = make_tokenizer(512).pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [32, 27, 21, 16]
    assert batch["attention_mask"][:, -1].all()


def test_the_tokenizer_says_the_ids() -> None:
    tokenizer = make_tokenizer(512)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (PAD_ID, EOS_ID, 512)
    assert tokenizer.decode([2, 511]).split() == ["2", "511"]


def test_the_large_model_has_as_many_weights_as_the_docstring_says() -> None:
    with torch.device("meta"):
        assert random_llama(LARGE).num_parameters() == pytest.approx(110e6, rel=0.01)


def test_a_measurement() -> None:
    part = measure(replace(EQUAL, mean_length=2))
    assert part["num_weights"] == random_llama(TINY).num_parameters() + 512  # and the bias
    for row in part["samplers"].values():
        assert row["n"] == 2
        assert 0 < row["quartile_low"] <= row["median"] <= row["quartile_high"]
        assert 1 <= row["mean_length"] < 6
        tokens = 12 * row["mean_length"] * 2
        assert row["tokens_per_second"] == pytest.approx(
            tokens / (2 * row["median"])
        )  # the mean of two is their median


def part_with(ours: float, generate: float) -> dict[str, Any]:
    return {"samplers": {"ours": {"median": ours}, "generate": {"median": generate}}}


def test_bars_are_the_asked_ones_and_held_against_the_ratio() -> None:
    parts = {name: part_with(2.0, 3.0) for name in sampler.CASES}  # 1.5 times
    rows = bars(parts)
    assert [bar for _, bar, _, _ in rows] == [">= 1.1", ">= 1.5", ">= 1.1", ">= 1.5", ">= 1.5"]
    assert all(value == 1.5 and met for _, _, value, met in rows)
    parts["large ragged"] = part_with(2.0, 2.9)
    [bad] = [what for what, _, _, met in bars(parts) if not met]
    assert bad.startswith("large ragged")
    assert bars({}) == []
    assert math.isclose(ratio(part_with(1.0, 4.0)), 4.0)


def test_main_measures_what_is_missing_and_prints_every_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Size(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    cases = {"fast": replace(EQUAL, size=small, bar=0.0), "slow": replace(EQUAL, size=small, bar=1e9)}
    monkeypatch.setattr(sampler, "CASES", cases)
    monkeypatch.setattr(sampler, "Results", partial(Results, folder=tmp_path))
    monkeypatch.setattr(sys, "argv", ["sampler", "--cases", "fast"])
    sampler.main()
    assert "NOT met" not in capsys.readouterr().out

    measured = []
    monkeypatch.setattr(sampler, "measure", lambda case: measured.append(case) or measure(case))
    monkeypatch.setattr(sys, "argv", ["sampler"])
    sampler.main()
    assert measured == [cases["slow"]]
    printed = capsys.readouterr().out
    assert printed.count("NOT met") == 1
    assert printed.count("  met") == 1
