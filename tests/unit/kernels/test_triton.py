"""Triton's passes over a shard against those of `tiles`, and what stands on them against the reference.

Letters: T tokens, V vocabulary, z student and teacher logits, y targets.
"""

import importlib.util

import pytest
import torch

from megatron_scope.kernels import reference, tiles
from megatron_scope.kernels.tiles import Shard, Upstream
from tests.unit.kernels import hidden, triton_cases
from tests.unit.kernels.logits import INF, check_stats, make, mixed_factors
from tests.unit.kernels.triton_cases import HALF_ERROR

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TOKENS, COLUMNS = 5, 29  # four tiles: those of the passes by themselves have 8 columns
NAMES = Upstream._fields
# (first id, valid columns): cut short by padding, a later shard, all padding.
SHARDS = ((0, 20), (29, 29), (58, 0))
ERROR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
DTYPES = list(ERROR)
CASES = [*((dtype, 0.6) for dtype in DTYPES), (torch.float32, 1.0)]


@pytest.fixture(scope="module")
def run():
    with triton_cases.runner() as runner:
        yield runner


def rows(dtype=torch.float64, **settings):
    """z, z, y, the targets of which are spread over three shards."""
    student, teacher, _ = make(TOKENS, COLUMNS, dtype=dtype, **settings)
    return student, teacher, torch.tensor([0, 19, 31, 28, 70])


def statistics_of(student, teacher, targets, shard):
    """What the gradient needs, from the torch path; with a teacher also `mixture_kl`."""
    local = tiles.local_statistics(student, teacher, targets, shard, tiles.compute_dtype(student.dtype))
    token = tiles.token_statistics(local, shard.temperature)
    if teacher is None:
        return token
    sums = tiles.mixture_sums(student, teacher, token, shard, 0.3)
    return token._replace(mixture_kl=sums[:, 0])


def upstream_of(names, dtype):
    factors = mixed_factors(TOKENS, names)
    return Upstream(**{name: factor.to(dtype) for name, factor in factors.items()})


def both_gradients(run, student, teacher, targets, names, shard, dtype=None):
    """(Triton's, the torch path's) in fresh memory of `dtype`, that of the student without one."""
    token = statistics_of(student, teacher, targets, shard)
    upstream = upstream_of(names, token.lse.dtype)
    out = torch.full(student.shape, 7.0, dtype=dtype or student.dtype)
    ours = run(triton_cases.gradient, student, teacher, targets, token, upstream, shard, out.clone(), 0.3)
    tiles.logits_gradient(student, teacher, targets, token, upstream, shard, teacher_weight=0.3, out=out)
    return ours, out


# ---- statistics


@pytest.mark.parametrize(("dtype", "temperature"), CASES, ids=str)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_statistics_equal_the_torch_paths(run, dtype, temperature, with_teacher):
    student, teacher, targets = rows(dtype)
    teacher = teacher if with_teacher else None
    for start, num_valid in SHARDS:
        shard = Shard(start, num_valid, temperature, group=None)
        ours = run(triton_cases.statistics, student, teacher, targets, shard)
        exact = tiles.local_statistics(student, teacher, targets, shard, tiles.compute_dtype(dtype))
        torch.testing.assert_close(ours, exact, rtol=ERROR[dtype], atol=10 * ERROR[dtype])
        picked = [0, 3] if teacher is None else [0, 3, 5, 8]
        assert torch.equal(ours[:, picked], exact[:, picked])


