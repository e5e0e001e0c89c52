"""The JIT around a vector-add: what it compiles, keeps, finds again, and how it fails."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vector_add import HEADER, add, adds, make_kernel, write_header

import deep_gemm
from deep_gemm.sm120.jit import CompileError, cache, compile_kernel, compiler

TESTS = Path(__file__).parent
PACKAGE_ROOT = Path(deep_gemm.__file__).parent.parent
ARCH = "sm_120f"


@pytest.fixture(autouse=True)
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tests' own headers and an empty cache."""
    monkeypatch.setattr(compiler, "HEADERS", None)  # restored afterwards
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DG_JIT_DUMP_DIR", raising=False)
    monkeypatch.setattr(cache, "_said", set())
    write_header(tmp_path / "headers")
    return tmp_path / "headers"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVRTC was asked for, as it is asked."""
    asked, real = [], compiler._nvrtc

    def counted(kernel, arch, target):
        asked.append(f"{kernel.name} {arch} {target}")
        return real(kernel, arch, target)

    monkeypatch.setattr(compiler, "_nvrtc", counted)
    return asked


def run(code: str, prefix: list[str] = (), **environment: str) -> str:
    """What `code` prints in an interpreter of its own, with the headers and the cache folder of this test."""
    prelude = f"from pathlib import Path; from vector_add import *; write_header(Path({str(compiler.HEADERS)!r}))\n"
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{TESTS}", **environment}
    command = [*prefix, sys.executable, "-c", prelude + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_whole(folder: Path) -> None:
    """No entry is cut short, and nothing lies around that was on its way to become one."""
    for path in entries(folder):
        content = path.read_bytes()
        assert cache.digest(content[32:]) == content[:32] and len(path.name) == 64, path


# ---- compile and run -------------------------------------------------------------------------------------------------


def test_vector_add(device: str) -> None:
    assert adds(make_kernel(), device)


def test_no_tensor_but_those_handed_in(device: str) -> None:
    if device != "cpu":
        pytest.skip("the emulator's")
    kernel = make_kernel(body="    add(p); p.sum[p.count] = 0;")
    with pytest.raises(RuntimeError, match="sum"):
        add(kernel, torch.randn(128), torch.randn(128))


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_100a", "sm_120a", "sm_120f", "sm_121a"])
def test_every_architecture(arch: str) -> None:
    assert b".target " + arch.encode() in compile_kernel(make_kernel(), arch, "ptx")
    assert compile_kernel(make_kernel(), arch, "cubin")[:4] == b"\x7fELF"


def test_the_compilers_log_is_in_the_error(compilations: list[str]) -> None:
    kernel = make_kernel(body="    add(q);")
    for _ in range(2):  # a failure is not kept
        with pytest.raises(CompileError, match=r'(?s)refuses vector_add.*identifier "q" is undefined.*add\(q\)'):
            compile_kernel(kernel, ARCH, "ptx")
    assert len(compilations) == 2


def test_a_struct_that_differs_from_its_mirror_is_refused(headers: Path) -> None:
    write_header(headers, HEADER.replace("int count;", "int count, more, still_more;"))
    with pytest.raises(CompileError, match="static assertion"):
        compile_kernel(make_kernel(), ARCH, "ptx")


# ---- hit and miss ----------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_compiled(compilations: list[str]) -> None:
    first = compile_kernel(make_kernel(), ARCH, "ptx")
    assert compile_kernel(make_kernel(), ARCH, "ptx") == first
    assert len(compilations) == 1
    assert adds(make_kernel()) and len(compilations) == 1


def test_another_process_finds_it(compilations: list[str]) -> None:
    compile_kernel(make_kernel(), ARCH, "ptx")
    code = """
        from deep_gemm.sm120.jit import compiler
        def refuse(*_): raise AssertionError("compiled again")
        compiler._nvrtc = refuse
        print(adds(make_kernel()))"""
    assert run(code) == "True"


def test_a_loaded_kernel_needs_no_folder(tmp_path: Path, compilations: list[str]) -> None:
    kernel = make_kernel()
    assert adds(kernel)
    for path in entries(tmp_path / "cache"):
        path.unlink()
    assert adds(kernel) and len(compilations) == 1


def change_source(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    return make_kernel(body="    add(p);  // changed"), ARCH, "ptx"


def change_name(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    return make_kernel(name="another"), ARCH, "ptx"


def change_architecture(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    return make_kernel(), "sm_121a", "ptx"


def change_target(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    return make_kernel(), ARCH, "cubin"


def change_its_header(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    write_header(headers, HEADER + "// changed")
    return make_kernel(), ARCH, "ptx"


def change_another_header(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    (headers / "other.cuh").write_text("// included by others")
    return make_kernel(), ARCH, "ptx"


def change_options(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    patch.setattr(compiler, "_options", lambda arch: [f"--gpu-architecture={arch}", "--std=c++20"])
    return make_kernel(), ARCH, "ptx"


def change_compiler(headers: Path, patch: pytest.MonkeyPatch) -> tuple:
    patch.setattr(compiler, "nvrtc_version", lambda: "13.7")
    return make_kernel(), ARCH, "ptx"


@pytest.mark.parametrize(
    "change",
    [
        change_source,
        change_name,
        change_architecture,
        change_target,
        change_its_header,
        change_another_header,
        change_options,
        change_compiler,
    ],
)
def test_whatever_the_binary_depends_on_is_in_the_key(
    change: Callable, headers: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernel(make_kernel(), ARCH, "ptx")
    changed = change(headers, monkeypatch)
    compile_kernel(*changed)
    assert len(compilations) == 2
    compile_kernel(*changed)
    assert len(compilations) == 2


def test_a_header_changed_while_running_is_seen(headers: Path, device: str) -> None:
    assert adds(make_kernel(), device)
    write_header(headers, HEADER.replace("p.a[i] + p.b[i]", "p.a[i] - p.b[i]"))
    a, b = torch.randn(2, 100, device=device)
    assert torch.equal(add(make_kernel(), a, b), a - b)


# ---- a cache that is broken, or out of reach -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[:-7], lambda content: content[:20], lambda content: b"", lambda content: os.urandom(5000)],
    ids=["truncated", "only a piece of the checksum", "empty", "garbage"],
)
def test_a_broken_entry_is_compiled_anew_and_repaired(tmp_path: Path, compilations: list[str], spoil) -> None:
    good = compile_kernel(make_kernel(), ARCH, "ptx")
    (entry,) = entries(tmp_path / "cache")
    whole = entry.read_bytes()
    entry.write_bytes(spoil(whole))
    assert compile_kernel(make_kernel(), ARCH, "ptx") == good
    assert len(compilations) == 2 and entry.read_bytes() == whole
    assert adds(make_kernel()) and len(compilations) == 2


def test_an_entry_that_is_a_folder(tmp_path: Path) -> None:
    good = compile_kernel(make_kernel(), ARCH, "ptx")
    (entry,) = entries(tmp_path / "cache")
    entry.unlink()
    entry.mkdir()
    assert compile_kernel(make_kernel(), ARCH, "ptx") == good


def test_a_folder_full_of_garbage(tmp_path: Path) -> None:
    for name in ("entries", "something", "something/ab"):
        (tmp_path / "cache" / name).mkdir(parents=True, exist_ok=True)
        for number in range(5):
            (tmp_path / "cache" / name / f"garbage{number}").write_bytes(os.urandom(100))
    assert adds(make_kernel())


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert adds(make_kernel())
    assert (tmp_path / "cache").read_text() == "not a folder"


def test_the_folder_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_JIT_CACHE_DIR", "/proc/nowhere")  # not even root can
    assert adds(make_kernel())


def test_the_folder_disappears_while_running(tmp_path: Path, compilations: list[str]) -> None:
    compile_kernel(make_kernel(), ARCH, "ptx")
    subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
    assert adds(make_kernel(name="another")) and len(compilations) == 2
    assert entries(tmp_path / "cache")  # made again, and used


def test_it_disappears_between_look_up_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adds(make_kernel(name="another"))
    real = compiler._nvrtc

    def compile_and_remove(*args):
        subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
        return real(*args)

    monkeypatch.setattr(compiler, "_nvrtc", compile_and_remove)
    assert adds(make_kernel())


def own_mounts(commands: str) -> list[str]:
    """A prefix that runs `commands` and then a program with mounts of its own; skips where that is not allowed."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{commands} && exec "$@"', "sh"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mounts of our own here: {error}")
    return prefix


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "cache"
    disk.mkdir()
    prefix = own_mounts(f"mount -t tmpfs -o size=16k tmpfs {disk}")
    code = f"""
        import errno
        disk = Path({str(disk)!r})
        try:
            (disk / "fill").write_bytes(bytes(10**6))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        print(adds(make_kernel()), adds(make_kernel(name="another")))
        print([path.name for path in disk.rglob("*") if path.is_file()])"""
    assert run(code, prefix) == "True True\n['fill']"


