"""Closed-form matting to 8-bit accuracy, several times faster than the general solver: one sparse factorisation.

The unknown pixels of a trimap are a band along the outline. Numbered along the band, their matting Laplacian has a
narrow envelope, and its Cholesky factor costs less than the incomplete one that pymatting makes in the image's own
order. The factor is kept in single precision and polished by conjugate gradients in double, usually one step. Work and
memory follow the unknown pixels, not the frame.

The Laplacian is Levin et al. 2007, equation 12, with pymatting's constants (3 × 3 windows, epsilon 1e-7) and, where
that is possible, its very order of operations: where one colour direction dominates a window by 1e7, the textbook
inverse of its 3 × 3 covariance has only two or three good digits, and only the same rounding gives the same matte. If
rounding has made the matrix indefinite (it happens in flat dark regions), it is assembled again by a stable inverse.
"""

from __future__ import annotations

import numpy as np
from numba import njit

EPSILON = 1e-7
"""Regularisation of the windows' covariance, pymatting's default."""

TOLERANCE = 5e-4
"""Largest estimated error of any pixel at which the iteration stops: an eighth of an 8-bit step."""

MAX_ITERATIONS = 2000
MAX_ENVELOPE = 30_000_000
"""Entries of the factor (4 bytes each). Beyond it the region is cut into tiles, which cost more iterations."""

TILES_PX = (1 << 30, 192, 96, 48)

# sums may be reordered into vector lanes; infinities and NaN keep their meaning
_FAST = {"contract", "reassoc", "nsz"}


def solve_alpha(image: np.ndarray, trimap: np.ndarray, *, tolerance: float = TOLERANCE) -> np.ndarray:
    """Alpha matte (H W float32 in [0, 1]); known pixels keep the trimap's value.

    Args:
        image: H W 3 uint8.
        trimap: H W float: 0 background, 1 foreground, else unknown; both kinds of known pixels must occur.
        tolerance: largest estimated error of a pixel, of 1.

    Raises:
        ArithmeticError: no convergence, which no photograph has shown so far.
    """
    alpha = trimap.astype(np.float32)
    unknown = (trimap > 0) & (trimap < 1)
    if not unknown.any() or min(trimap.shape) < 3:  # no window fits: nothing is known about the unknown
        return alpha
    rows, columns = np.flatnonzero(unknown.any(axis=1)), np.flatnonzero(unknown.any(axis=0))
    # a window that holds an unknown pixel reaches two pixels beyond it
    box = np.s_[max(0, rows[0] - 2) : rows[-1] + 3, max(0, columns[0] - 2) : columns[-1] + 3]
    state = np.where(unknown, 2, trimap > 0)[box].astype(np.uint8)
    crop = image[box] / 255.0
    index, part, positions, neighbours, first, start = _plan(state)
    width = index.shape[1] + 4
    for stable in (False, True):
        values, rhs = _laplacian(crop, state, index, len(positions), EPSILON, stable)
        factor = np.zeros(start[-1], np.float32)
        num_bad = _factorise(values, positions, width, neighbours, part, first, start, factor)
        if num_bad and not stable:
            continue
        solution = np.zeros(len(positions))
        steps = _conjugate_gradients(
            values,
            positions,
            width,
            np.zeros(neighbours.size),
            factor,
            start,
            first,
            rhs,
            solution,
            tolerance,
            MAX_ITERATIONS,
        )
        if steps < MAX_ITERATIONS and np.isfinite(solution).all():
            alpha[box][unknown[box]] = np.clip(solution[index[index >= 0]], 0, 1)
            return alpha
    raise ArithmeticError(
        f"closed-form matting of {len(positions)} unknown pixels did not converge in {MAX_ITERATIONS} steps; "
        "use matting.engine=pymatting for this photograph"
    )


