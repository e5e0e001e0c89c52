"""Our functions against upstream's sources, read without importing them: names, parameters, order, defaults."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import deep_gemm
from deep_gemm import sm120

REQUIRED = inspect.Parameter.empty
PACKAGE = Path(importlib.util.find_spec("deep_gemm").submodule_search_locations[0])
PINNED = PACKAGE / "upstream.py"  # upstream's __init__ in the full wheel
SUBMODULE = ROOT / "third_party" / "DeepGEMM" / "csrc" / "apis" / "attention.hpp"

INDEXER = [
    "get_paged_mqa_logits_metadata",
    "fp8_paged_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_fp4_mqa_logits",
]
OURS = [name for name in (*INDEXER, "set_num_sms", "get_num_sms", "set_pdl", "get_pdl") if hasattr(sm120, name)]
# Where `main` and the pinned wheel differ, the pinned wheel's default is ours.
PINNED_DEFAULTS = {"clean_logits": False}


def canonical(name: str) -> str:
    """The bounds of the ragged functions have two names."""
    return {"cu_seq_len_k_start": "ks", "cu_seq_len_k_end": "ke"}.get(name, name)


def python_signature(source: str, name: str) -> dict[str, Any]:
    """Parameters of `name` and their defaults, wherever in the module it is defined."""
    definitions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    (arguments,) = [node.args for node in definitions if node.name == name]
    assert not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
    names = [argument.arg for argument in arguments.args]
    defaults = [eval(ast.unparse(value), {"torch": torch}) for value in arguments.defaults]
    return dict(zip(names, [REQUIRED] * (len(names) - len(defaults)) + defaults))


def pybind_signature(source: str, name: str) -> dict[str, Any]:
    """The same out of a `m.def("name", ..., py::arg("a"), py::arg("b") = value)`."""
    (definition,) = re.findall(rf'm\.def\(\s*"{name}"(.*?)\);', source, re.DOTALL)
    values = {"false": False, "true": True, "std::nullopt": None, "torch::kFloat32": torch.float32}
    values |= {"torch::kFloat": torch.float32, "0": 0}
    arguments = re.findall(r'py::arg\("(\w+)"\)(?:\s*=\s*([\w:]+))?', definition)
    return {argument: values[default] if default else REQUIRED for argument, default in arguments}


def check(ours: Callable, upstream: dict[str, Any]) -> None:
    """`ours` takes what upstream takes, by position and by name, with the same defaults; what it takes beyond that
    comes later and has a default."""
    parameters = list(inspect.signature(ours).parameters.values())
    shared, extra = parameters[: len(upstream)], parameters[len(upstream) :]
    assert [(canonical(parameter.name), parameter.default) for parameter in shared] == [
        (canonical(name), default) for name, default in upstream.items()
    ]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in shared)
    assert all(parameter.default is not REQUIRED for parameter in extra)
    with pytest.raises(RuntimeError):  # an argument is refused; a name that is not taken would be a TypeError
        ours(**{name: object() for name in upstream})


@pytest.mark.skipif(not PINNED.exists(), reason="upstream's package is not in this build")
@pytest.mark.parametrize("name", [name for name in OURS if name in INDEXER])
def test_the_pinned_wheel(name: str) -> None:
    check(getattr(deep_gemm, name), python_signature(PINNED.read_text(), name))


@pytest.mark.skipif(not SUBMODULE.exists(), reason="the submodule is not checked out")
@pytest.mark.parametrize("name", [name for name in OURS if name in INDEXER])
def test_the_submodule(name: str) -> None:
    upstream = pybind_signature(SUBMODULE.read_text(), name)
    check(getattr(deep_gemm, name), {n: PINNED_DEFAULTS.get(n, default) for n, default in upstream.items()})


@pytest.mark.parametrize("name", [name for name in OURS if name.endswith("_logits")])
def test_what_is_ours_alone_goes_by_keyword(name: str) -> None:
    parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
    ours = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert ours == {"out": None, "block_max": None}


@pytest.mark.parametrize("name", OURS)
def test_the_face_shows_our_signature_and_docstring(name: str) -> None:
    assert inspect.signature(getattr(deep_gemm, name)) == inspect.signature(getattr(sm120, name))
    assert getattr(deep_gemm, name).__doc__ == getattr(sm120, name).__doc__
