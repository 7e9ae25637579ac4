"""The client against a scripted server that misbehaves in each way."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from aiohttp import web

from megatron_scope.errors import RolloutError
from megatron_scope.records import Prompt, Rollout
from megatron_scope.rollout.client import (
    ClientOptions,
    RolloutRequest,
    ServerClient,
    ServerFailure,
    sample_seed,
)
from megatron_scope.rollout.wire import StaleWeights, generate_body
from tests.unit.rollout.fake_server import (
    FAST,
    GOOD,
    KEY,
    PARAMS,
    PROMPT,
    Fake,
    Handler,
    answering,
    dropping,
    hanging,
)

REQUEST = RolloutRequest(PROMPT, 0, 1, "r")


def generate(
    handler: Handler, options: ClientOptions = FAST, prompt: Prompt = PROMPT
) -> tuple[Rollout, Fake]:
    async def run() -> tuple[Rollout, Fake]:
        async with (
            Fake(generate=handler) as fake,
            ServerClient(fake.url, vocab_size=10, api_key=KEY, options=options) as client,
        ):
            return await client.generate(RolloutRequest(prompt, 2, 11, "step3/p7/2"), PARAMS), fake

    return asyncio.run(run())


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one place changed; `path` is dotted, a final "!" deletes."""
    body = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place[name]
    if last.endswith("!"):
        del place[last[:-1]]
    else:
        place[last] = value
    return body


# ---- requests and good answers


def test_a_good_answer_becomes_a_rollout() -> None:
    rollout, fake = generate(answering(GOOD))
    assert rollout == Rollout(PROMPT, 2, (4, 5, 9), "45", (-0.5, -1.5, -0.25), "stop", 3)
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert fake.bodies == [
        {
            "input_ids": [1, 2, 3],
            "sampling_params": {
                "n": 1,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "max_new_tokens": 4,
                "stop_token_ids": [9],
                "no_stop_trim": True,
                "skip_special_tokens": True,
                "sampling_seed": 11,
            },
            "return_logprob": True,
            "rid": "step3/p7/2-0.",
        }
    ]


def test_an_abort_keeps_its_partial_output() -> None:
    rollout, _ = generate(answering(changed("meta_info.finish_reason", {"type": "abort", "message": "x"})))
    assert rollout.finish_reason == "abort" and rollout.output_ids == (4, 5, 9)


def test_a_response_over_two_versions_carries_the_older_one() -> None:
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}]
    assert generate(answering(changed("meta_info.weight_versions", spans)))[0].weight_version == 2
    assert generate(answering(changed("meta_info.weight_versions!", None)))[0].weight_version == 3


def test_sample_seeds_are_31_bits_and_depend_on_all_four() -> None:
    seed = sample_seed(1, 2, "p", 3)
    others = {
        sample_seed(9, 2, "p", 3),
        sample_seed(1, 9, "p", 3),
        sample_seed(1, 2, "q", 3),
        sample_seed(1, 2, "p", 9),
    }
    assert seed == sample_seed(1, 2, "p", 3) == 1884136985 and len(others | {seed}) == 5
    seeds = [sample_seed(0, step, "p", sample) for step in range(50) for sample in range(50)]
    assert min(seeds) >= 0 and 2**30 < max(seeds) < 2**31 and len(set(seeds)) > 2490


