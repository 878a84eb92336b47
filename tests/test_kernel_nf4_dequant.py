"""NF4 storage: codes as bitsandbytes', values as the definition, in bounded memory; `nf4_dequantize` gives its bits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from zoo.hopper import pretend_hopper
from zoo.poisoned import flat_within_nan, unwritten

from lrcompile.kernel_tools.compiling import usages
from lrcompile.kernel_tools.launches import config
from lrcompile.kernels.nf4_dequant import (
    ABSMAX_BLOCK,
    BLOCK_SIZES,
    CODEBOOK,
    DYNAMIC_CODEBOOK,
    Nf4,
    decode_absmax,
    dequantize_nf4,
    nf4_shapes,
    ops,
)
from lrcompile.kernels.nf4_dequant import (
    quantize_nf4 as _quantize_nf4,
)
from lrcompile.kernels.nf4_dequant.ops import BACKWARD, FORWARD
from lrcompile.kernels.nf4_dequant.storage import CHUNK

bnb = pytest.importorskip("bitsandbytes.functional")
quantize_nf4: Any = _quantize_nf4  # which of its optional fields are there is known in each test
quick = settings(deadline=None, max_examples=25, derandomize=True)
shapes = st.tuples(st.integers(1, 41), st.integers(1, 97))
HALF_GAP = max(b - a for a, b in itertools.pairwise(CODEBOOK)) / 2


def _weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _indices(nf4: Nf4, n: int) -> torch.Tensor:
    return torch.stack([nf4.codes >> 4, nf4.codes & 15], 1).view(-1)[:n].long()


def _peaks(nf4: Nf4, shape, block_size) -> torch.Tensor:
    return decode_absmax(nf4).repeat_interleave(block_size)[: math.prod(shape)].view(shape)


def _away_from_ties(weight, block_size) -> torch.Tensor:
    """Bytes of which neither value lies within float32's rounding of a decision threshold."""
    flat = weight.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size).double()
    unit = (padded / padded.abs().amax(1, keepdim=True).clamp(min=1e-38)).view(-1)[: 2 * -(-flat.numel() // 2)]
    thresholds = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(CODEBOOK)], dtype=torch.float64)
    clear = (unit[:, None] - thresholds).abs().amin(1) > 3e-7
    return clear.view(-1, 2).all(1)


@quick
@given(
    shape=shapes,
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_and_maxima_are_bitsandbytes_bit_for_bit_away_from_ties(shape, block_size, dtype, double_quant, seed):
    weight = _weight(shape, dtype, seed)
    ours = quantize_nf4(weight, block_size, double_quant)
    codes, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant)
    clear = _away_from_ties(weight, block_size)
    assert torch.equal(ours.codes[clear], codes.view(-1)[clear])
    if not double_quant:
        assert torch.equal(ours.absmax, state.absmax)
        return
    assert torch.equal(ours.absmax_scale, state.state2.absmax)
    assert torch.equal(ours.absmax_offset, state.offset)
    # bitsandbytes' own CPU search through the 256 values is approximate: where it differs it is never nearer.
    table = torch.tensor(DYNAMIC_CODEBOOK)
    target = quantize_nf4(weight, block_size, False).absmax - ours.absmax_offset
    scale = ours.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: target.numel()]
    error, theirs = ((table[code.int()] * scale - target).abs() for code in (ours.absmax, state.absmax))
    assert (error <= theirs * (1 + 1e-5)).all()


def test_the_second_level_code_is_bitsandbytes_dynamic_map():
    assert torch.equal(torch.tensor(DYNAMIC_CODEBOOK), bnb.create_dynamic_map())


