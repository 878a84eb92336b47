"""A BERT of two layers with random weights and a vocabulary of letters, as a local folder: for smoke runs, tests."""

from __future__ import annotations

import string
from pathlib import Path

from lrcompile.errors import require

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_tiny_bert(folder: Path, *, hidden: int = 24, layers: int = 2, seed: int = 0) -> Path:
    """Write config, safetensors and tokenizer into `folder`, which is made; returns it. `hidden` is a multiple of 3."""
    torch = require("torch", "hf")
    transformers = require("transformers", "hf")
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *string.digits]
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=2 * hidden + 1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(folder)
    return folder
