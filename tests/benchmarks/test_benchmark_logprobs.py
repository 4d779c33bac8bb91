"""benchmarks/logprobs.py: the same work on both sides, and numbers that mean what the bars say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import logprobs
from benchmarks.common import Results
from benchmarks.logprobs import (
    VARIANTS,
    Sizes,
    bars,
    build_model,
    extrapolate,
    measure_memory,
    measure_time,
    needed_gb,
    random_rows,
    run,
)

TINY = Sizes(97, 16, 32, num_heads=2, num_key_value_heads=1, prompt_length=3, completion_length=8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_variants_give_the_same_log_probs_entropies_and_gradients(temperature: float) -> None:
    prompt_ids, prompt_mask, ids, mask = random_rows(32, TINY)
    prompt_mask[0, :2] = False
    mask[1, 5:] = False
    outcomes = []
    for scorer in VARIANTS.values():
        model = build_model(TINY)
        logps, entropies = scorer(model, prompt_ids, prompt_mask, ids, mask, temperature=temperature)
        (logps * torch.arange(1.0, logps.numel() + 1).view_as(logps)).sum().backward()
        gradients = [weight.grad for weight in model.parameters()]
        outcomes.append([logps.detach(), entropies, *gradients])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    assert outcomes[0][0][mask].lt(-1).all()
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in outcomes[0][2:])


def test_rows_hold_the_tokens_they_are_named_for() -> None:
    rows = random_rows(32, TINY)
    assert [tuple(x.shape) for x in rows] == [(4, 3), (4, 3), (4, 8), (4, 8)]
    assert rows[3].sum() == 32
    with pytest.raises(AssertionError, match="whole rows"):
        random_rows(33, TINY)


def test_the_defaults_are_qwens_head() -> None:
    with torch.device("meta"):
        model = build_model(Sizes())
    assert model.lm_head.weight.shape == (151_936, 896)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(model.model.layers) == 1


def test_time_is_measured_only_if_both_did_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = measure_time(16, 2, TINY)
    assert seconds.keys() == VARIANTS.keys()
    assert all(times["n"] == 2 and times["median"] > 0 for times in seconds.values())
    idle = {**VARIANTS, "chunked": lambda model, *rows: VARIANTS["full_logits"](model, *rows, temperature=2.0)}
    monkeypatch.setattr(logprobs, "VARIANTS", idle)
    with pytest.raises(AssertionError, match="not close"):
        measure_time(16, 1, TINY)


@pytest.mark.slow
def test_memory_is_that_of_the_work_alone() -> None:
    """A parent that once held a gigabyte, a model whose building takes twice its size: neither is in the number."""
    ballast = torch.ones(250_000_000)
    del ballast
    sizes = Sizes(60_000, 128, 64, num_heads=2, num_key_value_heads=1, prompt_length=2, completion_length=16)
    result = measure_memory("full_logits", 128, sizes)
    logits_gb = 128 * 60_000 * 4 / 1e9  # 0.03; the model is as large again, and so is its gradient
    assert 3 * logits_gb < result["net_gb"] < 12 * logits_gb
    assert result["peak_gb"] == pytest.approx(result["model_gb"] + result["net_gb"])
    assert 0.1 < result["model_gb"] < 0.9
    assert result["work_seconds"] > 0


def made_up(net_gb: dict[str, list[float]]) -> dict[str, Any]:
    """Memory parts of 1,024, 4,096, 8,192 tokens, as many as are given; a model of 1 GB; 10 seconds a GB."""
    return {
        f"memory-{variant}-{tokens}": {"model_gb": 1.0, "peak_gb": 1 + net, "net_gb": net, "work_seconds": 10 * net}
        for variant, nets in net_gb.items()
        for tokens, net in zip(logprobs.MEMORY_TOKENS, nets, strict=False)
    }


def test_bars_compare_chunked_to_full_logits_at_4096_tokens() -> None:
    parts = made_up({"chunked": [1.0, 2.0, 3.0], "full_logits": [4.0, 10.0]})
    parts["time-4096"] = {"chunked": {"median": 14.0}, "full_logits": {"median": 10.0}}
    (_, memory_bar, memory, memory_met), (_, time_bar, time, time_met) = bars(parts)
    assert (memory_bar, memory, memory_met) == ("<= 0.25", 0.2, True)
    assert (time_bar, time, time_met) == ("<= 1.3", 1.4, False)
    parts["memory-chunked-4096"]["net_gb"], parts["time-4096"]["chunked"]["median"] = 2.6, 12.9
    assert [is_met for *_, is_met in bars(parts)] == [False, True]
    assert bars({}) == []


def test_what_is_computed_lies_on_the_line_through_the_two_largest() -> None:
    parts = made_up({"chunked": [99.0, 2.0, 3.0], "full_logits": [4.0, 10.0]})
    assert extrapolate(parts, "chunked", 16_384) == {
        "computed_from": [4096, 8192],
        "net_gb": 5.0,
        "peak_gb": 6.0,
        "work_seconds": 50.0,
    }
    assert extrapolate(parts, "full_logits", 16_384)["computed_from"] == [1024, 4096]
    assert extrapolate(parts, "full_logits", 16_384)["net_gb"] == pytest.approx(34.0)
    assert needed_gb(parts, "full_logits", 8192) == 21.0
    assert needed_gb({}, "full_logits", 1024) == 0.0


@pytest.mark.slow
def test_what_does_not_fit_is_not_run_and_what_is_measured_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = {"chunked": 0.5, "full_logits": 3.0}  # GB a thousand tokens
    calls: list[tuple[str, int]] = []

    def fake_memory(variant: str, num_tokens: int, sizes: Sizes) -> dict[str, Any]:
        calls.append((variant, num_tokens))
        net = nets[variant] * num_tokens / 1024
        return {"model_gb": 1.0, "peak_gb": 1 + net, "net_gb": net, "work_seconds": 1.0}

    def fake_time(num_tokens: int, repeats: int, sizes: Sizes) -> dict[str, Any]:
        calls.append(("time", num_tokens))
        return {variant: {"median": 1.0} for variant in VARIANTS}

    monkeypatch.setattr(logprobs, "measure_memory", fake_memory)
    monkeypatch.setattr(logprobs, "measure_time", fake_time)
    monkeypatch.setattr(logprobs, "available_memory_gb", lambda: 24.0)
    run(Results(logprobs.__file__, folder=tmp_path), TINY)
    assert sorted(calls) == sorted(
        [
            ("time", 1024),
            ("time", 4096),
            ("full_logits", 1024),
            ("full_logits", 4096),
            ("chunked", 1024),
            ("chunked", 4096),
            ("chunked", 8192),
        ]
    )
    results = Results(logprobs.__file__, folder=tmp_path)
    assert results.parts["memory-full_logits-8192"].items() >= {"does_not_fit": True, "needed_gb": 25.0}.items()
    assert results.parts["memory-full_logits-16384"]["net_gb"] == 48.0
    assert [is_met for *_, is_met in bars(results.parts)] == [True, True]
    assert "memory-full_logits-8192: does not fit, 25.0 GB of 24.0 GB" in capsys.readouterr().out
    calls.clear()
    run(results, TINY)
    assert calls == []
