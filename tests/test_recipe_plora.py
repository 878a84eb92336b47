"""PeriodicLoRA (arXiv 2402.16141): what an unload keeps, what it starts again, and what it leaves behind."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.optim.stages import LEARNING_RATES
from lrcompile.written import mark_written, written_by


def base(inside=7, hidden=5, out=3, dtype=torch.float64) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inside, hidden), nn.Tanh(), nn.Linear(hidden, out)).to(dtype)


def plora(model: Any = None, **fields) -> Any:
    given = {"rank": 2, "alpha": 3, "period": 4, "momentum": 1.0, "seed": 1} | fields
    return lrcompile.apply(base() if model is None else model, lrcompile.spec("plora", **given))


def take(model: Any, optimizer: Any, steps: int, start: int = 0, schedule: Any = None, seen: list | None = None) -> Any:
    """Steps start+1 … start+steps, each on data of its own number."""
    weight = next(p for name, p in model.named_parameters() if "lrcompile" not in name)
    for number in range(start + 1, start + steps + 1):
        g = torch.Generator().manual_seed(number)
        x = torch.randn(6, 7, generator=g, dtype=torch.float64).to(weight.dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        if seen is not None:
            seen.append(copy.deepcopy(model))
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model


def pair(model: Any, index: int = 0) -> Any:
    return model[index].lrcompile_adapters["weight"]["default"]


def weights(model: Any) -> list[torch.Tensor]:
    return [model[i].weight.detach().clone() for i in (0, 2)]


# --- (h): y identical before and after


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    inside=st.integers(2, 9),
    hidden=st.integers(2, 8),
    rank=st.integers(1, 2),
    momentum=st.floats(0.01, 1.0),
    double=st.booleans(),
    weight=st.sampled_from([1.0, 0.5, -1.7]),
)
def test_an_unload_changes_no_output(inside, hidden, rank, momentum, double, weight):
    dtype = torch.float64 if double else torch.float32
    model = plora(base(inside, hidden, 3, dtype), rank=rank, period=1, momentum=momentum)
    lrcompile.activate(model, {"default": weight})
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.0)
    with torch.no_grad():
        for index in (0, 2):
            pair(model, index).B.normal_()
    x = torch.randn(11, inside, dtype=dtype)
    before, old = model(x).detach(), weights(model)
    model(x).sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(old, weights(model), strict=True))
    # Each output is a handful of sums of at most inside + hidden + rank terms of size about 10.
    tolerance = 64 * torch.finfo(dtype).eps * float(before.abs().max() + 10)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=tolerance)


def transformer_layer() -> Any:
    return nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2Model(config)


def mixtral() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=8,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    return transformers.MixtralModel(config)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(11, 6), nn.Parameter(torch.randn(6, 5) / 3)

    def forward(self, ids):
        return (self.table(ids) @ self.weight).tanh()


IDS = torch.tensor([[1, 4, 10], [0, 2, 2]])
KINDS: dict[str, Any] = {
    "packed attention": (transformer_layer, "all-linear", torch.linspace(-1, 1, 36).reshape(2, 3, 6).double()),
    "conv1d": (gpt2, "all-linear", IDS),
    "embedding": (gpt2, ["wte"], IDS),
    "experts": (mixtral, ["gate_up_proj", "down_proj"], IDS),
    "raw parameter": (lambda: nn.Sequential(Raw()), ["0"], IDS),
    "captured graph": (
        lambda: torch.export.export(base(), (torch.ones(2, 7, dtype=torch.float64),)).module(),
        "all-linear",
        torch.linspace(-1, 1, 14, dtype=torch.float64).reshape(2, 7),
    ),
}


def outputs(model: Any, x: Any) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unload_changes_no_output_at_any_kind_of_site(kind, momentum):
    make, targets, x = KINDS[kind]
    model = plora(make().double(), targets=targets, period=1, momentum=momentum)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.0)
    old = {name: p.detach().clone() for name, p in model.named_parameters() if "lrcompile" not in name}
    for _ in range(2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lrcompile" in name:
                    p.normal_(0, 0.3)
        y = outputs(model, x)
        (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).sum().backward()
        optimizer.step()
        torch.testing.assert_close(outputs(model, x), y, rtol=1e-12, atol=1e-12)
    changed = {name for name, p in model.named_parameters() if name in old and not torch.equal(p, old[name])}
    assert changed == set(written_by(model, "default"))


# --- (h): W_T − W_0 is the sum of the stages' shares; its rank


@pytest.mark.parametrize("momentum", [1.0, 0.25])
def test_the_weight_has_moved_by_the_sum_of_what_the_stages_unloaded(momentum):
    model = plora(base(9, 8, 7), rank=1, period=3, momentum=momentum)
    start = [torch.zeros(8, 9), torch.zeros(7, 8)]
    total, seen = [each.double() for each in start], weights(model)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
    for number in range(1, 10):
        optimizer.zero_grad()
        x = torch.randn(6, 9, dtype=torch.float64)
        model(x).sin().sum().backward()
        twin = copy.deepcopy(model)
        optimizer.step()
        if number % 3 == 0:  # the product just before: what the outputs, unchanged, say it was
            eye = torch.eye(9, dtype=torch.float64)
            for i, index in enumerate((0, 2)):
                inside = eye if index == 0 else torch.eye(8, dtype=torch.float64)
                acting = (model[index](inside) - model[index](torch.zeros_like(inside))).T  # W' + s(1 − m)BA
                product = (acting - twin[index].weight) if momentum == 1 else None
                if product is None:
                    left = pair(model, index).delta(torch.float64)
                    product = left / (1 - momentum)
                total[i] += momentum * product.detach()
    for moved, old, expected in zip(weights(model), seen, total, strict=True):
        torch.testing.assert_close(moved - old, expected, rtol=1e-11, atol=1e-12)
        if momentum == 1:
            assert torch.linalg.matrix_rank(moved - old, rtol=1e-9) == 3  # one for each stage


# --- (h): optimizer state empty, step 0, learning rate of the schedule's start


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_the_optimizer_state_is_empty_right_after_an_unload_and_counts_from_the_start(cls):
    model = plora(bias="all")
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    optimizer = lrcompile.optimizer(model, cls, lr=0.01, **options)
    take(model, optimizer, 3)
    assert optimizer.state
    take(model, optimizer, 1, 3)
    assert not optimizer.state
    if cls is torch.optim.AdamW:
        take(model, optimizer, 1, 4)
        assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_a_stage_with_momentum_1_is_a_whole_lora_run_from_the_unloaded_weights():
    model = plora(momentum=1.0)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.02)
    take(model, optimizer, 4)
    assert all(not pair(model, i).B.any() and pair(model, i).A.any() for i in (0, 2))
    plain: Any = nn.Sequential(*[copy.deepcopy(each) for each in base()])
    for i in (0, 2):
        plain[i].weight.data = model[i].weight.data.clone()
    lrcompile.apply(plain, lrcompile.spec("lora", rank=2, alpha=3))
    with torch.no_grad():
        for i in (0, 2):
            pair(plain, i).A.copy_(pair(model, i).A)
    fresh = lrcompile.optimizer(plain, torch.optim.AdamW, lr=0.02)
    take(model, optimizer, 3, 4)
    take(plain, fresh, 3, 4)
    assert all(torch.equal(pair(model, i).B, pair(plain, i).B) for i in (0, 2))


def rates_used(schedule_of, period: int, steps: int) -> list[float]:
    """What SGD on the sum of B's gradient-1 entries shows: the learning rate each step really had."""
    model = plora(period=period, momentum=0.5)
    used: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            used.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    # The wiring's hooks run around `step`, so what this sees is what the update is computed with.
    optimizer = lrcompile.optimizer(model, Watched, lr=0.08)
    take(model, optimizer, steps, schedule=schedule_of(optimizer))
    return used


