"""AdaLoRA's promises: the budget's schedule, who is dropped, what survives a resume, and PEFT as a witness."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile import SpecError
from lrcompile.optim.adalora import IMPORTANCE, KEPT, UNCERTAINTY, budget, least
from lrcompile.state import adapter_set, state_of

FIELDS: dict[str, Any] = {"rank": 4, "target_rank": 2, "total_steps": 12, "tinit": 2, "tfinal": 4, "seed": 0}


class Model(nn.Module):
    """Two maps of other sizes than the rank; a loss is in its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 5)
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"y": y} if labels is None else {"loss": (y - labels).square().mean(), "y": y}


def spec(**fields: Any) -> lrcompile.Spec:
    return lrcompile.spec("adalora", **FIELDS | fields)


def adapted(**fields: Any) -> Any:
    return lrcompile.apply(Model(), spec(**fields)).train()


def adapters(model: nn.Module) -> list[Any]:
    return [adapter_set(model, site)["default"] for site in state_of(model).sites["default"]]


def nonzero(model: nn.Module) -> int:
    return sum(int(adapter.E.count_nonzero()) for adapter in adapters(model))


def batch(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 7, generator=g, dtype=torch.float64)
    return {"x": x, "labels": torch.randn(6, 5, generator=g, dtype=torch.float64)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, pieces: int = 1) -> None:
    optimizer.zero_grad()
    whole = batch(number)
    for piece in range(pieces):
        part = {key: value.chunk(pieces)[piece] for key, value in whole.items()}
        (model(**part)["loss"] / pieces).backward()
    optimizer.step()


def trained(model: Any, steps: int, pieces: int = 1) -> tuple[Any, torch.optim.Optimizer, list[int]]:
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    counts = []
    for number in range(1, steps + 1):
        step(model, optimizer, number, pieces)
        counts.append(nonzero(model))
    return model, optimizer, counts


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def schedule(**fields: Any) -> list[int]:
    s = spec(**fields)
    return [budget(s, number, 8, 2 * s.target_rank) for number in range(1, s.total_steps + 3)]


# ---- the method, item by item


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, 864),
        (50, 864),
        (51, 858),
        (60, 810),
        (75, 742),
        (100, 661),
        (125, 612),
        (150, 586),
        (175, 577),
        (199, 576),
        (200, 576),
        (201, 576),
        (300, 576),
        (400, 576),
    ],
)
def test_the_golden_schedule_of_72_sites_from_rank_12_to_8(number, expected):
    s = lrcompile.spec("adalora", rank=12, target_rank=8, total_steps=300, tinit=50, tfinal=100)
    assert budget(s, number, 72 * 12, 72 * 8) == expected


def test_the_output_at_the_start_is_the_bases_to_the_bit():
    base, model = Model(), adapted()
    x = batch(0)["x"]
    assert torch.equal(base(x)["y"], model(x)["y"])


def test_the_first_gradient_is_zero_for_A_and_B_and_not_for_E():
    model = adapted(orth_weight=0)
    model(**batch(0))["loss"].backward()
    for adapter in adapters(model):
        assert not adapter.A.grad.any()
        assert not adapter.B.grad.any()
        assert adapter.E.grad.count_nonzero() == 4


def test_factors_start_as_small_gaussians_and_the_scale_keeps_the_first_rank():
    model = lrcompile.apply(nn.Linear(300, 200), lrcompile.spec("adalora", rank=40, target_rank=8, total_steps=9))
    (adapter,) = adapters(model)
    for factor in (adapter.A, adapter.B):
        # 8000 draws or more: the standard deviation is 0.02 within 5 of its own standard errors
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=5 / (2 * 8000) ** 0.5)
    assert adapter.scale_value == 32 / (40 + 1e-5)


def test_no_more_triplets_act_than_the_budget_allows_after_each_mask():
    _, _, counts = trained(adapted(), 14)
    assert counts == [min(8, b) for b in schedule()[:14]]
    assert counts[-1] == 4


