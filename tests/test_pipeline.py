"""The pipeline file: strict, with lines; the default is what the example spells out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.budgets import KINDS
from lrcompile.pipeline import EXPORTS, DataPart, Pipeline, PipelineError, TrainPart, VerifyPart
from lrcompile.specs import Spec

EXAMPLE = Path(__file__).parents[1] / "examples" / "docstrings.yaml"


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "line.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PipelineError) as caught:
        Pipeline.load(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert "line.yaml" in message
    return message


def test_the_example_is_the_default() -> None:
    assert Pipeline.load(str(EXAMPLE)) == Pipeline()


def test_the_example_states_every_field() -> None:
    import yaml

    stated, default = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")), Pipeline().to_dict()
    assert stated.keys() == default.keys()
    for part in ("data", "train", "verify"):
        assert stated[part].keys() == default[part].keys()


def test_a_part_left_out_keeps_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text("train:\n  lr: 0.002\nexport: [fp32]\n", encoding="utf-8")
    read = Pipeline.load(str(path))
    assert read == Pipeline(train=TrainPart(lr=0.002), export=("fp32",))


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    message = refused(tmp_path, "model: m\ntrain:\n  epochs: 1\n  learning_rat: 1\n  batchsize: 3\n")
    assert "line.yaml:4" in message
    message = refused(tmp_path, "model: m\ntrain:\n  epochs: 1\n  batchsize: 3\n")
    assert "line.yaml:4: unknown key 'batchsize'; did you mean 'batch_size'?" in message
    assert "line.yaml:2: unknown key 'trian'; did you mean 'train'?" in refused(tmp_path, "model: m\ntrian: {}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spec: {method: lorra}\n", "did you mean 'lora'?"),
        ("spec: {method: lora, rnak: 3, train_modules: [head]}\n", "did you mean 'rank'?"),
        ("spec: {method: lora}\n", "'head'"),
        ("train: {lr: 1e-3}\n", "write 0.001"),
        ("train: {epochs: 0}\n", "train.epochs is 0"),
        ("train: {batch_size: true}\n", "train.batch_size is True"),
        ("data: {test_share: 1.0}\n", "between 0 and 1"),
        ("data: {limit: 1}\n", "data.limit is 1"),
        ("data: [1]\n", "expected keys and values: source"),
        ("verify: {bound_ratio: -1}\n", "verify.bound_ratio is -1"),
        ("export: [fp16]\n", "fp32, nf4, nf4-inline"),
        ("export: fp32\n", "export is 'fp32'"),
        ("budget: 0.2\n", "budget is 0.2; expected one of"),
        ("budget: {share: -1}\n", "budget share is -1"),
        ("model: ''\n", "model is ''"),
        ("model: a\nmodel: b\n", "line.yaml:2: the key 'model' stands there twice"),
        ("", "expected keys and values"),
        ("a: [1\n", "not YAML"),
        ("out: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fault(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="No such file"):
        Pipeline.load(str(tmp_path / "none.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="cannot read"):
        Pipeline.load(str(tmp_path / "b.yaml"))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    epochs=st.floats(0.01, 10),
    batch_size=st.integers(1, 512),
    limit=st.none() | st.integers(2, 10**6),
    rank=st.integers(1, 64),
    export=st.lists(st.sampled_from(EXPORTS), unique=True),
    budget=st.none() | st.builds(lambda kind, limit: {kind: limit}, st.sampled_from(KINDS), st.floats(0.01, 9)),
)
def test_to_dict_as_a_file_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    epochs: float,
    batch_size: int,
    limit: int | None,
    rank: int,
    export: list[str],
    budget: dict[str, float] | None,
) -> None:
    made = Pipeline(
        data=DataPart(limit=limit),
        spec=Spec("lora", rank=rank, train_modules=("head",)),
        train=TrainPart(epochs=epochs, batch_size=batch_size),
        export=tuple(export),
        verify=VerifyPart(examples=3),
        budget=budget,
    )
    path = tmp_path_factory.mktemp("pipeline") / "line.yaml"
    path.write_text(json.dumps(made.to_dict()), encoding="utf-8")  # JSON is YAML
    assert Pipeline.load(str(path)) == made


def test_reading_a_pipeline_does_not_import_torch() -> None:
    code = f"import sys; from lrcompile.pipeline import Pipeline as P; P.load({str(EXAMPLE)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "torch" not in done.stdout.split()
