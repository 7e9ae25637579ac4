import time

import pytest

from megatron_scope.verify.extraction import extract_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"so \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"first \boxed{1}, no: it is \boxed{2}", "2"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"The answer is 3. Check: \boxed{4}. The answer is 5.", "4"),
        (r"x is \boxed{1} or \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} and, once more, \boxed{1}", "1"),
        (r"\boxed{} but \boxed{6} then \boxed{ }", "6"),
        (r"\begin{pmatrix} \boxed{1 \\ 2} \end{pmatrix}", r"1 \\ 2"),
    ],
)
def test_last_complete_box_is_the_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{12", None),
        (r"the total is 7, so \boxed{12", "7"),
        (r"\boxed{3} and then \boxed{12", "3"),
    ],
)
def test_a_box_that_was_cut_off_gives_no_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("48 + 24 = 72 clips.\n#### 72", "72"),
        ("#### $1,234.50", "1,234.50"),
        ("#### -3", "-3"),
        ("#### Step 2: count\nThere are 9 left.", "9"),
        ("#### Step 2: count\nThere are 9 left.\n#### Yes", "Yes"),
        ("So it is.\n#### $e^{-1/3}$\n", "$e^{-1/3}$"),
        ("#### **3n + 2**", "3n + 2"),
        ("#### 5 apples.\nQ: next", "5"),
        ("The answer is 18 dollars per day.", "18"),
        ("The final answer is: 5. I hope it is correct.", "5"),
        ("**Final Answer:** 3.5", "3.5"),
        ("The answer to the question is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("The answer is\n$$\n\\frac{3}{4}\n$$", "\\frac{3}{4}"),
        ("The answers are $1$, $2$ and $3$.", "1, 2, 3"),
        ("the answer is 3 or 4", "3 or 4"),
        ("the answer is x = 5.", "x = 5"),
        ("the answer is 3x + 5", "3x + 5"),
        ("the answer is 2 + 3 = 5", "5"),
        ("The answer is 50%.", "50%"),
        ("The answer is $50$ percent", "50\\%"),
        ("The answer is 5 million.", "5 million"),
        ("The answer is 2 xy.", "2 xy"),
        ("The answer is (B).", "(B)"),
        ("Answer: C", "C"),
        ("the answer is yes, because 7 is prime", "yes"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is 4. Wait. The answer is 6.", "6"),
        ("So 8 is right; the answer is correct.", "8"),
        ("The answer is the sum of 5 and 6, which is 11.", "11"),
        ("The final answer is $x + 2y + 4 = 0$.", "x + 2y + 4 = 0"),
        ("The final answer is $a = b = 7$.", "7"),
        ("The answer is x^3 + ax + b", "x^3 + ax + b"),
        ("The answer is A.", "A"),
        ("The answer is **A**.", "A"),
        ("**The answer is A**", "A"),
        ("The answer is a mystery.", None),
        ("The answer is f'", "f'"),
        ("The answer is 'yes'", "yes"),
        ('The answer is "Evelyn".', "Evelyn"),
        ("The answer is x_*", "x_*"),
        ("The answer is 11 \\frac{2}{3}", "11 \\frac{2}{3}"),
        ("The answer is y = \\frac{1}{2} x + 2", "y = \\frac{1}{2} x + 2"),
        ("The answer is (\\frac{1}{2}, \\frac{2}{5}, 5)", "(\\frac{1}{2}, \\frac{2}{5}, 5)"),
        ("The answer is \\frac{1}{3}, 1, 9", "\\frac{1}{3}, 1, 9"),
        ("The answer is \\frac{1}{2} of the cake.", "\\frac{1}{2}"),
        ("The answer is 42, not 43.", "42"),
        ("The answer is 42 dollars (not 43).", "42"),
        ("The answer is 42 rather than 43.", "42"),
        ("The answer is 42 because 5 + 5 = 10.", "42"),
        ("The answer is 42 (see Theorem 43).", "42"),
        ("The answer is 3 (mod 7).", "3 (mod 7)"),
        ("The answer is D, not C.", "D"),
        ("The answer is not 43 but 42.", "42"),
        ("The answer is 42 apples and 43 pears.", "42 apples and 43 pears"),
        ("The answer is 5 + 6, which is 11.", "11"),
        ('The answer to "What is 6*7?" is 42.', "42"),
        ("**Final Answer**\n42", "42"),
        ("## Final Answer\n\n**42**", "42"),
        ("### The final answer\n$x^2$", "x^2"),
        ("**Final Answer**: The final answer is $42$. I hope it is correct.", "42"),
        ("Answer\uff1a42", "42"),
        ("\u7b54\u6848\u662f42\u3002\u5171 43", "42"),
        ("\u6700\u7ec8\u7b54\u6848\uff1a**$x^2$**", "x^2"),
        ("\u56e0\u6b64\uff0c\u7b54\u6848\u4e3a 42\u3002", "42"),
        ("<think>The answer is 3.</think> The answer is 4.", "4"),
        ("<think>The answer is 3.</think>\n", "3"),
    ],
)
def test_marked_answers(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("9458=358=88=6", "6"),
        ("9458=358=88=6$", "6"),
        ("$9458=358=88=6$", "6"),
        ("94580=9458=358=88=6 $", "6"),
        ("9458=358=88=-6", "-6"),
        ("9458=358=88=66", "66"),
        ("9458=358=88=", "88"),
        ("6$", "6"),
        ("5 + 3 = 8 apples.", "8"),
        ("5 + 3 = 8 apples, and 2 pears.\nSo 10 in all.", "10"),
        ("So f(x) = 2x", "2x"),
        ("Hence $y = \\sin x$.", "\\sin x"),
        ("\\[ x = \\frac{3}{4} \\]", "\\frac{3}{4}"),
        ("Hence we get \\frac{1}{2}.", "\\frac{1}{2}"),
        ("It costs $5 a day and $6 a night, so $11.", "11"),
        ("in total $1,234.50", "1,234.50"),
        ("it fell to -3.5 degrees", "-3.5"),
        ("I get 10^5 of them", "10^5"),
        ("x^2 + 1", "x^2 + 1"),
        ("(-1, 2)", "(-1, 2)"),
        ("Yes", "Yes"),
        ("12:30", "12:30"),
        ("**Total**\n42", "42"),
        ("So x = 42, not 43", "42"),
    ],
)
def test_without_a_marker_the_last_side_or_number_counts(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "response", ["", " \n", "$", "$$", "The group is abelian.", "so we get x + 5 then", "about 100m2 of it"]
)
def test_no_answer(response):
    assert extract_answer(response) is None


@pytest.mark.parametrize(
    "response",
    [
        "The answer is not 43.",
        "The answer isn't 43.",
        "The answer cannot be 43.",
        "The answer is at least 43.",
        "The answer is more than $43",
        "The answer is between 42 and 43.",
        "Hence x >= 43.",
        "Hence x != 43.",
        "It is the sqrt 43",
        "It is 3 mod 43",
    ],
)
def test_a_number_that_words_deny_or_limit_is_no_answer(response):
    assert extract_answer(response) is None


UNITS = ["\\boxed{", "{", "}", "$", "$a ", "the answer is ", "answer: x y\n", "#### ", "1", "1+", "(", "\\["]
UNITS += [
    "not ",
    "answer\n",
    "\u7b54\u6848 ",
    " (a",
    " not 1",
    "between 1 and ",
    "=",
    "1 ",
    "1,234,",
    "\\frac{",
    " ",
    "ab ",
    "\\boxed{1},",
    "\\",
    "1e",
    "answer",
]


@pytest.mark.parametrize("unit", UNITS)
def test_no_response_takes_long(unit):
    start = time.perf_counter()
    extract_answer(unit * (200_000 // len(unit)) + " 5 x")
    assert time.perf_counter() - start < 2
