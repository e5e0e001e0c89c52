"""The path that a card sees, without one: load a cubin, find the kernel, pack arguments, launch, read errors.

The process has the real cuda.bindings over a stand-in for libcuda (standin/libcuda.c), which runs launches in the
emulator. What PyTorch's CUDA build would say (current stream, current device) is said by the stand-in as well.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from problems import Paged, Ragged
from standin import driver
from standin.driver import SECOND_DEVICE_STREAM, STREAM
from vector_add import write_header

import deep_gemm
from deep_gemm.sm120 import prepare
from deep_gemm.sm120.jit import compile_kernel, compiler, shipped
from deep_gemm.sm120.kernels import metadata

VECTORS = "from vector_add import *; write_header(Path({headers!r})); kernel = make_kernel()\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs code over the stand-in, with an empty cache; returns what it prints, as JSON."""
    folder = driver.build()

    def run_it(code: str, vectors: bool = False, **environment: str):
        environment = {"DG_JIT_CACHE_DIR": str(tmp_path / "cache"), **environment}
        lines = code.splitlines()
        indent = " " * min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        prelude = indent + VECTORS.format(headers=str(tmp_path / "headers")) if vectors else ""
        return json.loads(driver.run(prelude + code, folder, **environment))

    return run_it


def test_only_who_asks_for_it_finds_it() -> None:
    assert not any("standin" in path for path in sys.path)
    package = Path(deep_gemm.__file__).parent
    assert not list(package.rglob("*libcuda*")) and not list(package.rglob("*standin*"))


def test_vector_add_in_device_memory(run) -> None:
    """Only integers go in: the device's addresses, the stream, the grid."""
    code = f"""
        import ctypes
        from cuda.bindings import driver as cuda
        from deep_gemm.sm120.emulator import Buffer
        from deep_gemm.sm120.jit import runtime
        standin.kernels[kernel.name] = kernel
        a, b = torch.randn(2, 1000)
        total = torch.zeros(1000)
        addresses = [int(cuda.cuMemAlloc(4000)[1]) for _ in range(3)]
        for address, tensor in zip(addresses, (a, b)):
            cuda.cuMemcpyHtoD(address, tensor.data_ptr(), 4000)
        names = ["a", "b", "sum"]
        standin.buffers = [Buffer(name, address, 4000, name == "sum") for name, address in zip(names, addresses)]
        parameters = AddParams(*addresses, 1000)
        runtime._launch_on_gpu(kernel, 0, {STREAM}, (16, 1), parameters)
        cuda.cuMemcpyDtoH(total.data_ptr(), addresses[2], 4000)
        (launch,) = standin.launches
        print(json.dumps({{
            "right": torch.equal(total, a + b), "grid": launch.grid, "block": launch.block, "stream": launch.stream,
            "bytes": launch.parameters == bytes(parameters), "name": launch.kernel,
            "overlapping": launch.overlapping}}))"""
    assert run(code, vectors=True) == {
        "right": True,
        "grid": [16, 1, 1],
        "block": [64, 1, 1],
        "stream": STREAM,
        "bytes": True,
        "name": "vector_add",
        "overlapping": 0,
    }


API = """
        import sys, deep_gemm
        standin.take_over()
        paged, ragged, planned, schedule, logits, prefill = torch.load({path!r}, weights_only=False)
        assert torch.equal(deep_gemm.get_paged_mqa_logits_metadata(paged[3], 64, planned), schedule)
        out = torch.full_like(logits, -77.0)
        deep_gemm.fp8_paged_mqa_logits(*paged, out=out)
        again = deep_gemm.fp8_mqa_logits(*ragged, clean_logits=True)
        """


@pytest.fixture
def problem(tmp_path: Path) -> str:
    """Arguments and the emulator's results for the whole API, in a file."""
    paged, ragged = Paged([0, 37, 300], heads=16, slots=5), Ragged([0, 5, 60], [80, 5, 100], 100, heads=16)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(paged.context_lens, 64, paged.slots)
    logits = deep_gemm.fp8_paged_mqa_logits(*paged.arguments(schedule), out=torch.full((3, 300), -77.0))
    prefill = deep_gemm.fp8_mqa_logits(*ragged.arguments(), clean_logits=True)
    path = tmp_path / "problem.pt"
    torch.save([paged.arguments(schedule), ragged.arguments(), paged.slots, schedule, logits, prefill], path)
    return str(path)


