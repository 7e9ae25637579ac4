"""Triton kernels of the passes over a shard; `triton_tiles` launches them.

One program works through one row, in tiles of columns in ascending order, and needs no temporary outside
registers. Rows are many more than a GPU has multiprocessors (a chunk has 2048), so columns are not split over
programs. Letters as in `tiles`.

Strides are arguments, of which Triton compiles the value 1 apart: contiguous rows are read in vectors, and
any other layout without a copy. Names in capitals are compiled in: temperature and the teacher's weight are
constants of a run, and as such keep the precision of float64.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

# ---- what the kernels share


@triton.jit
def _read(row, columns, num_columns, stride, WIDE: tl.constexpr):
    """A tile of a row of logits; -inf, which contributes nothing, beyond its end."""
    pointers = row + columns.to(tl.int64) * stride
    return tl.load(pointers, mask=columns < num_columns, other=float("-inf")).to(WIDE)


@triton.jit
def _cooled(value, TEMPERATURE: tl.constexpr):
    """Over temperature. A product with its inverse could be fused into a subtraction, and then the difference
    of equals is not 0.
    """
    if TEMPERATURE != 1.0:
        value = value / TEMPERATURE
    return value


@triton.jit
def _centred(z, maximum, TEMPERATURE: tl.constexpr):
    """(z - maximum) / temperature, in this order; logits that are all -inf stay so."""
    return _cooled(z - tl.where(maximum == float("-inf"), 0.0, maximum), TEMPERATURE)


@triton.jit
def _exp(x):
    """Through exp2, which leaves out the care for results below 1e-38 that would cost as much again."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _times(factor, value):
    """factor * value with 0 * inf = 0."""
    return tl.where(factor == 0, 0.0, factor * value)


@triton.jit
def _rebase(maximum, total, new_maximum, TEMPERATURE: tl.constexpr):
    """(shift, e^shift) of sums that move to another maximum. Nothing was summed where the total is 0: shift 0
    instead of the -inf that would make NaN.
    """
    shift = _cooled(tl.where(total == 0, 0.0, maximum - new_maximum), TEMPERATURE)
    return shift, _exp(shift)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in (-1, 0]: the rounding error of 1 + x cancels in the quotient."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / (y - 1.0))


@triton.jit
def _expm1(x):
    """e^x - 1 for x in [-inf, 0]: the rounding error of e^x cancels in the quotient."""
    y = _exp(x)
    return tl.where(y == 1.0, x, tl.where(y < 0.25, y - 1.0, (y - 1.0) * x / tl.log(y)))


@triton.jit
def _to_mixture(u, v, TEACHER_WEIGHT: tl.constexpr):
    """(log p - log m, log q - log m) with m = (1 - b) p + b q, exactly 0 where p = q."""
    difference = v - u
    # The larger of p and q is factored out of m, so that nothing overflows.
    smaller = (difference > 0).to(u.dtype) * (1.0 - 2.0 * TEACHER_WEIGHT) + TEACHER_WEIGHT
    log_ratio = _log1p(_expm1(-tl.abs(difference)) * smaller)
    return -(tl.maximum(difference, 0.0) + log_ratio), -(tl.maximum(-difference, 0.0) + log_ratio)


# ---- statistics
#
# Lanes share a row's columns as shards share a vocabulary: each keeps sums on a maximum of its own, and they
# are joined at the row's end. A lane is one thread or two, so that threads need not talk in between.


@triton.jit
def _advance(z, maximum, total, TEMPERATURE: tl.constexpr):
    """One model's part of a step: each lane's new maximum and total, its logits centred on that maximum,
    their exponentials, and how the lane's earlier sums move.
    """
    new_maximum = tl.maximum(maximum, tl.max(z, 1))
    centred = _centred(z, new_maximum[:, None], TEMPERATURE)
    weight = _exp(centred)
    shift, scale = _rebase(maximum, total, new_maximum, TEMPERATURE)
    return new_maximum, scale * total + tl.sum(weight, 1), centred, weight, shift, scale


