"""The AMX form without AMX: its code is read, and its arithmetic runs on tiles that numpy keeps."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from cpu_programs import cpu_executor, single_sequence

from edgellm.kernels.cpu.compile import isa, jit, kernel_table, trials
from edgellm.kernels.cpu.compile.kernel_cache import KernelCache
from edgellm.kernels.cpu.compile.trials import outputs_of_ops
from edgellm.kernels.cpu.lib import amx
from edgellm.kernels.cpu.lib import layout as at
from edgellm.kernels.cpu.run.executor import CPUExecutor
from edgellm.kernels.cpu.weights import QUANTIZED

PLAIN_FORM = next(form for form in isa.available_forms() if form != "amx")
TYPES = ("Q8_0", "Q4_1", "Q4_K", "Q6_K")  # bytes or two planes; with and without minima; groups of 32 or of 256
N_TOKENS = (15, 23, 24, 25, 40)

# ---- tiles in numpy --------------------------------------------------------------------------------------------------


class Tiles:
    """The tile registers of a thread: the seven instructions that the kernels use, as Intel documents them."""

    def __init__(self) -> None:
        self.tiles = np.zeros((8, 16, 64), np.uint8)
        self.rows, self.widths = np.zeros(8, np.uint8), np.zeros(8, np.uint16)
        self.n_products = 0

    def ldtilecfg(self, address: int) -> None:
        """64 bytes: palette, 15 zeros, widths in bytes of eight tiles, 16 zeros, rows of eight tiles, 8 zeros."""
        config = np.frombuffer(ctypes.string_at(address, 64), np.uint8)
        self.widths, self.rows = config[16:32].view(np.uint16), config[48:56]
        assert config[0] == 1 and not config[1:16].any() and not config[32:48].any() and not config[56:].any()
        assert (self.widths <= 64).all() and (self.widths % 4 == 0).all() and (self.rows <= 16).all()
        self.tiles[:] = 0

    def tilerelease(self) -> None:
        self.rows, self.widths = np.zeros(8, np.uint8), np.zeros(8, np.uint16)

    def tilezero(self, tile: int) -> None:
        self.tiles[tile] = 0

    def tileloadd64(self, tile: int, address: int, stride: int) -> None:
        n_rows, width = int(self.rows[tile]), int(self.widths[tile])
        assert n_rows and width, "a tile without a shape"
        self.tiles[tile] = 0
        for row in range(n_rows):
            self.tiles[tile, row, :width] = np.frombuffer(ctypes.string_at(address + row * stride, width), np.uint8)

    def tilestored64(self, tile: int, address: int, stride: int) -> None:
        for row in range(int(self.rows[tile])):
            ctypes.memmove(address + row * stride, self.tiles[tile, row].tobytes(), int(self.widths[tile]))

    def tdpbssd(self, total: int, a: int, b: int) -> None:
        depth = int(self.widths[a])
        assert depth == 4 * self.rows[b] and self.rows[total] == self.rows[a] and self.widths[total] == self.widths[b]
        x = self.tiles[a].view(np.int8)[:, :depth].astype(np.int32)
        w = self.tiles[b].view(np.int8).reshape(16, 16, 4)[: depth // 4].transpose(0, 2, 1).reshape(depth, 16)
        self.tiles[total].view(np.int32)[:] += x @ w.astype(np.int32)
        self.n_products += 1


def with_tiles(tiles: Tiles) -> tuple[isa.Isa, list[Any]]:
    """A form of this CPU with the tile primitives of the AMX form on other tiles, and what must live as long."""
    plain = isa.detect(PLAIN_FORM)
    ir = amx.primitives(has_tiles=True)
    callbacks = []

    def define(declaration: re.Match[str]) -> str:
        name, types = declaration[1], [t.strip() for t in declaration[2].split(",") if t.strip()]
        callback = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * len(types)))(getattr(tiles, name))
        callbacks.append(callback)
        widen = {"i8": "zext i8 %a{} to i64", "ptr": "ptrtoint ptr %a{} to i64", "i64": "add i64 %a{}, 0"}
        lines = [f"  %w{i} = " + widen[t].format(i) for i, t in enumerate(types)]
        address = ctypes.cast(callback, ctypes.c_void_p).value
        call = ", ".join(f"i64 %w{i}" for i in range(len(types)))
        lines += [f"  %f = inttoptr i64 {address} to ptr", f"  call void %f({call})", "  ret void"]
        arguments = ", ".join(f"{t} %a{i}" for i, t in enumerate(types))
        return f"define void @emulated.{name}({arguments}) noinline {{\n" + "\n".join(lines) + "\n}"

    ir = re.sub(r"declare void @llvm\.x86\.(\w+)\((.*?)\)", define, ir).replace("@llvm.x86.", "@emulated.")
    assert amx.primitives(has_tiles=False) in plain.primitives
    primitives = plain.primitives.replace(amx.primitives(has_tiles=False), ir)
    return dataclasses.replace(plain, name="amx", primitives=primitives), callbacks


@pytest.fixture(scope="module")
def emulation() -> tuple[Tiles, KernelCache, list[Any]]:
    """Tiles, kernels that use them, compiled once for all types, and what must live as long."""
    tiles = Tiles()
    form, callbacks = with_tiles(tiles)
    return tiles, KernelCache(form, None), callbacks


@pytest.mark.parametrize("op", ["matmul", "expert_matmul"])
@pytest.mark.parametrize("quant", TYPES)
def test_tiles_give_the_bits_of_every_other_form(
    quant: str, op: str, emulation: tuple[Tiles, KernelCache, list[Any]]
) -> None:
    """Of experts one shape sends every token to each of them, others leave some with few."""
    assert quant in QUANTIZED
    sketch = trials.sketch(5, 64)
    trials.add_trial(sketch, f"{op}_{quant.lower()}")
    program, (tiles, kernels, _) = sketch.program(), emulation
    emulated = CPUExecutor(program, 4, 1, 64, untested=kernels)
    plain = cpu_executor(program, 4, 2, 64, PLAIN_FORM)
    for n in N_TOKENS:
        batch = single_sequence(program, n, seed=n)
        before = tiles.n_products
        found, expected = (outputs_of_ops(e, batch, sketch.inputs) for e in (emulated, plain))
        assert (tiles.n_products > before) == (n >= at.TILES_FROM)
        for shape, one, other in zip(sketch.shapes, found, expected, strict=True):
            assert np.array_equal(one.view(np.uint32), other.view(np.uint32)), f"{shape} tokens={n}"
    assert not tiles.rows.any(), "the tiles were not released"
    emulated.close()
    plain.close()


# ---- the code --------------------------------------------------------------------------------------------------------

FEATURES = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma,+f16c"


def assembly(kernel: str, form: str, features: str) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "x86_64-unknown-linux-gnu"
    try:
        llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this llvmlite has no code generator for {triple}")
    flags = {name[1:]: True for name in features.split(",")}
    target = isa.Isa(form, triple, "sapphirerapids", features, isa.primitives(form, flags, triple))
    return jit.assembly(kernel, jit.portable_ir(kernel, kernel_table.function(kernel, form)), target)


def test_products_of_many_tokens_use_tiles_and_those_of_one_token_do_not() -> None:
    text = assembly("matmul_q4_k", "amx", FEATURES + ",+amx-tile,+amx-int8")
    for instruction in ("ldtilecfg", "tileloadd", "tdpbssd", "tilestored", "tilezero", "tilerelease"):
        assert instruction in text, instruction
    assert "vpdpwssd" in text and "vcvtdq2ps" in text


@pytest.mark.parametrize("kernel", ["matmul_q4_k", "quantize"])
def test_other_forms_have_no_trace_of_tiles(kernel: str) -> None:
    text = assembly(kernel, "avx512_vnni", FEATURES)
    assert not re.search(r"\btdp|\btile(zero|load|store|release)|tilecfg|%tmm", text)


# ---- the permission --------------------------------------------------------------------------------------------------


def test_without_permission_the_next_form_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {name[1:]: True for name in FEATURES.split(",")} | {"amx-tile": True, "amx-int8": True}
    monkeypatch.setattr(isa, "host_features", lambda: features)
    monkeypatch.setattr(amx, "permitted", lambda: False)
    assert isa.cpu_forms() == ["avx512_vnni", "avx2", "portable"]
    monkeypatch.setattr(amx, "permitted", lambda: True)
    assert isa.cpu_forms()[0] == "amx"
    monkeypatch.setattr(isa, "host_features", lambda: features | {"amx-int8": False})
    assert isa.cpu_forms()[0] == "avx512_vnni"


def test_a_refused_permission_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def syscall(self, *arguments: int) -> int:
            ctypes.set_errno(95)
            return -1

    monkeypatch.setattr(amx.sys, "platform", "linux")
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: Refusing())
    amx.permitted.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="AMX") as warned:
            assert not amx.permitted() and not amx.permitted()
        assert len(warned) == 1
    finally:
        amx.permitted.cache_clear()
