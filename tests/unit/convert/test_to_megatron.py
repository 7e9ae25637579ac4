"""Hugging Face to Megatron: what is written, and that nothing is written of what cannot be used."""

import json
import types

import pytest
import torch
from safetensors.torch import save_file

from megatron_scope.convert import blocks, files, to_megatron
from megatron_scope.convert.hf_folder import INDEX, SINGLE
from megatron_scope.convert.shape import FileLayout
from megatron_scope.convert.torch_dist import BACKEND, BACKEND_FILE, TorchDistFolder
from megatron_scope.errors import ConfigError, DataError
from tests.unit.convert.folders import (
    BY_FAMILY,
    CONFIG,
    MIXTRAL,
    QWEN3_MOE,
    stacked,
    tensors,
    write_folder,
    write_shards,
)

TIED = {**CONFIG, "tie_word_embeddings": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "one": FileLayout(),
    "tp2": FileLayout(tensor=2),
    "pp2": FileLayout(pipeline=2),
    "tp2-pp3": FileLayout(tensor=2, pipeline=3),
    "more stages than layers": FileLayout(pipeline=5),
}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def convert(hf, out, layout=None, dtype=None):
    return to_megatron.to_megatron(hf, out, layout, dtype)


def read(path):
    """Every tensor of a checkpoint by key."""
    folder = TorchDistFolder(path)
    folder.check_files()
    return {
        key: folder.read(key, (), tuple(slice(0, length) for length in folder.size(key)))
        for key in folder.tensors
    }


