"""LoRA-drop's promises: how sites are measured and chosen, what the others share, and that a resume changes nothing."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile import AdapterError, SpecError, TargetError
from lrcompile.optim.lora_drop import importances, kept
from lrcompile.recipes.forms.lora_drop import KEPT, MEASURING, SHARED, WAITING, MeasuredLora, projection
from lrcompile.state import adapter_set, state_of

FIELDS: dict[str, Any] = {"rank": 3, "alpha": 5, "warmup_steps": 6, "threshold": 0.6, "seed": 0}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 11), nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.reentrant: bool | None = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def adapted(**fields: Any) -> Any:
    return lrcompile.apply(Model(), lrcompile.spec("lora-drop", **FIELDS | fields)).train()


def placed(model: nn.Module) -> dict[str, Any]:
    return {site.name: adapter_set(model, site)["default"] for site in state_of(model).sites["default"]}


def batch(number: int) -> Tensor:
    g = torch.Generator().manual_seed(number)
    return torch.randn(6, 7, generator=g, dtype=torch.float64).requires_grad_()  # reentrant checkpoints ask for that


def step(model: Any, optimizer: torch.optim.Optimizer, number: int, pieces: int = 1, call: Any = None) -> None:
    optimizer.zero_grad()
    for part in batch(number).chunk(pieces):
        ((model if call is None else call)(part).square().mean() / pieces).backward()
    optimizer.step()


def trained(model: Any, steps: int, pieces: int = 1, call: Any = None) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for number in range(1, steps + 1):
        step(model, optimizer, number, pieces, call)
    return model, optimizer


def stages(model: nn.Module) -> list[int]:
    return [adapter.stage for adapter in placed(model).values()]


def same(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


# ---- choosing

energies = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda g: sum(g) > 0)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(energies)
def test_importances_sum_to_one(g):
    assert sum(importances(g)) == pytest.approx(1, abs=len(g) * 1e-15)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(energies)
def test_a_threshold_of_one_keeps_all_and_the_least_keeps_exactly_one(g):
    assert all(kept(g, 1))
    assert sum(kept(g, 1e-12)) == 1
    assert kept(g, 1e-12)[g.index(max(g))]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(energies, st.sampled_from([0.25, 0.5, 0.9]), st.integers(-8, 8))
def test_the_choice_is_the_smallest_prefix_and_does_not_see_the_scale_of_inputs(g, threshold, power):
    choice = kept(g, threshold)
    share = sorted((i for i, stays in zip(importances(g), choice, strict=True) if stays), reverse=True)
    assert sum(share) >= threshold - 1e-12
    assert sum(share[:-1]) < threshold + 1e-12
    assert choice == kept([4.0**power * each for each in g], threshold)  # x → 2ᵖx


def test_nothing_measured_is_no_reason_to_drop():
    assert kept([0.0, 0.0, 0.0], 0.5) == [True] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [("model.layers.3.mlp.down_proj", "down_proj"), ("blocks.0", "blocks"), ("2", ""), ("", "")],
)
def test_a_projection_is_called_by_its_name_without_the_layer(name, expected):
    assert projection(name) == expected


# ---- measuring


def measured(model: nn.Module, *inputs: Any) -> float:
    """The energy that one forward and backward pass of a single adapted module adds up."""
    (adapter,) = placed(model).values()
    adapter.enter(MEASURING)
    adapter.energy.zero_()
    out = model.train()(*inputs)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    return float(adapter.energy)


def filled(model: Any, **fields: Any) -> Any:
    lrcompile.apply(model, lrcompile.spec("lora-drop", **FIELDS | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 9))
def test_the_energy_of_a_layer_is_that_of_its_update_of_the_output(inside, out, rank, rows, seed):
    torch.manual_seed(seed)
    model = filled(nn.Linear(inside, out).double(), rank=min(rank, inside, out))
    x = torch.randn(rows, inside, dtype=torch.float64)
    (adapter,) = placed(model).values()
    expected = float((x @ adapter.delta(torch.float64).T).square().sum())
    assert measured(model, x) == pytest.approx(expected, rel=1e-12)
    assert measured(model, 3 * x) == pytest.approx(9 * expected, rel=1e-12)


def test_the_energy_of_an_embedding_a_packed_projection_and_both_ways_through_experts():
    torch.manual_seed(0)
    ids = torch.tensor([[1, 4, 4], [0, 2, 8]])
    model = filled(nn.Embedding(9, 5, padding_idx=0).double(), targets=".*")
    (adapter,) = placed(model).values()
    assert measured(model, ids) == pytest.approx(float(adapter.delta(torch.float64).T[ids].square().sum()), rel=1e-12)

    model = filled(nn.MultiheadAttention(8, 2, batch_first=True).double(), targets=["in_proj_weight"])
    (adapter,) = placed(model).values()
    q, k, v = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3))
    delta = adapter.delta(torch.float64)
    parts = zip((q, k, v), delta.chunk(3), strict=True)
    assert measured(model, q, k, v) == pytest.approx(sum(float((x @ d.T).square().sum()) for x, d in parts), rel=1e-12)

    adapter = MeasuredLora(6, 4, 2, 0.7, copies=3, dtype=torch.float64).train()
    with torch.no_grad():
        adapter.A.normal_()
        adapter.B.normal_()
    adapter.enter(MEASURING)
    x, index = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 2, 1, 3])  # 3: no expert
    y = torch.zeros(5, 4, dtype=torch.float64)
    adapter.experts(y, x, index).sum().backward()
    rowwise = float(adapter.energy)
    adapter.energy.zero_()
    for expert in range(3):
        adapter.experts(y[index == expert], x[index == expert], expert).sum().backward()
    expected = sum(float((adapter.delta(torch.float64)[i] @ x[row]).square().sum()) for row, i in enumerate(index[:4]))
    assert rowwise == pytest.approx(expected, rel=1e-12)
    assert float(adapter.energy) == pytest.approx(expected, rel=1e-12)


def test_only_forwards_of_training_count_and_each_once():
    model = filled(nn.Linear(7, 5).double())
    x = torch.randn(4, 7, dtype=torch.float64)
    once = measured(model, x)
    (adapter,) = placed(model).values()
    with torch.no_grad():
        model(x)
    model(x)  # no backward pass goes through it
    model.eval()(x).sum().backward()
    assert float(adapter.energy) == once > 0
    model.train()(x).sum().backward()
    assert float(adapter.energy) == 2 * once


def test_dropout_is_not_in_the_energy():
    plain, dropped = (filled(nn.Linear(7, 5).double(), dropout=p) for p in (0.0, 0.5))
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(4, 7, dtype=torch.float64)
    assert measured(plain, x) == measured(dropped, x)


def test_a_batch_that_overflows_does_not_spoil_the_sum():
    model = filled(nn.Linear(7, 5).double())
    once = measured(model, torch.ones(1, 7, dtype=torch.float64))
    model(torch.full((1, 7), torch.inf, dtype=torch.float64)).sum().backward()
    assert float(next(iter(placed(model).values())).energy) == once


def test_casting_a_model_leaves_its_energy_in_double_precision():
    model = filled(nn.Linear(7, 5).double())
    once = measured(model, torch.ones(1, 7, dtype=torch.float64))
    model.bfloat16()
    (adapter,) = placed(model).values()
    assert adapter.energy.dtype == torch.float64
    assert float(adapter.energy) == once


def test_the_second_half_of_the_warm_up_is_measured():
    model = adapted(warmup_steps=5)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    seen = [set(stages(model))]
    for number in range(1, 6):
        step(model, optimizer, number)
        seen.append(set(stages(model)))
    assert seen == [{WAITING}, {WAITING}, {MEASURING}, {MEASURING}, {MEASURING}, {KEPT, SHARED}]


# ---- sharing


def test_each_kind_of_projection_has_a_pair_of_each_kept_site_and_one_more():
    model, optimizer = trained(adapted(), 6)
    for name in ("up", "down"):
        mine = [adapter for site, adapter in placed(model).items() if site.endswith(name)]
        count = sum(adapter.stage == KEPT for adapter in mine)
        assert 0 < count < 4
        tensors = {id(tensor): tensor for adapter in mine for tensor in (adapter.A, adapter.B)}
        assert sum(tensor.numel() for tensor in tensors.values()) == (count + 1) * 3 * (7 + 11)
        assert len({tensor.data_ptr() for tensor in tensors.values()}) == 2 * (count + 1)
    held = [id(tensor) for group in optimizer.param_groups for tensor in group["params"]]
    assert held == [id(tensor) for tensor in model.parameters() if tensor.requires_grad]
    assert set(map(id, optimizer.state)) <= set(held)


def test_a_threshold_of_one_changes_nothing_but_the_phase():
    model, optimizer = trained(adapted(threshold=1.0), 9)
    assert set(stages(model)) == {KEPT}
    assert len(optimizer.param_groups[0]["params"]) == 16
    plain = lrcompile.apply(Model(), lrcompile.spec("lora", rank=3, alpha=5, seed=0)).train()
    trained(plain, 9)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_shared_pair_starts_anew_and_its_gradient_is_the_sum_over_its_sites():
    model, optimizer = trained(adapted(threshold=0.3), 6)
    sharing = [(name, adapter) for name, adapter in placed(model).items() if adapter.stage == SHARED and "up" in name]
    assert len(sharing) > 1
    _, first = sharing[0]
    assert not first.B.any()
    assert first.A.abs().max() <= 7**-0.5
    assert first.A not in optimizer.state
    assert first.A.grad is None
    with torch.no_grad():
        first.B.normal_()
    model(batch(7)).square().mean().backward()
    apart = copy.deepcopy(model)
    for adapter in placed(apart).values():  # the same function with parameters of its own at each site
        adapter.A, adapter.B = (nn.Parameter(tensor.detach().clone()) for tensor in (adapter.A, adapter.B))
    apart(batch(7)).square().mean().backward()
    for key in ("A", "B"):
        summed = sum(getattr(placed(apart)[name], key).grad for name, _ in sharing)
        assert torch.allclose(getattr(first, key).grad, summed, rtol=1e-12)


def test_sites_of_other_shape_or_rank_do_not_share():
    model = adapted(threshold=0.05, rank_pattern={"layers.0.up": 2})
    trained(model, 6)
    sizes = {name: adapter.A.shape for name, adapter in placed(model).items()}
    by_pair: dict[int, set] = {}
    for name, adapter in placed(model).items():
        by_pair.setdefault(id(adapter.A), set()).add(sizes[name])
    assert all(len(shapes) == 1 for shapes in by_pair.values())
    assert placed(model)["layers.0.up"].stage == KEPT


def test_the_report_says_what_was_selected():
    model, _ = trained(adapted(), 6)
    notes = "\n".join(lrcompile.report(model).notes)
    for name in ("up", "down"):
        assert f"of 4 sites '{name}'" in notes
    assert "share one pair" in notes
    assert lrcompile.report(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_merging_disabling_and_removing_work_on_a_shared_pair():
    model, _ = trained(adapted(), 9)
    model.eval()
    x = batch(0)
    before = model(x).detach()
    with lrcompile.disabled(model):
        assert torch.equal(model(x), Model()(x))
    lrcompile.merge(model)
    assert torch.allclose(model(x), before, rtol=1e-12)
    lrcompile.unmerge(model)
    assert torch.equal(model(x), before)
    assert torch.equal(lrcompile.remove(model)(x), Model()(x))


# ---- the same in every loop


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_a_resumed_run_continues_to_the_bit(stop, optimizer_first):
    whole, _ = trained(adapted(), 10)
    model, optimizer = trained(adapted(), stop)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = adapted(seed=0)
    with torch.no_grad():
        for adapter in placed(model).values():
            adapter.A.normal_()
    if optimizer_first:
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
        model.load_state_dict(saved["model"])
    else:
        model.load_state_dict(saved["model"])
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    optimizer.load_state_dict(saved["optimizer"])
    for number in range(stop + 1, 11):
        step(model, optimizer, number)
    same(model, whole)
    assert stages(model) == stages(whole)
    ids = {id(adapter.A) for adapter in placed(model).values()}
    assert len(ids) == len({id(adapter.A) for adapter in placed(whole).values()})


@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_resumed_from_a_folder_continues_to_the_bit(stop, tmp_path):
    whole, _ = trained(adapted(), 10)
    model, optimizer = trained(adapted(), stop)
    lrcompile.save(model, tmp_path / "adapter")
    state = optimizer.state_dict()
    model = lrcompile.load(Model(), tmp_path / "adapter", trainable=True).train()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    optimizer.load_state_dict(state)
    for number in range(stop + 1, 11):
        step(model, optimizer, number)
    same(model, whole)


def test_an_earlier_state_loaded_into_a_model_that_shares_parts_the_pairs_again():
    early = copy.deepcopy(adapted().state_dict())
    model, _ = trained(adapted(), 8)
    model.load_state_dict(early)
    fresh = adapted()
    fresh.load_state_dict(early)
    same(model, fresh)
    assert len({id(adapter.A) for adapter in placed(model).values()}) == 8
    again, _ = trained(model, 8)
    other, _ = trained(fresh, 8)
    same(again, other)


def test_a_state_that_is_assigned_instead_of_copied_is_shared_all_the_same():
    model, _ = trained(adapted(), 8)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    other = adapted()
    other.load_state_dict(saved, assign=True)
    same(other, model)
    assert len({id(a.A) for a in placed(other).values()}) == len({id(a.A) for a in placed(model).values()})


def test_copies_share_among_themselves_only():
    model, _ = trained(adapted(), 8)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        ids = {id(adapter.A) for adapter in placed(other).values()}
        assert len(ids) == len({id(adapter.A) for adapter in placed(model).values()})
        assert not ids & {id(adapter.A) for adapter in placed(model).values()}
        other.load_state_dict(model.state_dict())
        assert {id(adapter.A) for adapter in placed(other).values()} == ids


def test_an_optimizers_state_of_the_other_side_of_the_selection_is_refused():
    early, late = trained(adapted(), 4)[1].state_dict(), trained(adapted(), 8)[1].state_dict()
    _, optimizer = trained(adapted(), 8)
    with pytest.raises(AdapterError, match="state of the same step first"):
        optimizer.load_state_dict(early)
    with pytest.raises(AdapterError, match="state of the same step first"):
        lrcompile.optimizer(adapted(), torch.optim.AdamW, lr=1e-2).load_state_dict(late)


def test_an_optimizer_past_the_selection_does_not_step_a_model_before_it():
    _, optimizer = trained(adapted(threshold=1.0), 8)
    fresh = adapted(threshold=1.0)
    other = lrcompile.optimizer(fresh, torch.optim.AdamW, lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(AdapterError, match="past warmup_steps=6"):
        step(fresh, other, 9)


def test_accumulating_gradients_measures_and_selects_alike():
    whole, _ = trained(adapted(), 10)
    pieces, _ = trained(adapted(), 10, pieces=3)
    assert stages(whole) == stages(pieces)
    for key, value in whole.state_dict().items():
        assert torch.allclose(value.double(), pieces.state_dict()[key].double(), rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(reentrant):
    whole, _ = trained(adapted(), 10)
    model = adapted()
    model.reentrant = reentrant
    trained(model, 10)
    same(model, whole)


@pytest.mark.parametrize("reentrant", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_run_measures_selects_and_shares(reentrant):
    whole, _ = trained(adapted(), 9)
    torch._dynamo.reset()
    model = adapted()
    model.reentrant = reentrant
    trained(model, 9, call=torch.compile(model, backend="aot_eager", fullgraph=True))
    assert stages(model) == stages(whole)
    for key, value in whole.state_dict().items():
        assert torch.allclose(value.double(), model.state_dict()[key].double(), rtol=1e-9, atol=1e-12), key
    torch._dynamo.reset()


def test_bfloat16_autocast_selects_and_stays_finite():
    model = adapted().float()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for number in range(1, 10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(number).float()).square().mean()
        loss.backward()
        optimizer.step()
    assert set(stages(model)) == {KEPT, SHARED}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


# ---- refusals


def test_a_raw_parameter_whose_use_is_in_a_graph_cannot_be_measured():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.mix

    with pytest.raises(TargetError, match="raw parameters"):
        lrcompile.apply(Raw(), lrcompile.spec("lora-drop", **FIELDS | {"targets": ["mix"]}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"threshold": 0.0}, "threshold"), ({"threshold": 1.1}, "threshold"), ({"warmup_steps": 1}, "warmup_steps")],
)
def test_numbers_without_meaning_are_refused(fields, field):
    with pytest.raises(SpecError) as error:
        lrcompile.spec("lora-drop", **FIELDS | fields)
    assert error.value.field == field


def test_a_state_in_no_known_phase_is_refused():
    model = adapted()
    state = model.state_dict()
    state["layers.0.up.lrcompile_adapters.weight.default.phase"] = torch.tensor(9, dtype=torch.uint8)
    with pytest.raises(AdapterError, match="phase 9"):
        model.load_state_dict(state)


def test_processes_that_train_together_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(AdapterError, match="DistributedDataParallel"):
            lrcompile.optimizer(adapted(), torch.optim.AdamW, lr=1e-2)
    finally:
        torch.distributed.destroy_process_group()


# ---- transformers


def trainer(model: Any, folder: Any, **settings: Any) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 37, (16, 8), generator=g)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))


def llama(nf4: bool = False) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    if nf4:
        lrcompile.quantize(model, "nf4")
    return lrcompile.apply(model, lrcompile.spec("lora-drop", **FIELDS | {"warmup_steps": 4, "threshold": 0.3}))


@pytest.mark.parametrize("stop", [2, 6])
def test_a_trainer_saves_shared_pairs_and_resumes_to_the_bit(stop, tmp_path):
    model = llama()
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train()
    assert set(stages(model)) == {KEPT, SHARED}
    resumed = llama()
    again = trainer(resumed, tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    same(resumed, model)
    assert len({id(a.A) for a in placed(resumed).values()}) == len({id(a.A) for a in placed(model).values()})


def test_it_trains_beside_a_base_in_nf4(tmp_path):
    model = llama(nf4=True)
    trainer(model, tmp_path, save_strategy="no").train()
    assert set(stages(model)) == {KEPT, SHARED}
    assert not [name for name, value in model.state_dict().items() if value.is_floating_point() and value.isnan().any()]
