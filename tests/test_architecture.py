"""The import rules: which wing may import which. And how much there is to read."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "train_grpo.py", ROOT / "evaluate.py", ROOT / "reward_model.py"]
FILES += sorted([*ROOT.glob("grpo/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("examples/*.py")])
SCRIPTS = ("train_grpo", "evaluate", "examples.")
ALGORITHM = {f"grpo.{name}" for name in ("data", "rollout", "logprobs", "advantages", "loss", "algorithms")}
EXTERNAL = {"torch", "numpy", "transformers"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{name.name}" for name in node.names} & ALL
            found |= modules or {str(node.module)}
    return found


ALL = {module_of(path) for path in FILES}
IMPORTS = {module_of(path): imports_of(path) for path in FILES}


def importers(*wings: str) -> set[str]:
    """The modules that import from one of these wings, and are not in it."""
    return {
        module for module, names in IMPORTS.items() for wing in wings
        if not f"{module}.".startswith(f"{wing}.") and any(f"{name}.".startswith(f"{wing}.") for name in names)
    }  # fmt: skip


def test_rule_1_the_algorithm_files_import_torch_each_other_fast_and_errors() -> None:
    for module in ALGORITHM:
        own = {name for name in IMPORTS[module] if name.startswith(("grpo", "reward_model"))}
        assert all(name in ALGORITHM | {"grpo.errors"} or name.startswith("grpo.fast.") for name in own), module
        others = {name.partition(".")[0] for name in IMPORTS[module] - own}
        assert others - EXTERNAL <= {"collections", "dataclasses", "functools", "typing", "importlib"}, module
    text = "".join((ROOT / f"{module.replace('.', '/')}.py").read_text() for module in ALGORITHM - {"grpo.algorithms"})
    assert "print(" not in text
    assert "open(" not in text


def test_rule_2_settings_import_no_torch_and_fast_knows_neither_tokenizer_nor_config() -> None:
    for module, names in IMPORTS.items():
        if module.startswith("grpo.settings") or module in ("grpo.algorithms", "grpo.errors"):
            assert not {name.partition(".")[0] for name in names} & {"torch", "transformers"}, module
            assert all(name.startswith(("grpo.settings", "grpo.algorithms", "grpo.errors")) or "grpo" not in name
                       for name in names), module  # fmt: skip
        if module.startswith("grpo.fast"):
            assert all(name.startswith(("grpo.fast", "grpo.errors")) or "grpo" not in name for name in names), module
    assert not [path for path in ROOT.glob("grpo/fast/*.py") if "okenizer" in path.read_text()]


def test_rule_3_rewards_models_and_data_sets_know_nothing_of_runs_and_evaluations() -> None:
    upper = importers("grpo.run", "grpo.evaluation")
    assert not [module for module in upper if module.startswith(("grpo.rewards", "grpo.models", "grpo.datasets"))]
    assert not [module for module in importers("grpo.rollout") if module.startswith("grpo.rewards")]
    assert not [module for module in importers("grpo.run") if module.startswith("grpo.evaluation")]


def test_rule_4_only_scripts_import_run_and_nobody_imports_scripts() -> None:
    assert all(module.startswith(SCRIPTS) for module in importers("grpo.run"))
    assert importers("examples", "benchmarks", "tests", "train_grpo", "evaluate") == set()


def test_rule_5_no_import_cycles() -> None:
    graph = {module: {name for name in names if name in ALL and name != module} for module, names in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_loop_stays_short_and_flat() -> None:
    train = functions(ROOT / "train_grpo.py")["train"]
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 <= 90
    inner = [node for node in ast.walk(train) if node is not train]
    assert not [node for node in inner if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert not [node for node in inner if isinstance(node, ast.Name) and node.id == "partial"]
    tree = ast.parse((ROOT / "train_grpo.py").read_text())
    names = [name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    assert len(names) <= 25


@pytest.mark.parametrize(
    ("file", "lines"),
    [("train_grpo.py", 130), ("evaluate.py", 130), ("reward_model.py", 110),
     ("examples/train_ppo.py", 170), ("examples/grpo_from_scratch.py", 90)],
)  # fmt: skip
def test_what_people_read_first_is_short(file: str, lines: int) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= lines


def test_the_door_of_the_package_is_a_map() -> None:
    names = {path.name for path in (ROOT / "grpo").glob("*.py")} - {"__init__.py"}
    wings = {path.name for path in (ROOT / "grpo").iterdir() if (path / "__init__.py").is_file()}
    assert len(names) + 1 <= 12
    text = ast.get_docstring(ast.parse((ROOT / "grpo" / "__init__.py").read_text())) or ""
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert set(lines) == names | {f"{wing}/" for wing in wings}
    assert len(lines) == len(set(lines))
