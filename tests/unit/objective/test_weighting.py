"""`path_weights` against Eq. 4 and 5 of arXiv:2604.10688, written out here in plain Python."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_scope.objective.weighting import path_weights

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=80)
NAN = math.nan


@dataclass(frozen=True)
class Step:
    """The responses of a step, in float64."""

    correct: list[bool]
    group: list[int]
    student: list[float]
    teacher: list[float]

    def set_of(self, index):
        """The members of a response's set: same prompt, same verdict."""
        key = (self.group[index], self.correct[index])
        return [j for j in range(len(self.group)) if (self.group[j], self.correct[j]) == key]

    def scored(self, index):
        return self.student[index] if self.correct[index] else self.teacher[index]

    def with_scored(self, index, value):
        """The same step with another value where the weight of `index` looks."""
        name = "student" if self.correct[index] else "teacher"
        values = list(getattr(self, name))
        values[index] = value
        return replace(self, **{name: values})

    def weights(self, **settings):
        return path_weights(
            torch.tensor(self.correct, dtype=torch.bool),
            torch.tensor(self.group, dtype=torch.int64),
            torch.tensor(self.student, dtype=torch.float64),
            torch.tensor(self.teacher, dtype=torch.float64),
            **settings,
        ).tolist()


def oracle(step, *, tau=1.0, student_exponent=1.0, teacher_exponent=-1.0, scale="sum_to_one"):
    """w_i = PPL_i^(e / tau) / sum over the set of PPL_j^(e / tau), PPL = exp(-mean log-prob)."""
    weights = []
    for i in range(len(step.group)):
        power = (student_exponent if step.correct[i] else teacher_exponent) / tau
        members = step.set_of(i)
        total = math.fsum(math.exp(-step.scored(j)) ** power for j in members)
        weight = math.exp(-step.scored(i)) ** power / total
        weights.append(weight * len(members) if scale == "mean_one" else weight)
    return weights


def close(rel=1e-11):
    return lambda values: pytest.approx(values, rel=rel, abs=1e-300)


logprobs = st.floats(-8.0, 0.0)
group_ids = st.sampled_from([-(2**63), -7, 0, 3, 2**40, 2**63 - 1])


@st.composite
def steps(draw, min_size=0):
    size = draw(st.integers(min_size, 12))
    columns = [
        draw(st.lists(values, min_size=size, max_size=size))
        for values in (st.booleans(), group_ids, logprobs, logprobs)
    ]
    return Step(*columns)


@st.composite
def steps_with_a_chosen_member(draw):
    """A step and a response that shares its set with another one."""
    step = draw(steps(min_size=2))
    candidates = [i for i in range(len(step.group)) if len(step.set_of(i)) > 1]
    assume(candidates)
    return step, draw(st.sampled_from(candidates))


MIXED = Step(
    correct=[True, False, True, False, True, False],
    group=[5, 5, 5, 5, 9, 5],
    student=[-0.2, NAN, -1.5, NAN, -0.7, NAN],
    teacher=[NAN, -0.4, NAN, -2.0, NAN, -1.1],
)


# ---- the numbers


@REPEATABLE
@given(
    steps(),
    st.floats(0.3, 8.0),
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
    st.sampled_from(["sum_to_one", "mean_one"]),
)
def test_weights_are_those_of_the_equations(step, tau, student_exponent, teacher_exponent, scale):
    settings = {
        "tau": tau,
        "student_exponent": student_exponent,
        "teacher_exponent": teacher_exponent,
        "scale": scale,
    }
    assert step.weights(**settings) == close()(oracle(step, **settings))


def test_a_worked_example_in_perplexities():
    # PPL_S 2 and 6 of the correct ones, PPL_T 2 and 6 of the incorrect ones.
    low, high = -math.log(2), -math.log(6)
    step = Step([True, True, False, False], [0] * 4, [low, high, NAN, NAN], [NAN, NAN, low, high])
    assert step.weights() == pytest.approx([0.25, 0.75, 0.75, 0.25], rel=1e-14)
    assert step.weights(tau=0.5) == pytest.approx([0.1, 0.9, 0.9, 0.1], rel=1e-14)
    assert step.weights(scale="mean_one") == pytest.approx([0.5, 1.5, 1.5, 0.5], rel=1e-14)


def test_the_defaults_are_those_of_the_paper():
    assert MIXED.weights() == close()(oracle(MIXED, tau=1.0, student_exponent=1.0, teacher_exponent=-1.0))
    assert MIXED.weights() == MIXED.weights(
        tau=1.0, student_exponent=1.0, teacher_exponent=-1.0, scale="sum_to_one"
    )


