"""Loading, overriding and writing configs: what is accepted, and the one line that each mistake gets."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.config.load import load_config, parse_config, write_config
from megatron_scope.config.schema import (
    Config,
    Divergence,
    Engine,
    ObjectiveName,
    Preset,
    Schedule,
    Truncated,
)
from megatron_scope.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def load(tmp_path):
    def run(text, *overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return run


@pytest.fixture
def message(load):
    """The single line that a config is refused with."""

    def run(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return run


def test_defaults_are_those_of_the_papers_table_3():
    config = Config()
    assert (config.optimizer.lr, config.optimizer.schedule) == (5e-5, Schedule.CONSTANT)
    assert config.optimizer.weight_decay == 0.01
    assert config.rollout.prompts_per_step == 256
    assert config.rollout.samples_per_prompt == 8
    assert config.train.updates_per_batch == 1
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (4096, 12288)
    assert config.rollout.temperature == 0.6
    assert (config.rollout.top_p, config.rollout.top_k) == (1.0, -1)
    objective = config.objective
    assert (objective.name, objective.preset, objective.tau) == (ObjectiveName.SCOPE, Preset.PAPER, 1.0)
    assert (objective.student_exponent, objective.teacher_exponent) == (1.0, -1.0)
    assert objective.divergence == Divergence.SAMPLED
    assert (objective.student_temperature, objective.teacher_temperature) == (1.0, 1.0)
    evaluate = config.evaluate  # Table 4
    assert (evaluate.temperature, evaluate.top_p, evaluate.top_k) == (0.6, 0.95, 20)
    assert evaluate.max_new_tokens == 32768


@pytest.mark.parametrize("text", ["", "# only a comment\n", "run:\nrollout:\n", "{}"])
def test_an_empty_file_or_section_gives_the_defaults(load, text):
    assert load(text) == Config()


def test_values_are_converted_as_their_annotations_say(load):
    config = load(
        """
        optimizer: {lr: 5e-5, clip_grad: 1}
        rollout: {engine: embedded, servers: http://a:1, truncated: drop, temperature: 1}
        student: {hf: ~/model, pipeline_layers: [1, 2]}
        teacher: {server: [http://a:1, http://b:2]}
        data: {stop_token_ids: [3], chat_template_kwargs: {enable_thinking: false, depth: {n: 1}}}
        objective: {ratio_clip: null}
        parallel: {sequence: true}
        """
    )
    assert config.optimizer.lr == 5e-5
    assert isinstance(config.optimizer.clip_grad, float)
    assert config.rollout.engine is Engine.EMBEDDED
    assert config.rollout.truncated is Truncated.DROP
    assert config.rollout.servers == ("http://a:1",)
    assert isinstance(config.rollout.temperature, float)
    assert config.student.hf == "~/model"
    assert config.student.pipeline_layers == (1, 2)
    assert config.teacher.server == ("http://a:1", "http://b:2")
    assert config.data.stop_token_ids == (3,)
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "depth": {"n": 1}}
    assert config.objective.ratio_clip is None
    assert config.parallel.sequence is True


def test_a_merge_key_is_not_a_doubled_key(load):
    assert load("run: &r {steps: 3, seed: 1}\ndata: {chat_template_kwargs: {<<: *r, seed: 2}}") == load(
        "run: {steps: 3, seed: 1}\ndata: {chat_template_kwargs: {steps: 3, seed: 2}}"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rollout: {temprature: 1}", "rollout.temprature is not a key; did you mean rollout.temperature?"),
        ("rolout: {temperature: 1}", "rolout is not a section; did you mean rollout?"),
        ("lr: 1e-3", "lr is not a section; did you mean optimizer.lr?"),
        ("train: {steps: 3}", "train.steps is not a key; did you mean run.steps?"),
        ("sync: {zzz: 3}", "sync.zzz is not a key; sync has transport, timeout_s, bucket_mb, master_address"),
        ("zzz: {a: 3}", "zzz is not a section; sections are run, student, "),
        ("run: 3", "run is 3: expected a mapping of keys; write `run:` and its keys below it"),
        ("- run", "the config is ['run']: expected a mapping of sections; "),
        ("run: {steps: 1.5}", "run.steps is 1.5: expected a whole number; write it in digits, "),
        ("run: {steps: 1e3}", "run.steps is 1000.0: expected a whole number"),
        ("run: {steps: true}", "run.steps is true: expected a whole number"),
        (
            "run: {steps: '3'}",
            "run.steps is '3': expected a whole number; write it in digits, without quotes",
        ),
        ("run: {steps: null}", "run.steps is null: expected a value; give one, or leave the key out"),
        ("run: {steps: 1:30}", "run.steps is '1:30': expected a whole number"),
        ("run: {output_dir: 2026}", "run.output_dir is 2026: expected text; put it in quotes"),
        ("run: {output_dir: [a]}", "run.output_dir is ['a']: expected text"),
        ("optimizer: {lr: '5e-5'}", "optimizer.lr is '5e-5': expected a number; write it as 0.5 or 5e-5"),
        ("optimizer: {lr: true}", "optimizer.lr is true: expected a number"),
        ("parallel: {sequence: yes}", "parallel.sequence is 'yes': expected true or false; "),
        ("parallel: {sequence: 1}", "parallel.sequence is 1: expected true or false"),
        (
            "rollout: {engine: sglnag}",
            "rollout.engine is 'sglnag': expected one of sglang, embedded, replay; did you mean sglang?",
        ),
        ("rollout: {engine: 3}", "choose one, as in rollout.engine=sglang"),
        ("rollout: {servers: [1]}", "rollout.servers[0] is 1: expected text"),
        (
            "student: {pipeline_layers: 2}",
            "student.pipeline_layers is 2: expected a list; write it as [a, b]",
        ),
        ("student: {pipeline_layers: [1, x]}", "student.pipeline_layers[1] is 'x': expected a whole number"),
        (
            "data: {chat_template_kwargs: 3}",
            "data.chat_template_kwargs is 3: expected a mapping with text keys",
        ),
        (
            "data: {chat_template_kwargs: {1: 3}}",
            "expected a mapping with text keys; write it as {name: value}",
        ),
        (
            "data: {chat_template_kwargs: &x {a: *x}}",
            "data.chat_template_kwargs is {'a': {...}}: expected plain",
        ),
        (f"run: {{output_dir: {{k: {'x' * 500}}}}}", "...: expected text; put it in quotes"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_file_and_its_cure(message, tmp_path, text, said):
    line = message(text)
    assert line.startswith(f"{tmp_path / 'c.yaml'}: ")
    assert said in line
    assert len(line) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "run:\n  steps: 1\n  steps: 2\n",
            ":3: not valid YAML: 'steps' is given twice in one mapping; keep one",
        ),
        ("run: {}\nrun: {}\n", ":2: not valid YAML: 'run' is given twice"),
        ("data:\n  chat_template_kwargs: {a: 1, a: 2}\n", ":2: not valid YAML: 'a' is given twice"),
        ("run: {steps: 1\n", ":2: not valid YAML: "),
        ("? [a]\n: 3\n", ":1: not valid YAML: a key must be a word"),
        (
            "run: !!python/object/apply:os.getcwd []\n",
            ":1: not valid YAML: could not determine a constructor",
        ),
        ("run:\n  output_dir: !!timestamp x\n", ":2: not valid YAML: could not determine a constructor"),
        ("run:\n  steps: !!int x\n", ": not valid YAML: invalid literal for int()"),
        ("parallel:\n  sequence: !!bool x\n", ": not valid YAML: 'x'"),
    ],
)
def test_bad_yaml_is_one_line_with_the_line_number(message, tmp_path, text, said):
    assert f"{tmp_path / 'c.yaml'}{said}" in message(text)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot read the config .*none\.yaml: No such file or directory; give"
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match=r"b\.yaml is not UTF-8 text"):
        load_config(tmp_path / "b.yaml")


def test_overrides_win_over_the_file_and_the_last_one_wins(load):
    config = load("run: {steps: 1, seed: 2}", "run.steps=3", "optimizer.lr=5e-5", "run.steps=4")
    assert (config.run.steps, config.run.seed, config.optimizer.lr) == (4, 2, 5e-5)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("objective.ratio_clip=0.2", "objective", "ratio_clip", 0.2),
        ("objective.ratio_clip=null", "objective", "ratio_clip", None),
        ("parallel.sequence=true", "parallel", "sequence", True),
        ("rollout.engine=replay", "rollout", "engine", Engine.REPLAY),
        ("rollout.servers=http://a:1", "rollout", "servers", ("http://a:1",)),
        ("rollout.servers=[http://a:1, http://b:2]", "rollout", "servers", ("http://a:1", "http://b:2")),
        ("student.pipeline_layers=[2,0]", "student", "pipeline_layers", (2, 0)),
        ("data.chat_template_kwargs={a: [1]}", "data", "chat_template_kwargs", {"a": [1]}),
        ("data.chat_template_kwargs.a.b=false", "data", "chat_template_kwargs", {"a": {"b": False}}),
        ("run.output_dir=2026-01-31", "run", "output_dir", "2026-01-31"),
        ("run.output_dir=null", "run", "output_dir", None),
        ("run.output_dir=", "run", "output_dir", None),
        ("run.output_dir='null'", "run", "output_dir", "null"),
        ("data.prompt_template={prompt}=", "data", "prompt_template", "{prompt}="),
        ("data.prompt_template=Task #1: {prompt} a=b", "data", "prompt_template", "Task #1: {prompt} a=b"),
        ('data.prompt_template="Q: {prompt}\\nA:"', "data", "prompt_template", "Q: {prompt}\nA:"),
    ],
)
def test_override_values_are_yaml_and_text_settings_take_text(load, override, section, key, value):
    assert getattr(getattr(load("", override), section), key) == value


def test_an_override_below_a_mapping_keeps_its_other_keys(load):
    config = load("data: {chat_template_kwargs: {a: 1, b: 2}}", "data.chat_template_kwargs.b=3")
    assert config.data.chat_template_kwargs == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.steps", "'run.steps' is not an override; write section.key=value, as in run.steps=10"),
        ("steps=3", "'steps=3' is not an override"),
        ("run..steps=3", "'run..steps=3' is not an override"),
        ("rollout.temprature=1", "rollout.temprature is not a key; did you mean rollout.temperature?"),
        ("rolout.n=1", "rolout is not a section; did you mean rollout?"),
        ("run.steps.x=1", "run.steps has no keys below it; write run.steps=value"),
        ("run.steps=x", "run.steps is 'x': expected a whole number"),
        ("run.steps=[", "'run.steps=[': not valid YAML: expected the node content"),
        ("run.steps=1_000", "run.steps is '1_000': expected a whole number"),
        ("optimizer.lr=1" + "0" * 400, "expected a number"),
    ],
)
def test_a_mistake_in_an_override_is_put_down_to_the_command_line(message, override, said):
    line = message("run: {seed: 1}", override)
    assert line.startswith("command line: ")
    assert said in line


def test_the_files_mistakes_are_not_put_down_to_an_override(message):
    assert message("run: {steps: x}", "run.seed=3").endswith("without quotes, point or exponent")
    assert not message("run: {steps: x}", "run.seed=3").startswith("command line")


def test_environment_references_are_expanded(load, monkeypatch):
    monkeypatch.setenv("DISK", "/d")
    monkeypatch.delenv("NOT_SET", raising=False)
    config = load(
        "student: {hf: '${DISK}/${DISK}/m'}\nrollout: {servers: ['${DISK}']}", "run.output_dir=${DISK}/r"
    )
    assert config.student.hf == "/d//d/m"
    assert config.rollout.servers == ("/d",)
    assert config.run.output_dir == "/d/r"
    assert load("run: {output_dir: '$${DISK} $x $'}").run.output_dir == "${DISK} $x $"
    assert load("data: {prompt_template: 'Is ${x}$ even? {prompt}'}").data.prompt_template.startswith(
        "Is ${x}$"
    )


def test_an_undefined_environment_reference_is_an_error(message, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    line = message("student: {hf: '${NOT_SET}/m'}")
    assert (
        "student.hf refers to ${NOT_SET}, which the environment does not define; export NOT_SET, or" in line
    )
    assert "refers to ${}" in message("student: {hf: '${}'}")


def test_parse_config_takes_a_mapping_and_leaves_it_alone():
    mapping = {"run": {"steps": 3}, "student": None, "data": {"chat_template_kwargs": {"a": 1}}}
    config = parse_config(mapping, "recorded run")
    assert config.run.steps == 3
    assert mapping == {"run": {"steps": 3}, "student": None, "data": {"chat_template_kwargs": {"a": 1}}}
    with pytest.raises(
        ConfigError, match=r"^recorded run: run\.step is not a key; did you mean run\.steps\?$"
    ):
        parse_config({"run": {"step": 3}}, "recorded run")


def test_a_written_config_names_every_setting_and_loads_equal(tmp_path):
    path = tmp_path / "new" / "config.resolved.yaml"
    config = parse_config(
        {
            "run": {"output_dir": "${A}".replace("$", "$$"), "steps": 7},
            "optimizer": {"lr": 5e-5},
            "student": {"hf": "5e-5", "pipeline_layers": [1, 0]},
            "rollout": {"servers": ["yes", "1:30", "~", ""], "engine": "replay"},
            "data": {
                "system_prompt": "a\nb: #c ${d}$ \u00fc",
                "chat_template_kwargs": {"x": [1, None, "010"]},
            },
        },
        "test",
    )
    write_config(config, path)
    assert load_config(path) == config
    text = path.read_text(encoding="utf-8")
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert f"{field.name}:" in text
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_config_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^cannot write .*file/c\.yaml: .*; choose another run\.output_dir"
    ):
        write_config(Config(), tmp_path / "file" / "c.yaml")


def _strategy(annotation):
    """Any value of a schema annotation."""
    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
        [
            "a\x85b",
            "\u2028",
            " a ",
            "a\n b\n\n",
            "null",
            "5e-5",
            "0x1",
            "0o7",
            "1_0",
            "1:2",
            "yes",
            "<<",
            "=",
            "2026-01-31",
            ".inf",
            "$${A}",
            "${A}",
            "$$${A}",
        ]
    )
    known = {bool: st.booleans(), int: st.integers(), float: st.floats(allow_nan=False), str: text}
    if annotation in known:
        return known[annotation]
    if isinstance(annotation, type):
        return st.sampled_from(list(annotation))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return st.lists(_strategy(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(
            text, text | st.integers() | st.booleans() | st.lists(text, max_size=2), max_size=3
        )
    assert arguments[1] is type(None)
    return st.none() | _strategy(arguments[0])


def _section(section):
    hints = typing.get_type_hints(section)
    return st.builds(section, **{name: _strategy(annotation) for name, annotation in hints.items()})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.builds(Config, **{name: _section(kind) for name, kind in typing.get_type_hints(Config).items()}))
def test_any_config_survives_writing_and_loading(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write_config(config, path)
    assert load_config(path) == config


def test_loading_a_config_imports_no_numerical_library():
    code = (
        "import sys, megatron_scope.config.load, megatron_scope.config.check; "
        "print([name for name in ('torch', 'numpy', 'transformers', 'megatron') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
