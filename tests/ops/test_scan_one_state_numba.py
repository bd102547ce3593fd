"""The kernels for one state per channel against the reference in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from semivim.ops import Direction
from semivim.ops import scan_kernels_numba as kernels
from semivim.ops import scan_one_state_numba as one_state
from semivim.ops.scan import scan
from tests.ops.scan_cases import bidirectional_inputs, bidirectional_scan, mixing, run
from tests.tolerance import assert_close


def operands(b, l, d, directions, gated, mixed, seed=0):
    """Float64 operands by name: those of each direction end in its number."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = {"z": rand(b, l, d)} if gated else {}
    for k in range(directions):
        inputs |= {f"u{k}": rand(b, l, d), f"delta{k}": rand(b, l, d), f"bc{k}": rand(b, l, 2)}
        inputs |= {f"A{k}": -rand(d, 1).abs(), f"D{k}": rand(d), f"delta_bias{k}": rand(d)}
    return inputs, rand(b, directions).abs() if mixed else None


def both_passes(inputs, mix, reverse, softplus, backend):
    """Output and gradients by name, for a fixed gradient of the output."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    directions = [
        Direction(*(leaves[f"{name}{k}"] for name in Direction._fields[:6]), reverse=back)
        for k, back in enumerate(reverse)
    ]
    out = scan(directions, leaves.get("z"), mix, 0.7, softplus, backend)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.sampled_from((1, 2, 5, 63, 64, 65, 130)), st.integers(1, 150)),
    reverse=st.lists(st.booleans(), min_size=1, max_size=4),
    gated=st.booleans(),
    mixed=st.booleans(),
    softplus=st.booleans(),
)
def test_drawn_shapes_and_any_number_of_directions(sizes, reverse, gated, mixed, softplus):
    inputs, mix = operands(*sizes, len(reverse), gated, mixed)
    if not softplus:
        inputs |= {name: x.abs() for name, x in inputs.items() if name.startswith("delta")}
    expected = both_passes(inputs, mix, reverse, softplus, "reference")
    torch.use_deterministic_algorithms(True)  # fills empty tensors, scratch too, with NaN
    try:
        narrow = {name: x.detach().float() for name, x in inputs.items()}
        result = both_passes(narrow, mix, reverse, softplus, "numba")
    finally:
        torch.use_deterministic_algorithms(False)
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    inputs = bidirectional_inputs(2, 150, 3 * kernels.BLOCK - 5, 1, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(bidirectional_scan, inputs, backend="numba", **mixing(2)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_bfloat16():
    inputs = bidirectional_inputs(2, 70, 40, 1, torch.bfloat16)
    wide = {name: x.double() for name, x in inputs.items()}
    result = run(bidirectional_scan, inputs, backend="numba", **mixing(2))
    expected = run(bidirectional_scan, wide, backend="reference", **mixing(2))
    for name in expected:
        assert_close(name, result[name], expected[name], "bfloat16")


def test_two_states_of_which_one_reads_nothing_are_one_state():
    inputs = bidirectional_inputs(1, 80, 30, 1)
    padded = dict(inputs)
    for end in ("", "_b"):
        B, C = inputs["bc" + end].chunk(2, -1)
        padded["bc" + end] = torch.cat((B, B, C, torch.zeros_like(C)), -1)
        padded["A" + end] = inputs["A" + end].expand(-1, 2)
    assert_close("out", bidirectional_scan(**inputs, backend="numba"), bidirectional_scan(**padded, backend="numba"))


@pytest.mark.parametrize("scratch", (one_state.forward_scratch, one_state.backward_scratch))
def test_scratch_fields_are_whole_vectors_and_known(scratch):
    sizes = scratch(6, kernels.padded_states(1))
    assert set(sizes) <= set(kernels.PLACE.names)
    assert all(size % kernels.WIDTH == 0 for size in sizes.values())
