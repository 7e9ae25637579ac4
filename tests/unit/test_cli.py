"""The command line in this process: exit codes, one-line messages, and options among overrides."""

import json

import pytest

import megatron_scope
import megatron_scope.config
import megatron_scope.config.check
from megatron_scope import cli
from megatron_scope.errors import CheckpointError, ConfigError, DataError, TrainingError
from tests.unit.convert.folders import (
    CONFIG,
    read_weights,
    same_bits,
    stacked,
    tensors,
    write_checkpoint,
    write_folder,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, stdout and stderr."""

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse's way to end
            code = exit_.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def write(tmp_path):
    def write_config(text="run: {output_dir: out}\n"):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_config


def one_line(err):
    """The message, without the program's name, when it is the only line."""
    assert err.startswith("megatron-scope: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("megatron-scope: ").strip()


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "COMMAND"),
        (("trian", "c.yaml"), "invalid choice: 'trian' (choose from"),
        (("train",), "CONFIG.yaml"),
        (("train", "c.yaml", "--nproc", "two"), "invalid int value: 'two'"),
        (("train", "c.yaml", "--resume", "maybe"), "invalid choice: 'maybe'"),
        (("train", "c.yaml", "--steps", "3"), "unrecognized arguments: --steps 3"),
        (("train", "c.yaml", "run.steps=1", "-x"), "unrecognized arguments: -x"),
        (("verify", "--input", "f"), "--output"),
        (("verify", "--input", "f", "--output", "g", "extra"), "unrecognized arguments: extra"),
        (("evaluate", "c.yaml"), "--benchmarks"),
        (("serve",), "--model"),
        (("serve", "--model", "m", "--", "--dtype", "x"), "unrecognized arguments: -- --dtype x"),
        (("launch", "c.yaml"), "--role"),
        (("launch", "--role", "rollout"), "CONFIG.yaml"),
        (("launch", "c.yaml", "--role", "student"), "invalid choice: 'student'"),
        (("launch", "c.yaml", "--role", "rollout", "--dtype", "x"), "unrecognized arguments: --dtype x"),
        (("convert",), "WHAT"),
        (("convert", "to-onnx"), "invalid choice: 'to-onnx' (choose from"),
        (("convert", "to-megatron", "--hf", "m"), "--out"),
        (("convert", "to-megatron", "--out", "o"), "--hf"),
        (("convert", "to-hf", "--megatron", "m", "--out", "o", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("convert", "to-hf", "--hf", "m", "--out", "o"), "--megatron"),
        (("convert", "check", "--hf", "m", "--megatron", "c", "--logits", "some"), "invalid choice: 'some'"),
        (("convert", "logits", "--megatron", "m", "--out", "o"), "--tokens"),
        (("convert", "to-hf", "--megatron", "m", "--out", "o", "extra"), "unrecognized arguments: extra"),
    ],
)
def test_wrong_use_exits_with_2_and_one_line(run, arguments, problem):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and problem in one_line(err)


@pytest.mark.parametrize(
    "command",
    [
        *((), ("train",), ("evaluate",), ("verify",), ("serve",), ("launch",), ("convert",)),
        *(("convert", kind) for kind in ("to-megatron", "to-hf", "check", "logits")),
    ],
)
def test_every_command_has_help(run, command):
    code, out, err = run(*command, "--help")
    assert code == 0 and err == "" and out.startswith("usage: megatron-scope")


def test_the_commands_are_listed_in_the_help(run):
    _, out, _ = run("--help")
    assert all(name in out for name in ("train", "convert", "evaluate", "verify", "serve", "launch"))


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"{megatron_scope.__version__}\n", "")


# ---- configs


