import torch

from semivim.ops.launch_numba import dense_rows, filled, unavailable
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


def test_a_record_holds_the_values_of_its_fields_and_zeros():
    kind = record("a", "b", "c")
    row = filled(kind, c=1 << 40, a=-3)[0]
    assert (row["a"], row["b"], row["c"]) == (-3, 0, 1 << 40)
