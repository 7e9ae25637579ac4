"""Megatron checkpoints of several writers as a source of weights, and those that are refused."""

import json
import shutil

import pytest
import torch

from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import model_entries
from megatron_scope.convert.megatron_folder import MegatronFolder
from megatron_scope.convert.shape import padded_vocab_size
from megatron_scope.errors import DataError
from tests.unit.convert.folders import BY_FAMILY, CONFIG, QWEN3_MOE, stacked, write_checkpoint, write_folder

DIVISIBLE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 5}  # by four
NORMS = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}


def as_it_is(values):
    return values


def plain_norms(values):
    """Norms by their own names, as local layer specs have them."""
    return {NORMS.get(key, key): value for key, value in values.items()}


def by_layer(values):
    """A tensor a layer, as checkpoints of layers that differ have them."""
    found = {}
    for key, value in values.items():
        if key.startswith("decoder.layers."):
            for layer, part in enumerate(value):
                found[key.replace("decoder.layers.", f"decoder.layers.{layer}.")] = part
        else:
            found[key] = value
    return found


WRITERS = {
    "stacked": as_it_is,
    "plain norms": plain_norms,
    "by layer": by_layer,
    "by layer, plain norms": lambda values: by_layer(plain_norms(values)),
}


def problem(action):
    with pytest.raises(DataError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def values(tmp_path):
    return stacked(write_folder(tmp_path / "hf"))


@pytest.fixture
def checkpoint(tmp_path, values):
    return write_checkpoint(tmp_path / "mega", values, CONFIG)


# ---- what is read


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_rank_reads_what_it_reads_of_the_folder(tmp_path, family, writer):
    config = {**BY_FAMILY[family], **DIVISIBLE}
    hf = HfFolder(write_folder(tmp_path / "hf", config))
    values = WRITERS[writer](stacked(hf.path))
    megatron = MegatronFolder(write_checkpoint(tmp_path / "mega", values, config))
    megatron.check()
    assert megatron.shape == hf.shape and megatron.family is hf.family
    for size in (1, 2, 4):
        for entry in model_entries(hf.family, hf.shape, padded_vocab_size(130, size)):
            for rank in range(size):
                place = (rank, size) if entry.expert is None else (0, 1)
                found = megatron.shard(entry, *place)
                assert torch.equal(found, hf.shard(entry, *place)), (entry.key, rank, size)


@pytest.mark.parametrize("rows", [130, 131, 256, 1000])
@pytest.mark.parametrize("padded", [256, 512])
def test_rows_that_pad_a_table_are_zeros_whatever_was_saved(tmp_path, padded, rows):
    hf = HfFolder(write_folder(tmp_path / "hf"))
    values = stacked(hf.path, 1024)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        values[key][130:] = torch.nan
        values[key] = values[key][:rows]
    megatron = MegatronFolder(write_checkpoint(tmp_path / "mega", values, CONFIG))
    megatron.check()
    for entry in model_entries(hf.family, hf.shape, padded):
        assert torch.equal(megatron.shard(entry, 0, 1), hf.shard(entry, 0, 1))
        if entry.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(megatron.shard(entry, 1, 2), hf.shard(entry, 1, 2))


def test_each_parameter_has_the_dtype_it_is_stored_in(tmp_path, values):
    values = {key: value.bfloat16() if "norm" in key else value for key, value in values.items()}
    folder = MegatronFolder(write_checkpoint(tmp_path / "mega", values, CONFIG))
    for entry in model_entries(folder.family, folder.shape, 130):
        expected = torch.bfloat16 if "norm" in entry.key else torch.float32
        assert folder.dtype(entry) == folder.shard(entry, 0, 1).dtype == expected


def test_optimizer_and_other_state_is_passed_over(tmp_path, values):
    others = {"optimizer.state.exp_avg.decoder.layers.x": torch.ones(2), "rng_state": torch.ones(1)}
    MegatronFolder(write_checkpoint(tmp_path / "mega", {**values, **others}, CONFIG)).check()


# ---- where it lies


@pytest.mark.parametrize(
    ("said", "folder"),
    [
        ("120", "iter_0000120"),
        ("0\n", "iter_0000000"),
        ("12345678", "iter_12345678"),
        (" release\n", "release"),
    ],
)
def test_the_newest_iteration_of_megatron_lm_is_taken(tmp_path, checkpoint, said, folder):
    root = tmp_path / "run"
    shutil.copytree(checkpoint, root / folder)
    (root / "iter_0000007").mkdir()
    (root / "latest_checkpointed_iteration.txt").write_text(said)
    assert MegatronFolder(root).path == root / folder and MegatronFolder.has_config(root)
    assert MegatronFolder(root / folder).path == root / folder


def test_a_folder_that_is_a_checkpoint_itself_is_taken_as_it_is(checkpoint):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("5")
    assert MegatronFolder(checkpoint).path == checkpoint


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"", "''"),
        (b"soon", "'soon'"),
        (b"../other", "'../other'"),
        ("²".encode(), "'²'"),
        (b"-1", "'-1'"),
        (b"\xff\x00", "'\ufffd\\x00'"),
    ],
)
def test_a_latest_iteration_that_is_none_is_refused(tmp_path, said, shown):
    path = tmp_path / "latest_checkpointed_iteration.txt"
    path.write_bytes(said)
    expected = f"{path} says {shown}; expected a number or release: name the folder of the iteration itself"
    assert problem(lambda: MegatronFolder(tmp_path)) == expected
    assert problem(lambda: MegatronFolder.has_config(tmp_path)) == expected