def test_the_whole_api_computes_what_the_emulator_does(run, problem: str) -> None:
    code = API.format(path=problem)
    code += """
        names, loads = [launch.kernel for launch in standin.launches], standin.calls().count("cuLibraryLoadData")
        same = torch.equal(out, logits), torch.equal(again, prefill)
        print(json.dumps([*same, str(standin.problem), names, loads]))"""
    same, same_too, trouble, launches, loads = run(code)
    assert same and same_too, trouble
    plan, paged, ragged, clean = launches
    assert plan == "paged_mqa_logits_metadata_128" and "paged_mqa" in paged and "ragged" in ragged and "clean" in clean
    assert loads == 4


def test_a_loaded_kernel_needs_nothing_but_the_launch(run) -> None:
    code = """
        standin.take_over()
        results = [adds(kernel)]
        standin.calls()
        results += [adds(kernel) for _ in range(5)]
        print(json.dumps([results, standin.calls()]))"""
    assert run(code, vectors=True) == [[True] * 6, []]


def test_a_capture_meets_a_cold_kernel(run) -> None:
    code = """
        standin.take_over()
        standin.capturing(1)
        errors = []
        for stream in (STREAM, 0):  # the captured one, and the default one meanwhile
            standin.stream = stream
            try:
                adds(kernel)
            except RuntimeError as error:
                errors.append(str(error))
        standin.stream, calls = STREAM, standin.calls()
        standin.capturing(0)
        adds(kernel)
        standin.capturing(1)
        standin.calls()
        print(json.dumps([errors, calls, adds(kernel), standin.calls(), len(standin.launches)]))"""
    errors, cold, right, warm, launches = run(code, vectors=True)
    assert len(errors) == 2
    for error in errors:
        assert "vector_add is not ready on cuda:0" in error and "deep_gemm.sm120.warmup()" in error
    assert "cuLibraryLoadData" not in cold  # nothing was loaded in the capture
    assert right and warm == [] and launches == 2


def test_warmup_before_a_capture(run, problem: str) -> None:
    code = """
        from deep_gemm.sm120 import warmup
        names = warmup(heads=16, device="cuda:0", logits_dtype=torch.float32)
        standin.capturing(1)
        standin.calls()"""
    code += API.format(path=problem)
    code += """
        print(json.dumps([names, [launch.kernel for launch in standin.launches], standin.calls(),
                          torch.equal(out, logits) and torch.equal(again, prefill)]))"""
    names, launches, calls, right = run(code)
    assert right and "cuLibraryLoadData" not in calls
    assert set(launches) < set(names) and len(set(launches)) == 4
    # What three rows had no use for: the plan of many, the logits of one, of more and of many.
    plan, *rest = [name for name in names if name not in launches]
    kinds = sorted({name.split("_p64_")[1].split("_")[0] for name in rest})
    assert plan == "paged_mqa_logits_metadata_1024" and kinds == ["few256", "many", "one"]


@pytest.mark.parametrize("heads", [8, 16, 64])
def test_what_is_warm_for_so_many_tokens_is_warm_for_fewer(heads: int, run) -> None:
    code = f"""
        import deep_gemm
        from deep_gemm.sm120 import warmup
        from problems import Paged
        standin.take_over()
        warmup(heads={heads}, next_n=5, ragged=False, device="cuda:0")
        standin.capturing(1)
        problems = [Paged([3] * rows, n, {heads}, slots=4) for n in range(1, 6) for rows in (1, 3, 5)]
        schedule = torch.zeros(5, 2, dtype=torch.int32)
        standin.calls()
        for p in problems:
            deep_gemm.fp8_paged_mqa_logits(*p.arguments(schedule))
        print(json.dumps([len(standin.launches), standin.calls().count("cuLibraryLoadData")]))"""
    assert run(code) == [15, 0]


