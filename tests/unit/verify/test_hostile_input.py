"""Input that is made to hang, crash or blow up the verifier: nothing of it may reach the caller."""

import importlib
import os
import random
import signal
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scope.records import Verdict
from megatron_scope.verify.math_answer import judge_at_once
from megatron_scope.verify.pool import VerifierPool

LIMIT_S = 120  # For whatever should come long before.
SETTINGS = settings(derandomize=True, deadline=None)
PIECES = r"""
\boxed{ \fbox{ { } $ $$ \[ \] \( \) #### = , ; . % \% \\ \ ^ _ ( ) [ ] < | & - + * / ! : '
\frac \frac{1}{2} \text{ \mathrm{cm} \left( \right) \{ \} \overline{3} \sqrt \pm \cup \infty ^\circ
0 1 12 1,234 .5 1e999 1e9999999 10^{999} x xy A yes no and or answer is Answer: <think> </think>
"""
PIECES = [*PIECES.split(), "\n", "\x00", "\ud800", "\u2212", "\u0661", "\u00b2", "\uff05", "\U0001d7d9"]
# A piece that is repeated, with what opens and closes the response.
REPEATED = [
    ("", r"\boxed{", ""),
    ("", "}", ""),
    (r"\boxed{", "{", ""),
    (r"\boxed{", "a}{", ""),
    ("", r"\boxed{1} and ", ""),
    ("", "the answer is ", ""),
    ("", "#### ", "x"),
    ("", "answer ", ""),
    ("", "</think>", ""),
    ("", "<think>", ""),
    ("The answer is ", "$", ""),
    ("The answer is ", r"\[", ""),
    ("The answer is ", "1+", "x"),
    ("The answer is ", "1  +  ", "x^"),
    ("", "1 ", ""),
    ("", "=", ""),
    ("", "1=", ""),
    ("", " ", "x"),
    ("", "\n", "x"),
    ("", "1,000", ","),
    ("", "*", ""),
    ("", "-", "1"),
]
LONG_ANSWERS = [
    ("{", ",", ""),
    (r"\{", ",", ""),
    ("(", "a,", ""),
    (r"\frac", "{", ""),
    ("", r"\frac{1}", ""),
    ("", r"\text{a}", "}"),
    ("1", " a", "1"),
    ("1", "a-", "1"),
    ("", "a.", "1"),
    ("", "1 ", "x"),
    ("", "1,", "x"),
    ("", "'", ""),
    ("", "^{", ""),
    ("", "$", ""),
    ("5 ", r"\text{ m}", "^"),
]
JUDGES = """
    import ctypes, os, signal, sys, time
    from megatron_scope.records import Verdict

    def judge(extracted, answer):
        match extracted.removeprefix("1+"):
            case "hang":
                time.sleep(600)
            case "spin":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                while True:
                    pass
            case "exit":
                sys.exit(3)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hog":
                bytearray(1 << 40)
            case "recurse":
                return judge(extracted, answer)
            case "raise":
                raise ValueError("bad formula")
            case "number":
                return 5
            case "nothing":
                return None
        return Verdict(extracted == answer[::-1], extracted)
"""
ERRORS = {
    "hang": "timed out after 5 s",
    "spin": "timed out after 5 s",
    "exit": "verifier failed: SystemExit: 3",
    "segfault": "verifier process died (exit code -11)",
    "killed": "verifier process died (exit code -9)",
    "hog": "verifier failed: MemoryError",
    "recurse": "verifier failed: RecursionError: maximum recursion depth exceeded",
    "raise": "verifier failed: ValueError: bad formula",
    "number": "verifier returned int, expected a Verdict",
    "nothing": "verifier returned NoneType, expected a Verdict",
}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A judge that misbehaves on demand, in a module that spawned workers can import."""
    (tmp_path / "hostile_judges.py").write_text(textwrap.dedent(JUDGES))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("hostile_judges").judge


@SETTINGS
@given(st.text(max_size=60), st.text(max_size=30))
def test_any_text_is_judged_or_left_to_the_library(response, answer):
    assert isinstance(judge_at_once(response, answer), (str, Verdict))


def test_mutated_real_answers_are_judged_or_left_to_the_library(gold_answers):
    rng = random.Random(0)
    answers = [answer for found in gold_answers.values() for answer in found[:200]]
    for answer in answers:
        letters = list(rf"The answer is $\boxed{{{answer}}}$.")
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(letters))
            letters[place : place + rng.randint(0, 3)] = rng.choice(PIECES)
        assert isinstance(judge_at_once("".join(letters), answer), (str, Verdict))


def seconds(response: str, answer: str) -> float:
    """Of processor time, the least of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        judge_at_once(response, answer)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(("opening", "piece", "end"), REPEATED)
def test_a_long_repeated_pattern_costs_no_more_than_its_length(opening, piece, end):
    short, long = (opening + piece * (size // len(piece)) + end for size in (50_000, 400_000))
    # Linear cost grows 8 times and quadratic cost 64 times; what passes at once is below the clock's noise.
    assert seconds(long, "5") < max(0.3, 24 * seconds(short, "5"))


@pytest.mark.parametrize(("opening", "piece", "end"), LONG_ANSWERS)
def test_the_longest_answers_that_are_compared_cost_little(opening, piece, end):
    text = opening + piece * ((4000 - len(opening) - len(end)) // len(piece)) + end
    assert seconds(rf"\boxed{{{text}}}", text + " ") < 1
    assert seconds(rf"\boxed{{{text}}}", "5") < 1
    assert seconds("5", text) < 1


def test_no_misdeed_of_a_worker_hangs_or_breaks_the_pool(judge):
    with VerifierPool(2, 5.0, judge=judge) as pool:
        futures = {}
        for number, misdeed in enumerate(ERRORS):
            futures[misdeed] = pool.submit("math", "x", rf"\boxed{{1+{misdeed}}}")
            letter = "abcdfghjklmn"[number]
            futures[letter] = pool.submit("math", f"{letter}+1", rf"\boxed{{1+{letter}}}")
        verdicts = {name: future.result(LIMIT_S) for name, future in futures.items()}
        after = pool.submit("math", "z+1", r"\boxed{1+z}").result(LIMIT_S)
    for misdeed, error in ERRORS.items():
        verdict = verdicts[misdeed]
        assert (verdict.correct, verdict.extracted) == (False, f"1+{misdeed}")
        assert (verdict.error or "").startswith(error), misdeed
    for letter in verdicts.keys() - ERRORS.keys():
        assert verdicts[letter] == Verdict(True, f"1+{letter}")
    assert after == Verdict(True, "1+z")


def test_signals_to_workers_lose_no_answer(judge):
    rng = random.Random(0)
    with VerifierPool(2, 10.0, judge=judge) as pool:
        pool.submit("math", "x+1", r"\boxed{1+x}").result(LIMIT_S)
        futures = [pool.submit("math", f"{n}y+1", rf"\boxed{{1+y{n}}}") for n in range(10)]
        futures += [pool.submit("math", "z+1", r"\boxed{1+z}") for _ in range(20)]
        for number in (signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT):
            processes = pool._pool  # None while it is being replaced.
            workers = [] if processes is None else list(processes._pool_manager.worker_manager.workers)
            if workers:
                os.kill(rng.choice(workers), number)
        verdicts = [future.result(LIMIT_S) for future in futures]
    for verdict in verdicts:
        assert verdict.correct or "verifier process died" in (verdict.error or "")
