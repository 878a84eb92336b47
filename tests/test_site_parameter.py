"""Raw parameters: the forward is traced for each signature it is called with, and nothing in the trace goes stale."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcompile

IN, OUT = 5, 7


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x):
        return x @ self.w


def adapted(model: Any, **fields) -> Any:
    """With B ≠ 0."""
    lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 2, "alpha": 3, "seed": 0} | fields))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p)
    return model


def follows(model: Any, *args, **kwargs) -> None:
    """Adapted and merged compute the same, by the original's own code."""
    y = model(*args, **kwargs)
    lrcompile.merge(model)
    torch.testing.assert_close(model(*args, **kwargs), y, rtol=1e-4, atol=1e-5)
    lrcompile.unmerge(model)


class Signature(Raw):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.sizes, self.options = 2.0, (1, 2), {"shift": 1.0}

    def forward(self, x, mask=None, mode: str = "plain", power=1, *, shift=0.0):
        y = x @ self.w * self.gain + shift + self.sizes[0] + self.options["shift"]
        if mask is not None:
            y = y * mask
        if mode == "abs":
            y = y.abs()
        if power is True:
            y = -y
        return F.dropout(y, 0.5, self.training) if self.training else y


def test_every_signature_is_followed_in_any_order():
    model, x, mask = adapted(Signature()).eval(), torch.randn(3, IN), torch.rand(3, OUT)
    calls: list[tuple[tuple, dict]] = [
        ((x,), {}), ((x, mask), {}), ((x,), {"mask": mask, "mode": "abs"}), ((x, None, "abs"), {}),
        ((x,), {"power": True}), ((x,), {"power": 1}), ((x,), {"shift": 2.5}), ((x,), {"shift": torch.ones(OUT)}),
    ]  # fmt: skip
    for args, kwargs in 2 * calls:
        follows(model, *args, **kwargs)
    assert not torch.equal(model(x, power=True), model(x, power=1))


def test_changed_attributes_are_followed():
    model, x = adapted(Signature()).eval(), torch.randn(3, IN)
    for change in ({"gain": 5.0}, {"sizes": (4, 2)}, {"options": {"shift": 9.0}}, {"gain": 2.0}):
        follows(model, x)
        vars(model).update(change)
        follows(model, x)


def test_the_training_branch_is_followed():
    model, x = adapted(Signature()), torch.randn(64, IN)
    assert (model.train()(x) == 0).float().mean() > 0.3
    assert (model.eval()(x) == 0).float().mean() < 0.1
    assert (model.train()(x) == 0).float().mean() > 0.3


class GradMode(Raw):
    def forward(self, x):
        return x @ self.w if torch.is_grad_enabled() else -(x @ self.w)


def test_the_grad_mode_is_followed():
    model, x = adapted(GradMode()), torch.randn(3, IN)
    y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), -y)


class Clash(Raw):
    def forward(self, x, w=2.0, w_1=None):
        y = x @ self.w * w
        return y if w_1 is None else y * w_1


def test_argument_names_that_look_alike_are_told_apart():
    model, x = adapted(Clash()), torch.randn(3, IN)
    torch.testing.assert_close(model(x, 2.0, torch.tensor(3.0)), 3 * model(x))


class Buffers(Raw):
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.ones(OUT))
        self.plain = torch.ones(OUT)

    def forward(self, x):
        return x @ self.w * (self.b + 1) + self.plain.exp().T + torch.arange(OUT) * self.b.shape[0]


def test_what_is_computed_from_buffers_and_attributes_is_computed_at_each_call():
    model, x = adapted(Buffers()), torch.randn(3, IN)
    follows(model, x)
    model.b.fill_(4.0)
    model.plain = torch.zeros(OUT)
    follows(model, x)
    model.b = torch.randn(OUT)
    follows(model, x)
    assert not [name for name in vars(model) if "constant" in name]


class Noisy(Raw):
    def forward(self, x):
        return x @ self.w + torch.randn(OUT)


def test_random_tensors_are_drawn_at_each_call_and_looking_draws_none():
    state = torch.get_rng_state()
    model, x = Noisy(), torch.randn(3, IN)
    torch.set_rng_state(state)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, seed=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    with lrcompile.disabled(model):
        torch.testing.assert_close(model(x), y)


def refused(body, reason: str, **attributes) -> None:
    class Odd(Raw):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("b", torch.ones(OUT))
            self.register_buffer("gate", torch.tensor(1.0))
            vars(self).update(attributes)

        forward = body

    model = Odd()
    before = {**vars(model)}
    bytes_before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lrcompile.TargetError, match=rf"(?s)w: .*{reason}"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["w"]))
    assert type(model) is Odd
    assert vars(model) == before
    assert all(torch.equal(v, bytes_before[k]) for k, v in model.state_dict().items())


def _stores(self, x):
    self.last = x @ self.w
    return self.last


def _counts(self, x):
    self.calls += 1
    return x @ self.w


def _reads(self, x):
    return x @ self.w * self.gate.item()


def _writes(self, x):
    self.b.add_(1)
    return x @ self.w * self.b


GLOBAL = torch.ones(OUT)


def _foreign(self, x):
    return x @ self.w * GLOBAL


def _branches(self, x):
    return x @ self.w if x.sum() > 0 else x


