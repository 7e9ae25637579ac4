"""The quickstart's comparison: numbers by hand, tables and picture, and one line for wrong input."""

import json
import random
import struct

import numpy as np
import pytest

from megatron_scope.evaluate.diversity import diversity
from megatron_scope.evaluate.metrics import pass_at_k
from tests.helpers.quickstart import load

task, scores, tables, plot, compare = map(load, ("task", "scores", "tables", "plot", "compare"))

EASY, HARD = "94580", "13942"
UNMEASURED = (None, None, None)


def solutions(problem, number):
    """Different right solutions, in a fixed order."""
    rng = random.Random(0)
    drawn = (task.solution(problem, rng).removesuffix("$") for _ in range(500))
    return list(dict.fromkeys(drawn))[:number]


def write_evaluation(folder, method, correct, *, num_samples=8, temperatures=scores.TEMPERATURES):
    """`correct[problem]` are the texts of its correct responses; wrong ones fill up."""
    for temperature in temperatures:
        path = scores.evaluation_file(folder, method, temperature)
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = {problem: len(texts) for problem, texts in correct.items()}
        report = {
            "num_samples": num_samples,
            "sampling": {"temperature": float(temperature)},
            "benchmarks": {"heldout.jsonl": {"num_correct": counts}},
        }
        path.write_text(json.dumps(report))
        rows = [
            {"id": problem, "sample": sample, "response": text, "correct": sample < len(texts)}
            for problem, texts in correct.items()
            for sample, text in enumerate([*texts, *["0"] * (num_samples - len(texts))])
        ]
        path = scores.responses_file(folder, method, temperature)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_metrics(folder, method, gradients, last_step=None):
    """`gradients` are correct and incorrect responses' norms and the noise, step by step."""
    path = folder / method / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, **dict(zip(scores.PATH_GRADIENTS, of_step, strict=True))}
        for step, of_step in enumerate(gradients, start=1)
    ]
    if last_step is not None:
        rows[-1]["step"] = last_step
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    """One seed: before training 2 and 0 of 8 are right, after SCOPE 8 and 4."""
    folder = tmp_path / "seed7"
    write_evaluation(folder, "base", {EASY: solutions(EASY, 2), HARD: []})
    write_evaluation(folder, "scope", {EASY: solutions(EASY, 3) + ["6"] * 5, HARD: solutions(HARD, 4)})
    write_metrics(folder, "scope", [(1.0, 4.0, 2.0), UNMEASURED, (2.0, 8.0, 7.0), (3.0, 0.0, 0.0)])
    return tmp_path


def read(runs, methods=("base", "scope"), seeds=(7,)):
    return scores.read(runs, seeds, methods)


def test_the_numbers_are_those_worked_out_by_hand(runs):
    comparison = read(runs)
    assert (comparison.num_problems, comparison.num_samples, comparison.steps) == (2, 8, 4)
    before, after = (comparison.results[method]["1.0"][0] for method in ("base", "scope"))
    assert (before.average.value, before.passed.value) == (12.5, 50.0)
    assert (after.average.value, after.passed.value) == (75.0, 100.0)
    # Of two problems that gain 75 and 50 points, a resample holds the one, the other or both.
    assert (after.average_gain.value, after.average_gain.low, after.average_gain.high) == (62.5, 50.0, 75.0)
    assert (after.passed_gain.value, after.passed_gain.low, after.passed_gain.high) == (50.0, 0.0, 100.0)
    assert before.average_gain is before.passed_gain is None
    assert before.solutions.value == 1.0  # two and none
    assert after.solutions.value == 3.5  # three and four: "6" is right, but not in every step
    # Without incorrect responses, as in the last step, there is no share of noise.
    assert comparison.gradients == {"scope": [scores.PathGradients(2.0, 4.0, 3.0, (2 / 4 + 7 / 8) / 2)]}