# ---- answers that do not hold together


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([1], "expected a JSON object"),
        (changed("meta_info!", None), "meta_info is None"),
        (changed("output_ids", [4, 5]), "3 log-probs for 2 output ids"),
        (changed("meta_info.output_token_logprobs!", None), "no log-probs for 3 output ids"),
        (changed("meta_info.output_token_logprobs", [[-1, 4, None]] * 3), "expected one of token 5"),
        (
            changed("meta_info.output_token_logprobs", [[-1, 4], [-1], [-1, 9]]),
            "log-prob 1 is [-1]; expected",
        ),
        (changed("meta_info.output_token_logprobs", [[-1, 4], 5, [-1, 9]]), "log-prob 1 is 5; expected one"),
        (changed("output_ids", [4, 5, 10]), "not token ids in 0..9"),
        (changed("output_ids", [4, 5, -1]), "not token ids"),
        (changed("output_ids", [4, 5, 9, 9, 9]), "max_new_tokens is 4"),
        (changed("meta_info.weight_version!", None) | {"x": 0}, None),
        (changed("meta_info.weight_versions", [{"version": "default"}]), "'default'; expected an integer"),
        (changed("meta_info.weight_versions", "3"), "expected a list of spans"),
        (changed("meta_info.finish_reason", {"type": "tired"}), "tired"),
        (changed("meta_info.finish_reason!", None), "finish_reason is None"),
        (changed("text!", None), "no text"),
    ],
)
def test_answers_are_checked(body: Any, said: str | None) -> None:
    if said is None:  # the spans alone are enough
        assert generate(answering(body))[0].weight_version == 3
        return
    with pytest.raises(RolloutError) as caught:
        generate(answering(body))
    message = str(caught.value)
    assert said in message and "http://127.0.0.1" in message and "\n" not in message
    assert "'p7' sample 2" in message


def test_a_missing_weight_version_is_an_error() -> None:
    body = changed("meta_info.weight_versions", [])
    del body["meta_info"]["weight_version"]
    with pytest.raises(RolloutError, match="weight version is None"):
        generate(answering(body))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "null", '"-1"'])
def test_a_logprob_that_is_no_finite_number_names_prompt_and_sample(value: str) -> None:
    text = web.json_response(GOOD).text
    assert text is not None
    with pytest.raises(RolloutError, match=r"'p7' sample 2: the log-prob of token 1 .* weights sound"):
        generate(answering(text.replace("-1.5", value)))


@pytest.mark.parametrize("ids", [(1, 10), (-1,), ()])
def test_prompt_ids_are_checked_before_they_are_sent(ids: tuple[int, ...]) -> None:
    with pytest.raises(RolloutError, match=r"'bad' has .*expected ids in 0\.\.9"):
        generate(answering(GOOD), prompt=Prompt("bad", ids, "", "math"))


# ---- failures of the exchange


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (answering({"error": "Unauthorized"}, 401), "HTTP 401, the API key is missing or wrong"),
        (answering({"error": {"message": "input too\nlong"}}, 400), "HTTP 400: input too long"),
        (answering({"error": "unknown field 'x'"}, 400), "HTTP 400: unknown field 'x'"),
        (answering({"message": "no"}, 422), "HTTP 422: no"),
        (answering("<html>down</html>", 503), "HTTP 503: <html>down</html>"),
        (answering({"error": {"message": f"key {KEY} of the header"}}, 500), r"HTTP 500: key \*\*\* of"),
        (answering("{half"), "not JSON"),
        (answering(b"\xff\xfe"), "not JSON"),
    ],
)
def test_error_answers_are_one_line_and_not_retried(handler: Handler, said: str) -> None:
    calls: list[int] = []

    async def counted(request: web.Request) -> web.StreamResponse:
        calls.append(1)
        return await handler(request)

    with pytest.raises(RolloutError, match=said) as caught:
        generate(counted)
    message = str(caught.value)
    assert "/generate" in message and "\n" not in message and KEY not in message and len(calls) == 1


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (answering("<html>down</html>", 503), "HTTP 503"),
        (answering({"message": "too many"}, 429), "HTTP 429"),
        (dropping, "no connection"),
        (hanging, r"no answer within 0\.1 s.*rollout\.request_timeout_s"),
    ],
)
def test_a_failure_of_the_server_is_told_apart_and_left_to_the_pool(handler: Handler, said: str) -> None:
    calls: list[int] = []

    async def counted(request: web.Request) -> web.StreamResponse:
        calls.append(1)
        return await handler(request)

    with pytest.raises(ServerFailure, match=said):
        generate(counted, ClientOptions(request_timeout_s=0.1))
    assert len(calls) == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_request_is_no_failure_of_the_server(status: int) -> None:
    with pytest.raises(RolloutError) as caught:
        generate(answering({"error": "no"}, status))
    assert not isinstance(caught.value, ServerFailure)


