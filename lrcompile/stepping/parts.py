"""Forward and backward as `lrcompile.compile` makes them, then the optimizer's step with everything around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, Loss, loss_of
from lrcompile.compiling import compile
from lrcompile.stepping.updating import Update
from lrcompile.undisturbed import device_of


class Parts:
    """Takes a batch, gives its loss; every `accumulate`-th call is a step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None,
        accumulate: int,
        max_norm: float | None,
        options: dict[str, Any],
    ):
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.accumulate, self.max_norm, self.options = accumulate, max_norm, options
        self.on_cuda = device_of(model).type == "cuda"
        self.compiled: Any = None
        self.update = Update(optimizer, options)
        self.gathered = 0

    def __call__(self, batch: Batch) -> Tensor:
        if self.compiled is None:  # not for a step that is captured whole
            self.compiled = compile(self.model, **self.options)
        return self._step(self.compiled, self.update, batch)

    def eagerly(self, batch: Batch) -> Tensor:
        return self._step(self.model, self.optimizer.step, batch)

    def _step(self, model: Any, update: Any, batch: Batch) -> Tensor:
        try:
            if self.gathered == 0:
                self.optimizer.zero_grad()
            if self.on_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            value = loss_of(model(**batch) if isinstance(batch, dict) else model(*batch), batch, self.loss)
            (value if self.accumulate == 1 else value / self.accumulate).backward()
            # On CUDA the next replay of the graph would overwrite what it returned.
            result = value.detach().clone() if self.on_cuda else value.detach()
            if self.on_cuda and self.accumulate > 1 and self.gathered == 0:
                for parameter in self._parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad.clone()
            self.gathered += 1
            if self.gathered == self.accumulate:
                if self.max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self._parameters(), self.max_norm)
                update()
                self.gathered = 0
        except BaseException:
            self.gathered = 0
            self.optimizer.zero_grad()
            raise
        return result

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
