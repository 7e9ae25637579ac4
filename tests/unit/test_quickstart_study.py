"""The quickstart's study: what it runs, in which order, and what it leaves alone when it is started again."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path

import pytest

from megatron_scope.config import load_config
from megatron_scope.config.check import check_config
from tests.helpers.quickstart import QUICKSTART, Commands, load

study = load("study")


@pytest.fixture
def commands(monkeypatch):
    stand_in = Commands()
    monkeypatch.setattr(study.subprocess, "run", stand_in.run)
    return stand_in


@pytest.fixture
def compared(monkeypatch):
    """What was handed to the comparison."""
    calls = []
    monkeypatch.setattr(study, "compare", lambda *arguments: calls.append(arguments))
    return calls


@pytest.fixture
def start(tmp_path, commands, compared):
    def run(*words):
        commands.ran.clear()
        paths = ("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"))
        return study.main([*paths, "--jobs", "1", *words])

    return run


# ---- what is run


def test_it_studies_every_method_with_three_seeds_unless_told_otherwise():
    settings, results, name = study.parse([])
    assert settings.seeds == (1234, 1235, 1236)
    assert settings.methods == tuple(study.METHODS)
    assert (settings.num_samples, settings.steps) == (32, None)
    assert results / name == QUICKSTART / "results" / "study"


def test_the_student_before_training_is_always_part_of_it():
    settings, _, _ = study.parse(["--methods", "opd,scope,opd"])
    assert settings.methods == ("base", "opd", "scope")


def test_a_seed_named_twice_is_run_once():
    settings, _, _ = study.parse(["--seeds", "6,5,6"])
    assert settings.seeds == (6, 5)


def test_the_quickstart_compares_three_methods_with_one_seed():
    script = (QUICKSTART / "run.sh").read_text().replace("\\\n", " ")
    (line,) = [line for line in script.splitlines() if "study.py -" in line]
    settings, results, name = study.parse(shlex.split(line.split("study.py", 1)[1]))
    assert (settings.seeds, settings.methods) == ((1234,), ("base", "opd", "grpo", "scope"))
    assert (settings.num_samples, settings.steps) == (32, None)
    assert (settings.runs, results / name) == (Path("runs/quickstart"), Path("runs/quickstart/comparison"))


def test_each_method_is_trained_once_and_sampled_at_every_temperature(start, commands, compared, tmp_path):
    assert start("--seeds", "5,6", "--methods", "opd,scope", "--name", "both") == 0
    assert commands.trained() == [*["teacher", "student"] * 2, *["opd", "scope"] * 2]
    one_seed = [f"{method}-t{t}" for method in ("base", "opd", "scope") for t in ("1.0", "0.6")]
    assert commands.evaluated() == one_seed * 2
    runs, seeds, methods, results, name = compared[0]
    assert (runs, seeds, methods) == (tmp_path / "runs", (5, 6), ("base", "opd", "scope"))
    assert (results, name) == (tmp_path / "results", "both")


def test_every_command_gets_the_seed_of_its_folder(start, commands):
    start("--seeds", "5,6", "--methods", "grpo")
    for words in commands.ran:
        (folder,) = {part for word in words for part in Path(word.split("=")[-1]).parts if part[:4] == "seed"}
        if words[0] == "megatron-scope":
            assert commands.setting(words, "run.seed") == folder.removeprefix("seed")
        elif words[0] == sys.executable:
            assert commands.option(words, "--seed") == folder.removeprefix("seed")


def test_all_methods_of_a_seed_start_from_one_student_and_differ_in_the_objective_alone(start, commands):
    start("--seeds", "5")
    configs = {}
    for words in commands.ran:
        if words[1] == "train" and words[2] == str(QUICKSTART / "scope.yaml"):
            config = load_config(words[2], words[3:])
            check_config(config, world_size=1)
            configs[Path(config.run.output_dir).name] = config
    assert list(configs) == [method for method in study.METHODS if method != "base"]
    scope = configs["scope"]
    assert scope.student.hf.endswith("seed5/student/hf")
    assert scope.teacher.hf.endswith("seed5/teacher/hf")
    for config in configs.values():
        run = dataclasses.replace(config.run, output_dir=scope.run.output_dir)
        assert dataclasses.replace(config, run=run, objective=scope.objective) == scope
    objectives = {name: config.objective for name, config in configs.items()}
    assert {name for name, objective in objectives.items() if objective.name == "scope"} == {
        *("scope", "reverse_kl", "student_0", "student_reversed", "teacher_0", "teacher_reversed", "both_0")
    }
    divergences = {name: objective.divergence for name, objective in objectives.items()}
    assert divergences.pop("reverse_kl") == "reverse_kl"
    assert set(divergences.values()) == {"sampled"}
    exponents = {name: (o.student_exponent, o.teacher_exponent) for name, o in objectives.items()}
    assert exponents["scope"] == exponents["reverse_kl"] == (1, -1)
    assert (exponents["student_0"], exponents["student_reversed"]) == ((0, -1), (-1, -1))
    assert (exponents["teacher_0"], exponents["teacher_reversed"]) == ((1, 0), (1, 1))
    assert exponents["both_0"] == (0, 0)
    assert (objectives["opd"].name, objectives["grpo"].name) == ("opd", "grpo")


def test_the_gradient_of_each_path_is_measured():
    assert load_config(QUICKSTART / "scope.yaml").train.path_gradients_every > 0


def test_other_numbers_of_steps_and_samples_reach_the_methods_but_not_the_models_they_start_from(
    start, commands
):
    start("--seeds", "5", "--methods", "scope", "--steps", "2", "--samples", "8")
    for words in commands.ran:
        if words[1] == "train":
            assert ("run.steps=2" in words) == (words[2] == str(QUICKSTART / "scope.yaml"))
        if words[1] == "evaluate":
            assert commands.option(words, "--samples") == "8"


def test_commands_keep_to_one_thread_and_away_from_model_hubs(start, commands, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start("--seeds", "5", "--methods", "scope")
    for environment in commands.environments:
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["PATH"] == os.environ["PATH"]


# ---- started again


def test_what_is_done_is_not_done_again(start, commands, compared):
    start("--seeds", "5", "--methods", "opd")
    assert start("--seeds", "5", "--methods", "opd") == 0
    assert commands.ran == []
    assert len(compared) == 2


def test_another_method_is_added_to_what_is_done(start, commands):
    start("--seeds", "5", "--methods", "opd")
    start("--seeds", "5", "--methods", "opd,scope")
    assert commands.trained() == ["scope"]
    assert commands.evaluated() == ["scope-t1.0", "scope-t0.6"]


def test_an_evaluation_without_its_responses_is_done_again(start, commands, tmp_path):
    start("--seeds", "5", "--methods", "opd")
    (tmp_path / "runs/seed5/eval/opd-t0.6.responses.jsonl").unlink()
    start("--seeds", "5", "--methods", "opd")
    assert (commands.trained(), commands.evaluated()) == ([], ["opd-t0.6"])


def test_evaluations_with_another_number_of_samples_are_done_again(start, commands):
    start("--seeds", "5", "--methods", "opd", "--samples", "8")
    start("--seeds", "5", "--methods", "opd", "--samples", "16")
    assert commands.trained() == []
    assert commands.evaluated() == ["base-t1.0", "base-t0.6", "opd-t1.0", "opd-t0.6"]


def test_a_model_trained_anew_is_evaluated_anew(start, commands, tmp_path):
    start("--seeds", "5", "--methods", "opd")
    model = tmp_path / "runs/seed5/opd/hf/config.json"
    written = (tmp_path / "runs/seed5/eval/opd-t0.6.json").stat().st_mtime
    os.utime(model, (written + 5, written + 5))
    start("--seeds", "5", "--methods", "opd")
    assert commands.evaluated() == ["opd-t1.0", "opd-t0.6"]


def test_data_that_was_half_written_is_made_again(start, commands, tmp_path):
    partial = tmp_path / "runs/seed5/data.partial"
    commands.fails = lambda words: words[1].endswith("task.py")
    assert start("--seeds", "5", "--methods", "opd") == 1
    assert not partial.with_name("data").exists()
    commands.fails = lambda words: False
    assert start("--seeds", "5", "--methods", "opd") == 0
    assert partial.with_name("data").is_dir()


# ---- what goes wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", "1,x"), "--seeds is '1,x'; expected numbers with commas, as in 1,2,3"),
        (("--samples", "4"), "--samples is 4; expected 8 or more"),
        (("--jobs", "0"), "--jobs is 0; expected 1 or more"),
        (("--steps", "0"), "--steps is 0; expected 1 or more"),
    ],
)
def test_options_that_cannot_be_are_one_line(start, commands, capsys, words, message):
    assert start(*words) == 1
    assert capsys.readouterr().err == f"study: {message}\n"
    assert commands.ran == []


def test_an_unknown_method_is_answered_with_the_known_ones(start, capsys):
    assert start("--methods", "scope,ppo") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"study: --methods has 'ppo'; known: {', '.join(study.METHODS)}"


def test_a_command_that_fails_ends_the_study_with_its_last_line_and_log(
    start, commands, compared, capsys, tmp_path
):
    commands.fails = lambda words: "objective.name=opd" in words
    assert start("--seeds", "5", "--methods", "opd") == 1
    log = tmp_path / "runs/seed5/logs/opd.0.log"
    said = "megatron-scope train ended with code 3"
    assert capsys.readouterr().err == f"study: {said}; {log} ends: megatron-scope: no space left\n"
    assert log.read_text().startswith("$ megatron-scope train ")
    assert compared == []
