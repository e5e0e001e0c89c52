"""Recording what launches did that somebody else makes."""

import threading

import numpy as np
import pytest
import torch

import deep_gemm
from deep_gemm.sm120.emulator import Buffer, Counters, EmulatorError, Module, recording

STORE = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry store(.param .u64 where) {
    .reg .b64 %rd<2>;
    .reg .b32 %r<2>;
    ld.param.u64 %rd1, [where];
    mov.u32 %r1, 7;
    st.global.u32 [%rd1], %r1;
    ret;
}
"""


@pytest.fixture
def store():
    """Launches a kernel that writes 4 bytes, with so many blocks; returns what the launch returns."""
    module, word = Module(STORE), np.zeros(1, np.uint32)
    return lambda blocks: module.launch("store", blocks, 1, [word.ctypes.data], [Buffer.of(word, "word")])


def test_launches_inside_in_their_order(store) -> None:
    store(1)
    with recording() as launches:
        assert launches == []
        returned = [store(3), store(2)]
    store(1)
    assert all(mine is theirs for mine, theirs in zip(launches, returned)) and len(launches) == 2
    assert sum(launches, Counters()).bytes_written == {"word": 20}


def test_a_trace_is_asked_for_by_the_recording() -> None:
    lengths = torch.arange(1, 101, dtype=torch.int32)
    with recording(trace=True), recording() as traced:
        deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 12)
    with recording() as plain:
        deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 12)
    # 400 bytes lie in 13 sectors, or 14 if they start within one.
    sectors = (lengths.data_ptr() % 32 + 400 + 31) // 32
    assert traced[0].block_bytes["context_lens"] == 32 * sectors
    assert traced[0].warp_bytes["context_lens"] >= 32 * sectors and traced[0].requests["context_lens"] > 0
    assert not plain[0].block_bytes and plain[0].instructions == traced[0].instructions


def test_nested_recordings_both_hear(store) -> None:
    with recording() as outer:
        store(1)
        with recording() as inner:
            store(2)
        store(3)
    assert [launch.blocks for launch in outer] == [1, 2, 3]
    assert [launch.blocks for launch in inner] == [2]


def test_a_failure_ends_a_recording(store) -> None:
    with pytest.raises(EmulatorError), recording() as launches:
        store(1)
        store(0)
    store(1)
    assert len(launches) == 1


def test_other_threads_are_not_heard(store) -> None:
    with recording() as launches:
        thread = threading.Thread(target=store, args=(1,))
        thread.start()
        thread.join()
    assert launches == []


def test_the_public_functions_are_heard() -> None:
    lengths = torch.tensor([300, 5], dtype=torch.int32)
    with recording() as launches:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 12)
    assert [launch.bytes_written["schedule"] for launch in launches] == [schedule.numel() * 4]
