"""Whose code is run: the folder of compiled kernels and the folder of dumps, where others can write as well."""

import errno
import os
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_jit import ARCH, PACKAGE_ROOT, TESTS, entries
from vector_add import adds, make_kernel, write_header

from deep_gemm.sm120 import doctor
from deep_gemm.sm120.jit import cache, compile_kernel, compiler

STRANGER, ANOTHER, GROUP = 54321, 54322, 54323  # nobody has these numbers
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user's."""
    monkeypatch.setattr(compiler, "HEADERS", None)  # restored afterwards
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("DG_JIT_CACHE_GROUP", "DG_JIT_DUMP_DIR"):
        monkeypatch.delenv(name, raising=False)
    write_header(tmp_path / "headers")
    return tmp_path / "cache"


@pytest.fixture
def umask() -> Iterator[None]:
    """What a test sets is set back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def stored(folder: Path) -> tuple[str, bytes, Path]:
    """Key, content and file of a fresh entry."""
    name, content = cache.key(secrets.token_bytes(8)), secrets.token_bytes(3000)
    cache.put(name, content)
    assert cache.get(name) == content
    return name, content, folder / name


def missed(name: str, *words: str) -> None:
    """The entry is a miss; that is said with all `words`, and said once."""
    with pytest.warns(RuntimeWarning) as caught:
        assert cache.get(name) is None
    assert len(caught) == 1
    for word in words:
        assert word in str(caught[0].message), str(caught[0].message)
    silently_missed(name)


def silently_missed(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(name) is None


def test_a_digest_is_that_of_the_parts() -> None:
    """Not of what they are put together."""
    digests = {
        cache.digest(*parts) for parts in ([], [""], ["ab", "c"], ["a", "bc"], ["abc"], ["a", "b", "c"], ["abc", ""])
    }
    joined = {cache.digest(b"a" + length.to_bytes(8, "little") + b"b") for length in range(20)}  # a part like two
    assert len(joined) == 20 and cache.digest("a", "b") not in joined
    assert len(digests) == 7 and cache.digest("a", "b") == cache.digest(b"a", b"b")


def test_no_file_stays_open(folder: Path) -> None:
    stored(folder)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        name, _, file = stored(folder)
        file.unlink()
        assert cache.get(name) is None
    assert len(os.listdir("/proc/self/fd")) == before


# ---- an entry that is none ------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5))  # /dev/zero: it has no end
    except PermissionError:
        pytest.skip("only root can make a device")


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name[:20])
        os.rename(path.name[:20], path.name)
    finally:
        os.chdir(here)


def make_link(path: Path) -> None:
    honest = path.parent / "honest"
    honest.write_bytes(cache.digest(b"code") + b"code")
    path.symlink_to(honest)


def make_dangling_link(path: Path) -> None:
    path.symlink_to("/nowhere")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_oversized(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)  # all holes; more than any memory


@pytest.mark.parametrize(
    "make", [make_fifo, make_device, make_socket, make_link, make_dangling_link, make_folder, make_oversized]
)
def test_what_is_no_entry_is_a_miss(folder: Path, make) -> None:
    """Above all it must come back: a FIFO without a writer blocks whoever opens it, /dev/zero never ends."""
    name, content, file = stored(folder)
    file.unlink()
    make(file)
    missed(name, str(file))
    if make is not make_folder:
        cache.put(name, content)  # in its place
        assert cache.get(name) == content and stat.S_ISREG(file.lstat().st_mode)
        assert make is not make_link or (folder / "honest").read_bytes().endswith(b"code")


def test_a_kernel_is_compiled_where_a_fifo_is(folder: Path) -> None:
    assert adds(make_kernel())
    (entry,) = entries(folder)
    entry.unlink()
    os.mkfifo(entry)
    with pytest.warns(RuntimeWarning, match="is no regular file"):
        assert adds(make_kernel())
    assert entry.is_file()


@root_only
def test_an_entry_of_somebody_else(folder: Path) -> None:
    name, content, file = stored(folder)
    os.chown(file, STRANGER, -1)
    missed(name, str(file), f"user {STRANGER}")
    cache.put(name, content)
    assert cache.get(name) == content and file.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_an_entry_that_others_can_write(folder: Path, mode: int) -> None:
    name, _, file = stored(folder)
    file.chmod(mode)
    missed(name, str(file), f"{mode:o}")


# ---- a folder that others can write ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775, 0o2775, 0o757])
def test_a_folder_that_others_can_write(folder: Path, mode: int) -> None:
    """With and without a sticky bit, and whoever wrote what is in it."""
    name, content, _ = stored(folder)
    folder.chmod(mode)
    missed(name, str(folder), f"{mode:o}", "DG_JIT_CACHE_GROUP")
    before = entries(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(cache.key("another"), content)
    assert entries(folder) == before
    folder.chmod(0o755)
    assert cache.get(name) == content


def test_a_folder_that_is_named_from_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, file = stored(folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", folder.name)
    assert cache.get(name) == content
    file.chmod(0o666)
    missed(name, f"cache: {folder.name}/{name}: ")
    folder.chmod(0o777)
    missed(name, f"cache: {folder.name}: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(name, content)  # nothing is said twice


@root_only
def test_a_folder_of_somebody_else(folder: Path) -> None:
    name, _, _ = stored(folder)
    os.chown(folder, STRANGER, -1)
    missed(name, str(folder), f"user {STRANGER}")
    cache.put(cache.key("another"), b"")
    assert len(entries(folder)) == 1


def test_a_folder_of_root_is_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make one")
    name, content, _ = stored(folder)
    monkeypatch.setattr(cache.os, "geteuid", lambda: STRANGER)
    assert cache.get(name) == content


def test_a_link_of_our_own_leads_to_the_folder(folder: Path, tmp_path: Path) -> None:
    name, content, _ = stored(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert cache.get(name) == content
    if os.geteuid() == 0:
        os.chown(folder, STRANGER, -1, follow_symlinks=False)
        missed(name, str(folder), f"user {STRANGER}")


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_what_we_make_is_trusted_whatever_the_umask(folder: Path, umask, mask: int) -> None:
    os.umask(mask)
    name, content, file = stored(folder)
    assert folder.stat().st_mode & 0o7022 == 0 and file.stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "dangling link"])
def test_a_folder_that_is_none(folder: Path, kind: str) -> None:
    {"fifo": make_fifo, "device": make_device, "socket": make_socket, "dangling link": make_dangling_link}[kind](folder)
    if kind == "dangling link":
        silently_missed(cache.key("it"))
    else:
        missed(cache.key("it"), str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            cache.put(cache.key("it"), b"binary")
    assert len(caught) == (1 if kind == "dangling link" else 0)  # else it has been said


def test_the_folder_for_those_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In /tmp, where anybody can make it first."""
    for name in ("DG_JIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    shared = tmp_path / "tmp"
    monkeypatch.setattr(cache.tempfile, "tempdir", str(shared))
    for mode in (0o1777, 0o777):
        shared.mkdir()
        shared.chmod(mode)
        ours = cache.folder()
        name, _, _ = stored(ours)  # made by us: used
        assert ours.parent == shared and ours.stat().st_mode & 0o022 == 0
        ours.chmod(0o777)
        missed(name, str(ours), "777")
        if os.geteuid() == 0:
            cache._said.clear()
            ours.chmod(0o755)
            os.chown(ours, STRANGER, -1)
            missed(name, str(ours), f"user {STRANGER}")
        subprocess.run(["rm", "-r", shared], check=True)
        cache._said.clear()


def test_no_home_and_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is read only: nothing is kept, which is said."""

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    for name in ("DG_JIT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", nowhere)
    assert cache.folder() == Path("/tmp") / f"deep_gemm_sm120-{os.geteuid()}"

    def read_only(path: Path, **_) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(cache.Path, "mkdir", read_only)
    with pytest.warns(RuntimeWarning, match="is not kept in the cache: /tmp/deep_gemm_.*: Read-only file") as caught:
        cache.put(cache.key("it"), b"binary")
        cache.put(cache.key("it"), b"binary")
    assert len(caught) == 1


# ---- a group that is trusted ----------------------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize("mode", [0o775, 0o2775, 0o2770])
def test_a_group_that_is_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    folder.mkdir()
    os.chown(folder, STRANGER, GROUP)
    folder.chmod(mode)
    missed(cache.key("it"), str(folder))
    monkeypatch.setenv("DG_JIT_CACHE_GROUP", str(GROUP))
    name, content, file = stored(folder)
    assert file.stat().st_gid == GROUP and file.stat().st_mode & 0o777 == 0o644
    os.chown(file, ANOTHER, GROUP)  # as if another member had written it
    file.chmod(0o664)
    assert cache.get(name) == content
    file.chmod(0o666)
    missed(name, "666")
    file.chmod(0o644)
    os.chown(file, ANOTHER, ANOTHER)
    cache._said.clear()
    missed(name, f"user {ANOTHER}")
    os.chown(file, ANOTHER, GROUP)
    folder.chmod(mode | 0o002)
    missed(name, str(folder))
    folder.chmod(mode)
    monkeypatch.setenv("DG_JIT_CACHE_GROUP", str(GROUP + 1))
    cache._said.clear()
    missed(name, f"user {STRANGER}")


def test_a_group_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp

    name, content, _ = stored(folder)
    group = grp.getgrgid(os.getegid())
    os.chown(folder, -1, group.gr_gid)
    folder.chmod(0o775)
    monkeypatch.setenv("DG_JIT_CACHE_GROUP", group.gr_name)
    assert cache.get(name) == content


@pytest.mark.parametrize("group", ["no such group", "-1", str(2**32 - 1), str(2**70), "9" * 5000])
def test_a_group_that_there_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    name, content, _ = stored(folder)
    monkeypatch.setenv("DG_JIT_CACHE_GROUP", group)
    missed(name, f"there is no group {group[:50]} (DG_JIT_CACHE_GROUP)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(cache.key("another"), content)  # nor is anything kept
    assert len(entries(folder)) == 1


# ---- two users ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user reaches."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_user(number: int, code: str, folder: Path, **environment: str) -> str:
    """What `code` prints in a process of that user's."""
    headers = str(compiler.HEADERS)
    prelude = f"from pathlib import Path; from vector_add import *; compiler.HEADERS = Path({headers!r})\n"
    names = {"PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{TESTS}", "DG_JIT_CACHE_DIR": str(folder), "HOME": "/nowhere"}
    environment = {**os.environ, **names, **environment}
    command = [sys.executable, "-B", "-c", prelude + textwrap.dedent(code)]
    who = {"user": number, "group": number, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", "import deep_gemm"], env=environment, cwd="/", check=True, **who)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("other users cannot read Python or the package here")
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300, **who)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COMPILE = """
        import warnings
        compiled, real = [], compiler._nvrtc
        compiler._nvrtc = lambda *args: compiled.append(args) or real(*args)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            right = [adds(make_kernel()), adds(make_kernel(name="another"))]
        print(right, len(compiled), *(warning.message for warning in caught), sep="|")"""


@root_only
@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_code_that_another_user_put_under_the_honest_key(shared: Path, mode: int) -> None:
    """He computes the key and the checksum as we do. His kernel would subtract; ours is compiled anew."""
    headers = shared / "headers"
    write_header(headers)
    folder = shared / "cache"
    folder.mkdir()
    folder.chmod(mode)
    plant = """
        import os
        from deep_gemm.sm120.jit import cache
        from dataclasses import replace
        kernel = make_kernel()
        honest = cache.key(compiler.identity(kernel, "sm_120f", "ptx"), compiler.nvrtc_version())
        bad = compiler._nvrtc(replace(kernel, body="    add(p); p.sum[0] = 0;"), "sm_120f", "ptx")
        Path(os.environ["DG_JIT_CACHE_DIR"], honest).write_bytes(cache.digest(bad) + bad)
        print(honest)"""
    planted = folder / as_user(STRANGER, plant, folder)
    assert planted.stat().st_uid == STRANGER
    right, compiled, *said = as_user(ANOTHER, COMPILE, folder).split("|")
    assert (right, compiled) == ("[True, True]", "2")
    assert len(said) == 1 and f"{folder}: can be written by others (mode {mode:o})" in said[0]
    # The same where the folder is his, and nobody else can write it.
    os.chown(folder, STRANGER, STRANGER)
    folder.chmod(0o755)
    right, compiled, *said = as_user(ANOTHER, COMPILE, folder).split("|")
    assert (right, compiled) == ("[True, True]", "2")
    assert len(said) == 1 and f"{folder}: belongs to user {STRANGER}" in said[0]
    folder.chmod(0o700)
    right, compiled, *said = as_user(ANOTHER, COMPILE, folder).split("|")
    assert (right, compiled) == ("[True, True]", "2")
    assert len(said) == 1 and f"{folder}: Permission denied" in said[0]


@root_only
def test_root_compiles_ahead_for_everybody(shared: Path) -> None:
    write_header(shared / "headers")
    folder = shared / "cache"
    assert as_user(0, COMPILE, folder) == "[True, True]|2"
    assert as_user(ANOTHER, COMPILE, folder) == "[True, True]|0"


# ---- dumps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_fifo, make_link, make_device, make_oversized])
def test_a_dump_replaces_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:
    """It waits for nobody, and writes through no link."""
    folder = tmp_path / "dump"
    folder.mkdir()
    monkeypatch.setenv("DG_JIT_DUMP_DIR", str(folder))
    for suffix in ("cu", "ptx", "cubin"):
        make(folder / f"vector_add.{ARCH}.{suffix}")
        if make is make_link and suffix != "cubin":
            (folder / "honest").unlink()
    kernel = make_kernel()
    compile_kernel(kernel, ARCH, "ptx")
    assert (folder / f"vector_add.{ARCH}.cu").read_text() == kernel.source
    assert (folder / f"vector_add.{ARCH}.cubin").read_bytes()[:4] == b"\x7fELF"
    if make is make_link:
        assert (folder / "honest").read_bytes().endswith(b"code")


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775])
def test_a_dump_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("DG_JIT_DUMP_DIR", str(folder))
    with pytest.warns(RuntimeWarning, match="DG_JIT_DUMP_DIR: vector_add cannot be written.*by others") as caught:
        compile_kernel(make_kernel(), ARCH, "ptx")
        compile_kernel(make_kernel(name="another"), ARCH, "ptx")
    assert len(caught) == 1 and entries(folder) == []


# ---- what the report says -------------------------------------------------------------------------------------------


def test_the_report_says_why_the_cache_is_not_used(folder: Path) -> None:
    assert "writable" in doctor._cache()[0] and not folder.exists()
    stored(folder)
    assert f"{folder}: 1 files, 2 KiB, writable" in doctor._cache()[0]
    folder.chmod(0o777)
    assert "not used, each process compiles anew: can be written by others (mode 777)" in doctor._cache()[0]
