"""The script that makes SGLang's environment: once, whole or not at all. Nothing is installed here."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("install_sglang_cpu", TOOLS / "install_sglang_cpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(tool, monkeypatch):
    """The commands that would have been run; a venv gets its folder and its python."""
    ran = []

    def run(command, doing):
        ran.append(doing)
        if "venv" in command:
            folder = Path(command[-1])
            (folder / "bin").mkdir()
            (folder / "bin" / "python").touch()
        return f"{Path(command[0]).parents[1]}/site\n"

    monkeypatch.setattr(tool, "_run", run)
    monkeypatch.setattr(tool, "supported", lambda: True)
    return ran


def test_the_second_call_finds_what_the_first_made(tool, commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tool.main([]) == 0
    num_commands = len(commands)
    assert tool.main([]) == 0
    assert len(commands) == num_commands > 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == f"{tool.default_folder()}/bin/python"
    assert tool.default_folder().parent == tmp_path / "megatron_scope"


def test_callers_at_the_same_time_make_it_once(tool, commands, tmp_path):
    with ThreadPoolExecutor(4) as threads:
        pythons = set(threads.map(tool.install, [tmp_path / "env"] * 4))
    assert pythons == {tmp_path / "env" / "bin" / "python"}
    assert commands.count("making the environment") == 1


def test_an_environment_that_was_not_finished_is_made_anew(tool, commands, tmp_path):
    folder = tmp_path / "env"
    (folder / "lib").mkdir(parents=True)
    (folder / tool.STARTED).touch()
    (folder / "lib" / "half").touch()
    tool.install(folder)
    assert not (folder / "lib").exists() and (folder / tool.DONE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "env.lock"]


@pytest.mark.parametrize("step", ["installing torch", "installing sglang", "importing what was installed"])
def test_what_failed_is_told_with_its_output_and_is_not_used(
    tool, commands, tmp_path, monkeypatch, capsys, step
):
    whole = tool._run

    def fail(command, doing):
        if doing == step:
            raise tool.InstallError(f"{doing} failed with exit code 1: pip install\nERROR: no such version")
        return whole(command, doing)

    monkeypatch.setattr(tool, "_run", fail)
    assert tool.main(["--dir", str(tmp_path / "env")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"install_sglang_cpu: {step} failed" in err and "no such version" in err
    assert not (tmp_path / "env" / tool.DONE).exists()
    monkeypatch.setattr(tool, "_run", whole)
    assert tool.main(["--dir", str(tmp_path / "env")]) == 0


def test_a_failed_command_gives_the_end_of_its_output(tool):
    with pytest.raises(tool.InstallError) as caught:
        tool._run([sys.executable, "-c", "print(*range(100), sep='\\n'); raise SystemExit(3)"], "counting")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("counting failed with exit code 3: ")
    assert rest == [str(number) for number in range(100 - tool.ERROR_LINES, 100)]


def test_commands_do_not_see_the_callers_packages(tool, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    seen = tool._run([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], "looking")
    assert seen == "None\n"


def test_a_folder_with_something_else_is_left_alone(tool, commands, tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert tool.main(["--dir", str(tmp_path)]) == 1
    assert f"{tmp_path} holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists() and commands == []


def test_another_platform_is_refused(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert tool.main(["--dir", str(tmp_path / "env")]) == 1
    assert "riscv64" in capsys.readouterr().err and not (tmp_path / "env").exists()


def test_the_name_changes_with_what_is_installed(tool, monkeypatch):
    before = tool.fingerprint()
    assert tool.fingerprint() == before
    monkeypatch.setattr(tool, "TORCH", "torch==1.0")
    assert tool.fingerprint() != before


def test_every_requirement_is_one_version(tool):
    lines = tool.REQUIREMENTS.read_text().splitlines()
    assert f"sglang=={tool.SGLANG}" in lines
    assert all(line.startswith("#") or line.count("==") == 1 for line in lines)


# ---- the stand-ins


def python(code):
    """What a python that finds the stand-ins prints."""
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(TOOLS / "sglang_cpu")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_stand_ins_can_be_imported_in_every_way():
    assert (
        python(
            "import torchvision.transforms.v2.functional as F\n"
            "from torchvision.transforms import InterpolationMode, functional\n"
            "from sgl_kernel import silu_and_mul\n"
            "class Mine(InterpolationMode): pass\n"
            "table = {InterpolationMode.BICUBIC: 1}\n"
            "print(table[InterpolationMode.BICUBIC], isinstance(1, InterpolationMode), Mine.__name__)"
        )
        == "1 False Mine"
    )


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("import torchvision; torchvision.transforms.Resize(3)", "torchvision.transforms.Resize"),
        ("import torchvision.ops.boxes as b; b.nms(1)", "torchvision.ops.boxes.nms"),
        ("import sgl_kernel; sgl_kernel.silu_and_mul(1)", "sgl_kernel.silu_and_mul"),
    ],
)
def test_a_stand_in_that_is_used_says_so(use, name):
    said = f"NotImplementedError: {name} is a stand-in for imports alone: it computes nothing"
    assert python(use) == said


def test_a_submodule_of_sgl_kernel_is_not_there():
    """SGLang tries some, and goes another way."""
    assert "No module named 'sgl_kernel.flash_attn'" in python("import sgl_kernel.flash_attn")
