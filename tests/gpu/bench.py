# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark: scan, block, network and training against their peers; rates, floors, memory, latency.

    python tests/gpu/bench.py --rates build/gpu/rates --peers build/gpu/peers
    python tests/gpu/bench.py --table REPORT.json                    # prints it as Markdown
    python tests/gpu/bench.py --device cpu --json try.json           # tiny sizes, to try out the benchmark

Medians of samples taken in turn (ours, peer, ours, ...), by CUDA events; each case has a few seconds, and one
that would end after --seconds is skipped and named. The file is written after every case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import cases_training
import floors
import peers
import torch
from cases import Case, Setting
from table import markdown
from timing import Device

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("scan", "scan_backward", "block", "block_backward", "model", "train", "latency", "error", "long")


def planned(tiny: bool) -> list[tuple[str, str, float, Case]]:
    """(part, name, seconds, case) in order of importance."""
    found: list[tuple[str, str, float, Case]] = []

    def add(part: str, function: Any, seconds: float, *args: Any) -> None:
        name = " ".join([part, *(str(a) for a in args if not isinstance(a, list))])
        found.append((part, name, seconds, lambda setting, s: function(setting, *args, s)))

    both = ["official", "deit"]
    if tiny:
        add("scan", cases.scan_case, 1, 2, 32, 5, "f32")
        add("scan_backward", cases.scan_backward_case, 1, 2, 32, 5, "f32")
        add("block", cases.block_case, 1, 32, 32, 2, "f32")
        add("block_backward", cases_training.block_backward_case, 1, 32, 32, 2, "f32")
        add("model", cases.model_case, 1, "toy", 32, 2, "f32", both)
        add("train", cases_training.train_case, 1, "toy", 32, 2, "f32", both)
        add("latency", cases.latency_case, 1, "toy", 32, "f32")
        add("error", cases.error_case, 1, "toy", 32, "f32")
        add("long", cases_training.long_case, 1, "toy", 64, "f32")
        return found
    scans = [(128, 197), (32, 1025), (16, 6085), (1, 6085)]
    blocks = [(192, 224, 128), (192, 512, 32), (192, 1248, 16), (384, 224, 128), (384, 1248, 8)]
    for batch, length in scans:
        add("scan", cases.scan_case, 4, batch, 384, length, "bf16")
        add("scan_backward", cases.scan_backward_case, 6, batch, 384, length, "bf16")
    for size in ("tiny", "small"):
        add("model", cases.model_case, 8, size, 224, 128, "bf16", both)
        add("latency", cases.latency_case, 6, size, 224, "bf16")
        add("error", cases.error_case, 3, size, 224, "bf16")
        for side, batch in ((224, 128), (512, 32), (1248, 8)):
            add("train", cases_training.train_case, 8, size, side, batch, "bf16", both)
    for shape in blocks:
        add("block_backward", cases_training.block_backward_case, 6, *shape, "bf16")
    for size in ("tiny", "small"):
        for side, batch in ((512, 32), (1248, 8), (1024, 8), (2048, 4)):
            add("model", cases.model_case, 8, size, side, batch, "bf16", both)
    for shape in blocks:
        add("block", cases.block_case, 4, *shape, "bf16")
    for batch, length in scans:
        add("scan", cases.scan_case, 4, batch, 768, length, "bf16")
        add("scan_backward", cases.scan_backward_case, 6, batch, 768, length, "bf16")
    for inner in (384, 768):
        for batch, length in scans:
            add("scan", cases.scan_case, 4, batch, inner, length, "f32")
            add("scan_backward", cases.scan_backward_case, 6, batch, inner, length, "f32")
    for size in ("tiny", "small"):
        add("latency", cases.latency_case, 6, size, 224, "f32")
        add("error", cases.error_case, 3, size, 224, "f32")
        for side, batch in ((224, 128), (512, 32), (1024, 8), (1248, 4), (2048, 1)):
            add("model", cases.model_case, 8, size, side, batch, "f32", both)
    for shape in blocks:
        add("block", cases.block_case, 4, *shape, "f32")
    add("long", cases.model_case, 15, "tiny", 16000, 1, "bf16", [])
    add("long", cases_training.long_case, 30, "tiny", 16384, "bf16")
    return found


def output_of(*command: str) -> str | None:
    """What the command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe(device: Device, peer_kernels: dict[str, str]) -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    import vimcore

    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"vimcore": vimcore.__version__, "cuda": torch.version.cuda}
    found: dict[str, Any] = {"name": "cpu"}
    if device.cuda:
        facts = torch.cuda.get_device_properties(device.torch)
        found = {
            "name": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "bytes": facts.total_memory,
        }
        found |= {"multiprocessors": facts.multi_processor_count, "l2_bytes": facts.L2_cache_size}
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions |= {"driver": driver, "cudnn": torch.backends.cudnn.version()}
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
        "device": found,
        "versions": versions,
        "peer_kernels": peer_kernels,
    }


def matmul_rate(device: Device, dtype: torch.dtype, size: int) -> float:
    """Flops a second of a square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device.torch).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    samples = sorted(device.seconds(lambda: a @ b) for _ in range(9))
    return 2.0 * size**3 / samples[4]


