"""Reading config.json: what the families take, and what they refuse instead of computing something else."""

import pytest

from megatron_scope.convert.families import family_of
from megatron_scope.convert.shape import RopeScaling
from megatron_scope.errors import DataError
from tests.unit.convert.folders import CONFIG, QWEN, QWEN3


def read(config):
    return family_of(config, "m/config.json").read_shape(config, "m/config.json")


def without(key):
    return {name: value for name, value in CONFIG.items() if name != key}


def test_a_llama_config_is_read():
    shape = read(CONFIG)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (3, 12, 20)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (4, 2, 3)
    assert (shape.vocab_rows, shape.max_positions, shape.norm_epsilon) == (130, 64, 1e-6)
    assert (shape.rope_theta, shape.rope_scaling) == (10000.0, None)
    assert not shape.tied_embeddings and not shape.qkv_bias and not shape.qk_norm


def test_qwen2_has_biases_on_query_key_and_value():
    shape = read(QWEN)
    assert shape.qkv_bias and not shape.qk_norm


def test_qwen3_has_norms_on_query_and_key_heads_instead():
    shape = read(QWEN3)
    assert shape.qk_norm and not shape.qkv_bias and shape.head_dim == 5


@pytest.mark.parametrize("config", [{"head_dim": None}, {}])
def test_a_qwen3_without_head_dim_has_that_of_transformers(config):
    from transformers import Qwen3Config

    settings = {name: value for name, value in QWEN3.items() if name != "head_dim"} | config
    assert read(settings).head_dim == Qwen3Config().head_dim == 128


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": 5}, "head_dim", 5),
        ({"head_dim": None}, "head_dim", 3),
        ({"num_key_value_heads": None}, "num_query_groups", 4),
        ({"tie_word_embeddings": True}, "tied_embeddings", True),
        ({"use_sliding_window": False, "sliding_window": 4096}, "num_layers", 3),
        ({"rope_theta": 1000000}, "rope_theta", 1e6),
    ],
)
def test_optional_settings_are_read_or_derived(changes, field, value):
    assert getattr(read({**CONFIG, **changes}), field) == value


@pytest.mark.parametrize("key", ["num_key_value_heads", "tie_word_embeddings"])
def test_settings_that_transformers_has_a_default_for_may_be_missing(key):
    shape = read(without(key))
    assert shape.num_query_groups == (4 if key == "num_key_value_heads" else 2) and not shape.tied_embeddings


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    ],
)
def test_a_missing_size_is_named(key):
    with pytest.raises(DataError) as raised:
        read(without(key))
    assert (
        str(raised.value)
        == f"m/config.json: '{key}' is missing; expected a complete Hugging Face config.json"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'; expected a whole number of 1 or more"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0; expected a whole number of 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of 1 or more"),
        ({"hidden_size": -12}, "hidden_size is -12; expected a whole number of 1 or more"),
        ({"vocab_size": True}, "vocab_size is True; expected a whole number of 1 or more"),
        ({"head_dim": 0}, "head_dim is 0; expected a whole number of 1 or more"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'; expected a whole number of"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number above 0"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; expected a number above 0"),
        ({"rope_scaling": "x"}, "the rotary settings are 'x'; expected an object with rope_type"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4, which num_key_value_heads=3 does not divide; copy the file again",
        ),
        ({"layer_types": 5}, "layer_types has 5; supported: full_attention"),
        ({"architectures": 5}, "architectures is 5; supported: LlamaForCausalLM"),
    ],
)
def test_a_setting_of_another_kind_is_named(changes, problem):
    with pytest.raises(DataError) as raised:
        read({**CONFIG, **changes})
    assert str(raised.value).startswith(f"m/config.json: {problem}")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    ],
)
def test_llama3_scaling_is_read_from_every_form_of_config(rope):
    shape = read({**without("rope_theta"), **rope})
    assert shape.rope_theta == 5e5 and shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_incomplete_llama3_scaling_is_refused(key):
    scaling = {name: value for name, value in LLAMA3.items() if name != key}
    with pytest.raises(DataError, match=f"'{key}' is missing"):
        read({**CONFIG, "rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_another_rope_type_is_refused(kind, key):
    with pytest.raises(DataError) as raised:
        read({**CONFIG, "rope_scaling": {key: kind, "factor": 2.0}})
    assert str(raised.value) == f"m/config.json: rope_type is '{kind}'; supported: default, llama3"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"use_sliding_window": True},
            "use_sliding_window is true; a window in some layers only is not supported",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types has 'sliding_attention'; supported: full_attention",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"attention_bias": True}, "attention_bias is true; models with this bias are not supported yet"),
        ({"mlp_bias": True}, "mlp_bias is true; models with this bias are not supported yet"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(changes, problem):
    for config in (CONFIG, QWEN, QWEN3):
        with pytest.raises(DataError) as raised:
            read({**config, **changes})
        assert str(raised.value) == f"m/config.json: {problem}"


@pytest.mark.parametrize("names", [None, [], ["GemmaForCausalLM"], ["LlamaForSequenceClassification"]])
def test_another_architecture_is_refused_with_those_that_are_read(names):
    with pytest.raises(DataError) as raised:
        read({**CONFIG, "architectures": names})
    assert str(raised.value) == (
        f"m/config.json: architectures is {names or []}; supported: LlamaForCausalLM, "
        "MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
    )


@pytest.mark.parametrize(("family", "head_dim"), [("Llama", 3), ("Qwen2", 3), ("Qwen3", 128)])
def test_configs_that_transformers_writes_are_read(family, head_dim):
    import transformers

    settings = {**CONFIG, "architectures": [f"{family}ForCausalLM"], "rope_parameters": None}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    del settings["rope_theta"]
    written = getattr(transformers, f"{family}Config")(**settings).to_dict()
    shape = read(written)
    assert (shape.rope_theta, shape.head_dim, shape.num_query_groups) == (12345.0, head_dim, 2)
