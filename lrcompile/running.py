"""`run`: an exported file, loaded under the session settings its manifest pins; call it, or generate with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompile.deployment.decoding import PAST, POSITIONS, positions
from lrcompile.errors import AdapterError, VerificationError, require
from lrcompile.links import followed
from lrcompile.verifying.manifest import Artefact, artefact
from lrcompile.verifying.runners import runner


def run(path: str | os.PathLike[str], adapters: str | Iterable[str] = (), *, threads: int | None = None) -> Session:
    """y = f(inputs) as the file at `path` computes it, with ONNX Runtime (`.onnx`) or AOTInductor (`.pt2`), on the CPU.

    The manifest beside the file, where there is one, says under which session settings, and is held to the file's
    hashes; `threads` replaces the number of threads, torch's own by default. A `.pt2` package is machine code: run only
    one you trust.

    `adapters`: of a graph exported with `adapters="inputs"`, one or several that act where a call is told nothing else;
    with none it computes its base. ONNX Runtime itself takes an adapter's file on trust. Here it has to be the one that
    the manifest describes, for this very graph, with its names, shapes and dtypes, whole pairs and finite numbers, and
    no two may act at one site.

    Raises VerificationError for a file that is missing, unsafe, or not the one its manifest describes; AdapterError for
    an adapter that is; MissingDependencyError.
    """
    path = followed(path)
    found = artefact(path)
    if found.stale:
        raise VerificationError(f"{path} is not run: {'; '.join(found.stale)}. Export it again")
    if threads is not None and path.suffix != ".onnx":
        raise VerificationError(f"threads={threads!r} is for ONNX Runtime; {path.name} runs on torch.set_num_threads")
    settings = found.session if threads is None else {**found.session, "threads": threads}
    if path.suffix == ".onnx" and path.is_file():
        return Session(path, _onnx(path, settings, found, adapters), found)
    session = Session(path, runner(path), found)
    session._chosen(adapters or None)
    return session


def _onnx(path: Path, settings: dict[str, Any], found: Artefact, adapters: str | Iterable[str]) -> Any:
    require("onnxruntime", "onnx")
    from lrcompile.interop.onnx_adapters import Interface, names_of, takes_adapters
    from lrcompile.interop.onnxruntime import OnnxRunner

    interface = Interface.of(path, found.data) if takes_adapters(found.data) else None
    return OnnxRunner(path, settings, interface, names_of(adapters), by_name=True)


class Session:
    """A loaded file. `session(inputs)` returns its outputs by name; `session.generate(ids)` continues a prompt.

    `.session` is what it runs under; `.adapters` names those it can be given; `.generation` is what the file says about
    generating, None without a cache. A candidate for `verify`, with the adapters it was opened with.
    """

    def __init__(self, path: Path, loaded: Any, found: Artefact):
        self.path, self.label, self.generation = path, loaded.label, found.generation
        self._runner, self._inputs = loaded, {port.name: port for port in found.inputs}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, generates={self.generation is not None})"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names its manifest gives."""
        return tuple(self._inputs)

    @property
    def session(self) -> dict[str, Any]:
        return self._runner.session

    @property
    def adapters(self) -> tuple[str, ...]:
        return getattr(self._runner, "adapters", ())

    def run(
        self, inputs: Mapping[str, Any] | tuple[Any, ...], adapters: str | Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """All outputs by name. The inputs by name as a dict, or in order as a tuple; arrays and numbers become tensors.
        `adapters`: one or several that act in this call, () for none; None: those the session was opened with.

        Raises VerificationError for inputs that do not fit, AdapterError for such adapters.
        """
        given: Any = (
            tuple(map(_tensors, inputs))
            if isinstance(inputs, tuple)
            else {name: _tensors(value) for name, value in inputs.items()}
        )
        return self._runner.run(given, **self._chosen(adapters))

    def __call__(self, *ordered: Any, adapters: str | Iterable[str] | None = None, **named: Any) -> dict[str, Tensor]:
        """`run` as a model is called: a dict of inputs, the inputs in order, or by keyword."""
        if ordered and named:
            raise VerificationError(f"inputs are given in order and by name ({', '.join(named)}); choose one")
        if len(ordered) == 1 and isinstance(ordered[0], Mapping | tuple):
            return self.run(ordered[0], adapters)
        return self.run(ordered or named, adapters)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 64,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        adapters: str | Iterable[str] | None = None,
    ) -> Tensor:
        """t_n = argmax logits(t_0 … t_{n-1}): greedy decoding, token for token `model.generate(do_sample=False)`.

        `input_ids` [batch, prompt] int64, shorter prompts padded on the left with `attention_mask` 0 there. Returns
        [batch, prompt + new] int64; a row ends after a token of `eos_token_id` and is filled with `pad_token_id`, and
        all end when every row has, or after `max_new_tokens`. Both default to the model's own; `eos_token_id=()`
        never ends early. `adapters` as for `run`. The cache stays in the runtime's memory between tokens.

        Raises VerificationError for a file exported without `use_cache=True` and for inputs that do not fit.
        """
        ids, mask = self._prompt(input_ids, attention_mask, max_new_tokens)
        assert self.generation is not None
        ends = _ends(self.generation.get("eos_token_id") if eos_token_id is None else eos_token_id)
        pad = pad_token_id if pad_token_id is not None else self._number("pad_token_id")
        filler = pad if pad is not None else ends[0] if ends else 0
        step = self._runner.steps(self._empty(len(ids)), **self._chosen(adapters))
        where, new, going = positions(mask), ids, torch.ones(len(ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            given = {"input_ids": new, "attention_mask": mask, POSITIONS: where}
            logits = step({name: tensor for name, tensor in given.items() if name in self._inputs})
            if bool(torch.isnan(logits).any()):
                raise VerificationError(f"{self.path}: the logits after {ids.shape[1]} tokens hold NaN")
            new = torch.where(going, logits.argmax(-1), filler)[:, None]
            ids, mask = torch.cat([ids, new], -1), torch.cat([mask, torch.ones_like(new)], -1)
            where = where[:, -1:] + 1
            going &= ~torch.isin(new[:, 0], torch.tensor(ends, dtype=torch.long))
            if not going.any():
                break
        return ids

    def _chosen(self, adapters: str | Iterable[str] | None) -> dict[str, Any]:
        if adapters is None:
            return {}
        if self.path.suffix != ".onnx":
            raise AdapterError(f"{self.path.name} takes no adapters; only .onnx does, exported with adapters='inputs'")
        return {"adapters": adapters}

    def _prompt(self, input_ids: Any, attention_mask: Any, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        if self.generation is None:
            raise VerificationError(
                f"{self.path} does not say that it generates: it is for a decoder written by"
                " export(model, path, inputs, use_cache=True), its manifest beside it"
            )
        ids = _tensors(input_ids)
        mask = torch.ones_like(ids) if attention_mask is None else _tensors(attention_mask)
        if ids.dim() != 2 or 0 in ids.shape or ids.is_floating_point() or mask.shape != ids.shape:
            raise VerificationError(
                f"input_ids are {ids.dtype} {list(ids.shape)} with a mask {list(mask.shape)}: integers"
                " [batch, prompt] of at least one token, and a mask of that shape, are expected"
            )
        if not bool(mask[:, -1].all()):
            raise VerificationError("a prompt ends in padding; pad on the left (tokenizer.padding_side = 'left')")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise VerificationError(f"max_new_tokens={max_new_tokens!r}: a whole number from 1 is expected")
        size, room, least, largest = self._number("vocab_size"), self._number("context_length"), ids.min(), ids.max()
        if size and (least < 0 or largest >= size):
            raise VerificationError(f"input_ids lie in {int(least)} … {int(largest)}; tokens are 0 … {size - 1}")
        if room and ids.shape[1] + max_new_tokens > room:
            raise VerificationError(
                f"{ids.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {room}"
            )
        return ids.long(), mask.long()

    def _number(self, name: str) -> int | None:
        value = (self.generation or {}).get(name)
        if value is not None and type(value) is not int:
            raise VerificationError(f"the manifest of {self.path} says {name} = {value!r}; a whole number is expected")
        return value

    def _empty(self, rows: int) -> list[dict[str, Tensor]]:
        """The cache before the first token: no keys and values, of the heads and sizes that the manifest says."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name, port in self._inputs.items():
            start, _, place = name.partition(".")
            layer, _, part = place.partition(".")
            if start != PAST:
                continue
            dtype = getattr(torch, port.dtype, None)
            sizes = [rows, *port.shape[1:2], 0, *port.shape[3:]]
            if len(sizes) != 4 or str in map(type, sizes) or not isinstance(dtype, torch.dtype):
                raise VerificationError(f"the manifest of {self.path} says of {name}: {port.dtype} {list(port.shape)}")
            layers.setdefault(layer, {})[part] = torch.zeros(sizes, dtype=dtype)  # type: ignore[arg-type]
        return list(layers.values())


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor | None):
        return value
    if isinstance(value, Mapping):
        return {name: _tensors(each) for name, each in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor | Mapping) for each in value):
        return [_tensors(each) for each in value]
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VerificationError(f"an input of type {type(value).__name__} is no tensor: {error}") from error


def _ends(given: int | Iterable[int] | None) -> list[int]:
    tokens = [] if given is None else [given] if isinstance(given, int) else list(given)
    if not all(type(token) is int for token in tokens):
        raise VerificationError(f"eos_token_id={given!r}: a token's number, or several, are expected")
    return tokens