@pytest.mark.parametrize("command", [("train",), ("evaluate", "--benchmarks", "b.jsonl")])
def test_a_config_that_is_not_there_is_one_line(run, tmp_path, command):
    path = tmp_path / "missing.yaml"
    code, out, err = run(command[0], path, *command[1:])
    assert (code, out) == (2, "")
    expected = f"cannot read the config {path}: No such file or directory; give the path of a YAML file"
    assert one_line(err) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {stepz: 3}\n", "run.stepz is not a key; did you mean run.steps?"),
        ("objective: {student_exponnt: 1}\n", "did you mean objective.student_exponent?"),
        ("trian: {precision: float32}\n", "trian is not a section; did you mean train?"),
        ("run: {steps: many}\n", "run.steps is 'many': expected a whole number"),
        ("run: [\n", "not valid YAML"),
        ("- 1\n", "expected a mapping of sections"),
        ("objective: {tau: 0}\n", "objective.tau is 0.0: it must be finite and above 0"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_with_a_way_out(run, write, text, message):
    code, out, err = run("train", write(text))
    assert (code, out) == (2, "") and message in one_line(err)


def test_a_mistake_in_an_override_is_blamed_on_the_command_line(run, write):
    code, _, err = run("train", write(), "run.stepz=3")
    assert code == 2
    assert one_line(err) == "command line: run.stepz is not a key; did you mean run.steps?"


@pytest.mark.parametrize("word", ["run.steps", "steps=3", "=3"])
def test_a_word_that_is_no_override_is_explained(run, write, word):
    code, _, err = run("train", write(), word)
    assert code == 2 and "is not an override; write section.key=value" in one_line(err)


@pytest.mark.parametrize("nproc", [0, -1])
def test_no_ranks_at_all_is_wrong_use(run, write, nproc):
    code, out, err = run("train", write(), f"--nproc={nproc}")
    assert (code, out) == (2, "") and one_line(err) == f"--nproc is {nproc}; expected 1 or more"


def test_ranks_that_do_not_fit_the_layout_are_refused_before_any_starts(run, write):
    text = "run: {output_dir: out}\nparallel: {tensor: 2, pipeline: 2}\n"
    code, _, err = run("train", write(text), "--nproc", 6)
    assert code == 2 and "there are 6 ranks" in one_line(err) and "needs a multiple of 4" in err


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}, 3),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "9"}, 5),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, 1),  # a batch script: no ranks
    ],
    ids=["torchrun", "srun", "sbatch"],
)
def test_the_number_of_ranks_is_what_the_launcher_started(run, write, monkeypatch, variables, ranks):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("train", write("run: {output_dir: out}\nparallel: {tensor: 2}\n"))
    assert code == 2 and f"there are {ranks} ranks" in one_line(err)


# ---- options among overrides


@pytest.fixture
def seen(monkeypatch):
    """What `train` and `evaluate` hand to the config loader; both end there."""
    calls = []

    def load_config(path, overrides):
        calls.append((path, list(overrides)))
        raise ConfigError("enough")

    monkeypatch.setattr(megatron_scope.config, "load_config", load_config)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        ("c.yaml", "a.b=1", "c.d=2", "--nproc", "2"),
        ("c.yaml", "--nproc", "2", "a.b=1", "c.d=2"),
        ("--nproc", "2", "c.yaml", "a.b=1", "c.d=2"),
        ("c.yaml", "a.b=1", "--nproc", "2", "c.d=2"),
        ("c.yaml", "a.b=1", "--nproc", "2", "c.d=2", "--resume", "never"),
        ("--resume=never", "c.yaml", "--nproc=2", "a.b=1", "c.d=2"),
    ],
)
def test_overrides_may_stand_before_and_after_options(run, seen, arguments):
    code, _, err = run("train", *arguments)
    assert (code, one_line(err)) == (2, "enough")
    assert seen == [("c.yaml", ["a.b=1", "c.d=2"])]


def test_an_override_may_hold_dashes_spaces_and_equal_signs(run, seen):
    overrides = ["rollout.top_k=-1", "data.prompt_template=Q = {prompt} --", "a.b="]
    run("train", "c.yaml", *overrides[:1], "--nproc", 1, *overrides[1:])
    assert seen == [("c.yaml", overrides)]


def test_the_model_to_evaluate_replaces_the_configs(run, seen):
    run("evaluate", "c.yaml", "--model", "m/x", "--benchmarks", "b.jsonl", "student.hf=other", "run.seed=2")
    assert seen == [("c.yaml", ["student.hf=other", "run.seed=2", "student.hf=m/x", "student.megatron=null"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "4", "--k", "1,8"), "--k holds 8; expected between 1 and --samples=4"),
        (("--samples", "4", "--k", "0"), "--k holds 0; expected between 1 and --samples=4"),
        (("--k", "1,x"), "--k is '1,x'; expected numbers with commas, as in 1,8,32"),
        (("--samples", "0"), "--samples is 0; expected 1 or more"),
    ],
)
def test_numbers_of_samples_that_do_not_fit_are_refused_before_any_is_drawn(run, write, arguments, message):
    text = "student: {hf: m}\nrollout: {engine: embedded}\n"
    code, _, err = run("evaluate", write(text), "--benchmarks", "b.jsonl", *arguments)
    assert (code, one_line(err)) == (2, message)


