"""quantize(budget=): each map stored as what its cost to the outputs is worth; the budget holds, the table is true."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import language

import lrcompile
from lrcompile.budgets import FLOAT, INT4, INT8, NF4, Options, within_bytes, within_error
from lrcompile.integers.modules import integer_layout_of, is_integers
from lrcompile.quantizing import is_nf4, quantization_of


class Uneven(nn.Module):
    """Three maps; what the second puts out is worth a hundred times that of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return 0.01 * self.low(x) + self.high(x) + 0.01 * self.last(torch.tanh(x))


def uneven() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    return Uneven(), [(torch.randn(32, 64),) for _ in range(2)]


def form_of(module: nn.Module) -> str:
    return NF4 if is_nf4(module) else f"int{integer_layout_of(module).bits}" if is_integers(module) else FLOAT


def table(model: nn.Module) -> Any:
    found = quantization_of(model)
    assert found is not None
    return found.allocation


def test_what_matters_most_gets_the_better_form_and_the_table_says_what_each_got():
    model, data = uneven()
    before = model(*data[0])
    lrcompile.quantize(model, budget={"share": 0.18}, data=data)
    found = table(model)
    forms = {choice.name: choice.form for choice in found.choices}
    assert forms["high"] in (INT8, FLOAT)
    assert {forms["low"], forms["last"]} <= {NF4, INT4}
    assert forms == {name: form_of(model.get_submodule(name)) for name in forms}
    assert found.bytes <= 0.18 * found.float_bytes
    held = sum(b.numel() * b.element_size() for n, b in model.named_buffers()) + sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if n.endswith("weight")
    )
    assert held == found.bytes
    with torch.no_grad():
        whole = torch.cat([model(*batch) for batch in data])
        plain = torch.cat([uneven()[0](*batch) for batch in data])
    assert found.measured == pytest.approx(float((whole - plain).norm() / plain.norm()), rel=1e-3)
    assert found.predicted == pytest.approx(found.measured, rel=0.5)
    assert all(each in str(found) for each in ("high", *forms.values(), "would save", "the smallest form"))
    assert before.shape == whole[:32].shape


def test_r_as_nf4_is_what_the_map_alone_does_to_the_outputs():
    model, data = uneven()
    plain = torch.cat([model(*batch) for batch in data])
    lrcompile.quantize(model, budget={"share": 0.14}, data=data)
    for choice in table(model).choices:
        alone, _ = uneven()
        lrcompile.quantize(alone, targets=[choice.name])
        with torch.no_grad():
            moved = torch.cat([alone(*batch) for batch in data]) - plain
        assert choice.moves_as_nf4 == pytest.approx(float(moved.norm() / plain.norm()), rel=1e-3)


@pytest.mark.parametrize("limit", [0.3, 0.02, 0.001])
def test_an_error_budget_is_kept_by_the_real_model_and_a_tighter_one_takes_more(limit):
    model = language.base(32, 20).eval()
    sizes = []
    data = language.sample(2, 1)
    with torch.no_grad():
        y = torch.cat([model(**batch).logits for batch in data]).double()
    for each in (limit, limit / 3):
        quantized = lrcompile.quantize(copy.deepcopy(model), budget={"error": each}, data=data)
        found = table(quantized)
        with torch.no_grad():
            moved = torch.cat([quantized(**batch).logits for batch in data]).double() - y
        assert float(moved.norm() / y.norm()) <= each * (1 + 1e-6)
        assert found.measured == pytest.approx(float(moved.norm() / y.norm()), rel=1e-2, abs=1e-6)
        sizes.append(found.bytes)
    assert sizes[0] <= sizes[1]


class Outliers(Uneven):
    """Inputs with one element in 64 that is fifty times the others, as real models have them."""

    def forward(self, x):
        return super().forward(torch.cat((50 * x[:, :1], x[:, 1:]), 1))


