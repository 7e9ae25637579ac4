"""Prompts through templates, stop tokens, and whether two tokenizers are one vocabulary."""

import json
import string

import pytest
from tokenizers import processors

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
    for template in ("{prompt}", "<bos>{prompt}"):
        ids = encode_prompt(DataConfig(prompt_template=template), chat, "q")
        assert chat.decode(ids) == "<bos>q"


@pytest.mark.parametrize(("pattern", "text"), [("$A <eos>", "q"), ("<bos> $A <eos>", "<bos>q")])
def test_a_prompt_does_not_end_in_what_the_tokenizer_puts_after_a_text(pattern, text):
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        pattern, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert tokenizer("q").input_ids[-1] == tokenizer.eos_token_id
    ids = encode_prompt(DataConfig(prompt_template="{prompt}"), tokenizer, "q")
    assert tokenizer.decode(ids) == text


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


# ---- chat templates in the manner of Qwen


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WITH_A_DEFAULT_SYSTEM_PROMPT = (  # as Qwen2.5's
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    + TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_THINKING = (  # as Qwen3's
    TURNS
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    + "{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
USER, ASSISTANT = "<|im_start|>user\n1+1<|im_end|>\n", "<|im_start|>assistant\n"


def chatml(template, **settings):
    tokenizer = character_tokenizer(template, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])  # a tokenizer that starts texts of its own accord
@pytest.mark.parametrize(
    ("template", "settings", "prompt", "text"),
    [
        (WITH_A_DEFAULT_SYSTEM_PROMPT, {}, "1+1", f"<|im_start|>system\nHelp.<|im_end|>\n{USER}{ASSISTANT}"),
        (
            WITH_A_DEFAULT_SYSTEM_PROMPT,
            {"system_prompt": "Add."},
            "1+1",
            f"<|im_start|>system\nAdd.<|im_end|>\n{USER}{ASSISTANT}",
        ),
        (
            WITH_A_DEFAULT_SYSTEM_PROMPT,
            {
                "chat_template_kwargs": {"enable_thinking": False}
            },  # a variable that this template does not read
            "1+1",
            f"<|im_start|>system\nHelp.<|im_end|>\n{USER}{ASSISTANT}",
        ),
        (
            WITH_A_DEFAULT_SYSTEM_PROMPT,
            {},
            [{"role": "system", "content": "Sum."}, {"role": "user", "content": "1+1"}],
            f"<|im_start|>system\nSum.<|im_end|>\n{USER}{ASSISTANT}",
        ),
        (
            WITH_THINKING,
            {},
            MESSAGES,
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            f"<|im_start|>user\nc<|im_end|>\n{ASSISTANT}",
        ),
        (WITH_THINKING, {}, "1+1", USER + ASSISTANT),
        (WITH_THINKING, {"chat_template_kwargs": {"enable_thinking": True}}, "1+1", USER + ASSISTANT),
        (
            WITH_THINKING,
            {"chat_template_kwargs": {"enable_thinking": False}},
            "1+1",
            f"{USER}{ASSISTANT}<think>\n\n</think>\n\n",
        ),
    ],
)
def test_a_chatml_prompt_is_the_templates_text_up_to_the_answer(bos, template, settings, prompt, text):
    tokenizer = chatml(template, bos=bos)
    config = DataConfig(**settings)
    check_template(config, tokenizer, "m")
    ids = encode_prompt(config, tokenizer, prompt)
    assert tokenizer.decode(ids) == text
    # Markers are one token each, and nothing stands before the first.
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(ids[0]) == text.count("<|im_start|>")


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TURNS, "<bos>" + TURNS])
def test_a_chat_template_that_writes_the_start_token_gets_no_second(template):
    tokenizer = chatml(template, bos=True)
    ids = encode_prompt(DataConfig(), tokenizer, "hi")
    assert tokenizer.decode(ids) == "<bos><|im_start|>user\nhi<|im_end|>\n"
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_reach_the_template(name):
    tokenizer = chatml("{{ " + name + "[0].title }}" + TURNS)
    config = DataConfig(chat_template_kwargs={name: [{"title": "calc"}]})
    check_template(config, tokenizer, "m")
    assert tokenizer.decode(encode_prompt(config, tokenizer, "hi")).startswith("calc<|im_start|>")


@pytest.mark.parametrize(
    "name",
    [
        *("add_generation_prompt", "tokenize", "return_dict", "conversation", "messages", "chat_template"),
        *("continue_final_message", "truncation", "max_length", "padding", "tokenizer_kwargs"),
    ],
)
def test_an_argument_that_would_not_reach_the_template_is_refused(chat, name):
    with pytest.raises(ConfigError) as raised:
        check_template(DataConfig(chat_template_kwargs={"brief": "x", name: 1}), chat, "m")
    assert str(raised.value) == (
        f"data.chat_template_kwargs has {name}, which is set here or by transformers and would not reach the "
        "template; give variables of the template only, as in {enable_thinking: false}"
    )


def test_two_system_messages_are_refused(chat):
    messages = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "1+1"}]
    with pytest.raises(DataError) as raised:
        encode_prompt(DataConfig(system_prompt="Add."), chat, messages)
    assert str(raised.value) == (
        f"the prompt {str(messages)[:80]!r} has a system message of its own beside data.system_prompt; "
        "remove one of the two"
    )


def test_what_a_template_says_of_a_prompt_that_it_refuses_is_one_line():
    tokenizer = chatml("{{ raise_exception('roles must\\nalternate') }}")
    with pytest.raises(DataError) as raised:
        encode_prompt(DataConfig(), tokenizer, "hi")
    assert str(raised.value) == (
        "the chat template does not take the prompt 'hi' (roles must alternate); mend the row, "
        "data.system_prompt or data.chat_template_kwargs"
    )


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
