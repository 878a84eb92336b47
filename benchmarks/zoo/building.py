"""Build one tiny random model of a family and the inputs to feed it; nothing is fetched from a hub.

Linear weights are drawn at 1/sqrt(width) instead of the library's 0.02: after two layers of 0.02 an adapter's effect
would drown in rounding, and "the adapter is live" could not be told from "it is not".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
VOCAB = 97


@dataclass(frozen=True)
class Family:
    """One row of the breadth table: how to build the model, what to feed it, what to target beside the linears."""

    name: str
    kind: str
    model: str
    config: Inputs
    inputs: str = "tokens"
    also: tuple[str, ...] = ()  # a second set of targets, by name: embeddings, experts, attention, raw parameters
    refused: str = ""  # what the refusal of `also` says, as a regex, where one is due
    bypassed: tuple[str, ...] = ()  # linear maps whose own module is never called: unused, or read by their parent
    narrow: tuple[str, ...] = ()  # linear maps narrower than the rank the others get: these get rank 1
    base_exports: bool = True  # False: torch.export cannot capture the base either, so no adapter is to blame

    def build(self) -> tuple[nn.Module, Inputs]:
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, self.model)
        config = dict(self.config)
        parts = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
        model = cls(cls.config_class(**config, **({} if parts else {"use_cache": False})))
        _wake(model)
        return model.eval(), INPUTS[self.inputs]()


def _wake(model: nn.Module) -> None:
    """Redraw every linear weight and bias at a scale where each map moves the output."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and "proj" in name:
                nn.init.normal_(weight, std=min(weight.shape[1:]) ** -0.5)
            elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                nn.init.normal_(weight, std=min(weight.shape) ** -0.5 if weight.dim() == 2 else 0.1)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(2))


def _masked(rows: int = 2, length: int = 11) -> Inputs:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": _ids(rows, length), "attention_mask": mask}


INPUTS: dict[str, Callable[[], Inputs]] = {
    "tokens": _masked,
    "ids": lambda: {"input_ids": _ids(2, 11)},
    "seq2seq": lambda: {**_masked(), "decoder_input_ids": _ids(2, 7)},
    "pixels": lambda: {"pixel_values": _draw(2, 3, 16, 16)},
    "pixels32": lambda: {"pixel_values": _draw(2, 3, 32, 32)},
    "text+pixels": lambda: {**_masked(2, 9), "pixel_values": _draw(2, 3, 16, 16)},
    "audio": lambda: {"input_values": _draw(2, 400)},
    "mel+text": lambda: {"input_features": _draw(2, 8, 40), "decoder_input_ids": _ids(2, 7)},
    "frames+text": lambda: {"input_features": _draw(2, 40, 8), "decoder_input_ids": _ids(2, 7)},
    "spectrogram": lambda: {"input_values": _draw(2, 32, 16)},
}
