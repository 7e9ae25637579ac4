"""From judged rollouts to the batch that is trained on: what is usable, what is counted, what is refused."""

import asyncio
import json
import math

import numpy as np
import pytest

from megatron_scope.config.schema import Config, Correction, Engine, RolloutConfig, Truncated
from megatron_scope.controller.core import Controller, is_usable, make_response, summarise
from megatron_scope.controller.rows import ResponseRecord, read_steps, write_step
from megatron_scope.errors import DataError, RolloutError
from megatron_scope.records import JudgedRollout, Prompt, Response, RolloutCounts, SequenceLimits, StepSummary
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


def summary_of(step: list[JudgedRollout], truncated: Truncated = KEEP, skipped: int = 0) -> StepSummary:
    return summarise(step, Config(rollout=RolloutConfig(truncated=truncated)), skipped, last_arrival_s=0.0)


def responses_of(step: list[JudgedRollout], truncated: Truncated = KEEP) -> list[Response]:
    usable = [(place, item) for place, item in enumerate(step) if is_usable(item, truncated)]
    return [make_response(place, item, LIMITS) for place, item in usable]


@pytest.mark.parametrize(("truncated", "expected"), [(KEEP, [0, 1, 4, 5]), (DROP, [0, 4])])
def test_aborted_and_empty_responses_are_left_out_and_truncated_ones_as_configured(truncated, expected):
    assert [response.index for response in responses_of(STEP, truncated)] == expected
    assert summary_of(STEP, truncated).places.tolist() == expected


@pytest.mark.parametrize(("truncated", "dropped"), [(KEEP, 0), (DROP, 2)])
def test_everything_that_became_of_the_rollouts_is_counted(truncated, dropped):
    assert summary_of(STEP, truncated, skipped=11).counts == RolloutCounts(
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
    counts, usable = summary_of(step, truncated).counts, responses_of(step, truncated)
    assert counts.sampled - counts.aborted - counts.empty - counts.dropped_truncated == len(usable)


def test_responses_are_numbered_in_order_and_grouped_by_prompt():
    summary = summary_of(STEP)
    assert summary.table.group.tolist() == [0, 0, 1, 2]
    assert summary.table.correct.tolist() == [True, False, False, True]
    assert [r.correct for r in responses_of(STEP)] == [True, False, False, True]
    assert summary.table.num_input_tokens.tolist() == [r.num_input_tokens for r in responses_of(STEP)]
    assert summary.names == (
        "prompt b, sample 0",
        "prompt b, sample 1",
        "prompt a, sample 1",
        "prompt c, sample 0",
    )


def test_responses_of_one_prompt_are_one_group_even_when_they_do_not_lie_together():
    step = [judged(name, number) for number, name in enumerate("xyxzy")]
    assert summary_of(step).table.group.tolist() == [0, 1, 0, 2, 1]


def test_a_prompt_without_a_usable_response_takes_no_group_number():
    step = [judged("a", finish="abort"), judged("b"), judged("c")]
    assert summary_of(step).table.group.tolist() == [0, 1]


def test_arrays_hold_the_engines_tokens_and_logprobs():
    (response,) = responses_of([judged(output=(9, 0, 4), engine_logprobs=(-1.0, math.nan, -0.25))])
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
    assert summary_of(step).oldest_version == 5


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
        responses_of([judged("a"), item])
    assert str(raised.value) == (
        f"prompt q, sample 4 holds token id {token}, but student and teacher share only 10 ids; "
        "sample with the student's own tokenizer and vocabulary"
    )


def test_the_largest_shared_id_is_allowed():
    assert responses_of([judged(output=(9, 9))])[0].output_ids.tolist() == [9, 9]


def test_a_bad_id_in_a_response_that_is_not_used_does_not_matter():
    step = [judged("a"), judged("b", output=(99,), finish="abort")]
    assert len(responses_of(step)) == 1


def test_a_step_without_a_usable_response_is_an_error_that_says_why():
    step = [judged("a", finish="abort"), judged("a", 1, output=()), judged("b", finish="length")]
    with pytest.raises(RolloutError) as raised:
        summary_of(step, DROP)
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

    async def first_part():
        await controller.begin_step(1, 0)
        return await controller.next_part(None)

    if not asked:
        assert len(asyncio.run(first_part()).responses) == 2
        return
    with pytest.raises(DataError, match=r"^prompt b, sample 2 has no finite engine log-prob for 2 of its 3"):
        asyncio.run(first_part())


def test_records_find_their_rollouts_though_unusable_ones_lie_between(tmp_path):
    """The file has a row for each rollout, usable or not."""
    write_step(tmp_path / "recorded", 1, STEP, {})
    config = Config(
        rollout=RolloutConfig(engine=Engine.REPLAY, file=str(tmp_path / "recorded"), truncated=DROP)
    )
    controller = Controller(config, LIMITS, str(tmp_path / "run"))

    async def one_step():
        await controller.begin_step(1, 0)
        part = await controller.next_part(None)
        summary = await controller.summarise()
        first, second = summary.places.tolist()
        records = {first: ResponseRecord(-0.5, None, 1.0), second: ResponseRecord(None, -0.25, 0.75)}
        await controller.record(1, records)
        await controller.close()
        return part, summary

    part, summary = asyncio.run(one_step())
    assert part.is_last and [response.index for response in part.responses] == [0, 4]
    assert summary.names == ("prompt b, sample 0", "prompt a, sample 1")
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
        assert len(responses_of(step)) == 1
        return
    with pytest.raises(RolloutError, match=r"prompt a, sample 0 has 21 tokens .* have 20 positions at most"):
        responses_of(step)
