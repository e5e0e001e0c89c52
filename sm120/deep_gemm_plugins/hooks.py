"""What the plugins share: how a framework's function is replaced by ours, and when it is left alone.

A hook waits for the module of its target to be imported: in processes that never import it, nothing happens at all. It
is placed if the framework's version and the target's parameters are those that it was written for. A call is ours where
the tensors lie on SM12x and the hook knows the case; any other call, and all calls after an error of ours, are the
framework's own. Each hook says so once in the log, whether it serves or not.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

SWITCH = "DG_SM120_PLUGIN"  # 0: no plugin does anything


@functools.cache
def serves(device: Any) -> bool:
    """Whether calls with tensors on `device` (a torch.device) are ours: SM12x."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 12


@functools.cache
def ours() -> ModuleType:
    """`deep_gemm.sm120`, imported by the first call that is ours."""
    return importlib.import_module("deep_gemm.sm120")


class Unfit(Exception):
    """Why a hook is not for this framework, in words for the log."""


class Hook:
    """Puts `function` in the place of a framework's function `target`, "module:name" or "module:Class.name".

    `parameters` is the target's signature without annotations (None: a function of this wheel, which is not checked).
    `function` takes the target's arguments and returns its result, or NotImplemented where the call is the framework's.
    What it raises it must raise before it writes anything that the framework's own function does not write again.
    """

    def __init__(self, target: str, parameters: str | None, function: Callable | None) -> None:
        self.target, self.parameters, self.function = target, parameters, function
        self.module, _, self.path = target.partition(":")
        self.reset()

    def reset(self) -> None:
        self.active, self.used = False, False
        self.state = "waits for its module"

    def install(self, plugin: "Plugin", module: ModuleType) -> None:
        """Replaces the target in its module, or says why not."""
        self.log = plugin.log
        try:
            original = _resolve(module, self.path)
            found = _parameters(original)
            if self.parameters not in (None, found):
                raise Unfit(f"its parameters are {found}, not {self.parameters}")
            plugin.place(self, original)
            if _resolve(module, self.path) is original:
                raise Unfit("it could not be replaced")
        except Exception as error:  # whatever the framework does about its names: it goes on as it was
            self.refuse(error)
            return
        self.active, self.state = True, "taken"

    def __call__(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            try:
                result = self.function(*args, **kwargs)
            except Exception as error:  # the framework's own function does the same work
                self.refuse(error)
            else:
                if result is not NotImplemented:
                    if not self.used:
                        self.tell()
                    return result
        return original(*args, **kwargs)

    def tell(self) -> None:
        self.used = True
        self.log.info("%s: on deep_gemm's SM120 kernels", self.target)

    def refuse(self, reason: Exception) -> None:
        self.active = False
        self.state = f"not taken: {_said(reason)}"
        self.log.warning("%s: not on deep_gemm's SM120 kernels: %s", self.target, _said(reason))


class Around(Hook):
    """Runs the framework's own `target` within the context that `function` makes from its arguments, which says whether
    it changes anything."""

    def __call__(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if self.active:
                try:
                    changes = stack.enter_context(self.function(*args, **kwargs))
                    if changes and not self.used:
                        self.tell()
                except Exception as error:
                    self.refuse(error)
            return original(*args, **kwargs)


class Plugin:
    """The hooks for one framework, of one version, whose logger's name carries them into its log."""

    def __init__(self, framework: str, version: str, hooks: Iterable[Hook], command: str) -> None:
        self.framework, self.version, self.hooks, self.command = framework, version, list(hooks), command
        self.log = logging.getLogger(f"{framework}.deep_gemm_sm120")
        self.registered = False

    def place(self, hook: Hook, original: Callable) -> None:
        """Puts `hook` where `original` is: in its module or class, and where else in the framework it was imported."""

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        owner, _, name = hook.path.rpartition(".")
        module = sys.modules[hook.module]
        setattr(_resolve(module, owner) if owner else module, name, call)
        for other, module in list(sys.modules.items()):
            if other.partition(".")[0] == self.framework and isinstance(module, ModuleType):
                for name, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, name, call)

    def register(self) -> None:
        """The entry point: lets each hook wait for its module. Imports nothing."""
        reason = self.unfit()
        if self.registered or reason == f"{SWITCH}=0":
            return
        self.registered = True
        if reason:
            self.log.warning("deep_gemm's SM120 kernels are not used: %s", reason)
            return
        for hook in self.hooks:
            when_imported(hook.module, functools.partial(hook.install, self))

    def unfit(self) -> str | None:
        """Why no hook is for this installation."""
        if os.environ.get(SWITCH) == "0":
            return f"{SWITCH}=0"
        found = self.found()
        if found is None:
            return f"{self.framework} is not installed"
        if found.partition("+")[0] != self.version:
            return f"the plugin is for {self.framework} {self.version}, this is {found}"
        return None

    def found(self) -> str | None:
        """The framework's version, from its package's metadata."""
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        try:
            return version(self.framework)
        except PackageNotFoundError:
            return None

    def report(self) -> list[str]:
        """Lines for `doctor`: every hook's module is imported, so that each one is placed or refused here and now."""
        reason = self.unfit()
        if reason:
            return [reason]
        self.register()
        import torch

        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        here = ", ".join(str(device) for device in devices if serves(device)) or "no device here: none is SM12x"
        lines = [f"{self.framework} {self.found()}: {self.command}", f"hooks serve {here}"]
        for hook in self.hooks:
            try:
                importlib.import_module(hook.module)
            except Exception as error:
                hook.state = f"not taken: {hook.module} cannot be imported: {_said(error)}"
            lines.append(f"{hook.path} of {hook.module}: {hook.state}")
        return lines


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action` with module `name` now if it is imported, else right after its code has run."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
    else:
        if _Imports not in sys.meta_path:
            sys.meta_path.insert(0, _Imports)
        _Imports.waiting.setdefault(name, []).append(action)


class _Imports:
    """Finds the modules that hooks wait for where the other finders find them, and calls the hooks after each."""

    waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        actions = cls.waiting.pop(name, None)
        if actions is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in actions:
                action(module)

        spec.loader.exec_module = exec_module
        return spec


def _resolve(module: ModuleType, path: str) -> Any:
    found = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise Unfit(f"{module.__name__} has no {path}")
        found = getattr(found, name)
    return found


def _parameters(function: Callable) -> str:
    """The signature without annotations: names, order, kinds and defaults."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _said(reason: Exception) -> str:
    """One line."""
    text = str(reason).partition("\n")[0]
    return text if isinstance(reason, Unfit) else f"{type(reason).__name__}: {text}"
