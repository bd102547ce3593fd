"""The scan on one CPU thread: this package, the token loop and mamba.py's parallel scan in one run.

    pip install mambapy && python benchmarks/scan.py            # about 3 minutes, 8 GB of memory
    python benchmarks/scan.py --shape 2 197 384 16 --repeats 3  # smaller

Times are the thread's own CPU time, the least of several calls, so that other work on the machine counts little;
memory is what a call allocates at its peak beyond inputs, outputs and gradients. A limit is the largest of: bytes that
must move over the bandwidth of a copy, exponentials over the rate of the same polynomial alone, operations over the
rate of a large matrix product, each measured in the same run.
"""

import argparse
import ctypes
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from mambapy.pscan import pscan
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from semivim.ops import Direction, scan_numba, selective_scan, vector_numba
from semivim.ops import linear as products
from semivim.ops.causal_conv import causal_conv
from semivim.ops.linear import linear
from semivim.ops.scan import scan


def keep_memory() -> None:
    """Let this process keep what it frees, as one that trains does: else each result's first touch is timed too."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value


def least_s(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call holds at most at once, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def token_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as mamba-ssm's plain version has it: decays and inputs of all states at once, then a loop."""
    decay = torch.exp(torch.einsum("bld,dn->bdln", delta, A))
    entering = torch.einsum("bld,bln,bld->bdln", delta, B, u)
    h, y = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, :, t] * h + entering[:, :, t]
        y.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(y, 1)


def reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(*channel_first(u, delta), A, *channel_first(B, C), backend="reference").transpose(1, 2)


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(*channel_first(u, delta), A, *channel_first(B, C), backend="numba").transpose(1, 2)


def by_pscan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The scan as mamba.py's Mamba block calls it."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    states = pscan(decay, delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (states @ C.unsqueeze(-1)).squeeze(3)


def channel_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def scan_inputs(b: int, l: int, d: int, n: int) -> list[Tensor]:
    delta = F.softplus(torch.randn(b, l, d) - 4)
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    tensors = torch.randn(b, l, d), delta, A, torch.randn(b, l, n), torch.randn(b, l, n)
    return [x.requires_grad_() for x in tensors]


