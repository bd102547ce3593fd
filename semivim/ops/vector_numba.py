# mypy: ignore-errors
# ruff: noqa: ARG001 (an intrinsic names its arguments and reads their types and values from other places)
"""Sixteen float32 lanes as a numba type: explicit vectors where numba's own loops leave registers and exps unused.

Addresses are plain integers, so that a kernel takes one table of addresses and strides and every tensor keeps its
memory. LLVM splits the vectors where a machine's are narrower.
"""

import operator
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
WIDTH = 4 * LANES  # bytes
FLOAT32, BFLOAT16 = np.float32(0), np.uint16(0)  # their numba types say what lies in memory
LOG2_E = 1.4426950408889634


def sources_field() -> str:
    """Return a field name for the records that kernels take.

    Numba's cache looks at a kernel's own file and argument types; this makes it miss after an edit to any file of ops,
    with which go the constants and the functions that a kernel takes from them.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return f"source_{zlib.crc32(sources)}"


SOURCE = sources_field()
_FLOAT, _INT, _HALF, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _INTS, _HALVES = (ir.VectorType(element, LANES) for element in (_FLOAT, _INT, _HALF))
_BITS = ir.VectorType(ir.IntType(1), LANES)


def compiled(function: Callable) -> Callable:
    """Compile at the first call, without the interpreter's lock, and keep the result on disk where that is possible."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:
        warnings.warn(f"{function.__name__} is compiled anew in each process: {error}", stacklevel=2)
        return njit(**options)(function)


def record(*names: str, **others: type) -> np.dtype:
    """Return a record type of 64-bit integers and, by keyword, of others."""
    return np.dtype([(name, np.int64) for name in names] + list(others.items()))


class _Vector(types.Type):
    """The numba type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, _FLOATS)


def _register(function: Callable, instruction: str) -> None:
    """Lower an operator between vectors to an instruction that may fuse into a multiply-add."""

    @infer_global(function)
    class _Template(ConcreteTemplate):
        cases = [signature(vector, vector, vector)]

    @lower_builtin(function, vector, vector)
    def _lower(_context, builder, _signature, args):
        return getattr(builder, instruction)(*args, flags=("contract",))


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _register(_function, _instruction)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(value)] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _broadcast(builder, scalar):
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _declare(builder, name, result, *arguments):
    return builder.module.declare_intrinsic(name, fnty=ir.FunctionType(result, arguments))


@intrinsic
def splat(_context, value):
    """Return a vector with one float in all lanes."""

    def generate(context, builder, sig, args):
        return _broadcast(builder, context.cast(builder, args[0], sig.args[0], types.float32))

    return vector(value), generate


@intrinsic
def splat_at(_context, address):
    """Return a vector with the float at an address in all lanes."""

    def generate(_context, builder, _sig, args):
        return _broadcast(builder, builder.load(_pointer(builder, args[0], _FLOAT), align=4))

    return vector(types.int64), generate


@intrinsic
def load_float(_context, address):
    """Return the float at an address."""

    def generate(_context, builder, _sig, args):
        return builder.load(_pointer(builder, args[0], _FLOAT), align=4)

    return types.float32(types.int64), generate


@intrinsic
def store_float(_context, address, value):
    """Write a float to an address."""

    def generate(context, builder, _sig, args):
        builder.store(args[1], _pointer(builder, args[0], _FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def load(_context, address):
    """Return the sixteen floats at an address."""

    def generate(_context, builder, _sig, args):
        return builder.load(_pointer(builder, args[0], _FLOATS), align=4)

    return vector(types.int64), generate


@intrinsic
def store(_context, address, value):
    """Write sixteen floats to an address."""

    def generate(context, builder, _sig, args):
        builder.store(args[1], _pointer(builder, args[0], _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def prefetch(_context, address):
    """Ask for the cache line of an address, which need not exist."""

    def generate(context, builder, _sig, args):
        byte = ir.IntType(8).as_pointer()
        function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), byte, _INT, _INT, _INT)
        read, near, data = ir.Constant(_INT, 0), ir.Constant(_INT, 3), ir.Constant(_INT, 1)
        builder.call(function, (builder.inttoptr(args[0], byte), read, near, data))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _memory(kind):
    """Vector in memory, its suffix in LLVM's names, bytes per lane, for float32 or, as uint16, bfloat16."""
    return (_FLOATS, "v16f32", 4) if kind == types.float32 else (_HALVES, "v16i16", 2)


