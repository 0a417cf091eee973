# SPDX-License-Identifier: Apache-2.0
"""README.md and config.json beside a vimcore file: what people and programs read. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .._core import Config, Preprocess

CARD_OPTIONS = ("license", "datasets", "metrics", "description", "base_model", "tags", "language")
_PLAIN = ("license", "datasets", "base_model", "language")  # as the hub names them
_BASE = "vimcore_vim_tiny_patch16_224"  # of timm's registry; every option is named beside it


def repository_config(
    config: Config, labels: Sequence[str] | None, preprocess: Preprocess | None
) -> dict[str, Any]:
    """config.json: what model.safetensors says itself, and what timm asks for.

    `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` makes the network of it, after
    `import vimcore.timm`; networks of clips, and such without preprocessing, have no part for timm.
    """
    options = config.to_dict()
    found: dict[str, Any] = {"library_name": "vimcore", "config": options}
    if preprocess is not None:
        found["preprocess"] = preprocess.to_dict()
    if labels is not None:
        found["label_names"] = list(labels)
    if preprocess is None or options["frames"]:
        return found
    arguments = {key: value for key, value in options.items() if key not in ("num_classes", "frames")}
    arguments["pos_drop_rate"] = arguments.pop("drop_rate")
    side = min(config.img_size)
    return {
        **found,
        "architecture": _BASE,
        "num_classes": options["num_classes"],
        "num_features": options["embed_dim"],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": options["num_classes"],
            "input_size": [options["in_chans"], *config.img_size],
            "fixed_input_size": True,
            "crop_pct": round(side / preprocess.resize, 6) if preprocess.resize else 1.0,
            "interpolation": "bicubic",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def card(
    repo: str,
    config: Config,
    labels: Sequence[str] | None,
    preprocess: Preprocess | None,
    given: Mapping[str, Any],
) -> str:
    """README.md: use, figures and architecture.

    Args:
        repo: OWNER/NAME, or a folder's name where it is on no hub.
        given: of CARD_OPTIONS; metrics as names with numbers.

    Raises:
        ValueError: another option, or metrics that are no numbers.
    """
    if unknown := sorted(set(given) - set(CARD_OPTIONS)):
        raise ValueError(f"model_card_kwargs: expected {', '.join(CARD_OPTIONS)}, got {', '.join(unknown)}")
    metrics = given.get("metrics") or {}
    if not isinstance(metrics, Mapping) or not all(isinstance(v, (int, float)) for v in metrics.values()):
        raise ValueError(f"model_card_kwargs: metrics: expected names with numbers, got {metrics!r:.100}")
    c, title = config.to_dict(), repo.rpartition("/")[2]
    return "\n".join(
        [
            "---",
            *_header(c, given),
            "---",
            "",
            f"# {_line(title)}",
            "",
            _line(str(given.get("description") or "A Vision Mamba.")),
            "",
            "```python",
            "import vimcore",
            "",
            f"model = vimcore.VisionMamba.from_pretrained({repo!r})  # a torch.nn.Module, in eval mode",
            "```",
            "",
            f'Without torch: `vimcore.Runtime.from_pretrained({repo!r}).predict("photo.jpg")`.',
            "",
            "## Figures",
            "",
            *_table(["", ""], _figures(config, preprocess, metrics)),
            "",
            "## Architecture",
            "",
            "Vision Mamba ([arXiv 2401.09417](https://arxiv.org/abs/2401.09417)), options of "
            "`vimcore.VisionMamba`:",
            "",
            *_table(
                ["option", "value"], [[f"`{key}`", f"`{json.dumps(value)}`"] for key, value in c.items()]
            ),
            *_classes(labels),
            "",
        ]
    )


def _header(c: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The block of YAML; JSON texts are YAML."""
    kind = "video-classification" if c["frames"] else "image-classification"
    tags = ["vision-mamba", "vim", "mamba", "vimcore", *(given.get("tags") or [])]
    facts = {key: given[key] for key in _PLAIN if given.get(key) is not None}
    facts |= {"library_name": "vimcore", "tags": tags}
    facts["pipeline_tag"] = kind if c["num_classes"] else "image-feature-extraction"
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]


def _figures(config: Config, preprocess: Preprocess | None, metrics: Mapping[str, float]) -> list[list[str]]:
    c = config.to_dict()
    learnt = sum(map(math.prod, config.param_shapes().values()))
    height, width = config.img_size
    rows = [
        ["parameters", f"{learnt:,}"],
        ["multiply-adds of an image, scans included", f"{config.flops():,}"],
        ["image", f"{height} x {width} pixels, {c['in_chans']} channels, {config.tokens} tokens"],
        ["classes", str(c["num_classes"]) if c["num_classes"] else "none: features"],
    ]
    if preprocess is not None:
        rows.append(["preprocessing", f"`{json.dumps(preprocess.to_dict())}`"])
    return rows + [[_line(str(name)), f"{value:g}"] for name, value in metrics.items()]


def _classes(labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        return []
    names = ", ".join(_line(name) for name in labels[:100])
    more = f" and {len(labels) - 100} more" if len(labels) > 100 else ""
    return ["", "## Classes", "", names + more]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def _line(text: str) -> str:
    return " ".join(text.split())
