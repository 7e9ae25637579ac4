"""The quickstart's task: solutions, their checker, what it writes, and that its models and tokenizer load."""

import importlib
import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest

from megatron_scope.config import load_config
from megatron_scope.config.check import check_config

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


def _load_task():
    spec = importlib.util.spec_from_file_location("quickstart_task", QUICKSTART / "task.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = _load_task()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    task.make(folder, seed=7)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_documented_solution_is_valid():
    assert task.is_valid_solution("94580", "9458=358=88=6$")
    assert task.is_valid_solution("94580=", "9458=358=88=6")
    assert task.answer("94580") == "6"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "$",
        "6$",
        "9458=358=88=7$",  # a wrong sum
        "9458=358=6$",  # a step left out
        "9458=358=88$",  # not finished
        "9458=358=88=6=6$",
        "94580=9458=358=88=6$",  # the problem again
        "9458=458=88=6$",  # no addition leads there
        "9458=358=88=6$$",
        " 9458=358=88=6$",
        "9458=358=88=6\n",
        "9458==88=6$",
        "9458=358=88=\u0666$",  # another script's digit
    ],
)
def test_an_invalid_solution_is_refused(response):
    assert not task.is_valid_solution("94580", response)


def test_solutions_are_valid_and_reach_every_order_of_additions():
    problem = "13942"  # no two orders of additions write the same text
    rng = random.Random(0)
    drawn = {task.solution(problem, rng) for _ in range(600)}
    assert all(task.is_valid_solution(problem, response) for response in drawn)
    assert all(response.endswith(task.answer(problem) + "$") for response in drawn)
    assert len(drawn) == 24
    orders = set()
    for order in itertools.product(range(4), range(3), range(2), range(1)):
        digits = [int(digit) for digit in problem]
        steps = []
        for pair in order:
            digits[pair : pair + 2] = [(digits[pair] + digits[pair + 1]) % 10]
            steps.append("".join(map(str, digits)))
        orders.add("=".join(steps) + "$")
    assert drawn == orders


def test_noise_makes_the_stated_share_of_solutions_wrong():
    rng = random.Random(1)
    problems = [f"{rng.randrange(10**5):05d}" for _ in range(4000)]
    valid = sum(task.is_valid_solution(problem, task.solution(problem, rng, 0.1)) for problem in problems)
    # Each of four sums is wrong with chance 0.1 * 9/10; a wrong sum cannot be mended by a later one.
    assert valid / len(problems) == pytest.approx(0.91**4, abs=0.03)


def test_held_out_problems_are_in_no_row_that_a_model_is_trained_on(made):
    heldout = {row["prompt"] for row in rows(made / "heldout.jsonl")}
    assert len(heldout) == 256
    for name in ("train", "teacher_sft", "student_sft"):
        assert heldout.isdisjoint(row["prompt"] for row in rows(made / f"{name}.jsonl"))


def test_the_files_hold_what_the_configs_use(made):
    prompts = rows(made / "train.jsonl")
    assert len({row["id"] for row in prompts}) == len(prompts) == 20_000
    for row in prompts[:200]:
        assert row == {
            "id": row["id"],
            "prompt": f"{row['id']}=",
            "answer": str(sum(map(int, row["id"])) % 10),
            "task": "math",
        }
    teacher, student = rows(made / "teacher_sft.jsonl"), rows(made / "student_sft.jsonl")
    assert all(task.is_valid_solution(row["prompt"], row["response"]) for row in teacher)
    share = sum(task.is_valid_solution(row["prompt"], row["response"]) for row in student) / len(student)
    assert 0.65 < share < 0.72
    for name, data in (("teacher", teacher), ("student", student)):
        config = load_config(QUICKSTART / f"{name}_sft.yaml")
        assert len(data) == config.run.steps * config.rollout.prompts_per_step
        assert {len(row["response"]) for row in data} == {14}


