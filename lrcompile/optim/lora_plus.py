"""LoRA+ (arXiv 2402.12354): B learns λ times as fast as A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lrcompile.optim.rule import Rule
from lrcompile.state import state_of


class Ratio(Rule):
    """A (and what else has two dimensions) at η; B, and what has one, at λη; adapters of embeddings at a rate of their
    own.

    λ is `lr_ratio`, the embeddings' rate is `embedding_lr`, absolute. Of the second set, biases and the weights of
    norms (modules whose class is called …Norm) have no weight decay. With λ = 1, no decay and no embeddings it is the
    optimizer over one group, to the bit. A scheduler that multiplies rates (`LambdaLR`, `StepLR`, `transformers`') does
    so with each; one that sets them (`OneCycleLR`) takes a list, one rate a group. An optimizer that finds its own rate
    and takes only one (Prodigy, D-Adaptation) cannot know λ.
    """

    def groups(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        fast, plain, lookup = self._fast(), self._undecayed(), self._lookup()
        split = []
        for group in groups:
            rate = group.get("lr", lr)
            quick = {"lr": rate * self.spec.lr_ratio}
            kinds: dict[str, dict[str, Any]] = {
                "slow": {},
                "embeddings": {"lr": self.spec.embedding_lr},
                "fast": quick,
                "fast, undecayed": {**quick, "weight_decay": 0.0},
            }
            members: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
            for tensor in group["params"]:
                if id(tensor) in lookup:
                    kind = "embeddings"
                elif id(tensor) in fast:
                    kind = "fast, undecayed" if id(tensor) in plain else "fast"
                else:
                    kind = "slow"
                members[kind].append(tensor)
            split += [{**group, "params": members[kind], **kinds[kind]} for kind in kinds if members[kind]]
        return split

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """What this adapter trains, with local names."""
        for _, adapter in self.adapters():
            yield from adapter.named_parameters()
        for name in state_of(self.model).trained.names_of(self.name):
            yield name, self.model.get_parameter(name)

    def _fast(self) -> set[int]:
        return {id(tensor) for name, tensor in self._own() if name == "B" or tensor.dim() < 2}

    def _lookup(self) -> set[int]:
        sites = [adapter for site, adapter in self.adapters() if site.form == "lookup"]
        return {id(tensor) for adapter in sites for tensor in adapter.parameters()}

    def _undecayed(self) -> set[int]:
        plain = set()
        for module in self.model.modules():
            norm = type(module).__name__.endswith("Norm")
            plain |= {
                id(tensor)
                for name, tensor in module.named_parameters(recurse=False)
                if tensor.dim() < 2 and (norm or name.endswith("bias"))
            }
        return plain
