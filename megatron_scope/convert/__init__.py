"""Hugging Face folders and Megatron-core parameters: what a model looks like on both sides, and how one
becomes the other.
"""
