# SPDX-License-Identifier: Apache-2.0
"""Which tensors the networks for segmentation have besides Vim's, and what they cost. Needs no torch.

Names are those of the published layouts: `backbone.fpn*`, `decode_head.*`, `auxiliary_head.*` as
mmsegmentation writes them, the parts of a Segmenter as its authors call them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .._core import Config
from ..utils.arguments import boolean, integer, native
from .task import MOST_CLASSES

Shapes = dict[str, tuple[int, ...]]
POOLS = (1, 2, 3, 6)  # bins a side of UPerHead's pooled maps
AUXILIARY = 256  # channels of the auxiliary head
NORMS = {"batch": "bn", "group": "gn"}
NAMES = {"fcn": "FCN", "linear": "FCN", "uper": "UperNet", "segmenter": "Segmenter"}
_STATISTICS = ("running_mean", "running_var")
_WIDEST, _MOST_LAYERS = 1 << 16, 256


# ---- options -----------------------------------------------------------------------------------------------


def checked_options(head: str, options: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The options of a head with defaults filled in.

    Args:
        options: what a constructor or a file gives.
        config: of the backbone.

    Raises:
        ValueError, TypeError: one is unknown, out of range, of another type, or does not suit the backbone.
    """
    name = NAMES[head]
    given = dict(options)
    found: dict[str, Any] = {}
    if head != "segmenter":
        channels = given.pop("channels", None)
        found["channels"] = _size(name, "channels", config.embed_dim if channels is None else channels)
    if head in ("fcn", "linear"):
        found["convs"] = _size(name, "convs", given.pop("convs", 2), 0, _MOST_LAYERS)
        if (found["convs"] == 0) != (head == "linear"):
            raise ValueError(f"[{name}] convs: expected {'0' if head == 'linear' else '1 or more'}")
        if head == "linear" and found["channels"] != config.embed_dim:
            raise ValueError(
                f"[{name}] channels: without convolutions they are the backbone's {config.embed_dim}, "
                f"got {found['channels']}"
            )
    if head == "uper":
        found["indices"] = _indices(given.pop("indices", None), config)
        found["aux"] = boolean(f"[{name}] aux", given.pop("aux", True))
        found["taps"] = _one_of(name, "taps", given.pop("taps", "stream"), ("stream", "mixer"))
        if found["taps"] == "mixer" and (config.directions == "block" or 0 in found["indices"]):
            raise ValueError(
                f"[{name}] taps: the output of a mixer is told from the layer before it, which the first "
                "layer and pairs of directions='block' lack; take 'stream', or other indices"
            )
    if head == "segmenter":
        found["layers"] = _size(name, "layers", given.pop("layers", 2), 1, _MOST_LAYERS)
    else:
        found["head_norm"] = _one_of(name, "head_norm", given.pop("head_norm", "batch"), tuple(NORMS))
    found["dropout"] = _share(name, "dropout", given.pop("dropout", 0.1))
    if given:
        raise ValueError(f"[{name}] {next(iter(given))!r:.60}: no option of this head")
    return found


def check_backbone(head: str, config: Config) -> None:
    """Refuses what dense networks cannot stand on.

    Raises:
        ValueError: a head of its own, patches that do not tile the image, or a stride without a neck.
    """
    name = NAMES[head]
    if config.num_classes:
        raise ValueError(
            f"[{name}] backbone: has a head for {config.num_classes} classes, which would not be used; "
            "backbone.reset_classifier(0) takes it off"
        )
    refuse_clips(name, config)
    size, patch = config.img_size, config.patch_size
    if config.stride != patch or size[0] % patch or size[1] % patch:
        raise ValueError(
            f"[{name}] backbone: patches of {patch} every {config.stride} pixels do not tile "
            f"{size[0]} x {size[1]}, so maps could not be laid over images; take stride = patch_size and "
            "sides that are multiples of it"
        )
    if head == "uper":
        levels(patch)


def refuse_clips(name: str, config: Config) -> None:
    """ValueError where a backbone's input is clips, or it has a neck that only its own head would read."""
    if config.frames:
        raise ValueError(
            f"[{name}] backbone: takes clips of {config.frames} frames, which are for classification only; "
            "expected one that takes images (frames=None)"
        )
    if config.neck_reduction > 1:
        raise ValueError(
            f"[{name}] backbone: its neck (neck_reduction={config.neck_reduction}) would not be used; build "
            "it with neck_reduction=1"
        )


def check_classes(name: str, classes: Any) -> int:
    """The number of classes; ValueError or TypeError: none that masks of 8 bits can hold."""
    count = integer(f"[{name}] num_classes", classes, 1)
    if count > MOST_CLASSES:
        raise ValueError(
            f"[{name}] num_classes: expected {MOST_CLASSES} or fewer, got {count}; masks have 8 bits, "
            "in which 255 says to ignore a pixel"
        )
    return count