@pytest.mark.parametrize("exponent", [0.1, 1 / 3, 1.1])
def test_an_exponent_keeps_its_double_precision(exponent):
    """PPLs far apart multiply any rounding of the exponent."""
    step = Step([True, True, False, False], [0] * 4, [-90.0, -60.0, NAN, NAN], [NAN, NAN, -60.0, -90.0])
    settings = {"student_exponent": exponent, "teacher_exponent": -exponent}
    assert step.weights(**settings) == close(1e-12)(oracle(step, **settings))


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ({"student_exponent": 0.0}, [0.5, 0.75, 0.5, 0.25]),
        ({"teacher_exponent": 0.0}, [0.25, 0.5, 0.75, 0.5]),
        ({"student_exponent": 0.0, "teacher_exponent": 0.0}, [0.5, 0.5, 0.5, 0.5]),
        ({"student_exponent": -1.0}, [0.75, 0.75, 0.25, 0.25]),
        ({"teacher_exponent": 1.0}, [0.25, 0.25, 0.75, 0.75]),
    ],
)
def test_each_ablation_is_one_exponent(exponents, expected):
    low, high = -math.log(2), -math.log(6)
    step = Step([True, False, True, False], [0] * 4, [low, NAN, high, NAN], [NAN, low, NAN, high])
    assert step.weights(**exponents) == pytest.approx(expected, rel=1e-14)


# ---- monotonicity and invariance


@REPEATABLE
@given(steps_with_a_chosen_member(), st.floats(0.01, 3.0), st.floats(0.5, 4.0))
def test_a_higher_student_ppl_raises_and_a_higher_teacher_ppl_lowers_the_weight(chosen, rise, tau):
    step, index = chosen
    before = step.weights(tau=tau)
    after = step.with_scored(index, step.scored(index) - rise).weights(tau=tau)
    members = step.set_of(index)
    direction = 1 if step.correct[index] else -1
    for j in range(len(before)):
        if j == index:
            assert direction * (after[j] - before[j]) > 0
        elif j in members:
            assert direction * (after[j] - before[j]) < 0
        else:
            assert after[j] == before[j]


@REPEATABLE
@given(steps_with_a_chosen_member(), st.floats(0.01, 3.0))
def test_reversed_exponents_reverse_the_direction(chosen, rise):
    step, index = chosen
    reversed_exponents = {"student_exponent": -1.0, "teacher_exponent": 1.0}
    before = step.weights(**reversed_exponents)
    after = step.with_scored(index, step.scored(index) - rise).weights(**reversed_exponents)
    assert (after[index] < before[index]) if step.correct[index] else (after[index] > before[index])


@REPEATABLE
@given(steps(min_size=1))
def test_weights_become_uniform_as_tau_grows(step):
    expected = [1 / len(step.set_of(i)) for i in range(len(step.group))]
    assert step.weights(tau=1e13) == pytest.approx(expected, rel=1e-11)


@REPEATABLE
@given(steps(min_size=1))
def test_a_small_tau_leaves_only_the_extreme_member(step):
    weights = step.weights(tau=1e-300)
    for i, weight in enumerate(weights):
        members = [step.scored(j) for j in step.set_of(i)]
        winner = min(members) if step.correct[i] else max(members)
        assert weight == (1 / members.count(winner) if step.scored(i) == winner else 0.0)


@REPEATABLE
@given(steps_with_a_chosen_member(), st.floats(-50.0, 50.0))
def test_a_constant_added_to_a_sets_logprobs_changes_nothing(chosen, constant):
    step, index = chosen
    shifted = step
    for j in step.set_of(index):
        shifted = shifted.with_scored(j, step.scored(j) + constant)
    assert shifted.weights() == close(1e-9)(step.weights())


@REPEATABLE
@given(steps(), st.sampled_from(["sum_to_one", "mean_one"]), st.floats(0.05, 10.0))
def test_every_set_sums_to_one_or_to_its_size(step, scale, tau):
    weights = step.weights(scale=scale, tau=tau)
    for i in range(len(weights)):
        members = step.set_of(i)
        expected = 1.0 if scale == "sum_to_one" else len(members)
        assert math.fsum(weights[j] for j in members) == pytest.approx(expected, rel=1e-12)


@REPEATABLE
@given(steps(), st.randoms(use_true_random=False))
def test_reordering_the_responses_reorders_the_weights(step, random):
    order = list(range(len(step.group)))
    random.shuffle(order)
    columns = (step.correct, step.group, step.student, step.teacher)
    reordered = Step(*([column[i] for i in order] for column in columns))
    assert reordered.weights() == close(1e-12)([step.weights()[i] for i in order])


