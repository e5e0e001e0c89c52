"""Finds what happens to work: reads of what nobody wrote, races between warps, shuffles from lanes that are not there.

Written or not is kept for every register and every byte of shared and local memory, and of buffers that are declared
`unwritten`.  Races are found by vector clocks (FastTrack, Flanagan and Freund, PLDI 2009): each warp counts its
releases and knows of every other warp of its block how far it has come at least.  Arriving at a barrier or mbarrier
releases, leaving it acquires.  Two accesses to a byte, one of them a write (two atomics are none), are a race unless
the later warp knows of the earlier one's.  Warps of different blocks never know of each other.  Bulk copies run in a
further warp of the block, which starts from what its issuer knows and releases to the copy's mbarrier: who reads what
was copied must have waited there, even the issuer.

Of a byte the last write, the last atomic and the last reads of two warps are remembered; what lanes of one warp do to
each other is not looked at.  The first finding stops the kernel.
"""

from __future__ import annotations

import numpy as np

from .errors import Fault
from .lanes import WARP, Lanes
from .memory import Access, Region, first_lane, rounds


class Sanitizers:
    """All detectors, for one launch.  See memory.Sanitizer for who calls what."""

    def __init__(self) -> None:
        self.bytes: dict[str, np.ndarray] = {}  # of global memory, by buffer: [bytes] bool, written or not
        self.races: dict[str, Races] = {}

    def wave(self, wave) -> _Wave:
        """What is kept for the blocks of a wave."""
        kept = wave.state.get("sanitizers")
        if kept is None:
            kept = wave.state["sanitizers"] = _Wave(wave)
        return kept

    # --- registers ---

    def register_read(self, wave, instruction, register, lanes: Lanes) -> None:
        written = self.wave(wave).registers.get(register.number)
        if written is None or not (lanes.full and written.all() or written[lanes.index].all()):
            missing = np.ones(lanes.count, bool) if written is None else ~written[lanes.index]
            raise Fault(f"register {register.name} is read and was never written", first_lane(lanes, missing))

    def register_write(self, wave, instruction, register, lanes: Lanes) -> None:
        registers = self.wave(wave).registers
        if register.number not in registers:
            registers[register.number] = np.zeros(wave.size, bool)
        registers[register.number][lanes.index] = True

    # --- shuffles ---

    def shuffle(self, wave, instruction, lanes: Lanes, sources: np.ndarray) -> None:
        missing = ~lanes.mask[sources]
        if missing.any():
            at = int(np.argmax(missing))
            lane = int(sources[at]) % WARP
            raise Fault(
                f"'{instruction.opcode}' reads from lane {lane}, which does not take part", int(lanes.numbers[at])
            )

    # --- memory ---

    def access(self, wave, access: Access) -> None:
        kept = self.wave(wave)
        for region, offsets, which in access.parts:
            if not region.counted:
                continue
            lanes = access.lanes.numbers if which is None else access.lanes.numbers[which]
            starts = np.broadcast_to(offsets, len(lanes))
            written, races = (self.bytes, self.races) if access.space == "global" else (kept.bytes, kept.races)
            self._written(written, access, region, lanes, starts)
            if access.space != "local" and region.writable:
                if region.name not in races:
                    races[region.name] = Races(len(region.raw))
                races[region.name].access(wave, kept, access, lanes, starts)

    @staticmethod
    def _written(all_written, access: Access, region: Region, lanes: np.ndarray, starts: np.ndarray) -> None:
        if access.space == "global" and not region.unwritten:
            return
        written = all_written.get(region.name)
        if written is None:
            written = all_written[region.name] = np.zeros(len(region.raw), bool)
        touched = starts[:, None] + np.arange(access.nbytes)
        if access.kind in ("read", "atomic", "fetch"):
            missing = ~written[touched].all(axis=1)
            if missing.any():
                where = f"'{region.name}'" if access.space == "global" else f"{access.space} memory"
                raise Fault(
                    f"{access.kind} of {access.nbytes} bytes of {where} that were never written",
                    int(lanes[np.argmax(missing)]),
                )
        if access.kind not in ("read", "fetch"):
            written[touched] = True

    # --- barriers ---

    def release(self, wave, key: tuple, lanes: Lanes, copied: bool = False) -> None:
        """Lanes arrive at a barrier; ``copied``: a copy of theirs does."""
        kept = self.wave(wave)
        blocks, warps = kept.copying(lanes.numbers) if copied else kept.warps_of(lanes.numbers)
        np.maximum.at(kept.gathering(key), blocks, kept.clocks[blocks, warps])
        kept.clocks[blocks, warps, warps] += 1

    def complete(self, wave, key: tuple, blocks: np.ndarray) -> None:
        """The barriers of these blocks [blocks] bool have all that they wait for."""
        kept = self.wave(wave)
        gathering = kept.gathering(key)
        kept.completed.setdefault(key, np.zeros_like(gathering))[blocks] = gathering[blocks]
        gathering[blocks] = 0

    def acquire(self, wave, key: tuple, lanes: Lanes) -> None:
        """Lanes pass a barrier."""
        kept = self.wave(wave)
        if key in kept.completed:
            blocks, warps = kept.warps_of(lanes.numbers)
            kept.clocks[blocks, warps] = np.maximum(kept.clocks[blocks, warps], kept.completed[key][blocks])


