"""Loading, the frozen reference, the optimizer and its schedule."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.data import Dataset
from grpo.errors import InputError, RunError
from grpo.models.device import check_compile, choose_device, compile_trunks, make_autocast, uncompiled
from grpo.models.loading import check_lengths, check_positions, disable_dropout, frozen_copy, load_policy
from grpo.models.optimizer import learning_rate_at, make_optimizer
from grpo.models.saving import save_model
from grpo.models.tiny import build_model, train_tokenizer
from grpo.settings.config import load_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 1 + 2?"])


def rates(schedule_name: str, *, steps: int, warmup: int, iterations: int = 1, minibatches: int = 1) -> list[float]:
    """The learning rate of every optimizer step, and the one after the last."""
    config = load_config(
        None,
        [
            f"num_train_steps={steps}",
            f"warmup_steps={warmup}",
            f"lr_schedule={schedule_name}",
            f"num_iterations={iterations}",
            f"num_minibatches={minibatches}",
            "learning_rate=1.0",
        ],
    )
    return [learning_rate_at(config, num_updates) for num_updates in range(steps * iterations * minibatches + 1)]


def test_schedules_by_hand() -> None:
    assert rates("cosine", steps=4, warmup=0) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0], abs=1e-7)
    assert rates("linear", steps=4, warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates("constant", steps=3, warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates("cosine", steps=4, warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])


def test_the_schedule_counts_optimizer_steps_not_rollouts() -> None:
    found = rates("linear", steps=2, warmup=0, iterations=2, minibatches=2)
    assert found == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


def test_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    assert max(rates("cosine", steps=3, warmup=10)) < 0.5


def test_biases_and_norms_do_not_decay(tokenizer) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = make_optimizer(model, load_config(None, ["weight_decay=0.1"]))
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert [decay[id(weight)] for weight in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_the_tokenizer_and_the_special_tokens_are_saved_and_loaded(tokenizer, tmp_path: Path) -> None:
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model")
    loaded, loaded_tokenizer = load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id


def test_dropout_is_off_in_modules_and_in_plain_floats(tokenizer) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.arange(20).unsqueeze(0)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attention_dropout == 0.0
    wrapped = torch.nn.Dropout(0.3)
    model.extra = wrapped
    disable_dropout(model)
    assert wrapped.p == 0.0


def test_the_reference_is_a_frozen_copy(tokenizer) -> None:
    policy = build_model(tokenizer, 0).train()
    reference = frozen_copy(policy)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert all(weight.requires_grad for weight in policy.parameters())
    assert not reference.training
    assert policy.training
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert not torch.equal(next(policy.parameters()), next(reference.parameters()))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no configuration (config.json)"),
        ("model.safetensors", "has no weights (*.safetensors)"),
        ("tokenizer*", "has no tokenizer (tokenizer.json)"),
        ("*", "has no configuration (config.json)"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_lacks(tokenizer, tmp_path: Path, missing: str, message: str) -> None:
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model")
    for path in (tmp_path / "model").glob(missing):
        path.unlink()
    with pytest.raises(InputError, match=re.escape(message)):
        load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)


def test_a_folder_that_does_not_exist_is_named() -> None:
    for name in ("/nowhere/at/all", "./model", "a/b/c", "", "~/nowhere"):
        with pytest.raises(InputError, match=re.escape(f"model_name: there is no folder {name!r}")):
            load_policy(name, base_seed=0, device=CPU)


def test_a_hub_name_without_network_names_the_offline_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"'some/model' here.*Hub cannot be reached; tiny, the default model, needs no network"
    ) as raised:
        load_policy("some/model", base_seed=0, device=CPU)
    assert "\n" not in str(raised.value)


def test_a_name_that_is_no_model_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise HFValidationError("Repo id must be …")

    monkeypatch.setattr(huggingface_hub, "model_info", unknown)
    with pytest.raises(InputError, match="no folder 'some--model' here, and it is no public model"):
        load_policy("some--model", base_seed=0, device=CPU)


def test_a_tokenizer_without_eos_is_refused(tokenizer, tmp_path: Path) -> None:
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no eos token: no completion could ever end"):
        load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)


def test_completions_must_fit_the_models_positions(tokenizer) -> None:
    """A GPT-2 would fail with an index error in the middle of the run."""
    ids = tokenizer("1 + 1")["input_ids"]
    dataset, model = Dataset("data", [("line 1", {"prompt": "1 + 1", "prompt_ids": ids})]), build_model(tokenizer, 0)
    check_lengths(dataset, model, load_config(None, [f"max_completion_length={256 - len(ids)}"]))
    with pytest.raises(InputError, match=r"max_completion_length: got 256.*exceeds the 256 positions"):
        check_lengths(dataset, model, load_config(None, ["max_completion_length=256"]))


def test_the_last_position_may_be_used_and_the_one_after_it_not(llama: PreTrainedModel) -> None:
    def complaint(max_completion_length: int) -> str | None:
        try:
            check_positions(llama, 60, max_completion_length, what="a prompt")
        except InputError as error:
            return str(error)
        return None

    assert llama.config.max_position_embeddings == 64
    assert complaint(4) is None
    assert complaint(5) == (
        "max_completion_length: got 5; with a prompt (60 tokens) that exceeds the 64 positions of the model"
    )


def test_damaged_weights_are_named(tokenizer, tmp_path: Path) -> None:
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model_name: '.*model' cannot be loaded: .*header"):
        load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)


def test_devices_and_dtypes() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device: got cuda"):
            choose_device("cuda")
    a = torch.ones(2, 2)
    for dtype, expected in [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]:
        with make_autocast(dtype, CPU)():
            assert (a @ a).dtype == expected


def test_compile_is_for_cuda() -> None:
    for kind in ("cpu", "mps"):
        check_compile(load_config(), torch.device(kind))
        with pytest.raises(InputError, match=f"^compile: got true on {kind}, allowed there: false"):
            check_compile(load_config(None, ["compile=true"]), torch.device(kind))
    check_compile(load_config(None, ["compile=true"]), torch.device("cuda"))


@pytest.mark.slow
def test_compiled_trunks_keep_their_names_and_run_plainly_where_asked(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that only counts how often what it made is run."""
    names, ids, num_runs = list(llama.state_dict()), torch.tensor([[3, 4, 5]]), 0
    expected = llama(ids, use_cache=False).logits

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            nonlocal num_runs
            num_runs += 1
            return graph(*inputs)

        return run

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **settings: compile_module(module, backend=counting, **settings)
    )
    compile_trunks(llama, None)
    with uncompiled():
        assert torch.equal(llama(ids, use_cache=False).logits, expected)
    assert num_runs == 0
    torch.testing.assert_close(llama(ids, use_cache=False).logits, expected)
    assert num_runs > 0
    assert list(llama.state_dict()) == names


