"""A golden from outside, mutated hundreds of times: refused with a typed error, or failing, or still true. Never a
crash of another kind, never a change that passes for the recorded case.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
import lrcompile.golden as golden
from lrcompile.errors import LrcompileError
from lrcompile.verifying.golden_files import DATA, MANIFEST, WEIGHTS, read_case, seal
from lrcompile.verifying.manifest import sha256

PATIENCE = 20.0  # seconds a single check may take, on a busy machine
JUNK: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1e308, float("inf"), "", "x" * 5000, "../../etc/passwd", "/dev/zero",
    "os:system", [], {}, [[]], {"tensor": "nowhere"}, {"value": {"dict": 1}}, "\u0000", "\U0001d54f",
    [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]],
]  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = mlp()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["0"], seed=0))
    model.get_parameter("0.lrcompile_adapters.weight.default.B").data.normal_()
    folder = tmp_path_factory.mktemp("golden") / "case"
    golden.record(folder, model, (torch.randn(3, 6),), reason="to be mutated", pipeline="merge-lora")
    return folder


def outcome(folder: Path, **options: Any) -> str:
    """What became of a check: "refused", "fails" or "holds"."""
    started = time.monotonic()
    try:
        verdicts = golden.check(folder, **options)
    except LrcompileError:
        found = "refused"
    else:
        found = "holds" if all(verdicts) else "fails"
    assert time.monotonic() - started < PATIENCE
    return found


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at:at] = chance.randbytes(chance.choice([1, 8, 500]))


def repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start:start] = data[start : start + chance.randrange(1, 200)]


def blank(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    data[start : start + 16] = b"\xff" * 16


BYTES: list[Callable[[bytearray, random.Random], None]] = [flip, cut, insert, repeat, blank]


def test_it_holds_as_it_was_recorded(recorded: Path) -> None:
    assert outcome(recorded, build=_here("mlp")) == "holds"


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, DATA])
def test_no_changed_byte_of_any_file_is_accepted(recorded: Path, tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    whole = (recorded / name).read_bytes()
    folder = tmp_path / "case"
    shutil.copytree(recorded, folder)
    for at in range(100):
        data = bytearray(whole)
        chance.choice(BYTES)(data, chance)
        if bytes(data) == whole or (name == MANIFEST and _same_json(data, whole)):
            continue
        (folder / name).write_bytes(data)
        assert outcome(folder, build=_here("mlp")) in ("refused", "fails"), f"mutation {at} of {name} was accepted"


def test_a_manifest_changed_by_somebody_who_can_seal_it_leads_to_no_crash_and_no_other_tensors(
    recorded: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    original = json.loads((recorded / MANIFEST).read_text())
    folder = tmp_path / "case"
    shutil.copytree(recorded, folder)
    seen = {"refused": 0, "fails": 0, "holds": 0}
    for _ in range(120):
        content = copy.deepcopy(original)
        path = chance.choice([path for path in _paths(content) if path[0] != "seal"])
        _put(content, path, chance)
        content["seal"] = seal(content)
        try:
            text = json.dumps(content)
        except ValueError:
            continue  # no JSON at all
        (folder / MANIFEST).write_text(text)
        found = outcome(folder, build=_here("mlp"))
        seen[found] += 1
        if found == "holds":  # only what is said about the case changed, not what is computed
            case = read_case(folder)
            assert case.sha256 == original["sha256"]
            assert path[0] in ("reason", "limits", "limits_reason", "environment", "updates", "model", "forms",
                               "pipeline", "adapters"), path  # fmt: skip
    assert seen["refused"] > 40, seen


def test_tensors_changed_by_somebody_who_can_hash_them_are_refused_or_computed_and_never_crash(
    recorded: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    folder = tmp_path / "case"
    shutil.copytree(recorded, folder)
    seen = {"refused": 0, "fails": 0, "holds": 0}
    for at in range(100):
        name = chance.choice([WEIGHTS, DATA])
        data = bytearray((recorded / name).read_bytes())
        chance.choice(BYTES)(data, chance)
        (folder / name).write_bytes(data)
        other = DATA if name == WEIGHTS else WEIGHTS
        shutil.copyfile(recorded / other, folder / other)
        content = json.loads((recorded / MANIFEST).read_text())
        content["sha256"] = {each: sha256(folder / each) for each in (WEIGHTS, DATA)}
        content["seal"] = seal(content)
        (folder / MANIFEST).write_text(json.dumps(content))
        found = outcome(folder, build=_here("mlp"))
        seen[found] += 1
        if found == "holds":
            assert len(data) == (recorded / name).stat().st_size, f"mutation {at}"
            assert _nearly(recorded / name, folder / name), "only the last bits of a number may differ unnoticed"
    assert seen["refused"] > 20, seen
    assert seen["fails"] > 10, seen


def test_a_golden_of_a_model_that_gives_nan_is_refused_when_recorded_and_when_checked(
    recorded: Path, tmp_path: Path
) -> None:
    broken = mlp()
    broken.get_parameter("2.bias").data.fill_(float("nan"))
    with pytest.raises(lrcompile.VerificationError, match="hold NaN"):
        golden.record(tmp_path / "nan", broken, (torch.randn(3, 6),), reason="broken")
    assert not (tmp_path / "nan").exists()


def _here(name: str) -> str:
    import sys

    sys.modules.setdefault("golden_mutated_models", sys.modules[__name__])
    return f"golden_mutated_models:{name}"


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from _paths(item, (*above, key))


def _put(content: Any, path: tuple[Any, ...], chance: random.Random) -> None:
    for key in path[:-1]:
        content = content[key]
    act = chance.randrange(3)
    if act == 0 and isinstance(content, dict):
        content[str(path[-1]) + "x"] = content.pop(path[-1])
    elif act == 1:
        del content[path[-1]]
    else:
        content[path[-1]] = chance.choice(JUNK)


def _same_json(data: bytearray, whole: bytes) -> bool:
    try:
        return json.loads(data.decode()) == json.loads(whole)
    except (ValueError, RecursionError):
        return False


def _nearly(one: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(
        torch.allclose(left[key].double(), right[key].double(), rtol=1e-4, atol=1e-5) for key in left
    )
