"""What drawing responses costs beside the server, what requests in flight hold, and what a publish takes.

    python benchmarks/rollout.py [--only overhead,flight,sync] [--engines sglang,embedded] [--out FOLDER]

Three parts, each with real servers on this machine: SGLang on the CPU (tools/install_sglang_cpu.py makes its
environment the first time) and the embedded server.

`overhead`: 64 prompts x 8 samples through the pool, in turns with the leanest client of the same server: one
aiohttp session that posts the same bodies, as many at a time, and parses the JSON. Each run is a fresh
process, and its processor time stands beside that of the server's processes for the same requests.

`flight`: so many requests in the embedded server at once: it is paused until all are there. Memory of client
and server above what they held before, each time with a fresh server.

`sync`: one model by disk and by broadcast from real ranks to each server. Seconds, and the peak of every
process above what it held before the publish: a trainer's rank then has its shards and no more.

Needs Linux; at the default sizes 8 GB of memory and 2 GB on the disk of the temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from kernels import processor  # noqa: E402  (needs the path)
from rollout_client import Plan  # noqa: E402
from rollout_report import FlightRow, OverheadRow, report  # noqa: E402
from rollout_servers import ENGINES, ModelSize, Running, running  # noqa: E402
from rollout_sync import (  # noqa: E402
    LAYOUTS,
    TRANSPORTS,
    SyncRow,
    settings_of,
    summarise,
)

from tests.helpers.ranks import RankPool  # noqa: E402

CHILD = HERE / "rollout_client.py"
CLIENTS = ("lean", "pool")  # in this order, in turns
PARTS = ("overhead", "flight", "sync")
FLIGHT_PROMPTS = 50  # in every row, since the server keeps prompts that it has read
FLIGHT_NEW_TOKENS = 32  # enough for requests that are there to wait
# Left to itself glibc keeps freed memory for later, which would count as in use.
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
WARM_UP_TOKENS = 128  # of context: enough for the request that SGLang makes of itself at its start
RANKS_TIMEOUT_S = 900.0


def run_client(plan: Plan) -> dict[str, Any]:
    """A fresh client process."""
    process = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(dataclasses.asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"the {plan.kind} client ended with exit code {process.returncode}; see above")
    return json.loads(process.stdout.splitlines()[-1])


def plan_for(server: Running, model: Path, size: ModelSize, options: argparse.Namespace, **own: Any) -> Plan:
    common = {
        "num_prompts": options.prompts,
        "num_samples": options.samples,
        "prompt_tokens": options.prompt_tokens,
        "max_new_tokens": options.new_tokens,
        "concurrency": options.concurrency,
    }
    where = {"url": server.url, "server_pid": server.pid, "model": str(model), "vocab": size.vocab}
    return Plan(**{**where, **common, **own})


def measure_overhead(options: argparse.Namespace, folder: Path) -> list[OverheadRow]:
    """Both clients on each server, in turns after one run of each that does not count."""
    size = ModelSize(options.hidden, options.layers)
    model, rows = size.save(folder / "overhead"), []
    total = options.prompt_tokens + options.new_tokens
    for engine in options.engines:
        serving = running(
            engine,
            model,
            folder,
            total_tokens=total,
            concurrency=options.concurrency,
            cache_tokens=2 * options.concurrency * total,
        )
        runs: dict[str, list[dict[str, Any]]] = {client: [] for client in CLIENTS}
        with serving as server:
            for repeat in range(options.repeats + 1):
                for client in CLIENTS:
                    found = run_client(plan_for(server, model, size, options, kind=client))
                    say(f"{engine}, {client}: {found}")
                    if repeat:
                        runs[client].append(found)
        rows += [OverheadRow(engine, client, tuple(found)) for client, found in runs.items()]
    return rows


def measure_flight(options: argparse.Namespace, folder: Path) -> list[FlightRow]:
    """The pool with each number of requests at once."""
    size = ModelSize(options.hidden, options.layers)
    model, rows = size.save(folder / "flight"), []
    for count in options.flight:
        serving = running(
            *("embedded", model, folder),
            total_tokens=options.prompt_tokens + FLIGHT_NEW_TOKENS,
            concurrency=256,
            cache_tokens=65536,
        )
        with serving as server:
            found = run_client(
                plan_for(
                    *(server, model, size, options),
                    kind="pool",
                    num_prompts=FLIGHT_PROMPTS,
                    num_samples=count // FLIGHT_PROMPTS,
                    max_new_tokens=FLIGHT_NEW_TOKENS,
                    concurrency=count,
                    holds=True,
                )
            )
        say(f"{count} in flight")
        rows.append(FlightRow(**found))
    return rows


def measure_sync(options: argparse.Namespace, folder: Path) -> list[SyncRow]:
    """Every layout and transport to each server."""
    size = ModelSize(options.sync_hidden, options.sync_layers, options.sync_vocab)
    model, rows = size.save(folder / "sync"), []
    for engine in options.engines:
        serving = running(
            engine, model, folder, total_tokens=WARM_UP_TOKENS, concurrency=8, cache_tokens=1024
        )
        with serving as server:
            for layout in options.layouts:
                with unittest.mock.patch.dict(os.environ, GIVE_BACK):  # the ranks inherit it
                    pool = RankPool(math.prod(LAYOUTS[layout]), RANKS_TIMEOUT_S)
                try:
                    rows += [
                        publish_by(transport, pool, server, layout, model, folder, options)
                        for transport in TRANSPORTS
                    ]
                finally:
                    pool.close()
    return rows


def publish_by(
    transport: str,
    pool: RankPool,
    server: Running,
    layout: str,
    model: Path,
    folder: Path,
    options: argparse.Namespace,
) -> SyncRow:
    settings = settings_of(
        model,
        folder / f"{server.engine} {layout} {transport}",
        server.url,
        transport=transport,
        layout=LAYOUTS[layout],
        bucket_mb=options.bucket_mb,
    )
    results = pool.run(
        "rollout_ranks:publish_on_rank", settings, server.pid, num_publishes=options.publishes + 1
    )
    row = summarise(
        results, engine=server.engine, layout=layout, transport=transport, bucket_mb=options.bucket_mb
    )
    say(f"{server.engine}, {layout}, {transport}: {row.median_seconds:.2f} s")
    return row


MEASURE = {"overhead": measure_overhead, "flight": measure_flight, "sync": measure_sync}


def machine(engines: Sequence[str]) -> dict[str, Any]:
    """What is needed to judge the numbers."""
    names = ("torch", "aiohttp", "transformers", "megatron-core")
    return {
        "cores": os.cpu_count(),
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "processor": processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        **({"sglang": sglang_version()} if "sglang" in engines else {}),
    }


def sglang_version() -> str:
    from tests.helpers import sglang

    code = "import importlib.metadata as m; print(m.version('sglang'))"
    done = subprocess.run([sglang.install(), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def load() -> float:
    """Processes that want a core, over the last minute."""
    return round(os.getloadavg()[0], 1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Costs of the client's side of rollouts, and of publishing.")
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "results")
    add("--only", type=_among(PARTS), default=PARTS, help=f"of {', '.join(PARTS)}")
    add("--engines", type=_among(ENGINES), default=ENGINES, help=f"of {', '.join(ENGINES)}")
    add("--repeats", type=int, default=5, help="of each client on each server")
    add("--hidden", type=int, default=256, help="width of the model that draws responses")
    add("--layers", type=int, default=4)
    add("--prompts", type=int, default=64)
    add("--samples", type=int, default=8)
    add("--prompt-tokens", type=int, default=128)
    add("--new-tokens", type=int, default=128)
    add("--concurrency", type=int, default=64, help="requests at once")
    add(
        "--flight",
        type=_numbers,
        default=(500, 2000, 4000),
        help=f"requests at once, multiples of {FLIGHT_PROMPTS}",
    )
    add("--layouts", type=_among(LAYOUTS), default=tuple(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    add("--publishes", type=int, default=5, help="after the first, which makes the process groups")
    add("--sync-hidden", type=int, default=1024, help="width of the model that is published")
    add("--sync-layers", type=int, default=6)
    add("--sync-vocab", type=int, default=8192)
    add("--bucket-mb", type=int, default=64)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.publishes < 1:
        parser.error("--repeats and --publishes must be 1 or more")
    if uneven := [count for count in options.flight if count % FLIGHT_PROMPTS]:
        parser.error(f"--flight has {uneven[0]}; expected multiples of {FLIGHT_PROMPTS}")
    return options


def _among(known: Any) -> Any:
    def parse_names(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse_names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    about: dict[str, Any] = machine(options.engines)
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rollout-benchmark-") as folder:
        for part in options.only:
            about[f"load before {part}"] = load()
            found[part] = MEASURE[part](options, Path(folder))
            write(found, about, options)  # what is measured is kept should a later part fail
    print((options.out / "rollout.md").read_text(encoding="utf-8"))


def write(found: dict[str, list[Any]], about: dict[str, Any], options: argparse.Namespace) -> None:
    """The parts so far, as rollout.md and rollout.json."""
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {part: [dataclasses.asdict(row) for row in rows] for part, rows in found.items()}
    sizes = {key: value for key, value in vars(options).items() if key != "out"}
    whole = {"about": about, "options": sizes, **rows}
    (options.out / "rollout.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (options.out / "rollout.md").write_text(report(found, about, options), encoding="utf-8")


if __name__ == "__main__":
    main()
