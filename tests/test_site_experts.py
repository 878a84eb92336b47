"""Routed experts with adapters are the same experts with the update folded into each one's weight."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.adapters import AdapterSet
from lrcompile.errors import AdapterError
from lrcompile.hosting import swap
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.sites import experts, parameter
from lrcompile.sites.site import Slot

transformers = pytest.importorskip("transformers")

HIDDEN, INNER, EXPERTS, RANK, TOP = 12, 8, 5, 3, 2  # rows of 16 bytes, which torch's grouped product asks for
SCALE = 0.75  # exact in float32, in which adapters keep it
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CLASSES = {
    "mixtral": "MixtralExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "olmoe": "OlmoeExperts",
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v4": "DeepseekV4Experts",  # a gate of its own
    "gpt_oss": "GptOssExperts",  # transposed, biased, gate and up interleaved
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # transposed, biased; eager computes in float32
    "aria": "AriaExperts",  # transposed
    "nemotron_h": "NemotronHExperts",  # ungated
    "muse_spark": "MuseSparkExperts",  # a norm after each expert
    "inkling2": "Inkling2Experts",  # eager adds up in float32
}
CONFIGS = {"aria": "AriaTextConfig", "muse_spark": "MuseSparkTextConfig", "inkling2": "Inkling2TextConfig"}
FLOAT32 = {"openai_privacy_filter", "inkling2"}  # cast to float32 themselves; torch's grouped product has no float64


def draw(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(family: str, implementation: str = "eager", dtype: torch.dtype | None = None) -> nn.Module:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(modeling, CLASSES[family])
    config_class = CONFIGS.get(family) or CLASSES[family].replace("Experts", "Config")
    config = getattr(modeling, config_class)()
    for key, value in SIZES.items() | {(count, EXPERTS) for count in COUNTS}:
        if hasattr(config, key):
            setattr(config, key, value)
    config.moe_hidden_size = HIDDEN
    narrow = family in FLOAT32 or implementation == "grouped_mm"
    module = cls(config).to(dtype or (torch.float32 if narrow else torch.float64))
    for i, weight in enumerate(module.parameters()):
        weight.data = draw(weight.shape, 20 + i, weight.dtype) * 0.5
        weight.requires_grad_(False)
    module.config._experts_implementation = implementation
    return module


def routed(dtype=torch.float64, tokens=7, experts_used=EXPERTS, seed=1):
    """Hidden states, indices (distinct for a token), weights; experts beyond `experts_used` get no token."""
    index = torch.stack([draw(experts_used, seed * 100 + t).argsort()[:TOP] for t in range(tokens)])
    return draw((tokens, HIDDEN), seed, dtype), index, draw((tokens, TOP), seed + 1, dtype).softmax(-1)


def slots_of(module) -> list[Slot]:
    found = experts.slots(module)
    assert found is not None
    return found


def adapt(module, rank=RANK, seed=1, zero=False, dropout=0.0, only=None):
    """Adapters with B ≠ 0 (unless `zero`) on both weights, as `apply` would put them there; returns them by slot."""
    if "lrcompile_adapters" not in module._modules:
        slots = slots_of(module)
        swap(module, experts.HOST)
        module.lrcompile_adapters = nn.ModuleDict({s.name: AdapterSet() for s in slots if only in (None, s.name)})
    found = {}
    for i, slot in enumerate(s for s in slots_of(module) if only in (None, s.name)):
        sizes = {"copies": slot.copies, "dropout": dropout, "dtype": module.down_proj.dtype}
        adapter = LoraAdapter(slot.in_features, slot.out_features, rank, SCALE, **sizes)
        adapter.A.data = draw(adapter.A.shape, seed + i, adapter.A.dtype)
        adapter.B.data = draw(adapter.B.shape, seed + i + 5, adapter.B.dtype) * (not zero)
        adapters = module.lrcompile_adapters[slot.name]
        name = f"a{len(adapters)}"
        adapters.attach(name, adapter)
        adapters.active = (*adapters.active, name)
        found[slot.name] = adapter.train(module.training)
    return found


def folded(family, adapters, dtype):
    """The class as transformers runs it, each s·B·A added by hand and differentiably."""
    plain = built(family, "eager", dtype)
    state: dict[str, torch.Tensor] = dict(plain.named_parameters())
    for slot, adapter in adapters.items():
        delta = SCALE * adapter.B @ adapter.A
        state[slot] = state[slot] + (delta.mT if plain.is_transposed else delta)
    return lambda *args: torch.func.functional_call(plain, state, args)


def near(module):
    """A few hundred roundings of sums of this size, in the weights' dtype."""
    limit = 1e-10 if module.down_proj.dtype == torch.float64 else 2e-4
    return {"rtol": limit, "atol": limit}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", CLASSES)
