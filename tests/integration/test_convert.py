"""The conversion commands as a user runs them: exit codes, messages, and what an untimely end leaves."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import read_weights, save_llama, save_qwen3_moe
from tests.integration.conftest import start
from tests.unit.convert.folders import CONFIG, sizes_of, tensors, write_folder, write_shards

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LARGE = {
    **CONFIG,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 8000,
}  # 300 MB in bfloat16
MEBIBYTE = 2**20


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The only line that a refused command prints."""
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("megatron-scope: "), result.stderr
    return lines[0].removeprefix("megatron-scope: ")


def same_bits(found: Path, expected: Path) -> bool:
    ours, theirs = read_weights(found), read_weights(expected)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


# ---- the way there, back, and the proof


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_model_goes_there_and_back_and_a_certificate_proves_it(
    run: Run, tmp_path: Path, family: str
) -> None:
    save = {"llama": save_llama, "qwen3-moe": save_qwen3_moe}[family]
    hf, mega, back = save(tmp_path / "hf", seed=3), tmp_path / "mega", tmp_path / "back"
    done = run("convert", "to-megatron", "--hf", str(hf), "--out", str(mega), "--tp", "2", "--pp", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"[\d.]+ MB in \d+\.\d s: {mega}\n", done.stdout)
    done = run("convert", "to-hf", "--megatron", str(mega), "--out", str(back))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"[\d.]+ MB in \d+\.\d s: {back}\n", done.stdout)
    assert same_bits(back, hf)
    certificate = tmp_path / "certificate.json"
    words = ("--hf", str(back), "--megatron", str(mega), "--output", str(certificate))
    layout = ("--tp", "2", "--pp", "2") if family == "llama" else ("--ep", "2")
    checked = run("convert", "check", *words, *layout)
    assert checked.returncode == 0, checked.stderr
    tensor_line, logit_line = checked.stdout.splitlines()
    count = len(read_weights(hf))
    assert tensor_line == f"{count} of {count} tensors are equal bit for bit"
    size = "TP 2 x PP 2 x EP 1" if family == "llama" else "TP 1 x PP 1 x EP 2"
    assert re.fullmatch(rf"logits differ by up to \S+ \(limit \S+\) at {size}", logit_line)
    found = json.loads(certificate.read_text())
    assert found["equal"] and found["logits"]["within_limit"]
    assert found["tensors"]["compared"] == found["tensors"]["equal"] == len(found["tensors"]["each"]) == count
    assert found["tensors"]["largest_difference"] == 0.0
    assert 0.0 <= found["logits"]["largest_difference"] <= found["logits"]["limit"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(back)
    assert AutoTokenizer.from_pretrained(back)("1").input_ids == [1]


def test_a_difference_is_named_and_the_command_fails(run: Run, tmp_path: Path) -> None:
    hf, mega, certificate = save_llama(tmp_path / "hf"), tmp_path / "mega", tmp_path / "certificate.json"
    assert run("convert", "to-megatron", "--hf", str(hf), "--out", str(mega)).returncode == 0
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][2, 3] += 0.5
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    words = ("--hf", str(hf), "--megatron", str(mega), "--output", str(certificate))
    checked = run("convert", "check", *words)
    assert checked.returncode == 1
    tensor_line, logit_line = checked.stdout.splitlines()
    count = len(weights)
    assert tensor_line == (
        f"{count - 1} of {count} tensors are equal bit for bit; {name} differs by up to 0.5"
    )
    assert logit_line.startswith("logits differ by up to ")
    found = json.loads(certificate.read_text())
    assert not found["equal"] and not found["logits"]["within_limit"]
    assert [each["name"] for each in found["tensors"]["each"] if not each["equal"]] == [name]
    again = run("convert", "check", *words, "--logits", "never")
    assert (again.returncode, again.stderr) == (1, "")
    assert again.stdout.splitlines() == [tensor_line, "logits not compared: not asked for"]


# ---- what is refused


def truncate_a_shard(hf: Path) -> str:
    path = hf / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} cannot be read as safetensors"


def leave_out_an_entry(hf: Path) -> str:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    return "has no tensor lm_head.weight"


def change(hf: Path, name: str, value: torch.Tensor) -> None:
    write_shards(hf, {**tensors(), name: value})


def change_a_size(hf: Path) -> str:
    change(hf, "model.layers.0.mlp.up_proj.weight", torch.ones(20, 13))
    return "model.layers.0.mlp.up_proj.weight has size (20, 13)"


def put_a_nan(hf: Path) -> str:
    change(hf, "model.layers.2.mlp.up_proj.weight", torch.full((20, 12), torch.nan))
    return "model.layers.2.mlp.up_proj.weight holds NaN"


def name_another_family(hf: Path) -> str:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    return "has no tensor model.layers.0.self_attn.k_proj.bias, which Qwen2ForCausalLM needs"


def name_an_unknown_family(hf: Path) -> str:
    (hf / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["GemmaForCausalLM"]}))
    return "architectures is ['GemmaForCausalLM']; supported: LlamaForCausalLM,"


