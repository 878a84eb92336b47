"""What comes into each site: its covariance, or its main directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, Loss, fitted, run, taken
from lrcompile.errors import AdapterError, SpecError, TargetError
from lrcompile.recipes.calibration import Calibration
from lrcompile.recipes.calibration.principal import Principal
from lrcompile.recipes.calibration.ranks import redistributed, with_ranks
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
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

    def _watch(self, data: Iterable[Any]) -> None:
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


class Covariance(Inputs):
    """C = 1/T·Σₜ xₜxₜᵀ `[in, in]` over all T tokens that come into a site (not centred).

    The sums take 4·in² bytes of host memory a site. For a mean over tokens the unit of C does not depend on the amount
    of data; the official code of CorDA (arXiv 2406.05223) divides each sample by its largest value first and adds up.
    """

    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Tensor]]:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._watch(data)
        for name, total in self._sums.items():
            if not total.diagonal().any():
                raise TargetError(f"the input of {name!r} is zero on all of this data, so it has no main directions")
        return self.spec, {site.name: self._sums[site.name] / self._counts[site.name] for site in self.sites}

    def take(self, name: str, x: Tensor) -> None:
        product = (x.mT @ x).cpu()
        self._sums[name] = self._sums[name].add_(product) if name in self._sums else product
        self._counts[name] = self._counts.get(name, 0) + len(x)


class Directions(Inputs):
    """The leading principal directions of each site's input, `[rank, in]`, and how many each site should have.

    Incremental, batch by batch (`Principal`), until every direction a site is to have keeps a cosine of at least `tau`
    with what it was a batch before, or `batches` are through. Then the sum of all ranks is dealt out anew, by explained
    variance (`redistributed`), each site getting up to rho times its rank and at least one.

    As in the authors' code (arXiv 2410.07170 and PEFT): the mean is taken off, padding and tokens whose label is −100
    do not count, evaluation mode, B's scale s stays as alpha moves with the rank. Unlike there: at most `batches`
    batches, not as many rounds as it takes; and a site keeps one direction where it would be left without an adapter.
    """

    ignored_label = -100

    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Tensor]]:
        ranks = {site.name: self.spec.rank_of(site.name) for site in self.sites}
        self._found = {
            site.name: Principal(min(round(self.spec.rho * ranks[site.name]), site.in_features, site.out_features))
            for site in self.sites
        }
        self._budget = sum(ranks.values())
        self._watch(data)
        dealt = self._deal()
        if moving := [name for name, rank in dealt.items() if not self._found[name].converged(rank, self.spec.tau)]:
            self.notes.append(
                f"{self.spec.method}: at {len(moving)} of {len(dealt)} sites, {moving[0]} among them, the directions still"
                f" moved with the last batch (a cosine below tau={self.spec.tau}); more batches settle them"
            )
        rows = {name: self._found[name].components[:rank].cpu() for name, rank in dealt.items()}
        return with_ranks(self.spec, dealt), rows

    def take(self, name: str, x: Tensor) -> None:
        self._found[name].take(x)

    def settled(self) -> bool:
        if any(found.batches < 2 for found in self._found.values()):
            return False
        return all(self._found[name].converged(rank, self.spec.tau) for name, rank in self._deal().items())

    def _deal(self) -> dict[str, int]:
        ratios = {name: found.explained() for name, found in self._found.items()}
        if flat := [name for name, ratio in ratios.items() if not len(ratio)]:
            raise TargetError(f"the input of {flat[0]!r} is the same for every token, so it has no main directions")
        if (there := sum(map(len, ratios.values()))) < self._budget:
            raise SpecError(
                f"the inputs of all sites together span {there} directions on this data, fewer than the sum of ranks"
                f" ({self._budget}); give more or larger batches, or lower rank",
                field="data",
            )
        return redistributed(ratios, self._budget)


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
