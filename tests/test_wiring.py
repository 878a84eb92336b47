"""Rules run once around each real optimizer step, whoever takes it, and what they do survives a resume to the bit."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import recipes
from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.recipe import Recipe, integer

STEPS, BATCH = 6, 8


class Counting(Rule):
    """Acts on gradients, weights and state by the step's number, and writes down what it was called with."""

    calls: list[tuple[str, int]] = []  # noqa: RUF012 (of all rules of one test)

    def started(self, step: Step) -> None:
        self.calls.append(("started", step.number))

    def before_step(self, step: Step) -> None:
        self.calls.append(("before", step.number))
        for adapter in self.pairs():
            assert adapter.B.grad is not None
            adapter.B.grad.mul_(1 + step.number / self.spec.period)

    def after_step(self, step: Step) -> None:
        self.calls.append(("after", step.number))
        for adapter in self.pairs():
            state = step.optimizer.state[adapter.A]
            state["total"] = state.get("total", torch.zeros_like(adapter.A)) + adapter.A.detach()
            if step.number % self.spec.period == 0:
                adapter.A.sub_(0.1 * state["total"])


PLUGIN = "counting_plugin"
"""What this file is called as a module that an entry point names."""

RECIPE = Recipe(
    name="counting",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ, with a rule that shows every step",
    paper="2106.09685",
    rules=(f"{PLUGIN}:Counting",),
    options={"period": integer(2, 1)},
)


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    monkeypatch.setitem(sys.modules, PLUGIN, sys.modules[__name__])
    points = [EntryPoint("counting", f"{PLUGIN}:RECIPE", "lrcompile.methods")]
    monkeypatch.setattr(recipes, "entry_points", lambda group: [p for p in points if p.group == group])
    recipes._plugins.cache_clear()
    Counting.calls.clear()
    yield
    recipes._plugins.cache_clear()


class Model(nn.Module):
    """As `transformers` calls one: keyword arguments, and a dict with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.b(torch.tanh(self.a(x)))
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def adapted(method="counting", **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"rank": 2, "seed": 0, "bias": "all"} | fields
    return lrcompile.apply(Model(), lrcompile.spec(method, **fields))


def batches(count=STEPS) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return [{"x": draw(BATCH, 6), "labels": draw(BATCH, 3)} for _ in range(count)]


def make(model: nn.Module, **kw: Any) -> torch.optim.Optimizer:
    return lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2, **kw)


def loop(model: Any, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


def result(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def plain() -> list[Tensor]:
    model = adapted()
    loop(model, make(model), batches())
    Counting.calls.clear()
    return result(model)


def same(model: nn.Module, expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(result(model), expected, strict=True))


def once_each(steps=STEPS, first=1) -> list[tuple[str, int]]:
    return [("started", first)] + [(kind, n) for n in range(first, first + steps) for kind in ("before", "after")]


def steps(calls: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Without the starts: accelerate loads an optimizer's state into itself when it prepares one."""
    return [call for call in calls if call[0] != "started"]


def test_a_plain_loop_calls_each_rule_once_before_and_once_after():
    model = adapted()
    loop(model, make(model), batches())
    assert Counting.calls == once_each()
    assert not same(adapted(), result(model))


def test_gradient_accumulation_is_one_step():
    expected = plain()
    model = adapted()
    optimizer = make(model)
    for batch in batches():
        optimizer.zero_grad()
        for _ in range(2):  # halves of a power of two add up to the whole, to the bit
            (model(**batch)["loss"] / 2).backward()
        optimizer.step()
    assert Counting.calls == once_each()
    assert same(model, expected)


def test_a_closure():
    expected = plain()
    for positional in (True, False):
        Counting.calls.clear()
        model = adapted()
        optimizer = make(model)
        calls: list[Any] = []

        def closure(batch, model=model, optimizer=optimizer, calls=calls):
            calls.append(batch)
            optimizer.zero_grad()
            loss = model(**batch)["loss"]
            loss.backward()
            return loss

        for batch in batches():
            bound = lambda batch=batch: closure(batch)  # noqa: E731
            loss = optimizer.step(bound) if positional else optimizer.step(closure=bound)
            assert loss is not None
        assert len(calls) == STEPS
        assert Counting.calls == once_each()
        assert same(model, expected)


def test_lbfgs_is_refused_for_a_method_that_acts_once_a_step():
    model = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.LBFGS, lr=0.1)
    with pytest.raises(lrcompile.AdapterError, match="many times a step"):
        optimizer.step(lambda: model(**batches(1)[0])["loss"])


