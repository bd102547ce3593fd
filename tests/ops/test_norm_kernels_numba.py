import pytest
import torch

from semivim.ops import norm_kernels_numba, norm_numba


def both_passes(x, weight, grad):
    y, scales = norm_numba.forward(x, weight, 1e-5)
    dx, dweight = norm_numba.backward(grad, x, weight, scales)
    return {"y": y, "dx": dx, "dweight": dweight}


def test_not_a_number_stays_in_its_row():
    x, weight, grad = torch.randn(4, 33), torch.randn(33), torch.randn(4, 33)
    x[2, 7] = float("nan")
    results = both_passes(x, weight, grad)
    for name in ("y", "dx"):
        assert results[name].isnan().any(1).tolist() == [False, False, True, False]
    assert results["dweight"].isnan().all()


def test_small_gradients_of_small_rows_do_not_vanish():
    x, grad = torch.full((2, 20), 1e-6), torch.full((2, 20), 1e-33)
    results = both_passes(x, torch.ones(20), grad)
    scale = (1e-12 + 1e-5) ** -0.5
    assert results["dweight"].tolist() == pytest.approx([2 * 1e-6 * scale * 1e-33] * 20, rel=1e-5)


def test_rows_of_the_last_task_end_where_the_tensor_does():
    rows = norm_kernels_numba.ROWS + 1
    x, weight, grad = torch.randn(rows, 17), torch.randn(17), torch.randn(rows, 17)
    apart = [both_passes(x[cut], weight, grad[cut]) for cut in (slice(0, rows - 1), slice(rows - 1, rows))]
    together = both_passes(x, weight, grad)
    assert torch.equal(together["dx"], torch.cat([part["dx"] for part in apart]))
    torch.testing.assert_close(together["dweight"], apart[0]["dweight"] + apart[1]["dweight"])
