"""`python -m deep_gemm.sm120 doctor`."""

import pytest
import torch

import deep_gemm
from deep_gemm.sm120 import doctor


def test_the_report_has_every_section_and_a_self_test_that_passes(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DG_SM120_FORCE", "0")
    assert doctor.report() == 0
    text = capsys.readouterr().out
    for title in (
        "deep_gemm",
        "torch",
        "devices",
        "compiler",
        "cache",
        "upstream",
        "ours",
        "sglang",
        "vllm",
        "self-test",
    ):
        assert f"\n{title}" in f"\n{text}"
    assert deep_gemm.__version__ in text and torch.__version__ in text
    assert "DG_SM120_FORCE=0" in text
    assert text.count(": ok, ") == 5 * (1 + torch.cuda.device_count())


def test_the_self_test_notices_wrong_logits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = deep_gemm.fp8_mqa_logits
    monkeypatch.setattr(deep_gemm, "fp8_mqa_logits", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert doctor.report() == 1
    assert "FP8 ragged: WRONG" in capsys.readouterr().out


def test_what_is_broken_is_reported_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor.compiler, "nvrtc_version", broken)
    doctor.report()
    assert "RuntimeError: no compiler" in capsys.readouterr().out
