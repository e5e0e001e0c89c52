"""What runs beside the threads: barriers in shared memory (mbarrier) and bulk copies (TMA) that report to them.

A copy is done at once, which is as early as it may be; what must not be read or overwritten yet is the business of
sanitizers.  Threads that wait for a phase stall until something arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from .. import memory
from ..errors import Fault
from ..formats import TYPES
from ..lanes import Lanes
from ..operands import address_reader, opcode, reader, writer
from ..parser import Addr, Imm, Instruction, Reg, Vec
from .data import address_bits, space_of, without_hints

U32, S32, U64, PRED = TYPES["u32"], TYPES["s32"], TYPES["u64"], TYPES["pred"]
OFFSET = np.uint64((1 << 56) - 1)  # of a generic address within its space


# --- mbarrier --------------------------------------------------------------------------------------------------------


@dataclass
class Mbarrier:
    """The barriers at one address of shared memory, [blocks] each.  A phase is over when ``pending`` arrivals and
    ``bytes`` of transactions are both down to zero."""

    count: np.ndarray  # arrivals that a phase takes; 0: there is no barrier
    pending: np.ndarray
    bytes: np.ndarray
    phase: np.ndarray  # phases completed


def mbarrier_at(wave, address: int, lanes: Lanes) -> Mbarrier:
    """The initialised barriers of the lanes' blocks."""
    found = wave.state.setdefault("mbarriers", {}).get(address)
    missing = np.ones(lanes.count, bool) if found is None else found.count[wave.block_of[lanes.index]] == 0
    if missing.any():
        raise Fault(f"no mbarrier was initialised at shared address {address:#x}", memory.first_lane(lanes, missing))
    return found


def touch(wave, address: int, lanes: Lanes, kind: str) -> None:
    """Observers hear of an access to the barrier's own eight bytes."""
    addresses = np.full(lanes.count, address)
    wave.observe(kind, "shared", lanes, addresses, 8, wave.shared.locate(lanes, addresses, 8, kind))


def arrive(wave, address: int, lanes: Lanes, arrivals, expected, copied: bool = False) -> None:
    """Each lane brings arrivals and expects bytes (below zero: bytes have come); both [lanes.count] or scalars.
    ``copied``: it is a copy that reports."""
    barrier, blocks = mbarrier_at(wave, address, lanes), wave.block_of[lanes.index]
    if not copied:
        touch(wave, address, lanes, "atomic")
    if wave.sanitizer is not None:
        wave.sanitizer.release(wave, ("mbarrier", address), lanes, copied)

    def by_block(values) -> np.ndarray:
        return np.bincount(blocks, np.broadcast_to(values, lanes.count), wave.blocks).astype(np.int64)

    barrier.pending -= by_block(arrivals)
    barrier.bytes += by_block(expected)
    beyond = barrier.pending[blocks] < 0
    if beyond.any():
        at = int(np.argmax(beyond))
        count = int(barrier.count[blocks[at]])
        raise Fault(
            f"more than the {count} arrivals of a phase come to the mbarrier at {address:#x}", int(lanes.numbers[at])
        )
    over = (barrier.pending == 0) & (barrier.bytes == 0) & (barrier.count > 0)
    if over.any():
        barrier.pending[over] = barrier.count[over]
        barrier.phase[over] += 1
        if wave.sanitizer is not None:
            wave.sanitizer.complete(wave, ("mbarrier", address), over)
        wave.wake()


def shared_address(i: Instruction, operand) -> object:
    """Reads an address in shared memory, [lanes.count] uint64, given in that space or generic."""
    if not space_of(i.parts).startswith("shared") and not i.has("tensor", "bulk"):
        read = address_reader(i, operand, address_bits(""))
        return lambda wave, at: np.broadcast_to(read(wave, at) & OFFSET, at.count)
    read = address_reader(i, operand, 32)
    return lambda wave, at: np.broadcast_to(read(wave, at), at.count)


def same_address(at: Lanes, addresses: np.ndarray) -> Iterator[tuple[int, Lanes, np.ndarray]]:
    """The lanes in groups of one address: (address, lanes, positions)."""
    for address in np.unique(addresses):
        chosen = addresses == address
        yield int(address), at.where(chosen), chosen


