"""SCOPE (arXiv:2604.10688) on Megatron-core: on-policy distillation from one CPU to a cluster of GPUs."""

__version__ = "0.1.0"
