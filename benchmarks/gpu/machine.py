"""The device, its clocks, and the versions of everything that the numbers depend on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from gpu.section import Section

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "unsloth", "liger-kernel", "numpy")
ASKED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,persistence_mode"


def main() -> None:
    section = Section()
    section.row(what="python", value=platform.python_version(), system=platform.platform())
    for package in PACKAGES:
        try:
            section.row(what=package, value=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            section.row(what=package, value=None)
    if section.dry:
        return
    found = torch.cuda.get_device_properties(0)
    section.row(
        what="device", value=found.name, capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count, bytes=found.total_memory, cuda=torch.version.cuda,
    )  # fmt: skip
    if shutil.which("nvidia-smi"):
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"], capture_output=True, text=True
        )
        section.row(what="nvidia-smi", value=dict(zip(ASKED.split(","), said.stdout.strip().split(", "), strict=False)))


if __name__ == "__main__":
    main()
