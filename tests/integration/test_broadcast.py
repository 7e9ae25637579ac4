"""Weights by broadcast: to the embedded server, to a real SGLang, and what breaks on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_scope.errors import SyncError
from megatron_scope.rollout.embedded.options import ServeOptions
from megatron_scope.rollout.process import EmbeddedServer
from tests.helpers.models import save_qwen2, save_qwen3, save_qwen3_moe
from tests.helpers.proxy import Proxy
from tests.helpers.rows import without_times
from tests.helpers.settings import changed
from tests.helpers.sglang import SglangServer, SglangServers
from tests.integration.conftest import start

TRAIN = "tests.helpers.jobs:train"
BROKEN = "tests.helpers.jobs:error_of_broken_training"
TOLERANCE = 1e-5  # nats, float32 on both sides
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "ep2": (2, {"expert": 2}),
}
BUCKET_MB = 0.01  # several buckets of a tiny model, and a table that stands alone
Save = Callable[[Path], Path]


def tied(folder: Path) -> Path:
    return save_qwen2(folder, seed=1)


def untied(folder: Path) -> Path:
    return save_qwen3(folder, seed=1, tie_word_embeddings=False)


def mixture(folder: Path) -> Path:
    return save_qwen3_moe(folder, seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, and prompts with answers that need not be right."""
    root = tmp_path_factory.mktemp("data")
    rows = [
        {"id": str(number), "prompt": f"say {number}", "answer": "1", "task": "math"} for number in range(8)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"teacher": save_qwen2(root / "teacher", seed=9), "prompts": root / "prompts.jsonl"}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    return {"tied": tied(root / "tied"), "untied": untied(root / "untied")}


