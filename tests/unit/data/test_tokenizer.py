"""Prompts through templates, stop tokens, and whether two tokenizers are one vocabulary."""

import json
import string

import pytest

from megatron_scope.config.schema import DataConfig
from megatron_scope.data.tokenizer import (
    check_same_tokens,
    check_template,
    encode_prompt,
    load_tokenizer,
    stop_token_ids,
)
from megatron_scope.errors import ConfigError, DataError
from tests.unit.data.characters import CHAT_TEMPLATE, character_tokenizer


@pytest.fixture(scope="module")
def plain():
    return character_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return character_tokenizer(CHAT_TEMPLATE, bos=True)


# ---- templates


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{prompt}", "1+1"),
        ("Q: {prompt}\nA: ", "Q: 1+1\nA: "),
        ("{x}{prompt}{{y}} %s", "{x}1+1{{y}} %s"),  # other braces stand as they are
    ],
)
def test_a_prompt_template_is_the_whole_prompt(plain, template, text):
    ids = encode_prompt(DataConfig(prompt_template=template), plain, "1+1")
    assert plain.decode(ids) == text and all(type(token) is int for token in ids)


def test_a_prompt_that_holds_a_field_itself_is_not_filled_in_again(plain):
    ids = encode_prompt(DataConfig(prompt_template="<{prompt}>"), plain, "a{prompt}b")
    assert plain.decode(ids) == "<a{prompt}b>"


def test_a_template_gets_the_tokenizers_start_token_once(chat):
    assert chat.decode(encode_prompt(DataConfig(prompt_template="{prompt}"), chat, "q")) == "<bos>q"


def test_a_chat_template_is_used_where_no_prompt_template_is_set(chat):
    assert chat.decode(encode_prompt(DataConfig(), chat, "hi")) == "u:hi|a:"


def test_the_system_prompt_comes_first(chat):
    ids = encode_prompt(DataConfig(system_prompt="be good"), chat, "hi")
    assert chat.decode(ids) == "s:be good|u:hi|a:"


def test_messages_are_taken_as_they_are(chat):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    before = json.dumps(messages)
    assert chat.decode(encode_prompt(DataConfig(), chat, messages)) == "u:a|a:b|u:c|a:"
    with_system = encode_prompt(DataConfig(system_prompt="z"), chat, messages)
    assert chat.decode(with_system) == "s:z|u:a|a:b|u:c|a:"
    assert json.dumps(messages) == before


def test_chat_template_arguments_reach_the_template(chat):
    ids = encode_prompt(DataConfig(chat_template_kwargs={"brief": "now"}), chat, "hi")
    assert chat.decode(ids) == "u:hi|a:now"


def test_the_ids_of_a_chat_prompt_are_a_plain_list(chat):
    ids = encode_prompt(DataConfig(), chat, "hi")
    assert isinstance(ids, list) and all(type(token) is int for token in ids)


def test_some_template_must_be_at_hand(plain, chat):
    with pytest.raises(ConfigError) as raised:
        check_template(DataConfig(), plain, "models/base")
    assert str(raised.value) == (
        "the tokenizer of models/base has no chat template; set data.prompt_template, for example '{prompt}'"
    )
    check_template(DataConfig(prompt_template="{prompt}"), plain, "models/base")
    check_template(DataConfig(), chat, "models/base")


# ---- stop tokens


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),  # the tokenizer's
        ({"config.json": {"eos_token_id": 5}}, (5,)),
        ({"config.json": {}}, (1,)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": [7, 8]}}, (7, 8)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {}}, (5,)),
        ({"generation_config.json": {"eos_token_id": 0}}, (0,)),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": None}}, (1,)),
    ],
)
def test_stop_tokens_come_from_the_first_place_that_names_them(tmp_path, plain, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert stop_token_ids(DataConfig(), str(tmp_path), plain) == expected


@pytest.mark.parametrize("configured", [(), (3,), (3, 4)])
def test_configured_stop_tokens_come_before_all(tmp_path, plain, configured):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert stop_token_ids(DataConfig(stop_token_ids=configured), str(tmp_path), plain) == configured


def test_a_tokenizer_without_an_end_token_gives_no_stop_token(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    assert stop_token_ids(DataConfig(), str(tmp_path), tokenizer) == ()


# ---- one vocabulary


def test_equal_vocabularies_are_compatible_whatever_else_differs(plain, chat):
    check_same_tokens(plain, chat, "student", "teacher")


def test_other_ids_for_the_same_tokens_are_refused():
    ours = character_tokenizer(characters=string.ascii_lowercase)
    theirs = character_tokenizer(characters="ba" + string.ascii_lowercase[2:])
    with pytest.raises(ConfigError) as raised:
        check_same_tokens(ours, theirs, "models/s", "models/t")
    assert str(raised.value) == (
        "the tokenizers of models/s and models/t differ in 2 tokens, for example 'a': id 3 and 4; "
        "student and teacher must share one vocabulary"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "ids"), [("ab", "abc", "None and 5"), ("abc", "ab", "5 and None")]
)
def test_a_token_that_only_one_of_them_has_is_refused(ours, theirs, ids):
    tokenizers = [character_tokenizer(characters=characters) for characters in (ours, theirs)]
    with pytest.raises(ConfigError, match=f"differ in 1 tokens, for example 'c': id {ids};"):
        check_same_tokens(*tokenizers, "student", "teacher")


def test_added_tokens_count_as_tokens():
    ours, theirs = character_tokenizer(), character_tokenizer()
    theirs.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(ConfigError, match="'<think>': id None and"):
        check_same_tokens(ours, theirs, "student", "teacher")


# ---- loading


def test_a_saved_tokenizer_is_loaded_with_its_chat_template(tmp_path, chat):
    chat.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == chat.get_vocab()
    assert encode_prompt(DataConfig(), loaded, "hi") == encode_prompt(DataConfig(), chat, "hi")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="missing is not a folder; expected a Hugging Face model folder"):
        load_tokenizer(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"version": 3}', '{"added_tokens": [], "model": {"type": "Newer"}}']
)
def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(DataError) as raised:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
