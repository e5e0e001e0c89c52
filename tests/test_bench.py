"""The benchmark: its plan, its arithmetic, its check and what it writes. Nothing is timed here."""

import functools
import json
import subprocess
import sys
from argparse import Namespace

import bench
import contenders
import indexer
import probes
import pytest
import sass
import topk
import topk_peers
import torch
from cases import PAGE, Case, figures, peak_for, plan
from clock import Timing
from inputs import Cache, Inputs, relative_error
from results import write

from deep_gemm import sm120
from deep_gemm.sm120 import reference
from deep_gemm.sm120.emulator import Buffer, Counters, Module, recording
from deep_gemm.sm120.jit import compile_kernel

CPU = torch.device("cpu")
SMALL = [
    Case("decode", False, 2, 128, heads=16),
    Case("decode", False, 2, 192, next_n=3, heads=8),
    Case("decode", True, 3, 64, next_n=2, heads=16),
    Case("prefill", False, 12, 64, heads=8),
    Case("prefill", True, 9, 128, heads=16),
    Case("ragged", False, 9, 70, heads=16),
    Case("ragged", True, 5, 33, heads=8),
]
names = [case.name for case in SMALL]


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_whole_plan() -> None:
    cases = plan()
    assert len(cases) == len(set(cases)) == 2 * (3 * 5 * 5 + 4 + 4)
    decode = {(case.rows, case.keys, case.next_n) for case in cases if case.kind == "decode"}
    assert {rows for rows, _, _ in decode} == {1, 8, 64, 256, 1024}
    assert {keys for _, keys, _ in decode} == {1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10}
    assert {next_n for _, _, next_n in decode} == {1, 2, 4}
    assert {case.rows for case in cases if case.kind != "decode"} == {4096}
    assert {case.heads for case in plan(heads=32)} == {32}
    assert all(case.keys % PAGE == 0 for case in cases)


def test_quick_comes_first() -> None:
    quick, cases = plan(quick=True), plan()
    assert cases[: len(quick)] == quick and len(quick) < len(cases) / 8
    assert {(case.kind, case.fp4) for case in quick} == {(case.kind, case.fp4) for case in cases}


def test_cases_that_do_not_fit_are_left_out() -> None:
    big, small = Case("decode", False, 1024, 256 << 10), Case("decode", False, 1, 1024)
    assert big.footprint > 1024 * (256 << 10) * (132 + 4)
    assert not bench.fits(big, 32 << 30) and bench.fits(big, 100 << 30) and bench.fits(small, 3 << 30)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_decode_lengths() -> None:
    case = Case("decode", False, 2, 100, next_n=3)
    assert case.lengths.tolist() == [[98, 99, 100]] * 2 and case.lengths.dtype == torch.int32
    assert (case.pairs, case.tokens, case.distinct_keys) == (2 * 297, 6, 200)


