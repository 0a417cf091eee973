# SPDX-License-Identifier: Apache-2.0
"""The reference network with linear maps as torch computes them in bfloat16, and everything else in float32.

What the 2x rule of the tests measures against: whoever writes Vim in torch and trains it under autocast, but
keeps scan, convolution, norms and residual in float32, gets these numbers.

    python tests/python/half_twin.py

writes its errors on the golden files to tests/golden/torch_bf16.csv, for the C++ test of these files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import golden
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

TABLE = golden.FOLDER / "torch_bf16.csv"


class HalfWeight:
    """A weight whose products are torch's in bfloat16, forward and backward: factors and product rounded."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight, weight.shape

    @property
    def T(self) -> HalfWeight:
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Tensor:
        x, weight = args[0].bfloat16(), args[1].weight.bfloat16()
        if func is F.conv2d:
            return F.conv2d(x, weight, args[2].bfloat16(), **(kwargs or {})).float()
        assert func in (Tensor.matmul, Tensor.__matmul__), func
        return F.linear(x, weight).float()


def gradients(
    config: reference.Config, weights: Mapping[str, Tensor], images: Tensor, probe: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of sum(logits * probe) as `reference.gradients` gives them."""
    leaves = {name: w.detach().float().requires_grad_() for name, w in weights.items()}
    linear = {name: HalfWeight(leaf) if is_linear(name, leaf) else leaf for name, leaf in leaves.items()}
    x = images.detach().float().requires_grad_()
    logits = reference.forward(config, linear, x).logits  # type: ignore[arg-type]
    found = torch.autograd.grad((logits * probe).sum(), [x, *leaves.values()], allow_unused=True)
    named = zip(["input", *leaves], [x, *leaves.values()], found)
    return logits.detach(), {k: torch.zeros_like(v) if g is None else g for k, v, g in named}


def is_linear(name: str, weight: Tensor) -> bool:
    """Weights of linear maps but for the one of time steps, which stays in float32."""
    return weight.ndim in (2, 4) and name.endswith(".weight") and "dt_proj" not in name


def whole(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The relative error of all gradients together."""
    flat = [torch.cat([x[k].double().flatten() for k in truth]) for x in (found, truth)]
    return golden.relative(*flat)


def errors(name: str) -> tuple[float, float, float]:
    """Relative errors of the twin on a golden file: of tokens or logits, of all gradients, of the worst.

    A few logits may be right by chance, tokens are not.
    """
    g = golden.load(name)
    logits, grads = gradients(g.config, g.weights, g.input, g.probe)
    linear = {k: HalfWeight(w) if is_linear(k, w) else w for k, w in g.weights.items()}
    tokens = reference.forward(g.config, linear, g.input).tokens  # type: ignore[arg-type]
    exact = reference.forward(
        g.config, {k: w.double() for k, w in g.weights.items()}, g.input.double()
    ).tokens
    truth = {k: v for k, v in g.grads.items() if v.any()}
    forward = max(golden.relative(logits, g.logits), golden.relative(tokens, exact))
    return forward, whole(grads, truth), max(golden.relative(grads[k], v) for k, v in truth.items())


def main() -> None:
    lines = [",".join([name, *(f"{error:.4g}" for error in errors(name))]) for name in golden.NAMES]
    TABLE.write_text("\n".join(["file,forward,gradients,worst gradient", *lines]) + "\n")


if __name__ == "__main__":
    main()
