"""`shown` gives every item once, and speaks only to somebody who waits at a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from lrcompile import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "speaks"), [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)]
)
def test_every_item_comes_once_and_a_bar_only_after_the_wait_on_a_terminal(monkeypatch, stream, patience, speaks):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    assert list(progress.shown(range(5), "counting", 5)) == [0, 1, 2, 3, 4]
    assert ("counting" in stderr.getvalue()) is speaks
