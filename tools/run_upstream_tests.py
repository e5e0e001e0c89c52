"""DeepGEMM's own tests of the MQA logits, from the submodule, against the installed wheel.

    git submodule update --init third_party/DeepGEMM      (once)
    python tools/run_upstream_tests.py [--cases 12] [--seed 1]

On a GPU the file runs as it is. Without one it runs in the emulator: 'cuda' means the CPU, sizes are divided as CUT
says, a spread of the cases is taken, and nothing is timed. Its inputs, references, assertions and tolerances are
upstream's in either case. Exits with 1 if an assertion fails, with 2 if there is nothing to run.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import deep_gemm

SUBMODULE = Path(__file__).parent.parent / "third_party" / "DeepGEMM"
TESTS = ("test_mqa_logits", "test_paged_mqa_logits")  # the others are of functions that are upstream's
# In the emulator: name -> (divisor, least). Powers of two, since some sizes must divide others; 32 rows at least, since
# what FP4 makes of the inputs, 0.013 on average, is held against upstream's tolerance of 0.02.
CUT = {
    "seq_len": (64, 32),
    "seq_len_kv": (32, 128),
    "batch_size": (128, 32),
    "num_sequences": (128, 32),
    "avg_kv": (128, 64),
    "max_model_len": (256, 0),
    "repeats": (10, 1),
}
# What the file's cases are listed for: this architecture has FP4, all page sizes and next_n in them. While they run,
# the emulator is what it emulates.
LISTED_FOR, EMULATED = 10, 12


class Instrumented(ast.NodeTransformer):
    """`for a, b in <a list from enumerate_*()>` asks `_cases` for its list; sizes that are written as constants, and
    the n of `for _ in range(n)`, ask `_cut`. Nothing else is changed."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        called = {call.func.id for call in ast.walk(node.iter) if isinstance(call, ast.Call) and _is_name(call.func)}
        if _is_name(node.target) and node.target.id == "_" and called == {"range"}:
            node.iter.args = [_call("_cut", ast.Constant("repeats"), *node.iter.args)]
        elif isinstance(node.target, ast.Tuple) and any(name.startswith("enumerate_") for name in called):
            names = [ast.Constant(target.id) for target in node.target.elts]
            listing = ast.Lambda(ast.arguments([], [], defaults=[], kwonlyargs=[], kw_defaults=[]), node.iter)
            node.iter = _call("_cases", ast.List(names, ast.Load()), listing)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        constant = all(isinstance(part, (ast.Constant, ast.BinOp, ast.operator)) for part in ast.walk(node.value))
        if constant and len(node.targets) == 1 and _is_name(node.targets[0]) and node.targets[0].id in CUT:
            node.value = _call("_cut", ast.Constant(node.targets[0].id), node.value)
        return node


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


class CudaIsTheCpu(TorchFunctionMode):
    """Whoever asks torch for 'cuda' gets the CPU."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: self.on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(self.on_cpu, args), **kwargs)

    @staticmethod
    def on_cpu(value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
            return type(value)("cpu")
        return value


class Run:
    """One test function: lists its cases, takes some or all of them, and says how each went."""

    def __init__(self, emulated: bool, count: int, rng: random.Random) -> None:
        self.emulated, self.count, self.rng = emulated, count, rng
        self.done, self.listed, self.current, self.listing = 0, 0, "", False

    def arch_major(self) -> int:
        return LISTED_FOR if self.listing else EMULATED

    def cut(self, name: str, value: int) -> int:
        divisor, least = CUT[name]
        return max(value // divisor, least) if self.emulated else value

    def cases(self, names: list[str], listing: Callable) -> Iterator[tuple]:
        self.listing = True
        try:
            cases = [dict(zip(names, values)) for values in listing()]
        finally:
            self.listing = False
        self.listed += len(cases)
        if self.emulated:
            cases = self.spread([case for case in cases if self.is_ours(case)])
        for case in cases:
            self.current = ", ".join(f"{name}={value}" for name, value in case.items())
            start = time.perf_counter()
            yield tuple(case.values())
            self.done += 1
            if self.emulated:  # on a GPU the file prints a line of its own
                print(f"  passed in {time.perf_counter() - start:4.1f} s: {self.current}", file=sys.stderr)

    @staticmethod
    def is_ours(case: dict[str, Any]) -> bool:
        """Upstream's SM100 has formats and head counts that no SM120 kernel has, upstream's included."""
        return case.get("fmt") != "mxfp8" and case.get("num_heads", 64) % 8 == 0

    def spread(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`count` cases, cut down, each next one with as many values as possible that no one before it had."""
        self.rng.shuffle(cases)
        chosen, seen = [], set()
        while cases and len(chosen) < self.count:
            case = max(cases, key=lambda case: len(set(case.items()) - seen))
            cases.remove(case)
            seen.update(case.items())
            chosen.append({name: self.cut(name, value) if name in CUT else value for name, value in case.items()})
        return chosen