def test_adapted_is_the_class_with_folded_weights_forward_and_backward(family, implementation):
    module = built(family, implementation)
    adapters = adapt(module)
    hidden, index, weights = routed(module.down_proj.dtype, experts_used=4)
    hidden.requires_grad_(), weights.requires_grad_()
    leaves = [hidden, weights, *(p for a in adapters.values() for p in (a.A, a.B))]
    mine, truth = module(hidden, index, weights), folded(family, adapters, hidden.dtype)(hidden, index, weights)
    assert mine.dtype == truth.dtype
    torch.testing.assert_close(mine, truth, **near(module))
    probe = draw(mine.shape, 9, mine.dtype)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (mine, truth)), strict=True):
        torch.testing.assert_close(a, b, **near(module))
        if a.dim() == 3:
            assert not a[4].any()  # the expert without tokens: zero, not missing
            assert a[:4].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name in CLASSES if name not in FLOAT32])
def test_a_zero_update_changes_no_bit_of_eager(family, dtype):
    module = built(family, "eager", dtype)
    inputs = routed(dtype)
    truth = module(*inputs)
    adapt(module, zero=True)
    assert torch.equal(module(*inputs), truth)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_a_zero_update_changes_no_bit_of_the_other_implementations(implementation):
    module = built("gpt_oss", implementation, torch.float32)
    inputs = routed(torch.float32)
    truth = module(*inputs)
    adapt(module, zero=True)
    assert torch.equal(module(*inputs), truth)


def test_without_a_live_adapter_the_original_runs():
    module: Any = built("mixtral", "grouped_mm", torch.float32)
    inputs = routed(torch.float32)
    truth = module(*inputs)
    adapters = adapt(module)
    assert not torch.equal(module(*inputs), truth)
    for slot in adapters:
        module.lrcompile_adapters[slot].active = ()
    assert torch.equal(module(*inputs), truth)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slot", ["gate_up_proj", "down_proj"])
