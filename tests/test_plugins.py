"""The plugins without a framework: when a hook is placed, when it serves, and that a server is never worse off.

The framework here is a small package written to disk, whose functions say what they are.
"""

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deep_gemm_plugins import hooks, sglang, vllm
from deep_gemm_plugins.hooks import Around, Hook, Plugin

SOURCES = {
    "__init__": "",
    "kernels": """
def scale(values, factor=2, *, out=None):
    return "theirs"

class Backend:
    def scale(self, values):
        return "theirs"
""",
    "user": """
from clientele.kernels import scale

def use(values):
    return scale(values)
""",
}


@pytest.fixture
def framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A framework named `clientele`, version 1.0."""
    (tmp_path / "clientele").mkdir()
    for name, source in SOURCES.items():
        (tmp_path / "clientele" / f"{name}.py").write_text(source)
    (tmp_path / "clientele-1.0.dist-info").mkdir()
    (tmp_path / "clientele-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: clientele\nVersion: 1.0"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(hooks.SWITCH, raising=False)
    yield
    hooks._Imports.waiting.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "clientele"]:
        del sys.modules[name]


def plugin(*given: Hook, version: str = "1.0") -> Plugin:
    return Plugin("clientele", version, given, "clientele serve")


def scale_hook(function=lambda values, factor=2, *, out=None: "ours") -> Hook:
    return Hook("clientele.kernels:scale", "(values, factor=2, *, out=None)", function)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_nothing_is_imported_before_the_framework_imports_it(framework) -> None:
    hook = scale_hook()
    plugin(hook).register()
    assert "clientele" not in sys.modules and hook.state == "waits for its module"
    kernels = importlib.import_module("clientele.kernels")
    assert hook.state == "taken" and kernels.scale([1]) == "ours"
    assert kernels.scale.__name__ == "scale" and kernels.scale.__wrapped__([1]) == "theirs"
    assert kernels.__spec__.loader.get_source("clientele.kernels") == SOURCES["kernels"]


@pytest.mark.parametrize("first", [[], ["clientele.kernels"], ["clientele.user"]])
def test_what_was_imported_from_the_target_s_module_is_replaced_too(framework, first: list[str]) -> None:
    for name in first:
        importlib.import_module(name)
    plugin(scale_hook()).register()
    assert importlib.import_module("clientele.user").use([1]) == "ours"


def test_a_method(framework) -> None:
    hook = Hook("clientele.kernels:Backend.scale", "(self, values)", lambda self, values: (type(self).__name__, values))
    plugin(hook).register()
    assert importlib.import_module("clientele.kernels").Backend().scale(3) == ("Backend", 3)


def test_registering_twice_places_once(framework) -> None:
    once = plugin(scale_hook())
    once.register()
    once.register()
    kernels = importlib.import_module("clientele.kernels")
    assert not hasattr(kernels.scale.__wrapped__, "__wrapped__")


def test_the_first_call_that_is_ours_is_logged_once(framework, caplog) -> None:
    caplog.set_level(logging.INFO)
    plugin(scale_hook()).register()
    scale = importlib.import_module("clientele.kernels").scale
    assert not caplog.records
    scale([1]), scale([1])
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("clientele.deep_gemm_sm120", "clientele.kernels:scale: on deep_gemm's SM120 kernels")
    ]


def test_a_call_that_is_not_ours_is_the_framework_s(framework, caplog) -> None:
    hook = scale_hook(lambda values, factor=2, *, out=None: NotImplemented if factor == 3 else "ours")
    plugin(hook).register()
    scale = importlib.import_module("clientele.kernels").scale
    assert (scale([1], 3), scale([1]), scale([1], factor=3)) == ("theirs", "ours", "theirs")
    assert hook.state == "taken" and not warnings(caplog)


def test_a_hook_that_fails_is_the_framework_s_from_then_on(framework, caplog) -> None:
    calls = []

    def fails(values, factor=2, *, out=None):
        calls.append(values)
        raise RuntimeError("no such kernel\nand a long log")

    hook = scale_hook(fails)
    plugin(hook).register()
    scale = importlib.import_module("clientele.kernels").scale
    assert (scale([1]), scale([2])) == ("theirs", "theirs")
    assert calls == [[1]]
    assert warnings(caplog) == [
        "clientele.kernels:scale: not on deep_gemm's SM120 kernels: RuntimeError: no such kernel"
    ]
    assert hook.state == "not taken: RuntimeError: no such kernel"


def test_the_framework_s_own_error_is_left_alone(framework, caplog) -> None:
    hook = scale_hook(lambda *args, **kwargs: NotImplemented)
    plugin(hook).register()
    scale = importlib.import_module("clientele.kernels").scale
    with pytest.raises(TypeError, match="unexpected keyword"):
        scale([1], size=3)
    assert hook.active and not warnings(caplog)


@pytest.mark.parametrize(
    ("target", "parameters", "reason"),
    [
        ("clientele.kernels:shrink", "(values)", "clientele.kernels has no shrink"),
        ("clientele.kernels:Backend.shrink", "(self, values)", "clientele.kernels has no Backend.shrink"),
        (
            "clientele.kernels:scale",
            "(values, factor, *, out=None)",
            r"its parameters are (values, factor=2, *, out=None)",
        ),
        ("clientele.kernels:scale", "(values, factor=3, *, out=None)", "its parameters are"),
        ("clientele.kernels:scale", "(values, factor=2, out=None)", "its parameters are"),
    ],
)
def test_a_target_that_has_changed_is_left_alone(framework, caplog, target: str, parameters: str, reason: str) -> None:
    hook = Hook(target, parameters, lambda *args, **kwargs: "ours")
    other = Hook("clientele.kernels:Backend.scale", "(self, values)", lambda self, values: "ours")
    plugin(hook, other).register()
    kernels = importlib.import_module("clientele.kernels")
    assert kernels.scale([1]) == "theirs" and kernels.Backend().scale(1) == "ours"
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{target}: not on deep_gemm's SM120 kernels: ") and reason in warning
    assert reason in hook.state


@pytest.mark.parametrize("version", ["1.0.1", "1.1", "2.0"])
def test_another_version_is_left_alone(framework, caplog, version: str) -> None:
    hook = scale_hook()
    plugin(hook, version=version).register()
    assert importlib.import_module("clientele.kernels").scale([1]) == "theirs"
    assert warnings(caplog) == [
        f"deep_gemm's SM120 kernels are not used: the plugin is for clientele {version}, this is 1.0"
    ]
    assert plugin(version=version).report() == [f"the plugin is for clientele {version}, this is 1.0"]


def test_a_build_s_local_version_is_the_release_s(framework, tmp_path: Path) -> None:
    path = tmp_path / "clientele-1.0.dist-info" / "METADATA"
    path.write_text(path.read_text().replace("Version: 1.0", "Version: 1.0+cu130"))
    assert plugin().unfit() is None


def test_the_switch_turns_everything_off(framework, monkeypatch, caplog) -> None:
    monkeypatch.setenv(hooks.SWITCH, "0")
    caplog.set_level(logging.INFO)
    plugin(scale_hook()).register()
    assert importlib.import_module("clientele.kernels").scale([1]) == "theirs"
    assert not caplog.records and plugin().report() == [f"{hooks.SWITCH}=0"]


def test_a_module_that_cannot_be_imported_raises_its_own_error(framework, tmp_path: Path) -> None:
    (tmp_path / "clientele" / "kernels.py").write_text("raise OSError('no library')")
    hook = scale_hook()
    plugin(hook).register()
    with pytest.raises(OSError, match="no library"):
        importlib.import_module("clientele.kernels")
    assert "cannot be imported: OSError: no library" in plugin(hook).report()[2]


def test_a_module_that_is_not_there(framework) -> None:
    hook = Hook("clientele.gone:scale", "(values)", lambda values: "ours")
    given = plugin(hook)
    given.register()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("clientele.gone")
    assert given.report()[2].startswith("scale of clientele.gone: not taken: clientele.gone cannot be imported")


def test_the_report_places_every_hook(framework, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(hooks, "serves", lambda device: device.index == 1)
    hook, gone = scale_hook(), Hook("clientele.kernels:gone", "()", lambda: "ours")
    assert plugin(hook, gone).report() == [
        "clientele 1.0: clientele serve",
        "hooks serve cuda:1",
        "scale of clientele.kernels: taken",
        "gone of clientele.kernels: not taken: clientele.kernels has no gone",
    ]


def test_a_framework_that_is_not_installed() -> None:
    assert Plugin("no-such-framework", "1.0", [], "").report() == ["no-such-framework is not installed"]


def test_around(framework, caplog) -> None:
    """The framework's function runs within our context, and without it once that has failed."""
    import contextlib

    seen = []

    @contextlib.contextmanager
    def context(values, factor=2, *, out=None):
        if values == [0]:
            raise LookupError("no gate")
        seen.append("before")
        yield True
        seen.append("after")

    caplog.set_level(logging.INFO)
    hook = Around("clientele.kernels:scale", "(values, factor=2, *, out=None)", context)
    plugin(hook).register()
    scale = importlib.import_module("clientele.kernels").scale
    assert scale([1]) == "theirs" and seen == ["before", "after"]
    assert scale([0]) == "theirs" and scale([1]) == "theirs" and seen == ["before", "after"]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_only_sm12x_is_served(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, device.index))
    serves = hooks.serves.__wrapped__  # without its memory
    assert not serves(torch.device("cpu"))
    assert serves(torch.device("cuda", 0)) and serves(torch.device("cuda", 1))  # SM120, SM121
    for major in (8, 9, 10, 11):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert not serves(torch.device("cuda", 0))


@pytest.mark.parametrize("plugin", [sglang.PLUGIN, vllm.PLUGIN], ids=lambda plugin: plugin.framework)
def test_stand_ins_take_what_their_targets_take(plugin: Plugin) -> None:
    for hook in plugin.hooks:
        if hook.function and not isinstance(hook, Around):
            assert hooks._parameters(hook.function) == hook.parameters, hook.target


def test_loading_a_plugin_is_quick_and_touches_nothing() -> None:
    """As entry points are loaded, in a process that has what frameworks have by then: under 50 ms, without PyTorch."""
    code = """
import importlib, importlib.metadata, logging, sys, time
start = time.process_time()
for name in ("sglang", "vllm"):
    importlib.import_module(f"deep_gemm_plugins.{name}").register()
took = time.process_time() - start
loaded = {"torch", "deep_gemm", "cuda", "sglang", "vllm", "numpy"} & set(sys.modules)
print(took, *loaded)
"""
    environment = {"PYTHONPATH": str(Path(hooks.__file__).parent.parent)}
    best = 1.0
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        took, *loaded = run.stdout.split()
        best = min(best, float(took))
        assert not loaded
    assert best < 0.050
