"""The innermost loop of every product, and how it is compiled: what Numba's own language cannot say.

In: a panel of weights, 64 outputs side by side, and rows of numbers. Out: their products: of floats each one chain of multiply-adds, of integers exact.
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

PANEL = 64  # outputs side by side
LANES = 16  # numbers in a vector: one of AVX-512's, and two or four where vectors are shorter
TOGETHER = 8  # rows that share each weight that is read; with half a panel that fills AVX-512's registers
AHEAD = 2048  # bytes by which weights are asked for before they are used: about what arrives during the delay of the memory


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit`, with what it compiles kept in our cache for the next process, where that can be written.

    Nothing is allocated, and so no references are counted, which would take more time than a product: threads would wait for each other's counts.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # Numba looks for changes only in the file of a function itself
    settings: Any = numba.config
    elsewhere, folder = settings.CACHE_DIR, cache_dir() / f"numba-{version}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    settings.CACHE_DIR = str(folder)  # read where a function is decorated
    try:
        return numba.njit(function, cache=os.access(folder, os.W_OK), nogil=True, error_model="numpy", _nrt=False, **options)
    finally:
        settings.CACHE_DIR = elsewhere


def tile(R: int, width: int) -> Any:
    """Make the inner loop of every product: tile(panel, x, y) with y (R, width) float32 = x (R, K or more) @ panel (K, width).

    It is written in LLVM's own language, with one accumulator for each row and each 16 outputs, since no compiler finds this loop by itself.
    The panel's type says what x is: float32 beside float32 or uint16 (the upper half of a float32, which is a bfloat16), and int16 beside int8. There, two
    weights of an output lie side by side, the panel is (K / 2, 2 width), and one instruction adds two products to a sum in 32 bits.
    """
    i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
    integers, floats, pairs = ir.VectorType(i32, LANES), ir.VectorType(ir.FloatType(), LANES), ir.VectorType(i32, 2 * LANES)
    pointer = i8.as_pointer()
    even, odd = (ir.Constant(integers, list(range(first, 2 * LANES, 2))) for first in (0, 1))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, x, y = (make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True))
        kind = signature.args[0].dtype
        item, together = kind.bitwidth // 8, 2 if kind == types.int8 else 1  # bytes of a weight; weights of an output that lie side by side
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{LANES}f32")
        fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0")

        def at(array: Any, *offsets: tuple[Any, Any]) -> Any:
            """The address that lies so many (steps, bytes each) behind the array's begin."""
            address = builder.bitcast(array.data, pointer)
            for steps, size in offsets:
                address = builder.gep(address, [builder.mul(steps, size)])
            return address

        def load(address: Any, of: Any, align: int) -> Any:
            return builder.load(builder.bitcast(address, of.as_pointer()), align=align)

        def weights(address: Any) -> Any:
            """Those of 16 outputs."""
            if kind == types.int8:
                return builder.sext(load(address, ir.VectorType(i8, 2 * LANES), 1), pairs)
            if kind == types.uint16:
                wide = builder.zext(load(address, ir.VectorType(i16, LANES), 2), integers)
                return builder.bitcast(builder.shl(wide, ir.Constant(integers, [16] * LANES)), floats)
            return load(address, floats, 4)

        def numbers(address: Any) -> Any:
            """What they are multiplied by: 32 bits, as often as a vector has room for them."""
            number = load(address, i32, 2) if kind == types.int8 else load(address, ir.FloatType(), 4)
            vector = integers if kind == types.int8 else floats
            nothing = ir.Constant(vector, ir.Undefined)
            everywhere = builder.shuffle_vector(builder.insert_element(nothing, number, i32(0)), nothing, ir.Constant(integers, [0] * LANES))
            return builder.sext(builder.bitcast(everywhere, ir.VectorType(i16, 2 * LANES)), pairs) if kind == types.int8 else everywhere

        def added(number: Any, weight: Any, total: Any) -> Any:
            """total + number * weight. What is said of pairs becomes a single instruction wherever there is one, as in all of x86."""
            if kind != types.int8:
                return builder.call(fma, [number, weight, total])
            products = builder.mul(weight, number, flags=["nsw"])
            firsts, seconds = (builder.shuffle_vector(products, ir.Constant(pairs, ir.Undefined), half) for half in (even, odd))
            return builder.add(total, builder.add(firsts, seconds))

        rows, parts = [i64(r) for r in range(R)], [i64(part * LANES) for part in range(width // LANES)]
        x_row, x_item = cgutils.unpack_tuple(builder, x.strides)
        steps = cgutils.unpack_tuple(builder, panel.shape)[0]
        zeros = ir.Constant(integers, [0] * LANES) if kind == types.int8 else ir.Constant(floats, [0.0] * LANES)
        before, loop, behind = builder.block, builder.append_basic_block("multiply"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(i64)
        k.add_incoming(i64(0), before)
        sums = {(r, part): builder.phi(zeros.type) for r in range(R) for part in range(len(parts))}
        row = i64(PANEL * item * together)
        for line in range(0, width * item * together, 64):
            builder.call(fetch, [at(panel, (k, row), (i64(AHEAD + line), i64(1))), i32(0), i32(3), i32(1)])
        taken = [weights(at(panel, (k, row), (part, i64(item * together)))) for part in parts]
        for r in range(R):
            number = numbers(at(x, (rows[r], x_row), (k, builder.mul(x_item, i64(together)))))
            for part in range(len(parts)):
                total = sums[r, part]
                total.add_incoming(zeros, before)
                sums[r, part] = added(number, taken[part], total)
                total.add_incoming(sums[r, part], loop)
        following = builder.add(k, i64(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, behind)
        builder.position_at_end(behind)
        y_row, y_item = cgutils.unpack_tuple(builder, y.strides)
        for (r, part), total in sums.items():
            result = builder.sitofp(total, floats) if kind == types.int8 else total
            builder.store(result, builder.bitcast(at(y, (rows[r], y_row), (parts[part], y_item)), floats.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile_of(typing_context, panel, x, y):  # type: ignore[no-untyped-def]
        return types.void(panel, x, y), generate

    return tile_of


one_row, some_rows = tile(1, PANEL), tile(TOGETHER, PANEL // 2)


@intrinsic
def add_together(typing_context, numbers, i, more):  # type: ignore[no-untyped-def]
    """Add to numbers[i], int64, what other threads may add to as well; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(numbers, types.int64, types.int64), generate


@intrinsic
def larger(typing_context, a, b):  # type: ignore[no-untyped-def]
    """The larger of two float32, neither of them NaN; a loop over it becomes vectors, which one over `max` does not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number] * 2), "llvm.maxnum.f32")
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())