def test_one_adapted_weight_and_two_adapters_on_it(slot, implementation):
    module = built("aria", implementation)
    first, second = adapt(module, only=slot), adapt(module, rank=4, seed=30, only=slot)
    both = LoraAdapter(1, 1, 1, SCALE, copies=1)
    both.A.data = torch.cat([first[slot].A, second[slot].A], dim=1).detach()
    both.B.data = torch.cat([first[slot].B, second[slot].B], dim=2).detach()
    inputs = routed(module.down_proj.dtype)
    truth = folded("aria", {slot: both}, module.down_proj.dtype)(*inputs)
    torch.testing.assert_close(module(*inputs), truth, **near(module))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sentinel_index_contributes_nothing_and_gets_no_gradient(implementation):
    module: Any = built("gpt_oss" if implementation != "eager" else "mixtral", implementation)
    adapters = adapt(module)
    module._is_expert_parallel = True
    hidden, index, weights = routed(module.down_proj.dtype)
    hidden.requires_grad_()
    index[2, 1] = index[4, 0] = EXPERTS
    index[5] = EXPERTS
    dropped = weights.masked_fill(index == EXPERTS, 0.0)
    truth = module(hidden, index.masked_fill(index == EXPERTS, 0), dropped)
    mine = module(hidden, index, weights)
    torch.testing.assert_close(mine, truth, **near(module))
    assert not mine[5].any()
    leaves = [hidden, *(p for a in adapters.values() for p in (a.A, a.B))]
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (mine, truth)), strict=True):
        torch.testing.assert_close(a, b, **near(module))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adapter_dropout_acts_in_training_only(implementation):
    module = built("mixtral", implementation)
    adapt(module, dropout=0.5)
    inputs = routed(module.down_proj.dtype)
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("nemotron_h", "eager"), ("gpt_oss", "batched_mm"), ("gpt_oss", "grouped_mm"), ("qwen3_moe", "grouped_mm")],
)
def test_it_exports_as_one_dialect_op_a_projection_for_any_number_of_tokens(family, implementation):
    module = built(family, implementation, torch.float32).eval()
    adapt(module)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(module, routed(torch.float32), strict=False, dynamic_shapes=({0: tokens},) * 3)
    ops = [n for n in program.graph.nodes if n.target is torch.ops.lrcompile.lora_experts.default]
    assert len(ops) == 2
    other = routed(torch.float32, tokens=11, seed=4)
    torch.testing.assert_close(program.module()(*other), module(*other), rtol=1e-4, atol=1e-4)
    plain = program.run_decompositions()
    assert not [n for n in plain.graph.nodes if n.op == "call_function" and str(n.target).startswith("lrcompile")]
    torch.testing.assert_close(plain.module()(*other), module(*other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_compiles_without_a_graph_break_and_trains(implementation):
    module = built("mixtral", implementation, torch.float32)
    adapters = adapt(module)
    inputs = routed(torch.float32)
    leaves = [p for a in adapters.values() for p in (a.A, a.B)]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(*inputs).sum(), leaves) for f in (compiled, module)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_op_keeps_rows_routed_to_no_expert():
    y, x, a, b = draw((4, 6)), draw((4, 5), 1), draw((3, 2, 5), 2), draw((3, 6, 2), 3)
    out = torch.ops.lrcompile.lora_experts(y, x, a, b, torch.tensor(SCALE), torch.tensor([2, 3, 0, -1]))
    expected = y.clone()
    expected[0] += SCALE * b[2] @ a[2] @ x[0]
    expected[2] += SCALE * b[0] @ a[0] @ x[2]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_peft_computes_the_same_from_the_same_factors():
    peft = pytest.importorskip("peft")
    module = built("mixtral", "eager")
    adapters = adapt(module)
    wrapped = nn.ModuleDict({"experts": built("mixtral", "eager")})
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=[], target_parameters=targets)
    model = peft.inject_adapter_in_model(config, wrapped)
    layers = {m.parameter_name: m for m in model.modules() if type(m).__name__ == "ParamWrapper"}
    assert layers.keys() == adapters.keys()
    for slot, adapter in adapters.items():
        layer = layers[slot]
        layer.lora_A["default"].weight.data = adapter.A.detach().flatten(0, 1).clone()  # expert slowest
        layer.lora_B["default"].weight.data = adapter.B.detach().permute(1, 2, 0).flatten(1).clone()  # expert fastest
    inputs = routed()
    torch.testing.assert_close(module(*inputs), model["experts"](*inputs), rtol=1e-10, atol=1e-10)


def test_a_whole_model_through_apply_and_merge_whatever_its_implementation():
    config = transformers.Qwen3MoeConfig(
        vocab_size=31, hidden_size=HIDDEN, intermediate_size=14, moe_intermediate_size=INNER, num_hidden_layers=2,
        head_dim=6, num_attention_heads=2, num_key_value_heads=1, num_experts=EXPERTS, num_experts_per_tok=TOP,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    ids = torch.arange(10).view(2, 5)
    base = model(ids).logits
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, targets=["experts.gate_up_proj", "experts.down_proj"]))
    assert torch.equal(model(ids).logits, base)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data = draw(p.shape, len(name), p.dtype) * 0.1
    adapted = {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        adapted[implementation] = model(ids).logits
    lrcompile.merge(model)
    merged = model(ids).logits
    assert (merged - base).abs().max() > 1e-3
    for logits in adapted.values():
        torch.testing.assert_close(logits, merged, rtol=1e-5, atol=1e-5)  # router and norms compute in float32
    lrcompile.unmerge(model)
    lrcompile.remove(model)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(ids).logits, base)


