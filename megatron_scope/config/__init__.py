"""Settings: their schema and defaults, strict loading, and the rules between them. Imports neither torch nor Megatron."""

from megatron_scope.config.load import load_config, parse_config, write_config
from megatron_scope.config.schema import Config

__all__ = ["Config", "load_config", "parse_config", "write_config"]