def check_window(name: str, window: tuple[int, int], config: Config) -> None:
    """ValueError unless patches tile the window."""
    if any(side % config.patch_size for side in window):
        raise ValueError(
            f"[{name}] window: expected multiples of the {config.patch_size} pixels of a patch, "
            f"got {list(window)}"
        )


def levels(stride: int) -> list[int]:
    """Exponents e of the neck's four levels: sides grow by 2^e, to strides of 4, 8, 16, 32 pixels.

    Raises:
        ValueError: there is no neck for patches of this stride.
    """
    if stride not in (4, 8, 16):
        raise ValueError(f"[UperNet] backbone: expected patches every 4, 8 or 16 pixels, got {stride}")
    finest = int(math.log2(stride)) - 2
    return [finest - level for level in range(4)]


def attention_heads(width: int) -> int:
    """Of a Segmenter: 64 channels each, or the next wider ones that divide the width."""
    return next(n for n in range(max(width // 64, 1), 0, -1) if width % n == 0)


def norm_groups(channels: int) -> int:
    """Of a GroupNorm: as many as divide the channels, 32 at most, with four channels or more in each.

    A single channel of a map that is pooled to one pixel would be normalised to nothing.
    """
    return next(n for n in range(max(min(32, channels // 4), 1), 0, -1) if channels % n == 0)


def _size(name: str, option: str, value: Any, low: int = 1, high: int = _WIDEST) -> int:
    found = integer(f"[{name}] {option}", value)
    if not low <= found <= high:
        raise ValueError(f"[{name}] {option}: expected {low} to {high}, got {found}")
    return found


def _one_of(name: str, option: str, value: Any, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"[{name}] {option}: expected {' or '.join(map(repr, known))}, got {value!r:.60}")
    return value


def _share(name: str, option: str, value: Any) -> float:
    found = native(f"[{name}] {option}", value)
    if type(found) not in (int, float) or not 0 <= found < 1:
        raise ValueError(f"[{name}] {option}: expected a number from 0 to below 1, got {value!r:.60}")
    return float(found)


def _indices(value: Any, config: Config) -> list[int]:
    """Four layers, counted from the first; None: the last of each quarter (of a pair its second)."""
    depth = config.depth
    found = native("[UperNet] indices", value)
    if found is None:
        step = 2 if config.directions == "block" else 1
        found = [max((depth * i // 4 + step - 1) // step * step, step) - 1 for i in range(1, 5)]
    if not isinstance(found, list) or len(found) != 4:
        raise ValueError(f"[UperNet] indices: expected four layers, got {value!r:.60}")
    found = [integer("[UperNet] indices", index) for index in found]
    for index in found:
        if not -depth <= index < depth:
            raise ValueError(f"[UperNet] indices: expected {-depth} to {depth - 1}, got {index}")
        if config.directions == "block" and index % depth % 2 == 0:
            raise ValueError(
                f"[UperNet] indices: of directions='block' only odd layers have outputs, got {index}"
            )
    return [index % depth for index in found]


# ---- tensors -----------------------------------------------------------------------------------------------


def head_shapes(head: str, options: Mapping[str, Any], classes: int, config: Config) -> Shapes:
    """Shapes of all tensors besides Vim's own, by name.

    Args:
        options: as `checked_options` gives them.
        config: of the backbone.
    """
    dim, norm = config.embed_dim, options.get("head_norm", "batch")
    if head == "segmenter":
        return _mask_transformer(dim, classes, options["layers"])
    channels = options["channels"]
    if head in ("fcn", "linear"):
        return _fcn("decode_head.", dim, channels, options["convs"], classes, norm)
    found = {**_neck(dim, config.patch_size, norm), **_uper(dim, channels, classes, norm)}
    if options["aux"]:
        found.update(_fcn("auxiliary_head.", dim, AUXILIARY, 1, classes, norm))
    return found


def _norm(prefix: str, channels: int, norm: str) -> Shapes:
    found: Shapes = {prefix + "weight": (channels,), prefix + "bias": (channels,)}
    if norm == "batch":
        found.update({prefix + name: (channels,) for name in _STATISTICS})
        found[prefix + "num_batches_tracked"] = ()
    return found


def _conv(prefix: str, inputs: int, channels: int, kernel: int, norm: str) -> Shapes:
    """A convolution with norm and ReLU."""
    weight = {prefix + "conv.weight": (channels, inputs, kernel, kernel)}
    return {**weight, **_norm(f"{prefix}{NORMS[norm]}.", channels, norm)}


def _classifier(prefix: str, channels: int, classes: int) -> Shapes:
    return {prefix + "conv_seg.weight": (classes, channels, 1, 1), prefix + "conv_seg.bias": (classes,)}


def _fcn(prefix: str, dim: int, channels: int, convs: int, classes: int, norm: str) -> Shapes:
    found: Shapes = {}
    for i in range(convs):
        found.update(_conv(f"{prefix}convs.{i}.", channels if i else dim, channels, 3, norm))
    return {**found, **_classifier(prefix, channels, classes)}


def _neck(dim: int, stride: int, norm: str) -> Shapes:
    found: Shapes = {}
    for level, exponent in enumerate(levels(stride), 1):
        for i in range(exponent):
            prefix = f"backbone.fpn{level}."
            found[f"{prefix}{3 * i}.weight"], found[f"{prefix}{3 * i}.bias"] = (dim, dim, 2, 2), (dim,)
        if exponent == 2:
            found.update(_norm(f"backbone.fpn{level}.1.", dim, norm))
    return found


def _uper(dim: int, channels: int, classes: int, norm: str) -> Shapes:
    found: Shapes = {}
    for i in range(len(POOLS)):
        found.update(_conv(f"decode_head.psp_modules.{i}.1.", dim, channels, 1, norm))
    found.update(_conv("decode_head.bottleneck.", dim + len(POOLS) * channels, channels, 3, norm))
    for i in range(3):
        found.update(_conv(f"decode_head.lateral_convs.{i}.", dim, channels, 1, norm))
        found.update(_conv(f"decode_head.fpn_convs.{i}.", channels, channels, 3, norm))
    found.update(_conv("decode_head.fpn_bottleneck.", 4 * channels, channels, 3, norm))
    return {**found, **_classifier("decode_head.", channels, classes)}


def _linear(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {prefix + ".weight": (outputs, inputs), prefix + ".bias": (outputs,)}


def _scale(prefix: str, width: int) -> Shapes:
    return {prefix + ".weight": (width,), prefix + ".bias": (width,)}


def _mask_transformer(dim: int, classes: int, layers: int) -> Shapes:
    own = "decode_head."
    found: Shapes = {own + "cls_emb": (1, classes, dim), own + "proj_patch": (dim, dim)}
    found.update({own + "proj_classes": (dim, dim), **_linear(own + "proj_dec", dim, dim)})
    for i in range(layers):
        block = f"{own}blocks.{i}."
        found.update({**_scale(block + "norm1", dim), **_scale(block + "norm2", dim)})
        found.update({**_linear(block + "attn.qkv", dim, 3 * dim), **_linear(block + "attn.proj", dim, dim)})
        found.update({**_linear(block + "mlp.fc1", dim, 4 * dim), **_linear(block + "mlp.fc2", 4 * dim, dim)})
    return {**found, **_scale(own + "decoder_norm", dim), **_scale(own + "mask_norm", classes)}


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers are learnt, statistics of BatchNorm left out."""
    learnt = (s for name, s in shapes.items() if not name.endswith((*_STATISTICS, "num_batches_tracked")))
    return sum(map(math.prod, learnt))


# ---- multiply-adds -----------------------------------------------------------------------------------------


def head_flops(head: str, options: Mapping[str, Any], classes: int, config: Config) -> int:
    """Multiply-adds of inference for one image of the configuration's size, without Vim's own.

    Convolutions, linear maps and products of attention count; norms, activations and resizing do not. Nor
    does the auxiliary head, which only training has.
    """
    shapes = head_shapes(head, options, classes, config)
    rows, columns = config.grid
    patches, dim = rows * columns, config.embed_dim
    if head == "segmenter":
        tokens = patches + classes
        per_block = 12 * dim * dim * tokens + 2 * tokens * tokens * dim
        return dim * dim * (patches + tokens) + options["layers"] * per_block + patches * classes * dim
    if head in ("fcn", "linear"):
        return patches * _weights(shapes, "decode_head.")
    return _neck_flops(dim, config) + _uper_flops(shapes, config)


def _weights(shapes: Shapes, prefix: str) -> int:
    """Of the convolutions below a prefix: multiply-adds for a pixel."""
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith(prefix) and len(s) == 4)


def _neck_flops(dim: int, config: Config) -> int:
    """Every input pixel of a transposed convolution goes into four pixels."""
    patches = math.prod(config.grid)
    return sum(
        4 * dim * dim * patches * 4**i for exponent in levels(config.patch_size) for i in range(exponent)
    )


def level_sizes(config: Config) -> list[tuple[int, int]]:
    """(height, width) of the neck's maps, at least 1."""
    rows, columns = config.grid
    found = []
    for e in levels(config.patch_size):
        up, down = 2 ** max(e, 0), 2 ** max(-e, 0)
        found.append((max(rows * up // down, 1), max(columns * up // down, 1)))
    return found


def _uper_flops(shapes: Shapes, config: Config) -> int:
    areas = [height * width for height, width in level_sizes(config)]
    own = "decode_head."
    total = sum(_weights(shapes, f"{own}psp_modules.{i}.") * bins**2 for i, bins in enumerate(POOLS))
    total += _weights(shapes, own + "bottleneck.") * areas[3]
    for i in range(3):
        both = _weights(shapes, f"{own}lateral_convs.{i}.") + _weights(shapes, f"{own}fpn_convs.{i}.")
        total += both * areas[i]
    return (
        total + (_weights(shapes, own + "fpn_bottleneck.") + _weights(shapes, own + "conv_seg.")) * areas[0]
    )