@pytest.mark.parametrize(
    "damage",
    [
        truncate_a_shard,
        leave_out_an_entry,
        change_a_size,
        put_a_nan,
        name_another_family,
        name_an_unknown_family,
    ],
)
def test_a_damaged_folder_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    hf, out = write_folder(tmp_path / "hf"), tmp_path / "out"
    write_shards(hf, tensors())
    said = damage(hf)
    assert said in one_line(run("convert", "to-megatron", "--hf", str(hf), "--out", str(out)), 2)
    assert list(tmp_path.iterdir()) == [hf]


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    hf, mega, out = write_folder(tmp_path / "hf"), tmp_path / "mega", tmp_path / "out"
    assert run("convert", "to-megatron", "--hf", str(hf), "--out", str(mega)).returncode == 0
    path = mega / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    said = one_line(run("convert", "to-hf", "--megatron", str(mega), "--out", str(out)), 2)
    assert said.startswith(f"{path} should have ")
    assert said == one_line(run("convert", "check", "--hf", str(hf), "--megatron", str(mega)), 2)
    assert sorted(tmp_path.iterdir()) == [hf, mega]


def test_what_exists_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    hf = write_folder(tmp_path / "hf")
    said = one_line(run("convert", "to-megatron", "--hf", str(hf), "--out", str(hf)), 2)
    assert said == f"{hf} exists already; remove it or name another folder"


# ---- an untimely end


@pytest.fixture(scope="session")
def sources(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of 300 MB and its checkpoint, by the command that reads each."""
    root = tmp_path_factory.mktemp("large")
    weights = {name: torch.ones(size, dtype=torch.bfloat16) for name, size in sizes_of(LARGE).items()}
    hf, mega = write_folder(root / "hf", LARGE, weights), root / "mega"
    done = run("convert", "to-megatron", "--hf", str(hf), "--out", str(mega))
    assert done.returncode == 0, done.stderr
    return {"to-megatron": hf, "to-hf": mega}


KINDS = ("to-megatron", "to-hf")


def words_of(kind: str, sources: dict[str, Path], out: Path) -> tuple[str, ...]:
    option = "--hf" if kind == "to-megatron" else "--megatron"
    return ("convert", kind, option, str(sources[kind]), "--out", str(out))


def partial_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def stopped_in_the_middle(words: tuple[str, ...], out: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion that stands still after some of its bytes; killed at the end if it is still there."""
    process, give_up = start(*words), time.monotonic() + 300
    try:
        while sum(path.stat().st_size for path in partial_of(out).glob("*_0.distcp")) < MEBIBYTE and not any(
            path.stat().st_size > MEBIBYTE for path in partial_of(out).glob("*.safetensors")
        ):
            assert process.poll() is None and time.monotonic() < give_up, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        assert not out.exists() and partial_of(out).is_dir()
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """A stopped process goes on to its end."""
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_in_the_middle_leaves_nothing(
    sources: dict[str, Path], tmp_path: Path, kind: str, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    with stopped_in_the_middle(words_of(kind, sources, out), out) as process:
        process.send_signal(number)
        result = ended(process)
    assert (result.returncode, result.stdout) == (130, ""), result.stderr
    assert "Traceback" not in result.stderr and "error" not in result.stderr.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_kill_there_is_no_folder_and_the_next_run_makes_it(
    run: Run, sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    words = words_of(kind, sources, out)
    with stopped_in_the_middle(words, out) as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [partial_of(out)]
    (partial_of(out) / "mark").write_text("of the killed run")
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert list(tmp_path.iterdir()) == [out] and not (out / "mark").exists()
    if kind == "to-hf":
        assert same_bits(out, sources["to-megatron"])
    else:
        words = ("--hf", str(sources["to-megatron"]), "--megatron", str(out), "--logits", "never")
        checked = run("convert", "check", *words)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_is_refused_before_anything_is_written(
    run: Run, sources: dict[str, Path], small_disk: Callable[[int], Path], kind: str
) -> None:
    disk = small_disk(16)
    said = one_line(run(*words_of(kind, sources, disk / "out")), 2)
    assert said.startswith(f"{disk / 'out'} needs 0.30 GB but {disk} has 0.02 GB free; make room or name")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_in_the_middle_is_one_line_and_leaves_nothing(
    sources: dict[str, Path], small_disk: Callable[[int], Path], kind: str
) -> None:
    disk = small_disk(400)
    out, other = disk / "out", disk / "other"
    with stopped_in_the_middle(words_of(kind, sources, out), out) as process:
        with open(other, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MEBIBYTE))
        result = ended(process)
    said = one_line(result, 1)
    assert re.fullmatch(rf"\[Errno 28\] No space left on device: '{partial_of(out)}/\S+'", said)
    assert list(disk.iterdir()) == [other]


def test_nothing_else_is_left_in_the_temporary_folder(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    hf, mega = save_llama(tmp_path / "hf"), tmp_path / "mega"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert run("convert", "to-megatron", "--hf", str(hf), "--out", str(mega)).returncode == 0
    assert run("convert", "check", "--hf", str(hf), "--megatron", str(mega)).returncode == 0
    assert list((tmp_path / "temporary").iterdir()) == []
