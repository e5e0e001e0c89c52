"""What callers may hand in. Every check comes before the first launch, so that a refused call writes nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

STRIDED = torch.strided


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


def tensor(
    argument: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple, device: Any, other: str = ""
) -> torch.Tensor:
    """`value`, if it is a tensor of one of `dtypes` on `device` and of `shape`, whose sizes are ints or `Open`. `other`
    is the argument that the sizes come from: either may be the wrong one, so an error names both."""
    try:
        if value.layout is STRIDED and value.dtype in dtypes and value.device == device and value.shape == shape:
            return value
    except AttributeError:
        pass  # no tensor: to ask first would take longer
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    refuse(
        argument,
        value,
        f"a {names} tensor [{', '.join(map(str, shape))}] on {device}" + (other and f" to match {other}"),
    )


def contiguous(argument: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, if it is contiguous."""
    if not value.is_contiguous():
        refuse(argument, value, "a contiguous tensor")
    return value


def on_a_device(argument: str, value: torch.Tensor) -> torch.device:
    """Where `value` lies, if kernels can reach it there."""
    if value.layout is not STRIDED or not (value.is_cpu or value.is_cuda):
        refuse(argument, value, "a strided tensor on the CPU or a CUDA device")
    return value.device


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


class Known(dict):
    """What was found of calls, by the layouts of their tensors and what else they depend on: a call like an earlier one
    is not checked again. All layers of a step make the same call, so few are kept."""

    def keep(self, call: tuple, found: Any) -> Any:
        """`found`, which stands for `call` from now on."""
        if len(self) >= _MOST_KNOWN:
            self.clear()
        self[call] = found
        return found


_MOST_KNOWN = 64


def layouts(tensors: Iterable[torch.Tensor | None]) -> tuple:
    """All that is looked at of tensors but their memory: those of equal layouts pass every check or none.

    Raises AttributeError or RuntimeError where one is no tensor, or none with strides.
    """
    return tuple([t if t is None else (t.dtype, t.shape, t.stride(), t.device, t.requires_grad) for t in tensors])


def sizes(*tensors: torch.Tensor | None) -> list[int]:
    """Bytes of each from its first element to the end of its last one; of those that are there."""
    there = [tensor for tensor in tensors if tensor is not None]
    return [t.nbytes if t.is_contiguous() or not t.numel() else _extent(t)[1] for t in there]


def memory(inputs: Mapping[str, torch.Tensor | None], outputs: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that begin where no element of theirs can (where no word of four bytes can, if it has one byte:
    kernels read words), those whose storage has been taken away, and outputs that share memory with an input or another
    output.
    """
    there = [value for value in inputs.values() if value is not None]
    there += outputs.values()
    memory_at(
        [value.data_ptr() for value in there], [value.untyped_storage().nbytes() for value in there], inputs, outputs
    )


def memory_at(
    addresses: Sequence[int],
    sizes: Sequence[int],
    inputs: Mapping[str, torch.Tensor | None],
    outputs: Mapping[str, torch.Tensor | None],
) -> None:
    """The same where addresses and (at most) sizes in bytes are known, of the inputs that are there, then the outputs.
    Only suspects are looked at closely."""
    together = 0
    for address in addresses:
        together |= address or 1
    at = len(addresses)
    for output in outputs.values():
        if output is not None:
            at -= 1
            start, end = addresses[at], addresses[at] + sizes[at]
            for address, size in zip(addresses[:at], sizes):
                if address < end and start < address + size:
                    _apart(inputs, outputs)
    if together & 3:
        written = [(_ARGUMENT.get(name, name), value) for name, value in outputs.items()]
        for name, value in (*inputs.items(), *written):
            if value is None or not value.numel():
                continue
            if not (address := value.data_ptr()):
                refuse(name, value, "memory behind its elements, and its storage is empty")
            if address % (needed := _ALIGNMENT.get(value.itemsize, 4)):
                refuse(name, value, f"a tensor that begins at a multiple of {needed} bytes")


_ALIGNMENT = {2: 2}  # bytes of an element -> of its address
_ARGUMENT = {"logits": "out"}  # what kernels write -> what callers call it


def _apart(inputs: Mapping[str, torch.Tensor | None], outputs: Mapping[str, torch.Tensor | None]) -> None:
    others = dict(inputs)
    for name, output in outputs.items():
        if output is None:
            continue
        for other, value in others.items():
            if value is not None and overlap(output, value):
                refuse(_ARGUMENT.get(name, name), output, f"memory of its own; this is {other}'s as well")
        others[_ARGUMENT.get(name, name)] = output


def overlap(rows: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the two have a byte in common; one, or its rows, may lie between the rows of the other."""
    if not rows.numel() or not value.numel():
        return False
    start, size, stride, row = _extent(rows)
    address, bytes_, other_stride, other_row = _extent(value)
    if start + size <= address or address + bytes_ <= start:
        return False
    piece = other_row if other_stride == stride else bytes_
    gap = (address - start) % stride
    return gap < row or gap + piece > stride


def _extent(value: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and bytes of a tensor, bytes from row to row, and bytes of a row (all but the first dimension)."""
    last = [(size - 1) * stride for size, stride in zip(value.shape, value.stride())]
    size = (sum(last) + 1) * value.itemsize
    if value.dim() < 2 or value.shape[0] < 2:
        return value.data_ptr(), size, size, size
    row = (sum(last[1:]) + 1) * value.itemsize
    return value.data_ptr(), size, max(value.stride()[0] * value.itemsize, row), row


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        strided, layout = value.layout is STRIDED, str(value.layout).removeprefix("torch.")
        how = f"strides {list(value.stride())}" if strided else f"layout {layout}"
        return f"a {dtype} tensor {list(value.shape)} with {how} on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return f"{value!r} ({type(value).__name__})" if value is not None else "None"
