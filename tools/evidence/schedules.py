"""A model of who gets which keys: how far the longest SM is from an even share.  Tables and a picture.

    python tools/evidence/schedules.py [--out docs/performance]

ours        the schedule in splits of 256 keys, consumed in such splits.  SGLang's planner writes the same schedule.
            Few rows (`few_rows` in kernels/logits.py: 256 at most) do without, for what it would do to them here.
peer        the peer's schedule in splits of 128 keys, consumed by its kernels.
mismatch    SGLang's schedule in splits of 256 keys, handed to the peer's kernels, which read 128 into it: every slot
            does half of its share but the one that ends a row, which does all the rest of that row.

Work is counted in keys: ours multiplies tiles of 32, the peer whole splits of 128, and one for a row of length 0 that
it walks across.  The even share is all keys over all SMs, the same for the three, so a batch too small to fill the SMs
is above 1 however it is planned.  A schedule counts a short row's only split like a full one, so many rows of 64 keys
beside a long one come out up to 4 (peer: 2) times an even share of keys.  One query token a request, rows not grouped;
no time and no caches: only who gets how much.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np

SMS = {48: "DGX Spark", 170: "RTX 5090", 188: "RTX PRO 6000"}
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
LENGTHS = {"64": 64, "1K": 1 << 10, "16K": 1 << 14, "128K": 1 << 17, "1M": 1 << 20}
SHORT = 64  # keys of the other rows where one is long
SCHEMES = ("ours", "peer", "mismatch")


def plan(lengths: np.ndarray, num_sms: int, split: int) -> np.ndarray:
    """The schedule, [num_sms + 1, 2]: slot j starts at split `[j, 1]` of row `[j, 0]`. The last slots get one more."""
    ends = np.cumsum(-(-lengths // split))
    average, rest = divmod(int(ends[-1]), num_sms)
    slots = np.arange(num_sms + 1)
    places = slots * average + np.maximum(slots - (num_sms - rest), 0)
    rows = np.searchsorted(ends, places, side="right")
    before = np.where(rows > 0, ends[rows - 1], 0)
    return np.stack([rows, np.where(rows < len(lengths), places - before, 0)], axis=1)


def work(lengths: np.ndarray, schedule: np.ndarray, split: int, tile: int, empty: int = 0) -> np.ndarray:
    """Keys that each slot multiplies, when a split is `split` keys and its last tile is a whole one of `tile`.
    A row without keys costs `empty`."""
    splits = np.maximum(-(-lengths // split), 1 if empty else 0)
    keys = np.where(lengths > 0, -(-lengths // tile) * tile, empty)
    first = np.concatenate([[0], np.cumsum(keys)])  # keys before each row
    rows, at = schedule.T
    within = np.minimum(rows, len(lengths) - 1)
    reached = np.where(at >= splits[within], keys[within], at * split)
    return np.diff(first[rows] + np.where(rows < len(lengths), reached, 0))


def imbalance(lengths: np.ndarray, num_sms: int) -> dict[str, float]:
    """Longest SM over the even share, by scheme."""
    ours, peers = plan(lengths, num_sms, 256), plan(lengths, num_sms, 128)
    loads = {
        "ours": work(lengths, ours, 256, 32),
        "peer": work(lengths, peers, 128, 128, empty=128),
        "mismatch": work(lengths, ours, 128, 128, empty=128),
    }
    return {scheme: float(load.max() / (lengths.sum() / num_sms)) for scheme, load in loads.items()}


def batch_of(size: int, length: int, skewed: bool) -> np.ndarray:
    """`size` rows of `length` keys; skewed: only the middle one, the others short."""
    lengths = np.full(size, SHORT if skewed else length, dtype=np.int64)
    lengths[size // 2] = length
    return lengths


def tables() -> dict[tuple[int, bool], np.ndarray]:
    """(SMs, skewed) -> [batch, length, scheme]"""
    return {
        (sms, skewed): np.array(
            [[list(imbalance(batch_of(b, n, skewed), sms).values()) for n in LENGTHS.values()] for b in BATCHES]
        )
        for sms in SMS
        for skewed in (False, True)
    }


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def markdown(ratios: np.ndarray) -> str:
    head = ["batch", *(f"{name} {scheme}" for name in LENGTHS for scheme in SCHEMES)]
    rows = [[str(b), *map(number, ratios[i].flatten())] for i, b in enumerate(BATCHES)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def picture(results: dict[tuple[int, bool], np.ndarray], sms: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, grid = plt.subplots(2, len(SCHEMES), figsize=(11, 6.2), layout="constrained")
    for axes_row, skewed in zip(grid, (False, True), strict=True):
        for k, (axes, scheme) in enumerate(zip(axes_row, SCHEMES, strict=True)):
            ratios = results[sms, skewed][:, :, k]
            image = axes.imshow(ratios, cmap="RdYlGn_r", norm=LogNorm(1, sms), aspect="auto")
            for (y, x), value in np.ndenumerate(ratios):
                axes.text(x, y, number(value), ha="center", va="center", fontsize=8)
            axes.set_xticks(range(len(LENGTHS)), LENGTHS)
            axes.set_yticks(range(len(BATCHES)), BATCHES)
            axes.set_title(f"{scheme}, {'one long row, others 64 keys' if skewed else 'uniform'}", fontsize=10)
    figure.supxlabel("keys of the (long) rows")
    figure.supylabel("batch")
    figure.suptitle(f"Longest SM over an even share, {sms} SMs (model)")
    figure.colorbar(image, ax=grid)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "performance")
    out = parser.parse_args().out
    results = tables()
    command = f"`python tools/evidence/schedules.py`, {datetime.date.today()}.\n"
    text = ["# Schedules\n", command, __doc__.partition("\n\n")[2]]
    text.append("![longest SM over an even share](schedules.png)\n")
    for (sms, skewed), ratios in results.items():
        kind = f"one row of so many keys, the others of {SHORT}" if skewed else "uniform"
        text.append(f"## {sms} SMs ({SMS[sms]}), {kind}\n\n{markdown(ratios)}\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "schedules.md").write_text("\n".join(text))
    picture(results, 188, out / "schedules.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
