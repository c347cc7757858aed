"""The inner loops of matmuls in LLVM IR, atomics, and the compilation of kernels with a cache.

A microkernel multiplies rows by a panel of weights, which holds 64 outputs side by side. For float
weights each output is one chain of multiply-adds; for int8 weights it is exact.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from nanogpt.files import cache_dir

NR = 64  # outputs of a panel
SIMD_LANES = 16  # 32-bit numbers of an AVX-512 vector; shorter vectors are used in groups
# Rows that share each load of weights: with half a panel, they fill the registers of AVX-512.
MR = 8
# How far ahead weights are prefetched: about what arrives during the latency of the memory.
PREFETCH_BYTES = 2048

# Numba checks only the file of a kernel for changes, not those of the functions that it calls.
SOURCE_FILES = ("microkernel.py", "rowwise.py", "structs.py", "kernels.py")
SOURCE_HASH = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCE_FILES)
).hexdigest()[:12]


def cache_folder() -> Path:
    """Return the folder of compiled kernels, a different one for each version of their source."""
    return cache_dir() / f"numba-{SOURCE_HASH}"


def njit_cached(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Apply `numba.njit` with a cache in `cache_folder`, if that is writable.

    Kernels allocate nothing, so reference counting (`_nrt`) is off: it would take longer than a
    matmul, because threads contend for the counts.
    """
    if function is None:
        return lambda function: njit_cached(function, **options)
    numba_config: Any = numba.config
    default_folder = numba_config.CACHE_DIR
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # Numba reads the setting when a function is decorated. Other users keep their own folder.
    numba_config.CACHE_DIR = str(folder)
    options |= {"cache": os.access(folder, os.W_OK), "nogil": True, "error_model": "numpy"}
    jit: Any = numba.njit
    try:
        return jit(function, _nrt=False, **options)
    finally:
        numba_config.CACHE_DIR = default_folder


I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
BYTES = I8.as_pointer()
I32_VECTOR = ir.VectorType(I32, SIMD_LANES)
I32_PAIRS = ir.VectorType(I32, 2 * SIMD_LANES)
F32_VECTOR = ir.VectorType(F32, SIMD_LANES)
EVEN_LANES = ir.Constant(I32_VECTOR, list(range(0, 2 * SIMD_LANES, 2)))
ODD_LANES = ir.Constant(I32_VECTOR, list(range(1, 2 * SIMD_LANES, 2)))
# panel, its number of steps, x, its row and step strides in bytes, y, its row stride in bytes
MICROKERNEL_TYPE = ir.FunctionType(ir.VoidType(), [BYTES, I64, BYTES, I64, I64, BYTES, I64])


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=align)


def _offset(builder: Any, address: Any, *offsets: Any) -> Any:
    for offset in offsets:
        address = builder.gep(address, [offset])
    return address


def _load_weights(builder: Any, dtype: Any, address: Any) -> Any:
    """Load the weights of 16 outputs as 32-bit numbers."""
    if dtype == types.int8:
        pairs = _load(builder, address, ir.VectorType(I8, 2 * SIMD_LANES), 1)
        return builder.sext(pairs, I32_PAIRS)
    if dtype == types.uint16:
        bits = builder.zext(_load(builder, address, ir.VectorType(I16, SIMD_LANES), 2), I32_VECTOR)
        bits = builder.shl(bits, ir.Constant(I32_VECTOR, [16] * SIMD_LANES))
        return builder.bitcast(bits, F32_VECTOR)
    return _load(builder, address, F32_VECTOR, 4)


def _broadcast_input(builder: Any, dtype: Any, address: Any) -> Any:
    """Load a 32-bit input, for int8 weights a pair of int16, into all lanes of a vector."""
    is_int8 = dtype == types.int8
    vector = I32_VECTOR if is_int8 else F32_VECTOR
    undefined = ir.Constant(vector, ir.Undefined)
    scalar = _load(builder, address, vector.element, 2 if is_int8 else 4)
    first_lane = builder.insert_element(undefined, scalar, I32(0))
    all_zero = ir.Constant(I32_VECTOR, [0] * SIMD_LANES)
    broadcast = builder.shuffle_vector(first_lane, undefined, all_zero)
    if not is_int8:
        return broadcast
    pairs = builder.bitcast(broadcast, ir.VectorType(I16, 2 * SIMD_LANES))
    return builder.sext(pairs, I32_PAIRS)


def _fma(builder: Any, dtype: Any, scalar: Any, weights_vec: Any, total: Any) -> Any:
    """Return total + scalar * weights_vec; for pairs, x86 has a single instruction for it."""
    if dtype != types.int8:
        kind = ir.FunctionType(F32_VECTOR, [F32_VECTOR] * 3)
        name = f"llvm.fmuladd.v{SIMD_LANES}f32"
        fma = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(fma, [scalar, weights_vec, total])
    products = builder.mul(weights_vec, scalar, flags=["nsw"])
    undefined = ir.Constant(I32_PAIRS, ir.Undefined)
    even = builder.shuffle_vector(products, undefined, EVEN_LANES)
    odd = builder.shuffle_vector(products, undefined, ODD_LANES)
    return builder.add(total, builder.add(even, odd))


