"""The same source for other cards, and the plain MMA on SM12x: compiled for each, run in the emulator."""

import pytest
import torch
from problems import Paged, Ragged, Sparse, check, poisoned

import deep_gemm
from deep_gemm.sm120 import checks, paged, ragged
from deep_gemm.sm120.emulator import recording
from deep_gemm.sm120.jit import compiler
from deep_gemm.sm120.kernels import clean, logits, metadata

OTHERS = ["sm_89", "sm_90a", "sm_100a", "sm_121f"]
BLOCK_SCALED_FP8 = "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.e4m3.e4m3.f32.ue8m0"
PLAIN_FP8 = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
FP4 = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue8m0"
MXFP8 = BLOCK_SCALED_FP8
FORMATS = pytest.mark.parametrize("fp4", [False, True], ids=["fp8", "fp4"])


def run(heads: int, dim: int, fp4: bool) -> set[str]:
    """A paged and a ragged problem against float64; the MMA instructions that were executed."""
    paged = Paged([[0, 37, 300], [5, 600, 0]], next_n=3, heads=heads, dim=dim, fp4=fp4, slots=7)
    ragged = Ragged([0, 5, 9], [300, 5, 77], 300, heads=heads, dim=dim, fp4=fp4)
    with recording() as launches:
        schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, 7)
        out = poisoned(6, 600)
        check(deep_gemm.fp8_fp4_paged_mqa_logits(*paged.arguments(schedule), out=out), paged.expected())
        out = poisoned(3, 300)
        check(deep_gemm.fp8_fp4_mqa_logits(*ragged.arguments(), True, out=out), ragged.expected(), cleaned=True)
    return {opcode for launch in launches for opcode in launch.instructions if opcode.startswith("mma")}


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("heads, dim", [(64, 128), (24, 64)])
@FORMATS
def test_other_cards(arch: str, heads: int, dim: int, fp4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no block-scaled MMA, FP4 is widened to FP8."""
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    native = FP4 if fp4 else BLOCK_SCALED_FP8
    assert run(heads, dim, fp4) == {native if arch.startswith("sm_12") else PLAIN_FP8}


@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a"])
@pytest.mark.parametrize("layout", [{"page": 64, "few_rows": True}, {"page": 16}, {"page": 0}], ids=str)
@FORMATS
def test_the_compiler_has_nothing_to_say(arch: str, layout: dict, fp4: bool) -> None:
    """A function that returns nothing it should is a warning to it, and anything to the card."""
    config = logits.configure(arch, fp4, 16, 64, weights=torch.float32, logits=torch.bfloat16, **layout)
    nvrtc, options = compiler._bindings(), [*compiler._options(arch), f"--include-path={compiler.HEADERS}"]
    for kernel in (config.kernel, *metadata.KERNELS, clean.kernel(torch.float32)):
        _, program = nvrtc.nvrtcCreateProgram(kernel.source.encode(), b"", 0, [], [])
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = compiler._fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().strip("\0\n")
        assert not error and not log, log


@pytest.mark.parametrize("arch", ["sm_120f", *OTHERS])
@pytest.mark.parametrize("heads, block_kv", [(32, 64), (24, 0)])
@FORMATS
def test_sparse_on_other_cards(
    arch: str, heads: int, block_kv: int, fp4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the MMA knows no scales they are applied to the products of every 32 elements."""
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    with recording() as launches:
        for rows in (1, 4, 150):
            lengths = ([300, 0, 37, 100] * 38)[:rows]
            problem = Sparse(lengths, width=20, heads=heads, block_kv=block_kv, fp4=fp4)
            out = poisoned(len(problem.lengths), 160, torch.bfloat16)
            check(problem.logits(problem.metadata(), out), problem.expected())
    executed = {opcode for launch in launches for opcode in launch.instructions if opcode.startswith("mma")}
    assert executed == {(FP4 if fp4 else MXFP8) if arch.startswith("sm_12") else PLAIN_FP8}


@pytest.mark.parametrize("choice, opcode", [("plain", PLAIN_FP8), ("block_scaled", BLOCK_SCALED_FP8)])
def test_choice_of_the_fp8_mma(choice: str, opcode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_SM120_FP8_MMA", choice)
    monkeypatch.setattr(logits, "configure", logits.Config)  # the switch is read when a configuration is first used
    for module in (paged, ragged):
        monkeypatch.setattr(module, "_known", checks.Known())
    assert run(64, 128, False) == {opcode}
    assert run(16, 64, True) == {FP4}


@pytest.mark.parametrize("exponents", [(0, 255), (1, 254), (0, 1), (250, 254)])
@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a"])
def test_scales_at_the_ends_of_their_range(arch: str, exponents: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^-127, 2^127 and NaN (255) as scales of FP4 keys: the same places are infinite, NaN or finite as in float64 that
    is rounded to fp32 in the end."""
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    problem = Ragged([0] * 3, [40] * 3, 40, heads=8, fp4=True)
    values, scales = problem.kv
    scales.view(torch.uint8).view(40, 4)[::3] = torch.tensor(exponents * 2, dtype=torch.uint8)
    out = poisoned(3, 40)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    ordinary = torch.arange(40) % 3 != 0
    check(out[:, ordinary], problem.expected()[:, ordinary])
    if 255 in exponents:
        assert out[:, ::3].isnan().all()
    assert (out != -123456.75).all()


@pytest.mark.parametrize("arch", ["sm_120f", "sm_90a"])
def test_the_smallest_scale(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale byte of 0 is 2^-127, which fp32 has among its subnormals only. Large query scales bring it back."""
    monkeypatch.setenv("DG_SM120_ARCH", arch)
    problem = Ragged([0] * 3, [40] * 3, 40, heads=8, fp4=True)
    problem.kv[1].zero_()
    problem.q[1].fill_(int.from_bytes([187] * 4, "little") - 2**32)
    out = torch.full((3, 40), -123456.75)
    deep_gemm.fp8_fp4_mqa_logits(*problem.arguments(), out=out)
    check(out, problem.expected())
    assert 0 < out.abs().max() < 1e-12
