"""AOTInductor packages: the program decomposed to aten, its weights computed, compiled for this machine's CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.capture import Captured
from lrcompile.dialect_nf4 import decompose
from lrcompile.errors import ExportError
from lrcompile.folding import Recipe
from lrcompile.manifest import sha256
from lrcompile.writing import atomic_file


def write(
    captured: Captured, recipes: Mapping[str, Recipe], path: Path, describe: Callable[[dict[str, str]], bytes]
) -> None:
    """Write `path` and its manifest. Unlike ONNX, a package is compiled from the weights, so all of them are computed.

    Raises ExportError when Inductor cannot compile the program (it needs a C++ compiler) or a file cannot be written.
    """
    program = captured.program
    for name, recipe in recipes.items():
        weight = recipe()
        is_parameter = isinstance(program.state_dict[name], nn.Parameter)
        program.state_dict[name] = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
    with (
        atomic_file(path.with_suffix(".manifest.json"), error=ExportError) as described,
        atomic_file(path, error=ExportError) as temporary,
    ):
        try:
            lowered = _without_nf4_op(captured).run_decompositions()
            torch._inductor.aoti_compile_and_package(lowered, package_path=os.fspath(temporary))
        except RuntimeError as error:
            raise ExportError(
                f"Inductor could not compile {path.name}: {error}\n.onnx is the other supported format"
            ) from error
        described.write_bytes(describe({path.name: sha256(temporary)}))


def _without_nf4_op(captured: Captured) -> ExportedProgram:
    """A Python op in a package could not be loaded in another process, so it is spelled out and captured again."""
    module = captured.program.module()
    if not decompose(module):
        return captured.program
    args, kwargs = captured.examples
    return torch.export.export(module, args, kwargs, dynamic_shapes=captured.shapes, strict=False)
