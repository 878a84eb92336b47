"""NF4 codes chosen for what a layer puts out, not element by element: a merge's way to keep a small update."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.kernels.nf4_dequant import CODEBOOK, Nf4, decode_absmax, pack, quantize_nf4, unpack
from lrcompile.nf4.modules import Layout

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it, as in GPTQ (arXiv 2210.17323): it stands for inputs that the
calibration data does not show."""
SWEEPS = 3
_COLUMNS = 128  # whose updates of the rest of the matrix are gathered into one product


def rounded_for_outputs(target: Tensor, nf4: Nf4, layout: Layout, moments: Tensor) -> Nf4:
    """argmin over codes q of tr((Ŵ − T)·H·(Ŵ − T)ᵀ), Ŵ = c[q]·m with one of two sets of block maxima m, approximately.

    `target` T `[out, in]`, `moments` H `[in, in]` the second moments of the inputs, `nf4` what the weight is stored as
    now, in which form the result is. The maxima are those there are, which a small update fits, or T's own, where it
    outgrew them. For either, each column of T in turn is rounded with its error handed on to the columns after it
    (GPTQ, arXiv 2210.17323), then improved by coordinate descent: q_j takes the level nearest to the minimum of the
    quadratic in that one element. The codes there are, or those nearest to T, improved in the same way, are a second
    start, and each row takes the better one. So no result is further from T's outputs than either of these.
    """
    target = target.float()
    H = moments.to(target.device, torch.float32)
    H = H + torch.eye(len(H), device=H.device) * (DAMPING * H.diagonal().mean()).clamp_min(torch.finfo(H.dtype).tiny)
    stored = _oriented(target, layout).contiguous()
    own = quantize_nf4(stored, layout.block_size, nf4.absmax_scale is not None)
    found = [_improved(target, each, layout, H) for each in (nf4, own)]
    return min(found, key=lambda each: each[1])[0]


def _improved(target: Tensor, nf4: Nf4, layout: Layout, H: Tensor) -> tuple[Nf4, float]:
    """The best codes found for the maxima of `nf4`, and their error."""
    scale = _scales(nf4, layout)
    there = _oriented(unpack(nf4.codes, layout.shape), layout)
    (codes, errors), (others, other_errors) = (
        _descended(start, target, scale, H) for start in (there, _compensated(target, scale, H))
    )
    best = torch.where((other_errors < errors)[:, None], others, codes)
    total = float(torch.minimum(errors, other_errors).double().sum())
    return nf4._replace(codes=pack(_oriented(best, layout).contiguous())), total


def _scales(nf4: Nf4, layout: Layout) -> Tensor:
    """The block maximum of each element, `[out, in]`."""
    n = layout.out_features * layout.in_features
    flat = decode_absmax(nf4).repeat_interleave(layout.block_size)[:n]
    return _oriented(flat.view(layout.shape), layout)


def _oriented(stored: Tensor, layout: Layout) -> Tensor:
    return stored.t() if layout.transposed else stored


def _levels(like: Tensor) -> Tensor:
    return torch.tensor(CODEBOOK, dtype=like.dtype, device=like.device)


def _nearest(values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The code whose level times scale is nearest; any code where the scale is 0."""
    unit = torch.where(scale > 0, values / scale, 0.0)
    return torch.bucketize(unit.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _compensated(target: Tensor, scale: Tensor, H: Tensor) -> Tensor:
    """GPTQ: with R the upper Cholesky factor of H⁻¹, the error e of column j leaves wₖ − (e/R_jj)·R_jk for k > j."""
    levels, left = _levels(target), target.clone()
    codes = torch.empty(target.shape, dtype=torch.int64, device=target.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).to(H.dtype)
    for start in range(0, target.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, target.shape[1])
        errors = torch.empty(len(target), stop - start, dtype=target.dtype, device=target.device)
        for j in range(start, stop):
            codes[:, j] = _nearest(left[:, j], scale[:, j], levels)
            errors[:, j - start] = (left[:, j] - levels[codes[:, j]] * scale[:, j]) / factor[j, j]
            left[:, j + 1 : stop] -= errors[:, j - start, None] * factor[j, j + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _descended(codes: Tensor, target: Tensor, scale: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Codes after `SWEEPS` rounds of coordinate descent, and (ŵ − t)·H·(ŵ − t)ᵀ of each row."""
    levels, codes = _levels(target), codes.clone()
    gap = levels[codes] * scale - target
    slope, curvature = gap @ H, H.diagonal()
    for _ in range(SWEEPS):
        before = codes.clone()
        for start in range(0, target.shape[1], _COLUMNS):
            stop = min(start + _COLUMNS, target.shape[1])
            moved = torch.zeros(len(target), stop - start, dtype=target.dtype, device=target.device)
            for j in range(start, stop):
                now = levels[codes[:, j]] * scale[:, j]
                codes[:, j] = _nearest(now - slope[:, j] / curvature[j], scale[:, j], levels)
                step = levels[codes[:, j]] * scale[:, j] - now
                moved[:, j - start] = step
                slope[:, start:stop] += step[:, None] * H[j, start:stop]
            slope[:, :start] += moved @ H[start:stop, :start]
            slope[:, stop:] += moved @ H[start:stop, stop:]
        if torch.equal(codes, before):
            break
    gap = levels[codes] * scale - target
    return codes, ((gap @ H) * gap).sum(1)
