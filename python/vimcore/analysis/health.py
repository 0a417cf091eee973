# SPDX-License-Identifier: Apache-2.0
"""Numerical health of a model: value ranges by layer, the first non-finite tensor, a safe precision."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _core
from ..autograd.network import Request
from ..autograd.tensors import activation_types, describe, on_cuda
from ..data.named_files import named, read_input
from ..data.picture_files import FORMATS_TEXT, find_images
from ..data.pictures import network_input
from ..io import load_model
from ..nn.inputs import checked_images
from ..nn.plain import Plain
from ..nn.vision_mamba import VisionMamba
from ..utils import notebook
from ..weights.metadata import unpack

Range = tuple[float, float]  # smallest and largest value, NaN where there was one
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = ("norm", "mixer.xz", "mixer.u", "mixer.u_b", "mixer.q", "mixer.q_b", "mixer.y", "mixer.out")
TOLERANCE = 0.05  # relative change of the outputs up to which a precision counts as safe
NOISE = 4  # images where none are given
HEADROOM = 8  # factor that activations must stay below the largest float16: other images, later steps


@dataclass(frozen=True)
class Layer:
    """Value ranges of one layer; None for what was not computed.

    Attributes:
        delta, A_delta, state: over both directions.
        residual: the input of the layer.
        activation, largest: the activation with the largest magnitude, and its name in `Health.ranges`.
    """

    index: int
    delta: Range | None
    A_delta: Range | None
    state: Range | None
    residual: Range
    activation: Range | None
    largest: str | None


@dataclass(frozen=True)
class Precision:
    """The outputs with activations rounded to a 16-bit type, as under autocast.

    Attributes:
        error: relative change of the outputs by the rounding (norms over the batch); NaN: not finite.
        same_top1: (number of images whose top-1 class is unchanged, number of images); None without classes.
        overflow: name of the first tensor that is not finite.
        computed: the same change, of the outputs that vimcore itself computes in this type on the model's
            device; None where it does not.
    """

    error: float
    same_top1: tuple[int, int] | None
    overflow: str | None
    computed: float | None = None


@dataclass(frozen=True)
class Health:
    """The report of `health`; `str()` gives a table, `to_dict()` what JSON holds.

    Attributes:
        images: number of images.
        layers: one entry per layer, up to the first that is not finite.
        ranges: (smallest, largest) of every tensor by name, parameters under their state-dict keys, in the
            order of computation, up to the first that is not finite.
        first_nonfinite: its name; None: all is finite.
        precisions: the effect of "bfloat16" and "float16"; empty if a value is not finite.
        precision, reason: the type advised for activations, and why.
    """

    images: int
    layers: list[Layer]
    ranges: dict[str, Range]
    first_nonfinite: str | None
    precisions: dict[str, Precision]
    precision: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries; values that are not finite as strings."""
        plain: dict[str, Any] = _jsonable(asdict(self))
        return plain

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *self._findings()])

    def _repr_html_(self) -> str:
        """The same table, in notebooks."""
        head, *rows = self._rows()
        findings = "".join(f"<p>{notebook.cell(line)}</p>" for line in self._findings())
        return notebook.table(rows, head) + findings

    def _rows(self) -> list[list[str]]:
        rows = [["layer", "dt", "A dt", "|state|", "|residual|", "|activation|", "in"]]
        for layer in self.layers:
            sizes = [_size(r) for r in (layer.state, layer.residual, layer.activation)]
            at = (layer.largest or "-").removeprefix(f"layers.{layer.index}.").removeprefix("mixer.")
            rows.append([str(layer.index), _span(layer.delta), _span(layer.A_delta), *sizes, at])
        return rows

    def _findings(self) -> list[str]:
        bad = self.first_nonfinite
        lines = [f"not finite: first {bad}" if bad else "everything is finite"]
        lines += [f"{name}: {_sentence(found)}" for name, found in self.precisions.items()]
        return [*lines, f"advised: {self.precision}; {self.reason}"]


