# SPDX-License-Identifier: Apache-2.0
"""Weights that are said not to change for a while, and whether that was so."""

from __future__ import annotations

import threading

from torch import Tensor, nn

from ..autograd.tensors import on_cuda, place
from .base import NetworkBase
from .structure import written

ENTERING = threading.Lock()  # of any network: held for an assignment


class ConstantWeights:
    """The weights of a network as `VisionMamba.constant_weights` found them."""

    def __init__(self, model: NetworkBase) -> None:
        self.renew(model)

    def renew(self, model: NetworkBase) -> None:
        """Takes note of the weights as they are: on entering, and after a write that was announced."""
        self.core, self.params = model._weights()
        self.weights = self.core.weights(self.params)
        # parametrised weights: of use only where no gradient goes on to what they are computed from
        self.computed = not all(isinstance(p, nn.Parameter) for p in self.params)
        self._sum = self._look()

    def check(self, model: NetworkBase) -> None:
        """RuntimeError if the weights of the network are not what they were."""
        core, params = model._weights()
        if core is self.core:
            self.params, self.weights = params, core.weights(params)
        if core is not self.core or self._look() != self._sum:
            raise RuntimeError(
                "[VisionMamba] weights changed within constant_weights: results there may be those of the "
                "former ones; write to weights outside of it"
            )

    def _look(self) -> tuple[int, list[tuple[int, int]]]:
        """Something that another content changes: a checksum, on a device what torch counts."""
        counted = [_place(p) for p in self.params] if on_cuda(self.params[0]) else []
        return self.weights.look(place(self.params[0])), counted


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a parameter is and how often torch saw it written to; a computed one is always elsewhere."""
    if not isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return 0, 0
    return tensor.data_ptr(), written(tensor)
