"""How long calls take, and the card's ceilings by the same clock."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from probes import Reader, mma_flops, mma_kinds, mma_loop, run_probe

from deep_gemm.sm120.jit import architecture_of


@dataclass
class Timing:
    """Microseconds of the GPU: median, and the tenth and ninetieth percentile; of the host per call."""

    median_us: float
    low_us: float
    high_us: float
    repeats: int
    host_us: float


class Clock:
    """Times calls on the current device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 128 << 20)
        self.flush = Reader(max(2 * l2, 32 << 20), device, 2 * properties.multi_processor_count)
        self.seconds = seconds

    def time(self, calls: list[Callable[[], Any]], cold: bool) -> Timing:
        """Of the calls in turn. The GPU is kept busy until all of them are queued, so the host's time does not show."""
        turns = itertools.cycle(calls)
        start = time.perf_counter()
        for call in calls:  # whatever the first call of each has to do
            call()
        torch.cuda.synchronize()
        first = (time.perf_counter() - start) / len(calls)
        repeats = 1
        if first < 0.5:
            start = time.perf_counter()
            next(turns)()
            host = time.perf_counter() - start
            torch.cuda.synchronize()
            once = time.perf_counter() - start
            repeats = max(3, min(40, int(self.seconds / max(once, 20e-6))))
            torch.cuda._sleep(int(2e9 * min(0.05, (host + 20e-6) * repeats)))
        events, host_times = [], []
        for _ in range(repeats):
            if cold:
                self.flush()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call = next(turns)
            begin.record()
            start = time.perf_counter()
            call()
            host_times.append(time.perf_counter() - start)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = sorted(1e3 * begin.elapsed_time(end) for begin, end in events)
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        return Timing(statistics.median(times), low, high, repeats, 1e6 * statistics.median(host_times))


def measure_ceilings(device: torch.device, clock: Clock) -> dict[str, Any]:
    """Bandwidths in TB/s, a copy's counting what is read and what is written; MMA rates in TFLOPS."""
    properties = torch.cuda.get_device_properties(device)
    size = min(2 << 30, properties.total_memory // 8)
    reader = Reader(size, device, 2 * properties.multi_processor_count)
    target = torch.empty_like(reader.buffer)
    copied = clock.time([lambda: target.copy_(reader.buffer)], cold=False)
    read = clock.time([reader], cold=False)
    blocks, rates = properties.multi_processor_count, {}
    for name in mma_kinds(architecture_of(device)):
        turns, loop = 64, mma_loop(name)
        for _ in range(2):  # the first tells how many turns take 10 ms
            call = functools.partial(run_probe, loop, blocks, reader.sink, reader.sink, turns)
            took = clock.time([call], cold=False).median_us
            rates[name] = mma_flops(name, blocks, turns) / took * 1e-6
            turns = int(turns * 10_000 / took)
    nothing = clock.time([lambda: None], cold=False)
    return {
        "copy_tbps": 2 * reader.bytes / copied.median_us * 1e-6,
        "read_tbps": reader.bytes / read.median_us * 1e-6,
        "mma_tflops": rates,
        "empty_us": nothing.median_us,
    }
