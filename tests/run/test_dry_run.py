"""--dry_run and --preflight: the numbers by hand, and nothing written."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.datasets.mixture import load_train_set
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError
from grpo.models.loading import load_skeleton
from grpo.run.dry_run import describe, estimate_memory
from grpo.settings.config import Config, load_config
from tests.conftest import later_slow
from tests.run import test_train as helpers

small = helpers.small  # the fixture


def said_of(config: Config) -> str:
    skeleton, tokenizer = load_skeleton(config.model_name)
    return describe(config, skeleton, tokenizer, load_train_set(config, tokenizer))


def described(*overrides: str) -> dict[str, str]:
    """The lines of the tiny model's text: what stands to the left -> what to the right, further lines joined."""
    config = load_config(None, overrides)
    text = said_of(config)
    lines: dict[str, str] = {}
    for line in text.split("\n"):
        name = line[:13].strip() or list(lines)[-1]
        lines[name] = f"{lines[name]} {line[13:]}" if name in lines else line[13:]
    return lines


def longest_prompt() -> int:
    tokenizer = load_skeleton("tiny")[1]
    return max(len(tokenizer(sample["prompt"])["input_ids"]) for sample in JSONLinesDataset(load_config().train_file))


def test_the_default_run_by_hand() -> None:
    lines = described()
    length = longest_prompt() + 28
    tokens = 256 * length
    assert lines["a step"] == (
        f"16 prompts x 16 completions = 256 completions, at most {tokens:,} tokens "
        "1 optimizer step, in micro-batches of at most 256 completions"
    )
    assert lines["the run"] == (f"150 steps = 38,400 completions, 150 optimizer steps, at most {150 * tokens:,} tokens")
    assert lines["the model"] == "tiny: LlamaForCausalLM, 150,016 weights"


def test_a_weight_count_by_hand() -> None:
    """Tied embeddings, and 2 layers of four 64 x 64 and three 64 x 256 matrices, norms of 64 each."""
    model, tokenizer = load_skeleton("tiny")
    assert 64 * len(tokenizer) + 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 64 == 150_016
    assert model.num_parameters() == 150_016


def test_updates_and_micro_batches_by_hand() -> None:
    lines = described(
        "batch_size=6", "group_size=10", "num_minibatches=3", "num_iterations=2", "num_train_steps=7",
        "micro_batch_size=128",
    )  # fmt: skip
    assert "6 prompts x 10 completions = 60 completions" in lines["a step"]
    assert "6 optimizer steps, in micro-batches of at most 20 completions" in lines["a step"]
    assert "7 steps = 420 completions, 42 optimizer steps" in lines["the run"]
    assert "at most 8 completions" in described("micro_batch_size=8")["a step"]


@pytest.mark.parametrize(
    ("override", "parts"),
    later_slow(
        [
            (
                "algorithm=grpo",
                ["grpo: baseline group, scale group", "surrogate clipped", "0.2", "KL 0.005 in the loss"],
            ),
            (
                "algorithm=rloo",
                ["rloo: baseline leave_one_out, scale none", "reinforce", "KL 0.005 in the reward (k1)"],
            ),
            ("algorithm=gspo", ["gspo: baseline group", "surrogate gspo", "0.0003", "0.0004", "aggregation sequence"]),
            ("surrogate=cispo", ["grpo: baseline group", "surrogate cispo", "clip_range_high 4", "aggregation token"]),
        ],
        1,
    ),
)
def test_the_method_is_said_as_it_was_filled(override: str, parts: list[str]) -> None:
    method = described(override)["the method"]
    assert [part for part in parts if part not in method] == []


def test_dynamic_sampling_is_said() -> None:
    assert "dynamic sampling" not in described()["the run"]
    assert described("algorithm=dapo")["the run"].endswith("up to 4 times as many with dynamic sampling")
    assert described("max_resample_rounds=5")["the run"].endswith("up to 6 times as many with dynamic sampling")


def test_the_rendered_prompt_is_the_first_one_as_the_model_sees_it() -> None:
    _, tokenizer = load_skeleton("tiny")
    prompt = JSONLinesDataset(load_config().train_file)[0]["prompt"]
    ids = tokenizer(prompt)["input_ids"]
    assert described()["a prompt"] == f"{prompt!r} {len(ids)} tokens: {ids}"


