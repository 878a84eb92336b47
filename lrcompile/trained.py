"""Base parameters that an adapter trains in full (`train_modules`, biases), or whose values, written by its method,
were loaded with it: every adapter has its own values, the base keeps its bits.

The parameter object never changes, only the storage it points at, so optimizers and names stay valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrcompile.errors import AdapterError


@dataclass
class Trained:
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By adapter and parameter: its value, stale while `in_place` says that the parameter itself holds it."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """The base's bits of each parameter whose place an adapter's value has taken."""
    in_place: dict[str, str] = field(default_factory=dict)
    """Parameter → the adapter whose value it holds."""
    hidden: dict[str, Tensor] = field(default_factory=dict)
    """Values in place that a merge has put others over."""
    written: dict[str, frozenset[str]] = field(default_factory=dict)
    """By adapter: parameters that do not train themselves; its method writes them."""

    def names_of(self, adapter: str) -> tuple[str, ...]:
        """What `adapter` trains in full."""
        written = self.written.get(adapter, frozenset())
        return tuple(name for name in self.values.get(adapter, ()) if name not in written)

    def add(self, model: nn.Module, adapter: str, names: Iterable[str]) -> None:
        """Let `adapter` have its own values of these parameters, starting from the base's."""
        chosen = {name: self._base_value(model, name).detach().clone() for name in names}
        if chosen:
            self.values.setdefault(adapter, {}).update(chosen)

    def add_written(self, model: nn.Module, adapter: str, names: Iterable[str]) -> None:
        """Let `adapter` have its own values of these, which its method writes."""
        if chosen := frozenset(names):
            self.add(model, adapter, sorted(chosen))
            self.written[adapter] = self.written.get(adapter, frozenset()) | chosen

    def keep_written(self, model: nn.Module, adapter: str) -> None:
        """Make what the method of `adapter` has written the base's own values."""
        for name in self.written.pop(adapter, ()):
            value = self.values[adapter].pop(name)
            if self.in_place.get(name) == adapter:
                del self.in_place[name], self.base[name]
            elif name in self.base:
                self.base[name] = value
            else:
                _point(model.get_parameter(name), value)

    def drop(self, model: nn.Module, adapter: str) -> None:
        self.show(model, [other for other in dict.fromkeys(self.in_place.values()) if other != adapter])
        self.values.pop(adapter, None)
        self.written.pop(adapter, None)

    def show(self, model: nn.Module, adapters: Iterable[str]) -> None:
        """Put the values of these adapters in place, the base's bits everywhere else."""
        wanted: dict[str, str] = {}
        for adapter in adapters:
            for name in self.values.get(adapter, ()):
                if name in wanted:
                    raise AdapterError(
                        f"adapters {wanted[name]!r} and {adapter!r} both train {name!r}, or brought a value of it, so"
                        " they cannot be active together"
                    )
                wanted[name] = adapter
        for name in [name for name, adapter in self.in_place.items() if wanted.get(name) != adapter]:
            parameter = model.get_parameter(name)
            self.values[self.in_place.pop(name)][name] = parameter.data
            _point(parameter, self.base.pop(name))
        for name, adapter in wanted.items():
            if name not in self.in_place:
                parameter = model.get_parameter(name)
                self.base[name], self.in_place[name] = parameter.data, adapter
                _point(parameter, self.values[adapter][name])

    def hide(self, name: str, value: Tensor) -> None:
        """A merge puts another value over the one in place."""
        if name in self.in_place:
            self.hidden[name] = value

    def value(self, model: nn.Module, adapter: str, name: str) -> Tensor:
        """The current value of a parameter in this adapter, wherever it lies."""
        if self.in_place.get(name) != adapter:
            return self.values[adapter][name]
        return self.hidden.get(name, model.get_parameter(name).data)

    def write(self, model: nn.Module, adapter: str, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.value(model, adapter, name).copy_(value)

    def forget(self) -> None:
        """Make what is in place the only value there is."""
        self.values, self.base, self.in_place, self.hidden, self.written = {}, {}, {}, {}, {}

    def _base_value(self, model: nn.Module, name: str) -> Tensor:
        return self.base.get(name, model.get_parameter(name).data)


def _point(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.to(device=parameter.device, dtype=parameter.dtype)
