"""One step of every variant, many times in turn; and what can be counted instead of timed."""

from __future__ import annotations

import copy
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
    """Of the output and of the input's gradient against float64, largest as a share of the largest value there."""


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


def measure(found: Sequence[Variant], x: Tensor, w: Tensor, pairs: int, track: Callable[[Any], Iterable[Any]]) -> dict:
    """By name of the variant."""
    results = {each.name: Measured() for each in found}
    running = [_started(each, results[each.name], x, w) for each in found]
    gc.collect()
    gc.disable()
    for _ in track(range(pairs)):
        for each in random.sample(running, len(running)):
            _changed(each)
            _wait(x)
            start = time.perf_counter()
            step(each.call, each.variant.model, x, w)
            _wait(x)
            each.times.append(time.perf_counter() - start)
    gc.enable()
    times = {each.variant.name: each.times for each in running}
    for each in running:
        result = results[each.variant.name]
        ratios = [a / b for a, b in zip(each.times, times[each.variant.beside], strict=True)]
        result.median_ms = statistics.median(each.times) * 1e3
        result.ratio, result.p10, result.p90 = interval(ratios), percentile(ratios, 0.1), percentile(ratios, 0.9)
        result.peak_bytes, result.kernels = _profiled(each, x, w)
    return {name: asdict(result) for name, result in results.items()}


def _started(variant: Variant, result: Measured, x: Tensor, w: Tensor) -> Running:
    call: Any = variant.model
    if variant.compiled is None:
        result.flops = flops(lambda: step(variant.model, variant.model, x, w))
        result.saved_bytes = _saved(variant.model, x)
    else:
        counted = Step(results=1)
        step(variant.compiled(variant.model, _counting(counted)), variant.model, x, w)
        result.flops, result.saved_bytes = counted.flops, counted.bytes
        torch._dynamo.reset()
        call = variant.compiled(variant.model, None)
        start = time.perf_counter()
        step(call, variant.model, x, w)
        result.compile_seconds = time.perf_counter() - start
    result.error = _errors(call, variant.model, x, w)
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


def _errors(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, w: Tensor) -> dict[str, float]:
    """Against a float64 copy, whose norms and softmax still compute in float32 where the model says so."""
    y = call(x)
    (gradient,) = torch.autograd.grad((y * w).sum(), x)
    found = {"y": y.detach(), "dx": gradient}
    try:
        exact = copy.deepcopy(model).double()
    except (RuntimeError, TypeError, NotImplementedError):  # codes of another library cannot be widened
        return {}
    wide = x.detach().double().requires_grad_(True)
    reference = exact(wide)
    (other,) = torch.autograd.grad((reference * w.double()).sum(), wide)
    truth = {"y": reference.detach(), "dx": other}
    return {key: float((found[key] - truth[key]).abs().max() / truth[key].abs().max()) for key in found}


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
    found = [event for event in profile.events() if event.name == "[memory]"]
    for event in sorted(found, key=lambda event: event.time_range.start):
        now += event.cpu_memory_usage
        peak = max(peak, now)
    return peak, None
