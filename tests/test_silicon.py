"""The comparison on silicon, as far as it goes without a card: both sides with the MMA replaced, run in the emulator
and looked at in their SASS, and the arithmetic of the report."""

import json
import math
import struct
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import floors
import overlap
import peer
import pytest
import sass
import silicon
import silicon_card
import silicon_cases
import silicon_report
import substitute
import torch
from silicon_cases import Case, Inputs, Pool, distance, error_against_float64
from silicon_report import TOLERANCE, Result

from deep_gemm.sm120.emulator import Buffer, Module

ROOT = Path(__file__).parent.parent
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
FORMS = pytest.mark.parametrize("form", substitute.FORMS)
SLOTS = 8


@pytest.fixture(scope="module")
def tree() -> substitute.Tree:
    return substitute.Tree("tested", ROOT)


@pytest.fixture(scope="module")
def wheel() -> None:
    try:
        peer.fetch()
    except peer.PeerUnavailable as problem:
        pytest.skip(f"the peer's wheel cannot be fetched: {str(problem).splitlines()[0]}")


def inputs(case: Case) -> Inputs:
    return Pool(torch.device("cpu")).inputs(case)[1]


def results(it: Inputs, call) -> torch.Tensor:
    it.logits.fill_(math.nan)
    call()
    return it.out.clone()


class Emulated:
    """In the place of `silicon.PeerKernels`: launches run in the emulator."""

    def __init__(self, it: Inputs) -> None:
        self.it = it

    def bind(self, launch: peer.Launch, form: str):
        it, kernel = self.it, launch.kernel
        binary = substitute.build_peer(kernel, form)
        tensors = [*(it.q if isinstance(it.q, tuple) else (it.q,)), *(it.kv or ()), it.weights, it.lengths, it.logits]
        tensors += [it.kv_cache, it.block_table, it.indices, it.starts, it.made.get("schedule")]
        buffers = [Buffer.of(tensor, str(n)) for n, tensor in enumerate(tensors) if tensor is not None]
        params, maps = launch.parameters()
        shared = {"shared_bytes": kernel.shared_bytes, "tensor_maps": maps}
        return lambda: Module(binary.ptx).launch(binary.name, launch.grid, launch.block, params, buffers, **shared)


def random_case(kind: str, fp4: bool) -> Case:
    keys = int(torch.randint(100, 300, ()))
    if kind == "decode":
        return Case(kind, fp4, 2, keys, next_n=int(torch.randint(1, 4, ())), heads=32)
    if kind == "mixed":
        return Case("decode", fp4, 3, keys, style="mixed")
    if kind == "varlen":
        return Case("prefill", fp4, 7, keys, heads=32, style=kind)
    if kind == "compressed":
        return Case("ragged", fp4, 5, keys, style=kind)
    return Case(kind, fp4, 6, keys, heads=32)


# ---- both sides, run ------------------------------------------------------------------------------------------------


@FORMATS
@FORMS
def test_ours_with_the_mma_replaced(form: str, fp4: bool, tree: substitute.Tree) -> None:
    """The package's own functions, on fp16 pairs, against float64."""
    tree.use(form)
    for kind in ("decode", "ragged"):
        it = inputs(random_case(kind, fp4))
        got = results(it, silicon.our_call(tree, it, SLOTS))
        assert error_against_float64(it, form, got, tree.reference.dequantize) < 1e-6


@pytest.mark.peer
@FORMATS
@pytest.mark.parametrize("kind", ["decode", "mixed", "prefill", "varlen", "ragged", "compressed"])
def test_both_sides_agree(kind: str, fp4: bool, tree: substitute.Tree, wheel: None) -> None:
    """Whatever becomes the MMA, ours and the peer's have the same logits."""
    case = random_case(kind, fp4)
    for form in substitute.FORMS[:: 1 if kind == "decode" else 2]:
        tree.use(form)
        it = inputs(case)
        ours = results(it, silicon.our_call(tree, it, SLOTS))
        theirs = results(it, silicon.peer_call(Emulated(it), form, it, SLOTS))
        for got in (ours, theirs):
            assert error_against_float64(it, form, got, tree.reference.dequantize) < 1e-6
        assert distance(it, ours, theirs) < 1e-6


