"""From judged rollouts to the batch that is trained on: what is usable, what is counted, what is refused."""

import asyncio
import json
import math

import numpy as np
import pytest

from megatron_scope.config.schema import Config, Correction, Engine, RolloutConfig, Truncated
from megatron_scope.controller.core import Controller, make_batch, usable_places
from megatron_scope.controller.rows import ResponseRecord, read_steps, write_step
from megatron_scope.errors import DataError, RolloutError
from megatron_scope.records import Prompt, RolloutCounts, SequenceLimits
from tests.unit.controller.judged import judged

KEEP, DROP = Truncated.KEEP, Truncated.DROP
LIMITS = SequenceLimits(vocab_size=10, max_positions=20)

STEP = [
    judged("b", 0),
    judged("b", 1, finish="length", correct=False),
    judged("b", 2, finish="abort"),
    judged("a", 0, output=()),
    judged("a", 1, correct=False, error="timed out"),
    judged("c", 0, finish="length"),
    judged("a", 2, output=(), finish="abort", correct=False, error="empty"),
]


@pytest.mark.parametrize(("truncated", "expected"), [(KEEP, [0, 1, 4, 5]), (DROP, [0, 4])])
def test_aborted_and_empty_responses_are_left_out_and_truncated_ones_as_configured(truncated, expected):
    assert usable_places(STEP, truncated) == expected


@pytest.mark.parametrize(("truncated", "dropped"), [(KEEP, 0), (DROP, 2)])
def test_everything_that_became_of_the_rollouts_is_counted(truncated, dropped):
    assert make_batch(STEP, truncated, LIMITS, skipped=11).counts == RolloutCounts(
        prompts=3,
        sampled=7,
        aborted=2,
        empty=1,
        truncated=2,
        dropped_truncated=dropped,
        verify_errors=2,
        skipped_prompts=11,
    )


@pytest.mark.parametrize("truncated", [KEEP, DROP])
def test_the_counts_of_what_is_left_out_add_up(truncated):
    """An empty response that also ran out of length is left out once, so it is counted once."""
    step = [*STEP, judged("d", 0, output=(), finish="length")]
    batch = make_batch(step, truncated, LIMITS, 0)
    counts = batch.counts
    assert counts.sampled - counts.aborted - counts.empty - counts.dropped_truncated == len(batch.responses)


def test_responses_are_numbered_in_order_and_grouped_by_prompt():
    batch = make_batch(STEP, KEEP, LIMITS, 0)
    assert [r.index for r in batch.responses] == [0, 1, 2, 3]
    assert [r.group for r in batch.responses] == [0, 0, 1, 2]
    assert [r.correct for r in batch.responses] == [True, False, False, True]
    assert batch.names == (
        "prompt b, sample 0",
        "prompt b, sample 1",
        "prompt a, sample 1",
        "prompt c, sample 0",
    )


def test_responses_of_one_prompt_are_one_group_even_when_they_do_not_lie_together():
    batch = make_batch([judged(name, number) for number, name in enumerate("xyxzy")], KEEP, LIMITS, 0)
    assert [r.group for r in batch.responses] == [0, 1, 0, 2, 1]


def test_a_prompt_without_a_usable_response_takes_no_group_number():
    batch = make_batch([judged("a", finish="abort"), judged("b"), judged("c")], KEEP, LIMITS, 0)
    assert [r.group for r in batch.responses] == [0, 1]


def test_arrays_hold_the_engines_tokens_and_logprobs():
    (response,) = make_batch(
        [judged(output=(9, 0, 4), engine_logprobs=(-1.0, math.nan, -0.25))], KEEP, LIMITS, 0
    ).responses
    assert response.prompt_ids.tolist() == [2, 3] and response.output_ids.tolist() == [9, 0, 4]
    assert response.prompt_ids.dtype == response.output_ids.dtype == np.int64
    np.testing.assert_array_equal(response.engine_logprobs, np.array([-1, np.nan, -0.25], dtype=np.float32))
    assert response.engine_logprobs.dtype == np.float32
    assert response.num_input_tokens == 4


def test_the_oldest_version_is_that_of_the_usable_responses():
    step = [
        judged("a", weight_version=7),
        judged("b", weight_version=5),
        judged("c", weight_version=1, finish="abort"),
    ]
    assert make_batch(step, KEEP, LIMITS, 0).oldest_version == 5


# ---- refusals


