"""y = x·dq(W)ᵀ + b: the definition, and kernels that multiply by the codes, interpreted, against float64.

Inputs lie within NaN and outputs start as NaN, so reading out of bounds and leaving an element unwritten both show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.hopper import pretend_hopper
from zoo.poisoned import bound_ratio, flat_within_nan, unwritten

import lrcompile.dialect.nf4  # noqa: F401  (registers lrcompile::nf4_linear)
from lrcompile.kernel_tools import parts
from lrcompile.kernel_tools.compiling import usages
from lrcompile.kernel_tools.launches import Config, config
from lrcompile.kernels.nf4_dequant import CODEBOOK, Nf4, dequantize_nf4, quantize_nf4
from lrcompile.kernels.nf4_dequant import ops as dequant_ops
from lrcompile.kernels.nf4_linear import nf4_linear, ops

pytest.importorskip("triton")
fused = pytest.importorskip("lrcompile.kernels.nf4_linear.fused")
nibbles = pytest.importorskip("lrcompile.kernels.nf4_linear.nibbles")
operands = pytest.importorskip("lrcompile.kernels.nf4_linear.operands")

HALVES = (torch.bfloat16, torch.float16)
LIMIT = 4
"""Of max|y − y64| / (u·Σ|x||W|): code book, scaled weight and y are each rounded once, float32 sums take the rest."""
GEMV = config(4, 1, SLICES=2, OUTPUTS=16, LOOK_UP=0)
WIDE_GEMV = config(4, 1, SLICES=4, OUTPUTS=32, LOOK_UP=1)
SKINNY = config(4, 2, OUTPUTS=32, ROWS=16)
TILED = config(4, 2, ROWS=16, OUTPUTS=32, DEPTH=32)


def _weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _values(nf4: Nf4, block_size: int, transposed: bool, n: int, k: int) -> Tensor:
    """dq(W) `[n, k]` in float64."""
    W = dequantize_nf4(nf4, (k, n) if transposed else (n, k), block_size, torch.float64)
    return W.t() if transposed else W


@pytest.mark.parametrize("transposed", [False, True])
def test_the_linear_map_is_the_dequantized_weights(transposed):
    weight, x, bias = _weight((13, 7) if transposed else (7, 13)), _weight((2, 3, 13), seed=1), _weight(7, seed=2)
    nf4 = quantize_nf4(weight, 32, True)
    y = nf4_linear(x, nf4, bias, 7, 13, 32, transposed, torch.float64)
    exact = x.double() @ _values(nf4, 32, transposed, 7, 13).T + bias.double()
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), exact, rtol=2**-23, atol=1e-12)


def _run(
    path: str, config: Config, x: Tensor, nf4: Nf4, bias: Tensor | None, n: int, block_size: int,
    transposed: bool = False,
) -> tuple[Tensor, int]:  # fmt: skip
    """y of the kernel, everything within NaN, and how many launches it took."""
    stored = Nf4._make(None if tensor is None else flat_within_nan(tensor) for tensor in nf4)
    y = unwritten(x.shape[0], n, dtype=x.dtype)
    given = operands.Operands(
        flat_within_nan(x), stored, None if bias is None else flat_within_nan(bias), y, block_size, transposed
    )
    launches = fused.LAUNCHES[path](given, config)
    for launch in launches:
        launch()
    return y, len(launches)


def _held(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None) -> float:
    b = 0 if bias is None else bias.double()
    magnitude = x.double().abs() @ W.abs().T + (0 if bias is None else bias.double().abs())
    return bound_ratio(y, x.double() @ W.T + b, magnitude)


CASES = (
    # path, config, rows, out, in, transposed: one row and output; odd rows and outputs; more than a tile; rows of W in
    # multiples of 64, of 32, of 8; fewer inner elements than slices; any number of inner elements where transposed
    ("gemv", GEMV, 1, 1, 32, False),
    ("gemv", GEMV, 5, 37, 160, False),
    ("gemv", WIDE_GEMV, 11, 37, 192, False),
    ("gemv", WIDE_GEMV, 16, 32, 64, False),
    ("skinny", SKINNY, 19, 37, 96, False),
    ("skinny", SKINNY, 16, 33, 128, False),
    ("skinny", config(4, 2, OUTPUTS=64, ROWS=32), 20, 65, 64, False),
    ("tiled", TILED, 19, 37, 72, False),
    ("tiled", config(4, 2, ROWS=32, OUTPUTS=64, DEPTH=64), 33, 70, 128, False),
    ("tiled", TILED, 19, 40, 37, True),
    ("tiled", config(4, 2, ROWS=16, OUTPUTS=64, DEPTH=64), 5, 128, 65, True),
)
STORED = (
    # block size, double quantization, dtype, whether there is a bias
    (32, True, torch.bfloat16, False),
    (64, False, torch.bfloat16, True),
    (64, True, torch.float16, True),
    (128, True, torch.bfloat16, False),
    (4096, False, torch.float16, False),
)


@pytest.mark.parametrize(
    ("case", "stored"), [(case, STORED[(i + j) % len(STORED)]) for i, case in enumerate(CASES) for j in (0, 2)]
)
def test_every_kernel_is_within_the_bound_of_float64(case: tuple[Any, ...], stored: tuple[Any, ...]):
    path, config, rows, n, k, transposed = case
    block_size, double_quant, dtype, biased = stored
    nf4 = quantize_nf4(_weight((k, n) if transposed else (n, k)), block_size, double_quant)
    x, bias = _weight((rows, k), dtype, 1), _weight(n, dtype, 2) if biased else None
    y, _ = _run(path, config, x, nf4, bias, n, block_size, transposed)
    assert _held(y, x, _values(nf4, block_size, transposed, n, k), bias) < LIMIT


@pytest.mark.parametrize("block_size", [256, 512, 1024, 2048])
def test_the_other_block_sizes_are_decoded_too(block_size):
    nf4 = quantize_nf4(_weight((45, 96)), block_size, True)
    x = _weight((3, 96), torch.float16, 1)
    for path, chosen in (("gemv", GEMV), ("tiled", TILED)):
        y, _ = _run(path, chosen, x, nf4, None, 45, block_size)
        assert _held(y, x, _values(nf4, block_size, False, 45, 96), None) < LIMIT


@pytest.mark.parametrize(("path", "config"), [("gemv", GEMV), ("skinny", SKINNY)])
def test_where_maxima_multiply_sums_only_the_code_book_and_the_output_are_rounded(path, config):
    """Against c rounded to float16 nothing but y's own rounding and float32 sums are left, so no product is missing."""
    n, k = 37, 160
    nf4 = quantize_nf4(_weight((n, k)), 64, True)
    x = _weight((12, k), torch.float16, 1)
    y, _ = _run(path, config, x, nf4, None, n, 64)
    unit = Nf4(nf4.codes, torch.ones(nf4.absmax.shape))
    c = dequantize_nf4(unit, (n, k), 64, torch.float64)
    exact = x.double() @ (_values(nf4, 64, False, n, k) / c.where(c != 0, 1) * c.half().double()).T
    assert bound_ratio(y, exact, exact.abs() + 2.0**-8) < 1.01


