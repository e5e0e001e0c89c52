"""Cubins that came with the wheel, so that common kernels need no compiler. Written by the build, see `prepare.py`.

`index.json` says which file is whose: {identity of the kernel: file}. An edited header or another architecture has
another identity, and is compiled.
"""

import json
from functools import cache as once
from pathlib import Path

from .compiler import compile_kernel, identity
from .kernel import Kernel

FOLDER = Path(__file__).parent / "shipped"


def find(kernel: Kernel, arch: str) -> bytes | None:
    """The shipped cubin of `kernel` for `arch`, or None."""
    if not (files := _index()) or (file := files.get(identity(kernel, arch, "cubin"))) is None:
        return None
    try:
        return (FOLDER / file).read_bytes()
    except OSError:
        return None


def write(folder: Path, kernels: list[Kernel], arch: str) -> int:
    """Compiles `kernels` into `folder`, with the index; returns the sum of the cubins' sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    files, size = {}, 0
    for kernel in kernels:
        file = f"{kernel.name}.{arch}.cubin"
        size += (folder / file).write_bytes(compile_kernel(kernel, arch, "cubin"))
        files[identity(kernel, arch, "cubin")] = file
    (folder / "index.json").write_text(json.dumps(files, indent=1))
    return size


@once
def _index() -> dict[str, str]:
    try:
        return json.loads((FOLDER / "index.json").read_text())
    except (OSError, ValueError):
        return {}
