# mypy: ignore-errors
# ruff: noqa: ARG001 (an intrinsic names its arguments and reads their types and values from other places)
"""Subnormal numbers in kernels: read and written as zero, because a processor may take 100 cycles for each.

States that die out and small gradients make products below 1.2e-38, the smallest normal float32. Whether such a product
is kept is a mode of the thread. A kernel sets the mode at its start and restores it at its end; it raises nothing in
between, so its caller never sees the mode changed. x86 (MXCSR) and 64-bit ARM (FPCR) have such a mode; elsewhere both
functions do nothing.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_MACHINE = platform.machine().lower()
_X86, _ARM = _MACHINE in ("x86_64", "amd64", "i386", "i686"), _MACHINE in ("aarch64", "arm64")
_BITS = 1 << 15 | 1 << 6 if _X86 else 1 << 24  # MXCSR: results (FTZ), operands (DAZ). FPCR: both (FZ)
_BYTE, _INT, _LONG, _VOID = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64), ir.VoidType()


def _x86_register(builder, instruction, slot):
    """Move the register MXCSR to or from memory."""
    function = builder.module.declare_intrinsic(f"llvm.x86.sse.{instruction}", fnty=ir.FunctionType(_VOID, [_BYTE]))
    builder.call(function, [builder.bitcast(slot, _BYTE)])


def _get(builder):
    if _X86:
        slot = cgutils.alloca_once(builder, _INT)
        _x86_register(builder, "stmxcsr", slot)
        return builder.zext(builder.load(slot), _LONG)
    if _ARM:
        return builder.call(
            builder.module.declare_intrinsic("llvm.aarch64.get.fpcr", fnty=ir.FunctionType(_LONG, [])), []
        )
    return ir.Constant(_LONG, 0)


def _set(builder, mode):
    if _X86:
        slot = cgutils.alloca_once(builder, _INT)
        builder.store(builder.trunc(mode, _INT), slot)
        _x86_register(builder, "ldmxcsr", slot)
    elif _ARM:
        function = builder.module.declare_intrinsic("llvm.aarch64.set.fpcr", fnty=ir.FunctionType(_VOID, [_LONG]))
        builder.call(function, [mode])


@intrinsic
def float_mode(_context):
    """Return the floating point mode of the thread."""

    def generate(_context, builder, _sig, _args):
        return _get(builder)

    return types.int64(), generate


@intrinsic
def flush_subnormals(_context):
    """Take subnormal numbers as zero in this thread from here on; return the mode before."""

    def generate(_context, builder, _sig, _args):
        before = _get(builder)
        _set(builder, builder.or_(before, ir.Constant(_LONG, _BITS)))
        return before

    return types.int64(), generate


@intrinsic
def restore_float_mode(_context, mode):
    """Give the thread the mode that `flush_subnormals` returned."""

    def generate(context, builder, _sig, args):
        _set(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate
