"""What becomes of adapters and weights when a model leaves: the forms, the refusals, and a pipeline that is re-read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import ExportError, passes
from lrcompile.deployment.capture import capture
from lrcompile.deployment.deploying import Deployed, Plan, deploy
from lrcompile.passes import deploy as pipelines

IN, HIDDEN, OUT, RANK = 10, 13, 7, 3
X = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))


def _model(*, nf4: bool = False, trained: tuple[str, ...] = ("0", "2"), dtype: torch.dtype = torch.float32) -> Any:
    model: Any = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).to(dtype)
    if nf4:
        lrcompile.quantize(model, targets=["0", "2"])
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, alpha=5, targets=["0", "2"]))
    for name in trained:
        nn.init.normal_(model.get_submodule(name).lrcompile_adapters["weight"]["default"].B, std=0.3)
    return model.eval()


def _deploy(model: nn.Module, x: torch.Tensor = X, *, keep_nf4: bool = True, **plan: Any) -> Deployed:
    return deploy(capture(model, (x,)).program, model, Plan(**plan), keep_nf4=keep_nf4)


def _counts(deployed: Deployed) -> tuple[int, int, int]:
    """lora, linear, nf4_linear"""
    targets = Counter(str(node.target) for node in deployed.program.exported.graph.nodes)
    return tuple(targets[f"{name}.default"] for name in ("lrcompile.lora", "aten.linear", "lrcompile.nf4_linear"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("nf4", "plan", "form", "counts"),
    [
        (False, {}, "merge", (0, 2, 0)),
        (False, {"adapters": "merge"}, "merge", (0, 2, 0)),
        (False, {"adapters": "inline"}, "inline", (0, 6, 0)),
        (False, {"quantize": "nf4"}, "inline", (0, 4, 2)),
        (False, {"quantize": "nf4", "adapters": "merge"}, "merge", (0, 0, 2)),
        (True, {}, "inline", (0, 4, 2)),
        (True, {"adapters": "inline"}, "inline", (0, 4, 2)),
        (True, {"adapters": "merge", "into": "float32"}, "merge", (0, 2, 0)),
        (True, {"adapters": "merge", "into": "bfloat16"}, "merge", (0, 2, 0)),
    ],
)
def test_each_form_says_what_it_did(nf4, plan, form, counts):
    model = _model(nf4=nf4)
    deployed = _deploy(model, **plan)
    assert deployed.adapters["form"] == form
    assert list(deployed.adapters["inline"]) == (["0", "2"] if form == "inline" else [])
    assert deployed.adapters["folded"] == ([] if form == "inline" else ["0", "2"])
    assert _counts(deployed) == counts
    assert deployed.nf4 == (["0", "2"] if counts[2] else [])
    assert deployed.stored == ({"float32": torch.float32, "bfloat16": torch.bfloat16}.get(plan.get("into", "")))
    if "quantize" not in plan:
        with torch.no_grad():
            found, expected = deployed.program.module()(X), model(X)
        bound = 2**-7 if plan.get("into") == "bfloat16" else 2**-20
        torch.testing.assert_close(found, expected, rtol=bound * HIDDEN, atol=bound * HIDDEN)


@pytest.mark.parametrize("adapters", ["merge", "inline"])
@pytest.mark.parametrize("keep_nf4", [True, False])
@pytest.mark.parametrize("nf4", [True, False])
def test_the_pipeline_it_ran_is_read_back_and_does_the_same(adapters, keep_nf4, nf4):
    plan = {"adapters": adapters, "into": "bfloat16" if nf4 and adapters == "merge" else None}
    plan["quantize"] = None if nf4 else "nf4"
    model = _model(nf4=nf4)
    deployed = _deploy(model, keep_nf4=keep_nf4, **plan)
    pipeline = passes.parse(deployed.pipeline)
    assert str(pipeline) == deployed.pipeline
    assert pipeline == pipelines.deploy(
        adapters, into=plan["into"], quantize=plan["quantize"] is not None, keep_nf4=keep_nf4
    )
    program = passes.base.Program(capture(model, (X,)).program, model)
    pipeline.run(program)
    assert program.exported.graph_module.code == deployed.program.exported.graph_module.code
    with torch.no_grad():
        assert torch.equal(program.module()(X), deployed.program.module()(X))


@pytest.mark.parametrize("nf4", [True, False])
def test_without_an_operator_for_codes_none_of_ours_is_left_and_the_sites_are_still_named(nf4):
    deployed = _deploy(_model(nf4=nf4), keep_nf4=False, quantize=None if nf4 else "nf4")
    assert _counts(deployed)[2] == 0
    assert deployed.nf4 == ["0", "2"]
    assert deployed.pipeline.endswith("expand-lora,expand-nf4,expand-integers")


def test_an_adapter_of_zeros_is_dropped_and_not_said_to_be_kept():
    deployed = _deploy(_model(trained=("2",)), adapters="inline")
    assert deployed.adapters == {"form": "inline", "folded": ["0"], "inline": {"2": "kept beside the weight"}}
    assert _counts(deployed) == (0, 4, 0)


def test_a_model_without_adapters_is_merged_already():
    deployed = _deploy(nn.Sequential(nn.Linear(IN, OUT)))
    assert deployed.adapters == {"form": "merge", "folded": [], "inline": {}}


class Twice(nn.Module):
    """The base output is used once more without the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
        self.A, self.B = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))
        self.scale = torch.tensor(0.5)

    def forward(self, x):
        y = self.one(x)
        return torch.ops.lrcompile.lora(y, x, self.A, self.B, self.scale, 0.0) * y


