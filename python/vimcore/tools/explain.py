# SPDX-License-Identifier: Apache-2.0
"""`vimcore explain`: figures of what a network does with pictures, and why it decides as it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _core
from ..analysis.attention import attention_maps, place_of
from ..analysis.curves import deletion_insertion
from ..analysis.features import feature_pca, token_norms
from ..analysis.layers import chosen_layers, output_layers
from ..analysis.receptive_field import effective_receptive_field, erf_shown, erf_sides
from ..analysis.relevance import relevance
from ..analysis.rollout import MOST, attention_rollout, first_layer, rollouts
from ..analysis.saliency import saliency
from ..data.picture_files import read_file, reason
from ..data.pictures import network_input
from ..io import load_model
from ..plots import explain as plots
from ..plots.panels import View, view_of
from ..utils.files import literal
from ..weights.metadata import task_of_file, unpack

WHAT = ("attention", "rollout", "erf", "pca", "norms", "relevance", "saliency")
OF_CLASSES = ("relevance", "saliency")
OF_ALL = ("erf", "pca")  # one figure for all pictures
COLOURED = 16  # pictures in the figure of features, whose tokens are held together
Watch = Callable[[str, str], None]  # told the picture and what is computed of it, before it is


@dataclass(frozen=True)
class Wishes:
    """What to explain.

    Attributes:
        what: of `WHAT`; None: all that the network has.
        layers: of attention and norms, the last one also of erf and pca; None: all.
        token: "class" or (row, column); None: the class token, or the middle patch where there is none.
        target: a class by index or label; None: the predicted ones, the topk most probable.
        start: first layer of the rollout.
        kind: "png" or "svg".
    """

    what: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    token: str | tuple[int, int] | None = None
    target: str | None = None
    topk: int = 1
    start: int = 0
    kind: str = "png"


@dataclass
class Explained:
    """One picture.

    Attributes:
        targets: of every class explained index, label, p, and by method the areas of deletion and insertion.
        written: files.
        error: why there are none.
    """

    image: str
    targets: list[dict[str, Any]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    error: str | None = None


class Explainer:
    """A network of a file, and the folder for figures of it.

    Raises:
        ValueError: the file is no classifier of pictures, or it has not what was wished for.
        vimcore.Error: the file is missing or damaged.
    """

    def __init__(
        self,
        weights: str,
        out: Path,
        wishes: Wishes,
        img_size: tuple[int, int] | None = None,
        device: str = "cpu",
    ) -> None:
        if (task := task_of_file(weights)) != "classify":
            raise ValueError(
                f"{weights}: expected a classifier or a backbone, got a network for the task {task}; in "
                "Python its .backbone can be given to vimcore.attention_maps and the others"
            )
        contents = unpack(_core.safetensors_header(weights)[1], weights)
        if contents.preprocess is None:
            raise ValueError(
                f"{weights}: no preprocessing (vimcore.preprocess), so nothing that a picture could fill; "
                "vimcore.io.save_model(..., preprocess=...) writes it, vimcore.attention_maps and the others "
                "take tensors"
            )
        self.model = load_model(weights, img_size, device)
        self.config = self.model._config
        channels = len(contents.preprocess.mean)
        if channels != self.config.in_chans:
            raise ValueError(
                f"{weights}: the network takes {self.config.in_chans} channels, "
                f"its preprocessing gives {channels}"
            )
        self.preprocess = contents.preprocess.rescaled(*self.config.img_size)
        self.labels, self.device = contents.labels, device
        self.out, self.wishes = out, wishes
        self.classes = self.config.num_classes if len(self.config.logits_shape(1)) == 2 else 0
        self.what = self._what(weights)
        depth = self.config.depth
        self.layers = chosen_layers("explain", depth, wishes.layers)
        streams = [what for what in self.what if what in ("erf", "pca", "norms")]
        self.streams = output_layers("explain", self.config, wishes.layers) if streams else []
        if self.config.frames:
            raise ValueError(
                f"{weights}: a network of clips, whose maps are no pictures; expected one of images"
            )
        rows, columns = self.config.grid
        middle = "class" if self.config.class_tokens else (rows // 2, columns // 2)
        self.token: str | tuple[int, int] = middle if wishes.token is None else wishes.token
        if "attention" in self.what:
            place_of(self.config, self.token)
        if "rollout" in self.what:
            first_layer(self.config, wishes.start)
        self.target = None if wishes.target is None else self._class(wishes.target)
        self._field: Tensor | None = None
        self._fields = 0
        self._inputs: list[Tensor] = []
        self._uncoloured = 0
        self._names: set[str] = set()

    def _what(self, weights: str) -> list[str]:
        wishes = self.wishes
        if wishes.what is None:
            return [what for what in WHAT if self.classes or what not in OF_CLASSES]
        if unknown := [what for what in wishes.what if what not in WHAT]:
            raise ValueError(f"what: expected some of {', '.join(WHAT)}, got {unknown[0]!r:.60}")
        if not self.classes and (bad := [what for what in wishes.what if what in OF_CLASSES]):
            why = (
                "has no head" if not self.config.num_classes else 'gives logits for every patch (pool="all")'
            )
            raise ValueError(f"what: {bad[0]} is of the logit of a class, and {weights} {why}")
        return [what for what in WHAT if what in wishes.what]

    def _class(self, text: str) -> int:
        if not self.classes:
            raise ValueError(f"target: this network has no classes, got {text!r:.60}")
        if self.labels and self.labels.count(text) == 1:
            return self.labels.index(text)
        if text.isdecimal() and int(text) < self.classes:
            return int(text)
        kinds = "a label or a number" if self.labels else "a number"
        raise ValueError(f"target: expected {kinds} of 0 .. {self.classes - 1}, got {text!r:.60}")

    # ---- one picture ---------------------------------------------------------------------------------------

    def explain(self, paths: Sequence[str], watch: Watch) -> Iterator[Explained]:
        """The pictures in order; one that cannot be read becomes an error."""
        self.out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            found = Explained(path)
            try:
                array = network_input(read_file(path), "", self.preprocess)
            except (_core.Error, OSError, ValueError, MemoryError) as error:
                found.error = reason(error)
                yield found
                continue
            images = torch.from_numpy(array)[None].to(self.device)
            targets = self._targets(images, found)
            if found.error is None:
                self._figures(images, targets, found, watch)
            yield found

    def _targets(self, images: Tensor, found: Explained) -> list[int]:
        """The classes to explain, also noted; an error where the network gives no finite values."""
        with torch.no_grad():
            outputs = self.model(images)
        if not torch.isfinite(outputs).all():
            found.error = "the network gives values that are not finite; its weights are damaged"
            return []
        if not self.classes:
            return []
        p = outputs[0].double().softmax(0)
        order = p.argsort(descending=True, stable=True).tolist()
        targets = order[: self.wishes.topk] if self.target is None else [self.target]
        for index in targets:
            label = self.labels[index] if self.labels else None
            found.targets.append({"index": index, "label": label, "p": float(f"{float(p[index]):.6g}")})
        return targets

    def _figures(self, images: Tensor, targets: list[int], found: Explained, watch: Watch) -> None:
        view, stem = self._view(images), self._stem(found.image)
        name = literal(os.path.basename(found.image))
        for what in self.what:
            watch(found.image, what)
            path = self.out / f"{stem}_{what}.{self.wishes.kind}"
            if what == "attention":
                maps = attention_maps(self.model, images, self.token, self.layers)[0]
                title = f"{name}: what enters {self._token_name()}, layer by layer"
                plots.plot_attention(view, _array(maps), self.layers, self._token_place(), title, path)
            elif what == "rollout":
                self._rollout(view, images, targets, found, name, path)
            elif what == "norms":
                norms = token_norms(self.model, images, self.streams)[0]
                plots.plot_norms(view, _array(norms), self.streams, f"{name}: token norms", path)
            elif what in OF_CLASSES:
                self._evidence(view, images, targets, found, what, path)
            else:  # a figure of all pictures
                self._add(what, images)
                continue
            found.written.append(str(path))

    def _rollout(
        self, view: View, images: Tensor, targets: list[int], found: Explained, name: str, path: Path
    ) -> None:
        start = self.wishes.start
        if self.config.tokens > MOST:
            maps = [("signed rollout", attention_rollout(self.model, images, start, signed=True))]
            note = f"more than {MOST} tokens: product over layers with signs; red adds, blue subtracts"
        else:
            names = ["rollout", *(f"for {_short(target)}" for target in found.targets)]
            maps = list(zip(names, rollouts(self.model, images, start, [None, *targets])))
            note = "product of the layers' maps" + (
                ", and weighted by the gradient of a class" if targets else ""
            )
        title = f"{name}: attention rollout" + (f" from layer {start}" if start else "")
        plots.plot_maps(view, [(text, _array(x[0])) for text, x in maps], title, note, path)

    def _evidence(
        self, view: View, images: Tensor, targets: list[int], found: Explained, what: str, path: Path
    ) -> None:
        rows = []
        for target, entry in zip(targets, found.targets):
            method = relevance if what == "relevance" else saliency
            heat = method(self.model, images, target)[0]
            curves = deletion_insertion(self.model, images[0], heat, target)
            areas = curves.deletion_area, curves.insertion_area
            entry[what] = {key: float(f"{a:.6g}") for key, a in zip(("deletion", "insertion"), areas)}
            row = plots.Evidence(
                _short(entry), _array(heat), curves.shares, curves.deletion, curves.insertion, areas
            )
            rows.append(row)
        name = literal(os.path.basename(found.image))
        if what == "relevance":
            title = f"{name}: relevance (MambaLRP)"
            note = "red patches speak for the class, blue ones against it; right: probability of the class"
        else:
            title = f"{name}: saliency (integrated gradients)"
            note = "bright: speaks for the class; right: its probability as pixels go or come"
        plots.plot_evidence(view, rows, what == "relevance", title, note, path)

    # ---- all pictures --------------------------------------------------------------------------------------

    def _add(self, what: str, images: Tensor) -> None:
        if what == "erf":
            found = effective_receptive_field(self.model, images, self.streams[-1])
            self._field = found if self._field is None else self._field + found
            self._fields += 1
        elif len(self._inputs) < COLOURED:
            self._inputs.append(images)
        else:
            self._uncoloured += 1

    def finish(self, watch: Watch) -> dict[str, Any]:
        """The figures of all pictures: what was found, and under "written" the files."""
        result: dict[str, Any] = {}
        written: list[str] = []
        layer = self.streams[-1] if self.streams else -1
        if self._field is not None:
            watch("all pictures", "erf")
            shown = erf_shown(_array(self._field))
            rows, columns = self.config.grid
            half, stride = self.config.patch_size // 2, self.config.stride
            centre = rows // 2 * stride + half, columns // 2 * stride + half
            sides = erf_sides(shown, centre=centre)
            at = f"layer {layer}, patch ({rows // 2}, {columns // 2})"
            note = f"{at}, {_count(self._fields, 'picture')}; log10(1 + gradient), by the largest"
            path = self.out / f"erf.{self.wishes.kind}"
            plots.plot_field(shown, sides, centre, "Effective receptive field", note, path)
            written.append(str(path))
            table = [{"share": s, "side": side, "area": area} for s, side, area in sides]
            result["erf"] = {"images": self._fields, "layer": layer, "sides": table}
        if self._inputs:
            watch("all pictures", "pca")
            inputs = torch.cat(self._inputs)
            colours = _array(feature_pca(self.model, inputs, layer))
            note = f"layer {layer}: first three principal components of the foreground as red, green, blue"
            if self._uncoloured:
                note += f"; the first {len(inputs)} of {len(inputs) + self._uncoloured} pictures"
            path = self.out / f"pca.{self.wishes.kind}"
            views = [self._view(image[None]) for image in inputs]
            plots.plot_colours(views, colours, "Alike in colour: alike in features", note, path)
            written.append(str(path))
            result["pca"] = {"images": len(inputs), "layer": layer, "left_out": self._uncoloured}
        return {**result, "written": written} if written else {}

    # ---- names ---------------------------------------------------------------------------------------------

    def _view(self, images: Tensor) -> View:
        """The picture as the network sees it."""
        mean, std = (
            np.asarray(v, np.float32)[:, None, None] for v in (self.preprocess.mean, self.preprocess.std)
        )
        pixels = np.moveaxis(_array(images[0]) * std + mean, 0, 2).clip(0, 1)
        return view_of(pixels, self.config.patch_size, self.config.stride, self.config.grid)

    def _stem(self, path: str) -> str:
        """The picture's name without suffix, numbered where it came before."""
        stem = os.path.splitext(os.path.basename(path))[0]
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name)
        return name

    def _token_name(self) -> str:
        if self.token == "class":
            return "the class tokens" if self.config.class_tokens > 1 else "the class token"
        return "patch ({}, {})".format(*self.token)

    def _token_place(self) -> tuple[float, float] | None:
        if isinstance(self.token, str):
            return None
        row, column = self.token
        half = (self.config.patch_size - 1) / 2
        return column * self.config.stride + half, row * self.config.stride + half


def _short(target: dict[str, Any]) -> str:
    label = target["label"]
    return f"{label if label is not None else 'class ' + str(target['index'])}, {100 * target['p']:.3g} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _array(x: Tensor) -> NDArray[Any]:
    return np.asarray(x.detach().float().cpu().numpy())
