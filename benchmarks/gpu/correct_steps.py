"""Compiled training by method: every gradient against float64, losses of steps with an optimizer against a plain loop.

‖g − g64‖/‖g64‖ of the worst tensor may be twice that of the uncompiled model in the same dtype, and 4 roundings.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
import lrcompile.backend
from gpu.layers import SMALL, TINY, Layers, Sizes, batch
from gpu.section import Section

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 32}, "dora": {"alpha": 32}, "lora-fa": {"alpha": 32}, "qlora": {"alpha": 32}, "galore": {},
}  # fmt: skip
STEPS = 3
CAP = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""No gradient may be further off, however far the uncompiled model's are."""
PLAN = {
    torch.bfloat16: (("gradients", tuple(METHODS)),),
    torch.float32: (("gradients", ("lora", "dora")), ("steps", ("lora", "galore", "qlora"))),
}
DRY_PLAN = {torch.float32: (("gradients", ("lora",)), ("steps", ("galore",)))}


def main() -> None:
    os.environ.setdefault("LRCOMPILE_TUNE", "0")  # correct_kernels has every way; choosing takes minutes
    section = Section()
    sizes, rows = (TINY, 5) if section.dry else (SMALL, 77)
    checks = {"gradients": _gradients, "steps": _steps}
    for dtype, plan in (DRY_PLAN if section.dry else PLAN).items():
        for what, methods in plan:
            for method in methods:
                if section.over(f"{what} {method} {dtype}"):
                    return
                torch.compiler.reset()
                checks[what](section, method, sizes, rows, dtype)


def _made(method: str, sizes: Sizes, base: torch.dtype, computing: torch.dtype, device: torch.device) -> nn.Module:
    """Computes in `computing`, with values that `base` can hold; B is random, or A had no gradient."""
    torch.manual_seed(1)
    model = Layers(sizes, 1).to(base).to(computing).to(device)
    fields = {"rank": 8, "seed": 1, "dtype": str(computing).removeprefix("torch."), **METHODS[method]}
    if method == "qlora":
        fields["compute_dtype"] = fields["dtype"]
    model = lrcompile.apply(model, lrcompile.spec(method, **fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.rpartition(".")[2] in ("A", "B"):
                drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                parameter.copy_(drawn.to(base))
            elif name.rpartition(".")[2] == "A":  # lora-fa's, which does not train
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(base))
    return model


def _gradients(section: Section, method: str, sizes: Sizes, rows: int, dtype: torch.dtype) -> None:
    found: list[dict[str, Tensor]] = []
    for computing, compiled in ((torch.float64, False), (dtype, False), (dtype, True)):
        model = _made(method, sizes, dtype, computing, section.device)
        given = batch(sizes, rows, dtype, section.device)
        given = {name: value.detach().to(computing).requires_grad_(name == "x") for name, value in given.items()}
        run: Any = (
            torch.compile(model, backend=lrcompile.backend.lrcompile, options=_inner(section)) if compiled else model
        )
        run(**given)["loss"].backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        found.append({**gradients, "x": given["x"].grad.double()})  # type: ignore[union-attr]
    exact, eager, ours = found
    errors = [
        max(float((each[n] - g).norm() / g.norm()) for n, g in exact.items() if g.norm() > 0) for each in (eager, ours)
    ]
    limit = min(2 * errors[0] + 4 * torch.finfo(dtype).eps / 2, CAP[dtype])
    same = exact.keys() == ours.keys() and errors[1] <= limit
    section.row(
        what="gradients", method=method, dtype=str(dtype), tensors=len(ours), error=errors[1], eager_error=errors[0],
        limit=limit, ok=same,
    )  # fmt: skip


def _steps(section: Section, method: str, sizes: Sizes, rows: int, dtype: torch.dtype) -> None:
    """Losses after steps by `compile_step` and by a plain loop: of the same dtype, since GaLore draws its directions in
    it, and with SGD, since a step of Adam follows the rounding of the smallest gradients.
    """
    plain, ours = (_made(method, sizes, dtype, dtype, section.device) for _ in range(2))
    optimizers = [lrcompile.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9) for model in (plain, ours)]
    step = lrcompile.compile_step(ours, optimizers[1], **({"options": _inner(section)} if section.dry else {}))
    losses: list[tuple[float, float]] = []
    for number in range(STEPS):
        given = {name: value.detach() for name, value in batch(sizes, rows, dtype, section.device, number).items()}
        optimizers[0].zero_grad()
        expected = plain(**given)["loss"]
        expected.backward()
        optimizers[0].step()
        losses.append((float(expected), float(step(**given))))
    error = max(abs(one - other) for one, other in losses) / max(abs(one) for one, _ in losses)
    section.row(
        what="steps", method=method, dtype=str(dtype), captured=step.captured, reason=step.reason, error=error,
        limit=CAP[dtype], ok=error <= CAP[dtype],
    )  # fmt: skip


def _inner(section: Section) -> dict[str, Any]:
    return {"inner": "aot_eager"} if section.dry else {}


if __name__ == "__main__":
    main()