@pytest.mark.parametrize(
    ("path", "config", "k", "transposed"), [("skinny", SKINNY, 128, False), ("tiled", TILED, 160, True)]
)
def test_programs_that_share_a_tile_add_up(path, config, k, transposed, monkeypatch, nan_when_empty):
    """Four of them: with one step each, and with two, two, one and none."""
    monkeypatch.setattr(parts, "FEWEST_STEPS", 1)
    n = 24
    nf4 = quantize_nf4(_weight((k, n) if transposed else (n, k)), 32, True)
    x, bias = _weight((9, k), torch.float16, 1), _weight(n, torch.float32, 2)
    y, launches = _run(path, config, x, nf4, bias, n, 32, transposed)
    assert launches == 2
    assert _held(y, x, _values(nf4, 32, transposed, n, k), bias) < LIMIT


@pytest.mark.parametrize(
    ("tiles", "steps", "shared"), [(1, 64, 16), (32, 64, 8), (33, 64, 8), (132, 64, 2), (400, 64, 1), (1, 7, 1)]
)
def test_a_tile_is_shared_by_as_many_programs_as_keep_a_device_busy(tiles, steps, shared):
    assert parts.parts(tiles, steps, torch.device("cpu")) == shared


def _emulated(assembly: str, outputs: int, word: int, table: list[int]) -> list[int]:
    """What the assembly that a GPU runs makes of a word; its instructions are those of PTX's manual."""
    registers = {f"${outputs + i}": value for i, value in enumerate([word, *table])}
    for line in assembly.strip("{}\n").split("\n")[1:]:
        name, rest = line.rstrip(";").split(" ", 1)
        target, *given = rest.split(", ")
        values = [registers[each] if each in registers else int(each, 0) for each in given]
        registers[target] = INSTRUCTIONS[name](*values) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def _prmt(a: int, b: int, selector: int) -> int:
    result = 0
    for i in range(4):
        byte = (b << 32 | a) >> 8 * (selector >> 4 * i & 7) & 0xFF
        sign = 0xFF if byte >> 7 else 0
        result |= (sign if selector >> 4 * i & 8 else byte) << 8 * i
    return result


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "shl.b32": lambda a, n: a << n, "shr.b32": lambda a, n: a >> n, "and.b32": lambda a, b: a & b,
    "prmt.b32": _prmt, "lop3.b32": _lop3,
}  # fmt: skip


