import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.records import Verdict
from megatron_scope.verify import math_answer
from megatron_scope.verify.exact import compare, normalised
from megatron_scope.verify.math_answer import MAX_ANSWER_CHARS, judge_at_once, judge_with_library, verify_math

INTEGERS = st.integers(-(10**12), 10**12)
SETTINGS = settings(derandomize=True, deadline=None)
DENOMINATORS = st.integers(2, 10**6)
PIECES = r"1 2 12 x \pi , ( ) - + = ^ _ \frac { } $ . % \, \text{m} m \left \right"
EQUAL_ANSWERS = r"""
72 | 72.0
1234 | 1,234
1234 | 1\,234
1234567 | 1{,}234{,}567
0.5 | .5
\frac{1}{2} | 0.5
\frac{1}{2} | \dfrac 12
-\frac{1}{2} | \frac{-1}{2}
3.5 | 3\frac{1}{2}
3.5 | 3 1/2
\frac{1}{3} | 0.\overline{3}
\frac{1}{3} | 0.333333
3e8 | 3 \times 10^8
2.55e-10 | 2.55 \cdot 10^{-10}
1e-7 | \frac{1}{10^7}
50\% | 50%
50 | 50\%
0.5 | 50\%
17.5% | 17.5
17.5% | 0.175
5 | 5 \text{ cm}
5 | 5\,\mathrm{cm}^2
5 | 5 cm
5 | 5 apples
90^\circ | 90
90 | 90^{\circ}
90 | 90 \text{ degrees}
18 | \$18
18 | $18$.
5 | x = 5
x = 5 | 5
5 | 2 + 3 = 5
y = \sin x | \sin x
\text{Evelyn} | Evelyn
\text{(C)} | C
Yes | yes
True | Yes
even | Even
\sqrt{2}-1$,$\frac{1}{7} | \frac{1}{7}, \sqrt2-1
5,15 | 15 and 5
3 \pm 2 \sqrt{2} | 3+2\sqrt{2}, 3-2\sqrt{2}
(1,2) | \left( 1, 2 \right)
\frac{3-\sqrt3}{6} | \frac12-\frac{\sqrt 3}{6}
x^2-1 | (x+1)(x-1)
4343_6 | 4343_{6}
\begin{pmatrix} -2 \\ 1 \end{pmatrix} | \begin{bmatrix} -2 \\ 1 \end{bmatrix}
10^{-20} | \frac{1}{10^{20}}
\frac{\pi}{10^{20}} | \pi \cdot 10^{-20}
"""

DIFFERENT_ANSWERS = r"""
6 | -6
12 | 1 2
3 | 1 2
0 | 1 000
6 | 5 or 6
2 | 1, 2
100200 | 100, 200
0 | 0.\overline{3}
\frac{1}{3} | 0.33
15.5 | 3 1/2
1.5 | 3\frac{1}{2}
5 | 5!
2.55e-10 | 7e-12
10^{-20} | 10^{-30}
\sqrt{2} \cdot 10^{-20} | \sqrt{2} \cdot 10^{-21}
1e-9 | 0
10^{20} | 10^{20}+1
3.14 | \pi
3 | 3t
3t | 3
2 | 2 xy
2 xy | 2
5 | 5 \text{ million}
5 \text{ cm} | 5 \text{ m}
6 \text{ hours} | 6 minutes
4343_6 | 4343_7
(1,2) | (2,1)
[1,2] | (1,2)
[0,1) | [0,1]
\infty | -\infty
x > 5 | x \ge 5
x = 5 | y = 5
C | D
Yes | No
Debra | Bread
infinity | 7
y' | y
\gcd(m, n) | 1
\gcd(m, n) = 1 | \gcd(m, n) = 5
1:2:3 | \frac{1}{6}
\aleph_0 | \aleph_1
x | x + 10^{-30}
"""


def boxed(answer: str) -> str:
    return rf"Hence the result is $\boxed{{{answer}}}$."


def pairs(table: str) -> list[tuple[str, ...]]:
    """Lines "ground truth | given answer"."""
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize("response", ["9458=358=88=6", "9458=358=88=6$", "9458=358=88=6 $", "9458=358=88=06"])
def test_quickstart_chain_is_judged_by_its_last_side(response):
    assert verify_math(response, "6").correct
    assert not verify_math(response, "8").correct
    assert not verify_math(response, "88").correct


