"""Settings: schema and defaults, strict loading, the rules between them. Imports no torch."""

from megatron_scope.config.load import load_config, parse_config, write_config
from megatron_scope.config.schema import Config

__all__ = ["Config", "load_config", "parse_config", "write_config"]
