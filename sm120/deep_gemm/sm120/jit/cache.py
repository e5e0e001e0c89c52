"""Compiled kernels on disk, shared by all processes: cuda-core's file cache (atomic replacement), with a checksum.

The cache may fail in any way, and nothing but time is lost: what cannot be read is a miss, what cannot be written is
not kept.
"""

import hashlib
import os
import tempfile
from pathlib import Path

_DIGEST_BYTES = 32


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
    private = Path(tempfile.gettempdir()) / f"deep_gemm_sm120-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():  # anybody can make it there, and put code of his own into it
        raise PermissionError(f"{private} belongs to somebody else")
    return private


def get(name: str) -> bytes | None:
    """The binary stored under `name`; None if there is none, or it is broken or out of reach."""
    try:
        entry = _files().get(name)
    except (OSError, ValueError):
        return None
    if entry is None or digest(entry[_DIGEST_BYTES:]) != entry[:_DIGEST_BYTES]:
        return None
    return entry[_DIGEST_BYTES:]


def put(name: str, binary: bytes) -> None:
    """Stores `binary`, if the folder can be written."""
    try:
        _files()[name] = digest(binary) + binary
    except (OSError, ValueError):
        pass


def _files():
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache(folder())