def test_schedulers_wrap_the_step_and_change_nothing_but_rates():
    expected = plain()
    model = adapted()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for batch in batches():
        loop(model, optimizer, [batch])
        scheduler.step()
    assert Counting.calls == once_each()
    assert same(model, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    expected = plain()
    model = adapted()
    optimizer = make(model)
    for batch in batches():
        optimizer.zero_grad()
        x = batch["x"].clone().requires_grad_()
        loss = torch.utils.checkpoint.checkpoint(
            lambda x, b=batch: model(x, b["labels"])["loss"], x, use_reentrant=reentrant
        )
        loss.backward()
        optimizer.step()
    assert Counting.calls == once_each()
    assert same(model, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate):
    accelerate = pytest.importorskip("accelerate")
    expected = plain()
    model = adapted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inner = make(model)
    prepared, optimizer = accelerator.prepare(model, inner)
    for batch in [batch for batch in batches() for _ in range(accumulate)]:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert steps(Counting.calls) == steps(once_each())
    assert same(model, expected)


def trainer(model: Any, optimizer: Any, folder: Any, **settings: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(BATCH)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))


def test_transformers_trainer(tmp_path):
    expected = plain()
    model = adapted()
    trainer(model, make(model), tmp_path, save_strategy="no").train()
    assert steps(Counting.calls) == steps(once_each())
    assert same(model, expected)


def test_transformers_trainer_resumes_in_mid_schedule(tmp_path):
    expected = plain()
    model = adapted()
    trainer(model, make(model), tmp_path, save_strategy="steps", save_steps=3).train()
    assert same(model, expected)
    model = adapted()
    Counting.calls.clear()
    again = trainer(model, make(model), tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps(Counting.calls) == steps(once_each(3, first=4))
    assert same(model, expected)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_run_continues_to_the_bit(at, tmp_path):
    expected = plain()
    model = adapted()
    optimizer = make(model)
    loop(model, optimizer, batches()[:at])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    model = adapted()
    optimizer = make(model)
    model.load_state_dict(saved["model"])
    Counting.calls.clear()
    optimizer.load_state_dict(saved["optimizer"])
    loop(model, optimizer, batches()[at:])
    assert Counting.calls == once_each(STEPS - at, first=at + 1)
    assert same(model, expected)


def test_a_gradient_scaler_and_the_step_it_skips():
    expected = plain()
    model = adapted()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for index, batch in enumerate(batches()):
        for broken in [True, False] if index == 2 else [False]:
            optimizer.zero_grad()
            scaler.scale(model(**batch)["loss"] * (float("inf") if broken else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert Counting.calls == once_each()
    assert same(model, expected)  # scales are powers of two


def test_a_scaler_inside_a_fused_optimizer_and_the_step_it_skips():
    model = adapted()
    optimizer = make(model, fused=True)
    loop(model, optimizer, batches())
    expected = result(model)
    model = adapted()
    Counting.calls.clear()
    optimizer = make(model, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**10), torch.tensor(0.0)  # type: ignore[attr-defined]
    for index, batch in enumerate(batches()):
        for broken in [True, False] if index == 2 else [False]:
            optimizer.zero_grad()
            (model(**batch)["loss"] * 2.0**10 * (float("inf") if broken else 1.0)).backward()
            optimizer.found_inf.fill_(float(broken))  # type: ignore[attr-defined]
            optimizer.step()
    assert Counting.calls == once_each()
    assert same(model, expected)


def test_a_first_step_that_a_scaler_skips_is_not_taken_for_a_broken_loss():
    model = adapted()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(**batches(1)[0])["loss"] * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model(**batches(1)[0])["loss"]).backward()
    scaler.step(optimizer)
    assert [kind for kind, _ in Counting.calls] == ["started", "before", "after"]


def test_a_step_that_calls_its_parents_is_one_step():
    """Torch hooks both, once the parent class has had an instance of its own."""

    class Louder(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    expected = plain()  # makes a torch.optim.AdamW
    model = adapted()
    loop(model, lrcompile.optimizer(model, Louder, lr=1e-2), batches())
    assert Counting.calls == once_each()
    assert same(model, expected)


def test_a_step_that_raised_leaves_nothing_behind():
    class Failing(torch.optim.AdamW):
        fail = True

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory")
            return super().step(closure)

    plain()
    model = adapted()
    optimizer: Any = lrcompile.optimizer(model, Failing, lr=1e-2)
    model(**batches(1)[0])["loss"].backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False
    optimizer.step()
    assert Counting.calls == [("started", 1), ("before", 1), ("before", 1), ("after", 1)]


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"period": 3}, "default period was 2 when saved and is 3 now"),
    ({"rank": 1}, r"sites a was \[2, "),
    ({"alpha": 5}, r"sites a was \[2, "),
    ({"targets": ["a"]}, "sites b is in the saved state only"),
    ({"bias": "none"}, r"trained was \["),
    ({"method": "lora"}, "default method was 'counting' when saved and is 'lora' now"),
]