def test_routing_may_be_given_by_the_names_each_class_gives_it():
    called = {"mixtral": ("top_k_index", "top_k_weights"), "gpt_oss": ("router_indices", "routing_weights")}
    for family, names in called.items():
        module: Any = built(family)
        hidden, *routing = routed()
        by_name = dict(zip(names, routing, strict=True))
        truth = module(hidden, **by_name)
        adapters = adapt(module)
        assert torch.equal(module(hidden, **by_name), module(hidden, *routing))
        for slot in adapters:
            module.lrcompile_adapters[slot].active = ()
        assert torch.equal(module(hidden, **by_name), truth)


def test_slots_follow_the_flags_and_are_found_again_on_a_hosted_module():
    plain = slots_of(built("mixtral"))
    assert [(s.name, s.in_features, s.out_features, s.copies, s.transposed) for s in plain] == [
        ("gate_up_proj", HIDDEN, 2 * INNER, EXPERTS, False), ("down_proj", INNER, HIDDEN, EXPERTS, False)
    ]  # fmt: skip
    assert [(s.name, s.in_features, s.out_features, s.transposed) for s in slots_of(built("gpt_oss"))] == [
        ("gate_up_proj", HIDDEN, 2 * INNER, True), ("down_proj", INNER, HIDDEN, True)
    ]  # fmt: skip
    assert [s.name for s in slots_of(built("nemotron_h"))] == ["up_proj", "down_proj"]
    module = built("mixtral")
    adapt(module)
    assert slots_of(module) == plain
    assert experts.slots(nn.Linear(2, 3)) is None


def test_weights_in_eight_bits_and_strange_forwards_are_refused_by_name():
    module = built("mixtral", dtype=torch.float32)
    module.down_proj.data = module.down_proj.data.to(torch.float8_e4m3fn)
    assert "MixtralExperts holds it as torch.float8_e4m3fn" in str(slots_of(module)[1].refusal)

    @transformers.integrations.use_experts_implementation
    class Strange(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_up_proj = self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

        def forward(self, hidden_states, capacity):
            return hidden_states

    assert "Strange.forward takes hidden_states, capacity" in str(slots_of(Strange(None))[0].refusal)
    hosted = built("mixtral")
    adapt(hosted)
    with pytest.raises(AdapterError, match="experts take hidden states, the indices"):
        hosted(draw((3, HIDDEN)), top_k_index=torch.zeros(3, 2, dtype=torch.int64))


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_decorated():
    module = built("mixtral")
    module.__class__ = type("Own", (type(module),), {"forward": lambda self, hidden_states: hidden_states})
    assert experts.slots(module) is None


def test_every_decorated_class_uses_flags_known_here():
    models = Path(transformers.__file__).parent / "models"
    flags = set()
    for file in models.glob("*/modeling_*.py"):
        for call in re.findall(r"^@use_experts_implementation\((.*)\)$", file.read_text(), re.MULTILINE):
            flags |= set(re.findall(r"(\w+)=", call))
    assert flags <= {"has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"}


UNDECORATED = {
    "llama4": ("Llama4TextExperts", "Llama4TextConfig"),
    "longcat_flash": ("LongcatFlashExperts", "LongcatFlashConfig"),
    "step3p7": ("Step3p7Experts", "Step3p7TextConfig"),
    "inkling": ("InklingSharedExperts", "InklingTextConfig"),
}


@pytest.mark.parametrize("family", UNDECORATED)
def test_experts_that_are_not_decorated_are_traced_or_refused_by_name(family):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls, config = (getattr(modeling, name) for name in UNDECORATED[family])
    with torch.device("meta"):
        module = cls(config())
    assert experts.slots(module) is None
    for slot in parameter.slots(module) or ():
        assert slot.refusal is None or cls.__name__ in slot.refusal or slot.refusal.startswith("it is")
