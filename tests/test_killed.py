"""A process killed at any moment of a long write leaves the old content whole or the new one whole.

Each scenario runs in a process of its own that forks the writer and the reader of every round: libraries are loaded
once, and a killed writer leaves no thread behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile

ROUNDS = 50


@dataclass(frozen=True)
class Scenario:
    write: Callable[[Path, int], None]
    """Put version 0 or 1 there."""
    read: Callable[[Path], int | None]
    """Which version is there, complete; None: nothing. Raises on anything else."""
    afresh: bool = False
    """What it writes may not be there before."""


def network(version: int, name: str = "lora") -> nn.Module:
    torch.manual_seed(version)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64)).eval()
    lrcompile.apply(model, lrcompile.spec(name, rank=16, alpha=8 + version, targets=["0", "2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def save(folder: Path, version: int) -> None:
    lrcompile.save(network(version), folder / "adapter")


def saved(folder: Path) -> int | None:
    x = torch.ones(1, 64)
    found = json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_alpha"] - 8
    expected = network(found)
    torch.manual_seed(found)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64)).eval()
    lrcompile.load(model, folder / "adapter")
    assert torch.equal(model(x), expected(x))
    return int(found)


def llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=1, **sizes))
    model.save_pretrained(folder / "base")
    lrcompile.apply(model, lrcompile.spec("lora", rank=4))
    lrcompile.save(model, folder / "adapter")


def merge(folder: Path, version: int) -> None:
    from lrcompile.cli import main

    if not (folder / "base").exists():
        llama(folder)
    base, adapter, out = (str(folder / name) for name in ("base", "adapter", "out"))
    assert main(["merge", base, adapter, "--out", out]) == 0


def merged(folder: Path) -> int | None:
    from transformers import LlamaForCausalLM

    if not (folder / "out").exists():
        return None
    there, base = (LlamaForCausalLM.from_pretrained(folder / each).state_dict() for each in ("out", "base"))
    assert there.keys() == base.keys()
    assert all(torch.equal(there[key], base[key]) for key in base)  # B starts at 0
    return 1


def export(folder: Path, version: int) -> None:
    lrcompile.export(network(version), folder / "model.onnx", (torch.ones(2, 64),))


def exported(folder: Path) -> int | None:
    fits = [
        version
        for version in (0, 1)
        if lrcompile.verify(network(version), folder / "model.onnx", (torch.ones(3, 64),)).ok
    ]
    (version,) = fits
    return version


def within_budget(version: int) -> nn.Module:
    torch.manual_seed(version)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64)).eval()
    return lrcompile.quantize(model, budget={"share": 0.2}, data=[(torch.ones(2, 64),)])


def save_quantized(folder: Path, version: int) -> None:
    lrcompile.save_quantized(within_budget(version), folder / "small")


def saved_quantized(folder: Path) -> int | None:
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64)).eval()
    y = lrcompile.load_quantized(model, folder / "small")(torch.ones(1, 64))
    (version,) = [each for each in (0, 1) if torch.equal(within_budget(each)(torch.ones(1, 64)), y)]
    return version


SCENARIOS = {
    "save": Scenario(save, saved),
    "save_quantized": Scenario(save_quantized, saved_quantized),
    "merge": Scenario(merge, merged, afresh=True),
    "export": Scenario(export, exported),
}


def forked(work: Callable[[], Any]) -> int:
    """The process that does it, and then ends: with 0, or 1 if it raised."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def again_and_again(scenario: Scenario, folder: Path, first: int) -> None:
    for turn in range(first, first + 1000):
        scenario.write(folder, turn % 2)
        if scenario.afresh:
            return


def drive(scenario: Scenario, folder: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    scenario.write(folder, 0)  # loads what is needed, which no fork then does again
    scenario.read(folder)
    if scenario.afresh:
        shutil.rmtree(folder / "out")
    begun = time.monotonic()
    assert os.waitpid(forked(lambda: scenario.write(folder, 0)), 0)[1] == 0
    took, chance = time.monotonic() - begun, random.Random(0)
    seen = set()
    for turn in range(ROUNDS):
        if scenario.afresh:
            shutil.rmtree(folder / "out", ignore_errors=True)
        writer = forked(lambda turn=turn: again_and_again(scenario, folder, turn))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 3 * took))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)

        def look() -> None:
            (folder / "seen").write_text(str(scenario.read(folder)))

        assert os.waitpid(forked(look), 0)[1] == 0, turn
        seen.add((folder / "seen").read_text())
    print(json.dumps(sorted(seen)), file=sys.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_killed_at_any_moment_leaves_the_old_or_the_new(name: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stderr.splitlines()[-1])
    assert len(seen) == 2, f"kills came too early or too late to tell anything: {seen}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    drive(SCENARIOS[sys.argv[1]], Path(sys.argv[2]))
