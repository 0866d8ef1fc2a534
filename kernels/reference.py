"""Plain-torch twins of the kernels: the CPU path, the tests' oracle and the benchmarks' baseline.

Each function has the public signature of its kernel less `impl`. They compute in the widest of fp32 and the inputs'
type, so float64 inputs give a float64 oracle. Two read values back to the host, `photometric` and `sgd_ema`: on a CPU
that waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.kernels.batch_norm_reference import batch_norm_act as batch_norm_act
from fastmoco.kernels.batch_norm_reference import batch_norm_act_twice as batch_norm_act_twice
from fastmoco.kernels.batch_norm_reference import batch_norm_pool as batch_norm_pool

if TYPE_CHECKING:
    from fastmoco.kernels.tensor_table import Tensors, TensorTable

# Columns of the photometric parameters, one row a view (float32 [N, 8]).
FLIP, GRAY, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = range(8)
GRAY_NEVER, GRAY_BEFORE_JITTER, GRAY_AFTER_JITTER = 0, 1, 2
NO_JITTER = -1  # in ORDER; otherwise four 2-bit codes, lowest bits first: 0 brightness, 1 contrast, 2 saturation, 3 hue
MIN_SIGMA, MAX_SIGMA = 1e-3, 4.0  # of the blur, in pixels; a positive SIGMA outside is taken as the nearer
CACHED_PIXELS = 1 << 16  # that `photometric` takes through all its operations at a time: fp32 RGB of 768 KB


def info_nce(
    z_q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    row_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of normalised queries against one positive and the queue, less keys of the row's own id (equation 1)."""
    wide = torch.promote_types(z_q.dtype, torch.float32)
    q = F.normalize(z_q.to(wide), dim=1)
    positive = (q * k.detach().to(wide)).sum(1, keepdim=True)
    negatives = q @ queue.detach().to(wide).T
    if row_ids is not None and key_ids is not None:
        negatives = negatives.masked_fill(row_ids[:, None] == key_ids[None, :], -math.inf)
    # Joined after the sum over the queue: joining the logits would copy all of them.
    positive_logit = positive[:, 0] / temperature
    loss = torch.logaddexp(torch.logsumexp(negatives / temperature, 1), positive_logit) - positive_logit
    rank = (negatives > positive).sum(1, dtype=torch.int32)
    return loss, rank


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write `keys` into the ring at `pointer` and advance it, wrapping at the end; of too many keys the last K stay."""
    size = queue.shape[0]
    newest = keys[-size:]
    skip = keys.shape[0] - newest.shape[0]
    rows = (pointer + skip + torch.arange(newest.shape[0], device=queue.device)) % size
    queue.index_copy_(0, rows, newest.to(queue.dtype))
    pointer.copy_((pointer + keys.shape[0]) % size)


def sgd_ema(
    table: Tensors | TensorTable,
    grads: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
    nonfinite: Tensor,
    grad_scale: float | Tensor | None = None,
) -> None:
    """SGD with momentum, EMA and casts, in place; a non-finite gradient changes nothing but `nonfinite`.

    It reads the scalars and the verdict on the gradients back to the host. So its arithmetic is that of
    `torch.optim.SGD` to the last bit.
    """
    lr, momentum, decay, weight = float(lr), float(momentum), float(weight_decay), 1 - float(ema_momentum)
    unscale = 1 / float(1 if grad_scale is None else grad_scale)
    flat = [_in_storage_order(grad) for grad in grads if grad.numel()]
    if flat and not torch.stack([end for grad in flat for end in torch.aminmax(grad)]).isfinite().all():
        nonfinite.fill_(1)
        return
    keys = (table.k, table.k_work) if table.k else ()
    for entry in zip(table.q, table.velocity, table.q_work, grads, *keys, strict=True):
        for q, velocity, q_work, grad, *key in _blocks(entry):
            grad = grad.to(q.dtype)
            grad = grad if unscale == 1 else grad * unscale
            velocity.mul_(momentum).add_(grad.add(q, alpha=decay))
            q.add_(velocity, alpha=-lr)
            _cast(q, q_work)
            if key:
                k, k_work = key
                k.lerp_(q, weight)
                _cast(k, k_work)


def ema(table: Tensors | TensorTable, ema_momentum: float | Tensor) -> None:
    """k = m k + (1 - m) q in place, and its cast; written as a lerp, so that k stays put where it equals q."""
    weight = 1 - float(ema_momentum)
    for entry in zip(table.q, table.k, table.k_work, strict=True):
        for q, k, k_work in _blocks(entry):
            k.lerp_(q, weight)
            _cast(k, k_work)


def _blocks(tensors: Sequence[Tensor], size: int = 65536) -> Iterator[tuple[Tensor, ...]]:
    # Blocks that stay in a core's cache from the first operation to the last.
    return zip(*(_in_storage_order(tensor).split(size) for tensor in tensors), strict=True)


def _in_storage_order(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))


def _cast(master: Tensor, work: Tensor) -> None:
    if not work.is_set_to(master):
        work.copy_(master)


def photometric(
    crops: Tensor,
    parameters: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    rows: Tensor | None = None,
    max_sigma: float = MAX_SIGMA,
) -> Tensor:
    """Jitter, grey, blur, flip, normalise and cast of uint8 [N, S, S, 3] crops, in the widest of fp32 and `dtype`.

    As many rows at a time as stay in the cache, and each operation touches only the rows that drew it; so it depends on
    the parameters' values, which is free on a CPU and a sync on a GPU.
    """
    n, size = crops.shape[:2]
    wide = torch.promote_types(dtype, torch.float32)
    shift, scale = (torch.tensor(value, dtype=wide, device=crops.device).view(3, 1, 1) for value in (mean, std))
    views = torch.empty((n, size, size, channels), dtype=dtype, device=crops.device).permute(0, 3, 1, 2)
    views[:, 3:] = 0
    source = torch.arange(n, device=crops.device) if rows is None else inverse(rows)
    together = max(1, CACHED_PIXELS // size**2)
    for places, out in zip(source.split(together), views[:, :3].split(together)):
        x = crops.index_select(0, places).permute(0, 3, 1, 2).to(wide, memory_format=torch.contiguous_format).div_(255)
        draws = parameters.index_select(0, places)
        x = _blur_and_flip(_jitter_and_gray(x, draws), draws, max_sigma)
        out.copy_(x.sub_(shift).div_(scale))
    return views


def inverse(permutation: Tensor) -> Tensor:
    """Where each row comes from, if row i goes to permutation[i]; raises ValueError if that is no permutation."""
    source = torch.argsort(permutation)
    if not torch.equal(permutation[source], torch.arange(len(source), device=source.device)):
        raise ValueError(f"rows must hold each of 0 to {len(source) - 1} once, not {permutation.tolist()}")
    return source


def _jitter_and_gray(x: Tensor, draws: Tensor) -> Tensor:
    when, orders = draws[:, GRAY].tolist(), draws[:, ORDER].long().tolist()
    factors = draws[:, BRIGHTNESS : HUE + 1, None, None, None].to(x.dtype).unbind(1)
    x = _on([gray == GRAY_BEFORE_JITTER for gray in when], x, _gray)
    for position in range(4):
        codes = [order >> 2 * position & 3 if order >= 0 else NO_JITTER for order in orders]
        for jitter, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            x = _on([code == jitter for code in codes], x, function, factors[jitter])
    return _on([gray == GRAY_AFTER_JITTER for gray in when], x, _gray)


def _blur_and_flip(x: Tensor, draws: Tensor, max_sigma: float = MAX_SIGMA) -> Tensor:
    sigma = draws[:, SIGMA].clamp_max(max_sigma)
    x = _on((sigma > 0).tolist(), x, _blur, sigma)
    return _on((draws[:, FLIP] > 0).tolist(), x, lambda rows: rows.flip(3))


def _on(where: list[bool], x: Tensor, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    if all(where):
        return function(x, *values)
    if any(where):
        rows = torch.tensor(where, device=x.device).nonzero().flatten()
        x.index_copy_(0, rows, function(x.index_select(0, rows), *(value.index_select(0, rows) for value in values)))
    return x


def _gray(x: Tensor) -> Tensor:
    return x.copy_(_luma(x))


def _luma(x: Tensor) -> Tensor:
    return (0.299 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    center = _luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_((1 - factor) * center).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    # Without branches: from red, the hue is 1 + (g + b - r - low) / chroma sixths of a turn away, on the side of g - b.
    r, g, b = x.split(1, 1)
    low = torch.minimum(r, g).minimum(b)
    chroma = torch.maximum(r, g).maximum(b).sub_(low)
    from_red = (g + b).sub_(r).sub_(low).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny)).add_(1)
    hue = from_red.copysign_(g - b).add_(6 * turns)
    hue.sub_(hue.div(6).floor_(), alpha=6)
    shares = (hue - 3).abs_().sub_(1), (hue - 2).abs_().neg_().add_(2), (hue - 4).abs_().neg_().add_(2)
    for channel, share in zip((r, g, b), shares):
        torch.addcmul(low, chroma, share.clamp_(0, 1), out=channel)
    return x


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    # View by view, as each has its own number of taps; a scalar factor is also what torch's CPU loops are fastest with.
    sigma = sigma.clamp_min(MIN_SIGMA)
    radii = (3 * sigma).ceil().int().clamp_max(x.shape[-1] - 1).tolist()
    for view, deviation, radius in zip(x, sigma.tolist(), radii):
        weights = [math.exp(-0.5 * (tap / deviation) ** 2) for tap in range(radius + 1)]
        total = 2 * sum(weights) - weights[0]
        for dim in (1, 2):
            _convolve(view, dim, [weight / total for weight in weights])
    return x


def _convolve(view: Tensor, dim: int, weights: list[float]) -> None:
    size, radius = view.shape[dim], len(weights) - 1
    before, after = view.narrow(dim, 1, radius).flip(dim), view.narrow(dim, size - 1 - radius, radius).flip(dim)
    padded = torch.cat([before, view, after], dim)
    view.mul_(weights[0])
    for tap in range(1, radius + 1):
        view.add_(padded.narrow(dim, radius - tap, size), alpha=weights[tap])
        view.add_(padded.narrow(dim, radius + tap, size), alpha=weights[tap])


class NtXentRows(NamedTuple):
    """One sweep of NT-Xent over rows of z [N, D]."""

    loss: Tensor
    """[N]: log Z - s_pos."""
    rank: Tensor
    """int32 [N]: keys that score above the positive."""
    normaliser: Tensor
    """[N, 2]: logarithm of the sum over all keys but the row's own, and the share that the negatives have of it."""
    gradient: Tensor
    """[N, D]: of each row's own loss with respect to that row of z."""


