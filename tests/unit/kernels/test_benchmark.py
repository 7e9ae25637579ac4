"""The kernels' benchmark: what it compares with computes the same numbers, and its table is right."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_scope.kernels import reference
from tests.unit.kernels.logits import make

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks folder, which is no package; afterwards it is gone again."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split("_")[0] == "kernels"]:
        del sys.modules[name]


def test_every_contestant_computes_the_references_numbers_and_gradient(load):
    contestants = load("kernels_contestants")
    student, teacher, targets = make(40, 30, dtype=torch.bfloat16)
    factors = torch.rand(2, 40, generator=torch.Generator().manual_seed(3))

    def differentiate(function, logits):
        leaf = logits.detach().requires_grad_(True)
        kl, logprob = function(leaf)
        (factors[0] * kl + factors[1] * logprob).sum().backward()
        return kl.detach().double(), logprob.detach().double(), leaf.grad.double()

    def exactly(logits):
        stats = reference.distill_stats(logits, teacher, targets)
        return stats.reverse_kl, stats.logprob

    exact = differentiate(exactly, student.double())
    for name in contestants.LOGITS.keys() - {contestants.TRL}:
        shard = contestants.Shard(None, 0, 30)
        found = differentiate(
            lambda z, name=name, shard=shard: contestants.LOGITS[name](z, teacher, targets, shard), student
        )
        for mine, want, tolerance in zip(found, exact, (2e-6, 2e-6, 2**-8), strict=True):
            torch.testing.assert_close(
                mine, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_table_has_medians_ratios_to_ours_and_memory_in_shards(load):
    kernels = load("kernels_report")
    shard_bytes = 2 * 10 * 50
    ours, other = (
        kernels.Measurement(
            case=kernels.Case("logits", name, num_tokens=10, vocab=100),
            tensor_parallel=2,
            seconds=seconds,
            cpu_seconds=[value / 2 for value in seconds],
            extra_bytes=[shares * shard_bytes for shares in (1, 3, 2)],
            value_error=1e-7,
            gradient_error=None,
        )
        for name, seconds in (("ours", [2.0, 9.0, 1.0]), ("other", [5.0, 4.0, 9.0]))
    )
    header, _, *rows = kernels.table([ours, other]).splitlines()
    assert header.startswith("| | seconds | runs | times ours | CPU seconds | times ours | extra memory, u |")
    assert rows == [
        "| ours | 2.000 (1.000 to 9.000) | 3 | 1.00 | 1.000 | 1.00 | 2.00 | 1e-07 |  |",
        "| other | 5.000 (4.000 to 9.000) | 3 | 2.50 | 2.500 | 2.50 | 2.00 | 1e-07 |  |",
    ]


def test_the_gpus_script_runs_whole_on_a_cpu(load, tmp_path, capsys):
    sizes = ["--tokens", "6", "--columns", "48", "--width", "8", "--chunk", "4"]
    few = ["--warmups", "1", "--iterations", "3", "--device", "cpu", "--out", str(tmp_path)]
    load("kernels_gpu").main([*sizes, *few])
    printed = capsys.readouterr().out
    assert (tmp_path / "kernels_gpu.md").read_text().strip() == printed.strip()
    parts = json.loads((tmp_path / "kernels_gpu.json").read_text())["parts"]
    rows = [row for part in parts.values() for row in part["rows"] if row["name"].startswith("ours")]
    assert len(rows) == 3 and all(row["share_of_ceiling"] > 0 for row in rows)
