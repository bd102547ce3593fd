import torch

from semivim.ops.launch_numba import Fields, dense_rows, records, unavailable
from semivim.ops.vector_numba import record


def test_runs_on_the_cpu_only():
    assert unavailable(torch.device("cpu")) is None
    assert unavailable(torch.device("cuda")) == "it runs on the CPU, not on cuda"


def test_rows_are_copied_only_where_their_last_dimension_is_not_dense():
    x = torch.randn(2, 5, 8)
    assert dense_rows(x[..., 2:6], torch.float32).data_ptr() == x[..., 2:6].data_ptr()
    for strided in (x[..., ::2], x.transpose(1, 2)):
        rows = dense_rows(strided, torch.float32)
        assert rows.stride(-1) == 1 and torch.equal(rows, strided)
    assert torch.equal(dense_rows(x, torch.bfloat16), x.bfloat16())


def test_records_hold_the_values_of_their_fields_and_zeros():
    kind = record("a", "b", "c")
    rows = records(kind, Fields(c=1 << 40, a=-3), Fields(b=7))
    assert [row.tolist() for row in rows] == [(-3, 0, 1 << 40), (0, 7, 0)]


def test_fields_keep_the_tensors_they_point_to():
    fields, x = Fields(), torch.randn(2, 5, 8)[..., ::2]
    fields.describe("x", x, torch.float32)
    (kept,) = fields.kept
    assert torch.equal(kept, x) and kept.is_contiguous()
    assert fields == {"x": kept.data_ptr(), "x_image": 5 * 4 * 4, "x_token": 4 * 4}
