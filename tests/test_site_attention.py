"""nn.MultiheadAttention with adapters is nn.MultiheadAttention with the update folded into its weights."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompile.adapters import AdapterSet
from lrcompile.errors import AdapterError
from lrcompile.hosting import swap
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.sites import attention, bypass, linear
from lrcompile.sites.site import Slot

WIDTH, HEADS, RANK = 12, 4, 3
SCALE = 0.75  # exact in float32, in which adapters keep it


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slots_of(module: nn.Module) -> list[Slot]:
    found = attention.slots(module)
    assert found is not None
    return found


def attach(host: Any, mixin, slot, rank=RANK, seed=1, dropout=0.0, zero=False):
    """An adapter with B ≠ 0 (unless `zero`) on one weight, as `apply` would put it there."""
    weight = getattr(host, slot)
    if "lrcompile_adapters" not in host._modules:
        swap(host, mixin)
        host.lrcompile_adapters = nn.ModuleDict()
    if slot not in host.lrcompile_adapters._modules:
        host.lrcompile_adapters._modules[slot] = AdapterSet()
    adapters = host.lrcompile_adapters._modules[slot]
    adapter = LoraAdapter(weight.shape[1], weight.shape[0], rank, SCALE, dropout=dropout, dtype=weight.dtype)
    with torch.no_grad():
        adapter.A.copy_(draw(adapter.A.shape, seed))
        adapter.B.copy_(draw(adapter.B.shape, seed + 1) * (not zero))
    name = f"a{len(adapters)}"
    adapters.attach(name, adapter)
    adapters.active = (*adapters.active, name)
    return adapter.train(host.training)


def adapt(mha: Any, out_proj=True, **options):
    """Adapt every weight of `mha`; returns the adapters by (host, slot)."""
    found = {(mha, slot.name): attach(mha, attention.HOST, slot.name, seed=3 + i, **options)
             for i, slot in enumerate(slots_of(mha))}  # fmt: skip
    if out_proj:
        found[mha.out_proj, "weight"] = attach(mha.out_proj, linear.HOST, "weight", seed=9, **options)
    return found


def built(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    mha = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mha


def folded(mha, adapters):
    """`mha` as it was, with each adapter's s·B·A added to its weight by hand, differentiably."""
    plain = copy.deepcopy(mha)
    state = {name: p for name, p in plain.named_parameters() if "lrcompile" not in name}
    for (host, slot), adapter in adapters.items():
        name = slot if host is mha else "out_proj.weight"
        state[name] = state[name].detach() + SCALE * adapter.B @ adapter.A
    bare = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **mha.options)
    bare.train(mha.training)
    return lambda *args, **kwargs: torch.func.functional_call(bare, state, args, kwargs)


MASKS = st.sampled_from([None, "bool", "float"])


@st.composite
def calls(draw_):
    """A module's options and a call's, over everything nn.MultiheadAttention takes."""
    options = {
        "batch_first": draw_(st.booleans()),
        "bias": draw_(st.booleans()),
        "add_bias_kv": draw_(st.booleans()),
        "add_zero_attn": draw_(st.booleans()),
    }
    same = draw_(st.sampled_from(["self", "memory", "three"]))
    if same == "three":
        options |= draw_(st.sampled_from([{}, {"kdim": 7}, {"vdim": 5}, {"kdim": 7, "vdim": 10}]))
    batched, length, source = draw_(st.booleans()), draw_(st.integers(1, 5)), draw_(st.integers(2, 6))
    source = length if same == "self" else source
    rows = 2 if batched else 1

    def tensor(n, width, seed):
        x = draw((n, rows, width), seed)
        return x[:, 0] if not batched else x.transpose(0, 1) if options["batch_first"] else x

    query = tensor(length, WIDTH, 1)
    key = query if same == "self" else tensor(source, options.get("kdim", WIDTH), 2)
    value = key if same != "three" else tensor(source, options.get("vdim", WIDTH), 3)
    kind, padding = draw_(MASKS), draw_(st.booleans())
    per_head = draw_(st.booleans())
    call = {"need_weights": draw_(st.booleans()), "average_attn_weights": draw_(st.booleans())}
    if kind:
        shape = (rows * HEADS, length, source) if per_head else (length, source)
        mask = draw(shape, 4)
        call["attn_mask"] = mask if kind == "float" else (mask > 0.5).index_fill(-1, torch.tensor([0]), False)
    if padding:
        pad = torch.zeros(rows, source, dtype=torch.bool)
        pad[:, -1] = True
        pad = pad if kind != "float" else torch.where(pad, -1.5, 0.25).double()
        call["key_padding_mask"] = pad if batched else pad[0]
    if kind == "bool" and not per_head and draw_(st.booleans()):
        call["attn_mask"] = torch.ones(length, source, dtype=torch.bool).triu(1)
        call["is_causal"] = True
    return options, (query, key, value), call


def compare(mine, truth):
    assert (mine[1] is None) == (truth[1] is None)
    for a, b in zip(mine, truth, strict=True):
        if a is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(calls(), st.booleans())