def test_prefill_grows_by_one_every_four_rows() -> None:
    assert Case("prefill", False, 10, 5).lengths.flatten().tolist() == [3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    first = Case("prefill", False, 4096, 1024).lengths.flatten()
    assert first[:5].tolist() == [1, 1, 1, 1, 2] and first[-1] == 1024
    assert Case("ragged", False, 3, 5).lengths.flatten().tolist() == [3, 4, 5]
    assert Case("ragged", False, 4, 2).lengths.flatten().tolist() == [0, 0, 1, 2]


def test_bytes_and_flops_by_hand() -> None:
    fp8 = Case("decode", False, 2, 128, next_n=2, heads=64)
    logits = 2 * (127 + 128)
    query, weights, lengths, pages = 4 * 64 * 128, 4 * 4 * 64, 4 * 4, 4 * 2 * 2
    assert fp8.bytes == 256 * 132 + query + weights + lengths + pages + 4 * logits
    assert fp8.flops == logits * 64 * 128 * 2
    fp4 = Case("ragged", True, 3, 100, heads=16)
    assert fp4.bytes == 100 * 68 + 3 * 16 * (64 + 4) + 4 * 3 * 16 + 2 * 4 * 3 + 4 * (98 + 99 + 100)
    prefill = Case("prefill", False, 4, 128, heads=8)
    assert prefill.key_bytes == 128 * 132  # the rows share them
    assert prefill.bytes == 128 * 132 + 4 * 8 * 128 + 4 * 4 * 8 + 4 * 4 + 4 * 4 * 2 + 4 * 4 * 128


def test_percent_of_peak() -> None:
    ceilings = {"copy_tbps": 2.0, "mma_tflops": {"fp8_plain": 100.0, "fp8_block_scaled": 200.0, "fp4": 400.0}}
    case = Case("decode", False, 64, 16384)
    found = figures(case, 100.0, ceilings)
    assert found["tbps"] == pytest.approx(case.bytes / 1e8) and found["of_copy"] == pytest.approx(case.bytes / 2e8)
    assert found["tflops"] == pytest.approx(case.flops / 1e8) and found["of_mma"] == pytest.approx(case.flops / 2e10)
    assert found["floor_us"] == pytest.approx(max(case.flops / 200e6, case.bytes / 2e6))
    assert found["of_roof"] == pytest.approx(found["floor_us"] / 100)
    assert found["floor_us"] == pytest.approx(case.flops / 200e6)  # 120 FLOP a byte over 100
    fast = {**ceilings, "mma_tflops": {"fp8_plain": 1000.0}}
    assert figures(case, 100.0, fast)["floor_us"] == pytest.approx(case.bytes / 2e6)
    assert peak_for(True, ceilings["mma_tflops"]) == 400 and peak_for(True, {"fp8_plain": 7.0}) == 7


# ---- the probes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", probes.mma_kinds("sm_120f"))
def test_mma_loop_does_what_is_counted(name: str) -> None:
    source, sink = torch.zeros(4, dtype=torch.int32), torch.full((2 * 512,), -1, dtype=torch.int32)
    with recording() as launches:
        probes.run_probe(probes.mma_loop(name), 2, source, sink, 3)
    done = sum(launches, Counters())
    k = 64 if name == "fp4" else 32
    assert done.classes["mma"] * 2 * 16 * 8 * k == probes.mma_flops(name, 2, 3)
    assert not done.bytes_read.total() and done.bytes_written.total() == sink.nbytes
    sums = sink.view(torch.float32)
    assert sums.isfinite().all() and sums.unique().numel() > 500  # random, no NaN


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a", "sm_120f"])
def test_mma_loop_multiplies_in_every_turn(arch: str) -> None:
    """On SM90 the instruction is emulated with two HMMAs; none of them may have been moved out of the loop."""
    for name in probes.mma_kinds(arch):
        kernel = probes.mma_loop(name)
        function = sass.disassemble(compile_kernel(kernel, arch, "cubin"))[kernel.name]
        turns = function.mma_loop().macs / (8 * 16 * 8 * (64 if name == "fp4" else 32))
        assert turns in (1, 2, 4, 8), f"{name} for {arch}: {turns} turns' worth of products in the loop"
        assert function.resources.stack == 0


def test_other_cards_have_the_plain_mma_alone() -> None:
    assert probes.mma_kinds("sm_90a") == probes.mma_kinds("sm_89") == ["fp8_plain"]


@pytest.mark.parametrize("threads, blocks", [(128, 3), (512, 9)])
def test_rows_are_read_once_and_answered(threads: int, blocks: int) -> None:
    scores = torch.randint(-(2**31), 2**31 - 1, (5, 4160), dtype=torch.int32)
    results = torch.empty((5, 700), dtype=torch.int32)
    with recording() as launches:
        probes.run_rows(threads, blocks, scores, results)
    done = sum(launches, Counters())
    assert done.bytes_read.total() == scores.nbytes and done.bytes_written.total() == results.nbytes
    lanes = torch.zeros((5, threads), dtype=torch.int32)  # a word is the exclusive or of all that its lane has read
    for vector, words in enumerate(scores.view(5, -1, 4).unbind(1)):
        for word in words.unbind(1):
            lanes[:, vector % threads] ^= word
    assert torch.equal(results, lanes.repeat(1, 6)[:, :700])


def test_reader_reads_every_byte_once() -> None:
    reader = probes.Reader(1, CPU, blocks=1)
    assert reader.bytes == reader.buffer.nbytes == 1024 * 16 * 8
    with recording() as launches:
        reader()
    assert sum(launches, Counters()).bytes_read.total() == reader.bytes
    words = reader.buffer.view(8, 1024, 4)  # a thread's word is the exclusive or of all it has read
    want = [0] * 3
    for thread in range(3):
        for word in words[:, thread].flatten().tolist():
            want[thread] ^= word
    assert reader.sink[:3].tolist() == want


# ---- the check ------------------------------------------------------------------------------------------------------


def expected(inputs: Inputs) -> torch.Tensor:
    if inputs.kv is not None:
        return reference.ragged_logits(inputs.q, inputs.kv, inputs.weights, inputs.starts, inputs.ends)
    arguments = (inputs.kv_cache, inputs.weights, inputs.lengths, inputs.block_table, inputs.case.keys)
    return reference.paged_logits(inputs.q if inputs.case.fp4 else inputs.q[0], *arguments)


@pytest.mark.parametrize("case", SMALL, ids=names)
def test_inputs_and_check(case: Case) -> None:
    """Ours, in the emulator, and torch's operators are both found right; so is the reference itself."""
    sets = Cache(CPU).inputs(case, 2)
    assert len(sets) == 2
    for prepare, limit in ((contenders.ours, 1e-6), (contenders.plain_torch, 1e-5)):
        calls, entry = bench.judge(sets, prepare)
        assert len(calls) == 2 and entry["status"] == "right" and 0 < entry["error"] < limit, entry
    want = expected(sets[1])
    assert relative_error(sets[1], want, samples=case.tokens + 2) < 1e-12
    assert not torch.equal(want, expected(sets[0]))


def test_sets_take_pages_of_their_own() -> None:
    sets = Cache(CPU).inputs(Case("decode", False, 3, 128, heads=8), 3)
    pages = [page for inputs in sets for page in inputs.block_table.flatten().tolist()]
    assert sorted(pages) == list(range(18))
    prefill = Cache(CPU).inputs(Case("prefill", False, 3, 128, heads=8), 2)
    assert all((inputs.block_table == inputs.block_table[0]).all() for inputs in prefill)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits: logits * 1.01,
        lambda logits: logits.roll(1, dims=1),
        lambda logits: logits.clone().index_fill_(0, torch.tensor([0]), torch.nan),
        lambda logits: torch.zeros_like(logits),
    ],
    ids=["scaled", "moved", "nan", "nothing"],
)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[4], SMALL[5]], ids=lambda case: case.name)
def test_wrong_results_are_not_timed(case: Case, spoil) -> None:
    inputs = Cache(CPU).inputs(case, 1)
    calls, entry = bench.judge(inputs, lambda it: lambda: spoil(contenders.ours(it)()))
    assert calls == [] and entry["status"] == "wrong" and entry["error"] > bench.TOLERANCE


