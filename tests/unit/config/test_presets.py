"""What objective.name and objective.preset imply, and that a stated setting always wins."""

import dataclasses

import pytest

from megatron_scope.config import load_config, parse_config, write_config
from megatron_scope.config.needs import (
    draws_responses,
    needs_old_logprobs,
    needs_reference,
    needs_teacher,
)
from megatron_scope.config.schema import ObjectiveConfig


def objective(temperature=0.6, **settings):
    return parse_config({"objective": settings, "rollout": {"temperature": temperature}}, "test").objective


def differences(config):
    default = ObjectiveConfig(name=config.name, preset=config.preset)
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }


@pytest.mark.parametrize(
    ("settings", "implied"),
    [
        ({}, {}),
        ({"name": "opd"}, {}),
        ({"name": "sft"}, {"aggregation": "token_mean"}),
        ({"name": "kd"}, {"aggregation": "token_mean"}),
        ({"name": "grpo"}, {"aggregation": "token_mean", "ratio_clip": 0.2, "kl_coefficient": 1e-4}),
        (
            {"preset": "official"},
            {
                "student_exponent": -1.0,
                "weight_scale": "mean_one",
                "correct_path": "log_likelihood",
                "aggregation": "token_mean",
                "student_temperature": 0.6,
            },
        ),
    ],
)
def test_implied_values(settings, implied):
    assert differences(objective(**settings)) == implied


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"name": "grpo", "ratio_clip": None}, "ratio_clip", None),
        ({"name": "grpo", "kl_coefficient": 0}, "kl_coefficient", 0.0),
        ({"preset": "official", "student_exponent": 1.0}, "student_exponent", 1.0),
        ({"preset": "official", "student_temperature": 1.0}, "student_temperature", 1.0),
        ({"preset": "official", "aggregation": "sequence_sum"}, "aggregation", "sequence_sum"),
    ],
)
def test_a_stated_setting_wins(settings, key, value):
    config = objective(**settings)
    assert getattr(config, key) == value
    others = differences(config).keys() - {key}
    without = {name: value for name, value in settings.items() if name != key}
    assert others == differences(objective(**without)).keys() - {key}


def test_an_override_is_stated_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("objective: {preset: official}\nrollout: {temperature: 0.8}\n")
    config = load_config(path, ["objective.weight_scale=sum_to_one", "rollout.temperature=0.7"])
    assert config.objective.weight_scale == "sum_to_one"
    assert config.objective.student_temperature == 0.7


@pytest.mark.parametrize("settings", [{"preset": "official"}, {"name": "grpo", "ratio_clip": None}])
def test_a_written_config_reads_back_the_same(tmp_path, settings):
    config = parse_config({"objective": settings, "rollout": {"temperature": 0.6}}, "test")
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    warmer = load_config(tmp_path / "resolved.yaml", ["rollout.temperature=1.0"])
    assert warmer.objective == config.objective  # resolved once, it stays


@pytest.mark.parametrize(
    ("name", "drawn", "teacher", "reference"),
    [
        ("scope", True, True, False),
        ("opd", True, True, False),
        ("grpo", True, False, True),
        ("sft", False, False, False),
        ("kd", False, False, False),
    ],
)
def test_what_an_objective_needs(name, drawn, teacher, reference):
    config = parse_config({"objective": {"name": name}}, "test")
    assert (draws_responses(config), needs_teacher(config), needs_reference(config)) == (
        drawn,
        teacher,
        reference,
    )
    assert not needs_old_logprobs(config)
    twice = parse_config({"objective": {"name": name}, "train": {"updates_per_batch": 2}}, "test")
    assert needs_old_logprobs(twice) == drawn


def test_grpo_without_its_kl_needs_no_third_model():
    assert not needs_reference(parse_config({"objective": {"name": "grpo", "kl_coefficient": 0}}, "test"))
