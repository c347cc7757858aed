"""The innermost loop of every product, and how it is compiled: what Numba's own language cannot say.

In: a panel of weights, 64 outputs side by side, and rows of numbers. Out: their products, each one chain of multiply-adds.
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
    """`numba.njit`, with what it compiles kept in our cache for the next process, where that can be written."""
    if function is None:
        return lambda function: compiled(function, **options)
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # Numba looks for changes only in the file of a function itself
    settings: Any = numba.config
    elsewhere, folder = settings.CACHE_DIR, cache_dir() / f"numba-{version}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    settings.CACHE_DIR = str(folder)  # read where a function is decorated
    try:
        return numba.njit(function, cache=os.access(folder, os.W_OK), nogil=True, error_model="numpy", **options)
    finally:
        settings.CACHE_DIR = elsewhere


def tile(R: int, width: int) -> Any:
    """Make the inner loop of every product: tile(panel, x, y) with y (R, width) = x (R, K or more) @ panel (K, width).

    It is written in LLVM's own language, with one accumulator for each row and each 16 outputs, since no compiler finds this loop by itself.
    The panel's type, int8, uint16 (the upper half of a float32, which is a bfloat16) or float32, says how 16 weights become floats.
    """
    vector, i32, i64 = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32), ir.IntType(64)
    pointer = ir.IntType(8).as_pointer()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, x, y = (make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True))
        item = signature.args[0].dtype.bitwidth // 8
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32")
        fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0")

        def at(array: Any, *offsets: tuple[Any, Any]) -> Any:
            """The address that lies so many (steps, bytes each) behind the array's begin."""
            address = builder.bitcast(array.data, pointer)
            for steps, size in offsets:
                address = builder.gep(address, [builder.mul(steps, size)])
            return address

        def weights(address: Any, kind: Any) -> Any:
            raw = {types.int8: ir.IntType(8), types.uint16: ir.IntType(16), types.float32: ir.FloatType()}[kind]
            loaded = builder.load(builder.bitcast(address, ir.VectorType(raw, LANES).as_pointer()), align=item)
            if kind == types.int8:
                return builder.sitofp(loaded, vector)
            if kind == types.uint16:
                wide = ir.VectorType(i32, LANES)
                return builder.bitcast(builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)), vector)
            return loaded

        rows, parts = [i64(r) for r in range(R)], [i64(part * LANES) for part in range(width // LANES)]
        x_row, x_item = cgutils.unpack_tuple(builder, x.strides)
        K = cgutils.unpack_tuple(builder, panel.shape)[0]
        before, loop, behind = builder.block, builder.append_basic_block("multiply"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(i64)
        k.add_incoming(i64(0), before)
        sums = {(r, part): builder.phi(vector) for r in range(R) for part in range(len(parts))}
        row = i64(PANEL * item)
        for line in range(0, width * item, 64):
            builder.call(fetch, [at(panel, (k, row), (i64(AHEAD + line), i64(1))), i32(0), i32(3), i32(1)])
        taken = [weights(at(panel, (k, row), (part, i64(item))), signature.args[0].dtype) for part in parts]
        for r in range(R):
            number = builder.load(builder.bitcast(at(x, (rows[r], x_row), (k, x_item)), ir.FloatType().as_pointer()))
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, i32(0))
            everywhere = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))
            for part in range(len(parts)):
                total = sums[r, part]
                total.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                sums[r, part] = builder.call(fma, [everywhere, taken[part], total])
                total.add_incoming(sums[r, part], loop)
        following = builder.add(k, i64(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, K), loop, behind)
        builder.position_at_end(behind)
        y_row, y_item = cgutils.unpack_tuple(builder, y.strides)
        for (r, part), total in sums.items():
            builder.store(total, builder.bitcast(at(y, (rows[r], y_row), (parts[part], y_item)), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile_of(typing_context, panel, x, y):  # type: ignore[no-untyped-def]
        return types.void(panel, x, y), generate

    return tile_of


one_row, some_rows = tile(1, PANEL), tile(TOGETHER, PANEL // 2)


@intrinsic
def as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())
