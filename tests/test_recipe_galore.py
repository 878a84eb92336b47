"""GaLore (arXiv 2403.03507): what its paper, its code and the docstrings of its parts promise."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from zoo.processes import spawn
from zoo.projected import SIZES, adapter, batches, galore, loss, plain, train_replicas, weights

import lrcompile
from lrcompile.recipes.forms.galore import ProjectedGradient


def full_rank(model: nn.Module, **fields: Any) -> Any:
    return galore(model, rank=7, rank_pattern={"2": 5}, scale=1.0, **fields)


def train(model: Any, optimizer: Any, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    """G of each weight, from autograd on a plain copy."""
    reference = plain(x.dtype)
    with torch.no_grad():
        for index in (0, 2):
            reference[index].weight.copy_(model[index].weight)
            reference[index].bias.copy_(model[index].bias)
    loss(reference, x).backward()
    return [reference[index].weight.grad for index in (0, 2)]


# --- the gradient -----------------------------------------------------------------------------------------------------


def test_the_projected_gradient_is_that_of_the_weight_on_the_side_of_its_smaller_dimension():
    model = galore(plain())
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    (x,) = batches(1)
    G_wide, G_tall = gradients(model, x)
    loss(model, x).backward()
    right, left = adapter(model, 0), adapter(model, 2)
    assert (right.P.shape, right.Z.shape) == ((3, 7), (12, 3))
    assert (left.P.shape, left.Z.shape) == ((5, 3), (3, 12))
    torch.testing.assert_close(right.Z.grad, G_wide @ right.P.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.Z.grad, left.P.t() @ G_tall, rtol=1e-12, atol=1e-12)
    assert model[0].weight.grad is None


def test_a_square_weight_is_projected_from_the_right():
    model = galore(nn.Sequential(nn.Linear(6, 6)), rank=2)
    assert adapter(model, 0).P.shape == (2, 6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_p_is_orthonormal_before_and_after_a_refresh(dtype, bound):
    model = galore(plain(dtype))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    for _ in range(2):
        for P in (adapter(model, 0).P, adapter(model, 2).P.t()):
            assert (P @ P.t() - torch.eye(3, dtype=dtype)).abs().max() < bound
        train(model, optimizer, batches(1, dtype=dtype))


def test_a_refresh_finds_the_leading_directions_of_the_current_gradient():
    model = galore(plain(), rank=2)
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    (x,) = batches(1)
    G_wide, G_tall = gradients(model, x)
    loss(model, x).backward()
    V, U = torch.linalg.svd(G_wide).Vh[:2], torch.linalg.svd(G_tall).U[:, :2].t()
    for found, expected in ((adapter(model, 0).P, V), (adapter(model, 2).P.t(), U)):
        sine = torch.linalg.matrix_norm(found - found @ expected.t() @ expected, 2)
        assert sine < 1e-10  # rank + 8 spans everything here, so nothing but rounding is left


def test_p_changes_only_where_the_step_is_a_multiple_of_the_gap():
    model = galore(plain(), gap=3)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    changed = []
    for x in batches(8):
        before = adapter(model, 0).P.detach().clone(), adapter(model, 2).P.detach().clone()
        train(model, optimizer, [x])
        after = adapter(model, 0).P, adapter(model, 2).P
        changed.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert changed == [[t % 3 == 0] * 2 for t in range(8)]


# --- the step ---------------------------------------------------------------------------------------------------------


def test_sgd_at_full_rank_and_scale_1_is_sgd_on_the_weight():
    model, reference = full_rank(plain(), gap=2), plain()
    for p in reference.parameters():
        p.requires_grad_(p.dim() == 2)
    ours = lrcompile.optimizer(model, torch.optim.SGD, lr=0.05)
    theirs = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.05)
    for m, optimizer in ((model, ours), (reference, theirs)):
        train(m, optimizer, batches(6))
    for a, b in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_first_adam_step_is_the_sign_of_the_projected_gradient():
    model = galore(plain())
    optimizer = lrcompile.optimizer(model, torch.optim.Adam, lr=0.01)
    before = weights(model)
    train(model, optimizer, batches(1))
    right, left = adapter(model, 0), adapter(model, 2)
    assert right.Z.grad is not None
    assert left.Z.grad is not None
    N = [(right.Z.grad / (right.Z.grad.abs() + 1e-8)), (left.Z.grad / (left.Z.grad.abs() + 1e-8))]  # sign up to eps
    lifted = [N[0] @ right.P, left.P @ N[1]]
    for old, new, change in zip(before, weights(model), lifted, strict=True):
        torch.testing.assert_close(new, old - 0.01 * 0.5 * change, rtol=1e-9, atol=1e-12)
    assert not right.Z.any()
    assert not left.Z.any()


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 6))
def test_the_change_has_rank_r_for_each_projection_there_was(rank, gap, steps):
    model = galore(plain(sizes=(13, 17, 11)), rank=rank, gap=gap)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    before = weights(model)
    generator = torch.Generator().manual_seed(0)
    train(model, optimizer, [torch.randn(9, 13, generator=generator, dtype=torch.float64) for _ in range(steps)])
    for old, new in zip(before, weights(model), strict=True):
        assert torch.linalg.matrix_rank(new - old, rtol=1e-9) <= rank * math.ceil(steps / gap)


def test_weight_decay_acts_on_the_whole_weight_decoupled():
    runs = []
    for decay in (0.0, 0.3):
        model = galore(plain())
        before = weights(model)
        train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=decay), batches(1))
        runs.append(weights(model))
    for old, free, decayed in zip(before, *runs, strict=True):
        torch.testing.assert_close(decayed, free - 0.1 * 0.3 * old, rtol=1e-12, atol=1e-14)


def test_a_bfloat16_weight_takes_the_step_with_one_rounding():
    model = galore(plain(torch.bfloat16), scale=1.0)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.05)
    before = weights(model)
    train(model, optimizer, batches(1, dtype=torch.bfloat16))
    right, left = adapter(model, 0), adapter(model, 2)
    assert right.Z.grad is not None
    assert left.Z.grad is not None
    assert right.P.dtype == right.Z.grad.dtype == torch.float32
    lifted = [(-0.05 * right.Z.grad) @ right.P, left.P @ (-0.05 * left.Z.grad)]
    for old, new, change in zip(before, weights(model), lifted, strict=True):
        exact = old.float() + change
        assert (new.float() - exact).abs().max() <= 2**-8 * exact.abs().max() * (1 + 1e-5)


def test_conv1d_stores_its_weight_the_other_way_and_trains_the_same():
    from transformers.pytorch_utils import Conv1D

    reference, model = plain(), plain()
    for index in (0, 2):
        linear: Any = model[index]
        swapped = Conv1D(linear.out_features, linear.in_features).double()
        with torch.no_grad():
            swapped.weight.copy_(linear.weight.t())
            swapped.bias.copy_(linear.bias)
        model[index] = swapped
    for m in (reference, model):
        galore(m, gap=2)
        train(m, lrcompile.optimizer(m, torch.optim.AdamW, lr=0.01), batches(3))
    for a, b in zip(weights(model), weights(reference), strict=True):
        torch.testing.assert_close(a.t(), b, rtol=1e-9, atol=1e-11)


def test_adafactor_whose_step_depends_on_the_size_of_the_parameter_is_refused():
    with pytest.raises(lrcompile.AdapterError, match="Adafactor scales its step"):
        lrcompile.optimizer(galore(plain()), torch.optim.Adafactor, lr=0.01)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_optimizer_states_have_the_shape_of_the_projected_gradient():
    model = galore(plain(torch.float32))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    train(model, optimizer, batches(1, dtype=torch.float32))
    shapes = [tuple(state["exp_avg"].shape) for state in optimizer.state.values()]
    assert shapes == [(12, 3), (3, 12)]
    assert sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")) == 2 * 2 * 36 * 4


@pytest.mark.parametrize(("out", "inside", "share"), [(4096, 4096, 0.375), (11008, 4096, 0.297)])
def test_states_and_projection_take_the_share_of_adams_that_the_paper_says(out, inside, share):
    shapes = ProjectedGradient.shapes(inside, out, 1024)
    numbers = 2 * math.prod(shapes["Z"]) + math.prod(shapes["P"])
    assert numbers / (2 * out * inside) == pytest.approx(share, abs=5e-4)


def flops(model: Any, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        loss(model, x).backward()
    return counter.get_total_flops()


def test_a_step_between_refreshes_costs_4_products_of_the_weight_instead_of_6():
    T, r = 50, 3
    x = torch.randn(T, SIZES[0], dtype=torch.float64, requires_grad=True)
    products = 2 * T * (7 * 12 + 12 * 5)
    assert flops(plain(), x) == 3 * products
    model = galore(plain())
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.01)
    train(model, optimizer, batches(1))
    assert flops(model, x) == 2 * products + 2 * T * r * (7 + 12) + 2 * T * r * (12 + 5)


def test_a_site_on_the_right_keeps_rank_numbers_a_token_and_frozen_weights_keep_nothing():
    model = galore(nn.Sequential(nn.Linear(7, 12).double()))
    train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.01), batches(1))
    saved: list[Tensor] = []
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batches(1)[0])
    assert sum(tensor.nbytes for tensor in saved) == 6 * 3 * 8


# --- how it is driven -------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_big_batch():
    model = galore(plain(), gap=4)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    data = batches(4, size=8)
    train(model, optimizer, data[:1])  # from here on P stays
    other = copy.deepcopy(model)
    other_optimizer = lrcompile.optimizer(other, torch.optim.AdamW, lr=0.01)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in data[1:]:
        train(model, optimizer, [x])
        other_optimizer.zero_grad()
        for part in x.chunk(4):
            loss(other, part).backward()
        other_optimizer.step()
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_first_micro_batch_of_a_step_decides_p_and_later_ones_use_it():
    model = galore(plain(), gap=1)
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    first, second = batches(2)
    G = [a + b for a, b in zip(gradients(model, first), gradients(model, second), strict=True)]
    loss(model, first).backward()
    P = adapter(model, 0).P.detach().clone()
    loss(model, second).backward()
    assert torch.equal(adapter(model, 0).P, P)
    torch.testing.assert_close(adapter(model, 0).Z.grad, G[0] @ P.t(), rtol=1e-11, atol=1e-12)


def test_clipping_by_global_norm_sees_the_projected_gradient():
    model = galore(plain())
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    loss(model, batches(1)[0]).backward()
    Z = [adapter(model, 0).Z, adapter(model, 2).Z]
    expected = torch.stack([z.grad.norm() for z in Z if z.grad is not None]).norm()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) == pytest.approx(float(expected))
    assert torch.stack([z.grad.norm() for z in Z if z.grad is not None]).norm() == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
def test_a_gradient_without_directions_keeps_p_and_leaves_it_due(bad):
    model = galore(plain())
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    before = adapter(model, 0).P.detach().clone()
    (loss(model, batches(1)[0]) * bad).backward()
    assert torch.equal(adapter(model, 0).P, before)
    loss(model, batches(1)[0]).backward()
    assert not torch.equal(adapter(model, 0).P, before)


def test_a_step_that_a_gradient_scaler_skips_leaves_weights_and_schedule_alone():
    model = galore(plain(torch.float32), gap=2)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    train(model, optimizer, batches(1, dtype=torch.float32))
    before, P = weights(model), adapter(model, 0).P.detach().clone()
    for x, factor in zip(batches(3, dtype=torch.float32), (1.0, float("inf"), 1.0), strict=True):
        optimizer.zero_grad()
        scaler.scale(loss(model, x) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            assert not torch.equal(model[0].weight, before[0])
        else:
            assert torch.equal(model[0].weight, before[0])
            assert torch.equal(adapter(model, 0).P, P)
        before = weights(model)
    assert not torch.equal(adapter(model, 0).P, P)  # two steps were taken, the third found P anew
    assert optimizer.param_groups[0]["lrcompile_steps"] == 3


def test_a_site_that_is_not_reached_keeps_its_weight_and_finds_p_when_it_is():
    model = galore(plain(), gap=2)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    train(model, optimizer, batches(2))
    before, P = weights(model), adapter(model, 2).P.detach().clone()
    train(model[:2], optimizer, batches(1))  # step 2, where P is due
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[1])
    train(model, optimizer, batches(1))
    assert not torch.equal(adapter(model, 2).P, P)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit_also_where_p_is_renewed(reentrant):
    runs = []
    for use in (False, True):
        model = galore(plain(), gap=2)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
        for x in batches(4):
            optimizer.zero_grad()
            x.requires_grad_()
            y = checkpoint(model, x, use_reentrant=reentrant) if use else model(x)
            y.square().sum().backward()
            optimizer.step()
        runs.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_shared_module_is_lifted_once_and_gets_the_sum_of_its_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(7, 7, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(self.map(x).tanh())

    model = Twice()
    reference = copy.deepcopy(model)
    lrcompile.apply(model, lrcompile.spec("galore", rank=7, scale=1.0, seed=0))
    reference.map.bias.requires_grad_(False)
    train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.1), batches(2))
    train(reference, torch.optim.SGD([reference.map.weight], lr=0.1), batches(2))
    torch.testing.assert_close(model.map.weight, reference.map.weight, rtol=1e-12, atol=1e-13)


def test_compiled_training_is_eagers_and_compiles_each_map_twice_at_most():
    runs, frames = [], []
    for compiled in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = galore(plain(), gap=3)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for index, x in enumerate(batches(9)):
            if index == 4:
                frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            train(run, optimizer, [x])
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        runs.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert frames[2] == frames[3] > 0  # nothing compiles once both kinds of step were seen


def test_a_run_resumed_in_mid_schedule_continues_bit_for_bit(tmp_path):
    data = batches(9)
    runs = []
    for model_first in (None, True, False):
        model = galore(plain(), gap=4)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
        train(model, optimizer, data[:6])
        if model_first is not None:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
            stored = torch.load(tmp_path / "run.pt", weights_only=True)
            model = galore(plain(), gap=4)
            if model_first:
                model.load_state_dict(stored["model"])
            optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
            optimizer.load_state_dict(stored["optimizer"])
            if not model_first:
                model.load_state_dict(stored["model"])
        train(model, optimizer, data[6:])
        runs.append([*weights(model), *(adapter(model, index).P.detach() for index in (0, 2))])
    for resumed in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], resumed, strict=True))


def test_a_new_optimizer_starts_with_a_projection_of_its_own():
    model = galore(plain(), gap=4)
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(2))
    P = adapter(model, 0).P.detach().clone()
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(3)[2:])
    assert not torch.equal(adapter(model, 0).P, P)


def test_a_copy_trains_on_its_own():
    model = galore(plain(), gap=2)
    train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.01), batches(1))
    twin = copy.deepcopy(model)
    before = weights(model)
    train(twin, lrcompile.optimizer(twin, torch.optim.SGD, lr=0.01), batches(3))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert not torch.equal(before[0], twin[0].weight)


# --- what is left of it -----------------------------------------------------------------------------------------------


def test_nothing_of_it_is_in_an_exported_graph_or_in_a_forward_without_gradients():
    model = galore(plain())
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    (x,) = batches(1)
    reference = plain()(x)
    assert torch.equal(model(x), reference)
    for strict in (True, False):
        program = torch.export.export(model.eval(), (x,), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert targets == {"aten.linear.default", "aten.tanh.default"}
    with torch.no_grad():
        assert not model(x).requires_grad


def test_the_trained_model_exports_to_onnx_as_it_is(tmp_path):
    pytest.importorskip("onnxruntime")
    model = galore(plain(torch.float32))
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(2, dtype=torch.float32))
    result = lrcompile.export(model, tmp_path / "model.onnx", tuple(batches(1, dtype=torch.float32)))
    assert result.verify().ok


def test_merging_finds_everything_in_the_weight_already():
    model = galore(plain())
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(3))
    before = weights(model)
    lrcompile.merge(model, final=True)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert type(model[0]) is nn.Linear


def test_remove_and_disabled_refuse_once_the_weight_is_written():
    model = galore(plain())
    start = weights(model)
    with lrcompile.disabled(model):
        pass
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(1))
    with pytest.raises(lrcompile.AdapterError, match="written"):
        lrcompile.remove(model)
    with pytest.raises(lrcompile.AdapterError, match="written"), lrcompile.disabled(model):
        pass
    trained = weights(model)
    lrcompile.remove(model, keep_trained_weights=True)
    assert torch.equal(model[0].weight, trained[0])
    assert not torch.equal(model[0].weight, start[0])
    assert type(model[0]) is nn.Linear


def test_the_proof_on_example_inputs_passes_and_leaves_no_trace():
    (x,) = batches(1)
    model = lrcompile.apply(plain(), lrcompile.spec("galore", rank=3), example_inputs=(x,))
    assert torch.equal(model(x), plain()(x))
    assert not adapter(model, 0).Z.any()
    assert adapter(model, 0).Z.grad is None


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_an_nf4_base_is_refused_with_the_reason():
    model = lrcompile.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), targets=["0"])
    with pytest.raises(lrcompile.TargetError, match=r"NF4 codes, and galore trains the weight itself"):
        galore(model, targets=["0"])


def test_a_tied_weight_is_refused():
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(lrcompile.TargetError, match="one with"):
        galore(model, targets=["0"], rank=2)


@pytest.mark.parametrize("field", ["alpha", "dropout", "init", "scaling"])
def test_fields_that_would_mean_nothing_are_refused(field):
    values: dict[str, Any] = {"alpha": 3, "dropout": 0.1, "init": "gaussian", "scaling": "alpha/sqrt(r)"}
    with pytest.raises(lrcompile.SpecError) as caught:
        lrcompile.spec("galore", rank=2, **{field: values[field]})
    assert caught.value.field == field


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(lrcompile.TargetError, match="acts on linear layers, not on"):
        galore(nn.Sequential(nn.MultiheadAttention(8, 2)), targets=["0.in_proj_weight"], rank=2)


# --- real trainers ----------------------------------------------------------------------------------------------------


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32,
        )
    )  # fmt: skip


def test_a_trainer_trains_it_with_accumulation_clipping_and_checkpointing(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = galore(tiny_llama(), rank=4, gap=2, scale=1.0)
    tokens = torch.randint(0, 37, (8, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_grad_norm=1.0, gradient_checkpointing=True, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        optimizers=(optimizer, None),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert optimizer.param_groups[0]["lrcompile_steps"] == 12


def test_bitsandbytes_eight_bit_adam_holds_the_moments_and_resumes_bit_for_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(32, 64, generator=generator) for _ in range(6)]

    def started() -> tuple[Any, Any]:
        model = galore(plain(torch.float32, (64, 128, 96)), rank=40, gap=3)
        return model, lrcompile.optimizer(model, bitsandbytes.optim.AdamW8bit, lr=0.01, min_8bit_size=1024)

    model, optimizer = started()
    begin = loss(model, data[0]).item()
    train(model, optimizer, data[:4])
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[4:])
    states = [state["state1"] for state in optimizer.state.values()]
    assert [(tuple(s.shape), s.dtype) for s in states] == [((128, 40), torch.uint8), ((40, 128), torch.uint8)]
    assert loss(model, data[0]).item() < begin

    resumed, resumed_optimizer = started()
    resumed.load_state_dict(stored[0])
    resumed_optimizer.load_state_dict(stored[1])
    train(resumed, resumed_optimizer, data[4:])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))


@pytest.mark.slow
def test_data_parallel_processes_stay_one_model_and_train_as_one_on_the_whole_batch(tmp_path):
    spawn(tmp_path / "store", train_replicas, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = galore(plain(), gap=2)
    train(alone, lrcompile.optimizer(alone, torch.optim.AdamW, lr=0.01), batches(5, size=8))
    for a, b in zip(first, weights(alone), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
