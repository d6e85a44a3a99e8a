"""LLVM vectors as numba types, with the few operations the kernels are made of.

A kernel written with these compiles to portable LLVM IR: every operation here is generic, and LLVM lowers it to AVX2,
AVX-512, NEON or plain scalar code. What has a much better form on some CPUs (integer multiply-add, float fma, half
conversion, the spin hint) is only *declared* here, as a function ``edgellm.*``; ``isa.py`` holds one definition of
each per instruction set and ``jit.py`` links them in before it optimises.

Addresses are int64. Loads and stores promise no alignment. ``forceinline`` marks the building blocks of kernels.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from edgellm.kernels.cpu.lib.layout import ARGUMENTS

IR_SCALAR = {
    types.int8: ir.IntType(8),
    types.uint8: ir.IntType(8),
    types.int16: ir.IntType(16),
    types.uint16: ir.IntType(16),
    types.int32: ir.IntType(32),
    types.uint32: ir.IntType(32),
    types.int64: ir.IntType(64),
    types.uint64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}
I32 = ir.IntType(32)


def forceinline(function: Any) -> Any:
    """A building block that always dissolves into the kernel that uses it."""
    return njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


class Vec(types.Type):
    """n lanes of one scalar type, an LLVM vector. Unsigned lanes shift and widen with zeros."""

    def __init__(self, dtype: types.Type, n: int) -> None:
        self.dtype, self.n = dtype, n
        super().__init__(name=f"vec{n}x{dtype}")

    @property
    def ir(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(IR_SCALAR[self.dtype], self.n)

    @property
    def is_float(self) -> bool:
        """Whether the lanes are floating point."""
        return self.dtype in (types.float32, types.float64)

    @property
    def is_signed(self) -> bool:
        """Whether integer lanes carry a sign."""
        return bool(getattr(self.dtype, "signed", True))


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, fe_type.ir)


u8x8, u8x16, u8x32, u8x64 = (Vec(types.uint8, n) for n in (8, 16, 32, 64))
i8x8 = Vec(types.int8, 8)
u16x8, u16x16 = Vec(types.uint16, 8), Vec(types.uint16, 16)
i16x8, i16x16, i16x32 = Vec(types.int16, 8), Vec(types.int16, 16), Vec(types.int16, 32)
i32x8, i32x16, u32x8 = Vec(types.int32, 8), Vec(types.int32, 16), Vec(types.uint32, 8)
u32x16, u64x8 = Vec(types.uint32, 16), Vec(types.uint64, 8)
f32x8, f32x16 = Vec(types.float32, 8), Vec(types.float32, 16)
i32x4, f32x4 = Vec(types.int32, 4), Vec(types.float32, 4)


# ---- operators ------------------------------------------------------------------------------------------------------


def _binary(op: Any, name_int: str, name_float: str | None) -> None:
    """Make ``a op b`` work on two vectors of one type."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
                return signature(args[0], args[0], args[0])
            return None

    @lower_builtin(op, Vec, Vec)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vec = sig.return_type
        name = name_float if vec.is_float else name_int
        if name == "lshr" and vec.is_signed:
            name = "ashr"
        return getattr(builder, name)(*args)


_binary(operator.add, "add", "fadd")
_binary(operator.sub, "sub", "fsub")
_binary(operator.mul, "mul", "fmul")
_binary(operator.truediv, "", "fdiv")
_binary(operator.and_, "and_", None)
_binary(operator.or_, "or_", None)
_binary(operator.xor, "xor", None)
_binary(operator.lshift, "shl", None)
_binary(operator.rshift, "lshr", None)


# ---- loads, stores, constants ---------------------------------------------------------------------------------------


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def make_load(result: types.Type) -> Any:
    """An intrinsic that reads a vector or scalar from an address."""

    @intrinsic
    def load(typing_context, address):
        pointee = result.ir if isinstance(result, Vec) else IR_SCALAR[result]

        def codegen(context, builder, sig, args):
            return builder.load(_pointer(builder, args[0], pointee), align=1)

        return result(types.int64), codegen

    return load


def make_store(value: types.Type) -> Any:
    """An intrinsic that writes a vector or scalar to an address."""

    @intrinsic
    def store(typing_context, address, v):
        pointee = value.ir if isinstance(value, Vec) else IR_SCALAR[value]

        def codegen(context, builder, sig, args):
            builder.store(args[1], _pointer(builder, args[0], pointee), align=1)
            return context.get_dummy_value()

        return types.none(types.int64, value), codegen

    return store


