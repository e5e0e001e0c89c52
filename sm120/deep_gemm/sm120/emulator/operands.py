"""The instruction table, and the closures that read and write operands.

Each instruction of a kernel is translated once into a *step*: a function ``step(wave, lanes)`` that does its work for
those lanes and returns

    None            all lanes go on to the next instruction
    pc              all lanes jump there
    [(pc, lanes)]   lanes part; those not named have exited or wait somewhere

A translator is a function of the instruction that returns its step, entered in TABLE under the opcode's first word.
A guard ``@p`` is no concern of a translator: the step is called for fewer lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import TYPES, UNSIGNED, Type
from .lanes import Lanes
from .parser import SINK, Addr, Imm, Instruction, Not, Pair, Reg, Sym, Vec

Step = Callable[[object, Lanes], object]
Read = Callable[[object, Lanes], np.ndarray]
TABLE: dict[str, Callable[[Instruction], Step]] = {}
SPECIAL: dict[str, Callable] = {}  # special registers: name -> function of the wave; filled by isa/special.py


def opcode(*names: str):
    """Enter a translator in the table."""

    def register(translate):
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = translate
        return translate

    return register


def elementwise(*names: str):
    """For instructions that compute each lane's result from that lane's sources.

    The decorated function gets the instruction and returns a function of numpy arrays, alone if destination and
    sources have the instruction's type, else ``(function, type of the destination, types of the sources)``.
    """

    def register(make):
        @opcode(*names)
        def translate(i: Instruction) -> Step:
            made = make(i)
            target, *sources = i.operands
            if not isinstance(made, tuple):
                made = made, i.type, [i.type] * len(sources)
            function, result, types = made
            return compute(i, function, target, result, sources, types)

        return make

    return register


def compute(i: Instruction, function, target, result: Type, sources, types) -> Step:
    """The step ``target = function(*sources)``."""
    if len(sources) != len(types):
        raise i.error(f"{len(types)} sources expected, found {len(sources)}")
    write = writer(i, target, result)
    reads = [reader(i, source, kind) for source, kind in zip(sources, types)]
    if len(reads) == 1:
        (a,) = reads
        return lambda wave, at: write(wave, at, function(a(wave, at)))
    if len(reads) == 2:
        a, b = reads
        return lambda wave, at: write(wave, at, function(a(wave, at), b(wave, at)))
    if len(reads) == 3:
        a, b, c = reads
        return lambda wave, at: write(wave, at, function(a(wave, at), b(wave, at), c(wave, at)))
    return lambda wave, at: write(wave, at, function(*[read(wave, at) for read in reads]))


# --- reading ---------------------------------------------------------------------------------------------------------


def reader(i: Instruction, operand, kind: Type) -> Read:
    """A function (wave, lanes) -> [lanes.count] of kind.dtype; a scalar where all lanes agree by construction."""
    if isinstance(operand, Reg):
        return _register_reader(i, operand, kind)
    if isinstance(operand, Imm):
        value = constant(operand, kind)
        return lambda wave, at: value
    if isinstance(operand, Not):
        read = reader(i, operand.operand, kind)
        return lambda wave, at: ~read(wave, at)
    if isinstance(operand, Vec) and len(operand.items) == 1:
        return reader(i, operand.items[0], kind)
    if isinstance(operand, Vec):
        return _packed_reader(i, operand, kind)
    if isinstance(operand, Sym):
        name = operand.name
        if name in SPECIAL:
            value_of = SPECIAL[name]

            def read_special(wave, at):
                value = value_of(wave)
                value = value.astype(kind.dtype, copy=False)
                return value[at.index] if value.ndim else value

            return read_special
        if name.startswith("%"):
            raise i.error(f"unknown special register or undeclared register '{name}'")
        return lambda wave, at: kind.dtype(wave.symbol(i, name))
    raise i.error(f"operand {operand} cannot be read")


def _register_reader(i: Instruction, register: Reg, kind: Type) -> Read:
    number, bits, dtype = register.number, register.bits, kind.dtype
    if (bits == 1) != (kind.bits == 1):
        raise i.error(f"register {register.name} has {bits} bits, .{kind.name} wants {kind.bits}")
    if bits < kind.bits:
        raise i.error(f"register {register.name} has {bits} bits, .{kind.name} needs {kind.bits}")
    unsigned = UNSIGNED[kind.bits]
    cut, view = bits > kind.bits, dtype is not unsigned

    def read(wave, at):
        value = wave.registers[number]
        if value is None:
            value = wave.never_written(number, bits)
        if wave.sanitizer is not None:
            wave.sanitizer.register_read(wave, i, register, at)
        if not at.full:
            value = value[at.index]
        if cut:
            value = value.astype(unsigned)
        return value.view(dtype) if view else value

    return read


def _packed_reader(i: Instruction, vector: Vec, kind: Type) -> Read:
    """{a, b, ...} read as one wide value, a in the low bits."""
    each = TYPES[f"b{kind.bits // len(vector.items)}"]
    reads = [reader(i, item, each) for item in vector.items]

    def read(wave, at):
        parts = np.stack([np.broadcast_to(r(wave, at), at.count) for r in reads], axis=1)
        return parts.view(kind.dtype)[:, 0]

    return read


def constant(immediate: Imm, kind: Type):
    """An immediate as a numpy scalar of the type."""
    value = immediate.value
    if kind.kind == "p":
        return np.bool_(value)
    if immediate.kind == "int" and kind.kind == "f":
        return kind.dtype(value)
    if immediate.kind != "int" and kind.kind == "f":
        source = np.array(value, UNSIGNED[int(immediate.kind[1:])]).view(TYPES[immediate.kind].dtype)
        return source.astype(kind.dtype)[()]
    return np.array(value & ((1 << kind.bits) - 1), UNSIGNED[kind.bits]).view(kind.dtype)[()]


def address_reader(i: Instruction, operand, bits: int = 64) -> Read:
    """[base + offset] as uint64; ``bits``: the width in which the sum wraps."""
    if not isinstance(operand, Addr):
        raise i.error(f"an address in brackets expected, found {operand}")
    base, offset = operand.base, operand.offset
    if isinstance(base, Imm):
        value = np.uint64(base.value + offset)
        return lambda wave, at: value
    if isinstance(base, Sym):
        return lambda wave, at: np.uint64(wave.symbol(i, base.name) + offset)
    width = min(base.bits, bits)
    read = reader(i, base, TYPES[f"u{width}"])
    step = np.array(offset & ((1 << width) - 1), UNSIGNED[width])[()]
    if width == 64:
        return (lambda wave, at: read(wave, at) + step) if offset else read
    return lambda wave, at: (read(wave, at) + step).astype(np.uint64)


# --- writing ---------------------------------------------------------------------------------------------------------


def writer(i: Instruction, operand, kind: Type) -> Callable:
    """A function (wave, lanes, value) that sets a register (or the words of a vector) in those lanes."""
    if operand is None or operand == SINK:
        return lambda wave, at, value: None
    if isinstance(operand, Pair):
        raise i.error("one destination expected, found two")
    if isinstance(operand, Vec):
        each = TYPES[f"b{kind.bits // len(operand.items)}"]
        writes = [writer(i, item, each) for item in operand.items]

        def scatter(wave, at, value):
            words = np.ascontiguousarray(np.broadcast_to(value, at.count)).view(each.dtype).reshape(at.count, -1)
            for position, write_word in enumerate(writes):
                write_word(wave, at, np.ascontiguousarray(words[:, position]))

        return scatter
    if not isinstance(operand, Reg):
        raise i.error(f"operand {operand} cannot be written")
    number, bits = operand.number, operand.bits
    if (bits == 1) != (kind.bits == 1):
        raise i.error(f"register {operand.name} has {bits} bits, .{kind.name} has {kind.bits}")
    stored = UNSIGNED[bits]
    if bits == kind.bits:
        convert = None if kind.dtype is stored else "view"
    elif kind.bits < bits:  # extend by the sign of the type
        convert = "extend"
        wider = TYPES[f"{'s' if kind.signed else 'u'}{bits}"].dtype
        plain = kind.dtype if kind.kind in "su" else UNSIGNED[kind.bits]
    else:
        raise i.error(f"register {operand.name} has {bits} bits, .{kind.name} needs {kind.bits}")

    def write(wave, at, value):
        if convert == "view":
            value = value.view(stored)
        elif convert:
            value = value.view(plain).astype(wider).view(stored)
        if at.full:
            # Stored arrays never change, so sharing one between registers is safe.
            wave.registers[number] = value if value.ndim else np.full(wave.size, value)
        else:
            old = wave.registers[number]
            new = np.zeros(wave.size, stored) if old is None else old.copy()
            new[at.index] = value
            wave.registers[number] = new
        if wave.sanitizer is not None:
            wave.sanitizer.register_write(wave, i, operand, at)

    return write


# --- warps -----------------------------------------------------------------------------------------------------------


def warp_step(i: Instruction, body: Step, members: Read | None = None) -> Step:
    """A step that runs once its warp is together.

    ``members`` reads the lanes a lane must wait for, as a bit mask; None: an .aligned instruction, which all 32 lanes
    of the warp must execute.  Lanes that come early wait here while the others go on.
    """

    def step(wave, lanes):
        if lanes.whole:
            return body(wave, lanes)
        ready = wave.together(i, lanes, None if members is None else members(wave, lanes))
        if ready.all():
            return body(wave, lanes)
        wave.stall(i.pc, lanes.where(~ready))
        now = lanes.where(ready)
        if now is None:
            return []
        body(wave, now)
        return [(i.pc + 1, now)]

    return step


def guarded(i: Instruction, step: Step) -> Step:
    """The step for the lanes whose guard holds."""
    if i.guard is None:
        return step
    holds = reader(i, i.guard, TYPES["pred"])
    following = i.pc + 1

    def run(wave, lanes):
        active = lanes.where(holds(wave, lanes))
        if active is lanes:
            return step(wave, lanes)
        if active is None:
            wave.threads[i.pc] -= lanes.count
            return None
        wave.threads[i.pc] -= lanes.count - active.count
        out = step(wave, active)
        if out is None:
            return None
        rest = (following, lanes.without(active))
        return [(out, active), rest] if isinstance(out, int) else [*out, rest]

    return run


def translate(i: Instruction) -> Step:
    """The step of an instruction, guard and all."""
    make = TABLE.get(i.parts[0])
    if make is None:
        raise i.error(f"unknown opcode '{i.opcode}'")
    try:
        return guarded(i, make(i))
    except (IndexError, KeyError, ValueError) as problem:
        raise i.error(f"this form of '{i.parts[0]}' is not supported ({problem})") from problem
