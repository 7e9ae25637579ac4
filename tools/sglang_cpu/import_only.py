"""Modules that can be imported and not used.

SGLang imports torchvision and sgl_kernel at its top, for images and kernels that a text model on a CPU never
reaches: there all mathematics is SGLang's torch-native code. Neither can be had for every CPU: torchvision's
wheel wants the CUDA build of torch, sgl_kernel's a GPU or a CPU with AMX. These stand-ins answer the imports
and compute nothing: whatever calls one is told so by an error.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from typing import Any, NoReturn


class Placeholder:
    """The value of a name of an import-only module.

    Imports may put it into a table, an annotation, an isinstance or the bases of a class; calling it is an
    error.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Any:
        return _named(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self.__name__} is a stand-in for imports alone: it computes nothing")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __instancecheck__(self, instance: object) -> bool:
        return False


class ImportOnlyModule(types.ModuleType):
    """A package with every name and every submodule that one may ask for."""

    __path__ = ()  # no file of ours is a submodule

    def __getattr__(self, name: str) -> Any:
        return _named(self, name)


def _named(owner: Any, name: str) -> Any:
    """The placeholder OWNER.NAME, the same one each time."""
    if name.startswith("__"):  # Python asks for these itself
        raise AttributeError(name)
    value = Placeholder(f"{owner.__name__}.{name}")
    setattr(owner, name, value)
    return value


class _Finder(MetaPathFinder, Loader):
    """Makes the submodules of one package."""

    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return ImportOnlyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: names come when they are asked for."""


def make_import_only(package: str) -> None:
    """Turns a package, while it is being imported, into an import-only one; what it defines stays."""
    module = sys.modules[package]
    module.__class__ = ImportOnlyModule
    module.__path__ = ()
    sys.meta_path.insert(0, _Finder(package))