@opcode("mbarrier")
def mbarrier(i: Instruction):
    """mbarrier.{init, inval, arrive, arrive_drop, expect_tx, complete_tx, test_wait, try_wait}"""
    what = i.parts[1]
    if what in ("init", "inval"):
        return _init(i, what)
    if what in ("test_wait", "try_wait"):
        return _wait(i, suspend=what == "try_wait")
    if what not in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        raise i.error(f"'{i.opcode}' is not supported")
    operands = list(i.operands)
    token = writer(i, operands.pop(0), U64) if what.startswith("arrive") and not isinstance(operands[0], Addr) else None
    address, amount = shared_address(i, operands[0]), reader(i, (*operands, Imm(1, "int"))[1], U32)
    brings_bytes = i.has("expect_tx", "complete_tx")
    sign = -1 if what == "complete_tx" else 1

    def step(wave, at):
        amounts = np.broadcast_to(amount(wave, at), at.count).astype(np.int64)
        addresses = address(wave, at)
        tokens = np.zeros(at.count, np.uint64)
        for one, lanes, chosen in same_address(at, addresses):
            blocks = wave.block_of[lanes.index]
            barrier = mbarrier_at(wave, one, lanes)
            tokens[chosen] = barrier.phase[blocks]
            if what == "arrive_drop":
                np.subtract.at(barrier.count, blocks, amounts[chosen])
            arrivals = 0 if not what.startswith("arrive") else 1 if brings_bytes else amounts[chosen]
            arrive(wave, one, lanes, arrivals, sign * amounts[chosen] if brings_bytes else 0)
        if token is not None:
            token(wave, at, tokens)

    return step


def _init(i: Instruction, what: str):
    address = shared_address(i, i.operands[0])
    count = reader(i, i.operands[1], U32) if what == "init" else None

    def step(wave, at):
        counts = np.broadcast_to(count(wave, at) if count else np.uint32(0), at.count)
        if count and (counts == 0).any():
            raise Fault("an mbarrier takes at least one arrival, got 0", memory.first_lane(at, counts == 0))
        for one, lanes, chosen in same_address(at, address(wave, at)):
            touch(wave, one, lanes, "write")
            barriers = wave.state.setdefault("mbarriers", {})
            if one not in barriers:
                barriers[one] = Mbarrier(*(np.zeros(wave.blocks, np.int64) for _ in range(4)))
            barrier, blocks = barriers[one], wave.block_of[lanes.index]
            barrier.count[blocks] = barrier.pending[blocks] = counts[chosen]
            barrier.bytes[blocks] = barrier.phase[blocks] = 0

    return step


def _wait(i: Instruction, suspend: bool):
    """{test,try}_wait{.parity} p, [barrier], phase{, time}: is the phase of this parity (or token) over?"""
    target, source, phase, *_ = i.operands
    write, address = writer(i, target, PRED), shared_address(i, source)
    parity = "parity" in i.parts
    asked = reader(i, phase, U32 if parity else U64)

    def step(wave, at):
        phases, over = np.broadcast_to(asked(wave, at), at.count), np.zeros(at.count, bool)
        for one, lanes, chosen in same_address(at, address(wave, at)):
            completed = mbarrier_at(wave, one, lanes).phase[wave.block_of[lanes.index]].astype(np.uint64)
            touch(wave, one, lanes, "atomic")
            over[chosen] = completed & 1 != phases[chosen] if parity else completed > phases[chosen]
            through = lanes.where(over[chosen])
            if through is not None and wave.sanitizer is not None:
                wave.sanitizer.acquire(wave, ("mbarrier", one), through)
        if not suspend:
            wave.looks += 1
            return write(wave, at, over)
        if not over.all():
            wave.stall(i.pc, at.where(~over))
        now = at.where(over)
        if now is None:
            return []
        write(wave, now, np.ones(now.count, bool))
        return [(i.pc + 1, now)]

    return step


# --- copies ---------------------------------------------------------------------------------------------


