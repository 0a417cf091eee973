# SPDX-License-Identifier: Apache-2.0
"""Training in mixed precision against float32 on a GPU: hundreds of steps, curve beside curve.

    python tests/gpu/stability.py                       # writes gpu-stability-DEVICE.json and .png
    python tests/gpu/stability.py --device cpu --tiny   # to try it out: float64 is the other type

Vim-Ti with 24 blocks learns the direction of gratings in noise, a batch of its own in every step, from
initial weights and from strained ones: time steps up to 5 and more, decays that A_log spreads over e^8. The
update is that of `vimcore train`: AdamW, label smoothing, autocast, for float16 a GradScaler.

A curve passes where every loss is finite, means of 20 steps stay within a tenth of float32's first mean from
float32's, and the last is below nine tenths of that first one (not asked with --tiny: too few steps). Curves
that the time did not suffice for are named, and not judged.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vimcore
from bench import ROOT, describe, save
from timing import Device
from torch import Tensor
from vimcore.tasks.classification.evaluation import cross_entropy
from vimcore.train import parameter_groups
from vimcore.train.loop import Loop, NonFiniteError

CLASSES = 10
WINDOW = 20
TOLERANCE, FALL = 0.1, 0.9  # shares of float32's loss in the first window
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]  # of VisionMamba
    batch: int
    steps: int
    strained: bool
    look: bool  # vimcore.health at the end, which walks token by token


def planned(tiny: bool) -> list[Case]:
    """In order of importance."""
    if tiny:
        small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1}
        return [Case("tiny", small, 4, 24, False, True), Case("tiny strained", small, 4, 24, True, True)]
    sizes = [(224, 32, 200, True), (1248, 4, 200, False)]
    return [
        Case(f"{side} px{' strained' if strained else ''}", {"img_size": side}, batch, steps, strained, look)
        for side, batch, steps, look in sizes
        for strained in (False, True)
    ]


def build(case: Case, device: torch.device) -> vimcore.VisionMamba:
    """The network with the same weights for every type, float32."""
    torch.manual_seed(0)
    model = vimcore.create_model("vim_tiny_patch16_224", num_classes=CLASSES, **case.options)
    if case.strained:
        strain(model)
    return model.to(device).train()


@torch.no_grad()
def strain(model: torch.nn.Module) -> None:
    """As training may leave weights: bias of time steps -5 to 5, A_log shifted by -4 to 4 per channel."""
    for name, parameter in model.named_parameters():
        if re.search(r"dt_proj(_b)?\.bias$", name):
            parameter.uniform_(-5, 5)
        if re.search(r"A(_b)?_log$", name):
            parameter.add_(torch.empty(len(parameter), 1).uniform_(-4, 4))


def draw(case: Case, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, side, side), float32, and the classes (B,) of step number `step`."""
    generator = torch.Generator(device).manual_seed(1000 + step)
    side = case.options["img_size"]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    labels = torch.randint(CLASSES, (case.batch,), generator=generator, device=device)
    angle = (math.pi / CLASSES * labels).view(-1, 1, 1, 1)
    phase, contrast = uniform(0, 2 * math.pi, case.batch, 3, 1, 1), uniform(0.5, 1.5, case.batch, 3, 1, 1)
    at = torch.arange(side, device=device, dtype=torch.float32)
    along = at.view(1, 1, 1, -1) * angle.cos() + at.view(1, 1, -1, 1) * angle.sin()
    noise = torch.randn(case.batch, 3, side, side, generator=generator, device=device)
    return contrast * (0.8 * along + phase).cos() + 0.5 * noise, labels


def rate(steps: int) -> Callable[[int], float]:
    """Warm-up over 20 steps, then a cosine to nothing."""
    return lambda i: 5e-4 * min((i + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * i / steps))