load_u8x16, load_u8x32 = make_load(u8x16), make_load(u8x32)
load_i16x32, load_i16x16, load_i16x8, load_u16x16 = (make_load(v) for v in (i16x32, i16x16, i16x8, u16x16))
load_f32x8, load_f32x16, load_i32x8, load_i32x16 = (make_load(v) for v in (f32x8, f32x16, i32x8, i32x16))
load_f32x4, load_i32x4, store_f32x4, store_i32x4 = (
    make_load(f32x4),
    make_load(i32x4),
    make_store(f32x4),
    make_store(i32x4),
)
load_f32, load_f64, load_i32, load_i64 = (
    make_load(t) for t in (types.float32, types.float64, types.int32, types.int64)
)
load_u8, load_u16, load_u32 = make_load(types.uint8), make_load(types.uint16), make_load(types.uint32)
store_f32x8, store_f32x16, store_i16x16 = make_store(f32x8), make_store(f32x16), make_store(i16x16)
store_i32x16, store_u16x16, store_i32x8 = (make_store(v) for v in (i32x16, u16x16, i32x8))
store_f32, store_f64, store_i32, store_i64, store_u16 = (
    make_store(t) for t in (types.float32, types.float64, types.int32, types.int64, types.uint16)
)


def make_const(vec: Vec, value: float) -> Any:
    """An intrinsic without arguments: the same constant in every lane."""

    @intrinsic
    def const(typing_context):
        def codegen(context, builder, sig, args):
            return ir.Constant(vec.ir, [value] * vec.n)

        return vec(), codegen

    return const


def make_constants(vec: Vec, values: list[int]) -> Any:
    """An intrinsic without arguments: these lanes."""

    @intrinsic
    def constants(typing_context):
        def codegen(context, builder, sig, args):
            return ir.Constant(vec.ir, values)

        return vec(), codegen

    return constants


def make_splat(vec: Vec) -> Any:
    """An intrinsic that puts one scalar in every lane."""

    @intrinsic
    def splat(typing_context, value):
        def codegen(context, builder, sig, args):
            undefined = ir.Constant(vec.ir, ir.Undefined)
            first = builder.insert_element(undefined, args[0], ir.Constant(I32, 0))
            return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, vec.n), [0] * vec.n))

        return vec(vec.dtype), codegen

    return splat


splat_f32x8, splat_f32x16, splat_i32x16 = make_splat(f32x8), make_splat(f32x16), make_splat(i32x16)
splat_u16x8, splat_i32x8 = make_splat(u16x8), make_splat(i32x8)
splat_f32x4, splat_i32x4 = make_splat(f32x4), make_splat(i32x4)
zero_f32x8, zero_f32x16 = make_const(f32x8, 0.0), make_const(f32x16, 0.0)
zero_i32x8, zero_i32x16 = make_const(i32x8, 0), make_const(i32x16, 0)
zero_f32x4, zero_i32x4 = make_const(f32x4, 0.0), make_const(i32x4, 0)


# ---- conversions and shuffles ---------------------------------------------------------------------------------------


def make_convert(source: Vec, target: Vec, instruction: str) -> Any:
    """An intrinsic around one LLVM conversion (``zext``, ``sext``, ``trunc``, ``sitofp``, ``bitcast`` ...)."""

    @intrinsic
    def convert(typing_context, value):
        def codegen(context, builder, sig, args):
            return getattr(builder, instruction)(args[0], target.ir)

        return target(source), codegen

    return convert


u8x32_as_u16x16 = make_convert(u8x32, u16x16, "bitcast")
u16x16_as_i16x16 = make_convert(u16x16, i16x16, "bitcast")
to_f32x4 = make_convert(i32x4, f32x4, "sitofp")
to_f32x8, to_f32x16 = make_convert(i32x8, f32x8, "sitofp"), make_convert(i32x16, f32x16, "sitofp")
truncate_f32x16 = make_convert(f32x16, i32x16, "fptosi")
narrow_i32x16 = make_convert(i32x16, i16x16, "trunc")
f32x16_bits, f32x16_from_bits = make_convert(f32x16, i32x16, "bitcast"), make_convert(i32x16, f32x16, "bitcast")
i16x32_as_i32x16 = make_convert(i16x32, i32x16, "bitcast")
i32x16_as_i16x32 = make_convert(i32x16, i16x32, "bitcast")
u32x8_as_u16x16 = make_convert(u32x8, u16x16, "bitcast")
i32x8_as_i16x16, u16x16_as_u8x32 = make_convert(i32x8, i16x16, "bitcast"), make_convert(u16x16, u8x32, "bitcast")


