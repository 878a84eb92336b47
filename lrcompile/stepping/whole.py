"""Forward, backward and update as one graph: Dynamo traces `torch.autograd.grad` and the optimizer's own step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, Loss, loss_of
from lrcompile.compiling import compile
from lrcompile.liveness import drops_layers
from lrcompile.optim.wiring import foreign_hooks, rules_of
from lrcompile.stepping.updating import hooked, own_step, settings, traceable
from lrcompile.undisturbed import device_of

PARTITIONED = ("max_rank", "memory_budget", "regions")
"""Options that only a graph of forward alone, or one with a partitioner behind it, can honour."""


def obstacle(model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int, options: dict[str, Any]) -> str:
    """What keeps the step from being one graph, as far as can be said before it runs; empty if nothing does."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return f"torch {torch.__version__} does not trace autograd"
    if accumulate > 1:
        return f"a step is {accumulate} batches"
    if given := [name for name in PARTITIONED if options.get(name) is not None]:
        return f"{' and '.join(given)} need the backward pass in a graph of its own"
    if rules := rules_of(optimizer):
        methods = " and ".join(sorted({rule.spec.method for rule in rules}))
        return f"{methods} acts around the update, in Python"
    if foreign_hooks(optimizer):
        return "the optimizer has hooks of its own, which expect the gradients of this step"
    if not traceable(optimizer):
        return f"{type(optimizer).__name__} is not one of torch's optimizers"
    if drops_layers(model):
        return "layers are dropped at random, in Python"
    if isinstance(model, nn.parallel.DistributedDataParallel) or any(map(_unusual, model.parameters())):
        return "gradients are exchanged or hooked, in Python"
    return ""


def _unusual(parameter: Tensor) -> bool:
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(hooks) or hasattr(parameter, "full_tensor")


class Whole:
    """Takes a batch, gives its loss; each call is a step. After a first one, taken otherwise, it is to be prepared."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None,
        max_norm: float | None,
        options: dict[str, Any],
    ):
        self.model, self.optimizer = model, optimizer
        self.on_cuda = device_of(model).type == "cuda"
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        compiled = compile(_Graph(model, optimizer, self.parameters, loss, max_norm), fullgraph=True, **options)
        self.step = hooked(optimizer, compiled)
        self.settings: Any = None
        self.gradients: list[Tensor] = []

    @property
    def ready(self) -> bool:
        return self.settings is not None

    def prepare(self) -> str:
        """Keep the first step's gradients as memory for all later ones; or why that cannot be."""
        missing = sum(parameter.grad is None for parameter in self.parameters)
        if missing:
            return f"no gradient reached {missing} tensors in the first step, and one may in another"
        self.gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        for tensor in (*self.gradients, *states):
            torch._dynamo.mark_static_address(tensor)
            torch._dynamo.mark_static(tensor)
        self.settings = settings(self.optimizer)
        return ""

    def changed(self) -> str:
        """Why the graph no longer is what a step would do."""
        now = settings(self.optimizer)
        if len(now) != len(self.settings):
            return "the optimizer has other groups than it had"
        keys = sorted({key for one, other in zip(now, self.settings, strict=True) for key in one.keys() | other.keys()
                       if one.get(key) != other.get(key)})  # fmt: skip
        return f"the optimizer's {', '.join(keys)} changes, which a graph holds as constants" if keys else ""

    def __call__(self, batch: Batch) -> Tensor:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # a loop may have called zero_grad
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            value: Tensor = self.step(batch)
        return value.clone() if self.on_cuda else value


class _Graph(nn.Module):
    """What is traced."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        loss: Loss | None,
        max_norm: float | None,
    ):
        super().__init__()
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.update, self.trained, self.max_norm = own_step(optimizer), parameters, max_norm

    def forward(self, batch: Batch) -> Tensor:
        output = self.model(**batch) if isinstance(batch, dict) else self.model(*batch)
        value = loss_of(output, batch, self.loss)
        gradients = torch.autograd.grad(value, self.trained)
        with torch.no_grad():
            for parameter, gradient in zip(self.trained, gradients, strict=True):
                assert parameter.grad is not None  # memory of the first step's
                parameter.grad.copy_(gradient)
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, self.max_norm)
            self.update(self.optimizer)
        return value.detach()
