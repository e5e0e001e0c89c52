"""`python -m deep_gemm.sm120 doctor`: what a bug report needs."""

import sys

from .doctor import report

if sys.argv[1:] != ["doctor"]:
    sys.exit("usage: python -m deep_gemm.sm120 doctor")
sys.exit(report())