def loss_of(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """With label smoothing."""
    images, labels = batch
    return cross_entropy(model(images), labels, 0.1), {}


def train(case: Case, kind: str, device: torch.device) -> dict[str, Any]:
    """One curve: losses, the scaler's scale after every step, what stopped it early, health at the end."""
    model = build(case, device)
    wide = kind == "float64"  # not an autocast type: weights and images themselves
    if wide:
        model.double()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    precision = torch.float32 if wide else TYPES[kind]
    loop = Loop(model, optimizer, rate(case.steps), loss_of, precision=precision)
    result: dict[str, Any] = {"losses": [], "scale": [], "skipped": 0, "stopped": None, "health": None}
    begin = time.monotonic()
    for step in range(case.steps):
        images, labels = draw(case, step, device)
        before = loop.scaler.get_scale()
        try:
            result["losses"].append(loop.update([(images.double() if wide else images, labels)]).loss)
        except NonFiniteError as error:
            result["stopped"] = str(error)
            break
        result["scale"].append(loop.scaler.get_scale())
        result["skipped"] += result["scale"][-1] < before
    result["seconds"] = round(time.monotonic() - begin, 2)
    if case.look:
        images = draw(case, case.steps, device)[0][:2]
        found = vimcore.health(model, images.to(next(model.parameters()).dtype)).to_dict()
        names = ("first_nonfinite", "precisions", "precision", "reason", "layers")
        result["health"] = {name: found[name] for name in names}
    return result


def windows(losses: list[float]) -> list[float]:
    """Means of WINDOW steps each; what is left over counts as one more, shorter window."""
    parts = [losses[i : i + WINDOW] for i in range(0, len(losses), WINDOW)]
    return [sum(part) / len(part) for part in parts]


def verdict(curve: dict[str, Any], truth: dict[str, Any], must_fall: bool) -> tuple[float, str]:
    """The largest distance from float32's averaged losses, and what is wrong; "" is nothing."""
    if curve["stopped"]:
        return math.nan, curve["stopped"]
    if truth["stopped"]:
        return math.nan, "float32 stopped: nothing to compare with"
    found, wanted = windows(curve["losses"]), windows(truth["losses"])
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    if not apart <= TOLERANCE * wanted[0]:
        return apart, f"{apart:.3g} from float32, more than {TOLERANCE * wanted[0]:.3g}"
    if must_fall and not found[-1] < FALL * wanted[0]:
        return apart, f"has learned nothing: {found[-1]:.3g} at the end"
    if curve["health"] and curve["health"]["first_nonfinite"]:
        return apart, f"{curve['health']['first_nonfinite']} is not finite at the end"
    return apart, ""


def markdown(report: dict[str, Any]) -> str:
    """The verdicts as a table."""
    head = "| case | type | first | last | from float32 | steps left out | seconds | |"
    lines = [head, "|" + "---|" * 8]
    for row in report["rows"]:
        for kind, curve in row["curves"].items():
            means = windows(curve["losses"]) or [math.nan]
            apart = "-" if curve["apart"] is None else f"{curve['apart']:.2g}"
            cells = [row["case"], kind, f"{means[0]:.4f}", f"{means[-1]:.4f}", apart, str(curve["skipped"])]
            cells += [f"{curve['seconds']:.1f}", curve["wrong"] or "ok"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\nNo time for {name}" for name in report["skipped"]]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Averaged losses of every case, one line a type."""
    from vimcore.plots.style import BLUE, GREEN, INK, ORANGE, RED, new_figure, save_figure, tidy

    colors = {"float32": BLUE, "bfloat16": ORANGE, "float16": GREEN, "float64": RED}
    rows = report["rows"]
    figure = new_figure(4.2 * len(rows), 3.4)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for kind, curve in row["curves"].items():
            means = windows(curve["losses"])
            middles = [WINDOW * (i + 0.5) for i in range(len(means))]
            axes.plot(middles, means, color=colors[kind], lw=2, label=kind, alpha=0.8)
        axes.set_title(row["case"], color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel(f"cross-entropy, mean of {WINDOW}")
        tidy(axes)
        axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def run(args: argparse.Namespace, device: torch.device, report: dict[str, Any], target: Path) -> int:
    """All cases; the number of curves that something is wrong with."""
    end = time.monotonic() + args.seconds
    kinds = list(TYPES) if device.type == "cuda" else ["float32", "float64"]
    wrong = 0
    for case in planned(args.tiny):
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "steps": case.steps, "curves": {}}
        slowest = 0.0
        for kind in kinds:
            if time.monotonic() + slowest > end:
                report["skipped"].append(f"{case.name} {kind}")
                continue
            begin = time.monotonic()
            curve = train(case, kind, device)
            slowest = max(slowest, time.monotonic() - begin)
            truth = row["curves"].get("float32", curve)
            apart, curve["wrong"] = verdict(curve, truth, not args.tiny)
            curve["apart"] = apart if math.isfinite(apart) else None
            wrong += bool(curve["wrong"])
            row["curves"][kind] = curve
            print(f"{curve['seconds']:6.1f} s  {case.name} {kind}  {curve['wrong']}", file=sys.stderr)
        if row["curves"]:
            report["rows"].append(row)
            save(report, target)
    save(report, target)
    return wrong


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu implies --tiny")
    result.add_argument("--tiny", action="store_true", help="a tiny network and few steps: shows nothing")
    result.add_argument("--seconds", type=float, default=240.0, help="no curve is begun that would end later")
    where = ROOT / "tests/bench/results"
    result.add_argument("--results", type=Path, default=where, help="folder for gpu-stability-DEVICE.json")
    result.add_argument("--json", type=Path, help="file to write instead; the picture goes beside it")
    return result


def main(given: list[str] | None = None) -> int:
    """Returns the exit status: 1 if something is wrong with a curve, or none was made."""
    args = parser().parse_args(given)
    args.tiny = args.tiny or args.device == "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        print("stability: no GPU that torch can use (--device cpu tries it out)", file=sys.stderr)
        return 1
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = False  # float32 is the truth here
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    label = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    target = args.json or args.results / f"gpu-stability-{slug}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    report = describe(Device(args.device), {}) | {"tolerance": TOLERANCE, "rows": [], "skipped": []}
    wrong = run(args, device, report, target)
    print(markdown(report))
    if not report["rows"]:
        return 1
    try:
        plot(report, target.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"\nwritten to {target}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
