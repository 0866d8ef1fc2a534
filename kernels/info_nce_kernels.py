"""The Triton kernels of info_nce.py and nt_xent.py.

Read `sweep_kernel` first, as a training step runs it: D = 128 columns in one CHUNK, bf16 projections and queue, a fixed
shift (not RUNNING), and a queue of whole tiles (WHOLE). Projections are operands as they are, of the queue's dtype, and
1 / |z| is part of a row's scale: so tensor cores read them from shared memory. The other forms:

- RUNNING: where the fixed shift would leave the range of the dtype, a running maximum takes its place.
- D > CHUNK: accumulators of all columns do not fit the registers, so further programs have the other columns, and
  each computes the scores anew.
- `exclusions`: of each row two keys count for nothing, by their numbers in the queue, or with `key_ids` all of one id.
- `key_log_z`: the weight of a key is of the softmax of that key, whose normaliser is given, and not of the row's. Then
  neither a maximum nor a sum is needed, and a weight is at most 1.
- `key_scale`: keys are raw as well, and key j counts as key_j * key_scale[j]: in fp32, so that a score has no rounding
  of its operands in it.

Z, A and p are those of info_nce.py. A logit is in powers of two: a score times log2(e) / T.
"""

import triton
import triton.language as tl

from fastmoco.kernels.dispatch import cast, dot

LN2, LOG2_E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
    base, start, count, column, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
):
    # Rows [start, start + ROWS) and columns [column, column + CHUNK) of a matrix [count, DIM]; zeros beyond.
    row, columns = tl.arange(0, ROWS), column + tl.arange(0, CHUNK)
    pointers = base + tl.cast(start, tl.int64) * DIM + (row[:, None] * DIM + columns[None, :])
    if DIM % CHUNK == 0:
        if WHOLE:
            return tl.load(pointers)
        return tl.load(pointers, mask=(start + row < count)[:, None], other=0.0)
    return tl.load(pointers, mask=(start + row < count)[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def _inverse_norm(squares):
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))  # F.normalize's