def test_memory_by_hand() -> None:
    """With 30 tokens of prompt and 28 of completion, in one micro-batch of 256 completions, or smaller ones."""
    model, tokenizer = load_skeleton("tiny")
    memory = estimate_memory(load_config(), model, 30)
    weights, length = 4 * 150_016, 30 + 28
    activations = 2 * (24 * 64 * length + 2 * 4 * length**2)  # layers * (24 * hidden * tokens + 2 * heads * tokens^2)
    logits = 5 * 256 * 28 * len(tokenizer)  # fewer than the 2**25 of a chunk
    assert memory == {
        "weights": weights,
        "reference": weights,
        "gradients": weights,
        "AdamW": 2 * weights,
        "rollout or update": 4 * (256 * activations + logits),
    }
    assert estimate_memory(load_config(None, ["kl_coeff=0"]), model, 30) == memory | {"reference": 0}
    by_tokens = estimate_memory(load_config(None, ["micro_batch_tokens=5000"]), model, 30)  # 86 of 58 tokens
    assert by_tokens["rollout or update"] == 4 * 86 * (activations + 5 * 28 * len(tokenizer))


def test_memory_of_a_chunked_head_does_not_grow_with_the_vocabulary() -> None:
    model, _ = load_skeleton("tiny")
    model.config.vocab_size = 1_000_000
    memory = estimate_memory(load_config(None, ["batch_size=1", "group_size=2", "micro_batch_size=2"]), model, 30)
    activations = 2 * 2 * (24 * 64 * 58 + 2 * 4 * 58**2)
    assert memory["rollout or update"] == 4 * (activations + 5 * 2**25)


def test_the_cache_of_the_rollout_counts_where_it_is_the_larger_part() -> None:
    model, tokenizer = load_skeleton("tiny")
    config = load_config(None, ["micro_batch_size=1"])
    # keys and values of 2 layers, 4 heads of 16 each, for 58 tokens of 256 completions; four rows of the vocabulary
    expected = 4 * 256 * (58 * 2 * 2 * 4 * 16 + 4 * len(tokenizer))
    assert estimate_memory(config, model, 30)["rollout or update"] == expected


@pytest.mark.slow
def test_the_sum_of_the_parts_is_said() -> None:
    def said(*overrides: str) -> str:
        return described(*overrides)["memory"]

    assert "reference 600 kB" in said()
    assert "reference 0 B" in said("kl_coeff=0")
    assert "AdamW 1.2 MB" in said()
    total = sum(estimate_memory(load_config(), load_skeleton("tiny")[0], longest_prompt()).values())
    assert said().startswith(f"about {total / 1e6:.3g} MB")


def test_the_weights_of_a_folder_are_never_read(small: dict[str, Any], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small["model_name"])
    tokenizer = AutoTokenizer.from_pretrained(small["model_name"])
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # reading it would fail
    skeleton, its_tokenizer = load_skeleton(str(tmp_path))
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    assert skeleton.num_parameters() == model.num_parameters()
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    config = load_config(None, [f"model_name={tmp_path}", f"train_file={small['train_file']}"])
    text = said_of(config)
    assert f"{tmp_path}: LlamaForCausalLM, {model.num_parameters():,} weights" in text


def config_of(small: dict[str, Any], **changes: object) -> Config:
    return load_config(None, [f"{key}={value}" for key, value in (small | changes).items()])


def test_a_prompt_that_is_too_long_is_found(small: dict[str, Any]) -> None:
    config = config_of(small, max_prompt_length=3)
    with pytest.raises(InputError, match=r"train\.jsonl, line \d+: the longest prompt has \d+ tokens, .* allows 3"):
        said_of(config)


@pytest.mark.parametrize("content", [None, "{oops"], ids=["no config.json", "no JSON"])
def test_a_folder_that_is_no_model_is_an_input_error(tmp_path: Path, content: str | None) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"^model_name: "):
        load_skeleton(str(tmp_path))


def snapshot(*folders: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for folder in folders for path in [folder, *folder.rglob("*")]}


@pytest.mark.slow
def test_a_dry_run_prints_and_writes_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    before = snapshot(Path(small["model_name"]).parent)
    result = helpers.run(small, tmp_path / "run", "--dry_run")
    assert (result.returncode, result.stderr) == (0, "")
    assert "4 prompts x 4 completions = 16 completions" in result.stdout
    assert "'What is 0 + 0?'" in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert snapshot(Path(small["model_name"]).parent) == before


@pytest.mark.slow
def test_a_preflight_prints_the_groups_and_writes_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    before = snapshot(Path(small["model_name"]).parent)
    result = helpers.run(small | {"rewards": "[math]"}, tmp_path / "run", "--preflight")
    assert result.returncode == 0, result.stderr
    assert "pre-flight: 4 groups of 4 from the base: 0 all right, 0 mixed, 4 all wrong" in result.stdout
    assert "No group is mixed: the base never found a right answer." in result.stdout
    assert "held-out" not in result.stdout
    assert list(tmp_path.iterdir()) == []
    assert snapshot(Path(small["model_name"]).parent) == before
