"""However a run ends on its way, going on leads to the bits of the uninterrupted run, or to one clear line.

The rest of --resume (what may change, what is said, what is left behind) is in tests/run/test_resume.py.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import grpo.run.plots
import train_grpo
from grpo.errors import InputError, RunError, errors_explained
from grpo.files import sha256
from grpo.run.checkpoint import check_integrity, checkpoints, step_of
from tests.conftest import later_slow, loop_function, patch_loop
from tests.run import test_train as helpers
from tests.run.test_resume import assert_same_run
from tests.run.test_train import ROOT, read, resume, train

small = helpers.small  # the fixture

# Six steps: evaluations after 3 and 6, checkpoints after 2, 4 and 6, three optimizer steps of warm-up.
SIX = {
    "num_train_steps": 6, "eval_every": 3, "save_every": 2, "warmup_steps": 3,
    "learning_rate": 5e-3, "eval_metric": "eval/reward",
    "seed": 1,  # best/ is from step 3 or 6, not the base; some steps are without any signal
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "no-kl": {"kl_coeff": 0},
    "no-kl-reference-would-move": {"kl_coeff": 0, "ref_update_every": 1},
    "no-kl-two-iterations": {"kl_coeff": 0, "num_iterations": 2},
    "kl": {"kl_coeff": 0.1},
    "kl-two-iterations": {"kl_coeff": 0.1, "num_iterations": 2},
    "kl-reference-moves": {"kl_coeff": 0.1, "ref_update_every": 1},
    "kl-reference-moves-two-iterations": {"kl_coeff": 0.1, "ref_update_every": 1, "num_iterations": 2},
    "kl-reference-moves-two-minibatches": {"kl_coeff": 0.1, "ref_update_every": 3, "num_minibatches": 2},
}
HALF_LINES = '{"step": 99, "reward": 1e9}\n{"step": 100, "rew'


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        yield


def at_the_start_of(patch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Do something whenever a training step begins."""
    draw = loop_function("samples_for_step")
    calls = []

    def hooked(dataset: Any, *, step: int, **settings: Any) -> Any:
        calls.append(step)
        if len(calls) > 1 or step > 1:  # the first call of a new run is the pre-flight's
            action(step)
        return draw(dataset, step=step, **settings)

    patch_loop(patch, "samples_for_step", hooked)


