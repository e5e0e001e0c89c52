"""Compiled kernels on disk, shared by this user's processes: one folder, a file for each, replaced whole.

Whoever can write an entry has his code run on the reader's GPU, and a checksum does not tell: he computes it too. So an
entry counts only where nobody else can have written it: the folder and the file belong to this user or to root, and no
others may write them. Members of the group that `DG_JIT_CACHE_GROUP` names are trusted like this user.

The cache may fail in any way, and nothing but time is lost: what cannot be read or trusted is a miss, what cannot be
written is not kept. Each reason is said once.
"""

import errno
import grp
import hashlib
import io
import os
import secrets
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DIGEST_BYTES = 32
_LARGEST_ENTRY = 2**24  # bytes; our kernels have some 2^16

_said: set[str] = set()


def digest(*parts: str | bytes) -> bytes:
    """SHA-256 over the parts and their lengths."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.digest()


def key(*parts: str | bytes) -> str:
    """The name of an entry; everything that the binary depends on must be among the parts."""
    return digest(*parts).hex()


def folder() -> Path:
    """`DG_JIT_CACHE_DIR`; else the user's cache folder; else, without a home, a folder of this user's own in /tmp."""
    if chosen := os.environ.get("DG_JIT_CACHE_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "deep_gemm_sm120"
    if home := os.environ.get("HOME"):
        return Path(home) / ".cache" / "deep_gemm_sm120"
    try:
        base = tempfile.gettempdir()
    except FileNotFoundError:  # no folder at all can be written
        base = "/tmp"
    return Path(base) / f"deep_gemm_sm120-{os.geteuid()}"


def get(name: str) -> bytes | None:
    """The binary stored under `name`; None if there is none, or it is broken, out of reach or not to be trusted."""
    try:
        with opened(folder()) as place:
            entry = _read(place, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        where = folder() / name if error.filename == name else folder()
        say_once("A compiled kernel is not taken from the cache", where, error)
        return None
    if digest(entry[_DIGEST_BYTES:]) != entry[:_DIGEST_BYTES]:
        return None
    return entry[_DIGEST_BYTES:]


def put(name: str, binary: bytes) -> None:
    """Stores `binary`, if the folder can be written and trusted."""
    try:
        with opened(folder(), make=True) as place:
            write(place, name, digest(binary) + binary)
    except OSError as error:
        say_once("A compiled kernel is not kept in the cache", folder(), error)


def say_once(what: str, where: Path, error: OSError) -> None:
    """Warns of `what` an error led to, unless something was said of `where` before in this process."""
    if str(where) not in _said:
        _said.add(str(where))
        warnings.warn(f"{what}: {where}: {error.strerror}", RuntimeWarning, stacklevel=3)


# ---- what nobody else can have written ------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, make: bool = False) -> Iterator[int]:
    """A descriptor of the folder `path`; its files are reached through it, whatever becomes of the path meanwhile.

    Raises PermissionError if others may write to the folder, or another OSError.
    """
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o755, exist_ok=True)
    if path.is_symlink():
        _refuse_foreign(path, path.lstat())  # the way to the folder is as the user chose it, without others' links
    with _descriptor(path, os.O_DIRECTORY) as place:
        _refuse_foreign(path, os.fstat(place))
        yield place


def write(place: int, name: str, content: bytes) -> None:
    """Makes `content` the file `name` of an opened folder. Whatever was there is replaced, and not looked into; readers
    see the one or the other, whole."""
    unfinished = f"{name}.{secrets.token_hex(8)}"
    with open(unfinished, "xb", opener=lambda file, flags: os.open(file, flags, 0o644, dir_fd=place)) as file:
        try:
            if (group := _trusted_group()) is not None:
                os.fchown(file.fileno(), -1, group)
                os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.replace(unfinished, name, src_dir_fd=place, dst_dir_fd=place)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=place)
            raise


def _read(place: int, name: str) -> bytes:
    """The content of a file of an opened folder. Follows no link, and does not wait for what a pipe may bring."""
    with _descriptor(name, os.O_NOFOLLOW | os.O_NONBLOCK, place) as file:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", name)
        if status.st_size > _LARGEST_ENTRY:
            raise OSError(errno.EFBIG, f"has {status.st_size} bytes, more than any kernel", name)
        _refuse_foreign(name, status)
        return io.FileIO(file, closefd=False).readall()


@contextmanager
def _descriptor(path: Path | str, flags: int, place: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | flags, dir_fd=place)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse_foreign(path: Path | str, status: os.stat_result) -> None:
    """Raises PermissionError if others than this user, root and the trusted group may write what is at `path`."""
    trusted = status.st_gid == _trusted_group()
    mode = 0 if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode)  # a link's mode says nothing
    if status.st_uid not in (os.geteuid(), 0) and not trusted:
        reason = f"belongs to user {status.st_uid}"
    elif mode & (stat.S_IWOTH if trusted else stat.S_IWGRP | stat.S_IWOTH):
        reason = f"can be written by others (mode {mode:o})"
    else:
        return
    reason += ", so it may hold anybody's code (DG_JIT_CACHE_GROUP names a group to trust)"
    raise PermissionError(errno.EPERM, reason, str(path))


def _trusted_group() -> int | None:
    """The number of the group `DG_JIT_CACHE_GROUP`, a name or a number."""
    if not (name := os.environ.get("DG_JIT_CACHE_GROUP")):
        return None
    try:
        number = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # the latter of thousands of digits
        number = -1
    if not 0 <= number < 2**32 - 1:
        raise PermissionError(errno.EINVAL, f"there is no group {name[:50]} (DG_JIT_CACHE_GROUP)")
    return number
