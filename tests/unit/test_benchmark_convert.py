"""The conversion benchmark's parts: its synthetic folders, its measurements of processes, its arithmetic."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import read_weights

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


process, sizes, child, convert = map(_load, ("convert_process", "convert_sizes", "convert_child", "convert"))


def plan(size, max_shard_bytes):
    return {"config": size.config(), "tensors": size.tensors(), "max_shard_bytes": max_shard_bytes}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "hf"
    child.make(folder, plan(sizes.TINY, 100_000), block_values=5000)
    return folder


def run(seconds, peak=0, anonymous=0, failure=None):
    return process.Run(seconds, peak, anonymous, 0, written_bytes=7, failure=failure)


def test_8b_has_the_size_of_llama_3_1_8b():
    assert sizes.SIZES["8b"].num_bytes == 2 * 8_030_261_248


def test_the_limit_is_twice_the_largest_tensor_and_the_allowance():
    assert sizes.SIZES["8b"].limit_bytes == 2 * (128256 * 4096 * 2) + 500_000_000


def test_a_made_folder_has_the_planned_tensors_in_bfloat16(made):
    weights = read_weights(made)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == dict(sizes.TINY.tensors())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_made_folder_s_values_are_finite_and_tensors_of_one_shape_differ(made):
    weights = read_weights(made)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert 0.015 < weights["lm_head.weight"].float().std() < 0.025
    gates = [weights[f"model.layers.{layer}.mlp.gate_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*gates)


def test_a_made_folder_s_shards_keep_to_their_size_and_the_index_names_them(made):
    files = sorted(made.glob("*.safetensors"))
    assert len(files) > 1
    assert all(file.stat().st_size <= 100_000 + 8192 for file in files)  # 8192 for the header
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sizes.TINY.num_bytes


def test_a_made_folder_loads_in_transformers(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(made, dtype="auto", output_loading_info=True)
    model, about = loaded
    assert not about["missing_keys"] and not about["unexpected_keys"]
    tokens = AutoTokenizer.from_pretrained(made)("1+2=3", return_tensors="pt")
    assert model(input_ids=tokens["input_ids"]).logits.isfinite().all()


def test_a_tensor_over_the_shard_size_gets_a_shard_of_its_own():
    found = child.shards([("a", (10,)), ("b", (100,)), ("c", (10,)), ("d", (10,))], max_bytes=60)
    assert [[name for name, _ in shard] for shard in found] == [["a"], ["b"], ["c", "d"]]


def test_pieces_go_round_the_block():
    block = bytearray(b"abcde")
    assert b"".join(child.pieces(block, 8, 9)) == b"deabcdeab"


def test_a_process_s_peak_and_anonymous_memory_are_its_own():
    size = 150_000_000
    script = f"import time; held = b'x' * {size}; time.sleep(0.2)"
    grown, _ = process.run_process([sys.executable, "-c", script])
    assert grown.failure is None
    assert size < grown.peak_bytes < 2 * size
    assert size < grown.anonymous_bytes < 2 * size


def test_a_small_process_does_not_inherit_this_one_s_peak():
    # This process has imported torch, and a fork counts that.
    slept, _ = process.run_process([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert 1_000_000 < slept.peak_bytes < 60_000_000


def test_a_process_s_time_includes_its_start_and_what_it_wrote_is_counted(tmp_path):
    out = tmp_path / "out"
    argv = ["sh", "-c", 'mkdir "$0" && sleep 0.2 && printf abc > "$0/a"', str(out)]
    found, _ = process.run_process(argv, out=out)
    assert found.seconds >= 0.2
    assert found.written_bytes == 3


def test_a_failed_process_is_told_by_its_last_line():
    found, printed = process.run_process(["sh", "-c", "echo so; echo 'no, thus' >&2; exit 3"])
    assert found.failure == "exit code 3: no, thus"
    assert printed == "so\nno, thus\n"


def test_a_process_that_the_kernel_kills_is_told_apart_from_one_over_the_time_limit():
    killed, _ = process.run_process(
        [sys.executable, "-c", f"import os; os.kill(os.getpid(), {signal.SIGKILL})"]
    )
    assert killed.failure == "killed, as the kernel does when memory runs out"
    late, _ = process.run_process(["sleep", "60"], timeout_s=0.3)
    assert late.failure == "stopped at the time limit"
    assert late.seconds < 30


def test_an_interrupt_leaves_no_process_behind(monkeypatch):
    started = []

    def interrupted(pid, options):
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run_process(["sleep", "60"])
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_memory_is_read_in_bytes():
    status = "Name:\tx\nVmHWM:\t    1024 kB\nRssAnon:\t 3 kB\nRssFile:\t 0 kB\nVmRSS:\t 9 kB\n"
    assert process.memory(status) == {"VmHWM": 1 << 20, "RssAnon": 3072, "RssFile": 0}


def test_imported_modules_are_those_of_importtime_each_once():
    found, printed = process.run_process([sys.executable, "-X", "importtime", "-c", "import json.tool"])
    modules = process.imported_modules(printed)
    assert found.failure is None
    assert {"json.decoder", "json.tool"} <= set(modules)
    assert len(modules) == len(set(modules))


def test_the_space_for_three_folders_must_be_free():
    size = sizes.SIZES["small"]
    needed = 3 * size.num_bytes + 2_000_000_000
    assert convert.missing_space(size, needed) == 0
    assert convert.missing_space(size, needed - 5) == 5


def test_rows_have_medians_ratios_to_the_copy_and_memory_above_the_bare_process():
    runs = {
        convert.COPY: [run(2.0), run(1.0), run(9.0)],
        "ours": [run(5.0, 900, 70), run(4.0, 800, 60), run(3.0, 700, 50)],
    }
    bare = {convert.COPY: run(0.0), "ours": run(1.0, 300, 20)}
    copy, ours = convert.summarise("small", "cold", runs, bare)
    assert (copy.seconds, copy.ratio_to_copy, copy.ratio_without_start) == (2.0, 1.0, 1.0)
    assert (ours.seconds, ours.ratio_to_copy) == (4.0, 0.5)
    assert math.isclose(ours.ratio_without_start, 2 / 3)
    assert (ours.peak_above_bare_bytes, ours.anonymous_above_bare_bytes) == (600, 50)
    assert math.isclose(ours.bytes_per_second, sizes.SIZES["small"].num_bytes / 4)
    last = convert.table([copy, ours]).splitlines()[-1]
    assert last.startswith("| small | cold | ours | 3 | 4.00 (3.00 to 5.00) | ")
    assert " | 0.50 | 0.67 | " in last


def contestant(name, script, **traits):
    """Runs a Python script that finds the folders in HF and OUT."""
    text = "import os, sys; HF, OUT = sys.argv[1:]; "
    return convert.Contestant(
        name, lambda at: [sys.executable, "-c", text + script, str(at.hf), str(at.out)], **traits
    )


@pytest.fixture
def quick_sizes(monkeypatch):
    """The small size replaced by the tiny one, measured cold and warm."""
    quick = dataclasses.replace(sizes.TINY, caches=("cold", "warm"), rival_repeats=1)
    monkeypatch.setitem(convert.SIZES, "small", quick)


def test_contestants_are_measured_in_turns_and_those_that_fail_are_out_with_a_note(tmp_path, quick_sizes):
    copies = "import shutil; shutil.copytree(HF, OUT)"
    field = [
        convert.contestants(None)[0],
        contestant("rival", copies, is_rival=True),
        contestant("broken", "raise SystemExit('cannot')"),
        contestant("lazy", "os.mkdir(OUT)"),
    ]
    benchmark = convert.Benchmark(tmp_path, field, repeats=2, timeout_s=60.0)
    rows = benchmark.at("small")
    counts = {(row.cache, row.contestant): len(row.runs) for row in rows}
    assert counts == {
        **{("cold", "cp -r"): 2, ("cold", "rival"): 1},
        **{("warm", "cp -r"): 2, ("warm", "rival"): 1},
    }
    assert benchmark.notes == [
        "broken did not convert a tiny model: exit code 1: cannot",
        "lazy did not convert small (cold): it wrote 0 bytes, too few",
    ]
    assert list(tmp_path.iterdir()) == []


def test_everything_made_is_removed_after_an_error(tmp_path, monkeypatch):
    def failing(*arguments):
        (root,) = tmp_path.iterdir()
        (root / "large").write_text("left")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "Benchmark", failing)
    monkeypatch.setattr(sys, "argv", ["convert.py", "--work", str(tmp_path), "--sizes", "small"])
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt):
        convert.main()
    signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_size_or_too_little_space_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert.py", "--work", str(tmp_path), "--sizes", "small,70b"])
    with pytest.raises(SystemExit):
        convert.parse()
    assert "--sizes names 70b; choose from small, 8b" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["convert.py", "--work", str(tmp_path), "--sizes", "8b"])
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000_000_000))
    with pytest.raises(SystemExit):
        convert.parse()
    assert "has 40.2 GB too little free for 8b" in capsys.readouterr().err
