"""DeepGEMM's own package, found and loaded when somebody first asks for a name that is not ours.

Its `_C.so` fits one release of PyTorch's CUDA build, and its `__init__` wants a CUDA toolkit. Where either is missing
every name of upstream is absent; callers decide by `hasattr` which of their paths to take.
"""

import importlib
from types import ModuleType
from typing import Any

import torch

BUNDLED = "deep_gemm.upstream"  # upstream's __init__ in the full wheel
CANDIDATES = (BUNDLED, "vllm.third_party.deep_gemm")

failures: dict[str, str] = {}  # candidate -> why it is not the one
_complete: ModuleType | None = None
_settings: dict[str, Any] = {}


def is_complete() -> bool:
    """Whether upstream's package is loaded to its end."""
    return _complete is not None


def module() -> ModuleType | None:
    """Upstream's package, the first candidate that loads. Asked from inside its own imports: as far as it has come."""
    global _complete
    if _complete is not None:
        return _complete
    for name in CANDIDATES:
        if name in failures:
            continue
        try:
            candidate = importlib.import_module(name)
        except Exception as error:  # whatever it raises, the indexer works without it
            failures[name] = _explain(name, error)
            continue
        if not getattr(candidate.__spec__, "_initializing", False):
            _complete = candidate
            for setter, value in _settings.items():
                keep_set(setter, value)
        return candidate
    return None


def lookup(name: str) -> Any:
    """Upstream's `name`, or an AttributeError that says why there is none."""
    package = module()
    if package is None:
        reasons = "".join(f"\n  {candidate}: {reason}" for candidate, reason in failures.items())
        raise AttributeError(f"DeepGEMM's own {name!r} cannot be loaded:{reasons}")
    try:
        return getattr(package, name)
    except AttributeError:
        raise AttributeError(f"deep_gemm has no {name!r}: neither ours nor in {package.__name__}") from None


def keep_set(setter: str, value: Any) -> None:
    """Upstream's setting follows ours. Upstream asks the driver for the device's limits, so only where there is one."""
    _settings[setter] = value
    if _complete is not None and torch.cuda.is_available():
        getattr(_complete, setter)(value)


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
        return "not in this wheel (it was built with DG_UPSTREAM=none)" if name == BUNDLED else "not installed"
    if isinstance(error, AssertionError) and not str(error):
        return "no CUDA toolkit found; set CUDA_HOME"
    advice = "; it needs PyTorch's CUDA build, of the release it was built for" if isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {error.__cause__ or error}{advice}"