def health(model: VisionMamba, images: Tensor | None = None) -> Health:
    """Finds the first non-finite value in a model, and checks whether bfloat16 or float16 is safe for it.

    The network is computed in plain torch operations on the model's parameters, in their type and on their
    device, as in eval mode; the model is not changed. Then once more for each 16-bit type, with activations
    and weights of linear maps rounded as under autocast (time steps, states, residual and norm statistics
    stay wide there), and by vimcore itself where the device computes in that type. Gradients are not
    examined. Takes seconds: a few images are enough.

    Args:
        images: (B, C, H, W) as the model takes them, at least one; None: four of random noise.

    Raises:
        TypeError: the model is no VisionMamba.
        ValueError: shape, type or device of the images do not fit.
    """
    for wrapped in ("module", "_orig_mod"):  # DistributedDataParallel and averages; torch.compile
        model = getattr(model, wrapped, model)
    if not isinstance(model, VisionMamba):
        raise TypeError(f"[health] model: expected a VisionMamba, got {type(model).__name__}")
    like = model.norm_f.weight
    if images is None:
        images = _noise(model, NOISE).to(like)
    images = images.detach() if isinstance(images, Tensor) else images
    with torch.autocast(like.device.type, enabled=False):
        images = checked_images(images, like, model._config, model.dynamic_img_size)
        if not len(images):
            raise ValueError(f"[health] images: expected at least one, got {describe(images)}")
        images = images.to(like.dtype)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)  # thousands of small operations: more threads mostly wait for each other
            ranges, outputs = _look(model, images)
            bad = next((name for name, r in ranges.items() if not _finite(r)), None)
            precisions = {}
            if bad is None:
                precisions = {name: _compare(model, images, outputs, t) for name, t in PRECISIONS.items()}
        finally:
            torch.set_num_threads(threads)
    layers = _layers(ranges, int(model.config["depth"]))
    largest = max((_magnitude(layer.activation) for layer in layers), default=0.0)
    return Health(len(images), layers, ranges, bad, precisions, *_advice(bad, largest, precisions))


def health_of_file(
    weights: str, pictures: Sequence[str], count: int, passed_over: Counter[str] | None = None
) -> Health:
    """`health` of a vimcore file on the first `count` pictures, or on noise without any.

    Args:
        pictures: files, folders, patterns, lists as `vimcore predict` takes them.
        passed_over: counts files in the folders that are not images, by suffix.
    """
    model = load_model(weights)
    if not pictures:
        return health(model, _noise(model, count))
    if model._config.frames:
        raise ValueError(f"{weights}: takes clips, not pictures; without any, its health is that on noise")
    preprocess = unpack(_core.safetensors_header(weights)[1], weights).preprocess
    if preprocess is None:
        raise ValueError(f"{weights}: no preprocessing, so nothing that a picture could fill")
    preprocess = preprocess.rescaled(*model._config.img_size)
    inputs = []
    for path in itertools.islice(find_images(named(pictures), passed_over), count):
        inputs.append(network_input(read_input(path), path, preprocess))
    if not inputs:
        raise ValueError(f"no pictures found ({FORMATS_TEXT})")
    return health(model, torch.from_numpy(np.stack(inputs)))


def _noise(model: VisionMamba, count: int) -> Tensor:
    """Images (count, C, H, W), or clips (count, C, T, H, W), that are the same each time."""
    c = model._config
    frames = (c.frames,) if c.frames else ()
    return torch.randn(count, c.in_chans, *frames, *c.img_size, generator=torch.Generator().manual_seed(0))


class _Stop(Exception):
    """A value is not finite, so that those computed from it say nothing."""


def _look(
    model: VisionMamba, images: Tensor, store: torch.dtype | None = None
) -> tuple[dict[str, Range], Tensor | None]:
    """Ranges by name, up to the first that is not finite; the outputs, or None in that case."""
    ranges: dict[str, Range] = {}

    def observe(name: str, x: Tensor) -> None:
        low, high = (float(v) for v in x.aminmax())
        before = ranges.get(name, (low, high))
        ranges[name] = (min(before[0], low), max(before[1], high)) if _finite((low, high)) else (low, high)
        if not _finite(ranges[name]):
            raise _Stop

    try:
        with torch.no_grad():
            tokens = Plain(model, observe, store).tokens(images)
            for name, parameter in model.head.named_parameters(prefix="head"):
                observe(name, parameter)
            outputs = VisionMamba.forward_head(model, tokens)  # not a subclass's, which may drop
            observe("logits" if model.num_classes else "features", outputs)
    except _Stop:
        return ranges, None
    return ranges, outputs