@pytest.mark.peer
def test_native_form_is_the_real_thing(tree: substitute.Tree, wheel: None) -> None:
    """On SM120 nothing is replaced, and the definition is the format's."""
    tree.use(substitute.NATIVE)
    for fp4 in (False, True):
        it = inputs(random_case("decode", fp4))
        ours = results(it, silicon.our_call(tree, it, SLOTS))
        theirs = results(it, silicon.peer_call(Emulated(it), substitute.NATIVE, it, SLOTS))
        for got in (ours, theirs):
            assert error_against_float64(it, substitute.NATIVE, got, tree.reference.dequantize) < 1e-6


def test_a_wrong_logit_shows(tree: substitute.Tree) -> None:
    it = inputs(Case("decode", False, 2, 150))
    tree.use("x1")
    right = results(it, silicon.our_call(tree, it, SLOTS))
    for value in (math.nan, float(right[1, 149]) + float(right[1, :150].norm()) * 1e-4):
        wrong = right.clone()
        wrong[1, 149] = value
        assert not error_against_float64(it, "x1", wrong, tree.reference.dequantize) < TOLERANCE
        assert not distance(it, wrong, right) < TOLERANCE
    assert error_against_float64(it, "x2", right, tree.reference.dequantize) > 0.4


def test_pairs_of_bytes_are_fp16() -> None:
    data = silicon_cases.random_bytes(8, 64, torch.device("cpu"))
    pairs = substitute.number_pairs(data)
    assert pairs.tolist() == [list(struct.unpack("<32e", bytes(row.tolist()))) for row in data]
    assert pairs.abs().min() >= 2**-3 and pairs.abs().max() < 2
    assert not data.view(torch.float8_e4m3fn).float().isnan().any()


# ---- both sides, compiled -------------------------------------------------------------------------------------------


def turn(cubin: bytes) -> Counter[str]:
    """Instructions of a turn of the loop, by name."""
    (function,) = sass.disassemble(cubin).values()
    return Counter(instruction.name for instruction in function.mma_loop().turn)


def check_mmas(native: Counter[str], replaced: dict[str, Counter[str]]) -> None:
    """One or two native ones for each that was there; ptxas has neither merged nor dropped any."""
    count = native["QMMA"] + native["OMMA"]
    assert count > 0 and native["HMMA"] == 0
    for form, turned in replaced.items():
        assert turned["HMMA"] == count * (1 if form == "x1" else 2), form
        assert turned["QMMA"] == turned["OMMA"] == 0


@FORMATS
def test_every_mma_of_ours_is_replaced(fp4: bool, tree: substitute.Tree) -> None:
    kernel = next(kernel for kernel in tree.kernels(64, fp4) if "paged_mqa_logits_h" in kernel.name)
    native = turn(tree.compile(kernel, substitute.NATIVE))
    replaced = {form: turn(tree.compile(kernel, form)) for form in substitute.FORMS}
    check_mmas(native, replaced)
    if fp4:  # whose scales only the MMA looks at
        assert replaced["x1"]["LDG"] == native["LDG"]


@pytest.mark.peer
@FORMATS
def test_every_mma_of_the_peer_is_replaced(fp4: bool, wheel: None) -> None:
    kernel = peer.paged("fp4" if fp4 else "fp8")
    native = turn(kernel.compile().cubin)
    replaced = {form: turn(substitute.build_peer(kernel, form).cubin) for form in substitute.FORMS}
    check_mmas(native, replaced)
    assert replaced["x1"]["LDSM"] == native["LDSM"]
    if fp4:
        assert replaced["x1"]["LDS"] >= native["LDS"]


