# SPDX-License-Identifier: Apache-2.0
"""The implied attention against the dense matrix by its formula, and the network rebuilt from it."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import vimcore
from helpers import build, images_for, small
from torch import Tensor
from vimcore.analysis.layers import Layers
from vimcore.analysis.matrices import block_rows, channel_matrices

CONFIGS = {
    "middle": small(),
    "sum of directions": small(average_directions=False),
    "double": small(class_token="double"),
    "registers": small(class_token="registers", registers=3),
    "none": small(directions="none", class_token="none", d_conv=3),
    "sequence": small(directions="sequence", class_token="head"),
    "block": small(directions="block", depth=4),
    "ssm": small(directions="ssm", class_token="random"),
    "layer norm, scaled": small(norm="layer", layer_scale=0.5, pos_embed=False),
    "rope": small(rope=True, rope_residual=True, class_token="head", depth=3),
    "overlapping": small(num_classes=0, stride=2),
}


@pytest.fixture
def _short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a matrix of few tokens has several."""
    monkeypatch.setattr("vimcore.analysis.matrices.ROWS", 3)


def written_out(
    config: reference.Config, w: dict[str, Tensor], m: str, s: str, a: str, x: Tensor, scan: bool, conv: bool
) -> tuple[Tensor, Tensor]:
    """alpha (L, L, E) of a scan by its formula, sigmoid(p) (L, E); flags: from the last token on."""
    x = x.flip(1) if conv else x
    p = reference.causal_conv(x, w[m + f"conv1d{s}.weight"], w[m + f"conv1d{s}.bias"])
    u, raw, B, C = (t[0] for t in reference.branch_inputs(config, w, m, s, x))
    delta, slope = F.softplus(raw + w[m + f"dt_proj{s}.bias"]), torch.sigmoid(p[0])
    if conv:
        delta, slope, B, C = (t.flip(0) for t in (delta, slope, B, C))
    A, D = -w[m + f"A{a}_log"].exp(), w[m + f"D{s}"]
    length = len(u)
    alpha = torch.zeros(length, length, config.inner, dtype=torch.float64)
    for t in range(length):
        for j in range(t, length) if scan else range(t + 1):
            between = delta[t:j] if scan else delta[j + 1 : t + 1]
            decay = (A * between.sum(0)[:, None]).exp()
            alpha[t, j] = delta[j] * (C[t] * decay * B[j]).sum(-1)
        alpha[t, t] += D
    return alpha, slope


def convolved(alpha: Tensor, slope: Tensor, weight: Tensor, reverse: bool) -> Tensor:
    """sum_s alpha[t, s] slope[s] w[j - s + K - 1] of (L, L, E)."""
    out, width = torch.zeros_like(alpha), weight.shape[-1]
    for s in range(alpha.shape[1]):
        for tap in range(width):
            j = s + tap if reverse else s - tap
            if 0 <= j < alpha.shape[1]:
                out[:, j] += alpha[:, s] * slope[s] * weight[:, 0, width - 1 - tap]
    return out


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("_short_tiles")
def test_maps_are_the_matrix_and_rebuild_the_block(name: str) -> None:
    config = CONFIGS[name]
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 1)
    length, height, width = config.tokens, *config.grid
    at = reference.class_positions(config, reference.Draws())
    patches = [t for t in range(length) if t not in at]
    tokens = [(row, column) for row in range(height) for column in range(width)]
    rows = {
        part: torch.stack(
            [vimcore.attention_maps(model, images, t, part=part, reduce=None)[0] for t in tokens], 1
        )
        for part in ("block", "scan")
    }
    assert rows["block"].shape == (config.depth, len(tokens), 2, config.inner, length)
    if at:
        classes = vimcore.attention_maps(model, images, part="block", reduce=None)[0]
    net = Layers("test", model, images)
    for i, h, r in net.visit():
        m, mixer = f"layers.{i}.mixer.", net.frozen(i, h, r)
        v = reference.normalise(config, weights, f"layers.{i}.norm", h if r is None else r + h)
        x, z = (v @ weights[m + "in_proj.weight"].T).chunk(2, -1)
        back = config.directions == "block" and i % 2 == 1
        ways = {
            "ssm_conv": [("", "", False, False), ("_b", "_b", True, True)],
            "ssm": [("", "", False, False), ("", "_b", True, False)],
        }.get(config.directions, [("", "", back, back)])
        half = 0.5 if config.directions == "ssm_conv" and config.average_directions else 1.0
        gate = F.silu(z[0]) * half
        whole, biases = torch.zeros(length, length, config.inner, dtype=torch.float64), 0.0
        both = torch.zeros(2, *whole.shape, dtype=torch.float64)
        for (s, a, scan, conv), branch in zip(ways, mixer.branches, strict=True):
            alpha, slope = written_out(config, weights, m, s, a, x, scan, conv)
            found = rows["scan"][i, :, int(scan)].transpose(1, 2)
            assert (found - alpha[patches]).abs().max() < 1e-12
            matrix = convolved(alpha, slope, weights[m + f"conv1d{s}.weight"], conv) * gate[:, None]
            assert (rows["block"][i, :, int(scan)].transpose(1, 2) - matrix[patches]).abs().max() < 1e-12
            for part, start, values in block_rows(mixer, branch, 0):
                tile = torch.zeros_like(matrix[part])
                tile[:, start : start + values.shape[2]] = values.permute(1, 2, 0)
                assert (tile - matrix[part]).abs().max() < 1e-12
            both[int(scan)] += matrix
            whole += matrix
            biases += (alpha * slope * weights[m + f"conv1d{s}.bias"]).sum(1) * gate
        if len(ways) == 1:  # there is no such scan
            assert not rows["block"][i, :, 1 - int(ways[0][2])].any()
        if at:
            row = both[:, at].mean(1).transpose(1, 2)
            assert (classes[i] - row).abs().max() < 1e-12
        kinds = [torch.abs, torch.relu]
        for kept, matrix in zip(kinds, channel_matrices(mixer, 0, kinds), strict=True):
            assert (matrix - kept(whole).mean(-1)).abs().max() < 1e-12
        out = ((whole * x[0]).sum(1) + biases) @ weights[m + "out_proj.weight"].T
        if config.layer_scale is not None:
            out = out * weights[m + "gamma"]
        wanted, _ = net.block(i, h, r)
        assert (out - wanted[0]).abs().max() < 1e-12


