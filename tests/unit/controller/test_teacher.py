"""The served teacher as the controller uses it, against scripted servers: which responses are sent and as
what, and what is refused before the run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scope.config import parse_config
from megatron_scope.controller.arrivals import Arrive, Produce
from megatron_scope.controller.teacher import ServedTeacher
from megatron_scope.errors import ConfigError, RolloutError, ScoringError
from megatron_scope.records import JudgedRollout, SequenceLimits
from tests.helpers.models import CHARACTERS, save_qwen2, save_tokenizer
from tests.unit.controller.judged import judged
from tests.unit.rollout.fake_server import dropping, hanging
from tests.unit.teacher.fake_teacher import FakeTeacher, error_of, expected, request, run

VOCAB_SIZE = len(CHARACTERS)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("models") / "student")


@contextlib.asynccontextmanager
async def teacher_over(
    student: Path,
    *fakes: FakeTeacher,
    started: bool = True,
    vocab_size: int = VOCAB_SIZE,
    objective: str = "scope",
    rollout: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[ServedTeacher]:
    """A teacher whose servers read the student's own tokenizer, unless a test says otherwise."""
    for fake in fakes:
        fake.model_info["tokenizer_path"] = fake.model_info["tokenizer_path"] or str(student)
    config = parse_config(
        {
            "student": {"hf": str(student)},
            "teacher": {"server": [fake.url for fake in fakes], "start_timeout_s": 0.3, **settings},
            "objective": {"name": objective},
            "data": {"max_prompt_tokens": 60},
            "rollout": {"engine": "replay", "file": "r.jsonl", **(rollout or {})},
        },
        "test",
    )
    teacher = ServedTeacher(config, SequenceLimits(vocab_size, 256))
    try:
        if started:
            await teacher.start()
        yield teacher
    finally:
        await teacher.close()


def fake(**model_info: Any) -> FakeTeacher:
    return FakeTeacher(**{"tokenizer_path": None, **model_info})


def producing(*items: JudgedRollout, error: Exception | None = None) -> Produce:
    async def produce(arrive: Arrive) -> None:
        for place, item in enumerate(items):
            arrive(place, item)
        if error is not None:
            raise error

    return produce


async def gather(
    teacher: ServedTeacher, *items: JudgedRollout, error: Exception | None = None
) -> dict[int, JudgedRollout]:
    """What arrives of the items, in its order; aborted ones are not usable."""
    found: dict[int, JudgedRollout] = {}
    await teacher.score_arriving(
        producing(*items, error=error),
        lambda item: item.rollout.finish_reason != "abort",
        found.__setitem__,
    )
    return found


def sent(server: FakeTeacher) -> list[list[int]]:
    """The sequences that came after the canary."""
    return sorted(ids for batch in server.batches[1:] for ids in batch)


STEP = [
    judged("a", 0, output=(4, 5, 12)),
    judged("a", 1, output=(6, 5, 12), correct=False),
    judged("b", 0, output=(7, 7), correct=False, finish="abort"),
    judged("b", 1, output=(8, 9, 10), correct=False, finish="length"),
]


def scores(item: JudgedRollout) -> list[float] | None:
    return None if item.teacher_logprobs is None else item.teacher_logprobs.tolist()


# ---- which responses are sent, and as what


def test_only_incorrect_usable_responses_are_sent_and_each_gets_its_own_scores(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server) as teacher:
            found = await gather(teacher, *STEP)
            assert sent(server) == [[2, 3, 6, 5, 12], [2, 3, 8, 9, 10]]
            assert [found[place] for place in range(4)] == STEP
            assert [scores(found[place]) for place in range(4)] == [
                None,
                expected(request(prompt=(2, 3), targets=(6, 5, 12))),
                None,
                expected(request(prompt=(2, 3), targets=(8, 9, 10))),
            ]
            assert found[1].teacher_logprobs is not None and found[1].teacher_logprobs.dtype == np.float32

    run(test)


def test_opd_asks_for_correct_responses_too(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server, objective="opd") as teacher:
            await gather(teacher, *STEP)
            assert sent(server) == [[2, 3, 4, 5, 12], [2, 3, 6, 5, 12], [2, 3, 8, 9, 10]]

    run(test)


def test_the_stop_token_of_a_response_is_scored_as_the_teachers_own(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server, stop_token_id=20) as teacher:
            found = await gather(teacher, *STEP)
            assert sent(server) == [[2, 3, 6, 5, 20], [2, 3, 8, 9, 10]]
            assert found[1].rollout.output_ids == (6, 5, 12)
            assert scores(found[1]) == expected(request(prompt=(2, 3), targets=(6, 5, 20)))

    run(test)


def test_what_the_teacher_need_not_read_does_not_wait_for_it(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server) as teacher:
            server.delay_s = 0.2
            assert list(await gather(teacher, STEP[1], STEP[0])) == [1, 0]

    run(test)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"output": (4, VOCAB_SIZE)},
            f"prompt x, sample 0 holds token id {VOCAB_SIZE}, but the teacher is known",
        ),
        ({"output": (-1,)}, "prompt x, sample 0 holds token id -1, but the teacher is known to have 40 ids"),
        (
            {"output": (1,) * 99},
            "prompt x, sample 0 has 101 tokens with its prompt, but the teacher's servers take ",
        ),
    ],
)
def test_what_a_server_would_not_survive_or_take_is_never_sent(
    student: Path, changes: dict[str, Any], said: str
) -> None:
    async def test() -> None:
        async with fake() as server:
            server.server_info["max_req_input_len"] = 101
            async with teacher_over(student, server) as teacher:
                error = await error_of(gather(teacher, judged("x", correct=False, **changes)))
                assert isinstance(error, ScoringError) and said in str(error) and not sent(server)

    run(test)


