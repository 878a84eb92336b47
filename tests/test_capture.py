"""Capture: every input its own, batch and sequence vary, names as the model has them, the model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from lrcompile.deployment.capture import capture
from lrcompile.errors import ExportError

transformers = pytest.importorskip("transformers")


class Scorer(nn.Module):
    """Takes two integer tensors that a caller may well pass as one object."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids, labels, scale=1.0, mask=None):
        scores = self.drop(self.table(ids)) * scale
        if mask is not None:
            scores = scores * mask[..., None]
        return {"scores": scores, "hit": (ids == labels).float().mean(), "nested": [scores.sum(-1), None]}


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_two_arguments_that_are_one_object_stay_two_inputs():
    ids = _ids(3, 4)
    captured = capture(Scorer(), {"ids": ids, "labels": ids})
    assert captured.program.graph_signature.user_inputs == ("ids", "labels")
    other = (ids + 1) % 11
    result = captured.program.module()(ids=ids, labels=other)
    assert result["hit"] == 0


@pytest.mark.parametrize("order", [["ids", "labels", "mask"], ["mask", "labels", "ids"]])
def test_inputs_and_their_sizes_keep_their_names_in_whatever_order_they_are_given(order):
    given = {"ids": _ids(2, 3), "labels": _ids(2, 3), "mask": torch.ones(2, 3)}
    sizes = {"ids": {0: Dim("rows")}, "labels": {0: Dim("rows")}, "mask": {0: Dim("rows")}}
    captured = capture(Scorer(), {name: given[name] for name in order}, sizes)
    assert {name: node for node, name in captured.inputs.items()} == {name: name for name in given}
    assert list(captured.inputs) == ["ids", "labels", "mask"]
    assert set(captured.dimensions.values()) == {"rows"}


def test_outputs_are_named_as_in_the_model_and_none_is_left_out():
    captured = capture(Scorer(), {"ids": _ids(2, 3), "labels": _ids(2, 3)})
    assert captured.outputs == ("scores", "hit", "nested.0")


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (4, 4)])
def test_batch_and_sequence_vary_whatever_the_example_sizes(shape):
    model = Scorer()
    captured = capture(model, {"ids": _ids(*shape), "labels": _ids(*shape)})
    assert set(captured.dimensions.values()) == {"batch", "sequence"}
    module, model = captured.program.module(), model.eval()
    for batch, sequence in ((2, 7), (7, 2), (3, 3)):
        ids, labels = _ids(batch, sequence), _ids(batch, sequence)
        assert torch.equal(module(ids=ids, labels=labels)["scores"], model(ids, labels)["scores"])


def test_static_freezes_every_size():
    captured = capture(Scorer(), (_ids(2, 3), _ids(2, 3)), "static")
    assert captured.dimensions == {}
    assert captured.program.range_constraints == {}


def test_the_users_dimensions_keep_their_names():
    rows, words = Dim("rows"), Dim("words", max=9)
    for shapes in ({"ids": {0: rows, 1: words}, "labels": {0: rows, 1: words}}, ((rows, words), (rows, words))):
        captured = capture(Scorer(), (_ids(2, 3), _ids(2, 3)), shapes)
        assert set(captured.dimensions.values()) == {"rows", "words"}
        assert captured.limits == {"words": 9}


def test_what_is_no_tensor_is_a_constant():
    captured = capture(Scorer(), {"ids": _ids(2, 3), "labels": _ids(2, 3), "scale": 3.0, "mask": None})
    model = Scorer().eval()
    model.load_state_dict(captured.program.state_dict)
    ids = _ids(4, 5)
    result = captured.program.module()(ids=ids, labels=ids, scale=3.0, mask=None)
    assert torch.equal(result["scores"], model(ids, ids, 3.0)["scores"])


def test_training_flags_and_the_config_come_back_exactly():
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    model.model.layers[0].mlp.eval()
    flags = [module.training for module in model.modules()]
    captured = capture(model, {"input_ids": _ids(1, 5), "attention_mask": torch.ones(1, 5, dtype=torch.long)})
    assert captured.outputs == ("logits",)  # and no cache
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is True


def test_a_failing_capture_leaves_flags_and_config_too():
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 5)

        def forward(self, ids):
            if self.table(ids).sum() > 0:  # a branch on data cannot be captured
                return ids
            return -ids

    model = Breaks().train()
    with pytest.raises(ExportError, match="Breaks could not be captured"):
        capture(model, (_ids(2, 3),))
    assert model.training


