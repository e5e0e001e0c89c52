"""mma.sync: tensor-core products of 16xK by Kx8 matrices, plain and block-scaled.

Three functions say which element of a matrix sits where in a warp's registers (PTX ISA, "Matrix fragments for
mma"); with group g = lane / 4, thread t = lane % 4, and e elements to a 32-bit register:

    a   row g + 8 (r % 2), k = e t + j + 4 e (r / 2)
    b   column g,          k = e t + j + 4 e r
    d   row g + 8 (r / 2), column 2 t + r % 2          (r counts single elements)

Everything else is one loop for all kinds: registers -> elements -> float32 matrices -> matmul -> registers.
Products of elements of at most 8 bits are exact in float32; the sum is float32.
"""

from __future__ import annotations

import re

import numpy as np

from ..formats import DECODE, TYPES, bf16_to_f32
from ..operands import opcode, reader, warp_step, writer
from ..parser import Instruction, Vec

B32, F32 = TYPES["b32"], TYPES["f32"]
BITS = {"e4m3": 8, "e5m2": 8, "e3m2": 8, "e2m3": 8, "e2m1": 8, "f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}


def a_element(lane: int, register: int, element: int, per: int) -> tuple[int, int]:
    """(row, k)"""
    return lane // 4 + 8 * (register % 2), per * (lane % 4) + element + 4 * per * (register // 2)


def b_element(lane: int, register: int, element: int, per: int) -> tuple[int, int]:
    """(k, column)"""
    return per * (lane % 4) + element + 4 * per * register, lane // 4


def d_element(lane: int, element: int) -> tuple[int, int]:
    """(row, column)"""
    return lane // 4 + 8 * (element // 2), 2 * (lane % 4) + element % 2


def gather_order(where, registers: int, per: int, columns: int) -> np.ndarray:
    """Positions in a warp's elements [32 lanes, registers, per] in the order of the matrix's rows."""
    order = np.empty(32 * registers * per, np.intp)
    for lane in range(32):
        for register in range(registers):
            for element in range(per):
                row, column = where(lane, register, element, per)
                order[row * columns + column] = (lane * registers + register) * per + element
    return order


# [4 elements, 32 lanes] positions in a 16x8 matrix
D_ORDER = np.array(
    [[d_element(lane, n)[0] * 8 + d_element(lane, n)[1] for lane in range(32)] for n in range(4)], np.intp
)


# --- elements of a register ------------------------------------------------------------------------------------------


def decode_nibbles(words: np.ndarray) -> np.ndarray:
    octets = words.view(np.uint8)
    return _TWO_E2M1[octets].reshape(*octets.shape[:-1], -1)


_TWO_E2M1 = np.stack([DECODE["e2m1"][np.arange(256) & 15], DECODE["e2m1"][np.arange(256) >> 4]], axis=1)
_PADDED_E2M1 = DECODE["e2m1"][np.arange(256) >> 2 & 15]  # in 8-bit containers the four bits lie in the middle

_DECODERS = {
    "f16": lambda words: words.view(np.float16).astype(np.float32),
    "bf16": lambda words: bf16_to_f32(words.view(np.uint16)),
    "tf32": lambda words: (words & np.uint32(0xFFFFE000)).view(np.float32),
    "s8": lambda words: words.view(np.int8).astype(np.float64),
    "u8": lambda words: words.view(np.uint8).astype(np.float64),
    "nibbles": decode_nibbles,
}


def decoder(name: str):
    """[..., registers] uint32 -> [..., elements] float32"""
    if name in _DECODERS:
        return _DECODERS[name]
    table = _PADDED_E2M1 if name == "e2m1" else DECODE[name]
    return lambda words: table[words.view(np.uint8)]


class Fragment:
    """Reads one of the operands a, b as matrices, and keeps them while their registers stay the same."""

    def __init__(self, i: Instruction, vector: Vec, name: str, per: int, layout, rows: int, columns: int):
        self.reads = [reader(i, register, B32) for register in vector.items]
        self.numbers = tuple(getattr(register, "number", None) for register in vector.items)
        self.decode, self.shape = decoder(name), (rows, columns)
        self.key = (self.numbers, name, layout)
        self.order = gather_order(layout, len(self.reads), per, columns)

    def matrices(self, wave, at) -> np.ndarray:
        """[warps, rows, columns] float32"""
        if None in self.numbers:
            return self._assemble(wave, at)
        # Stored registers are never changed, only replaced: the same arrays mean the same fragment.
        now = tuple(wave.registers[number] for number in self.numbers)
        cache = wave.state.setdefault("fragments", {})
        known = cache.get(self.key)
        if known is not None and known[0] is at and all(old is new for old, new in zip(known[1], now)):
            return known[2]
        matrices = self._assemble(wave, at)
        cache[self.key] = (at, now, matrices)
        return matrices

    def _assemble(self, wave, at) -> np.ndarray:
        words = np.stack([np.broadcast_to(read(wave, at), at.count) for read in self.reads], axis=1)
        elements = self.decode(words).reshape(at.count // 32, -1)
        return np.take(elements, self.order, axis=1).reshape(-1, *self.shape)


class Scale:
    """The scale factors of one operand: {data}, {byte selector, thread selector}.

    Lane t = selector (a: t = 2 * selector for row g, t + 1 for row g + 8) of each group holds the bytes of that row or
    column in its register, from the byte selector on, one for each of ``blocks`` chunks of k.
    """

    def __init__(self, i: Instruction, data, selectors, is_a: bool, blocks: int, table: np.ndarray):
        self.read, self.blocks, self.is_a = reader(i, data, B32), blocks, is_a
        self.byte, self.thread = (reader(i, item, TYPES["u16"]) for item in selectors.items)
        self.table = table.astype(np.float64)
        self.instruction = i

    def factors(self, wave, at) -> np.ndarray | None:
        """[warps, rows or columns, blocks] float64; None if all are 1."""
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
    d_type, a_name, b_name, c_type = names[:4]
    scaled = "block_scale" in i.parts
    nibbles = i.has("kind::mxf4", "kind::mxf4nvf4")
    if nibbles:
        a_name = b_name = "nibbles"
    per = 32 // (4 if nibbles else BITS[a_name])
    d, a, b, c, *scales = i.operands
    left = Fragment(i, a, a_name, per, a_element, 16, k)
    right = Fragment(i, b, b_name, per, b_element, k, 8)
    if len(a.items) * per * 2 != k or len(b.items) * per * 4 != k:
        raise i.error(f"fragments of {len(a.items)} and {len(b.items)} registers do not fit k = {k}")
    add, write = accumulate(i, d, c, d_type)

    if scaled:
        default = "scale_vec::1X" if i.has("kind::mxf8f6f4") else "scale_vec::2X"
        blocks = int(i.one_of("scale_vec::1X", "scale_vec::2X", "scale_vec::4X", default=default)[-2])
        table = DECODE[tail[-1]]
        scale_a = Scale(i, scales[0], scales[1], True, blocks, table)
        scale_b = Scale(i, scales[2], scales[3], False, blocks, table)

    def body(wave, at):
        x, y = left.matrices(wave, at), right.matrices(wave, at)
        if scaled:
            fa, fb = scale_a.factors(wave, at), scale_b.factors(wave, at)
            if fa is not None or fb is not None:
                return write(wave, at, add(wave, at, scaled_product(x, y, fa, fb, blocks)))
        return write(wave, at, add(wave, at, x @ y))

    return warp_step(i, body)


def scaled_product(x: np.ndarray, y: np.ndarray, fa, fb, blocks: int) -> np.ndarray:
    """The sum over blocks of k of (x y) times its row's and its column's factor, in float64."""
    warps, _, k = x.shape
    x = x.reshape(warps, 16, blocks, -1).swapaxes(1, 2)  # [warps, blocks, 16, k / blocks]
    y = y.reshape(warps, blocks, k // blocks, 8)
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
