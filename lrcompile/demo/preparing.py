"""From a pipeline to what can be trained: the data read and encoded, the classifier built, the results' folder
checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrcompile.demo.data import Data, load_data
from lrcompile.demo.folders import INSIDE, Card
from lrcompile.demo.model import TextClassifier, encode, pad
from lrcompile.demo.sources import load_encoder, load_tokenizer, locate, quiet, weight_files
from lrcompile.demo.training import Examples, schedule
from lrcompile.pipeline import Pipeline, PipelineError

RESULT = "result.json"


@dataclass(frozen=True)
class Prepared:
    data: Data
    tokenizer: Any
    train: Examples
    test: Examples
    batches: list[list[int]]
    """Of training examples; the baseline and the adapter see the same ones."""
    model: TextClassifier
    base_bytes: int
    """Of the encoder's weight files."""
    named: Card
    """A card whose encoder is the one the user named, and one whose encoder is inside the folder."""
    inside: Card


def prepare(pipeline: Pipeline) -> Prepared:
    """Read, encode and build. Raises `DataError`, `ModelError` or `PipelineError`; nothing has been written by then."""
    quiet()
    _refuse_foreign_folder(Path(pipeline.out))
    where, online = locate(pipeline.model)
    part = pipeline.data
    data = load_data(part.source, classes=part.classes, test_share=part.test_share, limit=part.limit)
    tokenizer = load_tokenizer(pipeline.model)
    train, test = (
        Examples(encode(tokenizer, texts.texts, part.max_length), texts.labels, tokenizer.pad_token_id)
        for texts in (data.train, data.test)
    )
    torch.manual_seed(pipeline.train.seed)
    model = TextClassifier(load_encoder(pipeline.model), len(data.labels)).eval()
    labels = list(data.labels)
    weights = weight_files(pipeline.model)
    absolute = pipeline.model if online or ":" in pipeline.model else str(Path(where).resolve())
    return Prepared(
        data=data,
        tokenizer=tokenizer,
        train=train,
        test=test,
        batches=schedule(
            [len(row) for row in train.rows], pipeline.train.batch_size, pipeline.train.epochs, pipeline.train.seed
        ),
        model=model,
        base_bytes=sum(each.stat().st_size for each in weights),
        named=Card(absolute, labels, part.max_length),
        inside=Card(INSIDE, labels, part.max_length),
    )


def write_test(path: Path, examples: Examples) -> None:
    """All test texts padded to one width, for the processes that measure the rungs."""
    whole = pad(examples.rows, examples.pad_id)
    ids, mask = whole["input_ids"].numpy(), whole["attention_mask"].numpy()
    np.savez(path, labels=np.array(examples.labels), input_ids=ids, attention_mask=mask)


def _refuse_foreign_folder(out: Path) -> None:
    """A run replaces its results' folder as a whole, so it must not be a folder that holds anything else."""
    if out.is_dir() and any(out.iterdir()) and not (out / RESULT).is_file():
        raise PipelineError(
            f"out is {str(out)!r}, which exists and holds no {RESULT} of an earlier run; choose another folder"
        )
