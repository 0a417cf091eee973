# SPDX-License-Identifier: Apache-2.0
"""Names that users type: there without further imports, with the arguments that programs rely on."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import vimcore

ROOT = Path(__file__).parents[2]
# The first arguments, in their order; later versions may add others behind them, or with names.
NAMES = {
    "VisionMamba": "img_size patch_size stride in_chans num_classes embed_dim depth d_state d_conv expand "
    "dt_rank directions average_directions class_token",
    "VisionMamba.forward_features": "self images",
    "VisionMamba.forward_intermediates": "self images indices",
    "VisionMamba.forward_head": "self tokens",
    "VisionMamba.reset_classifier": "self num_classes",
    "VisionMamba.set_input_size": "self img_size",
    "VisionMamba.flops": "self",
    "VisionMamba.save": "self path labels",
    "VisionMamba.load": "path img_size device",
    "VisionMamba.from_pretrained": "pretrained_model_name_or_path",
    "VisionMamba.push_to_hub": "self repo_id",
    "VisionMamba.weights_changed": "self",
    "VisionMamba.constant_weights": "self",
    "create_model": "name pretrained",
    "list_models": "",
    "load_checkpoint": "model path weights pos_embed head",
    "saliency": "model images target",
    "health": "model images",
    "cuda_is_available": "",
    "release_memory": "",
    "Runtime": "path device threads img_size dtype",
    "Runtime.predict": "self x topk",
    "Runtime.embed": "self x",
    "SimplePyramid": "dim out scales",
    "attention_maps": "model images token layers part reduce",
    "attention_rollout": "model images start target",
    "effective_receptive_field": "model images layer position",
    "feature_pca": "model images layer foreground",
    "token_norms": "model images layers",
    "relevance": "model images target",
    "show": "x images labels",
    "io.load_model": "path",
    "ops.selective_scan": "u delta A B C D z delta_bias delta_softplus reverse",
    "ops.causal_conv1d": "x weight bias activation reverse",
    "ops.rms_norm": "x weight residual eps",
    "ops.layer_norm": "x weight bias residual eps",
    "ops.bidirectional_scan": "z u q A_log D dt_weight dt_bias",
    "ops.vim_block": "x parameters residual",
    "segmentation.UperNet": "backbone num_classes channels indices aux",
    "segmentation.Segmenter": "backbone num_classes layers",
    "segmentation.FCN": "backbone num_classes channels",
    "detection.CascadeMaskRCNN": "backbone num_classes masks",
    "pretraining.MaskedImages": "backbone mask_ratio norm_target",
    "pretraining.MaskedImages.reconstruct": "self images",
    "pretraining.NextPatch": "backbone",
    "pretraining.NextPatch.predict": "self images",
    "clip.zero_shot": "model names templates",
    "clip.export_image_tower": "model path",
    "train.fit": "model train valid",
}


def found(name: str) -> Any:
    value: Any = vimcore
    for part in name.split("."):
        value = getattr(value, part)
    return value


LONG = pytest.mark.slow  # to import


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG) if n[:5] == "clip." else n for n in NAMES])
def test_names_and_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if no test had imported it before: an imported submodule is an attribute of its package.
    first = name.split(".")[0]
    if isinstance(vars(vimcore).get(first), ModuleType):
        monkeypatch.delattr(vimcore, first)
    if name.startswith("clip."):
        pytest.importorskip("open_clip")
    arguments = [] if name == "release_memory" else list(inspect.signature(found(name)).parameters)
    wanted = NAMES[name].split()
    assert arguments[: len(wanted)] == wanted


def test_what_the_package_says_it_has() -> None:
    assert {name.split(".")[0] for name in NAMES} <= {*vimcore.__all__}
    for name in vimcore.__all__:
        if name != "clip":
            assert found(name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'VisonMamba'"):
        found("VisonMamba")


def test_names_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"(?<![\w/.:-])vimcore\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?![\w/]|\.\w)", text))
    assert {"Runtime", "create_model", "segmentation.UperNet"} <= words
    for word in words - {"timm"}:  # which has to be imported
        assert found(word) is not None, word
