"""Complex values take a new axis in ONNX, wherever it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrcompile

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Turned(nn.Module):
    """x turned by an angle for each position, as rotary embeddings in polar form are: `[batch, sequence, heads, 2n]`.

    `axis` is where the heads' axis is put into the angles `[batch, sequence, n]`.
    """

    def __init__(self, axis: int):
        super().__init__()
        self.axis, self.speed = axis, nn.Buffer(torch.tensor([1.0, 0.3, 0.1]))

    def forward(self, x, positions):
        angles = positions[..., None].float() * self.speed
        turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(self.axis)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize("axis", [2, -2])
def test_a_rotation_in_polar_form_is_computed(tmp_path, axis):
    positions = torch.arange(5).expand(2, 5).contiguous()
    given = {"x": torch.randn(2, 5, 4, 6), "positions": positions}
    shapes = {"x": {0: (batch := torch.export.Dim("batch"))}, "positions": {0: batch}}
    exported = lrcompile.export(Turned(axis), tmp_path / "m.onnx", given, dynamic_shapes=shapes)
    other = {"x": torch.randn(3, 5, 4, 6), "positions": torch.arange(3, 8).expand(3, 5).contiguous()}
    found, expected = lrcompile.run(exported.path)(other)["output"], Turned(axis)(**other)
    assert (found - expected).abs().max() <= 16 * 2**-24 * expected.abs().max()
    assert not torch.allclose(expected, other["x"], atol=0.1)
