"""Loads, stores, atomics, ldmatrix and stmatrix."""

from __future__ import annotations

import numpy as np

from .. import memory
from ..formats import TYPES, UNSIGNED, Type
from ..operands import address_reader, opcode, reader, warp_step, writer
from ..parser import Instruction, Reg, Vec
from .floating import float_add, float_minmax

B32, U32 = TYPES["b32"], TYPES["u32"]
_SPACES = ("global", "shared", "local", "param", "const")


def space_of(parts: tuple[str, ...]) -> str:
    """global, shared, local or "" (generic); parameters and constants lie in global memory here."""
    for part in parts:
        name = part.split("::")[0]
        if name in _SPACES and part not in ("shared::cluster",):
            return "global" if name in ("param", "const") else name
        if part == "shared::cluster":
            return "shared"
    return ""


def address_bits(space: str) -> int:
    return 64 if space in ("global", "") else 32


def in_space(space: str, act):
    """Call ``act(wave, memory space, lanes, addresses, positions)`` for a known space, or for each one generic
    addresses name; ``positions`` picks its lanes (None: all)."""
    if space:
        return lambda wave, at, addresses: [(act(wave, getattr(wave, _ATTRIBUTE[space]), at, addresses, None), None)]

    def generic(wave, at, addresses):
        tags = addresses >> np.uint64(56)
        if not tags.any():
            return [(act(wave, wave.memory, at, addresses, None), None)]
        addresses, tags = np.broadcast_to(addresses, at.count), np.broadcast_to(tags, at.count)
        results = []
        for tag in np.unique(tags):
            chosen = tags == tag
            target = (wave.memory, wave.shared, wave.local)[int(tag)] if tag < 3 else wave.memory
            inner = addresses[chosen] & np.uint64((1 << 56) - 1) if tag < 3 else addresses[chosen]
            results.append((act(wave, target, at.where(chosen), inner, chosen), chosen))
        return results

    return generic


_ATTRIBUTE = {"global": "memory", "shared": "shared", "local": "local"}


def vector_length(i: Instruction) -> int:
    return int(i.one_of("v2", "v4", "v8", default="v1")[1:])


def without_hints(i: Instruction):
    """Operands but for a trailing cache policy."""
    return i.operands[:-1] if "L2::cache_hint" in i.parts else i.operands


@opcode("ld", "ldu")
def ld(i: Instruction):
    target, source = without_hints(i)[:2]
    kind, count, space = i.type, vector_length(i), space_of(i.parts)
    size = kind.bits // 8
    address = address_reader(i, source, address_bits(space))
    targets = target.items if isinstance(target, Vec) and count > 1 else (target,)
    if len(targets) != count:
        raise i.error(f"{count} destinations expected, found {len(targets)}")
    if kind.name == "b128":
        raise i.error("128-bit registers are not supported")
    writes = [writer(i, one, kind) for one in targets]
    dtype = kind.dtype

    def read(wave, where, at, addresses, positions):
        return memory.load(wave, where, at, addresses, size, count)

    access = in_space(space, read)
    may_spin = i.has("volatile", "relaxed", "acquire", "mmio")

    def step(wave, at):
        wave.looks += may_spin
        results = access(wave, at, address(wave, at))
        if len(results) == 1:
            words = results[0][0]
        else:
            words = [np.empty(at.count, UNSIGNED[8 * size]) for _ in range(count)]
            for loaded, chosen in results:
                for word, value in zip(words, loaded):
                    word[chosen] = value
        for write, word in zip(writes, words):
            write(wave, at, word.view(dtype))

    return step


@opcode("st")
def st(i: Instruction):
    target, source = without_hints(i)[:2]
    kind, count, space = i.type, vector_length(i), space_of(i.parts)
    address = address_reader(i, target, address_bits(space))
    sources = source.items if isinstance(source, Vec) and count > 1 else (source,)
    if len(sources) != count:
        raise i.error(f"{count} sources expected, found {len(sources)}")
    bits = TYPES[f"u{kind.bits}"]
    reads = [reader(i, one, bits if isinstance(one, Reg) else kind) for one in sources]

    def step(wave, at):
        values = [np.asarray(read(wave, at)).view(bits.dtype) for read in reads]

        def write(wave, where, part, addresses, positions):
            chosen = values if positions is None else [v[positions] if v.ndim else v for v in values]
            memory.store(wave, where, part, addresses, chosen)

        in_space(space, write)(wave, at, address(wave, at))

    return step


# --- atomics ---------------------------------------------------------------------------------------------------------


def wrap_increment(old, limit):
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def wrap_decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


_UPDATES = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "inc": wrap_increment,
    "dec": wrap_decrement,
}


def update_of(i: Instruction, name: str, kind: Type):
    """The function of unsigned words that an atomic applies."""
    unsigned = TYPES[f"u{kind.bits}"].dtype
    if name in _UPDATES:
        return _UPDATES[name]
    if kind.floating:
        # add and max as the arithmetic instructions do them
        typed = float_add(i) if name == "add" else float_minmax(_renamed(i, name))
    else:
        typed = {"add": np.add, "min": np.minimum, "max": np.maximum}[name]
    return lambda old, value: np.asarray(typed(old.view(kind.dtype), value.view(kind.dtype))).view(unsigned)


