"""A method that acts at certain steps acts at the same ones however the steps are taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile.written import written_by

STEPS, ROWS = 7, 8
SPECS = {
    "plora": {"period": 3, "momentum": 1.0},
    "plora, a part": {"period": 2, "momentum": 0.4},
    "delta-lora": {"start_step": 2, "ratio": 0.8},
}


class Small(nn.Module):
    """A model that `Trainer` takes: it returns its loss."""

    checkpointed = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


DATA = [{"x": x, "labels": x[:3].sin()} for x in torch.linspace(-2, 1.3, ROWS * 7).cos().reshape(ROWS, 7).double()]


def rows(first: int = 0, last: int = ROWS) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in DATA[first:last]]) for key in ("x", "labels")}


def made(name: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(2)
    spec = lrcompile.spec(name.partition(",")[0], rank=2, alpha=3, seed=1, dtype="float64", **SPECS[name])
    model = lrcompile.apply(Small().double(), spec)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k / 2))


def plain(model: Any, optimizer: Any, schedule: Any) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**rows())["loss"].backward()
        optimizer.step()
        schedule.step()


def accumulated(model: Any, optimizer: Any, schedule: Any) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in range(4):
            (model(**rows(part * 2, part * 2 + 2))["loss"] / 4).backward()
        optimizer.step()
        schedule.step()


def checkpointed(model: Any, optimizer: Any, schedule: Any) -> None:
    model.checkpointed = True
    plain(model, optimizer, schedule)


def scaled(model: Any, optimizer: Any, schedule: Any) -> None:
    """With a step that overflows and is left out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number in range(STEPS + 1):
        optimizer.zero_grad()
        scaler.scale(model(**rows())["loss"] * (float("inf") if number == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 3:
            schedule.step()


def closures(model: Any, optimizer: Any, schedule: Any) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**rows())["loss"]
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        schedule.step()


def trained(parts: int) -> Callable[[Any, Any, Any], None]:
    def run(model: Any, optimizer: Any, schedule: Any) -> None:
        transformers = pytest.importorskip("transformers")
        arguments = transformers.TrainingArguments(
            output_dir="unused", max_steps=STEPS, per_device_train_batch_size=ROWS // parts, save_strategy="no",
            gradient_accumulation_steps=parts, max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True,
            logging_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=DATA, optimizers=(optimizer, schedule))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()

    return run


LOOPS: dict[str, Callable[[Any, Any, Any], None]] = {
    "accumulation": accumulated,
    "gradient checkpointing": checkpointed,
    "gradient scaler": scaled,
    "closure": closures,
    "Trainer": trained(1),
    "Trainer with accumulation": trained(2),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", SPECS)
def test_the_method_acts_at_the_same_steps_in_every_loop(name, loop):
    (model, *with_model), (reference, *with_reference) = made(name), made(name)
    LOOPS[loop](model, *with_model)
    plain(reference, *with_reference)
    assert any(written_by(reference, "default")) == (name != "delta-lora")
    for (key, value), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        # Rows are added up in another order; Adam divides by roots of sums that are small at first.
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", SPECS)
def test_a_step_that_the_scaler_leaves_out_is_none(name):
    model, optimizer, _ = made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(model(**rows())["loss"] * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
