"""Cold start, from `import deep_gemm` to the first logits, in fresh processes.

    python tools/bench/cold_start.py [rounds]

One plan and one call of fp8_paged_mqa_logits (64 heads of 128, pages of 64) with the kernels shipped in the package,
with a warm cache, and with an empty one; beside it the time in which the same NVRTC compiles the peer's two kernels.

The driver is the tests' stand-in, so the cubins are those of a card (sm_120f), but neither its context, nor the
upload, nor the kernels themselves take any time. PyTorch is imported before the clock starts.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = ("import deep_gemm", "first plan", "first logits", "both, again")
PEER = ("plan's kernel, compiled", "logits' kernel, compiled")


def ours() -> list[float]:
    """Milliseconds of STEPS."""
    import torch

    clock = Clock()
    import deep_gemm

    clock.lap()
    from standin.driver import Standin

    standin = Standin()
    standin.without_emulator()
    lengths = torch.full((8, 1), 1000, dtype=torch.int32)
    query, weights = torch.zeros(8, 1, 64, 128).to(torch.float8_e4m3fn), torch.zeros(8, 64)
    kv_cache, table = torch.zeros(128, 64, 1, 132, dtype=torch.uint8), torch.zeros(8, 16, dtype=torch.int32)

    def plan() -> torch.Tensor:
        return deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, 188)

    def logits(schedule: torch.Tensor) -> torch.Tensor:
        return deep_gemm.fp8_paged_mqa_logits(query, kv_cache, weights, lengths, table, schedule, 1000)

    clock.start()
    schedule = clock.timed(plan)
    clock.timed(lambda: logits(schedule))
    clock.timed(lambda: logits(plan()))
    return clock.laps


def theirs() -> list[float]:
    """Milliseconds of PEER."""
    import peer

    kernels = peer.metadata(8, 188), peer.paged("fp8")
    clock = Clock()
    for kernel in kernels:
        clock.timed(kernel.compile)
    return clock.laps


class Clock:
    def __init__(self) -> None:
        self.laps: list[float] = []
        self.start()

    def start(self) -> None:
        self._started = time.perf_counter()

    def lap(self) -> None:
        self.laps.append((time.perf_counter() - self._started) * 1e3)
        self.start()

    def timed(self, call: Callable) -> object:
        result = call()
        self.lap()
        return result


def main(rounds: int = 5) -> None:
    from standin.driver import build

    standin = build()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(which: str, **environment: object) -> list[float]:
            command = [sys.executable, __file__, "--once", which]
            variables = {**os.environ, "LD_LIBRARY_PATH": str(standin), **{k: str(v) for k, v in environment.items()}}
            return json.loads(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)

        def fresh() -> Path:
            return Path(tempfile.mkdtemp(dir=folder))

        warm = folder / "warm"
        ship(folder / "package")
        states = {
            "shipped": lambda: run("ours", PYTHONPATH=folder / "package", DG_JIT_CACHE_DIR=fresh()),
            "warm cache": lambda: run("ours", DG_JIT_CACHE_DIR=warm),
            "empty cache": lambda: run("ours", DG_JIT_CACHE_DIR=fresh()),
            "peer": lambda: run("theirs", DG_PEER_DIR=peer_without_results(fresh())),
        }
        states["warm cache"]()
        times: dict[str, list[list[float]]] = {state: [] for state in states}
        for _ in range(rounds):  # in turns, so that all see the same noise
            for state, measure in states.items():
                times[state].append(measure())
    for state, laps in times.items():
        steps = PEER if state == "peer" else STEPS
        print(f"\n{state}, ms: median (least) of {rounds}")
        if state != "peer":  # the last step is no part of a first result
            steps, laps = ["first result, all in all", *steps], [[sum(lap[:-1]), *lap] for lap in laps]
        for step, values in zip(steps, zip(*laps), strict=True):
            print(f"  {step:28}{statistics.median(values):9.1f} ({min(values):.1f})")


def ship(package: Path) -> None:
    """Puts a copy of the sources into `package`, with the kernels of `ours` as the wheel ships them."""
    import compileall
    import shutil

    import torch

    from deep_gemm.sm120.jit import shipped
    from deep_gemm.sm120.kernels import logits, metadata

    shutil.copytree(ROOT / "sm120", package, ignore=shutil.ignore_patterns("__pycache__", "shipped", "*.egg-info"))
    config = logits.configure("sm_120f", False, 64, 128, 64, torch.float32, torch.float32, few_rows=1)
    shipped.write(package / "deep_gemm/sm120/jit/shipped", [metadata.FEW, config.kernel], "sm_120f")
    compileall.compile_dir(package, quiet=1)  # as pip does


def peer_without_results(folder: Path) -> Path:
    """The peer's packages again, in `folder`, without what was compiled from them before."""
    import peer

    packages = peer.fetch()
    (folder / packages.name).mkdir()
    for entry in packages.iterdir():
        if entry.name != "compiled":
            (folder / packages.name / entry.name).symlink_to(entry)
    return folder


if __name__ == "__main__":
    sys.path += [str(ROOT / name) for name in ("sm120", "tests", "tools/evidence")]  # after PYTHONPATH
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[2]]()))
    else:
        main(*map(int, sys.argv[1:]))