def _renamed(i: Instruction, name: str) -> Instruction:
    return Instruction(i.pc, i.line, i.text, None, i.opcode, (name, *i.parts[1:]), i.operands[:3], i.scope)


@opcode("atom", "red")
def atom(i: Instruction):
    operands = list(without_hints(i))
    target = operands.pop(0) if i.parts[0] == "atom" else None
    name = i.one_of("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    kind, space = i.type, space_of(i.parts)
    if vector_length(i) > 1 or kind.bits > 64:
        raise i.error("vector and 128-bit atomics are not supported")
    unsigned = TYPES[f"u{kind.bits}"]
    update = update_of(i, name, kind)
    address = address_reader(i, operands[0], address_bits(space))
    reads = [reader(i, one, kind) for one in operands[1:]]
    write = writer(i, target, unsigned)
    size = kind.bits // 8

    may_spin = target is not None

    def step(wave, at):
        wave.looks += may_spin
        values = [np.broadcast_to(np.asarray(read(wave, at)).view(unsigned.dtype), at.count) for read in reads]

        def apply(wave, where, part, addresses, positions):
            chosen = values if positions is None else [value[positions] for value in values]
            return memory.atomic(wave, where, part, addresses, size, update, chosen)

        found = np.empty(at.count, unsigned.dtype)
        for old, chosen in in_space(space, apply)(wave, at, address(wave, at)):
            found[slice(None) if chosen is None else chosen] = old
        write(wave, at, found)

    return step


# --- matrices --------------------------------------------------------------------------------------------------------


def _matrices(i: Instruction) -> int:
    if not i.has("m8n8") or not i.has("b16"):
        raise i.error("only 8x8 matrices of 16 bits are supported")
    return int(i.one_of("x1", "x2", "x4")[1:])


def _row_addresses(wave, at, read, count: int) -> np.ndarray:
    """[warps, 8 * count] the addresses that the warp's first lanes hand in, in bytes."""
    return np.broadcast_to(read(wave, at), at.count).reshape(-1, 32)[:, : 8 * count]


@opcode("ldmatrix")
def ldmatrix(i: Instruction):
    """Each 8x8 matrix of 16-bit elements: lane l gets elements 2(l % 4), +1 of row l / 4 (.trans: of column l / 4)."""
    count, trans = _matrices(i), "trans" in i.parts
    target, source = i.operands
    targets = target.items if isinstance(target, Vec) else (target,)
    writes = [writer(i, one, B32) for one in targets]
    address = address_reader(i, source, 32)
    if len(writes) != count:
        raise i.error(f"{count} destinations expected, found {len(writes)}")

    def body(wave, at):
        rows = _row_addresses(wave, at, address, count)
        holders = at.where((np.arange(at.count) % 32) < 8 * count)
        words = memory.load(wave, wave.shared, holders, rows.reshape(-1), 4, 4)
        # [warps, matrix, row, pair of columns, element]
        tiles = np.stack(words, axis=1).view(np.uint16).reshape(-1, count, 8, 4, 2)
        if trans:
            tiles = tiles.reshape(-1, count, 8, 8).swapaxes(2, 3).reshape(-1, count, 8, 4, 2)
        for n, write in enumerate(writes):
            write(wave, at, np.ascontiguousarray(tiles[:, n]).view(np.uint32).reshape(-1))

    return warp_step(i, body)


@opcode("stmatrix")
def stmatrix(i: Instruction):
    """The inverse of ldmatrix."""
    count, trans = _matrices(i), "trans" in i.parts
    target, source = i.operands
    sources = source.items if isinstance(source, Vec) else (source,)
    reads = [reader(i, one, B32) for one in sources]
    address = address_reader(i, target, 32)
    if len(reads) != count:
        raise i.error(f"{count} sources expected, found {len(reads)}")

    def body(wave, at):
        words = [np.broadcast_to(read(wave, at), at.count).reshape(-1, 32) for read in reads]
        tiles = np.stack(words, axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        rows = tiles.reshape(-1, 8).view(np.uint32)
        holders = at.where((np.arange(at.count) % 32) < 8 * count)
        addresses = _row_addresses(wave, at, address, count).reshape(-1)
        memory.store(wave, wave.shared, holders, addresses, list(np.ascontiguousarray(rows.T)))

    return warp_step(i, body)


@opcode("movmatrix")
def movmatrix(i: Instruction):
    """Transpose one 8x8 matrix of 16-bit elements that lies in a register of the warp."""
    target, source = i.operands
    write, read = writer(i, target, B32), reader(i, source, B32)

    def body(wave, at):
        tile = np.ascontiguousarray(np.broadcast_to(read(wave, at), at.count)).view(np.uint16).reshape(-1, 8, 8)
        write(wave, at, np.ascontiguousarray(tile.swapaxes(1, 2)).reshape(-1).view(np.uint32))

    return warp_step(i, body)


@opcode("createpolicy")
def createpolicy(i: Instruction):
    """An opaque cache policy; nothing looks at it."""
    write = writer(i, i.operands[0], TYPES["b64"])
    return lambda wave, at: write(wave, at, np.uint64(0))


@opcode("mapa")
def mapa(i: Instruction):
    """The address in another block of the cluster: a block is its own cluster here."""
    target, source, *_ = i.operands
    write, read = writer(i, target, i.type), reader(i, source, i.type)
    return lambda wave, at: write(wave, at, read(wave, at))