FAILURES = [
    # call, code, how often, words
    ("cuInit", 100, "CUDA_ERROR_NO_DEVICE"),
    ("cuCtxGetCurrent", 4, "CUDA_ERROR_DEINITIALIZED"),
    ("cuDeviceGet", 101, "CUDA_ERROR_INVALID_DEVICE (invalid device ordinal)"),
    ("cuDevicePrimaryCtxRetain", 2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
    ("cuCtxSetCurrent", 201, "CUDA_ERROR_INVALID_CONTEXT (invalid device context)"),
    ("cuStreamIsCapturing", 400, "CUDA_ERROR_INVALID_HANDLE (invalid resource handle)"),
    ("cuDeviceGetAttribute", 1, "CUDA_ERROR_INVALID_VALUE"),
    ("cuLibraryLoadData", 209, "CUDA_ERROR_NO_BINARY_FOR_GPU (no kernel image is available"),
    ("cuLibraryLoadData", 200, "CUDA_ERROR_INVALID_IMAGE (device kernel image is invalid)"),
    ("cuLibraryLoadData", 2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
    ("cuLibraryGetKernel", 500, "CUDA_ERROR_NOT_FOUND (named symbol not found)"),
    ("cuLaunchKernel", 2, "CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
    ("cuLaunchKernel", 719, "CUDA_ERROR_LAUNCH_FAILED"),
]


def test_every_failure_is_one_clear_error_and_leaves_nothing_behind(run) -> None:
    code = f"""
        from deep_gemm.sm120.jit import runtime
        standin.take_over()
        once = [value for value in vars(runtime).values() if hasattr(value, "cache_clear")]
        found = []
        for call, code, _ in {FAILURES!r}:
            runtime._loaded.clear()
            for function in once:
                function.cache_clear()
            ctypes.CDLL("libcuda.so.1")
            kernel = make_kernel()
            standin.fail(call, code)
            before = len(standin.launches)
            try:
                adds(kernel)
                found.append(["nothing", "no error"])
            except Exception as error:
                found.append([type(error).__name__, str(error)])
            found[-1] += [len(standin.launches) - before, len(runtime._loaded), adds(kernel)]
        print(json.dumps([found, standin.calls().count("cuLibraryUnload")]))"""
    found, unloaded = run(code, vectors=True)
    for (call, _, words), (kind, message, launches, loaded, afterwards) in zip(FAILURES, found, strict=True):
        assert kind in ("RuntimeError", "DriverError"), (call, message)
        assert "vector_add cannot be" in message and "cuda:0" in message and words in message, (call, message)
        assert "\n" not in message and launches == 0, (call, message)
        assert loaded == (1 if call == "cuLaunchKernel" else 0), call
        assert afterwards is True, call  # the next call works
    assert unloaded == 1  # the library without the kernel


def test_a_sticky_error(run) -> None:
    """A kernel that runs wild leaves the context broken: the next calls fail too, in the driver's words."""
    code = """
        standin.take_over()
        wild, errors = make_kernel("wild", "    add(p); p.sum[1000000] = 1;"), []
        for victim in (wild, kernel, wild):
            try:
                adds(victim)
            except RuntimeError as error:
                errors.append(str(error))
        print(json.dumps([errors, str(standin.problem)]))"""
    errors, problem = run(code, vectors=True)
    assert "outside" in problem or "no buffer" in problem, problem
    for name, error in zip(("wild", "vector_add", "wild"), errors, strict=True):
        assert name in error and "cuda:0" in error and "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access" in error


@pytest.mark.parametrize(
    "sm, arch", [(120, "sm_120f"), (121, "sm_120f"), (89, "sm_89"), (90, "sm_90a"), (100, "sm_100a")]
)
def test_each_card_gets_a_cubin_that_it_takes(run, tmp_path: Path, sm: int, arch: str) -> None:
    code = f"""
        standin.take_over()
        standin.sm({sm})
        print(json.dumps(adds(kernel)))"""
    assert run(code, vectors=True, DG_JIT_DUMP_DIR=str(tmp_path / "dump")) is True
    assert (tmp_path / "dump" / f"vector_add.{arch}.cubin").exists()


def test_a_cubin_for_another_card(run) -> None:
    """Not a made-up failure: the stand-in reads the SM out of the cubin, as a driver does."""
    code = """
        from deep_gemm.sm120.jit import runtime
        standin.take_over()
        runtime._architecture_of_gpu = lambda index: "sm_90a"
        try:
            adds(kernel)
        except RuntimeError as error:
            print(json.dumps(str(error)))"""
    error = run(code, vectors=True)
    assert "vector_add cannot be made ready on cuda:0" in error
    assert "sm_90a on SM120, driver for CUDA 13.0: CUDA_ERROR_NO_BINARY_FOR_GPU" in error


def test_another_device_than_the_current_one(run) -> None:
    code = f"""
        from cuda.bindings import driver as cuda
        from deep_gemm.sm120.jit import runtime
        from deep_gemm.sm120.emulator import Buffer
        standin.kernels[kernel.name] = kernel
        standin.library.standin_on_launch(standin._callback)
        x = torch.randn(64)
        standin.buffers = [Buffer.of(x, "x")]
        parameters = AddParams(x.data_ptr(), x.data_ptr(), x.data_ptr(), 64)
        before = cuda.cuCtxGetCurrent()[1]
        runtime._launch_on_gpu(kernel, 1, {SECOND_DEVICE_STREAM}, (1, 1), parameters)
        runtime._launch_on_gpu(kernel, 1, 0, (1, 1), parameters)
        runtime._launch_on_gpu(kernel, 0, {STREAM}, (1, 1), parameters)
        left = []
        for index in (1, 0):  # a thread's context is its own again after a call for another device
            mine = cuda.CUcontext(int(runtime._primary_context(1 - index)))
            cuda.cuCtxSetCurrent(mine)
            standin.device = 1 - index
            runtime._launch_on_gpu(kernel, index, SECOND_DEVICE_STREAM if index else STREAM, (1, 1), parameters)
            left.append(int(cuda.cuCtxGetCurrent()[1]) == int(mine))
        print(json.dumps([[launch.device for launch in standin.launches], int(before), left]))"""
    assert run(code, vectors=True) == [[1, 1, 0, 1, 0], 0, [True, True]]


def test_threads_that_have_no_context(run) -> None:
    code = """
        import threading
        standin.take_over()
        assert adds(kernel)
        results = []
        def call():
            results.append(adds(kernel))
        for _ in range(3):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        print(json.dumps(results))"""
    assert run(code, vectors=True) == [True] * 3


@pytest.mark.parametrize("sm, expected", [(120, [0, 1, 0]), (90, [0, 1, 0]), (89, [0, 0, 0])])
def test_overlapping_launches(run, sm: int, expected: list[int]) -> None:
    code = f"""
        import deep_gemm.sm120 as sm120
        standin.take_over()
        standin.sm({sm})
        assert not sm120.get_pdl()
        results = [adds(kernel)]
        for enable in (True, False):
            sm120.set_pdl(enable)
            results += [adds(kernel), sm120.get_pdl() is enable]
        shapes = [[launch.grid, launch.block, launch.stream] for launch in standin.launches]
        print(json.dumps([results, [launch.overlapping for launch in standin.launches], shapes[0] == shapes[1]]))"""
    assert run(code, vectors=True) == [[True] * 5, expected, True]


# ---- kernels that came with the wheel -------------------------------------------------------------------------------

NO_COMPILER = """
        import os, site
        site.getsitepackages, site.ENABLE_USER_SITE = lambda: [], False
        for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
            os.environ.pop(name, None)
        from deep_gemm.sm120.jit import compiler
        try:
            compiler.nvrtc_version()
            raise SystemExit(print('"NVRTC"'))
        except compiler.CompileError:
            pass
        """
SHIPPED = """
        from deep_gemm.sm120.jit import shipped
        shipped.FOLDER, standin.ptx = Path({folder!r}), Path({folder!r})
        """


def without_compiler(result):
    if result == "NVRTC":
        pytest.skip("the system's own loader finds an NVRTC")
    return result


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as in the wheel, with the kernels of `problem`, and their PTX for the emulator."""
    folder = tmp_path / "shipped"
    monkeypatch.setenv("DG_JIT_DUMP_DIR", str(folder))
    kernels = prepare._kernels("sm_120f", 16, 128, 64, False, 1, True, True, torch.float32, torch.float32, alignment=32)
    shipped.write(folder, kernels, "sm_120f")
    monkeypatch.delenv("DG_JIT_DUMP_DIR")
    return folder


def test_the_first_call_needs_no_compiler(run, problem: str, wheel: Path) -> None:
    code = NO_COMPILER + SHIPPED.format(folder=str(wheel)) + API.format(path=problem)
    code += """
        print(json.dumps([torch.equal(out, logits) and torch.equal(again, prefill), len(standin.launches)]))"""
    assert without_compiler(run(code)) == [True, 4]


def test_what_is_not_shipped_and_cannot_be_compiled(run, wheel: Path) -> None:
    code = (
        NO_COMPILER
        + SHIPPED.format(folder=str(wheel))
        + """
        from deep_gemm.sm120 import warmup
        try:
            warmup(heads=24, device="cuda:0")
        except RuntimeError as error:
            print(json.dumps(str(error)))"""
    )
    assert "pip install nvidia-cuda-nvrtc" in without_compiler(run(code))


@pytest.mark.parametrize("spoil", ["another card", "garbage", "missing", "no index"])
def test_shipped_kernels_that_do_not_load_are_compiled(run, problem: str, wheel: Path, spoil: str) -> None:
    for cubin in wheel.glob("*.cubin"):
        if spoil == "another card":
            cubin.write_bytes(compile_kernel(metadata.FEW, "sm_90a", "cubin"))
        elif spoil == "garbage":
            cubin.write_bytes(bytes(range(256)) * 8)
        elif spoil == "missing":
            cubin.unlink()
        else:
            (wheel / "index.json").write_text("{")
    code = (
        SHIPPED.format(folder=str(wheel))
        + """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")"""
        + API.format(path=problem).replace("\n        ", "\n            ")
    )
    code += """
        right = torch.equal(out, logits) and torch.equal(again, prefill)
        print(json.dumps([right, [str(warning.message) for warning in caught]]))"""
    right, warned = run(code)
    assert right
    if spoil in ("missing", "no index"):
        assert warned == []
    else:
        (message,) = warned  # one, though no kernel loads
        assert "compiled instead (paged_mqa_logits_metadata_128 on cuda:0" in message
        assert ("CUDA_ERROR_NO_BINARY_FOR_GPU" if spoil == "another card" else "CUDA_ERROR_INVALID_IMAGE") in message


def test_an_edited_header_is_not_answered_with_a_shipped_kernel(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", wheel)
    shipped._index.cache_clear()
    try:
        assert shipped.find(metadata.FEW, "sm_120f") == compile_kernel(metadata.FEW, "sm_120f", "cubin")
        assert shipped.find(metadata.FEW, "sm_121f") is None
        shutil.copytree(compiler.HEADERS, tmp_path / "edited")
        with (tmp_path / "edited" / "window.cuh").open("a") as header:
            header.write("// edited")
        monkeypatch.setattr(compiler, "HEADERS", tmp_path / "edited")
        assert shipped.find(metadata.FEW, "sm_120f") is None
    finally:
        shipped._index.cache_clear()


def test_the_source_tree_ships_nothing() -> None:
    if not (Path(deep_gemm.__file__).parent / "VERSION").exists():
        assert not shipped.FOLDER.exists()


def test_no_driver_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    monkeypatch.setattr(compiler, "HEADERS", None)  # restored afterwards
    write_header(tmp_path / "headers")
    with pytest.raises(RuntimeError, match="libcuda"):
        deep_gemm.sm120.warmup(device="cuda:0")
