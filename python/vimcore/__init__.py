# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba with a C++ core: train, load, explain and run Vim on the CPU, run it on CUDA.

`import vimcore` does not import torch; what needs torch (`VisionMamba`, `create_model`, `load_checkpoint`,
`health`, `saliency` and the other explanations, `vimcore.ops`, `vimcore.train`) is imported when it is first
used. `Runtime` never needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import Config, Error, build_info, release_memory
from .config import list_models
from .runtime import Runtime
from .utils.extras import needs

if TYPE_CHECKING:
    from . import clip, detection, io, ops, pretraining, segmentation, train
    from .analysis.attention import attention_maps
    from .analysis.features import feature_pca, token_norms
    from .analysis.health import health
    from .analysis.receptive_field import effective_receptive_field
    from .analysis.relevance import relevance
    from .analysis.rollout import attention_rollout
    from .analysis.saliency import saliency
    from .io import load_checkpoint
    from .nn.heads.pyramid import SimplePyramid
    from .nn.models import create_model
    from .nn.vision_mamba import VisionMamba
    from .plots.show import show

__version__: str = _core.__version__
__all__ = [
    "Config",
    "Error",
    "Runtime",
    "SimplePyramid",
    "VisionMamba",
    "attention_maps",
    "attention_rollout",
    "build_info",
    "clip",
    "create_model",
    "cuda_is_available",
    "detection",
    "effective_receptive_field",
    "feature_pca",
    "health",
    "io",
    "list_models",
    "load_checkpoint",
    "ops",
    "pretraining",
    "release_memory",
    "relevance",
    "saliency",
    "segmentation",
    "show",
    "token_norms",
    "train",
]

_LAZY = {
    "SimplePyramid": "nn.heads.pyramid",
    "VisionMamba": "nn.vision_mamba",
    "attention_maps": "analysis.attention",
    "attention_rollout": "analysis.rollout",
    "create_model": "nn.models",
    "effective_receptive_field": "analysis.receptive_field",
    "feature_pca": "analysis.features",
    "health": "analysis.health",
    "load_checkpoint": "io",
    "relevance": "analysis.relevance",
    "saliency": "analysis.saliency",
    "show": "plots.show",
    "token_norms": "analysis.features",
}
_LAZY_MODULES = {"clip", "detection", "io", "nn", "ops", "pretraining", "segmentation", "train"}


def cuda_is_available() -> bool:
    """Whether this build can compute on a CUDA device of this machine."""
    return _core.cuda_device_count() > 0


def __getattr__(name: str) -> Any:
    if name not in _LAZY and name not in _LAZY_MODULES:
        raise AttributeError(f"module 'vimcore' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LAZY.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        extras = {"torch": "torch", "torchvision": "train", "matplotlib": "demo"}
        if error.name not in extras:
            raise
        extra = extras[error.name]
        raise ImportError(f"vimcore.{name} needs {error.name}; {needs(extra)}") from error
    value = module if name in _LAZY_MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
