"""The split of a step's prompts that turns a gradient into its noise, and the coefficients under it."""

import numpy as np
import pytest

from megatron_scope.backend.update import prompt_contrast
from megatron_scope.records import ResponseCoefficients, ResponseTable


def table(group, update=None):
    group = np.array(group, dtype=np.int64)
    update = np.zeros_like(group) if update is None else np.array(update, dtype=np.int64)
    tokens = np.ones_like(group)
    return ResponseTable(group, update, np.zeros(len(group), dtype=bool), tokens, tokens)


def of_prompts(factors, group):
    """The one factor of each prompt."""
    group, found = np.array(group), {}
    for prompt in np.unique(group):
        (found[int(prompt)],) = set(factors[group == prompt].tolist())
    return found


def test_an_even_number_of_prompts_is_halved_into_plus_and_minus_one_whole_prompts():
    group = [0, 0, 2, 2, 2, 5, 7, 7]
    factors = of_prompts(prompt_contrast(table(group), seed=1, step=1), group)
    assert sorted(factors.values()) == [-1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 7, 32, 33])
def test_factors_add_up_to_0_and_their_squares_to_the_number_of_prompts(num_prompts):
    factors = prompt_contrast(table(range(num_prompts)), seed=1, step=1)
    assert factors.sum() == pytest.approx(0.0, abs=1e-12)
    assert (factors**2).sum() == pytest.approx(num_prompts, rel=1e-12)


@pytest.mark.parametrize("num_prompts", [2, 3, 4, 5])
def test_the_mean_over_all_splits_is_the_unbiased_variance_of_a_sum(num_prompts):
    gradients = np.random.default_rng(0).normal(3.0, 1.0, (num_prompts, 4))
    splits = {tuple(prompt_contrast(table(range(num_prompts)), seed=1, step=step)) for step in range(400)}
    assert len(splits) == {2: 2, 3: 3, 4: 6, 5: 10}[num_prompts]
    squares = [np.sum((np.array(split) @ gradients) ** 2) for split in splits]
    assert np.mean(squares) == pytest.approx(num_prompts * gradients.var(axis=0, ddof=1).sum(), rel=1e-12)


def test_a_single_prompt_has_no_halves():
    assert not prompt_contrast(table([4, 4, 4]), seed=1, step=1).any()


def test_prompts_of_later_updates_have_no_part_in_it():
    factors = prompt_contrast(table([0, 0, 1, 2, 3, 4], update=[0, 0, 0, 1, 1, 1]), seed=1, step=1)
    assert factors[3:].tolist() == [0.0, 0.0, 0.0]
    assert sorted(factors[1:3]) == [-1.0, 1.0]


def test_the_split_is_told_by_seed_step_and_prompts_alone():
    group = [0, 1, 1, 2, 3, 4, 5, 6, 7]
    other = [7, 6, 6, 6, 5, 4, 3, 2, 1, 0]
    factors = prompt_contrast(table(group), seed=1, step=1)
    assert of_prompts(factors, group) == of_prompts(prompt_contrast(table(other), seed=1, step=1), other)
    for seed, step in ((2, 1), (1, 2)):
        assert prompt_contrast(table(group), seed=seed, step=step).tolist() != factors.tolist()


def test_every_coefficient_of_a_response_is_multiplied():
    coefficients = ResponseCoefficients(*(np.array([1.0, 2.0, 3.0]) * scale for scale in (1, 2, 3, 4)))
    found = coefficients.times(np.array([1.0, -1.0, 0.0]))
    assert found.likelihood.tolist() == [1.0, -2.0, 0.0]
    assert found.distill.tolist() == [2.0, -4.0, 0.0]
    assert found.advantage.tolist() == [3.0, -6.0, 0.0]
    assert found.reference_kl.tolist() == [4.0, -8.0, 0.0]
