"""A causal language model as a function of its key-value cache: one graph for the prompt and for each token after it.

(logits, K', V') = f(ids, mask, positions, K, V) with K' = [K, k(ids)], V' = [V, v(ids)]: K and V of length 0 make it
the prefill, one new token makes it a decode step. `transformers` hands the cache on as an object that no graph can;
here it is a list with a key and a value for each layer, and the object is made inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lrcompile.errors import AdapterError, ExportError, require
from lrcompile.hosting import Host, restore, swap
from lrcompile.verifying.runners import evaluating

PAST, PRESENT = "past_key_values", "present"
POSITIONS = "position_ids"
_OWN = ("input_ids", "attention_mask", POSITIONS)


class Decoder(Host):
    """`forward(input_ids, attention_mask, position_ids, past_key_values=[{"key": K, "value": V}, ...])` gives
    `{"logits": …, "present": [{"key": K', "value": V'}, ...]}`; K and V are `[batch, heads, past, head size]`,
    the mask is `[batch, past + sequence]`.
    """

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any = None, past_key_values: Any = ()) -> Any:
        (batch, sequence), past = input_ids.shape, past_key_values[0]["key"].shape[2]
        # said here, these become equalities of the graph's sizes; torch.export would otherwise leave each its own
        torch._check(attention_mask.shape[0] == batch)
        torch._check(attention_mask.shape[1] == past + sequence)
        for tensor in (tensor for layer in past_key_values for tensor in layer.values()):
            torch._check(tensor.shape[0] == batch)
            torch._check(tensor.shape[2] == past)
        given = {} if position_ids is None else {POSITIONS: position_ids}
        result = super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, **given, past_key_values=_cache(past_key_values),
            use_cache=True, return_dict=True,
        )  # fmt: skip
        return {"logits": result.logits, PRESENT: _layers(result.past_key_values)}


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """With `model` called as `Decoder.forward` is; a copy made inside keeps that. Raises ExportError for a model that
    has no such form.
    """
    refuse_cacheless(model)
    try:
        swap(model, Decoder)
    except AdapterError as error:
        raise ExportError(str(error)) from error
    try:
        yield
    finally:
        restore(model, Decoder)


def refuse_cacheless(model: nn.Module) -> None:
    """ExportError unless `model` is a `transformers` decoder that returns logits and takes a key-value cache."""
    config, name = getattr(model, "config", None), type(model).__name__
    if config is None or not {"input_ids", "attention_mask", PAST} <= set(_parameters(model)):
        raise ExportError(
            f"use_cache=True: {name}.forward takes no {PAST}; it is for causal language models of transformers"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"use_cache=True: {name} is an encoder-decoder, whose cache has two parts; export it without (one graph of"
            " input_ids and decoder_input_ids), or its encoder and decoder as modules of their own"
        )
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ExportError(f"use_cache=True: {name} returns no logits; take the model with its language-model head")


def prompt_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where the model takes them, `position_ids` of a prompt given in any of the
    forms `model` takes. Raises ExportError for anything beside them, and as `refuse_cacheless`.
    """
    refuse_cacheless(model)
    taken = _parameters(model)
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(taken, inputs, strict=False))
    given = {name: value for name, value in given.items() if value is not None and name != "use_cache"}
    if not isinstance(given.get("input_ids"), Tensor) or given["input_ids"].dim() != 2 or set(given) - set(_OWN):
        raise ExportError(
            f"use_cache=True takes example inputs of {', '.join(_OWN)}, of which only input_ids [batch, sequence] must"
            f" be there; given were {', '.join(given) or 'none'}"
        )
    ids = given["input_ids"].long()
    mask = given.get("attention_mask", torch.ones_like(ids)).long()
    if mask.shape != ids.shape:
        raise ExportError(f"attention_mask is {list(mask.shape)} beside input_ids {list(ids.shape)}: one size is due")
    prompt = {"input_ids": ids, "attention_mask": mask}
    if POSITIONS in taken:
        prompt[POSITIONS] = given.get(POSITIONS, positions(mask))
    return prompt


def _parameters(model: nn.Module) -> list[str]:
    """The names of what `forward` takes; one that only hands `**kwargs` on takes what the one above it does."""
    for cls in type(model).__mro__:
        names = list(inspect.signature(cls.__dict__["forward"]).parameters)[1:] if "forward" in cls.__dict__ else []
        if PAST in names:
            return names
    return []


