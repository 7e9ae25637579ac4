"""Megatron-core behind plain functions: the only place, with `convert`, that imports it."""
