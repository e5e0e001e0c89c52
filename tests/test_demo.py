"""The demo: what it prints and draws, what it calls a failure, and the few sums that it does itself."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import torch

import deep_gemm
from deep_gemm.sm120 import reference


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the demo in this process; returns its exit status and what it printed."""
    for name in ("DG_SM120_ARCH", "DG_SM120_FORCE", "DG_JIT_CACHE_DIR"):  # it sets them; they end with the test
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, {"DG_SM120_FORCE": "1", "DG_SM120_ARCH": "sm_120f"}.get(name, str(tmp_path)))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> tuple[int, str]:
        status = demo.main(list(arguments))
        return status, capsys.readouterr().out

    return call


def cells(printed: str, name: str) -> list[str]:
    """The cells of the table row that starts with `name`."""
    (row,) = [line for line in printed.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for cell in row.split("│")[2:-1]]


def is_picture(path: Path) -> bool:
    from matplotlib.image import imread

    pixels = imread(path)
    return min(pixels.shape[:2]) > 500 and pixels[..., :3].std() > 0.05


def test_the_command(tmp_path) -> None:
    """As `make demo ARGS="--arch sm_120f --save ..."` runs it, at its default size."""
    picture = tmp_path / "demo.png"
    environment = {**os.environ, "PYTHONPATH": str(Path(deep_gemm.__file__).parents[1]), "COLUMNS": "80"}
    command = [sys.executable, demo.__file__, "--arch", "sm_120f", "--save", str(picture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    assert max(map(len, printed.splitlines())) <= 80
    assert cells(printed, "where") == ["PTX emulator, sm_120f, numpy"]
    assert 0.1 < float(cells(printed, "compile time")[0].removesuffix(" s")) < 60
    sms, tiles = deep_gemm.get_num_sms(), 2 + 128 + 512
    spread = f"fewest {tiles // sms}, mean {tiles / sms:.1f}, most {-(-tiles // sms)}"
    assert cells(printed, "work") == [f"{sms} SMs, 32-key tiles: {spread}"]
    for request, keys in enumerate(["37", "4,096", "16,384"], 1):
        length, error, overlap = cells(printed, f"request {request}")
        assert length == keys and 1e-9 < float(error) < 1e-6 and overlap.startswith("100.00%")
    assert cells(printed, "request 0") == ["0", "-", "-"]
    _, instructions, mma, read, written = (number.replace(",", "") for number in cells(printed, "paged logits"))
    assert int(mma) == 642 * 64 and int(instructions) > int(mma)  # 4 x 4 x 4 of m16n8k32 a tile of 32 keys
    assert int(written) == 4 * (37 + 4096 + 16384) and int(read) > 132 * (37 + 4096 + 16384)
    assert is_picture(picture)


@pytest.mark.parametrize(
    "options, mmas",
    [
        (["--fp4"], 16 * 24),  # MMAs of 16 keys and one token, times 20 + 4: tiles are of 32 keys
        (["--heads", "24"], 2 * 4 * 2 * 24),
        (["--next-n", "3"], 3 * 32 * 24),
        (["--arch", "sm_90a", "--heads", "16"], 2 * 4 * 24),
        (["--arch", "sm_100a", "--fp4", "--next-n", "2"], 2 * 32 * 24),
    ],
    ids=["fp4", "heads", "next-n", "sm_90a", "sm_100a"],
)
def test_options(run, options: list[str], mmas: int) -> None:
    arch = options[1] if options[0] == "--arch" else "sm_120f"
    options = options if options[0] == "--arch" else ["--arch", arch, *options]
    status, printed = run("--keys", "300", "0", "40", *options)
    assert status == 0, printed
    assert cells(printed, "where") == [f"PTX emulator, {arch}, numpy"]
    assert ("FP4" if "--fp4" in options else "FP8") in printed.splitlines()[0]
    assert cells(printed, "paged logits")[2] == f"{mmas:,}"
    assert cells(printed, "request 2")[0].endswith("40") and float(cells(printed, "request 2")[1]) < 1e-6


def test_no_keys_at_all(run, tmp_path) -> None:
    status, printed = run("--arch", "sm_120f", "--keys", "0", "--save", str(tmp_path / "empty.png"))
    assert status == 0 and cells(printed, "request 0") == ["0", "-", "-"]
    assert (tmp_path / "empty.png").exists()


@pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])
def test_prefill(run, fp4: bool) -> None:
    status, printed = run("--arch", "sm_120f", "--prefill", "26", "--heads", "8", *["--fp4"] * fp4)
    assert status == 0, printed
    lengths = [(4097 + token) // 4 for token in range(26)]
    assert cells(printed, "paged, ragged") == [f"0 of {sum(lengths):,} logits differ"]
    assert cells(printed, "tokens 0 to 6")[0] == "1,024 to 1,025"
    assert cells(printed, "tokens 21 to 25")[0] == "1,029 to 1,030"
    # Paged, these are few rows, one by one; ragged, neighbours are taken two at a time, the last of them for nobody:
    # 26 of them up to key 1,024, then 23.
    tile = 8 if fp4 else 16  # MMAs of 32 keys and one token
    assert cells(printed, "paged logits")[2] == f"{sum(-(-keys // 32) for keys in lengths) * tile:,}"
    assert cells(printed, "ragged logits")[2] == f"{(32 * 26 + 24) * tile:,}"


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda logits: logits * (1 + 1e-5), "error 1.00e-05, overlap 100.00%"),
        (lambda logits: logits.roll(1, dims=1), "request 1: error"),
        (lambda logits: logits * torch.nan, "error nan"),
    ],
    ids=["scaled", "moved", "nan"],
)
def test_wrong_logits_fail(run, monkeypatch, wrong, said: str) -> None:
    right = deep_gemm.fp8_paged_mqa_logits
    monkeypatch.setattr(deep_gemm, "fp8_paged_mqa_logits", lambda *arguments: wrong(right(*arguments)))
    status, printed = run("--arch", "sm_120f", "--keys", "0", "600", "--heads", "8", "--seed", "7")
    assert status == 1
    assert "FAILED (--seed 7)" in printed and said in " ".join(printed.split())


