"""Sums of four neighbouring products of unsigned and signed bytes, in 32 bits: what matmuls in integers are made of.

Each processor has its own instruction for them, or none. All give the same integers. The unsigned bytes are codes of
weights that stand for numbers less some constant; what that makes too much, a total begins with (or need not, where
the instruction takes the numbers themselves).
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

from engine.kernels.intrinsics import I16, I32, constant, join, lanes_of

_Builder: TypeAlias = Any


@dataclass(frozen=True)
class ByteDots:
    """How sums are started, added to and read, ``lanes`` at once.

    Attributes:
        start: ``(builder, first)`` gives a total that begins with ``first``, int32 in every lane.
        add: ``(builder, total, unsigned, signed)`` adds the products of ``4 * lanes`` bytes each, the signed ones from
            -127 on. A total takes 8 of them.
        sums: ``(builder, total, first)`` reads it, int32.
    """

    lanes: int
    start: Callable[[_Builder, Any], Any]
    add: Callable[[_Builder, Any, Any, Any], Any]
    sums: Callable[[_Builder, Any, Any], Any]


def available() -> list[str]:
    """The names of what this processor has, the best first."""
    found = llvmlite.binding.get_host_cpu_features()
    machine = platform.machine().lower()
    names = ["generic"]
    if machine in ("x86_64", "amd64"):
        if found.get("avx2"):
            names.insert(0, "avx2")
        if found.get("avxvnni") or (found.get("avx512vnni") and found.get("avx512vl")):
            names.insert(0, "vnni")
        if found.get("avx512vnni") and found.get("avx512bw"):
            names.insert(0, "avx512-vnni")
    elif machine in ("arm64", "aarch64") and (found.get("dotprod") or sys.platform == "darwin"):
        names.insert(0, "neon-dotprod")
    return names


def _call(builder: _Builder, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _first(builder: _Builder, first: Any) -> Any:
    return first


def _total(builder: _Builder, total: Any, first: Any) -> Any:
    return total


def _vnni(lanes: int) -> ByteDots:
    """``vpdpbusd``."""
    words = ir.VectorType(I32, lanes)

    def add(builder: _Builder, total: Any, unsigned: Any, signed: Any) -> Any:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return _call(builder, name, words, total, *(builder.bitcast(b, words) for b in (unsigned, signed)))

    return ByteDots(lanes, _first, add, _total)


def _avx2_small() -> ByteDots:
    """``vpmaddubsw``: pairs are added up in 16 bits, and the pairs of each four at the end."""
    halves, lanes = ir.VectorType(I16, 16), 8

    def start(builder: _Builder, first: Any) -> Any:
        return constant(0, halves)

    def add(builder: _Builder, total: Any, unsigned: Any, signed: Any) -> Any:
        return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.ub.sw", halves, unsigned, signed))

    def sums(builder: _Builder, total: Any, first: Any) -> Any:
        return builder.add(_pairs(builder, total, constant(1, halves)), first)

    return ByteDots(lanes, start, add, sums)


def _avx2() -> ByteDots:
    """``vpmaddwd`` of the even bytes and of the odd ones: two products of large bytes overflow 16 bits."""
    halves = ir.VectorType(I16, 16)
    eight = constant(8, halves)

    def add(builder: _Builder, total: Any, unsigned: Any, signed: Any) -> Any:
        codes, numbers = (builder.bitcast(bytes_, halves) for bytes_ in (unsigned, signed))
        even = builder.and_(codes, constant(255, halves))
        total = builder.add(total, _pairs(builder, even, builder.ashr(builder.shl(numbers, eight), eight)))
        return builder.add(total, _pairs(builder, builder.lshr(codes, eight), builder.ashr(numbers, eight)))

    return ByteDots(8, _first, add, _total)


def _pairs(builder: _Builder, a: Any, b: Any) -> Any:
    return _call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), a, b)


def _neon_small() -> ByteDots:
    """``sdot``, four lanes at a time. It takes the unsigned bytes for signed ones, which those up to 127 are."""
    return ByteDots(8, _first, _sdot, _total)


def _neon() -> ByteDots:
    """``sdot`` of the numbers that the bytes stand for, so that nothing is too much."""

    def start(builder: _Builder, first: Any) -> Any:
        return constant(0, first.type)

    def add(builder: _Builder, total: Any, unsigned: Any, signed: Any) -> Any:
        return _sdot(builder, total, builder.xor(unsigned, constant(-128, unsigned.type)), signed)

    return ByteDots(8, start, add, _total)


def _sdot(builder: _Builder, total: Any, left: Any, right: Any) -> Any:
    parts = []
    for half in range(2):
        four = lanes_of(builder, total, 4 * half, 4)
        given = (lanes_of(builder, bytes_, 16 * half, 16) for bytes_ in (left, right))
        parts.append(_call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", four.type, four, *given))
    return join(builder, *parts)


def _generic(width: ir.IntType) -> ByteDots:
    """Sums of four in ``width``."""
    lanes = 8

    def add(builder: _Builder, total: Any, unsigned: Any, signed: Any) -> Any:
        wide = ir.VectorType(width, 4 * lanes)
        sums = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
        while sums.type.count > lanes:
            even, odd = (lanes_of(builder, sums, first, sums.type.count // 2, 2) for first in (0, 1))
            sums = builder.add(even, odd)
        return builder.add(total, sums if width == I32 else builder.sext(sums, total.type))

    return ByteDots(lanes, _first, add, _total)


# Of unsigned bytes up to 15.
SMALL = {
    "avx512-vnni": _vnni(16), "vnni": _vnni(8), "avx2": _avx2_small(), "neon-dotprod": _neon_small(),
    "generic": _generic(I16),
}  # fmt: skip
# Of unsigned bytes that stand for numbers less 128.
WHOLE = {
    "avx512-vnni": _vnni(16), "vnni": _vnni(8), "avx2": _avx2(), "neon-dotprod": _neon(), "generic": _generic(I32)
}  # fmt: skip
