"""The rules of the tree: who imports whom, optional packages in one place, flags that are read, a test per module."""

import argparse
import ast
import importlib
from pathlib import Path

import pytest
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "semivim").rglob("*.py"))
LAYERS = {  # folder -> folders of semivim that it may import
    "ops": {"ops"},
    "layers": {"ops", "layers"},
    "models": {"layers", "models", "_timm"},
    "loss": {"loss"},
    "data": {"data", "utils", "hub"},
    "utils": {"utils"},
    "runs": {"utils", "runs"},
    "task": {"loss", "data", "utils", "runs", "task"},
    "flags": {"task", "data", "utils", "flags", "hub", "runs"},
    "hub": {"runs", "utils", "hub"},
}
OPTIONAL = {"numba": "_numba.py", "triton": "_triton.py", "mamba_ssm": "_cuda.py", "causal_conv1d": "_cuda.py"}


def imported(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, relative ones resolved."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    parts = path.relative_to(ROOT / "semivim").parts
    for name in imported(path):
        top = name.split(".")[0]
        if top in OPTIONAL:
            assert path.name.endswith(OPTIONAL[top]), f"{path.name} imports {name}"
        if top == "semivim" and len(parts) > 1 and name != "semivim":
            target = name.split(".")[1]
            assert target in LAYERS[parts[0]], f"{'/'.join(parts)} imports {name}"
        assert top not in ("train_ssl", "train_arm", "hubconf", "tests"), f"{path.name} imports {name}"


def test_no_file_is_over_500_lines_and_no_script_over_its_limit():
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    limits = {"train_ssl.py": 400, "train_arm.py": 350}
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > limits.get(name, 500)}


def test_every_module_has_a_test_of_its_name():
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    lacking = [
        str(m.relative_to(ROOT))
        for m in MODULES
        if m.name != "__init__.py" and f"test_{m.stem.strip('_')}.py" not in tests
    ]
    assert not lacking


def test_only_scripts_the_command_and_flags_read_the_command_line():
    for path in MODULES:
        if path.parent.name != "flags" and path.name != "cli.py":
            given = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)]
            flags = [node.arg for node in given if node.annotation and "Namespace" in ast.unparse(node.annotation)]
            assert not flags, f"{path.name} takes parsed flags as {flags}"


def strings(path: Path) -> set[str]:
    """String constants of a file, docstrings left out, f-strings in their parts."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_files_of_a_run_are_named_once():
    from semivim.runs import run_folder

    names = {value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)}
    assert {"model.safetensors", "config.json", "best.json", "args.yaml", "last.pth.tar", "metrics.jsonl"} <= names
    for path in (*MODULES, *ROOT.glob("*.py")):
        if path.name != "run_folder.py" and path.parent.name != "models":  # whose names are the Hub's
            found = {text for text in strings(path) if any(text in (name, f"/{name}", f": {name}") for name in names)}
            assert not found, f"{path.name} spells {found}"


def test_models_are_listed_by_the_models():
    for path in (*MODULES, *ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        if path.parent.name == "models" and path.is_relative_to(ROOT / "semivim"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("list_models"):
                assert not [k for k in node.keywords if k.arg == "module"], f"{path} lists the models of one module"


class Recorder:
    """A namespace that notes which of its values timm's helpers read."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._read = args, set()

    def __getattr__(self, name):
        self._read.add(name)
        return getattr(self._args, name)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def called_from(script: Path) -> list[ast.FunctionDef]:
    """Functions of a script and those of the flags that it calls, and these call in turn; checks left out."""
    own = functions(script)
    of_flags = {k: f for path in (ROOT / "semivim" / "flags").glob("*.py") for k, f in functions(path).items()}
    found, new = {}, own
    while new:
        found |= new
        names = {n.id for f in new.values() for n in ast.walk(f) if isinstance(n, ast.Name)} - set(found)
        new = {k: f for k, f in of_flags.items() if k in names and not k.startswith("_check")}
    return list(found.values())


SCRIPTS = ["train_ssl", "train_arm"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_every_read_is_a_flag(name):
    script = importlib.import_module(name)
    declared = {a.dest for a in script.build_parser()._actions} - {"help"}
    read = {
        node.attr
        for function in called_from(ROOT / f"{name}.py")
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    } - {"config"}
    recorder = Recorder(script.parse_args([]))
    optimizer_kwargs(recorder)
    scheduler_kwargs(recorder)
    by_timm = recorder._read | {"mean", "std", "crop_pct", "interpolation"}  # resolve_input_data_config
    by_init = {"rank", "world_size", "distributed", "device", "local_rank"}  # init_distributed_device
    assert declared - read - by_timm == set(), "declared, read nowhere"
    assert read - declared - by_init == set(), "read, declared nowhere"


@pytest.mark.parametrize("name", SCRIPTS)
def test_demo_values_are_what_flags_would_give(name):
    script = importlib.import_module(name)
    args = vars(script.parse_args([]))
    assert {key: args[key] for key in script.DEMO} == script.DEMO
