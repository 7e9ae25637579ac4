"""The evaluator around its stages: what it shows, what it writes, and what it refuses before sampling."""

import dataclasses
import json

import pytest

from megatron_scope import evaluator
from megatron_scope.config import parse_config
from megatron_scope.data.prompts import example_drawer
from megatron_scope.data.tokenizer import load_tokenizer
from megatron_scope.errors import ConfigError
from megatron_scope.evaluate.diversity import diversity
from megatron_scope.evaluator import EvaluateOptions, evaluate
from megatron_scope.records import JudgedRollout, Rollout, Verdict
from tests.helpers.models import save_qwen2

# Texts of the samples of a problem; the reply to sample s is the s-th.
TEXTS = ("1+2=3$", "2+1=3$", "12=3$", "3$", "4$", "5$", "6$", "7$")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_qwen2(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def problems(tmp_path):
    def write(name, count=3):
        path = tmp_path / name
        rows = [{"id": str(i), "prompt": f"{i}+2=", "answer": "3", "task": "math"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def config(model):
    def make(**settings):
        settings = {"max_new_tokens": 8, "bootstrap_resamples": 20, "diversity_responses": 2, **settings}
        return parse_config(
            {
                "student": {"hf": str(model)},
                "rollout": {"engine": "embedded"},
                "data": {"prompt_template": "{prompt}"},
                "evaluate": settings,
            },
            "test",
        )

    return make


@pytest.fixture(autouse=True)
def service(monkeypatch, model):
    """A service that answers sample s with TEXTS[s]; the first four are correct."""
    tokenizer = load_tokenizer(str(model))

    class Service:
        num_requests = 0

        def __init__(self, *_):
            pass

        async def publish(self, *_):
            pass

        async def sample(self, requests, params, version):
            Service.num_requests += len(requests)
            return [self._reply(request, version) for request in requests]

        def _reply(self, request, version):
            text = TEXTS[request.sample]
            ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
            finish = "stop" if request.sample % 4 else "length"
            rollout = Rollout(request.prompt, request.sample, ids, text, (-1.0,) * len(ids), finish, version)
            return JudgedRollout(rollout, Verdict(text.endswith("3$"), text[-2]))

        async def close(self):
            pass

    monkeypatch.setattr(evaluator, "RolloutService", Service)
    return Service


def read(path):
    return json.loads(path.read_text())


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is shown


def test_the_table_fits_120_columns_with_the_default_ks(config, problems, monkeypatch, capsys):
    monkeypatch.setattr(f"{__name__}.TEXTS", ("1=3$",) * 32)  # the widest numbers: 100.0
    names = (problems("competition.jsonl"), problems("other.jsonl"))
    evaluate(config(diversity_responses=4), EvaluateOptions(names, 32, (1, 8, 32)))
    lines = capsys.readouterr().out.splitlines()
    shown = "\n".join(lines)
    titles = ("problems", "avg@32", "pass@1", "pass@8", "pass@32", "distinct-2", "self-BLEU")
    for word in ("competition", "other", "mean", "100.0 to 100.0", *titles):
        assert word in shown
    assert "…" not in shown
    assert max(len(line) for line in lines[1:]) <= 120


def test_diversity_that_no_problem_has_is_a_dash_in_the_table_and_null_in_the_file(
    config, problems, tmp_path, capsys
):
    options = EvaluateOptions((problems("a.jsonl"),), 1, (1,), output=str(tmp_path / "out.json"))
    evaluate(config(), options)
    assert "nan" not in capsys.readouterr().out
    (benchmark,) = read(tmp_path / "out.json")["benchmarks"].values()
    assert benchmark["diversity"] == {
        "num_problems": 0,
        "num_responses": 2,
        "distinct_responses": None,
        "distinct_n": {"1": None, "2": None, "3": None, "4": None},
        "self_bleu": None,
    }


# ---- what is written


def test_the_file_has_the_diversity_of_the_correct_responses_as_the_settings_bound_it(
    config, problems, tmp_path
):
    options = EvaluateOptions((problems("a.jsonl"),), 8, (1,), output=str(tmp_path / "out.json"))
    evaluate(config(diversity_responses=3, diversity_tokens=4), options)
    (benchmark,) = read(tmp_path / "out.json")["benchmarks"].values()
    expected = diversity([list(TEXTS[:4])] * 3, num_responses=3, max_tokens=4)
    assert expected.num_problems == 3
    assert expected != diversity([list(TEXTS[:4])] * 3, num_responses=3, max_tokens=5)
    assert benchmark["diversity"] == json.loads(json.dumps(dataclasses.asdict(expected)))


def test_the_file_counts_what_was_cut_short_and_what_was_right(config, problems, tmp_path):
    options = EvaluateOptions((problems("a.jsonl", 2),), 8, (1, 8), output=str(tmp_path / "new/out.json"))
    evaluate(config(), options)
    (benchmark,) = read(tmp_path / "new/out.json")["benchmarks"].values()
    assert benchmark["num_correct"] == {"0": 4, "1": 4}
    assert benchmark["num_truncated"] == 2 * 2
    assert (benchmark["num_aborted"], benchmark["num_verify_errors"]) == (0, 0)
    assert (benchmark["avg@8"]["value"], benchmark["pass@8"]["value"]) == (0.5, 1.0)


def test_the_responses_serve_as_training_data_of_kd(config, problems, tmp_path, model):
    responses = tmp_path / "responses.jsonl"
    evaluate(config(), EvaluateOptions((problems("a.jsonl"),), 4, (1,), responses=str(responses)))
    rows = read_rows(responses)
    assert [row["response"] for row in rows] == list(TEXTS[:4]) * 3
    data = dataclasses.replace(config().data, train=str(responses), shuffle=False)
    tokenizer = load_tokenizer(str(model))
    examples = example_drawer(data, tokenizer, (), seed=0).draw(12)
    assert [tokenizer.decode(example.output_ids) for example in examples] == list(TEXTS[:4]) * 3
    assert tokenizer.decode(examples[4].prompt.token_ids) == "1+2="
    assert len({example.prompt.id for example in examples}) == 12


# ---- what is refused


def test_output_that_cannot_be_written_is_refused_before_sampling(config, problems, tmp_path, service):
    name, file = problems("a.jsonl"), str(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"^--responses is .*, a folder; expected the name of a file"):
        evaluate(config(), EvaluateOptions((name,), 1, (1,), responses=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^--output and --responses are both .*x\.json; give two files"):
        evaluate(config(), EvaluateOptions((name,), 1, (1,), output=file, responses=file))
    assert service.num_requests == 0


def test_more_tokens_than_the_model_has_positions_are_refused_before_sampling(config, problems, service):
    with pytest.raises(ConfigError, match=r"make 1004 tokens, but the model has 256 positions"):
        evaluate(config(max_new_tokens=1000), EvaluateOptions((problems("a.jsonl"),), 1, (1,)))
    assert service.num_requests == 0
