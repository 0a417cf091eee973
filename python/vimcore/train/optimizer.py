# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, and which parameters they treat alike. `parameter_groups` needs torch alone."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..tasks.settings import Settings


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "authors"
) -> list[dict[str, object]]:
    """Two groups of an optimizer: with decay and without.

    Never decayed: tensors of one dimension, biases, and what ``model.no_weight_decay()`` names (tokens,
    position table). decay="authors" decays A_log like any matrix, as the published training did; "mamba"
    exempts A_log and A_b_log.
    """
    exempt = _not_decayed(model, decay)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if name not in exempt]
    free = [p for name, p in trained.items() if name in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _not_decayed(model: nn.Module, decay: str) -> set[str]:
    if decay not in ("authors", "mamba"):
        raise ValueError(f"decay: expected 'authors' or 'mamba', got {decay!r}")
    named: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", tuple)
    found = set(named())
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        is_log = decay == "mamba" and leaf in ("A_log", "A_b_log")
        if parameter.ndim <= 1 or leaf == "bias" or is_log:
            found.add(name)
    return found


def create_optimizer(
    model: nn.Module,
    settings: Settings,
    lr: float,
    layers: Mapping[str, Any],
    layer_decay: float | None,
) -> torch.optim.Optimizer:
    """timm's optimizer `settings.opt` over the groups of `parameter_groups`, or over these by layers.

    Args:
        lr: peak learning rate.
        layers: patterns of parameter names as of timm's `group_matcher`, used with layer_decay: the last
            layer has the factor 1, as has what no pattern names.
        layer_decay: factor of a layer over that of the next one; None: all learn alike.

    Raises:
        ValueError: there is no such optimizer here, or it asks for second derivatives.
    """
    from timm.optim import (  # `fit` does without timm
        create_optimizer_v2,
        list_optimizers,
        param_groups_layer_decay,
    )

    groups: Any = parameter_groups(model, settings.weight_decay, settings.decay)
    if layer_decay is not None:
        groups = param_groups_layer_decay(
            _Layered(model, layers),  # type: ignore[arg-type]
            settings.weight_decay,
            _not_decayed(model, settings.decay),
            layer_decay=layer_decay,
        )
    try:
        more: Any = {} if settings.betas is None else {"betas": (settings.betas[0], settings.betas[1])}
        optimizer = create_optimizer_v2(groups, settings.opt, lr, **more)
    except (AssertionError, ImportError, TypeError, ValueError) as error:  # its package is missing, mostly
        close = difflib.get_close_matches(settings.opt, map(str, list_optimizers()), 3)
        hint = f"; close to it: {', '.join(close)}" if close and settings.opt not in close else ""
        raise ValueError(f"opt: {settings.opt}: {str(error) or type(error).__name__}{hint}") from None
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"opt: {settings.opt} needs second derivatives, which vimcore does not compute")
    return optimizer


class _Layered:
    """A model as timm's layer decay wants to see it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        self.model, self.layers = model, layers

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def group_matcher(self, coarse: bool) -> Mapping[str, Any]:
        return self.layers
