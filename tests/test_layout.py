"""The rules of the tree: who imports whom, optional packages in one place, flags that are read, a test per module."""

import argparse
import ast
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
    "data": {"data", "utils"},
    "utils": {"utils"},
    "task": {"loss", "data", "utils", "task"},
    "runs": {"data", "task", "utils", "runs"},
    "flags": {"task", "utils", "flags"},
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
        assert top not in ("train_ssl", "hubconf", "tests"), f"{path.name} imports {name}"


def test_no_file_is_over_500_lines():
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 500}
    assert not long


def test_every_module_has_a_test_of_its_name():
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    lacking = [
        str(m.relative_to(ROOT))
        for m in MODULES
        if m.name != "__init__.py" and f"test_{m.stem.lstrip('_')}.py" not in tests
    ]
    assert not lacking


class Recorder:
    """A namespace that notes which of its values timm's helpers read."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._read = args, set()

    def __getattr__(self, name):
        self._read.add(name)
        return getattr(self._args, name)


def test_every_flag_is_read_and_every_read_is_a_flag():
    import train_ssl
    from semivim.flags import train_flags

    declared = {a.dest for a in train_ssl.build_parser()._actions} - {"help"}
    tree = ast.parse((ROOT / "train_ssl.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    recorder = Recorder(train_ssl.parse_args([]))
    optimizer_kwargs(recorder)
    scheduler_kwargs(recorder)
    recorder._args.lr = None
    train_flags.scaled_lr(recorder, 1)
    by_timm = recorder._read | {"mean", "std", "crop_pct", "interpolation"}  # resolve_input_data_config
    by_init = {"rank", "world_size", "distributed", "device", "local_rank"}  # init_distributed_device
    assert declared - read - by_timm == set(), "declared, read nowhere"
    assert read - declared - by_init == set(), "read, declared nowhere"


def test_demo_values_are_what_flags_would_give():
    import train_ssl

    args = vars(train_ssl.parse_args([]))
    assert {key: args[key] for key in train_ssl.DEMO} == train_ssl.DEMO
