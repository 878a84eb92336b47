"""Adapters as inputs of an ONNX graph: swapped in one session of ONNX Runtime, each as its eager model computes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdapterError, ExportError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

from zoo.small import TOKENS, padded, sizes, small  # noqa: E402  (needs the packages above)

from lrcompile.interop import onnx_writing  # noqa: E402

IN, HIDDEN, OUT = 18, 23, 7
SITES = ["0", "3"]
X = (torch.randn(9, IN, generator=torch.Generator().manual_seed(1)),)


def _mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.3), nn.GELU(), nn.Linear(HIDDEN, OUT), nn.LayerNorm(OUT))


def _add(model: nn.Module, name: str, method: str = "lora", **fields: Any) -> nn.Module:
    """One more adapter, every tensor that trains moved off its start by numbers of the name's own."""
    lrcompile.apply(model, lrcompile.spec(method, **{"targets": SITES, **fields}), name=name)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _trio() -> Any:
    model = _add(_mlp(), "small", rank=4, bias="all")
    _add(model, "large", rank=16, alpha=16, scaling="alpha/sqrt(r)", rank_pattern={"3": 2}, alpha_pattern={"3": 9})
    return _add(model, "turned", "dora", rank=3, train_modules=["4"])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Any, Path, Any]:
    """A model with three adapters, and its graph."""
    model = _trio()
    exported = lrcompile.export(model, tmp_path_factory.mktemp("trio") / "m.onnx", X, adapters="inputs")
    return model, exported.path, exported


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """The same files where a test may change them."""
    for entry in made[1].parent.iterdir():
        (tmp_path / entry.name).write_bytes(entry.read_bytes())
    return tmp_path / "m.onnx"


def _eager(model: nn.Module, *names: str) -> torch.Tensor:
    lrcompile.activate(model, names) if names else None
    with torch.no_grad():
        if names:
            return model(*X)
        with lrcompile.disabled(model):
            return model(*X)


def _holds(model: nn.Module, path: Path, *names: str, inputs: Any = X) -> None:
    lrcompile.activate(model, names)
    verdict = lrcompile.verify(model, path, inputs)
    assert verdict.ok, verdict
    assert verdict.adapter_relative_error is None or verdict.adapter_relative_error < 1e-4


def _graph(path: Path) -> Any:
    return onnx.load(path).graph


def _bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_adapters_of_any_rank_are_swapped_in_one_session(made):
    model, path, _ = made
    session = lrcompile.run(path)
    assert session.adapters == ("small", "large", "turned")
    outputs = {name: session.run(X, name)["output"] for name in ("small", "large", "small", "turned")}
    for name, found in outputs.items():
        expected = _eager(model, name)
        assert (found - expected).abs().max() <= 16 * 2**-24 * HIDDEN * expected.abs().max()
        _holds(model, path, name)
    assert torch.equal(session.run(X)["output"], session.run(X, ())["output"])
    sizes = [outputs[name].std(0).sum() for name in outputs]
    assert len({float(size) for size in sizes}) == 3


def test_the_files_are_what_onnx_runtimes_own_adapter_api_takes(made):
    model, path, _ = made
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for name in ("small", "large", "turned"):
        adapter, run = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(path.with_name(f"m.{name}.onnx_adapter")))
        run.add_active_adapter(adapter)
        (found,) = session.run(None, {"input": X[0].numpy()}, run)
        np.testing.assert_allclose(found, _eager(model, name).numpy(), rtol=0, atol=1e-5)


def test_without_an_adapter_the_graph_computes_what_the_base_exports_to_bit_for_bit(made, tmp_path):
    frozen = lrcompile.export(_mlp().eval(), tmp_path / "base.onnx", X).path
    feed = {"input": X[0].numpy()}
    assert np.array_equal(_as_written(frozen, feed), _as_written(made[1], feed))
    with lrcompile.disabled(made[0]):
        assert lrcompile.verify(made[0], made[1], X).ok


