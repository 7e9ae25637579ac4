"""The command line of a SGLang server, from a config."""

import json
import sys

import pytest

from megatron_scope import cli
from megatron_scope.config import parse_config
from megatron_scope.errors import ConfigError, DataError
from megatron_scope.rollout.launch import CPU_CACHE_TOKENS, LaunchOptions, launch_command


@pytest.fixture
def folders(tmp_path):
    """Folders of a student with 256 positions and a teacher with 128."""
    for name, settings in (
        ("student", {"max_position_embeddings": 256}),
        ("teacher", {"text_config": {"max_position_embeddings": 128}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def command(folders):
    """The command of a config of `sections` over one that fits, for LaunchOptions(**options)."""

    def of(sections=None, **options):
        own = {
            "student": {"hf": str(folders / "student")},
            "teacher": {"hf": str(folders / "teacher")},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 32},
        }
        merged = {
            name: {**own.get(name, {}), **(sections or {}).get(name, {})}
            for name in {*own, *(sections or {})}
        }
        return launch_command(parse_config(merged, "test"), LaunchOptions(**{"role": "rollout", **options}))

    return of


def flags(command):
    """The words after the module as {flag: value}; the last of a repeated flag counts, as for SGLang."""
    words = command.words[3:]
    values = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            follows = words[place + 1] if place + 1 < len(words) else "--"
            values[word] = None if follows.startswith("--") else follows
    return values


def test_a_rollout_server_takes_the_students_folder_precision_lengths_and_concurrency(command, folders):
    sections = {"rollout": {"max_concurrent_requests": 7}, "train": {"precision": "float32"}}
    made = command(sections, python="py", host="0.0.0.0", port=31000, tp=4)
    assert made.words[:3] == ("py", "-m", "sglang.launch_server")
    assert flags(made) == {
        "--model-path": str(folders / "student"),
        "--host": "0.0.0.0",
        "--port": "31000",
        "--dtype": "float32",
        "--context-length": "98",  # 64 + 32, and the two that SGLang keeps
        "--tp-size": "4",
        "--max-running-requests": "7",
        "--random-seed": str(1234 + 31000),
        "--log-level-http": "warning",
    }
    assert made.environment == {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.mark.parametrize(("positions", "context"), [("null", "39"), ("64", "39"), ("24", "24")])
def test_short_sequences_leave_room_for_sglangs_own_first_request(command, folders, positions, context):
    (folders / "student" / "config.json").write_text(f'{{"max_position_embeddings": {positions}}}')
    made = command({"data": {"max_prompt_tokens": 16}, "rollout": {"max_new_tokens": 4}})
    assert flags(made)["--context-length"] == context


def test_weights_that_were_not_published_have_no_number(command):
    """SGLang calls them "default", which no rollout may carry."""
    assert "--weight-version" not in flags(command())


def test_servers_on_different_ports_draw_different_noise(command):
    first, second = (flags(command(port=port))["--random-seed"] for port in (30000, 30001))
    assert first != second


def test_a_teacher_server_takes_the_teachers_folder_and_bounds_the_logits_of_prompts(command, folders):
    made = command(role="teacher")
    assert flags(made)["--model-path"] == str(folders / "teacher")
    assert flags(made)["--context-length"] == "103"  # 64 + 32, and the seven that SGLang keeps of an input
    assert "--max-running-requests" not in flags(made) and "--random-seed" not in flags(made)
    assert made.environment["SGLANG_ENABLE_LOGPROB_CHUNK"] == "1"
    assert int(made.environment["SGLANG_LOGPROB_CHUNK_SIZE"]) > 0


def test_a_cpu_server_uses_torchs_own_code_and_a_bounded_cache(command):
    made = command(device="cpu")
    assert flags(made)["--device"] == "cpu" and flags(made)["--attention-backend"] == "torch_native"
    assert flags(made)["--max-total-tokens"] == str(CPU_CACHE_TOKENS)
    assert made.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in made.environment


def test_the_cache_of_a_cpu_server_holds_the_longest_sequence(command, folders):
    (folders / "student" / "config.json").write_text("{}")  # a model without a limit
    sections = {"data": {"max_prompt_tokens": CPU_CACHE_TOKENS}, "rollout": {"max_new_tokens": 5}}
    found = flags(command(sections, device="cpu"))
    assert found["--max-total-tokens"] == found["--context-length"] == str(CPU_CACHE_TOKENS + 7)


@pytest.mark.parametrize(("cores", "ranges"), [(8, "0-3|4-7"), (3, "0-0|1-1"), (2, "0-0|1-1")])
def test_the_ranks_of_a_cpu_server_share_the_cores(command, cores, ranges):
    environment = command(device="cpu", tp=2, cores=cores).environment
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == ranges
    assert environment["TORCHDYNAMO_DISABLE"] == "1"


def test_a_megatron_student_starts_with_dummy_weights_and_its_companions(command, folders):
    companions = folders / "checkpoint" / "hf"
    companions.mkdir(parents=True)
    (companions / "config.json").write_text("{}")
    made = command({"student": {"hf": None, "megatron": str(folders / "checkpoint")}})
    assert flags(made)["--model-path"] == str(companions) and flags(made)["--load-format"] == "dummy"
    beside = command({"student": {"megatron": str(folders / "checkpoint")}})
    assert flags(beside)["--model-path"] == str(folders / "student")
    assert flags(beside)["--load-format"] == "dummy"  # the weights are the checkpoint's


def test_extra_words_come_after_our_own(command):
    made = command({"rollout": {"api_key_env": "SERVER_KEY"}}, extra=("--port", "5", "--api-key", "mine"))
    assert made.extra == ("--port", "5", "--api-key", "mine")
    assert made.as_shell().endswith('--api-key "$SERVER_KEY" --port 5 --api-key mine')


def test_the_shell_line_quotes_and_leaves_the_key_to_the_shell(command, folders, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    moved = folders / "a b"
    (folders / "student").rename(moved)
    sections = {"student": {"hf": str(moved)}, "rollout": {"api_key_env": "SERVER_KEY"}}
    line = command(sections, extra=("--x", "$HOME")).as_shell()
    assert line.startswith("HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 ")
    assert f"--model-path '{moved}'" in line and line.endswith("--api-key \"$SERVER_KEY\" --x '$HOME'")
    assert "secret" not in line


@pytest.mark.parametrize(
    ("sections", "role", "message"),
    [
        ({"student": {"hf": None}}, "rollout", "student.hf is not set: --role rollout serves it"),
        ({"teacher": {"hf": None}}, "teacher", "teacher.hf is not set: --role teacher serves it"),
        ({"teacher": {"megatron": "m"}}, "teacher", "SGLang reads no Megatron checkpoint"),
        (
            {"rollout": {"max_new_tokens": 191}},
            "rollout",
            "is 255, but {folders}/student has 256 positions and SGLang keeps 2 of them to itself; lower one "
            "of the two to a sum of 254",
        ),
        ({"rollout": {"max_new_tokens": 63}}, "teacher", "lower one of the two to a sum of 121"),
    ],
)
def test_what_cannot_be_served_is_one_line(command, folders, sections, role, message):
    with pytest.raises(ConfigError) as caught:
        command(sections, role=role)
    assert message.format(folders=folders) in str(caught.value) and "\n" not in str(caught.value)


def test_the_longest_that_fits_is_served(command):
    assert flags(command({"rollout": {"max_new_tokens": 190}}))["--context-length"] == "256"


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_sound_config_is_named(command, folders, text):
    path = folders / "student" / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=r"student/config\.json: .*; expected a Hugging Face model folder"):
        command()


# ---- the command


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, stdout and stderr."""

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def served(tmp_path):
    """The path of a config whose student has 64 positions."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    path = tmp_path / "launch.yaml"
    path.write_text(
        f"student: {{hf: {tmp_path}}}\n"
        "data: {max_prompt_tokens: 32}\n"
        "rollout: {max_new_tokens: 30, api_key_env: SERVER_KEY}\n"
    )
    return path


def test_launch_prints_one_command_line_without_the_key(run, served, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    words = ("--role", "rollout", "train.precision=float32", "--python", "python3", "--", "--trust", "a b")
    code, out, err = run("launch", served, *words)
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert f"python3 -m sglang.launch_server --model-path {tmp_path} " in out
    assert " --dtype float32 --context-length 64 " in out
    assert out.endswith(" --api-key \"$SERVER_KEY\" --trust 'a b'\n") and "secret" not in out


def test_launch_runs_what_it_prints_with_the_key(run, served, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    became = []
    monkeypatch.setattr("os.execvpe", lambda *call: became.append(call))
    words = ("launch", served, "--role", "rollout", "--device", "cpu", "--python", sys.executable)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    code, printed, err = run(*words, "--run")
    assert (code, err) == (0, "")
    ((program, argv, environment),) = became
    assert program == argv[0] == sys.executable and argv[-2:] == ["--api-key", "secret"]
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1" and environment["SERVER_KEY"] == "secret"
    assert " ".join(argv[:-1]) in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "0"), "--port is 0; expected 1 to 65535"),
        (("--tp", "0"), "--tp is 0; expected 1 or more"),
        (("rollout.max_new_tokens=31",), "lower one of the two to a sum of 62"),
        (("rollout.max_new_tokens=0",), "rollout.max_new_tokens is 0: it must be 1 or more"),
        (("student.hf=/nowhere",), "/nowhere/config.json"),
        (("student.hf=null",), "student.hf is not set: --role rollout serves it"),
        (("--run",), "the config's api_key_env names SERVER_KEY, which is not set"),
        (
            ("--run", "rollout.api_key_env=null", "--python", "/nowhere/python"),
            "--python is /nowhere/python, which cannot be run",
        ),
        (("--run", "rollout.api_key_env=null"), "has no sglang: install megatron_scope[sglang]"),
    ],
)
def test_launch_refuses_what_cannot_be_served(run, served, monkeypatch, words, message):
    monkeypatch.delenv("SERVER_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run("launch", served, "--role", "rollout", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