def _transposed_too(self, x):
    return x @ self.w @ self.w.T


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_stores, "sets self.last"), (_counts, "sets self.calls"), (_reads, "reads the value"), (_writes, "in place"),
        (_foreign, "no attribute of the module"), (_branches, "control flow"), (_transposed_too, "both as stored"),
    ],
)  # fmt: skip
def test_what_a_trace_cannot_follow_is_refused_and_the_module_is_as_it_was(body, reason):
    refused(body, reason, calls=0)


@pytest.mark.parametrize("extra", [[1, 2], {"a": 1}, object()])
def test_a_container_argument_is_refused_when_it_is_given(extra):
    model, x = adapted(Signature()).eval(), torch.randn(3, IN)
    with pytest.raises(lrcompile.AdapterError, match=rf"mask={type(extra).__name__}"):
        model(x, extra)
    with lrcompile.disabled(model), pytest.raises(TypeError):
        model(x, extra)


def test_a_wrong_call_is_pythons_own_error():
    with pytest.raises(TypeError, match="nonsense"):
        adapted(Raw())(torch.randn(3, IN), nonsense=1)


class Memory(nn.Module):
    """Parameters named like the methods of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(OUT, IN)), nn.Parameter(torch.randn(OUT, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys.T).softmax(-1) @ self.values


def test_parameters_may_have_any_name():
    model: Any = adapted(Memory())
    follows(model, torch.randn(4, IN))
    assert {row.name for row in lrcompile.report(model).sites} == {"keys", "values"}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


def test_a_stack_of_maps_has_factors_for_each():
    model: Any = adapted(Stack())
    assert model.lrcompile_adapters["w"]["default"].A.shape == (4, 2, IN)
    follows(model, torch.randn(4, 3, IN))


def test_an_adapter_applied_anew_is_traced_anew():
    model, x = Raw(), torch.randn(3, IN)
    adapted(model, dropout=0.9)
    model(x)
    lrcompile.remove(model)
    adapted(model)
    assert torch.equal(model(x), model(x))
    follows(model, x)


def test_copies_and_several_modules_do_not_share_traces():
    model: Any = adapted(nn.Sequential(Signature(), Raw_(OUT)), targets=["0.w", "1.w"]).eval()
    other, x = copy.deepcopy(model), torch.randn(3, IN)
    assert torch.equal(model(x), other(x))
    model[0].gain = random.Random(0).random()
    follows(model, x)
    follows(other, x)
    assert not torch.equal(model(x), other(x))


class Raw_(Raw):
    def __init__(self, inside: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(inside, 3))


def test_submodules_are_called_so_that_their_hooks_and_adapters_act():
    class Nested(Raw):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(OUT, 3)

        def forward(self, x):
            return self.inner(x @ self.w)

    model, calls = Nested(), []
    model.inner.register_forward_hook(lambda *_: calls.append(1))
    adapted(model, targets=["w", "inner"])
    x = torch.randn(2, IN)
    y, count = model(x), len(calls)
    assert count == 1
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_it_compiles_and_exports_to_the_same_values():
    model, x = adapted(Signature()).eval(), torch.randn(3, IN)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_first_compiled_call_is_one_graph_and_follows_what_it_depends_on():
    torch._dynamo.reset()
    model = adapted(Signature()).eval()
    lrcompile.apply(model, lrcompile.spec("lora", rank=1, seed=1), name="other")
    for name, p in model.named_parameters():
        if name.endswith("other.B"):
            nn.init.normal_(p)
    run = lrcompile.compile(model, fullgraph=True, options={"inner": "eager"})
    x, mask = torch.randn(3, IN), torch.randn(3, OUT)
    eager = copy.deepcopy(model)
    for change, given in (
        (lambda model: None, {}),
        (lambda model: None, {"mode": "abs"}),
        (lambda model: None, {"mask": mask, "power": True}),
        (lambda model: setattr(model, "gain", 3.0), {}),
        (lambda model: model.options.update(shift=2.0), {}),
        (lambda model: lrcompile.activate(model, ["default", "other"]), {}),
        (lambda model: lrcompile.activate(model, "other"), {}),
        (lambda model: lrcompile.activate(model, "default"), {}),
    ):
        for each in (model, eager):
            change(each)
        torch.testing.assert_close(run(x, **given), eager(x, **given))
        with torch.no_grad():
            torch.testing.assert_close(run(x, **given), eager(x, **given))


def test_what_was_compiled_once_is_not_compiled_again_on_return():
    torch._dynamo.reset()
    model = adapted(Signature()).eval()
    twin = adapted(Signature()).eval()
    run = lrcompile.compile(model, fullgraph=True, options={"inner": "eager"})
    x = torch.randn(3, IN)
    for mode in ("plain", "abs", "plain", "abs"):
        torch.testing.assert_close(run(x, mode=mode), model(x, mode=mode))
        twin(x, mode=mode)
    assert len(lrcompile.report(model).compiled) == 2
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))


def test_a_model_that_has_run_is_stored_and_copied_without_its_traces(tmp_path):
    model, x = adapted(Signature()).eval(), torch.randn(3, IN)
    y = model(x)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert not other.lrcompile_adapters._traces.names
        torch.testing.assert_close(other(x), y)