def test_adapted_is_the_original_class_with_folded_weights_forward_and_backward(case, training):
    options, inputs, call = case
    mha = built(**options).train(training)
    mha.options = options
    adapters = adapt(mha)
    leaves = [p for a in adapters.values() for p in (a.A, a.B)]
    mine = mha(*inputs, **call)
    truth = folded(mha, adapters)(*inputs, **call)
    compare(mine, truth)
    probe = draw(mine[0].shape, 11)
    for a, b in zip(*(torch.autograd.grad((y[0] * probe).sum(), leaves) for y in (mine, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(calls(), st.sampled_from([torch.float32, torch.float64]))
def test_an_update_of_zero_changes_no_bit_of_the_unfused_path(case, dtype):
    options, inputs, call = case
    cast = {id(t): t.to(dtype) for t in inputs}
    inputs = tuple(cast[id(t)] for t in inputs)
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    mha = built(dtype=dtype, **options)
    truth = mha(*inputs, **call)
    adapt(mha, zero=True)
    for a, b in zip(mha(*inputs, **call), truth, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_without_a_live_adapter_the_original_runs_bit_for_bit():
    x = draw((2, 5, WIDTH), dtype=torch.float32)
    mha = built(dtype=torch.float32, batch_first=True).eval()
    with torch.no_grad():
        truth = mha(x, x, x)
        fused = torch.profiler.profile()
        adapters = adapt(mha)
        changed = mha(x, x, x)
        for host, slot in adapters:
            host.lrcompile_adapters[slot].active = ()
        with fused:
            back = mha(x, x, x)
    assert not torch.equal(changed[0], truth[0])
    assert torch.equal(back[0], truth[0])
    assert torch.equal(back[1], truth[1])
    assert any("_native_multi_head_attention" in event.name for event in fused.events())


@pytest.mark.parametrize("which", ["in_proj", "out_proj"])
def test_each_of_the_projections_is_live_alone_in_eval_without_gradients(which):
    x = draw((2, 5, WIDTH))
    mha = built(batch_first=True).eval()
    mha.options = {"batch_first": True}
    if which == "in_proj":
        adapters = adapt(mha, out_proj=False)
    else:
        swap(mha, attention.HOST)
        assert bypass.mixin_for(mha) is attention.HOST
        adapters = {(mha.out_proj, "weight"): attach(mha.out_proj, linear.HOST, "weight")}
    with torch.no_grad():
        compare(mha(x, x, x), folded(mha, adapters)(x, x, x))


def test_several_adapters_on_one_weight_add_up():
    x = draw((5, 2, WIDTH))
    mha = built()
    mha.options = {}
    first, second = (attach(mha, attention.HOST, "in_proj_weight", rank=r, seed=r) for r in (2, 5))
    both = LoraAdapter(WIDTH, 3 * WIDTH, 7, SCALE, dtype=torch.float64)
    both.A.data, both.B.data = torch.cat([first.A, second.A]).detach(), torch.cat([first.B, second.B], 1).detach()
    compare(mha(x, x, x), folded(mha, {(mha, "in_proj_weight"): both})(x, x, x))


def test_adapter_dropout_acts_in_training_only():
    x = draw((5, 2, WIDTH))
    mha = built()
    adapt(mha, dropout=0.5)
    assert not torch.equal(mha(x, x, x)[0], mha(x, x, x)[0])
    mha.eval()
    assert torch.equal(mha(x, x, x)[0], mha(x, x, x)[0])


def test_attention_dropout_draws_the_mask_the_original_draws():
    x = draw((5, 2, WIDTH))
    for need_weights in (True, False):
        mha = built(dropout=0.3)
        torch.manual_seed(7)
        truth = mha(x, x, x, need_weights=need_weights)[0]
        adapt(mha, zero=True)
        torch.manual_seed(7)
        assert torch.equal(mha(x, x, x, need_weights=need_weights)[0], truth)


def parents():
    common: Any = {"dim_feedforward": 7, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    yield "encoder layer", lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, **common)
    yield "encoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, **common), 2)
    yield "decoder layer", lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, **common)
    yield "transformer", lambda: nn.Transformer(WIDTH, HEADS, 1, 2, **common)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [pytest.param(make, id=name) for name, make in parents()])
def test_inside_torchs_transformer_blocks_the_adapters_act(build, training):
    torch.manual_seed(0)
    model = build().train(training)
    merged = copy.deepcopy(model)
    source, target = draw((2, 5, WIDTH), 1), draw((2, 4, WIDTH), 2)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def run(m):
        if isinstance(m, nn.Transformer):
            return m(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        if isinstance(m, nn.TransformerDecoderLayer):
            return m(target, source, memory_key_padding_mask=padding)
        return m(source, src_key_padding_mask=padding)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            other = merged.get_submodule(name)
            for (host, slot), adapter in adapt(module).items():
                weight = getattr(other if host is module else other.out_proj, slot)
                weight.data += SCALE * adapter.B.data @ adapter.A.data
    for module in list(model.modules()):
        mixin = bypass.mixin_for(module)
        if mixin and mixin is not attention.HOST:
            swap(module, mixin)
    with torch.no_grad():
        mine, truth = run(model), run(merged)
    seen = ~padding if mine.shape[1] == 5 else torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(mine[seen], truth[seen], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
def test_it_exports_with_dynamic_sizes_as_one_dialect_op_a_projection(need_weights):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = built(batch_first=True).eval()
            adapt(self.mha)

        def forward(self, x, m):
            own = self.mha(x, x, x, need_weights=need_weights)[0]
            return self.mha(own, m, m, need_weights=need_weights)[0]

    block = Block()
    batch, length, source = torch.export.Dim("batch"), torch.export.Dim("length"), torch.export.Dim("source")
    program = torch.export.export(
        block, (draw((2, 5, WIDTH)), draw((2, 3, WIDTH), 1)), strict=False,
        dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: source}),
    )  # fmt: skip
    ops = [n for n in program.graph.nodes if n.target is torch.ops.lrcompile.lora.default]
    assert len(ops) == 5  # self: packed and out; memory: q, packed k and v, out
    x, m = draw((3, 4, WIDTH), 5), draw((3, 6, WIDTH), 6)
    torch.testing.assert_close(program.module()(x, m), block(x, m), rtol=1e-12, atol=1e-12)


def test_it_compiles_without_a_graph_break():
    mha = built(batch_first=True)
    adapt(mha)
    x = draw((2, 5, WIDTH))
    compiled = torch.compile(mha, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], mha(x, x, x)[0], rtol=1e-12, atol=1e-12)


def test_copy_and_save_keep_the_adapters_acting():
    x = draw((5, 2, WIDTH))
    mha = built()
    adapt(mha)
    truth = mha(x, x, x)[0]
    assert torch.equal(copy.deepcopy(mha)(x, x, x)[0], truth)
    file = io.BytesIO()
    torch.save(mha, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, x, x)[0], truth)