# ---- how errors end


def ending_in(monkeypatch, error):
    def load_config(path, overrides):
        raise error

    monkeypatch.setattr(megatron_scope.config, "load_config", load_config)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (DataError("x"), 2), (CheckpointError("x"), 1), (TrainingError("x"), 1)],
)
def test_the_kind_of_error_gives_the_exit_code(run, monkeypatch, error, code):
    ending_in(monkeypatch, error)
    assert run("train", "c.yaml") == (code, "", "megatron-scope: x\n")


@pytest.mark.parametrize(
    "variables",
    [("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")],
    ids=["torchrun", "srun"],
)
@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_of_an_error_that_all_ranks_have_rank_zero_alone_speaks(run, monkeypatch, variables, rank, speaks):
    for variable, value in zip(variables, (rank, rank, "2"), strict=True):
        monkeypatch.setenv(variable, value)
    ending_in(monkeypatch, TrainingError("the loss is nan"))
    assert run("train", "c.yaml") == (1, "", "megatron-scope: the loss is nan\n" if speaks else "")
    ending_in(monkeypatch, CheckpointError("disk full"))
    assert run("train", "c.yaml") == (1, "", "megatron-scope: disk full\n")


def test_an_interrupt_ends_as_shells_expect(run, monkeypatch):
    ending_in(monkeypatch, KeyboardInterrupt())
    assert run("train", "c.yaml") == (130, "", "")


def test_a_failure_that_nobody_foresaw_keeps_its_traceback(monkeypatch):
    ending_in(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["train", "c.yaml"])


# ---- verify


def test_verify_judges_a_file_and_says_how_it_went(run, tmp_path):
    rows = [
        {"id": 1, "task": "math", "answer": "4", "response": "so \\boxed{4}"},
        {"id": 2, "task": "math", "answer": "4", "response": "so \\boxed{5}"},
        {"id": 3, "task": "math", "answer": "4"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("verify", "--input", source, "--output", target)
    assert (code, out, err) == (0, f"3 rows, 1 correct, 1 with an error: {target}\n", "")
    judged = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in judged] == [1, 2, 3]
    assert [row["correct"] for row in judged] == [True, False, False]
    assert [row["extracted"] for row in judged] == ["4", "5", None]
    assert [row["error"] is None for row in judged] == [True, True, False]


def test_verify_of_a_file_that_is_not_there_writes_nothing(run, tmp_path):
    source, target = tmp_path / "missing.jsonl", tmp_path / "out.jsonl"
    code, out, err = run("verify", "--input", source, "--output", target)
    assert (code, out) == (2, "") and one_line(err) == f"{source}: cannot be read: No such file or directory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [("--workers", "0"), ("--timeout", "0"), ("--timeout", "nan")])
def test_verify_refuses_settings_that_cannot_work(run, tmp_path, option):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "task": "math", "answer": "4", "response": "4"}\n')
    code, out, err = run("verify", "--input", source, "--output", tmp_path / "out.jsonl", *option)
    assert (code, out) == (2, "") and one_line(err)
    assert not (tmp_path / "out.jsonl").exists()


# ---- serve


def test_serve_refuses_a_folder_that_holds_no_model(run, tmp_path):
    code, out, err = run("serve", "--model", tmp_path)
    assert (code, out) == (2, "") and str(tmp_path) in one_line(err)


# ---- convert


@pytest.mark.parametrize("name", ["tp", "pp", "ep"])
@pytest.mark.parametrize("value", [0, -2])
@pytest.mark.parametrize(
    "words",
    [
        ("to-megatron", "--hf", "m", "--out", "o"),
        ("check", "--hf", "m", "--megatron", "c"),
        ("logits", "--megatron", "c", "--tokens", "t", "--out", "o"),
    ],
    ids=["to-megatron", "check", "logits"],
)
def test_no_ranks_of_a_kind_are_wrong_use(run, words, name, value):
    code, out, err = run("convert", *words, f"--{name}={value}")
    assert (code, out) == (2, "") and one_line(err) == f"--{name} is {value}; expected 1 or more"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_files_without_a_size_are_wrong_use(run, value):
    code, out, err = run("convert", "to-hf", "--megatron", "c", "--out", "o", f"--max-shard-gb={value}")
    assert (code, out) == (2, "")
    assert one_line(err) == f"--max-shard-gb is {float(value)}; expected finite and above 0"