def test_between_masks_dropped_triplets_may_come_back():
    _, _, counts = trained(adapted(delta_t=3, total_steps=14), 9)
    assert counts[2] < 8  # step 3 masks
    assert counts[3] == 8  # step 4 does not, and every E gets a gradient


def test_the_output_does_not_change_when_dropped_rows_are_cut_off():
    model, _, _ = trained(adapted(), 14)
    x = batch(0)["x"]
    before = model(x)["y"].detach()
    for adapter in adapters(model):
        kept = adapter.E.detach().flatten() != 0
        assert not kept.all()
        adapter.A.data, adapter.E.data, adapter.B.data = (
            adapter.A[kept].data,
            adapter.E[kept].data,
            adapter.B[:, kept].data,
        )
    assert (model(x)["y"] - before).abs().max() <= 8 * torch.finfo(torch.float64).eps * before.abs().max()


def test_importance_is_that_of_new_weights_and_this_steps_gradients():
    model = adapted(orth_weight=0, tinit=5)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    mean: Any = 0.0
    spread: Any = 0.0
    for number in range(1, 4):
        step(model, optimizer, number)
        E = adapters(model)[0].E
        now = (E * E.grad).abs().detach()
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * (now - mean).abs()
        assert torch.allclose(optimizer.state[E][IMPORTANCE], mean, rtol=1e-14)
        assert torch.allclose(optimizer.state[E][UNCERTAINTY], spread, rtol=1e-14)


def test_the_final_choice_is_made_by_the_scores_of_the_step_before():
    plain, _, _ = trained(adapted(), 8)
    model, optimizer, _ = trained(adapted(), 7)
    optimizer.zero_grad()
    model(**batch(8))["loss"].backward()
    for adapter in adapters(model):
        dropped = adapter.E == 0
        assert dropped.any()
        adapter.E.grad[dropped] *= 1e6  # would make them the most important ones
    optimizer.step()
    for one, two in zip(adapters(plain), adapters(model), strict=True):
        assert torch.equal(one.E != 0, two.E != 0)


# ---- budgets at their edges


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    values=st.integers(1, 3),
)
def test_exactly_as_many_are_dropped_as_asked_for_whatever_is_equal(ranks, data, values):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = [torch.randint(values, (rank,), generator=g).double() for rank in ranks]
    count = data.draw(st.integers(0, sum(ranks)))
    masks = least(scores, count)
    assert sum(int(mask.sum()) for mask in masks) == count
    dropped = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)])
    kept = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()


def test_scores_that_are_all_zero_shrink_every_site_alike():
    masks = least([torch.zeros(4), torch.zeros(4), torch.zeros(2)], 4)
    assert [mask.tolist() for mask in masks] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0]]


def test_a_target_equal_to_the_initial_rank_never_masks():
    _, _, counts = trained(adapted(target_rank=4), 14)
    assert counts == [8] * 14


def test_a_budget_that_is_final_at_the_first_step_is_kept():
    _, _, counts = trained(adapted(total_steps=1, tinit=0, tfinal=0), 4)
    assert counts == [4] * 4


def test_every_expert_of_a_stack_has_triplets_of_its_own():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    config._experts_implementation = "eager"
    model: Any = MixtralForCausalLM(config)
    fields = FIELDS | {"rank": 3, "target_rank": 1, "targets": ["down_proj"]}
    lrcompile.apply(model, lrcompile.spec("adalora", **fields)).train()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    ids = torch.arange(10).reshape(2, 5)
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    (adapter,) = adapters(model)
    assert adapter.E.shape == (3, 3, 1)
    assert nonzero(model) == 3