def test_shards_join_to_the_statistics_of_the_whole(run):
    student, teacher, targets = make(TOKENS, 30, scale=5.0)
    parts = []
    for start, width in ((0, 13), (13, 0), (13, 17)):
        z_s, z_t = (z[:, start : start + width] for z in (student, teacher))
        parts.append(run(triton_cases.statistics, z_s, z_t, targets, Shard(start, width, 0.6, None)))
    token = tiles.token_statistics(tiles.join(torch.stack(parts), 0.6), 0.6)
    exact = reference.distill_stats(student, teacher, targets, temperature=0.6)
    check_stats(token, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("minus_infinity", ["student", "teacher", "both"])
@pytest.mark.parametrize("columns", [slice(0, 9), slice(4, 29), slice(0, 29)], ids=str)
def test_minus_infinity_in_a_tile_a_lane_or_a_row_counts_as_on_the_torch_path(run, minus_infinity, columns):
    student, teacher, targets = rows(torch.float32)
    for name, z in (("student", student), ("teacher", teacher)):
        if minus_infinity in (name, "both"):
            z[1:, columns] = -INF
    student[3, 5] = 300.0  # leaves no probability elsewhere
    shard = Shard(0, COLUMNS, 0.6, None)
    ours = run(triton_cases.statistics, student, teacher, targets, shard)
    exact = tiles.local_statistics(student, teacher, targets, shard, torch.float32)
    torch.testing.assert_close(ours, exact, rtol=3e-6, atol=3e-5)


def test_nan_spoils_its_own_row_only(run):
    student, teacher, targets = rows(torch.float32)
    student[1, 20], teacher[2, 3] = torch.nan, torch.nan
    local = run(triton_cases.statistics, student, teacher, targets, Shard(0, COLUMNS, 1.0, None))
    token = tiles.token_statistics(local, 1.0)
    assert token.entropy.isnan().tolist() == [False, True, False, False, False]
    assert token.reverse_kl.isnan().tolist() == [False, True, True, False, False]


def test_a_large_common_offset_costs_no_precision(run):
    """Logits that are multiples of 2^-12 keep their differences exactly when 300 is added."""
    student, teacher = ((z * 4096).round().float() / 4096 for z in rows()[:2])
    targets = torch.arange(TOKENS)
    shard = Shard(0, COLUMNS, 1.0, None)
    for offset in (300.0, -300.0):
        at, moved = (
            tiles.token_statistics(run(triton_cases.statistics, z_s, z_t, targets, shard), 1.0)
            for z_s, z_t in ((student, teacher), (student + offset, teacher + offset))
        )
        check_stats(moved, at, rtol=0, atol=1e-6)


# ---- the mixture


@pytest.mark.parametrize(("dtype", "temperature"), CASES, ids=str)
def test_sums_of_the_mixture_equal_the_torch_paths(run, dtype, temperature):
    student, teacher, targets = rows(dtype)
    student[:, 4], teacher[:, 5] = -INF, -INF
    teacher[1] = student[1]
    teacher[2] = student[2] + 2.0**-10 * teacher[2]  # nearly the same distribution
    for start, num_valid in SHARDS:
        shard = Shard(start, num_valid, temperature, group=None)
        token = statistics_of(student, teacher, targets, Shard(0, COLUMNS, temperature, None))
        ours = run(triton_cases.mixture, student, teacher, token, shard, 0.3)
        exact = tiles.mixture_sums(student, teacher, token, shard, 0.3)
        torch.testing.assert_close(ours, exact, rtol=ERROR[dtype], atol=ERROR[dtype] / 10)


# ---- the gradient


@pytest.mark.parametrize(
    ("names", "temperature"),
    [*(((name,), 0.6) for name in NAMES), (NAMES, 0.6), (NAMES, 1.0), ((), 0.6)],
    ids=str,
)
def test_the_gradient_of_each_statistic_alone_and_mixed_equals_the_torch_paths(run, names, temperature):
    student, teacher, targets = rows()
    for start, num_valid in SHARDS:
        if num_valid:
            shard = Shard(start, num_valid, temperature, group=None)
            ours, exact = both_gradients(run, student, teacher, targets, names, shard)
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)
            assert (ours[:, num_valid:] == 7.0).all()  # not this kernel's to write


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_the_gradient_has_the_precision_of_its_dtype(run, dtype, teacher_dtype):
    student, teacher, targets = rows(dtype)
    shard = Shard(0, COLUMNS, 0.6, group=None)
    ours, exact = both_gradients(run, student, teacher.to(teacher_dtype), targets, NAMES, shard)
    rounding = HALF_ERROR if dtype.itemsize == 2 else ERROR[dtype]
    torch.testing.assert_close(ours, exact, rtol=rounding, atol=ERROR[dtype])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_gradient_of_the_students_own_statistics_needs_no_teacher(run, with_teacher):
    student, teacher, targets = rows()
    shard = Shard(0, COLUMNS, 0.6, group=None)
    names = ("logprob", "entropy")
    ours, exact = both_gradients(run, student, teacher if with_teacher else None, targets, names, shard)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("logits_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_the_gradient_may_lie_over_the_students_logits(run, logits_dtype, dtype):
    student, teacher, targets = rows(logits_dtype)
    shard = Shard(0, COLUMNS - 2, 0.6, group=None)
    token = statistics_of(student, teacher, targets, shard)
    upstream = upstream_of(NAMES, token.lse.dtype)
    arguments = (student, teacher, targets, token, upstream, shard)
    apart = run(triton_cases.gradient, *arguments, torch.empty(student.shape, dtype=dtype))
    over = run(triton_cases.gradient, student.clone(), *arguments[1:], dtype)
    assert torch.equal(over[:, :-2], apart[:, :-2])


def test_no_weight_on_a_statistic_that_is_infinite_gives_no_gradient(run):
    student, teacher, targets = rows(torch.float32)
    student[1, 3:9], student[2, 4], teacher[2:, 20] = -INF, -INF, -INF
    shard = Shard(0, COLUMNS, 1.0, group=None)
    token = statistics_of(student, teacher, targets, shard)
    upstream = upstream_of(NAMES, torch.float32)
    upstream.reverse_kl[2:] = 0.0  # it is infinite there, as the forward one is in row 1
    out = torch.empty_like(student)
    ours = run(triton_cases.gradient, student, teacher, targets, token, upstream, shard, out.clone(), 0.3)
    tiles.logits_gradient(student, teacher, targets, token, upstream, shard, teacher_weight=0.3, out=out)
    assert ours.isfinite().all() and token.reverse_kl[2:].isinf().all()
    torch.testing.assert_close(ours, out, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equal_models_have_no_divergence_and_no_gradient(run, temperature):
    student, _, targets = rows(torch.float32)
    student[:, 11] = -INF
    shard = Shard(0, COLUMNS, temperature, group=None)
    local = run(triton_cases.statistics, student, student.clone(), targets, shard)
    token = tiles.token_statistics(local, temperature)
    assert not token.reverse_kl.any() and not token.forward_kl.any()
    sums = run(triton_cases.mixture, student, student.clone(), token, shard, 0.3)
    assert not sums.any()
    token = token._replace(mixture_kl=sums[:, 0])
    upstream = upstream_of(("reverse_kl", "forward_kl", "jsd"), torch.float32)
    out = torch.empty_like(student)
    arguments = (student, student.clone(), targets, token, upstream, shard, out)
    assert not run(triton_cases.gradient, *arguments).any()


def test_the_layout_in_memory_does_not_matter(run):
    """Columns apart, rows apart, and one number expanded to all tokens."""
    student, teacher, targets = rows()
    shard = Shard(0, COLUMNS, 0.6, group=None)
    token = statistics_of(student, teacher, targets, shard)
    upstream = Upstream(*(torch.tensor(0.5 + i, dtype=torch.float64).expand(TOKENS) for i in range(5)))
    z_s, z_t = student.T.contiguous().T, torch.cat([teacher, teacher], dim=1)[:, :COLUMNS]
    apart = torch.empty(COLUMNS, TOKENS, dtype=torch.float64).T
    spread = torch.stack([targets, targets], dim=1)[:, 0]
    ours = run(triton_cases.gradient, z_s, z_t, spread, token, upstream, shard, apart, 0.3)
    dense = torch.empty_like(student)
    tiles.logits_gradient(student, teacher, targets, token, upstream, shard, teacher_weight=0.3, out=dense)
    torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-13)
    local = run(triton_cases.statistics, z_s, z_t, spread, shard)
    exact = tiles.local_statistics(student, teacher, targets, shard, torch.float64)
    torch.testing.assert_close(local, exact, rtol=1e-12, atol=1e-13)
    sums = run(triton_cases.mixture, z_s, z_t, token, shard, 0.3)
    torch.testing.assert_close(
        sums, tiles.mixture_sums(student, teacher, token, shard, 0.3), rtol=1e-12, atol=1e-13
    )


# ---- the kernels on top, in tiles as they are on a GPU


@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float64, 1e-13, 1e-14), (torch.float32, 2e-6, 2e-6), (torch.bfloat16, 2e-6, HALF_ERROR)],
    ids=str,
)
def test_distill_stats_equals_the_reference(run, dtype, value_error, gradient_error):
    student, teacher, targets = make(4, 2300, dtype=dtype, scale=1.5)
    settings = {"temperature": 0.6, "vocab_size": 2200}
    targets, factors = targets % 2200, mixed_factors(4)
    stats, grad = run(triton_cases.distill_stats, student, teacher, targets, factors, settings)
    z_s, z_t = student[:, :2200].double().requires_grad_(True), teacher[:, :2200]
    exact = reference.distill_stats(z_s, z_t, targets, temperature=0.6)
    check_stats(stats, type(exact)(*(value.detach() for value in exact)), rtol=value_error, atol=value_error)
    sum((getattr(exact, name) * factor).sum() for name, factor in factors.items()).backward()
    scale = z_s.grad.abs().max().item()
    torch.testing.assert_close(
        grad[:, :2200].double(), z_s.grad, rtol=gradient_error, atol=gradient_error * scale + 1e-15
    )
    assert grad.dtype == dtype and not grad[:, 2200:].any()


