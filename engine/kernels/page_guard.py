"""What runs when the system finds that a mapped page cannot be read (SIGBUS, on Linux): machine code that calls nothing of
Python. For a page of a guarded mapping it maps zeros in its place and counts it; else it puts the earlier handler back, whom the
same fault then reaches. See :mod:`engine.mapped_files`.
"""

from __future__ import annotations

import mmap

import llvmlite.binding as llvm
from llvmlite import ir

from engine.kernels.guard_fields import ANY, BEGIN, EARLIER, END, LOST, MOST, SIGBUS, TABLE_FIELDS

_ADDRESS_AT = 16  # of the faulting address in siginfo_t
_READ_WRITE, _PRIVATE_ANONYMOUS_FIXED = 3, 0x32
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def native_code() -> dict[str, tuple[str, bytes]]:
    """The handler, compiled for this CPU: its symbol and its object file."""
    module = ir.Module()
    handler = _handler(module)
    # Symbols may be anywhere.
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="large")
    return {"on_bus": (handler.name, machine.emit_object(llvm.parse_assembly(str(module))))}


def _handler(module: ir.Module) -> ir.Function:
    """``(signal, siginfo, context)``."""
    table = ir.GlobalVariable(module, ir.ArrayType(_I64, TABLE_FIELDS), "slipstream_guard_table")
    map_page = ir.Function(
        module, ir.FunctionType(_I64, [_I64, _I64, _I32, _I32, _I32, _I64]), "slipstream_mmap"
    )
    act = ir.Function(module, ir.FunctionType(_I32, [_I32, _I64, _I64]), "slipstream_sigaction")
    handler = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I32, _I64, _I64]), "slipstream_on_bus")
    entry, look, hit, following, other, done = (
        handler.append_basic_block(name) for name in ("entry", "look", "hit", "following", "other", "done")
    )

    def word(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
        return builder.gep(table, [_I64(0), place])

    builder = ir.IRBuilder(entry)
    at = builder.add(handler.args[1], _I64(_ADDRESS_AT))
    address = builder.load(builder.inttoptr(at, _I64.as_pointer()))
    builder.branch(look)

    builder = ir.IRBuilder(look)
    place = builder.phi(_I64)
    place.add_incoming(_I64(0), entry)
    begin, end = (builder.load(word(builder, builder.add(place, _I64(first)))) for first in (BEGIN, END))
    inside = builder.and_(
        builder.icmp_unsigned(">=", address, begin), builder.icmp_unsigned("<", address, end)
    )
    builder.cbranch(inside, hit, following)

    builder = ir.IRBuilder(following)
    after = builder.add(place, _I64(1))
    place.add_incoming(after, following)
    builder.cbranch(builder.icmp_unsigned("<", after, _I64(MOST)), look, other)

    builder = ir.IRBuilder(hit)
    page = builder.and_(address, _I64(-mmap.PAGESIZE))
    how = (_I64(mmap.PAGESIZE), _I32(_READ_WRITE), _I32(_PRIVATE_ANONYMOUS_FIXED), _I32(-1), _I64(0))
    mapped = builder.call(map_page, [page, *how])
    builder.atomic_rmw("add", word(builder, builder.add(place, _I64(LOST))), _I64(1), "seq_cst")
    builder.store(_I64(1), word(builder, _I64(ANY)))
    builder.cbranch(builder.icmp_unsigned("==", mapped, page), done, other)

    builder = ir.IRBuilder(other)
    earlier = builder.ptrtoint(word(builder, _I64(EARLIER)), _I64)
    builder.call(act, [_I32(SIGBUS), earlier, _I64(0)])
    builder.branch(done)
    ir.IRBuilder(done).ret_void()
    return handler