def test_latencies_of_the_forms(tree: substitute.Tree) -> None:
    """Clocks between MMAs that depend on each other, by ptxas's own stall counts: with x2s as on SM120, 29 to 34."""
    clocks = {}
    for form in substitute.FORMS:
        (function,) = sass.disassemble(silicon_card.probe(tree, form, 1)).values()
        turned = function.mma_loop().turn
        sums = [at for at, i in enumerate(turned) if i.name == "HMMA" and "F32" in i.modifiers]
        first, last = sums[0], sums[-len(sums) // silicon_card.MMAS]  # of the first and of the last of MMAS
        clocks[form] = sum(i.stall for i in turned[first:last]) / (silicon_card.MMAS - 1)
    assert clocks["x1"] < 28 < clocks["x2s"] < 36 < 44 < clocks["x2"]


def test_the_sources_stay_as_they_are(tree: substitute.Tree) -> None:
    folder = ROOT / "sm120" / "deep_gemm" / "sm120" / "kernels"
    native = tree.headers(substitute.NATIVE)
    assert native == {file.name: file.read_text() for file in folder.glob("*.cuh")}
    for form in substitute.FORMS:
        edited = tree.headers(form)
        assert [name for name in native if edited[name] != native[name]] == ["ptx.cuh"]
        assert "e4m3.e4m3" not in edited["ptx.cuh"] and "mxf4" not in edited["ptx.cuh"]
        assert "/* %10 %11 %12 %13 %14 */" in edited["ptx.cuh"]  # FP4's scales are still inputs


def test_trees_live_side_by_side(tmp_path: Path) -> None:
    """Two source trees in one process, each with kernels of its own."""
    target = tmp_path / "sm120" / "deep_gemm" / "sm120"
    target.parent.mkdir(parents=True)
    target.symlink_to(ROOT / "sm120" / "deep_gemm" / "sm120")
    trees = [substitute.Tree("before", ROOT), substitute.Tree("after", tmp_path)]
    assert trees[0].sm120 is not trees[1].sm120 and trees[0].runtime is not trees[1].runtime
    names = [{kernel.name for kernel in tree.kernels(32, True)} for tree in trees]
    assert names[0] == names[1] and len(names[0]) >= 3


# ---- the plan, the command line, the report -------------------------------------------------------------------------


def test_cases() -> None:
    cases = silicon_cases.plan()
    assert len({case.name for case in cases}) == len(cases)
    by_name = {case.name: case for case in cases}
    assert {case.heads for case in cases} == {16, 32, 64} and {case.kind for case in cases} == set(silicon_cases.KINDS)
    assert {1, 2, 4, 8, 16, 64, 256, 1024} <= {case.rows for case in cases if case.kind == "decode"}
    decode = by_name["fp8 64 x 16K"]
    assert decode.key_bytes == 64 * 16384 * 132 and decode.mmas == 64 * 16384 // 8 * 4 * 4
    assert by_name["fp4 64 x 16K n4"].key_bytes == 64 * 16384 * 68
    assert by_name["fp4 1 x 16K n4"].lengths.tolist() == [[16381, 16382, 16383, 16384]]
    prefill = by_name["fp8 prefill 2048 x 8K varlen"].lengths
    assert prefill[-1] == 8192 and prefill[0] == 8192 - 2047 // 4 and prefill.shape == (2048, 1)
    mixed = by_name["fp8 16 x 64K mixed"].lengths
    assert mixed.min() >= 64 and mixed.max() == 65536 and len(mixed.unique()) > 10
    for case in cases:
        assert case.launches >= 12 or case.mmas > 1 << 26
        assert case.sets == case.launches or case.sets >= 4 and case.sets * case.footprint >= 192 << 20


@pytest.mark.parametrize("kind", ["decode", "mixed", "prefill", "ragged"])
def test_sets_of_inputs_share_nothing(kind: str) -> None:
    """No launch finds in L2 what another one of the graph has read."""
    case = Case("decode", True, 3, 200, style=kind) if kind == "mixed" else Case(kind, True, 3, 200)
    sets = Pool(torch.device("cpu")).inputs(case)
    assert len(sets) == case.sets + 1
    if kind == "ragged":
        assert len({it.kv[0].data_ptr() for it in sets}) == len(sets)
        return
    used = []
    for it in sets:
        pages = [row[:count] for row, count in zip(it.block_table, case.pages.tolist())]
        used += torch.cat(pages).unique().tolist()
    assert len(used) == len(set(used)) == case.distinct_pages * len(sets)


def test_arguments() -> None:
    arguments = silicon.parse_arguments(
        ["--only", "decode,ragged", "--formats", "fp4", "--heads", "64", "--case", "2048"]
    )
    names = [case.name for case in silicon.selected(arguments)]
    assert names == ["fp4 ragged 2048 x 8K", "fp4 ragged 2048 x 8K compressed"]
    for words in (["--only", "sparse"], ["--forms", "x3"], ["run"], ["--formats", "bf16"]):
        with pytest.raises(SystemExit):
            silicon.parse_arguments(words)


@pytest.mark.peer
def test_without_a_gpu_it_builds_and_says_what_it_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, wheel: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["silicon.py", "--case", "fp4 64 x 16K n4", "--forms", "x1,x2", "--heads", "64", "--into", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert silicon.main() == 0
    printed = capsys.readouterr().out
    assert "No GPU here" in printed and printed.splitlines()[-1] == "  fp4 64 x 16K n4"
    built = silicon.Built(tmp_path)
    kernel = peer.paged("fp4", 64, 4)
    for form in ("x1", "x2"):
        made = substitute.build_peer(kernel, form)
        assert built.get(kernel, form) == (made.name, made.cubin)


CARD = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 12)


@pytest.mark.peer
@pytest.mark.skipif(not CARD, reason="needs an SM90 or SM120 card")
def test_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: None) -> None:
    place = tmp_path / "silicon.json"
    cases = ["--case", "1 x 1K", "--case", "ragged 2048 x 8K h32", "--case", "metadata 64"]
    monkeypatch.setattr(sys, "argv", ["silicon.py", *cases, "--heads", "64,32", "--out", str(place)])
    assert silicon.main() == 0
    report = json.loads(place.read_text())
    assert len(report["cases"]) == 7 and not report["missed"]
    for case in report["cases"]:
        assert all(
            us > report["empty_us"] for form in case["forms"].values() for us in [form["peer"], form["ours"]["ours"]]
        )


