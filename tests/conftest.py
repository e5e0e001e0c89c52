"""The tests run the installed wheel; where none is installed, the source tree."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("deep_gemm") is None:
    sys.path.insert(0, str(ROOT / "sm120"))