def refuse(hf, out, kind=DataError, **options):
    """The message of a conversion that is refused and leaves nothing."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind) as raised:
        convert(hf, out, **options)
    assert sorted(out.parent.rglob("*")) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- what is written


# Every family tied and untied, every layout of a dense model and of one with experts.
CASES = [
    *((family, "one", True) for family in BY_FAMILY),
    *((family, "tp2-pp3", False) for family in BY_FAMILY),
    *((family, layout, False) for family in ("LlamaForCausalLM", "MixtralForCausalLM") for layout in LAYOUTS),
]


@pytest.mark.parametrize(("family", "layout", "tied"), sorted(set(CASES)))
def test_the_checkpoint_holds_the_folders_numbers(tmp_path, out, monkeypatch, family, layout, tied):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    hf = write_folder(tmp_path / "hf", {**BY_FAMILY[family], "tie_word_embeddings": tied})
    done = convert(hf, out, LAYOUTS[layout])
    found, expected = read(out), stacked(hf)
    if "router" in "".join(expected):  # the norm is stored under both of the names that readers look for
        name = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
        other = found.pop("decoder.layers.pre_mlp_layernorm.weight")
        assert torch.equal(other, expected[name])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert done.num_bytes == sum(value.nbytes for value in expected.values())


@pytest.mark.parametrize(
    ("rows", "tensor", "padded"), [(128, 1, 128), (129, 1, 256), (130, 4, 512), (512, 4, 512)]
)
def test_tables_are_padded_with_zeros_for_the_layout(tmp_path, out, rows, tensor, padded):
    config = {**CONFIG, "vocab_size": rows, "num_key_value_heads": 4}
    convert(write_folder(tmp_path / "hf", config), out, FileLayout(tensor=tensor))
    table = read(out)["output_layer.weight"]
    assert table.shape == (padded, 12) and not table[rows:].any()
    assert torch.equal(table[:rows], tensors(config)["lm_head.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_kept(tmp_path, out, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    hf = write_folder(tmp_path / "hf", weights=weights)
    convert(hf, out)
    found, expected = read(out), stacked(hf)
    assert all(found[key].dtype == dtype and torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_numbers_are_cast_as_torch_casts_them(tmp_path, out, source, target):
    weights = {name: tensor.to(source) for name, tensor in tensors().items()}
    hf = write_folder(tmp_path / "hf", weights=weights)
    convert(hf, out, dtype=target)
    found, expected = read(out), stacked(hf)
    for key, value in expected.items():
        assert found[key].dtype == target and torch.equal(found[key], value.to(target))


def test_each_stage_of_the_layout_has_a_file(tmp_path, out):
    convert(write_folder(tmp_path / "hf"), out, FileLayout(pipeline=3))
    assert sorted(path.name for path in out.glob("*.distcp")) == [f"__{n}_0.distcp" for n in range(3)]


def test_no_block_holds_numbers_of_two_layers(tmp_path, out):
    convert(write_folder(tmp_path / "hf", MIXTRAL), out)
    for key, tensor in TorchDistFolder(out).tensors.items():
        lead = 2 if ".experts." in key else 1 if "decoder.layers." in key else 0
        assert all(set(chunk.sizes[:lead]) <= {1} for chunk in tensor.chunks), key


def test_config_and_tokenizer_go_along(tmp_path, out):
    hf = write_folder(tmp_path / "hf")
    (hf / "tokenizer.json").write_text("tokens")
    convert(hf, out)
    assert {path.name for path in (out / "hf").iterdir()} == {"config.json", "tokenizer.json"}
    assert json.loads((out / "hf" / "config.json").read_text()) == CONFIG
    assert json.loads((out / BACKEND_FILE).read_text()) == BACKEND
    assert torch.load(out / "common.pt", weights_only=True) == {}


def test_a_folder_of_several_files_gives_the_same_checkpoint(tmp_path, out):
    hf = write_folder(tmp_path / "hf")
    write_shards(hf, tensors(), 3)
    convert(hf, out)
    expected = stacked(write_folder(tmp_path / "one"))
    found = read(out)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("copy", [True, False])
def test_a_tied_table_that_is_written_twice_is_taken_once(tmp_path, out, copy):
    weights = tensors(TIED)
    if copy:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    convert(write_folder(tmp_path / "hf", TIED, weights), out)
    assert "output_layer.weight" not in read(out)


def test_the_time_and_size_are_told():
    assert str(to_megatron.Converted(1_500_000_000, 2.04)) == "1,500.0 MB in 2.0 s"


# ---- what is refused, and leaves nothing


@pytest.mark.parametrize("family", BY_FAMILY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_refused_with_its_tensor(tmp_path, out, family, value):
    weights = tensors(BY_FAMILY[family])
    name = next(name for name in reversed(weights) if name.startswith("model.layers.2"))
    weights[name].view(-1)[-1] = value
    hf = write_folder(tmp_path / "hf", BY_FAMILY[family], weights)
    assert refuse(hf, out) == (
        f"{hf / SINGLE}: {name} holds NaN or infinity; copy the file again, or look at the run that wrote it"
    )


def test_every_tensor_with_a_nan_is_named(tmp_path, out):
    for name in tensors():
        weights = tensors()
        weights[name].view(-1)[0] = torch.nan
        assert f": {name} holds NaN" in refuse(write_folder(tmp_path / "hf", weights=weights), out)


def test_a_number_that_the_dtype_cannot_hold_is_refused(tmp_path, out):
    weights = tensors()
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000.0
    hf = write_folder(tmp_path / "hf", weights=weights)
    assert refuse(hf, out, dtype=torch.float16) == (
        f"{hf}: model.layers.1.mlp.up_proj.weight holds 7e+04, which float16 cannot hold; convert to a dtype "
        "with a wider range"
    )
    convert(hf, out, dtype=torch.bfloat16)


def test_layers_of_different_dtypes_are_refused_unless_one_is_chosen(tmp_path, out):
    weights = tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].bfloat16()
    hf = write_folder(tmp_path / "hf", weights=weights)
    assert refuse(hf, out) == (
        f"{hf}: {name} is bfloat16 but model.layers.0.mlp.down_proj.weight float32, which share "
        "a tensor in Megatron's checkpoints; choose one with --dtype"
    )
    convert(hf, out, dtype=torch.float32)


def test_projections_of_different_dtypes_are_refused(tmp_path, out):
    weights = tensors()
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        weights[name] = weights[name].half()
    message = refuse(write_folder(tmp_path / "hf", weights=weights), out)
    assert "k_proj.weight is float16 but model.layers.0.self_attn.q_proj.weight float32" in message


def test_norms_may_have_a_dtype_of_their_own(tmp_path, out):
    weights = {name: value if "norm" in name else value.bfloat16() for name, value in tensors().items()}
    convert(write_folder(tmp_path / "hf", weights=weights), out)
    dtypes = {("norm" in key, value.dtype) for key, value in read(out).items()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("target", [None, torch.float32])
def test_a_dtype_that_is_not_supported_is_refused(tmp_path, out, dtype, target):
    weights = {**tensors(), "model.norm.weight": torch.ones(12).to(dtype)}
    message = refuse(write_folder(tmp_path / "hf", weights=weights), out, dtype=target)
    assert ": model.norm.weight is " in message and message.endswith("; supported: F32, BF16, F16")


def test_every_missing_tensor_is_named(tmp_path, out):
    for name in tensors():
        rest = {other: value for other, value in tensors().items() if other != name}
        hf = write_folder(tmp_path / "hf", weights=rest)
        assert refuse(hf, out) == f"{hf} has no tensor {name}, which LlamaForCausalLM needs"


def test_an_unknown_tensor_is_named(tmp_path, out):
    weights = {**tensors(), "model.layers.0.mlp.extra.weight": torch.ones(1)}
    hf = write_folder(tmp_path / "hf", weights=weights)
    assert refuse(hf, out) == (
        f"{hf} holds model.layers.0.mlp.extra.weight, which LlamaForCausalLM does not have"
    )


def test_every_tensor_of_another_size_is_named(tmp_path, out):
    for name, value in tensors().items():
        weights = {**tensors(), name: torch.cat([value, value])}
        hf = write_folder(tmp_path / "hf", weights=weights)
        wrong, right = (2 * value.shape[0], *value.shape[1:]), tuple(value.shape)
        assert refuse(hf, out) == (
            f"{hf / SINGLE}: {name} has size {wrong}, but config.json means {right}; config.json and the "
            "weights disagree"
        )


@pytest.mark.parametrize("turn", ["transposed", "flat"])
def test_a_tensor_with_the_right_count_but_another_size_is_refused(tmp_path, out, turn):
    weights = tensors()
    value = weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = (
        value.T.contiguous() if turn == "transposed" else value.view(-1)
    )
    assert "up_proj.weight has size" in refuse(write_folder(tmp_path / "hf", weights=weights), out)


@pytest.mark.parametrize("architecture", sorted(set(BY_FAMILY) - {"LlamaForCausalLM", "MistralForCausalLM"}))
def test_a_config_of_another_family_is_refused(tmp_path, out, architecture):
    hf = write_folder(tmp_path / "hf", BY_FAMILY[architecture], tensors())
    assert f"which {architecture} needs" in refuse(hf, out)
    hf = write_folder(tmp_path / "other", CONFIG, tensors(BY_FAMILY[architecture]))
    message = refuse(hf, out)
    assert "which LlamaForCausalLM needs" in message or "which LlamaForCausalLM does not have" in message


@pytest.mark.parametrize("differs", ["numbers", "dtype", "size"])
def test_a_tied_table_whose_copy_differs_is_refused(tmp_path, out, differs):
    table = tensors(TIED)["model.embed_tokens.weight"]
    copy = {"numbers": table.clone(), "dtype": table.bfloat16(), "size": table[:100].clone()}[differs]
    if differs == "numbers":
        copy[-1, -1] += 1e-3
    hf = write_folder(tmp_path / "hf", TIED, {**tensors(TIED), "lm_head.weight": copy})
    assert refuse(hf, out) == (
        f"{hf}: config.json ties the output table to the embedding, but lm_head.weight differs from "
        "model.embed_tokens.weight; set tie_word_embeddings to false in config.json, or remove lm_head.weight"
    )


def test_a_file_with_tensors_that_the_index_does_not_list_is_refused(tmp_path, out):
    hf = write_folder(tmp_path / "hf")
    file_of = write_shards(hf, tensors())
    index = {"weight_map": file_of}
    stray = {name: value for name, value in tensors().items() if file_of[name] == "part-0.safetensors"}
    save_file({**stray, "model.stray": torch.ones(1)}, hf / "part-0.safetensors")
    assert refuse(hf, out) == (
        f"{hf / 'part-0.safetensors'} holds model.stray, which {INDEX} does not list; copy both again"
    )
    (hf / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage", ["missing entry", "wrong file", "missing file", "truncated", "no name"])
def test_an_index_and_files_that_disagree_are_refused(tmp_path, out, damage):
    hf = write_folder(tmp_path / "hf")
    file_of = write_shards(hf, tensors())
    path = hf / "part-1.safetensors"
    name = "lm_head.weight"
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    if damage == "missing entry":
        del file_of[name]
        said = f"{hf} (by {INDEX}) has no tensor {name}, which LlamaForCausalLM needs"
    elif damage == "wrong file":
        said = f"{hf / file_of[name]} holds {name}, which {INDEX} does not list; copy both again"
        file_of[name] = other[file_of[name]]
    elif damage == "missing file":
        path.unlink()
        said = f"{path} cannot be read as safetensors ("
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
        said = f"{path} cannot be read as safetensors ("
    else:
        file_of[name] = None
        said = f"{hf / INDEX} says that {name} is in None; expected a file name: copy the file again"
    (hf / INDEX).write_text(json.dumps({"weight_map": file_of}))
    assert refuse(hf, out).startswith(said)


@pytest.mark.parametrize(
    ("config", "layout", "said"),
    [
        (CONFIG, FileLayout(tensor=4), "--tp is 4 but "),
        (CONFIG, FileLayout(tensor=3), "--tp is 3 but "),
        (CONFIG, FileLayout(expert=2), "--ep is 2 but "),
        (QWEN3_MOE, FileLayout(expert=4), "6 experts, which 4 does not divide"),
    ],
)
def test_an_impossible_layout_is_refused(tmp_path, out, config, layout, said):
    assert said in refuse(write_folder(tmp_path / "hf", config), out, ConfigError, layout=layout)


def test_what_exists_is_not_overwritten(tmp_path, out):
    out.mkdir()
    (out / "mine").write_text("1")
    hf = write_folder(tmp_path / "hf")
    assert refuse(hf, out) == f"{out} exists already; remove it or name another folder"


def test_a_disk_without_room_is_refused(tmp_path, out, monkeypatch):
    hf = write_folder(tmp_path / "hf")
    needed = sum(value.nbytes for value in stacked(hf).values())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed - 1))
    assert refuse(hf, out).startswith(f"{out} needs 0.00 GB but ")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed))
    convert(hf, out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_conversion_that_ends_in_the_middle_leaves_nothing(tmp_path, out, monkeypatch, error, after):
    hf, done = write_folder(tmp_path / "hf"), []

    def end(self, num_bytes):
        assert not out.exists()
        if len(done) == after:
            raise error
        done.append(num_bytes)

    monkeypatch.setattr(to_megatron.ByteProgress, "advance", end)
    refuse(hf, out, error)
    assert len(done) == after
    monkeypatch.undo()
    convert(hf, out)
    assert set(read(out)) == set(stacked(hf))


def test_the_source_is_left_as_it_was(tmp_path, out):
    hf = write_folder(tmp_path / "hf")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in hf.iterdir()}
    convert(hf, out)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in hf.iterdir()} == before