@pytest.fixture(scope="module", params=later_slow(reversed(SETTINGS), 4))  # the least of them last
def recorded(
    request: pytest.FixtureRequest, small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A whole run, and a folder with copies of it as it was after each of its steps; not to be touched."""
    return record(small | SIX | SETTINGS[request.param], tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def two_iterations(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same for a KL to a reference that stays, with two optimizer steps a rollout."""
    return record(small | SIX | SETTINGS["kl-two-iterations"], tmp_path_factory.mktemp("two_iterations"))


def record(settings: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    whole, copies = folder / "run", folder / "copies"
    copies.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        at_the_start_of(patch, lambda step: void(shutil.copytree(whole, copies / str(step - 1))))
        train(settings, whole)
    return whole, copies


def void(_: object) -> None:
    """For a lambda that must return nothing."""


def power_cut(recorded: tuple[Path, Path], step: int, folder: Path) -> Path:
    """The run as it is found when the power went in step `step` + 1, half a line already written."""
    shutil.copytree(recorded[1] / str(step), folder)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write(HALF_LINES)
    return folder


def assert_goes_on_as(whole: Path, folder: Path) -> None:
    """Resumed, a run ends as the one that nobody disturbed, to the bit."""
    resume(folder)
    assert_same_run(whole, folder)


# The same bits


EVERY_STOP = later_slow((3, 4, 1, 2, 5), 1)  # first between two checkpoints, then right after one


@pytest.mark.parametrize("step", EVERY_STOP)
def test_after_a_power_cut_a_run_goes_on_as_if_nothing_had_happened(
    recorded: tuple[Path, Path], tmp_path: Path, step: int
) -> None:
    folder = power_cut(recorded, step, tmp_path / "run")
    assert [step_of(path) for path in checkpoints(folder)] == [saved for saved in (2, 4) if saved <= step]
    assert [row["step"] for row in resume(folder)] == [0, 1, 2, 3, 4, 5, 6]
    assert_same_run(recorded[0], folder)


@pytest.mark.parametrize("step", EVERY_STOP)
def test_after_ctrl_c_a_run_goes_on_as_if_nothing_had_happened(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path, step: int
) -> None:
    """The step is finished and saved, whether or not it was to be saved."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_the_start_of(patch, lambda now: signal.raise_signal(signal.SIGINT) if now == step else None)
        with pytest.raises(KeyboardInterrupt, match=f"stopped; step {step} is saved"):
            train(small | SIX | SETTINGS["kl-two-iterations"], folder)
    assert step_of(checkpoints(folder)[-1]) == step
    assert len(read(folder / "metrics.jsonl")) == step + 1
    assert_goes_on_as(two_iterations[0], folder)


def test_a_run_interrupted_after_every_step_is_the_same_run(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for step in (1, 2, 3, 4, 5):
        with pytest.MonkeyPatch.context() as patch:
            at_the_start_of(patch, lambda _: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt, match=f"stopped; step {step} is saved"):
                resume(folder) if step > 1 else train(small | SIX | SETTINGS["kl-two-iterations"], folder)
    assert_goes_on_as(two_iterations[0], folder)


def optimizer_left_as_new(load: Any, folder: Path, *objects: Any) -> Any:
    policy, optimizer, *others = objects
    return load(folder, policy, torch.optim.AdamW(optimizer.param_groups), *others)


def weights_left_as_the_base(load: Any, folder: Path, *objects: Any) -> Any:
    base = {name: weight.clone() for name, weight in objects[0].state_dict().items()}
    state = load(folder, *objects)
    objects[0].load_state_dict(base)
    return state


def tokens_counted_from_0(load: Any, folder: Path, *objects: Any) -> Any:
    return load(folder, *objects) | {"num_tokens": 0}


def completions_counted_from_0(load: Any, folder: Path, *objects: Any) -> Any:
    return load(folder, *objects) | {"num_completions": 0}


def samples_not_cut_off(load: Any, folder: Path, *objects: Any) -> Any:
    return load(folder, *objects) | {"samples_size": (folder.parent / "samples.jsonl").stat().st_size}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        optimizer_left_as_new, weights_left_as_the_base, tokens_counted_from_0, completions_counted_from_0,
        samples_not_cut_off,
    ],
    ids=lambda wrong: wrong.__name__,
)  # fmt: skip
def test_a_resume_that_loses_something_is_another_run(
    two_iterations: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    """The comparison above can fail."""
    folder = power_cut(two_iterations, 3, tmp_path / "run")
    load = loop_function("load_checkpoint")
    patch_loop(monkeypatch, "load_checkpoint", lambda *arguments: wrong(load, *arguments))
    resume(folder)
    with pytest.raises(AssertionError):
        assert_same_run(two_iterations[0], folder)


def test_a_reference_that_is_the_resumed_weights_is_another_run(
    two_iterations: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = power_cut(two_iterations, 3, tmp_path / "run")
    load, copy, references = loop_function("load_checkpoint"), loop_function("make_reference"), list[Any]()

    def remembered(model: Any) -> Any:
        references.append(copy(model))
        return references[-1]

    def load_both(folder: Path, policy: Any, *others: Any) -> Any:
        state = load(folder, policy, *others)
        references[-1].load_state_dict(policy.state_dict())
        return state

    patch_loop(monkeypatch, "make_reference", remembered)
    patch_loop(monkeypatch, "load_checkpoint", load_both)
    resume(folder)
    assert len(references) == 1
    with pytest.raises(AssertionError):
        assert_same_run(two_iterations[0], folder)


def test_a_moved_reference_that_is_not_put_back_is_another_run(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, copies = record(small | SIX | SETTINGS["kl-reference-moves-two-minibatches"], tmp_path)
    folder = power_cut((whole, copies), 4, tmp_path / "again")
    name = "model.layers.0.mlp.up_proj.weight"
    files = [folder / "step-000004" / f"{which}.safetensors" for which in ("reference", "model")]
    assert not torch.equal(*(load_file(path)[name] for path in files))  # it moved at step 3
    monkeypatch.setattr("grpo.run.checkpoint.load_safetensors", lambda *_: None)
    resume(folder)
    with pytest.raises(AssertionError):
        assert_same_run(whole, folder)


# The base that the KL is measured against


def test_a_base_that_is_gone_is_no_new_anchor(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    """One that was changed under the same name is in tests/run/test_resume.py."""
    folder = power_cut(two_iterations, 3, tmp_path / "run")
    base = tmp_path / "base"
    change_facts(folder, model_name=str(base))
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(InputError) as raised:
        resume(folder)
    assert str(raised.value) == f"model_name: there is no folder {str(base)!r}"
    assert (folder / "samples.jsonl").read_bytes() == before
    shutil.copytree(small["model_name"], base)  # found again, wherever it comes from
    assert_goes_on_as(two_iterations[0], folder)


def change_facts(folder: Path, **settings: Any) -> None:
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"settings": facts["settings"] | settings}))


# Damage


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def grown(content: bytes) -> bytes:
    return content + b"\n"


def test_every_file_of_a_checkpoint_is_checked_and_named(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    folder = power_cut(recorded, 4, tmp_path / "run")
    newest = folder / "step-000004"
    check_integrity(folder, "RESUME", "RESTART")
    way_on = f"to go on without it: rm -r {newest} && RESUME"
    files = [path for path in newest.iterdir() if path.name != "checksums.json"]
    assert len(files) >= 6
    for path in files:
        content = path.read_bytes()
        for damage in (truncated, flipped, grown):
            path.write_bytes(damage(content))
            with pytest.raises(InputError) as raised:
                check_integrity(folder, "RESUME", "RESTART")
            problem = f"{path.name} differs from its checksum"
            assert str(raised.value) == f"--resume: {newest} is damaged: {problem}; {way_on}"
        path.unlink()
        with pytest.raises(InputError) as raised:
            check_integrity(folder, "RESUME", "RESTART")
        assert str(raised.value) == f"--resume: {newest} is damaged: {path.name} is missing; {way_on}"
        path.write_bytes(content)
    check_integrity(folder, "RESUME", "RESTART")


def test_a_flipped_bit_in_the_checksums_is_found_wherever_it_is(
    two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = power_cut(two_iterations, 4, tmp_path / "run")
    path = folder / "step-000004" / "checksums.json"
    content = path.read_bytes()
    for place in range(0, len(content) - 1, 7):  # the last byte is the end of the line
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="step-000004 is damaged: ") as raised:
            check_integrity(folder, "RESUME", "RESTART")
        assert f"rm -r {folder / 'step-000004'} && RESUME" in str(raised.value)


def test_checksums_of_another_kind_are_damage(two_iterations: tuple[Path, Path], tmp_path: Path) -> None:
    folder = power_cut(two_iterations, 4, tmp_path / "run")
    for text in ("", "[]", "5", "[" * 100_000, '{"state.json": 5}'):
        (folder / "step-000004" / "checksums.json").write_text(text)
        with pytest.raises(InputError, match=r"step-000004 is damaged: checksums\.json "):
            check_integrity(folder, "RESUME", "RESTART")


@pytest.mark.slow
def test_the_command_that_goes_on_without_a_damaged_checkpoint_works_as_printed(
    two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = power_cut(two_iterations, 5, tmp_path / "my run")
    (folder / "step-000004" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(InputError) as raised:
        resume(folder)
    command = str(raised.value).partition("to go on without it: ")[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Going on after step 2 of 6" in done.stdout
    assert_same_run(two_iterations[0], folder)


# A full disk


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["train_grpo.py", "--resume", "--output_dir", sys.argv[2]]
runpy.run_path("train_grpo.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samples.jsonl", "optimizer.pt", "model.safetensors"])
def test_a_write_that_the_system_refuses_costs_only_what_did_not_fit(
    two_iterations: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """The system's limit on the size of a file stands in for a full disk: a part is written, then no more."""
    folder = power_cut(two_iterations, 3, tmp_path / "run")
    checkpoint = folder / "step-000002"
    if name == "samples.jsonl":
        limit = json.loads((checkpoint / "state.json").read_text())["samples_size"] + 1000
        what = folder / name
    else:
        limit = (checkpoint / name).stat().st_size - 1000
        what = folder / ("step-000004" if name == "optimizer.pt" else "best")  # best/ comes first, after step 3
    command = [sys.executable, "-c", LIMITED, str(limit), str(folder)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"error: {what} cannot be written: ")
    assert last.endswith(f"step 2 is saved; to go on: python train_grpo.py --resume --output_dir {folder}")
    assert [step_of(path) for path in checkpoints(folder)] == [2]
    assert not list(folder.glob(".*unfinished*"))
    check_integrity(folder, "", "")
    assert_goes_on_as(two_iterations[0], folder)


# Nothing that is loaded can run code


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def vouch_for(checkpoint: Path) -> None:
    """Checksums that fit whatever lies there now."""
    names = [path.name for path in checkpoint.iterdir() if path.is_file() and path.name != "checksums.json"]
    (checkpoint / "checksums.json").write_text(json.dumps({name: sha256(checkpoint / name) for name in names}))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a resume that is refused says on its way out, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised, errors_explained():
        resume(folder)
    assert raised.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "save",
    [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))],
    ids=["as-torch-saves", "plain-pickle"],
)
def test_an_optimizer_that_would_run_code_is_refused(
    two_iterations: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    save: Callable[[object, Path], None],
) -> None:
    folder, mark = power_cut(two_iterations, 3, tmp_path / "run"), tmp_path / "code_has_run"
    path = folder / "step-000002" / "optimizer.pt"
    save({"state": {}, "param_groups": Bomb(mark)}, path)
    vouch_for(path.parent)
    line = refusal(folder, capsys)
    assert line == f"error: --resume: {path} holds something else than tensors; it was not loaded"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb is a real one


