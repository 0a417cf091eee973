# SPDX-License-Identifier: Apache-2.0
"""The whole network as one node of autograd's graph, and the weights it is bound to."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import _core
from .checks import once_differentiable, refuse_layout
from .draws import NONE
from .tensors import NAMES, aligned, describe, exported, on_cuda, place


class Request(NamedTuple):
    """What one call of the network computes."""

    kind: str  # "logits", "tokens" or "layers"
    layers: tuple[int, ...] = ()
    draws: _core.Draws = NONE
    memory: str = "lean"


class Bound(NamedTuple):
    """Parameters as the core sees them."""

    places: tuple[list[int], list[torch.Size], list[Any]]  # addresses, shapes, strides that matter
    held: list[Tensor]  # what the core's views point at
    copies: list[int]  # of these parameters, which are not contiguous
    weights: _core.BoundWeights

    def state(self) -> list[tuple[int, int]]:
        """Where the memory is, and how often torch saw it written to."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.held]


class Core:
    """The C++ network of one architecture and the weights it was bound to last. Threads may share it."""

    def __init__(self, config: _core.Config) -> None:
        self.config = config
        self.network = _core.BoundNetwork(config)
        self.names = list(config.param_shapes())
        self._sizes: dict[tuple[int, int], _core.Config] = {config.img_size: config}
        self._bound: Bound | None = None
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, tuple[int, ...]], list[bool]] = {}
        self._layouts: dict[tuple[bool, ...], tuple[int, list[int], list[int]]] = {}

    def at(self, height: int, width: int) -> _core.Config:
        """The configuration for images of this size.

        Raises:
            ValueError: they have no patch, or too many.
        """
        found = self._sizes.get((height, width))
        if found is None:
            found = self.config.replace(img_size=(height, width))
            if len(self._sizes) > 1000:  # they are no more than looked up
                self._sizes = {self.config.img_size: self.config}
            self._sizes[height, width] = found
        return found

    def room(self, memory: str, images: Tensor) -> Tensor:
        """For what a forward on a device saves: memory of torch, which knows its streams and graphs."""
        config, dtype = self.at(*images.shape[-2:]), NAMES[images.dtype]
        size = _core.Saved.size(config, images.shape[0], dtype, True, memory)
        return images.new_empty(size, dtype=torch.uint8)

    def weights(self, params: Sequence[Tensor]) -> _core.BoundWeights:
        """The parameters, in the order of `names`, as the core sees them; bound again when they moved."""
        return self.bound(params).weights

    def bound(self, params: Sequence[Tensor], copy: bool = True, keep: bool = True) -> Bound:
        """As `weights`, with what that depends on.

        Args:
            copy: whether copies of parameters that are not contiguous are brought up to date.
            keep: whether the next call is expected to have its parameters in the same place.
        """
        try:
            contiguous = all(map(Tensor.is_contiguous, params))  # of hundreds of tensors, at every call
            strides = [] if contiguous else list(map(Tensor.stride, params))
            places = ([p.data_ptr() for p in params], list(map(Tensor.size, params)), strides)
        except RuntimeError:
            for name, p in zip(self.names, params):
                refuse_layout("VisionMamba", name, p)
            raise
        with self._lock:
            bound = self._bound
            if bound is not None and bound.places == places:
                if copy:
                    for index in bound.copies:
                        bound.held[index].copy_(params[index].detach())
                return bound
            held = [p.detach() for p in params]
            for name, p in zip(self.names, held):
                if p.is_meta or p.device != held[0].device:
                    device = "the cpu or cuda" if held[0].is_meta else held[0].device
                    raise ValueError(
                        f"[VisionMamba] {name}: expected a tensor on {device}, got {describe(p)}"
                    )
                if p.is_contiguous() and p.untyped_storage().nbytes() < p.nbytes:
                    raise ValueError(
                        f"[VisionMamba] {name}: {describe(p)} without its memory, which was freed or is "
                        "sharded: call the wrapper (FSDP, say), not the network in it"
                    )
            held = [p.resolve_conj().resolve_neg().contiguous() for p in held]
            copies = [i for i, p in enumerate(params) if held[i].data_ptr() != p.data_ptr()]
            weights = self.network.bind([exported(p) for p in held])
            bound = Bound(places, held, copies, weights)
            if keep:
                self._bound = bound
            return bound

    def run(
        self,
        request: Request,
        images: Tensor,
        params: Sequence[Tensor],
        saved: _core.Saved | None,
        constant: _core.BoundWeights | None = None,
        bound: Bound | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs that `request` names, freshly allocated.

        Args:
            constant: what the parameters are bound to, if it is known that they did not change.
            bound: what they are bound to, if that is known.
        """
        batch, at = images.shape[0], place(images)
        weights = constant or (bound or self.bound(params)).weights
        config = self.at(*images.shape[-2:])
        tokens = (batch, config.tokens, config.embed_dim)
        if request.kind == "layers":
            outputs = [images.new_empty(tokens) for _ in request.layers]
            wanted = _core.Outputs(None, None, list(request.layers), [exported(y) for y in outputs])
        else:
            features = request.kind == "tokens"
            outputs = [images.new_empty(tokens if features else config.logits_shape(batch))]
            wanted = _one_output(request.kind, exported(outputs[0]))
        if batch:
            self.network.forward(
                weights, exported(images), wanted, request.draws, at, saved, constant is not None
            )
        return tuple(outputs)

    def taking_part(self, kind: str, layers: Sequence[int]) -> list[bool]:
        """For every parameter whether these outputs depend on it."""
        found = self._parts.get((kind, tuple(layers)))
        if found is None:
            found = [kind == "logits" or self._takes_part(name, kind, layers) for name in self.names]
            self._parts[(kind, tuple(layers))] = found
        return found

    @staticmethod
    def _takes_part(name: str, kind: str, layers: Sequence[int]) -> bool:
        if name.startswith(("head.", "neck.", "norm_neck.")) or (
            kind == "layers" and name.startswith("norm_f.")
        ):
            return False
        return kind == "tokens" or not name.startswith("layers.") or int(name.split(".")[1]) <= max(layers)

    def layout(self, params: Sequence[Tensor], wanted: tuple[bool, ...]) -> tuple[int, list[int], list[int]]:
        """One buffer for the gradients of the wanted parameters.

        Returns:
            its length, the offset of every parameter (-1: not wanted), the padded sizes of the wanted ones.
        """
        found = self._layouts.get(wanted)
        if found is None:
            total, offsets, sizes = 0, [], []
            for p, want in zip(params, wanted):
                offsets.append(total if want else -1)
                if want:
                    sizes.append((p.numel() + 15) // 16 * 16)
                    total += sizes[-1]
            found = self._layouts[wanted] = (total, offsets, sizes)
        return found


def _one_output(kind: str, array: Any) -> _core.Outputs:
    """The logits or the tokens, or the gradients of these."""
    return _core.Outputs(None, array) if kind == "tokens" else _core.Outputs(array)


class NetworkFunction(torch.autograd.Function):
    """The whole network as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        request: Request,
        constant: _core.BoundWeights | None,
        images: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        # The token is what is saved: autograd frees it with its other saved tensors, hooks may move it.
        token = core.room(request.memory, images) if on_cuda(images) else None
        if token is None:
            saved = core.network.saved(request.memory, place(images))
        else:
            saved = _core.Saved.lent(request.memory, exported(token))
        bound = core.bound(params, copy=constant is None)
        outputs = core.run(request, images, params, saved, constant, bound)
        token = from_dlpack(saved.token) if token is None else token
        ctx.save_for_backward(token, images, *params)
        ctx.set_materialize_grads(False)
        ctx.core, ctx.request, ctx.bound, ctx.state = core, request, bound, bound.state()
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        core, request = ctx.core, ctx.request
        wanted = ctx.needs_input_grad[4:]
        nothing: tuple[Tensor | None, ...] = (None,) * (4 + len(wanted))
        if all(g is None for g in gradients):
            return nothing
        token, images, *params = ctx.saved_tensors
        dimages = torch.zeros_like(images) if ctx.needs_input_grad[3] else None
        # named, so that they live until the call has queued its work
        incoming = [None if g is None else g.contiguous() for g in gradients]
        layers = [i for i, g in zip(request.layers, incoming) if g is not None]
        if request.kind == "layers":
            outputs = _core.Outputs(None, None, layers, [exported(g) for g in incoming if g is not None])
        else:
            outputs = _one_output(request.kind, exported(incoming[0]))
        part = core.taking_part(request.kind, layers)
        wanted = tuple([want and p for want, p in zip(wanted, part)])
        total, offsets, sizes = core.layout(params, wanted)
        flat = params[0].new_zeros(total)
        bound = ctx.bound
        if (
            bound.state() != ctx.state
        ):  # what hooks on saved tensors brought back, or a sharded model gathered
            bound = core.bound(params, copy=False, keep=False)
        if images.shape[0]:
            core.network.backward(
                bound.weights,
                exported(images),
                _core.Kept(exported(aligned(token)), request.memory),
                outputs,
                _core.Gradients(exported(flat), offsets, exported(dimages)),
                request.draws,
                place(images),
            )
        pieces = iter(flat.split(sizes))
        dparams = [
            next(pieces)[: p.numel()].view(p.shape) if want else None for p, want in zip(params, wanted)
        ]
        return (None, None, None, dimages, *dparams)
