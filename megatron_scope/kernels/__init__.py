"""Numerical kernels over vocabulary shards. They take their process group as an argument and know nothing
else of the package.
"""