def test_maxima_of_many_blocks_are_nearest_in_the_dynamic_code():
    weight = _weight((70, 515))
    nf4, exact = quantize_nf4(weight, 32, True), quantize_nf4(weight, 32, False).absmax
    assert nf4.absmax_scale.shape == (-(-exact.numel() // ABSMAX_BLOCK),)
    scale = nf4.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: exact.numel()]
    every = torch.tensor(DYNAMIC_CODEBOOK)[None, :] * scale[:, None]
    best = (every - (exact - nf4.absmax_offset)[:, None]).abs().amin(1)
    chosen = (decode_absmax(nf4) - exact).abs()
    assert (chosen - best).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.max()


@quick
@given(shape=shapes, block_size=st.sampled_from(BLOCK_SIZES), seed=st.integers(0, 99))
def test_each_value_is_the_definition_and_within_half_a_gap(shape, block_size, seed):
    weight = _weight(shape, seed=seed)
    nf4 = quantize_nf4(weight, block_size, False)
    peaks = _peaks(nf4, shape, block_size)
    assert torch.equal(
        dequantize_nf4(nf4, shape, block_size),
        torch.tensor(CODEBOOK)[_indices(nf4, weight.numel())].view(shape) * peaks,
    )
    error = (dequantize_nf4(nf4, shape, block_size, torch.float64) - weight.double()).abs()
    assert (error <= peaks.double() * (HALF_GAP + 3e-7)).all()
    assert pytest.approx(0.1519, abs=1e-4) == HALF_GAP


@quick
@given(shape=shapes, block_size=st.sampled_from(BLOCK_SIZES), seed=st.integers(0, 99))
def test_requantizing_what_was_stored_changes_nothing(shape, block_size, seed):
    nf4 = quantize_nf4(_weight(shape, seed=seed), block_size, False)
    again = quantize_nf4(dequantize_nf4(nf4, shape, block_size), block_size, False)
    assert torch.equal(nf4.codes, again.codes)
    assert torch.equal(nf4.absmax, again.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_survive_rounding_of_the_weight_and_double_quantization(double_quant):
    nf4 = quantize_nf4(_weight((37, 53)), 64, double_quant)
    again = quantize_nf4(dequantize_nf4(nf4, (37, 53), 64, torch.bfloat16), 64, double_quant)
    assert torch.equal(nf4.codes, again.codes)


def test_double_quantization_does_not_touch_the_codes():
    weight = _weight((33, 65))
    assert torch.equal(quantize_nf4(weight, 64, True).codes, quantize_nf4(weight, 64, False).codes)


def test_a_block_of_zeros_is_exactly_zero_and_extremes_are_exact():
    weight = _weight((4, 64))
    weight[1] = 0
    weight[3, 5], weight[2, 7] = -9.7, 8.3
    nf4 = quantize_nf4(weight, 64, False)
    restored = dequantize_nf4(nf4, (4, 64), 64)
    assert (restored[1] == 0).all()
    assert (_indices(nf4, 256).view(4, 64)[1] == 7).all()
    assert restored[3, 5] == weight[3, 5]
    assert restored[2, 7] == weight[2, 7]


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(scale):
    weight = _weight((3, 43)).clamp(-1, 1) * scale
    restored = dequantize_nf4(quantize_nf4(weight, 32, False), (3, 43), 32)
    assert torch.isfinite(restored).all()
    assert (restored.double() - weight.double()).abs().max() <= weight.double().abs().max() * (
        0.153 if scale > 1e-37 else 1
    )


def test_the_even_element_is_in_the_high_nibble_and_the_last_low_nibble_is_zero():
    nf4 = quantize_nf4(torch.tensor([[-1.0, 1.0, 1.0]]), 32, False)
    assert nf4.codes.tolist() == [0x0F, 0xF7]


def test_blocks_run_across_row_ends():
    weight = torch.ones(2, 48)
    weight[1] = 5
    assert quantize_nf4(weight, 64, False).absmax.tolist() == [5, 5]


def test_storage_is_half_a_byte_an_element_and_the_block_state():
    shape, block_size = (129, 257), 64
    codes, blocks, scales = nf4_shapes(129 * 257, block_size)
    plain, double = (quantize_nf4(_weight(shape), block_size, flag) for flag in (False, True))
    assert plain.codes.nbytes + plain.absmax.nbytes == codes + 4 * blocks
    assert sum(tensor.nbytes for tensor in double) == codes + blocks + 4 * scales + 4
    million = nf4_shapes(1 << 24, 64)
    assert 8 * (million[0] + million[1] + 4 * million[2]) / (1 << 24) == pytest.approx(4.127, abs=1e-3)


def test_pieces_make_the_same_weight_as_the_whole():
    shape = (1031, 3 * CHUNK // 1000)
    weight = _weight(shape)
    nf4 = quantize_nf4(weight, 64, True)
    assert weight.numel() > 2 * CHUNK
    assert torch.equal(nf4.codes[: CHUNK // 2], quantize_nf4(weight.flatten()[:CHUNK], 64).codes)
    assert torch.equal(nf4.codes[CHUNK // 2 : CHUNK], quantize_nf4(weight.flatten()[CHUNK : 2 * CHUNK], 64).codes)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(dequantize_nf4(nf4, shape, 64, dtype), dequantize_nf4(nf4, shape, 64, dtype, whole=True))


def test_float64_is_formed_in_float64():
    nf4 = quantize_nf4(_weight((9, 31)), 32, True)
    table, dynamic = torch.tensor(CODEBOOK).double(), torch.tensor(DYNAMIC_CODEBOOK).double()
    peaks = dynamic[nf4.absmax.int()] * nf4.absmax_scale.double() + nf4.absmax_offset.double()
    exact = table[_indices(nf4, 279)] * peaks.repeat_interleave(32)[:279]
    assert torch.equal(dequantize_nf4(nf4, (9, 31), 32, torch.float64).view(-1), exact)


def test_the_meta_device_gives_the_shapes_of_a_real_weight():
    for double_quant in (False, True):
        real = quantize_nf4(_weight((33, 65)), 64, double_quant)
        meta = quantize_nf4(torch.empty(33, 65, device="meta"), 64, double_quant)
        for a, b in zip(real, meta, strict=True):
            assert (a is None and b is None) or (a.shape == b.shape and a.dtype == b.dtype and b.is_meta)


@pytest.mark.parametrize("block_size", [0, 16, 48, 63, 8192])
def test_other_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="expected one of 32, 64"):
        quantize_nf4(_weight((4, 64)), block_size)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    weight = _weight((4, 64))
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="NaN"):
        quantize_nf4(weight)


@pytest.mark.parametrize(
    "weight", [torch.zeros(0, 4), torch.ones(3, 4, dtype=torch.int8), torch.full((2, 2), 1e300, dtype=torch.float64)]
)
def test_what_float32_cannot_hold_is_refused(weight):
    with pytest.raises(ValueError, match="float"):
        quantize_nf4(weight)


op = torch.ops.lrcompile_kernels.nf4_dequantize


@quick
@given(
    shape=shapes,
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_op_gives_the_bits_of_the_definition_in_either_phase(shape, block_size, double_quant, dtype):
    nf4 = quantize_nf4(_weight(shape), block_size, double_quant)
    expected = dequantize_nf4(nf4, shape, block_size, dtype)
    for phase in (FORWARD, BACKWARD):
        assert torch.equal(op(*nf4, *shape, block_size, dtype, phase), expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_finds_the_op_and_its_fake_in_agreement(double_quant):
    nf4 = quantize_nf4(_weight((7, 13)), 32, double_quant)
    torch.library.opcheck(op.default, (*nf4, 7, 13, 32, torch.bfloat16, FORWARD))


def test_the_op_refuses_storage_of_another_shape():
    nf4 = quantize_nf4(_weight((7, 13)), 32, True)
    with pytest.raises(
        RuntimeError, match=r"nf4_dequantize: codes is torch.uint8 \(46,\), expected torch.uint8 \(49,\)"
    ):
        op(*nf4, 7, 14, 32, torch.bfloat16, FORWARD)


class _Halves(torch.autograd.Function):
    """y = x·Wᵀ with W made anew in the backward pass, as a schedule does; in one phase for both if asked."""

    @staticmethod
    def forward(ctx, x, phase, *nf4):
        ctx.phase = phase
        ctx.save_for_backward(*nf4)
        return x @ op(*nf4, 40, 24, 32, x.dtype, FORWARD).t()

    @staticmethod
    def backward(ctx, dy):
        return dy @ op(*ctx.saved_tensors, 40, 24, 32, dy.dtype, ctx.phase), *(5 * (None,))


@pytest.mark.parametrize(("phase", "kept"), [(FORWARD, True), (BACKWARD, False)])
def test_only_the_phase_keeps_the_weight_of_the_forward_pass_from_living_until_the_backward(phase, kept):
    nf4 = quantize_nf4(_weight((40, 24)), 32, True)
    handed: list[tuple[int, ...]] = []

    def backward_compiler(graph, _):
        handed.extend(tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.op == "placeholder")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=backward_compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    f = torch.compile(lambda x: _Halves.apply(x * 2, phase, *nf4), backend=backend, fullgraph=True)
    x = _weight((5, 24)).requires_grad_()
    f(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * dequantize_nf4(nf4, (40, 24), 32).sum(0).expand(5, 24))
    assert ((40, 24) in handed) == kept


fused = pytest.importorskip("lrcompile.kernels.nf4_dequant.fused")
SMALL = config(4, 1, WORDS=32, REPEAT=2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _surrounded(nf4: Nf4) -> Nf4:
    """The same storage within other bytes and NaN."""
    return Nf4._make(None if tensor is None else flat_within_nan(tensor) for tensor in nf4)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((1, 1), 32), ((13, 7), 32), ((37, 53), 64), ((16, 96), 128), ((9, 111), 256), ((64, 16), 512),
        ((5, 613), 1024), ((33, 65), 2048), ((70, 63), 4096), ((70, 131), 32),
    ],
)  # fmt: skip
def test_the_kernel_writes_the_bits_of_the_definition(shape, block_size, dtype, double_quant):
    nf4 = quantize_nf4(_weight(shape), block_size, double_quant)
    weight = unwritten(*shape, dtype=dtype)
    fused.launch(_surrounded(nf4), block_size, weight, SMALL)()
    assert torch.equal(weight, dequantize_nf4(nf4, shape, block_size, dtype))


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return pretend_hopper(monkeypatch, ops)


@pytest.mark.parametrize("dtype", FLOATS)
def test_on_cuda_every_configuration_gives_the_same_bits_and_is_measured_once(as_on_hopper, dtype):
    nf4 = quantize_nf4(_weight((37, 53)), 64, True)
    for _ in range(2):
        found = ops.fastest_nf4_dequantize(
            nf4.codes, nf4.absmax, nf4.absmax_scale, nf4.absmax_offset, 37, 53, 64, dtype, BACKWARD
        )
        assert torch.equal(found, dequantize_nf4(nf4, (37, 53), 64, dtype))
    assert len(as_on_hopper) == len(fused.CONFIGS)


def test_what_the_kernel_does_not_write_is_left_to_torch(as_on_hopper):
    nf4 = quantize_nf4(_weight((7, 13)), 32, True)
    found = ops.fastest_nf4_dequantize(
        nf4.codes, nf4.absmax, nf4.absmax_scale, nf4.absmax_offset, 7, 13, 32, torch.float64, FORWARD
    )
    assert torch.equal(found, dequantize_nf4(nf4, (7, 13), 32, torch.float64))
    assert as_on_hopper == []
    assert list(ops.ways_to_dequantize(torch.device("cpu"), torch.float64)) == ["aten"]


def test_a_cpu_never_meets_triton_and_cuda_has_its_own_kernel():
    assert list(ops.ways_to_dequantize(torch.device("cpu"), torch.bfloat16)) == ["aten"]
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, "lrcompile_kernels::nf4_dequantize")
    assert has("CUDA")
    assert not has("CPU")


def test_a_sample_of_configurations_compiles_without_spills():
    found = usages("lrcompile.kernels.nf4_dequant.fused", 90, every=19)
    assert len(found) == 2
    for name, usage in found.items():
        assert usage.stack == 0, f"{name} spills: {usage}"
        assert usage.registers <= 64, f"{name} leaves too few threads to reach the memory's bandwidth: {usage}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_compiles_without_spills(capability):
    found = usages("lrcompile.kernels.nf4_dequant.fused", capability)
    assert {usage.stack for usage in found.values()} == {0}
    assert max(usage.registers for usage in found.values()) <= 64


def test_scale_and_offset_are_not_fused_into_one_rounding():
    """d·s + μ as one FMA would be another number than the reference's, which rounds the product."""
    code = """
from lrcompile.kernel_tools.compiling import compiled
from lrcompile.kernels.nf4_dequant.fused import ahead_of_time
launch = next(launch for name, launch in ahead_of_time(90).items() if "double torch.float32" in name)
instructions = compiled(launch, 90).asm["sass"]
print("FMUL" in instructions, "FADD" in instructions, "FFMA" in instructions)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["True", "True", "False"], run.stderr