def test_pass_at_8_is_the_unbiased_estimate_from_all_samples(tmp_path):
    folder = tmp_path / "seed7"
    write_evaluation(folder, "base", {EASY: ["6"] * 3, HARD: ["9"]}, num_samples=32)
    passed = read(tmp_path, ["base"]).results["base"]["0.6"][0].passed.value
    assert passed == pytest.approx(100 * np.mean([pass_at_k(32, 3, 8), pass_at_k(32, 1, 8)]))


def test_a_solution_that_is_written_twice_or_with_its_end_sign_counts_once(tmp_path):
    (text,) = solutions(EASY, 1)
    write_evaluation(tmp_path / "seed7", "base", {EASY: [text, text + "$", text]})
    assert read(tmp_path, ["base"]).results["base"]["1.0"][0].solutions.value == 1.0


def test_diversity_compares_equally_many_responses_to_the_problems_that_all_methods_solve(tmp_path):
    folder, texts = tmp_path / "seed7", solutions(EASY, 8)
    write_evaluation(folder, "base", {EASY: texts[:4], HARD: solutions(HARD, 3)})
    write_evaluation(folder, "scope", {EASY: texts[:4] + ["6"] * 4, HARD: solutions(HARD, 8)})
    write_metrics(folder, "scope", [(1.0, 1.0, 1.0)])
    results = read(tmp_path).results
    base, scope = (results[method]["1.0"][0].diversity for method in ("base", "scope"))
    # HARD has three correct responses before training; of EASY the first four count for both.
    assert base == scope == diversity([texts[:4]], num_responses=4, max_tokens=2048)
    assert base.num_problems == 1


def test_no_shared_problem_leaves_diversity_empty_in_table_and_json(runs):
    compare.compare(runs, [7], ["base", "scope"], runs, "found")
    report = json.loads((runs / "found.json").read_text())
    assert report["results"]["scope"]["1.0"][0]["diversity"]["self_bleu"] is None
    row = next(line for line in (runs / "found.md").read_text().splitlines() if "| SCOPE" in line)
    assert [cell.strip() for cell in row.split("|")][-3:-1] == ["-", "-"]


