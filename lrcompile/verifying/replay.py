"""How far rounding may carry a model's outputs: D = max over seeds of |replay - y64|.

In a replay of the float64 reference every linear map's output receives a random-sign `u·(|x||W|)`, the bound of its
own rounding with unit roundoff u. What arrives at the outputs is what a correct implementation in that precision may
deviate by, with the model's own amplification and cancellation in it: no tolerance has to be guessed. Fused attention
counts as its two products.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lrcompile.adapters import ADAPTERS
from lrcompile.nf4.modules import is_nf4, layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEEDS = (0, 1, 2, 3)

_ATEN = torch.ops.aten
# Multilinear with non-negative constants: the same operator on absolute values is the magnitude |x||W| (+ |b|).
_LINEAR = frozenset(
    {
        _ATEN.mm, _ATEN.bmm, _ATEN.mv, _ATEN.dot, _ATEN.vdot, _ATEN.addmm, _ATEN.baddbmm, _ATEN.addbmm, _ATEN.addmv,
        _ATEN.addr,
        _ATEN.linear, _ATEN.convolution, _ATEN._grouped_mm, _ATEN._trilinear,
    }
)  # fmt: skip
_NF4 = "lrcompile::nf4_linear"


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to `dtype` (2⁻²⁴ for float32, 2⁻⁸ for bfloat16)."""
    return torch.finfo(dtype).eps / 2


def working_dtype(model: nn.Module, inputs: Any = None) -> torch.dtype:
    """The floating type that holds most of the base; where it holds none, that of the inputs, of the adapters, or
    torch's default.

    The majority, not the coarsest: a single half-precision table in a float32 model must not loosen every bound by
    8192. The base's, not its adapters': these act in the type of what they are added to, whatever they train in.
    """
    base: Counter[torch.dtype] = Counter()
    adapters: Counter[torch.dtype] = Counter()
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            (adapters if ADAPTERS in name.split(".") else base)[tensor.dtype] += tensor.numel()
    for layout in (layout_of(module) for module in model.modules() if is_nf4(module)):
        base[layout.dtype] += layout.out_features * layout.in_features
    leaves = torch.utils._pytree.tree_leaves(inputs)
    given = Counter(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    for counts in (base, given, adapters):
        if counts:
            return counts.most_common(1)[0][0]
    return torch.get_default_dtype()


class Magnitudes:
    """u·|x||W| of each linear map in order, kept from one replay for the next ones of the same inputs.

    They differ between replays by a relative 2⁻²⁴ or so, and cost as much as the maps themselves. Beyond `limit` bytes
    they are computed each time.
    """

    def __init__(self, limit: int = 2 << 30):
        self._kept: dict[tuple[int, Any, torch.Size], Tensor] = {}
        self._left = limit

    def get(self, index: int, func: Any, shape: torch.Size, compute: Callable[[], Tensor]) -> Tensor:
        key = (index, func, shape)
        if key in self._kept:
            return self._kept[key]
        value = compute()
        size = 4 * value.numel()
        if size <= self._left:
            self._left -= size
            self._kept[key] = value.to(torch.float32)
        return value


class _Perturb(TorchDispatchMode):
    def __init__(self, roundoff: float, seed: int, magnitudes: Magnitudes):
        super().__init__()
        self.roundoff = roundoff
        self.seed = seed
        self.magnitudes = magnitudes
        self.generators: dict[torch.device, torch.Generator] = {}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.name == _NF4:
            compute = partial(_nf4_magnitude, self.roundoff, func, args, kwargs)
        elif (
            func.overloadpacket in _LINEAR and isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex())
        ):
            compute = partial(_magnitude, self.roundoff, func, args, kwargs)
        else:
            return out
        self.count += 1
        magnitude = self.magnitudes.get(self.count, func, out.shape, compute)
        return out.addcmul_(self._signs(out), magnitude)  # a linear map's result is a fresh tensor

    def _signs(self, like: Tensor) -> Tensor:
        if like.device not in self.generators:
            self.generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        coins = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        coins.random_(0, 2, generator=self.generators[like.device])
        return coins.to(torch.float32).mul_(2).sub_(1)


def _magnitude(roundoff: float, func: Any, args: Any, kwargs: Any) -> Tensor:
    return func(*_absolute(args), **_absolute(kwargs)) * roundoff


def _absolute(values: Any) -> Any:
    def magnitude(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.abs() if leaf.is_floating_point() or leaf.is_complex() else leaf
        return abs(leaf) if type(leaf) in (int, float) else leaf  # not bool: a flag stays a flag

    return tree_map(magnitude, values)


def _nf4_magnitude(roundoff: float, func: Any, args: Any, kwargs: Any) -> Tensor:
    """u·(|x|·|Ŵ|ᵀ + |b|), Ŵ read off the operator itself by feeding it the identity; u is that of the coarser of the
    model's and the compute type.
    """
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, bias = given["x"], given["bias"]
    identity = torch.eye(given["in_features"], dtype=torch.float64, device=x.device)
    weight = func(**{**given, "x": identity, "bias": None})
    magnitude = x.abs().to(torch.float64) @ weight.abs()
    if bias is not None:
        magnitude = magnitude + bias.abs()
    return magnitude * max(roundoff, unit_roundoff(given["compute_dtype"]))


@contextmanager
def perturbed(roundoff: float, seed: int, magnitudes: Magnitudes | None = None) -> Iterator[None]:
    """Inside `float64_mode`: every linear map's output moves by ±u·(|x||W|), signs drawn from `seed`."""
    with _Perturb(roundoff, seed, magnitudes or Magnitudes()):
        yield


class Deviation:
    """Accumulates D for one tensor over seeds; `.bound` is never under u·max|y|, one correct rounding of the result
    itself.
    """

    def __init__(self, exact: Tensor, roundoff: float):
        self.exact = exact
        finite = exact[torch.isfinite(exact)]
        self.bound = roundoff * float(finite.abs().max()) if finite.numel() else 0.0

    def update(self, replayed: Tensor) -> None:
        difference = (replayed - self.exact).abs()
        difference = difference[torch.isfinite(difference)]
        if difference.numel():
            self.bound = max(self.bound, float(difference.max()))

    def ratio(self, error: float) -> float:
        """r = error / D; an error where no rounding can occur is infinitely too large."""
        if error == 0.0:
            return 0.0
        return error / self.bound if self.bound > 0.0 else math.inf
