"""The servers' model beside the student's tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_scope.errors import SyncError
from megatron_scope.records import ServedModel
from megatron_scope.sync.buckets import plan_buckets
from megatron_scope.sync.compare import check_served
from tests.helpers.models import read_weights, save_qwen2

ARCHITECTURE = "Qwen2ForCausalLM"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_qwen2(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture
def check(student):
    """Compares the student's tensors with those of a folder."""
    tensors = [(name, tuple(value.shape)) for name, value in read_weights(student).items()]
    buckets = plan_buckets(tensors, torch.float32, 4000)

    def run(folder, architectures=(ARCHITECTURE,)):
        check_served(ServedModel("http://s", 1, "0", str(folder), architectures), ARCHITECTURE, buckets)

    return run


def changed_copy(student, folder, change):
    folder.mkdir()
    (folder / "config.json").write_bytes((student / "config.json").read_bytes())
    save_file(change(read_weights(student)), folder / "model.safetensors")
    return folder


def test_the_students_own_folder_passes(check, student):
    check(student)


def test_a_folder_that_cannot_be_read_from_here_passes(check, tmp_path):
    check("/gone/with/the/old/version")
    (tmp_path / "config.json").write_text("{")
    check(tmp_path)


def test_another_architecture_is_refused_by_name(check, student):
    with pytest.raises(SyncError, match="a LlamaForCausalLM; the student is a Qwen2ForCausalLM: start"):
        check(student, ("LlamaForCausalLM",))


def test_a_tensor_of_another_size_is_refused(check, student, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed_copy(student, tmp_path / "m", lambda weights: {**weights, name: torch.zeros(41, 24)})
    with pytest.raises(SyncError, match=rf"has \[41, 24\] as size of {name}; the student's is \[") as caught:
        check(folder)
    assert "\n" not in str(caught.value) and "http://s" in str(caught.value)


def test_a_missing_tensor_is_refused(check, student, tmp_path):
    name = "model.layers.0.input_layernorm.weight"

    def without(weights):
        del weights[name]
        return weights

    with pytest.raises(SyncError, match=f"has no {name}"):
        check(changed_copy(student, tmp_path / "m", without))


def test_a_layer_that_would_keep_its_old_weights_is_refused(check, student, tmp_path):
    name = "model.layers.9.input_layernorm.weight"
    folder = changed_copy(student, tmp_path / "m", lambda weights: {**weights, name: torch.zeros(24)})
    with pytest.raises(SyncError, match=f"has {name}; the student has no such tensor"):
        check(folder)


def test_a_tied_table_written_twice_passes(check, student, tmp_path):
    assert json.loads((student / "config.json").read_text())["tie_word_embeddings"]
    folder = changed_copy(
        student,
        tmp_path / "m",
        lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
    )
    check(folder)
