"""Kinds of answers: the same value in another notation, and values that are near but not the same."""

import pytest

from megatron_scope.records import Verdict
from megatron_scope.verify.math_answer import verify_math

EQUAL = r"""
interval: [0,1) | \left[ 0, 1 \right)
interval: (-\infty, 3] | (-\infty,3]
interval: (-\infty,1)\cup(2,\infty) | (2,\infty)\cup(-\infty,1)
interval: x \in [0,1] | [0,1]
set: \{1,2,3\} | \{3,1,2\}
set: \{1,2,3\} | 3, 2, 1
set: \emptyset | \varnothing
set: \emptyset | \{\}
list: (1,2),(3,4) | (3,4),(1,2)
list: 5 \text{ or } 6 | 6, 5
list: \pm 2 | 2, -2
list: x=1, y=2 | y=2, x=1
tuple: (1,2) | \left(1, \frac{4}{2}\right)
tuple: (1,2) | 1,2
matrix: \begin{pmatrix}1/2\\2\end{pmatrix} | \begin{pmatrix}\frac12\\2\end{pmatrix}
matrix: \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}
unit: 12 \text{ hours} | 12 \text{ hrs}
unit: 12 \text{ meters} | 12 \text{ m}
unit: 12 \text{ cm}^2 | 12 \text{ square cm}
unit: 12 \text{ cubic feet} | 12\,\mathrm{ft}^3
unit: 9 \text{ a.m.} | 9 \text{ AM}
unit: 5 \text{ kPa} | 5\,\mathrm{kPa}
unit: 20^\circ \text{C} | 20 \text{ degrees Celsius}
unit: \$5 | 5
unit: \$5 | 5 \text{ dollars}
separators: 1,234,567 | 1234567
separators: 12,345 | 12345.0
separators: 1 000 000 | 1000000
percent: 25\% | \frac{1}{4}
percent: 0.25 | 25\%
percent: 0.5\% | 0.005
mixed: 2\frac{1}{2} | \frac{5}{2}
mixed: -2\frac{1}{2} | -2.5
power: 6.02 \times 10^{23} | 6.02e23
power: 2^{10} | 1024
text: \text{Monday} | monday
text: \text{No solution} | \text{no solution}
text: \text{A} | (A)
points: \angle ABC | \angle ABC
relation: x \leq 5 | x \le 5
relation: x<5 | 5>x
equation: y=2x+1 | y-2x=1
equation: f^{-1}(x)=2x | 2x
equation: a_{n+1}=2^n | 2^n
equation: x+y=1 | y=1-x
equation: (x,y)=(1,2) | (1,2)
power: 2^{3}3^{2} | 72
power: 5.3e3 | 0+5.3e3
power: \frac{x}{2e3} | \frac{x}{2000}
power: 72 | 2^{3} 3^{2}
power: x^{2}3y | 3x^2y
power: x^{2}y | y x^2
prime: 5^\prime | 5'
prime: y'' | y^{\prime\prime}
derivative: \frac{dy}{dx} | \dfrac{dy}{dx}
letter: \frac{a}{B} | \frac {a} {B}
unit: 20^{\circ}C | 20^\circ C
time: 10:30 | 10{:}30
dots: 1, 2, \ldots, 9 | 1,2,\dots,9
"""

