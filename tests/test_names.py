"""Rules over qualified names give what trying each rule on each name gives, at the price of a few look-ups a name."""

from __future__ import annotations

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrcompile.names import Patterns, beginnings, endings, meant, within

PARTS = st.sampled_from(["h", "0", "1", "10", "q", "hq", "q-k", "é"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
SPELLED = st.one_of(NAMES, NAMES.map(re.escape), NAMES.map(lambda name: f"^{re.escape(name)}"), NAMES.map("^{}".format))
EXPRESSIONS = st.sampled_from([r"\d\.q", "q|k", ".*", "^h", ".", "h.0", r"h\.\d+", "(q)", "q$", "0[.]q"])
KEYS = st.one_of(SPELLED, EXPRESSIONS)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(keys=st.lists(KEYS, unique=True, max_size=6), name=NAMES)
@example(keys=["h.0", r"h\.0"], name="hq0")
@example(keys=["1.q", "^1.q"], name="h.1.q")
def test_patterns_hit_as_each_key_would_as_a_regular_expression(keys, name):
    assert Patterns(keys).hitting(name) == [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(keys=st.lists(KEYS, unique=True, max_size=6), names=st.lists(NAMES, max_size=6))
def test_idle_keys_hit_no_name(keys, names):
    idle = [key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
    assert Patterns(keys).idle(names) == idle


@settings(deadline=None, max_examples=100, derandomize=True)
@given(entries=st.lists(NAMES, max_size=5), names=st.lists(NAMES, max_size=6))
def test_a_list_means_whole_names_and_suffixes_at_a_dot(entries, names):
    one_by_one = {name for name in names if any(name == each or name.endswith(f".{each}") for each in entries)}
    assert meant(entries, names) == one_by_one


def test_a_string_means_whole_names():
    assert meant("h|q.*", ["h", "a.h", "q.0", "hq"]) == {"h", "q.0"}


def test_what_is_within_a_module_lies_in_it_or_is_it():
    names = ["h.0.q", "h.0.q.weight", "h.0.qq", "h.1.k"]
    assert within(["q"], names) == {"h.0.q", "h.0.q.weight"}
    assert within(r"h\.0", names) == {"h.0.q", "h.0.q.weight", "h.0.qq"}
    assert within((), names) == set()


def test_the_parts_of_a_name():
    assert list(beginnings("a.b.c")) == ["a", "a.b", "a.b.c"]
    assert list(endings("a.b.c")) == ["a.b.c", "b.c", "c"]
