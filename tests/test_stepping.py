"""`compile_step` does what a plain loop does, step by step, whatever the method does around its steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile.errors import AdapterError, SpecError

EAGER = {"inner": "aot_eager"}
TRACES = hasattr(torch._dynamo.config, "trace_autograd_ops")
needs_tracing = pytest.mark.skipif(not TRACES, reason="this torch does not trace autograd")
STEPS = 5

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 3},
    "dora": {"alpha": 3},
    "vera": {},
    "lora+": {"alpha": 3},
    "lora-fa": {"alpha": 3},
    "lora-pro": {"alpha": 3},
    "adalora": {"alpha": 3, "rank": 3, "target_rank": 1, "total_steps": 5, "tfinal": 1},
    "plora": {"alpha": 3, "period": 2, "momentum": 0.5},
    "delta-lora": {"alpha": 3, "start_step": 2, "ratio": 0.7},
    "lora-drop": {"alpha": 3, "warmup_steps": 2, "threshold": 0.5},
    "galore": {"update_proj_gap": 3},
}


class Small(nn.Module):
    """Three maps of which two share their input; returns its loss, as models of transformers do."""

    checkpointed = False

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(7, 5), nn.Linear(7, 3), nn.Linear(8, 4)

    def inner(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x)], -1).tanh()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        y = self.out(h)
        return {"loss": (y - labels).square().mean(), "logits": y}


def batch(number: int, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 7, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": x[:, :4].sin()}


def made(method: str, cls: Any = torch.optim.SGD, lr: float = 0.05, **kw: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    fields = {"rank": 2, "seed": 1, "dtype": "float64", **METHODS[method]}
    model = lrcompile.apply(Small().double(), lrcompile.spec(method, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(("B", "b", "d")):
                parameter.normal_(std=0.1)
    return model, lrcompile.optimizer(model, cls, lr=lr, **kw)


def plain(model: Any, optimizer: Any, number: int, **kw: Any) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = model(**batch(number, **kw))["loss"]
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_same(model: Any, other: Any, tolerance: float) -> None:
    named = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=tolerance, atol=tolerance)


QUICK = ("lora", "dora", "lora-fa", "adalora", "plora", "delta-lora", "galore")


@pytest.mark.parametrize(
    "method", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in METHODS]
)
def test_steps_are_those_of_a_plain_loop(method: str) -> None:
    (model, optimizer), (ours, stepped) = made(method, momentum=0.9), made(method, momentum=0.9)
    step = lrcompile.compile_step(ours, stepped, options=EAGER)
    for number in range(STEPS):
        expected = plain(model, optimizer, number)
        torch.testing.assert_close(step(**batch(number)), expected, rtol=1e-12, atol=1e-12)
    assert_same(ours, model, 1e-12)
    assert (step.captured == "whole") == (TRACES and method in ("lora", "dora", "vera", "lora+"))
    assert step.reason == "" or method in step.reason or not TRACES


@pytest.mark.parametrize("whole", [None, False])
@pytest.mark.parametrize("method", ["lora", pytest.param("vera", marks=pytest.mark.slow)])
def test_steps_of_adamw_are_those_of_a_plain_loop(method: str, whole: bool | None) -> None:
    (model, optimizer), (ours, stepped) = made(method, torch.optim.AdamW), made(method, torch.optim.AdamW)
    step = lrcompile.compile_step(ours, stepped, whole=whole, options=EAGER)
    for number in range(STEPS):
        plain(model, optimizer, number)
        step(**batch(number))
    assert_same(ours, model, 1e-12)


@pytest.mark.parametrize("whole", [None, False])
def test_a_scheduler_moves_the_rate_and_nothing_is_compiled_anew(whole: bool | None) -> None:
    (model, optimizer), (ours, stepped) = made("lora"), made("lora")
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda k: 1 / (1 + k)) for each in (optimizer, stepped)]
    step = lrcompile.compile_step(ours, stepped, whole=whole, options=EAGER)
    compiled = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number in range(STEPS):
            plain(model, optimizer, number, rows=6 + number)
            step(**batch(number, rows=6 + number))
            for schedule in schedules:
                schedule.step()
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[1] == compiled[-1]
    assert isinstance(stepped.param_groups[0]["lr"], float)
    assert_same(ours, model, 1e-12)


@needs_tracing
def test_settings_that_a_graph_holds_as_constants_end_the_whole_step_when_they_change() -> None:
    (model, optimizer), (ours, stepped) = made("lora", momentum=0.9), made("lora", momentum=0.9)
    step = lrcompile.compile_step(ours, stepped, options=EAGER)
    for number in range(STEPS):
        for each in (optimizer, stepped):
            each.param_groups[0]["momentum"] = 0.9 if number < 3 else 0.5 + number / 10
        plain(model, optimizer, number)
        step(**batch(number))
        assert step.captured == ("whole" if number < 3 else "parts")
    assert "momentum" in step.reason
    assert_same(ours, model, 1e-12)


def test_gradients_of_several_batches_make_one_step() -> None:
    (model, optimizer), (ours, stepped) = made("galore"), made("galore")
    step = lrcompile.compile_step(ours, stepped, accumulate=2, options=EAGER)
    for number in range(3):
        optimizer.zero_grad()
        before = ours.query.weight.clone()
        for half in range(2):
            assert torch.equal(ours.query.weight, before)
            given = {key: value[4 * half : 4 * half + 4] for key, value in batch(number, rows=8).items()}
            (model(**given)["loss"] / 2).backward()
            step(**given)
        optimizer.step()
    assert_same(ours, model, 1e-12)


@pytest.mark.parametrize("whole", [None, False])
def test_gradients_are_scaled_down_to_max_norm(whole: bool | None) -> None:
    (model, optimizer), (ours, stepped) = made("lora"), made("lora")
    step = lrcompile.compile_step(ours, stepped, max_norm=0.01, whole=whole, options=EAGER)
    for number in range(3):
        optimizer.zero_grad()
        model(**batch(number))["loss"].backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.01
        optimizer.step()
        step(**batch(number))
    assert_same(ours, model, 1e-12)


@needs_tracing
def test_a_whole_step_of_a_checkpointed_model_is_the_same() -> None:
    (model, optimizer), (ours, stepped) = made("lora"), made("lora")
    ours.checkpointed = True
    step = lrcompile.compile_step(ours, stepped, options=EAGER)
    for number in range(3):
        plain(model, optimizer, number)
        step(**batch(number))
    assert_same(ours, model, 1e-12)


def test_a_loss_of_the_users_sees_output_and_batch() -> None:
    (model, optimizer), (ours, stepped) = made("lora"), made("lora")

    def loss(output: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
        return (output["logits"] - given[1]).abs().sum()

    step = lrcompile.compile_step(ours, stepped, loss, options=EAGER)
    for number in range(3):
        given = tuple(batch(number).values())
        optimizer.zero_grad()
        expected = loss(model(*given), given)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(*given), expected.detach(), rtol=1e-12, atol=1e-12)
    assert_same(ours, model, 1e-12)


def test_state_is_loaded_in_between_and_hooks_are_called_once_a_step() -> None:
    (model, optimizer), (ours, stepped) = made("lora", momentum=0.9), made("lora", momentum=0.9)
    called = []
    stepped.register_step_post_hook(lambda *_: called.append(ours.query.weight.grad))
    step = lrcompile.compile_step(ours, stepped, options=EAGER)
    for number in range(STEPS):
        if number == 3:
            stepped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert stepped.state_dict()["param_groups"][0]["lrcompile_steps"] == 3
        plain(model, optimizer, number)
        step(**batch(number))
    assert stepped.param_groups[0]["lrcompile_steps"] == len(called) == STEPS
    assert_same(ours, model, 1e-12)


def test_an_error_within_a_step_leaves_model_and_step_usable() -> None:
    (model, optimizer), (ours, stepped) = made("lora"), made("lora")
    step = lrcompile.compile_step(ours, stepped, options=EAGER)
    captured = step.captured
    for number in range(4):
        plain(model, optimizer, number)
        with pytest.raises((RuntimeError, SpecError)):
            step(x=torch.zeros(3, 6, dtype=torch.float64), labels=torch.zeros(3, 4))
        step(**batch(number))
    assert step.captured == captured
    assert isinstance(stepped.param_groups[0]["lr"], float)
    assert_same(ours, model, 1e-12)


def test_a_target_that_no_gradient_reaches_is_named_as_in_a_loop() -> None:
    model, optimizer = made("lora")
    with pytest.raises(lrcompile.TargetError, match=r"out\..*B"):
        lrcompile.compile_step(model, optimizer, lambda output, given: model.inner(given["x"]).sum(), options=EAGER)(
            **batch(0)
        )


def _another(model: Any, optimizer: Any) -> Any:
    return lrcompile.compile_step(made("lora")[0], optimizer)


def _frozen(model: Any, optimizer: Any) -> Any:
    model.requires_grad_(False)
    return lrcompile.compile_step(model, optimizer)


def _stepping(*args: Any, loss: Any = None, **kw: Any) -> Callable[[Any, Any], Any]:
    return lambda model, optimizer: lrcompile.compile_step(model, optimizer, loss, options=EAGER)(*args, **kw)


def _made_with(*args: Any, **kw: Any) -> Callable[[Any, Any], Any]:
    return lambda model, optimizer: lrcompile.compile_step(model, optimizer, *args, **kw)


def _lbfgs(model: Any, optimizer: Any) -> Any:
    return lrcompile.compile_step(model, torch.optim.LBFGS(optimizer.param_groups[0]["params"]))


def _class(model: Any, optimizer: Any) -> Any:
    cls: Any = type(optimizer)
    return lrcompile.compile_step(model, cls)


WRONG: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "another model's": (_another, AdapterError, "belong to another model"),
    "nothing trains": (_frozen, AdapterError, "activate"),
    "no optimizer": (_class, AdapterError, "lrcompile.optimizer"),
    "LBFGS": (_lbfgs, AdapterError, "closure"),
    "a loss that is none": (_made_with("mse"), SpecError, "function of output and batch"),
    "accumulate": (_made_with(accumulate=0), SpecError, "whole number from 1"),
    "max_norm": (_made_with(max_norm=-1.0), SpecError, "above 0"),
    "whole, accumulated": (_made_with(whole=True, accumulate=3), SpecError, "3 batches|trace"),
    "a packed batch": (_stepping(batch(0)), SpecError, r"step\(\*\*batch\)"),
    "both": (_stepping(batch(0)["x"], labels=batch(0)["labels"]), SpecError, "both"),
    "no batch": (_stepping(), SpecError, "got nothing"),
    "unknown names": (_stepping(x=batch(0)["x"], target=batch(0)["labels"]), SpecError, "labels"),
    "no scalar": (_stepping(loss=lambda out, _: out["logits"], **batch(0)), SpecError, "one number"),
    "no gradient": (_stepping(loss=lambda out, _: out["logits"].sum().detach(), **batch(0)), SpecError, "no gradient"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said(name: str) -> None:
    act, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        act(*made("lora"))


@pytest.mark.slow
@needs_tracing
def test_a_llama_is_captured_whole_by_inductor_with_our_schedules() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> tuple[Any, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, use_cache=False,
        )  # fmt: skip
        model = lrcompile.apply(LlamaForCausalLM(config), lrcompile.spec("lora", rank=3, seed=1))
        return model, lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)

    (model, optimizer), (ours, stepped) = llama(), llama()
    step = lrcompile.compile_step(ours, stepped)
    for number in range(4):
        ids = torch.randint(0, 64, (2, 10 + number), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        expected = model(input_ids=ids, labels=ids).loss
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(step(input_ids=ids, labels=ids), expected.detach(), rtol=1e-4, atol=1e-4)
    assert step.captured == "whole"
    assert "one graph" in repr(step)
