# SPDX-License-Identifier: Apache-2.0
"""What a classifier says of a picture: for people, for notebooks, as JSON. Needs no torch."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data.digits import encode_png
from .data.given import Given, thumbnail
from .utils.files import literal

_SHOWN = 32  # pictures of a list in a notebook


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image, or the error that prevented it.

    Attributes:
        image: its file, or which one of those given it is.
        top: (class index, label or None, probability), most probable first.
        logits: float32 of all classes.
    """

    image: str
    top: list[tuple[int, str | None, float]]
    logits: NDArray[np.float32] | None = field(default=None, repr=False)
    error: str | None = None
    given: Given | None = field(default=None, repr=False, compare=False)

    @property
    def index(self) -> int:
        """Of the most probable class."""
        return self.top[0][0]

    @property
    def label(self) -> str:
        """Of the most probable class; its number where the file has no labels."""
        index, label, _ = self.top[0]
        return str(index) if label is None else label

    @property
    def p(self) -> float:
        """Probability of the most probable class."""
        return self.top[0][2]

    def __str__(self) -> str:
        if self.error is not None:
            return f"{literal(self.image)}: {self.error}"
        rows = [f"{100 * p:7.3f} %  {i:>5}  {literal(label or '')}".rstrip() for i, label, p in self.top]
        return "\n".join([literal(self.image), *(f"  {row}" for row in rows)])

    def _repr_html_(self) -> str:
        """The picture with its classes, in notebooks."""
        return f"<div>{self._cell()}</div>"

    def _cell(self) -> str:
        picture = _picture(self.given)
        rows = "".join(
            f"<tr><td style='text-align:right'>{100 * p:.1f} %</td>"
            f"<td style='text-align:left'>{html.escape(literal(label or str(index)))}</td></tr>"
            for index, label, p in self.top
        )
        name = html.escape(literal(self.image))
        return f"<div>{picture}<div><small>{name}</small></div><table>{rows}</table></div>"

    def to_json(self, with_logits: bool = False, passed_over: Mapping[str, int] | None = None) -> str:
        """One line of JSON: probabilities with 6 significant digits, logits with 9, which float32 needs.

        Args:
            passed_over: number of skipped files by suffix, added to the line of the last image.
        """
        line = f'{{"image": {json_text(self.image)}'
        if self.error is not None or self.logits is None:
            line += f', "error": {json_text(self.error)}'
        else:
            top = ", ".join(
                f'{{"index": {index}, "label": {json_text(label)}, "p": {p:.6g}}}'
                for index, label, p in self.top
            )
            line += f', "top": [{top}]'
            if with_logits:
                line += ', "logits": [' + ", ".join(f"{float(v):.9g}" for v in self.logits) + "]"
        if passed_over:
            line += f', "passed_over": {json_text(dict(sorted(passed_over.items())))}'
        return line + "}"


class Predictions(list[Prediction]):
    """Of several images, in the order given."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        """The pictures with their classes, in notebooks."""
        cells = "".join(prediction._cell() for prediction in self[:_SHOWN])
        more = f"<p>and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        return f"<div style='display:flex;flex-wrap:wrap;gap:1em'>{cells}</div>{more}"


def prediction_of(
    image: str, logits: NDArray[np.float32], labels: list[str] | None, topk: int, given: Given | None = None
) -> Prediction:
    """The most probable classes by logits (classes); an error where they are not finite."""
    if not np.isfinite(logits).all():
        return Prediction(image, [], error=NOT_FINITE)
    p = softmax(logits)
    order = np.argsort(-logits, kind="stable")[:topk]
    top = [(int(i), labels[i] if labels else None, float(p[i])) for i in order]
    return Prediction(image, top, logits, given=given)


NOT_FINITE = "the network gives values that are not finite; its weights are damaged"


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits (classes)."""
    exponent = np.exp(logits.astype(np.float64) - float(logits.max()))
    return exponent / exponent.sum()


def json_text(value: Any) -> str:
    """JSON in UTF-8; bytes of file names that are not UTF-8 are written as \\udc80 to \\udcff."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _picture(given: Given | None) -> str:
    pixels = None if given is None else thumbnail(given)
    if pixels is None:
        return ""
    data = base64.b64encode(encode_png(pixels)).decode("ascii")
    return f"<img src='data:image/png;base64,{data}'>"
