"""The benchmark of rollouts: its two clients ask for the same, and its sums are right."""

import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.rollout.pool_server import MODEL, PoolServer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


client, report, servers, sync, rollout = map(
    _load, ("rollout_client", "rollout_report", "rollout_servers", "rollout_sync", "rollout")
)


def plan(**own):
    sizes = {"num_prompts": 5, "num_samples": 3, "prompt_tokens": 4, "max_new_tokens": 4, "concurrency": 4}
    where = {"url": "", "server_pid": os.getpid(), "model": "/w", "vocab": 100}
    return client.Plan(**{"kind": "pool", **sizes, **where, **own})


def test_both_clients_ask_for_the_same_samples_as_many_at_a_time_and_count_what_came(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    async def run(kind):
        server = PoolServer()
        await server.start()
        try:
            found = await client.time_it(plan(kind=kind, url=server.url, model=str(tmp_path)))
        finally:
            await server.kill()
        return found, sorted(rid.rpartition("-")[0] for rid in server.asked), server.most, server.updates

    ours, lean = (asyncio.run(run(kind)) for kind in ("pool", "lean"))
    assert ours[1:] == lean[1:]
    assert ours[1] == [f"1/p{prompt}/{sample}" for prompt in range(5) for sample in range(3)]
    assert ours[2:] == (4, ["1"])
    for found, *_ in (ours, lean):
        assert (found["num_responses"], found["num_tokens"]) == (15, 15)
        assert found["seconds"] > 0 and found["client_cpu_seconds"] > 0


def test_the_processor_time_of_a_server_is_that_of_its_whole_tree():
    script = (
        "import subprocess, sys, time; burn = 'sum(range(20_000_000))'\n"
        "child = subprocess.Popen([sys.executable, '-c', burn + '; print(1, flush=True); input()'],"
        " stdout=subprocess.PIPE, stdin=subprocess.PIPE)\n"
        "child.stdout.readline(); print(1, flush=True); input()"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree, alone = client.Server(process.pid), client.Server(process.pid)
        alone._processes = alone._processes[:1]
        assert tree.cpu_seconds() > alone.cpu_seconds() + 0.1
        process.kill()


def runs(*numbers):
    keys = ("seconds", "client_cpu_seconds", "server_cpu_seconds")
    return tuple(
        {**dict(zip(keys, found, strict=True)), "num_responses": 10, "num_tokens": 70} for found in numbers
    )


def test_the_overhead_is_the_median_of_the_runs_shares_and_of_their_ratios_to_the_run_before():
    lean = report.OverheadRow("sglang", "lean", runs((10.0, 0.1, 8.0), (20.0, 0.1, 8.0), (8.0, 0.1, 8.0)))
    ours = report.OverheadRow("sglang", "pool", runs((11.0, 0.4, 8.0), (20.0, 0.2, 10.0), (10.0, 0.3, 10.0)))
    assert ours.share == pytest.approx(0.03)
    assert ours.milliseconds_a_response == pytest.approx(30.0)
    assert report.wall_ratios([lean, ours]) == {"sglang": pytest.approx([1.1, 1.0, 1.25])}
    last = report.overhead_table([lean, ours]).splitlines()[-1]
    assert last == "| sglang | pool | 11.00 (10.00 to 20.00) | 0.30 | 10.00 | 3.0% | 30.00 | 70 |"


def test_the_growth_of_memory_is_that_from_the_fewest_to_the_most_requests():
    few, many = report.FlightRow(500, 0, 1, 10_000, 2, 1_000_000), report.FlightRow(1500, 0, 1, 30_000, 2, 0)
    assert report.growth([few, many]) == {"client": 20.0, "server": -1000.0}


def test_a_publish_takes_as_long_as_its_slowest_rank_and_the_peaks_are_the_highest():
    first = sync.RankResult(
        100,
        70,
        (sync.Publish(5.0, 900, 10, 3, 4), sync.Publish(1.0, 300, 10, 9, 8), sync.Publish(2.0, 1, 10)),
    )
    other = sync.RankResult(150, 80, tuple(sync.Publish(1.5, peak, 0) for peak in (1, 2_000_000, 3)))
    row = sync.summarise([first, other], engine="e", layout="l", transport="disk", bucket_mb=1)
    assert (row.first_seconds, row.seconds, row.median_seconds) == (5.0, (1.5, 2.0), 1.75)
    assert (row.model_bytes, row.shard_bytes, row.written_bytes) == (250, 150, 10)
    assert row.largest_bytes == 80
    assert (row.rank_peak_bytes, row.peak_in_buckets) == (2_000_000, 2.0)
    assert (row.controller_peak_bytes, row.server_peak_bytes) == (9, 8)


def test_a_made_model_loads_and_its_tokenizer_writes_a_word_for_every_id(tmp_path):
    from transformers import AutoTokenizer

    folder = servers.ModelSize(hidden=64, layers=1, vocab=128, positions=64).save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([5, 40, 127]) == "5aaaadj"
    assert len(tokenizer("the capital")["input_ids"]) == 11  # what SGLang warms up with is not empty


def test_what_is_no_part_or_engine_is_refused(capsys):
    for words in (["--only", "speed"], ["--repeats", "0"], ["--flight", "50,60"]):
        with pytest.raises(SystemExit):
            rollout.parse(words)
    told = capsys.readouterr().err
    assert "'speed' is none of overhead, flight, sync" in told
    assert "--flight has 60; expected multiples of 50" in told