def test_logits_that_were_never_written_are_wrong() -> None:
    inputs = Cache(CPU).inputs(SMALL[0], 1)
    inputs[0].out.copy_(contenders.ours(inputs[0])())  # right, but of an earlier call
    calls, entry = bench.judge(inputs, lambda it: lambda: it.out)
    assert calls == [] and entry["status"] == "wrong"


def test_a_peer_that_fails_or_declines() -> None:
    inputs = Cache(CPU).inputs(SMALL[2], 1)

    def breaks(_):
        raise ValueError("no such arch\nand more")

    assert bench.judge(inputs, breaks) == ([], {"status": "failed", "reason": "ValueError: no such arch"})
    assert bench.judge(inputs, contenders.triton_kernel)[1] == {"status": "unsupported", "reason": "FP8 only"}
    assert bench.judge(inputs, lambda it: contenders.sglang(None, it))[1]["status"] == "unsupported"


def test_either_generation_of_deepgemm() -> None:
    """Called with the signatures of both: ours stands in for them, and takes down what it was given."""
    given = []

    class Old:
        get_num_sms, get_paged_mqa_logits_metadata = lambda: 4, sm120.get_paged_mqa_logits_metadata

        def fp8_paged_mqa_logits(q, kv, w, lens, table, meta, longest, clean_logits=True):
            given.append(("old", clean_logits))
            return sm120.fp8_paged_mqa_logits(q, kv, w, lens, table, meta, longest)

        def fp8_mqa_logits(q, kv, w, ks, ke, clean_logits=True):
            given.append(("old", clean_logits))
            return sm120.fp8_mqa_logits(q, kv, w, ks, ke)

    class New:
        get_num_sms, get_paged_mqa_logits_metadata = lambda: 4, sm120.get_paged_mqa_logits_metadata

        def fp8_fp4_paged_mqa_logits(q, kv, w, lens, table, meta, longest, indices=None):
            given.append("new")
            return sm120.fp8_fp4_paged_mqa_logits(q, kv, w, lens, table, meta, longest)

    for case, package, seen in (
        (SMALL[0], Old, ("old", False)),
        (SMALL[5], Old, ("old", False)),
        (SMALL[0], New, "new"),
        (SMALL[2], New, "new"),
    ):
        prepare = functools.partial(contenders.deep_gemm_package, package)
        calls, entry = bench.judge(Cache(CPU).inputs(case, 1), prepare)
        assert calls and entry["status"] == "right" and given.pop() == seen
    assert bench.judge(Cache(CPU).inputs(SMALL[2], 1), lambda it: contenders.deep_gemm_package(Old, it))[1] == {
        "status": "unsupported",
        "reason": "not in this package",
    }