def make_shuffle(vec: Vec, lanes: list[int]) -> Any:
    """An intrinsic of two vectors: the lanes of (a, b) at the given indexes."""
    result = Vec(vec.dtype, len(lanes))

    @intrinsic
    def shuffle(typing_context, a, b):
        def codegen(context, builder, sig, args):
            return builder.shuffle_vector(args[0], args[1], ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

        return result(vec, vec), codegen

    return shuffle


concat_u8x16 = make_shuffle(u8x16, list(range(32)))
low_i32x16, high_i32x16 = make_shuffle(i32x16, list(range(8))), make_shuffle(i32x16, list(range(8, 16)))
low_i16x32, high_i16x32 = make_shuffle(i16x32, list(range(16))), make_shuffle(i16x32, list(range(16, 32)))
concat_i16x16 = make_shuffle(i16x16, list(range(32)))
even_i16x16 = make_shuffle(i16x16, list(range(0, 32, 2)))
odd_i16x16 = make_shuffle(i16x16, list(range(1, 32, 2)))
interleave_low_i16x16 = make_shuffle(i16x16, [lane for i in range(8) for lane in (i, 16 + i)])
interleave_high_i16x16 = make_shuffle(i16x16, [lane for i in range(8, 16) for lane in (i, 16 + i)])


def make_gather(vec: Vec) -> Any:
    """An intrinsic that builds a vector of eight lanes from scalars, one per row."""

    @intrinsic
    def gather(typing_context, v0, v1, v2, v3, v4, v5, v6, v7):
        def codegen(context, builder, sig, args):
            result = ir.Constant(vec.ir, ir.Undefined)
            for lane, value in enumerate(args):
                result = builder.insert_element(result, value, ir.Constant(I32, lane))
            return result

        return vec(*([vec.dtype] * 8)), codegen

    return gather


gather_u32x8, gather_u16x8 = make_gather(u32x8), make_gather(u16x8)


# ---- primitives that isa.py defines ---------------------------------------------------------------------------------


def declared(name: str, result: types.Type, *arguments: types.Type) -> Any:
    """An intrinsic that calls ``edgellm.<name>``, left undefined until link time."""

    def ir_type(t: types.Type) -> Any:
        return ir.VoidType() if t is types.none else t.ir if isinstance(t, Vec) else IR_SCALAR[t]

    def call(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir_type(result), [ir_type(a) for a in arguments])
        value = builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"edgellm.{name}"), args)
        return context.get_dummy_value() if result is types.none else value

    sig = result(*arguments)
    if len(arguments) == 0:

        @intrinsic
        def function(typing_context):
            return sig, call
    elif len(arguments) == 1:

        @intrinsic
        def function(typing_context, a):
            return sig, call
    elif len(arguments) == 2:

        @intrinsic
        def function(typing_context, a, b):
            return sig, call
    elif len(arguments) == 3:

        @intrinsic
        def function(typing_context, a, b, c):
            return sig, call
    else:

        @intrinsic
        def function(typing_context, a, b, c, d):
            return sig, call

    return function


madd_i16 = declared("madd", i32x16, i32x16, i16x32, i16x32)
"""madd_i16(acc, a, b): lane j of acc plus a[2j] b[2j] + a[2j+1] b[2j+1], exact in int32."""
madd_i16x16 = declared("madd8", i32x8, i32x8, i16x16, i16x16)
"""The 16 products added to 8 lanes, those of each half to its own four; to which of the four, the form decides."""
lookup_u8x32 = declared("lookup", u8x32, u8x16, u8x32)
"""lookup_u8x32(levels, names): the level that each byte names, 0 to 15."""
fma_f32x8, fma_f32x16 = (
    declared("fma8", f32x8, f32x8, f32x8, f32x8),
    declared("fma16", f32x16, f32x16, f32x16, f32x16),
)
fma_f32x4 = declared("fma4", f32x4, f32x4, f32x4, f32x4)
fma_f32 = declared("fma1", types.float32, types.float32, types.float32, types.float32)
half_f32x8, half_f32x16 = declared("half8", f32x8, u16x8), declared("half16", f32x16, u16x16)
round_half_f32x16 = declared("tohalf16", u16x16, f32x16)
"""float32 to float16 bits, to nearest even."""
pause = declared("pause", types.none)
fetch, fetch_weights, fetch_first, fetch_later = (
    declared(name, types.none, types.int64) for name in ("fetch", "fetch_weights", "fetch_first", "fetch_later")
)
"""fetch(address): bring a line near; to where, the CPU decides (isa.py). Of weights that are read about 8 KiB after one
another it may be asked for twice; what is read at once goes into the first level, after other work into the second."""
max_f32x16, min_f32x16 = declared("max16", f32x16, f32x16, f32x16), declared("min16", f32x16, f32x16, f32x16)
abs_f32x16 = declared("abs16", f32x16, f32x16)


