"""A model's weights from wherever its config says."""

from __future__ import annotations

from megatron_scope.config.schema import ModelConfig
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import ModelSource
from megatron_scope.convert.megatron_folder import MegatronFolder


def open_model(model: ModelConfig) -> ModelSource:
    """The Megatron checkpoint where one is named, else the Hugging Face folder; DataError when it is none."""
    if model.megatron is not None:
        return MegatronFolder(model.megatron, model.hf)
    return HfFolder(str(model.hf))