def test_sparse(run) -> None:
    """Candidates alone give the top 512 that all keys give, those of other blocks masked."""
    status, printed = run("--arch", "sm_120f", "--sparse", "--keys", "0", "37", "17000")
    assert status == 0, printed
    assert cells(printed, "request 0") == ["0", "0", "-", "-"] and cells(printed, "request 1")[3] == "100.00%"
    keys, blocks, error, overlap = cells(printed, "request 2")
    assert (keys, blocks) == ("17,000", "2,048") and 1e-4 < float(error) < 2**-8
    assert float(overlap.split("%")[0]) >= 97


def test_wrong_sparse_logits_fail(run, monkeypatch) -> None:
    right = deep_gemm.fp8_fp4_paged_sparse_mqa_logits
    monkeypatch.setattr(
        deep_gemm, "fp8_fp4_paged_sparse_mqa_logits", lambda *arguments: right(*arguments).roll(8, dims=1)
    )
    status, printed = run("--arch", "sm_120f", "--sparse", "--keys", "1000", "--seed", "7")
    assert status == 1 and "FAILED (--seed 7)" in printed


def test_paged_unlike_ragged_fails(run, monkeypatch) -> None:
    right = deep_gemm.fp8_paged_mqa_logits
    monkeypatch.setattr(deep_gemm, "fp8_paged_mqa_logits", lambda *arguments: right(*arguments) * (1 + 2**-23))
    status, printed = run("--arch", "sm_120f", "--prefill", "2", "--heads", "8")
    assert status == 1 and "FAILED" in printed and float(cells(printed, "tokens 0 to 0")[1]) < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [
        ["--next-n", "0"],
        ["--keys", "-1"],
        ["--prefill", "--next-n", "2"],
        ["--sparse", "--prefill"],
        ["--sparse", "--topk"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2 and "error: --" in capsys.readouterr().err


def test_ties_are_told_from_misses() -> None:
    expected = torch.linspace(1, 2, 1000, dtype=torch.float64).unsqueeze(0)
    lens = torch.tensor([1000])
    expected[0, 487] = expected[0, 488] - 1e-9  # the last that is left out, and the last of the top 512
    tie = expected.float()
    tie[0, 487] = tie[0, 488] + 1e-6
    found = demo.compare("", tie, expected, lens)
    assert (found.shared, found.wanted, found.ties, found.passed) == (511, 512, 1, True)
    miss = expected.float()
    miss[0, [487, 486]] = miss[0, [488, 700]]
    miss[0, 488] = 0
    found = demo.compare("", miss, expected, lens)
    assert found.shared < found.wanted - found.ties and not found.passed


@pytest.mark.parametrize("sms", [7, 20, 48, 188])
def test_tiles_per_sm(sms: int) -> None:
    lengths = torch.randint(0, 3000, (20, 2), dtype=torch.int32)
    lengths[torch.randint(0, 20, (5,))] = 0
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, sms)
    if sms > 20:  # few rows
        tiles = (-(lengths.amax(1) // -32)).tolist()
        for run in itertools.count(1):  # until there is a warp for each
            runs = [min(run, row - first) for row in tiles for first in range(0, row, run)]
            if len(runs) <= 12 * sms:
                break
        assert demo.tiles_per_sm(lengths, schedule).tolist() == [sum(runs[sm::sms]) for sm in range(sms)]
        return
    splits = [(r, s) for r, (a, b) in enumerate(lengths.tolist()) for s in range((max(a, b) + 255) // 256)]
    entries = [tuple(entry) for entry in schedule.tolist()]
    expected = [
        sum(min(8, -(-(int(lengths[r].max()) - 256 * s) // 32)) for r, s in splits if begin <= (r, s) < end)
        for begin, end in zip(entries, entries[1:])
    ]
    assert demo.tiles_per_sm(lengths, schedule).tolist() == expected


def test_quantized_numbers_are_the_nearest() -> None:
    numbers = torch.randn(50, 128)
    fp8 = reference.dequantize(*demo.quantize(numbers, fp4=False))
    assert ((fp8 - numbers).abs() <= numbers.abs() / 16 + numbers.abs().amax(1, keepdim=True) / 448 / 2**9).all()
    values, scales = demo.quantize(numbers, fp4=True)
    fp4 = reference.dequantize(values, scales)
    steps = torch.exp2(scales.view(torch.uint8).view(50, 4).double() - 127).repeat_interleave(32, dim=1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    grid = torch.cat([grid, -grid]) * steps.unsqueeze(-1)
    nearest = (grid - numbers.unsqueeze(-1)).abs().amin(dim=-1)
    torch.testing.assert_close((fp4 - numbers).abs(), nearest)
    assert (numbers.abs() <= 6 * steps).all() and (numbers.abs().view(50, 4, 32).amax(2) > 3 * steps[:, ::32]).all()


@pytest.mark.parametrize("next_n", [1, 2])
def test_the_choice(run, next_n: int) -> None:
    status, printed = run("--topk", "--keys", "37", "700", "--heads", "8", "--next-n", str(next_n))
    assert status == 0, printed
    assert cells(printed, "top 512") == [f"{2 * next_n} of {2 * next_n} tokens choose exactly"]
    assert len(cells(printed, "logits and top 512")) == 5


def test_a_wrong_choice_is_a_failure(run, monkeypatch) -> None:
    right = deep_gemm.sm120.fp8_fp4_paged_mqa_topk

    def wrong(*arguments):
        out = right(*arguments)
        out[1, 7] = out[1, 8]
        return out

    monkeypatch.setattr(deep_gemm.sm120, "fp8_fp4_paged_mqa_topk", wrong)
    status, printed = run("--topk", "--keys", "37", "700", "--heads", "8")
    assert status == 1
    assert "top 512: 1 of 2 tokens choose exactly" in printed