NOT_EQUAL = r"""
interval: [0,1) | (0,1)
interval: (-\infty, 3] | (-\infty, 3)
interval: (-\infty,1)\cup(2,\infty) | (-\infty,1)\cup[2,\infty)
set: \{1,2,3\} | \{1,2\}
set: \{1,2\} | (1,2)
set: (1,2) | \{1,2\}
set: (1,2) | \{2,1\}
tuple: (1,2) | 2,1
tuple: (1,2,3) | (1,3,2)
tuple: (1,2,3) | (1,2,3,4)
list: (1,2),(3,4) | (2,1),(3,4)
list: x=1, y=2 | x=2, y=1
list: \pm 2 | 2
matrix: \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
matrix: \begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
matrix: \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
matrix: A^T | A
unit: 12 \text{ cm}^2 | 12 \text{ cm}^3
unit: 12 \text{ square cm} | 12 \text{ cubic cm}
unit: 12 \text{ square feet} | 12 \text{ feet}
unit: 12 \text{ m/s} | 12 \text{ km/h}
unit: 5 \text{ kJ} | 5 \text{ J}
unit: 5 \text{ mW} | 5 \text{ MW}
unit: 5 \text{ nm} | 5 \text{ mm}
unit: 20^\circ \text{C} | 20^\circ \text{F}
unit: 10:30 \text{ am} | 10:30 \text{ pm}
unit: 9 \text{ a.m.} | 9 \text{ p.m.}
unit: 5 \text{ m east} | 5 \text{ m west}
unit: 30 \text{ increase} | 30 \text{ decrease}
unit: 5 \text{ cents} | \$5
unit: 5 \text{ hundred} | 5 \text{ thousand}
separators: 1,234 | 1, 234
separators: 1,234 | 1.234
separators: 1,23 | 123
percent: 25\% | 2.5
percent: 25\% | 0.0025
percent: 25 | 0.25
percent: 30\% \text{ increase} | 30\% \text{ decrease}
mixed: -2\frac{1}{2} | -1.5
mixed: 2 1/2 | 21/2
power: 6.02 \times 10^{23} | 6.02e22
power: 2^{10} | 20
text: \text{Monday} | Tuesday
text: \text{none} | 0
points: ABC | ACB
points: \angle ABC | \angle ACB
relation: x<5 | x \le 5
relation: x \ne 3 | x = 3
equation: y=2x+1 | y=2x-1
equation: a_n = 2^n | b_n = 2^n
equation: x+y=1 | 1
equation: x^2+y^2=1 | 1
equation: 2x=4 | 4
equation: \alpha+\beta=1 | 1
power: 2^{3}3^{2} | 2^{33}
power: x+5e3 | x+5e4
power: x^{23} | x^{2}3
prime: 5 | 5'
prime: 5' | 5''
prime: y'' | y
derivative: \frac{dy}{dx} | \frac{dx}{dy}
derivative: \frac{\partial f}{\partial x} | \frac{\partial f}{\partial y}
product: \vec{a}\times\vec{b} | \vec{b}\times\vec{a}
letter: \frac{a}{b} | \frac{a}{B}
letter: \frac{a}{A} | 1
letter: a+b | A+B
letter: x | X
percent: 5\% | \$5
percent: 90\% | 90^\circ
percent: 5\text{ kg} | 5\%
dots: 1,2,\ldots,10 | 1,2,10
"""


def cases(table):
    """Lines "kind: ground truth | given answer"."""
    return [
        pytest.param(*line.split(": ", 1)[1].split(" | "), id=line) for line in table.strip().splitlines()
    ]


@pytest.mark.parametrize(("answer", "given"), cases(EQUAL))
def test_another_notation_is_correct(answer, given):
    assert verify_math(rf"Hence the result is $\boxed{{{given}}}$.", answer) == Verdict(True, given)


@pytest.mark.parametrize(("answer", "given"), cases(NOT_EQUAL))
def test_what_is_near_but_not_equal_is_incorrect(answer, given):
    assert verify_math(rf"Hence the result is $\boxed{{{given}}}$.", answer) == Verdict(False, given)


STATED = r"""
**Final Answer**: 42
**Final Answer:** $42$
The final answer is **42**.
The final answer is: $\boxed{42}$
Final answer - see below. The answer: 42
Thus the answer is \(42\).
Answer: 42 apples
#### 42
work 6*7=42\n#### $42
#### 42.
\boxed{\boxed{42}}
\boxed{7}, no wait: \boxed{42}
\boxed{42} and then \boxed{7
<think>\boxed{7}</think>\boxed{42}
<think>The answer is 7.</think>The final answer is 42.
\fbox{42}
"""


@pytest.mark.parametrize("response", STATED.strip().splitlines())
def test_a_final_answer_is_found_in_every_form(response):
    response = response.replace(r"\n", "\n")
    assert verify_math(response, "42").correct
    assert not verify_math(response, "7").correct