def test_the_table_shows_gains_with_their_intervals(runs, capsys):
    compare.compare(runs, [7], ["base", "scope"], runs, "found")
    text = (runs / "found.md").read_text()
    assert capsys.readouterr().out.startswith(tables.markdown(read(runs)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    gain = ["75.0", "+62.5 (+50.0 to +75.0)", "100.0", "+50.0 (+0.0 to +100.0)", "3.5"]
    assert [row[1:6] for row in rows if row[0] == "SCOPE"][:2] == [gain, gain]
    assert ["SCOPE", "2.00", "4.00", "3.00", "0.69"] in rows
    assert "2 held-out problems x 8 samples after 4 steps of training, seed 7." in text
    assert "(found.png)" in text


def test_several_seeds_show_their_mean_and_each_value_and_each_interval(runs):
    folder = runs / "seed8"
    write_evaluation(folder, "base", {EASY: ["6"], HARD: []})
    write_evaluation(folder, "scope", {EASY: ["6"] * 2, HARD: []})
    write_metrics(folder, "scope", [(3.5, 7.0, 3.5), *[UNMEASURED] * 3])
    text = tables.markdown(read(runs, seeds=(7, 8)))
    assert "43.8 (75.0, 12.5)" in text
    assert "2.75 (2.00, 3.50)" in text
    assert "0.59 (0.69, 0.50)" in text
    row = next(line for line in text.splitlines() if "SCOPE" in line and "to" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["SCOPE", "+62.5 (+50.0 to +75.0)", "+6.2 (+0.0 to +12.5)"]


@pytest.mark.parametrize("seeds", [(7,), (7, 8, 9)])
def test_the_picture_has_a_row_for_each_method_and_all_seeds(runs, seeds):
    for seed in seeds[1:]:
        write_evaluation(runs / f"seed{seed}", "base", {EASY: ["6"], HARD: []})
        write_evaluation(runs / f"seed{seed}", "scope", {EASY: ["6"] * 3, HARD: ["9"]})
        write_metrics(runs / f"seed{seed}", "scope", [(1.0, 1.0, 1.0)] * 4)
    comparison = read(runs, seeds=seeds)
    plot.draw(comparison, runs / "found.png")
    content = (runs / "found.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1800 and height > 400
    from matplotlib.image import imread

    image = imread(runs / "found.png")[..., :3]
    for colour, _ in plot.STYLES.values():
        wanted = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 500, colour
    plot.draw(comparison, runs / "again.png")
    assert (runs / "again.png").read_bytes() == content


def test_percentages_have_no_tick_above_100(runs):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    axis.plot([90, 100], [0, 0])
    plot._strip(axis, 1, most=100)
    assert axis.get_xlim()[1] > 100 >= max(axis.get_xticks())


def _spoil_report(folder):
    scores.evaluation_file(folder, "scope", "1.0").write_text('{"num_samples": 8}')


def _spoil_temperature(folder):
    path = scores.evaluation_file(folder, "scope", "1.0")
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 0.9'))


def _spoil_noise(run):
    """As a run of before it was measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del rows[1]["grad_noise_incorrect"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _spoil_responses(folder):
    path = scores.responses_file(folder, "scope", "0.6")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: scores.evaluation_file(f, "scope", "0.6").unlink(), "scope-t0.6.json: cannot be read"),
        (lambda f: scores.responses_file(f, "scope", "0.6").unlink(), "responses.jsonl: cannot be read"),
        (_spoil_report, "scope-t1.0.json: not a report of one benchmark"),
        (_spoil_temperature, "temperature is 0.9, expected 1.0"),
        (_spoil_responses, "not the responses of scope-t0.6.json"),
        (lambda f: write_evaluation(f, "scope", {EASY: []}), "scope and base answered other problems"),
        (
            lambda f: write_evaluation(f, "scope", {EASY: [], HARD: []}, num_samples=9),
            "evaluations have (2, 8) and (2, 9) problems x samples",
        ),
        (
            lambda f: write_evaluation(f, "scope", {EASY: [], HARD: []}, num_samples=7),
            "7 samples a problem, but pass@8 needs 8",
        ),
        (lambda f: (f / "scope" / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read"),
        (lambda f: (f / "scope" / "metrics.jsonl").write_text(""), "metrics.jsonl: empty"),
        (
            lambda f: (f / "scope" / "metrics.jsonl").write_text('{"step": 1}\n'),
            "metrics.jsonl:1: no grad_norm_correct",
        ),
        (
            lambda f: _spoil_noise(f / "scope"),
            "metrics.jsonl:2: no grad_noise_incorrect in it; remove {runs}/seed7/scope and start",
        ),
    ],
)
def test_input_that_does_not_compare_is_one_line(runs, capsys, spoil, message):
    spoil(runs / "seed7")
    assert compare.main([str(runs)]) == 1
    captured = capsys.readouterr()
    assert message.replace("{runs}", str(runs)) in captured.err
    assert captured.err.startswith("compare: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_methods_that_took_unequal_steps_do_not_compare(runs):
    write_evaluation(runs / "seed7", "opd", {EASY: [], HARD: []})
    write_metrics(runs / "seed7", "opd", [(1.0, 1.0, 1.0)], last_step=5)
    with pytest.raises(scores.CompareError, match="methods took 4 and 5 steps"):
        read(runs, ["base", "opd", "scope"])


def test_the_command_finds_the_seeds_and_methods_that_are_there(runs, capsys):
    assert compare.found_methods(runs, compare.found_seeds(runs)) == ["base", "scope"]
    assert compare.main([str(runs), "--results", str(runs / "out"), "--name", "x"]) == 0
    assert sorted(path.name for path in (runs / "out").iterdir()) == ["x.json", "x.md", "x.png"]
    assert compare.main([str(runs / "out")]) == 1
    assert "no seedN/eval in it" in capsys.readouterr().err
