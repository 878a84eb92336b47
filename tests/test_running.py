"""`run`: an exported file answers by name, generates, and refuses what does not fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import VerificationError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

VOCAB = 61


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, gain):
        y = self.fc(x) * gain
        return {"y": y, "sum": y.sum(-1)}


def _x(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Any:
    torch.manual_seed(0)
    model, path = Pair(), tmp_path_factory.mktemp("pair") / "m.onnx"
    return model, lrcompile.export(model, path, {"x": _x(2), "gain": _x(2)[:, :1]}).path


def test_outputs_come_by_name_for_inputs_by_name_or_in_order(pair):
    model, path = pair
    session = lrcompile.run(path)
    x, gain = _x(5), _x(5)[:, :1]
    with torch.no_grad():
        expected = model(x, gain)
    for result in (
        session({"x": x, "gain": gain}),
        session(x=x, gain=gain),
        session((x, gain)),
        session(x=x.numpy(), gain=gain.tolist()),
    ):
        assert set(result) == {"y", "sum"}
        torch.testing.assert_close(result["y"], expected["y"], rtol=0, atol=16 * 2**-24 * 8)
    assert "m.onnx" in repr(session)


def test_the_session_runs_under_the_manifests_settings_and_the_threads_asked_for(pair):
    _, path = pair
    assert lrcompile.run(path).session["config"] == {"session.qdq_matmulnbits_accuracy_level": "0"}
    assert lrcompile.run(path, threads=2).session["threads"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s(x=_x(2)), "takes the inputs x, gain; given were x"),
        (lambda s: s(x=_x(2), gains=_x(2)), "given were x, gains"),
        (lambda s: s((_x(2),), gain=_x(2)), "choose one"),
        (lambda s: s(x=_x(2), gain="loud"), "no tensor"),
        (lambda s: s(x=_x(2)[:, :3], gain=_x(2)[:, :1]), "cannot run"),
        (lambda s: s.generate([[1, 2]]), "use_cache=True"),
    ],
)
def test_what_does_not_fit_says_what_would(pair, call, message):
    with pytest.raises(VerificationError, match=message):
        call(lrcompile.run(pair[1]))


def test_a_file_that_is_not_its_manifests_is_not_run(tmp_path, pair):
    model, _ = pair
    path = lrcompile.export(model, tmp_path / "m.onnx", {"x": _x(2), "gain": _x(2)[:, :1]}).path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(VerificationError, match=r"m\.onnx is not the file m\.manifest\.json describes"):
        lrcompile.run(path)
    with pytest.raises(VerificationError, match="no file"):
        lrcompile.run(tmp_path / "absent.onnx")
    with pytest.raises(VerificationError, match="ends in"):
        lrcompile.run(tmp_path / "m.manifest.json")


def test_a_link_stands_for_the_model_it_points_at_and_all_that_belongs_to_it(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    inputs, wide = {"input": torch.randn(2, 40)}, [nn.Linear(40, 500).eval() for _ in range(2)]  # beyond 64 KiB
    link = here / "latest.onnx"
    link.symlink_to(there / "v1.onnx")
    for model in wide:  # the second replaces the first
        exported = lrcompile.export(model, link, inputs)
        assert exported.path == there / "v1.onnx"
        assert [entry.name for entry in here.iterdir()] == ["latest.onnx"]
        assert len(list(there.iterdir())) == 3  # the model, its data and its manifest
        assert lrcompile.verify(model, link, inputs).ok
        assert torch.equal(lrcompile.run(link)(inputs)["output"], lrcompile.run(exported.path)(inputs)["output"])
    assert not lrcompile.verify(wide[0], link, inputs).ok


def test_a_link_to_a_name_without_the_suffix_is_read_as_it_stands_and_not_written(tmp_path, pair):
    blob, link = tmp_path / "0f3a", tmp_path / "m.onnx"
    blob.write_bytes(pair[1].read_bytes())
    link.symlink_to(blob)
    assert lrcompile.run(link)(_x(2), _x(2)[:, :1])["y"].shape == (2, 3)
    with pytest.raises(lrcompile.ExportError, match=r"is a link to .*0f3a.*remove it"):
        lrcompile.export(pair[0], link, (_x(2), _x(2)[:, :1]))
    assert blob.read_bytes() == pair[1].read_bytes()


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=48,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.5)
    path = tmp_path_factory.mktemp("talker") / "m.onnx"
    return model, lrcompile.export(model, path, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, use_cache=True).path


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def test_rows_end_at_their_own_end_token_and_are_padded_as_generate_does(talker):
    model, path = talker
    session, ids = lrcompile.run(path), _ids(4, 5)
    free = session.generate(ids, max_new_tokens=20, eos_token_id=())
    end = int(free[0, 8])  # a token that the first row comes to, and others perhaps later or never
    for options in ({"eos_token_id": end}, {"eos_token_id": [end, int(free[1, 6])]}, {}):
        theirs = model.generate(ids, do_sample=False, max_new_tokens=20, **options)
        assert torch.equal(session.generate(ids, max_new_tokens=20, **options), theirs)
    stopped = session.generate(ids[:1], max_new_tokens=20, eos_token_id=end)
    assert stopped.shape[1] <= 9 < free.shape[1]
    assert int(stopped[0, -1]) == end


def test_lists_and_arrays_are_prompts_too(talker):
    session, ids = lrcompile.run(talker[1]), _ids(2, 5)
    expected = session.generate(ids, max_new_tokens=4)
    assert torch.equal(session.generate(ids.tolist(), max_new_tokens=4), expected)
    assert torch.equal(session.generate(ids.numpy().astype(np.int32), max_new_tokens=4), expected)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2, 3], {}, r"\[batch, prompt\]"),
        ([[]], {}, "at least one token"),
        ([[1.5, 2.0]], {}, "integers"),
        ([[1, 2], [3]], {}, "no tensor"),
        ([[1, VOCAB]], {}, "tokens are 0 … 60"),
        ([[1, 2]], {"attention_mask": [[1, 0]]}, "pad on the left"),
        ([[1, 2]], {"attention_mask": [[1, 1, 1]]}, "a mask of that shape"),
        ([[1, 2]], {"max_new_tokens": 0}, "from 1"),
        ([[1, 2]], {"max_new_tokens": 47}, "context of 48"),
        ([[1, 2]], {"eos_token_id": "stop", "max_new_tokens": 4}, "a token's number"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(talker, ids, options, message):
    with pytest.raises(VerificationError, match=message):
        lrcompile.run(talker[1]).generate(ids, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 3},
        {"generation": {"vocab_size": "many"}},
        {"inputs": [{"name": "past_key_values.0.key", "dtype": "float32", "shape": ["batch", "heads", "past", 8]}]},
        {"inputs": [{"name": "past_key_values.0.key", "dtype": "load", "shape": ["batch", 2, "past", 8]}]},
        {"inputs": [{"name": "past_key_values.0.key", "dtype": "float32", "shape": ["batch", 2, "past", -8]}]},
        {"inputs": [{"name": "past_key_values.0.key", "dtype": "float32", "shape": ["batch", 3, "past", 8]}]},
        {"inputs": 7},
        {"inputs": []},
    ],
    ids=str,
)
def test_a_manifest_that_lies_about_the_cache_is_an_error_not_a_wrong_answer(tmp_path, talker, change):
    data = json.loads(talker[1].with_suffix(".manifest.json").read_text())
    for name in data["sha256"]:
        (tmp_path / name).write_bytes((talker[1].parent / name).read_bytes())
    (tmp_path / "m.manifest.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(VerificationError):
        lrcompile.run(tmp_path / "m.onnx").generate([[3, 4]])
