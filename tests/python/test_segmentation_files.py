# SPDX-License-Identifier: Apache-2.0
"""Files of segmentation networks: what is written, read, kept and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from torch import Tensor
from vimcore.segmentation import FCN, Segmentation, load

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "class_token": "none"}


def backbone(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, "num_classes": 0, **options})


def images(size: tuple[int, int] = (16, 16), channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, Any] = {
    "fcn": lambda: FCN(backbone(), 5),
    "narrow": lambda: FCN(backbone(), 3, channels=8, convs=1, head_norm="group", dropout=0.0),
    "linear": lambda: FCN(backbone(class_token="middle"), 4, convs=0),
    "one class": lambda: FCN(backbone(img_size=(16, 24)), 1),
    "four channels": lambda: FCN(backbone(in_chans=4), 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_gives_the_network_back(name: str, tmp_path: Path) -> None:
    model: Segmentation = NETWORKS[name]()
    config = model.config
    x = images(tuple(config["img_size"]), config["in_chans"])
    model.train()
    model(x)  # statistics of BatchNorm that are not those of the start
    model.eval().save(tmp_path / "a.safetensors")
    other = load(tmp_path / "a.safetensors")
    assert type(other) is type(model)
    assert (other.config, other.options, other.head) == (config, model.options, model.head)
    assert not other.training
    assert torch.equal(other(x), model(x))
    other.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