@pytest.mark.parametrize("counted", [False, True])
def test_the_table_says_what_the_fast_form_costs_in_onnx_runtime_and_a_budget_may_be_about_that(tmp_path, counted):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    plain, data = Outliers(), [(torch.randn(32, 64),) for _ in range(2)]
    model: Any = copy.deepcopy(plain)
    lrcompile.quantize(model, budget={"error": 0.012}, data=data, integer_inputs=counted)
    found = table(model)
    assert (found.measured_integer_inputs if counted else found.measured) <= 0.012
    forms = {choice.form for choice in found.choices}
    assert forms & {INT8, INT4}
    assert not (counted and NF4 in forms)
    exported = lrcompile.export(model, tmp_path / "m.onnx", data[0], nf4_form="int8")
    session = lrcompile.run(exported.path)
    with torch.no_grad():
        y = torch.cat([plain(*batch) for batch in data]).double()
    (name,) = exported.manifest["inputs"]
    shipped = torch.cat([next(iter(session({name["name"]: x}).values())) for (x,) in data]).double()
    assert float((shipped - y).norm() / y.norm()) == pytest.approx(found.measured_integer_inputs, rel=0.02)
    if not counted:  # what the budget was about does not hold for the other form, and the table says so
        assert found.measured_integer_inputs > 0.012
    assert ("by the weights (counted)" in str(found)) != counted
    assert ("rounded to 8 bits (counted)" in str(found)) == counted


def test_padding_and_a_cache_are_no_outputs():
    model = language.base(32, 3).eval()
    ids = language.sample(1, 1)[0]["input_ids"][:4, :12]
    mask = torch.ones_like(ids)
    mask[:2, 6:] = 0
    tables = []
    for filler in (1, 99):
        padded = torch.where(mask.bool(), ids, filler)
        batch = {"input_ids": padded, "attention_mask": mask, "use_cache": True}
        tables.append(table(lrcompile.quantize(copy.deepcopy(model), budget={"share": 0.2}, data=[batch])))
    assert tables[0].measured == pytest.approx(tables[1].measured, rel=1e-6)
    assert [choice.form for choice in tables[0].choices] == [choice.form for choice in tables[1].choices]
    with torch.no_grad():
        logits = model(**batch).logits[mask.bool()].double()
        quantized = lrcompile.quantize(copy.deepcopy(model), budget={"share": 0.2}, data=[batch])
        moved = quantized(**batch).logits[mask.bool()].double() - logits
    assert tables[0].measured == pytest.approx(float(moved.norm() / logits.norm()), rel=1e-3)


def test_the_forms_go_into_an_onnx_file_and_hold_there(tmp_path):
    onnx = pytest.importorskip("onnx")
    model, data = uneven()
    lrcompile.quantize(model, budget={"share": 0.2}, data=data)
    forms = [choice.form for choice in table(model).choices]
    for form in ("exact", "int8"):
        exported = lrcompile.export(model, tmp_path / f"{form}.onnx", data[0], nf4_form=form)
        operators = [node.op_type for node in onnx.load(exported.path).graph.node]
        as_integers = sum(each in (INT8, INT4) for each in forms) + (forms.count(NF4) if form == "int8" else 0)
        assert operators.count("MatMulNBits") == as_integers
        verdict = exported.verify(data[1])
        assert verdict.ok, verdict
        assert (verdict.bound_ratio < 16) == (form == "exact")
        assert len(exported.manifest["integers"]) == sum(each in (INT8, INT4) for each in forms)


def test_a_model_of_integers_casts_moves_copies_and_refuses_adapters_and_another_quantize():
    model, data = uneven()
    lrcompile.quantize(model, budget={"bytes": 9000}, data=data)
    x = data[0][0]
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    twin.load_state_dict(model.state_dict())
    scales = model.high.weight_scales.clone()
    wide = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(wide.float(), y, rtol=1e-4, atol=1e-5)
    model.bfloat16()
    assert torch.equal(model.high.weight_scales, scales)  # a cast would round them
    assert model(x.bfloat16()).dtype == model.high.weight.dtype == torch.bfloat16
    assert isinstance(model.high, nn.Linear)
    with pytest.raises(lrcompile.TargetError, match="stored as integers"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["high"]))
    with pytest.raises(lrcompile.TargetError, match="integers already"):
        lrcompile.quantize(model, targets=["high"])