def nt_xent_rows(
    z: Tensor, keys: Tensor, scale: Tensor, own: Tensor | None, positive: Tensor, temperature: float
) -> NtXentRows:
    """Rows against `keys` [K, D], unit vectors once they are times `scale` [K], of which row i leaves out `own[i]` and
    tells `positive[i]` apart."""
    q, keys, scores = _scores(z, keys, scale, temperature)
    right = scores.gather(1, positive[:, None])
    scores.scatter_(1, positive[:, None], -math.inf)
    if own is not None:
        scores.scatter_(1, own[:, None], -math.inf)
    right_logit = right[:, 0]
    log_z = torch.logaddexp(torch.logsumexp(scores, 1), right_logit)
    rank = (scores > right).sum(1, dtype=torch.int32)
    shares = scores.sub_(log_z[:, None]).exp_()
    # p_positive - 1 = -(sum of the others' shares), without the cancellation.
    share = shares.sum(1)
    pull = shares @ keys - share[:, None] * keys[positive]
    normaliser = torch.stack([log_z, share], 1)
    return NtXentRows(log_z - right_logit, rank, normaliser, _through_normalise(z, q, pull / temperature))


def nt_xent_columns(
    z: Tensor, keys: Tensor, scale: Tensor, normaliser: Tensor, own: Tensor | None, positive: Tensor, temperature: float
) -> Tensor:
    """Gradient [N, D] that the losses of `keys`, with their `normaliser` [K, 2], have with respect to rows of z."""
    q, keys, scores = _scores(z, keys, scale, temperature)
    log_z, share = normaliser.unbind(1)
    scores.scatter_(1, positive[:, None], -math.inf)
    if own is not None:
        scores.scatter_(1, own[:, None], -math.inf)
    pull = scores.sub_(log_z).exp_() @ keys - share[positive, None] * keys[positive]
    return _through_normalise(z, q, pull / temperature)


