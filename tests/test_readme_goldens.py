"""What the README tells a user to put into their CI is run here, on a tiny model of theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lrcompile
from lrcompile import cli
from lrcompile.demo.opening import open_model
from lrcompile.demo.tiny import write_tiny_bert

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("### Goldens of your")[1].split("\n##")[0]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


def workflow() -> dict[Any, Any]:
    return yaml.safe_load(block("yaml"))


def steps() -> list[dict[str, Any]]:
    return workflow()["jobs"]["goldens"]["steps"]


def run(command: str) -> int:
    program, *arguments = shlex.split(command)
    assert program == "lrcompile"
    return cli.main(arguments)


def test_the_workflow_is_what_github_reads_and_installs_what_there_is() -> None:
    found = workflow()
    assert set(found) == {True, "jobs"}  # YAML reads the key `on` as a truth value; GitHub knows that
    assert len(block("yaml").splitlines()) == 10
    uses = [step["uses"] for step in steps() if "uses" in step]
    assert [each.split("@")[0] for each in uses] == ["actions/checkout", "actions/setup-python"]
    (install,) = [step["run"] for step in steps() if step.get("run", "").startswith("pip install")]
    (extra,) = re.findall(r"lrcompile\[(\w+)\]", install)
    import tomllib

    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_commands_record_check_and_catch_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_bert(tmp_path / "model", layers=1)
    model = open_model("model").model
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["query", "value"], seed=0))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.1)
    lrcompile.save(model, "adapter")
    assert run(block("sh")) == 0
    commands = [step["run"] for step in steps() if step.get("run", "").startswith("lrcompile")]
    assert commands
    for command in commands:
        assert run(command) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "as merged" in said
    assert "as onnx" in said
    assert (tmp_path / "report.html").is_file()

    weights = next((tmp_path / "goldens").glob("*/weights.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("query.weight"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, weights)
    assert run(commands[0]) == 1
    assert "sha256 differs" in capsys.readouterr().out
