import torch

from semivim.ops.launch_numba import Fields, Layout, records, unavailable
from semivim.ops.vector_numba import record


def test_runs_on_the_cpu_only():
    assert unavailable(torch.device("cpu")) is None
    assert unavailable(torch.device("cuda")) == "it runs on the CPU, not on cuda"


KIND = record("a", "x", "x_image", "x_token", "b")


def described(x, dtype):
    fields = Fields(Layout(KIND))
    fields.describe("x", dtype, x)
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


def test_tensors_are_described_one_after_the_other():
    fields = Fields(Layout(record("a", *(f"{x}{part}" for x in "xy" for part in ("", "_image", "_token")))), 5)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 3).bfloat16()
    fields.describe("x", torch.float32, x, y)
    kept = fields.kept[1]
    assert torch.equal(kept, y.float())
    assert fields.values == [5, x.data_ptr(), 160, 32, kept.data_ptr(), 60, 12]


def test_records_hold_the_values_of_their_fields_and_zeros():
    layout = Layout(KIND)
    first, second = Fields(layout, -3), Fields(layout, 0, 7)
    first["b"] = 1 << 40
    rows = records(layout, first, second)
    assert [row.tolist() for row in rows] == [(-3, 0, 0, 0, 1 << 40), (0, 7, 0, 0, 0)]


def test_fields_point_to_tensors_that_they_keep():
    fields, x, y = Fields(Layout(KIND)), torch.randn(3), torch.randn(2)
    fields.point("x_image", x, y)
    fields["b"] = fields["x_image"]
    assert fields.values == [0, 0, x.data_ptr(), y.data_ptr(), x.data_ptr()]
    assert fields.kept[0] is x and fields.kept[1] is y


def test_what_is_not_dense_float32_is_copied_first():
    fields, dense, strided, narrow = Fields(Layout(KIND)), torch.randn(3), torch.randn(6)[::2], torch.randn(3).half()
    fields.point_dense("a", dense, strided, narrow)
    assert fields.kept[0] is dense
    for x, kept in zip((strided, narrow), fields.kept[1:], strict=True):
        assert torch.equal(kept, x.float()) and kept.is_contiguous()
    assert fields.values[:3] == [x.data_ptr() for x in fields.kept]
