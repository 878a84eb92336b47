"""AOTInductor packages: the program decomposed to aten, its weights computed, compiled for this machine's CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from lrcompile.errors import ExportError
from lrcompile.passes.base import Program
from lrcompile.verifying.manifest import sha256
from lrcompile.writing import atomic_file


def write(program: Program, path: Path, describe: Callable[[dict[str, str]], bytes]) -> None:
    """Write `path` and its manifest. Unlike ONNX, a package is compiled from the weights, so all of them are computed.

    Raises ExportError when Inductor cannot compile the program (it needs a C++ compiler) or a file cannot be written.
    """
    program.compute()
    with (
        atomic_file(path.with_suffix(".manifest.json"), error=ExportError) as described,
        atomic_file(path, error=ExportError) as temporary,
    ):
        try:
            lowered = program.exported.run_decompositions()
            torch._inductor.aoti_compile_and_package(lowered, package_path=os.fspath(temporary))
        except RuntimeError as error:
            raise ExportError(
                f"Inductor could not compile {path.name}: {error}\n.onnx is the other supported format"
            ) from error
        described.write_bytes(describe({path.name: sha256(temporary)}))
