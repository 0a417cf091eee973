# SPDX-License-Identifier: Apache-2.0
"""`SimplePyramid`: published names and sizes, arithmetic against plain torch, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vimcore
from torch import Tensor

NAMES = {
    "simfp_2": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
    "simfp_3": ["0.weight", "0.bias"],
    "simfp_4": [],
    "simfp_5": [],
}
CONVOLUTIONS = {"simfp_2": (4, 5), "simfp_3": (1, 2), "simfp_4": (0, 1), "simfp_5": (1, 2)}


@pytest.mark.parametrize(
    ("dim", "parameters", "giga"), [(192, 2_664_880, 53.703868416), (384, 3_298_144, 57.8813952)]
)
def test_sizes_and_names(dim: int, parameters: int, giga: float) -> None:
    pyramid = vimcore.SimplePyramid(dim)
    assert sum(p.numel() for p in pyramid.parameters()) == parameters
    assert pyramid.flops(64, 64) == round(giga * 1e9)
    assert pyramid.strides == [4, 8, 16, 32, 64]
    expected = {
        f"{level}.{name}"
        for level, first in NAMES.items()
        for name in [
            *first,
            *(f"{i}.{leaf}" for i in CONVOLUTIONS[level] for leaf in ("weight", "norm.weight", "norm.bias")),
        ]
    }
    assert set(pyramid.state_dict()) == expected


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over channels, by the formula."""
    mean = x.mean(1, keepdim=True)
    deviation = ((x - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()
    return (x - mean) / deviation * weight[:, None, None] + bias[:, None, None]


def test_arithmetic() -> None:
    """Every level against the formula, with norms that are not trivial; odd sides."""
    pyramid = vimcore.SimplePyramid(8, 6).double()
    for p in pyramid.parameters():
        torch.nn.init.normal_(p)
    state = pyramid.state_dict()

    def normed(x: Tensor, level: str, place: int) -> Tensor:
        weight = state[f"{level}.{place}.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return norm(x, state[f"{level}.{place}.norm.weight"], state[f"{level}.{place}.norm.bias"])

    def enlarged(x: Tensor, level: str, place: int) -> Tensor:
        return F.conv_transpose2d(
            x, state[f"{level}.{place}.weight"], state[f"{level}.{place}.bias"], stride=2
        )

    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    finest = norm(enlarged(x, "simfp_2", 0), state["simfp_2.1.weight"], state["simfp_2.1.bias"])
    finest = 0.5 * finest * (1 + torch.erf(finest / 2**0.5))
    begun = [
        enlarged(finest, "simfp_2", 3),
        enlarged(x, "simfp_3", 0),
        x,
        x[:, :, :2, :4].unflatten(2, (1, 2)).unflatten(4, (2, 2)).amax((3, 5)),
    ]
    expected = [
        normed(normed(y, level, places[0]), level, places[1])
        for y, (level, places) in zip(begun, CONVOLUTIONS.items())
    ]
    found = pyramid(x)
    assert len(found) == 5
    for got, want in zip(found, [*expected, expected[-1][:, :, ::2, ::2]]):
        torch.testing.assert_close(got, want)


def test_other_strides() -> None:
    pyramid = vimcore.SimplePyramid(4, 8, scales=(1, 0.5, 0.25), stride=4, top=False)
    assert pyramid.strides == [4, 8, 16]
    assert [tuple(y.shape) for y in pyramid(torch.randn(1, 4, 8, 12))] == [
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
    ]
    assert pyramid.flops(8, 12) == (96 + 24 + 6) * (4 * 8 + 9 * 64)
    with pytest.raises(
        ValueError, match=r"map: expected \(B, 4, h, w\) of 4 x 4 or more, got \(1, 4, 3, 9\)"
    ):
        pyramid(torch.randn(1, 4, 3, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 6}, "scale 4: must divide dim and stride, which are 6 and 16"),
        ({"dim": 0}, "dim: expected 1 or more, got 0"),
        ({"out": 1.5}, "out: expected an integer, got 1.5"),
        ({"scales": (8,)}, "scales: expected powers of two up to 4, got 8"),
        ({"scales": (3,)}, "scales: expected powers of two up to 4, got 3"),
        ({"scales": (1, 2)}, "scales: expected the finest first"),
        ({"scales": ()}, "scales: expected at least one"),
        ({"scales": 4}, "scales: expected at least one"),
        ({"stride": 2}, "scale 4: must divide dim and stride, which are 8 and 2"),
        ({"top": 1}, "top: expected True or False, got 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        vimcore.SimplePyramid(**{"dim": 8, **options})
