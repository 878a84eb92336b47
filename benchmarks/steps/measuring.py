"""One step of every variant, many times in turn; and what can be counted instead of timed."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from zoo.training import Step, flops

from steps.accuracy import errors
from steps.ratios import interval, percentile
from steps.variants import Variant

MICRO_BATCHES = 4
"""Between two changes of the trained tensors: what is computed once for each state of them is, as in training."""


@dataclass
class Measured:
    median_ms: float = 0.0
    ratio: list[float] = field(default_factory=list)
    """To its denominator in the same round: lower end, median, upper end of the 95 % interval of the median."""
    p10: float = 0.0
    p90: float = 0.0
    flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    kernels: int | None = None
    """Launched in a step, on a GPU."""
    compile_seconds: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    """Of the output, the input's gradient and the worst gradient of a trained tensor against true float64, largest as a
    share of the largest value there."""
    seldom_ms: float | None = None
    """What a step costs more that does what is due only now and then."""
    amortised: list[float] | None = None
    """The ratio with that spread over the steps between."""


@dataclass
class Running:
    variant: Variant
    call: Callable[[Tensor], Tensor]
    times: list[float] = field(default_factory=list)
    steps: int = 0


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, w: Tensor) -> None:
    (call(x) * w).sum().backward()
    for p in (x, *model.parameters()):
        p.grad = None


def measure(
    found: Sequence[Variant],
    x: Tensor,
    w: Tensor,
    pairs: int,
    track: Callable[[Any], Iterable[Any]],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """By name of the variant. `clock` is read in seconds when a step begins and when it is done."""
    results = {each.name: Measured() for each in found}
    running = [_started(each, results[each.name], x, w) for each in found]
    gc.collect()
    gc.disable()
    for _ in track(range(pairs)):
        for each in random.sample(running, len(running)):
            _changed(each)
            each.times.append(_timed(each, x, w, clock))
    for each in running:
        if each.variant.seldom is not None:
            results[each.variant.name].seldom_ms = _seldom(each, each.variant.seldom, x, w, clock) * 1e3
    gc.enable()
    times = {each.variant.name: each.times for each in running}
    for each in running:
        result = results[each.variant.name]
        ratios = [a / b for a, b in zip(each.times, times[each.variant.beside], strict=True)]
        result.median_ms = statistics.median(each.times) * 1e3
        result.ratio, result.p10, result.p90 = interval(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9)
        if result.seldom_ms is not None:
            more = result.seldom_ms / each.variant.gap / (statistics.median(times[each.variant.beside]) * 1e3)
            result.amortised = [ratio + more for ratio in result.ratio]
        result.peak_bytes, result.kernels = _profiled(each, x, w)
    return {name: asdict(result) for name, result in results.items()}


def _timed(each: Running, x: Tensor, w: Tensor, clock: Callable[[], float]) -> float:
    _wait(x)
    start = clock()
    step(each.call, each.variant.model, x, w)
    _wait(x)
    return clock() - start


def _seldom(
    each: Running, prepare: Callable[[], None], x: Tensor, w: Tensor, clock: Callable[[], float], rounds: int = 5
) -> float:
    """Seconds that a step takes longer after `prepare`."""
    more = []
    for _ in range(rounds):
        plain = _timed(each, x, w, clock)
        prepare()
        more.append(_timed(each, x, w, clock) - plain)
        each.variant.usual()
    return statistics.median(more)


def _started(variant: Variant, result: Measured, x: Tensor, w: Tensor) -> Running:
    call: Any = variant.model
    if variant.compiled is None:
        result.flops = flops(lambda: step(variant.model, variant.model, x, w))
        result.saved_bytes = _saved(variant.model, x)
    else:
        counted = Step(results=1)
        step(variant.compiled(variant.model, _counting(counted)), variant.model, x, w)
        result.flops = counted.flops
        if len(counted.forward) == 1:  # with more, what is kept cannot be told from what is handed on
            result.saved_bytes = counted.bytes
        torch._dynamo.reset()
        call = variant.compiled(variant.model, None)
        start = time.perf_counter()
        step(call, variant.model, x, w)
        result.compile_seconds = time.perf_counter() - start
    result.error = errors(call, variant.model, x, w)
    running = Running(variant, call)
    step(call, variant.model, x, w)
    return running


def _changed(each: Running) -> None:
    """As an optimizer would, every few steps, and without changing a value."""
    if each.steps % MICRO_BATCHES == 0:
        with torch.no_grad():
            for p in each.variant.model.parameters():
                if p.requires_grad:
                    p.mul_(1.0)
    each.steps += 1


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _counting(found: Step) -> Any:
    """An inner compiler that runs the graphs as they are and counts, with Inductor's choice of what to keep."""

    def record(into: list[Any]) -> Callable[..., Any]:
        def compiler(graph: Any, example_inputs: Sequence[Any]) -> Any:
            into.append(graph)

            def run(*arguments: Any) -> Any:
                outputs: list[Any] = []
                found.flops += flops(lambda: outputs.append(graph.forward(*arguments)))
                return outputs[0]

            return make_boxed_func(run)

        return compiler

    return aot_autograd(
        fw_compiler=record(found.forward),
        bw_compiler=record(found.backward),
        partition_fn=min_cut_rematerialization_partition,
    )


def _saved(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages autograd keeps for backward, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    total = sum(kept.values())
    del out
    return total


def _profiled(each: Running, x: Tensor, w: Tensor) -> tuple[int | None, int | None]:
    """Peak of what a step allocates beyond what was there, and the kernels it launches on a GPU."""
    kind = torch.profiler.ProfilerActivity
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[kind.CUDA] if x.is_cuda else [kind.CPU], profile_memory=True) as profile:
        step(each.call, each.variant.model, x, w)
        _wait(x)
    if x.is_cuda:
        kernels = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
        return torch.cuda.max_memory_allocated() - before, kernels
    now = peak = 0
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, None
