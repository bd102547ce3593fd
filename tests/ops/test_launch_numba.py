import torch

from semivim.ops.launch_numba import Fields, Layout, records, unavailable
from semivim.ops.vector_numba import record


def test_runs_on_the_cpu_only():
    assert unavailable(torch.device("cpu")) is None
    assert unavailable(torch.device("cuda")) == "it runs on the CPU, not on cuda"


KIND = record("a", "x", "x_image", "x_token", "b")


def described(x, dtype):
    fields = Fields(Layout(KIND))
    fields.describe("x", x, dtype)
    return fields, fields.kept[0]


def test_rows_are_copied_only_where_their_last_dimension_is_not_dense():
    x = torch.randn(2, 5, 8)
    for rows in (x, x[..., 2:6], x[:, ::2], x[..., 1:].transpose(0, 1), x[..., 3:4]):
        fields, kept = described(rows, torch.float32)
        image, token, _ = rows.stride()
        assert fields.values == [0, rows.data_ptr(), 4 * image, 4 * token, 0]
        assert kept is rows
    for strided in (x[..., ::2], x.transpose(1, 2)):
        fields, kept = described(strided, torch.float32)
        assert kept.is_contiguous() and torch.equal(kept, strided)
        assert fields.values == [0, kept.data_ptr(), 4 * kept.stride(0), 4 * kept.stride(1), 0]
    fields, kept = described(x, torch.bfloat16)
    assert torch.equal(kept, x.bfloat16())
    assert fields.values == [0, kept.data_ptr(), 2 * 40, 2 * 8, 0]


def test_records_hold_the_values_of_their_fields_and_zeros():
    layout = Layout(KIND)
    rows = records(layout, Fields(layout, b=1 << 40, a=-3), Fields(layout, x=7))
    assert [row.tolist() for row in rows] == [(-3, 0, 0, 0, 1 << 40), (0, 7, 0, 0, 0)]


def test_a_field_points_to_a_tensor_that_it_keeps():
    fields, x = Fields(Layout(KIND)), torch.randn(3)
    assert fields.point("a", x) is x
    fields["b"] = fields["a"]
    assert fields.values == [x.data_ptr(), 0, 0, 0, x.data_ptr()] and fields.kept[0] is x