@triton.jit
def _joined(maximum, total, TEMPERATURE: tl.constexpr):
    """The row's maximum and total, and how the sums of each lane move to that maximum."""
    whole = tl.max(maximum, 0)
    shift, scale = _rebase(maximum, total, whole, TEMPERATURE)
    return whole, tl.sum(scale * total, 0), shift, scale


@triton.jit
def statistics(
    student,
    teacher,
    targets,
    out,
    start,
    num_columns,
    student_row,
    student_column,
    teacher_row,
    teacher_column,
    TEMPERATURE: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    LANE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    student += row * student_row
    m_s = tl.full((LANES,), float("-inf"), WIDE)
    total_s = tl.zeros((LANES,), WIDE)
    moment = tl.zeros((LANES,), WIDE)
    if teacher is not None:
        teacher += row * teacher_row
        m_t = tl.full((LANES,), float("-inf"), WIDE)
        total_t = tl.zeros((LANES,), WIDE)
        cross_s = tl.zeros((LANES,), WIDE)
        cross_t = tl.zeros((LANES,), WIDE)
    within = tl.arange(0, LANES)[:, None] * LANE_COLUMNS + tl.arange(0, LANE_COLUMNS)[None, :]
    for first in range(0, num_columns, LANES * LANE_COLUMNS):
        z_s = _read(student, first + within, num_columns, student_column, WIDE)
        new_m_s, new_total_s, u, e_s, shift_s, scale_s = _advance(z_s, m_s, total_s, TEMPERATURE)
        moment = _times(scale_s, moment + total_s * shift_s) + tl.sum(_times(e_s, u), 1)
        if teacher is not None:
            z_t = _read(teacher, first + within, num_columns, teacher_column, WIDE)
            new_m_t, new_total_t, v, e_t, shift_t, scale_t = _advance(z_t, m_t, total_t, TEMPERATURE)
            cross_s = _times(scale_s, cross_s + total_s * (shift_s - shift_t)) + tl.sum(_times(e_s, u - v), 1)
            cross_t = _times(scale_t, cross_t + total_t * (shift_t - shift_s)) + tl.sum(_times(e_t, v - u), 1)
            m_t = new_m_t
            total_t = new_total_t
        m_s = new_m_s
        total_s = new_total_s

    whole_m_s, whole_total_s, shift_s, scale_s = _joined(m_s, total_s, TEMPERATURE)
    target = tl.load(targets + row) - start
    owned = (target >= 0) & (target < num_columns)
    y_s = tl.load(student + target * student_column, mask=owned, other=float("-inf"))
    fields = out + row * (4 if teacher is None else 9)
    tl.store(fields, whole_m_s)
    tl.store(fields + 1, whole_total_s)
    tl.store(fields + 2, tl.sum(_times(scale_s, moment + total_s * shift_s), 0))
    tl.store(fields + 3, y_s.to(WIDE))
    if teacher is not None:
        whole_m_t, whole_total_t, shift_t, scale_t = _joined(m_t, total_t, TEMPERATURE)
        y_t = tl.load(teacher + target * teacher_column, mask=owned, other=float("-inf"))
        tl.store(fields + 4, tl.sum(_times(scale_s, cross_s + total_s * (shift_s - shift_t)), 0))
        tl.store(fields + 5, whole_m_t)
        tl.store(fields + 6, whole_total_t)
        tl.store(fields + 7, tl.sum(_times(scale_t, cross_t + total_t * (shift_t - shift_s)), 0))
        tl.store(fields + 8, y_t.to(WIDE))


# ---- the mixture


@triton.jit
def mixture(
    student,
    teacher,
    maximum,
    lse,
    teacher_maximum,
    teacher_lse,
    out,
    num_columns,
    student_row,
    student_column,
    teacher_row,
    teacher_column,
    TEACHER_WEIGHT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    m_s, lse_s = tl.load(maximum + row), tl.load(lse + row)
    m_t, lse_t = tl.load(teacher_maximum + row), tl.load(teacher_lse + row)
    from_student = tl.zeros((COLUMNS,), WIDE)
    from_teacher = tl.zeros((COLUMNS,), WIDE)
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        z_s = _read(student, columns, num_columns, student_column, WIDE)
        z_t = _read(teacher, columns, num_columns, teacher_column, WIDE)
        u = _centred(z_s, m_s, TEMPERATURE) - lse_s
        v = _centred(z_t, m_t, TEMPERATURE) - lse_t
        from_p, from_q = _to_mixture(u, v, TEACHER_WEIGHT)
        from_student += _times(_exp(u), from_p)
        from_teacher += _times(_exp(v), from_q)
    tl.store(out + row * 2, tl.sum(from_student, 0))
    tl.store(out + row * 2 + 1, tl.sum(from_teacher, 0))


# ---- the gradient


@triton.jit
def gradient(
    student,
    teacher,
    targets,
    out,
    maximum,
    lse,
    teacher_maximum,
    teacher_lse,
    entropy,
    reverse_kl,
    mixture_kl,
    g_logprob,
    g_reverse_kl,
    g_forward_kl,
    g_entropy,
    g_jsd,
    start,
    num_columns,
    student_row,
    student_column,
    teacher_row,
    teacher_column,
    out_row,
    out_column,
    TEACHER_WEIGHT: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    out += row * out_row
    m_s, lse_s = tl.load(maximum + row), tl.load(lse + row)
    if teacher is not None:
        teacher += row * teacher_row
        m_t, lse_t = tl.load(teacher_maximum + row), tl.load(teacher_lse + row)
    constant = tl.full((), 0.0, WIDE)
    if g_logprob is not None:
        target = (tl.load(targets + row) - start).to(tl.int32)
        g_L = tl.load(g_logprob + row)
        constant -= g_L
    if g_reverse_kl is not None:
        g_R = tl.load(g_reverse_kl + row)
        constant -= _times(g_R, tl.load(reverse_kl + row))
    if g_entropy is not None:
        g_H = tl.load(g_entropy + row)
        constant -= _times(g_H, tl.load(entropy + row))
    if g_jsd is not None:
        g_J = tl.load(g_jsd + row) * (1.0 - TEACHER_WEIGHT)
        constant -= g_J * tl.load(mixture_kl + row)
    if g_forward_kl is not None:
        g_F = tl.load(g_forward_kl + row)
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        z_s = _read(student, columns, num_columns, student_column, WIDE)
        u = _centred(z_s, m_s, TEMPERATURE) - lse_s
        p = _exp(u)
        bracket = tl.zeros_like(u) + constant
        if teacher is not None:
            z_t = _read(teacher, columns, num_columns, teacher_column, WIDE)
            v = _centred(z_t, m_t, TEMPERATURE) - lse_t
        if g_reverse_kl is not None:
            bracket += _times(g_R, u - v)
        if g_entropy is not None:
            bracket -= _times(g_H, u)
        if g_jsd is not None:
            from_p, _ = _to_mixture(u, v, TEACHER_WEIGHT)
            bracket += _times(g_J, from_p)
        dz = _times(p, bracket)
        if g_forward_kl is not None:
            dz += g_F * (p - _exp(v))  # exactly 0 where p = q, also when fused into one operation
        if g_logprob is not None:
            dz += tl.where(columns == target, g_L, 0.0)
        dz = _cooled(dz, TEMPERATURE)
        # `out` may lie over the student's row. Its numbers are no wider than those, so what this tile writes
        # ends before the next tile's logits begin; but another thread's part of this tile, or a warp that is
        # a tile behind, may still have to be read.
        tl.debug_barrier()
        tl.store(
            out + columns.to(tl.int64) * out_column,
            dz.to(out.dtype.element_ty),
            mask=columns < num_columns,
        )
