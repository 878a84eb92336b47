"""Runs the sections in order within a budget of time, and writes one JSON of every number and every failure."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SECTIONS = {
    "machine": 30,
    "ceilings": 40,
    "correct_kernels": 150,
    "correct_steps": 120,
    "time_nf4": 110,
    "time_lora": 130,
    "time_steps": 150,
}
"""Seconds each may take at most. Ceilings come before what is measured against them, correctness before any timing."""
MODULE = "gpu.{}"
LEAST = 10.0
"""Seconds below which a section is not begun."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    out = os.environ.get("OUT")
    parser.add_argument("--json", type=Path, default=Path(out, "gpu.json") if out else None, help="where to write")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, Triton interpreted: no figure counts")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    result: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "dry": given.dry, "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in (each for each in SECTIONS if each in given.only):
            left = given.budget - (time.monotonic() - began)
            limit = min(SECTIONS[name] * (5 if given.dry else 1), left)
            print(f"== {name} ({left:.0f} s left)", flush=True)
            if limit < LEAST:
                section: dict[str, Any] = {
                    "status": "skipped",
                    "reason": f"{left:.0f} s of {given.budget:.0f} were left",
                }
            else:
                section = _run(name, Path(folder), limit, given.dry)
            print(f"   {section['status']} {section.get('reason', '')}", flush=True)
            result["sections"][name] = section
    result["seconds"] = round(time.monotonic() - began, 1)
    failed = [name for name, section in result["sections"].items() if section["status"] == "failed"]
    result["failed"] = failed
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1))
        print(f"written to {given.json}")
    print("failed: " + ", ".join(failed) if failed else "nothing failed")
    return 1 if failed else 0


def _run(name: str, folder: Path, limit: float, dry: bool) -> dict[str, Any]:
    """One section in a process of its own; what it had reported by the time it ended, however it ended."""
    rows = folder / f"{name}.jsonl"
    environment = {**os.environ, "GPU_ROWS": str(folder)}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # A section stops by itself at nine tenths; one that does not (a compiler, a hung kernel) is ended.
    command = [sys.executable, "-m", MODULE.format(name), "--rows", str(rows), "--seconds", str(0.9 * limit)]
    began = time.monotonic()
    try:
        ended = subprocess.run([*command, *(["--dry"] if dry else [])], env=environment, timeout=limit,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
        code, errors = ended.returncode, ended.stderr
    except subprocess.TimeoutExpired as expired:
        code, errors = None, _text(expired.stderr)
    lines = rows.read_text().splitlines() if rows.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    wrong = [row for row in found if row.get("ok") is False]
    section: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "status": "ok", "rows": found}
    if code is None:
        section |= {"status": "failed", "reason": f"not done after {limit:.0f} s"}
    elif code:
        section |= {"status": "failed", "reason": f"exit code {code}", "stderr": errors[-4000:]}
        print(errors[-4000:], file=sys.stderr)
    elif wrong:
        section |= {"status": "failed", "reason": f"{len(wrong)} of {len(found)} checks do not hold"}
    return section


def _text(said: bytes | str | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


if __name__ == "__main__":
    sys.exit(main())
