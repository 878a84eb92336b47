"""What the sections share: their arguments, a row written and printed at a time, and the clock."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch


class Section:
    """Rows go to a file as they come, so that a section which is ended keeps what it had."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--rows", type=Path, required=True)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--dry", action="store_true")
        given = parser.parse_args()
        self.rows, self.seconds, self.dry = given.rows, given.seconds, given.dry
        self.device = torch.device("cpu" if self.dry else "cuda")
        self._began = time.monotonic()
        if not self.dry and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --dry runs every section on a CPU")
        if not self.dry:
            # Graphics cards multiply float32 in TF32 only where asked to; results are compared with float64.
            torch.backends.cuda.matmul.allow_tf32 = False
        torch.manual_seed(0)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self._began)

    def over(self, what: str) -> bool:
        """Is there no time for `what`? Then that is a row."""
        if self.left > 0:
            return False
        self.row(what=what, skipped="the section's time is up")
        return True

    def row(self, **values: Any) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False) + "\n")
        print("   " + "  ".join(f"{name}={_short(value)}" for name, value in values.items()), flush=True)

    def earlier(self, section: str) -> list[dict[str, Any]]:
        """The rows of a section that ran before."""
        path = Path(os.environ.get("GPU_ROWS", self.rows.parent), f"{section}.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finite(value: Any) -> Any:
    """JSON has no word for the others."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
