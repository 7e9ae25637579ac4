"""When the log-prob gap stops a run, and what it says."""

import math

import pytest

from megatron_scope.backend.parity import LogprobGap, overall
from megatron_scope.errors import ParityError


@pytest.mark.parametrize(("mean", "limit"), [(0.25, 0.25), (0.0, 1e-9), (7.0, None), (math.nan, None)])
def test_a_gap_up_to_the_limit_passes(mean, limit):
    LogprobGap(mean, 9.0, 1.0, 5).check(limit)


@pytest.mark.parametrize("mean", [0.26, math.inf, math.nan])
def test_a_gap_over_the_limit_or_none_at_all_is_an_error(mean):
    with pytest.raises(ParityError):
        LogprobGap(mean, 9.0, 1.0, 5).check(0.25)


def test_the_error_says_how_far_it_is_and_why_that_may_be():
    with pytest.raises(ParityError) as raised:
        LogprobGap(0.53217, 2.1043, 0.3115, 5).check(0.05, "rollout server http://a")
    said = str(raised.value)
    assert "\n" not in said
    for part in (
        "0.532 nats a token off those of rollout server http://a",
        "at most 2.1,",
        "KL(engine || trainer) 0.311",
        "over rollout.logprob_gap_limit=0.05; nothing is learnt from its responses",
        *("stale", "precision", "rollout.temperature", "tokenizer"),
    ):
        assert part in said
    assert raised.value.on_every_rank


def test_an_engine_that_drew_nothing_is_told_apart():
    LogprobGap.of_nothing().check(None)
    with pytest.raises(ParityError, match=r"^rollout server http://a drew no token"):
        LogprobGap.of_nothing().check(0.1, "rollout server http://a")


def test_the_gap_over_several_engines_counts_every_token_once():
    nothing = LogprobGap.of_nothing()
    gap = overall([LogprobGap(1.0, 3.0, 0.5, 1), nothing, LogprobGap(4.0, 5.0, 2.0, 3)])
    assert gap == LogprobGap(3.25, 5.0, 1.625, 4)
    assert math.isnan(overall([nothing]).mean)
