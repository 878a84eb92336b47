"""What comes into linear maps while the model runs on a user's data, shown token by token to whatever measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, fitted, run, taken
from lrcompile.errors import AdapterError, TargetError
from lrcompile.undisturbed import set_mode, undisturbed

Take = Callable[[str, Tensor], None]
"""Is given a name and tokens `[tokens, in]` in float32 or wider."""


def watch(
    model: nn.Module,
    hosts: Mapping[str, str],
    data: Iterable[Any],
    take: Take,
    *,
    label: str,
    most: int | None = None,
    seed: int | None = 0,
    ignored_label: int | None = None,
    settled: Callable[[], bool] = lambda: False,
) -> int:
    """Run `model` on `data` in evaluation mode and without gradients, and show `take` the input of each host, a module
    by name that is called with it alone; returns how many batches were run, `most` (None: all) at most.

    Padding does not count: of a batch with an `attention_mask` only the tokens it keeps, wherever an input has its
    shape; nor do tokens whose entry in the batch's `labels` is `ignored_label`. `settled`, asked after each batch,
    ends the run early. Raises `AdapterError` where an input is not finite, `TargetError` for hosts no input reaches.
    """
    looking = _Looking(take)
    seen = 0
    with undisturbed(model, seed), torch.no_grad(), looking.hooked(model, hosts):
        set_mode(model, False)
        for given in taken(data, most, label):
            batch = fitted(model, given, seen)
            looking.kept = kept_tokens(batch, ignored_label)
            run(model, batch, seen)
            seen += 1
            if settled():
                break
    if dead := [name for name in hosts if name not in looking.reached]:
        listed = "\n".join(f"  {name}" for name in dead[:8]) + (f"\n  … ({len(dead)} in all)" if dead[8:] else "")
        raise TargetError(
            f"no input reaches {len(dead)} sites on this data:\n{listed}\nTheir modules are not called (read by a"
            " parent, not used) or see no token that counts. Exclude them, or give data that uses them."
        )
    return seen


class SecondMoments:
    """H = 1/T·Σₜ xₜxₜᵀ `[in, in]` over all tokens shown under a name, on the host, in float32 or wider.

    ‖X·Eᵀ‖² = T·tr(E·H·Eᵀ) is what an error E of a weight costs its outputs on these tokens. Takes 4·in² bytes a name.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def take(self, name: str, x: Tensor) -> None:
        product = (x.mT @ x).cpu()
        self._sums[name] = self._sums[name].add_(product) if name in self._sums else product
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def means(self) -> dict[str, Tensor]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}


def second_moments(model: nn.Module, hosts: Mapping[str, str], data: Iterable[Any], *, label: str) -> dict[str, Tensor]:
    """`SecondMoments` of what comes into each host on all of `data`."""
    found = SecondMoments()
    watch(model, hosts, data, found.take, label=label)
    return found.means()


class _Looking:
    """Hooks in front of modules; `kept` says which tokens of the batch under way count, None: all."""

    def __init__(self, take: Take):
        self.take, self.kept, self.reached = take, None, set[str]()

    kept: Tensor | None

    @contextmanager
    def hooked(self, model: nn.Module, hosts: Mapping[str, str]) -> Iterator[None]:
        handles = [model.get_submodule(host).register_forward_pre_hook(self._hook(name), with_kwargs=True)
                   for name, host in hosts.items()]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (x,) = args or kwargs.values()
            tokens = self._tokens(x)
            if not len(tokens):
                return
            if not torch.isfinite(tokens).all():
                raise AdapterError(
                    f"the input of {name!r} is not finite on this data: look at what runs before it, and at the"
                    " range of the model's dtype"
                )
            self.reached.add(name)
            self.take(name, tokens)

        return hook

    def _tokens(self, x: Tensor) -> Tensor:
        kept, wide = self.kept, x.to(torch.promote_types(x.dtype, torch.float32))
        if kept is None or not (x.shape[:-1] == kept.shape or (x.dim() == 2 and len(x) == kept.numel())):
            return wide.reshape(-1, x.shape[-1])
        return wide.reshape(-1, x.shape[-1])[kept.reshape(-1).to(x.device)]


def kept_tokens(batch: Batch, ignored_label: int | None = None) -> Tensor | None:
    """Which tokens of the batch count `[batch, length]`; None where it does not say."""
    if not isinstance(batch, dict):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    kept = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if ignored_label is not None and isinstance(labels, Tensor) and labels.dim() == 2:
        counted = labels != ignored_label
        if kept is None or kept.shape == counted.shape:
            kept = counted if kept is None else kept & counted
    return kept