def test_a_latest_iteration_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    assert problem(lambda: MegatronFolder(tmp_path)).startswith(
        f"{tmp_path / 'iter_0000009' / '.metadata'} is missing"
    )


def test_a_home_folder_is_expanded(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert MegatronFolder("~/mega").path == checkpoint


# ---- its config


def test_a_checkpoint_without_a_config_needs_a_folder_like_it(tmp_path, values):
    path = write_checkpoint(tmp_path / "mega", values)
    assert not MegatronFolder.has_config(path)
    assert problem(lambda: MegatronFolder(path)) == (
        f"{path / 'hf' / 'config.json'} is missing: this checkpoint does not say what model it is of; name a "
        "Hugging Face folder of the same architecture (--like HF_DIR, or hf beside megatron in a config)"
    )
    found = MegatronFolder(path, tmp_path / "hf")
    found.check()
    assert found.companions == tmp_path / "hf" and found.shape == HfFolder(tmp_path / "hf").shape


def test_a_folder_like_it_comes_before_its_own_config(tmp_path, checkpoint):
    like = write_folder(tmp_path / "like", rope_theta=5.0)
    assert MegatronFolder(checkpoint, like).shape.rope_theta == 5.0
    assert MegatronFolder(checkpoint).shape.rope_theta == 10000.0


def test_a_folder_like_it_without_a_config_is_refused(tmp_path, checkpoint):
    assert problem(lambda: MegatronFolder(checkpoint, tmp_path / "nothing")) == (
        f"{tmp_path / 'nothing' / 'config.json'} is missing; expected a Hugging Face model folder"
    )


def with_config(checkpoint, **changes):
    path = checkpoint / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return MegatronFolder(checkpoint)


@pytest.mark.parametrize(
    ("changes", "key", "found", "wanted"),
    [
        ({"vocab_size": 257}, "embedding.word_embeddings.weight", (256, 12), (257, 12)),
        ({"hidden_size": 16, "head_dim": 3}, "embedding.word_embeddings.weight", (256, 12), (130, 16)),
        (
            {"num_hidden_layers": 2},
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            (3, 12),
            (2, 12),
        ),
        (
            {"num_hidden_layers": 4},
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            (3, 12),
            (4, 12),
        ),
        ({"intermediate_size": 22}, "decoder.layers.mlp.linear_fc1.weight", (3, 40, 12), (3, 44, 12)),
        ({"head_dim": 4}, "decoder.layers.self_attention.linear_qkv.weight", (3, 24, 12), (3, 32, 12)),
    ],
)
def test_a_config_of_other_sizes_is_refused(checkpoint, changes, key, found, wanted):
    message = problem(with_config(checkpoint, **changes).check)
    assert message == (
        f"{checkpoint}: {key} has size {found}, but {checkpoint / 'hf' / 'config.json'} means {wanted}; use "
        "the config of the model that was saved"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tie_word_embeddings": True}, "holds output_layer.weight, which LlamaForCausalLM does not have"),
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            "has no tensor decoder.layers.self_attention.linear_qkv.bias "
            "(for model.layers.0.self_attn.q_proj.bias), which Qwen2ForCausalLM needs",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "head_dim": 3},
            "has no tensor decoder.layers.self_attention.q_layernorm.weight "
            "(for model.layers.0.self_attn.q_norm.weight), which Qwen3ForCausalLM needs",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
            "has no tensor decoder.layers.mlp.router.weight "
            "(for model.layers.0.block_sparse_moe.gate.weight), which MixtralForCausalLM needs",
        ),
    ],
)
def test_a_config_of_another_family_is_refused(checkpoint, changes, said):
    assert problem(with_config(checkpoint, **changes).check) == f"{checkpoint} {said}"