def test_what_cannot_be_folded_is_kept_by_auto_and_refused_by_merge():
    deployed = _deploy(Twice())
    assert deployed.adapters["form"] == "merge"
    (reason,) = deployed.adapters["inline"].values()
    assert "used a second time" in reason
    with pytest.raises(ExportError, match=r"cannot fold .*used a second time.*adapters='inline'"):
        _deploy(Twice(), adapters="merge")


@pytest.mark.parametrize(
    ("nf4", "plan", "message"),
    [
        (False, {"adapters": "fold"}, r"adapters='fold': choose one of 'auto', 'merge', 'inline'"),
        (False, {"into": "int8"}, r"into='int8': choose one of 'float32', 'bfloat16', 'float16'"),
        (False, {"quantize": "int8"}, r"quantize='int8': 'nf4' is the format there is"),
        (False, {"into": "float32"}, r"no NF4 weights\. Leave it out"),
        (True, {"into": "float32"}, r"adapters='auto' and there are NF4 weights"),
        (True, {"adapters": "inline", "into": "float32"}, r"adapters='inline' and there are NF4 weights"),
        (True, {"adapters": "merge"}, r"stored as NF4 \(0, …\).*adapters='inline'.*into='float32'"),
        (True, {"quantize": "nf4"}, r"NF4 weights are in the model already \(0, …\)"),
    ],
)
def test_refusals_say_what_to_do(nf4, plan, message):
    with pytest.raises(ExportError, match=message):
        _deploy(_model(nf4=nf4), **plan)


def test_nothing_to_quantize_is_refused():
    with pytest.raises(ExportError, match="no linear map that can be stored so"):
        _deploy(nn.Sequential(nn.Tanh()), quantize="nf4")


def test_the_model_keeps_every_bit():
    model = _model(nf4=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _deploy(model, adapters="merge", into="float32").program.compute()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bfloat16_model_stays_in_its_dtype():
    model = _model(dtype=torch.bfloat16)
    for adapters in ("merge", "inline"):
        deployed = _deploy(model, X.bfloat16(), adapters=adapters)
        with torch.no_grad():
            found, expected = deployed.program.module()(X.bfloat16()), model(X.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=4 * 2**-8 * HIDDEN, atol=4 * 2**-8)


@pytest.mark.parametrize("form", ["merge", "inline"])
def test_an_adapter_that_diverged_is_refused_by_name(form, tmp_path):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    model.get_parameter("1.lrcompile_adapters.weight.default.B").data[0, 0] = float("nan")
    with pytest.raises(lrcompile.ExportError, match=r"at 1 holds NaN"):
        lrcompile.export(model, tmp_path / "m.onnx", (torch.randn(2, 5),), adapters=form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)], ids=str)
def test_an_update_that_rounding_erases_is_not_folded(dtype, size):
    model, x = _model(dtype=dtype), X.to(dtype)
    with torch.no_grad():
        for name in ("0", "2"):
            model.get_submodule(name).lrcompile_adapters["weight"]["default"].B.mul_(size)
    with pytest.raises(lrcompile.MergeError) as theirs:
        lrcompile.merge(model)
    for adapters in ("merge", "auto"):
        with pytest.raises(ExportError, match=r"at 2 weights in all, also at (0|2)\.weight.*adapters='inline'") as ours:
            _deploy(model, x, adapters=adapters)
        assert str(ours.value).split(" of the update")[0] == str(theirs.value).split(" of the update")[0]
    assert _deploy(model, x, adapters="inline").adapters["inline"].keys() == {"0", "2"}
    lrcompile.merge(model, limit=float("inf"))
    _deploy(model, x, adapters="merge")  # accepted
    assert _deploy(_model(), X, adapters="merge").adapters["folded"] == ["0", "2"]
