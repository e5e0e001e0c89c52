"""The instructions, one file per family.  Importing them fills the table in operands.py."""

from . import asynchronous, control, conversion, data, floating, integer, special, tensor, warp  # noqa: F401
