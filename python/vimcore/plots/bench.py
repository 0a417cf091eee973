# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot` of reports of `vimcore bench`: images a second and peak memory over the image size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .style import BLUE, GREEN, INK, MUTED, ORANGE, RED, new_figure, plain_text, save_figure, tidy

# Peer: name in the figure, colour. None: ours.
NETWORKS: dict[str | None, tuple[str, str]] = {
    None: ("Vim, vimcore", BLUE),
    "torch": ("DeiT, torch", ORANGE),
    "torch-materialised": ("DeiT, attention matrix in memory", RED),
    "openvino": ("DeiT, OpenVINO", GREEN),
    "onnxruntime": ("DeiT, ONNX Runtime", "#7b4fb5"),
    "vim-torch": ("Vim, plain torch", MUTED),
    "vimcore-float32": ("Vim, vimcore in float32", "#6aa7d8"),
}
Series = dict[tuple[str | None, str], dict[int, tuple[float, float]]]  # (peer, neck): side: (rate, bytes)


def plot_reports(
    files: Sequence[str], out: str | None = None, kind: str = "png"
) -> tuple[list[str], list[str]]:
    """Draws the rows of all reports into one figure.

    Args:
        files: that `vimcore bench --json` wrote, of one device, model and batch.
        out: folder to write to; default: the current one.
        kind: "png" or "svg".

    Returns:
        The file written; notes on what was left out.

    Raises:
        ValueError: a file is no report, or they are of different measurements.
    """
    reports = [_read(file) for file in files]
    rows = [row for report in reports for row in report["rows"]]
    for name, values in (
        ("device", {report.get("device") for report in reports}),
        ("dtype", {report.get("dtype") for report in reports}),
        ("model", {row["model"] for row in rows}),
        ("mode", {row["mode"] for row in rows}),
        ("batch", {row["batch"] for row in rows}),
    ):
        if len(values) != 1:
            shown = ", ".join(sorted(map(str, values)))
            raise ValueError(f"{', '.join(files)}: {name}: expected one for a figure, got {shown or 'none'}")
    folder = Path(out) if out is not None else Path()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"efficiency.{kind}"
    series = _series(rows)
    _plot(series, _caption(reports[0], rows[0]), path)
    notes = []
    if not any(math.isfinite(size) for points in series.values() for _, size in points.values()):
        notes.append("the reports have no peak memory, measured with bench --peak-memory: one curve is drawn")
    return [str(path)], notes


def _read(file: str) -> dict[str, Any]:
    """A report whose rows have what is drawn."""
    try:
        report = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = report["rows"]
        for row in rows:
            good = row["size"] > 0 and row["ms_per_image"] > 0 and row["batch"] > 0
            if not good or not {"model", "mode", "peer"} <= set(row) or row["peer"] not in NETWORKS:
                raise ValueError("a row")
        if not rows:
            raise ValueError("no rows")
    except (KeyError, RecursionError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file}: no report of vimcore bench: {error!r:.80}") from None
    return dict(report)


def _series(rows: Sequence[Mapping[str, Any]]) -> Series:
    """Rates in images a second and peak memory; our own of each size from the first row that has it."""
    found: Series = {}
    for row in rows:
        neck, side = row.get("neck", "none"), int(row["size"])
        ours = found.setdefault((None, neck), {})
        ours.setdefault(side, (1e3 / row["ms_per_image"], _bytes(row, "peak_bytes")))
        if row["peer"] is not None:
            rate = row.get("peer_images_per_s") or 1e3 / row["peer_ms_per_image"]
            peer = found.setdefault((row["peer"], neck), {})
            peer[side] = (rate, _bytes(row, "peer_peak_bytes"))
    return found


def _bytes(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else float(value)


def _caption(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    where = report.get("device", "cpu")
    machine = report.get("machine", {}).get("cpu", "") if where == "cpu" else ""
    threads = f", {report.get('threads')} threads" if where == "cpu" else ""
    date = str(report.get("date", ""))[:10]
    return f"batch {row['batch']}, {report.get('dtype', '')}, {machine or where}{threads}, {date}"


@plain_text
def _plot(series: Series, caption: str, path: Path) -> None:
    memory = any(math.isfinite(size) for points in series.values() for _, size in points.values())
    figure = new_figure(11 if memory else 6, 4.6)
    panels = figure.subplots(1, 2 if memory else 1, squeeze=False)[0]
    for (peer, neck), points in series.items():
        _, colour = NETWORKS[peer]
        sides = sorted(points)
        style: dict[str, Any] = {
            "color": colour,
            "lw": 2,
            "marker": "o",
            "ms": 4,
            "ls": "-" if neck == "none" else "--",
        }
        panels[0].plot(sides, [points[side][0] for side in sides], **style)
        if memory:
            panels[1].plot(sides, [points[side][1] / 2**30 for side in sides], **style)
    sides = sorted({side for points in series.values() for side in points})
    _finish(panels[0], "images per second", sides)
    if memory:
        _finish(panels[1], "peak memory, GiB", sides)
    lines = [
        Line2D([], [], color=colour, lw=2, label=name)
        for peer, (name, colour) in NETWORKS.items()
        if any(key[0] == peer for key in series)
    ]
    if len({neck for _, neck in series}) > 1:
        lines.append(Line2D([], [], color=MUTED, lw=2, label="network alone"))
        lines.append(Line2D([], [], color=MUTED, lw=2, ls="--", label="with feature pyramid"))
    panels[0].legend(handles=lines, frameon=False, fontsize=8.5)
    figure.suptitle("Speed and memory over image size", color=INK, weight="bold", x=0.02, ha="left")
    figure.text(0.02, 0.005, caption, color=MUTED, fontsize=8, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save_figure(figure, path)


def _finish(axes: Axes, title: str, sides: Sequence[int]) -> None:
    """Logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(sides), [str(side) for side in sides])
    axes.set_xlabel("side of the image, pixels", color=INK)
    axes.set_title(title, color=INK, loc="left", fontsize=11)
    tidy(axes)
