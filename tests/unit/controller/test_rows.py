"""RUN/rollouts rows: written, read back for replay, and refused with file and line when they are not that."""

import dataclasses
import json
import math

import pytest

from megatron_scope.controller.rows import ResponseRecord, read_steps, rollout_file, write_step
from megatron_scope.errors import DataError
from tests.unit.controller.judged import judged

KEYS = {
    *("step", "prompt_id", "sample", "prompt_ids", "output_ids", "text", "engine_logprobs", "finish_reason"),
    *(
        "weight_version",
        "correct",
        "extracted",
        "student_mean_logprob",
        "teacher_mean_logprob",
        "path",
        "weight",
    ),
}


def lines_of(folder, step=1):
    return [
        json.loads(line) for line in rollout_file(folder, step).read_text(encoding="utf-8").split("\n")[:-1]
    ]


def without_answer(item):
    """What a row keeps of a rollout: the prompt's answer and task are not in it."""
    prompt = dataclasses.replace(item.rollout.prompt, answer="", task="")
    return dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, prompt=prompt))


STEP = [
    judged("a", 0, text="größer \u2028 \U0001f600"),
    judged("a", 1, correct=False, finish="length", error="timed out", weight_version=0),
    judged("b/2", 0, output=(), finish="abort", text=""),
]


def test_what_is_written_is_read_back_for_replay(tmp_path):
    write_step(tmp_path, 1, STEP, {0: ResponseRecord(-0.5, None, 1.0)})
    (read,) = read_steps(str(tmp_path))
    assert read == [without_answer(item) for item in STEP]


def test_a_row_holds_the_fields_of_the_contract(tmp_path):
    write_step(tmp_path, 12, STEP, {0: ResponseRecord(-0.5, None, 1.0), 1: ResponseRecord(None, -0.25, 0.75)})
    first, second, unused = lines_of(tmp_path, 12)
    assert set(first) >= KEYS and set(first) == set(second) == set(unused)
    assert [row["step"] for row in (first, second, unused)] == [12, 12, 12]
    assert (first["path"], first["weight"], first["student_mean_logprob"], first["teacher_mean_logprob"]) == (
        *("correct", 1.0, -0.5),
        None,
    )
    assert (
        second["path"],
        second["weight"],
        second["student_mean_logprob"],
        second["teacher_mean_logprob"],
    ) == (
        *("incorrect", 0.75, None),
        -0.25,
    )
    assert [unused[key] for key in ("path", "weight", "student_mean_logprob", "teacher_mean_logprob")] == [
        None
    ] * 4
    assert (second["correct"], second["extracted"], second["error"]) == (False, "42", "timed out")
    assert first["prompt_ids"] == [2, 3] and first["output_ids"] == [5, 6, 1]


def test_logprobs_that_are_not_numbers_become_null_and_read_back_as_nan(tmp_path):
    item = judged(output=(5, 6, 7, 1), engine_logprobs=(-0.5, math.nan, -math.inf, -0.125))
    write_step(tmp_path, 1, [item], {})
    assert lines_of(tmp_path)[0]["engine_logprobs"] == [-0.5, None, None, -0.125]
    (((read),),) = read_steps(str(tmp_path))
    assert [value if math.isfinite(value) else None for value in read.rollout.engine_logprobs] == [
        -0.5,
        None,
        None,
        -0.125,
    ]
    assert all(math.isnan(value) for value in read.rollout.engine_logprobs[1:3])


def test_logprobs_survive_to_the_last_bit(tmp_path):
    exact = (-0.1, -1e-17, -math.pi, -12345.678901234567, -5e-324)
    write_step(tmp_path, 1, [judged(output=(5,) * 5, engine_logprobs=exact)], {})
    assert read_steps(str(tmp_path))[0][0].rollout.engine_logprobs == exact


def test_text_with_a_lone_surrogate_is_kept(tmp_path):
    write_step(tmp_path, 1, [judged(text="half \ud83d")], {})
    assert read_steps(str(tmp_path))[0][0].rollout.text == "half \ud83d"


