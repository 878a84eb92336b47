"""The goldens of this project hold on this machine, on another instruction set, and in every form they ask for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lrcompile.golden as golden
from lrcompile.verifying.golden_files import MANIFEST, cases, read_case

pytest.importorskip("transformers")

SUITE = Path(__file__).parent.parent / "golden"
CASES = [folder.name for folder in cases(SUITE)]
ONNX = ("onnx", "onnx-inline", "onnx-inputs", "onnx-nf4")
IN_PACKAGES = [name for name in CASES if "pt2" in read_case(SUITE / name).forms]


def test_the_suite_is_broad_and_small() -> None:
    found = [read_case(SUITE / name) for name in CASES]
    size = sum(file.stat().st_size for file in SUITE.rglob("*") if file.is_file())
    assert len(found) >= 12
    assert size < 5 << 20
    assert len({case.model["model_type"] for case in found}) >= 8
    assert len({entry["spec"]["method"] for case in found for entry in case.adapters}) >= 7
    assert {form for case in found for form in case.forms} == {"merged", "pt2", *ONNX}
    assert any(case.quantization for case in found)
    assert any(case.pipeline for case in found)
    assert all(len(case.reason) > 20 for case in found)


def test_the_script_that_makes_the_suite_knows_every_case() -> None:
    found = importlib.util.spec_from_file_location("golden_generate", SUITE / "generate.py")
    assert found is not None
    assert found.loader is not None
    script = importlib.util.module_from_spec(found)
    sys.modules["golden_generate"] = script  # its dataclass looks there
    try:
        found.loader.exec_module(script)
    finally:
        del sys.modules["golden_generate"]
    assert sorted(recipe.name for recipe in script.RECIPES) == sorted(CASES)
    for recipe in script.RECIPES:
        case = read_case(SUITE / recipe.name)
        assert (tuple(case.forms), case.pipeline, case.reason) == (recipe.forms, recipe.pipeline, recipe.reason)


@pytest.mark.parametrize("name", CASES)
def test_a_case_holds_as_recorded_through_its_passes_and_merged(name: str) -> None:
    for verdict in golden.check(SUITE / name, forms=["merged"]):
        assert verdict.ok, str(verdict)
        assert verdict.bound_ratio < 4, "far from the limit of 16: correct arithmetic in another order"


@pytest.mark.parametrize(("name", "form"), [("gpt2-rslora", "onnx"), ("bert-lora", "onnx-nf4")])
def test_a_case_holds_in_onnx_runtime(name: str, form: str) -> None:
    """`make golden` has the others."""
    holds_in(name, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PACKAGES)
def test_a_case_holds_in_a_compiled_package(name: str) -> None:
    holds_in(name, "pt2")


def holds_in(name: str, form: str) -> None:
    found = [verdict for verdict in golden.check(SUITE / name, forms=[form]) if verdict.name.endswith(f" as {form}")]
    assert found
    for verdict in found:
        assert verdict.ok, str(verdict)
        assert verdict.bound_ratio < 4


@pytest.mark.parametrize("instructions", ["avx2", pytest.param("default", marks=pytest.mark.slow)])
def test_the_recorded_bounds_hold_on_another_instruction_set(instructions: str) -> None:
    code = f"""
import json
import lrcompile.golden as golden
names = ("llama-qlora", "mistral-dora-bfloat16")
found = [golden.check(rf"{SUITE}/{{name}}", forms=[])[0] for name in names]
print(json.dumps([[verdict.ok, verdict.bound_ratio, verdict.note or ""] for verdict in found]))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    recorded = {read_case(SUITE / name).environment["cpu"] for name in CASES}
    for ok, ratio, note in json.loads(done.stdout.splitlines()[-1]):
        assert ok
        assert ratio < 4
        assert recorded == {instructions.upper()} or "recorded with cpu" in note, "it really ran on other instructions"


def test_a_manifest_says_what_it_was_recorded_with() -> None:
    for name in CASES:
        content = json.loads((SUITE / name / MANIFEST).read_text())
        assert {"torch", "python", "cpu", "threads", "lrcompile"} <= set(content["environment"])