def test_a_model_folder_appears_whole_or_not_at_all(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tokenizer, 0)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(RunError, match="model cannot be written: No space left"):
        save_model(model, tokenizer, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_where_another_process_was_faster_its_folder_stays(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "marker").write_text("theirs")
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "marker").read_text() == "theirs"


def test_a_published_generation_config_cannot_cost_the_finished_run(tokenizer, tmp_path: Path) -> None:
    """Sampling settings without do_sample fail transformers' check on saving; a trained model must always be saved."""
    save_model(build_model(tokenizer, 0), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(
        '{"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 7]}'
    )
    model, loaded = load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)
    save_model(model, loaded, tmp_path / "final")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config
    assert saved.eos_token_id == [1, 7]
    assert saved.pad_token_id == tokenizer.pad_token_id


def test_a_pad_token_without_an_embedding_is_replaced(tokenizer, tmp_path: Path) -> None:
    """A <pad> added to the tokenizer of a model that was not resized: common with Llama 2."""
    model = build_model(tokenizer, 0)
    padded = train_tokenizer(["What is 1 + 2?"])
    padded.add_special_tokens({"pad_token": "<added>"})
    assert padded.pad_token_id == len(tokenizer)
    save_model(model, padded, tmp_path / "model")
    loaded, loaded_tokenizer = load_policy(str(tmp_path / "model"), base_seed=0, device=CPU)
    assert loaded_tokenizer.pad_token_id == loaded_tokenizer.eos_token_id
    assert loaded.generation_config.pad_token_id == tokenizer.eos_token_id


def test_emulated_bfloat16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation  # a T4: emulated only

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    make_autocast("auto", torch.device("cuda"))
    assert asked == [False]
