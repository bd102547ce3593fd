import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from semivim.ops.launch_triton import alignment, ceil_div, check_size, launch
from tests.ops.triton_runs import compiled
from tests.ops.triton_runs import compiles as compiles

ONE_WARP = {"num_warps": 1}


@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=("x", "y"))
def add(x, y, count, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    if y is not None:
        tl.store(x + at, tl.load(x + at) + tl.load(y + at), mask=at < count)


@pytest.fixture
def launches(compiles, monkeypatch):
    """The kernels compiled and, of each launch of a compiled one, its grid and arguments."""
    seen = []
    monkeypatch.setattr(CompiledKernel, "__getitem__", lambda self, grid: lambda *values: seen.append((grid, values)))
    return compiles, seen


@compiled
def test_second_launch_hands_addresses_to_the_compiled_kernel(launches):
    compiled_kernels, seen = launches
    x, y = torch.zeros(8), torch.zeros(8)
    for count in (5, 1, 16):
        launch(add, (1, 1, 1), x, y, count, WIDTH=8, options=ONE_WARP)
    assert len(compiled_kernels) == 1
    assert seen == [((1, 1, 1), (x.data_ptr(), y.data_ptr(), count, 8)) for count in (1, 16)]


@compiled
@pytest.mark.parametrize(
    ("change", "options"),
    (
        ({"y": None}, ONE_WARP),
        ({"x": torch.zeros(8, dtype=torch.bfloat16)}, ONE_WARP),
        ({"count": 2**31}, ONE_WARP),
        ({"WIDTH": 4}, ONE_WARP),
        ({}, {"num_warps": 2}),
        ({"specialized": (True,)}, ONE_WARP),
    ),
    ids=("absent", "dtype", "wide", "constant", "option", "specialised"),
)
def test_another_kernel_where_its_text_would_differ(launches, change, options):
    def run(WIDTH=8, options=ONE_WARP, specialized=(), **changed):
        arguments = {"x": torch.zeros(8), "y": torch.zeros(8), "count": 5} | changed
        launch(add, (1, 1, 1), *arguments.values(), WIDTH=WIDTH, options=options, specialized=specialized)

    run()
    run(options=options, **change)
    assert not launches[1]
    run()
    run(options=options, **change)
    assert len(launches[1]) == 2


def test_sizes_over_a_limit_are_refused():
    check_size(65_535, 2**31 - 1)
    with pytest.raises(ValueError, match="at most 65535 images in a batch, got 65536"):
        check_size(65_536, 1)
    with pytest.raises(ValueError, match="at most 2147483647 elements an image, got 2147483648"):
        check_size(1, 2**31)


def test_alignment_tells_apart_what_triton_specialises_on():
    x = torch.zeros(16)
    assert alignment([x, x[1:], x[4:]], [16, 8, 1]) == (True, False, True, True, False, False, False, False, True)


def test_ceil_div():
    assert [ceil_div(a, 4) for a in (1, 4, 5, 8)] == [1, 1, 2, 2]
