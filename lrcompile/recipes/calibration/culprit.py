"""Where a forward pass first stops being finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrcompile.batches import Batch, run
from lrcompile.sites.site import Site


def first_not_finite(model: nn.Module, sites: Sequence[Site], batch: Batch, index: int) -> str:
    """Words for the first of `sites`, in the order they run, whose output is not finite; the batch is run once more."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not _finite(output):
                why = (
                    "its input is finite: look at its weight and bias, and at the range of its dtype"
                    if _finite((args, kwargs))
                    else "its input is not finite either: look at what runs before it"
                )
                found.append(f"the first site whose output is not finite is {name!r}, and {why}")

        return hook

    hosts = {site.host: site.name for site in reversed(sites) if site.graph is None}
    handles = [model.get_submodule(host).register_forward_hook(look(name), with_kwargs=True)
               for host, name in hosts.items()]  # fmt: skip
    try:
        with torch.no_grad():
            run(model, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "the outputs of all its adapted sites are finite: look at the layers behind them, the labels and the loss"


def _finite(values: Any) -> bool:
    floats = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in floats)
