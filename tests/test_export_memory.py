"""An export of large weights stays near their own size in memory; measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's high-water mark is Linux's")
def test_a_merged_decoder_of_676_mib_is_exported_within_1_3_times_its_weights():
    options = ("--layers", "10", "--hidden", "1024", "--form", "merge", "--use-cache")
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["weights_MiB"] > 600
    assert result["held_before"] > 0.9  # the model itself is in the figure
    assert 0.95 < result["peak_anonymous"] <= result["peak"] < 1.3, result
