"""mma.sync: tensor-core products of 16xK by Kx8 matrices, plain and block-scaled.

Three functions say which element of a matrix sits where in a warp's registers (PTX ISA, "Matrix fragments for
mma"); with group g = lane / 4, thread t = lane % 4, and e elements to a 32-bit register:

    a   row g + 8 (r % 2), k = e t + j + 4 e (r / 2)
    b   column g,          k = e t + j + 4 e r
    d   row g + 8 (r / 2), column 2 t + r % 2          (r counts single elements)

Everything else is one loop for all kinds: registers -> units of 16 bits in the matrix's order -> float32 matrices by
table -> matmul -> registers.  Products of elements of at most 8 bits are exact in float32; the sum is float32.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from ..formats import DECODE, TYPES, bf16_to_f32
from ..operands import opcode, reader, warp_step, writer
from ..parser import Instruction, Reg, Vec

B32, F32 = TYPES["b32"], TYPES["f32"]
NIBBLES = "e2m1 packed"  # as in the mxf4 kinds; elsewhere an e2m1 element has a byte to itself
BITS = {"e4m3": 8, "e5m2": 8, "e3m2": 8, "e2m3": 8, "e2m1": 8, "f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}
BITS[NIBBLES] = 4


def a_element(lane: int, register: int, element: int, per: int) -> tuple[int, int]:
    """(row, k) of an element, ``per`` elements to a register."""
    return lane // 4 + 8 * (register % 2), per * (lane % 4) + element + 4 * per * (register // 2)


def b_element(lane: int, register: int, element: int, per: int) -> tuple[int, int]:
    """(column, k)"""
    return lane // 4, per * (lane % 4) + element + 4 * per * register


def d_element(lane: int, element: int) -> tuple[int, int]:
    """(row, column)"""
    return lane // 4 + 8 * (element // 2), 2 * (lane % 4) + element % 2


# [4 elements, 32 lanes] positions in a 16x8 matrix
D_ORDER = np.array([[8 * row + col for row, col in (d_element(lane, n) for lane in range(32))] for n in range(4)])


# --- elements --------------------------------------------------------------------------------------------------------


@cache
def unit_table(name: str) -> np.ndarray:
    """The elements in 16 bits, for all 65536 values: one record of 1, 2 or 4 float32 each."""
    units = np.arange(1 << 16, dtype=np.uint16)
    if name == "f16":
        elements = units.view(np.float16).astype(np.float32)
    elif name == "bf16":
        elements = bf16_to_f32(units)
    elif name == NIBBLES:
        elements = DECODE["e2m1"][units[:, None] >> np.arange(0, 16, 4) & 15]
    elif name in ("s8", "u8"):
        elements = units.view(np.int8 if name == "s8" else np.uint8).astype(np.float32)
    elif name == "e2m1":  # the four bits lie in the middle of the byte
        elements = DECODE["e2m1"][units.view(np.uint8) >> 2]
    else:
        elements = DECODE[name][units.view(np.uint8)]
    elements = np.ascontiguousarray(elements).reshape(1 << 16, -1)
    record = {1: np.float32, 2: np.complex64, 4: np.complex128}[elements.shape[1]]  # just something of that size
    return elements.view(record)[:, 0]


def remembered(wave, at, key, registers: list[int], make):
    """``make()``, or what it returned last time if the lanes and the registers are still the same.

    Stored registers are never changed, only replaced: the same arrays mean the same contents.
    """
    now = [wave.registers[number] for number in registers]
    store = wave.state.setdefault("mma", {})
    known = store.get(key)
    if known is not None and known[0] is at and all(map(lambda old, new: old is new, known[1], now)):
        return known[2]
    value = make()
    store[key] = at, now, value
    return value


class Fragment:
    """Operand a or b: one matrix a warp, each row (of b: column) contiguous in k."""

    def __init__(self, i: Instruction, vector: Vec, name: str, layout, rows: int, k: int):
        self.reads = [reader(i, register, B32) for register in vector.items]
        if not all(isinstance(register, Reg) for register in vector.items):
            raise i.error("matrices must lie in registers")
        self.registers = [register.number for register in vector.items]
        self.key = (tuple(self.registers), name, layout)
        per = 32 // BITS[name]
        if len(self.reads) * per * 32 != rows * k:
            raise i.error(f"a fragment of {len(self.reads)} registers does not fill {rows} x {k}")
        self.name, self.shape = name, (-1, rows, k)
        self.unit = np.uint32 if name == "tf32" else np.uint16
        width = 1 if name == "tf32" else 16 // BITS[name]  # elements of a unit
        # Positions of the matrix's units, row by row, in the warp's registers [32 lanes, registers, units].
        self.order = np.empty(rows * k // width, np.intp)
        for position in range(len(self.order)):
            lane, rest = divmod(position, len(self.order) // 32)
            register, unit = divmod(rest, per // width)
            row, column = layout(lane, register, unit * width, per)
            self.order[(row * k + column) // width] = position

    def matrices(self, wave, at) -> np.ndarray:
        """[warps, rows, k] float32"""
        return remembered(wave, at, self.key, self.registers, lambda: self._assemble(wave, at))

    def _assemble(self, wave, at) -> np.ndarray:
        words = np.stack([read(wave, at) for read in self.reads], axis=1)
        units = words.view(self.unit).reshape(at.count // 32, -1).take(self.order, axis=1)
        if self.name == "tf32":
            elements = (units & np.uint32(0xFFFFE000)).view(np.float32)
        else:
            elements = unit_table(self.name)[units].view(np.float32)
        return elements.reshape(self.shape)


class Scale:
    """The scale factors of one operand: {data}, {byte selector, thread selector}.

    Lane t = selector (a: t = 2 * selector for row g, t + 1 for row g + 8) of each group holds the bytes of that row or
    column in its register, from the byte selector on, one for each of ``blocks`` chunks of k.
    """

    def __init__(self, i: Instruction, data, selectors, is_a: bool, blocks: int, name: str):
        if isinstance(data, Vec):
            (data,) = data.items
        self.read, self.blocks, self.is_a = reader(i, data, B32), blocks, is_a
        self.key = (data, selectors, is_a, blocks, name)
        self.registers = [operand.number for operand in (data, *selectors.items) if isinstance(operand, Reg)]
        self.byte, self.thread = (reader(i, item, TYPES["u16"]) for item in selectors.items)
        self.table = DECODE[name].astype(np.float64)
        self.instruction = i

    def factors(self, wave, at) -> np.ndarray | None:
        """[warps, rows or columns, blocks] float64; None if all are 1."""
        return remembered(wave, at, self.key, self.registers, lambda: self._factors(wave, at))

    def _factors(self, wave, at) -> np.ndarray | None:
        words = np.ascontiguousarray(np.broadcast_to(self.read(wave, at), at.count)).view(np.uint8).reshape(-1, 8, 4, 4)
        byte, thread = (int(np.max(read(wave, at))) for read in (self.byte, self.thread))
        if byte % self.blocks or byte > 4 - self.blocks or thread > (1 if self.is_a else 3):
            raise self.instruction.error(f"scale selectors {{{byte}, {thread}}} are not valid here")
        chosen = words[..., byte : byte + self.blocks]  # [warps, group, thread, blocks]
        if self.is_a:
            chosen = np.concatenate([chosen[:, :, 2 * thread], chosen[:, :, 2 * thread + 1]], axis=1)
        else:
            chosen = chosen[:, :, thread]
        if self.table[127] == 1 and (chosen == 127).all():
            return None
        return self.table[chosen]


@opcode("mma")
def mma(i: Instruction):
    """mma.sync.aligned{.kind}.m16n8kK.row.col.dtype.atype.btype.ctype d, a, b, c{, scales}"""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", i.opcode)
    if not shape or shape.group(1, 2) != ("16", "8") or not i.has("row") or not i.has("col") or i.has("sp"):
        raise i.error("only dense m16n8kK.row.col products are supported")
    k = int(shape.group(3))
    tail = i.parts[i.parts.index("col") + 1 :]
    names = [part for part in tail if part in BITS or part in ("f32", "s32")]
    d_type, a_name, b_name, _ = names[:4]
    scaled = "block_scale" in i.parts
    if i.has("kind::mxf4", "kind::mxf4nvf4"):
        a_name = b_name = NIBBLES
    d, a, b, c, *scales = i.operands
    left, right = Fragment(i, a, a_name, a_element, 16, k), Fragment(i, b, b_name, b_element, 8, k)
    add, write = accumulate(i, d, c, d_type)

    if scaled:
        default = "scale_vec::1X" if i.has("kind::mxf8f6f4") else "scale_vec::2X"
        blocks = int(i.one_of("scale_vec::1X", "scale_vec::2X", "scale_vec::4X", default=default)[-2])
        scale_a = Scale(i, scales[0], scales[1], True, blocks, tail[-1])
        scale_b = Scale(i, scales[2], scales[3], False, blocks, tail[-1])

    def body(wave, at):
        x, y = left.matrices(wave, at), right.matrices(wave, at)
        if scaled:
            fa, fb = scale_a.factors(wave, at), scale_b.factors(wave, at)
            if fa is not None or fb is not None:
                return write(wave, at, add(wave, at, scaled_product(x, y, fa, fb, blocks)))
        return write(wave, at, add(wave, at, x @ y.swapaxes(1, 2)))

    return warp_step(i, body)


def scaled_product(x: np.ndarray, y: np.ndarray, fa, fb, blocks: int) -> np.ndarray:
    """The sum over blocks of k of (x y) times its row's and its column's factor, in float64."""
    warps = len(x)
    x = x.reshape(warps, 16, blocks, -1).swapaxes(1, 2)  # [warps, blocks, 16, k / blocks]
    y = y.reshape(warps, 8, blocks, -1).transpose(0, 2, 3, 1)
    product = (x @ y).astype(np.float64)
    if fa is not None:
        product *= fa.swapaxes(1, 2)[..., None]
    if fb is not None:
        product *= fb.swapaxes(1, 2)[:, :, None, :]
    return product.sum(axis=1)


def accumulate(i: Instruction, d: Vec, c: Vec, d_type: str):
    """How to add c to a product and put the sum into d, for f32, f16 and s32 accumulators."""
    if d_type == "f16":
        reads = [reader(i, register, B32) for register in c.items]
        writes = [writer(i, register, B32) for register in d.items]

        def add_half(wave, at, product):
            flat = product.reshape(-1, 128).astype(np.float64)
            words = [np.ascontiguousarray(np.broadcast_to(read(wave, at), at.count)) for read in reads]
            halves = [word.view(np.float16).reshape(-1, 2)[:, n] for word in words for n in range(2)]
            return [flat[:, order].reshape(-1) + half for order, half in zip(D_ORDER, halves)]

        def write_half(wave, at, sums):
            for n, write in enumerate(writes):
                pair = np.stack([s.astype(np.float16) for s in sums[2 * n : 2 * n + 2]], axis=1)
                write(wave, at, pair.view(np.uint32)[:, 0])

        return add_half, write_half

    kind = TYPES[d_type]
    reads = [reader(i, register, kind) for register in c.items]
    writes = [writer(i, register, kind) for register in d.items]

    def add(wave, at, product):
        flat = product.reshape(-1, 128)
        parts = [np.take(flat, order, axis=1).reshape(-1) for order in D_ORDER]
        if kind is F32:
            return [(part + read(wave, at)).astype(np.float32) for part, read in zip(parts, reads)]
        wrap = "satfinite" not in i.parts
        sums = [part.astype(np.int64) + read(wave, at) for part, read in zip(parts, reads)]
        return [(s if wrap else np.clip(s, -(2**31), 2**31 - 1)).astype(np.int32) for s in sums]

    def write_all(wave, at, sums):
        for write, value in zip(writes, sums):
            write(wave, at, value)

    return add, write_all