def _as_written(path: Path, feed: dict[str, Any]) -> np.ndarray:
    """The first output without ONNX Runtime's fusions of a bias with what follows it, which round in another order."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def test_the_graph_has_an_input_with_a_default_for_each_part_and_no_number_of_any_adapter(made):
    model, path, exported = made
    graph = _graph(path)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {
        port.name: [size.dim_param or size.dim_value for size in port.type.tensor_type.shape.dim]
        for port in graph.input
    }
    pairs = {
        f"{site}.lora_{letter}.weight": [width, f"{site}.rank"] if letter == "A" else [f"{site}.rank", width]
        for site, widths in {"0": (IN, HIDDEN), "3": (HIDDEN, OUT)}.items()
        for letter, width in zip("AB", widths, strict=True)
    }
    gains = {"0.row_gain": [HIDDEN], "3.row_gain": [OUT]}
    full = {"0.bias": [HIDDEN], "3.bias": [OUT], "4.weight": [OUT], "4.bias": [OUT]}
    assert shapes == {"input": ["batch", IN], **pairs, **gains, **full}
    ports = {port["name"]: port["shape"] for port in exported.manifest["adapters"]["inputs"]}
    assert ports == {**pairs, **gains, **full}
    assert all(held[name].size == 0 for name in pairs)
    assert all((held[name] == 1).all() for name in gains)
    base = _mlp().state_dict()
    assert all(np.array_equal(held[name], base[name].numpy()) for name in full)
    written = b"".join(entry.read_bytes() for entry in path.parent.iterdir() if entry.suffix in (".onnx", ".data"))
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in ("A", "B"):
            assert tensor.numpy().tobytes()[:32] not in written
            assert tensor.T.contiguous().numpy().tobytes()[:32] not in written


def test_files_hold_the_scale_in_b_and_only_what_their_adapter_trained(made):
    model, path, exported = made
    held = {
        name: {key: value.numpy() for key, value in _parameters(path, name).items()}
        for name in ("small", "large", "turned")
    }
    set_of = model[3].lrcompile_adapters.weight
    np.testing.assert_allclose(held["large"]["3.lora_B.weight"], (9 / 2**0.5 * set_of["large"].B.T).detach(), rtol=1e-6)
    np.testing.assert_array_equal(held["small"]["3.lora_A.weight"], set_of["small"].A.detach().T)
    assert {name for name in held["small"] if "lora" not in name} == {"0.bias", "3.bias", "4.bias"}
    assert set(held["turned"]) - set(held["large"]) == {"0.row_gain", "3.row_gain", "4.weight", "4.bias"}
    said = exported.manifest["adapters"]["files"]
    assert said["large"]["sites"] == {"0": {"rank": 16, "scale": 4.0}, "3": {"rank": 2, "scale": 9 / 2**0.5}}
    assert said["turned"]["method"] == "dora"
    assert said["small"]["parameters"] == ["0.bias", "3.bias", "4.bias"]
    assert {entry.name for entry in path.parent.iterdir()} - {"m.manifest.json"} == set(exported.manifest["sha256"])


def _parameters(path: Path, name: str) -> dict[str, Any]:
    return ort.AdapterFormat.read_adapter(str(path.with_name(f"{path.stem}.{name}.onnx_adapter"))).get_parameters()


def test_the_model_is_left_exactly_as_it_was(tmp_path):
    model = _trio().train()
    _add(model, "folded", "pissa", rank=3, residual="fold")
    before, active = _bits(model), [module.training for module in model.modules()]
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs")
    after = _bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert active == [module.training for module in model.modules()]
    assert exported.verify().ok
    _holds(model, exported.path, "turned")


@pytest.mark.parametrize("quantize", [False, True])
def test_beside_nf4_weights_too(tmp_path, quantize):
    model = _mlp()
    if not quantize:
        lrcompile.quantize(model, "nf4", targets=SITES)
        _add(model, "turned", "dora", rank=3)
    _add(model, "plain", rank=5, train_modules=["4"])
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs", quantize="nf4" if quantize else None)
    assert exported.manifest["nf4"] == ["0", "3"][: 1 if quantize else 2] or quantize
    assert sum(node.op_type == "MatMulBnb4" for node in _graph(exported.path).node) == len(exported.manifest["nf4"]) > 0
    assert exported.verify().ok
    if not quantize:
        _holds(model, exported.path, "turned")


def test_weights_that_are_quantized_on_the_way_out_carry_no_gains_made_of_others(tmp_path):
    with pytest.raises(ExportError, match=r"turned.*function of the weights.*lrcompile\.quantize"):
        lrcompile.export(_trio(), tmp_path / "m.onnx", X, adapters="inputs", quantize="nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("bert", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_models_of_transformers_with_every_kind_of_adapter(tmp_path, family):
    model = small(family, layers=1)
    fields: dict[str, Any] = {"targets": "all-linear"}
    head: dict[str, Any] = {"train_modules": ["classifier"]} if family == "bert" else {}
    _add(model, "lora", rank=4, **fields, **head)
    _add(model, "dora", "dora", rank=2, **fields)
    _add(model, "rslora", "rslora", rank=16, **fields)
    _add(model, "vera", "vera", rank=24, **fields)
    path = lrcompile.export(model, tmp_path / "m.onnx", padded(2, 8), adapters="inputs").path
    for name in ("lora", "dora", "rslora", "vera"):
        _holds(model, path, name, inputs=padded(3, 5))
    frozen = lrcompile.export(small(family, layers=1), tmp_path / "base.onnx", padded(2, 8)).path
    feed = {name: value.numpy() for name, value in padded(5, 13).items()}
    assert np.array_equal(_as_written(path, feed), _as_written(frozen, feed))


def test_a_decoder_generates_the_tokens_of_the_adapter_it_is_given(tmp_path):
    """Each step binds its inputs; ONNX Runtime leaves active adapters out of such a run without a word."""
    model, ids = small("llama", layers=1), padded(2, 6)["input_ids"]
    _add(model, "lora", rank=4, targets="all-linear")
    _add(model, "dora", "dora", rank=2, targets="all-linear")
    exported = lrcompile.export(model, tmp_path / "m.onnx", {"input_ids": ids}, adapters="inputs", use_cache=True)
    session, tokens = lrcompile.run(exported.path), {}

    def generated() -> torch.Tensor:
        every = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
        return model.generate(ids, max_new_tokens=16, do_sample=False, **every)

    for name in ("lora", "dora"):
        lrcompile.activate(model, name)
        assert exported.verify().ok
        tokens[name] = generated()
        assert torch.equal(session.generate(ids, max_new_tokens=16, eos_token_id=(), adapters=name), tokens[name])
    with lrcompile.disabled(model):
        tokens["base"] = generated()
    assert torch.equal(session.generate(ids, max_new_tokens=16, eos_token_id=()), tokens["base"])
    assert len({tuple(each.flatten().tolist()) for each in tokens.values()}) == 3


@pytest.mark.slow
def test_adapters_of_experts_and_embeddings_are_inputs_too(tmp_path):
    config = transformers.MixtralConfig(**TOKENS, **sizes(1), num_key_value_heads=2, num_local_experts=4)
    model, ids = transformers.MixtralForCausalLM(config), {"input_ids": padded(2, 7)["input_ids"]}
    targets = ["gate_up_proj", "down_proj", "embed_tokens", "q_proj"]
    _add(model, "lora", rank=3, targets=targets)
    exported = lrcompile.export(model, tmp_path / "m.onnx", ids, adapters="inputs")
    shapes = {port["name"]: port["shape"] for port in exported.manifest["adapters"]["inputs"]}
    assert shapes["model.embed_tokens.lora_A.weight"] == [99, "model.embed_tokens.rank"]
    assert shapes["model.layers.0.mlp.experts.down_proj.lora_A.weight"][:2] == [4, 48]
    assert exported.verify().ok
    with lrcompile.disabled(model):
        assert exported.verify().ok


class Attention(nn.Module):
    """Both ways the packed projection is read: all its rows at once, and rows of its own for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x, z):
        return (self.attention(x, x, x)[0] + self.attention(x, z, z, need_weights=False)[0]) @ self.w