def _mask(builder, count):
    """Lanes below a count, as bits."""
    counts = builder.insert_element(ir.Constant(_INTS, ir.Undefined), builder.trunc(count, _INT), ir.Constant(_INT, 0))
    counts = builder.shuffle_vector(counts, ir.Constant(_INTS, ir.Undefined), _ints(0))
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), counts)


def _widen(builder, value):
    """Float32 from bfloat16 bits: the upper half."""
    if value.type == _FLOATS:
        return value
    return builder.bitcast(builder.shl(builder.zext(value, _INTS), _ints(16)), _FLOATS)


def _narrow(builder, value, memory):
    """Bfloat16 bits from float32, to the nearest, ties to even; NaN stays NaN."""
    if memory == _FLOATS:
        return value
    bits = builder.bitcast(value, _INTS)
    odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), odd), _ints(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, _ints(0x7FC0), rounded), memory)


@intrinsic
def _load_row(_context, kind, address):
    memory, _, size = _memory(kind)

    def generate(_context, builder, _sig, args):
        return _widen(builder, builder.load(_pointer(builder, args[1], memory), align=size))

    return vector(kind, types.int64), generate


@intrinsic
def _load_part(_context, kind, address, count):
    memory, suffix, size = _memory(kind)

    def generate(_context, builder, _sig, args):
        pointer = _pointer(builder, args[1], memory)
        function = _declare(builder, f"llvm.masked.load.{suffix}.p0", memory, pointer.type, _INT, _BITS, memory)
        zeros = ir.Constant(memory, [0] * LANES)
        arguments = pointer, ir.Constant(_INT, size), _mask(builder, args[2]), zeros
        return _widen(builder, builder.call(function, arguments))

    return vector(kind, types.int64, types.int64), generate


@intrinsic
def _store_row(_context, kind, address, value):
    memory, _, size = _memory(kind)

    def generate(context, builder, _sig, args):
        builder.store(_narrow(builder, args[2], memory), _pointer(builder, args[1], memory), align=size)
        return context.get_dummy_value()

    return types.void(kind, types.int64, vector), generate


@intrinsic
def _store_part(_context, kind, address, count, value):
    memory, suffix, size = _memory(kind)

    def generate(context, builder, _sig, args):
        pointer = _pointer(builder, args[1], memory)
        function = _declare(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), memory, pointer.type, _INT, _BITS)
        value = _narrow(builder, args[3], memory)
        builder.call(function, (value, pointer, ir.Constant(_INT, size), _mask(builder, args[2])))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, vector), generate


@intrinsic
def _stream_row(_context, address, value):
    def generate(context, builder, _sig, args):
        row = builder.store(args[1], _pointer(builder, args[0], _FLOATS), align=WIDTH)
        row.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def _is_float32(_context, kind):
    def generate(_context, _builder, sig, _args):
        return ir.Constant(ir.IntType(1), sig.args[0] == types.float32)

    return types.boolean(kind), generate


@intrinsic
def finish_streaming(_context):
    """Wait until other threads see what `stream_lanes` wrote."""

    def generate(context, builder, _sig, _args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def load_lanes(kind, address, count):
    """Return up to sixteen values of a tensor's row as float32, zero beyond the count."""
    if count >= LANES:
        return _load_row(kind, address)
    return _load_part(kind, address, count)


@compiled
def store_lanes(kind, address, count, value):
    """Write up to sixteen lanes to a tensor's row."""
    if count >= LANES:
        _store_row(kind, address, value)
    else:
        _store_part(kind, address, count, value)


@compiled
def stream_lanes(kind, address, count, value):
    """`store_lanes` for a tensor that is not read again soon: float32 rows go past the caches.

    A row of 64 bytes is a whole cache line, which so need not be read before it is overwritten. Half a line, as of
    bfloat16, would be slower this way.
    """
    if _is_float32(kind) and count >= LANES and address % WIDTH == 0:
        _stream_row(address, value)
    else:
        store_lanes(kind, address, count, value)


@intrinsic
def store_sums(_context, address, v0, v1, v2, v3):
    """Write the sums over the lanes of four vectors to an address, in a fixed order."""

    def generate(context, builder, _sig, args):
        def fold(x, y, low, high):
            picked = (builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes)) for lanes in (low, high))
            return builder.fadd(*picked)

        low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
        pairs = fold(args[1], args[2], low, high), fold(args[3], args[4], low, high)
        low = [start + lane for start in (0, 8, 16, 24) for lane in range(4)]
        total = fold(*pairs, low, [lane + 4 for lane in low])
        for distance in (2, 1):
            total = fold(total, total, list(range(16)), [lane ^ distance for lane in range(16)])
        quad = ir.VectorType(_INT, 4)
        sums = builder.shuffle_vector(total, total, ir.Constant(quad, [0, 4, 8, 12]))
        builder.store(sums, _pointer(builder, args[0], sums.type), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector, vector, vector, vector), generate