def test_peers_are_found_or_said_to_be_missing() -> None:
    found, missing = contenders.find_peers()
    assert found["ours"] is contenders.ours and "torch" in found
    everybody = {"deep_gemm.upstream", "vllm.third_party.deep_gemm", "flashinfer", "sglang tilelang", "sglang torch"}
    assert everybody | {"triton"} <= found.keys() | missing.keys() and not found.keys() & missing.keys()
    assert all(missing.values())


# ---- what is written ------------------------------------------------------------------------------------------------


class Stopwatch:
    """Takes no time: 100 us for a cold call, 50 for a warm one; the calls are made all the same."""

    def time(self, calls, cold: bool) -> Timing:
        for call in calls:
            call()
        return Timing(100.0 if cold else 50.0, 90.0, 110.0, 3, 12.345678)


@pytest.fixture
def result() -> dict:
    """As `run` makes it, of two small cases; a third one's peers are wrong and broken."""
    ceilings = {"copy_tbps": 0.001, "read_tbps": 0.001, "mma_tflops": {"fp8_plain": 0.1, "fp4": 0.2}, "empty_us": 2.0}
    peers = {
        "ours": contenders.ours,
        "torch": contenders.plain_torch,
        "wrong": lambda it: lambda: it.out * 2,
        "fp8 only": contenders.triton_kernel,
    }
    results = []
    for case in (SMALL[2], SMALL[5]):
        results += bench.run_case(case, Cache(CPU), peers, Stopwatch(), ceilings)
    device = {"name": "A card", "capability": "12.0", "sms": 188}
    return {
        "schema": bench.SCHEMA, "date": "2026-11-24T00:00:00+00:00", "device": device, "ceilings": ceilings,
        "results": [entry for entry in results if entry["peer"] != "fp8 only" or entry["fp4"]], "took_s": 1.0,
    }  # fmt: skip


def test_entries(result) -> None:
    ours, torch_, wrong, declined = result["results"][:4]
    case = SMALL[2]
    assert [entry["peer"] for entry in result["results"][:4]] == ["ours", "torch", "wrong", "fp8 only"]
    assert Case(*(ours[key] for key in Case.__dataclass_fields__)) == case and ours["name"] == case.name
    assert ours["status"] == torch_["status"] == "right" and declined["status"] == "unsupported"
    assert wrong["status"] == "wrong" and "cold" not in wrong
    for mode, microseconds in (("cold", 100.0), ("warm", 50.0)):
        assert ours[mode]["median_us"] == microseconds
        wanted = figures(case, microseconds, result["ceilings"])
        assert {key: ours[mode][key] for key in wanted} == wanted
    assert ours["warm"]["of_copy"] == pytest.approx(case.bytes / 50e-6 / 1e9)


def test_written(result, tmp_path, capsys) -> None:
    write(result, tmp_path / "new" / "folder", print)
    folder = tmp_path / "new" / "folder"
    stored = json.loads((folder / "bench.json").read_text())
    assert stored["schema"] == 1 and stored["device"] == result["device"]
    assert stored["results"][0]["cold"]["host_us"] == 12.35 and len(stored["results"]) == len(result["results"])
    header, first, second = (folder / "bench.txt").read_text().splitlines()
    assert header.split()[:2] == ["case", "us"] and header.split()[-4:] == ["torch", "wrong", "fp8", "only"]
    assert first.startswith("fp4 decode 3x2 x 64  100.0") and "100.0 (1.00x)" in first
    assert first.split()[-2:] == ["wrong", "-"] and "fp8 ragged 9 x 70" in second
    from matplotlib.image import imread

    assert imread(folder / "roofline.png")[..., :3].std() > 0.05
    assert "bench.json is the file to send" in capsys.readouterr().out


