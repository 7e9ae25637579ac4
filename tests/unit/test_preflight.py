"""What is known before any rank starts: warnings about settings that run but probably not as meant."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_scope.config import parse_config
from megatron_scope.config.schema import ModelConfig
from megatron_scope.errors import ConfigError
from megatron_scope.preflight import check_files, max_positions, vocabulary, warnings_of
from tests.helpers.models import CHARACTERS, save_qwen2
from tests.helpers.rollouts import random_rows, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(folder: Path, name: str, end: str) -> str:
    """A model whose generation ends in a token."""
    path = folder / name
    if not path.exists():
        save_qwen2(path)
        ids = {"eos_token_id": [CHARACTERS.index(character) for character in end]}
        (path / "generation_config.json").write_text(json.dumps(ids))
    return str(path)


def config(folder: Path, ends: tuple[str, str], **sections):
    """A replayed run whose student and teacher end as `ends` says."""
    student, teacher = ends
    settings = {
        "run": {"output_dir": str(folder / "run")},
        "student": {"hf": model(folder, f"ends in {student}", student)},
        "rollout": {
            "engine": "replay",
            "file": str(
                write_rows(folder / "rows.jsonl", random_rows(num_prompts=1, num_samples=2, vocab_size=40))
            ),
        },
        **sections,
    }
    settings["teacher"] = {
        "hf": model(folder, f"ends in {teacher}", teacher),
        **sections.get("teacher", {}),
    }
    return parse_config(settings, "test")


def test_a_student_that_ends_otherwise_than_its_teacher_is_warned_of_once_and_clearly(folder):
    (warning,) = warnings_of(config(folder, ("e", "$")))
    assert warning == (
        "responses may end in 'e' (id 18), but the teacher's end in '$': it would teach the student not to "
        "stop. Set teacher.stop_token_id=12, and watch stop_log_ratio in metrics.jsonl"
    )


@pytest.mark.parametrize(
    ("student", "teacher", "sections"),
    [
        ("$", "$", {}),
        ("$", "e$", {}),
        ("e", "$", {"teacher": {"stop_token_id": 12}}),
        ("e", "$", {"data": {"stop_token_ids": [12]}}),
        ("e", "$", {"objective": {"name": "grpo"}}),
    ],
)
def test_no_warning_where_both_end_alike_or_the_setting_is_made(folder, student, teacher, sections):
    assert warnings_of(config(folder, (student, teacher), **sections)) == []


def test_a_second_stop_token_that_the_teacher_does_not_know_is_warned_of(folder):
    (warning,) = warnings_of(config(folder, ("$e", "$")))
    assert "'e' (id 18)" in warning


def test_a_teachers_stop_token_outside_the_shared_vocabulary_is_refused(folder):
    with pytest.raises(ConfigError, match=r"teacher.stop_token_id is 40, but .* share only 40 ids"):
        check_files(config(folder, ("$", "$"), teacher={"stop_token_id": 40}))


# ---- a served teacher


def served(folder: Path, **teacher):
    """A student of 43 rows whose teacher is behind a server."""
    student = folder / "longer table"
    if not student.exists():
        save_qwen2(student, rows=43)
    replaced = config(folder, ("$", "$"), teacher={"hf": None, "server": ["http://t:1"], **teacher})
    return dataclasses.replace(replaced, student=ModelConfig(hf=str(student)))


def card(folder: Path, name: str, **changes) -> str:
    """A folder with the teacher's config.json and tokenizer, and no weights."""
    path = folder / name
    if not path.exists():
        save_qwen2(path)
        (path / "model.safetensors").unlink()
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(path)


def test_a_served_teacher_needs_no_files_here(folder):
    given = served(folder)
    check_files(given)
    assert vocabulary(given).size == 43 and max_positions(given) == 256 and warnings_of(given) == []


def test_a_served_teachers_config_narrows_the_vocabulary_and_the_positions(folder):
    given = served(folder, hf=card(folder, "card", max_position_embeddings=99))
    check_files(given)
    assert vocabulary(given).size == 40 and max_positions(given) == 99
    # The student's table is built at its own size: nothing of the teacher's stands beside it.
    assert vocabulary(given).padded_rows == vocabulary(served(folder)).padded_rows


def test_a_served_teachers_family_need_not_be_known(folder):
    strange = card(folder, "strange", architectures=["StrangeForCausalLM"], model_type="strange")
    assert vocabulary(served(folder, hf=strange)).size == 40


def test_the_tokenizer_given_for_a_served_teacher_must_be_the_students(folder):
    other = Path(card(folder, "another tokenizer"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"4": 4', '"4": 5', 1).replace('"5": 5', '"5": 4', 1))
    with pytest.raises(ConfigError, match="differ in 2 tokens"):
        check_files(served(folder, hf=str(other)))


def test_a_served_teachers_stop_token_must_be_in_the_vocabulary(folder):
    with pytest.raises(
        ConfigError, match=r"teacher\.stop_token_id is 43, but student and teacher share only 43"
    ):
        check_files(served(folder, stop_token_id=43))
