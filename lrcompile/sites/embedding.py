"""`nn.Embedding` as a linear map of one-hot rows: y = Wᵀ-rows by index, in = the vocabulary, out = the width."""

from __future__ import annotations

from torch import Tensor, nn

from lrcompile.hosting import Host
from lrcompile.sites.linear import REPLACED, keeps_forward, refusal_of
from lrcompile.sites.site import Slot

NAME = "embedding"


class AdaptedEmbedding(Host):
    """The base's lookup, then each live adapter's."""

    padding_idx: int | None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        (ids,) = args or kwargs.values()
        for adapter in self.lrcompile_adapters["weight"].live:  # type: ignore[attr-defined]
            y = adapter.lookup(y, ids, self.padding_idx)
        return y


HOST = AdaptedEmbedding


def slots(module: nn.Module) -> list[Slot] | None:
    if not isinstance(module, nn.Embedding):
        return None
    if "forward" in module.__dict__:
        return [Slot("weight", refusal=REPLACED, form="lookup")]
    if not keeps_forward(module, nn.Embedding):
        return None
    return [
        Slot(
            "weight",
            module.num_embeddings,
            module.embedding_dim,
            transposed=True,
            refusal=_refusal(module),
            form="lookup",
        )
    ]


def _refusal(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "max_norm rewrites its rows at each lookup, so an update cannot be added beside them"
    if module.scale_grad_by_freq or module.sparse:
        return "its gradients are sparse or scaled by frequency, which an adapter's are not"
    return refusal_of(module)
