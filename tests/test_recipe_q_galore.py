"""Q-GaLore (arXiv 2407.08296): GaLore on INT8 weights, with INT4 projections that are renewed less and less often."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.int8.groups import empty_groups
from lrcompile.recipes.forms.q_galore import QuantizedProjectedGradient

IN, HIDDEN, OUT = 21, 40, 13


def plain(dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model.to(dtype)


def quantized(model: Any = None, *, rank: int = 4, gap: int = 2, **fields: Any) -> Any:
    fields = {"scale": 1.0, "group_size": 32, "seed": 0, **fields}
    spec = lrcompile.spec("q-galore", rank=rank, update_proj_gap=gap, **fields)
    return lrcompile.apply(plain() if model is None else model, spec)


def adapter(model: Any, index: int) -> Any:
    return model[index].lrcompile_adapters["weight"]["default"]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(16, IN, generator=generator) for _ in range(count)]


def train(model: Any, optimizer: Any, data: list[Tensor]) -> list[float]:
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_weight_is_rounded_once_when_it_is_taken():
    model, base = quantized(), plain()
    for index in (0, 2):
        step = adapter(model, index).W_scale
        assert (model[index].weight - base[index].weight).abs().max() <= 0.5 * step.max() * (1 + 1e-4)
        assert adapter(model, index).W_codes.dtype == torch.uint8


def test_weight_projection_and_states_take_the_bytes_they_should():
    model = quantized(group_size=32)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01)
    train(model, optimizer, batches(1))
    numbers, projected = IN * HIDDEN, 4 * IN
    groups, small = -(-numbers // 32), -(-projected // 32)
    one = adapter(model, 0)
    assert sum(t.nbytes for t in one.held()) == groups * (32 + 8)
    assert sum(t.nbytes for name, t in one.named_buffers() if name.startswith("P_")) == small * (16 + 8)
    assert sum(t.nbytes for t in (*one.held(), one.P_codes, one.P_scale, one.P_offset)) == (
        QuantizedProjectedGradient.held_bytes(
            lrcompile.spec("q-galore", rank=4, group_size=32), lrcompile.sites.find(plain())[0]
        )
    )
    assert [tuple(s["exp_avg"].shape) for s in optimizer.state.values()] == [(HIDDEN, 4), (4, HIDDEN)]
    assert not [p for p in model.parameters() if p.shape == (HIDDEN, IN)]


def test_a_weight_of_seven_billion_class_takes_a_half_of_bfloat16():
    held = empty_groups(4096 * 4096, 8, 256, torch.device("meta"))
    assert sum(t.nbytes for t in held) / (4096 * 4096 * 2) == pytest.approx(0.516, abs=1e-3)


def test_the_projected_gradient_is_that_of_the_dequantized_weight_and_projection():
    model = quantized()
    lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    reference = plain()
    with torch.no_grad():
        for index in (0, 2):
            reference[index].weight.copy_(model[index].weight)
    (x,) = batches(1)
    for m in (model, reference):
        m(x).square().mean().backward()
    right, left = adapter(model, 0), adapter(model, 2)
    torch.testing.assert_close(right.Z.grad, reference[0].weight.grad @ right.basis(torch.float32).t())
    torch.testing.assert_close(left.Z.grad, left.basis(torch.float32).t() @ reference[2].weight.grad)


def test_the_projection_is_orthonormal_as_far_as_4_bits_go():
    model = quantized()
    train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.1), batches(1))
    P = adapter(model, 0).basis(torch.float64)
    assert (P @ P.t() - torch.eye(4)).abs().max() < 0.1
    assert not torch.allclose(P @ P.t(), torch.eye(4).double(), atol=1e-4)


def test_steps_far_below_a_code_are_not_lost_on_average():
    """Round to nearest would leave every weight where it is."""
    model = quantized(nn.Sequential(nn.Linear(64, 64)), rank=64, gap=1000, group_size=64, scale=1.0)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=1.0)
    before, one = model[0].weight.clone(), adapter(model, 0)
    direction = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    step = 0.02 * float(one.W_scale.mean())
    model(torch.randn(3, 64)).sum().backward()  # P is found here, and is a basis of everything
    P = one.basis(torch.float32)
    steps = 200
    for _ in range(steps):
        one.Z.grad = -step * direction @ torch.linalg.inv(P)
        optimizer.step()
    moved = model[0].weight - before
    share = float((moved * direction).sum() / (steps * step * direction.square().sum()))
    assert share == pytest.approx(1.0, abs=0.15)


def test_the_gap_doubles_once_five_renewals_found_nearly_the_same_direction():
    model = quantized(gap=1, similarity=0.9)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=1e-6)
    gaps = []
    for x in batches(1) * 20:
        train(model, optimizer, [x])
        gaps.append(int(adapter(model, 0).gap))
    # the 6th renewal brings the fifth similarity; from then on each renewal doubles: at 5, 6, 8, 16
    assert gaps == [1] * 5 + [2] + [4] * 2 + [8] * 8 + [16] * 4


def test_the_gap_stays_while_directions_keep_changing():
    model = quantized(gap=1, similarity=1.0)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    train(model, optimizer, batches(9))
    assert int(adapter(model, 0).gap) == 1
    assert (adapter(model, 0).cosines >= 0).all()


def test_sites_renew_at_their_own_pace():
    model = quantized(gap=1, similarity=0.9)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=1e-6)
    adapter(model, 2).similarity = 2.0  # never
    train(model, optimizer, batches(1) * 8)
    before = [adapter(model, index).P_codes.clone() for index in (0, 2)]
    other = batches(9)[-1]
    train(model, optimizer, [other * 3])  # step 8: the first site is at gap 8 and due, like the second
    train(model, optimizer, [other])
    assert not torch.equal(adapter(model, 2).P_codes, before[1])
    assert adapter(model, 0).gap_now > adapter(model, 2).gap_now == 1


@pytest.mark.parametrize("cls", ["AdamW", "AdamW8bit"])
def test_a_run_resumed_in_mid_schedule_continues_bit_for_bit(cls, tmp_path):
    if cls == "AdamW8bit":
        optimizer_class: Any = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    else:
        optimizer_class = torch.optim.AdamW
    data = batches(14)

    def started() -> tuple[Any, Any]:
        model = quantized(gap=1, similarity=0.2)
        return model, lrcompile.optimizer(model, optimizer_class, lr=0.01)

    whole, optimizer = started()
    train(whole, optimizer, data[:7])
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(whole, optimizer, data[7:])
    resumed, again = started()
    stored = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(stored["model"])
    again.load_state_dict(stored["optimizer"])
    train(resumed, again, data[7:])
    assert adapter(whole, 0).gap_now > 1
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_follows_galore_on_the_float_weight():
    losses = []
    for method in ("galore", "q-galore"):
        extra = {"group_size": 32, "similarity": 1.0} if method == "q-galore" else {}
        spec = lrcompile.spec(method, rank=4, update_proj_gap=5, scale=1.0, seed=0, **extra)
        model = lrcompile.apply(plain(), spec)
        losses.append(train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(1) * 30))
    assert losses[0][-1] < 0.2 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.35)


def test_weight_decay_acts_on_the_dequantized_weight():
    model = quantized()
    before = model[0].weight.clone()
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=1.0), batches(1) * 10)
    assert model[0].weight.norm() < 0.6 * before.norm()


def test_conv1d_is_held_as_it_is_stored():
    from transformers.pytorch_utils import Conv1D

    base: Any = nn.Sequential(Conv1D(HIDDEN, IN))
    x = batches(1)[0]
    expected = base(x)
    model = quantized(copy.deepcopy(base))
    assert model[0].weight.shape == (IN, HIDDEN)
    assert (model(x) - expected).abs().max() < 0.1
    before, one = model[0].weight, adapter(model, 0)
    train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=0.5), [x])
    change = -0.5 * one.Z.grad @ one.basis(torch.float32)
    assert change.abs().max() > 3 * one.W_scale.max()
    assert (model[0].weight - before - change.t()).abs().max() <= one.W_scale.max() * (1 + 1e-4)
    lrcompile.remove(model, keep_trained_weights=True)
    assert type(model[0]) is Conv1D
    assert list(model.state_dict()) == list(base.state_dict())


def test_a_bfloat16_model_answers_in_bfloat16_and_gives_bfloat16_weights_back():
    model = quantized(plain(torch.bfloat16))
    x = batches(1)[0].bfloat16()
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), [x] * 2)
    expected = model(x)
    assert expected.dtype == torch.bfloat16
    lrcompile.remove(model, keep_trained_weights=True)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model(x), expected)


def test_remove_gives_plain_layers_with_the_trained_weights_or_asks():
    model, base = quantized(), plain()
    with pytest.raises(lrcompile.AdapterError, match="keep_trained_weights"):
        lrcompile.remove(model)
    (x,) = batches(1)
    expected = model(x)
    lrcompile.remove(model, keep_trained_weights=True)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), expected)


def test_a_proof_that_fails_leaves_the_float_weights_untouched():
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.lost = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x)

    model = Bypass()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lrcompile.TargetError, match="lost"):
        lrcompile.apply(model, lrcompile.spec("q-galore", rank=3), example_inputs=tuple(batches(1)))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(before) == list(after)


def test_a_captured_program_is_that_of_the_plain_model():
    model = quantized()
    program = capture(model, tuple(batches(1))).program
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default", "aten.tanh.default", "aten.linear.default"]
    assert torch.equal(program.state_dict["0.weight"], model[0].weight)


def test_an_export_holds_float_weights_and_verifies(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = quantized()
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.01), batches(2))
    result = lrcompile.export(model, tmp_path / "model.onnx", tuple(batches(1)))
    assert result.verify().ok
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    shapes = {tuple(t.dims): t.data_type for t in graph.initializer}
    assert onnx.TensorProto.UINT8 not in shapes.values()
    assert {(HIDDEN, IN), (IN, HIDDEN)} & set(shapes)


@pytest.mark.parametrize("value", [0, 1, 255, 2.0, True])
def test_a_group_size_that_does_not_pack_is_refused(value):
    with pytest.raises(lrcompile.SpecError, match="even integer") as caught:
        lrcompile.spec("q-galore", rank=2, group_size=value)
    assert caught.value.field == "group_size"


def test_an_nf4_base_is_refused_with_the_reason():
    model = lrcompile.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), targets=["0"])
    with pytest.raises(lrcompile.TargetError, match="holds the weight in INT8 itself"):
        quantized(model, targets=["0"])
