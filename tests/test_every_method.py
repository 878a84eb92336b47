"""Every method × everything a user does with it: the same promises hold for all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from zoo.every_method import METHODS, RANK, applied, base, batches, optimizer_of, spec_of, train, trained

import lrcompile
from lrcompile.recipes import recipe

X = batches(1)[0]["x"]
WRITES = [name for name in METHODS if recipe(name).writes_base]
QUANTIZES = [name for name in METHODS if recipe(name).quantizes_base]
FLOAT = [name for name in METHODS if name not in QUANTIZES]


def logits(model: Any, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lrcompile_adapters" not in name}


def reference(method: str) -> Any:
    """The base `method` trains beside: quantized, where it quantizes."""
    if method not in QUANTIZES:
        return base()
    model = applied(method)
    return lrcompile.remove(model)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_changes_the_output(method):
    model = applied(method)
    before = logits(model.eval())
    optimizer = optimizer_of(method, model)
    losses = train(model, optimizer, batches(1) * 12)
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("method", FLOAT)
def test_merged_computes_the_same_and_unmerge_restores_every_bit(method):
    model = trained(method)
    expected, bits = logits(model), weights(model)
    lrcompile.merge(model)
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    lrcompile.unmerge(model)
    assert torch.equal(logits(model), expected)
    after = weights(model)
    assert all(torch.equal(after[name], bits[name]) for name in bits)


@pytest.mark.parametrize("method", FLOAT)
def test_a_final_merge_leaves_a_plain_model(method):
    model = trained(method)
    expected = logits(model)
    lrcompile.merge(model, final=True)
    assert set(model.state_dict()) == set(base().state_dict())
    assert {type(m) for m in model.modules()} == {type(m) for m in base().modules()}
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("method", QUANTIZES)
def test_on_codes_a_merge_says_into_what(method):
    model = trained(method)
    expected = logits(model)
    with pytest.raises(lrcompile.MergeError, match="NF4"):
        lrcompile.merge(model)
    lrcompile.merge(model, into="float32")
    size = float(expected.abs().max())
    assert torch.allclose(logits(model), expected, rtol=0, atol=torch.finfo(torch.bfloat16).eps * size)  # as the base
    lrcompile.unmerge(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_computes_the_same_bits(method, tmp_path):
    model = trained(method)
    lrcompile.save(model, tmp_path / "adapter")
    other = reference(method)
    lrcompile.load(other, tmp_path / "adapter")
    assert torch.equal(logits(other.eval()), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_disabled_gives_the_bases_bits_or_says_why_not(method):
    model = trained(method)
    expected = logits(reference(method).eval())
    if method in WRITES:
        with pytest.raises(lrcompile.AdapterError), lrcompile.disabled(model):
            pass
        return
    active = logits(model)
    with lrcompile.disabled(model):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), active)


@pytest.mark.parametrize("method", METHODS)
def test_removed_it_leaves_the_base_or_asks(method):
    model = trained(method)
    expected = weights(reference(method))
    if method in WRITES:
        with pytest.raises(lrcompile.AdapterError, match="keep_trained_weights"):
            lrcompile.remove(model)
        lrcompile.remove(model, keep_trained_weights=True)
        assert set(model.state_dict()) == set(base().state_dict())
        return
    lrcompile.remove(model)
    after = model.state_dict()
    assert set(after) == set(expected)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_copied_it_computes_the_same_bits_and_trains_alone(method):
    model = trained(method)
    other = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    train(other, optimizer_of(method, other), batches(2))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_mid_schedule_it_continues_bit_for_bit(method):
    data = batches(8)
    whole = applied(method)
    optimizer = optimizer_of(method, whole)
    train(whole, optimizer, data[:3])
    model_state, optimizer_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, data[3:])
    resumed = applied(method)
    again = optimizer_of(method, resumed)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    train(resumed, again, data[3:])
    assert torch.equal(logits(resumed.eval()), logits(whole.eval()))


@pytest.mark.parametrize("method", METHODS)
def test_on_an_nf4_base_it_trains_or_says_why_not(method):
    model = lrcompile.quantize(base(), "nf4", targets=["up", "down"])
    if reason := recipe(method).nf4:
        with pytest.raises(lrcompile.TargetError) as error:
            applied(method, model)
        assert reason in str(error.value)
        return
    applied(method, model)
    losses = train(model, optimizer_of(method, model), batches(1) * 8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_gives_the_same_outputs_and_gradients(method):
    compare_compiled(method, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "pissa", "adalora", "delta-lora", "galore"])
def test_compiled_by_inductor_too(method):
    compare_compiled(method, "inductor")


def compare_compiled(method: str, backend: str) -> None:
    model = trained(method).train()
    model.zero_grad()
    batch = batches(1)[0]
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    out = compiled(**batch)
    out.loss.backward()
    assert torch.allclose(out.logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("method", METHODS)
def test_compiled_by_our_passes_it_is_one_graph_with_the_same_outputs_and_gradients(method):
    compare_rewritten(method)


@pytest.mark.parametrize("method", sorted({recipe(name).form: name for name in METHODS}.values()))
def test_with_a_maximum_rank_each_form_computes_the_same(method):
    compare_rewritten(method, max_rank=RANK + 2)


def compare_rewritten(method: str, **options: Any) -> None:
    """In float64, where codes do not round: what is left is the order of sums."""
    model = trained(method, model=base(torch.float64)).train()
    batch = batches(1, torch.float64)[0]
    expected = gradients_of(model, model, batch)
    torch._dynamo.reset()
    compiled = lrcompile.compile(model, fullgraph=True, options={"inner": "aot_eager"}, **options)
    tolerance = 0.02 if method in QUANTIZES else 1e-9  # NF4 layers compute in bfloat16
    for name, tensor in gradients_of(compiled, model, batch).items():
        wanted = expected.pop(name)
        assert torch.allclose(tensor, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())), name
    assert not expected


def gradients_of(function: Any, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """And the outputs."""
    model.zero_grad()
    out = function(**batch)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **found}


@pytest.mark.parametrize("method", METHODS)
def test_its_plan_and_report_count_what_trains(method):
    model = applied(method)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lrcompile.report(model).trainable == trainable
    from lrcompile.planning import plan

    assert plan(base(), spec_of(method)).trainable == trainable


@pytest.mark.parametrize("method", METHODS)
def test_its_spec_survives_dicts_and_files(method, tmp_path):
    spec = spec_of(method)
    assert lrcompile.Spec.from_dict(spec.to_dict()) == spec
    for suffix in ("yaml", "json"):
        spec.dump(tmp_path / f"spec.{suffix}")
        assert lrcompile.Spec.load(tmp_path / f"spec.{suffix}") == spec


@pytest.mark.parametrize("method", METHODS)
def test_a_field_of_another_method_is_an_error_that_names_it(method):
    with pytest.raises(lrcompile.SpecError, match="no field 'flavour'") as error:
        spec_of(method, flavour=1)
    assert error.value.field == "flavour"


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["auto", "inline"])
@pytest.mark.parametrize("method", METHODS)
def test_exported_it_verifies(method, adapters, tmp_path):
    model = trained(method)
    done = lrcompile.export(model, tmp_path / "model.onnx", {"x": X}, adapters=adapters)
    verdict = done.verify()
    assert verdict.ok, str(verdict)
