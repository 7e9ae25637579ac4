"""What is sent to a teacher's server, and which answers are scores: each wrong one is an error, never a
number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_scope.errors import ScoringError
from megatron_scope.teacher.wire import NoAnswer, parse_scores, scoring_body
from tests.unit.teacher.fake_teacher import VOCAB_SIZE, answer, expected, request

TWO = [request(0), request(1, prompt=[6], targets=[7])]


def answers() -> list[dict[str, Any]]:
    return [answer([1, 2, 3, 4, 5, 9], 2), answer([6, 7], 0)]


def parse(body: Any, version: str | None = "default") -> list[np.ndarray]:
    return parse_scores(body, TWO, server="http://t:1", weight_version=version, last_id=VOCAB_SIZE - 1)


def test_a_batch_asks_for_the_logprobs_from_each_prompts_last_token_on() -> None:
    assert scoring_body(TWO) == {
        "input_ids": [[1, 2, 3, 4, 5, 9], [6, 7]],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [2, 0],
    }


def test_a_good_answer_gives_one_float32_per_response_token_in_the_order_of_the_requests() -> None:
    scores = parse(answers())
    assert [values.dtype for values in scores] == [np.float32, np.float32]
    assert [values.tolist() for values in scores] == [expected(one) for one in TWO]


def meta(change: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    body = answers()
    change(body[0]["meta_info"])
    return body


def entries(change: Callable[[list[Any]], Any]) -> list[dict[str, Any]]:
    return meta(lambda found: change(found["input_token_logprobs"]))


def put(place: int, value: Any) -> Callable[[list[Any]], Any]:
    return lambda found: found.__setitem__(place, value)


FIRST = "http://t:1: the teacher's answer to prompt p0, sample 0"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("nonsense", "http://t:1: got nonsense to 2 scoring requests; is this an SGLang server?"),
        (answers()[:1], "http://t:1: got 1 answers to 2 scoring requests"),
        ([1, 2], f"{FIRST} is 1; expected a JSON object"),
        ([{}, {}], f"{FIRST} is None; expected a JSON object"),
        (entries(lambda found: found.pop()), f"{FIRST} has 2 log-probs for 3 response tokens"),
        (entries(lambda found: found.append([-1.0, 1, None])), f"{FIRST} has 4 log-probs for 3"),
        (entries(lambda found: found.clear()), f"{FIRST} has 0 log-probs for 3"),
        (meta(lambda found: found.pop("input_token_logprobs")), f"{FIRST} has no log-probs for 3"),
        (entries(put(0, [None, 2, None])), f"{FIRST}: entry 0 of its log-probs is of token 2; expected 3"),
        (entries(put(2, [-1.0, 4, None])), f"{FIRST}: entry 2 of its log-probs is of token 4; expected 5"),
        (entries(put(2, [None, 5, None])), f"{FIRST}: the log-prob of response token 1 is None; expected"),
        (entries(put(3, [float("nan"), 9, None])), f"{FIRST}: the log-prob of response token 2 is nan"),
        (entries(put(1, [float("-inf"), 4, None])), f"{FIRST}: the log-prob of response token 0 is -inf"),
        (entries(put(1, ["low", 4, None])), f"{FIRST} has entries that are not [log-prob, token id]"),
        (entries(put(1, [])), f"{FIRST} has entries that are not [log-prob, token id]"),
        (entries(put(1, None)), f"{FIRST} has entries that are not [log-prob, token id]"),
        (
            meta(lambda found: found.update(weight_version="7")),
            f"{FIRST} comes from weight version '7', not 'default' as at the start; a teacher's weights stay",
        ),
    ],
)
def test_an_answer_that_does_not_hold_together_is_an_error_that_names_server_and_response(body, said) -> None:
    with pytest.raises(ScoringError) as raised:
        parse(body)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("last_id", "fits"), [(VOCAB_SIZE - 1, True), (VOCAB_SIZE, False), (None, False)])
def test_the_last_id_of_the_table_may_be_told_as_0(last_id: int | None, fits: bool) -> None:
    one = request(prompt=[1, VOCAB_SIZE - 1], targets=[4, VOCAB_SIZE - 1, 0])
    body = [answer([1, VOCAB_SIZE - 1, 4, VOCAB_SIZE - 1, 0], 1)]
    assert [entry[1] for entry in body[0]["meta_info"]["input_token_logprobs"]] == [0, 4, 0, 0]

    def parse() -> list[np.ndarray]:
        return parse_scores(body, [one], server="http://t:1", weight_version=None, last_id=last_id)

    if fits:
        assert parse()[0].tolist() == expected(one)
        return
    with pytest.raises(ScoringError, match="entry 0 of its log-probs is of token 0; expected 49"):
        parse()


def test_an_aborted_request_has_no_answer_yet() -> None:
    with pytest.raises(NoAnswer, match="prompt p0, sample 0 was aborted"):
        parse(meta(lambda found: found.update(finish_reason={"type": "abort", "message": "by hand"})))


def test_any_weight_version_will_do_before_the_servers_own_is_known() -> None:
    assert len(parse(answers(), version=None)) == 2