@pytest.mark.parametrize(("answer", "given_answer"), pairs(EQUAL_ANSWERS))
def test_equal_answers(answer, given_answer):
    assert verify_math(boxed(given_answer), answer) == Verdict(True, given_answer)


@pytest.mark.parametrize(("answer", "given_answer"), pairs(DIFFERENT_ANSWERS))
def test_different_answers(answer, given_answer):
    assert verify_math(boxed(given_answer), answer) == Verdict(False, given_answer)


def test_a_typographic_minus_is_a_minus():
    assert verify_math(boxed("\N{MINUS SIGN}3"), "-3").correct
    assert not verify_math(boxed("\N{MINUS SIGN}3"), "3").correct


@pytest.mark.parametrize("response", ["", "  \n", "I do not know.", "$"])
def test_a_response_without_answer_is_incorrect_and_no_error(response):
    assert verify_math(response, "5") == Verdict(False, None, None)


@settings(SETTINGS)
@given(INTEGERS, INTEGERS)
def test_two_different_integers_are_never_equal(a, b):
    for wrong in {a, b, -a, a + 1, a * 10}:
        assert verify_math(boxed(str(wrong)), str(a)).correct == (wrong == a)
        assert judge_at_once(f"{wrong:,}", str(a)) == Verdict(wrong == a, f"{wrong:,}")


@settings(SETTINGS, max_examples=40)
@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_two_different_integers_are_never_equal_to_the_library_either(a, b):
    assert judge_with_library(str(b), str(a)).correct == (a == b)


@settings(SETTINGS, max_examples=40)
@given(INTEGERS, st.integers(-(10**6), 10**6))
def test_an_integer_equals_its_rewrites(value, part):
    rewrites = [
        f"{value}",
        f"{value}.",
        f"{value}.0",
        f"{value:,}",
        f"${value}$",
        f"\\left({value}\\right)",
        f"+{value}",
    ]
    rewrites += [
        f" {value} \\text{{ km}}",
        f"x = {value}",
        f"{part} + {value - part} = {value}",
        f"{part} + {value - part}",
    ]
    for rewrite in rewrites if value >= 0 else rewrites[:6]:
        verdict = verify_math(rf"\boxed{{{rewrite}}}", str(value))
        assert verdict.correct and verdict.error is None, rewrite


@settings(SETTINGS, max_examples=40)
@given(st.integers(-(10**6), 10**6), DENOMINATORS, st.integers(2, 9))
def test_a_fraction_equals_its_rewrites_and_no_other(numerator, denominator, factor):
    value = Fraction(numerator, denominator)
    sign = "-" if numerator < 0 else ""
    size = abs(numerator)
    rewrites = [f"{numerator}/{denominator}", f"{sign}\\dfrac{{{size}}}{{{denominator}}}"]
    rewrites += [
        f"\\frac{{{numerator * factor}}}{{{denominator * factor}}}",
        f"${sign}\\frac {{{size}}} {{{denominator}}}$",
    ]
    gold = f"\\frac{{{numerator}}}{{{denominator}}}"
    for rewrite in rewrites:
        assert verify_math(boxed(rewrite), gold).correct, rewrite
        for other in (value + Fraction(1, denominator), 1 / value if value else value + 1):
            assert verify_math(boxed(rewrite), f"{other.numerator}/{other.denominator}").correct == (
                other == value
            )


@settings(SETTINGS)
@given(st.decimals(-(10**6), 10**6, places=4), st.decimals(-(10**6), 10**6, places=4))
def test_different_short_decimals_are_never_equal(a, b):
    assert compare(f"{a}", f"{b}").equal is (a == b)
    assert compare(f"{a}e-12", f"{b}e-12").equal is (a == b)


@settings(SETTINGS)
@given(st.lists(st.sampled_from([" ", ", ", *PIECES.split()]), max_size=8))
def test_normalising_is_idempotent_and_keeps_what_separates_numbers(parts):
    text = "".join(parts)
    once = normalised(text)
    assert normalised(normalised(once)) == normalised(once)
    numbers = [run for run in "".join(c if c.isdigit() else " " for c in text).split()]
    kept = [run for run in "".join(c if c.isdigit() else " " for c in once).split()]
    assert "".join(numbers) == "".join(kept)