def test_the_first_error_ends_the_step_and_what_is_under_way(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server) as teacher:
            server.instead = dropping
            before = asyncio.all_tasks()
            error = await error_of(gather(teacher, *STEP))
            assert isinstance(error, ScoringError) and "none of its servers answers" in str(error)
            await teacher.close()
            assert asyncio.all_tasks() <= before

    run(test)


def test_an_error_of_the_rollouts_is_not_hidden_by_the_teacher(student: Path) -> None:
    async def test() -> None:
        async with fake() as server, teacher_over(student, server) as teacher:
            server.instead = hanging
            gone = RolloutError("the rollout servers are gone")
            assert await error_of(gather(teacher, STEP[1], error=gone)) is gone

    run(test)


# ---- what is refused before the run


def other_tokenizer(folder: Path) -> Path:
    """The student's with two ids exchanged."""
    save_tokenizer(folder)
    path = folder / "tokenizer.json"
    text = path.read_text()
    swapped = text.replace('"4": 4', '"4": 5').replace('"5": 5', '"5": 4')
    assert swapped != text
    path.write_text(swapped)
    return folder


def test_a_tokenizer_that_can_be_read_here_is_compared_token_by_token(student: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            fake(tokenizer_path=str(other_tokenizer(tmp_path))) as server,
            teacher_over(student, server, started=False) as teacher,
        ):
            error = await error_of(teacher.start())
            assert isinstance(error, ConfigError)
            assert f"the tokenizers of {student} and {tmp_path} differ in 2 tokens" in str(error)

    run(test)


@pytest.mark.parametrize("wrong", [None, 0, VOCAB_SIZE - 1])
def test_a_tokenizer_elsewhere_is_compared_by_the_text_of_every_id(student: Path, wrong: int | None) -> None:
    async def test() -> None:
        async with (
            fake(tokenizer_path="org/model") as server,
            teacher_over(student, server, started=False) as teacher,
        ):
            server.texts = lambda token: "?" if token == wrong else CHARACTERS[token]
            if wrong is None:
                await teacher.start()
                return
            said = str(await error_of(teacher.start()))
            assert (
                f"{server.url}: the teacher's tokenizer is not that of {student}: token id {wrong} is '?' "
                in said
            )

    run(test)


def test_a_tokenizer_that_cannot_be_looked_at_is_refused(student: Path) -> None:
    async def test() -> None:
        async with (
            fake(tokenizer_path="org/model") as server,
            teacher_over(student, server, started=False) as teacher,
        ):
            error = await error_of(teacher.start())
            assert isinstance(error, ConfigError)
            assert "/detokenize: HTTP 404" in str(error) and "(org/model) can neither be read here" in str(
                error
            )

    run(test)


def test_a_shorter_table_is_refused_and_an_untold_one_limits_ids_to_the_tokenizer(student: Path) -> None:
    async def test() -> None:
        async with fake() as server:
            server.server_info["vocab_size"] = VOCAB_SIZE + 2
            async with teacher_over(student, server, started=False, vocab_size=VOCAB_SIZE + 3) as teacher:
                said = str(await error_of(teacher.start()))
                assert (
                    f"{server.url}: the teacher's table has 42 rows, but ids up to 42 count; set teacher.hf"
                    in said
                )
            del server.server_info["vocab_size"]
            async with teacher_over(student, server, vocab_size=VOCAB_SIZE + 3) as teacher:
                item = judged("x", output=(VOCAB_SIZE,), correct=False)
                assert "known to have 40 ids" in str(await error_of(gather(teacher, item)))

    run(test)


@pytest.mark.parametrize(("new_tokens", "fits"), [(40, True), (41, False)])
def test_servers_too_short_for_the_rollouts_are_refused_at_once(
    student: Path, new_tokens: int, fits: bool
) -> None:
    async def test() -> None:
        async with fake() as long, fake() as short:
            short.server_info["max_req_input_len"] = 101
            rollout = {"engine": "embedded", "max_new_tokens": new_tokens}
            async with teacher_over(student, long, short, started=False, rollout=rollout) as teacher:
                if fits:
                    await teacher.start()
                    return
                assert str(await error_of(teacher.start())).startswith(
                    "data.max_prompt_tokens + rollout.max_new_tokens is 101, but the teacher's servers "
                    "take 100 tokens at most (SGLang: --context-length less 7)"
                )

    run(test)


def test_a_key_that_is_not_set_is_a_config_error(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with fake() as server:
            with pytest.raises(
                ConfigError, match=r"teacher\.api_key_env names TEACHER_KEY, which is not set"
            ):
                async with teacher_over(student, server, api_key_env="TEACHER_KEY"):
                    pass
            monkeypatch.setenv("TEACHER_KEY", "s3cret")
            async with teacher_over(student, server, api_key_env="TEACHER_KEY"):
                assert set(server.keys) == {"Bearer s3cret"}

    run(test)
