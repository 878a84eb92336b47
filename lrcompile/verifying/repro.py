"""The smallest part of a candidate that shows a failure, as a folder that runs without lrcompile.

    model.onnx | model.pt2    the part: the nodes between the diverging place and what enters it, with their weights
    inputs.npz                what the candidate itself handed in (a .pt2 program carries its inputs)
    expected.npz              float64 of the reference on these very inputs, and the bound
    run.py, README.md         prints the deviation in units of the bound; exit code 1 if it is over the limit
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from lrcompile.deployment.describing import versions
from lrcompile.errors import VerificationError
from lrcompile.verifying.cutting import Part, cut, savez
from lrcompile.verifying.outputs import Inputs
from lrcompile.verifying.references import ModuleReference, Reference
from lrcompile.verifying.replay import Deviation
from lrcompile.verifying.runners import Runner
from lrcompile.verifying.verdict import Verdict
from lrcompile.writing import atomic_folder

_RUN = '''"""Runs the part in this folder and compares it with what it should give. Needs {needs} only."""

import json
import sys
from pathlib import Path

import numpy as np
{imports}

here = Path(__file__).parent
options = json.loads((here / "options.json").read_text())
expected = np.load(here / "expected.npz", allow_pickle=False)
{run}
worst = 0.0
for name, wanted in ((key, expected[key]) for key in expected.files if not key.startswith("bound:")):
    error = float(np.max(np.abs(values[name].astype(np.float64) - wanted), initial=0.0))
    bound = float(expected["bound:" + name])
    ratio = error / bound if bound else float(error > 0) * float("inf")
    print(f"{{name}}: max |error| {{error:.3g}}, r = {{ratio:.3g}} (limit {{options['limit']:g}})")
    worst = max(worst, ratio)
sys.exit(1 if not worst <= options["limit"] else 0)
'''
_ONNX = '''session_options = onnxruntime.SessionOptions()
session_options.intra_op_num_threads = options["session"]["threads"]
levels = {"disabled": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
level = levels[options["session"]["graph_optimization_level"]]
session_options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
for key, value in options["session"]["config"].items():
    session_options.add_session_config_entry(key, value)
session = onnxruntime.InferenceSession(str(here / "model.onnx"), session_options, providers=["CPUExecutionProvider"])
inputs = np.load(here / "inputs.npz", allow_pickle=False)
names = [output.name for output in session.get_outputs()]
values = dict(zip(names, session.run(names, {key: inputs[key] for key in inputs.files})))'''
_PROGRAM = '''torch.set_num_threads(1)
program = torch.export.load(here / "model.pt2")
args, kwargs = program.example_inputs
with torch.no_grad():
    result = program.module()(*args, **kwargs)
leaves = torch.utils._pytree.tree_leaves(result)
tensor = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
values = {"value": tensor.float().numpy()}'''
_PACKAGE = '''torch.set_num_threads(1)
stored = np.load(here / "inputs.npz", allow_pickle=False)
call = torch._inductor.aoti_load_package(str(here / "model.pt2"))
given = {key: torch.from_numpy(stored[key].copy()) for key in stored.files}
with torch.no_grad():
    result = call(*given.values()) if options["positional"] else call(**given)
leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
values = {name: leaves[index].float().numpy() for name, index in options["outputs"].items()}'''
_KINDS = {
    "onnx": ("numpy and onnxruntime", "import onnxruntime", _ONNX),
    "program": ("numpy and torch", "import torch", _PROGRAM),
    "package": ("numpy and torch", "import torch", _PACKAGE),
}


def refuse_used(folder: str | os.PathLike[str]) -> None:
    """A folder is replaced as a whole, so only a new or empty one may be named."""
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise VerificationError(f"{path} exists and is not empty; name a new folder for the repro")


def write_repro(
    folder: str | os.PathLike[str], verdict: Verdict, judge: Reference, candidate: Runner, inputs: Inputs
) -> None:
    """Write the part of `candidate` at the first diverging place, or all of it where there is none.

    Raises `VerificationError` for a candidate that holds nothing to run (recorded outputs) or cannot be cut.
    """
    place = verdict.divergence.name if verdict.divergence else None
    expected = _expected(judge, candidate, inputs, place)
    part = cut(candidate, inputs, place, expected)
    with atomic_folder(folder, error=VerificationError) as target:
        part.write(target)
        arrays = {name: bound.exact.numpy() for name, bound in expected.items()}
        bounds = {f"bound:{name}": np.array(bound.bound) for name, bound in expected.items()}
        renamed = dict(zip(arrays, part.outputs, strict=True)) if part.outputs else {name: name for name in arrays}
        arrays = {renamed[name]: value for name, value in arrays.items()}
        bounds = {f"bound:{renamed[key.removeprefix('bound:')]}": value for key, value in bounds.items()}
        savez(target / "expected.npz", arrays | bounds)
        options = {"limit": verdict.limits.bound_ratio, "session": candidate.session, "versions": versions()}
        text = json.dumps(options | part.options, indent=1, default=str)
        (target / "options.json").write_text(text + "\n", encoding="utf-8")
        needs, imports, run = _KINDS[part.kind]
        (target / "run.py").write_text(_RUN.format(needs=needs, imports=imports, run=run), encoding="utf-8")
        (target / "README.md").write_text(_readme(verdict, part, candidate, place, judge), encoding="utf-8")


def _expected(judge: Reference, candidate: Runner, inputs: Inputs, place: str | None) -> dict[str, Deviation]:
    """Float64 (of a file: its own values) with bounds, of the place on the candidate's inputs, else of the outputs."""
    if place is not None:
        found = judge.local(candidate, inputs, place)
        if found is not None:
            return {"value": found}
    own = judge.own([inputs], None)
    return judge.expected([inputs], own)[0].bounds


def _readme(verdict: Verdict, part: Part, candidate: Runner, place: str | None, judge: Reference) -> str:
    nowhere = "No single place could be named: this is all of it."
    where = f"Place: `{place}`\n\n{verdict.divergence}" if place else nowhere
    source = "float64 of the reference" if isinstance(judge, ModuleReference) else f"the values of {judge.exact}"
    return f"""# A part of {candidate.label} that leaves its bound

{where}

`python run.py` runs {part.what} on the inputs it was handed in the whole model and compares with {source}
on the same inputs. It needs neither lrcompile nor the model; `options.json` has the session settings and versions.

{chr(10).join(f"- {failure}" for failure in verdict.failures)}
"""
