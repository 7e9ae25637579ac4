"""Parameters of pipeline stages beside Hugging Face tensors: each once, in both directions."""

import math

import pytest
import torch
from safetensors.torch import save_file

from megatron_scope.convert.hf_folder import SINGLE, HfFolder
from megatron_scope.convert.layouts import Vocabulary
from megatron_scope.convert.mapping import (
    Peers,
    checkpoint_key,
    export_stage,
    exported_tensors,
    largest_in_hand,
    load_stage,
    model_entries,
    reading_order,
    stage_entries,
)
from megatron_scope.errors import DataError
from tests.unit.convert.folders import CONFIG, MIXTRAL, QWEN, QWEN3, QWEN3_MOE, tensors, write_folder

PADDED = 256


def stages_of(folder, *sizes, padded=PADDED):
    """Entries of consecutive stages with that many layers."""
    start, entries = 0, []
    for number, size in enumerate(sizes):
        layers = range(start, start + size)
        ends = {"first": number == 0, "last": number == len(sizes) - 1}
        entries.append(stage_entries(folder.family, folder.shape, padded, layers, **ends))
        start += size
    return entries


def place(entry, rank, size):
    """What a tensor rank holds of a parameter: experts are whole on each."""
    return (rank, size) if entry.expert is None else (0, 1)


def empty_parameters(folder, entries, rank=0, size=1):
    """Parameters of the right shapes, filled with NaN."""
    shapes = {
        e.parameter: e.layout.shard(
            [folder.slice(n) for n in e.hf], folder.shape, *place(e, rank, size)
        ).shape
        for e in entries
    }
    return {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}


ALONE = Peers(None, 0, 1)


def exported_by_one(entries, parameters, folder):
    """What a rank that holds the whole stage exports."""
    return dict(export_stage([entries], parameters.__getitem__, folder.shape, ALONE, ALONE))


CONFIGS = {
    "llama": CONFIG,
    "qwen": QWEN,
    "qwen3": QWEN3,
    "tied": QWEN,
    "qwen3-tied": QWEN3,
    "mixtral": MIXTRAL,
    "qwen3-moe-tied": QWEN3_MOE,
}


@pytest.fixture(params=CONFIGS)
def config(request):
    config = CONFIGS[request.param]
    return {**config, "tie_word_embeddings": request.param.endswith("tied")}


@pytest.fixture
def folder(tmp_path, config):
    return HfFolder(write_folder(tmp_path, config))


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (0, 3, 0), (1, 1, 1)])
def test_stages_hold_every_tensor_of_the_folder_exactly_once(folder, sizes):
    exported = [name for entries in stages_of(folder, *sizes) for e in entries if not e.copy for name in e.hf]
    assert sorted(exported) == sorted(folder.file_of)


def test_layers_are_counted_from_zero_in_every_stage(folder):
    _, second = stages_of(folder, 1, 2)
    names = {e.parameter: e.hf for e in second}
    for local, layer in ((0, 1), (1, 2)):
        parameter = f"decoder.layers.{local}.self_attention.linear_proj.weight"
        assert names[parameter] == (f"model.layers.{layer}.self_attn.o_proj.weight",)
    assert "decoder.layers.2.self_attention.linear_proj.weight" not in names


def test_a_tied_output_table_is_a_copy_only_where_the_embedding_is_not(folder, config):
    (alone,), (first, last) = stages_of(folder, 3), stages_of(folder, 1, 2)
    tied = config["tie_word_embeddings"]
    outputs = {
        name: [(e.hf, e.copy) for e in entries if e.parameter == "output_layer.weight"]
        for name, entries in (("alone", alone), ("first", first), ("last", last))
    }
    own = [(("lm_head.weight",), False)]
    copy = [(("model.embed_tokens.weight",), True)]
    assert outputs == (
        {"alone": [], "first": [], "last": copy} if tied else {"alone": own, "first": [], "last": own}
    )


@pytest.mark.parametrize("sizes", [(3,), (1, 2)])
def test_what_is_loaded_is_exported_with_the_same_bits(folder, config, sizes):
    exported = {}
    for entries in stages_of(folder, *sizes):
        parameters = empty_parameters(folder, entries)
        load_stage(parameters, entries, folder, 0, 1)
        assert all(value.isfinite().all() for value in parameters.values())
        exported |= exported_by_one(entries, parameters, folder)
    expected = tensors(config)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("sizes", [(3,), (1, 2)])
def test_names_sizes_and_order_of_an_export_are_known_before_it(folder, sizes):
    for entries in stages_of(folder, *sizes):
        parameters = empty_parameters(folder, entries)
        load_stage(parameters, entries, folder, 0, 1)
        found = export_stage([entries], parameters.__getitem__, folder.shape, ALONE, ALONE)
        assert [(name, tuple(tensor.shape)) for name, tensor in found] == list(exported_tensors([entries]))


# ---- experts


