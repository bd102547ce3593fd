import re

import pytest
import torch

from semivim.ops import conv_triton
from tests.ops.conv_cases import both_passes, conv_inputs
from tests.ops.triton_runs import assert_deterministic, compiled, resources
from tests.ops.triton_runs import compiles as compiles

pytestmark = [compiled, pytest.mark.slow]


def compile_both_passes(room):
    inputs = conv_inputs(2, 197, 384, dtype=torch.bfloat16)
    inputs["x"] = torch.zeros(2, 197, room, dtype=torch.bfloat16)[..., :384]
    both_passes(conv_triton, inputs, [torch.zeros(2, 197, 384, dtype=torch.bfloat16)] * 2)


def vectors_of(kernel):
    """Which of loads and stores a kernel makes with vectors of values of 2 bytes."""
    return set(re.findall(r"\b(ld|st)\.global\S*\.v2\.b32", kernel.asm["ptx"]))


def test_kernels_take_no_spills_and_vector_loads(compiles, tmp_path):
    compile_both_passes(768)
    assert set(compiles) == {"conv_forward", "conv_backward", "sum_shares"}
    assert_deterministic(compiles)
    for name in ("conv_forward", "conv_backward"):
        used = resources(compiles[name], tmp_path)
        assert used["REG"] <= {80: 168, 90: 136}[compiles[name].metadata.target.arch]
        assert used["STACK"] == 0
    assert vectors_of(compiles["conv_forward"]) == {"ld", "st"}


def test_rows_that_do_not_begin_at_16_bytes_are_read_one_by_one(compiles):
    compile_both_passes(769)
    assert vectors_of(compiles["conv_forward"]) == {"st"}