def _write_body(function: Any, dtype: Any, num_rows: int, width: int) -> None:
    """Write the body of a microkernel: one accumulator for each row and each 16 outputs."""
    panel, steps, x, x_row, x_step, y, y_row = function.args
    is_int8 = dtype == types.int8
    entry = function.append_basic_block("begin")
    loop = function.append_basic_block("multiply")
    done = function.append_basic_block("done")
    builder = ir.IRBuilder(entry)
    builder.branch(loop)
    builder.position_at_end(loop)
    prefetch_type = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
    step_bytes = dtype.bitwidth // 8 * (2 if is_int8 else 1)  # of one output
    vector = I32_VECTOR if is_int8 else F32_VECTOR
    zeros = ir.Constant(vector, [0 if is_int8 else 0.0] * SIMD_LANES)
    columns = range(0, width, SIMD_LANES)

    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    totals = {(r, column): builder.phi(vector) for r in range(num_rows) for column in columns}
    panel_row = builder.mul(k, I64(NR * step_bytes))
    x_column = builder.mul(k, x_step)
    for line in range(0, width * step_bytes, 64):
        address = _offset(builder, panel, panel_row, I64(PREFETCH_BYTES + line))
        builder.call(prefetch, [address, I32(0), I32(3), I32(1)])
    weights = {}
    for column in columns:
        address = _offset(builder, panel, panel_row, I64(column * step_bytes))
        weights[column] = _load_weights(builder, dtype, address)
    for r in range(num_rows):
        address = _offset(builder, x, builder.mul(I64(r), x_row), x_column)
        scalar = _broadcast_input(builder, dtype, address)
        for column in columns:
            total = totals[r, column]
            total.add_incoming(zeros, entry)
            totals[r, column] = _fma(builder, dtype, scalar, weights[column], total)
            total.add_incoming(totals[r, column], loop)
    k_next = builder.add(k, I64(1))
    k.add_incoming(k_next, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, steps), loop, done)
    builder.position_at_end(done)
    for (r, column), total in totals.items():
        result = builder.sitofp(total, F32_VECTOR) if is_int8 else total
        address = _offset(builder, y, builder.mul(I64(r), y_row), I64(4 * column))
        builder.store(result, builder.bitcast(address, F32_VECTOR.as_pointer()), align=4)
    builder.ret_void()


def make_microkernel(num_rows: int, width: int) -> Any:
    """Return an intrinsic f(panel, x, y): y (num_rows, width) = x (num_rows, K) @ panel (K, width).

    It is written in LLVM IR because no compiler finds this loop from Python or C. y is float32. x
    is float32 for panels of float32 or uint16 (bfloat16 bits). For panels of int8, x is int16, and
    a panel (K/2, 2 width) holds pairs of weights: one instruction adds two products to a 32-bit
    sum. x may have more than K columns.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        """Call the microkernel, a function of its own in each module so that callers stay small."""
        panel, x, y = (
            make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, values, strict=True)
        )
        dtype = signature.args[0].dtype
        name = f"nanogpt_tile_{num_rows}_{width}_{dtype}"
        function = cgutils.get_or_insert_function(builder.module, MICROKERNEL_TYPE, name)
        if not function.blocks:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            _write_body(function, dtype, num_rows, width)
        x_row, x_item = cgutils.unpack_tuple(builder, x.strides)
        x_step = builder.mul(x_item, I64(2 if dtype == types.int8 else 1))
        steps = cgutils.unpack_tuple(builder, panel.shape)[0]
        y_row = cgutils.unpack_tuple(builder, y.strides)[0]
        panel_data, x_data, y_data = (builder.bitcast(array.data, BYTES) for array in (panel, x, y))
        builder.call(function, [panel_data, steps, x_data, x_row, x_step, y_data, y_row])
        return context.get_dummy_value()

    @intrinsic
    def microkernel(typing_context, panel, x, y):  # type: ignore[no-untyped-def]
        return types.void(panel, x, y), generate

    return microkernel


gemv_64 = make_microkernel(1, NR)
gemm_8x32 = make_microkernel(MR, NR // 2)


def _element_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of element `arguments[1]` of the array `arguments[0]`."""
    array = make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def atomic_add(typing_context, array, i, value):  # type: ignore[no-untyped-def]
    """Add to array[i], int64, atomically; return the value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _element_pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", address, arguments[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def atomic_load_acquire(typing_context, array, i):  # type: ignore[no-untyped-def]
    """Return array[i], int64, by an atomic load with acquire ordering."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _element_pointer(context, builder, signature, arguments)
        return builder.load_atomic(address, "acquire", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def fmax_nnan(typing_context, a, b):  # type: ignore[no-untyped-def]
    """Return the larger of two float32, neither NaN; unlike with `max`, loops vectorize."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(F32, [F32] * 2)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.maxnum.f32")
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def bitcast_f32(typing_context, bits):  # type: ignore[no-untyped-def]
    """Return the float32 with the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate
