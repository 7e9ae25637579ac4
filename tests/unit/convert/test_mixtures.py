"""config.json of models with experts or a sliding window: what is read, and what is refused."""

import pytest

from megatron_scope.convert.families import family_of
from megatron_scope.convert.shape import Mixture
from megatron_scope.errors import DataError
from tests.unit.convert.folders import MISTRAL, MIXTRAL, QWEN3_MOE


def read(config, **changes):
    """The shape by a config.json with changes; None takes a key out."""
    settings = {name: value for name, value in {**config, **changes}.items() if value is not None}
    return family_of(settings, "m/config.json").read_shape(settings, "m/config.json")


def mixture(config, **changes):
    found = read(config, **changes).mixture
    assert found is not None
    return found


def refusal(config, **changes):
    with pytest.raises(DataError) as raised:
        read(config, **changes)
    return str(raised.value).removeprefix("m/config.json: ")


def test_qwen3_moe_has_norms_on_heads_and_small_experts():
    shape = read(QWEN3_MOE)
    assert shape.mixture == Mixture(6, 2, 7, normalize_weights=True)
    assert shape.qk_norm and shape.head_dim == 5 and shape.sliding_window is None


@pytest.mark.parametrize(("given", "normalizes"), [(False, False), (None, False), (True, True)])
def test_qwen3_moe_normalizes_weights_where_it_says_so(given, normalizes):
    assert mixture(QWEN3_MOE, norm_topk_prob=given).normalize_weights == normalizes


def test_the_number_of_experts_has_either_of_two_names():
    # The hub's, and what transformers 5 writes.
    for family, name, other in (
        (QWEN3_MOE, "num_experts", "num_local_experts"),
        (MIXTRAL, "num_local_experts", "num_experts"),
    ):
        assert mixture(family, **{name: None, other: 3}).num_experts == 3


def test_mixtral_has_experts_of_the_whole_intermediate_size_and_no_window_of_its_own():
    shape = read(MIXTRAL)
    assert shape.mixture == Mixture(4, 2, 20, normalize_weights=True)
    assert not shape.qk_norm and shape.sliding_window is None
    assert read(MIXTRAL, sliding_window=16).sliding_window == 16


def test_mistral_sees_a_window():
    assert read(MISTRAL).sliding_window == 8 and read(MISTRAL).mixture is None


def test_a_mistral_that_names_no_window_has_that_of_transformers():
    from transformers import MistralConfig

    assert read(MISTRAL, sliding_window=None).sliding_window == MistralConfig().sliding_window == 4096


def test_a_mistral_with_a_null_window_sees_everything():
    settings = {**MISTRAL, "sliding_window": None}
    assert family_of(settings, "m").read_shape(settings, "m").sliding_window is None


@pytest.mark.parametrize("window", [0, -1, "8", 2.5])
def test_a_window_that_is_no_count_is_refused(window):
    for family in (MISTRAL, MIXTRAL):
        assert refusal(family, sliding_window=window) == (
            f"sliding_window is {window!r}; expected 1 or more, or null"
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]; supported: experts in every layer"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1, experts in every layer"),
        ({"num_experts": None}, "'num_experts' is missing; expected a complete Hugging Face config.json"),
        ({"num_experts": 0}, "num_experts is 0; expected a whole number of 1 or more"),
        ({"moe_intermediate_size": None}, "'moe_intermediate_size' is missing; expected a complete"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7 but num_experts 6; copy the file again"),
        (
            {"num_experts_per_tok": 1},
            "num_experts_per_tok is 1 with normalized weights, which are then all 1",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ],
)
def test_experts_that_compute_something_else_are_refused(changes, said):
    assert refusal(QWEN3_MOE, **changes).startswith(said)


def test_one_expert_a_token_is_read_where_its_weight_is_the_routers():
    assert mixture(QWEN3_MOE, num_experts_per_tok=1, norm_topk_prob=False).experts_per_token == 1
