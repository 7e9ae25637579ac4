"""Megatron to Hugging Face: the same bits come back, and nothing is written of what cannot be used."""

import json
import types

import pytest
import torch

from megatron_scope.convert import blocks, files, to_hf
from megatron_scope.convert.hf_folder import INDEX, SINGLE, HfFolder
from megatron_scope.convert.shape import FileLayout
from megatron_scope.convert.to_megatron import to_megatron
from megatron_scope.errors import DataError
from tests.unit.convert.folders import (
    BY_FAMILY,
    CONFIG,
    read_weights,
    same_bits,
    stacked,
    tensors,
    write_checkpoint,
    write_folder,
    write_shards,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "mega", stacked(write_folder(tmp_path / "hf")), CONFIG)


def refuse(megatron, out, kind=DataError, **options):
    """The message of a conversion that is refused and leaves nothing."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind) as raised:
        to_hf.to_hf(megatron, out, **options)
    assert sorted(out.parent.rglob("*")) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- what is written


@pytest.mark.parametrize(
    ("tied", "layout"),
    [(False, FileLayout()), (True, FileLayout(tensor=2, pipeline=2))],
    ids=["untied-one", "tied-tp2-pp2"],
)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_there_and_back_every_bit_is_the_same(tmp_path, out, monkeypatch, family, tied, layout):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    config = {**BY_FAMILY[family], "tie_word_embeddings": tied}
    hf = write_folder(tmp_path / "hf", config)
    to_megatron(hf, tmp_path / "mega", layout)
    done = to_hf.to_hf(tmp_path / "mega", out)
    assert same_bits(read_weights(out), tensors(config))
    assert done.num_bytes == sum(tensor.nbytes for tensor in tensors(config).values())
    HfFolder(out).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [128, 129])
def test_no_row_that_pads_a_table_comes_back_in_any_dtype(tmp_path, out, dtype, rows):
    config = {**CONFIG, "vocab_size": rows}
    weights = {name: tensor.to(dtype) for name, tensor in tensors(config).items()}
    to_megatron(write_folder(tmp_path / "hf", config, weights), tmp_path / "mega", FileLayout(tensor=2))
    to_hf.to_hf(tmp_path / "mega", out)
    assert same_bits(read_weights(out), weights)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_numbers_are_cast_as_torch_casts_them(tmp_path, out, source, target):
    weights = {name: tensor.to(source) for name, tensor in tensors().items()}
    to_megatron(write_folder(tmp_path / "hf", weights=weights), tmp_path / "mega")
    to_hf.to_hf(tmp_path / "mega", out, dtype=target)
    assert same_bits(read_weights(out), {name: tensor.to(target) for name, tensor in weights.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == str(target).removeprefix("torch.")


@pytest.mark.parametrize(("max_bytes", "most"), [(1, 30), (7000, 9000), (10**9, 10**9)])
def test_files_have_the_chosen_size_and_an_index_in_the_models_order(checkpoint, out, max_bytes, most):
    to_hf.to_hf(checkpoint, out, max_shard_bytes=max_bytes)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    if max_bytes == 10**9:
        assert names == [SINGLE] and not (out / INDEX).exists()
    else:
        count = len(names)
        assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        index = json.loads((out / INDEX).read_text())
        assert set(index["weight_map"].values()) == set(names)
        assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors().values())}
        assert index["weight_map"]["model.embed_tokens.weight"] == names[0]
        assert index["weight_map"]["lm_head.weight"] == names[-1]
    if max_bytes == 1:
        assert len(names) == len(tensors())
    else:
        assert all(path.stat().st_size <= most for path in out.glob("*.safetensors"))
    folder = HfFolder(out)
    folder.check()
    assert same_bits({name: folder.slice(name)[:] for name in folder.file_of}, tensors())


@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_garbage_in_the_padding_does_not_matter(tmp_path, out, garbage):
    """A trained table's padding is not zero any more."""
    values = stacked(write_folder(tmp_path / "hf"), 512)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        values[key][130:] = garbage
    to_hf.to_hf(write_checkpoint(tmp_path / "mega", values, CONFIG), out)
    assert same_bits(read_weights(out), tensors())


