"""The benchmark of rollouts runs whole at toy size."""

import importlib
import json
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_all_parts_run_whole_with_the_embedded_server(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # the ranks inherit it
    rollout = importlib.import_module("rollout")
    sizes = {
        "hidden": 64, "layers": 1, "prompts": 2, "samples": 2, "prompt-tokens": 6, "new-tokens": 6,
        "concurrency": 3, "flight": "50", "sync-hidden": 64, "sync-layers": 2, "sync-vocab": 128,
        "bucket-mb": 1, "repeats": 1, "publishes": 1, "engines": "embedded", "layouts": "1 rank",
    }  # fmt: skip
    rollout.main([*(f"--{key}={value}" for key, value in sizes.items()), f"--out={tmp_path}"])
    assert (tmp_path / "rollout.md").read_text().strip() == capsys.readouterr().out.strip()
    found = json.loads((tmp_path / "rollout.json").read_text())
    assert [(row["client"], row["runs"][0]["num_responses"]) for row in found["overhead"]] == [
        ("lean", 4),
        ("pool", 4),
    ]
    assert [row["num_responses"] for row in found["flight"]] == [50]
    assert all(row["server_waiting_bytes"] <= row["server_peak_bytes"] for row in found["flight"])
    disk, broadcast = found["sync"]
    assert (disk["transport"], broadcast["transport"]) == ("disk", "broadcast")
    assert disk["written_bytes"] >= disk["model_bytes"] > 0 == broadcast["written_bytes"]