def test_a_site_that_no_gradient_reaches_keeps_nothing_and_harms_nothing():
    model = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    reached, missed = adapters(model)
    for number in range(1, 15):
        optimizer.zero_grad()
        model(**batch(number))["loss"].backward()
        if number > 1:  # the first step insists on gradients everywhere
            for tensor in (missed.A, missed.B, missed.E):
                tensor.grad = None
        else:
            for tensor in (missed.A, missed.B, missed.E):
                tensor.grad.zero_()
        optimizer.step()
    assert nonzero(model) == 4
    assert reached.E.count_nonzero() == 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_rank": 5}, "target_rank"),
        ({"tinit": 8, "tfinal": 4}, "total_steps"),
        ({"tinit": 20}, "total_steps"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 0.0}, "beta2"),
        ({"orth_weight": -0.1}, "orth_weight"),
        ({"scaling": "alpha/sqrt(r)"}, "scaling"),
    ],
)
def test_a_budget_that_cannot_be_met_is_a_spec_error_naming_the_field(fields, field):
    with pytest.raises(SpecError) as error:
        spec(**fields)
    assert error.value.field == field


@pytest.mark.parametrize("field", ["target_rank", "total_steps"])
def test_what_has_no_usual_value_must_be_given(field):
    with pytest.raises(SpecError, match=field):
        lrcompile.spec("adalora", **{key: value for key, value in FIELDS.items() if key != field})


def test_a_target_above_what_a_rank_pattern_leaves_is_refused_and_leaves_the_model_alone():
    model = Model()
    with pytest.raises(SpecError, match=r"6 ranks in all.* start with 5") as error:
        lrcompile.apply(model, spec(rank=4, target_rank=3, rank_pattern={"up": 1}))
    assert error.value.field == "target_rank"
    assert type(model.up) is nn.Linear


# ---- the same in every loop


@pytest.mark.parametrize("stop", [1, 4, 7, 8, 9, 11])
def test_a_resumed_run_continues_to_the_bit(stop):
    whole, _, counts = trained(adapted(), 14)
    model, optimizer, _ = trained(adapted(), stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = adapted(seed=5)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for number in range(stop + 1, 15):
        step(model, optimizer, number)
        assert nonzero(model) == counts[number - 1]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("stop", [4, 10])
def test_a_run_resumed_from_a_folder_continues_to_the_bit(stop, tmp_path):
    whole, _, _ = trained(adapted(), 14)
    model, optimizer, _ = trained(adapted(), stop)
    lrcompile.save(model, tmp_path / "adapter")
    state = optimizer.state_dict()
    model = lrcompile.load(Model(), tmp_path / "adapter", trainable=True).train()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    optimizer.load_state_dict(state)
    for number in range(stop + 1, 15):
        step(model, optimizer, number)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_final_choice_is_fixed_and_the_moving_averages_are_freed():
    model, optimizer, _ = trained(adapted(), 8)
    chosen = [adapter.E != 0 for adapter in adapters(model)]
    for number in range(9, 15):
        step(model, optimizer, number)
        assert all(torch.equal(adapter.E != 0, mask) for adapter, mask in zip(adapters(model), chosen, strict=True))
    for adapter in adapters(model):
        assert KEPT in optimizer.state[adapter.E]
        assert not {IMPORTANCE, UNCERTAINTY} & {key for w in adapter.parameters() for key in optimizer.state[w]}


def test_accumulating_gradients_is_one_step_of_the_schedule():
    whole, _, counts = trained(adapted(), 14)
    pieces, _, again = trained(adapted(), 14, pieces=3)
    assert counts == again
    for key, value in whole.state_dict().items():
        assert torch.allclose(value, pieces.state_dict()[key], rtol=1e-9, atol=1e-12), key


def test_a_closure_is_one_step_of_the_schedule():
    model = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(**batch(number))["loss"]
        loss.backward()
        return loss.item()

    for number in range(1, 13):  # noqa: B007 (the closure reads it)
        optimizer.step(closure)
    whole, _, _ = trained(adapted(), 12)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.state_dict().items())