def measured_rates(given: Path | None, device: Device, tiny: bool) -> dict[str, Any] | None:
    """From the program that rates.cu makes, or a .json with its output, and matrix products."""
    if given is None:
        return None
    text = given.read_text() if given.suffix == ".json" else output_of(str(given.resolve()))
    if text is None:
        raise RuntimeError(f"--rates {given}: it failed")
    rates: dict[str, Any] = json.loads(text)
    for name, dtype in cases.TYPES.items():
        rates.setdefault(f"matmul_{name}", matmul_rate(device, dtype, 64 if tiny else 8192))
    return rates


def save(report: dict[str, Any], target: Path) -> None:
    target.write_text(json.dumps(report, indent=1) + "\n")


def warm_up(device: Device) -> None:
    """Loads libraries and compiles kernels that are compiled at first use, so that no case pays for it."""
    for dtype in ("f32", "bf16") if device.cuda else ():
        setting = Setting(device, None, 1)
        cases.model_case(setting, "tiny", 64, 2, dtype, ["official", "deit"], 0.1)
        cases_training.block_backward_case(setting, 192, 64, 2, dtype, 0.1)


def run(args: argparse.Namespace, device: Device, target: Path) -> int:
    """All cases; the number of those that failed."""
    end = time.monotonic() + args.seconds
    peers.add_to_path(args.peers)
    report = describe(device, cases.vim_official.kernels(device.torch))
    report |= {"rates": None, "rows": [], "skipped": [], "failed": {}}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; a failure is noted, and the other cases go on."""
        try:
            with torch.no_grad():
                return work()
        except Exception as error:
            report["failed"][name] = f"{type(error).__name__}: {error}"
            return None

    rates = report["rates"] = attempt("rates", lambda: measured_rates(args.rates, device, args.tiny))
    attempt("warm-up", lambda: warm_up(device))
    setting = Setting(device, floors.Rates.of(rates) if rates else None, args.rounds)
    for part, name, seconds, case in planned(args.tiny):
        if part not in args.only:
            continue
        if time.monotonic() + 2 * seconds > end:  # as much again to set up
            report["skipped"].append(name)
            continue
        begin = time.monotonic()
        row = attempt(name, lambda c=case, s=seconds: c(setting, s))
        took = time.monotonic() - begin
        if row:
            report["rows"].append(row | {"took": round(took, 1)})
        print(f"{took:6.1f} s  {name}  {report['failed'].get(name, '')}", file=sys.stderr)
        device.release()
        save(report, target)
    from vimcore import _core

    report["products"] = _core.cuda_products()
    if report["products"]["built_in"]:
        report["failed"]["products of matrices"] = f"by slow built-in kernels: {report['products']}"
    save(report, target)
    return len(report["failed"])


def names(text: str) -> list[str]:
    """Type of --only."""
    found = text.split(",")
    if unknown := set(found) - set(PARTS):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(PARTS)}, got {','.join(sorted(unknown))}"
        )
    return found


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu implies --tiny")
    result.add_argument("--tiny", action="store_true", help="tiny sizes: does everything, measures nothing")
    result.add_argument("--only", type=names, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    result.add_argument("--seconds", type=float, default=440.0, help="no case is begun that would end later")
    result.add_argument("--rounds", type=int, default=15, help="samples of each side at most")
    result.add_argument("--rates", type=Path, help="program made of rates.cu; without it no floors")
    result.add_argument(
        "--peers", type=Path, default=ROOT / "build/gpu/peers", help="where peers.py built them"
    )
    where = ROOT / "tests/bench/results"
    result.add_argument("--results", type=Path, default=where, help="folder for gpu-forward-DEVICE.json")
    result.add_argument("--json", type=Path, help="file to write instead")
    result.add_argument("--table", type=Path, metavar="JSON", help="only print this report as Markdown")
    return result


def main(given: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a case failed."""
    args = parser().parse_args(given)
    if args.table:
        print(markdown(json.loads(args.table.read_text())))
        return 0
    args.tiny = args.tiny or args.device == "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: no GPU that torch can use (--device cpu tries the benchmark out)", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = False  # f32 is float32 on every side
    device = Device(args.device)
    if not device.cuda:
        torch.set_num_threads(1)
    label = torch.cuda.get_device_name() if device.cuda else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    target = args.json or args.results / f"gpu-forward-{slug}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = run(args, device, target)
    print(markdown(json.loads(target.read_text())))
    print(f"\nwritten to {target}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
