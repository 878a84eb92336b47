"""The report: one row a site, what was left alone and why, what trains, what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lrcompile


def model() -> Any:
    m: Any = nn.Sequential(nn.Linear(6, 7), nn.Embedding(9, 5), nn.Linear(7, 3))
    return lrcompile.apply(m, lrcompile.spec("lora", rank=2, bias="lora_only", exclude=["2"]))


def test_rows_say_what_is_adapted_and_why_not():
    rows = {row.name: row for row in lrcompile.report(model()).sites}
    assert (rows["0"].adapted, rows["0"].kind, rows["0"].in_features, rows["0"].out_features, rows["0"].rank) == (
        True, "linear", 6, 7, 2,
    )  # fmt: skip
    assert rows["0"].added == 2 * (6 + 7)
    assert (rows["1"].adapted, rows["1"].reason) == (False, "embedding")
    assert (rows["2"].adapted, rows["2"].reason, rows["2"].rank) == (False, "excluded", None)


def test_totals_are_counted():
    m = model()
    report = lrcompile.report(m)
    added, base = 2 * (6 + 7), 6 * 7 + 7 + 9 * 5 + 7 * 3 + 3
    assert report.trainable == added + 7
    assert report.total == added + base
    assert report.trainable_bytes == 4 * (added + 7)
    assert report.base_bytes == 4 * base


def test_an_nf4_code_counts_as_two_numbers():
    m: Any = lrcompile.apply(
        nn.Sequential(nn.Linear(64, 64, bias=False)), lrcompile.spec("qlora", rank=2, double_quant=False)
    )
    report = lrcompile.report(m)
    assert report.total == 64 * 64 + 2 * 128
    assert report.base_bytes == 64 * 64 // 2 + 4 * 64


def test_it_prints_adapters_state_and_every_row():
    m = model()
    lrcompile.merge(m)
    text = str(lrcompile.report(m))
    assert "adapters: default (active: default; merged: default)" in text
    assert "1 adapted, 2 left alone" in text
    assert "excluded" in text
    assert "embedding" in text


def test_it_becomes_a_dictionary():
    found = lrcompile.report(model()).to_dict()
    assert found["sites"][0]["name"] == "0"
    assert found["adapters"] == ("default",)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_it_draws_a_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = lrcompile.report(model()).plot(tmp_path / f"sites{suffix}")
    assert path.stat().st_size > 1000


def test_two_adapters_share_a_row():
    m = model()
    lrcompile.apply(m, lrcompile.spec("lora", rank=3, targets=["0", "2"]), name="two")
    rows = {row.name: row for row in lrcompile.report(m).sites}
    assert rows["0"].added == (2 + 3) * (6 + 7)
    assert rows["2"].adapted
    assert len(rows) == 3


def test_a_model_without_adapters_has_no_report():
    with pytest.raises(lrcompile.AdapterError, match=r"lrcompile\.apply"):
        lrcompile.report(nn.Linear(2, 2))


def test_notes_name_what_shares_a_weight():
    m: Any = nn.ModuleDict({"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
    m["head"].weight = m["embed"].weight
    lrcompile.apply(m, lrcompile.spec("lora", rank=2, targets=["head"]))
    assert "head shares its weight with embed.weight" in str(lrcompile.report(m))
    assert torch.is_tensor(m["head"].weight)
