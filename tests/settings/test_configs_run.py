"""Every ready config runs two real steps: on small stand-ins of its model, its tokenizer and its data."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import grpo.run.plots
import train_grpo
from grpo.models.saving import save_model
from grpo.settings.config import load_config
from tests.run.test_train import ROOT, read

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GSM8K = [
    {
        "question": f"Ann has {n} apples and buys {n + 1} more. How many has she?",
        "answer": f"{n}+{n + 1}=\n#### {2 * n + 1:,}",
    }
    for n in (3, 40, 7, 600, 12, 5)
]
MATH = [
    {
        "problem": f"Find $x$ if ${n} - x = 1$.",
        "solution": f"So $x = \\boxed{{{answer}}}$.",
        "level": "Level 1",
        "type": "Algebra",
    }
    for n, answer in ((3, "2"), (9, "8"), (5, "4"), (2, "\\frac{1}{2}"), (1001, "1,000"))
]


def qwen(folder: Path) -> str:
    """A random Qwen2 of a few thousand weights with bfloat16 files, two stop ids and a ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=264,  # a little more than the tokenizer has, as Qwen's
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.top_k, model.generation_config.do_sample = 20, True
    save_model(model, tokenizer, folder)
    return str(folder)


def prepare(name: str, rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """The data script on files with the Hub's columns; what it says."""
    source = folder / f"{name}_source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, f"data/prepare_{name}.py", f"--train={source}", f"--test={source}", f"--out={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    qwen(folder / "qwen")
    prepare("gsm8k", GSM8K, folder)
    prepare("math", MATH, folder)
    for split in ("train", "eval"):
        shutil.copy(ROOT / "data" / f"code_tasks_{split}.jsonl", folder)
    return folder


@pytest.mark.slow
def test_the_data_scripts_write_our_columns(tmp_path: Path) -> None:
    assert "6 problems" in prepare("gsm8k", GSM8K, tmp_path)
    assert read(tmp_path / "gsm8k_test.jsonl")[3] == {
        "prompt": GSM8K[3]["question"], "answer": "1201", "solution": GSM8K[3]["answer"],
    }  # fmt: skip
    said = prepare("math", MATH, tmp_path)
    assert "5 problems" in said
    rows = read(tmp_path / "math_train.jsonl")
    assert [row["answer"] for row in rows] == ["2", "8", "4", "\\frac{1}{2}", "1000"]
    said = prepare("math", [*MATH, MATH[0] | {"solution": "It is 2."}], tmp_path)
    assert "1 of 6 rows have no answer that can be judged: left out" in said
    assert set(rows[0]) == {"prompt", "answer", "solution", "level", "type"}


@pytest.mark.slow
def test_a_data_script_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "1+1?"}\n')
    command = [sys.executable, "data/prepare_gsm8k.py", f"--train={tmp_path / 'x.jsonl'}", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'x.jsonl, line 1: has no "answer"; it has prompt' in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_two_steps(name: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
    path = ROOT / "configs" / name
    asked = yaml.safe_load(path.read_text())
    here: dict[str, Any] = {"num_train_steps": 2, "batch_size": 2, "group_size": 4, "device": "cpu", "dtype": "float32"}
    here |= {"output_dir": tmp_path / "run", "max_completion_length": 12, "micro_batch_tokens": 4096, "warmup_steps": 0}
    if asked.get("num_train_epochs"):
        here["num_train_epochs"] = 0.35
        del here["num_train_steps"]
    if "model_name" in asked:
        here |= {"model_name": stand_ins / "qwen", "quantization": "none", "max_prompt_length": 500}
        local = json.loads(json.dumps(asked).replace("data/", f"{stand_ins}/"))
        here |= {key: local[key] for key in ("train_file", "eval_file") if key in local}
        if "datasets" in local:
            here["datasets"] = json.dumps(local["datasets"])
    train_grpo.main(load_config(path, [f"{key}={value}" for key, value in here.items()]))
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] == row["grad_norm"] for row in rows[1:])
    assert rows[1]["sampling/logp_difference/max"] < 1e-3
    if "model_name" in asked:
        samples = read(tmp_path / "run" / "samples.jsonl")
        assert all(isinstance(sample["prompt"], str) for sample in samples)
        assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
        assert any(f"rewards/{name}/mean" in rows[1] for name in ("gsm8k", "boxed", "code"))
