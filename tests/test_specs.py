"""A spec is checked where it is given: every error names the field, the value and what would be valid."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lrcompile
from lrcompile.errors import SpecError
from lrcompile.names import Patterns
from lrcompile.specs import COMMON, Spec, spec

WRONG: list[tuple[str, object]] = [
    ("rank", 0), ("rank", -1), ("rank", 2.0), ("rank", True), ("rank", "8"), ("rank", None),
    ("alpha", 0), ("alpha", -1), ("alpha", math.inf), ("alpha", math.nan), ("alpha", "16"), ("alpha", True),
    ("alpha", 10**400),
    ("dropout", 1), ("dropout", -0.1), ("dropout", math.nan), ("dropout", None),
    ("targets", ()), ("targets", ""), ("targets", "("), ("targets", 5), ("targets", ["q", 3]), ("targets", [""]),
    ("exclude", "["), ("exclude", 0), ("exclude", {"q": 1}),
    ("layers", 3.5), ("layers", -1), ("layers", [0, -1]), ("layers", "1"), ("layers", [True]),
    ("rank_pattern", {"q": 0}), ("rank_pattern", [("q", 2)]), ("rank_pattern", {1: 2}), ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"q": 0}), ("alpha_pattern", {"q": "2"}), ("alpha_pattern", None),
    ("scaling", "alpha"), ("scaling", 1), ("scaling", ["alpha/r"]),
    ("init", "zeros"), ("bias", True), ("dtype", "int8"), ("dtype", float),
    ("train_modules", "head"), ("train_modules", 5), ("train_modules", [1]),
    ("seed", -1), ("seed", 1.5), ("seed", 2**63), ("seed", True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={value!r:.20}" for field, value in WRONG])
def test_a_wrong_value_is_refused_where_it_is_given_and_the_field_named(field: str, value: object):
    with pytest.raises(lrcompile.SpecError, match=field) as caught:
        spec("lora", **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("method", "hint"), [("lorra", "'lora'"), ("QLORA", "olora, pissa"), (["lora"], "Known"), (None, "Known")]
)
def test_an_unknown_method_is_refused_with_the_nearest_and_all_known_ones(method, hint):
    with pytest.raises(lrcompile.SpecError, match=hint) as caught:
        spec(method)
    assert caught.value.field == "method"


def test_an_unknown_field_is_refused_with_the_nearest_one():
    with pytest.raises(lrcompile.SpecError, match=r"did you mean 'rank'.*train_modules") as caught:
        spec("lora", rnak=4)
    assert caught.value.field == "rnak"


@pytest.mark.parametrize("field", ["block_size", "double_quant", "compute_dtype", "keep_base", "options"])
def test_a_field_of_another_method_is_refused(field: str):
    with pytest.raises(lrcompile.SpecError, match=field):
        spec("lora", **{field: 64})


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 65), ("block_size", 64.0), ("double_quant", 1), ("compute_dtype", "int8"), ("keep_base", "cuda")],
)
def test_a_methods_own_field_is_checked_too(field: str, value: object):
    with pytest.raises(lrcompile.SpecError, match=field) as caught:
        spec("qlora", **{field: value})
    assert caught.value.field == field


def test_defaults_are_those_the_documentation_states():
    s = spec("lora")
    assert (s.rank, s.alpha, s.dropout, s.targets, s.scaling, s.bias) == (
        16,
        32.0,
        0.0,
        "all-linear",
        "alpha/r",
        "none",
    )
    q = spec("qlora")
    assert (q.block_size, q.double_quant, q.compute_dtype, q.keep_base) == (64, True, "bfloat16", None)


def test_a_spec_cannot_be_changed_after_it_was_checked():
    with pytest.raises(AttributeError):
        spec("lora").rank = 0  # type: ignore[misc]


def test_a_missing_attribute_is_an_attribute_error_naming_the_method():
    with pytest.raises(AttributeError, match=r"'lora'.*'block_size'"):
        _ = spec("lora").block_size


NAME = st.text(st.characters(categories=("Ll", "Nd"), max_codepoint=127), min_size=1, max_size=6)
FIELDS = {
    "rank": st.integers(1, 512),
    "alpha": st.floats(1e-3, 1e3),
    "dropout": st.floats(0, 0.99),
    "targets": st.one_of(st.just("all-linear"), st.lists(NAME, min_size=1, max_size=3)),
    "exclude": st.lists(NAME, max_size=2),
    "layers": st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=3)),
    "rank_pattern": st.dictionaries(NAME, st.integers(1, 99), max_size=2),
    "alpha_pattern": st.dictionaries(NAME, st.floats(0.1, 99), max_size=2),
    "scaling": st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    "init": st.sampled_from(["kaiming", "gaussian", "orthogonal"]),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "train_modules": st.lists(NAME, max_size=2),
    "dtype": st.one_of(st.none(), st.sampled_from(["float32", "bfloat16"])),
    "seed": st.one_of(st.none(), st.integers(0, 2**63 - 1)),
}


def test_every_common_field_is_generated_below():
    assert set(FIELDS) == set(COMMON)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS), suffix=st.sampled_from([".json", ".yaml"]))
def test_a_spec_survives_dict_file_copy_and_pickle(fields, suffix, tmp_path_factory):
    s = spec("lora", **fields)
    path = tmp_path_factory.mktemp("spec") / f"spec{suffix}"
    s.dump(path)
    assert Spec.from_dict(s.to_dict()) == Spec.load(path) == copy.deepcopy(s) == pickle.loads(pickle.dumps(s)) == s


def test_options_of_a_method_survive_too(tmp_path):
    s = spec("qlora", block_size=128, double_quant=False, keep_base="cpu")
    s.dump(tmp_path / "q.yaml")
    assert Spec.load(tmp_path / "q.yaml") == s
    assert s.block_size == 128


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[1, 2]", b"5", b"a: [", b"\xff\xfe\x00", b"method: 2024-99-99",
        b"!!python/object/apply:os.system ['x']", b"rank: 4",
        b"1: 2\nmethod: lora", b"method: lora\nrank: " + b"9" * 5000, b"[" * 20_000, b"method: lora\nrnk: 3",
    ],
)  # fmt: skip
def test_a_file_that_is_no_spec_is_one_typed_error(tmp_path, content):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(lrcompile.SpecError):
        Spec.load(tmp_path / "s.yaml")


def test_the_two_scale_rules_are_exact():
    assert spec("lora", rank=8, alpha=12.0).scale_of("q") == 1.5
    assert spec("lora", rank=8, alpha=12.0, scaling="alpha/sqrt(r)").scale_of("q") == 12.0 / math.sqrt(8)
    s = spec("lora", rank=4, alpha=3, rank_pattern={"q": 9}, alpha_pattern={"q": 5}, scaling="alpha/sqrt(r)")
    assert s.scale_of("h.0.q") == 5 / 3
    assert s.scale_of("h.0.k") == 1.5


@pytest.mark.parametrize("alpha", [1e300, 1e-60])
def test_a_scale_float32_cannot_hold_is_refused(alpha):
    with pytest.raises(lrcompile.SpecError, match="float32") as caught:
        spec("lora", alpha=alpha).scale_of("q")
    assert caught.value.field == "alpha"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q", "a.q", True),
        ("q", "aq", False),
        ("q", "a.q.b", False),
        (r"layers\.\d\.q", "m.layers.1.q", True),
        ("q|k", "a.k", True),
    ],
)
def test_a_pattern_ends_the_name_at_a_dot_as_in_peft(pattern, name, expected):
    assert Patterns([pattern]).hitting(name) == [pattern] * expected


def test_describing_a_method_does_not_import_torch():
    code = "import sys, lrcompile; lrcompile.spec('lora'); lrcompile.methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_without_fields_is_named_in_the_error(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SpecError, match=r"empty\.yaml holds no fields"):
        Spec.load(tmp_path / "empty.yaml")


def test_small_numbers_in_json_are_numbers(tmp_path):
    small = spec("lora", alpha=1e-5)
    small.dump(tmp_path / "small.json")
    assert Spec.load(tmp_path / "small.json") == small
