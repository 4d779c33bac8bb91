"""LoRA: the base stays, the adapter is what is saved, merged and resumed; the reference is the base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import grpo.run.plots
from grpo.errors import InputError
from grpo.logprobs import compute_logprobs
from grpo.models import merge_lora
from grpo.models.loading import load_policy, make_reference
from grpo.models.lora import ADAPTER_CONFIG, ADAPTER_FILE, adapter_off, add_adapter, has_adapter
from grpo.models.merge_lora import save_merged
from grpo.models.optimizer import make_optimizer
from grpo.models.saving import weights_sha256
from grpo.run.dry_run import num_trained
from grpo.settings.config import load_config
from tests.conftest import patch_loop, ragged_batch
from tests.run import test_train as helpers
from tests.run.test_resume import assert_same_run, interrupted
from tests.run.test_train import read, resume, train

small = helpers.small  # the fixture

LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 5e-2, "kl_coeff": 0.01, "save_every": 1}
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        yield


@pytest.fixture(scope="module")
def trained(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with an adapter, and the merged model; not to be touched."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(small | LORA, folder, num_train_steps=4, save_merged=True)
    return folder


def adapted(architecture: str, make_model: Callable[..., PreTrainedModel], **settings: Any) -> PreTrainedModel:
    model = make_model(architecture)
    defaults: dict[str, Any] = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear", "seed": 0, "base": "x"}
    add_adapter(model, **(defaults | settings))
    return model


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    """As a program that knows nothing of us loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=torch.arange(3, 40).view(1, -1)).logits


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(
    architecture: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    base, model = make_model(architecture), adapted(architecture, make_model)
    ids = torch.arange(3, 20).view(1, -1)
    assert torch.equal(base(input_ids=ids).logits, model(input_ids=ids).logits)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names
    assert all(".lora_" in name for name in names)
    optimized = [weight for group in make_optimizer(model, load_config()).param_groups for weight in group["params"]]
    assert len(optimized) == len(names)
    assert weights_sha256(model) == weights_sha256(base)


@pytest.mark.parametrize("modules", ["all-linear", "q_proj, down_proj", "c_attn", "query_key_value"])
def test_a_dry_run_counts_the_weights_of_the_adapter(
    modules: str, architecture: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    config = load_config(None, ["lora_rank=3", f"lora_target_modules={modules}"])
    counted = num_trained(config, make_model(architecture))
    if counted == 0:  # another architecture's names
        with pytest.raises(InputError):
            adapted(architecture, make_model, target_modules=modules)
        return
    model = adapted(architecture, make_model, rank=3, target_modules=modules)
    assert counted == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_the_random_half_of_an_adapter_is_a_function_of_the_seed_alone(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    def values(seed: int) -> list[Tensor]:
        state = torch.random.get_rng_state()
        model = adapted("llama", make_model, seed=seed)
        weights = [weight.clone() for name, weight in model.named_parameters() if ".lora_A" in name]
        torch.manual_seed(sum(map(len, str(state))))  # whatever was drawn before
        return weights

    assert all(torch.equal(*pair) for pair in zip(values(0), values(0), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(values(0), values(1), strict=True))


def test_the_reference_is_the_base_after_updates_and_no_second_copy(
    architecture: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    base, model = make_model(architecture), adapted(architecture, make_model)
    reference = make_reference(model)
    assert reference is model
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    batch = ragged_batch()
    for _ in range(3):
        compute_logprobs(model, *batch)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        of_base, of_policy = compute_logprobs(base, *batch)[0], compute_logprobs(model, *batch)[0]
        with adapter_off(reference):
            of_reference = compute_logprobs(reference, *batch)[0]
        assert torch.equal(of_reference, of_base)
        assert (of_policy - of_base).abs().max() > 0.1
        assert torch.equal(compute_logprobs(model, *batch)[0], of_policy)  # the adapter is on again
    assert all(weight.requires_grad == (".lora_" in name) for name, weight in model.named_parameters())


def test_the_adapter_is_on_again_after_an_error(make_model: Callable[..., PreTrainedModel]) -> None:
    model = adapted("llama", make_model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += 0.1 * (".lora_B" in name)
    ids = torch.arange(3, 20).view(1, -1)
    before = model(input_ids=ids).logits
    try:
        with adapter_off(model):
            assert not torch.equal(model(input_ids=ids).logits, before)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert torch.equal(model(input_ids=ids).logits, before)


def test_without_an_adapter_the_reference_is_a_copy(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    reference = make_reference(model)
    assert reference is not model
    with adapter_off(reference):
        assert not has_adapter(reference)


def test_a_target_that_fits_no_layer_is_named(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(InputError, match=r"lora_target_modules: got q_porj, which fits no layer of LlamaForCausalLM"):
        adapted("llama", make_model, target_modules="q_porj")
    model = adapted("llama", make_model, target_modules="q_proj, v_proj")
    names = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_" in name}
    assert names == {"q_proj", "v_proj"}
    names = {name.split(".")[-4] for name, _ in adapted("llama", make_model).named_parameters() if ".lora_" in name}
    assert names == LAYERS


def test_a_missing_peft_is_named_with_its_install_command(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"lora_rank: LoRA adapters need the package peft: pip install peft"):
        adapted("llama", make_model)


# Runs


def test_kl_is_exactly_0_at_step_1_and_grows(trained: Path) -> None:
    kl = [row["kl"] for row in read(trained / "metrics.jsonl")[1:]]
    assert kl[0] == 0
    assert kl[-1] > 1e-3


def test_checkpoints_best_and_final_hold_the_adapter_alone(trained: Path) -> None:
    for folder in (trained / "step-000004", trained / "best", trained / "final"):
        names = {path.name for path in folder.iterdir()}
        assert {ADAPTER_FILE, ADAPTER_CONFIG, "tokenizer.json"} <= names
        assert not {"model.safetensors", "config.json"} & names
        assert all(".lora_" in name for name in load_file(folder / ADAPTER_FILE))
        AutoTokenizer.from_pretrained(folder)
    base = json.loads((trained / "final" / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute()


def test_final_and_final_merged_are_the_same_model(trained: Path, small: dict[str, Any]) -> None:
    merged, adapter, base = logits_of(trained / "final-merged"), logits_of(trained / "final"), small["model_name"]
    assert (merged - adapter).abs().max() <= 1e-5
    assert (merged - logits_of(base)).abs().max() > 0.1
    names = {path.name for path in (trained / "final-merged").iterdir()}
    assert "model.safetensors" in names
    assert not {ADAPTER_FILE, ADAPTER_CONFIG} & names


def test_adapter_and_merged_weights_in_one_folder_are_applied_twice(trained: Path, tmp_path: Path) -> None:
    """Why final-merged/ is a folder of its own: this is what transformers makes of both."""
    both = tmp_path / "both"
    shutil.copytree(trained / "final-merged", both)
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        shutil.copy(trained / "final" / name, both)
    assert (logits_of(both) - logits_of(trained / "final-merged")).abs().max() > 0.01
    with pytest.raises(InputError, match=r"both holds no adapter \(adapter_config\.json\), or a whole model beside it"):
        save_merged(both, tmp_path / "out")


def test_weights_that_were_merged_are_trained(trained: Path) -> None:
    policy, _ = load_policy(str(trained / "final"), base_seed=0, device=torch.device("cpu"))
    assert all(weight.requires_grad for weight in policy.parameters())


def test_the_base_is_left_as_it_was(trained: Path, small: dict[str, Any]) -> None:
    policy, _ = load_policy(small["model_name"], base_seed=0, device=torch.device("cpu"))
    assert json.loads((trained / "run.json").read_text())["base_sha256"] == weights_sha256(policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merge_command(
    dtype: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (trained / "final").iterdir()}
    monkeypatch.setattr("sys.argv", ["x", str(trained / "final"), str(tmp_path / "out"), "--dtype", dtype])
    merge_lora.main()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    # Added up in float32 and rounded once: the bfloat16 file is the float32 file rounded.
    for name, exact in load_file(trained / "final-merged" / "model.safetensors").items():
        assert torch.equal(weights[name], exact.to(weights[name].dtype)), name
    assert before == {path: path.read_bytes() for path in (trained / "final").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        merge_lora.main()
    assert stopped.value.code == 2
    assert "OUT: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(trained: Path, tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "again")
    resume(folder)
    assert_same_run(trained, folder)
    assert (folder / "final-merged" / "model.safetensors").read_bytes() == (
        trained / "final-merged" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_an_adapter_as_the_model_to_start_from(
    rank: int, trained: Path, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into its base: that is the policy and the reference, and what the next adapter names as its base."""
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "cache"))
    settings = small | LORA | {"model_name": trained / "final", "lora_rank": rank}
    rows = train(settings, tmp_path / "second")
    assert rows[1]["kl"] == 0
    start, first = logits_of(trained / "final-merged"), logits_of(tmp_path / "second" / "final")
    assert (first - start).abs().max() > 1e-3
    if rank:
        base = json.loads((tmp_path / "second" / "final" / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        assert (logits_of(Path(base)) - start).abs().max() <= 1e-5
        # What the run's own evaluation saw is what anybody gets who loads the adapter.
        loaded, _ = load_policy(str(tmp_path / "second" / "final"), base_seed=0, device=torch.device("cpu"))
        ids = torch.arange(3, 40).view(1, -1)
        assert (loaded(input_ids=ids).logits - first).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_update_every": 2}, r"ref_update_every: 2 does not work with lora_rank 4, .* Use 0"),
        ({"lora_rank": 0, "save_merged": True}, r"save_merged: true needs a LoRA adapter, but lora_rank is 0"),
        ({"lora_rank": 0, "quantization": "4bit"}, r'quantization: "4bit" needs a LoRA adapter, but lora_rank is 0'),
    ],
)
def test_contradictions_name_both_keys(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, [f"{key}={value}" for key, value in (LORA | changes).items()])


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_needs_cuda(quantization: str, small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"quantization: got {quantization} on cpu, allowed there: none"):
        train(small | LORA, tmp_path / "run", quantization=quantization)
    assert not (tmp_path / "run").exists()


def test_a_damaged_adapter_folder_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "final", tmp_path / "x")
    (tmp_path / "x" / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json: does not name the base model"):
        load_policy(str(tmp_path / "x"), base_seed=0, device=torch.device("cpu"))


def test_the_loop_scores_the_reference_with_the_adapter_off(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a reference that is the policy itself, whose KL is 0 for ever."""
    from contextlib import nullcontext

    patch_loop(monkeypatch, "adapter_off", nullcontext)
    rows = train(small | LORA, tmp_path / "run", num_train_steps=3)
    assert rows[-1]["kl"] == 0


# What the base of an adapter is


def test_a_head_that_is_tied_to_the_embedding_gets_no_adapter_of_its_own(small: dict[str, Any], tmp_path: Path) -> None:
    """Merged, it would change the embedding as well: another model than the one that was trained."""
    for name in ("lm_head", "embed_tokens", "q_proj,lm_head"):
        with pytest.raises(InputError, match=r"lora_target_modules: got (lm_head|embed_tokens), which fits no layer"):
            train(small | LORA, tmp_path / "run", lora_target_modules=name)
    assert not (tmp_path / "run").exists()


def test_an_untied_head_may_have_one(make_model: Callable[..., PreTrainedModel]) -> None:
    model = adapted("llama", make_model, target_modules="lm_head")
    assert any("lm_head" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_of_several_targets_each_must_fit(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(InputError, match=r"lora_target_modules: got foo, which fits no layer"):
        adapted("llama", make_model, target_modules="q_proj,foo")


def test_a_base_with_other_weights_is_not_the_base(trained: Path, small: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small["model_name"], base)
    train(small | LORA | {"model_name": base}, tmp_path / "run", num_train_steps=1)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file(weights | {name: weights[name] + 0.01}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"final: its base, .*base, no longer has the weights that it was trained on"):
        save_merged(tmp_path / "run" / "final", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_within_the_runs_own_folder_is_refused(trained: Path, small: dict[str, Any]) -> None:
    """It would be moved aside with the earlier run, and the new adapter would name itself as its base."""
    with pytest.raises(InputError, match=r"model_name: .*final lies in output_dir, which this run needs for itself"):
        train(small | LORA | {"model_name": trained / "final"}, trained)
    assert (trained / "final" / ADAPTER_FILE).is_file()


def test_an_adapter_is_not_merged_into_quantized_weights(trained: Path) -> None:
    with pytest.raises(InputError, match=r"quantization: got 4bit with an adapter as the model, allowed there: none"):
        load_policy(str(trained / "final"), base_seed=0, device=torch.device("cuda"), quantization="4bit")
