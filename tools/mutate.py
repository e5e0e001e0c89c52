"""Would the tests notice?  Flips one small thing at a time in a copy of the kernels and runs a quick part of the tests.

    python tools/mutate.py                all mutations; prints each one's fate, and the survivors at the end
    python tools/mutate.py --only 3 17    these; --from 20: these and all after
    python tools/mutate.py --check        only: does each still find its place?

A mutation is caught if a test fails, the compiler refuses it, or nothing comes back in time (a loop without an end).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sm120" / "deep_gemm"
KERNELS = Path("sm120", "kernels")
PATIENCE = 240  # seconds

PAGED = [
    "test_paged.py::test_dims",
    "test_paged.py::test_heads",
    "test_paged.py::test_page_sizes",
    "test_paged.py::test_next_n",
    "test_paged.py::test_dtypes",
    "test_paged.py::test_bf16_logits_are_the_rounded_fp32_ones",
    "test_paged.py::test_padded_cache",
    "test_paged.py::test_weights_with_a_row_stride",
    "test_paged.py::test_a_length_past_the_maximum_stays_inside_the_row",
    "test_paged.py::TestForeignBytes",
    "test_paged.py::TestSchedules::test_poor_balance",
    "test_paged.py::TestSchedules::test_slots",
    "test_paged.py::TestSchedules::test_many_rows_of_one_sequence",
    "test_paged.py::TestSchedules::test_many_rows_of_all_lengths",
    "test_paged.py::test_empty_rows",
]
RAGGED = [
    "test_ragged.py::test_compressed",
    "test_ragged.py::test_full",
    "test_ragged.py::test_dims",
    "test_ragged.py::test_no_padding_is_asked_for",
    "test_ragged.py::test_bounds_past_the_keys_are_cut",
    "test_ragged.py::test_bounds_before_the_first_key_are_cut",
    "test_ragged.py::test_nan_outside_the_window",
    "test_ragged.py::test_one_row_of_many_keys",
]
CLEAN = ["test_paged.py::test_clean_logits", "test_ragged.py::test_compressed", "test_ragged.py::test_full"]
ARCHITECTURES = [
    "test_architectures.py::test_other_cards[fp4-24-64-sm_89]",
    "test_architectures.py::test_scales_at_the_ends_of_their_range",
    "test_architectures.py::test_the_smallest_scale",
]
# For each file the tests that concern it, the likeliest to notice first: a run ends at the first failure.
TESTS = {
    "metadata.cuh": ["test_metadata.py"],
    "window.cuh": [
        "test_metadata.py::test_a_row_is_as_long_as_its_longest_token",
        *PAGED[3:9],
        *RAGGED,
        "test_fuzz.py::test_any_ragged",
    ],
    "clean.cuh": CLEAN,
    "formats.cuh": [*PAGED[:3], *ARCHITECTURES],
    "ptx.cuh": [*PAGED[:6], "test_paged.py::TestForeignBytes", *ARCHITECTURES],
    "logits.cuh": [
        *PAGED,
        *RAGGED,
        "test_sanitizers.py::test_paged_is_clean",
        "test_sharing.py::test_tokens_of_a_request",
        "test_fuzz.py",
    ],
}

# «what stands there → what comes in its place»; the line around it says where: it is found once in the file.
MUTATIONS = {
    "metadata.cuh": [
        "if (lane «>= → >» distance) x += below;",
        "distance < «32 → 16»; distance *= 2",
        "if (lane == «31 → 30») warp_sums[warp] = x;",
        "return warp > «0 → 1» ? x + warp_sums[warp - 1] : x;",
        "+ kSplit« - 1 → ») / kSplit : 0;",
        "row < «rows → rows - 1»; row += kThreads",
        "shorter = p.slots - total % p.slots« → - 1»",
        "if (start < before || start «>= → >» until) continue;",
        "«<= → <» start) row += step;",
        "(row > 0 ? sums[row - 1] : «before → 0»)",
        "before = «until → total»;",
        "slot == p.slots« || total == 0 → »",
    ],
    "window.cuh": [
        "if (lengths_per_row «== next_n → != 1») {",
        "- (next_n -« 1 - → » (token - row * next_n));",
        "max(0, «min(end, limit) → end»)",
        "starts ? «max(int(ptx::load_word(starts + token)), 0) → int(ptx::load_word(starts + token))» : 0",
        "row * lengths_per_row« + i → »)",
    ],
    "clean.cuh": [
        "if (n < begin || n «>= → >» end)",
        "begin = «p.compressed ? 0 : window.begin → window.begin»",
        "end = «p.compressed ? window.end - window.begin : window.end → window.end»",
        "n += «gridDim.y → 2 * gridDim.y» * blockDim.x",
    ],
    "formats.cuh": [
        "return 4 * kVector * lane.«t → g»;",
        "key[2 * Step], key[2 * Step« + 1 → »], 0x7f7f7f7f",
        "0x7f7f7f«7f → 80»",
        "const int head = 32 * i + «8 → 4» * lane.t + lane.g;",
        "ptx::mma_e2m1<2 * Step, «1 → 0», KeyTile>",
        "ptx::mma_e2m1<«2 * Step → 0», 0, KeyTile>",
        "words[2 * j + 1] = (loaded[j] & 0x80808080) | (loaded[j] >> «2 → 1» & 0x1c1c1c1c);",
        "byte == 0 ? «0x00400000 → 0» : byte == 255",
        "return sum * «4096 → 2048»;",
        "4 * (2 * lane.t« + c → ») + KeyTile",
        "return sum «* → +» __uint_as_float(key_scale);",
    ],
    "ptx.cuh": [
        'asm("max«.NaN → ».f32 %0, %1, 0f00000000;"',
        "cvt.«rn → rz».bf16.f32",
        "{%10}, {%12, %13}, {%11}, {%12, %«14 → 13»};",
    ],
    "logits.cuh": [
        "const int head = 16 * m + 8 * half + lane.«g → t»;",
        "if (16 * m« + 8 * half → » < kHeads) {",
        "fragments[m][s][1] = rows[«1 → 0»][2 * s] ^ zero;",
        "token * «p.weights_stride → kHeads» + head",
        "sums[i % 2] += query.weights[m][i «/ → %» 2]",
        "return 16 * (lane.g >> 2) + «8 → 4» * (lane.g & 1)",
        "const bool keeps_upper = lane.g« >> Step → » & 1;",
        "key «< → <=» kTile / 2 ? pages[0] : pages[1]",
        "«min(tile * kTile + kTile / 2, last_key) → (tile * kTile + kTile / 2)»",
        "if constexpr (kOnePage) offset += tile «% → /» (kPage / kTile)",
        "return array + («min(key + more, last_key - tile * kTile) → (key + more)» * kRowBytes + offset);",
        "array += int64(page) * «p.page_stride → (kPage * (Format::kRowBytes + 4))»;",
        "if (n «<= → <» last_stored)",
        "if (n <= last_stored« → + 1»)",
        "last_stored(kPaged ? last_key : window.end -« window.begin - → » 1)",
        "+ (kPaged« || p.columns → » ? 0 : window.begin)",
        "for (const int cut = to - «2 → 1» * step; tile < cut; tile += step)",
        "if (guess.tile «!= tile → < 0») keys.locate",
        "min(window.end, «window.begin + p.columns → p.columns»)",
        "«(mine.end - 1) → mine.end» / kTile + 1;\n        const bool active",
        "share = warp / tokens, shares = «kWarps / tokens → 1»;",
        "if («share < shares && → » tile < until)",
        "if (entry.x «>= → >» first_row + rows) return kNever;",
        "if (missing «< → <=» active) return cut;",
        "begin.x == end.x && begin.y «>= → >» end.y ? 0",
        "end.x + «(end.y > 0) → 1»",
        "const int first_row = row« - row % p.rows_per_group → »;",
        "row += p.rows_per_group« - row % p.rows_per_group → »;",
        "if (found) return (first + 32 * i + __ffs(found)« - 1 → »)",
        "const int share = (last - first« - 1) / int(gridDim.y) + 1 → ) / int(gridDim.y)»;",
    ],
}

# Survivors that are no gap, and why.
EXPLAINED = {
    "if (start < before || start «>= → >» until) continue;": "what is written too early, the same thread corrects",
    "if (lengths_per_row «== next_n → != 1») {": "with one token and one length both ways lead to the same window",
    "if (missing «< → <=» active) return cut;": "cuts a group a tile earlier, alike for both slots that meet there",
    "begin.x == end.x && begin.y «>= → >» end.y ? 0": "an idle slot looks at its row and finds nothing to score",
    "end.x + «(end.y > 0) → 1»": "a slot looks at the row after its last and finds nothing to score",
    "share = warp / tokens, shares = «kWarps / tokens → 1»;": "the same logits by fewer warps",
}


class Mutation(NamedTuple):
    file: str
    text: str

    def applied(self, mutated: bool) -> str:
        """The line with or without the change."""
        return re.sub("«(.*?) → (.*?)»", r"\2" if mutated else r"\1", self.text, flags=re.S)


ALL = [Mutation(file, text) for file, texts in MUTATIONS.items() for text in texts]


def misplaced() -> list[str]:
    """Mutations that do not find their place any more."""
    sources = {file: (PACKAGE / KERNELS / file).read_text() for file in MUTATIONS}
    counts = [(m, sources[m.file].count(m.applied(False))) for m in ALL]
    return [f"{m.file}: '{m.applied(False)}' is there {count} times" for m, count in counts if count != 1]


def survives(mutation: Mutation | None, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass on a mutated copy (None: as it is), and what caught it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "deep_gemm")
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation:
            file = package / KERNELS / mutation.file
            file.write_text(file.read_text().replace(mutation.applied(False), mutation.applied(True)))
        environment = os.environ | {
            "PYTHONPATH": folder,
            "DG_JIT_CACHE_DIR": str(Path(folder, "cache")),
            "DG_TEST_DEVICES": "cpu",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(folder, "examples")),
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{test}" for test in tests]
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                capture_output=True,
                timeout=PATIENCE if mutation else None,
            )
        except subprocess.TimeoutExpired:
            return False, "no end"
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return run.returncode == 0, failed[0].split(" - ")[0] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutations")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first mutation")
    parser.add_argument("--check", action="store_true", help="only see that every mutation finds its place")
    arguments = parser.parse_args()
    lost = misplaced()
    print("\n".join(lost) or f"{len(ALL)} mutations find their place")
    if lost or arguments.check:
        return bool(lost)
    passed, by = survives(None, list(dict.fromkeys(test for tests in TESTS.values() for test in tests)))
    if not passed:
        print(f"the tests fail on the kernels as they are: {by}")
        return 1
    left = []
    for number in arguments.only or range(arguments.first, len(ALL)):
        mutation, start = ALL[number], time.monotonic()
        survived, by = survives(mutation, TESTS[mutation.file])
        left += [mutation] * survived
        fate = f"SURVIVES {EXPLAINED.get(mutation.text, '')}" if survived else f"caught by {by}"
        print(f"{number:2} {mutation.file}: {mutation.text}  {fate} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(left)} survive")
    return any(mutation.text not in EXPLAINED for mutation in left)


if __name__ == "__main__":
    raise SystemExit(main())
