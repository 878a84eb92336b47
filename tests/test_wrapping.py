"""A model that is wrapped already is refused with the right order of calls; wrapping afterwards works."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError, ExportError, MergeError, VerificationError
from lrcompile.wrapping import refuse_wrapped


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> Any:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def ddp(m):
    return nn.parallel.DistributedDataParallel(m)


def fsdp(m):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(m, mesh=init_device_mesh("cpu", (1,)))
    return m


def dtensor(m):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    return distribute_module(m, init_device_mesh("cpu", (1,)))


def script(m):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(m, torch.ones(1, 6))


SPEC = lrcompile.spec("lora", rank=2)
CALLS = {
    "apply": lambda m: lrcompile.apply(m, SPEC),
    "quantize": lambda m: lrcompile.quantize(m, "nf4"),
    "merge": lambda m: lrcompile.merge(m),
}
WRAPPERS = {"torch.compile": torch.compile, "DataParallel": nn.DataParallel, "torch.jit": script}
GROUPED = {"DistributedDataParallel": ddp, "FSDPModule": fsdp, "DTensor": dtensor}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("name", "wrap"), WRAPPERS.items(), ids=WRAPPERS)
def test_a_wrapped_model_is_refused(name, wrap, call, inside):
    wrapped = wrap(model())
    with pytest.raises(AdapterError, match=rf"{name}.*(first|afterwards)"):
        call(nn.ModuleDict({"part": wrapped}) if inside else wrapped)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("name", "wrap"), GROUPED.items(), ids=GROUPED)
def test_a_distributed_model_is_refused(name, wrap, call, group):
    with pytest.raises(AdapterError, match=rf"{name}.*(first|afterwards)"):
        call(wrap(model()))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(AdapterError, match=r"cannot apply to a int: a torch\.nn\.Module"):
        refuse_wrapped(5, "apply to")  # type: ignore[arg-type]


def test_a_model_compiled_in_place_is_adapted_and_recompiled():
    torch._dynamo.reset()
    m, x = model(), torch.randn(2, 6)
    m.compile(backend="eager")
    m(x)
    lrcompile.apply(m, SPEC)
    nn.init.normal_(m[0].lrcompile_adapters["weight"]["default"].B)
    with lrcompile.disabled(m):
        base = m(x)
    assert not torch.equal(m(x), base)


def test_wrapping_afterwards_trains_the_adapter(group):
    m: Any = lrcompile.apply(model(), SPEC)
    wrapped = ddp(m)
    optimizer = lrcompile.optimizer(wrapped, torch.optim.SGD, lr=0.1)
    before = m[0].lrcompile_adapters["weight"]["default"].B.detach().clone()
    wrapped(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(m[0].lrcompile_adapters["weight"]["default"].B, before)


def test_a_model_on_the_meta_device_has_nothing_to_merge_export_or_verify(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2))
    inputs = (torch.ones(3, 6),)
    with pytest.raises(MergeError, match=r"0\.weight is on the meta device"):
        lrcompile.merge(model)
    with pytest.raises(ExportError, match="then export"):
        lrcompile.export(model, tmp_path / "m.onnx", inputs)
    with pytest.raises(VerificationError, match="then verify"):
        lrcompile.verify(model, model, inputs)