def _plan(state: np.ndarray) -> tuple[np.ndarray, ...]:
    """Numbering and shape of the factor, for the largest tiles whose factor fits into memory.

    Returns:
        index (H W int32, −1 where known), part of each unknown, its position in the frame padded by two, the index in
        that frame, and for every four rows of the factor their first column and where they start.
    """
    for tile_px in TILES_PX:
        index, part = _number(state, tile_px)
        padded = np.full((index.shape[0] + 4, index.shape[1] + 4), -1, np.int32)
        padded[2:-2, 2:-2] = index
        neighbours = padded.ravel()
        positions = np.empty(len(part), np.int32)
        flat = np.flatnonzero(neighbours >= 0)
        positions[neighbours[flat]] = flat
        first, start = _envelope(positions, padded.shape[1], neighbours, part)
        if start[-1] <= MAX_ENVELOPE:
            break
    return index, part, positions, neighbours, first, start


@njit(cache=True)
def _number(state, tile_px):
    """Unknown pixels numbered breadth-first along each connected part (reverse Cuthill–McKee on the 8-neighbourhood).

    The search starts from an end of the part, found by two searches before. Parts do not reach across tiles.
    """
    height, width = state.shape
    index = np.full((height, width), -1, np.int32)
    part_of = np.empty(height * width, np.int32)
    visited = np.zeros((height, width), np.int32)
    queue = np.empty(height * width, np.int32)
    mark, count, part = 0, 0, 0
    for y in range(height):
        for x in range(width):
            if state[y, x] != 2 or index[y, x] >= 0:
                continue
            seed = y * width + x
            size = 0
            for _ in range(3):
                mark += 1
                size = _search(state, seed, mark, visited, queue, tile_px)
                seed = queue[size - 1]
            for k in range(size):
                # in reverse, which makes the envelope smaller
                pixel = queue[size - 1 - k]
                index[pixel // width, pixel % width] = count
                part_of[count] = part
                count += 1
            part += 1
    return index, part_of[:count].copy()


@njit(cache=True)
def _search(state, seed, mark, visited, queue, tile_px):
    """Breadth-first order of the part around ``seed`` into ``queue``; its size."""
    height, width = state.shape
    queue[0] = seed
    visited[seed // width, seed % width] = mark
    head, tail = 0, 1
    while head < tail:
        y, x = queue[head] // width, queue[head] % width
        head += 1
        for ny in range(max(0, y - 1), min(height, y + 2)):
            for nx in range(max(0, x - 1), min(width, x + 2)):
                same_tile = ny // tile_px == y // tile_px and nx // tile_px == x // tile_px
                if same_tile and state[ny, nx] == 2 and visited[ny, nx] != mark:
                    visited[ny, nx] = mark
                    queue[tail] = ny * width + nx
                    tail += 1
    return tail


@njit(cache=True)
def _laplacian(image, state, index, num_unknown, epsilon, stable):
    """Rows of the matting Laplacian for the unknown pixels, and what their known neighbours contribute.

    Returns:
        values (U 25 float64): the 5 × 5 neighbourhood of each unknown, zero where known; right-hand side (U).
    """
    height, width = state.shape
    values = np.zeros((num_unknown, 25))
    rhs = np.zeros(num_unknown)
    c = np.empty((9, 3))  # colours of a window, centred
    ks = np.empty(9, np.int32)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            any_unknown = False
            for i in range(9):
                ks[i] = index[y + i // 3 - 1, x + i % 3 - 1]
                any_unknown |= ks[i] >= 0
            if not any_unknown:
                continue
            for channel in range(3):
                total = 0.0
                for i in range(9):
                    total += image[y + i // 3 - 1, x + i % 3 - 1, channel]
                for i in range(9):
                    c[i, channel] = image[y + i // 3 - 1, x + i % 3 - 1, channel] - total / 9
            a00, a01, a02, a11, a12, a22 = epsilon, 0.0, 0.0, epsilon, 0.0, epsilon
            for i in range(9):
                a00 += c[i, 0] * c[i, 0]
                a01 += c[i, 0] * c[i, 1]
                a02 += c[i, 0] * c[i, 2]
                a11 += c[i, 1] * c[i, 1]
                a12 += c[i, 1] * c[i, 2]
                a22 += c[i, 2] * c[i, 2]
            a00, a01, a02, a11, a12, a22 = a00 / 9, a01 / 9, a02 / 9, a11 / 9, a12 / 9, a22 / 9
            m00, m01, m02, m11, m12, m22 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            l10, l20, l21, d1, d2 = 0.0, 0.0, 0.0, 0.0, 0.0
            if stable:
                # L D Lᵀ of the covariance: exact to machine precision × its condition, whatever the colours
                l10, l20 = a01 / a00, a02 / a00
                d1 = a11 - l10 * a01
                l21 = (a12 - l20 * a01) / d1
                d2 = a22 - l20 * a02 - l21 * l21 * d1
            else:
                det = a00 * a12 * a12 + a01 * a01 * a22 + a02 * a02 * a11 - a00 * a11 * a22 - 2 * a01 * a02 * a12
                inverse = 1.0 / det
                m00 = (a12 * a12 - a11 * a22) * inverse
                m01 = (a01 * a22 - a02 * a12) * inverse
                m02 = (a02 * a11 - a01 * a12) * inverse
                m11 = (a02 * a02 - a00 * a22) * inverse
                m12 = (a00 * a12 - a01 * a02) * inverse
                m22 = (a01 * a01 - a00 * a11) * inverse
            for i in range(9):
                k = ks[i]
                if k < 0:
                    continue
                s, t, u = c[i, 0], c[i, 1], c[i, 2]
                if stable:
                    t -= l10 * s
                    u = (u - l20 * s - l21 * t) / d2
                    t = t / d1 - l21 * u
                    s = s / a00 - l10 * t - l20 * u
                else:
                    s, t, u = m00 * s + m01 * t + m02 * u, m01 * s + m11 * t + m12 * u, m02 * s + m12 * t + m22 * u
                for j in range(9):
                    affinity = s * c[j, 0] + t * c[j, 1] + u * c[j, 2]
                    value = (1.0 if i == j else 0.0) - (1 + affinity) / 9
                    if ks[j] >= 0:
                        values[k, (j // 3 - i // 3 + 2) * 5 + j % 3 - i % 3 + 2] += value
                    elif state[y + j // 3 - 1, x + j % 3 - 1] == 1:
                        rhs[k] -= value
    return values, rhs


@njit(cache=True)
def _envelope(positions, width, neighbours, part):
    """For every four rows of the factor, the first column they need (a multiple of four) and where they are stored."""
    n = len(positions)
    groups = (n + 3) // 4
    first = np.empty(groups, np.int64)
    start = np.zeros(groups + 1, np.int64)
    for g in range(groups):
        lowest = 4 * g
        for i in range(4 * g, min(n, 4 * g + 4)):
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    j = neighbours[positions[i] + dy * width + dx]
                    if 0 <= j < lowest and part[j] == part[i]:
                        lowest = j
        first[g] = lowest // 4 * 4
        start[g + 1] = start[g] + 4 * (4 * g + 4 - first[g])
    return first, start


@njit(inline="always")
def _flush(value, tiny):
    # a factor decays along the band; numbers below the normal range would cost a hundred cycles each
    return value if abs(value) > tiny else value * 0


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def _factorise(values, positions, width, neighbours, part, first, start, factor):
    """Cholesky factor of the Laplacian within its envelope, four rows at a time; the diagonal holds its inverse.

    Returns:
        Number of pivots that were not positive and were replaced.
    """
    n, groups = len(positions), len(first)
    num_bad = 0
    zero, one = np.float32(0), np.float32(1)
    tiny, floor = np.float32(1e-18), np.float32(1e-6)
    for g in range(groups):
        begin, c = first[g], 4 * g
        length = c + 4 - begin
        for r in range(4):
            i, row = c + r, start[g] + r * length - begin
            if i >= n:
                factor[row + i] = one
                continue
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    j = neighbours[positions[i] + dy * width + dx]
                    if 0 <= j <= i and part[j] == part[i]:
                        factor[row + j] = values[i, (dy + 2) * 5 + dx + 2]
        r0 = start[g] - begin
        r1, r2, r3 = r0 + length, r0 + 2 * length, r0 + 3 * length
        for h in range(begin // 4, g):
            e, other = 4 * h, first[h]
            low = max(begin, other)
            s0 = start[h] - other
            s1, s2, s3 = s0 + e + 4 - other, s0 + 2 * (e + 4 - other), s0 + 3 * (e + 4 - other)
            # slices, so that the compiler knows the indices are not negative and vectorises
            x0, x1, x2, x3 = (
                factor[r0 + low : r0 + e],
                factor[r1 + low : r1 + e],
                factor[r2 + low : r2 + e],
                factor[r3 + low : r3 + e],
            )
            y0, y1, y2, y3 = (
                factor[s0 + low : s0 + e],
                factor[s1 + low : s1 + e],
                factor[s2 + low : s2 + e],
                factor[s3 + low : s3 + e],
            )
            a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = zero
            a20 = a21 = a22 = a23 = a30 = a31 = a32 = a33 = zero
            for k in range(e - low):
                a00 += x0[k] * y0[k]
                a01 += x0[k] * y1[k]
                a02 += x0[k] * y2[k]
                a03 += x0[k] * y3[k]
                a10 += x1[k] * y0[k]
                a11 += x1[k] * y1[k]
                a12 += x1[k] * y2[k]
                a13 += x1[k] * y3[k]
                a20 += x2[k] * y0[k]
                a21 += x2[k] * y1[k]
                a22 += x2[k] * y2[k]
                a23 += x2[k] * y3[k]
                a30 += x3[k] * y0[k]
                a31 += x3[k] * y1[k]
                a32 += x3[k] * y2[k]
                a33 += x3[k] * y3[k]
            d0, d1, d2, d3 = factor[s0 + e], factor[s1 + e + 1], factor[s2 + e + 2], factor[s3 + e + 3]
            l10, l20, l21 = factor[s1 + e], factor[s2 + e], factor[s2 + e + 1]
            l30, l31, l32 = factor[s3 + e], factor[s3 + e + 1], factor[s3 + e + 2]
            for r in range(4):
                q = r0 + r * length + e
                if r == 0:
                    b0, b1, b2, b3 = a00, a01, a02, a03
                elif r == 1:
                    b0, b1, b2, b3 = a10, a11, a12, a13
                elif r == 2:
                    b0, b1, b2, b3 = a20, a21, a22, a23
                else:
                    b0, b1, b2, b3 = a30, a31, a32, a33
                t0 = (factor[q] - b0) * d0
                t1 = (factor[q + 1] - b1 - t0 * l10) * d1
                t2 = (factor[q + 2] - b2 - t0 * l20 - t1 * l21) * d2
                t3 = (factor[q + 3] - b3 - t0 * l30 - t1 * l31 - t2 * l32) * d3
                factor[q], factor[q + 1] = _flush(t0, tiny), _flush(t1, tiny)
                factor[q + 2], factor[q + 3] = _flush(t2, tiny), _flush(t3, tiny)
        # the 4 × 4 block on the diagonal
        for r in range(4):
            row = r0 + r * length
            for s in range(r + 1):
                other_row = r0 + s * length
                x, z = factor[row + begin : row + c + s], factor[other_row + begin : other_row + c + s]
                total = zero
                for k in range(c + s - begin):
                    total += x[k] * z[k]
                value = factor[row + c + s] - total
                if s < r:
                    factor[row + c + s] = value * factor[other_row + c + s]
                else:
                    least = floor * factor[row + c + r]
                    if not value > least:
                        value = max(least, tiny)
                        num_bad += 1
                    factor[row + c + r] = one / np.sqrt(value)
    return num_bad


@njit(cache=True, fastmath=_FAST)
def _solve_factor(factor, start, first, residual, scratch, result):
    """``result`` ← (L Lᵀ)⁻¹ ``residual`` by substitution, forwards and backwards, four rows at a time."""
    n, groups = len(residual), len(first)
    zero, tiny = np.float32(0), np.float32(1e-18)
    for i in range(n):
        scratch[i] = residual[i]
    for g in range(groups):
        begin, c = first[g], 4 * g
        length = c + 4 - begin
        r0 = start[g] - begin
        r1, r2, r3 = r0 + length, r0 + 2 * length, r0 + 3 * length
        x0, x1, x2, x3 = (
            factor[r0 + begin : r0 + c],
            factor[r1 + begin : r1 + c],
            factor[r2 + begin : r2 + c],
            factor[r3 + begin : r3 + c],
        )
        y = scratch[begin:c]
        a0 = a1 = a2 = a3 = zero
        for k in range(c - begin):
            a0 += x0[k] * y[k]
            a1 += x1[k] * y[k]
            a2 += x2[k] * y[k]
            a3 += x3[k] * y[k]
        t0 = (scratch[c] - a0) * factor[r0 + c]
        t1 = (scratch[c + 1] - a1 - factor[r1 + c] * t0) * factor[r1 + c + 1]
        t2 = (scratch[c + 2] - a2 - factor[r2 + c] * t0 - factor[r2 + c + 1] * t1) * factor[r2 + c + 2]
        t3 = scratch[c + 3] - a3 - factor[r3 + c] * t0 - factor[r3 + c + 1] * t1 - factor[r3 + c + 2] * t2
        scratch[c], scratch[c + 1] = _flush(t0, tiny), _flush(t1, tiny)
        scratch[c + 2], scratch[c + 3] = _flush(t2, tiny), _flush(t3 * factor[r3 + c + 3], tiny)
    for g in range(groups - 1, -1, -1):
        begin, c = first[g], 4 * g
        length = c + 4 - begin
        r0 = start[g] - begin
        r1, r2, r3 = r0 + length, r0 + 2 * length, r0 + 3 * length
        t3 = scratch[c + 3] * factor[r3 + c + 3]
        t2 = (scratch[c + 2] - factor[r3 + c + 2] * t3) * factor[r2 + c + 2]
        t1 = (scratch[c + 1] - factor[r3 + c + 1] * t3 - factor[r2 + c + 1] * t2) * factor[r1 + c + 1]
        t0 = (scratch[c] - factor[r3 + c] * t3 - factor[r2 + c] * t2 - factor[r1 + c] * t1) * factor[r0 + c]
        scratch[c], scratch[c + 1], scratch[c + 2], scratch[c + 3] = t0, t1, t2, t3
        x0, x1, x2, x3 = (
            factor[r0 + begin : r0 + c],
            factor[r1 + begin : r1 + c],
            factor[r2 + begin : r2 + c],
            factor[r3 + begin : r3 + c],
        )
        y = scratch[begin:c]
        for k in range(c - begin):
            y[k] -= x0[k] * t0 + x1[k] * t1 + x2[k] * t2 + x3[k] * t3
    for i in range(n):
        result[i] = scratch[i]


@njit(cache=True, fastmath=_FAST)
def _multiply(values, positions, width, frame, vector, result):
    """``result`` ← Laplacian · ``vector``, through the padded ``frame`` whose known pixels stay zero."""
    for k in range(len(positions)):
        frame[positions[k]] = vector[k]
    for k in range(len(positions)):
        total = 0.0
        corner = positions[k] - 2 * width - 2
        for dy in range(5):
            for dx in range(5):
                total += values[k, 5 * dy + dx] * frame[corner + dy * width + dx]
        result[k] = total


@njit(cache=True, fastmath=_FAST)
def _conjugate_gradients(
    values, positions, width, frame, factor, start, first, rhs, solution, tolerance, max_iterations
):  # fmt: skip
    """Preconditioned by the factor, from zero, in double precision; the number of steps taken.

    The preconditioned residual estimates the error, because the factor is nearly exact.
    """
    n = len(rhs)
    residual, product, correction = rhs.copy(), np.empty(n), np.empty(n)
    scratch = np.zeros(4 * len(first), np.float32)
    _solve_factor(factor, start, first, residual, scratch, correction)
    direction = correction.copy()
    energy = 0.0
    for k in range(n):
        energy += residual[k] * correction[k]
    for step in range(max_iterations):
        largest = 0.0
        for k in range(n):
            largest = max(largest, abs(correction[k]))
        if largest < tolerance or energy <= 0:
            return step
        _multiply(values, positions, width, frame, direction, product)
        curvature = 0.0
        for k in range(n):
            curvature += direction[k] * product[k]
        if not curvature > 0:  # rounding has made the matrix indefinite
            return max_iterations
        size = energy / curvature
        for k in range(n):
            solution[k] += size * direction[k]
            residual[k] -= size * product[k]
        scratch[:] = 0
        _solve_factor(factor, start, first, residual, scratch, correction)
        new_energy = 0.0
        for k in range(n):
            new_energy += residual[k] * correction[k]
        turn = new_energy / energy
        energy = new_energy
        for k in range(n):
            direction[k] = correction[k] + turn * direction[k]
    return max_iterations