def test_written_without_rich_and_matplotlib(result, tmp_path, monkeypatch, capsys) -> None:
    for name in ("rich", "rich.console", "rich.table", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    write(result, tmp_path, print)
    printed = capsys.readouterr().out
    assert "no picture: matplotlib is not installed" in printed and "fp4 decode 3x2 x 64" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.txt"]


def test_metadata_entries(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Namespace(multi_processor_count=5))
    (entry,) = bench.run_metadata(7, CPU, {"ours": contenders.ours, "torch": contenders.plain_torch}, Stopwatch())
    assert entry["status"] == "right" and entry["same_contract"] and entry["cold"]["median_us"] == 100
    monkeypatch.setattr(reference, "schedule", lambda lengths, slots: torch.zeros((6, 2), dtype=torch.int32))
    (entry,) = bench.run_metadata(7, CPU, {"ours": contenders.ours}, Stopwatch())
    assert entry["status"] == "wrong" and "cold" not in entry


# ---- the command ----------------------------------------------------------------------------------------------------


def test_dry_run(capsys) -> None:
    assert bench.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "fp4 decode 1024x4 x 256K" in printed and "166 cases" in printed
    assert bench.main(["--dry-run", "--quick", "--heads", "32"]) == 0
    assert "12 cases" in capsys.readouterr().out


def test_without_a_gpu(tmp_path) -> None:
    command = [sys.executable, bench.__file__, "--quick", "--out", str(tmp_path / "out")]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no GPU" in done.stderr and not (tmp_path / "out").exists()


# ---- top-k ----------------------------------------------------------------------------------------------------------


def test_topk_plan(capsys) -> None:
    cases = topk.plan((*topk.ROWS, topk.PREFILL), topk.KEYS, topk.KS)
    assert len(cases) == len(set(cases)) and all(keys > k for _, keys, k in cases)
    wanted = {(rows, keys, k) for rows in (1, 4, 16, 64, 256) for keys in topk.KEYS for k in (512, 1024, 2048)}
    assert {case for case in cases if case[0] < topk.PREFILL} == {case for case in wanted if case[1] > case[2]}
    assert topk.main(["--dry-run", "--rows", "1,4096", "--keys", "8K,16384", "--k", "512"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 x 8K, k 512", "1 x 16K, k 512", "4,096 x 16K, k 512"]
    with pytest.raises(SystemExit):
        topk.main(["--dry-run", "--rows", "0"])


@pytest.fixture
def choices() -> dict:
    """Of one case in the emulator; all but the first peer do something wrong, the last one nothing."""

    def reference_places(logits, lengths, table, out):
        best = logits.topk(out.shape[1]).indices
        return lambda: out.copy_(table.gather(1, best // PAGE) * PAGE + best % PAGE)

    def fails(*_):
        raise ValueError("no such arch\nand more")

    peers = {
        "ours": topk_peers.Peer(topk.ours, True),
        "places": topk_peers.Peer(reference_places, True),
        "torch": topk_peers.Peer(topk_peers.torch_topk),
        "positions for places": topk_peers.Peer(reference_places),
        "the smallest": topk_peers.Peer(lambda logits, *rest: topk_peers.torch_topk(-logits, *rest)),
        "one twice": topk_peers.Peer(lambda *all_: lambda: all_[3].copy_(torch.arange(all_[3].shape[1]) // 2)),
        "nothing": topk_peers.Peer(lambda *_: lambda: None),
        "fails": topk_peers.Peer(fails),
        "declines": topk_peers.Peer(lambda *_: None),
    }
    pool = torch.randn(topk.INPUTS * 3 * 320)
    return topk.compare((3, 320, 64), peers, lambda launches: 10.0 + len(launches), pool)


def test_topk_results_are_checked(choices) -> None:
    assert choices["us"] == {"ours": 18.0, "places": 18.0, "torch": 18.0}
    wrong = dict.fromkeys(["positions for places", "the smallest", "one twice", "nothing"], "wrong")
    assert choices["wrong"] == wrong | {"fails": "ValueError: no such arch"}
    assert "one twice: WRONG" in topk.line(choices) and "fails: ValueError" in topk.line(choices)


def test_topk_tables(tmp_path, capsys) -> None:
    def case(rows, keys, k=512, wrong=(), **us):
        names = {"v1": "SGLang v1", "clusters": topk.RECORD}
        us = {names.get(name, name): value for name, value in us.items()}
        return {"rows": rows, "keys": keys, "k": k, "us": us, "wrong": dict.fromkeys(wrong, "wrong")}

    report = {
        "date": "2026-01-01", "device": "a card", "sms": 132, "torch": "2", "empty_us": 1.0, "read_tbps": 2.0,
        "missing": {"FlashInfer": "is not here"},
        "cases": [
            case(1, 4096, ours=4.5, v1=9.0, clusters=4.0), case(1, 65536, ours=8.0, v1=24.0, torch=20.0),
            case(4096, 65536, ours=800.0, v1=700.0), case(4, 4096, 1024, ["SGLang v1"], ours=4.0, torch=9.0),
        ],
    }  # fmt: skip
    report["cases"][2]["limit_us"] = 640.0
    (tmp_path / "topk.json").write_text(json.dumps(report))
    assert topk.main(["--show", str(tmp_path / "topk.json")]) == 0
    text = capsys.readouterr().out
    assert "| k 512: rows x keys | ours | SGLang v1 | SGLang v2 (clusters) | torch | ratio |" in text
    assert "| 1 x 4K | **4.5** | 9.0 | 4.0 |  | 2.00 |" in text and "| 4 x 4K | **4.0** | wrong | 9.0 | 2.25 |" in text
    assert "| 4,096 x 64K | 800.0 | **700.0** |  |  | 0.88 |" in text and "Not here: FlashInfer (is not here)." in text
    assert "ahead of every peer | 3 of 4 | 0.88 of it: 4,096 x 64K, k 512" in text
    assert "| 1 of 2 | 0.86 of it: 1 x 64K, k 512 |" in text  # 7 us above an empty kernel where 6 were asked for
    assert "SGLang v1 at 16K, 64K, 256K | 0 of 1 | 0.75 of it" in text
    assert "| 4,096 x 64K | 512 | 671.1 | 640.0 | 800.0 | 1.25 | not met |" in text  # 1.07 GB at 80% of 2 TB/s
    for limit, ours, verdict in ((672.0, 800.0, "out of reach"), (640.0, 671.0, "met")):
        report["cases"][2].update(limit_us=limit, us={"ours": ours})
        assert topk.tables(report).count(f"| {verdict} |\n") == 1
    assert "80% of a read's bandwidth | 0 of 1 | 0.84 of it" in text  # 1.34 TB/s of 1.6


def places_of_the_best(logits, lengths, table, out, skip=0):
    """In the place of SGLang's kernels, which take a card; or the best but for some."""
    best = logits.topk(out.shape[1] + skip).indices[:, skip:]
    return lambda: out.copy_(table.gather(1, best // PAGE) * PAGE + best % PAGE)


def test_topk_as_rows_of_the_benchmark() -> None:
    peers = {
        "SGLang v1": topk_peers.Peer(places_of_the_best, True),
        "torch": topk_peers.Peer(topk_peers.torch_topk),
        "wrong": topk_peers.Peer(functools.partial(places_of_the_best, skip=1), True),
    }
    entries = indexer.run_topk((2, 640, 512), peers, Stopwatch(), CPU)
    assert [(entry["peer"], entry["status"]) for entry in entries] == [
        ("ours", "right"), ("SGLang v1", "right"), ("torch", "right"), ("wrong", "wrong"),
    ]  # fmt: skip
    assert {entry["name"] for entry in entries} == {"topk 2 x 640"}
    assert all((entry["cold"]["median_us"], entry["warm"]["median_us"]) == (100.0, 50.0) for entry in entries[:3])
    for quick in (False, True):
        assert all(keys > k for _, keys, k in indexer.topk_cases(quick))


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
def test_the_indexer_as_rows_of_the_benchmark(fp4, monkeypatch, tmp_path) -> None:
    """After the logits of a case: ours in one call, a package's with each of SGLang's choices behind them."""
    monkeypatch.setattr(bench, "has_indexer", lambda case: True)
    monkeypatch.setattr(bench.upstream, "CANDIDATES", ("package", "broken"))

    def broken(_):
        raise ValueError("no such arch")

    peers = {"ours": contenders.ours, "package": contenders.ours, "broken": broken, "triton": broken}
    choices = {
        "SGLang v1": topk_peers.Peer(places_of_the_best, True),
        "SGLang v2": topk_peers.Peer(functools.partial(places_of_the_best, skip=1), True),
        "torch": topk_peers.Peer(topk_peers.torch_topk),
    }
    case = Case("decode", fp4, 2, 640, heads=8)
    ceilings = {"copy_tbps": 0.001, "mma_tflops": {"fp8_plain": 0.1}}
    results = bench.run_case(case, Cache(CPU), peers, Stopwatch(), ceilings, choices)
    entries = {entry["peer"]: entry for entry in results if entry["kind"] == "indexer"}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "ours": "right", "package + SGLang v1": "right", "package + SGLang v2": "wrong",
        "broken + SGLang v1": "failed", "broken + SGLang v2": "failed",
    }  # fmt: skip
    assert {entry["name"] for entry in entries.values()} == {f"fp{4 if fp4 else 8} indexer 2 x 640"}
    assert entries["ours"]["error"] == 0 and entries["ours"]["cold"]["median_us"] == 100.0
    result = {"device": {"name": "A card"}, "date": "2026-11-24", "ceilings": ceilings, "results": results, "took_s": 1}
    write(result, tmp_path, print)
    lines = (tmp_path / "bench.txt").read_text().splitlines()
    assert "package + SGLang v1" in lines[0] and "100.0 (1.00x)" in next(line for line in lines if "indexer" in line)


def test_which_cases_have_the_indexer() -> None:
    sizes = {(case.fp4, case.rows, case.keys) for case in plan() if indexer.has_indexer(case)}
    k = 1024
    assert sizes == {(fp4, b, n) for fp4 in (False, True) for b in (1, 8, 64) for n in (16 * k, 64 * k, 256 * k)}
    assert any(map(indexer.has_indexer, plan(quick=True)))


@pytest.mark.peer
@pytest.mark.parametrize("version, keys", [("v1", 3072), ("v2", 5120), ("v2", 9216), ("v2", 17408)])
def test_topk_peers_are_launched_right(version, keys, monkeypatch) -> None:
    """SGLang's kernels, built for SM120, in the emulator: parameters, grids and geometry are right."""
    try:
        ptx = topk_peers.build(version, "sm_120a", "ptx").decode()
    except topk_peers.Unavailable as problem:
        pytest.skip(str(problem))
    logits, k, rows = torch.randn((2, keys + 4)), 512, 2
    lengths = torch.tensor([keys, keys - 77], dtype=torch.int32)
    table = torch.randperm(rows * keys // PAGE).int().view(rows, -1)
    out = torch.full((rows, k), -7, dtype=torch.int32)
    buffers = [Buffer.of(tensor, str(n)) for n, tensor in enumerate((logits, lengths, table, out))]

    def emulate(_, name, grid, shared, parameters):
        (entry,) = (line for line in ptx.splitlines() if ".entry" in line and name in line)
        entry = entry.partition(".entry ")[2].partition("(")[0]
        block = (topk_peers._THREADS, 1, 1)
        return lambda: Module(ptx).launch(entry, (*grid, 1), block, bytes(parameters), buffers, shared_bytes=shared)

    monkeypatch.setattr(topk_peers, "_launch", emulate)
    bind = {"v1": topk_peers.sglang_v1, "v2": topk_peers.sglang_v2}[version]
    bind(logits[:, :keys], lengths, table, out)()
    for row in range(rows):
        best = logits[row, : lengths[row]].topk(k).indices
        places = table[row][best // PAGE] * PAGE + best % PAGE
        assert out[row].sort().values.tolist() == places.sort().values.tolist()


def test_topk_peers_are_found_or_said_to_be_missing() -> None:
    found, missing = topk_peers.find()
    assert "torch" in found and not found.keys() & missing.keys() and all(missing.values())
    everybody = {"SGLang v1", "SGLang v2", "SGLang v2 (clusters)", "vLLM persistent", "vLLM per row", "FlashInfer"}
    assert everybody == (found.keys() | missing.keys()) - {"torch"}
