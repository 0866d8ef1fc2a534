"""The Triton kernels of batch_norm.py. `rows` are those of one group; a program has one group, one block of channels.

Activations are [groups, rows, channels] in memory; `moments` is fp32 [2, groups, channels]: mean and
1 / sqrt(variance + eps). The reductions write fp32 partials [arrays, groups, splits, channels]. An absent tensor is
None, which compiles its branch away; so does a vector that nothing uses.

Order: programs that run at the same time work side by side in memory. A reduction takes the tiles of all groups from
their ends to their beginnings, and what is applied after it starts at the beginnings: with the tiles that the
reduction has left in the L2 cache. With several STAGES a reduction's loads pass through shared memory, so that those of
later tiles are on their way while this one is added. With DEPENDENT launches overlap (see batch_norm_plan.py).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastmoco.kernels.dispatch import cast


@triton.jit
def affine(x, mean, invstd, weight, bias):
    # Centred first: x * scale + shift would cancel where the mean is large beside the deviation.
    return (x - mean) * (invstd * weight) + bias


@triton.jit
def vectors(weight, bias, moments, group, groups, channels, column):
    inside = column < channels
    at = moments + group * channels + column
    return (
        tl.load(at, mask=inside, other=0.0)[None, :],
        tl.load(at + groups * channels, mask=inside, other=0.0)[None, :],
        tl.load(weight + column, mask=inside, other=0.0)[None, :],
        tl.load(bias + column, mask=inside, other=0.0)[None, :],
    )


@triton.jit
def _load(tensor, at, mask):
    return tl.load(tensor + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile(groups, channels, BLOCK_CHANNELS: tl.constexpr):
    # Of a grid of one axis: columns come first, then groups, then tiles.
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    column = program % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return program // columns // groups, program // columns % groups, column


@triton.jit
def _rows_of_split(split, splits, rows, block_rows):
    # A split has the tiles split, split + splits, ... counted from the end; the last tile, counted first, may be short.
    tiles = tl.cdiv(rows, block_rows)
    whole = (tiles - split + splits - 1) // splits * block_rows
    return tl.where(split == 0, whole - (tiles * block_rows - rows), whole)


@triton.jit
def _cube(splits, channels, group, column, BLOCK_SPLITS: tl.constexpr):
    # Where the partials of some groups lie, [groups, splits, channels], and which splits there are.
    split = tl.arange(0, BLOCK_SPLITS)[None, :, None]
    return (group[:, None, None] * splits + split) * channels + column[None, None, :], split


@triton.jit
def statistics_kernel(
    x, partial, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    split, group, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    inside = (column < channels)[None, :]
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    first = (tiles - 1 - split) * BLOCK_ROWS
    base = (group * rows + first).to(tl.int64) * channels
    tile = row * channels + column[None, :]
    # Deviations from the first tile's mean: their squares do not cancel however large the mean.
    shift = tl.sum(_load(x, base + tile, (row < rows - first) & inside), 0) / tl.minimum(rows - first, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    square = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for index in tl.range(split, tiles, splits, num_stages=STAGES):  # from the end: loops only go up
        mask = (row < rows - (tiles - 1 - index) * BLOCK_ROWS) & inside
        deviation = tl.where(mask, _load(x, base + tile, mask) - shift[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        base -= splits * BLOCK_ROWS * channels
    count = _rows_of_split(split, splits, rows, BLOCK_ROWS)
    total_sum = tl.sum(total, 0)
    mean = shift + total_sum / count
    squares = tl.maximum(tl.sum(square, 0) - total_sum * total_sum / count, 0.0)
    out = partial + (group * splits + split) * channels + column
    tl.store(out, mean, mask=column < channels)
    tl.store(out + tl.num_programs(2) * splits * channels, squares, mask=column < channels)


@triton.jit(do_not_specialize=["rows", "block_rows", "splits", "groups"])
def finish_statistics_kernel(
    partial, moments, running_mean, running_var, rows, channels, block_rows, splits, groups, momentum, eps,
    BLOCK_GROUPS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = column < channels
    mean_sum = tl.zeros([BLOCK_CHANNELS], tl.float32)
    var_sum = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        valid = (group < groups)[:, None] & inside[None, :]
        cube, split = _cube(splits, channels, group, column, BLOCK_SPLITS)
        mask = (split < splits) & valid[:, None, :]
        means = tl.load(partial + cube, mask=mask, other=0.0)
        squares = tl.load(partial + groups * splits * channels + cube, mask=mask, other=0.0)
        origin = tl.load(partial + group[:, None] * splits * channels + column[None, :], mask=valid, other=0.0)
        # Chan, Golub and LeVeque's merge of (count, mean, squares), about the first partial's mean.
        count = _rows_of_split(split, splits, rows, block_rows).to(tl.float32)
        offset = tl.where(mask, means - origin[:, None, :], 0.0)
        delta = tl.sum(offset * count, 1) / rows
        total = tl.sum(squares, 1) + tl.sum(offset * offset * count, 1) - delta * delta * rows
        var = tl.maximum(total, 0.0) / rows
        place = moments + group[:, None] * channels + column[None, :]
        tl.store(place, origin + delta, mask=valid)
        tl.store(place + groups * channels, 1.0 / tl.sqrt(var + eps), mask=valid)
        mean_sum += tl.sum(origin + delta, 0)
        var_sum += tl.sum(var, 0)
    if running_mean is not None:
        old_mean = tl.load(running_mean + column, mask=inside, other=0.0)
        old_var = tl.load(running_var + column, mask=inside, other=0.0)
        unbiased = var_sum / groups * (rows / (rows - 1.0))
        tl.store(running_mean + column, (1 - momentum) * old_mean + momentum * (mean_sum / groups), mask=inside)
        tl.store(running_var + column, (1 - momentum) * old_var + momentum * unbiased, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def apply_kernel(
    x, y, weight, bias, moments, residual, residual_weight, residual_bias, residual_moments, rows, channels, groups,
    RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    index, group, column = _tile(groups, channels, BLOCK_CHANNELS)
    first = index * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    mask = (row < rows - first) & (column < channels)[None, :]
    at = (group * rows + first).to(tl.int64) * channels + row * channels + column[None, :]
    mean, invstd, scale, shift = vectors(weight, bias, moments, group, groups, channels, column)
    out = affine(_load(x, at, mask), mean, invstd, scale, shift)
    if residual is not None:
        side = _load(residual, at, mask)
        if residual_moments is not None:
            mean, invstd, scale, shift = vectors(
                residual_weight, residual_bias, residual_moments, group, groups, channels, column
            )
            side = affine(side, mean, invstd, scale, shift)
        out += side
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # not a maximum: NaN stays NaN
    tl.store(y + at, cast(out, y.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    grad, second_grad, x, y, masked, partial, weight, bias, moments, residual, residual_weight, residual_bias,
    residual_moments, rows, channels,
    RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    split, group = tl.program_id(0), tl.program_id(2)
    splits, groups = tl.num_programs(0), tl.num_programs(2)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    first = (tiles - 1 - split) * BLOCK_ROWS
    base = (group * rows + first).to(tl.int64) * channels
    tile = row * channels + column[None, :]
    mean, invstd, scale, shift = vectors(weight, bias, moments, group, groups, channels, column)
    if residual is not None:
        mean_2, invstd_2, scale_2, shift_2 = vectors(
            residual_weight, residual_bias, residual_moments, group, groups, channels, column
        )
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    total_x = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    total_2 = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for index in tl.range(split, tiles, splits, num_stages=STAGES):
        mask = (row < rows - (tiles - 1 - index) * BLOCK_ROWS) & (column < channels)[None, :]
        g = _load(grad, base + tile, mask)
        if second_grad is not None:
            g += _load(second_grad, base + tile, mask)
        values = _load(x, base + tile, mask)
        out = affine(values, mean, invstd, scale, shift)
        if residual is not None:
            side = _load(residual, base + tile, mask)
            out += affine(side, mean_2, invstd_2, scale_2, shift_2)
        if y is not None:
            out = _load(y, base + tile, mask)
        if RELU:
            g = tl.where(out <= 0, 0.0, g)
        if masked is not None:
            tl.store(masked + base + tile, cast(g, masked.dtype.element_ty), mask=mask)
        total += g
        total_x += g * (values - mean)
        if residual is not None:
            total_2 += g * (side - mean_2)
        base -= splits * BLOCK_ROWS * channels
    out_column = partial + (group * splits + split) * channels + column
    array = groups * splits * channels
    tl.store(out_column, tl.sum(total, 0), mask=column < channels)
    tl.store(out_column + array, tl.sum(total_x * invstd, 0), mask=column < channels)
    if residual is not None:
        tl.store(out_column + 2 * array, tl.sum(total_2 * invstd_2, 0), mask=column < channels)


@triton.jit(do_not_specialize=["splits", "groups"])
def finish_sums_kernel(
    partial, sums, totals, channels, splits, groups,
    BLOCK_GROUPS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    array = tl.program_id(1)
    inside = column < channels
    partial += array * groups * splits * channels
    sums += array * groups * channels
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for first in range(0, groups, BLOCK_GROUPS):
        group = first + tl.arange(0, BLOCK_GROUPS)
        valid = (group < groups)[:, None] & inside[None, :]
        cube, split = _cube(splits, channels, group, column, BLOCK_SPLITS)
        group_sums = tl.sum(tl.load(partial + cube, mask=(split < splits) & valid[:, None, :], other=0.0), 1)
        tl.store(sums + group[:, None] * channels + column[None, :], group_sums, mask=valid)
        total += tl.sum(group_sums, 0)
    tl.store(totals + array * channels + column, total, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def gradient_kernel(
    grad, x, grad_x, grad_residual, sums, weight, bias, moments, residual, residual_weight, residual_bias,
    residual_moments, rows, channels, groups,
    RELU: tl.constexpr, TRAINING: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    index, group, column = _tile(groups, channels, BLOCK_CHANNELS)
    first = index * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    inside = column < channels
    mask = (row < rows - first) & inside[None, :]
    at = (group * rows + first).to(tl.int64) * channels + row * channels + column[None, :]
    g, values = _load(grad, at, mask), _load(x, at, mask)
    mean, invstd, scale, shift = vectors(weight, bias, moments, group, groups, channels, column)
    out = affine(values, mean, invstd, scale, shift)
    if residual is not None:
        side = _load(residual, at, mask)
        mean_2, invstd_2, scale_2, shift_2 = vectors(
            residual_weight, residual_bias, residual_moments, group, groups, channels, column
        )
        out += affine(side, mean_2, invstd_2, scale_2, shift_2)
    if RELU:
        g = tl.where(out <= 0, 0.0, g)
    centred, centred_2 = g, g
    if TRAINING:
        # The gradient through the group's own mean and variance.
        sum_at = sums + group * channels + column
        mean_g = tl.load(sum_at, mask=inside, other=0.0)[None, :] / rows
        slope = tl.load(sum_at + groups * channels, mask=inside, other=0.0)[None, :] / rows
        centred = g - mean_g - (values - mean) * (invstd * slope)
        if residual is not None:
            slope = tl.load(sum_at + 2 * groups * channels, mask=inside, other=0.0)[None, :] / rows
            centred_2 = g - mean_g - (side - mean_2) * (invstd_2 * slope)
    tl.store(grad_x + at, cast(centred * (scale * invstd), grad_x.dtype.element_ty), mask=mask)
    if residual is not None:
        grad_side = centred_2 * (scale_2 * invstd_2)
        tl.store(grad_residual + at, cast(grad_side, grad_residual.dtype.element_ty), mask=mask)
