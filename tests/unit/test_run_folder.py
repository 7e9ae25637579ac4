"""The run folder: going on drops what the checkpoint does not know of, starting over loses nothing."""

import json

import pytest

from megatron_scope.errors import ConfigError
from megatron_scope.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """A folder with three steps of metrics and rollouts."""
    folder = RunFolder(str(tmp_path / "run"))
    folder.begin(0)
    folder.rollouts.mkdir()
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": step / 3})
        (folder.rollouts / f"step_{step:06d}.jsonl").write_text(f"rollouts of {step}")
    return folder


def steps(folder):
    return [row["step"] for row in folder.read_metrics()]


def rollout_files(folder):
    return sorted(file.name for file in folder.rollouts.iterdir())


def everything(path):
    """Every file below a folder with its content."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_new_run_starts_with_its_folder_and_no_metrics(tmp_path):
    folder = RunFolder(str(tmp_path / "a" / "b"))
    assert folder.read_metrics() == []
    folder.begin(0)
    assert folder.path.is_dir() and folder.read_metrics() == []


def test_appended_rows_are_read_back_exactly(run):
    assert run.read_metrics() == [{"step": step, "loss": step / 3} for step in (1, 2, 3)]
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == run.read_metrics()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
def test_going_on_after_a_step_drops_later_rows_and_rollouts_only(run, step):
    before = {name: (run.rollouts / name).read_bytes() for name in rollout_files(run)}
    run.begin(step)
    kept = [s for s in (1, 2, 3) if s <= step]
    assert steps(run) == kept
    assert rollout_files(run) == [f"step_{s:06d}.jsonl" for s in kept]
    assert all((run.rollouts / name).read_bytes() == before[name] for name in rollout_files(run))


def test_a_step_number_beyond_six_digits_is_compared_as_a_number(run):
    (run.rollouts / "step_1000000.jsonl").write_text("late")
    run.begin(999_999)
    assert "step_1000000.jsonl" not in rollout_files(run)
    (run.rollouts / "step_1000000.jsonl").write_text("late")
    run.begin(1_000_000)
    assert "step_1000000.jsonl" in rollout_files(run)


def test_begin_leaves_everything_else_alone(run):
    for name in (
        "checkpoints/step_3/x",
        "hf/model.safetensors",
        "weights/v3/w",
        "logs/l.log",
        "rollouts/notes.txt",
    ):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(name)
    others = {name: data for name, data in everything(run.path).items() if "jsonl" not in name}
    run.begin(1)
    assert {name: data for name, data in everything(run.path).items() if "jsonl" not in name} == others


def test_beginning_twice_is_beginning_once(run):
    run.begin(2)
    first = everything(run.path)
    run.begin(2)
    assert everything(run.path) == first


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4', "{", "\0\0\0\0"])
def test_a_line_that_a_crash_cut_short_is_left_out_and_not_appended_to(run, torn):
    with run.metrics.open("a") as file:
        file.write(torn)
    assert steps(run) == [1, 2, 3]
    run.begin(3)
    run.append_metrics({"step": 4})
    assert steps(run) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())


def test_a_last_line_that_lacks_only_its_newline_is_kept(run):
    run.metrics.write_text(run.metrics.read_text().rstrip("\n"))
    run.begin(3)
    run.append_metrics({"step": 4})
    assert steps(run) == [1, 2, 3, 4]


def test_no_partial_file_is_left(run):
    run.begin(1)
    assert sorted(file.name for file in run.path.iterdir()) == ["metrics.jsonl", "rollouts"]


# ---- starting over


def test_an_earlier_run_is_set_aside_whole(run):
    for name in ("checkpoints/step_3/x", "hf/model.safetensors", "config.resolved.yaml"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(name)
    before = everything(run.path)
    run.set_aside()
    assert everything(run.path / "previous" / "1") == before
    assert [file.name for file in run.path.iterdir()] == ["previous"]


def test_every_run_that_is_set_aside_has_its_own_number(run):
    first = everything(run.path)
    run.set_aside()
    run.begin(0)
    run.append_metrics({"step": 1, "loss": 9.0})
    second = run.metrics.read_bytes()
    run.set_aside()
    assert everything(run.path / "previous" / "1") == first
    assert (run.path / "previous" / "2" / "metrics.jsonl").read_bytes() == second
    run.begin(0)
    assert steps(run) == []
    run.set_aside()
    assert sorted(file.name for file in (run.path / "previous").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("exists", [True, False])
def test_without_an_earlier_run_nothing_is_set_aside(tmp_path, exists):
    folder = RunFolder(str(tmp_path / "run"))
    if exists:
        (folder.path / "logs").mkdir(parents=True)
    folder.set_aside()
    assert not (folder.path / "previous").exists() and folder.path.exists() == exists


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").metrics == tmp_path / "run" / "metrics.jsonl"


def test_published_versions_sort_by_name(tmp_path):
    folder = RunFolder(str(tmp_path))
    names = [folder.weights_of(version).name for version in (0, 9, 10, 12345678)]
    assert names == sorted(names) and len(set(names)) == 4


def test_a_second_trainer_is_kept_out(tmp_path):
    with RunFolder(str(tmp_path / "run")).locked():
        second = RunFolder(str(tmp_path / "run")).locked()
        with pytest.raises(ConfigError, match="another trainer is writing to"):
            second.__enter__()
    with RunFolder(str(tmp_path / "run")).locked():
        pass