def test_the_same_seed_writes_the_same_files(made, tmp_path):
    task.make(tmp_path, seed=7)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for name in names:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.parametrize("folder", ["teacher_init", "student_init"])
def test_the_tokenizer_gives_any_text_back_and_a_token_to_every_character_of_the_task(made, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / folder)
    for text in (
        "".join(map(chr, range(128))),
        "It 's $18.50 , isn 't it ?\r\n\n  Na\u00efve \u20ac5 \u2019",
        " a  b ",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    problem = "94580=9458=358=88=6$"
    ids = tokenizer.encode(problem)
    assert [tokenizer.decode([token]) for token in ids] == list(problem)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-1] not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == problem[:-1]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize(("folder", "layers", "width"), [("teacher_init", 3, 96), ("student_init", 2, 48)])
def test_the_models_load_and_their_rows_are_the_tokenizers(made, folder, layers, width):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made / folder)
    tokenizer = AutoTokenizer.from_pretrained(made / folder)
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", layers, width)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings >= 2048
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert str(model.dtype) == "torch.float32"


def test_making_the_models_leaves_the_callers_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    task.write_model(tmp_path, (1, 16), seed=3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["teacher_sft", "student_sft", "scope"])
def test_the_configs_load_and_pass_the_checks(name):
    config = load_config(QUICKSTART / f"{name}.yaml")
    check_config(config, world_size=1)
    check_config(config, world_size=4)
    assert config.train.precision == "float32"


def test_the_scope_config_samples_and_evaluates_at_temperature_one():
    config = load_config(QUICKSTART / "scope.yaml")
    check_config(config, command="evaluate")
    rollout, evaluate = config.rollout, config.evaluate
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert (evaluate.temperature, evaluate.top_p, evaluate.top_k) == (1.0, 1.0, -1)
    assert (config.run.steps, rollout.prompts_per_step, rollout.samples_per_prompt) == (120, 32, 8)
    assert rollout.max_new_tokens == evaluate.max_new_tokens == 22
    assert config.data.max_prompt_tokens + rollout.max_new_tokens <= task.MAX_POSITIONS


def test_each_config_starts_from_what_the_one_before_it_writes():
    scope, teacher, student = (
        load_config(QUICKSTART / f"{name}.yaml") for name in ("scope", "teacher_sft", "student_sft")
    )
    assert scope.teacher.hf == f"{teacher.run.output_dir}/hf"
    assert scope.student.hf == f"{student.run.output_dir}/hf"
    assert {Path(str(config.data.train)).parent for config in (scope, teacher, student)} == {
        Path(str(teacher.student.hf)).parent
    }


def test_every_method_takes_the_configs_steps_and_is_a_valid_config():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(QUICKSTART)
        study = importlib.import_module("study")
    configs = {name: load_config(QUICKSTART / "scope.yaml", list(o)) for name, o in study.METHODS.items()}
    for config in configs.values():
        check_config(config, world_size=1)
        assert (config.run.steps, config.optimizer.lr, config.rollout.prompts_per_step) == (120, 1e-3, 32)
        assert config.train.path_gradients_every == 10
    assert {
        name: config.objective.name.value for name, config in configs.items() if name in ("opd", "grpo")
    } == {
        "opd": "opd",
        "grpo": "grpo",
    }
    exact = {name for name, config in configs.items() if config.objective.divergence.value == "reverse_kl"}
    assert exact == {"reverse_kl"}
    exponents = {
        name: (config.objective.student_exponent, config.objective.teacher_exponent)
        for name, config in configs.items()
        if config.objective.name.value == "scope" and name != study.BASE
    }
    assert exponents == {
        "scope": (1, -1),
        "reverse_kl": (1, -1),
        "student_0": (0, -1),
        "student_reversed": (-1, -1),
        "teacher_0": (1, 0),
        "teacher_reversed": (1, 1),
        "both_0": (0, 0),
    }