def test_a_file_that_must_not_grow(tmp_path: Path) -> None:
    """Another way to run out of disk, which needs no mount: the write of the entry stops half-way."""
    code = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        print(adds(make_kernel()))"""
    assert run(code) == "True"
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("filled", [True, False])
def test_a_read_only_folder(tmp_path: Path, filled: bool) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if filled:
        compile_kernel(make_kernel(), ARCH, "ptx")
    before = entries(folder)
    prefix = own_mounts(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")
    code = f"""
        from deep_gemm.sm120.jit import compiler
        compiled, real = [], compiler._nvrtc
        compiler._nvrtc = lambda *args: compiled.append(args) or real(*args)
        try:
            Path({str(folder)!r}, "file").touch()
        except OSError:
            print(adds(make_kernel()), len(compiled))"""
    assert run(code, prefix) == f"True {0 if filled else 1}"  # what is there is used
    assert entries(folder) == before


def test_no_home_and_nowhere_to_write() -> None:
    code = "import os; [os.environ.pop(name, None) for name in ('HOME', 'XDG_CACHE_HOME')]; print(adds(make_kernel()))"
    assert run(code, DG_JIT_CACHE_DIR="", TMPDIR="/nonexistent") == "True"


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("DG_JIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/deep_gemm_sm120")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache.folder() == Path("/home/somebody/.cache/deep_gemm_sm120")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    assert cache.folder() == tmp_path / f"deep_gemm_sm120-{os.geteuid()}"


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_sixteen_processes_and_one_empty_cache(tmp_path: Path) -> None:
    """They start together (released by one pipe), after a fork from a process that has imported everything."""
    code = """
        import os, sys
        from deep_gemm.sm120.jit import compile_kernel
        kernel = make_kernel()
        ready, release = os.pipe()
        children = []
        for _ in range(16):
            child = os.fork()
            if child == 0:
                os.close(release)
                os.read(ready, 1)  # until the parent closes it
                torch.manual_seed(os.getpid())
                os._exit(0 if adds(kernel) and compile_kernel(kernel, "sm_120f", "cubin") else 1)
            children.append(child)
        os.close(release)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])"""
    assert run(code) == str([0] * 16)
    assert len(entries(tmp_path / "cache")) == 2
    assert_whole(tmp_path / "cache")


def test_threads_at_once(tmp_path: Path, compilations: list[str], device: str) -> None:
    kernel, start, results = make_kernel(), threading.Barrier(8), []

    def call() -> None:
        start.wait()
        results.append(adds(kernel, device))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len(compilations) == 1  # the others waited
    assert_whole(tmp_path / "cache")


def test_a_failure_in_one_thread_does_not_block_the_others() -> None:
    broken = make_kernel(body="    nonsense")
    for _ in range(2):
        with pytest.raises(CompileError):
            adds(broken)
    assert adds(make_kernel())


def test_a_fork_while_another_thread_compiles() -> None:
    """The child inherits the lock as it was; it must not wait for a thread that it does not have."""
    code = """
        import os, threading
        from deep_gemm.sm120.jit import compiler
        compiling, go_on, real = threading.Event(), threading.Event(), compiler._nvrtc
        def slow(*args):
            compiling.set()
            go_on.wait()
            return real(*args)
        compiler._nvrtc = slow
        thread = threading.Thread(target=adds, args=[make_kernel(name="slow")])
        thread.start()
        compiling.wait()
        child = os.fork()
        if child == 0:
            compiler._nvrtc = real
            os._exit(0 if adds(make_kernel()) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        go_on.set()
        thread.join()"""
    assert run(code) == "0"


def test_a_fork_after_use() -> None:
    code = """
        import os
        kernel = make_kernel()
        assert adds(kernel)
        child = os.fork()
        if child == 0:
            os._exit(0 if adds(kernel) and adds(make_kernel(name="another")) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    assert run(code) == "0"


def test_processes_that_are_spawned(tmp_path: Path) -> None:
    """They inherit nothing but what the program says, as vLLM's workers do, and share one empty cache."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import multiprocessing, sys
            from pathlib import Path
            from vector_add import *

            def work(number):
                write_header(Path(sys.argv[1]))
                return adds(make_kernel())

            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(3) as pool:
                    print(pool.map(work, range(6)))""")
    )
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{TESTS}"}
    command = [sys.executable, program, str(compiler.HEADERS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str([True] * 6), done.stderr
    assert len(entries(tmp_path / "cache")) == 1
    assert_whole(tmp_path / "cache")


@pytest.mark.parametrize("way", ["daemon", "thread", "exception", "killed"])
def test_the_interpreter_ends_while_a_kernel_compiles(tmp_path: Path, way: str) -> None:
    """It ends after the compilation, without a crash; what is kept is whole."""
    code = f"""
        import os, signal, sys, threading
        compiling, real = threading.Event(), compiler._nvrtc
        def announced(*args):
            compiling.set()
            return real(*args)
        compiler._nvrtc = announced
        # Long to compile: a chain of a thousand different additions.
        body = "add(p);" + "".join(f" if (p.count == {{n}}) p.sum[{{n}}] += __sinf(p.a[{{n}}]);" for n in range(1000))
        def work():
            print("compiled", adds(make_kernel(body=body)))
        threading.Thread(target=work, daemon={way != "thread"}).start()
        compiling.wait()
        print("ends", flush=True)
        if {way!r} == "exception":
            raise SystemExit(0)
        if {way!r} == "killed":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            os.kill(os.getpid(), signal.SIGTERM)"""
    lines = run(code).splitlines()
    assert lines == ["ends", "compiled True"] or way != "thread" and lines == ["ends"]
    assert len(entries(tmp_path / "cache")) == 1
    assert_whole(tmp_path / "cache")
    assert adds(make_kernel())


def test_an_interrupted_compilation_is_begun_anew() -> None:
    """Ctrl-C releases the lock, and leaves nothing half-made."""
    code = """
        from deep_gemm.sm120.jit import runtime
        real = compiler._nvrtc
        def interrupted(*args):
            raise KeyboardInterrupt
        compiler._nvrtc = interrupted
        kernel = make_kernel()
        try:
            adds(kernel)
        except KeyboardInterrupt:
            print("interrupted", runtime._loading.locked(), len(runtime._loaded))
        compiler._nvrtc = real
        print(adds(kernel))"""
    assert run(code).splitlines() == ["interrupted False 0", "True"]


# ---- the dump --------------------------------------------------------------------------------------------------------


def test_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("DG_JIT_DUMP_DIR", str(tmp_path / "a" / "dump"))
    kernel = make_kernel()
    assert adds(kernel, device)
    files = {path.suffix: path for path in (tmp_path / "a" / "dump").iterdir()}
    assert files.keys() == {".cu", ".ptx", ".cubin"}
    assert len({path.stem for path in files.values()}) == 1 and files[".cu"].name.startswith("vector_add.sm_")
    assert files[".cu"].read_text() == kernel.source
    assert ".entry vector_add(" in files[".ptx"].read_text() and "\0" not in files[".ptx"].read_text()
    assert files[".cubin"].read_bytes()[:4] == b"\x7fELF"


def test_the_dump_says_so_if_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_JIT_DUMP_DIR", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match="DG_JIT_DUMP_DIR: vector_add cannot be written"):
        assert adds(make_kernel())


# ---- the compiler ----------------------------------------------------------------------------------------------------


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    """What an NVRTC of before 12.9 says to sm_120f, this one says to sm_999."""
    with pytest.raises(CompileError, match="NVRTC 13.* does not know sm_999f; `pip install -U nvidia-cuda-nvrtc`"):
        compile_kernel(make_kernel(), "sm_999f", "ptx")


def test_no_compiler(tmp_path: Path) -> None:
    """The library is there, but out of sight of the search for it."""
    code = """
        import ctypes, json, os, site, sys
        try:
            sys.exit(ctypes.CDLL("libnvrtc.so.13") and 0)
        except OSError:
            pass
        site.getsitepackages, site.ENABLE_USER_SITE = lambda: [], False
        for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
            os.environ.pop(name, None)
        errors = []
        for _ in range(2):
            try:
                adds(make_kernel())
            except Exception as error:
                errors.append([type(error).__name__, str(error)])
        print(json.dumps(errors))"""
    if not (printed := run(code)):
        pytest.skip("the system's own loader finds an NVRTC")
    first, second = json.loads(printed)
    assert first[0] == "CompileError" and first[1].startswith("NVRTC, which compiles the kernels, cannot be loaded")
    assert "pip install nvidia-cuda-nvrtc" in first[1] and "\n" not in first[1]
    assert first == second
    assert entries(tmp_path / "cache") == []
