"""Import-only sgl_kernel: the compiled operations of SGLang, none of which the torch-native backends call.

Only names of the package itself: where SGLang tries a submodule, it must find none and take its other way.
"""

from __future__ import annotations

from typing import Any

from import_only import Placeholder

__version__ = "0.0.0"
__path__ = ()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Placeholder(f"{__name__}.{name}")
