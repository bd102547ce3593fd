import math

import numpy as np
import pytest
import torch

from semivim.ops import vector_numba as v


@v.compiled
def apply(kind, which, source, target, count):
    for i in range(0, count, v.LANES):
        x = v.load_lanes(v.FLOAT32, source + 4 * i, count - i)
        if which == 0:
            x = v.exp2(x)
        elif which == 1:
            x = v.softplus(x)
        elif which == 2:
            x = v.sigmoid(x)
        elif which == 5:
            x = v.softplus_and_slope(x)[0]
        elif which == 6:
            x = v.softplus_and_slope(x)[1]
        elif which == 7:
            x = v.even_lanes(x)
        v.store_lanes(kind, target + i * (2 if which == 4 else 4), count - i, x)


@v.compiled
def widen(source, target, count):
    for i in range(0, count, v.LANES):
        v.store_lanes(v.FLOAT32, target + 4 * i, count - i, v.load_lanes(v.BFLOAT16, source + 2 * i, count - i))


@v.compiled
def stream(kind, size, source, target, count):
    for i in range(0, count, v.LANES):
        x = v.load_lanes(kind, source + i * size, count - i)
        v.stream_lanes(kind, target + i * size, count - i, x)
    v.finish_streaming()


@v.compiled
def sums(source, target):
    x = v.load(source)
    v.store_sums(target, x, v.load(source + v.WIDTH), v.load(source + 2 * v.WIDTH), v.load(source + 3 * v.WIDTH))
    v.accumulate(source, x * v.splat(2.0))


def applied(which, x):
    y = torch.empty_like(x)
    apply(v.FLOAT32, which, x.data_ptr(), y.data_ptr(), x.numel())
    return y


@pytest.mark.parametrize(
    ("which", "exact", "low", "high", "limit"),
    (
        (0, torch.exp2, -126, 127, 3e-7),
        (1, torch.nn.functional.softplus, -10, 100, 1e-6),
        (2, torch.sigmoid, -10, 100, 1e-6),
        (5, torch.nn.functional.softplus, -10, 100, 1e-6),
        (6, torch.sigmoid, -10, 100, 1e-6),
    ),
    ids=("exp2", "softplus", "sigmoid", "softplus of a pair", "slope of a pair"),
)
def test_relative_error(which, exact, low, high, limit):
    x = torch.cat((torch.linspace(low, high, 50001), torch.logspace(-20, 0, 1001), -torch.logspace(-20, 0, 1001)))
    expected = exact(x.double())
    assert ((applied(which, x) - expected).abs() / expected).max() < limit


def test_limits():
    x = torch.tensor([0.0, -0.0, 1000.0, -1000.0, math.inf, -math.inf])
    assert applied(0, x).tolist() == [1, 1, math.inf, 2**-126, math.inf, 2**-126]
    assert applied(1, x[2:4]).tolist() == [1000, pytest.approx(0, abs=1e-37)]
    assert applied(2, x[2:]).tolist() == [1, 0, 1, 0]
    assert applied(6, x[2:]).tolist() == [1, pytest.approx(0, abs=1e-37), 1, pytest.approx(0, abs=1e-37)]
    assert all(torch.isnan(applied(which, torch.tensor([math.nan]))) for which in (0, 1, 2, 5, 6))


def test_even_lanes():
    assert applied(7, torch.arange(16.0)).tolist() == [0, 2, 4, 6, 8, 10, 12, 14] * 2


@pytest.mark.parametrize("count", (*range(1, 18), 33))
def test_a_part_of_a_row_leaves_its_neighbours(count):
    for dtype, kind, which in ((torch.float32, v.FLOAT32, 3), (torch.bfloat16, v.BFLOAT16, 4)):
        x, y = torch.randn(count), torch.full((count + 40,), 7.0, dtype=dtype)
        apply(kind, which, x.data_ptr(), y.data_ptr(), count)
        assert torch.equal(y[:count], x.to(dtype))
        assert (y[count:] == 7).all()


@pytest.mark.parametrize("offset", (0, 1, 8))  # values after the start of a cache line
@pytest.mark.parametrize("count", (5, 16, 37))
def test_rows_past_the_caches_are_whole_and_leave_their_neighbours(count, offset):
    for dtype, kind in ((torch.float32, v.FLOAT32), (torch.bfloat16, v.BFLOAT16)):
        x, y = torch.randn(count).to(dtype), torch.full((offset + count + 40,), 7.0, dtype=dtype)
        assert y.data_ptr() % v.WIDTH == 0
        stream(kind, x.itemsize, x.data_ptr(), y[offset:].data_ptr(), count)
        assert torch.equal(y[offset : offset + count], x)
        assert (y[:offset] == 7).all() and (y[offset + count :] == 7).all()


def test_bfloat16_rounds_as_torch_does():
    bits = torch.arange(0, 2**32, 2**32 // 100_003, dtype=torch.int64).to(torch.int32)
    near_ties = (torch.arange(-3, 4) + 0x3F808000).to(torch.int32)
    x = torch.cat((bits, near_ties, near_ties + 0x10000)).view(torch.float32)
    y = torch.empty(x.numel(), dtype=torch.bfloat16)
    apply(v.BFLOAT16, 4, x.data_ptr(), y.data_ptr(), x.numel())
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()].bfloat16())
    wide = torch.empty_like(x)
    widen(y.data_ptr(), wide.data_ptr(), x.numel())
    assert torch.equal(wide[~x.isnan()], y[~x.isnan()].float())


def test_sums_over_lanes():
    x, y = torch.arange(64.0).view(4, 16), torch.zeros(5)
    sums(x.data_ptr(), y.data_ptr())
    assert y.tolist() == [*torch.arange(64.0).view(4, 16).sum(1).tolist(), 0]
    assert torch.equal(x[0], 3 * torch.arange(16.0))


def test_without_a_writable_cache_it_warns_and_still_compiles(monkeypatch):
    njit = v.njit

    def refuses_to_cache(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(v, "njit", refuses_to_cache)
    with pytest.warns(UserWarning, match="compiled anew in each process: cannot cache"):

        @v.compiled
        def twice(x):
            return 2 * x

    assert twice(3) == 6


def test_an_edit_to_any_kernel_file_changes_the_record_types(monkeypatch):
    assert v.SOURCE.startswith("source_")
    assert v.sources_field() == v.SOURCE
    monkeypatch.setattr(v.Path, "read_bytes", lambda _: b"edited")
    assert v.sources_field() != v.SOURCE


def test_records_hold_integers_and_others():
    assert v.record("a", "b", c=np.float64) == np.dtype([("a", "i8"), ("b", "i8"), ("c", "f8")])
