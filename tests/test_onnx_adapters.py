"""`.onnx_adapter` files are checked for what ONNX Runtime takes on trust."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdapterError, LrcompileError, VerificationError

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lrcompile.interop.onnx_adapters import model_version, write_adapter  # noqa: E402  (needs the packages above)
from lrcompile.verifying.manifest import sha256  # noqa: E402

IN, OUT = 9, 5
X = (torch.randn(4, IN, generator=torch.Generator().manual_seed(1)),)
Arrays = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A graph with the adapters `one` and `two` of one site, `far` of another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT))
    for name, site in (("one", "0"), ("two", "0"), ("far", "1")):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=[site]), name=name)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("written") / "m.onnx"
    lrcompile.export(model, path, X, adapters="inputs")
    return path


@pytest.fixture
def path(written, tmp_path) -> Path:
    for entry in written.parent.iterdir():
        (tmp_path / entry.name).write_bytes(entry.read_bytes())
    return tmp_path / "m.onnx"


def _file(path: Path, name: str = "one") -> Path:
    return path.with_name(f"m.{name}.onnx_adapter")


def _arrays(path: Path, name: str = "one") -> Arrays:
    held = ort.AdapterFormat.read_adapter(str(_file(path, name))).get_parameters()
    return {key: torch.from_numpy(value.numpy().copy()) for key, value in held.items()}


def _manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path.with_suffix(".manifest.json")
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def _forged(path: Path, arrays: Arrays, digest: str | None = None) -> None:
    """Another content for `one`, which the manifest vouches for."""
    write_adapter(_file(path), digest or sha256(path), arrays)
    _vouch(path)


def _vouch(path: Path) -> None:
    _manifest(path, lambda data: data["sha256"].update({_file(path).name: sha256(_file(path))}))


def test_an_adapter_runs_with_its_numbers(path):
    arrays = _arrays(path)
    session = lrcompile.run(path)
    change = session.run(X, "one")["output"] - session.run(X)["output"]
    expected = X[0] @ arrays["0.lora_A.weight"] @ arrays["0.lora_B.weight"] @ _weights(path)["1.weight"].T
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def _weights(path: Path) -> Arrays:
    import onnx

    return {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(path).graph.initializer}


def test_an_adapter_says_which_graph_it_is_for(path):
    held = ort.AdapterFormat.read_adapter(str(_file(path)))
    assert held.get_model_version() == model_version(sha256(path)) < 2**31


FORGED: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "half a pair": (lambda a: {k: v for k, v in a.items() if "_A" in k}, r"lora_A\.weight.*without 0\.lora_B\.weight"),
    "ranks that differ": (
        lambda a: {**a, "0.lora_B.weight": torch.ones(3, OUT)}, r"0\.lora_(A|B).* has rank \d and 0\.lora_(A|B).* rank"
    ),
    "another dtype": (lambda a: {k: v.double() for k, v in a.items()}, r"is float64, the graph takes float32"),
    "another shape": (
        lambda a: {**a, "0.lora_A.weight": torch.ones(IN + 1, 2)}, r"is \[10, 2\], the graph takes \[9, '0\.rank'\]"
    ),
    "another number of dimensions": (lambda a: {**a, "0.lora_A.weight": torch.ones(IN)}, r"is \[9\], the graph takes"),
    "turned the other way": (lambda a: {k: v.T for k, v in a.items()}, r"is \[2, 9\], the graph takes \[9, "),
    "an input there is not": (lambda a: {**a, "7.lora_A.weight": torch.ones(2, 2)}, r"no input 7\.lora_A\.weight"),
    "an infinite number": (lambda a: {k: v / 0 for k, v in a.items()}, "NaN or infinite"),
    "a number that is none": (lambda a: {k: v * float("nan") for k, v in a.items()}, "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_file_that_does_not_fit_is_refused_although_the_manifest_vouches_for_it(path, case):
    change, message = FORGED[case]
    _forged(path, change(_arrays(path)))
    session = lrcompile.run(path)
    with pytest.raises(AdapterError, match=rf"m\.one\.onnx_adapter does not fit m\.onnx: .*{message}"):
        session.run(X, "one")
    assert session.run(X, "two")["output"].isfinite().all()


def test_an_adapter_of_another_graph_is_refused(path):
    _forged(path, _arrays(path), "0" * 64)
    with pytest.raises(AdapterError, match="another graph"):
        lrcompile.run(path, "one")


def test_what_fits_and_is_vouched_for_is_taken_whatever_its_rank(path):
    for rank in (1, 5, 40):
        _forged(path, {"0.lora_A.weight": torch.ones(IN, rank), "0.lora_B.weight": torch.ones(rank, OUT) / rank})
        session = lrcompile.run(path)
        change = (session.run(X, "one")["output"] - session.run(X)["output"]) @ torch.linalg.pinv(
            _weights(path)["1.weight"].T
        )
        torch.testing.assert_close(change, X[0].sum(1, keepdim=True).expand(4, OUT), rtol=1e-3, atol=1e-3)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "wrong magic": lambda raw: raw.replace(b"TORT", b"TROT"),
    "not an adapter": lambda raw: b"{}" * 200,
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("vouched", [True, False])
def test_a_damaged_file_is_refused(path, case, vouched):
    raw = _file(path).read_bytes()
    assert DAMAGED[case](raw) != raw
    _file(path).write_bytes(DAMAGED[case](raw))
    if vouched:
        _vouch(path)
    with pytest.raises(AdapterError, match="no adapter that ONNX Runtime reads" if vouched else "sha256 differs"):
        lrcompile.run(path, "one")


def test_files_that_changed_places_or_are_gone_are_refused(path):
    one, two = _file(path).read_bytes(), _file(path, "two").read_bytes()
    _file(path).write_bytes(two)
    _file(path, "two").write_bytes(one)
    with pytest.raises(AdapterError, match="sha256 differs"):
        lrcompile.run(path).run(X, "two")
    _file(path).unlink()
    with pytest.raises(AdapterError, match="missing"):
        lrcompile.run(path).run(X, "one")
    with pytest.raises(AdapterError, match="no adapter 'three'; it has 'one', 'two', 'far'"):
        lrcompile.run(path).run(X, "three")


def test_two_adapters_of_one_site_are_refused_where_the_runtime_would_take_the_first(path):
    session = lrcompile.run(path)
    with pytest.raises(AdapterError, match="'one' and 'two' both act at 0: ONNX Runtime would take the first"):
        session.run(X, ["one", "two"])
    one, far, both = (session.run(X, names)["output"] for names in ("one", "far", ["one", "far"]))
    assert not torch.equal(both, one)
    assert not torch.equal(both, far)


def test_an_input_of_an_adapter_cannot_be_fed_beside_it(path):
    session = lrcompile.run(path)
    for adapters in ("one", ()):
        with pytest.raises(VerificationError, match=r"takes the inputs input; given were input, 0\.lora_A\.weight"):
            session.run({"input": X[0], "0.lora_A.weight": torch.zeros(IN, 1)}, adapters)


@pytest.mark.parametrize(
    ("given", "adapters", "message"),
    [
        ({"inptu": X[0]}, "one", "takes the inputs input; given were inptu"),
        (X, "oen", r"no adapter 'oen'; it has 'one', 'two', 'far'"),
        (X, 7, "expected the name of one or several names"),
        (X, {"one": 0.5}, r"weight is part of an adapter's file"),
        (X, [None], "no adapter None"),
        ((X[0][:, :3],), "one", "ONNX Runtime cannot run"),
        ((X[0].long(),), "one", "ONNX Runtime cannot run"),
    ],
)
def test_what_a_session_is_given_wrongly_is_said(path, given, adapters, message):
    with pytest.raises(LrcompileError, match=message):
        lrcompile.run(path).run(given, adapters)


def test_arrays_tuples_and_names_are_all_inputs(path):
    session = lrcompile.run(path, "one")
    outputs = [session.run(given)["output"] for given in (X, {"input": X[0]}, {"input": X[0].numpy()}, (X[0].numpy(),))]
    assert all(torch.equal(each, outputs[0]) for each in outputs)
    assert session.session["adapters"] == ["one"]
    assert session.session["adapters"] == ["one"]


def test_a_graph_that_is_not_the_one_described_is_refused(path):
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw + b"\0")
    with pytest.raises(VerificationError, match="not the file"):
        lrcompile.run(path)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no inputs": lambda data: data["adapters"].pop("inputs"),
    "inputs that are no list": lambda data: data["adapters"].update(inputs=7),
    "a negative size": lambda data: data["adapters"]["inputs"][0].update(shape=[-1, "r"]),
    "a file elsewhere": lambda data: data["adapters"]["files"]["one"].update(file="../m.one.onnx_adapter"),
    "a name that is a path": lambda data: data["adapters"]["files"].update(
        {"../one": {**data["adapters"]["files"]["one"], "file": "m.../one.onnx_adapter"}}
    ),
    "an entry that is none": lambda data: data["adapters"]["files"].update(one=None),
    "hashes that are none": lambda data: data["sha256"].update({"m.one.onnx_adapter": 1}),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_of_another_form_is_refused(path, case):
    _manifest(path, MANIFESTS[case])
    with pytest.raises(LrcompileError, match=r"m\.onnx|manifest"):
        lrcompile.run(path, "one")


def _mutated(raw: bytes, drawn: random.Random) -> bytes:
    made = bytearray(raw)
    for _ in range(drawn.choice((1, 1, 2, 5))):
        made[drawn.randrange(len(made))] = drawn.randrange(256)
    return bytes(made[: drawn.randrange(len(made))] if drawn.random() < 0.2 else made)


def test_four_hundred_mutated_adapters_are_refused_or_run_with_the_numbers_they_hold(path):
    """Even those that the manifest vouches for: the reader of ONNX Runtime holds, and what it reads is looked at."""
    raw, drawn, taken = _file(path).read_bytes(), random.Random(0), 0
    for _ in range(400):
        _file(path).write_bytes(_mutated(raw, drawn))
        _vouch(path)
        try:
            output = lrcompile.run(path).run(X, "one")["output"]
        except LrcompileError:
            continue
        taken += 1
        arrays = _arrays(path)
        assert all(bool(value.isfinite().all()) for value in arrays.values())
        assert output.shape == (4, OUT)
    assert 0 < taken < 200


def test_three_hundred_mutated_manifests_are_refused_or_change_nothing(path):
    file = path.with_suffix(".manifest.json")
    raw, drawn, expected = file.read_bytes(), random.Random(0), lrcompile.run(path).run(X, "one")["output"]
    for _ in range(300):
        file.write_bytes(_mutated(raw, drawn))
        try:
            output = lrcompile.run(path).run(X, "one")["output"]
        except LrcompileError:
            continue
        assert torch.equal(output, expected)