def test_config_and_tokenizer_come_along_and_weights_of_the_folder_do_not(tmp_path, checkpoint, out):
    like = write_folder(tmp_path / "like", rope_theta=5.0)
    write_shards(like, tensors(seed=3))
    (like / "tokenizer.json").write_text("tokens")
    to_hf.to_hf(checkpoint, out, like=like)
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", SINGLE}
    config = json.loads((out / "config.json").read_text())
    assert config == {**CONFIG, "rope_theta": 5.0, "dtype": "float32", "torch_dtype": "float32"}
    assert same_bits(read_weights(out), tensors())


def test_a_second_conversion_gives_the_same_bytes(checkpoint, out, tmp_path):
    to_hf.to_hf(checkpoint, out, max_shard_bytes=7000)
    to_hf.to_hf(checkpoint, tmp_path / "again", max_shard_bytes=7000)
    assert [path.read_bytes() for path in sorted(out.iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "again").iterdir())
    ]


# ---- what is refused, and leaves nothing


def change(tmp_path, key, action, name="changed"):
    """A checkpoint one of whose tensors is changed."""
    values = stacked(write_folder(tmp_path / "hf"))
    values[key] = action(values[key])
    return write_checkpoint(tmp_path / name, values, CONFIG)


def with_number(number):
    def action(value):
        value.view(-1)[-1] = number
        return value

    return action


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_with_its_tensor(tmp_path, out, number):
    megatron = change(tmp_path, "decoder.layers.mlp.linear_fc2.weight", with_number(number))
    assert refuse(megatron, out) == (
        f"{megatron}: decoder.layers.mlp.linear_fc2.weight (for model.layers.2.mlp.down_proj.weight) holds "
        "NaN or infinity; look at the run that wrote it, or take an earlier checkpoint"
    )


def test_every_tensor_with_a_nan_is_named(tmp_path, out):
    for number, key in enumerate(stacked(write_folder(tmp_path / "hf"))):

        def spoil(value):
            value.view(-1)[0] = torch.nan
            return value

        assert f": {key} (for " in refuse(change(tmp_path, key, spoil, str(number)), out)


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path, out):
    megatron = change(tmp_path, "decoder.final_layernorm.weight", with_number(70000.0))
    message = refuse(megatron, out, dtype=torch.float16)
    assert (
        "decoder.final_layernorm.weight (for model.norm.weight) holds numbers that float16 cannot hold"
        in message
    )
    to_hf.to_hf(megatron, out, dtype=torch.bfloat16)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no metadata", "garbage"])
def test_a_damaged_checkpoint_is_refused(checkpoint, out, damage):
    path = checkpoint / ("__0_0.distcp" if damage != "no metadata" else ".metadata")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "garbage":
        path.write_bytes(b"\x00" * path.stat().st_size)
    else:
        path.unlink()
    assert refuse(checkpoint, out).startswith(str(path))


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path, out):
    hf = write_folder(tmp_path / "hf")
    assert "expected a Megatron checkpoint in torch_dist format" in refuse(hf, out)


def test_a_folder_like_it_of_another_model_is_refused(tmp_path, checkpoint, out):
    like = write_folder(tmp_path / "like", BY_FAMILY["Qwen3ForCausalLM"])
    assert refuse(checkpoint, out, like=like).startswith(f"{checkpoint}")
    like = write_folder(tmp_path / "like2", num_hidden_layers=2)
    assert "config.json means (2, 12); use the config of the model that was saved" in refuse(
        checkpoint, out, like=like
    )


def test_what_exists_is_not_overwritten(checkpoint, out):
    out.mkdir()
    assert refuse(checkpoint, out) == f"{out} exists already; remove it or name another folder"


def test_a_disk_without_room_is_refused(checkpoint, out, monkeypatch):
    needed = sum(value.nbytes for value in tensors().values())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed - 1))
    assert refuse(checkpoint, out).startswith(f"{out} needs ")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed))
    to_hf.to_hf(checkpoint, out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_conversion_that_ends_in_the_middle_leaves_nothing(checkpoint, out, monkeypatch, error, after):
    done = []

    def end(self, num_bytes):
        assert not out.exists()
        if len(done) == after:
            raise error
        done.append(num_bytes)

    monkeypatch.setattr(to_hf.ByteProgress, "advance", end)
    refuse(checkpoint, out, error, max_shard_bytes=5000)
    assert len(done) == after
    monkeypatch.undo()
    to_hf.to_hf(checkpoint, out)
    assert same_bits(read_weights(out), tensors())


def test_an_error_after_the_weights_leaves_nothing(checkpoint, out, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "finish_folder", fail)
    assert "No space left" in refuse(checkpoint, out, OSError)
