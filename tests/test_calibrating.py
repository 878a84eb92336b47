"""Data-needing methods: any iterable of batches, a loss, and a model that is afterwards what it was."""

from __future__ import annotations

import warnings
from collections import UserDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lrcompile
from lrcompile.calibrating import calibrated
from lrcompile.matching import match

GRADIENT = ("lora-ga", "lora-one", "lora-sb")
INPUT = ("corda", "eva")


def spec_of(method, **fields):
    given = {"rank": 2, "seed": 1} | ({"first_lr": 1e-3} if method == "lora-sb" else {}) | fields
    return lrcompile.spec(method, **given)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(11, 6)

    def forward(self, x, labels=None):
        y = self.last(self.drop(F.relu(self.norm(self.first(x)))))
        return {"loss": None if labels is None else F.mse_loss(y, labels), "y": y}


def batches(number=4, tokens=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(tokens, 7, generator=draw), "labels": torch.randn(tokens, 6, generator=draw)}
            for _ in range(number)]  # fmt: skip


def measured(method, model, data, loss=None, **fields):
    spec = spec_of(method, **fields)
    return calibrated(model, spec, match(model, spec), data, loss)


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_data_is_any_iterable(method):
    found = []
    for data in (batches(), iter(batches()), (each for each in batches()), DataLoader(batches(), batch_size=None)):
        torch.manual_seed(0)
        net = Net()
        net.drop.p = 0.0  # a DataLoader draws from the generator that dropout draws from
        found.append(measured(method, net, data)[2])
    assert all(torch.equal(found[0][site], other[site]) for other in found[1:] for site in ("first", "last"))


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_no_more_batches_are_drawn_than_the_spec_says(method):
    taken: list[int] = []

    def many():
        for seed in range(20):
            taken.append(seed)
            yield from batches(1, seed=seed)

    measured(method, Net(), many(), batches=3)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_what_is_measured_lies_on_the_host_in_float32_and_in_float64_for_a_float64_base(method):
    low = Net().bfloat16()
    data = [{key: value.bfloat16() for key, value in batch.items()} for batch in batches()]
    wide = [{key: value.double() for key, value in batch.items()} for batch in batches()]
    assert {v.dtype for v in measured(method, low, data)[2].values()} == {torch.float32}
    found = measured(method, Net().double(), wide)[2].values()
    assert {(v.dtype, v.device.type, v.requires_grad) for v in found} == {(torch.float64, "cpu", False)}


def test_batches_are_tuples_or_lists_and_mappings_of_any_kind():
    net, data = Net(), batches()
    net.drop.p = 0.0
    by_key = measured("lora-one", net, data)[2]
    tuples = [(batch["x"], batch["labels"]) for batch in data]
    assert all(torch.equal(by_key[s], measured("lora-one", net, tuples)[2][s]) for s in by_key)
    user_dicts = [UserDict(batch) for batch in data]
    assert all(torch.equal(by_key[s], measured("lora-one", net, user_dicts)[2][s]) for s in by_key)
    whole = TensorDataset(torch.cat([b["x"] for b in data]), torch.cat([b["labels"] for b in data]))
    loader = DataLoader(whole, batch_size=20)  # collates to lists
    assert all(torch.equal(by_key[s], measured("lora-one", net, loader)[2][s]) for s in by_key)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_forward_of_any_arguments_takes_any_batch(replaced):
    class Open(Net):
        def forward(*args, **kwargs):
            return Net.forward(*args, **kwargs)

    net: nn.Module = Open()
    if replaced:
        net = Net()
        net.forward = partial(Net.forward, net)  # type: ignore[method-assign]
    for batch in ({"x": torch.ones(9, 7), "labels": torch.ones(9, 6)}, (torch.ones(9, 7), torch.ones(9, 6))):
        measured("lora-one", net, [batch])


def test_the_loss_is_the_users_or_the_outputs():
    torch.manual_seed(0)
    net, data = Net(), batches()
    by_output = measured("lora-one", net, data)[2]
    seen = []

    def own(output, batch):
        seen.append(sorted(batch))
        return 2 * F.mse_loss(output["y"], batch["labels"])

    doubled = measured("lora-one", net, data, own)[2]
    assert seen == [["labels", "x"]] * 4
    for site in by_output:
        torch.testing.assert_close(doubled[site], 2 * by_output[site])


def snapshot(net):
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    grads = {key: None if p.grad is None else p.grad.clone() for key, p in net.named_parameters()}
    flags = {key: p.requires_grad for key, p in net.named_parameters()}
    modes = {key: module.training for key, module in net.named_modules()}
    hooks = {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in net.named_modules()}
    hooks |= {key: len(p._post_accumulate_grad_hooks or ()) for key, p in net.named_parameters()}
    return tensors, grads, flags, modes, hooks, torch.get_rng_state()


