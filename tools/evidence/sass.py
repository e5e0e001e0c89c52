"""Reads SASS: a cubin's instructions with their control words, its loops, and what one turn of a loop costs.

    function = disassemble(cubin)["kernel"]
    loop = function.loops()[0]          innermost first
    loop.turn                           the instructions of one turn

The disassembler is NVIDIA's (`nvidia-cuda-nvdisasm`, `nvidia-cuda-cuobjdump` on PyPI).  The control word lies in bits
105..125 of each 128-bit instruction, as published by many since Volta: stall count 4 bits, yield 1, write barrier 3,
read barrier 3, mask of barriers to wait for 6.
"""

from __future__ import annotations

import functools
import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from cuda.pathfinder import find_nvidia_binary_utility

# Opcode -> class.  Longest prefix wins; what is not here is "other" and counts as an instruction only.
CLASSES = {
    "mma": "QMMA OMMA HMMA IMMA DMMA",
    "fp32": "FADD FMUL FFMA",
    "imad": "IMAD",
    "alu": "IADD VIADD LOP3 LEA SHF ISETP FSETP FSEL FMNMX IMNMX VIMNMX VIADDMNMX FCHK SEL PRMT MOV PLOP3 SGXT BMSK"
    " IABS P2R R2P F2FP I2FP CS2R VOTE VHMNMX HADD HMUL HFMA HMNMX",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "uniform": "U R2UR S2UR S2R LDCU REDUX CREDUX",
    "shuffle": "SHFL",
    "ldsm": "LDSM",
    "shared": "LDS STS STSM ATOMS",
    "global": "LDG STG LD ST RED ATOM ATOMG LDGSTS",
    "local": "LDL STL",
    "const": "LDC",
    "tma": "UTMA UBLKCP",
    "sync": "BAR B2R SYNCS UCGABAR MEMBAR FENCE ERRBAR DEPBAR LDGDEPBAR CCTL ACQBULK ELECT",
    "control": "WARPSYNC BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK NOP NANOSLEEP YIELD USETMAXREG",
}
_PREFIXES = {prefix: kind for kind, names in CLASSES.items() for prefix in names.split()}

# nvdisasm -hex: address, instruction, low half; on the next line the high half.
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TEXT = re.compile(r"^\.text\.(\S+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@(!?U?P\w+)\s+")


@functools.cache
def _kind(name: str) -> str:
    prefixes = [prefix for prefix in _PREFIXES if name.startswith(prefix)]
    return _PREFIXES[max(prefixes, key=len)] if prefixes else "other"


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "!P0", or "" where it always executes
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str
    stall: int  # clocks until this warp may issue the next instruction
    writes: int | None  # barrier that is free when the result is written
    reads: int | None  # barrier that is free when the operands are read
    waits: tuple[int, ...]  # barriers that must be free before this instruction issues
    target: int | None = None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def kind(self) -> str:
        return _kind(self.name)

    @property
    def bits(self) -> int:
        """Bits that each lane moves, for loads and stores."""
        widths = [re.fullmatch(r"[US]?(8|16|64|128|256)", word) for word in self.modifiers]
        return next((int(width[1]) for width in widths if width), 32)

    @property
    def macs(self) -> int:
        """Multiply-adds of an MMA, from the shape in its name: 16832 is 16 x 8 x 32."""
        for word in self.modifiers:
            if shape := re.fullmatch(r"(16)(8)(\d+)", word):
                m, n, k = map(int, shape.groups())
                return m * n * k
        return 0

    @property
    def wavefronts(self) -> int:
        """128-byte passes over the shared-memory crossbar by a warp, without bank conflicts. A shuffle crosses it once;
        a load or store at least once (lanes may share words), so for these it is a lower bound."""
        return int(self.modifiers[-1]) if self.kind == "ldsm" else int(self.kind in ("shared", "shuffle"))

    @property
    def bytes(self) -> int:
        """Bytes that a full warp moves from or to global memory."""
        return 32 * self.bits // 8 if self.kind == "global" else 0

    def leaves(self) -> bool:
        return self.name in ("EXIT", "RET", "BRX", "JMX")

    def falls_through(self) -> bool:
        conditional = self.guard or re.match(r"!?U?P\d", self.operands)
        return bool(conditional) or not (self.leaves() or self.name in ("BRA", "JMP"))


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Loop:
    addresses: frozenset[int]
    turn: tuple[Instruction, ...]

    @property
    def macs(self) -> int:
        return sum(instruction.macs for instruction in self.turn)


