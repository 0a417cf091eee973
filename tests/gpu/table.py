# SPDX-License-Identifier: Apache-2.0
"""A report of the GPU benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _of(values: dict[str, float] | None, name: str | None, scale: float = 1.0, digits: int = 3) -> str:
    """values[name] * scale with so many significant digits, or a dash."""
    if not values or name is None or values.get(name) is None:
        return "-"
    value = values[name] * scale
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _peer(row: Row) -> str | None:
    return next((name for name in row["seconds"] if name != "vimcore"), None)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _rates(rates: Row) -> str:
    sms, clock = rates.get("sms"), rates.get("sm_clock_per_s")
    rows = []
    for name, value in rates.items():
        if not name.endswith("_per_s") or name == "sm_clock_per_s":
            continue
        share = f"{value / (sms * clock):.3g}" if sms and clock and not name.startswith("copy") else "-"
        rows.append((name.removesuffix("_per_s").replace("_", " "), f"{value:.4g}", share))
    rows += [
        (n.replace("_", " ") + ", flops", f"{v:.4g}", "-") for n, v in rates.items() if n.startswith("matmul")
    ]
    return _table(("rate", "per second", "per SM and clock"), rows)


def _scan(row: Row) -> Iterable[str]:
    peer, share = _peer(row), row.get("share_of_floor", {})
    yield f"({row['batch']}, {row['inner']}, {row['length']}) {row['dtype']}"
    yield _of(row["seconds"], "vimcore", 1e6)
    yield _of(row["seconds"], peer, 1e6)
    yield _of(row["ratio"], peer)
    yield " / ".join(_percent(share.get(unit)) for unit in ("exp", "issue", "memory"))
    yield f"{_of(row['error'], 'vimcore', digits=2)} / {_of(row['error'], peer, digits=2)}"


def _block(row: Row) -> Iterable[str]:
    yield f"{row['width']} wide, {row['side']} px, batch {row['batch']}, {row['dtype']}"
    yield _of(row["seconds"], "vimcore", 1e6)
    yield _of(row["seconds"], "official", 1e6)
    yield _of(row["ratio"], "official")
    yield _percent(row.get("share_of_floor"))
    yield f"{_of(row['error'], 'vimcore', digits=2)} / {_of(row['error'], 'official', digits=2)}"


def _model(row: Row) -> Iterable[str]:
    yield f"{row['size']}, {row['side']} px, batch {row['batch']}, {row['dtype']}"
    for name in ("vimcore", "official", "deit"):
        yield _of(row["images_per_second"], name)
    yield _of(row["ratio"], "official")
    yield _of(row["ratio"], "deit")
    yield _percent(row.get("share_of_floor"))
    yield " / ".join(_of(row["memory"], name, 2.0**-20) for name in ("vimcore", "official", "deit"))
    yield row.get("attention", "-")


def _share(values: dict[str, float | None], name: str, of: str) -> str:
    """values[name] / values[of], or a dash."""
    one, other = values.get(name), values.get(of)
    return "-" if one is None or not other else f"{one / other:.2f}"


def _block_backward(row: Row) -> Iterable[str]:
    names = ("vimcore", "vimcore fast", "official")
    yield f"{row['width']} wide, {row['side']} px, batch {row['batch']}, {row['dtype']}"
    for name in names:
        yield _of(row["seconds"], name, 1e6)
    yield _of(row["ratio"], "official")
    yield from _memory(row, names)
    yield f"{_of(row['error'], 'vimcore', digits=2)} / {_of(row['error'], 'official', digits=2)}"


def _memory(row: Row, names: tuple[str, ...]) -> Iterable[str]:
    memory = row["memory"]
    yield " / ".join(_of(memory, name, 2.0**-20) for name in names)
    yield " / ".join(_share(memory, name, "official") for name in ("vimcore", "vimcore fast"))


def _train(row: Row) -> Iterable[str]:
    names = ("vimcore", "vimcore fast", "official", "deit")
    yield f"{row['size']}, {row['side']} px, batch {row['batch']}, {row['dtype']}"
    for name in names:
        yield _of(row["images_per_second"], name)
    yield _of(row["ratio"], "official")
    yield _of(row["ratio"], "deit")
    yield from _memory(row, names)
    error = row.get("error")
    yield f"{_of(error, 'vimcore', digits=2)} / {_of(error, 'official', digits=2)}"
    yield "yes" if row["repeats"] else "NO"


def _long(row: Row) -> Iterable[str]:
    yield f"{row['size']}, {row['side']} px, {row['tokens']} tokens, {row['dtype']}"
    for memory in ("least", "lean", "fast"):
        planned, taken = (_of(row[key], memory, 2.0**-30) for key in ("planned", "memory"))
        yield f"{_of(row['seconds'], memory)} s, {planned} / {taken}"


def _latency(row: Row) -> Iterable[str]:
    yield f"{row['size']}, {row['side']} px, {row['dtype']}"
    for name in ("vimcore", "official", "deit"):
        yield f"{_of(row['eager'], name, 1e3)} / {_of(row['seconds'], name, 1e3)}"


def _error(row: Row) -> Iterable[str]:
    yield f"{row['size']}, {row['side']} px, {row['dtype']}"
    yield _of(row["error"], "vimcore", digits=2)
    yield _of(row["error"], "official", digits=2)


SECTIONS = {
    "scan": (
        "Scan of both directions, (batch, channels, tokens), against two calls of the peer's kernel",
        ("shape", "vimcore, us", "peer, us", "ratio", "of floor: exp / issue / memory", "error: ours / peer"),
        _scan,
    ),
    "scan_backward": (
        "Gradient of the scan of both directions, states every 64 tokens, against two calls of the peer's",
        ("shape", "vimcore, us", "peer, us", "ratio", "of floor: exp / issue / memory", "error: ours / peer"),
        _scan,
    ),
    "block": (
        "One block",
        ("block", "vimcore, us", "official, us", "ratio", "of floor", "error: ours / official"),
        _block,
    ),
    "model": (
        "Images to logits, each side as a CUDA graph; memory of one eager call",
        (
            *("network", "vimcore, img/s", "official, img/s", "DeiT, img/s", "over official", "over DeiT"),
            *("of floor", "MiB: ours / official / DeiT", "DeiT's attention"),
        ),
        _model,
    ),
    "block_backward": (
        "One block, forward and backward, each side as a CUDA graph; memory of one eager call",
        (
            *("block", "lean, us", "fast, us", "official, us", "official / lean"),
            *("MiB: lean / fast / official", "memory over official: lean / fast"),
            "error of the gradient: ours / official",
        ),
        _block_backward,
    ),
    "train": (
        "Forward and backward, each side as a CUDA graph; memory of one eager call",
        (
            *("network", "lean, img/s", "fast, img/s", "official, img/s", "DeiT, img/s"),
            *("over official", "over DeiT", "MiB: lean / fast / official / DeiT"),
            *("memory over official: lean / fast", "error of the gradient: ours / official", "same bits"),
        ),
        _train,
    ),
    "long": (
        "One large image, forward and backward: seconds, GiB planned / taken beside weights and image",
        ("network", "least", "lean", "fast"),
        _long,
    ),
    "latency": (
        "One image, ms on the host's clock: eager / as a CUDA graph",
        ("network", "vimcore", "official", "DeiT"),
        _latency,
    ),
    "error": ("Logits against float64, relative", ("network", "vimcore", "official"), _error),
}


def markdown(report: Row) -> str:
    """The whole report; sections without rows are left out."""
    device, versions = report["device"], report["versions"]
    facts = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    commit = (report["commit"] or "unknown")[:12] + (" with changes" if report["changed"] else "")
    kernels = ", ".join(f"{part} {name}" for part, name in report["peer_kernels"].items())
    parts = [f"{device['name']}, {facts}; commit {commit}, {report['date']}. Kernels of the peer: {kernels}."]
    if report["rates"]:
        parts.append(_rates(report["rates"]))
    for kind, (title, head, line) in SECTIONS.items():
        if rows := [row for row in report["rows"] if row["kind"] == kind]:
            parts.append(f"**{title}**\n\n" + _table(head, (line(row) for row in rows)))
    eager = [
        f"{row['kind']} {name}: {why}"
        for row in report["rows"]
        for name, why in row.get("graph", {}).items()
        if isinstance(why, str)
    ]
    left = [("No graph", eager), ("Skipped for lack of time", report["skipped"])]
    left.append(("Failed", [f"{name}: {why}" for name, why in report["failed"].items()]))
    parts += [f"{title}:\n" + "\n".join(f"- {item}" for item in items) for title, items in left if items]
    return "\n\n".join(parts)
