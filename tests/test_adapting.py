"""apply and remove: what changes, what does not, and that an error changes nothing at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.embed = nn.Linear(6, 7), nn.Linear(7, 5), nn.Embedding(9, 6)
        self.a.weight.requires_grad_(False)

    def forward(self, ids):
        return self.b(self.a(self.embed(ids)).tanh())


IDS = torch.tensor([[1, 2, 8], [0, 0, 3]])
LORA = lrcompile.spec("lora", rank=2, alpha=3, seed=0)


def snapshot(model: Any) -> dict:
    """All that `apply` promises to leave alone or to bring back."""
    return {
        "bytes": {k: v.clone() for k, v in model.state_dict().items()},
        "identity": {k: id(p) for k, p in model.named_parameters()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modes": {k: m.training for k, m in model.named_modules()},
        "attributes": {k: set(vars(m)) for k, m in model.named_modules()},
        "hooks": {k: [dict(h) for n, h in vars(m).items() if n.endswith("_hooks") and isinstance(h, dict)]
                  for k, m in model.named_modules()},
    }  # fmt: skip


def same(before: dict, after: dict) -> None:
    for what in before:
        if what == "bytes":
            assert list(before[what]) == list(after[what])
            assert all(torch.equal(v, after[what][k]) for k, v in before[what].items())
        else:
            assert before[what] == after[what], what


def fill(model: Any) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lrcompile_adapters" in name:
                nn.init.normal_(p)
    return model


def test_it_returns_the_same_object_with_the_base_in_place():
    model: Any = Model()
    before, y = snapshot(model), model(IDS)
    assert lrcompile.apply(model, LORA) is model
    after = snapshot(model)
    for what in ("bytes", "identity"):
        for key, value in before[what].items():
            assert torch.equal(value, after[what][key]) if what == "bytes" else value == after[what][key]
    assert isinstance(model.a, nn.Linear)
    assert torch.equal(model(IDS), y)


def test_the_adapter_trains_and_nothing_else():
    model: Any = lrcompile.apply(Model(), LORA)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {f"{m}.lrcompile_adapters.weight.default.{t}" for m in "ab" for t in "AB"}


def test_remove_brings_back_everything():
    model: Any = Model()
    before = snapshot(model)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2, bias="all", targets=["a", "embed"]), name="one"))
    fill(lrcompile.apply(model, LORA, name="two"))
    lrcompile.remove(model, "one")
    assert lrcompile.report(model).adapters == ("two",)
    lrcompile.remove(model)
    same(before, snapshot(model))
    with pytest.raises(lrcompile.AdapterError, match="has no adapter"):
        lrcompile.remove(model)


def test_removing_a_merged_model_unmerges_it_first():
    model: Any = Model()
    before = snapshot(model)
    fill(lrcompile.apply(model, LORA))
    lrcompile.merge(model)
    lrcompile.remove(model)
    same(before, snapshot(model))


def test_a_seed_makes_adapters_equal_whatever_else_was_drawn_or_targeted():
    one = lrcompile.apply(Model(), LORA)
    torch.randn(5)
    two = lrcompile.apply(Model(), lrcompile.spec("lora", rank=2, alpha=3, seed=0, targets=["b"]))
    key = "b.lrcompile_adapters.weight.default.A"
    assert torch.equal(one.get_parameter(key), two.get_parameter(key))
    assert not torch.equal(one.get_parameter(key)[:, :6], one.get_parameter("a.lrcompile_adapters.weight.default.A"))


def test_patterns_set_rank_and_scale_by_site():
    s = lrcompile.spec("lora", rank=2, alpha=3, rank_pattern={"b": 5}, alpha_pattern={"b": 20})
    model: Any = lrcompile.apply(Model(), s)
    assert [(m.lrcompile_adapters["weight"]["default"].rank, m.lrcompile_adapters["weight"]["default"].scale.item())
            for m in (model.a, model.b)] == [(2, 1.5), (5, 4.0)]  # fmt: skip


@pytest.mark.parametrize(("base", "asked", "got"), [
    (torch.bfloat16, None, torch.float32), (torch.float64, None, torch.float64),
    (torch.bfloat16, "bfloat16", torch.bfloat16), (torch.float32, "float64", torch.float64),
])  # fmt: skip
def test_factors_are_float32_or_the_bases_wider_dtype_or_what_is_asked_for(base, asked, got):
    model: Any = lrcompile.apply(nn.Linear(4, 3, dtype=base), lrcompile.spec("lora", rank=2, dtype=asked))
    assert model.lrcompile_adapters["weight"]["default"].A.dtype == got
    assert model(torch.randn(2, 4, dtype=base)).dtype == base


def test_a_model_that_is_one_linear_map_is_adapted_too():
    model: Any = nn.Linear(5, 7)
    before = snapshot(model)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2)))
    x = torch.randn(3, 5)
    y = model(x)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    lrcompile.remove(model)
    same(before, snapshot(model))


def test_a_deep_copy_is_a_model_of_its_own():
    model: Any = fill(lrcompile.apply(Model(), LORA))
    other, y = copy.deepcopy(model), model(IDS)
    assert torch.equal(other(IDS), y)
    lrcompile.merge(other, final=True)
    assert type(other.a) is nn.Linear
    assert torch.equal(model(IDS), y)
    lrcompile.remove(model)


def test_training_mode_and_hooks_go_through():
    model: Any = Model().eval()
    calls: list[str] = []
    model.a.register_forward_hook(lambda *_: calls.append("a"))
    lrcompile.apply(model, LORA)
    assert not model.a.lrcompile_adapters["weight"]["default"].training
    model(IDS)
    assert calls == ["a"]


def test_base_checkpoints_keep_their_keys_and_load():
    model: Any = Model()
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    fill(lrcompile.apply(model, LORA))
    assert {k for k in model.state_dict() if "lrcompile" not in k} == set(saved)
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected
    assert all("lrcompile_adapters" in key for key in missing)


def wrong_calls():
    def applied():
        return lrcompile.apply(Model(), LORA)

    def merged():
        model: Any = fill(applied())
        lrcompile.merge(model)
        return model

    yield "same name twice", applied, lambda m: lrcompile.apply(m, LORA), lrcompile.AdapterError, "applied already"
    yield "merged", merged, lambda m: lrcompile.apply(m, LORA, name="b"), lrcompile.MergeError, r"unmerge\(model\)"
    for name in ("", "a.b", "-a", "a b", "weight ", "training", "merged", "active", 5, None):
        yield (
            f"name {name!r}",
            Model,
            lambda m, n=name: lrcompile.apply(m, LORA, name=n),
            lrcompile.AdapterError,
            "name",
        )
    no_spec: Any = {"method": "lora"}
    yield "no spec", Model, lambda m: lrcompile.apply(m, no_spec), lrcompile.SpecError, "takes a Spec"
    yield "rank", Model, lambda m: lrcompile.apply(m, lrcompile.spec("lora", rank=6)), lrcompile.SpecError, "rank=6"
    missing, huge = (
        lrcompile.spec("lora", rank=2, **f) for f in ({"targets": ["a", "c"]}, {"alpha_pattern": {"b": 1e300}})
    )
    yield "one of two targets", Model, lambda m: lrcompile.apply(m, missing), lrcompile.TargetError, "'c'"
    yield "scale", Model, lambda m: lrcompile.apply(m, huge), lrcompile.SpecError, "float32"
    yield (
        "remove unknown",
        applied,
        lambda m: lrcompile.remove(m, "other"),
        lrcompile.AdapterError,
        "'other'.*'default'",
    )
    yield (
        "bad proof",
        Model,
        lambda m: lrcompile.apply(m, LORA, example_inputs=("x",)),
        lrcompile.AdapterError,
        "example_inputs",
    )
    yield "interrupted", Model, interrupted, KeyboardInterrupt, ""
    yield "qlora of embeddings", Model, qlora_embedding, lrcompile.SpecError, "embed"


def interrupted(model):
    def stop(*_):
        raise KeyboardInterrupt

    handle = model.b.register_forward_hook(stop)
    try:
        lrcompile.apply(model, LORA, example_inputs=(IDS,))
    finally:
        handle.remove()


def qlora_embedding(model):
    lrcompile.apply(model, lrcompile.spec("qlora", rank=2, targets=["embed", "a"]))


@pytest.mark.parametrize(
    ("build", "call", "error", "message"), [pytest.param(*rest, id=name) for name, *rest in wrong_calls()]
)
def test_a_wrong_call_is_one_typed_error_and_changes_nothing(build, call, error, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    same(before, snapshot(model))


def test_a_failure_halfway_is_undone(monkeypatch):
    from lrcompile import attaching

    model: Any = Model()
    before, real, left = snapshot(model), attaching.swap, [1]

    def fail_second(module, mixin):
        if not left:
            raise MemoryError("no more")
        left.pop()
        real(module, mixin)

    monkeypatch.setattr(attaching, "swap", fail_second)
    with pytest.raises(MemoryError):
        lrcompile.apply(model, LORA)
    same(before, snapshot(model))


@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_part_and_the_whole_cannot_both_be_adapted_as_adapters_would_act_twice(first):
    part = nn.Sequential(nn.Linear(5, 4))
    whole = nn.ModuleDict({"part": part})
    one, other = (part, whole) if first == "part" else (whole, part)
    fill(lrcompile.apply(one, LORA))
    x = torch.randn(2, 5)
    y = part(x)
    with pytest.raises(lrcompile.AdapterError, match="applied to another model"):
        lrcompile.apply(other, LORA, name="b")
    assert torch.equal(part(x), y)
    lrcompile.remove(one)
    lrcompile.apply(other, LORA, name="b")


def llama(**more):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=31, bos_token_id=1, eos_token_id=30, pad_token_id=0, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_generate_gives_the_tokens_of_the_merged_model():
    model: Any = fill(lrcompile.apply(llama(), LORA))
    ids = torch.tensor([[1, 5, 9]])
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    base = llama().generate(ids, max_new_tokens=6, do_sample=False)
    assert not torch.equal(tokens, base)
    with lrcompile.disabled(model):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), base)
    lrcompile.merge(model, final=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_models_own_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ids = torch.tensor([[1, 5, 9, 4]])
    gradients = []
    for checkpointing in (False, True):
        model: Any = fill(lrcompile.apply(llama(), lrcompile.spec("lora", rank=2, seed=0, dropout=0.2))).train()
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                nn.init.constant_(p, 0.1)
            elif name.endswith(".A"):
                nn.init.constant_(p, 0.2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_trainer_trains_the_adapter_only(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model: Any = lrcompile.apply(llama(), LORA)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    ids = torch.randint(1, 30, (6, 5))
    data = [{"input_ids": row, "labels": row} for row in ids]
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "lrcompile_adapters" in k}


def test_a_merged_final_model_is_saved_and_loaded_as_the_base_class(tmp_path):
    model: Any = fill(
        lrcompile.apply(llama(tie_word_embeddings=True), lrcompile.spec("lora", rank=2, targets=["q_proj", "lm_head"]))
    )
    ids = torch.tensor([[1, 5, 9]])
    y = model(ids).logits
    lrcompile.merge(model, final=True)
    assert not [k for k in model.state_dict() if "lrcompile" in k]
    assert all(
        "lrcompile" not in type(m).__mro__[0].__name__ and "Adapted" not in type(m).__name__ for m in model.modules()
    )
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(other(ids).logits, model(ids).logits)
    torch.testing.assert_close(other(ids).logits, y, rtol=1e-4, atol=1e-4)


def test_a_large_model_on_meta_is_adapted_quickly_and_without_memory():
    with torch.device("meta"):
        model = llama(max_position_embeddings=8)
    lrcompile.apply(model, LORA)
    assert all(p.is_meta for p in model.parameters())


def test_a_quantizing_method_that_fails_its_proof_leaves_a_float_base_and_the_adapter_before_it():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.used = nn.Linear(5, 7), nn.Linear(7, 64)

        def forward(self, x):
            return self.used(nn.functional.linear(x, self.read.weight))

    model = Bypass()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["used"]), name="first")
    before = snapshot(model)
    spec = lrcompile.spec("qlora", rank=2, targets=["read", "used"], compute_dtype="float32")
    with pytest.raises(lrcompile.TargetError, match="read"):
        lrcompile.apply(model, spec, name="second", example_inputs=(torch.randn(3, 5),))
    same(before, snapshot(model))
    assert lrcompile.report(model).active == ("first",)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"used.lrcompile_adapters.weight.first.{factor}" for factor in "AB"
    ]
