"""`export`: one file that computes what the model does, whatever its adapters, and a model left as it was."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import ExportError, MissingDependencyError
from lrcompile.nf4.modules import codes_of

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from zoo.small import padded, small  # noqa: E402  (needs the packages above)

IN, HIDDEN, OUT, RANK = 10, 23, 7, 3


def _mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.3), nn.GELU(), nn.Linear(HIDDEN, OUT))


def _adapted(model: nn.Module, **fields) -> Any:
    """With an adapter whose update is of the size of the weights, in training mode."""
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, **fields))
    for name, parameter in model.named_parameters():
        if "lrcompile_adapters" in name and name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def _x(rows: int) -> torch.Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows))


def _state(model: nn.Module) -> dict:
    return {
        "bits": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "classes": [type(module) for module in model.modules()],
        "addresses": [parameter.data_ptr() for parameter in model.parameters()],
    }


def _same(before: dict, after: dict) -> bool:
    bits = before.pop("bits"), after.pop("bits")
    return (
        before == after
        and bits[0].keys() == bits[1].keys()
        and all(torch.equal(bits[0][k], bits[1][k]) for k in bits[0])
    )


def _run(path, **feed) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feed.items()})[0]


def _ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def _held(path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("kw", "products", "inline"),
    [
        ({}, {"Gemm": 2}, []),
        ({"adapters": "inline"}, {"Gemm": 6}, ["0", "3"]),
        ({"quantize": "nf4"}, {"MatMulBnb4": 2, "Gemm": 4}, ["0", "3"]),
        ({"quantize": "nf4", "adapters": "merge"}, {"MatMulBnb4": 2}, []),
    ],
)
def test_every_form_of_a_float_model_verifies_and_leaves_the_model_alone(tmp_path, kw, products, inline):
    model = _adapted(_mlp(), targets=["0", "3"])
    before = _state(model)
    exported = lrcompile.export(model, tmp_path / "m.onnx", (_x(1),), **kw)
    assert _same(before, _state(model))
    verdict = exported.verify((_x(9),))
    assert verdict.ok, verdict
    assert verdict.adapter_relative_error is None or verdict.adapter_relative_error < 1e-5
    operators = _ops(exported.path)
    assert {name: operators.count(name) for name in products} == products
    assert list(exported.manifest["adapters"]["inline"]) == inline
    assert exported.verify().ok  # on the example inputs, whose single row was not baked in


def test_merged_and_inline_agree_within_float32(tmp_path):
    model = _adapted(_mlp(), targets=["0", "3"])
    paths = [
        lrcompile.export(model, tmp_path / f"{form}.onnx", (_x(4),), adapters=form).path for form in ("merge", "inline")
    ]
    one, other = (_run(path, input=_x(8)) for path in paths)
    assert np.abs(one - other).max() <= 16 * 2**-24 * (HIDDEN + RANK) * np.abs(one).max()
    assert not np.array_equal(one, _run(lrcompile.export(_mlp(), tmp_path / "b.onnx", (_x(4),)).path, input=_x(8)))


def test_a_model_merged_before_exports_as_it_is(tmp_path):
    model = _adapted(_mlp(), targets=["0", "3"])
    folded = _held(lrcompile.export(model, tmp_path / "a.onnx", (_x(4),)).path)
    lrcompile.merge(model)
    exported = lrcompile.export(model, tmp_path / "m.onnx", (_x(4),))
    assert exported.manifest["adapters"] == {"form": "merge", "folded": [], "inline": {}}
    merged = _held(exported.path)
    assert merged.keys() == folded.keys()
    assert all(np.array_equal(merged[name], folded[name]) for name in merged)
    assert exported.verify().ok


@pytest.fixture
def on_nf4() -> Any:
    model = _mlp()
    lrcompile.quantize(model, "nf4", targets=["0", "3"])
    return _adapted(model, targets=["0", "3"])


def test_on_an_nf4_base_pairs_stay_beside_codes_that_are_bit_identical(tmp_path, on_nf4):
    before = _state(on_nf4)
    exported = lrcompile.export(on_nf4, tmp_path / "m.onnx", (_x(4),))
    assert _same(before, _state(on_nf4))
    assert exported.manifest["adapters"]["form"] == "inline"
    assert exported.manifest["nf4"] == ["0", "3"]
    held = _held(exported.path)
    for site in ("0", "3"):
        assert np.array_equal(held[f"{site}.weight_codes"], codes_of(on_nf4.get_submodule(site))[0].numpy())
    assert exported.verify((_x(9),)).ok


@pytest.mark.parametrize("into", ["float32", "bfloat16"])
def test_merging_on_an_nf4_base_needs_a_dtype_and_then_folds(tmp_path, on_nf4, into):
    with pytest.raises(ExportError, match=r"adapters='inline'(.|\n)*into='float32'"):
        lrcompile.export(on_nf4, tmp_path / "m.onnx", (_x(4),), adapters="merge")
    assert list(tmp_path.iterdir()) == []
    exported = lrcompile.export(on_nf4, tmp_path / "m.onnx", (_x(4),), adapters="merge", into=into)
    assert exported.manifest["nf4"] == []
    verdict = exported.verify((_x(9),))
    assert verdict.ok, verdict
    assert verdict.limits.bound_ratio == {"float32": 16, "bfloat16": 16 * 2**16}[into]


def test_quantizing_the_copy_gives_the_codes_of_quantizing_the_model(tmp_path):
    model, twin = _mlp(), _mlp()
    first = lrcompile.export(model, tmp_path / "a.onnx", (_x(4),), quantize="nf4")
    lrcompile.quantize(twin, "nf4")
    second = lrcompile.export(twin, tmp_path / "b.onnx", (_x(4),))
    one, other = _held(first.path), _held(second.path)
    assert first.manifest["nf4"] == second.manifest["nf4"]
    assert all(
        np.array_equal(one[f"{site}.weight_codes"], other[f"{site}.weight_codes"]) for site in first.manifest["nf4"]
    )
    assert np.array_equal(_run(first.path, input=_x(5)), _run(second.path, input=_x(5)))


def test_a_layer_called_twice_is_quantized_once_and_a_shared_one_not_at_all(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(IN, IN), nn.Linear(IN, OUT)
            self.table = nn.Embedding(OUT, IN)
            self.tied = nn.Linear(IN, OUT)
            self.tied.weight = self.table.weight

        def forward(self, x):
            y = self.step(self.step(x).tanh()).tanh()
            return self.out(y) + self.tied(y) + self.table(torch.zeros(1, dtype=torch.long)).sum()

    exported = lrcompile.export(Recurrent(), tmp_path / "m.onnx", (_x(4),), quantize="nf4")
    assert exported.manifest["nf4"] == ["step", "out"]
    assert _ops(exported.path).count("MatMulBnb4") == 3
    assert exported.verify((_x(9),)).ok


class Awkward(nn.Module):
    """Uses what a linear map returns a second time, as only the unadapted map would."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.odd = nn.Linear(IN, IN), nn.Linear(IN, IN)
        self.A, self.B = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(IN, RANK))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        y = self.odd(self.plain(x))
        return y + torch.ops.lrcompile.lora(y, x, self.A, self.B, self.scale, 0.0)


