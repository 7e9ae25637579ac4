"""Proof that two sides hold the same numbers: one bit is enough to refute it."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch

from megatron_scope.convert import blocks
from megatron_scope.convert.certify import compare_tensors, summary
from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.megatron_folder import MegatronFolder
from megatron_scope.convert.shape import FileLayout
from megatron_scope.convert.to_megatron import to_megatron
from megatron_scope.errors import DataError
from tests.unit.convert.folders import (
    BY_FAMILY,
    CONFIG,
    QWEN3_MOE,
    stacked,
    tensors,
    write_checkpoint,
    write_folder,
)


def compare(hf, megatron):
    return compare_tensors(HfFolder(hf), MegatronFolder(megatron))


def differing(proofs):
    return {proof.name: proof.largest_difference for proof in proofs if not proof.equal}


def flip(tensor, place, bit):
    """Turns one bit of one number, in place."""
    kind = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    tensor.view(-1).view(kind)[place] ^= 1 << bit


@pytest.fixture
def hf(tmp_path):
    return write_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("tied", "layout"),
    [(True, FileLayout()), (False, FileLayout(tensor=2, pipeline=2))],
    ids=["tied-one", "untied-tp2-pp2"],
)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_tensor_of_a_conversion_is_compared_and_equal(tmp_path, monkeypatch, family, tied, layout):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    config = {**BY_FAMILY[family], "tie_word_embeddings": tied}
    hf = write_folder(tmp_path / "hf", config)
    to_megatron(hf, tmp_path / "mega", layout)
    proofs = compare(hf, tmp_path / "mega")
    weights = tensors(config)
    assert sorted(proof.name for proof in proofs) == sorted(weights)
    for proof in proofs:
        tensor = weights[proof.name]
        sha = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert proof.equal and proof.hf_sha256 == proof.megatron_sha256 == sha
        assert (proof.shape, proof.largest_difference) == (list(tensor.shape), 0.0)
        assert proof.hf_dtype == proof.megatron_dtype == "float32"


def test_one_flipped_bit_of_any_tensor_is_found_and_named(tmp_path, hf):
    for number, name in enumerate(weights := tensors()):
        changed = {**weights, name: weights[name].clone()}
        flip(changed[name], -1, 0)
        other = write_folder(tmp_path / "other", weights=changed)
        megatron = write_checkpoint(tmp_path / str(number), stacked(other), CONFIG)
        difference = (changed[name] - weights[name]).abs().max().item()
        assert differing(compare(hf, megatron)) == {name: difference} and difference > 0


def test_one_flipped_bit_in_the_file_of_a_checkpoint_is_found(tmp_path, hf):
    to_megatron(hf, tmp_path / "mega")
    path = tmp_path / "mega" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    row = tensors()["model.layers.1.mlp.up_proj.weight"][3].numpy().tobytes()
    at = bytes(content).index(row)
    content[at] ^= 1
    path.write_bytes(content)
    assert list(differing(compare(hf, tmp_path / "mega"))) == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("bit", [0, 22, 23, 31])
def test_the_largest_difference_is_that_of_the_numbers(tmp_path, hf, bit):
    values = stacked(hf)
    before = values["decoder.final_layernorm.weight"].clone()
    flip(values["decoder.final_layernorm.weight"], 4, bit)
    difference = (values["decoder.final_layernorm.weight"].double() - before.double()).abs().max().item()
    found = differing(compare(hf, write_checkpoint(tmp_path / "mega", values, CONFIG)))
    assert found == {"model.norm.weight": difference}


def test_zeros_of_another_sign_are_not_equal(tmp_path):
    weights = {**tensors(), "model.norm.weight": torch.zeros(12)}
    hf = write_folder(tmp_path / "hf", weights=weights)
    values = stacked(hf)
    values["decoder.final_layernorm.weight"] *= -1.0
    found = differing(compare(hf, write_checkpoint(tmp_path / "mega", values, CONFIG)))
    assert found == {"model.norm.weight": 0.0}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["hf", "megatron"])
def test_a_number_that_is_none_is_an_infinite_difference(tmp_path, hf, number, side):
    weights = tensors()
    weights["model.norm.weight"][3] = number
    spoilt = write_folder(tmp_path / "spoilt", weights=weights)
    ours, theirs = (spoilt, hf) if side == "hf" else (hf, spoilt)
    found = compare(ours, write_checkpoint(tmp_path / "mega", stacked(theirs), CONFIG))
    assert differing(found) == {"model.norm.weight": math.inf}


def test_exchanged_experts_are_found(tmp_path):
    hf = write_folder(tmp_path / "hf", QWEN3_MOE)
    values = stacked(hf)
    fc2 = values["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    fc2[1, [2, 4]] = fc2[1, [4, 2]]
    found = differing(compare(hf, write_checkpoint(tmp_path / "mega", values, QWEN3_MOE)))
    assert set(found) == {f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (2, 4)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_the_checkpoints_dtype_is_what_a_conversion_does(tmp_path, hf, dtype):
    to_megatron(hf, tmp_path / "mega", dtype=dtype)
    proofs = compare(hf, tmp_path / "mega")
    name = str(dtype).removeprefix("torch.")
    assert all(proof.equal and proof.hf_dtype == "float32" for proof in proofs)
    assert {proof.megatron_dtype for proof in proofs} == {name}
    expected = tensors()["model.norm.weight"].to(dtype).view(torch.int16).numpy().tobytes()
    (norm,) = (proof for proof in proofs if proof.name == "model.norm.weight")
    assert norm.megatron_sha256 == hashlib.sha256(expected).hexdigest()


def test_a_checkpoint_of_more_precision_than_the_folder_is_not_equal(tmp_path, hf):
    """The numbers that a cast took away are a difference."""
    half = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    to_megatron(hf, tmp_path / "mega")
    found = compare(write_folder(tmp_path / "half", weights=half), tmp_path / "mega")
    assert len(differing(found)) == len(half)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, "num_layers is 3 and 2"),
        ({"rope_theta": 5.0}, "rope_theta is 10000.0 and 5.0"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon is 1e-06 and 1e-05"),
        ({"tie_word_embeddings": True}, "tied_embeddings is False and True"),
        ({"sliding_window": 8, "architectures": ["MistralForCausalLM"]}, "sliding_window is None and 8"),
    ],
)
def test_sides_of_different_models_are_refused(tmp_path, hf, changes, said):
    config = {**CONFIG, **changes}
    other = write_folder(tmp_path / "other", config)
    megatron = write_checkpoint(tmp_path / "mega", stacked(other), config)
    with pytest.raises(DataError) as raised:
        compare(hf, megatron)
    assert str(raised.value) == f"{hf} and {megatron} are of different models: {said}"


@pytest.mark.parametrize("side", ["hf", "megatron"])
def test_a_missing_tensor_is_refused_on_either_side(tmp_path, hf, side):
    values, weights = stacked(hf), tensors()
    if side == "hf":
        del weights["model.norm.weight"]
        write_folder(hf, weights=weights)
    else:
        del values["decoder.final_layernorm.weight"]
    megatron = write_checkpoint(tmp_path / "mega", values, CONFIG)
    with pytest.raises(DataError, match="has no tensor"):
        compare(hf, megatron)


def test_the_summary_counts_and_lists_every_tensor(tmp_path, hf):
    values = stacked(hf)
    values["decoder.final_layernorm.weight"][0] += 1.0
    values["output_layer.weight"][1, 1] += 0.5
    proofs = compare(hf, write_checkpoint(tmp_path / "mega", values, CONFIG))
    found = summary(proofs)
    assert (found["compared"], found["equal"]) == (len(proofs), len(proofs) - 2)
    assert found["largest_difference"] == pytest.approx(1.0, abs=1e-6)
    assert found["each"] == [{**dataclasses.asdict(proof), "equal": proof.equal} for proof in proofs]
    assert json.loads(json.dumps(found)) == found