@intrinsic
def f32_of(typing_context, value):
    """A float64 rounded to float32."""

    def codegen(context, builder, sig, args):
        return builder.fptrunc(args[0], ir.FloatType())

    return types.float32(types.float64), codegen


@intrinsic
def i32_of(typing_context, value):
    """The low 32 bits of an integer."""

    def codegen(context, builder, sig, args):
        return builder.trunc(args[0], I32)

    return types.int32(types.int64), codegen


@intrinsic
def f32_from_bits(typing_context, value):
    """The float32 whose bits are the low 32 of an integer."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], I32), ir.FloatType())

    return types.float32(types.int64), codegen


@intrinsic
def f64_from_bits(typing_context, value):
    """The float64 with the bits of an integer."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def where_less(typing_context, a, b, yes, no):
    """Lane by lane: yes if a < b, else no."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen


# ---- sums over lanes, in a fixed order ------------------------------------------------------------------------------

_f_halves = [make_shuffle(f32x16, [*range(s, 2 * s), *range(s)] + [0] * (16 - 2 * s)) for s in (8, 4, 2, 1)]
_swap8, _swap4, _swap2, _swap1 = _f_halves


@intrinsic
def first_lane(typing_context, v):
    """Lane 0 of a vector."""

    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], ir.Constant(I32, 0))

    return v.dtype(v), codegen


@forceinline
def sum_f32x16(v):
    """Sum of 16 lanes, always as the same tree of halves."""
    v = v + _swap8(v, v)
    v = v + _swap4(v, v)
    v = v + _swap2(v, v)
    return first_lane(v + _swap1(v, v))


@forceinline
def maximum_f32x16(v):
    """Largest of 16 lanes."""
    v = max_f32x16(v, _swap8(v, v))
    v = max_f32x16(v, _swap4(v, v))
    v = max_f32x16(v, _swap2(v, v))
    return first_lane(max_f32x16(v, _swap1(v, v)))


# ---- atomics: the thread team and the work counters -----------------------------------------------------------------


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to an int64 and return what it was."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_exchange(typing_context, address, value):
    """Store an int64 and return what was there."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("xchg", _pointer(builder, args[0], ir.IntType(64)), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context, address):
    """An int64 that another thread may be writing."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_pointer(builder, args[0], ir.IntType(64)), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def arguments(typing_context, op, layout):
    """The arguments in a row of the op table, as a namedtuple of layout.py."""
    names = types.NamedUniTuple(types.int64, len(layout.instance_class._fields), layout.instance_class)

    def codegen(context, builder, sig, args):
        first = builder.add(args[0], ir.Constant(ir.IntType(64), ARGUMENTS))
        fields = _pointer(builder, first, ir.IntType(64))
        values = [builder.load(builder.gep(fields, [ir.Constant(I32, i)])) for i in range(names.count)]
        return context.make_tuple(builder, names, values)

    return names(types.int64, layout), codegen


@intrinsic
def call_kernel(typing_context, kernel, op, step, thread, n_threads):
    """Call ``void kernel(op, step, thread, n_threads)`` by its address."""

    def codegen(context, builder, sig, args):
        i64 = ir.IntType(64)
        function_type = ir.FunctionType(ir.VoidType(), [i64] * 4)
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.none(*([types.int64] * 5)), codegen


@intrinsic
def call_yield(typing_context, function):
    """Call ``int function(void)`` by its address: the system's sched_yield."""

    def codegen(context, builder, sig, args):
        function_type = ir.FunctionType(I32, [])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), codegen
