"""The mean gradient of the loss at each site's weight, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, Loss, fitted, loss_of, run, taken
from lrcompile.errors import AdapterError, TargetError
from lrcompile.owners import owners_of_parameters
from lrcompile.recipes.calibration import Calibration
from lrcompile.recipes.calibration.culprit import first_not_finite
from lrcompile.specs import Spec
from lrcompile.undisturbed import random_state, set_mode, set_random_state, undisturbed


class Gradients(Calibration):
    """G = 1/N·Σₙ ∂Lₙ/∂W over N batches at every site, `[..., out, in]` whatever way the weight is stored.

    In training mode, as the official code of LoRA-GA (arXiv 2407.05000), LoRA-One (2502.01235) and LoRA-SB (2411.19557)
    does it: dropout acts, drawn from `spec.seed` where there is one. Each ∂W goes to a sum on the host as soon as
    backward has it and is dropped, so that the device holds one at a time, beside the activations of one batch; the
    sums take as much host memory as the adapted weights do in float32.

    Raises `SpecError` for data or a loss that cannot be used, `AdapterError` for a loss or gradient that is not finite,
    `TargetError` for a site no gradient reaches or whose weight is used elsewhere too.
    """

    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Tensor]]:
        weights = self._weights()
        sums = {name: torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
                for name, weight in weights.items()}  # fmt: skip
        reached: set[str] = set()
        seen = 0
        with (
            undisturbed(self.model, self.spec.seed),
            torch.enable_grad(),
            _collected(self.model, weights, sums, reached),
        ):
            set_mode(self.model, True)
            for batch in taken(data, self.spec.batches, f"{self.spec.method}: gradients"):
                self._backward(fitted(self.model, batch, seen), loss, seen)
                self._require_finite(sums, seen)
                seen += 1
        names = [site.name for site in self.sites]
        self._require_reached([name for name in names if name not in reached or not sums[name].any()])
        self._note_batches(seen)
        mean = {site.name: sums[site.name].div_(seen) for site in self.sites}
        return self.spec, {site.name: mean[site.name].mT if site.transposed else mean[site.name] for site in self.sites}

    def _weights(self) -> dict[str, nn.Parameter]:
        owners = owners_of_parameters(self.model)
        weights = {}
        for site in self.sites:
            weight = self.model.get_submodule(site.host)._parameters.get(site.slot)
            if weight is None:
                raise TargetError(f"{site.name}: its weight is no parameter, so it has no gradient; exclude it")
            if others := [name for name in owners[id(weight)] if name != site.parameter]:
                raise TargetError(
                    f"{site.name} shares its weight with {', '.join(others)}: the gradient is that of all uses, the"
                    " adapter would act in one; untie them first, or exclude it"
                )
            weights[site.name] = weight
        return weights

    def _backward(self, batch: Batch, loss: Loss | None, index: int) -> None:
        state = random_state()
        value = loss_of(run(self.model, batch, index), batch, loss)
        if not torch.isfinite(value):
            got = f"the loss of batch {index} is {value.item()}"
            del value
            set_random_state(state)
            raise AdapterError(f"{got}; {first_not_finite(self.model, self.sites, batch, index)}")
        value.backward()

    def _require_finite(self, sums: Mapping[str, Tensor], index: int) -> None:
        if bad := [name for name, total in sums.items() if not torch.isfinite(total).all()]:
            raise AdapterError(
                f"the gradient of batch {index} is not finite at {len(bad)} sites, with a finite loss (first:"
                f" {', '.join(bad[:5])}): it overflows on the way back; use a wider dtype for the model, or a smaller"
                " loss"
            )

    def _require_reached(self, dead: list[str]) -> None:
        if dead:
            listed = "\n".join(f"  {name}" for name in dead[:8]) + (f"\n  … ({len(dead)} in all)" if dead[8:] else "")
            raise TargetError(
                f"no gradient of the loss reaches {len(dead)} sites:\n{listed}\nThe loss does not depend on their"
                " weights on this data (not used, read under no_grad, behind a zero, or within reentrant"
                " checkpointing). Exclude them, or give data and a loss that use them."
            )


@contextmanager
def _collected(
    model: nn.Module, weights: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], reached: set[str]
) -> Iterator[None]:
    """From here on only these weights require gradients; within the block those go into `sums` and away."""

    def collect(name: str) -> Callable[[Tensor], None]:
        def into_sum(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None
            if gradient is not None:
                sums[name].add_(gradient.to(sums[name]))
                reached.add(name)

        return into_sum

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    handles = [weight.register_post_accumulate_grad_hook(collect(name)) for name, weight in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
