"""Replica assignment and packing: every response once, every row where its token is predicted."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.data.batching import (
    assign_replicas,
    pack,
    response_table,
    split_prompts,
)
from megatron_scope.records import MicroBatch, Response

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=100)

lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=14)  # (prompt, output) tokens
multiples = st.sampled_from([1, 2, 3, 8])


def responses(sizes, first_index=0):
    """Responses whose every token id and log-prob is unique, so that a misplaced one shows."""
    made, token = [], 100
    for number, (prompt, output) in enumerate(sizes):
        ids = np.arange(token, token + prompt + output, dtype=np.int64)
        token += prompt + output
        made.append(
            Response(
                index=first_index + number,
                correct=number % 2 == 0,
                stopped=number % 3 != 0,
                prompt_ids=ids[:prompt],
                output_ids=ids[prompt:],
                engine_logprobs=(-ids[prompt:] / 7).astype(np.float32),
            )
        )
    return made


def segments(micro_batch):
    """(tokens, positions) of each segment of a row."""
    edges = micro_batch.cu_seqlens.tolist()
    return [
        (micro_batch.tokens[start:stop].tolist(), micro_batch.positions[start:stop].tolist())
        for start, stop in itertools.pairwise(edges)
    ]


def predictions(micro_batch):
    """Of every row: (response, what the model reads up to it, token to predict, engine's log-prob)."""
    edges = micro_batch.cu_seqlens
    found = []
    for row, target, response, logprob in zip(
        micro_batch.rows.tolist(),
        micro_batch.targets.tolist(),
        micro_batch.response.tolist(),
        micro_batch.engine_logprobs.tolist(),
        strict=True,
    ):
        start = int(edges[np.searchsorted(edges, row, side="right") - 1])
        found.append((response, micro_batch.tokens[start : row + 1].tolist(), target, logprob))
    return found


# ---- packing


@REPEATABLE
@given(lengths, st.integers(1, 30), multiples, st.integers(0, 5))
def test_every_output_token_is_predicted_once_from_what_came_before_it(sizes, capacity, multiple, first):
    given_responses = responses(sizes, first)
    expected = sorted(
        (
            r.index,
            [*r.prompt_ids.tolist(), *r.output_ids[:j].tolist()],
            int(r.output_ids[j]),
            float(r.engine_logprobs[j]),
        )
        for r in given_responses
        for j in range(len(r.output_ids))
    )
    packed = pack(given_responses, capacity, multiple)
    assert sorted(prediction for batch in packed for prediction in predictions(batch)) == expected


@REPEATABLE
@given(lengths, st.integers(1, 30), multiples)
def test_a_responses_rows_lie_together_and_in_order(sizes, capacity, multiple):
    for batch in pack(responses(sizes), capacity, multiple):
        changes = np.flatnonzero(np.diff(batch.response)) + 1
        blocks = np.split(np.arange(len(batch.response)), changes)
        owners = [batch.response[block[0]] for block in blocks if len(block)]
        assert len(set(owners)) == len(owners)
        for block in blocks:
            rows = batch.rows[block]
            assert np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))


@REPEATABLE
@given(lengths, st.integers(1, 30), multiples)
def test_rows_of_tokens_are_well_formed(sizes, capacity, multiple):
    for batch in pack(responses(sizes), capacity, multiple):
        num_tokens = len(batch.tokens)
        assert num_tokens % multiple == 0
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == num_tokens == len(batch.positions)
        assert (np.diff(batch.cu_seqlens) > 0).all()
        assert all(positions == list(range(len(tokens))) for tokens, positions in segments(batch))
        assert len(np.unique(batch.rows)) == len(batch.rows)
        types = {"tokens": np.int64, "positions": np.int64, "cu_seqlens": np.int32, "rows": np.int64}
        types |= {"targets": np.int64, "response": np.int64, "engine_logprobs": np.float32}
        assert {name: getattr(batch, name).dtype for name in types} == types