def test_slots_are_the_projections_in_use_and_found_again_on_a_hosted_module():
    packed = built()
    assert [(s.name, s.in_features, s.out_features, s.refusal) for s in slots_of(packed)] == [
        ("in_proj_weight", WIDTH, 3 * WIDTH, None)
    ]
    separate = built(kdim=7, vdim=5)
    before = slots_of(separate)
    assert [(s.name, s.in_features, s.out_features) for s in before] == [
        ("q_proj_weight", WIDTH, WIDTH), ("k_proj_weight", 7, WIDTH), ("v_proj_weight", 5, WIDTH)
    ]  # fmt: skip
    adapt(separate)
    assert attention.slots(separate) == before
    assert attention.slots(nn.Linear(2, 3)) is None


def test_a_forward_of_ones_own_and_a_computed_weight_are_refused_by_name():
    class Doubled(nn.MultiheadAttention):
        def forward(self, query, *rest, **kwargs):
            return super().forward(2 * query, *rest, **kwargs)

    mha = Doubled(WIDTH, HEADS)
    assert "Doubled" in str(slots_of(mha)[0].refusal)
    swap(mha, attention.HOST)
    attach(mha.out_proj, linear.HOST, "weight")
    x = torch.randn(5, 2, WIDTH)
    with pytest.raises(AdapterError, match=r"Doubled.*out_proj"):
        mha(x, x, x)
    computed = nn.MultiheadAttention(WIDTH, HEADS)
    nn.utils.parametrizations.orthogonal(computed, "in_proj_weight")
    assert "parametrization" in str(slots_of(computed)[0].refusal)


def bad_calls():
    x = torch.zeros(5, 2, WIDTH)
    yield "a mask of another size", (x, x, x), {"attn_mask": torch.zeros(5, 4)}, r"attn_mask is \[5, 4\]"
    yield "a mask of one head", (x, x, x), {"attn_mask": torch.zeros(1, 5, 5)}, r"attn_mask is \[1, 5, 5\]"
    yield "padding of another size", (x, x, x), {"key_padding_mask": torch.zeros(2, 4)}, r"key_padding_mask is \[2, 4\]"
    yield "an integer mask", (x, x, x), {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "int64"
    yield "a causal hint alone", (x, x, x), {"is_causal": True}, "is_causal"
    yield "mixed dimensions", (x, x[:, 0], x), {}, "3, 2, 3 dimensions"
    nested = torch.nested.nested_tensor([torch.zeros(3, WIDTH), torch.zeros(4, WIDTH)])
    yield "nested tensors", (nested, nested, nested), {}, "to_padded_tensor"


@pytest.mark.parametrize(("inputs", "call", "match"), [pytest.param(*case, id=name) for name, *case in bad_calls()])
def test_what_the_original_refuses_is_refused(inputs, call, match):
    mha = built(dtype=torch.float32)
    adapt(mha)
    with pytest.raises(AdapterError, match=match):
        mha(*inputs, **call)
