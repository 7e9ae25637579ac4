"""Hosting Megatron-core on a CPU: what it changes, and what it leaves alone."""

from __future__ import annotations

import torch

from megatron_scope.backend import cpu


def test_nothing_is_patched_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "manual_seed")}
    factories = {name: getattr(torch, name) for name in ("zeros", "empty", "tensor")}
    methods = (torch.Tensor.type, torch.Tensor.cuda)
    cpu.host()
    assert before == {name: getattr(torch.cuda, name) for name in before}
    assert factories == {name: getattr(torch, name) for name in factories}
    assert methods == (torch.Tensor.type, torch.Tensor.cuda)


def test_cuda_names_get_a_cpu_meaning_and_other_code_goes_on(pool, tmp_path):
    seen = pool(1).run("tests.helpers.jobs:look_at_the_hosted_process", str(tmp_path))[0]
    assert seen["zeros on cuda"] == "cpu"
    assert seen["type"] == "torch.cuda.FloatTensor"
    assert seen["type of an integer"] == "torch.LongTensor"
    # `with torch.device("meta")` still reaches every factory: transformers builds models in it.
    assert seen["arange on meta"] == "meta"
    assert seen["rotary frequencies of a model read by transformers"]
    assert seen["hosting twice changes nothing"]
