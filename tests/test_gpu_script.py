"""`benchmarks/gpu.sh` runs from start to end, here on a CPU with tiny sizes, and says what failed or is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu import __main__ as script

ROOT = Path(__file__).parent.parent


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]))


def run(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = script.main(["--json", str(path), *arguments])
    found: dict[str, Any] = json.loads(path.read_text())
    return code, found


def test_a_section_that_fails_is_written_down_and_the_others_run(
    tmp_path: Path, on_path: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "SECTIONS", {"no_such_section": 60, "machine": 60})
    code, found = run(tmp_path / "out.json", "--dry")
    assert code == 1
    assert found["failed"] == ["no_such_section"]
    assert "no_such_section" in found["sections"]["no_such_section"]["stderr"]
    assert found["sections"]["machine"]["status"] == "ok"
    assert {"what": "torch"}.items() <= found["sections"]["machine"]["rows"][1].items()


def test_what_a_section_had_when_its_time_ended_is_kept(
    tmp_path: Path, on_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow" / "gpu_slow.py"
    slow.parent.mkdir()
    slow.write_text("import sys, time\nopen(sys.argv[2], 'w').write('{\"what\": 1}\\n{\"what\":')\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "SECTIONS", {"slow": 2})
    monkeypatch.setattr(script, "LEAST", 0.0)
    monkeypatch.setattr(script, "MODULE", "gpu_{}")
    monkeypatch.setenv("PYTHONPATH", str(slow.parent))
    code, found = run(tmp_path / "out.json")
    section = found["sections"]["slow"]
    assert code == 1
    assert section["rows"] == [{"what": 1}]
    assert section["reason"] == "not done after 2 s"


def test_what_would_exceed_the_budget_is_left_out_with_the_reason(tmp_path: Path) -> None:
    code, found = run(tmp_path / "out.json", "--dry", "--budget", "5")
    assert code == 0
    assert all(section["status"] == "skipped" and "left" in section["reason"] for section in found["sections"].values())


def test_kernels_of_every_op_are_checked_interpreted_where_there_is_no_gpu(tmp_path: Path, on_path: None) -> None:
    code, found = run(tmp_path / "out.json", "--dry", "--only", "correct_kernels")
    rows = found["sections"]["correct_kernels"]["rows"]
    assert code == 0, found
    interpreted = [row for row in rows if row["way"].startswith(("interpreted", "tiled"))]
    assert {row["op"].split()[0] for row in interpreted} == {
        "sum_of_products", "factor_gradients", "nf4_dequantize", "nf4_linear",
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_runs_every_section(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["sh", str(ROOT / "benchmarks" / "gpu.sh"), "--dry", "--budget", "3000", "--json", str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(path.read_text())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {name: section["status"] for name, section in found["sections"].items()} == dict.fromkeys(
        script.SECTIONS, "ok"
    )
    assert all(section["rows"] for section in found["sections"].values())
