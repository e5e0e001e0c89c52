"""The whole indexer step, as far as it goes without a card: both sides in the emulator, and what is written."""

import json
import sys
from pathlib import Path

import peer
import pytest
import silicon_step
import substitute
import topk_peers
import torch
from silicon_cases import PAGE, Case, Inputs, Pool
from test_silicon import Emulated

ROOT = Path(__file__).parent.parent
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
K = 96


@pytest.fixture(scope="module")
def tree() -> substitute.Tree:
    made = substitute.Tree("step", ROOT)
    made.use("x1")
    return made


class Kept(Pool):
    def inputs(self, case: Case) -> list[Inputs]:
        self.made = super().inputs(case)
        return self.made


class Kernels:
    """In the place of `PeerKernels`: launches run in the emulator, on the inputs that they point into."""

    def __init__(self, pool: Kept) -> None:
        self.pool = pool

    def bind(self, launch: peer.Launch, form: str):
        addresses = {argument[1] for argument in launch.arguments if isinstance(argument, tuple)}
        it = next(it for it in self.pool.made if it.lengths.data_ptr() in addresses)
        return Emulated(it).bind(launch, form)


class Stopwatch:
    def time(self, calls, launches: int) -> float:
        for call in calls:
            call()
        return 10.0


def choice(logits, lengths, table, out, shift: int = 0):
    """In the place of SGLang's kernels, which take a card: the k largest, or those after the `shift` largest."""

    def call() -> None:
        seen = torch.arange(logits.shape[1]) < lengths[:, None]
        chosen = logits.where(seen, -torch.inf).sort(dim=1, descending=True).indices
        chosen = chosen[:, shift : shift + out.shape[1]]
        out.copy_(table.gather(1, chosen // PAGE) * PAGE + chosen % PAGE)

    return call


@pytest.mark.peer
@FORMATS
def test_all_sides_choose_the_same(fp4: bool, tree: substitute.Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        peer.fetch()
    except peer.PeerUnavailable as problem:
        pytest.skip(f"the peer's wheel cannot be fetched: {str(problem).splitlines()[0]}")
    monkeypatch.setattr(Case, "sets", 1)
    case, pool = Case("decode", fp4, 3, 64 * int(torch.randint(4, 8, ()))), Kept(torch.device("cpu"))
    choices = {"v1": choice, "v2": lambda *arguments: None}
    measured = silicon_step.measure(case, K, "x1", tree, Kernels(pool), Stopwatch(), pool, 8, choices)
    assert list(measured["us"]) == ["NVIDIA's logits", "v1", "our logits", "ours", "one call"]
    assert measured["apart"]["ours"] == measured["apart"]["one call"] == 0 and measured["apart"]["v1"] < 1e-6
    assert silicon_step.right(measured)


def test_a_wrong_choice_shows(tree: substitute.Tree) -> None:
    it = Pool(torch.device("cpu")).inputs(Case("decode", False, 2, 320))[1]
    out = torch.empty((2, K), dtype=torch.int32)
    silicon_step.ours(tree, it, out, 8)["ours"]()
    logits, lengths = it.out.clone(), it.lengths.flatten()

    def distance() -> float:
        return topk_peers.distance(logits, lengths, topk_peers.positions_of(out, it.block_table))

    right = out.clone()
    assert distance() == 0
    for place in (
        int(out[1, 6]),  # twice
        -1,
        int(out[0, 5]),  # another row's page
        len(it.kv_cache) * PAGE + 3,
    ):
        out[1, 5] = place
        assert distance() == float("inf")
        out.copy_(right)
    lengths[0] -= 320 - K // 2
    assert distance() == float("inf")
    lengths[0] = 320
    choice(logits, lengths, it.block_table, out, shift=1)()
    assert silicon_step.TOLERANCE < distance() < 1


def test_what_is_built_is_what_a_card_would_launch(tree: substitute.Tree) -> None:
    """For every case, whatever its size; nothing is launched."""
    names = {kernel.name for case in silicon_step.plan() for kernel in silicon_step.kernels_of(tree, case, 512, 132)}
    assert any("paged_mqa_logits" in name for name in names) and any("topk" in name for name in names)


def report() -> dict:
    us = {"NVIDIA's logits": 5.0, "v1": 40.0, "v2": 30.0, "our logits": 6.0, "ours": 20.0, "one call": 16.0}
    cases = [
        {"name": f"{kind} 1 x 64K", "fp4": kind == "fp4", "k": 512, "us": dict(us), "apart": {"v1": 1e-7, "ours": 0.0}}
        for kind in ("fp8", "fp4")
    ]
    return {
        "date": "2026-01-01",
        "device": "a card",
        "sms": 132,
        "form": "x1",
        "pdl": True,
        "empty_us": 1.0,
        "cases": cases,
    }


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    made = report()
    text = silicon_step.table(made)
    assert "| 1 x 64K | 5.0 | 40.0 | 30.0 | 6.0 | 20.0 | 16.0 | 2.50 | 1.88 |" in text
    assert "FP8, requests" in text and "FP4, requests" in text and "a card, 132 SMs" in text
    document = tmp_path / "performance.md"
    begin, end = silicon_step.MARKS
    document.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    monkeypatch.setattr(silicon_step, "DOCUMENT", document)
    (tmp_path / "step.json").write_text(json.dumps(made))
    monkeypatch.setattr(sys, "argv", ["silicon_step.py", "show", str(tmp_path / "step.json"), "--write"])
    for _ in range(2):
        assert silicon_step.main() == 0
        assert document.read_text() == f"above\n{begin}\n\n{text}\n{end}\nbelow\n"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="silicon_step"):
        silicon_step.main()
    made["cases"][0]["apart"]["v1"] = 0.1
    (tmp_path / "step.json").write_text(json.dumps(made))
    monkeypatch.setattr(sys, "argv", sys.argv[:3])
    assert silicon_step.main() == 1
    assert "| 1 x 64K **wrong** |" in capsys.readouterr().out


def test_the_document_has_its_place() -> None:
    text = silicon_step.DOCUMENT.read_text()
    assert all(text.count(mark) == 1 for mark in silicon_step.MARKS)


def test_without_a_gpu_it_says_what_it_would_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(silicon_step.Built, "build", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["silicon_step.py", "--case", "fp8 1 x 16K", "--case", "fp4 64 x 256K"])
    assert silicon_step.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["  fp8 1 x 16K", "  fp4 64 x 256K"] and "No GPU here" in printed[-3]
