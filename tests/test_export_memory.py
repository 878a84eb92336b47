"""An export of large weights stays near their own size in memory; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's high-water mark is Linux's"),
]


def _measured(*options: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["held_before"] > 0.9  # the model itself is in the figure
    assert 0.95 < result["peak_anonymous"] <= result["peak"], result
    return result


def test_a_merged_decoder_of_676_mib_is_exported_within_1_3_times_its_weights():
    result = _measured("--layers", "10", "--hidden", "1024", "--form", "merge", "--use-cache")
    assert result["weights_MiB"] > 600
    assert result["peak"] < 1.3, result


def test_a_package_is_written_without_a_second_copy_of_its_weights_in_memory():
    result = _measured("--layers", "2", "--hidden", "1024", "--form", "merge", "--suffix", ".pt2")
    assert result["written_MiB"] < 1.02 * result["weights_MiB"]
    # what does not grow with the weights is 0.5 of this small model; the folded weights alone would be another 0.65
    assert result["peak_anonymous"] < 1.8, result
