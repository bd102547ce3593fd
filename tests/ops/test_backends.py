import os
import subprocess
import sys

import pytest
import torch

from semivim.ops import (
    available_backends,
    backends,
    selective_scan,
    use_backend,
)
from semivim.ops.causal_conv import causal_conv
from tests.ops.scan_cases import selective_inputs


@pytest.fixture(autouse=True)
def no_remembered_choice():
    """Ask anew what can run: tests change it."""
    backends._chosen.cache_clear()
    yield
    backends._chosen.cache_clear()


def chosen(backend="auto", op="scan", dtype=torch.float32):
    return backends.choose(op, backend, torch.device("cpu"), dtype).__name__.rpartition(".")[2]


def test_report_names_the_choice_and_the_reasons():
    report = available_backends("cpu")
    assert list(report) == ["triton", "cuda", "numba", "reference"]
    assert report["numba"] == (True, ("cpu",), None)
    assert str(report["numba"]) == "available, chosen for cpu"
    assert report["reference"] == (True, (), None)
    assert str(report["reference"]) == "available"
    assert not report["cuda"].available
    assert str(report["cuda"]) == report["cuda"].reason
    assert "not installed" in report["cuda"].reason or "CUDA" in report["cuda"].reason


def test_named_backend_that_cannot_run_raises_and_says_why(monkeypatch):
    inputs = selective_inputs(1, 3, 2, 2)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match="backend 'cuda' cannot run the scan on cpu: package mamba_ssm is not installed"
    ):
        selective_scan(**inputs, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of triton, cuda, numba, reference; got 'fast'"):
        selective_scan(**inputs, backend="fast")


def test_a_broken_package_is_a_reason_not_a_crash(monkeypatch):
    def broken(name):
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    assert "undefined symbol" in available_backends("cpu")["numba"].reason


def test_float64_takes_the_reference():
    assert chosen(dtype=torch.float64) == "scan_reference"
    with pytest.raises(ValueError, match="only the reference keeps float64"):
        chosen("numba", dtype=torch.float64)


def test_block_over_environment_over_choice(monkeypatch):
    assert chosen() == "scan_numba"
    monkeypatch.setenv("SEMIVIM_BACKEND", "reference")
    assert chosen() == "scan_reference"
    with use_backend("numba"):
        assert chosen() == "scan_numba"
        with use_backend("reference"):
            assert chosen() == "scan_reference"
        assert chosen() == "scan_numba"
    monkeypatch.setenv("SEMIVIM_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        chosen()


def test_unknown_block_name_raises_at_once():
    with pytest.raises(ValueError, match="got 'fast'"), use_backend("fast"):
        pass


def test_block_ends_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "scan_numba"


def test_a_block_leaves_a_convolution_that_cannot_follow_its_choice(monkeypatch):
    unavailable = backends._unavailable

    def without_reference(op, name, *rest):
        return "no such kernels" if (op, name) == ("conv", "reference") else unavailable(op, name, *rest)

    monkeypatch.setattr(backends, "_unavailable", without_reference)
    with use_backend("reference"):
        assert chosen(op="scan") == "scan_reference"
        assert chosen(op="conv") == "conv_numba"
    x = torch.randn(1, 4, 2)
    with pytest.raises(ValueError, match="'reference' cannot run the conv on cpu: no such kernels"):
        causal_conv(x, [(torch.randn(2, 1, 4), torch.randn(2))], [False], backend="reference")


def test_report_follows_block_and_environment(monkeypatch):
    with use_backend("reference"):
        assert available_backends("cpu")["reference"].chosen_for == ("cpu",)
        assert available_backends("cpu")["numba"].chosen_for == ()
    monkeypatch.setenv("SEMIVIM_BACKEND", "")
    assert available_backends("cpu")["numba"].chosen_for == ("cpu",)
    monkeypatch.setenv("SEMIVIM_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        available_backends("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_chosen_for_it():
    report = available_backends("cuda")
    assert report["triton"].reason == "torch finds no CUDA device"
    assert not any(state.available or state.chosen_for for state in report.values())


def test_a_block_that_ends_late_takes_only_itself_away():
    first, second = use_backend("reference"), use_backend("numba")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == "scan_numba"
    with use_backend("reference"):
        second.__exit__(None, None, None)
        assert chosen() == "scan_reference"
    assert chosen() == "scan_numba"


def test_a_backward_stays_with_its_forward(monkeypatch):
    ran = []
    choose = backends.choose

    def note(op, backend, *rest):
        ran.append((op, choose(op, backend, *rest).__name__.rpartition("_")[2]))
        return choose(op, backend, *rest)

    for module in ("scan", "causal_conv"):
        monkeypatch.setattr(sys.modules[f"semivim.ops.{module}"], "choose", note)
    inputs = {name: x.requires_grad_() for name, x in selective_inputs(1, 3, 2, 2).items()}
    x = torch.randn(1, 4, 2, requires_grad=True)
    with use_backend("reference"):
        u = causal_conv(x, [(torch.randn(2, 1, 4), torch.randn(2))], [False])[0]
        out = selective_scan(**inputs).sum() + u.sum()
    out.backward()
    assert sorted(ran) == [("conv", "reference")] * 2 + [("scan", "reference")] * 2


def test_numba_without_its_compiler_says_so():
    code = "import semivim.ops as ops; print({k: str(v) for k, v in ops.available_backends('cpu').items()})"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True
    )
    assert "'numba': \"numba's compiler is switched off by NUMBA_DISABLE_JIT\"" in result.stdout, result.stderr
    assert "'reference': 'available, chosen for cpu'" in result.stdout


def test_import_brings_no_kernel_package():
    code = "import sys, semivim.ops; sys.exit('numba' in sys.modules or 'mamba_ssm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