def test_another_number_of_experts_is_refused(tmp_path):
    values = stacked(write_folder(tmp_path / "hf", QWEN3_MOE))
    checkpoint = write_checkpoint(tmp_path / "mega", values, {**QWEN3_MOE, "num_experts": 8})
    assert "router.weight has size (3, 6, 12), but" in problem(MegatronFolder(checkpoint).check)


# ---- its tensors


def test_every_tensor_that_is_missing_is_named(tmp_path, values):
    assert len(values) == 9
    for number, key in enumerate(values):
        rest = {other: value for other, value in values.items() if other != key}
        folder = MegatronFolder(write_checkpoint(tmp_path / str(number), rest, CONFIG))
        message = problem(folder.check)
        assert message.startswith(f"{folder.path} has no tensor {key} (for ")
        assert message.endswith("), which LlamaForCausalLM needs")


def test_a_layer_that_is_missing_is_noticed(tmp_path, values):
    values = by_layer(values)
    del values["decoder.layers.1.mlp.linear_fc2.weight"]
    folder = MegatronFolder(write_checkpoint(tmp_path / "mega", values, CONFIG))
    expected = (
        "has no tensor decoder.layers.mlp.linear_fc2.weight (for model.layers.1.mlp.down_proj.weight), "
    )
    assert expected in problem(folder.check)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.3.mlp.linear_fc2.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "embedding.position_embeddings.weight",
        "output_layer.bias",
    ],
)
def test_a_tensor_that_the_model_would_ignore_is_refused(tmp_path, values, key):
    folder = MegatronFolder(write_checkpoint(tmp_path / "mega", {**values, key: torch.ones(3, 4)}, CONFIG))
    assert problem(folder.check) == f"{folder.path} holds {key}, which LlamaForCausalLM does not have"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_converted_is_refused(tmp_path, values, dtype):
    values["output_layer.weight"] = values["output_layer.weight"].to(dtype)
    folder = MegatronFolder(write_checkpoint(tmp_path / "mega", values, CONFIG))
    expected = f"{folder.path}: output_layer.weight is {dtype}; supported: F32, BF16, F16"
    assert problem(folder.check) == expected


def test_a_damaged_file_is_refused_by_the_check(checkpoint):
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    assert problem(MegatronFolder(checkpoint).check).startswith(f"{path} should have ")
