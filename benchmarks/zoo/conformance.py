"""What it means that an adapter acts exactly where its weight acts: the promises, each checked on one model.

Nothing here is compared with a tolerance picked by hand. Where the promise is bits, bits are compared. Where two orders
of the same algebra meet (merged and unmerged, exported and eager), the limit is what rounding every parameter once does
to this model's outputs, times `LIMIT`, as in the design's verification section.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.matching import match

LIMIT = 16
CHECKS = ("start", "live", "copied", "disabled", "merged", "unmerged", "loaded", "exported", "gradients", "removed")
Build = Callable[[], tuple[nn.Module, Any]]


@dataclass
class Outcome:
    """What came of one model: `failures` by check, or the `refusal` of `apply`; empty strings are good news."""

    sites: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)
    relative_error: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    refusal: str = ""


class _Trial:
    """One model with its adapter, the outputs it must go back to, and the size of a rounding in them."""

    def __init__(self, build: Build, spec: lrcompile.Spec, exports: bool) -> None:
        self.build, self.exports = build, exports
        self.model, self.inputs = build()
        self.before = _snapshot(self.model)
        self.base = self.run()
        self.frozen, unfused = self._references()
        lrcompile.apply(self.model, spec, example_inputs=self.inputs)
        self.started = (self.run(), unfused)
        self.factors = {name: p for name, p in self.model.named_parameters() if "lrcompile_adapters" in name}
        generator = torch.Generator().manual_seed(5)
        for factor in self.factors.values():
            if not factor.any():  # B, but A where the map is a lookup
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
        self.adapted = self.run()
        self.rounding = _rounding(self.model, self.run, self.adapted)

    def _references(self) -> tuple[list[Tensor], list[Tensor]]:
        """The base as `apply` leaves it: frozen, since `requires_grad` decides which kernel `torch.matmul` picks.

        The second without the fused attention kernels, whose bits an adapted attention cannot have.
        """
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        frozen = self.run()
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        unfused = self.run()
        torch.backends.mha.set_fastpath_enabled(fused)
        for p, flag in flags:
            p.requires_grad_(flag)
        return frozen, unfused

    def run(self, model: nn.Module | None = None, *, train: bool = False, grad: bool = False) -> list[Tensor]:
        """The floating outputs; in training with the dropout masks of one seed."""
        model = self.model if model is None else model
        torch.manual_seed(11)
        model.train(train)
        with torch.set_grad_enabled(grad):
            found = _floats(_call(model, self.inputs))
        model.eval()
        return found

    def start(self) -> None:
        _require_bits(*self.started, "B = 0 changes the outputs")

    def live(self) -> None:
        dead = []
        for name, factor in self.factors.items():
            kept = factor.detach().clone()
            factor.data.zero_()
            if _distance(self.run(), self.adapted) <= LIMIT * self.rounding:
                dead.append(name)
            factor.data.copy_(kept)
        assert not dead, f"no effect in eval: {dead}"
        _require_bits(self.run(), self.adapted, "setting the factors back does not give the outputs back")

    def gradients(self) -> None:
        outputs = [y for y in self.run(train=True, grad=True) if y.requires_grad]
        generator = torch.Generator().manual_seed(7)
        loss = sum(((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs), torch.zeros(()))
        loss.backward()
        dead = [name for name, p in self.factors.items() if p.grad is None or not p.grad.any() or p.grad.isnan().any()]
        extra = [name for name, p in self.model.named_parameters() if p.grad is not None and name not in self.factors]
        self.model.zero_grad(set_to_none=True)
        assert not dead, f"no gradient in train: {dead}"
        assert not extra, f"the base is not frozen: {extra}"

    def copied(self) -> None:
        _require_bits(self.run(copy.deepcopy(self.model)), self.adapted, "a deep copy computes something else")

    def disabled(self) -> None:
        with lrcompile.disabled(self.model):
            _require_bits(self.run(), self.frozen, "disabled is not the base")
        _require_bits(self.run(), self.adapted, "after disabled the adapter does not act as before")

    def merged(self) -> None:
        training = self.run(train=True)
        lrcompile.merge(self.model)
        self.error = _distance(self.run(), self.adapted)
        in_training = _distance(self.run(train=True), training)
        for mode, error in (("eval", self.error), ("train", in_training)):
            assert error <= LIMIT * self.rounding, f"{mode}: off by {error:.3g}, one rounding is {self.rounding:.3g}"

    def unmerged(self) -> None:
        lrcompile.unmerge(self.model)
        _require_state(self.before, _snapshot(self.model), subset=True)
        _require_bits(self.run(), self.adapted, "after unmerge the adapter does not act as before")

    def loaded(self) -> None:
        fresh, _ = self.build()
        with tempfile.TemporaryDirectory() as folder:
            lrcompile.save(self.model, folder + "/adapter")
            # training too, like the one it is compared with: matmul picks its kernel by what requires a gradient
            lrcompile.load(fresh, folder + "/adapter", trainable=True)
        _require_bits(self.run(fresh), self.adapted, "saved and loaded computes something else")

    def exported(self) -> None:
        if not self.exports:
            return
        args, kwargs = ((), self.inputs) if isinstance(self.inputs, Mapping) else (self.inputs, {})
        program = torch.export.export(self.model, args, dict(kwargs), strict=False)
        nodes = sum("lrcompile" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
        hosts = {name.rpartition(".lrcompile_adapters")[0] for name in self.factors}
        assert nodes >= len(hosts), f"{nodes} dialect nodes for {len(hosts)} hosts"
        with torch.no_grad():
            error = _distance(_floats(_call(program.module(), self.inputs)), self.adapted)
        assert error <= LIMIT * self.rounding, f"off by {error:.3g}, one rounding is {self.rounding:.3g}"

    def removed(self) -> None:
        lrcompile.remove(self.model)
        _require_state(self.before, _snapshot(self.model), subset=False)
        _require_bits(self.run(), self.base, "removed is not the base")


def check(build: Build, spec: lrcompile.Spec, *, exports: bool = True) -> Outcome:
    """Apply `spec` to a new model and try every promise; a refusal must leave that model as it was."""
    try:
        match(build()[0], spec)  # before the trial runs the base, which would initialise what is lazy
        trial = _Trial(build, spec, exports)
    except lrcompile.TargetError as refusal:
        return Outcome(refusal=str(refusal))
    outcome = Outcome()
    for row in lrcompile.report(trial.model).sites:
        if row.adapted:
            outcome.sites[row.kind] += 1
        else:
            outcome.spared[row.reason or "not targeted"] += 1
    for name in CHECKS:
        try:
            getattr(trial, name)()
        except AssertionError as failure:
            outcome.failures[name] = str(failure)
    effect = _distance(trial.adapted, trial.base)
    outcome.relative_error = getattr(trial, "error", float("nan")) / effect if effect else float("nan")
    return outcome


def refused_cleanly(build: Build, spec: lrcompile.Spec) -> str:
    """The refusal of `apply`; raises AssertionError if it did not refuse, or left the model changed."""
    model, inputs = build()
    before = _snapshot(model)
    try:
        lrcompile.apply(model, spec, example_inputs=inputs)
    except lrcompile.LrcompileError as refusal:
        _require_state(before, _snapshot(model), subset=False)
        return str(refusal)
    adapted = [row.name for row in lrcompile.report(model).sites if row.adapted]
    raise AssertionError(f"nothing was refused; adapted {adapted}")


def _call(model: Callable[..., Any], inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return [y for part in output for y in _floats(part)] if isinstance(output, tuple | list) else []


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs), f"{len(ours)} outputs instead of {len(theirs)}"
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _rounding(model: nn.Module, run: Callable[[], list[Tensor]], outputs: list[Tensor]) -> float:
    """How far the outputs move when every parameter is rounded once more, at most, over four draws."""
    generator = torch.Generator().manual_seed(13)
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.is_floating_point()]
    worst = 0.0
    for _ in range(4):
        for p, value in kept:
            sign = torch.randint(0, 2, value.shape, generator=generator).to(value.dtype) * 2 - 1
            p.data.copy_(value + value * sign * torch.finfo(value.dtype).eps)
        worst = max(worst, _distance(run(), outputs))
        for p, value in kept:
            p.data.copy_(value)
    return worst


@dataclass
class _Snapshot:
    classes: dict[str, type]
    bits: dict[str, Tensor]
    same: dict[str, int]
    trained: dict[str, bool]
    keys: list[str]


def _snapshot(model: nn.Module) -> _Snapshot:
    """Everything a base must get back: classes, bits, which tensors are one, what trains, the keys of its state."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    lazy = nn.parameter.UninitializedParameter
    return _Snapshot(
        {name: type(module) for name, module in model.named_modules()},
        {name: t.detach().clone() for name, t in tensors.items() if not isinstance(t, lazy)},
        {name: id(t) for name, t in tensors.items() if isinstance(t, nn.Parameter)},
        {name: t.requires_grad for name, t in tensors.items()},
        list(model.state_dict()),
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _require_state(before: _Snapshot, after: _Snapshot, *, subset: bool) -> None:
    now = after.bits
    changed = [name for name, bits in before.bits.items() if name not in now or _bytes(bits) != _bytes(now[name])]
    assert not changed, f"bits differ: {changed}"
    moved = [name for name, was in before.same.items() if after.same.get(name) != was]
    assert not moved, f"no longer the same parameter: {moved}"
    if subset:
        return
    assert after.classes == before.classes, f"classes differ: {_differing(before.classes, after.classes)}"
    assert after.trained == before.trained, f"requires_grad differs: {_differing(before.trained, after.trained)}"
    assert after.keys == before.keys, f"state_dict keys differ: {sorted(set(after.keys) ^ set(before.keys))}"


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _require_bits(ours: list[Tensor], theirs: list[Tensor], message: str) -> None:
    same = len(ours) == len(theirs) and all(_bytes(a) == _bytes(b) for a, b in zip(ours, theirs, strict=True))
    assert same, f"{message} (by {_distance(ours, theirs):.3g})"