@REPEATABLE
@given(steps(), st.permutations([-(2**62), -1, 0, 17, 2**33, 2**62]))
def test_only_the_equality_of_group_ids_counts(step, names):
    renamed = dict(zip([-(2**63), -7, 0, 3, 2**40, 2**63 - 1], names, strict=True))
    other = replace(step, group=[renamed[g] for g in step.group])
    assert other.weights() == close(1e-13)(step.weights())


@REPEATABLE
@given(steps(min_size=1))
def test_a_prompts_weights_do_not_depend_on_other_prompts(step):
    alone = [i for i, g in enumerate(step.group) if g == step.group[0]]
    columns = (step.correct, step.group, step.student, step.teacher)
    part = Step(*([column[i] for i in alone] for column in columns))
    assert part.weights() == close(1e-13)([step.weights()[i] for i in alone])


@REPEATABLE
@given(steps(), st.sampled_from([NAN, math.inf, -math.inf, 1e308]))
def test_entries_that_the_contract_ignores_may_hold_anything(step, junk):
    student = [value if ok else junk for value, ok in zip(step.student, step.correct, strict=True)]
    teacher = [junk if ok else value for value, ok in zip(step.teacher, step.correct, strict=True)]
    assert replace(step, student=student, teacher=teacher).weights() == step.weights()


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("scale", ["sum_to_one", "mean_one"])
@pytest.mark.parametrize("logprob", [0.0, -1e4, -1e300])
def test_a_set_of_one_has_weight_one(correct, scale, logprob):
    assert Step([correct], [4], [logprob], [logprob]).weights(scale=scale) == [1.0]


# ---- extremes, types


@pytest.mark.parametrize("tau", [5e-324, 1e-308, 1e-30, 1.0, 1e30, 1.7e308])
@pytest.mark.parametrize("exponent", [1.0, -1.0, 0.0, 1e39, -1e300])
def test_extreme_logprobs_tau_and_exponents_stay_finite(tau, exponent):
    step = Step([True] * 3 + [False] * 3, [1] * 6, [0.0, -1e4, -5.0] * 2, [-1e4, -2e4, -1e4] * 2)
    weights = step.weights(tau=tau, student_exponent=exponent, teacher_exponent=exponent)
    assert all(0.0 <= weight <= 1.0 for weight in weights)
    assert math.fsum(weights[:3]) == pytest.approx(1.0) and math.fsum(weights[3:]) == pytest.approx(1.0)


@pytest.mark.parametrize("exponent", [0.0, -0.0])
@pytest.mark.parametrize("tau", [5e-324, 1.0, 1e300])
def test_exponent_zero_is_uniform_whatever_the_logprobs(exponent, tau):
    step = Step([True] * 4, [1] * 4, [0.0, -1e4, -1e300, -7.0], [NAN] * 4)
    assert step.weights(tau=tau, student_exponent=exponent) == [0.25] * 4


def test_float32_logprobs_are_weighted_in_double_precision():
    """At -1e4 the spacing of float32 is 1e-3: float32 arithmetic would lose the differences over tau."""
    student = torch.tensor([-1e4, -1e4 + 0.25, -9999.0, -3.0], dtype=torch.float32)
    correct, group = torch.tensor([True] * 3 + [False]), torch.zeros(4, dtype=torch.int64)
    weights = path_weights(correct, group, student, student, tau=0.05)
    step = Step([True] * 3, [0] * 3, [v + 1e4 for v in student[:3].tolist()], [NAN] * 3)
    assert weights.dtype == torch.float32
    assert weights.tolist()[:3] == pytest.approx(oracle(step, tau=0.05), rel=1e-6)
    assert weights[3] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_the_result_is_rounded_to_the_dtype_of_the_logprobs(dtype):
    generator = torch.Generator().manual_seed(0)
    logprobs = (-4 * torch.rand(40, generator=generator)).to(dtype)
    correct, group = torch.arange(40) % 3 > 0, torch.arange(40) % 4
    exact = path_weights(correct, group, logprobs.double(), logprobs.double(), tau=0.7)
    assert torch.equal(path_weights(correct, group, logprobs, logprobs, tau=0.7), exact.to(dtype))