@pytest.mark.parametrize(("fields", "message"), OTHERS, ids=[next(iter(fields)) for fields, _ in OTHERS])
def test_resuming_with_another_spec_names_the_difference_and_changes_nothing(fields, message):
    model = adapted()
    optimizer = make(model)
    loop(model, optimizer, batches(2))
    other = adapted(**fields)
    fresh = make(other)
    with pytest.raises(lrcompile.AdapterError, match=message):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    loop(other, fresh, batches(1))


def test_another_name_is_another_adapter():
    model: Any = adapted("lora")
    optimizer = make(model)
    loop(model, optimizer, batches(1))
    torch.manual_seed(0)
    other = lrcompile.apply(Model(), lrcompile.spec("lora", rank=2, seed=0, bias="all"), name="mine")
    with pytest.raises(lrcompile.AdapterError, match="default is in the saved state only"):
        make(other).load_state_dict(optimizer.state_dict())


def test_a_state_that_counts_no_steps_is_refused_by_a_method_that_does_and_taken_by_others():
    for method in ("counting", "lora"):
        model = adapted(method)
        optimizer = make(model)
        loop(model, optimizer, batches(1))
        saved = optimizer.state_dict()
        for key in ("lrcompile_steps", "lrcompile_belongs"):
            saved["param_groups"][0].pop(key)
        other = adapted(method)
        fresh = make(other)
        if method == "counting":
            with pytest.raises(lrcompile.AdapterError, match="how many steps"):
                fresh.load_state_dict(saved)
        else:
            fresh.load_state_dict(saved)
            loop(other, fresh, batches(1))


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
class TestPaged:
    """QLoRA's optimizer; without a GPU bitsandbytes keeps its states unpaged, in the same arithmetic."""

    @pytest.fixture
    def cls(self, name):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)

    def test_it_computes_what_adamw_does(self, cls):
        ends = []
        for made in (torch.optim.AdamW, cls):
            model = adapted("lora", rank=3)
            start = torch.cat([p.flatten() for p in result(model)])
            loop(model, lrcompile.optimizer(model, made, lr=1e-2, weight_decay=0.01), batches())
            ends.append(torch.cat([p.flatten() for p in result(model)]))
        # tensors this small keep 32-bit states in either; each step rounds weight and update in float32
        rounding = STEPS * 8 * torch.finfo(torch.float32).eps
        assert (ends[0] - ends[1]).abs().max() <= rounding * float(ends[0].abs().max())
        assert not torch.equal(start, ends[0])

    def test_it_trains_beside_codes_and_resumes_to_the_bit(self, cls, name, tmp_path):
        def adapted() -> Any:
            torch.manual_seed(0)
            return lrcompile.apply(nn.Sequential(nn.Linear(64, 64)), lrcompile.spec("qlora", rank=64, seed=0))

        def run(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
            x, losses = torch.linspace(-1, 1, 32 * 64).sin().view(32, 64), []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        model = adapted()
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        losses = run(model, optimizer, 5)
        states = {state["state1"].dtype for state in optimizer.state.values()}
        assert states == {torch.uint8 if "8bit" in name else torch.float32}  # 4096 values: enough for 8 bits
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
        losses += run(model, optimizer, 5)
        assert losses[-1] < losses[0] / 2
        expected, states_saved = result(model), torch.load(tmp_path / "run.pt", weights_only=True)
        model = adapted()
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        model.load_state_dict(states_saved[0])
        optimizer.load_state_dict(states_saved[1])
        assert run(model, optimizer, 5) == losses[5:]
        assert same(model, expected)

    def test_rules_and_their_resume(self, cls, tmp_path):
        """Bitsandbytes loads without calling torch's hooks."""
        model = adapted(period=2)
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        loop(model, optimizer, batches())
        expected = result(model)
        model = adapted()
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        loop(model, optimizer, batches()[:3])
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
        saved = torch.load(tmp_path / "run.pt", weights_only=True)
        model = adapted()
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        model.load_state_dict(saved["model"])
        Counting.calls.clear()
        optimizer.load_state_dict(saved["optimizer"])
        loop(model, optimizer, batches()[3:])
        assert Counting.calls == once_each(3, first=4)
        assert same(model, expected)

    def test_another_spec_is_noticed_when_it_loads(self, cls):
        model = adapted()
        optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
        loop(model, optimizer, batches(1))
        fresh = lrcompile.optimizer(adapted(period=3), cls, lr=1e-2)
        with pytest.raises(lrcompile.AdapterError, match="period was 2"):
            fresh.load_state_dict(optimizer.state_dict())
