"""Decoding with ONNX Runtime: each step's cache is the next step's input where it lies, bound and never copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompile.deployment.decoding import PAST, PRESENT
from lrcompile.errors import VerificationError, require
from lrcompile.verifying.outputs import named_tensors
from lrcompile.verifying.runners import Layers


def steps(session: Any, empty: Layers, always: Mapping[str, Any]) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function from the new tokens to the logits after the last of them, `[batch, vocabulary]`. It keeps the cache,
    at first `empty`; the runtime's values `always` are given at each step (an adapter's: bound runs take no other).
    """
    ort = require("onnxruntime", "onnx")
    names = [each.name for each in session.get_outputs()]
    first = named_tensors({PAST: empty})
    following = {name: f"{PRESENT}{name.removeprefix(PAST)}" for name in first}
    if not {"logits", *following.values()} <= set(names):
        raise VerificationError(f"the graph returns {', '.join(names)}; logits and a {PRESENT}.* for each {PAST}.* due")
    past = {name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in first.items()}

    def step(given: dict[str, Tensor]) -> Tensor:
        binding = session.io_binding()
        for name, tensor in given.items():
            binding.bind_cpu_input(name, tensor.contiguous().numpy())
        for name, value in {**always, **past}.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = dict(zip(names, binding.get_outputs(), strict=True))
        past.update({name: values[present] for name, present in following.items()})
        return torch.from_numpy(values["logits"].numpy()[:, -1])

    return step