def assert_same(net, before):
    after = snapshot(net)
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    for key, value in before[1].items():
        assert value is after[1][key] is None or torch.equal(value, after[1][key]), key
    assert after[2:5] == before[2:5]
    assert torch.equal(after[5], before[5])


def used_net():
    """A model with a gradient, mixed modes and a frozen parameter."""
    net = Net()
    net.train()
    net.norm.eval()
    net.first.bias.requires_grad_(False)
    net(batches(1)[0]["x"])["y"].square().sum().backward()
    return net


def shuffled():
    yield from DataLoader(batches(), batch_size=None, shuffle=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_measuring_leaves_the_model_and_the_random_state_as_they_were(method, grad):
    net = used_net()
    before = snapshot(net)
    with torch.set_grad_enabled(grad):
        measured(method, net, shuffled(), seed=None)
        measured(method, net, shuffled(), seed=3)
    assert_same(net, before)


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_an_error_in_the_middle_leaves_them_too(method):
    def breaking():
        yield from batches(2)
        raise Stop

    net = used_net()
    before = snapshot(net)
    with pytest.raises(Stop):
        lrcompile.apply(net, spec_of(method), data=breaking())
    assert_same(net, before)
    with pytest.raises(lrcompile.LrcompileError):
        lrcompile.apply(net, spec_of(method), data=[{"x": torch.full((20, 7), torch.nan), "labels": torch.ones(20, 6)}])
    assert_same(net, before)


def test_a_seed_decides_what_dropout_does_and_none_goes_by_torchs_generator():
    torch.manual_seed(0)
    net, data = Net(), batches()
    first = measured("lora-one", net, data, seed=4)[2]["first"]
    torch.rand(3)
    assert torch.equal(first, measured("lora-one", net, data, seed=4)[2]["first"])
    assert not torch.equal(first, measured("lora-one", net, data, seed=5)[2]["first"])
    drawn = measured("lora-one", net, data, seed=None)[2]["first"]
    torch.rand(3)
    assert not torch.equal(drawn, measured("lora-one", net, data, seed=None)[2]["first"])


def test_gradients_are_taken_in_training_mode_and_inputs_in_evaluation_mode():
    modes = []

    class Spy(Net):
        def forward(self, x, labels=None):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x, labels)

    for method in GRADIENT + INPUT:
        modes.clear()
        measured(method, Spy().eval(), batches(2))
        assert set(modes) == {(method in GRADIENT, method in GRADIENT)}, method


def test_adapters_that_are_active_take_part():
    torch.manual_seed(0)
    net, data = Net(), batches()
    plain = measured("lora-one", net, data)[2]["last"]
    inputs = measured("corda", net, data)[2]["last"]
    lrcompile.apply(net, lrcompile.spec("lora", rank=2, seed=0), name="earlier")
    with torch.no_grad():
        net.get_parameter("first.lrcompile_adapters.weight.earlier.B").fill_(0.3)
    assert not torch.equal(plain, measured("lora-one", net, data)[2]["last"])
    assert not torch.equal(inputs, measured("corda", net, data)[2]["last"])
    lrcompile.apply(net, spec_of("lora-ga"), name="later", data=data)
    assert net.get_parameter("first.lrcompile_adapters.weight.earlier.A").grad is None


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_fewer_batches_than_asked_for_are_used_and_noted(method):
    net = lrcompile.apply(Net(), spec_of(method, batches=5), data=batches(2))
    assert any("measured on 2 batches" in note and "5" in note for note in lrcompile.report(net).notes)
    net = lrcompile.apply(Net(), spec_of(method, batches=2), data=batches(2))
    assert not any("measured on" in note for note in lrcompile.report(net).notes)


@pytest.mark.parametrize("method", GRADIENT + INPUT)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (iter(()), "holds no batch"),
        (batches(1)[0], r"iterable of batches.*data=\[batch\]"),
        (torch.ones(3, 7), r"iterable of batches.*Tensor"),
        (7, r"iterable of batches.*int"),
        ([torch.ones(3, 7)], "batch 0 of data is a Tensor"),
        ([batches(1)[0], "text"], "batch 1 of data is a str"),
        ([{1: torch.ones(3, 7)}], "batch 0 of data is a dict"),
        ([{"input_ids": torch.ones(3, 7)}], r"Net does not take batch 0.*'input_ids'.*takes x, labels"),
        ([(torch.ones(3, 7),) * 3], r"Net does not take batch 0.*3 positional.*takes x, labels"),
    ],
)
def test_data_that_cannot_be_used_is_an_error_that_says_why(method, data, message):
    net = Net()
    with pytest.raises(lrcompile.SpecError, match=message) as caught:
        lrcompile.apply(net, spec_of(method), data=data)
    assert caught.value.field == "data"
    assert type(net.first) is nn.Linear


