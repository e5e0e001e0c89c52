"""Instructions by which the lanes of a warp talk to each other."""

from __future__ import annotations

import numpy as np

from ..errors import Fault
from ..formats import TYPES
from ..lanes import Lanes, ballot
from ..operands import opcode, reader, warp_step, writer
from ..parser import Imm, Instruction, Pair

B32, U32, S32, PRED = TYPES["b32"], TYPES["u32"], TYPES["s32"], TYPES["pred"]
ALL = np.uint32(0xFFFFFFFF)


def own_bit(wave, at: Lanes) -> np.ndarray:
    return np.uint32(1) << wave.lane[at.index]


def members_of(i: Instruction, operand):
    """A reader of the member mask that insists on the lane being its own member."""
    read = reader(i, operand, U32)

    def members(wave, at):
        mask = read(wave, at)
        if not (mask.ndim == 0 and mask == ALL):
            outside = (mask & own_bit(wave, at)) == 0
            if outside.any():
                first = int(np.argmax(outside))
                given = int(np.broadcast_to(mask, at.count)[first])
                raise Fault(f"the lane is not in its own member mask {given:#010x}", int(at.numbers[first]))
        return mask

    return members


def sync_step(i: Instruction, members, body):
    """A step that waits for its members; ``body(wave, lanes)``."""

    def checked(wave, at):
        members(wave, at)
        return body(wave, at)

    return warp_step(i, checked, members)


@opcode("shfl")
def shfl(i: Instruction):
    """shfl.sync.mode.b32 d{|p}, a, b, c, members"""
    target, a, b, c, mask = i.operands
    first, second = target if isinstance(target, Pair) else (target, None)
    write, write_valid = writer(i, first, B32), writer(i, second, PRED)
    read_a, read_b, read_c = (reader(i, one, U32) for one in (a, b, c))
    mode = i.one_of("up", "down", "bfly", "idx")
    fixed = isinstance(b, Imm) and isinstance(c, Imm)  # then the pattern is the same at every visit

    def pattern(wave, at):
        """Where each lane's value comes from [count], and whether that was in range."""
        lane = wave.lane[at.index].astype(np.int64)
        by, clamp = read_b(wave, at).astype(np.int64) & 31, read_c(wave, at).astype(np.int64)
        segment, limit = clamp >> 8 & 31, clamp & 31
        least = lane & segment
        most = least | (limit & ~segment)
        if mode == "up":
            source = lane - by
            valid = source >= most
        elif mode == "idx":
            source = least | (by & ~segment)
            valid = source <= most
        else:
            source = lane + by if mode == "down" else lane ^ by
            valid = source <= most
        return at.numbers - lane + np.where(valid, source, lane), valid

    def body(wave, at):
        known = at.memo.get(i.pc) if fixed else None
        if known is None:
            known = pattern(wave, at)
            if fixed:
                at.memo[i.pc] = known
        source, valid = known
        if wave.sanitizer is not None and not at.whole:
            wave.sanitizer.shuffle(wave, i, at, source)
        value = wave.spread(np.broadcast_to(read_a(wave, at), at.count), at)
        write(wave, at, value[source])
        write_valid(wave, at, valid)

    return sync_step(i, members_of(i, mask), body)


@opcode("vote")
def vote(i: Instruction):
    """vote.sync.{all,any,uni}.pred p, q, members; vote.sync.ballot.b32 d, q, members"""
    target, source, mask = i.operands
    mode = i.one_of("all", "any", "uni", "ballot")
    write = writer(i, target, B32 if mode == "ballot" else PRED)
    read, members = reader(i, source, PRED), members_of(i, mask)

    def body(wave, at):
        yes = ballot(wave.spread(np.broadcast_to(read(wave, at), at.count), at))[at.warp]
        asked = members(wave, at) & at.present[at.warp]
        yes = yes & asked
        if mode == "ballot":
            result = yes
        elif mode == "any":
            result = yes != 0
        else:
            result = yes == asked
            if mode == "uni":
                result = result | (yes == 0)
        write(wave, at, result)

    return sync_step(i, members, body)


def grid(wave, at: Lanes, value: np.ndarray, members: np.ndarray):
    """Everybody's value as each lane sees it: [count, 32] values, [count, 32] bool of those that count for it."""
    everyone = wave.spread(np.broadcast_to(value, at.count), at).reshape(-1, 32)[at.warp]
    asked = np.broadcast_to(members, at.count) & at.present[at.warp]
    return everyone, (asked[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1) != 0


@opcode("match")
def match(i: Instruction):
    """match.any.sync d, a, members; match.all.sync d|p, a, members"""
    target, source, mask = i.operands
    first, second = target if isinstance(target, Pair) else (target, None)
    write, write_all = writer(i, first, B32), writer(i, second, PRED)
    read, members = reader(i, source, i.type), members_of(i, mask)

    def body(wave, at):
        value = np.broadcast_to(read(wave, at), at.count)
        everyone, asked = grid(wave, at, value, members(wave, at))
        same = (everyone == value[:, None]) & asked
        bits = np.packbits(same, axis=1, bitorder="little").view(np.uint32)[:, 0]
        if "all" in i.parts:
            agree = (same == asked).all(axis=1)
            write_all(wave, at, agree)
            bits = np.where(agree, bits, np.uint32(0))
        write(wave, at, bits)

    return sync_step(i, members, body)


_REDUCTIONS = {
    "add": (np.add, 0),
    "min": (np.minimum, None),
    "max": (np.maximum, None),
    "and": (np.bitwise_and, -1),
    "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
}


@opcode("redux")
def redux(i: Instruction):
    target, source, mask = i.operands
    name, kind = i.one_of(*_REDUCTIONS), i.type
    if kind.floating:
        raise i.error("redux of floats is not supported")
    write, read, members = writer(i, target, kind), reader(i, source, kind), members_of(i, mask)
    function, neutral = _REDUCTIONS[name]
    if neutral is None:
        neutral = np.iinfo(kind.dtype).max if name == "min" else np.iinfo(kind.dtype).min
    neutral = np.array(neutral & ((1 << 32) - 1), np.uint32).view(kind.dtype)

    def body(wave, at):
        everyone, asked = grid(wave, at, read(wave, at), members(wave, at))
        write(wave, at, function.reduce(np.where(asked, everyone, neutral), axis=1, dtype=kind.dtype))

    return sync_step(i, members, body)


@opcode("activemask")
def activemask(i: Instruction):
    write = writer(i, i.operands[0], B32)
    return lambda wave, at: write(wave, at, at.present[at.warp])


@opcode("elect")
def elect(i: Instruction):
    """elect.sync d|p, members: the lowest member is elected."""
    target, mask = i.operands
    first, second = target if isinstance(target, Pair) else (target, None)
    write, write_elected = writer(i, first, B32), writer(i, second, PRED)
    members = members_of(i, mask)

    def body(wave, at):
        asked = members(wave, at) & at.present[at.warp]
        leader = np.bitwise_count(~asked & (asked - np.uint32(1))).astype(np.uint32)
        write(wave, at, leader)
        write_elected(wave, at, leader == wave.lane[at.index])

    return sync_step(i, members, body)
