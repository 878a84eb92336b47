"""Pipelines and the check that hangs on them: every pass keeps its class, a broken one is named with node and repro."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import VerificationError, passes
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.checking import Check
from lrcompile.passes.nodes import LORA
from lrcompile.passes.pipeline import Pipeline, Step, chain

transformers = pytest.importorskip("transformers")

RANK, VOCAB = 3, 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 40}
IDS = {"input_ids": torch.arange(14).view(2, 7) * 5 % VOCAB}


def _adapted(model: Any, **fields: Any) -> Any:
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, alpha=5, **fields))
    for name, parameter in model.named_parameters():
        if "lrcompile_adapters" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2))


def _bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **HEADS))


def _gpt2() -> Any:
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_inner": 40, "n_positions": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (_llama, {}),
    "bert": (_bert, {}),
    "conv1d and embedding": (_gpt2, {"targets": ["c_attn", "c_proj", "wte"]}),
}
FLOAT = (
    "drop-zero-adapters,fold-scale,expand-lora,expand-nf4",
    "merge-lora,quantize-nf4{block-size=32},expand-nf4",
)
NF4 = (
    "fold-scale,expand-lora,expand-nf4",
    "dequantize-nf4,merge-lora,expand-nf4",
    "dequantize-nf4{into=bfloat16},merge-lora",
)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("case", MODELS)
def test_every_pass_keeps_its_class(case, quantized):
    build, fields = MODELS[case]
    model = build()
    if quantized:
        lrcompile.quantize(model)
    _adapted(model, **fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for text in NF4 if quantized else FLOAT:
        program, check = Program(capture(model, IDS).program, model), Check(IDS)
        steps = passes.parse(text).run(program, check)
        assert ",".join(step.spec for step in steps) == text
        fired = [step for step in steps if step.result.modified]
        assert set(check.verdicts) == {step.spec for step in fired if step.preserves != "exact"}
        assert check.verdicts
        for step in fired:
            if step.preserves in ("reassociation", "cast"):
                verdict = check.verdicts[step.spec]
                assert verdict.ok
                assert verdict.bound_ratio < (2 if "bfloat16" not in text else 2**18)
        again = passes.parse(text).run(program)
        assert not any(step.result.modified for step in again)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pipeline_runs_its_passes_in_order_and_says_what_each_did():
    model = _adapted(nn.Sequential(nn.Linear(10, 13), nn.Linear(13, 7)), targets=["0", "1"])
    program = Program(capture(model, (torch.randn(4, 10),)).program, model)
    pipeline = passes.parse("drop-zero-adapters,fold-scale,expand-lora")
    steps = pipeline.run(program)
    assert [(step.spec, step.preserves, step.result.count) for step in steps] == [
        ("drop-zero-adapters", "exact", 0),
        ("fold-scale", "reassociation", 2),
        ("expand-lora", "exact", 2),
    ]
    assert isinstance(steps[0], Step)
    assert [each.name for each in pipeline] == [step.spec for step in steps]


def test_chained_callbacks_nest_around_each_pass():
    said: list[str] = []

    def callback(name):
        def before(each, program):
            said.append(f"{name} before {each}")
            return lambda result: said.append(f"{name} after {each}: {result.count}")

        return before

    model = nn.Linear(10, 7)
    program = Program(capture(model, (torch.randn(4, 10),)).program, model)
    passes.parse("fold-scale,expand-lora").run(program, chain(callback("one"), callback("two")))
    assert said[:4] == ["one before fold-scale", "two before fold-scale", "two after fold-scale: 0",
                        "one after fold-scale: 0"]  # fmt: skip
    assert said[4].startswith("one before expand-lora")


@dataclass(frozen=True)
class Scaled(Pass):
    """y ≠ 1.0001·y: wrong, whatever it claims."""

    name: ClassVar[str] = "scaled"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph = program.exported.graph
        node = next(node for node in graph.nodes if node.target is LORA)
        with graph.inserting_before(node):
            more = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 1.0001))
        more.meta = dict(node.args[0].meta)
        node.args = (more, *node.args[1:])
        program.exported.graph_module.recompile()
        return self.result()

    def result(self) -> Result:
        return Result(1)


@dataclass(frozen=True)
class Reassociated(Scaled):
    """y ≠ 1.0001·y."""

    preserves: ClassVar[Equivalence] = "reassociation"


@dataclass(frozen=True)
class Cast(Scaled):
    """y ≠ 1.0001·y."""

    preserves: ClassVar[Equivalence] = "cast"


@dataclass(frozen=True)
class Approximate(Scaled):
    """y ≈ 1.0001·y, with a larger error than it states."""

    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.1

    def result(self) -> Result:
        return Result(2, errors={"first": 0.05, "second": 0.2})


@dataclass(frozen=True)
class Unmeasured(Approximate):
    """y ≈ 1.0001·y, with no error given."""

    def result(self) -> Result:
        return Result(1)


@dataclass(frozen=True)
class NotANumber(Approximate):
    """y ≈ 1.0001·y, with an error that is none."""

    def result(self) -> Result:
        return Result(1, errors={"first": float("nan")})


@dataclass(frozen=True)
class Silent(Scaled):
    """y ≠ 1.0001·y, and denies it."""

    preserves: ClassVar[Equivalence] = "cast"

    def result(self) -> Result:
        return Result(0)


@dataclass(frozen=True)
class Crashing(Scaled):
    """y + x[…]: shapes that do not fit."""

    def apply(self, program: Program) -> Result:
        node = next(node for node in program.exported.graph.nodes if node.target is LORA)
        node.args = (node.args[0], node.args[0], *node.args[2:])
        program.exported.graph_module.recompile()
        return Result(1)


def _mlp() -> tuple[Program, tuple[torch.Tensor]]:
    model = _adapted(nn.Sequential(nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 7)), targets=["0", "2"])
    x = torch.randn(4, 10)
    return Program(capture(model, (x,)).program, model), (x,)


@pytest.mark.parametrize(
    ("broken", "where", "what"),
    [
        (Scaled(), "%lora", "output output changed by up to"),
        (Reassociated(), "%lora", "is over the limit 16"),
        (Cast(), "%lora", "is over the limit 16"),
        (Approximate(), "second", "its error there is 0.2, stated 0.1"),
        (Unmeasured(), "no tensor named", "inf, stated 0.1"),
        (NotANumber(), "first", "nan, stated 0.1"),
        (Silent(), "%lora", "output output changed by up to"),
        (Crashing(), "no node", "it does not run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else "",
)
def test_a_broken_pass_is_named_with_its_class_and_the_node(broken, where, what):
    program, inputs = _mlp()
    with pytest.raises(VerificationError) as caught:
        Pipeline((*passes.parse("drop-zero-adapters"), broken)).run(program, Check(inputs))
    assert f"pass scaled claims to be {broken.preserves} and is not, first at {where}: " in str(caught.value)
    assert what in str(caught.value)


def test_what_a_pass_may_do_is_not_refused():
    program, inputs = _mlp()

    @dataclass(frozen=True)
    class Careful(Approximate):
        """y ≈ 1.0001·y."""

        def result(self) -> Result:
            return Result(1, errors={"first": 0.1})

    check = Check(inputs)
    Pipeline((Careful(),)).run(program, check)
    assert not check.verdicts["scaled"].ok  # recorded: what an approximation costs at the outputs is no verdict on it


def test_nan_and_negative_zero_are_no_change():
    class Rest(nn.Module):
        def forward(self, x):
            return x / x

    model, x = Rest(), torch.tensor([[1.0, 0.0, -0.0]])
    program = Program(capture(model, (x,), "static").program, model)
    passes.parse("expand-lora,drop-zero-adapters").run(program, Check((x,)))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_repro_is_the_program_before_the_pass_and_loads_in_a_fresh_process(tmp_path, quantized):
    model: Any = nn.Sequential(nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 7))
    if quantized:
        lrcompile.quantize(model, targets=["0", "2"])
    _adapted(model, targets=["0", "2"])
    x = torch.randn(4, 10)
    program = Program(capture(model, (x,)).program, model)
    folder = tmp_path / "repros"
    with pytest.raises(VerificationError, match=r"import lrcompile\.passes\.nodes.*torch\.export\.load") as caught:
        Pipeline((Scaled(),)).run(program, Check((x,), folder))
    (path,) = folder.iterdir()
    assert path.name == "scaled.pt2"
    assert str(path) in str(caught.value)
    script = (
        "import sys, torch, lrcompile.passes.nodes\n"
        "program = torch.export.load(sys.argv[1])\n"
        "args, kwargs = program.example_inputs\n"
        "torch.save((args, program.module()(*args, **kwargs)), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / "out")], check=True)
    args, output = torch.load(tmp_path / "out")
    assert torch.equal(args[0], x)
    with torch.no_grad():
        assert torch.equal(output, model(x))


def test_a_module_of_a_program_leaves_it_as_it_was_and_does_not_change_with_it():
    program, (x,) = _mlp()
    passes.parse("merge-lora").run(program)
    pending, held = dict(program.pending), dict(program.exported.state_dict)
    code = program.exported.graph_module.code
    module = program.module()
    assert program.pending == pending
    assert program.pending
    assert program.exported.state_dict.keys() == held.keys()
    assert all(program.exported.state_dict[name] is tensor for name, tensor in held.items())
    assert program.exported.graph_module.code == code
    with torch.no_grad():
        before = module(x)
        passes.parse("quantize-nf4").run(program)
        assert torch.equal(module(x), before)
        assert not torch.equal(program.module()(x), before)
    program.compute()
    assert program.pending == {}
