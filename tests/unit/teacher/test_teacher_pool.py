"""The pool of a teacher's servers against scripted ones: what shares a request, where it goes, what becomes
of it when a server fails, and what is refused at the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_scope.errors import ScoringError
from megatron_scope.teacher.pool import MAX_FAILURES, TeacherPool
from megatron_scope.teacher.wire import ScoringRequest
from tests.unit.rollout.fake_server import dropping, hanging
from tests.unit.teacher.fake_teacher import (
    VOCAB_SIZE,
    FakeTeacher,
    answering,
    error_of,
    expected,
    pool_over,
    request,
    run,
)

KEY = "s3cret-key"


async def score_all(pool: TeacherPool, requests: Sequence[ScoringRequest]) -> list[list[float]]:
    return [values.tolist() for values in await asyncio.gather(*map(pool.score, requests))]


def different(count: int, length: int = 3) -> list[ScoringRequest]:
    """Requests that no two share their scores."""
    rng = np.random.default_rng(1)
    return [request(n, targets=rng.integers(0, VOCAB_SIZE, length).tolist()) for n in range(count)]


def scored(fake: FakeTeacher) -> list[list[int]]:
    """The sequences that a server scored after the canary."""
    return [ids for batch in fake.batches[1:] for ids in batch]


# ---- batches and places


def test_each_response_gets_its_own_scores() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two, pool_over(one.url, two.url) as pool:
            requests = different(40)
            assert await score_all(pool, requests) == [expected(each) for each in requests]
            assert len(scored(one)) + len(scored(two)) == 40 and scored(one) and scored(two)

    run(test)


def test_responses_that_wait_together_share_requests_up_to_the_limit() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url) as pool:
            requests = [request(n, targets=[4] * length) for n, length in enumerate((47, 47, 1, 200, 5, 5))]
            await score_all(pool, requests)
            # 100 tokens at most, prompts of 3 included; the long one stands alone.
            assert [[len(ids) for ids in batch] for batch in fake.batches[1:]] == [
                [50, 50],
                [4],
                [203],
                [8, 8],
            ]
            assert fake.bodies[1]["logprob_start_len"] == [2, 2]

    run(test)


def test_a_server_has_at_most_its_share_of_requests_at_once() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url, max_concurrent_requests=3) as pool:
            fake.delay_s = 0.02
            await score_all(pool, different(24, length=60))
            assert fake.most_at_once == 3 and len(fake.batches) == 25

    run(test)


def test_the_next_request_goes_where_the_fewest_tokens_are_outstanding() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two, pool_over(one.url, two.url) as pool:
            one.delay_s = two.delay_s = 0.1
            lengths = (90, 97, 97, 97)
            await score_all(pool, [request(n, targets=[4] * length) for n, length in enumerate(lengths)])
            assert [len(ids) for ids in scored(one)] == [93, 100]
            assert [len(ids) for ids in scored(two)] == [100, 100]

    run(test)


def test_the_key_is_sent_and_never_told() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url, key=KEY) as pool:
            await pool.score(request())
            assert set(fake.keys) == {f"Bearer {KEY}"}
            fake.instead = answering(400, {"error": {"message": f"no such thing for {KEY}"}})
            assert KEY not in str(await error_of(pool.score(request())))

    run(test)


# ---- a server that fails


async def half_an_answer(received: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(received)
    await response.write(b"[{")
    return await dropping(received)


@pytest.mark.parametrize(
    "failure",
    [dropping, half_an_answer, answering(500, {"error": "out of memory"}), answering(503, {}), hanging],
    ids=["dropped", "broken off", "500", "503", "hanging"],
)
def test_what_one_server_fails_to_score_another_scores(failure: Any, capfd: Any) -> None:
    async def test() -> None:
        async with (
            FakeTeacher() as bad,
            FakeTeacher() as good,
            pool_over(bad.url, good.url, request_timeout_s=0.3) as pool,
        ):
            bad.instead = failure
            requests = different(60)
            assert await score_all(pool, requests) == [expected(each) for each in requests]
            assert len(scored(good)) == 60
            assert f"warning: a teacher server is taken out: {bad.url}" in capfd.readouterr().err

    run(test)


def test_a_server_that_is_killed_and_started_again_is_used_again(capfd: Any) -> None:
    async def test() -> None:
        async with (
            FakeTeacher() as lasting,
            FakeTeacher() as first,
            pool_over(first.url, lasting.url) as pool,
        ):
            port = int(first.url.rsplit(":", 1)[1])
            await first.__aexit__()
            requests = different(20)
            assert await score_all(pool, requests) == [expected(each) for each in requests]
            # A new start may count its versions anew.
            async with FakeTeacher(port=port, weight_version="second") as again:
                while "warning: a teacher server is back" not in capfd.readouterr().err:
                    await asyncio.sleep(0.05)
                assert await score_all(pool, requests) == [expected(each) for each in requests]
                assert scored(again)

    run(test)


def test_the_only_server_may_come_back_in_time() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url, start_timeout_s=10) as pool:
            fake.instead = answering(503, {})
            scores = asyncio.gather(*map(pool.score, different(5)))
            await asyncio.sleep(0.1)
            assert not scores.done()
            fake.instead = None
            assert [values.tolist() for values in await scores] == [expected(each) for each in different(5)]

    run(test)


def test_without_a_server_every_response_ends_in_an_error_that_names_it_and_why() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two, pool_over(one.url, two.url) as pool:
            one.instead, two.instead = dropping, answering(500, {"error": "out of memory"})
            errors = await asyncio.gather(*map(pool.score, different(30)), return_exceptions=True)
            for number, error in enumerate(errors):
                assert isinstance(error, ScoringError)
                assert f"the teacher did not score prompt p{number}, sample 0: none of its servers" in str(
                    error
                )
                assert one.url in str(error) and "out of memory" in str(error)
                assert "teacher.start_timeout_s=0.5" in str(error)

    run(test)


def test_a_response_that_comes_when_all_servers_are_long_gone_is_an_error_too() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url, start_timeout_s=0.1) as pool:
            fake.instead = dropping
            for _ in range(2):
                assert "none of its servers" in str(await error_of(pool.score(request())))

    run(test)


def test_a_response_that_no_server_bears_fails_alone() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two, pool_over(one.url, two.url) as pool:
            poison = request(99, targets=[13, 13])

            async def fragile(received: web.Request) -> web.StreamResponse | None:
                body = await received.json() if received.can_read_body else {}
                if [1, 2, 3, 13, 13] not in body.get("input_ids", []):
                    return None
                deaths.append(received.path)
                return await dropping(received)

            deaths: list[str] = []
            one.instead = two.instead = fragile
            others = different(10)
            *scores, error = await asyncio.gather(*map(pool.score, [*others, poison]), return_exceptions=True)
            assert [values.tolist() for values in scores] == [expected(each) for each in others]
            assert isinstance(error, ScoringError) and len(deaths) == MAX_FAILURES
            assert f"did not score prompt p99, sample 0 (5 tokens) in {MAX_FAILURES} tries" in str(error)

    run(test)


def test_a_response_that_takes_too_long_twice_is_an_error_that_names_the_setting() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url, request_timeout_s=0.2) as pool:

            async def slow(received: web.Request) -> web.StreamResponse | None:
                ids = (await received.json())["input_ids"] if received.can_read_body else []
                return await hanging(received) if ids == [[1, 2, 3, 4, 5, 9]] else None

            fake.instead = slow
            said = str(await error_of(pool.score(request())))
            assert "no answer within 0.2 s: the teacher did not score prompt p0, sample 0" in said
            assert "in 2 tries; raise teacher.request_timeout_s" in said

    run(test)


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (
            answering(400, {"error": {"message": "too long"}}),
            "/generate: HTTP 400 to prompt p0, sample 0 and 1 other in one request",
        ),
        (
            answering(401, {"error": "Unauthorized"}),
            "/generate: HTTP 401, the API key is missing or wrong; mend ",
        ),
        (answering(200, "nonsense"), "got nonsense to 2 scoring requests; is this an SGLang server?"),
    ],
)
def test_an_answer_that_no_other_server_would_better_is_an_error_at_once(instead: Any, said: str) -> None:
    async def test() -> None:
        async with FakeTeacher() as bad, FakeTeacher() as good, pool_over(bad.url, good.url) as pool:
            bad.instead = instead
            errors = await asyncio.gather(
                pool.score(request(0)), pool.score(request(1)), return_exceptions=True
            )
            assert all(said in str(error) and bad.url in str(error) for error in errors)
            assert not scored(good)

    run(test)


def test_a_logprob_that_is_not_finite_is_an_error_and_not_asked_for_again() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two, pool_over(one.url, two.url) as pool:

            def spoil(answers: list[dict[str, Any]]) -> None:
                answers[0]["meta_info"]["input_token_logprobs"][1][0] = None

            one.meddle = spoil
            assert "response token 0 is None" in str(await error_of(pool.score(request())))
            assert not scored(two)

    run(test)


def test_weights_that_change_in_the_run_are_an_error() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake, pool_over(fake.url) as pool:
            fake.model_info["weight_version"] = "7"
            said = str(await error_of(pool.score(request())))
            assert "weight version '7', not 'default' as at the start" in said

    run(test)


def test_a_server_that_comes_back_with_another_model_stays_out(capfd: Any) -> None:
    async def test() -> None:
        async with FakeTeacher() as bad, FakeTeacher() as good, pool_over(bad.url, good.url) as pool:
            bad.instead = dropping
            await score_all(pool, different(20))
            bad.instead, bad.shift = None, -1.0
            while "stays out" not in (said := capfd.readouterr().err):
                await asyncio.sleep(0.05)
            assert f"{bad.url} (/models/teacher) gives log-probs that are 1 nats apart on average" in said
            count = len(bad.batches)
            requests = different(30)
            assert await score_all(pool, requests) == [expected(each) for each in requests]
            assert all(len(batch) == 1 and len(batch[0]) == 64 for batch in bad.batches[count:])  # canaries

    run(test)


def test_closing_leaves_nobody_waiting() -> None:
    async def test() -> None:
        async with FakeTeacher() as fake:
            async with pool_over(fake.url, max_concurrent_requests=1) as pool:
                fake.instead = hanging
                waiting = [asyncio.create_task(pool.score(each)) for each in different(3, length=90)]
                await asyncio.sleep(0.05)
            await asyncio.wait(waiting)
            assert all(task.cancelled() for task in waiting)

    run(test)
