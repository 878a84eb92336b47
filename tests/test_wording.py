"""Phrases of messages: lists cut short say how long they are, sizes carry a unit."""

from __future__ import annotations

import pytest

from lrcompile.wording import listed, sized


def test_a_long_list_is_cut_and_says_its_length():
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c"], 2) == "a, b … (3 in all)"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_sizes_have_the_largest_unit_that_leaves_a_number_above_one(count, text):
    assert sized(count) == text
