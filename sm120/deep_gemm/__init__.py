"""DeepGEMM, with the Lightning Indexer's kernels for SM120 and SM121.

Ours:        the nine functions of the indexer and the settings that belong to them, from `deep_gemm.sm120`.
Upstream's:  every other name. DeepGEMM's own package is loaded when one of them is first asked for; a name that it
             does not have, or that cannot be loaded here, is absent, and the AttributeError says why.
Dispatch:    the tensors' device decides between ours and upstream's of the same name: `_is_ours` below.
"""

import functools
import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import sm120
from .sm120 import upstream as _upstream

_VERSION_FILE = Path(__file__).parent / "VERSION"  # written by the build
__version__ = _VERSION_FILE.read_text().strip() if _VERSION_FILE.exists() else "0+source"


@functools.cache
def _is_ours(device: torch.device) -> bool:
    """SM12x and the CPU are ours; SM90 and SM100 upstream's, as is what no kernel of ours runs on; the rest ours."""
    if device.type != "cuda" or os.environ.get("DG_SM120_FORCE") == "1":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return major not in (9, 10) and (major, minor) >= (8, 9)


_FIRST = ("q", "context_lens", "cu_seq_len_k_start")  # the functions' first arguments


def _dispatched(ours: Callable) -> Callable:
    """`ours`, or, where the first argument lies on a device that upstream serves, its function of that name."""

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next((kwargs[name] for name in _FIRST if name in kwargs), None)
        if isinstance(first, (tuple, list)) and first:  # (values, scales)
            first = first[0]
        if not isinstance(first, torch.Tensor) or _is_ours(first.device):
            return ours(*args, **kwargs)  # an argument of another type is an error there
        try:
            theirs = _upstream.lookup(ours.__name__)
        except AttributeError as error:
            message = f"{first.device} is a device that upstream serves (DG_SM120_FORCE=1: ours does), but {error}"
            raise RuntimeError(message) from None
        return theirs(*args, **kwargs)

    return call


def _in_step(ours: Callable) -> Callable:
    """A setting that both have: what is set here is set in upstream as well, now or when it is loaded."""

    @functools.wraps(ours)
    def call(value: Any) -> None:
        ours(value)
        _upstream.keep_set(ours.__name__, value)

    return call


_OURS = {
    "get_paged_mqa_logits_metadata": _dispatched,
    "fp8_paged_mqa_logits": _dispatched,
    "fp8_fp4_paged_mqa_logits": _dispatched,
    "fp8_mqa_logits": _dispatched,
    "fp8_fp4_mqa_logits": _dispatched,
    "get_sparse_mqa_logits_metadata": _dispatched,
    "get_paged_sparse_mqa_logits_metadata": _dispatched,
    "fp8_fp4_sparse_mqa_logits": _dispatched,
    "fp8_fp4_paged_sparse_mqa_logits": _dispatched,
    "set_num_sms": _in_step,
    "get_num_sms": lambda ours: ours,
    "set_pdl": _in_step,
    "get_pdl": lambda ours: ours,
}
globals().update({name: wrap(getattr(sm120, name)) for name, wrap in _OURS.items() if hasattr(sm120, name)})


def __getattr__(name: str) -> Any:
    if name == "__all__":  # `from deep_gemm import *` takes upstream's names too
        return [public for public in __dir__() if not public.startswith("_")]
    if name.startswith("__"):  # Python's and tools' own probes
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _upstream.lookup(name)
    if _upstream.is_complete():
        globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    theirs = vars(_upstream.module() or sm120)  # first: its own imports become attributes of this module
    return sorted({*theirs, *globals()})


class _Names:
    """Finds `import deep_gemm.<name>`: upstream allows it for every public name. Its submodules count on upstream's
    `__init__` having run, so they too are looked up as attributes, which loads it."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name in ("sm120", "upstream"):
            return None
        try:
            value = getattr(sys.modules[package], name)
        except AttributeError as error:
            if _upstream.module() is None:
                raise ModuleNotFoundError(str(error), name=fullname) from None
            return None  # a submodule that upstream itself is about to import, or never does
        return importlib.machinery.ModuleSpec(fullname, _Found(value))


class _Found:
    """Makes a value that is there already the result of an import."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        sys.modules[module.__name__] = self.value


sys.meta_path.insert(0, _Names)
