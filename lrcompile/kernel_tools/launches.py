"""A kernel with everything one run of it needs, so that running it and compiling it ahead of time see the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """What a tuner may vary: the kernel's block sizes by name, warps a program, stages of the software pipeline."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


def config(num_warps: int, num_stages: int, **blocks: int) -> Config:
    """`config(8, 3, BLOCK_T=128)`: in this order because warps and stages are what all kernels have."""
    return Config(tuple(blocks.items()), num_warps, num_stages)


@dataclass(frozen=True)
class Launch:
    """`kernel` on `grid` with `arguments` by name: tensors, numbers, tuples of them, and the kernel's constexprs.

    The config's blocks are passed as constexprs of those names. Calling it runs it, on the device of the tensors, or
    on the CPU where the kernel's module was imported under TRITON_INTERPRET=1. On meta tensors it can only be compiled
    (`compiling.usage`).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config
    fuse_multiply_add: bool = True
    """a·b + c rounded once. Not where the bits of a reference that rounds twice are wanted."""

    @property
    def options(self) -> dict[str, Any]:
        # Said outright: Triton 3.10 turns fusing of multiply and add off where nobody asks for it.
        return {
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
            "enable_fp_fusion": self.fuse_multiply_add,
        }

    @property
    def values(self) -> dict[str, Any]:
        """Every argument of the kernel by name."""
        return {**self.arguments, **dict(self.config.blocks)}

    def __call__(self) -> None:
        self.kernel[self.grid](**self.values, **self.options)
