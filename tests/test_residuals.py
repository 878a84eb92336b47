"""residual="fold": while an adapter is active the weight holds what it leaves of it, and its own bits at all other
times.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.errors import AdapterError, SpecError
from lrcompile.state import adapter_set, state_of

METHODS = ["pissa", "milora", "olora"]


def base(dtype: torch.dtype = torch.float64) -> Any:
    return nn.Sequential(nn.Linear(17, 11), nn.Tanh(), nn.Linear(11, 7)).to(dtype)


def applied(model: Any, method: str = "pissa", name: str = "default", **fields: Any) -> Any:
    example_inputs = fields.pop("example_inputs", None)
    fields = {"rank": 3, "alpha": 4.5, "seed": 1, "targets": r".*\d", "residual": "fold"} | fields
    return lrcompile.apply(model, lrcompile.spec(method, **fields), name=name, example_inputs=example_inputs)


def trained(model: Any) -> Any:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


def of(model: nn.Module, name: str = "default", site: int = 0) -> Any:
    return adapter_set(model, state_of(model).sites[name][site])[name]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "lrcompile" not in key}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = bits(model)
    return list(after) == list(before) and all(torch.equal(value, after[key]) for key, value in before.items())


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    inside=st.integers(1, 19),
    out=st.integers(1, 19),
    share=st.floats(0, 1),
    alpha=st.floats(0.1, 50),
    weight=st.sampled_from([1.0, 0.5, -2.0]),
    method=st.sampled_from(METHODS),
    conv1d=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_weight_holds_W_less_the_offset_rounded_once(inside, out, share, alpha, weight, method, conv1d, dtype):
    rank = 1 + int(share * (min(inside, out) - 1))
    model: Any = nn.Sequential((Conv1D(out, inside) if conv1d else nn.Linear(inside, out)).to(dtype))
    nn.init.normal_(model[0].weight)
    parameter, before = model[0].weight, bits(model)
    applied(model, method, rank=rank, alpha=alpha)
    lrcompile.activate(model, {"default": weight})
    wide = torch.promote_types(dtype, torch.float32)
    offset = of(model).offset(wide)
    held = (before["0.weight"].to(wide) - (offset.T if conv1d else offset)).to(dtype)
    assert torch.equal(model[0].weight, held)
    assert model[0].weight is parameter
    assert model[0].weight.is_contiguous()
    lrcompile.remove(model)
    assert same(before, model)


@pytest.mark.parametrize("method", METHODS)
def test_output_is_preserved_at_init(method):
    model, x = base(torch.float32), torch.randn(9, 17)
    y = model(x)
    applied(model, method)
    assert (model(x) - y).norm() <= 1e-6 * y.norm()


def test_a_bf16_base_loses_one_rounding_of_the_residual():
    """Between 0.6 and 1.0e-3 of ‖W‖ for singular values k^-0.6, as the rounding is that of what is left of W."""
    g = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, 192, generator=g))[0] for n in (192, 256))
    model: Any = nn.Sequential(nn.Linear(256, 192)).bfloat16()
    model[0].weight.data = (U * torch.arange(1, 193) ** -0.6 @ V.T).bfloat16()
    W = model[0].weight.detach().double()
    applied(model, rank=24, alpha=36)
    lost = (model[0].weight.double() + of(model).offset(torch.float64) - W).norm() / W.norm()
    assert 0.6e-3 <= float(lost) <= 1.0e-3


@pytest.mark.parametrize("method", METHODS)
def test_it_computes_what_the_kept_base_does_after_training_too(method):
    x, model = torch.randn(4, 17).double(), base()
    folded, kept = (trained(applied(copy.deepcopy(model), method, residual=r)) for r in ("fold", "keep"))
    torch.testing.assert_close(folded(x), kept(x), rtol=1e-12, atol=1e-12)
    for m in (folded, kept):
        m(x).square().sum().backward()
    torch.testing.assert_close(of(folded).A.grad, of(kept).A.grad, rtol=1e-10, atol=1e-10)
    assert of(folded).factors()[0].shape == (3, 17)
    assert of(kept).factors()[0].shape == (6, 17)


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_are_back_while_disabled_inactive_or_removed(method):
    model, x = base(torch.float32), torch.randn(4, 17)
    before, y = bits(model), model(x)
    trained(applied(model, method))
    z = model(x)
    assert not same(before, model)
    with lrcompile.disabled(model):
        assert same(before, model)
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), z)
    lrcompile.activate(model, [])
    assert same(before, model)
    lrcompile.activate(model, "default")
    assert torch.equal(model(x), z)
    with pytest.raises(ZeroDivisionError), lrcompile.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), z)
    lrcompile.remove(model)
    assert same(before, model)
    assert not model._load_state_dict_post_hooks
    assert not model._load_state_dict_pre_hooks


def test_merge_folds_into_the_residual_and_everything_comes_back():
    model, x = base(), torch.randn(4, 17).double()
    before, y = bits(model), model(x)
    trained(applied(model))
    z, held = model(x), bits(model)
    lrcompile.merge(model)
    merged = bits(model)
    torch.testing.assert_close(model(x), z, rtol=1e-12, atol=1e-12)
    with lrcompile.disabled(model):
        assert same(before, model)
        assert torch.equal(model(x), y)
    assert same(merged, model)
    lrcompile.unmerge(model)
    assert same(held, model)
    lrcompile.merge(model)
    lrcompile.remove(model)
    assert same(before, model)


def test_a_final_merge_leaves_a_plain_model_also_of_two():
    model, x = base(), torch.randn(4, 17).double()
    trained(applied(model, name="a"))
    trained(applied(model, name="b"))
    lrcompile.activate(model, {"a": 0.5, "b": 2.0})
    z = model(x)
    lrcompile.merge(model, final=True)
    assert not any("lrcompile" in key for key in model.state_dict())
    torch.testing.assert_close(model(x), z, rtol=1e-11, atol=1e-11)
    assert not model._load_state_dict_post_hooks


def test_two_on_one_base_do_not_corrupt_each_other():
    model, x = base(), torch.randn(4, 17).double()
    before, y = bits(model), model(x)
    for name in ("a", "b"):
        applied(model, name=name)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        trained(model)
    a, b, W = of(model, "a"), of(model, "b"), before["0.weight"]
    assert torch.equal(a.A0, b.A0)  # the second started from W, not from what the first had left of it
    alone = {}
    for name in ("a", "b"):
        lrcompile.activate(model, name)
        alone[name] = model(x)
    lrcompile.activate(model, {"a": 0.5, "b": 2.0})
    change = 0.5 * (a.B @ a.A - a.B0 @ a.A0) + 2 * (b.B @ b.A - b.B0 @ b.A0)
    expected = x @ (W + 1.5 * change).T + before["0.bias"]
    torch.testing.assert_close(model[0](x), expected, rtol=1e-12, atol=1e-12)
    lrcompile.remove(model, "a")
    lrcompile.activate(model, "b")
    assert torch.equal(model(x), alone["b"])
    lrcompile.remove(model, "b")
    assert same(before, model)


def test_an_adapter_of_another_method_starts_from_the_base():
    model = base()
    W = model[0].weight.detach().clone()
    trained(applied(model))
    lrcompile.apply(model, lrcompile.spec("olora", rank=3, targets=["0"]), name="other")
    torch.testing.assert_close(of(model, "other").A0, torch.linalg.qr(W).R[:3], rtol=1e-12, atol=1e-12)
    assert torch.equal(model[0].weight, W)


def test_the_report_says_that_weights_are_not_the_bases_now():
    model = applied(base())
    assert "2 weights hold what the active adapters leave of them" in str(lrcompile.report(model))
    lrcompile.activate(model, [])
    assert "leave of them" not in str(lrcompile.report(model))


@pytest.mark.parametrize(
    ("method", "does", "fields"), [("plora", "writes", {"period": 2, "momentum": 0.5}), ("dora", "reads", {})]
)
def test_an_adapter_that_writes_or_reads_the_weight_cannot_be_active_beside(method, does, fields):
    model, x = applied(base(), name="a"), torch.randn(4, 17).double()
    lrcompile.apply(model, lrcompile.spec(method, rank=2, targets=["0"], **fields), name="b")
    y = model(x)
    with pytest.raises(AdapterError, match=rf"'b' {does} '0\.weight'.*'a'.*residual='keep'"):
        lrcompile.activate(model, ["a", "b"])
    assert torch.equal(model(x), y)
    lrcompile.activate(model, "a")


def test_a_copy_is_independent():
    model, x = base(), torch.randn(4, 17).double()
    before = bits(model)
    trained(applied(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        z = model(x)
        lrcompile.remove(other)
        assert same(before, other)
        assert torch.equal(model(x), z)
    lrcompile.remove(model)
    assert same(before, model)


def test_a_proof_by_example_leaves_the_start_as_it_was():
    x, model = torch.randn(4, 17).double(), base()
    proved, unproved = (applied(copy.deepcopy(model), example_inputs=example) for example in ((x,), None))
    assert all(torch.equal(value, unproved.state_dict()[key]) for key, value in proved.state_dict().items())
    lrcompile.remove(proved)
    assert same(bits(model), proved)


def test_frozen_tensors_keep_their_bits_through_training():
    model = applied(base())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 17).double()).square().sum().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    assert {n.rpartition(".")[2] for n in frozen} == {"weight", "bias", "A0", "B0"}
    assert all(torch.equal(named[n], value) for n, value in frozen.items())


@pytest.mark.parametrize("part", ["everything", "the adapter only"])
def test_a_loaded_state_dict_is_followed_by_the_weights(part):
    """A checkpoint of another start brings another offset; the weight must have given up that one."""
    model, x = base(), torch.randn(4, 17).double()
    before = bits(model)
    one, two = (trained(applied(copy.deepcopy(model), niter=0, seed=seed)) for seed in (1, 2))
    z, state = one(x), one.state_dict()
    if part == "the adapter only":
        state = {key: value for key, value in state.items() if "lrcompile" in key}
    assert not torch.equal(of(one).A0, of(two).A0)
    two.load_state_dict(state, strict=False)
    assert torch.equal(two(x), z)
    lrcompile.remove(two)
    assert same(before, two)


def test_a_state_dict_of_another_base_is_refused_by_name():
    torch.manual_seed(1)
    model, other = base(), base()
    applied(model)
    applied(other)
    with pytest.raises(AdapterError, match=r"0\.weight, 2\.weight.*first, then apply"):
        other.load_state_dict(model.state_dict())


def test_a_state_dict_may_hold_the_bases_own_bits():
    model, x = trained(applied(base())), torch.randn(4, 17).double()
    y = model(x)
    with lrcompile.disabled(model):
        state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert torch.equal(model(x), y)


def test_a_folder_is_loaded_onto_the_base(tmp_path):
    model, x = base(), torch.randn(4, 17).double()
    other, before = copy.deepcopy(model), bits(model)
    trained(applied(model))
    lrcompile.save(model, tmp_path / "adapter")
    lrcompile.load(other, tmp_path / "adapter")
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].weight, model[0].weight)
    lrcompile.remove(other)
    assert same(before, other)


def test_a_cast_reaches_weight_and_base():
    model = applied(base(torch.float32))
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    with lrcompile.disabled(model):
        assert model[0].weight.dtype == torch.bfloat16
        model(torch.randn(2, 17).bfloat16())
    model(torch.randn(2, 17).bfloat16())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(4, 17, 9, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.maps)


KINDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(13, 7)).double(), (torch.arange(13),)),
    "stack": (Stack, (torch.ones(4, 3, 17).double(),)),
    "graph": (lambda: fx.symbolic_trace(base()), (torch.ones(3, 17).double(),)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, dtype=torch.float64), (torch.ones(5, 8).double(),) * 3),
}


@pytest.mark.parametrize(("build", "inputs"), KINDS.values(), ids=KINDS)
def test_every_kind_of_site_folds(build, inputs):
    model: Any = build()
    run = lambda: out[0] if isinstance(out := model(*inputs), tuple) else out  # noqa: E731
    before, y = bits(model), run()
    applied(model, targets=r".*")
    assert not same(before, model)
    torch.testing.assert_close(run(), y, rtol=1e-10, atol=1e-10)
    trained(model)
    assert (run() - y).abs().max() > 1e-3
    with lrcompile.disabled(model):
        assert torch.equal(run(), y)
    lrcompile.remove(model)
    assert same(before, model)
    assert torch.equal(run(), y)


def test_a_weight_that_another_module_uses_is_refused_by_name():
    model: Any = nn.ModuleDict({"embed": nn.Embedding(17, 11), "head": nn.Linear(11, 17)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(SpecError, match=r"'head'.*embed\.weight.*residual='keep'") as raised:
        applied(model, targets=["head"])
    assert raised.value.field == "residual"
    assert not any("lrcompile" in key for key in model.state_dict())
    applied(model, targets=["head"], residual="keep")


def test_a_weight_without_values_is_refused_by_name():
    with pytest.raises(SpecError, match=r"'0'.*meta device"):
        applied(base().to("meta"), targets=["0"])


def test_a_conversion_gives_the_weight_its_bits_back():
    model, x = base(), torch.randn(4, 17).double()
    before = bits(model)
    trained(applied(model))
    z = model(x)
    lrcompile.to_lora(model)
    assert same(before, model)
    torch.testing.assert_close(model(x), z, rtol=1e-12, atol=1e-12)


def test_a_compiled_model_follows():
    model, x = trained(applied(base())), torch.randn(4, 17).double()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    with lrcompile.disabled(model):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
