import pytest
import torch

from semivim.ops import scan_triton
from tests.ops.test_scan_kernels_triton import vim_operands
from tests.ops.triton_runs import assert_deterministic, compiled, resources
from tests.ops.triton_runs import compiles as compiles

pytestmark = [compiled, pytest.mark.slow]


def compile_backward(b, l, d, n):
    directions, z = vim_operands(b, l, d, n)
    saved = torch.zeros(b, scan_triton.saved_size(l, d, n, 2))
    scan_triton.backward(torch.zeros_like(directions[0].u), directions, z, None, 0.5, True, saved)


@pytest.mark.parametrize("n", (16, 1))
def test_a_pair_takes_few_registers_and_no_shared_memory(compiles, tmp_path, n):
    compile_backward(64, 197, 384, n)
    assert set(compiles) == {"pack_rows", "scan_backward", "sum_partials"}
    assert_deterministic(compiles)
    used = resources(compiles["scan_backward"], tmp_path)
    assert used["REG"] <= 168
    assert used["STACK"] <= {80: 96, 90: 24}[compiles["scan_backward"].metadata.target.arch]  # spilled bytes a thread
    assert used["SHARED"] == 0


def test_segments_take_two_more_kernels(compiles):
    compile_backward(1, 197, 40, 2)
    assert set(compiles) == {"pack_rows", "segment_effect", "chain_segments", "scan_backward", "sum_partials"}
    assert_deterministic(compiles)