@pytest.mark.parametrize("method", ["lora-ga", "eva"])
def test_a_batch_the_model_fails_on_is_an_error_that_names_it(method):
    with pytest.raises(lrcompile.AdapterError, match=r"Net cannot be run on batch 1 of data \(RuntimeError: "):
        lrcompile.apply(Net(), spec_of(method), data=[batches(1)[0], {"x": torch.ones(3, 5), "labels": None}])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: output["y"], r"one number.*\(20, 6\)"),
        (lambda output, batch: 3.0, r"one number.*float"),
        (lambda output, batch: None, r"one number.*NoneType"),
        (lambda output, batch: output["y"].detach().sum(), "carries no gradient"),
        (lambda output, batch: torch.ones(()), "carries no gradient"),
        (3, "loss is a function of .output, batch., got 3"),
    ],
)
def test_a_loss_that_is_none_is_an_error(loss, message):
    with pytest.raises(lrcompile.SpecError, match=message) as caught:
        lrcompile.apply(Net(), spec_of("lora-ga"), data=batches(), loss=loss)
    assert caught.value.field == "loss"


def test_an_output_without_a_loss_says_to_pass_one():
    without = [{"x": batch["x"]} for batch in batches()]
    with pytest.raises(
        lrcompile.SpecError, match=r"output \(a dict\) has no loss.*loss=lambda output, batch"
    ) as caught:
        lrcompile.apply(Net(), spec_of("lora-ga"), data=without)
    assert caught.value.field == "loss"
    with pytest.raises(lrcompile.SpecError, match=r"output \(a Tensor\) has no loss"):
        lrcompile.apply(nn.Sequential(nn.Linear(7, 9)), spec_of("lora-ga"), data=[(torch.ones(3, 7),)])


def test_a_loss_of_one_element_is_a_scalar_too():
    measured("lora-ga", Net(), batches(), lambda output, batch: output["y"].square().mean().reshape(1, 1))


def test_methods_that_need_data_say_so_and_others_refuse_it():
    for method in GRADIENT + INPUT:
        with pytest.raises(lrcompile.SpecError, match=r"apply\(model, spec, data=batches, loss=fn\)"):
            lrcompile.apply(Net(), spec_of(method))
    with pytest.raises(lrcompile.SpecError, match="starts without data"):
        lrcompile.apply(Net(), lrcompile.spec("lora", rank=2), data=batches())


def test_a_model_on_the_meta_device_says_to_load_its_weights_first():
    with torch.device("meta"):
        net = Net()
    for method in GRADIENT + INPUT:
        with pytest.raises(lrcompile.AdapterError, match=f"meta device.*load the weights first, then apply {method}"):
            lrcompile.apply(net, spec_of(method), data=batches())


def test_nothing_is_measured_for_an_adapter_that_cannot_be_added():
    net = lrcompile.apply(Net(), lrcompile.spec("lora", rank=2))
    with pytest.raises(lrcompile.AdapterError, match="applied already"):
        lrcompile.apply(net, spec_of("lora-ga"), data=(pytest.fail("data was read") for _ in range(1)))


def test_an_example_proves_a_measured_adapter_and_leaves_it_as_measured():
    for method in GRADIENT + INPUT:
        torch.manual_seed(0)
        plain = lrcompile.apply(Net(), spec_of(method), data=batches())
        torch.manual_seed(0)
        proved = lrcompile.apply(Net(), spec_of(method), data=batches(), example_inputs={"x": torch.randn(5, 7)})
        a, b = plain.state_dict(), proved.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a), method


@pytest.mark.parametrize("method", GRADIENT + INPUT)
def test_a_measured_adapter_is_saved_and_loaded_without_the_data(method, tmp_path):
    torch.manual_seed(0)
    net, fresh = Net(), Net()
    fresh.load_state_dict(net.state_dict())
    lrcompile.apply(net, spec_of(method), data=batches())
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor), alpha=0.1 if name.endswith(".A") else 0.3)
    lrcompile.save(net, tmp_path / "adapter")
    lrcompile.load(fresh, tmp_path / "adapter")
    x = batches(1)[0]["x"]
    assert torch.equal(net.eval()(x)["y"], fresh.eval()(x)["y"])


def test_progress_appears_when_it_takes_long(monkeypatch):
    seen: list[tuple[str, int]] = []

    def shown(items, label, total):
        seen.append((label, total))
        return items

    monkeypatch.setattr("lrcompile.batches.shown", shown)
    measured("lora-ga", Net(), batches(), batches=4)
    measured("eva", Net(), batches(), batches=4)
    assert seen == [("lora-ga: gradients", 4), ("eva: inputs", 4)]


def test_measuring_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in GRADIENT + INPUT:
            measured(method, Net(), batches())
