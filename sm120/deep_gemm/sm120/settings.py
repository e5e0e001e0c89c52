"""How many SMs schedules are made for, and whether launches overlap."""

import functools

import torch

from .checks import boolean, integer

# Without a GPU the emulated card is an RTX PRO 6000.
EMULATED_SMS = 188

_num_sms: int | None = None
_pdl = False


def get_num_sms() -> int:
    """SMs that a schedule should be made for: what `set_num_sms` was given, else all that the current device has."""
    gpu = torch.cuda.is_available()
    return sms_to_use(torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"))


def set_num_sms(num_sms: int) -> None:
    """Sets what `get_num_sms` returns, so that the rest of the device is left to other work.

    Raises RuntimeError if it is not from 1 to the device's number of SMs.
    """
    global _num_sms
    at_most = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 2**16
    _num_sms = integer("num_sms", num_sms, 1, at_most)


def get_pdl() -> bool:
    """Whether kernels are launched with programmatic dependent launch."""
    return _pdl


def set_pdl(enable: bool) -> None:
    """Lets a kernel's blocks be set up while the one before it on the stream still runs (programmatic dependent launch;
    SM90 and later). Our kernels wait for that one to end before they read or write anything."""
    global _pdl
    _pdl = boolean("enable", enable)


def sms_to_use(device: torch.device) -> int:
    """What `get_num_sms` returns where `device` is the current one."""
    return sms_of(device) if _num_sms is None else _num_sms


@functools.cache
def sms_of(device: torch.device) -> int:
    """SMs of `device`."""
    if device.type == "cpu":
        return EMULATED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
