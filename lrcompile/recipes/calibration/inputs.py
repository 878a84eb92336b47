"""What comes into each site, shown token by token to whatever measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, fitted, run, taken
from lrcompile.errors import AdapterError, TargetError
from lrcompile.recipes.calibration import Calibration
from lrcompile.sites.site import Site
from lrcompile.undisturbed import set_mode, undisturbed


class Inputs(Calibration):
    """Shows every site's input, `[tokens, in]`, to `take`, in evaluation mode and without gradients.

    Padding does not count: of a batch with an `attention_mask` only the tokens it keeps, wherever a site's input has
    its shape. The loss is not needed and not called.
    """

    ignored_label: int | None = None
    """Tokens with this entry in the batch's `labels` do not count either."""

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        if site.graph is None and site.kind in ("linear", "conv1d"):
            return None
        return "what comes into it cannot be watched, as it is no nn.Linear or Conv1D that is called as a module"

    def take(self, name: str, x: Tensor) -> None:
        """Look at tokens `[tokens, in]` that come into the site, in float32 or wider."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Asked after each batch: would more of them change nothing?"""
        return False

    def watch(self, data: Iterable[Any]) -> None:
        """Run the model on the data."""
        seen, reached = 0, set[str]()
        self._kept: Tensor | None = None
        with undisturbed(self.model, self.spec.seed), torch.no_grad(), self._hooked(reached):
            set_mode(self.model, False)
            for given in taken(data, self.spec.batches, f"{self.spec.method}: inputs"):
                batch = fitted(self.model, given, seen)
                self._kept = _kept_tokens(batch, self.ignored_label)
                run(self.model, batch, seen)
                seen += 1
                if self.settled():
                    break
            else:
                self._note_batches(seen)
        if dead := [site.name for site in self.sites if site.name not in reached]:
            listed = "\n".join(f"  {name}" for name in dead[:8]) + (f"\n  … ({len(dead)} in all)" if dead[8:] else "")
            raise TargetError(
                f"no input reaches {len(dead)} sites on this data:\n{listed}\nTheir modules are not called (read by a"
                " parent, not used) or see no token that counts. Exclude them, or give data that uses them."
            )

    @contextmanager
    def _hooked(self, reached: set[str]) -> Iterator[None]:
        def look(name: str) -> Callable[..., None]:
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
                reached.add(name)
                self.take(name, tokens)

            return hook

        handles = [self.model.get_submodule(site.host).register_forward_pre_hook(look(site.name), with_kwargs=True)
                   for site in self.sites]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tokens(self, x: Tensor) -> Tensor:
        kept, wide = self._kept, x.to(torch.promote_types(x.dtype, torch.float32))
        if kept is None or not (x.shape[:-1] == kept.shape or (x.dim() == 2 and len(x) == kept.numel())):
            return wide.reshape(-1, x.shape[-1])
        return wide.reshape(-1, x.shape[-1])[kept.reshape(-1).to(x.device)]


def _kept_tokens(batch: Batch, ignored_label: int | None) -> Tensor | None:
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