def test_reductions_are_norms_of_the_maps() -> None:
    config = small(class_token="head", layer_scale=0.5)
    weights = reference.random_weights(config)
    model, images = build(config, weights, torch.float64), images_for(config, 2)
    whole = vimcore.attention_maps(model, images, reduce=None)
    assert whole.shape == (2, config.depth, 2, config.inner, config.tokens)
    on_grid = whole[..., 1:].unflatten(-1, config.grid)
    assert (vimcore.attention_maps(model, images) - on_grid.abs().mean(3)).abs().max() < 1e-14
    found = vimcore.attention_maps(model, images, layers=[-1, 0], reduce="norm")
    for k, i in enumerate((config.depth - 1, 0)):
        m = f"layers.{i}.mixer."
        into = weights[m + "in_proj.weight"][: config.inner]
        out = weights[m + "out_proj.weight"] * weights[m + "gamma"][:, None]
        wide = torch.einsum("de,bkehw,ef->bkhwdf", out, on_grid[:, i], into)
        assert (found[:, k] - wide.norm(dim=(-2, -1))).abs().max() < 1e-12
    scan = vimcore.attention_maps(model, images, part="scan", reduce=None)[..., 1:].unflatten(-1, config.grid)
    found = vimcore.attention_maps(model, images, part="scan", reduce="norm")
    assert (found - scan.norm(dim=3)).abs().max() < 1e-12


def test_any_size_type_and_mode() -> None:
    config = small(class_token="double", stride=2, rope=False)
    weights = reference.random_weights(config)
    wanted = vimcore.attention_maps(build(config, weights, torch.float64), images_for(config, 1))
    model = build(config, weights).train()
    found = vimcore.attention_maps(torch.nn.DataParallel(model), images_for(config, 1, torch.float32))
    assert model.training
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5 * wanted.max()
    model.dynamic_img_size = True
    images = torch.randn(1, 3, 14, 6)
    alone = vimcore.attention_maps(model, images, (5, 1), layers=1, reduce="norm")
    assert alone.shape == (1, 1, 2, 6, 2)
    assert not alone[0, 0, 0].flatten()[12:].any()  # the last patch sees all, forward; of the others ...
    assert alone[0, 0, 1, -1, -1] > 0
    assert not alone[0, 0, 1].flatten()[:-1].any()  # ... none is behind it


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"token": "head"}, ValueError, "token: expected 'class' or"),
        ({"token": (2, 0)}, ValueError, r"expected a row of 0 .. 1 and a column of 0 .. 2, got \(2, 0\)"),
        ({"token": (0, 1, 2)}, ValueError, r"token: expected 'class' or \(row, column\)"),
        ({"token": (0.5, 0)}, TypeError, "token: expected an integer"),
        ({"part": "mixer"}, ValueError, "part: expected 'block' or 'scan'"),
        ({"reduce": "sum"}, ValueError, "reduce: expected 'abs', 'norm' or None"),
        ({"layers": [2]}, ValueError, r"layers: expected -2 \.\. 1, got 2"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"images": torch.zeros(1, 3, 8, 8)}, ValueError, "images: expected"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "expected a VisionMamba, got Linear"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vimcore.attention_maps(**{"model": build(small()), "images": torch.zeros(1, 3, 8, 12), **options})


def test_without_a_class_token() -> None:
    model, images = build(small(class_token="none")), torch.zeros(1, 3, 8, 12)
    with pytest.raises(ValueError, match="no class token; name a patch"):
        vimcore.attention_maps(model, images)
