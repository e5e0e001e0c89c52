"""Branches, exits, barriers, fences, and hints without effect."""

from __future__ import annotations

import numpy as np

from ..errors import Fault
from ..formats import TYPES
from ..lanes import Lanes
from ..operands import opcode, reader, warp_step, writer
from ..parser import Instruction, Sym

U32, PRED = TYPES["u32"], TYPES["pred"]


@opcode("bra")
def bra(i: Instruction):
    (target,) = i.operands
    pc = i.scope.label(target.name) if isinstance(target, Sym) else None
    if pc is None:
        raise i.error(f"unknown label '{target}'")
    return lambda wave, lanes: pc


@opcode("ret", "exit")
def leave(i: Instruction):
    def step(wave, lanes):
        wave.leave(lanes)
        return []

    return step


@opcode("trap", "brkpt")
def trap(i: Instruction):
    def step(wave, lanes):
        raise Fault("the kernel trapped", int(lanes.numbers[0]))

    return step


@opcode(
    "membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "setmaxnreg", "pmevent"
)
def nothing(i: Instruction):
    """Memory is one and in order here, and a launch starts when the one before has ended."""
    return lambda wave, lanes: None


@opcode("nanosleep")
def nanosleep(i: Instruction):
    """Let the others go first, if there are any."""

    def step(wave, lanes):
        wave.rest(i.pc + 1, lanes)
        return []

    return step


@opcode("bar", "barrier")
def bar(i: Instruction):
    """bar.sync a{, b}; bar.arrive a, b; bar.red.popc.u32 d, a{, b}, p; bar.red.{and,or}.pred d, a{, b}, p; bar.warp."""
    if "warp" in i.parts:
        return warp_step(i, lambda wave, lanes: None, reader(i, i.operands[0], U32))
    if "cluster" in i.parts:
        raise i.error("clusters are not supported")
    reduce = i.one_of("popc", "and", "or") if "red" in i.parts else ""
    operands = list(i.operands)
    target = operands.pop(0) if reduce else None
    vote = reader(i, operands.pop(), PRED) if reduce else None
    number = reader(i, operands[0], U32)
    count = reader(i, operands[1], U32) if len(operands) > 1 else None
    write = writer(i, target, U32 if reduce == "popc" else PRED) if reduce else None

    def finish(wave, lanes: Lanes, values: np.ndarray, blocks: np.ndarray) -> None:
        yes = np.bincount(blocks[values], minlength=wave.blocks)
        if reduce == "popc":
            result = yes.astype(np.uint32)
        else:
            result = yes > 0 if reduce == "or" else yes == np.bincount(blocks, minlength=wave.blocks)
        write(wave, lanes, result[wave.block_of[lanes.index]])

    def step(wave, lanes):
        which = np.atleast_1d(number(wave, lanes))
        need = None if count is None else count(wave, lanes).astype(np.int64)
        if need is not None and (bad := np.atleast_1d(need % 32 != 0)).any():
            raise Fault(
                f"a barrier's thread count must be a multiple of 32, got {int(np.atleast_1d(need)[np.argmax(bad)])}",
                int(lanes.numbers[np.argmax(bad)]),
            )
        if (which >= 16).any():
            raise Fault(f"barriers are numbered 0 to 15, got {int(which.max())}", int(lanes.numbers[0]))
        values = None if vote is None else np.broadcast_to(vote(wave, lanes), lanes.count)
        out = []
        for one in np.unique(which):
            part = lanes.where(np.broadcast_to(which == one, lanes.count))
            chosen = slice(None) if part is lanes else np.broadcast_to(which == one, lanes.count)
            out += wave.barrier(
                int(one),
                part,
                i.pc + 1,
                need=need if need is None or not need.ndim else need[chosen],
                park="arrive" not in i.parts,
                values=None if values is None else values[chosen],
                done=finish if reduce else None,
            )
        return out

    return step