@pytest.fixture
def hf(tmp_path):
    return write_folder(tmp_path / "hf")


def test_convert_goes_there_and_back_and_says_how_much(run, tmp_path, hf):
    mega, back = tmp_path / "mega", tmp_path / "back"
    code, out, err = run(
        "convert", "to-megatron", "--hf", hf, "--out", mega, "--tp", 2, "--dtype", "bfloat16"
    )
    assert (code, err) == (0, "") and out.endswith(f": {mega}\n") and out.count("\n") == 1
    words = ("--megatron", mega, "--out", back, "--dtype", "float32", "--max-shard-gb", 7e-6)
    code, out, err = run("convert", "to-hf", *words)
    assert (code, err) == (0, "") and out.endswith(f": {back}\n") and out.count("\n") == 1
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors().items()}
    assert same_bits(read_weights(back), rounded)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1


def test_convert_takes_a_config_from_another_folder(run, tmp_path, hf):
    mega, back = write_checkpoint(tmp_path / "mega", stacked(hf)), tmp_path / "back"
    code, out, err = run("convert", "to-hf", "--megatron", mega, "--out", back)
    assert (code, out) == (2, "") and "--like HF_DIR" in one_line(err) and not back.exists()
    assert run("convert", "to-hf", "--megatron", mega, "--out", back, "--like", hf)[0] == 0
    assert same_bits(read_weights(back), tensors())


def test_check_tells_equal_and_different_by_its_exit_code(run, tmp_path, hf):
    mega, certificate = write_checkpoint(tmp_path / "mega", stacked(hf), CONFIG), tmp_path / "c.json"
    words = ("--hf", hf, "--megatron", mega, "--logits", "never", "--output", certificate)
    count = len(tensors())
    skipped = "logits not compared: not asked for\n"
    code, out, err = run("convert", "check", *words)
    assert (code, err) == (0, "")
    assert out == f"{count} of {count} tensors are equal bit for bit\n{skipped}"
    found = json.loads(certificate.read_text())
    assert found["equal"] and found["logits"] == {"skipped": "not asked for"}
    assert (found["hf"], found["megatron"]) == (str(hf), str(mega))
    assert found["architecture"] == "LlamaForCausalLM"
    weights = tensors()
    weights["model.norm.weight"][0] = weights["model.norm.weight"][0].round() + 8
    difference = (weights["model.norm.weight"] - tensors()["model.norm.weight"]).abs().max().item()
    write_folder(hf, weights=weights)
    code, out, err = run("convert", "check", *words)
    assert (code, err) == (1, "")
    assert out == (
        f"{count - 1} of {count} tensors are equal bit for bit; model.norm.weight differs by up to "
        f"{difference:.3g}\n{skipped}"
    )
    found = json.loads(certificate.read_text())
    assert not found["equal"] and found["tensors"]["largest_difference"] == pytest.approx(difference)


def test_a_checkpoint_without_a_config_is_checked_by_the_folders(run, tmp_path, hf):
    mega = write_checkpoint(tmp_path / "mega", stacked(hf))
    words = ("--hf", hf, "--megatron", mega, "--logits", "never")
    assert run("convert", "check", *words)[0] == 0


def test_a_checkpoint_with_a_config_of_another_model_is_refused(run, tmp_path, hf):
    """Its own config counts, not the folder's, or a wrong one would never be found."""
    mega = write_checkpoint(tmp_path / "mega", stacked(hf), {**CONFIG, "rope_theta": 5.0})
    code, out, err = run("convert", "check", "--hf", hf, "--megatron", mega, "--logits", "never")
    assert (code, out) == (2, "")
    assert one_line(err) == f"{hf} and {mega} are of different models: rope_theta is 10000.0 and 5.0"


def test_logits_need_as_many_ranks_as_the_layout(run, tmp_path, hf):
    mega = write_checkpoint(tmp_path / "mega", stacked(hf), CONFIG)
    words = ("--megatron", mega, "--tokens", "t.npy", "--out", "l.npy", "--tp", 2, "--pp", 3)
    code, out, err = run("convert", "logits", *words)
    assert (code, out) == (2, "") and one_line(err) == (
        "there are 1 ranks; --tp 2 --pp 3 --ep 1 needs 6: start them with torchrun --nproc-per-node 6 -m "
        "megatron_scope ..."
    )