def block_inputs(b: int, l: int, d: int, n: int, step: float = -4.0) -> list[Tensor]:
    """Operands of the bidirectional scan, strided as a block's projections leave them; `step` is before softplus."""
    rows = [torch.randn(b, l, d) for _ in range(4)]
    weights = [torch.randn(b, l, 2 * n + d // 32)[..., d // 32 :] for _ in range(2)]
    gate = torch.randn(b, l, 2 * d)[..., d:]
    A = [-torch.arange(1.0, n + 1).repeat(d, 1) for _ in range(2)]
    tensors = *rows, *weights, gate, *A, *(torch.ones(d) for _ in range(2)), *(torch.full((d,), step) for _ in range(2))
    return [x.requires_grad_() for x in tensors]


def both_scans(*operands: Tensor) -> Tensor:
    """Both directions as Vim's mixer scans them; operands as `block_inputs` gives them."""
    f, g = (Direction(*operands[k:6:2], *operands[7 + k :: 2], reverse=bool(k)) for k in (0, 1))
    return scan([f, g], operands[6], None, 0.5)


def pair_of_scans(*operands: Tensor) -> Tensor:
    """The same without a gate."""
    return scan([Direction(*operands[k::2], reverse=bool(k)) for k in (0, 1)])


def both_convs(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(causal_conv(x, [(weights[0], weights[1]), (weights[2], weights[3])], [False, True]))


def both_passes(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], grad: float = 1.0
) -> Callable[[], object]:
    out = function(*inputs)
    grads = [torch.full_like(o, grad) for o in (out if isinstance(out, tuple) else [out])]

    def call() -> object:
        out = function(*inputs)
        return out, torch.autograd.grad(out, inputs, grads)

    return call


def forward_only(function: Callable[..., object], inputs: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


@vector_numba.compiled
def _exps(at, count):
    for i in range(count):
        row = at + (i & 15) * 256
        for k in range(0, 256, 64):
            vector_numba.store(row + k, vector_numba.exp2(vector_numba.load(row + k)))


def exps_per_s() -> float:
    """Rate of the kernels' exponential alone, from and to the first cache."""
    memory, count = torch.zeros(2048), 100_000
    return 64 * count / least_s(lambda: _exps(memory.data_ptr(), count), 10)


def gemm_per_s(product: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Floating point operations of a large matrix product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / least_s(lambda: product(a, a), 5)


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy between buffers that no cache holds."""
    a, b = torch.zeros(2, 1 << 26)
    return 2 * a.numel() * 4 / least_s(lambda: b.copy_(a), 5)


class Limits(NamedTuple):
    """What this machine can do in a second."""

    exps: float
    bandwidth: float  # bytes
    gemm: float  # operations


def compare(shape: tuple[int, int, int, int], repeats: int) -> None:
    inputs = scan_inputs(*shape)
    b, l, d, n = shape
    states, kept = b * l * d * n, sum(x.numel() * 4 for x in inputs) + b * l * d * 4
    print(f"\nselective scan, b {b}, l {l}, d {d}, n {n}, float32; b l d n floats are {states * 4 / 2**20:.0f} MiB")
    print(f"{'':24}{'forward':>12}{'+ backward':>12}{'ns a state':>12}{'extra MiB':>12}")
    rows = {}
    for name, function, count in (
        ("token loop", token_loop, 2),
        ("reference backend", reference, max(2, repeats // 5)),
        ("mamba.py pscan", by_pscan, max(2, repeats // 5)),
        ("semivim", ours, repeats),
    ):
        call = both_passes(function, inputs)
        forward, both = least_s(forward_only(function, inputs), count), least_s(call, count)
        extra = peak_bytes(call) - kept
        rows[name] = forward, both, extra
        print(f"{name:24}{forward * 1e3:9.2f} ms{both * 1e3:9.2f} ms{both / states * 1e9:12.3f}{extra / 2**20:12.1f}")
    own, loop, parallel = rows["semivim"], rows["token loop"], rows["mamba.py pscan"]
    print(f"forward {loop[0] / own[0]:.0f} times as fast as the token loop (goal 20)")
    print(f"both passes {parallel[1] / own[1]:.0f} times as fast as pscan (goal 40)")
    share, of_pscan = states * 4 / own[2], parallel[2] / own[2]
    print(f"extra memory 1/{share:.0f} of b l d n floats (goal 1/8), 1/{of_pscan:.0f} of pscan's (goal 1/10)")


def stages(shape: tuple[int, int, int, int], repeats: int, limits: Limits) -> float:
    """Print what the scans and the convolution of one Vim block take; return the forward's ns per token and image."""
    b, l, d, n = shape
    inputs = block_inputs(*shape)
    tensor, states = b * l * d * 4, b * l * d * n
    x = torch.randn(b, l, 2 * d)[..., :d].requires_grad_()
    taps = [torch.randn(size).requires_grad_() for size in ((d, 1, 4), (d,), (d, 1, 4), (d,))]
    print(f"\none Vim block, b {b}, l {l}, d {d}, n {n}, float32: both directions")
    print(f"{'':24}{'forward':>12}{'limit':>9}{'+ backward':>12}{'limit':>9}")
    result = 0.0
    # Tensors of b l d moved: read u, delta (both directions) and z, write one; backward read those and the gradient,
    # write five. Exponentials: two a state in all, and two or three a channel for softplus and gates.
    for name, function, operands, moved, exponentials in (
        ("scans", both_scans, inputs, (6, 17), (2 * states + 5 * tensor / 4, 4 * states + 13 * tensor / 4)),
        ("convolutions", both_convs, [x, *taps], (3, 7), (2 * tensor / 4, 4 * tensor / 4)),
    ):
        forward = least_s(forward_only(function, operands), repeats)
        total = least_s(both_passes(function, operands), repeats)
        least = [max(m * tensor / limits.bandwidth, e / limits.exps) for m, e in zip(moved, exponentials, strict=True)]
        print(f"{name:24}{forward * 1e3:9.2f} ms{least[0] * 1e3:9.2f}{total * 1e3:9.2f} ms{least[1] * 1e3:9.2f}")
        result = result or forward / (b * l)
        if function is both_scans:
            # States that die out within a token or two, and gradients as small as a real step's: nothing may be slower.
            dying = block_inputs(*shape, step=3.0)
            forward = least_s(forward_only(function, dying), repeats)
            total = least_s(both_passes(function, dying, grad=1e-8), repeats)
            print(f"{'the same, dying states':24}{forward * 1e3:9.2f} ms{'':9}{total * 1e3:9.2f} ms")
    rank = d // 32
    for name, times, product, fan_in, fan_out in (
        ("in_proj", 1, linear, d // 2, 2 * d),
        ("in_proj, by torch", 1, F.linear, d // 2, 2 * d),
        ("x_proj, both", 2, linear, d, rank + 2 * n),
        ("dt_proj, both", 2, F.linear, rank, d),
        ("out_proj", 1, linear, d, d // 2),
    ):
        operands = [torch.randn(b * l, fan_in).requires_grad_(), torch.randn(fan_out, fan_in).requires_grad_()]
        forward = times * least_s(forward_only(product, operands), repeats)
        total = times * least_s(both_passes(product, operands), repeats)
        operations, moved = 2 * b * l * fan_in * fan_out, 4 * b * l * (fan_in + fan_out)
        limit = times * max(operations / limits.gemm, moved / limits.bandwidth)
        print(f"{name:24}{forward * 1e3:9.2f} ms{limit * 1e3:9.2f}{total * 1e3:9.2f} ms{3 * limit * 1e3:9.2f}")
    return result


def processor() -> str:
    """Return the processor's name, vendor and instruction set."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {products.vendor()}, {torch.backends.cpu.get_cpu_capability()}"


def compare_products(repeats: int) -> None:
    """Print oneDNN's time over that of torch's own product, at the sizes of Vim's projections."""
    products._LEAST_WORK = 1  # in the backward as well
    print(f"\n{'i, o':>12}{'tokens':>8}{'M mul-adds':>12}{'torch':>12}{'oneDNN':>8}{'+ backward':>12}{'oneDNN':>8}")
    for i, o in ((192, 768), (384, 192), (384, 44), (64, 256), (128, 64)):
        for tokens in (17, 197, 816, 1576, 6085):
            operands = [torch.randn(tokens, i).requires_grad_(), torch.randn(o, i).requires_grad_()]
            times = []
            for call in (forward_only, both_passes):
                # In turn, so that other work on the machine meets both.
                own, other = call(F.linear, operands), call(products.product, operands)
                pairs = [(least_s(own, 1), least_s(other, 1)) for _ in range(repeats)]
                times.append([min(of) for of in zip(*pairs, strict=True)])
            (a, b), (c, d) = times
            print(f"{f'{i}, {o}':>12}{tokens:8}{tokens * i * o / 1e6:12.1f}", end="")
            print(f"{a * 1e6:9.0f} us{b / a:7.2f}x{c * 1e6:9.0f} us{d / c:7.2f}x")


def one_state(shape: tuple[int, int, int, int], repeats: int, limits: Limits) -> None:
    """Print what one state per channel takes beside four, without a gate, as VMamba scans a pair of directions."""
    b, l, d, _ = shape
    tensor = b * l * d * 4
    # Tensors of b l d moved: read u and delta of both directions, write, read and write the sum; the backward reads
    # those four twice and the gradient, and writes four.
    limit = [moved * tensor / limits.bandwidth for moved in (7, 20)]
    print(f"\nscan of a pair without gate, b {b}, l {l}, d {d}, float32")
    print(f"{'':24}{'forward':>12}{'limit':>9}{'+ backward':>12}{'limit':>9}")
    for n in (1, 4):
        operands = block_inputs(b, l, d, n)
        operands.pop(6)
        forward, total = (least_s(call(pair_of_scans, operands), repeats) for call in (forward_only, both_passes))
        print(f"{f'n {n}':24}{forward * 1e3:9.2f} ms{limit[0] * 1e3:9.2f}{total * 1e3:9.2f} ms{limit[1] * 1e3:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 197, 384, 16), metavar=("b", "l", "d", "n"))
    parser.add_argument("--stages", action="store_true", help="only the stages of a block, without the slow peers")
    parser.add_argument("--products", action="store_true", help="only oneDNN's matrix products against torch's own")
    parser.add_argument("--repeats", type=int, default=20, help="calls timed for the fast kernels")
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    assert scan_numba.unavailable(torch.device("cpu")) is None
    print(f"{processor()}, torch {torch.__version__}, one thread")
    if args.products:
        compare_products(args.repeats)
        return
    limits = Limits(exps_per_s(), copy_bytes_per_s(), gemm_per_s(linear))
    print(f"{limits.exps / 1e9:.1f} G exponentials/s,", end=" ")
    print(f"copy {limits.bandwidth / 1e9:.1f} GB/s, GEMM {limits.gemm / 1e9:.0f} GFLOP/s", end=" ")
    print(f"(torch's own {gemm_per_s(F.linear) / 1e9:.0f})")
    shape = tuple(args.shape)
    if not args.stages:
        compare(shape, args.repeats)
    short = stages(shape, args.repeats, limits)
    long = stages((1, 6085, *shape[2:]), max(3, args.repeats // 3), limits)
    one_state((2, 3136, shape[2], 1), args.repeats, limits)
    print(f"\nscans, forward, ns a token: {short * 1e9:.0f} at l {shape[1]}, {long * 1e9:.0f} at l 6085", end="")
    print(f": {long / short:.2f} times (goal 1.15)")


if __name__ == "__main__":
    main()
