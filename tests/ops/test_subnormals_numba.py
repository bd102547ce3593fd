"""Subnormal numbers are zero inside the kernels, cost nothing there, and stay what they are outside."""

import platform
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from numba import njit

from semivim.ops import subnormals_numba
from tests.ops.conv_cases import bidirectional_conv, conv_inputs
from tests.ops.scan_cases import bidirectional_inputs, bidirectional_scan

has_mode = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64", "aarch64", "arm64"), reason="no such mode on this processor"
)
TINY = 1e-39  # subnormal in float32


@njit(nogil=True)
def mode():
    return subnormals_numba.float_mode() & ~0x3F  # without the flags of what happened so far


@njit(nogil=True)
def mode_inside_and_after():
    before = subnormals_numba.flush_subnormals()
    inside = subnormals_numba.float_mode()
    subnormals_numba.restore_float_mode(before)
    return inside, subnormals_numba.float_mode() & ~0x3F


def both_passes(function, inputs, scale=1.0):
    """A call that runs both passes, the gradient of the output `scale`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def call():
        out = function(**leaves, backend="numba")
        outs = [out] if isinstance(out, torch.Tensor) else out
        return outs, torch.autograd.grad(outs, list(leaves.values()), [torch.full_like(o, scale) for o in outs])

    return call


@has_mode
def test_the_mode_is_set_and_restored():
    before = mode()
    inside, after = mode_inside_and_after()
    assert inside != before == after == mode()


CALLS = {
    "scan": (bidirectional_scan, lambda: bidirectional_inputs(3, 70, 24, 4)),
    "convolution": (bidirectional_conv, lambda: conv_inputs(3, 20, 24)),
}


@has_mode
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("threads", (1, 2))
def test_no_thread_of_the_user_is_left_changed(name, threads):
    function, inputs = CALLS[name]
    before, count = mode(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(1) as pool:  # autograd runs the backward in the thread that calls it
            call = both_passes(function, inputs())
            call()
            assert mode() == before
            pool.submit(call).result()
            assert pool.submit(mode).result() == before
    finally:
        torch.set_num_threads(count)
    assert torch.tensor(TINY) * 1 > 0


@has_mode
def test_kernels_take_subnormal_numbers_as_zero():
    inputs = bidirectional_inputs(1, 5, 3, 2)
    inputs["u"], inputs["u_b"] = torch.full_like(inputs["u"], TINY), torch.full_like(inputs["u"], TINY)
    inputs["z"], inputs["D"] = torch.full_like(inputs["z"], 50.0), torch.full_like(inputs["D"], 1.0)
    assert (bidirectional_scan(**inputs, backend="reference") != 0).any()
    outs, gradients = both_passes(bidirectional_scan, inputs, TINY)()
    assert not any(x.any() for x in (*outs, *gradients))
    outs, gradients = both_passes(bidirectional_conv, conv_inputs(1, 5, 3), TINY)()
    assert not any(x.any() for x in gradients)


def seconds(calls, repeats=9):
    """Least CPU time of each call, taken in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for k, call in enumerate(calls):
            start = time.process_time()
            call()
            best[k] = min(best[k], time.process_time() - start)
    return best


def both_passes_of_decaying(step, rate, scale, last_only=False):
    """Both passes of a long scan whose states decay as `step` (before softplus) and `rate` say."""
    inputs = bidirectional_inputs(2, 400, 64, 16)
    for name in ("delta_bias", "delta_bias_b"):
        inputs[name] = torch.full_like(inputs[name], step)
    for name in ("A", "A_b"):
        inputs[name] = rate * inputs[name]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    grad = torch.full_like(inputs["u"], scale)
    if last_only:  # the adjoint of this token dies out on the way to the first one
        grad[:, :-1] = 0

    def call():
        torch.autograd.grad(bidirectional_scan(**leaves, backend="numba"), list(leaves.values()), grad)

    return call


def test_small_gradients_and_dying_states_take_no_longer():
    ordinary = both_passes_of_decaying(-4.0, 1.0, 1.0)
    others = [both_passes_of_decaying(3.0, 4.0, scale) for scale in (1.0, 1e-8, 1e-20)]
    others += [both_passes_of_decaying(1.0, 1.0, 1e-8, last_only=True), both_passes_of_decaying(6.0, 4.0, 1e-8)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, *rest = seconds([ordinary, *others])
    finally:
        torch.set_num_threads(before)
    assert max(rest) < 1.2 * first