def _scores(z: Tensor, keys: Tensor, scale: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    q = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
    keys = keys.to(q.dtype) * scale[:, None]
    return q, keys, (q @ keys.T).div_(temperature)


def _through_normalise(z: Tensor, q: Tensor, gradient: Tensor) -> Tensor:
    norm = z.to(q.dtype).norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (gradient - q * (q * gradient).sum(1, keepdim=True)) / norm


def resize_box(image: np.ndarray, box: Sequence[int], square: Tensor) -> None:
    """Resize the box (top, left, height, width) of `image` uint8 [H, W, 3] into `square` uint8 [3, S, S], in place.

    Bilinear with antialiasing, as Pillow and torchvision do it. `square` may have any strides.
    """
    top, left, height, width = box
    # Copied by NumPy, and resized by what F.interpolate calls, straight to its place. Were a copy left to torch, each
    # thread that calls this would start OpenMP threads, more than there are cores, and those of the training step
    # would go to sleep at every operation.
    cut = np.require(image[top : top + height, left : left + width], requirements=["C", "W"])
    planes = torch.from_numpy(cut).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(planes, square.shape[1:], False, out=square[None])


def resizing(images: Sequence[Tensor], boxes: np.ndarray, crops: Tensor) -> Callable[[], None]:
    """Work for one or several threads, which take the next image when they are done: see `fastmoco.kernels.resize`."""
    waiting = iter(range(len(images)))

    def work() -> None:
        for i in waiting:
            image = images[i].numpy()
            for view, box in enumerate(boxes[:, i].tolist()):
                resize_box(image, box, crops[view, i].permute(2, 0, 1))

    return work