@dataclass(frozen=True)
class Function:
    name: str
    instructions: tuple[Instruction, ...]
    resources: Resources

    @cached_property
    def blocks(self) -> dict[int, tuple[Instruction, ...]]:
        """Basic blocks by the address of their first instruction."""
        leaders = {self.instructions[0].address} | {i.target for i in self.instructions if i.target is not None}
        ends = [i for i in self.instructions if i.target is not None or i.leaves()]
        leaders |= {end.address + 16 for end in ends}
        blocks, current = {}, []
        for instruction in self.instructions:
            if instruction.address in leaders and current:
                blocks[current[0].address] = tuple(current)
                current = []
            current.append(instruction)
        return blocks | {current[0].address: tuple(current)}

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        edges = {}
        for start, block in self.blocks.items():
            last = block[-1]
            ways = [] if last.target is None else [last.target]
            if last.falls_through():
                ways.append(last.address + 16)
            edges[start] = [way for way in dict.fromkeys(ways) if way in self.blocks]
        return edges

    def loops(self) -> list[Loop]:
        """Natural loops, innermost (smallest) first."""
        predecessors: dict[int, list[int]] = {block: [] for block in self.blocks}
        for block, ways in self.successors.items():
            for way in ways:
                predecessors[way].append(block)
        bodies: dict[int, set[int]] = {}
        for tail, ways in self.successors.items():
            for head in ways:
                if head in self._dominators.get(tail, ()):
                    body = bodies.setdefault(head, {head})
                    stack = [tail]
                    while stack:
                        if (block := stack.pop()) not in body:
                            body.add(block)
                            stack += predecessors[block]
        loops = [Loop(self._addresses(body), self._turn(head, body)) for head, body in bodies.items()]
        return sorted(loops, key=lambda loop: len(loop.addresses))

    def mma_loop(self) -> Loop | None:
        """The innermost loop with the most multiply-adds in a turn."""
        loops = [loop for loop in self.loops() if loop.macs]
        inner = [a for a in loops if not any(b.addresses < a.addresses for b in loops)]
        return max(inner, key=lambda loop: loop.macs, default=None)

    def first_mma(self) -> list[Instruction]:
        """The shortest way from the entry to an MMA, its last instruction, by way of the first load from global memory:
        a loop over lengths may hold that, and is not passed by. Empty if there is none."""
        entry = self.instructions[0].address
        loads = [block for block, instructions in self.blocks.items() if any(i.name == "LDG" for i in instructions)]
        start = self._way(entry, lambda block: block in (loads[:1] or [entry]))
        rest = self._way(start[-1], lambda block: any(i.macs for i in self.blocks[block])) if start else []
        path = [i for block in [*start, *rest[1:]] for i in self.blocks[block]]
        return path[: next(n for n, i in enumerate(path) if i.macs) + 1] if rest else []

    def _way(self, start: int, goal: Callable[[int], bool]) -> list[int]:
        """Blocks on the way of fewest instructions from `start` to one that is the goal; empty if there is none."""
        queue, seen = [(0, start, ())], set()
        while queue:
            length, block, way = heapq.heappop(queue)
            if block in seen:
                continue
            seen.add(block)
            way = (*way, block)
            if goal(block):
                return list(way)
            for after in self.successors[block]:
                heapq.heappush(queue, (length + len(self.blocks[block]), after, way))
        return []

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        order, seen, stack = [], set(), [(self.instructions[0].address, False)]
        while stack:  # reverse postorder, without recursion
            block, done = stack.pop()
            if done:
                order.append(block)
            elif block not in seen:
                seen.add(block)
                stack += [(block, True), *((way, False) for way in self.successors[block])]
        order.reverse()
        before = {block: [b for b in order if block in self.successors[b]] for block in order}
        dominators = {block: set(order) for block in order}
        dominators[order[0]] = {order[0]}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                new = {block} | set.intersection(*(dominators[b] for b in before[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    def _addresses(self, body: Iterable[int]) -> frozenset[int]:
        return frozenset(i.address for block in body for i in self.blocks[block])

    def _turn(self, head: int, body: set[int]) -> tuple[Instruction, ...]:
        """The way from a loop's head back to it that does the most: most multiply-adds, among those most bytes loaded,
        among those fewest instructions, every inner loop once. Where TMA brings the keys, what the loop loads is
        bookkeeping that few turns need, and does not count: such a kernel is shown from its best side."""
        best: dict[int, tuple] = {}
        by_tma = any(i.name == "UTMALDG" for i in self.instructions)

        def cost(block: int, after: tuple) -> tuple:
            instructions = self.blocks[block]
            macs = sum(i.macs for i in instructions)
            loaded = 0 if by_tma else sum(i.bytes for i in instructions if i.name == "LDG")
            return after[0] + macs, after[1] + loaded, after[2] - len(instructions), (block, *after[3])

        def walk(block: int) -> tuple | None:
            if block not in best:
                ways = self.successors[block]
                found = [(0, 0, 0, ())] if head in ways else []
                for way in ways:
                    backward = way in self._dominators[block]
                    if way in body and not backward and (after := walk(way)) is not None:
                        found.append(after)
                best[block] = max((cost(block, after) for after in found), default=None, key=lambda c: c[:3])
            return best[block]

        return tuple(i for block in walk(head)[3] for i in self.blocks[block])


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.kind for instruction in instructions)


def turn_latency(turn: tuple[Instruction, ...], latency: dict[str, int]) -> tuple[int, int]:
    """Clocks of one turn for a warp alone on its sub-partition: (sum of the stall counts, the same with the waits).
    Each instruction issues when the one before has stalled its count and the barriers that it waits for are free;
    a barrier is free `latency[kind]` clocks after the instruction that set it for its result, `latency["read"]` after
    the one that set it for its operands. Turns follow each other until the waits repeat."""
    stalls = sum(max(1, i.stall) for i in turn)
    free = [0] * 6
    clock, starts = 0, []
    for _ in range(6):
        starts.append(clock)
        for instruction in turn:
            clock = max([clock, *(free[b] for b in instruction.waits)])
            for barrier, name in ((instruction.writes, instruction.kind), (instruction.reads, "read")):
                if barrier is not None:
                    free[barrier] = max(free[barrier], clock + latency.get(name, latency["other"]))
            clock += max(1, instruction.stall)
    return stalls, starts[-1] - starts[-2]


def awaited_loads(path: Iterable[Instruction]) -> list[Instruction]:
    """Loads from global memory that a warp waits for one after the other: the first whose arrival a later instruction
    of the path waits for, the first issued after that and waited for, and so on. Their number is the round trips.

    A guarded load into a register that an earlier load of the path has filled is for the case that the earlier one was
    of no use (a wrong guess): on this way it is not executed."""
    chain: list[Instruction] = []
    filled: set[str] = set()
    pending: dict[int, tuple[int, Instruction]] = {}  # barrier -> round trips before its first load, the load
    for instruction in path:
        for barrier in instruction.waits:
            before, load = pending.pop(barrier, (-1, None))
            if before == len(chain):
                chain.append(load)
        if instruction.name == "LDG" and instruction.writes is not None:
            register = instruction.operands.split(",")[0]
            if instruction.guard and register in filled:
                continue
            filled.add(register)
            # The barrier is free when its last load is there: a later load behind the same barrier counts.
            pending[instruction.writes] = len(chain), instruction
    return chain


def disassemble(cubin: bytes) -> dict[str, Function]:
    """Every kernel of a cubin, by its (mangled) name."""
    used, listing = resources(cubin), _run(cubin, "nvdisasm", "-hex", "-c")
    return {name: Function(name, parsed, used[name]) for name, parsed in parse(listing).items()}


def resources(cubin: bytes) -> dict[str, Resources]:
    """What every kernel of a cubin takes. Registers that are spilled lie on the stack."""
    found = re.findall(r"Function (\S+):\s+(.*)", _run(cubin, "cuobjdump", "--dump-resource-usage"))
    fields = {name: dict(re.findall(r"(\w+):(\d+)", line)) for name, line in found}
    return {name: Resources(int(f["REG"]), int(f["STACK"]), int(f["SHARED"])) for name, f in fields.items()}


def parse(listing: str) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each text section in a listing of `nvdisasm -hex -c`."""
    raw: dict[str, list[tuple[int, str, int]]] = {}
    labels: dict[str, int] = {}
    pending: list[str] = []
    lines = iter(listing.splitlines())
    for line in lines:
        if match := _TEXT.match(line):
            section = raw.setdefault(match[1], [])
        elif match := _LABEL.match(line):
            pending.append(match[1])
        elif match := _LINE.search(line):
            high = _HIGH.match(next(lines))
            if not high:
                raise RuntimeError(f"nvdisasm: the encoding's second half is missing after {line!r}")
            address = int(match[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending = []
            section.append((address, match[2], int(high[1], 16) << 64 | int(match[3], 16)))
    return {name: tuple(_instruction(*entry, labels) for entry in entries) for name, entries in raw.items()}


def _instruction(address: int, text: str, encoding: int, labels: dict[str, int]) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, operands = text[guard.end() if guard else 0 :].partition(" ")
    control = encoding >> 105
    written, read, mask = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    target = None
    if opcode.split(".")[0] in ("BRA", "JMP") and (label := _TARGET.search(operands)):
        target = labels[label[1]]
    return Instruction(
        address,
        guard[1] if guard else "",
        opcode,
        operands.strip(),
        stall=control & 15,
        writes=written if written < 6 else None,
        reads=read if read < 6 else None,
        waits=tuple(b for b in range(6) if mask >> b & 1),
        target=target,
    )


def _run(cubin: bytes, tool: str, *options: str) -> str:
    path = find_nvidia_binary_utility(tool)
    if path is None:
        raise RuntimeError(f"{tool}: not found; `pip install nvidia-cuda-{tool}`")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout
