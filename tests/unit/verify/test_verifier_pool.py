import importlib
import os
import signal
import textwrap
import time

import pytest

from megatron_scope.errors import ConfigError, ScopeError
from megatron_scope.records import Verdict
from megatron_scope.verify import pool as pool_module
from megatron_scope.verify.pool import VerifierPool

LIMIT_S = 60  # For whatever should come long before.
FORMULA = r"\boxed{1+x}"  # Only the library can tell that this is x+1.

JUDGES = """
    import os, time
    from megatron_scope.records import Verdict

    def judge(extracted, answer):
        if extracted == "1+hang":
            time.sleep(600)
        if extracted == "1+crash":
            os._exit(9)
        if extracted == "1+hog":
            bytearray(1 << 40)
        if extracted == "1+raise":
            raise ValueError("bad formula")
        return Verdict(extracted == answer[::-1], extracted)
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A judge that misbehaves on demand, in a module that spawned workers can import."""
    (tmp_path / "misbehaving_judges.py").write_text(textwrap.dedent(JUDGES))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("misbehaving_judges").judge


def kill_a_worker(pool: VerifierPool) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        processes = pool._pool  # None while it is being replaced.
        for worker in [] if processes is None else list(processes._pool_manager.worker_manager.workers):
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.01)
    raise AssertionError("no worker to kill")


def test_easy_answers_are_judged_at_once_and_start_no_process():
    with VerifierPool(1, 10.0) as pool:
        futures = [pool.submit("math", "6", f"9458=358=88={digit}$") for digit in range(10)]
        futures += [pool.submit("math", "6", ""), pool.submit("math", r"\frac12", r"\boxed{\dfrac{1}{2}}")]
        assert all(future.done() for future in futures)
        assert [future.result().correct for future in futures] == [digit == 6 for digit in range(10)] + [
            False,
            True,
        ]
        assert pool._pool is None


def test_formulas_are_judged_by_the_library_in_a_worker():
    with VerifierPool(1, 10.0) as pool:
        right = pool.submit("math", "x+1", FORMULA)
        wrong = pool.submit("math", "x+1", r"\boxed{2+x}")
        assert right.result(LIMIT_S) == Verdict(True, "1+x")
        assert wrong.result(LIMIT_S) == Verdict(False, "2+x")


def test_an_endless_formula_runs_into_the_limit_and_the_pool_goes_on():
    with VerifierPool(1, 1.0) as pool:
        endless = pool.submit("math", "x+1", r"\boxed{9^{9^{9^{9}}}}")
        assert endless.result(LIMIT_S) == Verdict(False, "9^{9^{9^{9}}}", "timed out after 1 s")
        assert pool.submit("math", "x+1", FORMULA).result(LIMIT_S).correct


@pytest.mark.parametrize(
    ("task", "answer", "response", "error"),
    [
        ("poetry", "5", "5", "unknown task 'poetry'; known: math"),
        (None, "5", "5", "unknown task 'None'; known: math"),
        (["math"], "5", "5", "unknown task \"['math']\"; known: math"),
        ("code", "5", "5", "task 'code' is not built yet; known: math"),
        ("math", 5, "5", "answer is int, expected text"),
        ("math", "5", None, "response is NoneType, expected text"),
        ("math", "", r"\boxed{5}", "the ground truth answer is empty"),
    ],
)
def test_bad_content_gives_an_error_verdict(task, answer, response, error):
    with VerifierPool(1, 10.0) as pool:
        verdict = pool.submit(task, answer, response).result(0)
    assert not verdict.correct and verdict.error == error


def test_hung_and_crashed_workers_cost_only_their_own_answer(judge):
    with VerifierPool(2, 1.0, judge=judge) as pool:
        names = ["a", "hang", "b", "crash", "c", "raise", "hog", "d"]
        futures = {name: pool.submit("math", f"{name}+1", rf"\boxed{{1+{name}}}") for name in names}
        assert futures["hang"].result(LIMIT_S) == Verdict(False, "1+hang", "timed out after 1 s")
        assert futures["crash"].result(LIMIT_S) == Verdict(
            False, "1+crash", "verifier process died (exit code 9)"
        )
        assert futures["raise"].result(LIMIT_S).error == "verifier failed: ValueError: bad formula"
        assert futures["hog"].result(LIMIT_S).error == "verifier failed: MemoryError"
        later = pool.submit("math", "e+1", r"\boxed{1+e}")
        for name in ("a", "b", "c", "d"):
            assert futures[name].result(LIMIT_S) == Verdict(True, f"1+{name}")
        assert later.result(LIMIT_S) == Verdict(True, "1+e")


def test_a_killed_worker_is_replaced():
    with VerifierPool(1, 10.0) as pool:
        assert pool.submit("math", "x+1", FORMULA).result(LIMIT_S).correct
        kill_a_worker(pool)
        # Sent before the death is noticed, and after.
        assert pool.submit("math", "x+1", FORMULA).result(LIMIT_S).error in (
            None,
            "verifier process died (exit code -9)",
        )
        time.sleep(1)
        assert pool.submit("math", "x+1", FORMULA).result(LIMIT_S).correct


def test_workers_that_cannot_start_give_errors_not_a_hang(judge, tmp_path):
    (tmp_path / "misbehaving_judges.py").unlink()
    with VerifierPool(1, 1.0, judge=judge) as pool:
        verdict = pool.submit("math", "a+1", r"\boxed{1+a}").result(LIMIT_S)
    assert verdict == Verdict(False, None, "no verifier process stays alive; see the log of this run")


def test_many_deaths_lose_no_answer(judge, monkeypatch):
    monkeypatch.setattr(pool_module, "STALL_S", 15.0)  # a job that was forgotten comes again before LIMIT_S
    with VerifierPool(2, 10.0, judge=judge) as pool:
        futures = []
        for _ in range(4):
            futures += [pool.submit("math", "a+1", r"\boxed{1+a}") for _ in range(10)]
            futures[-10].result(LIMIT_S)
            kill_a_worker(pool)
        verdicts = [future.result(LIMIT_S) for future in futures]
    died = Verdict(False, "1+a", "verifier process died (exit code -9)")
    assert set(verdicts) <= {Verdict(True, "1+a"), died} and verdicts.count(died) <= 4


def test_a_job_that_the_process_pool_forgets_is_sent_again(judge, monkeypatch):
    schedule = VerifierPool._schedule
    sent = []

    def forgetful(*args):
        sent.append(args)
        if len(sent) > 1:
            # From here on the new process may take its time to start.
            monkeypatch.setattr(pool_module, "STALL_S", 120.0)
            schedule(*args)

    monkeypatch.setattr(VerifierPool, "_schedule", forgetful)
    monkeypatch.setattr(pool_module, "STALL_S", 0.5)
    with VerifierPool(1, 0.5, judge=judge) as pool:
        assert pool.submit("math", "a+1", r"\boxed{1+a}").result(LIMIT_S) == Verdict(True, "1+a")
    assert len(sent) == 2


def test_leaving_waits_for_answers_under_way(judge):
    with VerifierPool(1, 10.0, judge=judge) as pool:
        futures = [pool.submit("math", "a+1", r"\boxed{1+a}") for _ in range(20)]
    assert all(future.done() and future.result().correct for future in futures)
    with pytest.raises(ScopeError, match="closed"):
        pool.submit("math", "a+1", r"\boxed{1+a}")


def test_an_exception_drops_answers_under_way(judge):
    with pytest.raises(KeyError), VerifierPool(1, 600.0, judge=judge) as pool:
        future = pool.submit("math", "x", r"\boxed{1+hang}")
        raise KeyError
    assert future.result(0) == Verdict(False, None, "the verifier pool was stopped")


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan"))])
def test_impossible_settings_are_refused(workers, timeout_s):
    with pytest.raises(ConfigError, match=r"verify\.(workers|timeout_s) is"):
        VerifierPool(workers, timeout_s)
