"""How tensors are put into buckets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_scope.sync.buckets import bucket_size, plan_buckets

TENSORS = [("a", (3, 4)), ("b", (8,)), ("big", (10, 10)), ("c", (2, 2, 2)), ("d", (1,)), ("e", (12,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_bytes", [1, 40, 100, 250, 10**9])
def test_every_tensor_travels_once_in_order_within_the_limit(dtype, max_bytes):
    buckets = plan_buckets(iter(TENSORS), dtype, max_bytes)
    sent = [pair for bucket in buckets for pair in zip(bucket.names, bucket.shapes, strict=True)]
    assert sent == TENSORS
    for bucket in buckets:
        assert bucket.num_bytes == sum(math.prod(shape) for shape in bucket.shapes) * dtype.itemsize
        assert bucket.num_bytes <= max_bytes or len(bucket.names) == 1
        assert [getattr(torch, name) for name in bucket.dtypes] == [dtype] * len(bucket.names)
    for first, second in itertools.pairwise(buckets):
        assert first.num_bytes + math.prod(second.shapes[0]) * dtype.itemsize > max_bytes


def test_a_tensor_larger_than_a_bucket_stands_alone():
    buckets = plan_buckets(TENSORS, torch.float32, 100)
    assert [bucket.names for bucket in buckets] == [("a", "b"), ("big",), ("c", "d", "e")]
    assert [bucket.num_bytes for bucket in buckets] == [80, 400, 84]


def test_a_stage_without_tensors_has_no_bucket():
    assert plan_buckets([], torch.float32, 100) == ()


@pytest.mark.parametrize(
    ("limit", "in_hand", "size"), [(100, 0, 100), (100, 30, 85), (100, 100, 50), (100, 180, 50)]
)
def test_two_buckets_and_the_parameter_in_hand_fit_into_two_of_the_limit(limit, in_hand, size):
    assert bucket_size(limit, in_hand) == size
    assert 2 * size + in_hand <= 2 * limit or in_hand > limit