@pytest.fixture
def settings(data: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Two steps with weights by broadcast; the student and the servers are each test's own."""
    return {
        "run": {"output_dir": str(tmp_path / "run"), "steps": 2},
        "teacher": {"hf": str(data["teacher"])},
        "data": {"train": str(data["prompts"]), "prompt_template": "{prompt}", "max_prompt_tokens": 16},
        "rollout": {
            "engine": "embedded",
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "max_new_tokens": 8,
            "temperature": 1.0,
        },
        "train": {"precision": "float32", "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 0},
        "sync": {"transport": "broadcast", "bucket_mb": BUCKET_MB, "timeout_s": 60},
    }


# ---- the embedded server


@pytest.mark.parametrize(
    ("save", "layout", "precision"),
    [
        (untied, "one", "bfloat16"),
        (tied, "tp2-pp2", "float32"),
        (mixture, "ep2", "float32"),
    ],
)
def test_a_run_is_bit_for_bit_the_run_by_disk(pool, settings, tmp_path, save, layout, precision):
    num_ranks, parallel = LAYOUTS[layout]
    settings = changed(
        settings,
        student={"hf": str(save(tmp_path / "student"))},
        parallel=parallel,
        train={"precision": precision},
    )
    found = pool(num_ranks).run(TRAIN, settings)[0]
    assert not (tmp_path / "run" / "weights").exists()
    by_disk = changed(settings, run={"output_dir": str(tmp_path / "disk")}, sync={"transport": "disk"})
    expected = pool(num_ranks).run(TRAIN, by_disk)[0]
    assert without_times(found) == without_times(expected)
    assert rollouts(tmp_path / "run") == rollouts(tmp_path / "disk")
    assert [row["weight_version"] for row in found] == [0, 1]


@pytest.fixture(scope="module")
def embedded(students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that outlives its trainers."""
    options = ServeOptions(model=str(students["untied"]), load_format="dummy")
    with EmbeddedServer(options, log_path=tmp_path_factory.mktemp("embedded") / "log") as server:
        yield server.url


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        ("/init_weights_update_group", {"tensor": 2}),
        ("/init_weights_update_group", {"pipeline": 2}),
        ("/update_weights_from_distributed", {"tensor": 2}),
        ("/update_weights_from_distributed", {"pipeline": 2}),
        ("/end_weight_update", {"pipeline": 2}),
    ],
)
def test_a_server_that_refuses_a_step_ends_all_ranks_at_once(
    pool, settings, embedded, students, path, layout
):
    """Long before the time limit, and nobody is left in a collective: the ranks take the next job."""

    def refuse(asked: str, body: Any) -> None:
        if asked == path and body.get("group_name", "-stage1").endswith(last_stage):
            raise RuntimeError("refused")  # which the proxy answers with HTTP 500

    last_stage = f"-stage{layout.get('pipeline', 1) - 1}"
    with Proxy(embedded, meet=refuse) as proxy:
        settings = changed(
            on_server(settings, proxy.url, students["untied"]), parallel=layout, sync={"timeout_s": 200}
        )
        ranks = pool(2)
        with pytest.raises(SyncError, match=f"weight version 0 was not published: .*{path}: HTTP 500"):
            ranks.run(TRAIN, settings)
    assert not ranks.closed
    settings = changed(settings, rollout={"servers": [embedded]})
    rows = pool(2).run(TRAIN, settings)[0]
    assert [row["weight_version"] for row in rows] == [0, 1]
    assert all(row["logprob_gap_max"] < TOLERANCE for row in rows)


@pytest.mark.parametrize(
    ("fault", "rank", "layout", "said", "asked"),
    [
        (
            "unreachable store",
            1,
            {"pipeline": 2},
            r"^rank 1: rank 0's store at 127.0.0.1:1, .* cannot be reached .*; open that port, or set ",
            set(),
        ),
        (
            "dead controller",
            0,
            {"pipeline": 2},
            "^the controller process ended with exit code -9; ",
            {"/health", "/server_info", "/model_info"},
        ),
        (
            "no memory for buckets",
            0,
            {"tensor": 2},
            r"^weight version 0 was not published: .*rank 0: OutOfMemoryError: out of memory$",
            None,
        ),
    ],
    ids=["unreachable-store", "dead-controller", "no-memory"],
)
def test_a_rank_that_cannot_go_on_ends_all_at_once(
    pool, settings, embedded, students, fault, rank, layout, said, asked
):
    """With the reason on rank 0, and before the servers are told to wait for what will not come."""
    paths: set[str] = set()
    with Proxy(embedded, meet=lambda path, body: paths.add(path)) as proxy:
        settings = changed(
            on_server(settings, proxy.url, students["untied"]), parallel=layout, sync={"timeout_s": 200}
        )
        ranks = pool(2)
        (_, message), (other, _) = ranks.run(BROKEN, settings, fault, rank)
    assert re.search(said, message) and "\n" not in message, message
    assert other == "FailedOnRankZero"
    assert asked is None or paths <= asked, paths


def test_a_server_whose_model_cannot_be_read_is_said_once(run, write, settings, embedded, students, tmp_path):
    """Although it is compared again for the group that a second server makes new."""
    folder = shutil.copytree(students["untied"], tmp_path / "elsewhere")
    options = ServeOptions(model=str(folder), load_format="dummy")
    listed = tmp_path / "servers"
    with EmbeddedServer(options, log_path=tmp_path / "log") as server:

        def add(path: str, body: Any) -> None:
            if path == "/generate":
                listed.write_text(f"{proxy.url}\n{embedded}")

        shutil.rmtree(folder)
        with Proxy(server.url, meet=add) as proxy:
            listed.write_text(proxy.url)
            settings = changed(
                on_server(settings, proxy.url, students["untied"]),
                rollout={"servers": [], "servers_file": str(listed)},
                run={"steps": 3},
            )
            result = run("train", write(settings))
        assert result.returncode == 0, result.stderr
        assert version_of(server.url) == version_of(embedded) == "3"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {proxy.url}: serves ") and "only its architecture was compared" in line


def test_servers_that_come_and_go_get_a_group_of_their_own(pool, settings, embedded, students, tmp_path):
    """A second server appears after the first publish, and the first one's group is made anew."""
    options = ServeOptions(model=str(students["untied"]), load_format="dummy")
    listed = tmp_path / "servers"
    listed.write_text(embedded)
    with EmbeddedServer(options, log_path=tmp_path / "log") as second:

        def add(path: str, body: Any) -> None:
            if path == "/generate":
                listed.write_text(f"{proxy.url}\n{second.url}")

        with Proxy(embedded, meet=add) as proxy:
            listed.write_text(proxy.url)
            settings = on_server(settings, proxy.url, students["untied"])
            settings = changed(
                settings, rollout={"servers": [], "servers_file": str(listed)}, run={"steps": 3}
            )
            rows = pool(1).run(TRAIN, settings)[0]
        assert version_of(second.url) == "3"
    assert [row["weight_version"] for row in rows] == [0, 1, 2]
    assert all(row["parity_gap_max"] < TOLERANCE for row in rows)


def version_of(url: str) -> str:
    with urllib.request.urlopen(f"{url}/model_info", timeout=60) as response:
        return json.loads(response.read())["weight_version"]


def rollouts(run: Path) -> list[str]:
    return [file.read_text() for file in sorted((run / "rollouts").glob("*.jsonl"))]


# ---- a real SGLang


@pytest.fixture(scope="module")
def servers(sglang_servers: SglangServers, students: dict[str, Path]) -> Iterator[dict[str, SglangServer]]:
    """One of each student's shape; none has the student's weights when it starts."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(sglang_servers.own(folder, extra=("--load-format", "dummy")))
            for name, folder in students.items()
        }


@pytest.mark.parametrize(("name", "layout"), [("tied", "tp2-pp2"), ("untied", "one"), ("untied", "tp2-pp2")])
def test_sglang_answers_as_the_trainer_and_as_a_server_with_the_weights_from_disk(
    pool, settings, servers, students, tmp_path, name, layout
):
    server = servers[name]
    num_ranks, parallel = LAYOUTS[layout]
    settings = changed(
        settings,
        student={"hf": str(students[name])},
        parallel=parallel,
        rollout={"engine": "sglang", "servers": [server.url]},
    )
    rows = pool(num_ranks).run(TRAIN, settings)[0]
    assert [row["weight_version"] for row in rows] == [0, 1]
    for row in rows:
        assert row["logprob_gap_max"] < TOLERANCE and row["parity_gap_max"] < TOLERANCE
    assert http(server, "/model_info")["weight_version"] == "2"
    sent = greedy(server)
    # A server started with dummy weights takes a folder for such a one, unless told otherwise.
    folder = {"model_path": str(tmp_path / "run" / "hf"), "load_format": "auto"}
    update = {**folder, "weight_version": "3", "flush_cache": True}
    assert http(server, "/update_weights_from_disk", update)["success"]
    assert greedy(server) == sent


def test_a_server_restarted_with_the_weights_answers_the_same(
    pool, settings, servers, students, sglang_servers, tmp_path
):
    settings = on_server(settings, servers["tied"].url, students["tied"])
    pool(1).run(TRAIN, settings)
    with sglang_servers.own(tmp_path / "run" / "hf") as restarted:
        assert greedy(servers["tied"]) == greedy(restarted)


def on_server(settings: dict[str, Any], url: str, student: Path) -> dict[str, Any]:
    return changed(settings, student={"hf": str(student)}, rollout={"engine": "sglang", "servers": [url]})


def http(server: SglangServer, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(f"{server.url}{path}", headers={"Content-Type": "application/json"})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(request, data, timeout=60) as response:
        return json.loads(response.read())


def greedy(server: SglangServer) -> list[Any]:
    """Output ids and log-prob entries, one request at a time."""
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answers = []
    for length in (1, 5, 11):
        body = {"input_ids": list(range(length)), "sampling_params": sampling, "return_logprob": True}
        answer = http(server, "/generate", body)
        answers.append((answer["output_ids"], answer["meta_info"]["output_token_logprobs"]))
    return answers


# ---- what breaks on the way


class At:
    """Acts once, when the `number`-th request for `path` (a bucket) of weight version 1 is about to be
    passed on.
    """

    def __init__(
        self, number: int, act: Callable[[], None], path: str = "/update_weights_from_distributed"
    ) -> None:
        self._left, self._act, self._path = number, act, path
        self._is_due = False
        self.happened = threading.Event()

    def __call__(self, path: str, body: Any) -> None:
        if path == "/update_weight_version":
            self._is_due = body["new_version"] == "incomplete-1"
        if path == self._path and self._is_due:
            self._left -= 1
            if self._left == 0:
                self._act()
                self.happened.set()


TORN = {"parallel": {"pipeline": 2}, "sync": {"timeout_s": 15}, "checkpoint": {"every": 1}}


def torn(settings: dict[str, Any], url: str, student: Path) -> dict[str, Any]:
    """Settings of two ranks whose training is to break."""
    return changed(on_server(settings, url, student), **TORN)


@pytest.fixture
def begin(settings: dict[str, Any], write: Any) -> Callable[..., subprocess.Popen[str]]:
    """Starts such a training, through a proxy."""
    return lambda url, student: start("train", write(torn(settings, url, student)), "--nproc", "2")


@pytest.fixture
def resumes(settings: dict[str, Any], train: Any) -> Callable[[SglangServer, Path], None]:
    """A later run on the same server goes on from the checkpoint, with the same numbers as ever."""

    def to_the_end(server: SglangServer, student: Path) -> None:
        rows = train(torn(settings, server.url, student), 2)
        assert [(row["step"], row["weight_version"]) for row in rows] == [(1, 0), (2, 1)]
        assert all(row["logprob_gap_max"] < TOLERANCE for row in rows)
        assert http(server, "/model_info")["weight_version"] == "2"

    return to_the_end


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code, and what the trainer itself said on stderr."""
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return process.returncode, [line for line in stderr.splitlines() if line.startswith("megatron-scope:")]


def test_a_server_killed_in_mid_transfer_is_one_clear_error(begin, resumes, servers, students):
    server = servers["tied"]
    at = At(2, server.kill)
    with Proxy(server.url, meet=at) as proxy:
        code, said = ended(begin(proxy.url, students["tied"]))
    assert at.happened.is_set()
    assert code == 1 and len(said) == 1, said
    assert "weight version 1 was not published" in said[0] and proxy.url in said[0]
    server.start()
    resumes(server, students["tied"])


def test_a_hung_server_is_one_clear_error_and_never_has_a_wrong_version(begin, resumes, servers, students):
    server = servers["tied"]
    at = At(2, server.suspend)
    try:
        with Proxy(server.url, meet=at) as proxy:
            code, said = ended(begin(proxy.url, students["tied"]))
    finally:
        server.resume()
    assert at.happened.is_set()
    assert code == 1 and len(said) == 1, said
    assert "no answer within" in said[0] and "sync.timeout_s" in said[0] and proxy.url in said[0]
    server.wait()
    assert http(server, "/model_info")["weight_version"] == "incomplete-1"
    resumes(server, students["tied"])


def test_a_killed_trainer_leaves_a_server_that_a_later_run_can_use(begin, resumes, servers, students):
    server = servers["tied"]
    trainer: list[subprocess.Popen[str]] = []
    killed = threading.Event()

    def kill() -> None:
        for process in [*psutil.Process(trainer[0].pid).children(recursive=True), trainer[0]]:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)
        killed.set()

    with Proxy(server.url, meet=At(2, kill)) as proxy:
        trainer.append(begin(proxy.url, students["tied"]))
        trainer[0].communicate(timeout=120)
        assert killed.is_set()
    version = http(server, "/model_info")["weight_version"]
    assert version == "incomplete-1"
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
    assert http(server, "/generate", body)["meta_info"]["weight_version"] == version
    resumes(server, students["tied"])


def test_a_hung_rank_is_one_clear_error(begin, embedded, students):
    """The second stage's sender, stopped before the servers are asked for its bucket."""
    trainer: list[subprocess.Popen[str]] = []

    def stop() -> None:
        for process in psutil.Process(trainer[0].pid).children():
            if process.environ().get("RANK") == "1":
                process.suspend()

    at = At(1, stop, path="/begin_weight_update")
    with Proxy(embedded, meet=at) as proxy:
        trainer.append(begin(proxy.url, students["untied"]))
        code, said = ended(trainer[0])
    assert at.happened.is_set()
    assert code == 1 and len(said) == 1, said
    assert "the sending rank of pipeline stage 1 does not answer" in said[0]
    assert version_of(embedded) == "incomplete-1"


def test_a_server_of_another_model_is_refused_before_any_byte(run, write, settings, servers, students):
    server = servers["untied"]
    before = http(server, "/model_info")["weight_version"]
    result = run("train", write(on_server(settings, server.url, students["tied"])))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("megatron-scope:")]
    assert server.url in line and "start the server with the student's model" in line
    assert http(server, "/model_info")["weight_version"] == before