def test_packed_projections_and_raw_matrices_have_places_too(tmp_path):
    torch.manual_seed(0)
    model, given = Attention(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8))
    _add(model, "a", rank=3, targets=["in_proj_weight", "out_proj", "w"])
    exported = lrcompile.export(model, tmp_path / "m.onnx", given, adapters="inputs")
    assert exported.verify().ok
    assert {"w.lora_A.weight", "attention.in_proj_weight.lora_B.weight"} <= {
        port["name"] for port in exported.manifest["adapters"]["inputs"]
    }


class Half(nn.Module):
    """Only one of its maps is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = nn.Linear(IN, OUT), nn.Linear(IN, OUT)

    def forward(self, x):
        return self.used(x).tanh()


def test_parts_that_the_graph_does_not_compute_are_left_out_and_named(tmp_path):
    model = _add(Half(), "one", rank=2, targets=["used", "spare"], bias="all")
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs")
    assert exported.manifest["adapters"]["unread"] == ["spare.lora_A.weight", "spare.lora_B.weight", "spare.bias"]
    assert set(_parameters(exported.path, "one")) == {"used.lora_A.weight", "used.lora_B.weight", "used.bias"}
    assert exported.verify().ok
    _add(model, "two", rank=3, targets=["used", "spare"])
    lrcompile.export_adapter(model, exported.path, "two")
    _holds(model, exported.path, "two")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_inputs_have_the_dtype_their_site_computes_in_and_gains_keep_their_digits(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30)).to(dtype)
    _add(model, "a", "dora", rank=1, targets=["0", "2"])
    given = (torch.randn(4, 40).to(dtype),)
    exported = lrcompile.export(model, tmp_path / "m.onnx", given, adapters="inputs")
    ports = {port["name"]: port["dtype"] for port in exported.manifest["adapters"]["inputs"]}
    assert ports["0.lora_A.weight"] == str(dtype).removeprefix("torch.")
    assert ports["0.row_gain"] == ("float64" if dtype == torch.float64 else "float32")
    assert exported.verify().ok


def test_further_adapters_of_random_names_and_ranks_fit_the_graph_that_is_there(copied):
    """The graph was made with other adapters; these bring their own ranks, patterns, scales and trained biases."""
    base, drawn = _trio(), random.Random(0)
    letters = "abcXYZ019-_"
    for _ in range(8):
        name = drawn.choice("aZ7") + "".join(drawn.choices(letters, k=drawn.randrange(12)))
        fields: dict[str, Any] = {
            "rank": drawn.randint(1, 7), "alpha": drawn.choice([1, 3.5, 32]),
            "rank_pattern": {"0": drawn.randint(1, 9)},
            "alpha_pattern": {"3": drawn.randint(1, 9)}, "scaling": drawn.choice(["alpha/r", "alpha/sqrt(r)"]),
            "targets": drawn.choice([["0"], SITES, SITES]), "bias": drawn.choice(["none", "lora_only", "all"]),
        }  # fmt: skip
        if fields["targets"] == ["0"]:
            fields["alpha_pattern"] = {}
        _add(base, name, drawn.choice(["lora", "dora"]), **fields)
        file = lrcompile.export_adapter(base, copied, name)
        assert file == copied.with_name(f"m.{name}.onnx_adapter")
        _holds(base, copied, name)
    assert len(lrcompile.run(copied).adapters) == 11
    _holds(base, copied, "large")


def test_a_trained_on_adapter_replaces_its_file(copied):
    model = _trio()
    with torch.no_grad():
        model[3].lrcompile_adapters.weight["small"].B.mul_(-2)
    lrcompile.activate(model, "small")
    assert not lrcompile.verify(model, copied, X).ok
    lrcompile.export_adapter(model, copied, "small")
    _holds(model, copied, "small")


def _other(change: Any) -> Any:
    model = _mlp()
    with torch.no_grad():
        change(model)
    return _add(model, "new", rank=2)


REFUSED: dict[str, tuple[Any, str]] = {
    "another weight below an adapter": (
        lambda: _other(lambda m: m[3].weight.add_(1)), r"is not the base that m\.onnx.*weight of 3 has other values"
    ),
    "another weight elsewhere": (
        lambda: _other(lambda m: m[4].weight.add_(1)), r"weights at 0, 3 are the same, others"
    ),
    "a base stored otherwise": (
        lambda: _other(lambda m: lrcompile.quantize(m, "nf4", targets=["3"])), r"another form.*3 \(float32, here nf4\)"
    ),
    "a trained module the graph has no input for": (
        lambda: _add(_mlp(), "new", rank=2, train_modules=["0"], targets=["3"]), r"no input 0\.weight"
    ),
    "gains of inputs": (
        lambda: _add(_mlp(), "new", "ia3", feedforward=["3"]), r"no input 0\.output_gain, 3\.input_gain"
    ),
    "an update as large as its weight": (
        lambda: _add(_mlp(), "new", "hira", rank=2), r"hira.*cannot be an input.*W ⊙ BA"
    ),
    "a broken adapter": (
        lambda: _broken(_add(_mlp(), "new", rank=2)), r"'new' holds NaN or infinite values at 0\.lora_A\.weight"
    ),
}  # fmt: skip


def _broken(model: Any) -> Any:
    model[0].lrcompile_adapters.weight["new"].A.data[0, 0] = float("inf")
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_the_graph_is_refused_with_what_differs(copied, case):
    build, message = REFUSED[case]
    files = {entry: entry.read_bytes() for entry in copied.parent.iterdir()}
    with pytest.raises(ExportError, match=message):
        lrcompile.export_adapter(build(), copied, "new")
    assert {entry: entry.read_bytes() for entry in copied.parent.iterdir()} == files


def test_a_graph_without_places_or_manifest_takes_no_adapter(tmp_path, copied):
    model = _trio()
    lrcompile.activate(model, "large")
    folded = lrcompile.export(model, tmp_path / "folded.onnx", X).path
    with pytest.raises(AdapterError, match=r"takes no adapters.*adapters='inputs'"):
        lrcompile.export_adapter(model, folded, "large")
    with pytest.raises(AdapterError, match="takes no adapters"):
        lrcompile.run(folded, "large")
    assert set(lrcompile.run(folded).run({"input": X[0].numpy()})) == {"output"}
    with pytest.raises(AdapterError, match=r"'lrage'.*'small'"):
        lrcompile.export_adapter(model, copied, "lrage")
    with pytest.raises(ExportError, match=r"no \.onnx file.*nowhere"):
        lrcompile.export_adapter(model, tmp_path / "nowhere.onnx", "large")
    copied.with_suffix(".manifest.json").unlink()
    with pytest.raises(ExportError, match=r"no m\.manifest\.json"):
        lrcompile.export_adapter(model, copied, "large")


@pytest.mark.parametrize(
    ("build", "kw", "message"),
    [
        (_mlp, {}, r"no adapter.*lrcompile\.apply"),
        (lambda: _merged(_trio()), {}, r"'turned' is merged.*lrcompile\.unmerge"),
        (lambda: _add(_mlp(), "a", "hira", rank=2), {}, r"'a' \(hira\) at 0 cannot be an input.*'merge' or 'inline'"),
        (lambda: _add(_mlp(), "a", "galore", rank=2), {}, r"galore.*weight itself is what trains"),
        (_trio, {"into": "float32"}, "folds nothing"),
        (_trio, {"path": "m.pt2"}, r"\.onnx"),
    ],
)
def test_what_cannot_be_given_to_a_graph_is_refused_by_name(tmp_path, build, kw, message):
    model = build()
    before = _bits(model)
    path = tmp_path / kw.pop("path", "m.onnx")
    with pytest.raises(ExportError, match=message):
        lrcompile.export(model, path, X, adapters="inputs", **kw)
    after = _bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.iterdir()) == []


def _merged(model: Any) -> Any:
    lrcompile.merge(model)
    return model


def test_an_adapter_that_has_written_the_base_is_refused(tmp_path):
    from zoo.every_method import trained

    model = trained("plora")
    with pytest.raises(ExportError, match=r"plora.*has written base weights \(blocks\.0\.up\.weight"):
        lrcompile.export(model, tmp_path / "m.onnx", {"x": torch.randn(4, 12)}, adapters="inputs")


def test_a_weight_of_activate_is_part_of_the_file_and_noticed_where_it_differs(tmp_path):
    model = _add(_mlp(), "a", rank=2)
    lrcompile.activate(model, {"a": 0.25})
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs")
    assert exported.manifest["adapters"]["files"]["a"]["weight"] == 0.25
    assert exported.verify().ok
    lrcompile.activate(model, "a")
    with pytest.raises(AdapterError, match=r"weight 1\.0.*has 0\.25.*export_adapter"):
        exported.verify()
    lrcompile.export_adapter(model, exported.path)
    assert exported.verify().ok


def test_an_inactive_adapter_leaves_with_weight_one_whatever_it_remembers(tmp_path):
    model = _add(_add(_mlp(), "a", rank=2), "b", "dora", rank=2)
    lrcompile.activate(model, {"a": 0.25})
    lrcompile.activate(model, {"b": 0.25})
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs")
    assert exported.verify().ok
    _holds(model, exported.path, "a")


def test_two_adapters_act_together_only_where_they_do_not_meet(tmp_path):
    model = _add(_mlp(), "first", rank=2, targets=["0"])
    _add(model, "second", rank=3, targets=["3"])
    _add(model, "both", rank=1)
    exported = lrcompile.export(model, tmp_path / "m.onnx", X, adapters="inputs")
    _holds(model, exported.path, "first", "second")
    lrcompile.activate(model, ["first", "both"])
    with pytest.raises(AdapterError, match="'first' and 'both' both act at 0"):
        exported.verify()


def test_verify_says_which_file_is_missing_where_the_model_has_another_adapter(copied):
    model = _add(_trio(), "later", rank=2)
    with pytest.raises(AdapterError, match=r"no adapter 'later'; it has 'small', 'large', 'turned'.*export_adapter"):
        lrcompile.verify(model, copied, X)
    lrcompile.activate(model, "small")
    assert lrcompile.verify(model, lrcompile.run(copied, "small"), X).ok
    assert not lrcompile.verify(model, lrcompile.run(copied, "large"), X).ok


def test_a_divergence_is_found_with_the_adapter_active(copied):
    model = _trio()
    lrcompile.activate(model, "small")
    with torch.no_grad():
        model[3].lrcompile_adapters.weight["small"].B.mul_(-2)
    verdict = lrcompile.verify(model, copied, X)
    assert not verdict.ok
    assert verdict.first_divergence == "3"


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["adapter", "manifest"])
def test_a_failure_leaves_files_and_model_as_they_were(copied, monkeypatch, raised, place):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    model = _trio()
    before, files = _bits(model), {entry: entry.read_bytes() for entry in copied.parent.iterdir()}
    if place == "adapter":
        monkeypatch.setattr("lrcompile.interop.onnx_adapters.write_adapter", fail)
    else:
        monkeypatch.setattr("lrcompile.deployment.exchanging.encoded", fail)
    error = KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else ExportError
    with pytest.raises(error):
        lrcompile.export(model, copied, X, adapters="inputs", opset=21)
    with pytest.raises(error):
        lrcompile.export_adapter(model, copied, "large")
    assert {entry: entry.read_bytes() for entry in copied.parent.iterdir()} == files
    after = _bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_written_through_a_link_lies_beside_the_graph(copied, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.onnx"
    link.symlink_to(copied)
    model = _add(_mlp(), "later", rank=5)
    assert lrcompile.export_adapter(model, link) == copied.with_name("m.later.onnx_adapter")
    found = lrcompile.run(link).run(X, "later")["output"]
    torch.testing.assert_close(found, _eager(model, "later"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_method_is_swappable_or_refused_by_name(tmp_path):
    from zoo.every_method import METHODS, batches, trained

    given, refused = {"x": batches(1)[0]["x"]}, set()
    for method in METHODS:
        model = trained(method).eval()
        before = _bits(model)
        try:
            exported = lrcompile.export(model, tmp_path / f"{method}.onnx", given, adapters="inputs")
        except ExportError as error:
            refused.add(method if method in str(error) else str(error))
        else:
            verdict = exported.verify()
            assert verdict.ok, (method, verdict)
            with lrcompile.disabled(model):
                assert exported.verify().ok, method
        after = _bits(model)
        assert all(torch.equal(before[name], after[name]) for name in before), method
    assert refused == {"hira", "galore", "q-galore", "plora"}


def test_a_manifest_says_what_the_graph_is_given_in_plain_json(made):
    data = json.loads(made[1].with_suffix(".manifest.json").read_text())
    assert data == made[2].manifest
    assert data["adapters"]["form"] == "inputs"
    assert set(data["adapters"]["base"]["sites"]) == set(SITES)
    assert onnx_writing.sha256(made[1]) == data["sha256"]["m.onnx"]