@REPEATABLE
@given(lengths, st.integers(1, 30))
def test_the_capacity_is_kept_and_only_an_over_long_response_exceeds_it_alone(sizes, capacity):
    batches = pack(responses(sizes), capacity)
    for batch in batches:
        members = np.unique(batch.response)
        assert len(members) >= 1
        assert len(batch.tokens) <= capacity or len(members) == 1
    used = [len(batch.tokens) for batch in batches if len(batch.tokens) <= capacity]
    # First fit: no two rows could have been one.
    assert all(a + b > capacity for i, a in enumerate(used) for b in used[i + 1 :])


@REPEATABLE
@given(lengths, st.integers(1, 30), multiples)
def test_padding_is_one_last_segment_below_the_multiple_and_no_row_lies_in_it(sizes, capacity, multiple):
    for batch in pack(responses(sizes), capacity, multiple):
        members = np.unique(batch.response)
        own = sum(sizes[i][0] + sizes[i][1] - 1 for i in members)
        padding = len(batch.tokens) - own
        assert 0 <= padding < multiple
        assert len(segments(batch)) == len(members) + (padding > 0)
        assert (batch.rows < own).all()
        if padding:
            assert segments(batch)[-1] == ([0] * padding, list(range(padding)))


def test_a_worked_example():
    short, long = responses([(2, 3), (3, 4)])  # 4 and 6 tokens read
    (batch,) = pack([short, long], 10, multiple_of=4)
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 12]
    assert batch.tokens.tolist() == [105, 106, 107, 108, 109, 110, 100, 101, 102, 103, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]
    assert batch.rows.tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert batch.targets.tolist() == [108, 109, 110, 111, 102, 103, 104]
    assert batch.response.tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_a_response_of_one_token_reads_its_prompt_only():
    (batch,) = pack(responses([(3, 1)]), 100)
    assert batch.tokens.tolist() == [100, 101, 102]
    assert batch.rows.tolist() == [2] and batch.targets.tolist() == [103]


def test_the_shortest_possible_response_is_one_token_long():
    (batch,) = pack(responses([(1, 1)]), 1)
    assert batch.tokens.tolist() == [100] and batch.rows.tolist() == [0] and batch.targets.tolist() == [101]


def test_an_over_long_response_shares_its_row_with_nobody():
    packed = pack(responses([(1, 1), (5, 10), (1, 1), (8, 10)]), 10)
    assert [np.unique(batch.response).tolist() for batch in packed] == [[3], [1], [0, 2]]


def test_rows_go_longest_first_and_ties_by_order():
    packed = pack(responses([(2, 2), (4, 5), (2, 2), (4, 5)]), 8)
    assert [batch.response[0] for batch in packed] == [1, 3, 0]
    assert np.unique(packed[2].response).tolist() == [0, 2]