SCHEDULES: dict[str, Any] = {
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, (k + 1) / 3)),
    "chained": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "none": lambda o: None,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_after_an_unload_is_that_of_the_schedules_start(schedule):
    used = rates_used(SCHEDULES[schedule], period=4, steps=11)
    assert used[4:8] == used[:4]
    assert used[8:] == used[:3]
    if schedule != "none":
        assert len(set(used[:4])) > 1


def test_the_scheduler_itself_goes_on_undisturbed():
    model = plora()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.08)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    take(model, optimizer, 10, schedule=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.08 / 2**10)


def test_a_learning_rate_in_a_tensor_stays_that_tensor():
    model = plora()
    rate = torch.tensor(0.01)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=rate)  # type: ignore[arg-type]
    held = optimizer.param_groups[0]["lr"]
    take(model, optimizer, 6)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.01)


# --- resume


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("stop", [2, 4, 6, 8], ids=lambda k: f"after-{k}")
@pytest.mark.parametrize("seed", [1, None])
def test_a_resumed_run_continues_to_the_bit_in_mid_stage_and_after_an_unload(stop, momentum, seed):
    def run(steps, start=0, files=None):
        model = plora(momentum=momentum, seed=seed)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
        if files is not None:
            loaded = torch.load(io.BytesIO(files), weights_only=True)
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
            schedule.load_state_dict(loaded["schedule"])
            torch.randn(7)  # torch's generator has gone elsewhere by then
        take(model, optimizer, steps, start, schedule)
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state, buffer)
        return model, buffer.getvalue()

    whole, _ = run(11)
    _, files = run(stop)
    resumed, _ = run(11 - stop, stop, files)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert written_by(resumed, "default") == ("0.weight", "2.weight")


