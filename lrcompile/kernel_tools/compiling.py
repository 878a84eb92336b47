"""Compiling a launch for a GPU that is not there, and reading what the assembler made of it.

A kernel module lists its launches, on meta tensors, in `ahead_of_time(capability) -> dict[str, Launch]`: every
configuration its tuner may choose on that target, for the shapes it was written for. From a shell:

    python -m lrcompile.kernel_tools.compiling lrcompile.kernels.lora_linear.fused --capability 90 --every 4

prints one JSON object, `{name: {registers, stack, shared, wgmma}}`. It needs Triton but neither GPU nor driver, and it
must be a process of its own where kernels are otherwise interpreted (TRITON_INTERPRET is read when they are decorated).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from lrcompile.errors import LrcompileError, require
from lrcompile.kernel_tools.launches import Launch

DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
"""Torch's dtypes in Triton's spelling."""
DIVISIBLE = [["tt.divisibility", 16]]
"""Triton compiles a kernel of its own for pointers and integers that are multiples of 16: it may then load vectors."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one thread: registers, and bytes of stack, which is where spilled registers go. Of one program: shared bytes.

    `stack` is 0 exactly where nothing spilled: these kernels have no arrays, calls or recursion that would need one.
    `wgmma`: whether products use Hopper's own instructions; with the older ones it stays well below its peak.
    """

    registers: int
    stack: int
    shared: int
    wgmma: bool


def usage(launch: Launch, capability: int) -> Usage:
    """What `compiled` makes of it needs."""
    binary = compiled(launch, capability)
    registers, stack = _resources(binary.asm["cubin"])
    return Usage(registers, stack, binary.metadata.shared, "wgmma" in binary.asm["ptx"])


def compiled(launch: Launch, capability: int) -> Any:
    """Compile `launch` for compute capability `capability` (90 for Hopper) as a run with these arguments would.

    The result has the code by stage in `.asm`: "ttgir", "ptx", "cubin", "sass". Tensors may be meta tensors, whose
    storage counts as aligned, as what an allocator returns is. Under TRITON_INTERPRET=1 there is nothing to compile:
    LrcompileError.
    """
    triton = require("triton", "gpu")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise LrcompileError(
            f"{launch.kernel.__name__} was imported under TRITON_INTERPRET=1 and cannot be compiled; compile it in a"
            " process without that variable (lrcompile.kernel_tools.compiling.usages starts one)"
        )
    described = _Described()
    for parameter in launch.kernel.params:
        described.add(parameter, launch.values[parameter.name])
    source = ASTSource(launch.kernel, described.signature, described.constants, described.attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


class _Described:
    """The arguments as Triton's compiler wants them: types by name, constants and known divisors by position."""

    def __init__(self) -> None:
        self.signature: dict[str, Any] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def add(self, parameter: Any, value: Any) -> None:
        if parameter.is_constexpr:
            self.signature[parameter.name], self.constants[parameter.num,] = "constexpr", value
        else:
            self.signature[parameter.name] = self._type(value, (parameter.num,), not parameter.do_not_specialize)

    def _type(self, value: Any, path: tuple[int, ...], specialize: bool) -> Any:
        """Noting on the way what a run would specialize on: a pointer's alignment, a multiple of 16, a 1."""
        if isinstance(value, tuple):
            return tuple(self._type(inner, (*path, i), specialize) for i, inner in enumerate(value))
        if value is None or (specialize and isinstance(value, int) and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            if specialize and value.data_ptr() % 16 == 0:
                self.attributes[path] = DIVISIBLE
            return "*" + DTYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if hasattr(value, "block_shape"):  # a TensorDescriptor, whose module only those who use it import
            return f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}>"
        if specialize and value % 16 == 0:
            self.attributes[path] = DIVISIBLE
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = dict(word.split(":", 1) for word in said.split() if ":" in word)
    return int(numbers["REG"]), int(numbers["STACK"])


def usages(module: str, capability: int, every: int = 1) -> dict[str, Usage]:
    """`usage` of each of `every`-th launch that `module` lists, in a fresh process without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __name__, module, "--capability", str(capability), "--every", str(every)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise LrcompileError(f"{module} does not compile for sm_{capability}:\n{run.stderr}")
    return {name: Usage(**numbers) for name, numbers in json.loads(run.stdout).items()}


def _listed(module: str, capability: int, every: int) -> Iterator[tuple[str, Usage]]:
    launches = importlib.import_module(module).ahead_of_time(capability)
    for name in list(launches)[::every]:
        yield name, usage(launches[name], capability)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile a module's Triton kernels for a GPU that is not there.")
    parser.add_argument("module", help="a module with ahead_of_time(capability)")
    parser.add_argument("--capability", type=int, default=90, help="80 for A100, 90 for H100 and H200")
    parser.add_argument("--every", type=int, default=1, help="only every n-th launch")
    given = parser.parse_args(arguments)
    found = _listed(given.module, given.capability, given.every)
    print(json.dumps({name: dataclasses.asdict(numbers) for name, numbers in found}, indent=1))


if __name__ == "__main__":
    main()