@settings(SETTINGS)
@given(st.lists(st.integers(0, 999), min_size=2, max_size=4), st.sampled_from([" ", ", ", " , ", ";", "; "]))
def test_a_list_of_numbers_never_equals_the_number_its_digits_spell(values, separator):
    joined = "".join(map(str, values))
    listed = separator.join(map(str, values))
    if separator == " " and all(len(str(v)) == 3 for v in values[1:]):
        return  # "1 234" is one number.
    assert not verify_math(boxed(listed), joined).correct


def test_library_failure_is_an_error_verdict(monkeypatch):
    def broken(*args):
        raise RecursionError("too deep")

    monkeypatch.setattr(math_answer, "_equal_formulas", broken)
    assert verify_math(boxed("1+x"), "x+1") == Verdict(
        False, "1+x", "math-verify failed: RecursionError: too deep"
    )
    monkeypatch.undo()
    verdict = verify_math(boxed("5"), r"\frac{1}{0}")
    assert (
        not verdict.correct and verdict.error is not None and verdict.error.startswith("math-verify failed")
    )


def test_answers_that_cannot_be_judged_say_why():
    assert verify_math(boxed("5"), " ") == Verdict(False, "5", "the ground truth answer is empty")
    verdict = verify_math(boxed("1+" * MAX_ANSWER_CHARS), "5")
    assert not verdict.correct and verdict.extracted is not None and len(verdict.extracted) < 300
    assert (
        verdict.error == f"the extracted answer has 8192 characters, at most {MAX_ANSWER_CHARS} are compared"
    )


def test_same_input_gives_the_same_verdict():
    pairs = list(itertools.product(["x+1", "5,15", "\\frac{1}{2}"], ["1+x", "15,5", "0.5", "x=1, y=2"]))
    first = [verify_math(boxed(b), a) for a, b in pairs]
    assert first == [verify_math(boxed(b), a) for a, b in reversed(pairs)][::-1]


# Answers that a statement in words cannot give back: the file's text closes and opens formulas of its own.
TORN_BY_DOLLARS = {
    *("minerva/72", "olympiad/1664", "olympiad/1687", "olympiad/1760", "olympiad/1938", "olympiad/1940"),
    *("olympiad/1965", "olympiad/2099", "olympiad/2203", "olympiad/2254", "olympiad/2287", "olympiad/2338"),
    *("olympiad/2340", "olympiad/2346", "olympiad/2375", "olympiad/2427", "olympiad/2490", "olympiad/2524"),
    *("olympiad/2771", "olympiad/2950"),
}


@pytest.mark.parametrize(
    ("statement", "known"),
    [
        (r"Hence the result is $\boxed{%s}$.", set()),
        (r"**Final Answer**\n\[\boxed{%s}\]", set()),
        ("We conclude. The final answer is $%s$.", {"minerva/72", "olympiad/1965", "olympiad/2349"}),
        ("We conclude. The final answer is: %s", TORN_BY_DOLLARS),
    ],
)
def test_real_answers_equal_themselves(gold_rows, statement, known):
    rows = {name: answer for file in gold_rows.values() for name, answer in file.items()}
    exceptions = {
        name for name, answer in rows.items() if not verify_math(statement % answer, answer).correct
    }
    assert exceptions <= known
    assert len(exceptions) <= 0.002 * len(rows)


def test_real_gsm8k_answers_equal_themselves_in_their_own_notation(gold_rows):
    rows = {name: answer for file in gold_rows if "gsm8k" in file for name, answer in gold_rows[file].items()}
    assert len(rows) > 1000
    assert [n for n, a in rows.items() if not verify_math(f"So 2 + 2 = 4.\n#### {a}", a).correct] == []


def test_real_answers_equal_themselves_to_the_library(gold_answers):
    """What the exact match hides: of an answer that it cannot read, every other spelling is incorrect."""
    sample = [
        answer for answers in gold_answers.values() for answer in answers[:: max(1, len(answers) // 75)]
    ]
    exceptions = [answer for answer in sample if not judge_with_library(answer, answer).correct]
    assert len(sample) > 100
    assert len(exceptions) <= 0.01 * len(sample), f"{len(exceptions)} of {len(sample)}: {exceptions[:20]}"


def test_different_real_answers_stay_different(gold_answers):
    formulas = [a for answers in gold_answers.values() for a in answers if not a.lstrip("-").isdigit()][::12]
    equal = [
        (a, b)
        for a, b in itertools.pairwise(formulas)
        if verify_math(boxed(b), a).correct and normalised(a) != normalised(b)
    ]
    assert equal == []
