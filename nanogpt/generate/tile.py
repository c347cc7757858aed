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
USED = (Path(__file__), Path(__file__).with_name("vectors.py"))  # by functions of other files; Numba looks for changes only in the file of a function itself
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in USED)).hexdigest()[:12]


def kept_in() -> Path:
    """The folder of what was compiled, for later processes with the same source."""
    return cache_dir() / f"numba-{VERSION}"


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit`, with what it compiles kept in our cache for the next process, where that can be written.

    Nothing is allocated, and so no references are counted, which would take more time than a product: threads would wait for each other's counts.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    settings: Any = numba.config
    elsewhere, folder = settings.CACHE_DIR, kept_in()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    settings.CACHE_DIR = str(folder)  # read where a function is decorated
    try:
        return numba.njit(function, cache=os.access(folder, os.W_OK), nogil=True, error_model="numpy", _nrt=False, **options)  # type: ignore[call-overload]
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
    arguments = ir.FunctionType(ir.VoidType(), [pointer, i64, pointer, i64, i64, pointer, i64])  # panel, its steps, x, its row and item in bytes, y, its row

    def load(builder: Any, address: Any, of: Any, align: int) -> Any:
        return builder.load(builder.bitcast(address, of.as_pointer()), align=align)

    def weights(builder: Any, kind: Any, address: Any) -> Any:
        """Those of 16 outputs."""
        if kind == types.int8:
            return builder.sext(load(builder, address, ir.VectorType(i8, 2 * LANES), 1), pairs)
        if kind == types.uint16:
            wide = builder.zext(load(builder, address, ir.VectorType(i16, LANES), 2), integers)
            return builder.bitcast(builder.shl(wide, ir.Constant(integers, [16] * LANES)), floats)
        return load(builder, address, floats, 4)

    def numbers(builder: Any, kind: Any, address: Any) -> Any:
        """What they are multiplied by: 32 bits, as often as a vector has room for them."""
        vector = integers if kind == types.int8 else floats
        nothing, number = ir.Constant(vector, ir.Undefined), load(builder, address, vector.element, 2 if kind == types.int8 else 4)
        everywhere = builder.shuffle_vector(builder.insert_element(nothing, number, i32(0)), nothing, ir.Constant(integers, [0] * LANES))
        return builder.sext(builder.bitcast(everywhere, ir.VectorType(i16, 2 * LANES)), pairs) if kind == types.int8 else everywhere

    def added(builder: Any, kind: Any, number: Any, weight: Any, total: Any) -> Any:
        """total + number * weight. What is said of pairs becomes a single instruction wherever there is one, as in all of x86."""
        if kind != types.int8:
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fmuladd.v{LANES}f32")
            return builder.call(fma, [number, weight, total])
        products = builder.mul(weight, number, flags=["nsw"])
        firsts, seconds = (builder.shuffle_vector(products, ir.Constant(pairs, ir.Undefined), half) for half in (even, odd))
        return builder.add(total, builder.add(firsts, seconds))

    def write(function: Any, kind: Any) -> None:
        """The function's body."""
        panel, steps, x, x_row, x_item, y, y_row = function.args
        before, loop, behind = (function.append_basic_block(name) for name in ("begin", "multiply", "done"))
        builder = ir.IRBuilder(before)
        builder.branch(loop)
        builder.position_at_end(loop)
        fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0")
        size = kind.bitwidth // 8 * (2 if kind == types.int8 else 1)  # bytes of what is added to an output at a step
        zeros = ir.Constant(integers, [0] * LANES) if kind == types.int8 else ir.Constant(floats, [0.0] * LANES)
        parts = range(0, width, LANES)

        def at(address: Any, *offsets: Any) -> Any:
            for offset in offsets:
                address = builder.gep(address, [offset])
            return address

        k = builder.phi(i64)
        k.add_incoming(i64(0), before)
        sums = {(r, part): builder.phi(zeros.type) for r in range(R) for part in parts}
        row, column = builder.mul(k, i64(PANEL * size)), builder.mul(k, x_item)
        for line in range(0, width * size, 64):
            builder.call(fetch, [at(panel, row, i64(AHEAD + line)), i32(0), i32(3), i32(1)])
        taken = {part: weights(builder, kind, at(panel, row, i64(part * size))) for part in parts}
        for r in range(R):
            number = numbers(builder, kind, at(x, builder.mul(i64(r), x_row), column))
            for part in parts:
                total = sums[r, part]
                total.add_incoming(zeros, before)
                sums[r, part] = added(builder, kind, number, taken[part], total)
                total.add_incoming(sums[r, part], loop)
        following = builder.add(k, i64(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, behind)
        builder.position_at_end(behind)
        for (r, part), total in sums.items():
            result = builder.sitofp(total, floats) if kind == types.int8 else total
            builder.store(result, builder.bitcast(at(y, builder.mul(i64(r), y_row), i64(4 * part)), floats.as_pointer()), align=4)
        builder.ret_void()

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        """A call of the function, which is one of its own in each module: where it is called from, nothing has to be compiled again."""
        panel, x, y = (make_array(kind)(context, builder, value) for kind, value in zip(signature.args, values, strict=True))
        kind = signature.args[0].dtype
        function = cgutils.get_or_insert_function(builder.module, arguments, f"nanogpt_tile_{R}_{width}_{kind}")
        if not function.blocks:
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            write(function, kind)
        x_row, x_item = cgutils.unpack_tuple(builder, x.strides)
        x_step = builder.mul(x_item, i64(2 if kind == types.int8 else 1))
        steps, y_row = cgutils.unpack_tuple(builder, panel.shape)[0], cgutils.unpack_tuple(builder, y.strides)[0]
        data = (builder.bitcast(array.data, pointer) for array in (panel, x, y))
        builder.call(function, [next(data), steps, next(data), x_row, x_step, next(data), y_row])
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
def as_others_left_it(typing_context, numbers, i):  # type: ignore[no-untyped-def]
    """numbers[i], int64, with what other threads have added by now; after it, all that they had written before is seen."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(numbers, types.int64), generate


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