@pytest.mark.parametrize("place", ["checkpoint", "base"])
def test_code_that_comes_with_a_folder_is_not_run(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path, place: str
) -> None:
    """auto_map names classes in files beside config.json; transformers has the class itself and needs none of them."""
    folder, mark = power_cut(two_iterations, 3, tmp_path / "run"), tmp_path / "code_has_run"
    base = tmp_path / "base"
    shutil.copytree(small["model_name"], base)
    change_facts(folder, model_name=str(base))
    poisoned = base if place == "base" else folder / "step-000002"
    plant_code(poisoned, mark)
    if place == "checkpoint":
        vouch_for(poisoned)
    resume(folder)
    assert not mark.exists()
    assert_same_run(two_iterations[0], folder)


def plant_code(folder: Path, mark: Path) -> None:
    """Custom classes for config, model and tokenizer, in a file that leaves a mark when it is imported."""
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["planted.T", "planted.T"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))


@pytest.mark.parametrize("place", ["checkpoint", "base"])
def test_a_folder_that_needs_code_of_its_own_is_refused(
    small: dict[str, Any],
    two_iterations: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    folder, mark = power_cut(two_iterations, 3, tmp_path / "run"), tmp_path / "code_has_run"
    base = tmp_path / "base"
    shutil.copytree(small["model_name"], base)
    change_facts(folder, model_name=str(base))
    poisoned = base if place == "base" else folder / "step-000002"
    plant_code(poisoned, mark)
    config = json.loads((poisoned / "config.json").read_text())
    (poisoned / "config.json").write_text(json.dumps(config | {"model_type": "planted", "architectures": ["M"]}))
    if place == "checkpoint":
        vouch_for(poisoned)
    line = refusal(folder, capsys)
    assert line.startswith(
        f"error: --resume: {poisoned} cannot be loaded: "
        if place == "checkpoint"
        else f"error: model_name: {str(base)!r} cannot be loaded: "
    )
    assert not mark.exists()


def test_a_state_that_is_no_state_is_refused(
    two_iterations: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["", "[" * 100_000, "cos\nsystem\n(S'true'\ntR.", "[1]", '{"step": 2}']
    state = {"step": 2, "num_tokens": 1, "num_completions": 1, "samples_size": 1}
    wrong = [
        {"step": 1},
        {"num_tokens": "x"},
        {"num_completions": None},
        {"num_completions": 1.5},
        {"samples_size": []},
    ]
    texts += [json.dumps(state | change) for change in wrong]
    for number, text in enumerate(texts):
        folder = power_cut(two_iterations, 3, tmp_path / str(number))
        (folder / "step-000002" / "state.json").write_text(text)
        vouch_for(folder / "step-000002")
        assert refusal(folder, capsys).startswith(f"error: --resume: {folder / 'step-000002'} cannot be loaded: ")


def test_what_a_run_writes_of_itself_is_plain_json(two_iterations: tuple[Path, Path]) -> None:
    def no_json(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    whole = two_iterations[0]
    for path in (whole / "run.json", *whole.glob("step-*/*.json"), whole / "best" / "about.json"):
        assert isinstance(json.loads(path.read_text(), parse_constant=no_json), dict)
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (whole / name).read_text().splitlines():
            assert isinstance(json.loads(line, parse_constant=no_json), dict)
    assert {path.suffix for path in whole.rglob("*") if path.is_file() and path.name != ".lock"} <= {
        ".json", ".jsonl", ".safetensors", ".pt", ".jinja",
    }  # fmt: skip


# Numbers that are none


def test_a_loss_that_becomes_nan_costs_no_step(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    """One token of step 4 has no finite loss; with the cause removed the run goes on from the checkpoint before."""
    folder = tmp_path / "run"
    clipped = train_grpo.SURROGATES["clipped"]
    now = [0]

    def poisoned(*arguments: Any, **settings: Any) -> torch.Tensor:
        loss = clipped.loss(*arguments, **settings)
        return loss * torch.where(torch.arange(loss.shape[1]) == 0, torch.nan, 1.0) if now[0] == 4 else loss

    with pytest.MonkeyPatch.context() as patch:
        at_the_start_of(patch, lambda step: now.__setitem__(0, step))
        patch.setitem(train_grpo.SURROGATES, "clipped", clipped._replace(loss=poisoned))
        with pytest.raises(RunError, match=r"^step 4: loss nan, gradient norm nan; the batch lies in .*failed-000004"):
            train(small | SIX | SETTINGS["kl-two-iterations"], folder)
    assert_stopped_at_4(folder, two_iterations[0])
    assert_goes_on_as(two_iterations[0], folder)


def test_a_weight_that_becomes_nan_costs_no_step(
    small: dict[str, Any], two_iterations: tuple[Path, Path], tmp_path: Path
) -> None:
    """It does so after step 4 was sampled: a memory error, say."""
    folder = tmp_path / "run"
    make, advantages = loop_function("make_optimizer"), loop_function("compute_advantages")
    policies, now = [], [0]

    def remembered(policy: Any, *others: Any) -> Any:
        policies.append(policy)
        return make(policy, *others)

    def struck(*arguments: Any, **settings: Any) -> torch.Tensor:
        if now[0] == 4:
            next(policies[0].parameters()).data[0, 0] = torch.nan
        return advantages(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        at_the_start_of(patch, lambda step: now.__setitem__(0, step))
        patch_loop(patch, "make_optimizer", remembered)
        patch_loop(patch, "compute_advantages", struck)
        with pytest.raises(RunError, match=r"^step 4: loss .*; the batch lies in .*failed-000004"):
            train(small | SIX | SETTINGS["kl-two-iterations"], folder)
    assert_stopped_at_4(folder, two_iterations[0])
    assert_goes_on_as(two_iterations[0], folder)


def assert_stopped_at_4(folder: Path, whole: Path) -> None:
    """Its batch is there to look at and to compute with; nothing of it is in the run."""
    batch, tensors = read(folder / "failed-000004.jsonl"), load_file(folder / "failed-000004.safetensors")
    assert batch == read(whole / "samples.jsonl")[3 * 16 : 4 * 16]
    assert tensors["completion_ids"].shape[0] == 16
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [step_of(path) for path in checkpoints(folder)] == [2]