def test_each_sending_has_a_request_id_that_is_no_beginning_of_another() -> None:
    async def run() -> list[str]:
        async with (
            Fake(generate=answering(GOOD)) as fake,
            ServerClient(fake.url, vocab_size=10, options=FAST) as client,
        ):
            for sample in (1, 1, 11, 12):
                await client.generate(RolloutRequest(PROMPT, sample, 0, f"3/p/{sample}"), PARAMS)
            return [body["rid"] for body in fake.bodies]

    rids = asyncio.run(run())
    assert all(not a.startswith(b) for a in rids for b in rids if a is not b)


def test_a_connection_closed_while_idle_is_no_failure() -> None:
    """The server closes after each answer without having said so, as one whose idle time is over does."""

    async def run() -> tuple[int, int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections, answers
            connections += 1
            body = json.dumps(GOOD).encode()
            for answered in range(2):
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
                if answered:
                    break
                answers += 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ")
                writer.write(str(len(body)).encode() + b"\r\n\r\n" + body)
                await writer.drain()
            writer.close()

        connections = answers = 0
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with listener, ServerClient(url, vocab_size=10, options=FAST) as client:
            for _ in range(3):
                assert (await client.generate(REQUEST, PARAMS)).output_ids == (4, 5, 9)
        return connections, answers

    assert asyncio.run(run()) == (3, 3)


def test_a_version_that_was_not_asked_for_is_stale() -> None:
    async def run(body: Any, version: int) -> Rollout:
        async with (
            Fake(generate=answering(body)) as fake,
            ServerClient(fake.url, vocab_size=10, options=FAST) as client,
        ):
            return await client.generate(REQUEST, PARAMS, version=version)

    assert asyncio.run(run(GOOD, 3)).weight_version == 3
    two = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    for body, version in (
        (GOOD, 4),
        (changed("meta_info.weight_versions", two), 3),
        (changed("meta_info.weight_versions", two), 4),
        (changed("meta_info.weight_versions", [{"version": "default"}]), 3),
    ):
        with pytest.raises(StaleWeights, match=f"expected {version}: was the server started again"):
            asyncio.run(run(body, version))


def test_a_server_that_is_not_there() -> None:
    async def run(url: str) -> None:
        async with ServerClient(url, vocab_size=10, options=FAST) as client:
            await client.generate(REQUEST, PARAMS)

    with pytest.raises(RolloutError, match=r"127\.0\.0\.1:9/generate: no connection \("):
        asyncio.run(run("http://127.0.0.1:9"))
    with pytest.raises(RolloutError, match="not a URL"):
        asyncio.run(run("localhost"))


def test_something_that_speaks_no_http() -> None:
    async def run() -> None:
        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-what\r\n\r\n")
            await writer.drain()
            writer.close()

        listener = await asyncio.start_server(babble, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        async with listener, ServerClient(f"http://127.0.0.1:{port}", vocab_size=10, options=FAST) as client:
            await client.generate(REQUEST, PARAMS)

    with pytest.raises(RolloutError, match="is this an SGLang server"):
        asyncio.run(run())


# ---- what it is made of


def test_the_client_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, megatron_scope.rollout.client, megatron_scope.rollout.process\n"
        "print(sorted({'torch', 'transformers', 'megatron.core'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_request_body_is_plain_json_types() -> None:
    body = generate_body(REQUEST, PARAMS)
    assert type(body["input_ids"]) is list and type(body["sampling_params"]["stop_token_ids"]) is list
