"""What the pool of a teacher's servers finds out and refuses before it scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_scope.errors import ConfigError, ScopeError, ScoringError
from megatron_scope.teacher.pool import TeacherPool
from tests.unit.teacher.fake_teacher import (
    VOCAB_SIZE,
    FakeTeacher,
    answering,
    error_of,
    pool_over,
    request,
    run,
)


def test_servers_of_two_models_are_refused_and_of_nearly_equal_ones_not() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher(model_path="/models/other") as two:
            two.shift = 0.2
            async with pool_over(one.url, two.url, started=False) as pool:
                error = await error_of(pool.compare(await pool.connect(), VOCAB_SIZE))
            assert isinstance(error, ConfigError)
            assert str(error).startswith(
                f"{two.url} (/models/other) and {one.url} (/models/teacher) give the same tokens log-probs "
                "that are 0.2 nats apart on average (teacher.canary_tolerance=0.05)"
            )
            two.shift = 0.04
            async with pool_over(one.url, two.url) as pool:
                assert len(await pool.score(request())) == 3

    run(test)


def test_the_canary_is_the_same_ids_on_all_servers_and_fits_the_shortest() -> None:
    async def test() -> None:
        async with FakeTeacher() as one, FakeTeacher() as two:
            two.server_info["max_req_input_len"] = 21
            async with pool_over(one.url, two.url):
                pass
            assert one.batches == two.batches and len(one.batches[0][0]) == 20
            assert all(0 <= token < VOCAB_SIZE for token in one.batches[0][0])
            assert len(set(one.batches[0][0])) > 10

    run(test)


@pytest.mark.parametrize(
    ("prepare", "kind", "said"),
    [
        (
            lambda fake: setattr(fake, "instead", answering(503, {})),
            ScoringError,
            "/health: HTTP 503: {}: the teacher is not healthy after 0.5 s; start the server, mend "
            "teacher.server",
        ),
        (
            lambda fake: fake.model_info.update(is_generation=False),
            ConfigError,
            ": /models/teacher is not served as a generation model (is_generation is False)",
        ),
        (
            lambda fake: setattr(fake, "instead", answering(404, {"detail": "Not Found"})),
            ScoringError,
            "/health: HTTP 404",
        ),
        (
            lambda fake: setattr(fake, "meddle", lambda answers: answers.clear()),
            ScoringError,
            "got 0 answers to 1 scoring requests",
        ),
        (
            lambda fake: setattr(
                fake,
                "meddle",
                lambda answers: answers[0]["meta_info"].update(finish_reason={"type": "abort"}),
            ),
            ScoringError,
            "the canary sequence was aborted (None): the teacher's servers must answer before the run starts",
        ),
    ],
)
def test_what_is_wrong_at_the_start_is_one_error(
    prepare: Callable[[FakeTeacher], None], kind: type[ScopeError], said: str
) -> None:
    async def test() -> None:
        async with FakeTeacher() as good, FakeTeacher() as bad:
            prepare(bad)
            async with pool_over(good.url, bad.url, started=False) as pool:
                error = await error_of(_start(pool))
            assert type(error) is kind and said in str(error) and bad.url in str(error)

    run(test)


async def _start(pool: TeacherPool) -> None:
    await pool.compare(await pool.connect(), VOCAB_SIZE)


def test_a_server_that_is_not_there_is_waited_for_and_then_an_error() -> None:
    async def test() -> None:
        async with pool_over("http://127.0.0.1:9", started=False, start_timeout_s=0.3) as pool:
            said = str(await error_of(pool.connect()))
            assert "http://127.0.0.1:9/health: " in said and "not healthy after 0.3 s" in said

    run(test)


def test_servers_tell_their_limits_or_do_not(tmp_path: Any) -> None:
    async def test() -> None:
        (tmp_path / "config.json").write_text('{"vocab_size": 17}')
        async with FakeTeacher() as plain, FakeTeacher(model_path=str(tmp_path)) as readable:
            readable.server_info = {"context_length": 300}
            async with FakeTeacher() as embedded:
                embedded.server_info = {"context_length": 64, "vocab_size": 9}
                async with pool_over(plain.url, readable.url, embedded.url, started=False) as pool:
                    facts = await pool.connect()
        told = [(each.max_input_tokens, each.vocab_rows, each.weight_version) for each in facts]
        assert told == [(1000, None, "default"), (300, 17, "default"), (64, 9, "default")]

    run(test)
