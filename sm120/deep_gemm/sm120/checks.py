"""What callers may hand in. Every check comes before the first launch, so that a refused call writes nothing."""

from typing import Any, NoReturn

import torch


class ArgumentError(RuntimeError):
    """An argument that is refused: its name, what came, and what was expected."""


class Open(str):
    """A size left open, by its name in an expected shape: equal to every size."""

    def __eq__(self, size: object) -> bool:
        return True

    __hash__ = None


def refuse(argument: str, got: Any, expected: str) -> NoReturn:
    """Raises ArgumentError."""
    raise ArgumentError(f"{argument}: expected {expected}, got {_describe(got)}")


def tensor(argument: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple, device: Any) -> torch.Tensor:
    """`value`, if it is a tensor of one of `dtypes` on `device` and of `shape`, whose sizes are ints or `Open`."""
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and value.device == device and value.shape == shape:
        return value
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    refuse(argument, value, f"a {names} tensor [{', '.join(map(str, shape))}] on {device}")


def contiguous(argument: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, if it is contiguous."""
    if not value.is_contiguous():
        refuse(argument, value, "a contiguous tensor")
    return value


def integer(argument: str, value: Any, at_least: int = 0, at_most: int = 2**31 - 1) -> int:
    """`value`, if it is an int (no bool) within the limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        refuse(argument, value, f"an int from {at_least} to {at_most}")
    return value


def boolean(argument: str, value: Any) -> bool:
    """`value`, if it is a bool."""
    if not isinstance(value, bool):
        refuse(argument, value, "a bool")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor {list(value.shape)} with strides {list(value.stride())} on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value))})"
    return f"{value!r} ({type(value).__name__})" if value is not None else "None"
