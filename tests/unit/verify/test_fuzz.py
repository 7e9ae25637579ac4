"""Nonsense and malice: whatever a model writes, there is a verdict, and the pool judges on."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.records import Verdict
from megatron_scope.verify.extraction import extract_answer
from megatron_scope.verify.math_answer import judge_at_once
from megatron_scope.verify.pool import VerifierPool

LIMIT_S = 120
SETTINGS = settings(derandomize=True, deadline=None, max_examples=400)
# What answers are made of, whole and torn.
PIECES = r"""
\boxed{ \fbox{ } { ( ) [ ] \left( \right) \{ \} $ $$ \( \) \[ \] #### \frac{1}{2} \dfrac \frac \sqrt
\sqrt[3]{x} \begin{pmatrix} \end{pmatrix} \\ & \pi \infty \cup \in \text{cm} \mathrm{ ^ _ ^{ _{ ! %
\% , ; : . = \ne < \le - + * / 0 7 12 1,234 3.14 -5 1e9 x y n e i ' answer is Answer: The final and
or because mod \pmod{7} </think> ~ \, \!
"""
PIECES = [*PIECES.split(), "\u2212", "\u00b0", "\u00bd", "\uff1a", "\u7b54\u6848", "\x00", "\u202e"]
TEXTS = st.lists(st.sampled_from([*PIECES, " ", "\n"]), max_size=25).map("".join)
HOSTILE = (
    "9" * 3000,
    "9^{" * 40 + "9" + "}" * 40,
    "100000000!!!",
    r"\frac{1}{" * 300 + "2" + "}" * 300,
    r"\sqrt{" * 500 + "2" + "}" * 500,
    "(" * 1500 + "x" + ")" * 1500,
    "+".join(f"x_{{{i}}}" for i in range(600)),
    "(x+1)^{10000000}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^k}",
    r"\int_0^1 e^{e^{e^{x^{x}}}} dx",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\lim_{x \to 0} \frac{\sin x}{x^{x^{x}}}",
    "1e999999999 + x",
)


@SETTINGS
@given(TEXTS, TEXTS)
def test_any_text_is_judged_or_left_to_the_library_without_an_exception(response, answer):
    extracted = extract_answer(response)
    assert extracted is None or (extracted.strip() and isinstance(extracted, str))
    judged = judge_at_once(response, answer)
    assert isinstance(judged, Verdict | str)
    if isinstance(judged, Verdict) and judged.correct:
        assert judged.error is None and judged.extracted is not None


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_fed_with_nonsense_gives_every_verdict_and_judges_on(seed):
    rng = random.Random(seed)
    nonsense = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(60)]
    hostile = list(HOSTILE[seed::3])
    texts = rng.sample(nonsense + hostile, len(nonsense) + len(hostile))
    with VerifierPool(2, 0.5) as pool:
        futures = [pool.submit("math", rng.choice(("x+1", *texts)), rf"\boxed{{{text}}}") for text in texts]
        verdicts = [future.result(LIMIT_S) for future in futures]
        assert all(isinstance(verdict, Verdict) for verdict in verdicts)
        assert not any(verdict.correct and verdict.error for verdict in verdicts)
        assert pool.submit("math", "x+1", r"\boxed{1+x}").result(LIMIT_S) == Verdict(True, "1+x")


def test_no_hostile_answer_is_taken_for_a_right_one():
    with VerifierPool(2, 0.5) as pool:
        futures = [pool.submit("math", "x+7", rf"\boxed{{{text}}}") for text in HOSTILE]
        assert not any(future.result(LIMIT_S).correct for future in futures)
