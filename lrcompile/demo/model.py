"""A text classifier: any `transformers` encoder, mean-pooled, and a linear head.

    logits = head( sum_t mask_t h_t / sum_t mask_t ),   h = encoder(input_ids, attention_mask)

Shapes: `input_ids` and `attention_mask` int64 [N, T], h [N, T, d], logits [N, classes].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class TextClassifier(nn.Module):
    """`encoder` is a module whose output has `last_hidden_state`; its own pooler is dropped, for nothing here reads
    it.
    """

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            # A pooler left in place would be a linear map no gradient ever reaches: a dead target.
            encoder.register_module("pooler", None)
        self.encoder = encoder
        config: Any = encoder.config
        self.head = nn.Linear(config.get_text_config().hidden_size, classes)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the hidden states over the real tokens, [N, d]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        logits = self.head(self.pooled(input_ids, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encode(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each text, at most `max_length`, special tokens included, unpadded."""
    return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


def pad(rows: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [len(rows), longest row], padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