@intrinsic
def sum_lanes(_context, x):
    """Return the sum of the sixteen lanes as a float, in a fixed order."""

    def generate(_context, builder, _sig, args):
        (total,) = args
        for distance in (8, 4, 2, 1):
            other = ir.Constant(_INTS, [lane ^ distance for lane in range(LANES)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, other))
        return builder.extract_element(total, ir.Constant(_INT, 0))

    return types.float32(vector), generate


@intrinsic
def even_lanes(_context, x):
    """Return lanes 0, 2, ..., 14 of a vector in its lower half, and again in its upper half."""

    def generate(_context, builder, _sig, args):
        return builder.shuffle_vector(args[0], args[0], ir.Constant(_INTS, list(range(0, 2 * LANES, 2))))

    return vector(vector), generate


@intrinsic
def positive_part(_context, x):
    """Return max(x, 0), NaN for NaN."""

    def generate(_context, builder, _sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(0.0)), _constant(0.0), args[0])

    return vector(vector), generate


@intrinsic
def magnitude(_context, x):
    """Return |x|."""

    def generate(_context, builder, _sig, args):
        return builder.bitcast(builder.and_(builder.bitcast(args[0], _INTS), _ints(0x7FFFFFFF)), _FLOATS)

    return vector(vector), generate


@intrinsic
def exp2(_context, x):
    """Return 2^x, relative error below 3e-7, exactly 1 at 0; outside [-126, 128] the ends' values, NaN for NaN."""
    # Minimax of (2^f - 1) / f on [-1/2, 1/2]: the error of 2^f vanishes with f, so slow decays stay exact.
    coefficients = 0.0013400436601042, 0.0096663729531244, 0.0555033318086027, 0.240223489548325, 0.6931471955056403

    def generate(_context, builder, _sig, args):
        (x,) = args
        for order, limit in (("<", -126.0), (">", 128.0)):
            # The comparison is false for NaN, which stays.
            x = builder.select(builder.fcmp_ordered(order, x, _constant(limit)), _constant(limit), x)
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        shifted = builder.fadd(x, _constant(12582912.0))
        fraction = builder.fsub(x, builder.fsub(shifted, _constant(12582912.0)))
        power = _constant(coefficients[0])
        for coefficient in (*coefficients[1:], 1.0):
            power = builder.fadd(
                builder.fmul(power, fraction, flags=("contract",)), _constant(coefficient), flags=("contract",)
            )
        exponent = builder.shl(builder.bitcast(shifted, _INTS), _ints(23))
        return builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)

    return vector(vector), generate


@intrinsic
def where_negative(_context, x, below, otherwise):
    """Return `below` where x < 0, else, and for NaN, `otherwise`."""

    def generate(_context, builder, _sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(0.0)), args[1], args[2])

    return vector(vector, vector, vector), generate


@compiled
def _softplus(x, small):
    """Return log(1 + e^x) for small = e^-|x|."""
    # Minimax of log(1 + e) / e on [0, 1].
    p = splat(0.00538405868848843) * small + splat(-0.030110951411843258)
    p = p * small + splat(0.07921071667253714)
    p = p * small + splat(-0.13746620052112943)
    p = p * small + splat(0.19145115342257388)
    p = p * small + splat(-0.24852945459191278)
    p = p * small + splat(0.3332034351020973)
    p = p * small + splat(-0.4999955258653787)
    p = p * small + splat(0.9999999745322546)
    return positive_part(x) + p * small


@compiled
def softplus(x):
    """Return log(1 + e^x), relative error below 1e-6."""
    return _softplus(x, exp2(magnitude(x) * splat(-LOG2_E)))


@compiled
def softplus_and_slope(x):
    """Return log(1 + e^x) and its derivative 1 / (1 + e^-x), of one exponential."""
    small = exp2(magnitude(x) * splat(-LOG2_E))
    return _softplus(x, small), where_negative(x, small, splat(1.0)) / (splat(1.0) + small)


@compiled
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    return splat(1.0) / (splat(1.0) + exp2(x * splat(-LOG2_E)))


@compiled
def accumulate(address, value):
    """Add to the sixteen floats at an address."""
    store(address, load(address) + value)
