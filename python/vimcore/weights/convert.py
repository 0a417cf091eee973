# SPDX-License-Identifier: Apache-2.0
"""From the authors' weights to a vimcore file: sizes are read off the tensors, the rest assumed and said."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from .._core import Config, Preprocess
from ..utils.files import listed
from .metadata import CONFIG_KEY, check_labels, pack, unpack
from .wrappers import ROPE_TABLES, format_of, read_safetensors

Shapes = Mapping[str, tuple[int, ...]]
PUBLISHED_SIZE = 224


class _Inference:
    """Collects what the tensors tell and what has to be assumed."""

    def __init__(self, shapes: Shapes, path: str) -> None:
        self.shapes, self.path = shapes, path
        self.assumptions: list[str] = []

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        found = self.shapes.get(name)
        if found is None:
            raise ValueError(f"{self.path}: no tensor {name}; these are not the weights of a Vision Mamba")
        if len(found) != rank:
            raise ValueError(f"{self.path}: {name}: expected {rank} axes, got {found}")
        return found

    def assume(self, text: str) -> None:
        self.assumptions.append(text)


def infer_config(
    shapes: Shapes, path: str = "weights", rope_cos: Any = None, rope_sin: Any = None
) -> tuple[dict[str, Any], list[str]]:
    """Constructor arguments that fit the authors' tensors.

    Args:
        shapes: shape of every tensor by state-dict key.
        rope_cos, rope_sin: the RoPE tables (patches, D) if the file has them; they tell the grid they were
            made for.

    Returns:
        (configuration, assumptions): what no tensor tells takes the authors' published choice, one sentence
        each.

    Raises:
        ValueError: names the tensor that is missing or contradicts the others.
    """
    see = _Inference(shapes, path)
    clips = len(shapes.get("patch_embed.proj.weight", ())) == 5
    width, channels, *depth, patch, patch_width = see.shape("patch_embed.proj.weight", 5 if clips else 4)
    if depth not in ([], [1]):
        raise ValueError(
            f"{path}: patch_embed.proj.weight: patches (tubelets) of {depth[0]} frames; "
            "expected patches of one frame, as the published networks of clips have them"
        )
    if patch != patch_width:
        raise ValueError(
            f"{path}: patch_embed.proj.weight: patches of {patch} x {patch_width} are not square"
        )
    layers = sorted(
        {
            int(key.split(".")[1])
            for key in shapes
            if key.startswith("layers.") and key.split(".")[1].isdigit()
        }
    )
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"{path}: expected layers 0, 1, 2, ..., got {layers}")
    mixer = "layers.0.mixer."
    inner, state = see.shape(mixer + "A_log", 2)
    if inner % width:
        raise ValueError(f"{path}: {mixer}A_log: inner width {inner} is no multiple of the width {width}")
    rank = see.shape(mixer + "dt_proj.weight", 2)[1]
    head = see.shape("head.weight", 2)[0] if "head.weight" in shapes else 0
    config: dict[str, Any] = {
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": head,
        "embed_dim": width,
        "depth": len(layers),
        "d_state": state,
        "d_conv": see.shape(mixer + "conv1d.weight", 3)[2],
        "expand": inner // width,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "norm": "layer" if "norm_f.bias" in shapes else "rms",
        "pos_embed": "pos_embed" in shapes,
        "rope": ROPE_TABLES[0] in shapes,
    }
    see.assume("norm_eps=1e-5, as in the authors' code")
    if clips:
        config["frames"] = see.shape("temporal_pos_embedding", 3)[1]
    _infer_tokens(see, config)
    _infer_directions(see, config, mixer)
    _infer_grid(see, config)
    if config["rope"]:
        config["rope_residual"] = False
        see.assume("rope_residual=False: the rotation of the residual leaves no trace in the weights")
        config["rope_grid"] = _rope_grid(see, config, rope_cos, rope_sin)
    if mixer + "gamma" in shapes:
        config["layer_scale"] = 1e-5
        see.assume(
            "layer_scale=1e-05: what gamma started from cannot be seen and only matters for new weights"
        )
    return config, see.assumptions


def _infer_tokens(see: _Inference, config: dict[str, Any]) -> None:
    if "cls_token_head" in see.shapes:
        config["class_token"] = "double"
    elif "pos_embed_cls" in see.shapes:
        config["class_token"] = "registers"
        config["registers"] = see.shape("pos_embed_cls", 3)[1]
        if "neck.weight" in see.shapes:
            config["neck_reduction"] = max(config["embed_dim"] // max(see.shape("neck.weight", 2)[0], 1), 1)
    elif config.get("frames"):
        config["class_token"] = "head"
        see.assume("class_token='head', as in the authors' networks for clips (not 'middle')")
    elif "cls_token" not in see.shapes:
        config["class_token"], config["pool"] = "none", "mean"
        see.assume("pool='mean': there is no class token, and the read-out leaves no trace in the weights")
    elif config["rope"]:
        config["class_token"] = "head"
        see.assume(
            "class_token='head': the authors' networks with RoPE have it there (not 'middle' or 'random')"
        )
    else:
        config["class_token"] = "middle"
        see.assume("class_token='middle', the authors' published choice (not 'head' or 'random')")


def _infer_directions(see: _Inference, config: dict[str, Any], mixer: str) -> None:
    if mixer + "conv1d_b.weight" in see.shapes:
        config["directions"] = "ssm_conv"
        config["average_directions"] = not config["rope"] and not config.get("frames")
        if config.get("frames"):
            see.assume(
                "average_directions=False: the authors' networks for clips add both directions, unhalved"
            )
        elif config["rope"]:
            see.assume(
                "average_directions=False: the authors' networks with RoPE add both directions, unhalved"
            )
        else:
            see.assume("average_directions=True, the authors' published choice (the sum is halved)")
    elif mixer + "A_b_log" in see.shapes:
        config["directions"] = "ssm"
    else:
        config["directions"] = "none"
        see.assume("directions='none': 'sequence' and 'block' have the same tensors")


def _infer_grid(see: _Inference, config: dict[str, Any]) -> None:
    """Image size and stride from the number of patches: 224 pixels where they fit, else a square image."""
    patch = config["patch_size"]
    config["stride"] = patch
    extra = {"none": 0, "double": 2, "registers": 0}.get(config["class_token"], 1)
    if config["pos_embed"]:
        patches = see.shape("pos_embed", 3)[1] - extra
        source = "position table"
    elif config["rope"]:
        patches = see.shape(ROPE_TABLES[0], 2)[0]
        source = "RoPE tables"
    else:
        config["img_size"] = PUBLISHED_SIZE
        see.assume(f"img_size={PUBLISHED_SIZE} and stride={patch}: neither position nor RoPE tables tell")
        return
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        # Left out: the caller has to name it, and the tables are checked against what is named.
        see.assume(f"stride={patch}")
        return
    for stride in (patch,) if config.get("frames") else (patch, patch // 2):
        if stride and patch <= PUBLISHED_SIZE and (PUBLISHED_SIZE - patch) // stride + 1 == side:
            config["img_size"], config["stride"] = PUBLISHED_SIZE, stride
            break
    else:
        config["img_size"] = side * patch
    see.assume(
        f"img_size={config['img_size']} and stride={config['stride']}: the {source} hold {patches} patches, "
        f"taken as {side} x {side}"
    )


def _rope_grid(see: _Inference, config: dict[str, Any], cos: Any, sin: Any) -> int:
    """The second row of patches is turned by rope_grid / rows in the first frequency."""
    if cos is None or sin is None or "img_size" not in config:
        see.assume("rope_grid=14, as in the authors' code")
        return 14
    side = math.isqrt(len(cos))
    if side * side != len(cos) or side < 2:
        see.assume("rope_grid=14, as in the authors' code")
        return 14
    angle = math.atan2(float(sin[side][0]), float(cos[side][0])) % (2 * math.pi)
    return max(round(angle * side), 1)


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--set``; the value is JSON, or Python's True, False, None, else text."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"--set: expected key=value, got {text!r}")
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return key, words[value]
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def read_labels(path: str) -> list[str]:
    """One label per line, or a JSON list.

    Raises:
        OSError, ValueError: the file cannot be read, is not UTF-8, or begins like a list and is none.
    """
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected labels in UTF-8: {error}") from None
    if text.lstrip().startswith("["):
        try:
            labels = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: not a JSON list of labels: {error}") from None
        return list(labels)
    return text.splitlines()


class Found(NamedTuple):
    """Arrays of numpy or tensors of torch by name, metadata, what was unwrapped, a checkpoint's "meta"."""

    arrays: dict[str, Any]
    metadata: dict[str, str]
    notes: list[str]
    meta: Mapping[Any, Any]