class _Wave:
    """registers, bytes   what has been written
    clocks[b, w, u]       how far warp w of block b knows warp u to have come; clocks[b, w, w] is its own clock.
                          The last warp of a block is that of its bulk copies"""

    def __init__(self, wave) -> None:
        self.registers: dict[int, np.ndarray] = {}
        self.bytes: dict[str, np.ndarray] = {}
        self.races: dict[str, Races] = {}
        self.lanes_per_block = wave.launch.shape.lanes
        self.warps = self.lanes_per_block // WARP + 1
        self.clocks = np.zeros((wave.blocks, self.warps, self.warps), np.int32)
        self.clocks[:, np.arange(self.warps), np.arange(self.warps)] = 1
        self._gathering: dict[tuple, np.ndarray] = {}
        self.completed: dict[tuple, np.ndarray] = {}

    def gathering(self, key: tuple) -> np.ndarray:
        """[blocks, warps] what the arrivals of this phase know together."""
        if key not in self._gathering:
            self._gathering[key] = np.zeros(self.clocks.shape[:2], np.int32)
        return self._gathering[key]

    def warps_of(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, warp) of each warp that has a lane here."""
        blocks, warps = np.divmod(np.unique(lanes // WARP), self.warps - 1)
        return blocks, warps

    def copying(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, the copies' warp)"""
        blocks = np.unique(lanes // self.lanes_per_block)
        return blocks, np.full_like(blocks, self.warps - 1)

    def start_copies(self, lanes: np.ndarray) -> None:
        """Copies know what their issuers know."""
        blocks, warps = self.warps_of(lanes)
        np.maximum.at(self.clocks[:, -1], blocks, self.clocks[blocks, warps])


WRITE, READS, ATOMIC = 0, (1, 2), 3
MEETS = {"read": (WRITE, ATOMIC), "write": (WRITE, *READS, ATOMIC), "atomic": (WRITE, *READS)}  # what it must not race


class Races:
    """The last accesses to each byte of a region, [4, bytes]: its last write, last reads of two warps, last atomic."""

    def __init__(self, nbytes: int) -> None:
        self.who = np.full((4, nbytes), -1, np.int64)  # block of the launch * warps + warp
        self.clock = np.zeros((4, nbytes), np.int32)
        self.pc = np.zeros((4, nbytes), np.int32)

    def access(self, wave, kept: _Wave, access: Access, lanes: np.ndarray, starts: np.ndarray) -> None:
        """Check lanes' accesses against the earlier ones, and remember them."""
        copy = access.kind in ("copy", "fetch")
        if copy:
            kept.start_copies(lanes)
        block = lanes // kept.lanes_per_block
        warp = np.full(len(lanes), kept.warps - 1) if copy else lanes // WARP - block * (kept.warps - 1)
        who = (wave.first_block + block) * kept.warps + warp
        # Each warp's touch of each byte once; then in rounds, so that a byte comes once in each.
        touched = (starts[:, None] + np.arange(access.nbytes)).reshape(-1)
        _, once = np.unique(touched * (int(who.max()) + 1) + np.repeat(who, access.nbytes), return_index=True)
        byte, of = touched[once], once // access.nbytes
        for turn in rounds(byte):
            self._one_round(wave, kept, access, byte[turn], lanes[of[turn]], who[of[turn]], block[of[turn]])

    def _one_round(self, wave, kept: _Wave, access: Access, byte, lanes, who, block) -> None:
        warp = who % kept.warps
        kind = {"fetch": "read", "copy": "write"}.get(access.kind, access.kind)
        for slot in MEETS[kind]:
            earlier = self.who[slot, byte]
            near = earlier // kept.warps == wave.first_block + block
            known = kept.clocks[block, warp, np.where(near, earlier % kept.warps, 0)] >= self.clock[slot, byte]
            race = (earlier >= 0) & (earlier != who) & ~(near & known)
            if race.any():
                self._report(wave, kept, access, slot, int(byte[np.argmax(race)]), int(lanes[np.argmax(race)]))
        slots = np.full(len(byte), WRITE if kind == "write" else ATOMIC)
        if kind == "read":  # one's own slot, else that of the older read
            first, second = self.who[1, byte] == who, self.who[2, byte] == who
            slots = np.where(first | ~second & (self.who[1, byte] < 0), 1, 2)
            move = ~first & ~second & (self.who[2, byte] >= 0)
            for array in (self.who, self.clock, self.pc):
                array[1, byte[move]] = array[2, byte[move]]
        elif kind == "write":
            self.who[1:, byte] = -1  # what came before is ordered before it
        clock = kept.clocks[block, warp, warp]
        self.who[slots, byte], self.clock[slots, byte], self.pc[slots, byte] = who, clock, wave.pc

    def _report(self, wave, kept: _Wave, access: Access, slot: int, byte: int, lane: int) -> None:
        block, warp = divmod(int(self.who[slot, byte]), kept.warps)
        line = wave.kernel.instructions[int(self.pc[slot, byte])].line
        what = "read" if slot in READS else "written"
        by = "a bulk copy" if warp == kept.warps - 1 else f"warp {warp}"
        raise Fault(
            f"race on {access.space} memory: the {access.kind} of {access.nbytes} bytes touches what {by} of block "
            f"{wave.block_position(block)} has {what} at PTX line {line}, and no barrier lies between",
            lane,
        )