def test_a_conv1d_is_stored_turned_round():
    transformers = pytest.importorskip("transformers")
    model: Any = nn.Sequential(transformers.pytorch_utils.Conv1D(48, 32))
    x, weight = torch.randn(5, 32), model[0].weight.detach().clone()
    y = model(x)
    lrcompile.quantize(model, budget={"error": 0.01}, data=[(x,)])
    assert form_of(model[0]) == INT8
    assert model[0].weight.shape == weight.shape
    assert (model(x) - y).norm() <= 0.01 * y.norm()  # what the budget allows, on the data it was held to


WRONG = {
    "no data": ({"budget": {"share": 0.2}}, lrcompile.SpecError, "data=batches"),
    "data alone": ({"data": [(torch.randn(2, 64),)]}, lrcompile.SpecError, "give budget="),
    "a number": ({"budget": 0.2, "data": [(torch.randn(2, 64),)]}, lrcompile.SpecError, "'share': 0.3"),
    "unknown": ({"budget": {"ram": 3}, "data": [(torch.randn(2, 64),)]}, lrcompile.SpecError, "'bytes': N"),
    "two": ({"budget": {"share": 0.2, "error": 1}, "data": []}, lrcompile.SpecError, "expected one of"),
    "inputs alone": ({"integer_inputs": True}, lrcompile.SpecError, "integer_inputs is True"),
    "inputs of 8": ({"budget": {"share": 0.2}, "data": [], "integer_inputs": 8}, lrcompile.SpecError, "_inputs is 8"),
    "negative": ({"budget": {"share": -0.2}, "data": []}, lrcompile.SpecError, "budget share is -0.2"),
    "too small": ({"budget": {"bytes": 100}, "data": [(torch.randn(2, 64),)]}, lrcompile.SpecError, "smallest forms"),
    "keep": ({"budget": {"share": 0.2}, "data": [(torch.randn(2, 64),)], "keep_base": "cpu"}, lrcompile.SpecError,
             "keep_base"),
    "not taken": ({"budget": {"share": 0.2}, "data": [(torch.randn(2, 63),)]}, lrcompile.AdapterError, "batch 0"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_one_error_and_changes_nothing(call, error, message):
    model, data = uneven()
    bits, y = {name: value.clone() for name, value in model.state_dict().items()}, model(*data[0])
    with pytest.raises(error, match=message):
        lrcompile.quantize(model, **call)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in bits.items())
    assert torch.equal(model(*data[0]), y)
    assert quantization_of(model) is None


def options(count: int, seed: int) -> dict[str, Options]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for index in range(count):
        size, worth = (float(each) for each in torch.rand(2, generator=draw) + 0.01)
        sizes = {NF4: int(1000 * size), INT4: int(1200 * size), INT8: int(2100 * size), FLOAT: int(8000 * size)}
        r = {NF4: worth, INT4: worth * (0.5 + float(torch.rand(1, generator=draw))), INT8: worth / 100, FLOAT: 0.0}
        found[str(index)] = Options(sizes, r, r)
    return found


@given(st.integers(1, 4), st.integers(0, 2**16), st.floats(0.13, 1.0))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_greedy_choice_is_within_one_step_of_the_best_of_all(count, seed, share):
    given_options = options(count, seed)
    most = share * sum(each.bytes[FLOAT] for each in given_options.values())
    every = [
        dict(zip(given_options, forms, strict=True))
        for forms in itertools.product((NF4, INT4, INT8, FLOAT), repeat=count)
    ]
    size = lambda forms: sum(given_options[name].bytes[form] for name, form in forms.items())  # noqa: E731
    cost = lambda forms: sum(given_options[name].r[form] for name, form in forms.items())  # noqa: E731
    chosen = within_bytes(given_options, most)
    best = min(cost(forms) for forms in every if size(forms) <= most)
    largest_step = max(each.r[NF4] for each in given_options.values())
    assert size(chosen) <= most
    assert best <= cost(chosen) <= best + largest_step
    limit = (best + 1e-12) ** 0.5
    assert cost(within_error(given_options, limit)) <= limit**2 * (1 + 1e-9)
