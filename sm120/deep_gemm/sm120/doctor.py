"""What a bug report needs: the machine, the packages, what is ours here and in each framework, whether it computes."""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import deep_gemm

from . import reference, upstream
from .jit import cache, compiler

PACKAGES = ("cuda-bindings", "nvidia-cuda-nvrtc", "numpy")


def report() -> int:
    """Prints every section; returns 1 if the self-test failed anywhere, else 0."""
    sections = {
        "deep_gemm": lambda: [f"{deep_gemm.__version__} in {Path(deep_gemm.__file__).parent}"],
        "system": lambda: [f"{platform.platform()}, Python {platform.python_version()}"],
        "torch": lambda: [f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"],
        "devices": _devices,
        "packages": _packages,
        "compiler": lambda: [f"NVRTC {compiler.nvrtc_version()}"],
        "cache": _cache,
        "upstream": _upstream,
        "ours": lambda: [name for name in deep_gemm._OURS if hasattr(deep_gemm, name)],
        "sglang": lambda: _plugin("sglang"),
        "vllm": lambda: _plugin("vllm"),
        "switches": lambda: [f"{name}={value}" for name, value in os.environ.items() if name.startswith("DG_")],
    }
    for title, section in sections.items():
        _print(title, _attempt(section))
    ok = True
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        passed, lines = _self_test(torch.device(device))
        _print("self-test", lines)
        ok &= passed
    return 0 if ok else 1


def _print(title: str, lines: list[str]) -> None:
    for index, line in enumerate(lines or ["none"]):
        print(f"{'' if index else title:12}{line}")


def _attempt(section: Callable[[], list[str]]) -> list[str]:
    try:
        return section()
    except Exception as error:  # a broken part is what the report is for
        return [f"{type(error).__name__}: {error}"]


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU that PyTorch can use; tensors on the CPU run in the emulator"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        owner = "ours" if deep_gemm._is_ours(torch.device("cuda", index)) else "upstream's"
        lines.append(
            f"cuda:{index} {properties.name}, SM{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory >> 20} MiB: {owner}"
        )
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return [*lines, f"driver for CUDA {version // 1000}.{version % 1000 // 10}"]


def _packages() -> list[str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return [", ".join(f"{name} {version(name)}" for name in PACKAGES)]


def _cache() -> list[str]:
    folder = cache.folder()
    try:
        with cache.opened(folder):
            pass
    except FileNotFoundError:
        pass  # not made yet
    except OSError as error:
        return [f"{folder}: not used, each process compiles anew: {error.strerror}"]
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    access = "writable" if os.access(existing, os.W_OK) else "not writable: each process compiles anew"
    return [f"{folder}: {len(sizes)} files, {sum(sizes) >> 10} KiB, {access}"]


def _upstream() -> list[str]:
    module = upstream.module()
    if module is not None:
        return [f"{module.__name__} from {module.__file__}"]
    return [f"{name}: {reason}" for name, reason in upstream.failures.items()]


def _plugin(framework: str) -> list[str]:
    """The framework's version and launch command; each hook, and whether it is taken here. Imports the framework."""
    return importlib.import_module(f"deep_gemm_plugins.{framework}").PLUGIN.report()


def _self_test(device: torch.device) -> tuple[bool, list[str]]:
    """Runs what is ours on small random problems and compares with float64."""
    if not deep_gemm._is_ours(device):
        return True, [f"{device}: upstream's device"]
    passed, lines = True, []
    for title, allowed, run in _cases(device):
        start = time.perf_counter()
        try:
            error = run()
            good = error < allowed
            verdict = f"{'ok' if good else 'WRONG'}, relative error {error:.1e}, {time.perf_counter() - start:.1f} s"
        except Exception as problem:
            good, verdict = False, f"FAILED, {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        passed &= good
        lines.append(f"{device} {title}: {verdict}")
    return passed, lines


def _cases(device: torch.device) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """What is run, how far off it may be, and how."""
    for fp4 in (False, True):
        name = "FP4" if fp4 else "FP8"
        yield f"{name} paged", 1e-6, lambda fp4=fp4: _paged_error(fp4, device)
        yield f"{name} ragged", 1e-6, lambda fp4=fp4: _ragged_error(fp4, device)
    yield "FP4 sparse", 2**-8, lambda: _sparse_error(device)  # bf16


def _paged_error(fp4: bool, device: torch.device) -> float:
    heads, dim, page, lengths = 64, 128, 64, [0, 37, 300]
    query = _random((3, 1, heads, dim), fp4, device, scaled=fp4)
    values, scales = _random((9, page, dim), fp4, device)
    parts = [part.view(torch.uint8).reshape(9, -1) for part in (values, scales)]
    kv_cache = torch.cat(parts, dim=1).view(9, page, 1, -1)
    weights = torch.randn(3, heads, device=device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)[:, None]
    table = torch.stack([torch.randperm(9)[:5] for _ in lengths]).to(device, torch.int32)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lens, page, 4)
    function = deep_gemm.fp8_fp4_paged_mqa_logits if fp4 else deep_gemm.fp8_paged_mqa_logits
    got = function(query, kv_cache, weights, lens, table, schedule, max(lengths), clean_logits=True)
    return _distance(got, reference.paged_logits(query, kv_cache, weights, lens, table, max(lengths)))


def _ragged_error(fp4: bool, device: torch.device) -> float:
    heads, dim, keys = 64, 128, 200
    query, kv = _random((5, heads, dim), fp4, device, scaled=fp4), _random((keys, dim), fp4, device)
    weights = torch.randn(5, heads, device=device)
    starts = torch.tensor([0, 3, 64, 100, 150], dtype=torch.int32, device=device)
    ends = torch.tensor([1, 200, 64, 129, 151], dtype=torch.int32, device=device)
    function = deep_gemm.fp8_fp4_mqa_logits if fp4 else deep_gemm.fp8_mqa_logits
    got = function(query, kv, weights, starts, ends, clean_logits=True)
    return _distance(got, reference.ragged_logits(query, kv, weights, starts, ends))


def _sparse_error(device: torch.device) -> float:
    heads, dim, keys, width, block = 32, 128, 400, 20, 8
    query, kv = _random((3, heads, dim), True, device), _random((keys, dim), True, device)
    weights = torch.randn(3, heads, device=device).bfloat16()
    starts = torch.zeros(3, dtype=torch.int32, device=device)
    ends = torch.tensor([0, 37, 400], dtype=torch.int32, device=device)
    lists = torch.stack([torch.randperm(max(1, -(-int(end) // block))).repeat(width)[:width] for end in ends])
    lists = lists.to(device, torch.int32)
    metadata = deep_gemm.get_sparse_mqa_logits_metadata(starts, ends, keys, lists, torch.int8, block)
    got = torch.full((3, width * block), -torch.inf, dtype=torch.bfloat16, device=device)
    deep_gemm.fp8_fp4_sparse_mqa_logits(query, kv, weights, metadata, width, block, out=got)
    return _distance(got, reference.ragged_sparse_logits(query, kv, weights, starts, ends, lists, block))


def _random(shape: tuple[int, ...], fp4: bool, device: torch.device, scaled: bool = True):
    """(values, scales) of a token or head each; the values alone unless `scaled`."""
    if fp4:
        values = torch.randint(-128, 128, (*shape[:-1], shape[-1] // 2), dtype=torch.int8)
        scales = torch.randint(125, 130, (*shape[:-1], 4), dtype=torch.uint8).view(torch.int32).squeeze(-1)
    else:
        values, scales = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(shape[:-1]) + 0.5
    return (values.to(device), scales.to(device)) if scaled else values.to(device)


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative norm of the difference; infinite if what should be cleaned is not."""
    inside = want != -torch.inf
    if not (got[~inside] == -torch.inf).all():
        return float("inf")
    return ((got[inside].double() - want[inside]).norm() / want[inside].norm()).item()
