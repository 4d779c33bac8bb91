"""benchmarks/gpu.py on a CPU: everything but CUDA itself."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.common import Results
from benchmarks.gpu import (
    MEASURES,
    SHAPES,
    Shape,
    accumulate,
    bars,
    build_model,
    child,
    describe,
    forward_flops,
    generate,
    main,
    make_tokenizer,
    sample,
    scorers,
    summary,
)

CPU, TINY = torch.device("cpu"), SHAPES["tiny"]
FULL = SHAPES["full"]


@pytest.mark.parametrize("part", MEASURES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_part_runs(part: str) -> None:
    result = child(part, "tiny", CPU)
    num_tokens = TINY.num_rows * (TINY.completion_length + (0 if part.startswith("sampling") else TINY.prompt_length))
    repeats = gpu.REPEATS["trl" if part == "trl-step" else part.split("-")[0]]
    assert result["times"]["n"] == repeats
    assert result["tokens_per_second"] * result["times"]["median"] == pytest.approx(num_tokens)
    assert result["teraflop"] > 0
    assert result.keys() == {"times", "tokens_per_second", "teraflop"}  # memory and MFU are a GPU's


def test_the_full_shape_is_qwens() -> None:
    with torch.device("meta"):
        model = build_model(FULL, torch.device("meta"))
    assert sum(weight.numel() for weight in model.parameters()) == 494_032_768  # as its model card's 0.49 B
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert FULL.num_rows % FULL.micro_batch_size == 0
    assert FULL.micro_batch_size % FULL.group_size == 0


def test_every_scorer_gives_the_same_gradient() -> None:
    gradients = []
    for scorer in scorers(TINY).values():
        model = build_model(TINY, CPU)
        accumulate(model, scorer, TINY, CPU)
        gradients.append([weight.grad for weight in model.parameters()])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, rtol=1e-4, atol=1e-6)
    assert gradients[0][0] is not None
    assert gradients[0][0].abs().max() > 1e-3


def test_both_samplers_continue_every_prompt_to_the_full_length() -> None:
    model = build_model(TINY, CPU)
    for sampler in (partial(sample, model, make_tokenizer(TINY), TINY, CPU), partial(generate, model, TINY, CPU)):
        ids = sampler()
        assert ids.shape == (TINY.num_rows, TINY.completion_length)
        assert len(ids.unique(dim=0)) == TINY.num_rows  # the siblings differ


@pytest.mark.parametrize("part", ["update-always", "update-never"])
def test_flops_are_those_that_torch_counts(part: str) -> None:
    """Up to attention, which torch counts whole though half of it is masked, and which is little here."""
    shape = Shape(512, 64, 128, 2, 2, 1, 2, 4, prompt_length=6, completion_length=5, micro_batch_size=8)
    model = build_model(shape, CPU)
    score = partial(scorers(shape)[part], model, *gpu.random_rollout(shape, CPU))
    score()  # the first call may find out what the model can do
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        score()
    ours = forward_flops(model, shape, is_shared=part == "update-always")
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_by_hand() -> None:
    """2 groups of 3 with 2 prompt and 2 completion tokens: 4 or 12 prompt tokens and 12 completion tokens."""
    shape = Shape(10, 4, 8, 1, 2, 1, num_prompts=2, group_size=3, prompt_length=2, completion_length=2)
    model = build_model(shape, CPU)
    body = sum(weight.numel() for weight in model.parameters()) - 40
    completion_pairs = 6 * (3 + 4)  # the third token sees three, the fourth four
    assert forward_flops(model, shape, is_shared=True) == 2 * body * 16 + 2 * 40 * 12 + 16 * (2 * 3 + completion_pairs)
    assert forward_flops(model, shape, is_shared=False) == 2 * body * 24 + 2 * 40 * 12 + 16 * (6 * 3 + completion_pairs)


def test_mfu_only_for_a_device_with_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mfu" not in summary([1.0], 1, 1e12, CPU)
    monkeypatch.setattr(gpu, "device_name", lambda _: "NVIDIA L4")
    assert summary([1.0, 2.0, 4.0], 10, 121e12, CPU)["mfu"] == 0.5
    assert summary([1.0, 2.0, 4.0], 10, 121e12, CPU)["tokens_per_second"] == 5
    monkeypatch.setattr(gpu, "device_name", lambda _: "NVIDIA L40S")  # another device, whatever its name begins with
    assert "mfu" not in summary([1.0], 1, 1e12, CPU)


def part(seconds: float, **values: Any) -> dict[str, Any]:
    return {"times": {"median": seconds}, **values}


def test_bars_compare_what_was_measured() -> None:
    parts = {
        "sampling": part(4.0),
        "sampling-generate": part(5.0),
        "update-always": part(1.0),
        "update-never": part(2.0, device_memory_gb=6.0),
        "update-full_logits": part(3.0, device_memory_gb=24.0),
        "trl-step": part(4.0),
    }
    assert [(value, is_met) for _, _, value, is_met in bars(parts)] == [
        (0.8, True),
        (0.5, True),
        (0.25, True),
        (1.25, False),
    ]
    parts["update-full_logits"] = {"out_of_memory": True}
    del parts["trl-step"]
    assert [value for _, _, value, _ in bars(parts)] == [0.8, 0.5]
    assert "out of memory" in describe("update-full_logits", parts["update-full_logits"])


def test_without_cuda_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch finds none here\n"


def test_memory_that_runs_out_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(gpu.MEASURES, "sampling", run_out)
    assert child("sampling", "tiny", CPU) == {"out_of_memory": True}


@pytest.mark.slow
def test_the_script_keeps_each_part_in_its_devices_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--device", "cpu", "--tiny", "--results", str(tmp_path), "--parts", "update-full_logits"]
    main(command)  # one real process
    content = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    assert content["parts"]["update-full_logits"]["device"] == "cpu"
    assert content["parts"]["update-full_logits"]["times"]["n"] == gpu.REPEATS["update"]
    assert "update-full_logits: " in capsys.readouterr().out

    monkeypatch.setattr(gpu, "in_fresh_process", lambda *_: pytest.fail("measured twice"))
    main(command)
    monkeypatch.setattr(gpu, "device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert isinstance(results := gpu.open_results(tmp_path, "full", CPU), Results)
    assert (results.path.name, results.parts) == ("gpu-a100-sxm4-80gb.json", {})