def test_an_output_that_is_a_size_is_refused_by_name():
    class Sized(nn.Module):
        def forward(self, x):
            return {"y": x * 2, "rows": x.shape[0]}

    with pytest.raises(ExportError, match="the output rows is a size"):
        capture(Sized(), (torch.randn(3, 4),))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_is_written_is_refused_by_name(in_place):
    class Counts(nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if in_place:
                self.calls.add_(1)
            else:
                self.calls = self.calls + 1
            return self.inner(x) + self.calls

    model = Counts()
    with pytest.raises(ExportError, match=r"Counts.forward writes its buffer 'calls'"):
        capture(model, (torch.randn(3, 4),))
    assert model.calls == 0
    assert capture(nn.BatchNorm1d(4), (torch.randn(3, 4),)).outputs == ("output",)  # in evaluation it only reads


def test_a_loop_over_values_is_an_error_that_does_not_speak_of_sizes():
    class Loops(nn.Module):
        def forward(self, x):
            for index in (x > 0).nonzero():
                x = x + index.sum()
            return x

    with pytest.raises(ExportError, match="depends on the values of its inputs") as caught:
        capture(Loops(), (torch.randn(3, 4),))
    assert "dynamic_shapes" not in str(caught.value)


class Table(nn.Module):
    """A row for each of `past + sequence` positions, of which there are ten."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Buffer(torch.arange(10.0))

    def forward(self, x, past):
        whole = past.shape[1] + x.shape[1]
        return x + self.rows[:whole][past.shape[1] :]


def test_free_sizes_may_be_bounded_together_but_not_tied():
    batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
    given = {"x": torch.ones(2, 3), "past": torch.ones(2, 4)}
    shapes = {"x": {0: batch, 1: sequence}, "past": {0: batch, 1: past}}
    with pytest.raises(ExportError, match="Constraints violated"):
        capture(Table(), given, shapes)
    captured = capture(Table(), given, shapes, free=("batch", "sequence", "past"))
    assert set(captured.dimensions.values()) == {"batch", "sequence", "past"}
    assert captured.limits == {}
    program = captured.program.module()
    for sizes in ((3, 2, 8), (2, 7, 2), (5, 3, 3)):
        other = {"x": torch.zeros(sizes[0], sizes[1]), "past": torch.zeros(sizes[0], sizes[2])}
        assert torch.equal(program(**other), Table()(**other)), sizes

    class Tied(Table):
        def forward(self, x, past):
            return x + past

    with pytest.raises(ExportError, match=r"ties (past|sequence) to other sizes"):
        capture(Tied(), {name: torch.ones(2, 3) for name in given}, shapes, free=("batch", "sequence", "past"))


def test_a_dimension_that_cannot_vary_is_an_error_that_says_what_to_do():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1) + torch.ones(4, 6)

    with pytest.raises(ExportError, match="dynamic_shapes='static'"):
        capture(Fixed(), (torch.ones(4, 6),))
    assert capture(Fixed(), (torch.ones(4, 6),), "static").dimensions == {}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": torch.ones(2, 2).long()}, "missing a required argument: 'labels'"),
        ({"ids": 1, "labels": 2, "nonsense": 3}, "nonsense"),
        (torch.ones(2, 2), "expected a dict"),
        ([torch.ones(2, 2)], "expected a dict"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, message):
    with pytest.raises(ExportError, match=message):
        capture(Scorer(), inputs)


def test_an_unknown_word_for_the_shapes_is_refused():
    with pytest.raises(ExportError, match="'static'"):
        capture(Scorer(), (_ids(2, 3), _ids(2, 3)), "dynamic")


def test_an_input_of_size_one_beside_larger_ones_broadcasts():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    captured = capture(Sum(), (torch.randn(3, 4), torch.randn(1, 4)))
    assert captured.program.module()(torch.ones(5, 4), torch.ones(1, 4)).shape == (5, 4)


def test_sizes_cannot_vary_for_what_only_variadic_keywords_take():
    class Variadic(nn.Module):
        def forward(self, x, **more):
            return x + more["bias"]

    inputs = {"x": torch.ones(3, 4), "bias": torch.ones(3, 4)}
    with pytest.raises(ExportError, match=r"bias: Variadic.forward takes this through \*\*more only"):
        capture(Variadic(), inputs)
    assert capture(Variadic(), inputs, "static").outputs == ("output",)