def test_a_state_dict_kept_in_memory_does_not_change_with_training():
    model = plora(period=5)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    take(model, optimizer, 2)
    kept = optimizer.state_dict()
    take(model, optimizer, 1, 2)
    assert len(kept["param_groups"][0][LEARNING_RATES]) == 2


def test_resuming_under_another_period_is_refused():
    first = plora(period=4)
    optimizer = lrcompile.optimizer(first, torch.optim.AdamW, lr=0.01)
    take(first, optimizer, 5)
    other = lrcompile.optimizer(plora(period=7), torch.optim.AdamW, lr=0.01)
    with pytest.raises(lrcompile.AdapterError, match="period was 4 when saved and is 7 now"):
        other.load_state_dict(optimizer.state_dict())


def test_every_stage_draws_factors_of_its_own():
    model = plora(period=1)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    drawn = [pair(take(model, optimizer, 1, number)).A.detach().clone() for number in range(3)]
    drawn.append(pair(plora()).A.detach())
    assert len({tuple(A.flatten().tolist()) for A in drawn}) == 4
    assert len({tuple(pair(model, i).A[0, :5].tolist()) for i in (0, 2)}) == 2


def test_replicas_whose_generators_differ_draw_the_same_fresh_factors():
    drawn = []
    for noise in range(2):
        torch.manual_seed(0)
        model = plora(seed=None)
        torch.manual_seed(noise)
        take(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.1), 4)
        drawn.append([pair(model, i).A.detach().clone() for i in (0, 2)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


# --- other adapters, other groups


def test_another_adapter_that_trains_keeps_its_own_state_and_schedule():
    model = plora()
    lrcompile.apply(model, lrcompile.spec("lora", rank=1, seed=5), name="other")
    lrcompile.activate(model, ["default", "other"], train=["default", "other"])
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    assert len(optimizer.param_groups) == 2
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    take(model, optimizer, 4, schedule=schedule)
    own = {id(p) for name, p in model.named_parameters() if ".other." in name}
    assert {id(p) for p in optimizer.state} == own
    held = [LEARNING_RATES in group for group in optimizer.param_groups]
    assert sorted(held) == [False, True]


def test_a_method_that_computes_from_the_weight_cannot_act_beside_it():
    class Doubling(nn.Module):
        def forward(self, y, x, host=None):
            return y + nn.functional.linear(x, host.weight)

    model = plora()
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other")
    lrcompile.activate(model, ["default", "other"], train="default")
    adapters = model[0].lrcompile_adapters["weight"]
    adapters._modules["other"].__class__ = type("Doubling", (type(adapters["other"]),), dict(vars(Doubling)))
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    with pytest.raises(lrcompile.AdapterError, match=r"'other' .* is active at '0' and computes from the weight"):
        take(model, optimizer, 1)


def test_an_adapter_that_is_not_active_is_not_unloaded():
    model = plora()
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other")
    lrcompile.activate(model, "default", train="default")
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    take(model, optimizer, 3)
    old = weights(model)
    model(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    lrcompile.activate(model, "other")
    with pytest.raises(lrcompile.AdapterError, match="'default' trains and is not active"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(old, weights(model), strict=True))


# --- what it refuses


def test_an_optimizer_step_while_merged_is_an_error():
    model = plora()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    take(model, optimizer, 1)
    model(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    lrcompile.merge(model)
    with pytest.raises(lrcompile.MergeError, match="unmerge"):
        optimizer.step()
    lrcompile.unmerge(model)
    with lrcompile.disabled(model), pytest.raises(lrcompile.AdapterError, match="leave the block first"):
        optimizer.step()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


def test_a_weight_that_another_module_holds_is_refused_by_name_and_spared_otherwise():
    with pytest.raises(lrcompile.TargetError, match=r"plora writes its weight, which is one with embed\.weight"):
        plora(Tied(), targets=["head"])
    model = plora(Tied())
    assert [row.name for row in lrcompile.report(model).sites if row.adapted] == ["mid"]


def test_an_nf4_base_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(64, 64))
    lrcompile.quantize(model, "nf4")
    with pytest.raises(lrcompile.TargetError, match="where NF4 would round it away"):
        plora(model)


def test_period_and_momentum_have_no_usual_value_and_a_range():
    for fields in ({"momentum": 0.5}, {"period": 4}):
        with pytest.raises(lrcompile.SpecError, match="has no usual value"):
            lrcompile.spec("plora", **fields)
    for wrong in ({"momentum": 0.0}, {"momentum": 1.1}, {"period": 0}, {"period": 2.0}):
        with pytest.raises(lrcompile.SpecError, match="is not valid for plora"):
            lrcompile.spec("plora", **{"period": 4, "momentum": 0.5} | wrong)


# --- rounding


def in_bfloat16(size: float) -> Any:
    """A bfloat16 model one step of which unloads an update of `size` times the weight's."""
    model = plora(base(dtype=torch.bfloat16), period=1)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.0)
    with torch.no_grad():
        for i in (0, 2):
            pair(model, i).B.normal_()
            pair(model, i).B.mul_(size * model[i].weight.norm() / pair(model, i).delta().norm())
    model(torch.ones(2, 7, dtype=torch.bfloat16)).sum().backward()
    return model, optimizer


def test_what_rounding_took_is_in_the_report_once():
    model, optimizer = in_bfloat16(0.3)
    old = [each.float() for each in weights(model)]
    deltas = [pair(model, i).delta() for i in (0, 2)]
    optimizer.step()
    for new, was, delta in zip(weights(model), old, deltas, strict=True):
        assert new.dtype == torch.bfloat16
        assert torch.equal(new, (was + delta).bfloat16())  # one rounding, of a sum in float32
    model(torch.ones(2, 7, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    notes = [note for note in lrcompile.report(model).notes if "rounding took" in note]
    assert len(notes) == 1
    assert "unload after step 2" in notes[0]


def test_an_unload_that_rounding_would_erase_is_an_error_and_writes_nothing():
    model, optimizer = in_bfloat16(1e-4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        lrcompile.MergeError, match=r"would lose \d+% of the update at '0' to rounding to torch.bfloat16"
    ):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_update_that_is_not_finite_is_not_unloaded():
    model, optimizer = in_bfloat16(0.3)
    with torch.no_grad():
        pair(model, 2).B[0, 0] = float("inf")
    with pytest.raises(lrcompile.MergeError, match="'2' after step 1 holds values that are not finite"):
        optimizer.step()
    assert written_by(model, "default") == ()


# --- a base that training has written


def test_before_the_first_unload_remove_and_disabled_give_the_base_to_the_bit():
    model = plora()
    take(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1), 3)
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
    with lrcompile.disabled(model):
        assert torch.equal(model(x), base()(x))
    lrcompile.remove(model)
    assert all(torch.equal(v, base().state_dict()[k]) for k, v in model.state_dict().items())


def unloaded() -> Any:
    model = plora()
    return take(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1), 5)


def resumed() -> Any:
    model = plora()
    model.load_state_dict(unloaded().state_dict())
    return model


WRITTEN: dict[str, Any] = {"itself": unloaded, "copied": lambda: copy.deepcopy(unloaded()), "resumed": resumed}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_written_base_cannot_be_had_back_and_says_so(how):
    model = WRITTEN[how]()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lrcompile.AdapterError, match=r"'default' \(plora\) has written 2 base weights.*0\.weight"):
        lrcompile.remove(model)
    with pytest.raises(lrcompile.AdapterError, match="cannot compute the base's values"), lrcompile.disabled(model):
        pass
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    assert any("has written 2 base weights" in note for note in lrcompile.report(model).notes)
    lrcompile.remove(model, keep_trained_weights=True)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_removing_all_adapters_removes_none_if_one_has_written():
    model = unloaded()
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other")
    with pytest.raises(lrcompile.AdapterError):
        lrcompile.remove(model)
    assert lrcompile.report(model).adapters == ("default", "other")
    lrcompile.remove(model, "other")
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other")
    lrcompile.remove(model, "default", keep_trained_weights=True)
    assert any("'default' wrote 2 base weights before it was removed" in n for n in lrcompile.report(model).notes)
    x = torch.ones(2, 7, dtype=torch.float64)
    with lrcompile.disabled(model):
        assert torch.equal(model(x), nn.Sequential.forward(model, x))


def test_a_second_adapter_takes_the_base_as_it_is_now_and_comes_off_again_to_the_bit():
    model = unloaded()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other", example_inputs=(torch.ones(2, 7).double(),))
    assert any("'default' has written" in note for note in lrcompile.report(model).notes)
    lrcompile.remove(model, "other")
    lrcompile.activate(model, "default")
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_merging_after_unloads_adds_the_last_stage_and_unmerge_gives_the_unloaded_weights_back():
    model = unloaded()
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
    y, trained = model(x).detach(), weights(model)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    lrcompile.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), trained, strict=True))
    lrcompile.merge(model, final=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


def test_only_weights_of_an_adapter_that_writes_can_be_marked():
    model = plora()
    with pytest.raises(lrcompile.AdapterError, match=r"'0\.bias' is no weight that adapter 'default'"):
        mark_written(model, "default", ["0.bias"])
    lrcompile.apply(model, lrcompile.spec("lora", rank=1), name="other")
    with pytest.raises(lrcompile.AdapterError, match="is no weight that adapter 'other'"):
        mark_written(model, "other", ["0.weight"])


def test_a_verification_of_a_model_with_a_written_base_measures_what_the_pair_still_does():
    model = unloaded()
    x = (torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7),)
    assert lrcompile.verify(model, copy.deepcopy(model), x).ok


def test_compiled_it_trains_as_it_does_uncompiled_and_an_unload_recompiles_nothing():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, twin = plora(period=2), plora(period=2)
    compiled: Any = torch.compile(model, backend=counter)
    optimizers = [lrcompile.optimizer(each, torch.optim.AdamW, lr=0.05) for each in (model, twin)]
    for number in range(5):
        for each, taken, optimizer in zip((compiled, twin), (model, twin), optimizers, strict=True):
            x = torch.randn(6, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            optimizer.zero_grad()
            (each(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()
            assert bool(written_by(taken, "default")) == (number >= 1)
    assert counter.frame_count == 1
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-11)
