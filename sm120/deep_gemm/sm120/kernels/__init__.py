"""The kernels (.cuh) and, beside each, its launcher (.py)."""