@pytest.mark.parametrize("given", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3-moe"])
def test_an_expert_rank_holds_its_experts_under_local_numbers(tmp_path, given):
    folder = HfFolder(write_folder(tmp_path, given))
    ends = {"first": False, "last": False, "experts": range(2, 4)}
    entries = stage_entries(folder.family, folder.shape, PADDED, range(1, 2), **ends)
    places = {e.parameter: (e.place, e.stack, e.expert) for e in entries if e.expert is not None}
    count = folder.shape.mixture.num_experts
    assert places == {
        f"decoder.layers.0.mlp.experts.local_experts.{expert - 2}.{name}.weight": (
            (1, expert),
            (3, count),
            expert,
        )
        for expert in (2, 3)
        for name in ("linear_fc1", "linear_fc2")
    }


def test_the_whole_model_is_read_in_the_order_of_files(tmp_path):
    folder = HfFolder(write_folder(tmp_path, MIXTRAL))
    entries = sorted(model_entries(folder.family, folder.shape, 130), key=reading_order)
    layers = [e.place[0] for e in entries[1:-2]]
    assert entries[0].key == "embedding.word_embeddings.weight" and layers == sorted(layers)
    assert {e.key for e in entries[-2:]} == {"decoder.final_layernorm.weight", "output_layer.weight"}


@pytest.mark.parametrize(
    ("parameter", "key"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        (
            "decoder.layers.{layer}.input_layernorm.weight",
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ),
        (
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ),
        (
            "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        ),
    ],
)
def test_checkpoints_stack_parameters_under_megatrons_names(parameter, key):
    assert checkpoint_key(parameter) == key


# ---- refusals


def rewrite(tmp_path, weights):
    save_file(weights, tmp_path / SINGLE)
    return HfFolder(tmp_path)


def test_complete_folders_pass(folder):
    folder.check()


def test_a_missing_tensor_is_named(tmp_path, folder, config):
    weights = tensors(config)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(
        DataError, match=r"has no tensor model\.layers\.1\.self_attn\.k_proj\.weight, which .* needs"
    ):
        rewrite(tmp_path, weights).check()


@pytest.mark.parametrize(
    "name", ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.v_norm.weight"]
)
def test_a_tensor_that_the_model_would_ignore_is_refused(tmp_path, folder, config, name):
    with pytest.raises(DataError, match=f"holds {name}, which .*ForCausalLM does not have"):
        rewrite(tmp_path, {**tensors(config), name: torch.ones(12)}).check()


@pytest.mark.parametrize("given", [CONFIG, QWEN], ids=["llama", "qwen2"])
def test_norms_of_heads_are_refused_in_a_family_without_them(tmp_path, given):
    write_folder(tmp_path, given)
    weights = {**tensors(given), "model.layers.0.self_attn.q_norm.weight": torch.ones(3)}
    with pytest.raises(
        DataError, match=r"holds model\.layers\.0\.self_attn\.q_norm\.weight, which .*ForCausal"
    ):
        rewrite(tmp_path, weights).check()


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_qwen3_without_a_norm_of_its_heads_is_refused(tmp_path, name):
    write_folder(tmp_path, QWEN3)
    weights = tensors(QWEN3)
    del weights[f"model.layers.1.self_attn.{name}_norm.weight"]
    with pytest.raises(
        DataError, match=rf"no tensor model\.layers\.1\.self_attn\.{name}_norm\.weight, which"
    ):
        rewrite(tmp_path, weights).check()


def test_stored_frequencies_and_a_tied_table_written_twice_are_accepted(tmp_path, folder, config):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": torch.ones(130, 12),
    }
    rewrite(tmp_path, {**extra, **tensors(config)}).check()


def test_a_tensor_of_another_shape_is_refused(tmp_path, folder, config):
    (entries,) = stages_of(folder, 3)
    parameters = empty_parameters(folder, entries)
    weights = {**tensors(config), "model.layers.2.input_layernorm.weight": torch.ones(14)}
    with pytest.raises(DataError) as raised:
        load_stage(parameters, entries, rewrite(tmp_path, weights), 0, 1)
    assert str(raised.value) == (
        f"{tmp_path}: model.layers.2.input_layernorm.weight give a shard of shape (14,) "
        "but the model has (12,); config.json and the weights disagree"
    )


@pytest.mark.parametrize("rows", [120, 140])
def test_a_table_of_another_length_is_refused_though_padding_would_hide_it(tmp_path, folder, config, rows):
    (entries,) = stages_of(folder, 3)
    parameters = empty_parameters(folder, entries)
    weights = {**tensors(config), "model.embed_tokens.weight": torch.ones(rows, 12)}
    with pytest.raises(DataError, match=f"{rows} rows .* config.json and the weights disagree"):
        load_stage(parameters, entries, rewrite(tmp_path, weights), 0, 1)


def test_a_parameter_without_a_rule_is_refused(folder):
    (entries,) = stages_of(folder, 3)
    parameters = {**empty_parameters(folder, entries), "decoder.extra": torch.zeros(1)}
    with pytest.raises(DataError, match=r"no rule for the parameters \['decoder\.extra'\]"):
        load_stage(parameters, entries, folder, 0, 1)


def test_both_tables_have_the_padded_size_of_the_run(folder):
    entries = [
        e for stage in stages_of(folder, 1, 2, padded=512) for e in stage if isinstance(e.layout, Vocabulary)
    ]
    assert len(entries) == 2 and all(e.layout.padded_rows == 512 for e in entries)


@pytest.mark.parametrize(("tensor_size", "copies"), [(1, 1), (2, 2), (4, 2)])
def test_what_an_export_has_in_hand_at_most_is_known_before(folder, tensor_size, copies):
    (entries,) = stages_of(folder, 2, padded=512)
    sizes = [math.prod(entry.whole_size(folder.shape)) for entry in entries]
    assert largest_in_hand([entries], folder.shape, tensor_size) == copies * max(sizes)
