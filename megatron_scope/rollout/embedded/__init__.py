"""A rollout server for the CPU with SGLang's HTTP protocol; importing this package imports no torch."""

from megatron_scope.rollout.embedded.options import ServeOptions, add_serve_arguments, options_from

__all__ = ["ServeOptions", "add_serve_arguments", "options_from"]
