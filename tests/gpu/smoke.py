# SPDX-License-Identifier: Apache-2.0
"""Is it right at all, and where does the time go: Vim-Ti against float64 on the CPU, then its kernels.

    python tests/gpu/smoke.py --json smoke.json                  # seconds to a minute on a GPU
    python tests/gpu/smoke.py --json smoke.json --device cpu     # small, in float32: to try it out

The file is written after every part. 1 is returned if a type errs by more than it may, two runs differ, an
image alone has other bits than among others, or a product of matrices went to a built-in kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vimcore
from torch import Tensor
from vimcore import _core

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative errors of logits and of the worst gradient, as in test_cuda.py.
LOGITS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 3e-2}
FACTS = {"registers per thread": "registers", "shared memory": "shared", "blocks per SM": "blocks per SM"}
FACTS |= {"warps per SM": "warps per SM", "est. achieved occupancy %": "occupancy %"}

BEGIN = time.monotonic()


def say(*words: object) -> None:
    print(f"{time.monotonic() - BEGIN:6.1f} s ", *words, flush=True)


def step(model: vimcore.VisionMamba, images: Tensor, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of sum(logits * probe), in float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    (logits * probe.to(logits)).sum().backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().double().cpu(), found


def correctness(device: torch.device, report: dict[str, Any], save: Callable[[], None]) -> list[str]:
    """Every type against float64; what is wrong."""
    cuda = device.type == "cuda"
    side, options = (224, {}) if cuda else (64, {"depth": 2})
    torch.manual_seed(0)
    model = vimcore.create_model("vim_tiny_patch16_224", img_size=side, **options).to(device).eval()
    images, probe = torch.randn(3, 3, side, side), torch.randn(3, 1000)
    double = vimcore.create_model("vim_tiny_patch16_224", img_size=side, **options).double().eval()
    double.load_state_dict(model.state_dict())
    truth, gradients = step(double, images.double(), probe.double())
    largest = max(float(g.norm()) for g in gradients.values())
    say("float64 on the CPU is there")
    wrong = []
    for name, kind in TYPES.items() if cuda else [("float32", torch.float32)]:
        try:
            x, p = images.to(device, kind), probe.to(device)
            logits, found = step(model, x, p)
            again, repeated = step(model, x, p)
            alone = torch.cat([step(model, x[i : i + 1], p[i : i + 1])[0] for i in range(len(x))])
            errors = {
                key: float((found[key] - g).norm()) / max(float(g.norm()), 1e-3 * largest)
                for key, g in gradients.items()
            }
            worst = sorted(errors.items(), key=lambda error: -error[1])[:3]
            same = torch.equal(logits, again) and all(torch.equal(found[k], repeated[k]) for k in found)
            row = {"logits": float((logits - truth).norm() / truth.norm()), "gradients": worst}
            row |= {"repeats": same, "same bits image by image": torch.equal(alone, logits)}
            right = row["logits"] < LOGITS[name] and worst[0][1] < GRADIENTS[name]
            if not (right and same and row["same bits image by image"]):
                wrong.append(name)
            report[name] = row
        except RuntimeError as error:
            report[name] = f"{type(error).__name__}: {error}"
            wrong.append(name)
        say("WRONG" if name in wrong else "right", name, json.dumps(report[name]))
        save()
    return wrong


def kernels_of(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Kernels of one call by time, with what limits their occupancy."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"us": 0.0, "launches": 0})
    for event in events:
        if event.get("cat") != "kernel":
            continue
        row, facts = found[event["name"]], event.get("args", {})
        row["us"] += float(event["dur"])
        row["launches"] += 1
        row |= {short: facts[name] for name, short in FACTS.items() if name in facts}
        row |= {name: facts[name] for name in ("grid", "block") if name in facts}
    rows = [{"kernel": name[:300], **row} for name, row in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def times(device: torch.device, report: dict[str, Any], save: Callable[[], None]) -> list[str]:
    """Kernels of forward and training at 224 px; calls in which a built-in kernel multiplied matrices."""
    torch.manual_seed(0)
    model = vimcore.create_model("vim_tiny_patch16_224").to(device).eval()
    labels = torch.randint(1000, (128,), device=device)
    slow = []

    def measure(name: str, call: Callable[[], Any], rows: int) -> None:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        each = (time.perf_counter() - begin) / 10
        found = kernels_of(call)
        report[name] = {"ms": 1e3 * each, "kernels": found}
        total, count = sum(row["us"] for row in found), sum(row["launches"] for row in found)
        say(f"== {name}: {1e3 * each:.3f} ms a call, kernels {total / 1e3:.3f} ms in {count} launches")
        for row in found[:rows]:
            facts = " ".join(f"{key} {row[key]}" for key in FACTS.values() if key in row)
            print(
                f"  {row['us']:9.0f} us {row['launches']:4d} x  {row['kernel'][:90]}  [{facts}]", flush=True
            )
        if any("gemm_kernel" in row["kernel"] for row in found):
            slow.append(name)
        save()

    for dtype in ("bfloat16", "float32"):
        images = torch.randn(128, 3, 224, 224, device=device).to(TYPES[dtype])
        one = images[:1].contiguous()

        def train(images: Tensor = images) -> None:
            model.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(images).float(), labels).backward()

        with torch.no_grad():
            measure(f"Ti 224 b128 {dtype} forward", lambda x=images: model(x), 14)
            measure(f"Ti 224 b1 {dtype} forward", lambda x=one: model(x), 5)
        measure(f"Ti 224 b128 {dtype} forward and backward", train, 24)
    return slow


def main(given: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    args = parser.parse_args(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("smoke: no GPU that torch can use (--device cpu tries it out)", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(args.device)
    report: dict[str, Any] = {"torch": torch.__version__, "vimcore": vimcore.build_info()}

    def save() -> None:
        part = args.json.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(args.json)

    wrong = correctness(device, report, save)
    slow = times(device, report, save) if device.type == "cuda" else []
    report["products"] = _core.cuda_products()
    save()
    say("products of matrices:", report["products"])
    if slow or report["products"]["built_in"]:
        say("WRONG: built-in kernels multiplied matrices:", slow)
    return 1 if wrong or slow or report["products"]["built_in"] else 0


if __name__ == "__main__":
    sys.exit(main())