@pytest.mark.parametrize(("assembly", "outputs"), [("PTX", 4), ("FIRST_HALF", 2)])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_assembly_decodes_every_byte_in_every_place(dtype, assembly, outputs):
    """The one thing the interpreter cannot run."""
    table = [int(word) & 0xFFFFFFFF for word in nibbles.planes(dtype, torch.device("cpu"))[:, 0]]
    bits = [int(value) & 0xFFFF for value in torch.tensor(CODEBOOK).to(dtype).view(torch.int16)]
    for word in [byte << 8 * place | (byte ^ 0x5A) << 8 * (place ^ 1) for place in range(4) for byte in range(256)]:
        for place, pair in enumerate(_emulated(getattr(nibbles, assembly).value, outputs, word, table)):
            byte = word >> 8 * place & 0xFF
            assert pair == bits[byte >> 4] | bits[byte & 15] << 16


def test_the_assembly_is_what_a_thread_can_afford():
    assert nibbles.PTX.value.count("\n") - 2 == 21
    assert nibbles.FIRST_HALF.value.count("\n") - 2 == 11


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return pretend_hopper(monkeypatch, ops)


def _call(
    rows: int, n: int, k: int, transposed: bool, dtype: torch.dtype, bias: bool = True
) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of the op, and dq(W)."""
    nf4 = quantize_nf4(_weight((k, n) if transposed else (n, k)), 32, True)
    x, b = _weight((1, rows, k), dtype, 1), _weight(n, dtype, 2) if bias else None
    return (x, *nf4, b, n, k, 32, transposed, dtype), _values(nf4, 32, transposed, n, k)


@pytest.mark.parametrize(("rows", "n", "k", "transposed"), [(3, 40, 64, False), (20, 40, 64, False), (9, 40, 33, True)])
def test_on_cuda_every_way_gives_the_product_and_each_is_measured_once(as_on_hopper, rows, n, k, transposed):
    arguments, W = _call(rows, n, k, transposed, torch.bfloat16)
    x, *stored, bias = arguments[:6]
    ways = ops.ways_to_multiply(x[0], stored, bias, n, 32, transposed)
    assert {"dequantize"} < set(ways)
    for way in ways.values():
        assert _held(way(x[0], stored, bias, n, 32, transposed), x[0], W, bias) < LIMIT
    for _ in range(2):
        y = ops.fastest_nf4_linear(*arguments)
        assert y.shape == (1, rows, n)
        assert _held(y[0], x[0], W, bias) < LIMIT
    assert len(as_on_hopper) == len(ways)


@pytest.mark.parametrize(
    ("rows", "n", "k", "transposed", "dtype"),
    [
        (3, 40, 64, False, torch.float32), (3, 40, 64, False, torch.float64), (3, 40, 61, False, torch.bfloat16),
        (3, 37, 64, True, torch.bfloat16), (600, 8, 32, False, torch.bfloat16), (0, 8, 32, False, torch.bfloat16),
    ],
    ids=["float32", "float64", "odd in", "odd out, transposed", "600 rows", "no rows"],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_dequantized_first(as_on_hopper, rows, n, k, transposed, dtype):
    arguments, W = _call(rows, n, k, transposed, dtype)
    x, *stored, bias = arguments[:6]
    assert list(ops.ways_to_multiply(x[0], stored, bias, n, 32, transposed)) == ["dequantize"]
    y = ops.fastest_nf4_linear(*arguments)
    assert y.shape == (1, rows, n)
    assert rows == 0 or _held(y[0], x[0], W, bias) < LIMIT
    assert as_on_hopper == []


@pytest.mark.parametrize(
    ("rows", "first"),
    [(1, "gemv"), (16, "gemv"), (64, "skinny OUTPUTS=128 ROWS=64"), (256, "tiled ROWS=128"), (4096, "dequantize")],
)
def test_without_measurement_the_predicted_path_runs(as_on_hopper, rows, first):
    x = torch.empty(rows, 4096, dtype=torch.bfloat16)
    assert next(iter(ops.ways_to_multiply(x, [], None, 4096, 64, False))).startswith(first)


def test_x_of_another_dtype_or_storage_order_is_taken_as_it_is(as_on_hopper):
    arguments, W = _call(3, 40, 64, False, torch.bfloat16, bias=False)
    x = arguments[0]
    for other in (x.float(), x.transpose(0, 1).contiguous().transpose(0, 1), flat_within_nan(x, margin=3)):
        y = ops.fastest_nf4_linear(other, *arguments[1:])
        assert y.dtype == other.dtype
        assert _held(y[0].bfloat16(), x[0], W, None) < LIMIT


def test_a_cpu_never_meets_triton_and_cuda_has_its_own_kernel():
    arguments, _ = _call(3, 40, 64, False, torch.bfloat16)
    assert list(ops.ways_to_multiply(arguments[0][0], arguments[1:5], None, 40, 32, False)) == ["dequantize"]
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, "lrcompile_kernels::nf4_linear")
    assert has("CUDA")
    assert not has("CPU")
    assert dequant_ops.LIBRARY.ns == "lrcompile_kernels"


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_finds_the_op_and_its_fake_in_agreement_and_its_flops_are_counted(transposed):
    arguments, _ = _call(3, 40, 65, transposed, torch.float32)
    for namespace in (torch.ops.lrcompile_kernels, torch.ops.lrcompile):
        torch.library.opcheck(namespace.nf4_linear.default, arguments)
        with FlopCounterMode(display=False) as counter:
            namespace.nf4_linear(*arguments)
        assert counter.get_total_flops() == 2 * 3 * 40 * 65


SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may have on an A100 and on an H100 or H200, by NVIDIA's tables."""


def _afford(found: dict[str, Any], capability: int) -> None:
    assert found
    for name, usage in found.items():
        assert usage.stack == 0, f"{name} spills: {usage}"
        assert usage.shared <= SHARED[capability], f"{name}: {usage}"
        # Two programs of 256 threads a processor, so that one's loads are under way while another computes.
        assert usage.registers <= (128 if name.startswith("gemv 1 ") else 255), f"{name}: {usage}"
        older = name.startswith(("gemv", "sum")) or ("tiled" in name and "ROWS=16" in name)
        assert usage.wgmma == (capability == 90 and not older), f"{name}: {usage}"


def test_a_sample_of_configurations_compiles_without_spills():
    _afford(usages("lrcompile.kernels.nf4_linear.fused", 90, every=40), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_that_may_be_chosen_compiles_without_spills(capability):
    _afford(usages("lrcompile.kernels.nf4_linear.fused", capability), capability)