def load_module(name: str, path: Path) -> ModuleType:
    """The module in `path`, under `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def provide_helpers(checkout: Path, emulated: bool) -> None:
    """`deep_gemm.testing`, `deep_gemm.utils` and `generators`, which the file imports. Where upstream's package does
    not load, the first two come from the checkout: what is used of them is plain Python. The third makes inputs of
    GEMMs, which are not run."""
    sources = {
        "deep_gemm.testing": checkout / "deep_gemm" / "testing" / "__init__.py",
        "deep_gemm.utils": checkout / "deep_gemm" / "utils" / "math.py",
    }
    for name, path in sources.items():
        try:
            importlib.import_module(name)
        except ImportError:
            load_module(name, path)
    sys.path.insert(0, str(checkout / "tests"))
    with contextlib.suppress(Exception):  # it imports what only upstream's library has
        if not emulated:
            importlib.import_module("generators")
    sys.modules.setdefault("generators", _Generators("generators"))


class _Generators(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["deep_gemm.testing"], name, None)


def no_timing(function: Callable, kernel_names: str | tuple[str, ...], *_: Any, **__: Any) -> float | tuple[float, ...]:
    return 1.0 if isinstance(kernel_names, str) else (1.0,) * len(kernel_names)


def run_test(name: str, path: Path, run: Run) -> bool:
    """Runs the function `name` of the file; whether it passed."""
    tree = ast.fix_missing_locations(Instrumented().visit(ast.parse(path.read_text(), str(path))))
    namespace = {"__name__": path.stem, "__file__": str(path), "_cases": run.cases, "_cut": run.cut}
    with contextlib.ExitStack() as stack:
        if run.emulated:
            testing = sys.modules["deep_gemm.testing"]
            stack.enter_context(mock.patch.object(testing, "get_arch_major", run.arch_major))
            stack.enter_context(mock.patch.object(testing, "bench_kineto", no_timing))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda device=None: None))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # its figures would be of no time at all
            stack.enter_context(CudaIsTheCpu())
        exec(compile(tree, str(path), "exec"), namespace)
        try:
            namespace[name]()
        except Exception:
            print(f"  FAILED: {run.current}\n{traceback.format_exc()}", file=sys.stderr)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=SUBMODULE, help="of DeepGEMM; the submodule by default")
    parser.add_argument("--cases", type=int, default=12, help="of each test, in the emulator (default: 12)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of cases and inputs")
    args = parser.parse_args()

    path = args.checkout / "tests" / "test_attention.py"
    if not path.exists():
        print(f"{path} is not there. To check it out: git submodule update --init third_party/DeepGEMM")
        return 2
    emulated = not torch.cuda.is_available()
    if emulated:
        device = "CPU, in the emulator"
    else:
        owner = "ours" if deep_gemm._is_ours(torch.device("cuda", torch.cuda.current_device())) else "upstream's"
        device = f"{torch.cuda.get_device_name()}, whose functions are {owner} (DG_SM120_FORCE=1: ours)"
    print(f"deep_gemm {deep_gemm.__version__} on {device}; seed {args.seed}", flush=True)

    provide_helpers(args.checkout, emulated)
    defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    torch.manual_seed(args.seed)
    passed = []
    for name in TESTS:
        if name not in defined:
            print(f"{path} has no {name}")
            return 2
        run = Run(emulated, args.cases, random.Random(args.seed))
        passed.append(run_test(name, path, run))
        if passed[-1] and not run.done:
            print(f"{name}: no list of cases was found; the file is not of the form that this runner knows")
            return 2
        print(f"{name}: {'passed' if passed[-1] else 'FAILED'}, {run.done} of {run.listed} cases run", flush=True)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
