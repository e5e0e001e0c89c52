"""Runs kernels: waves of blocks, lanes that diverge and meet again, barriers.

All threads of a wave's blocks lie side by side in numpy vectors.  Lanes with the same program counter form a *front*
and execute together; the front with the lowest program counter runs until it reaches another or branches, and fronts
that meet merge.  In code as compilers lay it out this brings diverged warps together at the first common instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from . import isa  # noqa: F401  (fills the instruction table)
from .counters import Counters, record, sanitizing, tracing
from .errors import EmulatorError, Fault
from .formats import UNSIGNED
from .isa.asynchronous import TensorMap
from .lanes import WARP, Lanes, ballot, position_of
from .memory import SHARED_START, Access, Buffer, GlobalMemory, Sanitizer, Scratch, Traffic
from .operands import Step, translate
from .parser import Instruction, Kernel, Parser, Variable
from .sanitizers import Sanitizers

LANES_PER_WAVE = 8192  # registers of 32 KB: a few fit the first cache level, a kernel's working set the second
PATIENCE = 32  # times that a front may look at memory which others change, while they wait for their turn


class Module:
    """PTX text, parsed once; its kernels can be launched any number of times.

    Raises EmulatorError (a RuntimeError) that names the line if the text cannot be read.
    """

    def __init__(self, ptx: str):
        parser = Parser(ptx)
        self.target = parser.target
        self.variables = parser.variables
        self._kernels = parser.kernels
        self._steps: dict[str, list[Step]] = {}
        self._storage: list[Buffer] = []
        self._addresses: dict[str, int] = {}
        for variable in parser.variables.values():
            if variable.space in ("global", "const"):
                data = variable.data or bytes(variable.nbytes)
                buffer = _place(variable.name, data, variable.align, variable.space == "global")
                self._addresses[variable.name] = buffer.address
                self._storage.append(buffer)

    @property
    def kernels(self) -> list[str]:
        """Names of the entry points."""
        return list(self._kernels)

    def kernel(self, name: str) -> Kernel:
        """The parsed kernel (instructions, parameters); raises EmulatorError for an unknown name."""
        if name not in self._kernels:
            raise EmulatorError(f"kernel: the module has {self.kernels}, got '{name}'")
        return self._kernels[name]

    def steps(self, name: str) -> list[Step]:
        """The kernel's instructions as closures, translated at the first call."""
        if name not in self._steps:
            kernel = self.kernel(name)
            try:
                self._steps[name] = [translate(i) for i in kernel.instructions]
            except EmulatorError as problem:
                raise EmulatorError(f"kernel '{name}', {problem}") from problem.__cause__
        return self._steps[name]

    def launch(
        self,
        kernel: str,
        grid: tuple[int, ...] | int,
        block: tuple[int, ...] | int,
        params: bytes | list,
        buffers: list[Buffer] = (),
        shared_bytes: int = 0,
        trace: bool = False,
        sanitize: bool | Sanitizer = False,
        tensor_maps: Mapping[int, TensorMap] | None = None,
    ) -> Counters:
        """Run a kernel to its end and return what it did.

        grid, block    blocks and threads as (x, y, z); shorter tuples and plain integers are filled with 1
        params         the parameter block as the driver gets it, or one number (or bytes) per parameter
        buffers        all global memory that the kernel may touch; pointers are host addresses
        shared_bytes   dynamic shared memory of a block, in bytes
        trace          also count the distinct 32-byte sectors read (see Counters); slower
        sanitize       True: stop at reads of what was never written, races and false shuffles, see sanitizers.py; or an
                       observer of one's own, see memory.Sanitizer
        tensor_maps    what the tensor maps among the parameters stand for, by their offsets in the parameter block

        Raises EmulatorError for wrong arguments, unknown instructions, accesses outside the buffers, misaligned or to
        read-only memory, barriers that cannot be passed and warps that diverge at .aligned instructions.
        """
        code = self.kernel(kernel)
        steps = self.steps(kernel)
        shape = _Shape.of(code, grid, block)
        param = _place("parameters", _pack(code, params), 128, writable=False)
        sanitizer = Sanitizers() if sanitize is True or sanitize is False and sanitizing() else sanitize or None
        launch = _Launch(self, code, steps, shape, shared_bytes, trace or tracing(), sanitizer)
        launch.memory = GlobalMemory([*buffers, *self._storage], hidden=[param])
        launch.tensor_maps = {param.address + offset: tensor for offset, tensor in (tensor_maps or {}).items()}
        launch.symbols.update({name: param.address + p.offset for name, p in code.params.items()})
        per_wave = max(1, LANES_PER_WAVE // shape.lanes)
        with np.errstate(all="ignore"):
            for first in range(0, shape.blocks, per_wave):
                Wave(launch, first, min(per_wave, shape.blocks - first)).run()
        return launch.finish()


def _place(name: str, data: bytes, align: int, writable: bool) -> Buffer:
    """Bytes in host memory at an aligned address."""
    room = np.zeros(len(data) + align, np.uint8)
    skip = -room.ctypes.data % align
    room[skip : skip + len(data)] = np.frombuffer(data, np.uint8)
    return Buffer(name, room.ctypes.data + skip, len(data), writable, room)


def _three(numbers, what: str) -> tuple[int, int, int]:
    numbers = (numbers,) if isinstance(numbers, int) else tuple(int(n) for n in numbers)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise EmulatorError(f"{what}: one to three positive numbers expected, got {numbers}")
    return (*numbers, 1, 1)[:3]


@dataclass(frozen=True)
class _Shape:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]

    @classmethod
    def of(cls, kernel: Kernel, grid, block) -> _Shape:
        shape = cls(_three(grid, "grid"), _three(block, "block"))
        limit = kernel.block_limit() or 1024
        if shape.threads > limit:
            raise EmulatorError(f"block: kernel '{kernel.name}' takes at most {limit} threads, got {shape.threads}")
        return shape

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def lanes(self) -> int:
        return -(-self.threads // WARP) * WARP

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def _pack(kernel: Kernel, params: bytes | list) -> bytes:
    if isinstance(params, (bytes, bytearray, memoryview)):
        if len(params) < kernel.param_bytes:
            raise EmulatorError(f"params: kernel '{kernel.name}' takes {kernel.param_bytes} bytes, got {len(params)}")
        return bytes(params)
    if len(params) != len(kernel.params):
        raise EmulatorError(f"params: kernel '{kernel.name}' takes {len(kernel.params)} values, got {len(params)}")
    packed = bytearray(kernel.param_bytes)
    for value, param in zip(params, kernel.params.values()):
        if isinstance(value, (bytes, bytearray)):
            data = bytes(value)
        elif param.type.kind == "f" or isinstance(value, float):
            data = struct.pack({2: "<e", 4: "<f", 8: "<d"}[param.nbytes], value)
        else:
            data = (int(value) & ((1 << 8 * param.nbytes) - 1)).to_bytes(param.nbytes, "little")
        if len(data) != param.nbytes:
            raise EmulatorError(f"params: '{param.name}' has {param.nbytes} bytes, got {len(data)}")
        packed[param.offset : param.offset + param.nbytes] = data
    return bytes(packed)


class _Launch:
    """What all waves of a launch share."""

    def __init__(self, module: Module, kernel: Kernel, steps, shape: _Shape, shared_bytes: int, trace: bool, sanitizer):
        self.kernel, self.steps, self.shape = kernel, steps, shape
        self.memory: GlobalMemory
        self.tensor_maps: dict[int, TensorMap] = {}
        self.issued, self.threads = [0] * (len(steps) + 1), [0] * (len(steps) + 1)
        self.symbols = dict(module._addresses)
        self.counters = Counters(blocks=shape.blocks)
        self.traffic = Traffic(self.counters) if trace else None
        self.sanitizer = sanitizer
        self.observers = [observer for observer in (self.traffic, sanitizer) if observer is not None]
        variables = {**module.variables, **kernel.variables}
        self.shared_bytes = self._layout(variables, "shared", SHARED_START) - SHARED_START + shared_bytes
        self.dynamic_bytes = shared_bytes
        self.local_bytes = self._layout(variables, "local", 0)

    def _layout(self, variables: dict[str, Variable], space: str, end: int) -> int:
        """Give the space's variables their addresses, unsized ones last; returns the end."""
        mine = [v for v in variables.values() if v.space == space and v.name in self.kernel.names]
        for variable in sorted(mine, key=lambda v: v.nbytes == 0):
            align = max(variable.align, 16 if variable.nbytes else 128)
            end = -(-end // align) * align
            self.symbols[variable.name] = end
            end += variable.nbytes
        return end

    def finish(self) -> Counters:
        counters = self.counters
        for i, issued, threads in zip(self.kernel.instructions, self.issued, self.threads):
            if issued:
                counters.instructions[i.opcode] += issued
                counters.threads[i.opcode] += threads
        counters.bytes_read.update(self.memory.read)
        counters.bytes_written.update(self.memory.written)
        record(counters)
        return counters


@dataclass
class _Waiting:
    """Lanes parked at a barrier.  ``done(lanes)`` runs when they leave; ``pc`` is where they go on."""

    lanes: np.ndarray
    pc: int
    need: np.ndarray | None  # [lanes] thread counts, None: all that have not exited
    values: np.ndarray | None = None
    done: object = None


@dataclass
class _Barriers:
    """Named barriers of the wave's blocks: who waits, and how many threads have arrived without waiting."""

    waiting: dict[int, list[_Waiting]] = field(default_factory=dict)
    arrived: dict[int, np.ndarray] = field(default_factory=dict)


class Wave:
    """Some blocks of a launch, running.  Instructions see the machine through this object.

    size, blocks            lanes and blocks of this wave
    pc                      the instruction at work
    registers[number]       [size] bits of a register, or None; arrays in here are never changed, only replaced
    lane, block_of          [size] lane in its warp, block in this wave
    memory, shared, local   the memory spaces
    """

    def __init__(self, launch: _Launch, first_block: int, blocks: int):
        self.launch, self.kernel, self.code = launch, launch.kernel, launch.steps
        shape = launch.shape
        self.first_block, self.blocks, self.size = first_block, blocks, blocks * shape.lanes
        self.registers: list[np.ndarray | None] = [None] * launch.kernel.registers
        self.issued, self.threads = launch.issued, launch.threads
        self.memory = launch.memory
        self.sanitizer = launch.sanitizer
        number = np.arange(self.size)
        self.lane = (number % WARP).astype(np.uint32)
        self.block_of = number // shape.lanes
        self.thread = number % shape.lanes
        self.shared = Scratch("shared", blocks, launch.shared_bytes, self.block_of, SHARED_START)
        self.local = Scratch("local", self.size if launch.local_bytes else 1, launch.local_bytes, number)
        self.alive = self.thread < shape.threads
        self.fronts: dict[int, Lanes] = {}
        self.stalled: dict[int, Lanes] = {}
        self.resting: dict[int, Lanes] = {}
        self.pc = 0
        self.looks = 0  # at memory that others may change, since the last turn of a waiting front
        self.barriers = _Barriers()
        self.state: dict = {}  # for special registers, and for instructions that keep something per wave

    # --- the schedule ---

    def run(self) -> None:
        """Run all blocks of the wave to their end."""
        self.arrive(0, Lanes(np.flatnonzero(self.alive), self.size))
        while self.fronts or self._wake_or_fail():
            pc = min(self.fronts)
            if self.looks > PATIENCE:  # the lowest front spins
                pc, self.looks = max(self.fronts), 0
            self._run_front(pc, self.fronts.pop(pc))
        if self.launch.traffic is not None:
            self.launch.traffic.finish()

    def _run_front(self, pc: int, lanes: Lanes) -> None:
        """Run lanes from ``pc`` until they part or come to where others are."""
        code, issued, threads = self.code, self.issued, self.threads
        meeting = min((other for other in (*self.fronts, *self.stalled) if other > pc), default=len(code))
        try:
            while pc < meeting:
                self.pc = pc
                issued[pc] += lanes.warps
                threads[pc] += lanes.count
                out = code[pc](self, lanes)
                if out is None:
                    pc += 1
                elif type(out) is int:
                    pc = out
                    if self.fronts or self.stalled:
                        break  # others may be there, or it may be their turn
                else:
                    for target, part in out:
                        self.arrive(target, part)
                    return
        except Fault as fault:
            raise self.error(pc, fault) from None
        if pc >= len(code):
            self.leave(lanes)  # fell off the end of the kernel
        else:
            self.arrive(pc, lanes)

    def arrive(self, pc: int, lanes: Lanes) -> None:
        """Put lanes at a program counter, with those already there."""
        for there in (self.stalled.pop(pc, None), self.fronts.pop(pc, None)):
            if there is not None:
                lanes = there | lanes
        self.fronts[pc] = lanes

    def leave(self, lanes: Lanes) -> None:
        """Lanes exit.  Those who waited for them look again."""
        self.alive[lanes.index] = False
        self.wake()
        for number in list(self.barriers.waiting):
            for pc, part in self._release(number):
                self.arrive(pc, part)

    def wake(self) -> None:
        """Something changed: let stalled lanes try again."""
        stalled, self.stalled = self.stalled, {}
        for pc, lanes in stalled.items():
            self.arrive(pc, lanes)

    def stall(self, pc: int, lanes: Lanes) -> None:
        """Lanes try the instruction at ``pc`` again when something changes; it counts when it is done."""
        self.issued[pc] -= lanes.warps
        self.threads[pc] -= lanes.count
        there = self.stalled.pop(pc, None)
        self.stalled[pc] = lanes if there is None else there | lanes

    def rest(self, pc: int, lanes: Lanes) -> None:
        """Lanes go on at ``pc`` once nobody else can run."""
        there = self.resting.pop(pc, None)
        self.resting[pc] = lanes if there is None else there | lanes

    def _wake_or_fail(self) -> bool:
        """Nobody can run: those who rest go on, or the wave is done, or it is a deadlock."""
        if self.resting:
            resting, self.resting = self.resting, {}
            for pc, lanes in resting.items():
                self.arrive(pc, lanes)
            return True
        apart = [(pc, lanes.numbers) for pc, lanes in self.stalled.items()]
        waiting = apart + [(w.pc - 1, w.lanes) for group in self.barriers.waiting.values() for w in group]
        if not waiting:
            return False
        lines = [self.kernel.instructions[pc].line for pc, _ in waiting]
        where = "; ".join(f"{len(lanes)} threads at PTX line {line}" for line, (_, lanes) in zip(lines, waiting))
        what = "a barrier can never be passed"
        if apart:
            waits = {self.kernel.instructions[pc].parts[0] for pc, _ in apart}
            what = "a phase is never over" if waits == {"mbarrier"} else "a warp that diverged never comes together"
        pc, lanes = waiting[0]
        raise self.error(pc, Fault(f"deadlock: {what}; waiting are {where}", int(lanes[0])))

    # --- warps ---

    def together(self, i: Instruction, lanes: Lanes, members: np.ndarray | None) -> np.ndarray:
        """[lanes.count] bool: has all of the lane's warp that it must wait for come?"""
        present = lanes.present[lanes.warp]
        alive = ballot(self.alive)[lanes.warp]
        if members is None:
            lacking = (present == alive) & (alive != 0xFFFFFFFF)
            if lacking.any():
                at = int(np.argmax(lacking))
                raise Fault(
                    f"'{i.opcode}' needs all 32 lanes of a warp; lanes {alive[at]:#010x} are left",
                    int(lanes.numbers[at]),
                )
            return present == 0xFFFFFFFF
        need = members & alive
        return (present & need) == need

    def spread(self, value: np.ndarray, lanes: Lanes) -> np.ndarray:
        """[lanes.count] -> [size], zero elsewhere."""
        if lanes.full and value.ndim:
            return value
        full = np.zeros(self.size, value.dtype)
        full[lanes.index] = value
        return full

    # --- barriers ---

    def barrier(self, number: int, lanes: Lanes, pc: int, need=None, park=True, values=None, done=None):
        """Lanes arrive at barrier ``number`` of their blocks; returns the fronts that may go on.

        need     threads that the barrier takes (a number per lane or for all); None: all that have not exited
        park     wait there (bar.sync), or go on (bar.arrive)
        values   [lanes.count] bool to be reduced (bar.red): ``done(wave, lanes, values of all, blocks)`` gets them
        """
        need = None if need is None else np.broadcast_to(need, lanes.count)
        if self.sanitizer is not None:
            self.sanitizer.release(self, ("bar", number), lanes)
        if park:
            group = _Waiting(lanes.numbers, pc, need, values, done)
            self.barriers.waiting.setdefault(number, []).append(group)
            return self._release(number)
        arrived = self.barriers.arrived.setdefault(number, np.zeros(self.blocks, np.int64))
        arrived += np.bincount(self.block_of[lanes.index], minlength=self.blocks)
        return [*self._release(number), (pc, lanes)]

    def _release(self, number: int) -> list[tuple[int, Lanes]]:
        groups = self.barriers.waiting.get(number, [])
        if not groups:
            return []
        arrived = self.barriers.arrived.get(number, np.zeros(self.blocks, np.int64)).copy()
        need = np.bincount(self.block_of[self.alive], minlength=self.blocks)
        for group in groups:
            blocks = self.block_of[group.lanes]
            arrived += np.bincount(blocks, minlength=self.blocks)
            if group.need is not None:
                need[blocks] = group.need
        complete = (arrived >= need) & (arrived > 0)
        if not complete.any():
            return []
        if self.sanitizer is not None:
            self.sanitizer.complete(self, ("bar", number), complete)
        out, staying = [], []
        if groups[0].values is not None:
            lanes = np.concatenate([group.lanes for group in groups])
            values = np.concatenate([group.values for group in groups])
        for group in groups:
            leaves = complete[self.block_of[group.lanes]]
            if leaves.any():
                part = Lanes(group.lanes[leaves], self.size)
                if self.sanitizer is not None:
                    self.sanitizer.acquire(self, ("bar", number), part)
                if group.done is not None:
                    group.done(self, part, values, self.block_of[lanes])
                out.append((group.pc, part))
            if not leaves.all():
                rest = ~leaves
                staying.append(
                    _Waiting(
                        group.lanes[rest],
                        group.pc,
                        None if group.need is None else group.need[rest],
                        None if group.values is None else group.values[rest],
                        group.done,
                    )
                )
        if staying:
            self.barriers.waiting[number] = staying
        else:
            del self.barriers.waiting[number]
        if number in self.barriers.arrived:
            self.barriers.arrived[number][complete] = 0
        return out

    # --- services for instructions ---

    def never_written(self, number: int, bits: int) -> np.ndarray:
        """A register that nobody has written: zero."""
        value = self.registers[number] = np.zeros(self.size, UNSIGNED[bits])
        return value

    def symbol(self, i: Instruction, name: str) -> int:
        """The address of a variable or parameter in its own space."""
        address = self.launch.symbols.get(name)
        if address is None:
            raise Fault(f"unknown name '{name}'")
        return address

    def observe(self, kind: str, space: str, lanes: Lanes, addresses: np.ndarray, nbytes: int, parts: list) -> None:
        if self.launch.observers:
            access = Access(kind, space, lanes, addresses, nbytes, parts)
            for observer in self.launch.observers:
                observer.access(self, access)

    def position(self, lane: int) -> str:
        """block (x, y, z), thread (x, y, z) of a lane."""
        block = self.block_position(self.first_block + int(self.block_of[lane]))
        return f"block {block}, thread {position_of(int(self.thread[lane]), self.launch.shape.block)}"

    def block_position(self, number: int) -> tuple[int, int, int]:
        """(x, y, z) of a block of the launch."""
        return position_of(number, self.launch.shape.grid)

    def error(self, pc: int, fault: Fault) -> EmulatorError:
        i = self.kernel.instructions[pc]
        who = "" if fault.lane is None else f"{self.position(fault.lane)}: "
        return EmulatorError(f"kernel '{self.kernel.name}', PTX line {i.line}: {who}{fault}\n    {i.text}")