def made_up_report() -> dict:
    """Ours takes 8 and 10 us, the peer 12, whatever the case; the second tree is wrong in one."""
    report = {
        "date": "2026-01-01",
        "device": "a card",
        "sms": 100,
        "trees": ["before", "after"],
        "empty_us": 1.0,
    }
    report |= {
        "copy_us": {"1000": 1.0, "1000000": 1.0, "3000000": 2.0},
        "mma": {"x1": {"interval": 6.0, "latency": 25.0, "rate": 1e11}},
        "missed": ["fp8 9 x 9"],
    }
    report["cases"] = []
    for case in (Case("decode", False, 8, 1000), Case("decode", True, 8, 1000), Case("metadata", False, 5, 1000)):
        entry = {"ours": {"before": 8.0, "after": 10.0}, "peer": 12.0, "off": {"after": 1e-7}, "apart": {}}
        described = asdict(case) | {"name": case.name, "key_bytes": case.key_bytes, "mmas": case.mmas}
        report["cases"].append(described | {"forms": {"x1": entry}})
    report["cases"][1]["forms"]["x1"]["apart"] = {"after": 0.5}
    return report


def test_report(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = made_up_report()
    first, second, last = (silicon_report.row(Result(report, case, "x1")) for case in report["cases"])
    # 8 x 1000 keys are 1,056,000 bytes, which a copy moves in 1.028 us; 8000 / 8 x 16 MMAs, of 100 G/s.
    assert first == ["fp8 8 x 1000", "8.00", "10.00", "12.00", "1.20", "9.00", "0.10", "0.02", "0.01", "1e-07"]
    assert second[-1] == "WRONG 5.0e-01" and last[-4:-1] == ["", "", ""]
    lines = "\n".join(silicon_report.summary(report))
    assert "x1, before" in lines and "decode 1.500" in lines and "decode 1.200" in lines and "fp8 9 x 9" in lines
    silicon_report.write(report, tmp_path)
    document = (tmp_path / "silicon.md").read_text()
    assert (
        "| 8 x 1000 | 10.00 / 12.00 | 1.20 | 9.00 | 0.10 | 0.02 / 0.01 |" in document and "a card, 100 SMs" in document
    )
    assert (tmp_path / "silicon.png").stat().st_size > 10_000
    for more in ([], ["--compact"]):
        monkeypatch.setattr(sys, "argv", ["silicon.py", "show", str(tmp_path / "silicon.json"), *more])
        assert silicon.main() == 1
        assert "WRONG" in capsys.readouterr().out


def test_bars() -> None:
    """Each is counted over the cases that it speaks of."""
    report = {
        "trees": ["ours"],
        "empty_us": 1.0,
        "copy_us": {1 << 20: 1.5, 1 << 30: 500.0},
        "mma": {"x1": {"rate": 1e11}, "x2": {"rate": 5e10}},
        "cases": [],
    }
    k = 1 << 10
    for case, ours, theirs in (
        (Case("decode", False, 1, 64), 2.5, 3.0),
        (Case("decode", True, 1, 16 * k, 4), 5.5, 5.0),
        (Case("decode", False, 64, 16 * k), 70.0, 105.0),  # a copy would take 65.2
        (Case("decode", True, 64, 16 * k, style="mixed"), 10.0, 20.0),
        (Case("prefill", False, 2048, 8 * k), 400.0, 560.0),
        (Case("ragged", True, 2048, 8 * k, heads=32), 300.0, 390.0),
        (Case("ragged", True, 2048, 8 * k, heads=16), 300.0, 30.0),
    ):
        entry = {"ours": {"ours": ours}, "peer": theirs, "off": {}, "apart": {}}
        described = asdict(case) | {"name": case.name, "key_bytes": case.key_bytes, "mmas": case.mmas}
        report["cases"].append(described | {"forms": {"x1": entry, "x2": entry}})
    found = {(bar.what, bar.form): bar.row()[2:] for bar in silicon_report.bars(report)}
    over = ": the peer's time over ours"
    assert found[f"decode{over}", "x1"] == ["at least 1", "3 of 4", "0.91: fp4 1 x 16K n4"]
    assert found["decode, geometric mean", "x1"] == ["at least 1.15", "yes", "1.35: 4 cases"]
    assert found["1 x 64: us above an empty kernel", "x1"] == ["at most 1.6", "yes", "1.50: fp8 1 x 64"]
    assert found["1 x 16384, next_n 4: us above an empty kernel", "x1"] == [
        "at most 4",
        "0 of 1",
        "4.50: fp4 1 x 16K n4",
    ]
    assert found["64 x 16K and larger: bytes of keys a second over a copy's", "x1"][1:] == [
        "0 of 1",
        "0.93: fp8 64 x 16K",
    ]
    assert found[f"FP8 paged prefill{over}", "x1"][1:] == ["0 of 1", "1.40: fp8 prefill 2048 x 8K"]
    assert found[f"FP8 paged prefill{over}", "x2"][1] == "yes"
    assert found[f"FP4 ragged{over}", "x1"][1:] == ["yes", "1.30: fp4 ragged 2048 x 8K h32"]
    assert found["prefill and ragged: share of the MMA's rate", "x2"][1] == "1 of 2"
    assert ("1 x 64: us above an empty kernel", "x2") not in found


@pytest.mark.parametrize("others", overlap.OTHERS)
@pytest.mark.parametrize("count", [0, 3])
def test_the_probe_of_overlap_has_what_it_says(others: str, count: int) -> None:
    binary = peer.build(overlap.source(others, count), "probe", ["--gpu-architecture=sm_90a"], {})
    turn = sass.disassemble(binary.cubin)[binary.name].mma_loop().turn
    counted = Counter(i.name for i in turn)
    assert counted["HMMA"] == overlap.MMAS
    expected = {"FFMA": (0, 1), "FMNMX": (1, 0), "half each": (2 / 3, 1 / 3)}[others]
    assert (counted["FMNMX"], counted["FFMA"]) == tuple(round(overlap.MMAS * count * share) for share in expected)


# ---- floors ---------------------------------------------------------------------------------------------------------


class EmulatedFloor:
    """In the place of `silicon_card.Function`."""

    def __init__(self, floor: floors.Floor, tensors: list[torch.Tensor | None]) -> None:
        self.floor, self.binary = floor, floor.build("sm_90a")
        self.buffers = [Buffer.of(tensor, str(n)) for n, tensor in enumerate(tensors) if tensor is not None]

    def bind(self, grid: tuple[int, int, int], threads: int, *arguments: bytes):
        packed = b""
        for argument in arguments:
            packed += bytes(-len(packed) % len(argument)) + argument
        shared = {"shared_bytes": self.floor.shared_bytes}
        launch = Module(self.binary.ptx).launch
        return lambda: launch(self.binary.name, grid, (threads, 1, 1), packed, self.buffers, **shared)


@FORMATS
@pytest.mark.parametrize("sizes", [(1, 64, 1, 64, ""), (1, 576, 2, 32, ""), (3, 320, 1, 64, "mixed")], ids=str)
def test_a_floor_reads_every_word(sizes: tuple, fp4: bool) -> None:
    """As often as it says, and nothing else; a word that is another one shows."""
    sms, case = 2, Case("decode", fp4, *sizes)
    it = inputs(case)
    table = floors.flat_pages(it)
    values, scales = it.q if fp4 else (it.q, None)
    forms = floors.floors(case, sms)
    assert len(forms) > 3
    for floor in forms:
        out = torch.zeros(floor.stores(len(table), sms), dtype=torch.int32)
        function = EmulatedFloor(floor, [it.kv_cache, table, out, it.lengths, values, scales, it.weights])
        floors.bind(floor, function, it, table, out, sms)()
        want = floors.expected(floor, it, table, sms)
        assert int(out.sum(dtype=torch.int64)) % 2**32 == want, floor.name
    word = it.kv_cache[int(table[-1])].view(-1)[-4:]
    word ^= 1
    assert floors.expected(floor, it, table, sms) != want


def test_what_floors_say() -> None:
    entry = {"peer": 4.0, "mmas": 0, "key_bytes": 132 << 20}
    report = {
        "empty_us": 1.0,
        "ghz": 2.0,
        "sms": 132,
        "copy_us": {"65536": 1.0, str(264 << 20): 101.0},
        "overlap": {"x1": {"4": {"half each": [5.0, 6.0, 8.0]}}},
        "cases": [
            entry | {"name": "fp8 1 x 64", "floors": {"a": 2.0, "b": 1.9}, "ours": 2.6},  # 16 MMAs of 5 clocks: 1.94
            entry | {"name": "fp8 1 x 1K", "floors": {"a": 2.58}, "ours": 2.7},
            entry | {"name": "fp4 1 x 16K n4", "floors": {"a": 4.0}, "ours": 5.1},  # 4 tiles of 32 MMAs: 0.32
            entry | {"name": "fp8 64 x 16K", "floors": {"a": 40.0}, "mmas": 132 * 4 * 20000, "ours": 51.0},
            entry | {"name": "fp8 64 x 4K", "floors": {"a": 9.0}, "ours": 9.0},  # nothing is asked of it
        ],
    }
    head, *rows = floors.decode_table(report)
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["by"] for row in found] == ["b", "a", "a", "a"]
    assert [row["us"] for row in found] == ["2.60", "2.60", "5.00", "50.99"]
    assert [row["limit"] for row in found] == ["1.94", "2.62", "4.32", "50.00"]
    assert [row["verdict"] for row in found] == ["met", "out of reach", "not met", "not met"]
    assert floors.beside_an_mma([5.0, 6.0, 8.0], 1.5) == 7 and floors.beside_an_mma([5.0, 6.0, 8.0], 3) == 10


def test_what_stands_beside_an_mma(tree: substitute.Tree) -> None:
    """The form's second MMA is not counted, nor what it needs."""
    case = Case("prefill", True, 512, 8192, heads=32)
    others = {form: floors.turn_of(tree, case, form) for form in substitute.FORMS}
    assert len({warps for _, warps in others.values()}) == 1
    assert max(n for n, _ in others.values()) - min(n for n, _ in others.values()) < 0.2