@pytest.mark.parametrize("token", [10, 11, 151_936, -1])
@pytest.mark.parametrize("where", ["output", "prompt"])
def test_a_token_id_outside_the_shared_vocabulary_is_an_error(token, where):
    bad = {"output": (4, token)} if where == "output" else {"prompt": Prompt("q", (2, token), "42", "math")}
    if where == "prompt":
        item = judged("q", 4)
        item = type(item)(type(item.rollout)(**{**vars(item.rollout), **bad}), item.verdict)
    else:
        item = judged("q", 4, **bad)
    with pytest.raises(RolloutError) as raised:
        make_batch([judged("a"), item], KEEP, LIMITS, 0)
    assert str(raised.value) == (
        f"prompt q, sample 4 holds token id {token}, but student and teacher share only 10 ids; "
        "sample with the student's own tokenizer and vocabulary"
    )


def test_the_largest_shared_id_is_allowed():
    assert make_batch([judged(output=(9, 9))], KEEP, LIMITS, 0).responses[0].output_ids.tolist() == [9, 9]


def test_a_bad_id_in_a_response_that_is_not_used_does_not_matter():
    step = [judged("a"), judged("b", output=(99,), finish="abort")]
    assert len(make_batch(step, KEEP, LIMITS, 0).responses) == 1


def test_a_step_without_a_usable_response_is_an_error_that_says_why():
    step = [judged("a", finish="abort"), judged("a", 1, output=()), judged("b", finish="length")]
    with pytest.raises(RolloutError) as raised:
        make_batch(step, DROP, LIMITS, 0)
    assert str(raised.value) == (
        "none of the step's 3 responses is usable: 1 aborted, 1 empty, 1 truncated and dropped; "
        "raise rollout.max_new_tokens or set rollout.truncated=keep"
    )


# ---- the controller over recorded rollouts


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "asked", [{"correction": Correction.TRUNCATED_IMPORTANCE}, {"logprob_gap_limit": 0.1}, {}]
)
@pytest.mark.parametrize("logprobs", [(NAN, -1.0, NAN), (-INF, -1.0, INF)], ids=["null", "infinite"])
def test_a_token_without_its_engine_logprob_is_an_error_where_each_is_needed(tmp_path, asked, logprobs):
    """An unusable response may lack them: nothing is learnt from it."""
    step = [
        judged("a", 0, finish="abort", engine_logprobs=(NAN,) * 3),
        judged("a", 1),
        judged("b", 2, engine_logprobs=logprobs),
    ]
    write_step(tmp_path / "recorded", 1, step, {})
    rollout = RolloutConfig(engine=Engine.REPLAY, file=str(tmp_path / "recorded"), **asked)
    controller = Controller(Config(rollout=rollout), LIMITS, str(tmp_path / "run"))
    if not asked:
        assert len(asyncio.run(controller.produce(1, 0)).responses) == 2
        return
    with pytest.raises(DataError, match=r"^prompt b, sample 2 has no finite engine log-prob for 2 of its 3"):
        asyncio.run(controller.produce(1, 0))


def test_records_find_their_rollouts_though_unusable_ones_lie_between(tmp_path):
    """The ranks number the usable responses only; the file has a row for each rollout."""
    write_step(tmp_path / "recorded", 1, STEP, {})
    config = Config(
        rollout=RolloutConfig(engine=Engine.REPLAY, file=str(tmp_path / "recorded"), truncated=DROP)
    )
    controller = Controller(config, LIMITS, str(tmp_path / "run"))

    async def one_step():
        batch = await controller.produce(1, 0)
        await controller.record(1, {0: ResponseRecord(-0.5, None, 1.0), 1: ResponseRecord(None, -0.25, 0.75)})
        await controller.close()
        return batch

    batch = asyncio.run(one_step())
    assert batch.names == ("prompt b, sample 0", "prompt a, sample 1")
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    weights = [json.loads(line)["weight"] for line in lines]
    assert weights == [1.0, None, None, None, 0.75, None, None]
    (again,) = read_steps(str(tmp_path / "run" / "rollouts"))
    assert [item.rollout.output_ids for item in again] == [item.rollout.output_ids for item in STEP]


@pytest.mark.parametrize(("length", "fits"), [(18, True), (19, False)])
def test_a_response_that_the_models_have_no_positions_for_is_an_error(length, fits):
    step = [judged("a", output=(1,) * length)]
    assert len(step[0].rollout.prompt.token_ids) == 2
    if fits:
        assert len(make_batch(step, KEEP, LIMITS, 0).responses) == 1
        return
    with pytest.raises(RolloutError, match=r"prompt a, sample 0 has 21 tokens .* have 20 positions at most"):
        make_batch(step, KEEP, LIMITS, 0)
