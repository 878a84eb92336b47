"""quantize-nf4: W ≈ c[q]·m; the maps, the codes and the error bound of `lrcompile.quantize`, on a captured program."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile import ExportError, SpecError
from lrcompile.deployment.capture import capture
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES, Nf4, quantize_nf4
from lrcompile.passes import quantize_nf4 as module
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.merge_lora import MergeLora
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.quantize_nf4 import QuantizeNf4

IN, HIDDEN, OUT, RANK = 10, 23, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.nf4_linear.default", "aten.linear.default", "aten.addmm.default")
    return {name.split(".")[1]: targets[name] for name in names}


def _mlp(dtype: torch.dtype = torch.float32) -> Any:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT, bias=False)).to(dtype).eval()


def _codes(program: Program) -> dict[str, torch.Tensor]:
    return {name: held for name, held in program.exported.state_dict.items() if name.endswith("_codes")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [64, 32])
def test_products_become_nf4_linear_with_the_codes_of_quantize(dtype, block_size):
    model, x = _mlp(dtype), torch.randn(4, IN, dtype=dtype)
    program = _program(model, x)
    assert _counts(program) == {"nf4_linear": 0, "linear": 2, "addmm": 0}
    (step,) = Pipeline((QuantizeNf4(block_size),)).run(program, Check((x,)))
    assert _counts(program) == {"nf4_linear": 2, "linear": 0, "addmm": 0}
    assert list(step.result.errors) == ["0.weight", "2.weight"]
    assert all(0.01 < error <= QuantizeNf4.tolerance for error in step.result.errors.values())
    assert not QuantizeNf4(block_size).apply(program).modified  # the weights it took have no use any more
    lrcompile.quantize(model, targets=["0", "2"], block_size=block_size)
    held = _codes(program)
    assert {name: held[name].tolist() for name in held} == {
        f"{site}.weight_codes": model.get_buffer(f"{site}.weight_codes").tolist() for site in ("0", "2")
    }
    rounding = 2**-22 if dtype == torch.float64 else 0.0  # the pass holds the maxima in float32
    for rows in (1, 4, 9):  # the batch still varies
        given = torch.randn(rows, IN, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(given), model(given), rtol=rounding, atol=rounding)


def test_a_conv1d_keeps_its_storage_order():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(OUT, IN)).eval()
    program = _program(model, torch.randn(4, 3, IN))
    assert QuantizeNf4().apply(program).count == 1
    assert _counts(program) == {"nf4_linear": 1, "linear": 0, "addmm": 0}
    lrcompile.quantize(model, targets=["0"])
    assert torch.equal(_codes(program)["0.weight_codes"], model.get_buffer("0.weight_codes"))
    x = torch.randn(7, 3, IN)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=16 * 2**-24 * IN)


def test_the_maps_of_a_model_are_those_that_quantize_takes():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 40}
    ids = torch.arange(10).view(2, 5)
    for model in (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)),
        transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **heads)),
    ):
        program = _program(model.eval(), ids)
        QuantizeNf4().apply(program)
        lrcompile.quantize(model)
        assert set(_codes(program)) == {name for name, _ in model.named_buffers() if name.endswith("_codes")}


class Odd(nn.Module):
    """Weights that must stay: tied to another use, read by a view, never used, not of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.table = nn.Linear(IN, 11, bias=False), nn.Embedding(11, IN)
        self.tied.weight = self.table.weight
        self.sliced, self.unused, self.raw = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Parameter(torch.randn(IN, IN))
        self.twins = nn.ModuleList([nn.Linear(IN, IN), nn.Linear(IN, IN)])
        self.attention = nn.MultiheadAttention(IN, 2)

    def forward(self, ids):
        x = self.table(ids)
        x = nn.functional.linear(x, self.sliced.weight[:, :]) + nn.functional.linear(x, self.raw)
        x, _ = self.attention(x, x, x)
        return self.tied(x)


def test_what_is_tied_viewed_unused_or_of_no_linear_map_stays():
    model = Odd().eval()
    program = _program(model, torch.arange(6).view(2, 3))
    code = program.exported.graph_module.code
    assert QuantizeNf4().apply(program).count == 0
    assert program.exported.graph_module.code == code


def test_a_layer_called_twice_is_stored_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(IN, IN)

        def forward(self, x):
            return self.step(torch.tanh(self.step(x)))

    program = _program(Twice(), torch.randn(4, IN))
    assert QuantizeNf4().apply(program).count == 1
    assert _counts(program) == {"nf4_linear": 2, "linear": 0, "addmm": 0}
    assert list(_codes(program)) == ["step.weight_codes"]


def test_a_bare_linear_map_is_stored():
    program = _program(nn.Linear(IN, OUT), torch.randn(4, IN))
    assert list(QuantizeNf4().apply(program).errors) == ["weight"]


def test_a_folded_weight_is_computed_then_stored():
    model: Any = lrcompile.apply(_mlp(), lrcompile.spec("lora", rank=RANK, targets=["0", "2"]))
    for index in (0, 2):
        nn.init.normal_(model[index].lrcompile_adapters["weight"]["default"].B)
    x = torch.randn(4, IN)
    program = _program(model.eval(), x)
    Pipeline((MergeLora(), QuantizeNf4())).run(program, Check((x,)))
    assert program.pending == {}
    assert _counts(program) == {"nf4_linear": 2, "linear": 0, "addmm": 0}
    lrcompile.merge(model, final=True)
    lrcompile.quantize(model, targets=["0", "2"])
    assert torch.equal(_codes(program)["2.weight_codes"], model.get_buffer("2.weight_codes"))


@given(
    st.sampled_from(BLOCK_SIZES[:3]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_the_stated_error_holds_for_heavy_tails_and_short_blocks(block_size, rows, columns, spread, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(rows, 1, generator=generator))  # blocks of very different size
    weight = (size * torch.randn(rows, columns, generator=generator)).to(dtype)
    assert module._error(weight, quantize_nf4(weight, block_size), block_size) <= QuantizeNf4.tolerance


def test_codes_of_neighbours_swapped_exceed_the_stated_error():
    weight = torch.randn(16, 64)
    stored = quantize_nf4(weight)
    swapped = Nf4(stored.codes << 4 | stored.codes >> 4, *stored[1:])
    assert module._error(weight, swapped, 64) > 3 * QuantizeNf4.tolerance


def test_a_weight_with_nan_is_refused_by_name():
    model = _mlp()
    model[2].weight.data[1, 2] = torch.nan
    with pytest.raises(ExportError, match=r"2\.weight cannot be stored as NF4: .*NaN"):
        QuantizeNf4().apply(_program(model, torch.randn(4, IN)))


def test_bad_block_sizes_are_refused_with_the_choices():
    with pytest.raises(SpecError, match=r"block_size=63 is not valid: choose one of \(32, 64"):
        QuantizeNf4(63)