def _compare(model: VisionMamba, images: Tensor, wanted: Tensor | None, dtype: torch.dtype) -> Precision:
    assert wanted is not None
    ranges, found = _look(model, images, dtype)
    if found is None:
        return Precision(math.nan, None, next(reversed(ranges)))
    error, same = _change(found, wanted), None
    if found.ndim == 2 and model.num_classes > 1:
        same = int((found.argmax(1) == wanted.argmax(1)).sum()), len(found)
    return Precision(error, same, None, _computed(model, images, wanted, dtype))


def _change(found: Tensor, wanted: Tensor) -> float:
    """Relative, by norm."""
    return float((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-300))


def _computed(model: VisionMamba, images: Tensor, wanted: Tensor, dtype: torch.dtype) -> float | None:
    """The change of the outputs with the kernels of this type; None where there are none."""
    core, params = model._weights()
    if images.dtype != torch.float32 or dtype not in activation_types(images):
        return None
    if not on_cuda(images) and dtype == torch.bfloat16 and _core.bf16_refusal():
        return None
    (tokens,) = core.run(Request("tokens"), images.to(dtype), [p.detach() for p in params], None)
    with torch.no_grad():
        return _change(VisionMamba.forward_head(model, tokens.float()), wanted)


def _advice(bad: str | None, largest: float, found: dict[str, Precision]) -> tuple[str, str]:
    """The precision advised for activations, and the reason."""
    if bad is not None:
        return "float32", f"{bad} is not finite already in full precision: find the cause there first"
    bf16, fp16 = found["bfloat16"], found["float16"]
    if bf16.error <= TOLERANCE:
        return "bfloat16", f"it has the range of float32, and {_sentence(bf16)}"
    room = torch.finfo(torch.float16).max / max(largest, 1e-30)
    if fp16.error <= TOLERANCE and room >= HEADROOM:
        return (
            "float16",
            f"{_sentence(fp16)}, with a factor of {room:.0f} left; in training with a GradScaler",
        )
    if fp16.overflow is None and fp16.error <= TOLERANCE:
        why = f"float16 leaves a factor of only {room:.2g} below overflow"
    else:
        why = f"with float16 {_sentence(fp16)}"
    return "float32", f"with bfloat16 {_sentence(bf16)}; {why}"


def _sentence(found: Precision) -> str:
    if found.overflow is not None:
        return f"{found.overflow} overflows"
    text = f"the outputs change by {100 * found.error:.2g} %"
    if found.computed is not None:
        text += f" ({100 * found.computed:.2g} % as computed here)"
    if found.same_top1 is not None:
        text += ", top-1 stays for {} of {} images".format(*found.same_top1)
    return text


def _layers(ranges: dict[str, Range], depth: int) -> list[Layer]:
    """The layers that were computed; the last of them perhaps in part."""
    layers = []
    for i in range(depth):
        prefix = f"layers.{i}."
        if prefix + "residual" not in ranges:
            break
        both = {
            name: _joined([ranges[k] for s in ("", "_b") if (k := f"{prefix}mixer.{name}{s}") in ranges])
            for name in ("delta", "A_delta", "state")
        }
        names = [prefix + name for name in ACTIVATIONS if prefix + name in ranges]
        largest = max(names, key=lambda name: _magnitude(ranges[name]), default=None)
        activation = None if largest is None else ranges[largest]
        layers.append(
            Layer(i, **both, residual=ranges[prefix + "residual"], activation=activation, largest=largest)
        )
    return layers


def _joined(ranges: Sequence[Range]) -> Range | None:
    """The union of ranges, or the first that is not finite; None without any."""
    bad = [r for r in ranges if not _finite(r)]
    if bad or not ranges:
        return bad[0] if bad else None
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _finite(r: Range) -> bool:
    return math.isfinite(r[0]) and math.isfinite(r[1])


def _magnitude(r: Range | None) -> float:
    """Largest absolute value; infinite for NaN."""
    if r is None:
        return 0.0
    return max(abs(r[0]), abs(r[1])) if _finite(r) else math.inf


def _span(r: Range | None) -> str:
    return "-" if r is None else f"{r[0]:.3g} .. {r[1]:.3g}"


def _size(r: Range | None) -> str:
    return "-" if r is None else f"{_magnitude(r):.3g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
