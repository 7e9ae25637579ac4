"""One file a model family. A family declares which config.json it reads and how its tensors map to Megatron's
parameters.
"""

from __future__ import annotations

from typing import Any

from megatron_scope.convert.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megatron_scope.convert.families.base import Family
from megatron_scope.errors import DataError

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)
)


def family_of(config: dict[str, Any], source: str) -> Family:
    """The family that reads this config.json; DataError with the supported architectures otherwise."""
    names = config.get("architectures") or []
    for family in FAMILIES:
        if isinstance(names, list) and family.architecture in names:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise DataError(f"{source}: architectures is {names}; supported: {supported}")
