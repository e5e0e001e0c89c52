"""Special registers: %tid, %ctaid, %laneid, ..."""

from __future__ import annotations

import time

import numpy as np

from ..lanes import WARP, position_of
from ..operands import SPECIAL


def special(name: str):
    """A special register that stays the same through the wave: computed once."""

    def register(make):
        def value(wave):
            if name not in wave.state:
                wave.state[name] = np.asarray(make(wave))
            return wave.state[name]

        SPECIAL[name] = value
        return make

    return register


def _block(wave) -> np.ndarray:
    return wave.first_block + wave.block_of


def _thread_at(wave, axis: int) -> np.ndarray:
    return position_of(wave.thread, wave.launch.shape.block)[axis].astype(np.uint32)


def _block_at(wave, axis: int) -> np.ndarray:
    return position_of(_block(wave), wave.launch.shape.grid)[axis].astype(np.uint32)


for _axis, _letter in enumerate("xyz"):
    special(f"%tid.{_letter}")(lambda wave, a=_axis: _thread_at(wave, a))
    special(f"%ctaid.{_letter}")(lambda wave, a=_axis: _block_at(wave, a))
    special(f"%ntid.{_letter}")(lambda wave, a=_axis: np.uint32(wave.launch.shape.block[a]))
    special(f"%nctaid.{_letter}")(lambda wave, a=_axis: np.uint32(wave.launch.shape.grid[a]))
    # Every block is a cluster of its own.
    special(f"%clusterid.{_letter}")(lambda wave, a=_axis: _block_at(wave, a))
    special(f"%nclusterid.{_letter}")(lambda wave, a=_axis: np.uint32(wave.launch.shape.grid[a]))
    special(f"%cluster_ctaid.{_letter}")(lambda wave: np.uint32(0))
    special(f"%cluster_nctaid.{_letter}")(lambda wave: np.uint32(1))

special("%cluster_ctarank")(lambda wave: np.uint32(0))
special("%cluster_nctarank")(lambda wave: np.uint32(1))
special("%is_explicit_cluster")(lambda wave: np.bool_(False))
special("%laneid")(lambda wave: wave.lane)
special("%warpid")(lambda wave: (wave.thread // WARP).astype(np.uint32))
special("%nwarpid")(lambda wave: np.uint32(wave.launch.shape.lanes // WARP))
special("%smid")(lambda wave: _block(wave).astype(np.uint32))  # a block an SM
special("%nsmid")(lambda wave: np.uint32(wave.launch.shape.blocks))
special("%gridid")(lambda wave: np.uint64(0))
special("%dynamic_smem_size")(lambda wave: np.uint32(wave.launch.dynamic_bytes))
special("%total_smem_size")(lambda wave: np.uint32(wave.launch.shared_bytes))
special("%lanemask_eq")(lambda wave: np.uint32(1) << wave.lane)
special("%lanemask_lt")(lambda wave: (np.uint32(1) << wave.lane) - np.uint32(1))
special("%lanemask_le")(lambda wave: (np.uint32(2) << wave.lane) - np.uint32(1))
special("%lanemask_gt")(lambda wave: ~((np.uint32(2) << wave.lane) - np.uint32(1)))
special("%lanemask_ge")(lambda wave: ~((np.uint32(1) << wave.lane) - np.uint32(1)))

# Clocks: instructions issued so far stand for cycles.
SPECIAL["%clock"] = lambda wave: np.uint32(sum(wave.issued) & 0xFFFFFFFF)
SPECIAL["%clock_hi"] = lambda wave: np.uint32(sum(wave.issued) >> 32)
SPECIAL["%clock64"] = lambda wave: np.uint64(sum(wave.issued))
SPECIAL["%globaltimer"] = lambda wave: np.uint64(time.time_ns())
SPECIAL["%globaltimer_lo"] = lambda wave: np.uint32(time.time_ns() & 0xFFFFFFFF)
SPECIAL["%globaltimer_hi"] = lambda wave: np.uint32(time.time_ns() >> 32)
