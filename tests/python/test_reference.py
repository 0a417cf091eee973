# SPDX-License-Identifier: Apache-2.0
"""The oracle itself against the values of the authors' code, on which every other test stands."""

from __future__ import annotations

import golden
import pytest
import reference
import torch


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NAMES)
def test_reference_agrees_with_golden(name: str) -> None:
    g = golden.load(name)
    weights = {k: v.double() for k, v in g.weights.items()}
    assert {k: tuple(v.shape) for k, v in weights.items()} == reference.parameter_shapes(g.config)
    result, grads = reference.gradients(g.config, weights, g.input.double(), g.probe.double())
    assert golden.relative(result.logits, g.logits) < 1e-13
    assert set(grads) == set(g.grads)
    for key, truth in g.grads.items():  # stored in float32
        assert golden.relative(grads[key], truth) < 1e-6, key


def test_all_files_are_there() -> None:
    assert len(golden.NAMES) == 18


def test_unknown_metadata_is_an_error() -> None:
    with pytest.raises(ValueError, match="if_new"):
        golden.config_from({"if_new": "True"})


def test_reverse_scan_is_the_scan_of_the_reversed_sequence() -> None:
    u, delta = torch.randn(2, 5, 3).double(), torch.rand(2, 5, 3).double()
    A, b, c = -torch.rand(3, 4).double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double()
    forward = reference.scan(u.flip(1), delta.flip(1), A, b.flip(1), c.flip(1)).flip(1)
    assert torch.equal(reference.scan(u, delta, A, b, c, reverse=True), forward)
