import torch

from semivim.ops.scan_kernels_numba import BLOCK
from tests.ops.scan_cases import bidirectional_inputs, bidirectional_scan, run
from tests.tolerance import assert_close


def test_gradients_of_shared_weights_add_up_over_channels_and_images():
    # Cut where no vector and no block ends: the parts' gradients of bc are the whole's, those of A its rows.
    d, cut = 2 * BLOCK + 21, BLOCK + 5
    inputs = bidirectional_inputs(2, 70, d, 3)

    def part(images, channels):
        select = {1: lambda x: x[channels], 2: lambda x: x[channels], 3: lambda x: x[images][..., channels]}
        return {name: x[images] if name.startswith("bc") else select[x.dim()](x) for name, x in inputs.items()}

    everything, before, after = slice(None), slice(cut), slice(cut, None)
    whole = run_with_ones(inputs)
    halves = [run_with_ones(part(everything, channels)) for channels in (before, after)]
    for name in ("bc", "bc_b"):
        assert_close(name, whole[name], halves[0][name] + halves[1][name])
    for name in ("A", "A_b", "D", "D_b", "delta_bias", "delta_bias_b", "u", "delta", "z"):
        axis = -1 if inputs[name].dim() == 3 else 0
        assert torch.equal(whole[name], torch.cat((halves[0][name], halves[1][name]), axis)), name
    images = [run_with_ones(part(slice(k, k + 1), everything)) for k in range(2)]
    for name in ("A", "D_b", "delta_bias"):
        assert_close(name, whole[name], images[0][name] + images[1][name])


def run_with_ones(inputs):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = bidirectional_scan(**leaves, backend="numba")
    return dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True))


def test_chunks_do_not_show():
    # The gradient of the last token's output for the first token's input passes through every chunk.
    inputs = bidirectional_inputs(1, 200, 3, 2)
    inputs["A"] = inputs["A"] * 1e-4
    results = []
    for backend in ("numba", "reference"):
        u = inputs["u"].clone().requires_grad_()
        out = bidirectional_scan(**inputs | {"u": u}, backend=backend)
        results.append(torch.autograd.grad(out[:, -1].sum(), u)[0][:, 0])
    assert results[0].abs().min() > 1e-3
    assert_close("du", *results)
    assert run(bidirectional_scan, inputs, backend="numba")["A"].isfinite().all()