def test_writing_a_step_again_replaces_it(tmp_path):
    write_step(tmp_path, 1, STEP, {})
    write_step(tmp_path, 1, STEP[:1], {})
    assert len(lines_of(tmp_path)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001.jsonl"]


def test_steps_are_read_by_number_from_one_file_or_from_a_folder(tmp_path):
    folder = tmp_path / "rollouts"
    for step in (10, 2, 1_000_000):
        write_step(folder, step, [judged(f"p{step}")], {})
    steps = read_steps(str(folder))
    assert [items[0].rollout.prompt.id for items in steps] == ["p2", "p10", "p1000000"]
    single = tmp_path / "all.jsonl"
    rows = [file.read_text() for file in sorted(folder.iterdir(), reverse=True)]
    single.write_text("".join(rows))
    assert read_steps(str(single)) == steps


def test_rows_of_a_step_keep_their_order(tmp_path):
    items = [judged(name, sample) for name, sample in (("z", 1), ("a", 0), ("z", 0))]
    write_step(tmp_path, 1, items, {})
    assert [(i.rollout.prompt.id, i.rollout.sample) for i in read_steps(str(tmp_path))[0]] == [
        ("z", 1),
        ("a", 0),
        ("z", 0),
    ]


MINIMAL = {
    "step": 1,
    "prompt_id": 7,
    "sample": 0,
    "prompt_ids": [2, 3],
    "output_ids": [5, 1],
    "finish_reason": "stop",
    "correct": True,
}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_rows_of_another_tool_need_only_what_training_needs(tmp_path):
    (((item),),) = read_steps(write_lines(tmp_path / "r.jsonl", MINIMAL))
    assert (item.rollout.prompt.id, item.rollout.text, item.rollout.weight_version) == ("7", "", 0)
    assert (
        all(math.isnan(value) for value in item.rollout.engine_logprobs)
        and len(item.rollout.engine_logprobs) == 2
    )
    assert (item.verdict.extracted, item.verdict.error) == (None, None)


def minus(key):
    return {name: value for name, value in MINIMAL.items() if name != key}


BAD = [
    *((minus(key), f"'{key}' is missing") for key in MINIMAL),
    ({**MINIMAL, "correct": 1}, "correct is 1, not true or false"),
    ({**MINIMAL, "correct": None}, "correct is None, not true or false"),
    ({**MINIMAL, "correct": "true"}, "correct is 'true', not true or false"),
    ({**MINIMAL, "prompt_ids": []}, "prompt_ids is empty"),
    ({**MINIMAL, "engine_logprobs": [-0.5]}, "engine_logprobs has 1 entries for 2 output_ids"),
    ({**MINIMAL, "engine_logprobs": []}, "engine_logprobs has 0 entries for 2 output_ids"),
    ({**MINIMAL, "engine_logprobs": [-0.5, "x"]}, "engine_logprobs"),
    ({**MINIMAL, "engine_logprobs": -0.5}, "engine_logprobs"),
    ({**MINIMAL, "output_ids": None}, "output_ids"),
    ({**MINIMAL, "output_ids": 5}, "output_ids"),
    ({**MINIMAL, "output_ids": "51"}, "output_ids"),
    ({**MINIMAL, "output_ids": [5.5, 1]}, "output_ids"),
    ({**MINIMAL, "output_ids": ["5", 1]}, "output_ids"),
    ({**MINIMAL, "output_ids": [True, 1]}, "output_ids"),
    ({**MINIMAL, "prompt_ids": "23"}, "prompt_ids"),
    ({**MINIMAL, "prompt_ids": [2, None]}, "prompt_ids"),
    ({**MINIMAL, "step": "one"}, "step"),
    ({**MINIMAL, "step": 1.5}, "step"),
    ({**MINIMAL, "step": None}, "step"),
    ({**MINIMAL, "sample": [0]}, "sample"),
    ({**MINIMAL, "finish_reason": "aborted"}, "finish_reason is 'aborted'"),
    ({**MINIMAL, "finish_reason": None}, "finish_reason is None"),
    ('{"step": 1e999}', "not JSON: 1e999 is beyond 1.8e308; write it as text in quotes"),
    ("{", "not JSON"),
    ("[]", "expected a JSON object"),
]


@pytest.mark.parametrize(("bad", "problem"), BAD, ids=lambda value: str(value)[-45:])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, problem):
    path = write_lines(tmp_path / "r.jsonl", MINIMAL, "", bad)
    with pytest.raises(DataError) as raised:
        read_steps(path)
    assert str(raised.value).startswith(f"{path}:3: ") and problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_without_rollouts_is_refused(tmp_path, kind):
    path = tmp_path / "empty"
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(DataError, match="empty holds no rollouts; expected rows as RUN/rollouts has them"):
        read_steps(str(path))


def test_a_place_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="missing: cannot be read"):
        read_steps(str(tmp_path / "missing"))