def convert(
    source: str,
    destination: str,
    *,
    weights: str = "model",
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the authors' weights as a vimcore file.

    Args:
        source: ``.pth`` (needs torch) or ``.safetensors`` under the authors' keys.
        weights: "model" or "ema", for training checkpoints.
        settings: constructor arguments that override what was inferred or assumed.
        labels: one for each class.
        preprocess: default: ImageNet evaluation at the image size.
        dtype: of the weights in the file: "float32", "bfloat16" or "float16", see `VisionMamba.save`; None:
            as in the source, 16 bits widened to float32.

    Returns:
        (configuration in full, what was unwrapped and assumptions that were made and not overridden).

    Raises:
        ValueError: names missing, unexpected and misshapen tensors (12 at most), or says what the source is
            instead of weights; nothing is written then.
    """
    found = read(source, weights)
    return convert_tensors(found, source, destination, settings, labels, preprocess, dtype)


def convert_tensors(
    found: Found,
    source: str,
    destination: str,
    settings: Mapping[str, Any] | None,
    labels: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """As `convert`, of what `read` found in the source."""
    settings = dict(settings or {})
    arrays, metadata, notes, _ = found
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    assumptions: list[str] = []
    if CONFIG_KEY in metadata:
        stored = unpack(metadata, source)
        options = stored.config.to_dict()
        labels = stored.labels if labels is None else labels
        if preprocess is None and stored.preprocess:
            preprocess = stored.preprocess.to_dict()
    else:
        options, assumptions = infer_config(shapes, source, *(arrays.get(name) for name in ROPE_TABLES))
    assumptions = notes + [text for text in assumptions if not overridden(text, settings)]
    options.update(settings)
    if "img_size" not in options:
        raise ValueError(
            f"{source}: the position table is no square grid, so the image size has to be named: "
            "--set 'img_size=[height, width]'"
        )
    config = Config(**options)
    tensors = {name: array for name, array in arrays.items() if name not in ROPE_TABLES}
    faults = _core.misfits(config.param_shapes(), {name: shapes[name] for name in tensors})
    if faults:
        raise ValueError(f"{source} does not fit {config.to_json()}:\n  " + listed(faults, "\n  "))
    names = None if labels is None else check_labels(labels, config.num_classes)
    if preprocess is None and (steps := Preprocess.default(config)):
        preprocess = steps.to_dict()
        assumptions.append(f"preprocess={json.dumps(preprocess)}")
    ordered = {name: as_float(tensors[name], name) for name in config.param_shapes()}
    _core.write_safetensors(os.fspath(destination), ordered, pack(config, names, preprocess), dtype)
    return config.to_dict(), assumptions


def overridden(assumption: str, settings: Mapping[str, Any]) -> bool:
    """True where every option that the sentence names was set by the caller."""
    named = [key for key in ("img_size", "stride") if f"{key}=" in assumption]
    named = named or [assumption.partition("=")[0]]
    return all(key in settings for key in named)


def as_float(array: Any, name: str) -> Any:
    """A contiguous array of float32 or float64, of an array of numpy or a tensor of torch; exact."""
    if not isinstance(array, np.ndarray):
        array = array.detach()
        array = (array.float() if array.is_floating_point() and array.itemsize < 4 else array).numpy()
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name}: expected floating point numbers, got {array.dtype}")
    return np.ascontiguousarray(array)


def read(source: str, weights: str, keep: str = "") -> Found:
    """The weights of a file; `keep`: see `plain_names`."""
    if weights == "model" and format_of(source) == "safetensors":
        return Found(*read_safetensors(source, keep), {})
    from .checkpoints import read_with_meta  # pickles need torch

    checkpoint, meta = read_with_meta(source, weights, keep)
    return Found(*checkpoint, meta)
