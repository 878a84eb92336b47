"""Run a candidate: module, graph, exported program, `.onnx` or `.pt2`; one interface, flat named tensors out."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lrcompile.errors import VerificationError
from lrcompile.verifying.manifest import NONE, Artefact
from lrcompile.verifying.outputs import Inputs, call, copied, named_outputs

if TYPE_CHECKING:
    from lrcompile.verifying.intermediates import Found

Layers = list[dict[str, Tensor]]
"""A key-value cache: `{"key": K, "value": V}` of each layer."""


@runtime_checkable
class Runner(Protocol):
    """What verification needs of a candidate: a label, the settings it runs under, and its outputs."""

    label: str

    @property
    def session(self) -> dict[str, Any]: ...

    def run(self, inputs: Inputs) -> dict[str, Tensor]: ...


class ModuleRunner:
    """A module or graph, run without gradients and with every part in evaluation mode, flags restored afterwards."""

    def __init__(self, module: nn.Module, label: str | None = None):
        self.module = module
        self.label = label or type(getattr(module, "_orig_mod", module)).__name__

    @property
    def size(self) -> int:
        """Bytes of its tensors, shared ones once."""
        held = {id(each): each for each in (*self.module.parameters(), *self.module.buffers())}
        return sum(each.numel() * each.element_size() for each in held.values())

    @property
    def session(self) -> dict[str, Any]:
        return {"runtime": "torch", "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        with evaluating(self.module), torch.no_grad():
            try:
                result = call(self.module, copied(inputs))
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                raise VerificationError(
                    f"{self.label} cannot be run on these inputs: {type(error).__name__}: {error}; give inputs it takes"
                ) from error
        return named_outputs(result)

    def intermediates(self, inputs: Inputs, shapes: Mapping[str, torch.Size]) -> dict[str, Found]:
        """What it computes at the reference's places, in one run."""
        from lrcompile.verifying.intermediates import module_values

        return module_values(self.module, inputs, shapes)

    def choices(self, inputs: Inputs) -> list[Tensor]:
        """Which experts its routers take."""
        from lrcompile.verifying.routing import choices_of

        return choices_of(self.module, inputs)


class RecordedRunner:
    """Outputs that were recorded, as a candidate; they belong to the input sets in order."""

    def __init__(self, outputs: list[dict[str, Tensor]], label: str = "recorded"):
        self.label = label
        self.outputs = outputs
        self._left = iter(outputs)

    @property
    def session(self) -> dict[str, Any]:
        return {"runtime": "none"}

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        try:
            return next(self._left)
        except StopIteration:
            raise VerificationError(
                f"{self.label} holds the outputs of {len(self.outputs)} input sets; more were given"
            ) from None


class PackageRunner:
    """An AOTInductor package. Its content is machine code: verify only packages you would also run."""

    def __init__(self, path: Path):
        names = _archive_names(path)
        if not any("/data/aotinductor/" in f"/{name}" for name in names):
            raise VerificationError(
                f"{path} is not an AOTInductor package; if torch.export.save wrote it, "
                "load it with torch.export.load and give the program"
            )
        self.label, self.path, self.size = path.name, path, path.stat().st_size
        self._model = torch._inductor.aoti_load_package(str(path))

    @property
    def session(self) -> dict[str, Any]:
        return {
            "runtime": "aotinductor",
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        return self._run(self._model, inputs)

    def constants(self) -> list[str]:
        """The names of the weights it was compiled with."""
        return list(self._model.get_constant_fqns())

    def run_with(self, inputs: Inputs, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it gives with these weights in the place of its own, which stay as they are."""
        other = torch._inductor.aoti_load_package(str(self.path))
        if weights:
            other.load_constants(dict(weights), check_full_update=False)
        return self._run(other, inputs)

    def _run(self, model: Any, inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            try:
                return named_outputs(call(model, copied(inputs)))
            except (RuntimeError, ValueError, TypeError) as error:
                raise VerificationError(f"{self.label} cannot be run on these inputs: {error}") from error

    def steps(self, empty: Layers) -> Callable[[dict[str, Tensor]], Tensor]:
        """As `onnx_steps.steps`."""
        past = empty

        def step(given: dict[str, Tensor]) -> Tensor:
            nonlocal past
            with torch.no_grad():
                result = self._model(**given, past_key_values=past)
            past = result["present"]
            return result["logits"][:, -1]

        return step


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule's `training` flag off, then as it was (the flag itself: an exported module forbids `.eval()`).

    So are what its buffers hold and torch's random numbers: a forward that counts, averages or draws would be another
    function at each run, and how far the runs of a reference lie apart is taken for its rounding.
    """
    before = [(part, part.training) for part in module.modules()]
    held = [
        _Held.of(part, name, buffer) for part, _ in before for name, buffer in part._buffers.items() if _may(buffer)
    ]
    for part, _ in before:
        part.training = False
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for part, training in before:
            part.training = training
        for each in held:
            each.put_back()


def _may(buffer: Tensor | None) -> bool:
    """Not the bytes that quantized weights are held in, which are large and which nothing writes."""
    return buffer is not None and buffer.dtype not in (torch.uint8, torch.int8) and not buffer.is_inference()


@dataclass(frozen=True)
class _Held:
    """A buffer and what it holds."""

    part: nn.Module
    name: str
    buffer: Tensor
    version: int
    copy: Tensor

    @classmethod
    def of(cls, part: nn.Module, name: str, buffer: Any) -> _Held:
        return cls(part, name, buffer, buffer._version, buffer.detach().clone())

    def put_back(self) -> None:
        self.part._buffers[self.name] = self.buffer
        if self.buffer._version != self.version:
            with torch.no_grad():
                self.buffer.copy_(self.copy)


def runner(candidate: Any, manifest: Artefact = NONE, adapters: Mapping[str, float] | None = None) -> Runner:
    """The runner for a candidate: with the ONNX Runtime settings that its manifest asks for and, where its graph is
    given adapters, with those named, whose files have to hold them with these weights.
    """
    if isinstance(candidate, torch.export.ExportedProgram):
        return ModuleRunner(candidate.module(), "ExportedProgram")
    if isinstance(candidate, nn.Module):
        return ModuleRunner(candidate)
    if isinstance(candidate, Runner):
        return candidate
    if isinstance(candidate, str | os.PathLike):
        path = Path(candidate)
        if not path.is_file():
            raise VerificationError(f"there is no file {path}")
        if path.suffix == ".onnx":
            from lrcompile.interop.onnx_adapters import Interface, takes_adapters
            from lrcompile.interop.onnxruntime import OnnxRunner

            given = takes_adapters(manifest.data)
            interface = Interface.of(path, manifest.data) if given else None
            if interface is not None:
                interface.require_weights(adapters or {})
            return OnnxRunner(path, manifest.session, interface, tuple(adapters or ()) if given else ())
        if path.suffix == ".pt2":
            return PackageRunner(path)
        raise VerificationError(f"{path} has suffix {path.suffix!r}; a candidate file ends in .onnx or .pt2")
    raise VerificationError(
        "a candidate is a module, an fx graph module, an exported program or a path to .onnx or .pt2, "
        f"not {type(candidate).__name__}"
    )


def _archive_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise VerificationError(f"{path} is not a .pt2 archive ({error}); it may be truncated") from error