def test_jensen_shannon_equals_the_reference(run):
    student, teacher, _ = make(4, 300, dtype=torch.float32)
    settings = {"teacher_weight": 0.3, "temperature": 0.6}
    factor = torch.randn(4, generator=torch.Generator().manual_seed(1))
    jsd, grad = run(triton_cases.jensen_shannon, student, teacher, factor, settings)
    leaf = student.double().requires_grad_(True)
    exact = reference.jensen_shannon(leaf, teacher, **settings)
    (exact * factor).sum().backward()
    torch.testing.assert_close(jsd.double(), exact.detach(), rtol=3e-6, atol=3e-7)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=3e-6, atol=3e-7)


def test_a_tiny_jensen_shannon_divergence_keeps_its_digits(run):
    """About 1e-7 nats, where the logarithm of a ratio near 1 would lose what it is made of."""
    student, noise, _ = make(4, 300, dtype=torch.float32)
    teacher = student + noise / 3000
    jsd, _ = run(triton_cases.jensen_shannon, student, teacher, torch.ones(4), {"teacher_weight": 0.3})
    exact = reference.jensen_shannon(student, teacher, teacher_weight=0.3)
    assert exact.max() < 3e-7
    torch.testing.assert_close(jsd.double(), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_distill_loss_equals_the_reference(run, dtype, error):
    """Of several chunks; the table's gradient is made from the one that lies over the logits."""
    inputs, factors = hidden.make(dtype=dtype), hidden.coefficients()
    settings = {"chunk_tokens": 3, "temperature": 0.6, "jsd_weight": 0.3}
    loss, stats, *gradients = run(triton_cases.distill_loss, inputs, factors, settings)
    exact_loss, exact_stats, *exact_gradients = hidden.exactly(
        inputs, factors, temperature=0.6, jsd_weight=0.3
    )
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    hidden.check_stats(stats, exact_stats, rtol=1e-5, atol=1e-5)
    for ours, exact in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == dtype and hidden.relative_error(ours, exact) < error


def test_no_tokens_have_no_statistics_and_no_gradient(run):
    student, teacher, targets = make(0, 12, dtype=torch.float32)
    factors = mixed_factors(0)
    stats, grad = run(triton_cases.distill_stats, student, teacher, targets, factors, {})
    assert all(value.shape == (0,) for value in stats) and grad.shape == (0, 12)
    jsd, grad = run(triton_cases.jensen_shannon, student, teacher, torch.zeros(0), {})
    assert jsd.shape == (0,) and grad.shape == (0, 12)
