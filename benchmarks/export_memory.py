"""Time and memory of an export against the size of its weights: a Llama with a LoRA adapter, merged, with its cache.

Prints one JSON object: sizes in MiB, seconds, and `peak`: (the process's largest resident memory during `export` − what
it held before the model was built) / the bytes of the weights, so 1 is the model alone. `anonymous` counts only
memory that is not the pages of a file, which the system takes back when it needs them. Linux only.

    python benchmarks/export_memory.py --layers 6 --hidden 1024 --form merge --suffix .onnx
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SAMPLING = """
import os, sys, time
os.set_blocking(0, False)
most = 0
while sys.stdin.buffer.raw.read(1) != b"":  # empty once whoever started this has closed it
    with open(f"/proc/{sys.argv[1]}/status") as lines:
        most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
    time.sleep(0.002)
print(1024 * most)
"""


class Resident:
    """The largest resident set while it is open. The kernel's own mark covers file pages too; what is anonymous is
    sampled, from a process of its own: a thread would have to wait for those that hold the interpreter.
    """

    def __enter__(self) -> Resident:
        self.anonymous = self.whole = 0
        Path("/proc/self/clear_refs").write_text("5")  # starts the kernel's high-water mark anew
        command = [sys.executable, "-c", _SAMPLING, str(os.getpid())]
        self._sampling = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self.anonymous = int(self._sampling.communicate()[0])
        self.whole = status("VmHWM")


def status(name: str) -> int:
    """Bytes of one line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(layers: int, hidden: int, form: str, suffix: str, use_cache: bool) -> dict[str, object]:
    import torch
    import transformers

    import lrcompile

    tiny = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    example = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with tempfile.TemporaryDirectory() as folder:  # whatever libraries load the first time is theirs, not the model's
        lrcompile.export(transformers.LlamaForCausalLM(tiny), Path(folder, f"tiny{suffix}"), example)
        before, anonymous = status("VmRSS"), status("RssAnon")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=8000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128, intermediate_size=4 * hidden,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        lrcompile.apply(model, lrcompile.spec("lora", rank=16))
        for name, parameter in model.named_parameters():
            if "lrcompile_adapters" in name and name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.02)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        held = status("VmRSS") - before
        started = time.monotonic()
        with Resident() as resident:
            exported = lrcompile.export(model, Path(folder, f"m{suffix}"), example, adapters=form, use_cache=use_cache)
        seconds = time.monotonic() - started
        written = sum(Path(folder, name).stat().st_size for name in exported.manifest["sha256"])
    return {
        "form": form,
        "suffix": suffix,
        "use_cache": use_cache,
        "weights_MiB": round(weights / 2**20, 1),
        "written_MiB": round(written / 2**20, 1),
        "held_before": round(held / weights, 3),
        "seconds": round(seconds, 1),
        "peak": round((resident.whole - before) / weights, 3),
        "peak_anonymous": round((resident.anonymous - anonymous) / weights, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--form", choices=("merge", "inline"), default="merge")
    parser.add_argument("--suffix", choices=(".onnx", ".pt2"), default=".onnx")
    parser.add_argument("--use-cache", action="store_true")
    given = parser.parse_args()
    print(json.dumps(measure(given.layers, given.hidden, given.form, given.suffix, given.use_cache)))
