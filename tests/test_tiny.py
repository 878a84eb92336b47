"""The whole line in a few seconds: apply, train, save, load, merge, quantize, export, verify. Run this first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile


class Classifier(nn.Module):
    """Odd sizes; an embedding, a raw matrix and two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(13, 34), nn.Parameter(torch.randn(34, 34) / 6)
        self.up, self.down = nn.Linear(34, 66), nn.Linear(66, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mean(1)
        return self.down(torch.tanh(self.up(x + x @ self.mix)))


SPEC = lrcompile.spec("lora", rank=3, alpha=8, targets=["embed", "mix", "up", "down"], seed=0)


def data() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 13, (48, 5), generator=torch.Generator().manual_seed(0))
    return ids, ids.sum(1) % 3


def trained(spec: lrcompile.Spec = SPEC) -> Any:
    torch.manual_seed(0)
    ids, labels = data()
    model: Any = lrcompile.apply(Classifier(), spec, example_inputs=(ids,))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return trained()


def test_training_changes_the_outputs_and_not_the_base(model):
    torch.manual_seed(0)
    base, ids = Classifier(), data()[0]
    assert not torch.allclose(model(ids), base(ids))
    with lrcompile.disabled(model):
        assert torch.equal(model(ids), base(ids))


def test_it_merges_and_unmerges(model):
    ids = data()[0]
    y = model(ids)
    report = lrcompile.merge(model)
    assert report.adapter_relative_error < 1e-5
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    lrcompile.unmerge(model)
    assert torch.equal(model(ids), y)


def test_it_is_saved_and_loaded(model, tmp_path):
    ids = data()[0]
    lrcompile.save(model, tmp_path / "adapter")
    torch.manual_seed(0)
    other = lrcompile.load(Classifier(), tmp_path / "adapter").eval()
    assert torch.equal(other(ids), model(ids))


def test_it_becomes_a_plain_model_in_four_bits():
    model, ids = trained(lrcompile.spec("lora", rank=3, targets=["up", "down"], seed=0)), data()[0]
    lrcompile.merge(model, final=True)
    assert {type(m) for m in model.modules()} == {Classifier, nn.Embedding, nn.Linear}
    y = model(ids)
    lrcompile.quantize(model, "nf4", targets=["up", "down"])
    assert torch.nn.functional.cosine_similarity(model(ids), y).mean() > 0.9


def test_qlora_trains_beside_four_bits():
    model = trained(lrcompile.spec("qlora", rank=3, targets=["up", "down"], compute_dtype="float32", seed=0))
    y = model(data()[0])
    lrcompile.merge(model, into="float32", final=True)
    torch.testing.assert_close(model(data()[0]), y, rtol=1e-4, atol=1e-4)


def test_it_is_exported_and_verified(model, tmp_path):
    pytest.importorskip("onnxruntime")
    ids = data()[0]
    result = lrcompile.export(model, tmp_path / "model.onnx", (ids,))
    verdict = result.verify()
    assert verdict.ok, str(verdict)
    assert lrcompile.verify(model, result.path, (ids,)).ok