@triton.jit
def _inverse_norms(z_q, start, n, ROWS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    squares = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(0, DIM, CHUNK):
        z = _load_rows(z_q, start, n, column, ROWS, DIM, CHUNK, False).to(tl.float32)
        squares += tl.sum(z * z, 1)
    return _inverse_norm(squares)


@triton.jit
def _scores(
    q,
    keys,
    z_q,
    start,
    n,
    matrix,
    key_start,
    key_count,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # q @ keys'. Of several chunks, q and keys are this program's alone: all are loaded again.
    if DIM <= CHUNK:
        return dot(q, tl.trans(keys), None, PRECISION)
    s = tl.zeros([ROWS, KEYS], tl.float32)
    for column in range(0, DIM, CHUNK):
        part = _load_rows(z_q, start, n, column, ROWS, DIM, CHUNK, False)
        others = _load_rows(matrix, key_start, key_count, column, KEYS, DIM, CHUNK, WHOLE).to(part.dtype)
        s = dot(part, tl.trans(others), s, PRECISION)
    return s


@triton.jit
def _diagonal(square, ROWS: tl.constexpr):
    index = tl.arange(0, ROWS)
    return tl.sum(tl.where(index[:, None] == index[None, :], square, 0.0), 1)


@triton.jit
def _log2_scale(temperature, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        scale = LOG2_E / tl.load(temperature)
    else:
        scale = LOG2_E / temperature
    return scale


@triton.jit(do_not_specialize=["n", "size", "tiles_per_piece"])
def sweep_kernel(
    z_q,
    k,
    queue,
    exclusions,
    key_ids,
    key_log_z,
    key_scale,
    temperature,
    z_part,
    a_part,
    rank_part,
    shift_part,
    positive_out,
    n,
    size,
    tiles_per_piece,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    RUNNING: tl.constexpr,
    HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, piece, column = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * CHUNK
    operand: tl.constexpr = queue.dtype.element_ty
    q = _load_rows(z_q, start, n, column, BLOCK_N, DIM, CHUNK, False)
    log2_scale = _log2_scale(temperature, ON_DEVICE)
    scale = _inverse_norms(z_q, start, n, BLOCK_N, DIM, CHUNK) * log2_scale  # a score s is the logit s * scale

    rows = start + tl.arange(0, BLOCK_N)
    if exclusions is not None:
        first_out = tl.load(exclusions + rows, mask=rows < n, other=-1)
        if key_ids is None:
            second_out = tl.load(exclusions + n + rows, mask=rows < n, other=-1)
    if key_log_z is None:
        # The positive goes through the same instruction as the negatives, so that equal keys score equally.
        own = cast(_load_rows(k, start, n, column, BLOCK_N, DIM, CHUNK, False).to(tl.float32), operand)
        square = _scores(q, own, z_q, start, n, k, start, n, BLOCK_N, BLOCK_N, DIM, CHUNK, False, PRECISION)
        positive = _diagonal(square, BLOCK_N)
        if key_scale is not None:
            positive *= tl.load(key_scale + first_out, mask=rows < n, other=0.0)
        shift = positive * scale
    z = tl.zeros([BLOCK_N], tl.float32)
    a = tl.zeros([BLOCK_N, CHUNK], tl.float32)
    rank = tl.zeros([BLOCK_N], tl.float32)  # exact up to 2^24 keys a piece, and fewer instructions than an integer
    first = piece * tiles_per_piece
    for tile in range(first, tl.minimum(first + tiles_per_piece, tl.cdiv(size, BLOCK_K))):
        keys = _load_rows(queue, tile * BLOCK_K, size, column, BLOCK_K, DIM, CHUNK, WHOLE)
        s = _scores(q, keys, z_q, start, n, queue, tile * BLOCK_K, size, BLOCK_N, BLOCK_K, DIM, CHUNK, WHOLE, PRECISION)
        if key_scale is not None:
            number = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            length = tl.load(key_scale + number, mask=number < size, other=0.0)[None, :]
            s *= length
        if not WHOLE:
            s = tl.where((tile * BLOCK_K + tl.arange(0, BLOCK_K) < size)[None, :], s, float("-inf"))
        if exclusions is not None:
            number = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            if key_ids is not None:
                number = tl.load(key_ids + number, mask=number < size, other=-2)
            out = number[None, :] == first_out[:, None]
            if key_ids is None:
                out |= number[None, :] == second_out[:, None]
            s = tl.where(out, float("-inf"), s)
        if key_log_z is not None:
            number = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            log_z = tl.load(key_log_z + number, mask=number < size, other=0.0)
            p = tl.exp2(s * scale[:, None] - (log_z - HEADROOM)[None, :])
        else:
            rank += tl.sum(tl.where(s > positive[:, None], 1.0, 0.0), 1)
            if RUNNING:
                new_shift = tl.maximum(shift, tl.max(s, 1) * scale)
                z *= tl.exp2(shift - new_shift)
                a *= tl.exp2(shift - new_shift)[:, None]
                shift = new_shift
                p = tl.exp2(s * scale[:, None] - (shift - HEADROOM)[:, None])
            else:
                p = tl.exp2(s * scale[:, None] - log2_scale)
            z += tl.sum(p, 1)
        if key_scale is not None:
            p *= length
        a = dot(cast(p, operand), keys, a, PRECISION)

    columns = column + tl.arange(0, CHUNK)
    slot = piece.to(tl.int64) * n + rows
    tl.store(a_part + slot[:, None] * DIM + columns[None, :], a, mask=(rows < n)[:, None] & (columns < DIM)[None, :])
    if key_log_z is None:
        valid = (rows < n) & (column == 0)
        tl.store(z_part + slot, z, mask=valid)
        tl.store(rank_part + slot, rank.to(tl.int32), mask=valid)
        if RUNNING:
            tl.store(shift_part + slot, shift, mask=valid)
        tl.store(positive_out + rows, positive * scale, mask=valid & (piece == 0))


@triton.jit(do_not_specialize=["n", "pieces"])
def combine_kernel(
    z_q,
    k,
    temperature,
    z_part,
    a_part,
    rank_part,
    shift_part,
    positive_in,
    loss_out,
    rank_out,
    normaliser_out,
    gradient_out,
    n,
    pieces,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    RUNNING: tl.constexpr,
    HEADROOM: tl.constexpr,
    RAW_KEYS: tl.constexpr,
):
    row = tl.program_id(0)
    log2_scale = _log2_scale(temperature, ON_DEVICE)
    positive = tl.load(positive_in + row)
    columns, lanes = tl.arange(0, PADDED), tl.arange(0, BLOCK_PIECES)

    shift = log2_scale
    if RUNNING:
        shift = positive
        for start in range(0, pieces, BLOCK_PIECES):
            piece = start + lanes
            shifts = tl.load(shift_part + piece.to(tl.int64) * n + row, mask=piece < pieces, other=float("-inf"))
            shift = tl.maximum(shift, tl.max(shifts, 0))

    z = tl.zeros([BLOCK_PIECES], tl.float32)
    a = tl.zeros([BLOCK_PIECES, PADDED], tl.float32)
    rank = tl.zeros([BLOCK_PIECES], tl.int32)
    for start in range(0, pieces, BLOCK_PIECES):
        piece = start + lanes
        slot = piece.to(tl.int64) * n + row
        valid = piece < pieces
        mask = valid[:, None] & (columns < DIM)[None, :]
        z_piece = tl.load(z_part + slot, mask=valid, other=0.0)
        a_piece = tl.load(a_part + slot[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
        if RUNNING:
            weight = tl.exp2(tl.load(shift_part + slot, mask=valid, other=float("-inf")) - shift)
            z_piece *= weight
            a_piece *= weight[:, None]
        z += z_piece
        a += a_piece
        rank += tl.load(rank_part + slot, mask=valid, other=0)

    negatives = tl.sum(z, 0)
    total = negatives + tl.exp2(positive - shift + HEADROOM)
    tl.store(loss_out + row, (tl.log2(total) - HEADROOM - (positive - shift)) * LN2)
    tl.store(rank_out + row, tl.sum(rank, 0))
    if normaliser_out is not None:
        tl.store(normaliser_out + 2 * row, tl.log2(total) - HEADROOM + shift)
        tl.store(normaliser_out + 2 * row + 1, negatives / total)

    at = row.to(tl.int64) * DIM + columns
    raw = tl.load(z_q + at, mask=columns < DIM, other=0.0).to(tl.float32)
    key = tl.load(k + at, mask=columns < DIM, other=0.0).to(tl.float32)
    inverse = _inverse_norm(tl.sum(raw * raw, 0))
    q = raw * inverse
    if RAW_KEYS:
        key *= _inverse_norm(tl.sum(key * key, 0))
    # p_0 - 1 = -negatives / total, without the cancellation.
    towards = (tl.sum(a, 0) - negatives * key) * (log2_scale * LN2 / total)
    gradient = (towards - q * tl.sum(q * towards, 0)) * inverse
    tl.store(gradient_out + at, gradient, mask=columns < DIM)


@triton.jit(do_not_specialize=["n", "pieces"])
def combine_columns_kernel(
    z_q,
    k,
    share,
    temperature,
    a_part,
    gradient_out,
    n,
    pieces,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    HEADROOM: tl.constexpr,
):
    # The end of a sweep with `key_log_z`: what keys pull at a row, through the normalisation. The positive pulls by
    # p - 1 = -share, the part that it gives to others: without the cancellation, as in combine_kernel.
    row = tl.program_id(0)
    columns, lanes = tl.arange(0, PADDED), tl.arange(0, BLOCK_PIECES)
    a = tl.zeros([BLOCK_PIECES, PADDED], tl.float32)
    for start in range(0, pieces, BLOCK_PIECES):
        slot = (start + lanes).to(tl.int64) * n + row
        mask = (start + lanes < pieces)[:, None] & (columns < DIM)[None, :]
        a += tl.load(a_part + slot[:, None] * DIM + columns[None, :], mask=mask, other=0.0)
    at = row.to(tl.int64) * DIM + columns
    raw = tl.load(z_q + at, mask=columns < DIM, other=0.0).to(tl.float32)
    key = tl.load(k + at, mask=columns < DIM, other=0.0).to(tl.float32)
    inverse = _inverse_norm(tl.sum(raw * raw, 0))
    q = raw * inverse
    key *= _inverse_norm(tl.sum(key * key, 0))  # keys of this form are raw
    towards = tl.sum(a, 0) * tl.exp2(-1.0 * HEADROOM) - tl.load(share + row) * key
    towards *= _log2_scale(temperature, ON_DEVICE) * LN2
    gradient = (towards - q * tl.sum(q * towards, 0)) * inverse
    tl.store(gradient_out + at, gradient, mask=columns < DIM)
