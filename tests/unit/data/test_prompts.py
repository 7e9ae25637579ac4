"""Drawing training rows: order, epochs, cursor, over-long prompts, and complaints that name file and line."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.config.schema import DataConfig
from megatron_scope.data.prompts import Cursor, Drawer, example_drawer, load_prompts, prompt_drawer
from megatron_scope.errors import DataError
from tests.unit.data.characters import CHAT_TEMPLATE, character_tokenizer

TASKS = ("math", "code")
REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


def drawer(num_rows, *, seed=1, shuffle=True, too_long=()):
    """A drawer of the numbers 0..num_rows-1, of which some have too long a prompt."""
    config = DataConfig(shuffle=shuffle, max_prompt_tokens=5)
    rows = list(range(num_rows))
    return Drawer("rows.jsonl", rows, lambda row: (row, 6 if row in too_long else 5), config, seed)


def draws(source, count, times):
    return [source.draw(count) for _ in range(times)]


def flat(lists):
    return [item for items in lists for item in items]


# ---- order


def test_without_shuffling_rows_come_in_the_files_order():
    assert draws(drawer(6, shuffle=False), 3, 4) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def test_a_rest_that_does_not_fill_a_draw_is_left_out():
    source = drawer(7, shuffle=False)
    assert draws(source, 3, 4) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert source.cursor == Cursor(len(source._rows), epoch=1, position=6, skipped=0)


def test_draws_of_another_size_go_on_where_the_last_one_ended():
    source = drawer(6, shuffle=False)
    assert [source.draw(count) for count in (1, 2, 3, 6, 5)] == [
        [0],
        [1, 2],
        [3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4],
    ]


def test_shuffled_epochs_hold_every_row_once_each_in_another_order():
    source = drawer(40)
    epochs = [flat(draws(source, 8, 5)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(40))}) == 5


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (draws(drawer(40, seed=seed), 8, 10) for seed in (1, 1, 2))
    assert first == again != other
    assert flat(other[:5]) != flat(first[5:])  # seed 2 is not seed 1 an epoch on


@REPEATABLE
@given(st.integers(1, 12), st.data())
def test_no_draw_holds_a_row_twice_nor_one_that_is_too_long(num_rows, data):
    too_long = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=num_rows - 1))
    usable = num_rows - len(too_long)
    source = drawer(num_rows, too_long=too_long, shuffle=data.draw(st.booleans()))
    counts = data.draw(st.lists(st.integers(1, usable), max_size=12))
    for count in counts:
        drawn = source.draw(count)
        assert len(drawn) == len(set(drawn)) == count
        assert not too_long & set(drawn)


@REPEATABLE
@given(st.integers(1, 12), st.data())
def test_within_an_epoch_no_row_comes_twice(num_rows, data):
    source = drawer(num_rows)
    seen = {}
    for _ in range(10):
        drawn = source.draw(data.draw(st.integers(1, num_rows)))
        seen.setdefault(source.cursor.epoch, []).extend(drawn)
    assert all(max(Counter(rows).values()) == 1 for rows in seen.values())


# ---- the cursor


@REPEATABLE
@given(st.integers(1, 12), st.booleans(), st.data())
def test_a_drawer_that_starts_from_a_cursor_goes_on_as_the_first_one_did(num_rows, shuffle, data):
    too_long = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=num_rows - 1))
    count = data.draw(st.integers(1, num_rows - len(too_long)))
    first = drawer(num_rows, shuffle=shuffle, too_long=too_long)
    draws(first, count, data.draw(st.integers(0, 8)))
    resumed = drawer(num_rows, shuffle=shuffle, too_long=too_long)
    resumed.cursor = Cursor(**json.loads(json.dumps(dataclasses.asdict(first.cursor))))
    assert draws(resumed, count, 6) == draws(first, count, 6)
    assert resumed.cursor == first.cursor


def test_a_cursor_can_be_set_back_on_the_same_drawer():
    source = drawer(10)
    start = dataclasses.replace(source.cursor)
    first = draws(source, 4, 5)
    source.cursor = start
    assert draws(source, 4, 5) == first


# ---- too long


def test_rows_that_are_too_long_are_skipped_and_counted():
    source = drawer(6, shuffle=False, too_long={0, 3})
    assert source.draw(2) == [1, 2]
    assert source.cursor == Cursor(len(source._rows), position=3, skipped=1)
    assert source.draw(2) == [4, 5]
    assert source.cursor == Cursor(len(source._rows), position=6, skipped=2)
    assert source.draw(1) == [1] and source.cursor.skipped == 3


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_when_an_epoch_holds_too_few_usable_rows_the_draw_fails_instead_of_running_for_ever(drawn_before):
    source = drawer(5, shuffle=False, too_long={1, 2})
    for _ in range(drawn_before):
        source.draw(2)
    with pytest.raises(DataError) as raised:
        source.draw(4)
    assert str(raised.value) == (
        "rows.jsonl holds 3 usable rows within data.max_prompt_tokens=5, fewer than the "
        "rollout.prompts_per_step=4 of one step; lower it or give more data"
    )


def test_all_rows_too_long_is_an_error():
    with pytest.raises(
        DataError, match=r"rows\.jsonl holds 0 usable rows within data\.max_prompt_tokens=5, fewer"
    ):
        drawer(3, too_long={0, 1, 2}).draw(1)


def test_fewer_rows_than_a_step_is_an_error_at_once():
    source = drawer(3)
    with pytest.raises(DataError) as raised:
        source.draw(4)
    assert str(raised.value) == (
        "rows.jsonl holds 3 usable rows, fewer than the rollout.prompts_per_step=4 of one step; "
        "lower it or give more data"
    )
    assert source.cursor == Cursor(len(source._rows))
    assert sorted(source.draw(3)) == [0, 1, 2]


# ---- prompt rows


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(CHAT_TEMPLATE)


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text(
            "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        )
        return str(path)

    return write_lines


def row(**changes):
    return {"id": "a", "prompt": "1+1=", "answer": "2", "task": "math", **changes}


def without(key):
    return {name: value for name, value in row().items() if name != key}


def test_a_row_becomes_a_prompt_with_the_models_token_ids(write, tokenizer):
    path = write(row(), row(id=7, answer=3.5, task="code", extra=[1]))
    source = prompt_drawer(
        DataConfig(train=path, shuffle=False, prompt_template="Q{prompt}A"), tokenizer, TASKS, 0
    )
    text, numbers = source.draw(2)
    assert (text.id, text.answer, text.task) == ("a", "2", "math")
    assert tokenizer.decode(text.token_ids) == "Q1+1=A"
    assert (numbers.id, numbers.answer, numbers.task) == ("7", "3.5", "code")
    assert isinstance(text.token_ids, tuple) and all(type(token) is int for token in text.token_ids)


def test_the_seed_and_the_length_limit_reach_the_drawer(write, tokenizer):
    path = write(*(row(id=number, prompt="x" * (number + 1)) for number in range(9)))
    config = DataConfig(train=path, prompt_template="{prompt}", max_prompt_tokens=6)
    first, again, other = (
        [prompt.id for prompt in prompt_drawer(config, tokenizer, TASKS, seed).draw(6)] for seed in (3, 3, 4)
    )
    assert first == again != other and sorted(first) == sorted(other) == list("012345")
    source = prompt_drawer(config, tokenizer, TASKS, 3)
    source.draw(6)
    source.draw(6)
    assert source.cursor.skipped >= 3


BAD_ROWS = [
    ("{", "not JSON"),
    ("[]", "expected a JSON object"),
    (without("id"), "id is None; expected text or a number"),
    (row(id=None), "id is None; expected text or a number"),
    (row(id=True), "id is True; expected text or a number"),
    (row(id=["a"]), "id is ['a']; expected text or a number"),
    (without("answer"), "answer is None; expected text or a number"),
    (row(answer={"x": 1}), "answer is {'x': 1}; expected text or a number"),
    (row(answer=False), "answer is False; expected text or a number"),
    (without("task"), "task is None; expected text"),
    (row(task=1), "task is 1; expected text"),
    (without("prompt"), "prompt is None; expected text or a list"),
    (row(prompt=""), "prompt is ''; expected text or a list"),
    (row(prompt=[]), "prompt is []; expected text or a list"),
    (row(prompt=3), "prompt is 3; expected text or a list"),
    (row(prompt=["hello"]), "prompt is ['hello']; expected text or a list"),
    (row(prompt=[{"role": "user"}]), "expected text or a list of {role, content} messages"),
    (row(prompt=[{"role": "user", "content": None}]), "expected text or a list of {role, content} messages"),
    (row(prompt=[{"role": "user", "content": ["a"]}]), "expected text or a list of {role, content} messages"),
    (row(prompt=[{"role": None, "content": "a"}]), "expected text or a list of {role, content} messages"),
]


@pytest.mark.parametrize(("bad", "problem"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_prompt_row_is_named_by_file_and_line(write, tokenizer, bad, problem):
    path = write(row(id="first"), "", bad)
    config = DataConfig(train=path, prompt_template="{prompt}")
    for read in (
        lambda: prompt_drawer(config, tokenizer, TASKS, 0),
        lambda: load_prompts(config, tokenizer, TASKS, path),
    ):
        with pytest.raises(DataError) as raised:
            read()
        assert str(raised.value).startswith(f"{path}:3: ") and problem in str(raised.value)


@pytest.mark.parametrize("second", ["a", "b"])
def test_an_id_that_comes_twice_is_refused(write, tokenizer, second):
    path = write(row(id="b"), row(id="a"), row(id=second))
    with pytest.raises(DataError, match=f"rows.jsonl holds the id '{second}' twice; ids must be unique"):
        prompt_drawer(DataConfig(train=path, prompt_template="{prompt}"), tokenizer, TASKS, 0)


def test_a_number_and_the_same_number_as_text_are_one_id(write, tokenizer):
    with pytest.raises(DataError, match="holds the id '1' twice"):
        prompt_drawer(
            DataConfig(train=write(row(id=1), row(id="1")), prompt_template="{prompt}"), tokenizer, TASKS, 0
        )


@pytest.mark.parametrize("content", [(), ("", "  ")])
def test_a_file_without_rows_is_refused(write, tokenizer, content):
    path = write(*content)
    config = DataConfig(train=path, prompt_template="{prompt}")
    for read in (prompt_drawer, example_drawer):
        arguments = (config, tokenizer, TASKS, 0) if read is prompt_drawer else (config, tokenizer, (), 0)
        with pytest.raises(DataError, match=r"rows\.jsonl is empty; expected JSON lines"):
            read(*arguments)


def test_a_file_that_is_not_there_is_refused(tmp_path, tokenizer):
    path = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"missing.jsonl: cannot be read: No such file"):
        prompt_drawer(DataConfig(train=path, prompt_template="{prompt}"), tokenizer, TASKS, 0)


# ---- load_prompts


def test_load_prompts_keeps_the_files_order_and_every_row(write, tokenizer):
    path = write(*(row(id=name) for name in "zayb"))
    prompts = load_prompts(DataConfig(prompt_template="{prompt}"), tokenizer, TASKS, path)
    assert [prompt.id for prompt in prompts] == list("zayb")


def test_load_prompts_leaves_no_prompt_out_but_refuses_one_that_is_too_long(write, tokenizer):
    path = write(row(id="a"), row(id="b", prompt="x" * 10), row(id="c", prompt="y" * 9))
    fits = DataConfig(prompt_template="{prompt}", max_prompt_tokens=10)
    assert len(load_prompts(fits, tokenizer, TASKS, path)) == 3
    with pytest.raises(DataError) as raised:
        load_prompts(dataclasses.replace(fits, max_prompt_tokens=9), tokenizer, TASKS, path)
    assert str(raised.value) == f"{path}: prompt b has 10 tokens, over data.max_prompt_tokens=9; raise it"


# ---- examples (sft)


EOS = 1


def examples(path, tokenizer, stop_ids=(EOS,), **changes):
    config = DataConfig(**{"train": path, "shuffle": False, "prompt_template": "{prompt}", **changes})
    return example_drawer(config, tokenizer, stop_ids, 0)


def test_an_example_holds_prompt_and_response_tokens(write, tokenizer):
    path = write({"prompt": "1+1=", "response": "2!"})
    (example,) = examples(path, tokenizer).draw(1)
    assert tokenizer.decode(example.prompt.token_ids) == "1+1="
    assert tokenizer.decode(example.output_ids) == "2!<eos>"
    assert example.prompt.id == "1"  # the line


def test_a_response_that_ends_in_any_stop_token_gets_no_other(write, tokenizer):
    exclamation = tokenizer.convert_tokens_to_ids("!")
    path = write(*({"prompt": "q", "response": text} for text in ("a!", "a", "!a", "", "!")))
    outputs = [tokenizer.decode(e.output_ids) for e in examples(path, tokenizer, (EOS, exclamation)).draw(5)]
    assert outputs == ["a!", "a<eos>", "!a<eos>", "<eos>", "!"]
    first_stop = [
        tokenizer.decode(e.output_ids) for e in examples(path, tokenizer, (exclamation, EOS)).draw(5)
    ]
    assert first_stop == ["a!", "a!", "!a!", "!", "!"]


def test_a_stop_token_written_in_the_response_is_not_doubled(write, tokenizer):
    (example,) = examples(write({"prompt": "q", "response": "a<eos>"}), tokenizer).draw(1)
    assert tokenizer.decode(example.output_ids) == "a<eos>"


def test_without_stop_tokens_the_response_stays_as_it_is(write, tokenizer):
    (example,) = examples(write({"prompt": "q", "response": "ab"}), tokenizer, ()).draw(1)
    assert tokenizer.decode(example.output_ids) == "ab"


def test_given_token_ids_are_learnt_as_they_are(write, tokenizer):
    path = write(
        {"id": "a", "sample": 0, "prompt_ids": [9, 8], "response": "text", "output_ids": [5, 7]},
        {"id": "a", "sample": 1, "prompt": "q", "output_ids": [5, EOS]},
    )
    drawn = examples(path, tokenizer).draw(2)
    assert [example.output_ids for example in drawn] == [(5, 7), (5, EOS)]
    assert [example.prompt.id for example in drawn] == ["a/0", "a/1"]
    assert drawn[0].prompt.token_ids == (9, 8)
    assert tokenizer.decode(drawn[1].prompt.token_ids) == "q"


def test_only_the_prompt_gets_the_tokenizers_start_token(write):
    tokenizer = character_tokenizer(bos=True)
    (example,) = examples(write({"prompt": "q", "response": "a"}), tokenizer).draw(1)
    assert tokenizer.decode(example.prompt.token_ids) == "<bos>q"
    assert tokenizer.decode(example.output_ids) == "a<eos>"


def test_the_length_limit_of_an_example_is_its_prompts(write, tokenizer):
    path = write({"prompt": "long", "response": "a"}, {"prompt": "q", "response": "a" * 50})
    source = examples(path, tokenizer, max_prompt_tokens=3)
    assert [tokenizer.decode(e.prompt.token_ids) for e in source.draw(1)] == ["q"]
    assert source.cursor.skipped == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"prompt": "q"}, "response is None; expected text"),
        ({"prompt": "q", "response": ["a"]}, "response is ['a']; expected text"),
        ({"response": "a"}, "prompt is None; expected text or a list"),
        ({"prompt": "q", "output_ids": [1.5]}, "output_ids is [1.5]; expected a list of token ids"),
        ({"prompt": "q", "output_ids": [True]}, "output_ids is [True]; expected a list of token ids"),
        ({"prompt": "q", "output_ids": [-1]}, "output_ids is [-1]; expected a list of token ids"),
        ({"prompt": "q", "output_ids": "12"}, "output_ids is 12; expected a list of token ids"),
        ({"prompt": "q", "output_ids": []}, "output_ids is []; expected a list of token ids"),
        ({"prompt_ids": [], "output_ids": [1]}, "prompt_ids is []; expected a list of token ids"),
    ],
)
def test_a_bad_example_row_is_named_by_file_and_line(write, tokenizer, bad, problem):
    path = write({"prompt": "q", "response": "a"}, bad)
    with pytest.raises(DataError) as raised:
        examples(path, tokenizer)
    assert str(raised.value).startswith(f"{path}:2: {problem}")


def test_the_ids_of_examples_must_be_unique_too(write, tokenizer):
    given = {"id": "x", "prompt": "q", "response": "a"}
    with pytest.raises(DataError, match="holds the id 'x' twice"):
        examples(write(given, given), tokenizer)


def test_a_task_that_nobody_can_judge_is_refused(write, tokenizer):
    path = write(row(), row(id="b", task="Math"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: task is 'Math'; known: math, code"):
        prompt_drawer(DataConfig(train=path, prompt_template="{prompt}"), tokenizer, TASKS, 0)


def test_a_list_of_messages_under_a_template_is_refused_by_line(write, tokenizer):
    path = write(row(prompt=[{"role": "user", "content": "1"}]))
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: prompt is a list of messages, which data.prompt_template"
    ):
        prompt_drawer(DataConfig(train=path, prompt_template="{prompt}"), tokenizer, TASKS, 0)


def test_a_prompt_without_tokens_is_refused(write, tokenizer):
    class Swallowing:
        def __call__(self, text):
            return type("Encoded", (), {"input_ids": []})

    path = write(row(id="a"))
    source = prompt_drawer(DataConfig(train=path, prompt_template="{prompt}"), Swallowing(), TASKS, 0)
    with pytest.raises(DataError, match="prompt a becomes no token at all"):
        source.draw(1)


def test_a_cursor_of_another_file_is_refused():
    source = drawer(6)
    source.go_to(Cursor(6, epoch=1, position=2))
    with pytest.raises(DataError, match=r"rows.jsonl has 6 rows, but 9 when the checkpoint was written"):
        source.go_to(Cursor(9))