def positions(mask: Tensor) -> Tensor:
    """Of each token among those the mask keeps, as `generate` counts: 0 for the first, and for what is padding."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def steps(model: nn.Module, prompt: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The prompt on an empty cache, and the likeliest next token on the cache that leaves: what `Decoder` takes.

    `model` is not hosted yet; it runs twice, the first time on one token.
    """
    ids, mask, first = prompt["input_ids"], prompt["attention_mask"], first_step(model, prompt)
    with torch.no_grad(), evaluating(model), decoding(model):
        result = model(**first)
    following = {
        "input_ids": result["logits"][:, -1:].argmax(-1).to(ids.dtype),
        "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], -1),
    }
    if POSITIONS in prompt:
        following[POSITIONS] = prompt[POSITIONS][:, -1:] + 1
    return [first, {**following, PAST: result[PRESENT]}]


def first_step(model: nn.Module, prompt: Mapping[str, Tensor]) -> dict[str, Any]:
    """The prompt on an empty cache; `model` is not hosted yet."""
    rows = len(prompt["input_ids"])
    empty = [
        {name: each.new_empty(rows, each.shape[1], 0, each.shape[3]) for name, each in layer.items()}
        for layer in _after_one_token(model, prompt)
    ]
    return {**prompt, PAST: empty}


def example(model: nn.Module, prompt: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs to trace `Decoder` with, no size of which is 0 or 1, and which sizes vary, in `torch.export`'s form."""
    rows, length, held = 2, 3, 4
    mask = prompt["attention_mask"].new_ones(rows, held + length)
    given: dict[str, Any] = {
        "input_ids": prompt["input_ids"][:1, :1].repeat(rows, length),
        "attention_mask": mask,
    }
    if POSITIONS in prompt:
        given[POSITIONS] = positions(mask)[:, held:].to(prompt[POSITIONS].dtype)
    given[PAST] = [
        {name: each.repeat(rows, 1, held, 1) for name, each in layer.items()}
        for layer in _after_one_token(model, prompt)
    ]
    batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
    shapes: dict[str, Any] = {name: {0: batch, 1: sequence} for name in prompt}
    shapes["attention_mask"] = {0: batch, 1: Dim.DYNAMIC}
    shapes[PAST] = [{name: {0: batch, 2: past} for name in layer} for layer in given[PAST]]
    return given, shapes


@torch.no_grad()
def _after_one_token(model: nn.Module, prompt: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each layer keeps of the prompt's first token."""
    with evaluating(model):
        result = model(input_ids=prompt["input_ids"][:1, :1], use_cache=True, return_dict=True)
    return _layers(result.past_key_values)


def described(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a runner must know beside the graph; `inputs` are those of `Decoder`."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    tokens = getattr(model, "generation_config", None) or text  # what `generate` itself goes by
    _, heads, _, head_size = inputs[PAST][0]["key"].shape
    return {
        "model_type": getattr(text, "model_type", None),
        "layers": len(inputs[PAST]),
        "attention_heads": getattr(text, "num_attention_heads", heads),
        "key_value_heads": heads,
        "head_size": head_size,
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "context_length": getattr(text, "max_position_embeddings", None),
        **{name: getattr(tokens, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _cache(layers: Any) -> Any:
    """One that grows without a bound, sliding windows too: what lies outside a window is masked, and one size holds for
    all layers.
    """
    utils = require("transformers.cache_utils", "hf")
    cache = utils.DynamicCache()
    for each in layers:
        layer = utils.DynamicLayer()
        layer.keys, layer.values = each["key"], each["value"]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


def _layers(cache: Any) -> list[dict[str, Tensor]]:
    utils = require("transformers.cache_utils", "hf")
    layers = getattr(cache, "layers", [])
    odd = [type(layer).__name__ for layer in layers if type(layer) not in _plain(utils)]
    if not layers or odd or type(cache) is not utils.DynamicCache:
        raise ExportError(
            f"use_cache=True: the model keeps {odd[0] if odd else type(cache).__name__}, which is not keys and values"
            " that grow by concatenation (recurrent states are not); export it without"
        )
    return [{"key": layer.keys, "value": layer.values} for layer in layers]


def _plain(utils: Any) -> tuple[type, ...]:
    return utils.DynamicLayer, utils.DynamicSlidingWindowLayer