def test_what_cannot_be_folded_is_kept_by_auto_and_named_by_merge(tmp_path):
    model = Awkward()
    with pytest.raises(ExportError, match=r"cannot fold.*second time.*adapters='inline'"):
        lrcompile.export(model, tmp_path / "m.onnx", (_x(4),), adapters="merge")
    exported = lrcompile.export(model, tmp_path / "m.onnx", (_x(4),))
    assert list(exported.manifest["adapters"]["inline"]) != []
    assert exported.verify((_x(9),)).ok


def test_the_manifest_says_what_the_file_is(tmp_path):
    model = nn.Sequential(nn.Linear(IN, 2000))
    exported = lrcompile.export(model, tmp_path / "m.onnx", (_x(4),))
    data = json.loads((tmp_path / "m.manifest.json").read_text())
    assert data == exported.manifest
    assert (data["schema"], data["format"], data["opset"], data["ir_version"]) == (1, "onnx", 20, 10)
    assert data["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", IN]}]
    assert data["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 2000]}]
    assert data["dimensions"] == {"batch": None}
    assert {"torch", "onnx", "onnxruntime", "onnxscript", "lrcompile"} <= set(data["versions"])
    assert set(data["sha256"]) == {entry.name for entry in tmp_path.iterdir()} - {"m.manifest.json"}
    assert len(data["sha256"]) == 2
    assert data["limits_reason"]
    (tmp_path / next(name for name in data["sha256"] if name.endswith(".data"))).touch()
    assert exported.verify().ok


def test_a_changed_file_does_not_verify(tmp_path):
    exported = lrcompile.export(_mlp(), tmp_path / "m.onnx", (_x(4),))
    other = lrcompile.export(_mlp(), tmp_path / "n.onnx", (_x(4),), opset=18)
    exported.path.write_bytes(other.path.read_bytes())
    assert not exported.verify().ok


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("bert", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_transformers_models_export_with_their_names_and_any_batch_and_length(tmp_path, family):
    model = _adapted(small(family, layers=2))
    before = _state(model)
    exported = lrcompile.export(model, tmp_path / "m.onnx", padded(1, 8))
    assert _same(before, _state(model))
    assert model.config.to_dict() == small(family, layers=2).config.to_dict()
    assert [port["name"] for port in exported.manifest["inputs"]] == ["input_ids", "attention_mask"]
    assert [port["name"] for port in exported.manifest["outputs"]] == ["logits"]
    assert exported.manifest["adapters"]["inline"] == {}
    assert len(exported.manifest["adapters"]["folded"]) >= 8
    for shape in ((1, 1), (3, 8), (5, 13)):
        verdict = exported.verify(padded(*shape))
        assert verdict.ok, verdict


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merge", "inline"])
def test_adapters_of_experts_are_folded_into_the_stack_or_stay_beside_it(tmp_path, form):
    config = transformers.MixtralConfig(
        vocab_size=99, num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = _adapted(transformers.MixtralForCausalLM(config), targets=["gate_up_proj", "down_proj", "q_proj"])
    ids = {"input_ids": padded(2, 7)["input_ids"]}
    exported = lrcompile.export(model, tmp_path / "m.onnx", ids, adapters=form)
    sites = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    sites.add("model.layers.0.self_attn.q_proj")
    kept, folded = (set(exported.manifest["adapters"][name]) for name in ("inline", "folded"))
    assert (folded, kept) == ((sites, set()) if form == "merge" else (set(), sites))
    verdict = exported.verify({"input_ids": padded(3, 9)["input_ids"]})
    assert verdict.ok, verdict
    assert verdict.adapter_relative_error is not None
    assert verdict.adapter_relative_error < 1e-5


@pytest.mark.slow
def test_caches_and_experts_are_set_aside_only_while_exporting(tmp_path):
    sizes = {"vocab_size": 99, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **sizes, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4,
        )
    )  # fmt: skip
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    ids = padded(2, 7)["input_ids"]
    for model, inputs in (
        (mixture, {"input_ids": ids}),
        (encoder_decoder, {"input_ids": ids, "decoder_input_ids": ids}),
    ):
        before = dict(model.config.__dict__)
        exported = lrcompile.export(_adapted(model), tmp_path / "m.onnx", inputs)
        assert exported.manifest["outputs"][0]["name"] == "logits"
        assert exported.verify().ok
        assert model.config.__dict__ == before
        assert model.config.use_cache


def test_labels_that_are_the_inputs_stay_an_input_of_their_own(tmp_path):
    class Agreement(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(99, 16)

        def forward(self, input_ids, labels):
            logits = self.table(input_ids) @ self.table.weight.t()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    model, ids = Agreement(), padded(2, 6)["input_ids"]
    exported = lrcompile.export(model, tmp_path / "m.onnx", {"input_ids": ids, "labels": ids})
    labels = (ids + 7) % 99
    with torch.no_grad():
        expected = model(ids, labels)["loss"].item()
        merged = model(ids, ids)["loss"].item()
    loss = float(_run(exported.path, input_ids=ids, labels=labels))
    assert abs(loss - expected) < 1e-5 < abs(loss - merged)


@pytest.mark.parametrize(
    ("path", "kw", "message"),
    [
        ("m.bin", {}, r"\.onnx and \.pt2"),
        ("m", {}, r"\.onnx and \.pt2"),
        ("m.pt2", {"adapters": "inputs"}, r"adapters='inputs' is for \.onnx"),
        ("m.onnx", {"adapters": "merged"}, "'auto', 'merge', 'inline', 'inputs'"),
        ("m.onnx", {"into": "float32"}, "no NF4 weights"),
        ("m.onnx", {"into": "int8"}, "'float32', 'bfloat16', 'float16'"),
        ("m.onnx", {"quantize": "int4"}, "'nf4'"),
        ("m.onnx", {"opset": 99}, "from 18 to 25"),
        ("m.pt2", {"opset": 20}, "opset=20 is for .onnx"),
        ("nowhere/m.onnx", {}, "nowhere.* does not exist"),
        ("m.onnx", {"dynamic_shapes": "frozen"}, "'static'"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, path, kw, message):
    model = _adapted(_mlp(), targets=["0"])
    before = _state(model)
    with pytest.raises(ExportError, match=message):
        lrcompile.export(model, tmp_path / path, (_x(4),), **kw)
    assert _same(before, _state(model))
    assert list(tmp_path.iterdir()) == []


def test_quantizing_what_is_quantized_is_refused(tmp_path, on_nf4):
    with pytest.raises(ExportError, match="NF4 weights are in the model already"):
        lrcompile.export(on_nf4, tmp_path / "m.onnx", (_x(4),), quantize="nf4")


def test_a_missing_package_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model = _mlp()
    model.forward = lambda x: pytest.fail("the model ran")
    with pytest.raises(MissingDependencyError, match=r"lrcompile\[onnx\]"):
        lrcompile.export(model, tmp_path / "m.onnx", (_x(4),))


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_files_and_model_as_they_were(tmp_path, monkeypatch, raised):
    from lrcompile.interop import onnx_writing

    def fail(*args, **kwargs):
        raise raised

    model = _adapted(_mlp(), targets=["0"])
    lrcompile.export(model, tmp_path / "m.onnx", (_x(4),))
    files, before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}, _state(model)
    monkeypatch.setattr(onnx_writing, "_serialized", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else ExportError):
        lrcompile.export(model, tmp_path / "m.onnx", (_x(4),), adapters="inline")
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == files
    assert _same(before, _state(model))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_an_aotinductor_package_computes_the_same(tmp_path, on_nf4, quantized):
    model = on_nf4 if quantized else _adapted(_mlp(), targets=["0", "3"])
    before = _state(model)
    exported = lrcompile.export(model, tmp_path / "m.pt2", (_x(1),))
    assert _same(before, _state(model))
    assert exported.verify((_x(9),)).ok
    assert json.loads((tmp_path / "m.pt2.manifest.json").read_text())["format"] == "pt2"


def test_an_export_is_frozen_and_keeps_the_callers_model(tmp_path):
    model = _mlp()
    exported = lrcompile.export(model, str(tmp_path / "m.onnx"), (_x(4),))
    with pytest.raises(AttributeError):
        exported.path = tmp_path  # type: ignore[misc]
    assert repr(exported).count("Sequential") == 0
    drifted = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.add_(0.1)
    assert not exported.verify().ok  # it is held against the model as it is now
    model.load_state_dict(drifted)
    assert exported.verify().ok


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_keyword_inputs_keep_their_names_in_whatever_order_they_are_given(tmp_path, order):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(IN, OUT)

        def forward(self, a, b):
            return self.map(a) - 2 * self.map(b)

    given = {"a": _x(4), "b": _x(4) + 1}
    exported = lrcompile.export(Two(), tmp_path / "m.onnx", {name: given[name] for name in order})
    assert [port["name"] for port in exported.manifest["inputs"]] == ["a", "b"]
    assert exported.verify().ok
    assert exported.verify({"b": _x(3), "a": _x(3) - 1}).ok