def test_packing_is_deterministic_and_leaves_its_input_alone():
    sizes = [(3, 5), (1, 9), (4, 4), (2, 2), (3, 5)]
    given_responses = responses(sizes)
    first, second = pack(given_responses, 12, 2), pack(given_responses, 12, 2)
    for one, other in zip(first, second, strict=True):
        for name in ("tokens", "positions", "cu_seqlens", "rows", "targets", "response", "engine_logprobs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
    for kept, fresh in zip(given_responses, responses(sizes), strict=True):
        assert np.array_equal(kept.prompt_ids, fresh.prompt_ids)
        assert np.array_equal(kept.output_ids, fresh.output_ids)


def test_an_engine_logprob_that_is_missing_stays_nan():
    (response,) = responses([(2, 3)])
    response.engine_logprobs[1] = np.nan
    (batch,) = pack([response], 10)
    assert np.isnan(batch.engine_logprobs).tolist() == [False, True, False]


def test_nothing_to_pack_gives_no_micro_batch():
    assert pack([], 100) == []


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_empty_micro_batch_has_tokens_to_read_but_no_row(multiple):
    batch = MicroBatch.of_padding(multiple)
    assert batch.tokens.tolist() == [0] * multiple and batch.positions.tolist() == list(range(multiple))
    assert batch.cu_seqlens.tolist() == [0, multiple]
    for name in ("rows", "targets", "response", "engine_logprobs"):
        assert getattr(batch, name).shape == (0,)
    assert batch.rows.dtype == batch.targets.dtype == batch.response.dtype == np.int64
    assert batch.engine_logprobs.dtype == np.float32 and batch.cu_seqlens.dtype == np.int32


# ---- replicas


@REPEATABLE
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_replicas_are_balanced(sizes, num_replicas):
    """Longest first to the least loaded: no replica has over the mean by more than one response."""
    sizes = np.array(sizes, dtype=np.int64)
    replica = assign_replicas(sizes, [0] * num_replicas)
    assert replica.shape == sizes.shape and replica.dtype == np.int64
    assert ((replica >= 0) & (replica < num_replicas)).all()
    loads = np.bincount(replica, weights=sizes, minlength=num_replicas)
    for number in range(num_replicas):
        if loads[number] > loads.min():
            # Its last, and so its shortest, response came while it was the least loaded one.
            assert loads[number] - sizes[replica == number].min() <= loads.min()


def test_a_worked_assignment_with_ties_by_number():
    assert assign_replicas(np.array([5, 9, 5, 5, 1]), [0] * 2).tolist() == [1, 0, 1, 0, 1]
    assert assign_replicas(np.array([4, 4, 4]), [0] * 3).tolist() == [0, 1, 2]
    assert assign_replicas(np.array([4, 4, 4]), [0] * 1).tolist() == [0, 0, 0]
    assert assign_replicas(np.array([3, 7]), [0] * 4).tolist() == [1, 0]
    assert assign_replicas(np.zeros(0, dtype=np.int64), [0] * 2).tolist() == []


def test_a_part_of_a_step_goes_to_the_replicas_that_have_least_of_it():
    assert assign_replicas(np.array([4, 4, 4]), [9, 0, 3]).tolist() == [1, 2, 1]


def test_assignment_depends_on_the_lengths_alone():
    sizes = np.random.default_rng(0).integers(1, 50, 200)
    first = assign_replicas(sizes, [0] * 7)
    assert np.array_equal(assign_replicas(sizes.copy(), [0] * 7), first)
    assert np.array_equal(assign_replicas(sizes * 2, [0] * 7), first)


# ---- the table


def test_the_table_holds_every_response_in_order():
    table = response_table(
        group=[0, 0, 1], correct=[True, False, True], num_prompt_tokens=[2, 1, 4], num_tokens=[3, 1, 2]
    )
    assert table.group.tolist() == [0, 0, 1] and table.correct.tolist() == [True, False, True]
    assert table.num_tokens.tolist() == [3, 1, 2]
    assert table.num_input_tokens.tolist() == [4, 1, 5]
    assert (table.group.dtype, table.correct.dtype) == (np.int64, bool)
    assert len(table) == 3


@given(lengths, st.sampled_from([1, 3, 50]), multiples)
@REPEATABLE
def test_the_last_row_of_a_stopped_response_is_its_stop_token(sizes, micro_batch_tokens, multiple_of):
    made = responses(sizes)
    for micro_batch in pack(made, micro_batch_tokens, multiple_of):
        assert micro_batch.stop.dtype == bool
        for index in set(micro_batch.response.tolist()):
            stops = micro_batch.stop[micro_batch.response == index]
            assert stops[-1] == made[index].stopped and not stops[:-1].any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 8))
@REPEATABLE
def test_a_prompt_is_in_one_update_and_updates_are_even_and_none_is_empty(group, num_updates):
    group = np.array(group)
    update = split_prompts(group, num_updates)
    prompts = {g: set(update[group == g].tolist()) for g in np.unique(group)}
    assert all(len(updates) == 1 for updates in prompts.values())
    in_order = [min(prompts[g]) for g in sorted(prompts)]
    sizes = np.bincount(in_order)
    assert in_order == sorted(in_order)
    assert len(sizes) == min(num_updates, len(prompts)) and sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
