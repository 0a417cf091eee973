# SPDX-License-Identifier: Apache-2.0
"""Logits and every gradient against the authors' published code, in both types and both memory modes."""

from __future__ import annotations

import golden
import pytest
import torch
from helpers import build, run

TYPES = {
    "float32": (torch.float32, 1e-5, 1e-4),
    "float64": (torch.float64, 1e-10, 1e-6),
}  # gradients stored in float32


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("name", golden.NAMES)
def test_golden(name: str, dtype: str, memory: str) -> None:
    kind, forward_tolerance, grad_tolerance = TYPES[dtype]
    g = golden.load(name)
    model = build(g.config, g.weights, kind, memory)
    images, probe = g.input.to(kind), g.probe.to(kind)

    model.train()
    logits, grads = run(model, images, probe)
    assert logits.dtype == kind
    assert golden.relative(logits, g.logits) < forward_tolerance
    assert set(grads) == set(g.grads)
    errors = {key: golden.relative(grads[key], truth) for key, truth in g.grads.items()}
    assert not {key: error for key, error in errors.items() if not error < grad_tolerance}

    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), logits)


@pytest.mark.parametrize("name", golden.NAMES)
def test_features_lead_to_the_same_logits(name: str) -> None:
    g = golden.load(name)
    model = build(g.config, g.weights, torch.float64).eval()
    with torch.no_grad():
        tokens = model.forward_features(g.input.double())
        assert tokens.shape == (len(g.input), g.config.tokens, g.config.embed_dim)
        assert golden.relative(model.forward_head(tokens), g.logits) < 1e-10