@opcode("cp")
def cp(i: Instruction):
    """cp.async, which each thread does for itself: groups need no bookkeeping where copies are done at once."""
    if i.has("bulk"):
        return bulk_copy(i)
    if i.parts[1] != "async" or i.has("mbarrier"):
        raise i.error(f"'{i.opcode}' is not supported")
    if i.has("commit_group", "wait_group", "wait_all"):
        return lambda wave, at: None
    target, source, size, *rest = without_hints(i)
    target, source = address_reader(i, target, 32), address_reader(i, source)
    nbytes = size.value
    # What follows is either the number of bytes to read (the rest is zero), or a predicate: read nothing.
    source_bytes = ignore = None
    if rest:
        if isinstance(rest[0], Reg) and rest[0].bits == 1:
            ignore = reader(i, rest[0], TYPES["pred"])
        else:
            source_bytes = reader(i, rest[0], U32)

    def step(wave, at):
        taken = np.full(at.count, nbytes, np.int64)
        if source_bytes is not None:
            taken = np.minimum(np.broadcast_to(source_bytes(wave, at), at.count), nbytes).astype(np.int64)
        if ignore is not None:
            taken = np.where(ignore(wave, at), 0, nbytes)
        sources = np.broadcast_to(source(wave, at), at.count)
        content = np.zeros((at.count, nbytes), np.uint8)
        memory.check_aligned(at, sources, nbytes, "global read")
        for amount in np.unique(taken[taken > 0]):
            chosen = taken == amount
            part = at.where(chosen)
            word = int(amount & -amount)  # the largest word that divides the amount
            word, count = (8, 2) if word == 16 else (word, amount // word)
            columns = []
            if word * count in (4, 8, 16):
                columns = memory.load(wave, wave.memory, part, sources[chosen], word, int(count))
            else:
                for n in range(count):
                    columns += memory.load(wave, wave.memory, part, sources[chosen] + np.uint64(n * word), word)
            content[chosen, :amount] = np.stack(columns, axis=1).view(np.uint8)
        words = content.view(np.uint32)
        memory.store(wave, wave.shared, at, target(wave, at), list(np.ascontiguousarray(words.T)))

    return step


# --- bulk copies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled puts into 128 opaque bytes of a kernel's parameters.  Innermost dimension first.

    address        of the first element
    element_bytes  1, 2, 4 or 8
    dims           extents in elements; what a box has outside them is filled with zeros
    strides        bytes from one index to the next; strides[0] = element_bytes
    box            extents that one copy takes
    swizzle        bytes: 0, or 32, 64, 128: units of 16 bytes change places within so many bytes
    """

    address: int
    element_bytes: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Address bits 4 up are XORed with as many bits from 7 up."""
    if not swizzle:
        return addresses
    return addresses ^ ((addresses >> np.uint64(7) & np.uint64(swizzle // 16 - 1)) << np.uint64(4))


def repeated(wave, lane: int, count: int) -> Lanes:
    """One lane as often as it has words to move."""
    return Lanes(np.full(count, lane), wave.size)


def fetch(wave, lane: int, addresses: np.ndarray, unit: int) -> np.ndarray:
    """[addresses, unit] uint8 of global memory."""
    size, count = min(unit, 8), max(unit // 8, 1)
    words = memory.load(wave, wave.memory, repeated(wave, lane, len(addresses)), addresses, size, count, "fetch")
    return np.stack(words, axis=1).view(np.uint8)


def deliver(wave, lane: int, addresses: np.ndarray, content: np.ndarray, barrier: int) -> None:
    """Content [addresses, 16] to shared memory; then the barrier hears of the bytes."""
    words = list(np.ascontiguousarray(content.view(np.uint64).T))
    memory.store(wave, wave.shared, repeated(wave, lane, len(addresses)), addresses, words, kind="copy")
    one = Lanes(np.array([lane]), wave.size)
    arrive(wave, barrier, one, 0, -content.size, copied=True)


def tile(wave, lane: int, tensor: TensorMap, start: list[int]) -> np.ndarray:
    """[box bytes] uint8: the box that begins at ``start`` (innermost coordinate first)."""
    size, inner = tensor.element_bytes, tensor.box[0]
    rows = np.full(1, tensor.address + start[0] * size, np.int64)
    inside = np.ones(1, bool)
    for first, extent, dim, stride in zip(start[1:], tensor.box[1:], tensor.dims[1:], tensor.strides[1:]):
        index = first + np.arange(extent)[:, None]
        rows = (rows + index * stride).reshape(-1)
        inside = (inside & (index >= 0) & (index < dim)).reshape(-1)
    content = np.zeros((len(rows), inner * size), np.uint8)
    low, high = max(0, -start[0]) * size, min(inner, tensor.dims[0] - start[0]) * size
    if low < high and inside.any():
        # The largest unit that all pieces are made of.
        whole = int(np.bitwise_or.reduce(rows)) | low | high | 16
        unit = whole & -whole
        addresses = (rows[inside, None] + np.arange(low, high, unit)).reshape(-1).view(np.uint64)
        content[inside, low:high] = fetch(wave, lane, addresses, unit).reshape(-1, high - low)
    return content.reshape(-1)


def bulk_copy(i: Instruction):
    """cp.async.bulk{.tensor.Nd}.shared.global.mbarrier::complete_tx::bytes"""
    if i.has("commit_group", "wait_group"):
        return lambda wave, at: None
    spaces = [part.split("::")[0] for part in i.parts if part.split("::")[0] in ("shared", "global")]
    refused = ("im2col", "multicast::cluster", "prefetch", "reduce", "tile::gather4", "cta_group::2")
    if spaces != ["shared", "global"] or i.has(*refused) or "mbarrier::complete_tx::bytes" not in i.parts:
        raise i.error(f"'{i.opcode}' is not supported")
    return _tensor_copy(i) if i.has("tensor") else _plain_copy(i)


def _plain_copy(i: Instruction):
    target, source, size, barrier = without_hints(i)
    reads = shared_address(i, target), address_reader(i, source), reader(i, size, U32), shared_address(i, barrier)

    def step(wave, at):
        for lane, *values in zip(at.numbers, *(np.broadcast_to(read(wave, at), at.count) for read in reads)):
            to, start, nbytes, where = map(int, values)
            if (to | start | nbytes) % 16:
                raise Fault(f"bulk copy of {nbytes} bytes from {start:#x} to {to:#x}: not multiples of 16", int(lane))
            steps = np.arange(0, nbytes, 16, np.uint64)
            if len(steps):
                content = fetch(wave, int(lane), np.uint64(start) + steps, 16)
                deliver(wave, int(lane), np.uint64(to) + steps, content, where)

    return step


def _tensor_copy(i: Instruction):
    target, source, barrier = without_hints(i)
    if len(source.extra) != 1 or not isinstance(source.extra[0], Vec):
        raise i.error("[tensor map, {coordinates}] expected")
    coordinates = source.extra[0].items
    if not i.has(f"{len(coordinates)}d"):
        raise i.error(f"{len(coordinates)} coordinates do not fit")
    reads = (
        shared_address(i, target),
        address_reader(i, Addr(source.base, source.offset)),
        shared_address(i, barrier),
        *(reader(i, coordinate, S32) for coordinate in coordinates),
    )

    def step(wave, at):
        for lane, *values in zip(at.numbers, *(np.broadcast_to(read(wave, at), at.count) for read in reads)):
            to, where, barrier_at, *start = map(int, values)
            tensor = wave.launch.tensor_maps.get(where)
            if tensor is None or len(tensor.box) != len(start):
                what = f"has {len(tensor.box)} dimensions, not {len(start)}" if tensor else "was not handed in"
                raise Fault(f"the tensor map at {where:#x} {what}", int(lane))
            nbytes = prod(tensor.box) * tensor.element_bytes
            if to % 128 or nbytes % 16:
                raise Fault(f"tensor copy of {nbytes} bytes to {to:#x}: multiples of 16 and 128 expected", int(lane))
            content = tile(wave, int(lane), tensor, start).reshape(-1, 16)
            addresses = swizzled(np.uint64(to) + np.arange(0, nbytes, 16, np.uint64), tensor.swizzle)
            deliver(wave, int(lane), addresses, content, barrier_at)

    return step
