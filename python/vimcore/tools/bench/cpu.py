# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench`: speed against peers, measured in interleaved pairs in one process.

Each figure is the median over pairs (ours, peer, ours, peer, ...) on the same machine, with the same number
of threads, within seconds of each other; a sample is as many calls back to back as fill `--sample` seconds,
after a pause in which the worker threads of the other side go to sleep. The share of the floor is

    (2 * multiply-adds outside the scan + 20 * state updates) / (seconds * FMA peak)

with state updates = tokens * inner * state * directions * depth per image, and the peak measured between
the pairs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from ...utils import options
from ...utils.arguments import gpu_number
from ...utils.extras import needs

Call = Callable[[], Any]

PEERS = ("torch", "openvino", "onnxruntime", "vim-torch")
WIDTHS = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}
STATE_UPDATE_FLOPS = 20  # 10 slots of the FMA pipe: the exponential takes most of them


def _peer_names(text: str) -> list[str]:
    """Type of an option: names of peers, separated by commas; none for an empty text."""
    names = [part for part in text.split(",") if part]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PEERS)}, got {','.join(unknown)!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vimcore bench`."""
    parser.add_argument(
        "--model", choices=sorted(WIDTHS), default="vim_tiny", help="size (default: vim_tiny)"
    )
    parser.add_argument(
        "--sizes", type=options.numbers, default=[224, 512, 1248], help="image sides in pixels, e.g. 224,512"
    )
    parser.add_argument("--batch", type=options.numbers, default=[1, 8], help="batch sizes, e.g. 1,8")
    parser.add_argument("--train", action="store_true", help="forward and backward with a cross-entropy loss")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations (default: bfloat16 on cuda; on the CPU there is float32 only)",
    )
    parser.add_argument(
        "--memory", choices=("least", "lean", "fast"), default="lean", help="what backward keeps"
    )
    parser.add_argument(
        "--threads", type=options.threads, default=2, help="threads on both sides (default: 2)"
    )
    parser.add_argument("--peers", type=_peer_names, default=list(PEERS), help="default: all; '' is none")
    parser.add_argument(
        "--peers-dir", type=Path, help="folder of deit.py and vim_torch.py (default: tests/bench)"
    )
    parser.add_argument(
        "--pairs", type=options.positive, default=15, help="pairs for each figure (default: 15)"
    )
    parser.add_argument(
        "--seconds", type=options.seconds, default=60.0, help="no new pair of a figure after this long"
    )
    parser.add_argument(
        "--sample", type=options.seconds, default=0.1, help="seconds of calls that make one sample"
    )
    parser.add_argument(
        "--pause", type=options.seconds, default=0.03, help="seconds of rest before each sample"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything to FILE as JSON; - is standard output"
    )


def peers_folder(given: Path | None) -> Path | None:
    """Where the peers are: the folder given, or tests/bench of the checkout around this file or the shell."""
    if given is not None:
        if not (given / "deit.py").is_file():
            raise FileNotFoundError(f"--peers-dir {given}: no deit.py there")
        return given
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "tests" / "bench" / "deit.py").is_file():
            return root / "tests" / "bench"
    return None


def load_module(folder: Path, name: str) -> ModuleType:
    """The peers of tests/bench/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"vimcore_bench_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine() -> dict[str, Any]:
    """Processor, number of cores, system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Of Python, of this library and of the peers that are installed."""
    import vimcore

    found = {"python": platform.python_version(), "vimcore": vimcore.__version__}
    for name in ("torch", "openvino", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def floor_flops(model: Any) -> float:
    """Flops of one image that no forward pass can leave out, exponentials at their cost."""
    updates = model.tokens * model.inner * model.d_state * model.scans * model.depth
    return 2.0 * (model.multiply_adds - 4 * updates) + STATE_UPDATE_FLOPS * updates


class Sizes:
    """What the floor needs to know of a network: middle token, both directions, patches of 16 pixels."""

    depth, d_state, scans = 24, 16, 2

    def __init__(self, side: int, width: int, multiply_adds: int) -> None:
        self.tokens = (side // 16) ** 2 + 1
        self.inner = 2 * width
        self.multiply_adds = multiply_adds  # scan included, at 4 for each state update


def sample(call: Call, seconds: float, pause: float) -> float:
    """Seconds of one call: rests, then calls until `seconds` are over."""
    time.sleep(pause)
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return elapsed / count


def interleave(
    ours: Call, peer: Call | None, peak: Callable[[], float] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Pairs of samples and the peaks between them: {"ours", "peer", "peak"}, lists of equal length."""
    ours()  # warm up: memory, packed weights, compiled kernels
    if peer:
        peer()
    found: dict[str, Any] = {"ours": [], "peer": [], "peak": []}
    begin = time.perf_counter()
    while len(found["ours"]) < args.pairs and (
        not found["ours"] or time.perf_counter() - begin < args.seconds
    ):
        if peak:
            time.sleep(args.pause)
            found["peak"].append(peak())
        found["ours"].append(sample(ours, args.sample, args.pause))
        if peer:
            found["peer"].append(sample(peer, args.sample, args.pause))
    return found


def training_call(model: Any, images: Any, targets: Any) -> Call:
    """A forward and a backward of the cross-entropy with these classes."""
    from torch.nn.functional import cross_entropy

    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images), targets).backward()

    return step


def _forward_call(model: Any, images: Any) -> Call:
    import torch

    model.eval()

    def forward() -> Any:
        with torch.no_grad():
            return model(images)

    return forward


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about packages and versions that play no part here."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _peer_call(
    name: str, folder: Path, size: str, side: int, images: Any, targets: Any, threads: int
) -> Call:
    """The call of a peer; ImportError where something is not installed."""
    if name == "vim-torch":
        model = load_module(folder, "vim_torch").build(size, side)
    else:
        deit = load_module(folder, "deit")
        model = deit.build(size, side)
        if name != "torch":
            with _quiet():
                return getattr(deit, name)(model, images, threads)
    return _forward_call(model, images) if targets is None else training_call(model, images, targets)


def _case(
    args: argparse.Namespace, side: int, batch: int, folder: Path | None, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """All rows of one image size and batch: one per peer, or one without a peer."""
    import torch

    import vimcore
    from vimcore import _core

    size, width = args.model.removeprefix("vim_"), WIDTHS[args.model]
    torch.manual_seed(0)
    model = vimcore.VisionMamba(img_size=side, embed_dim=width, memory=args.memory)
    images = torch.randn(batch, 3, side, side)
    targets = torch.randint(1000, (batch,)) if args.train else None
    ours = _forward_call(model, images) if targets is None else training_call(model, images, targets)
    floor = batch * floor_flops(Sizes(side, width, model.flops()))

    def peak() -> float:
        return _core.fma_peak(args.threads)

    peers: dict[str | None, Call | None] = {}
    for name in args.peers:
        if args.train and name in ("openvino", "onnxruntime"):
            skipped[name] = "does not train"
        elif folder is not None and name not in skipped:
            try:
                peers[name] = _peer_call(name, folder, size, side, images, targets, args.threads)
            except ImportError as error:
                skipped[name] = f"not installed ({error})"
    rows = []
    for name, peer in (peers or {None: None}).items():
        found = interleave(ours, peer, peak, args)
        row: dict[str, Any] = {
            "model": args.model,
            "size": side,
            "batch": batch,
            "mode": "train" if args.train else "forward",
            "peer": name,
            "pairs": len(found["ours"]),
            "ms_per_image": 1e3 * median(found["ours"]) / batch,
            "peak_gflops": median(found["peak"]),
            "samples": found,
        }
        if not args.train:
            shares = [floor / (t * p * 1e9) for t, p in zip(found["ours"], found["peak"], strict=True)]
            row["share_of_floor"] = median(shares)
        if peer:
            row["peer_ms_per_image"] = 1e3 * median(found["peer"]) / batch
            row["ratio"] = median(a / b for a, b in zip(found["ours"], found["peer"], strict=True))
        rows.append(row)
        print(_line(row), file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    return rows


HEADER = (
    "pixels",
    "batch",
    "peer".rjust(11),
    "ours ms/img",
    "peer ms/img",
    "ratio",
    "of floor",
    "peak GF/s",
    "pairs",
)


def _line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    cells = (
        str(row["size"]),
        str(row["batch"]),
        row["peer"] or "-",
        number("ms_per_image", ".2f"),
        number("peer_ms_per_image", ".2f"),
        number("ratio", ".3f"),
        number("share_of_floor", ".0%"),
        number("peak_gflops", ".0f"),
        str(row["pairs"]),
    )
    return "  ".join(cell.rjust(len(title)) for cell, title in zip(cells, HEADER, strict=True))


def _check(args: argparse.Namespace) -> None:
    """An error for what could only fail later, or would be ignored."""
    gpu_number("--device", args.device)
    if args.device == "cpu" and args.dtype != "float32":
        raise ValueError(f"--dtype {args.dtype}: the CPU computes in float32")
    if small := [side for side in args.sizes if side < 16]:
        raise ValueError(f"--sizes: an image of {small[0]} pixels is smaller than a patch of 16")
    if args.json not in (None, "-"):
        place = Path(args.json)
        if place.is_dir() or not os.access(place.parent, os.W_OK):  # known now, not after minutes
            raise ValueError(f"--json {args.json}: no file can be written there")


def main(args: argparse.Namespace) -> int:
    """Runs `vimcore bench`; returns the exit status.

    Raises:
        ValueError: an option does not fit; before anything is measured.
        RuntimeError: something that is needed is not there.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the benchmark needs torch; {needs('torch')}") from error
    import vimcore

    cuda = args.device != "cpu"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    _check(args)
    run_case, header = _case, HEADER
    where = f"{args.threads} threads, {machine()['cpu']}"
    folder = peers_folder(args.peers_dir)
    if cuda:
        from . import cuda as bench_cuda

        where, run_case, header = bench_cuda.prepare(args), bench_cuda.case, bench_cuda.HEADER
    notes = sys.stderr
    if folder is None and args.peers:
        print("no peers: they live in tests/bench of a source checkout; give --peers-dir", file=notes)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    skipped: dict[str, str] = {}
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "build": vimcore.build_info(),
        "threads": args.threads,
        "device": args.device,
        "dtype": args.dtype,
        "rows": [],
    }
    table = sys.stderr if args.json == "-" else sys.stdout
    mode = f"forward and backward ({args.memory})" if args.train else "forward"
    print(f"{args.model}, {mode}, {args.dtype}, {where}", file=table)
    print("  ".join(header), file=table, flush=True)
    try:
        for side in args.sizes:
            for batch in args.batch:
                report["rows"] += run_case(args, side, batch, folder, skipped)
    finally:
        torch.set_num_threads(threads_before)
    for name, why in skipped.items():
        print(f"{name}: {why}", file=notes)
    report["skipped"] = skipped
    if args.json == "-":
        json.dump(report, sys.stdout, indent=1)
        print()
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0