def test_bfloat16_autocast_keeps_to_the_schedule_and_stays_finite():
    model = adapted().float()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    counts = []
    for number in range(1, 15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**{key: value.float() for key, value in batch(number).items()})["loss"]
        loss.backward()
        optimizer.step()
        counts.append(nonzero(model))
    assert counts == [min(8, b) for b in schedule()[:14]]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_plain_sgd_which_keeps_no_state_of_its_own_will_do():
    model = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    for number in range(1, 15):
        step(model, optimizer, number)
    assert nonzero(model) == 4


def test_merging_folds_what_the_model_computes():
    model, _, _ = trained(adapted(), 14)
    model.eval()
    x = batch(0)["x"]
    before = model(x)["y"].detach()
    lrcompile.merge(model)
    # s is kept in float32, by the forward and by the fold alike
    assert (model(x)["y"] - before).abs().max() <= 1e-13 * before.abs().max()


# ---- PEFT


class ForPeft(Model):
    """PEFT adds its orthogonality loss where an output has a `.loss` attribute."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(**super().forward(x, labels))


def beside_peft(lr: float, steps: int) -> tuple[list[list[bool]], list[list[bool]], Any, Any]:
    """The masks of both after every step of the same run, and both models.

    Two things of PEFT 0.21 are set right first: it lets the initial rank, by which it divides, train; and a model
    without a task type is called past the forward that adds the orthogonality loss.
    """
    peft = pytest.importorskip("peft")
    ours = adapted(alpha=6, orth_weight=0.3)
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=12,
        tinit=2,
        tfinal=4,
        deltaT=1,
        lora_alpha=6,
        orth_reg_weight=0.3,
        target_modules=["up", "down"],
    )
    theirs = peft.get_peft_model(ForPeft(), config).train()
    for key, parameter in theirs.double().named_parameters():
        parameter.requires_grad_("lora_" in key)
    for name, adapter in zip(("up", "down"), adapters(ours), strict=True):
        layer = theirs.base_model.model.get_submodule(name)
        for key in "ABE":
            getattr(layer, f"lora_{key}")["default"].data = getattr(adapter, key).detach().clone()
    optimizer = lrcompile.optimizer(ours, torch.optim.AdamW, lr=lr)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=lr)
    masks: tuple[list, list] = ([], [])
    for number in range(1, steps + 1):
        step(ours, optimizer, number)
        theirs.base_model(**batch(number)).loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(number)
        other.zero_grad()
        masks[0].append([bool(value) for adapter in adapters(ours) for value in adapter.E.flatten()])
        E = [theirs.base_model.model.get_submodule(name).lora_E["default"] for name in ("up", "down")]
        masks[1].append([bool(value) for each in E for value in each.flatten()])
    return *masks, ours, theirs


def test_peft_drops_the_same_triplets_at_every_step_of_the_same_run():
    ours, theirs, model, other = beside_peft(1e-2, 14)
    assert ours == theirs
    assert len({tuple(mask) for mask in ours}) > 3
    for name, adapter in zip(("up", "down"), adapters(model), strict=True):
        layer = other.base_model.model.get_submodule(name)
        for key in "ABE":
            theirs_now = getattr(layer, f"lora_{key}")["default"]
            # the scale is float32 here and a float64 quotient there: 6e-8 a step
            assert torch.allclose(getattr(adapter, key), theirs_now, rtol=1e-4, atol=1e-7), (name, key)


def test_peft_computes_and_merges_the_same_map():
    _, _, model, other = beside_peft(1e-2, 5)
    x = batch(0)["x"]
    model.eval()
    other.eval()
    for name, adapter in zip(("up", "down"), adapters(model), strict=True):
        layer = other.base_model.model.get_submodule(name)
        for key in "ABE":
            getattr(layer, f"lora_{key}")["default"].data = getattr(adapter, key).detach().clone()
    assert torch.allclose(model(x)["y"], other(x).y, rtol=1e-6)
    merged = copy.deepcopy(other).merge_and_unload()
    lrcompile.merge(model)
    assert torch.allclose(model.up.weight, merged.up.weight, rtol=1e-6)
    assert torch.allclose(model.down.weight, merged.down.weight, rtol=1e-6)
