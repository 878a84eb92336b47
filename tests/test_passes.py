"""The registry of passes: names, laziness, and pipelines as text that is read back as it was printed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile import LrcompileError, SpecError, passes
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.dequantize_nf4 import DTYPES
from lrcompile.passes.pipeline import Pipeline

OPTIONS: dict[str, dict[str, Any]] = {
    "quantize-nf4": {"block_size": st.sampled_from(BLOCK_SIZES)},
    "dequantize-nf4": {"into": st.sampled_from(sorted(DTYPES))},
}
EXPORT = [name for name in passes.names() if passes.get(name).stage == "export"]
ONE = st.sampled_from(EXPORT).flatmap(lambda name: st.builds(passes.get(name), **OPTIONS.get(name, {})))


@dataclass(frozen=True)
class Nothing(Pass):
    """y = y."""

    name: ClassVar[str] = "third-party"
    preserves: ClassVar[Equivalence] = "exact"
    loud: bool = False
    amount: float = 0.5

    def apply(self, program: Program) -> Result:
        return Result(0)


@dataclass(frozen=True)
class Misnamed(Nothing):
    """y = y."""

    name: ClassVar[str] = "another-name"


@pytest.fixture
def plugins(monkeypatch):
    """Sets the entry points there are: name -> attribute of this module."""

    def install(**points: str) -> None:
        found = [EntryPoint(name, f"test_passes_plugin:{value}", "lrcompile.passes") for name, value in points.items()]
        monkeypatch.setattr(passes, "entry_points", lambda group: found if group == "lrcompile.passes" else [])
        passes._plugins.cache_clear()

    monkeypatch.setitem(sys.modules, "test_passes_plugin", sys.modules[__name__])
    yield install
    passes._plugins.cache_clear()


def test_every_built_in_pass_is_found_under_its_own_name():
    assert passes.names() == tuple(sorted(passes.names()))
    for name in passes.names():
        cls = passes.get(name)
        assert issubclass(cls, Pass)
        assert cls.name == name
        assert cls is passes.get(name.replace("-", "_"))
        assert cls.preserves in ("exact", "reassociation", "cast", "approximate")
        assert (cls.tolerance > 0) == (cls.preserves == "approximate")
        assert cls.__doc__
        assert "=" in cls.__doc__.splitlines()[0] or "≈" in cls.__doc__.splitlines()[0]  # the identity


def test_listing_names_imports_no_pass_and_no_torch():
    script = (
        "import sys; from lrcompile import passes; passes.names()\n"
        "print([m for m in sys.modules if m.startswith('lrcompile.passes.') or m == 'torch'])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "near"), [("merge-lore", "merge-lora"), ("quantise_nf4", "quantize-nf4")])
def test_an_unknown_name_suggests_the_nearest_and_lists_the_rest(name, near):
    with pytest.raises(SpecError, match=f"unknown pass '{name}'; did you mean '{near}'.*expand-lora") as caught:
        passes.parse(name)
    assert caught.value.field == "passes"


@given(st.lists(ONE, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_printed_pipeline_reads_back_as_itself(chosen):
    pipeline = Pipeline(tuple(chosen))
    assert passes.parse(str(pipeline)) == pipeline
    assert passes.parse(str(pipeline).replace("-", "_").replace(",", " , ").replace("=", " = ")) == pipeline


def test_only_options_that_differ_from_their_default_are_printed():
    assert str(passes.parse("quantize_nf4{block_size=64},fold-scale")) == "quantize-nf4,fold-scale"
    assert str(passes.parse("quantize-nf4{ block-size = 128 }")) == "quantize-nf4{block-size=128}"
    assert str(passes.parse("expand-lora{}")) == "expand-lora"


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "merge-lora,", "merge-lora,,fold-scale", "merge-lora fold-scale", "merge-lora{}fold-scale",
     "merge-lora{", "merge-lora}", "quantize-nf4{block-size=64", "quantize-nf4{{block-size=64}}", "{}"],
)  # fmt: skip
def test_text_that_is_no_pipeline_is_refused_with_an_example(text):
    with pytest.raises(SpecError, match=r"is no pipeline.*merge-lora,quantize-nf4\{block-size=128\}"):
        passes.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize-nf4{block-size=big}", "block_size of pass 'quantize-nf4' is 'big'; expected an integer"),
        ("quantize-nf4{block-size=64.0}", "expected an integer"),
        ("quantize-nf4{block-size=63}", r"block_size=63 is not valid: choose one of \(32, 64"),
        ("quantize-nf4{blocks=64}", "has no option 'blocks=64'; it takes block-size=…"),
        ("quantize-nf4{block-size}", "has no option 'block-size'; it takes block-size=…"),
        ("quantize-nf4{block-size=64,block_size=128}", "block_size of pass 'quantize-nf4' is given twice"),
        ("quantize-nf4{block-size=64,}", "has no option ''"),
        ("merge-lora{into=float32}", "it takes none"),
        ("dequantize-nf4{into=int8}", "into='int8' is not valid: choose one of 'float32'"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_expected(text, message):
    with pytest.raises(SpecError, match=message):
        passes.parse(text)


def test_a_third_party_pass_is_listed_found_and_parsed_by_type(plugins):
    plugins(third_party="Nothing")
    assert "third-party" in passes.names()
    assert passes.parse("third-party{loud=True,amount=2}") == Pipeline((Nothing(loud=True, amount=2.0),))
    for text, expected in (("loud=yes", "true or false"), ("amount=much", "a number")):
        with pytest.raises(SpecError, match=f"expected {expected}"):
            passes.parse(f"third-party{{{text}}}")
    printed = str(Nothing(loud=True, amount=0.25))
    assert printed == "third-party{loud=true,amount=0.25}"
    assert passes.parse(printed) == Pipeline((Nothing(loud=True, amount=0.25),))


@pytest.mark.parametrize("taken", ["merge-lora", "merge_lora"])
def test_an_entry_point_cannot_take_the_name_of_a_pass(plugins, taken):
    plugins(**{taken: "Nothing"})
    with pytest.raises(LrcompileError, match=f"'{taken}' of 'test_passes_plugin:Nothing' is defined already"):
        passes.names()


@pytest.mark.parametrize("value", ["Misnamed", "OPTIONS", "ONE"])
def test_an_entry_point_that_is_no_pass_of_that_name_is_refused(plugins, value):
    plugins(**{"third-party": value})
    with pytest.raises(LrcompileError, match=r"expected a subclass of .*Pass whose name is 'third-party'"):
        passes.get("third-party")
