# SPDX-License-Identifier: Apache-2.0
"""The backward pass in `vimcore doctor`: gradients of sum(logits * probe) by parameters and images.

On the CPU, gradients in float64 are compared with central differences of the loss, and those in float32 with
float64; a GPU is compared with float64 on the CPU. They are computed as in training, by `VisionMamba` and
autograd, so torch is needed: without it these rows are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _core
from ..._core import Config

Array = NDArray[Any]
Row = dict[str, Any]

STEP = 1e-5  # of a central difference, relative to the parameter
# Of the worst parameter: in bfloat16 some are off by 0.15 where all is well; wrong formulas show in float32.
CPU_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.3}
GPU_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 3e-2}


class Loss:
    """sum(logits * probe) of a network.

    Args:
        config: the architecture.
        weights: by name.
        images: (B, C, H, W).
        probe: in the shape of the logits.
        dtype: of the activations, "float64" (CPU), "float32", "bfloat16" or "float16" (GPU); bfloat16 on the
            CPU where the processor has a unit for it.
        device: torch's name of it.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Array],
        images: Array,
        probe: Array,
        dtype: str,
        device: str = "cpu",
    ) -> None:
        import torch

        from ...nn.vision_mamba import VisionMamba

        self.dtype = getattr(torch, dtype)
        wide = torch.float64 if dtype == "float64" else torch.float32
        self.model = VisionMamba(**config.to_dict()).eval()
        self.model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
        self.model.to(device, wide)
        self.images, self.probe = (torch.from_numpy(np.array(a)).to(device, wide) for a in (images, probe))
        self.images.requires_grad_()
        self.leaves = {**dict(self.model.named_parameters()), "images": self.images}

    def _value(self) -> Any:
        return (self.model(self.images.to(self.dtype)).to(self.probe.dtype) * self.probe).sum()

    def gradients(self) -> dict[str, Array]:
        """By parameter name, and of "images"; float64. Zeros for what the loss does not depend on."""
        import torch

        with torch.enable_grad():
            found = torch.autograd.grad(self._value(), list(self.leaves.values()), allow_unused=True)
        pairs = zip(self.leaves.items(), found, strict=True)
        return {
            name: np.zeros(leaf.shape) if g is None else g.double().cpu().numpy() for (name, leaf), g in pairs
        }

    def slope(self, name: str, direction: Array) -> float:
        """Derivative of the loss along `direction` of a parameter or of "images", by a central difference."""
        import torch

        leaf, ends = self.leaves[name], []
        with torch.no_grad():
            before, step = leaf.clone(), torch.from_numpy(STEP * direction)
            for sign in (1, -1):
                leaf.copy_(before + sign * step)
                ends.append(float(self._value()))
            leaf.copy_(before)
        return (ends[0] - ends[1]) / (2 * STEP)


def _row(check: str, errors: Mapping[str, float], tolerance: float, against: str) -> Row:
    """The row of a check; the worst of the errors by parameter counts."""
    name = max(errors, key=lambda key: (np.isnan(errors[key]), errors[key]))
    error = errors[name]
    row: Row = {"check": check, "error": error, "tolerance": tolerance}
    if not error <= tolerance:  # also when it is not a number
        detail = f"{name}: error {error:.1e} against {against} is above {tolerance:.0e}"
        return {**row, "status": "failed", "detail": detail}
    return {**row, "status": "ok", "detail": f"error {error:.1e} against {against} (at most {tolerance:.0e})"}


def _distances(found: Mapping[str, Array], truth: Mapping[str, Array]) -> dict[str, float]:
    """Relative errors by norm; gradients that are nearly nothing are measured against the largest."""
    norms = {name: float(np.linalg.norm(g)) for name, g in truth.items()}
    least = 1e-3 * max(norm for name, norm in norms.items() if name != "images")
    return {n: float(np.linalg.norm(found[n] - g)) / max(norms[n], least) for n, g in truth.items()}


def _slopes(loss: Loss, gradients: Mapping[str, Array], rng: np.random.Generator) -> dict[str, float]:
    """By parameter, the relative error of gradient . direction for a random direction."""
    errors = {}
    for name, gradient in gradients.items():
        value = loss.leaves[name].detach().numpy()
        direction = rng.normal(size=value.shape) * np.sqrt((value * value).mean())
        usual = np.linalg.norm(gradient) * np.sqrt((direction * direction).mean())
        difference = abs(loss.slope(name, direction) - float((gradient * direction).sum()))
        # A gradient of zeros has no size: whatever it missed is then a failure.
        errors[name] = float(difference / usual) if usual > 0 else float("inf")
    return errors


def _skipped(check: str, cuda: bool) -> list[Row]:
    """One row with the reason why nothing can be checked; empty if it can."""
    try:
        import torch
    except ImportError:
        return [{"check": check, "status": "skipped", "detail": "training needs torch: not installed"}]
    if cuda and not torch.cuda.is_available():
        return [{"check": check, "status": "skipped", "detail": "torch has no CUDA, or finds no GPU"}]
    return []


def check_cpu(
    config: Config, weights: Mapping[str, Array], images: Array, rng: np.random.Generator
) -> list[Row]:
    """float64 against central differences, the others against float64; logits are (B, classes)."""
    if skipped := _skipped("gradients cpu", False):
        return skipped
    probe = rng.normal(size=(len(images), config.num_classes))
    exact = Loss(config, weights, images, probe, "float64")
    truth = exact.gradients()
    errors, rest = {"float64": _slopes(exact, truth, rng)}, list[Row]()
    if why := _core.bf16_refusal():
        rest.append({"check": "gradients cpu bfloat16", "status": "skipped", "detail": why})
    for dtype in ("float32", *([] if why else ["bfloat16"])):
        errors[dtype] = _distances(Loss(config, weights, images, probe, dtype).gradients(), truth)
    against = {"float64": "finite differences"}
    rows = [
        _row(f"gradients cpu {t}", e, CPU_TOLERANCE[t], against.get(t, "float64")) for t, e in errors.items()
    ]
    return rows + rest


def check_cuda(
    networks: list[dict[str, Any]],
    random_weights: Callable[[Config, np.random.Generator], Mapping[str, Array]],
    rng: np.random.Generator,
    device: str = "cuda:0",
    reference: type[Loss] = Loss,
) -> list[Row]:
    """Every type against float64 on the CPU, the worst of these networks.

    Args:
        networks: options of `VisionMamba`; their logits are (B, classes).
        random_weights: of an architecture.
        rng: draws weights and images.
        device: torch's name of the GPU.
        reference: what computes the gradients on the CPU.
    """
    if skipped := _skipped(f"gradients {device}", device.startswith("cuda")):
        return skipped
    errors: dict[str, dict[str, float]] = {dtype: {} for dtype in GPU_TOLERANCE}
    for index, options in enumerate(networks):
        config = Config(**options)
        weights = random_weights(config, rng)
        images = rng.normal(size=(2, config.in_chans, *config.img_size)).astype(np.float32)
        probe = rng.normal(size=(2, config.num_classes)).astype(np.float32)
        truth = reference(config, weights, images, probe, "float64").gradients()
        for dtype, worst in errors.items():
            found = Loss(config, weights, images, probe, dtype, device).gradients()
            worst |= {f"{name} of network {index}": e for name, e in _distances(found, truth).items()}
    return [_row(f"gradients {device} {t}", e, GPU_TOLERANCE[t], "the CPU") for t, e in errors.items()]
