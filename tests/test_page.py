"""The report is one page that needs no network, escapes whatever it shows, and draws what was measured."""

from __future__ import annotations

import copy
import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.verification import verify
from lrcompile.verifying.page import write_page
from lrcompile.verifying.verdict import Verdict

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def failed() -> Verdict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, targets=["0", "2"], seed=0))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(std=0.3)
    other = copy.deepcopy(model)
    other.get_parameter("2.lrcompile_adapters.weight.default.B").data.mul_(2)
    return verify(model, other, (torch.randn(4, 12),))


class Tags(HTMLParser):
    """Every start tag with its attributes; end tags must match."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(path: Path) -> tuple[str, Tags]:
    text, tags = path.read_text(encoding="utf-8"), Tags()
    tags.feed(text)
    assert tags.open == []
    return text, tags


def test_it_shows_verdict_numbers_places_settings_and_pictures(failed: Verdict, tmp_path: Path) -> None:
    failed.to_html(tmp_path / "v.html")
    text, tags = parsed(tmp_path / "v.html")
    for part in (
        "does not hold", "First divergence", "Error along depth", "Effect of the adapter kept, per site", "Size",
        f"{failed.bound_ratio:.3g}", "entering 2", torch.__version__, "threads", "bound_ratio",
    ):  # fmt: skip
        assert part in text, part
    pictures = [tag for tag, _ in tags.seen if tag == "svg"]
    assert len(pictures) == 3
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_it_loads_nothing(failed: Verdict, tmp_path: Path) -> None:
    failed.to_html(tmp_path / "v.html")
    _, tags = parsed(tmp_path / "v.html")
    assert not {tag for tag, _ in tags.seen} & {"script", "img", "link", "iframe", "object"}
    for _, attributes in tags.seen:
        for key in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(key) or "#").startswith("#"), attributes
        assert not any(key.startswith("on") for key in attributes)


def test_names_from_a_file_are_text_and_nothing_else(failed: Verdict, tmp_path: Path) -> None:
    evil = '<script>alert(1)</script> $x_{ -->'
    places = tuple(dataclasses.replace(place, name=evil, node=evil) for place in failed.places)
    rows = tuple(dataclasses.replace(row, name=evil) for row in failed.outputs)
    shown = dataclasses.replace(
        failed, places=places, outputs=rows, failures=(evil,), note=evil, name=evil, session={evil: {evil: evil}},
        sizes={evil: 1, "other": 2},
    )  # fmt: skip
    write_page([shown, shown], tmp_path / "v.html")
    text, tags = parsed(tmp_path / "v.html")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in {tag for tag, _ in tags.seen}


def test_a_verdict_without_places_and_one_with_infinite_numbers_are_pages_too(failed: Verdict, tmp_path: Path) -> None:
    bare = dataclasses.replace(failed, places=(), sizes={}, divergence=None)
    endless = dataclasses.replace(
        failed, places=tuple(dataclasses.replace(p, bound_ratio=float("inf"), local_ratio=None) for p in failed.places)
    )
    for verdict in (bare, endless):
        verdict.to_html(tmp_path / "v.html")
        parsed(tmp_path / "v.html")


def test_a_page_that_cannot_be_written_leaves_the_old_one(failed: Verdict, tmp_path: Path) -> None:
    with pytest.raises(lrcompile.VerificationError, match="cannot write"):
        failed.to_html(tmp_path / "no" / "v.html")


def test_the_same_verdict_gives_the_same_page(failed: Verdict, tmp_path: Path) -> None:
    failed.to_html(tmp_path / "a.html")
    failed.to_html(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