@pytest.mark.parametrize(
    ("student", "teacher", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_weights_have_the_dtype_of_the_logprobs(student, teacher, result):
    correct, group = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.int64)
    weights = path_weights(correct, group, torch.zeros(3, dtype=student), torch.zeros(3, dtype=teacher))
    assert weights.dtype == result and weights.tolist() == [0.5, 0.5, 1.0]


def test_no_gradient_flows_and_no_input_changes():
    correct, group = torch.tensor([True, True, False, False]), torch.tensor([1, 1, 1, 1])
    student = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    teacher = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    weights = path_weights(correct, group, student, teacher)
    assert not weights.requires_grad
    assert student.tolist() == teacher.tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert correct.tolist() == [True, True, False, False] and group.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_group_ids_of_any_integer_type_are_taken(dtype):
    correct = torch.tensor([True, True, True])
    weights = path_weights(correct, torch.tensor([1, 0, 1], dtype=dtype), torch.zeros(3), torch.zeros(3))
    assert weights.tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("scale", ["sum_to_one", "mean_one"])
def test_no_response_gives_no_weight(scale):
    weights = path_weights(
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        torch.zeros(0),
        scale=scale,
    )
    assert weights.shape == (0,) and weights.dtype == torch.float32


# ---- errors


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (2, "student_mean_logprob[2] is {} for a response that is correct; expected a finite number"),
        (3, "teacher_mean_logprob[3] is {} for a response that is incorrect; expected a finite number"),
    ],
)
def test_a_needed_logprob_that_is_not_finite_is_refused(bad, index, expected):
    with pytest.raises(ValueError) as raised:
        MIXED.with_scored(index, bad).weights()
    assert str(raised.value) == expected.format(bad)


def test_of_several_bad_logprobs_the_first_is_named():
    with pytest.raises(ValueError, match=r"^teacher_mean_logprob\[1\] is nan"):
        MIXED.with_scored(1, NAN).with_scored(4, NAN).weights()


@pytest.mark.parametrize("tau", [0.0, -0.0, -1.0, NAN, math.inf, -math.inf])
def test_a_tau_that_is_not_finite_and_positive_is_refused(tau):
    with pytest.raises(ValueError) as raised:
        MIXED.weights(tau=tau)
    assert str(raised.value) == f"tau is {tau}; expected a finite positive number"


@pytest.mark.parametrize("name", ["student_exponent", "teacher_exponent"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_an_exponent_that_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError) as raised:
        MIXED.weights(**{name: value})
    assert str(raised.value) == f"{name} is {value}; expected a finite number"


@pytest.mark.parametrize("scale", ["sum", "mean", "", None])
def test_an_unknown_scale_is_refused(scale):
    with pytest.raises(ValueError) as raised:
        MIXED.weights(scale=scale)
    assert str(raised.value) == f'scale is {scale!r}; expected "sum_to_one" or "mean_one"'


ARGUMENTS = {
    "correct": torch.tensor([True, False]),
    "group": torch.tensor([0, 0]),
    "student_mean_logprob": torch.zeros(2),
    "teacher_mean_logprob": torch.zeros(2),
}


@pytest.mark.parametrize("name", list(ARGUMENTS))
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_a_shape_that_differs_is_refused_and_all_shapes_are_told(name, shape):
    arguments = {**ARGUMENTS, name: torch.zeros(shape, dtype=ARGUMENTS[name].dtype)}
    with pytest.raises(ValueError) as raised:
        path_weights(**arguments)
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in arguments.items())
    assert str(raised.value) == f"got shapes {shown}; expected one [N] for all"


def test_matrices_are_refused_though_their_shapes_agree():
    with pytest.raises(ValueError, match="expected one \\[N\\] for all"):
        path_weights(**{name: value.reshape(1, 2) for name, value in ARGUMENTS.items()})


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("correct", torch.int64, "correct has dtype torch.int64; expected torch.bool"),
        ("correct", torch.float32, "correct has dtype torch.float32; expected torch.bool"),
        ("group", torch.float32, "group has dtype torch.float32; expected integer ids"),
        ("group", torch.bool, "group has dtype torch.bool; expected integer ids"),
        (
            "student_mean_logprob",
            torch.int64,
            "student_mean_logprob has dtype torch.int64; expected a floating-point tensor",
        ),
        (
            "teacher_mean_logprob",
            torch.bool,
            "teacher_mean_logprob has dtype torch.bool; expected a floating-point tensor",
        ),
    ],
)
def test_a_wrong_dtype_is_refused(name, dtype, expected):
    with pytest.raises(ValueError) as raised:
        path_weights(**{**ARGUMENTS, name: ARGUMENTS[name].to(dtype)})
    assert str(raised.value) == expected
