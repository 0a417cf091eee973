# SPDX-License-Identifier: Apache-2.0
"""The whole network as an operator of torch, for what records or transforms calls.

Plain calls go by `NetworkFunction`, which passes hundreds of parameters faster than torch's dispatcher does.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .library import (
    config_of,
    dense,
    empty,
    looped,
    none,
    operator,
    same_for_all,
)
from .network import Core, Request, layout, outputs_of, pieces_of, takes_part
from .tensors import NAMES, aligned, exported, on_cuda, place

Maybe = Tensor | None

_SCHEMA = (
    "str config, str kind, int[] layers, str memory, Tensor? drop_path, Tensor? dropout, Tensor? choices"
)


class _Cores:
    """Networks by architecture and weights: the last ones used, since an operator has no place of its own."""

    LIMIT = 8

    def __init__(self) -> None:
        self._all: OrderedDict[tuple[str, int, str], Core] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, config: str, params: Sequence[Tensor]) -> Core:
        """The network of these weights, packed if it was used lately."""
        key = (config, params[0].data_ptr(), str(params[0].device))
        with self._lock:
            core = self._all.pop(key, None) or Core(config_of(config))
            self._all[key] = core
            if len(self._all) > self.LIMIT:
                self._all.popitem(last=False)
            return core

    def clear(self) -> None:
        """Lets go of all weights."""
        with self._lock:
            self._all.clear()


CORES = _Cores()


@functools.lru_cache(64)
def _shapes(config: str) -> Core:
    """For shapes alone: bound to nothing."""
    return Core(config_of(config))


def _request(
    kind: str,
    layers: Sequence[int],
    memory: str,
    drop_path: Maybe,
    dropout: Maybe,
    choices: Maybe,
) -> Request:
    flip, position = (False, -1) if choices is None else choices.tolist()
    given = [None if t is None else exported(dense(t)) for t in (drop_path, dropout)]
    return Request(kind, tuple(layers), _core.Draws(*given, bool(flip), position), memory)


def _size(images: Tensor, config: str, memory: str, batch: Any) -> int:
    """Bytes that are saved of so many images."""
    here = _shapes(config).at(*map(int, images.shape[-2:]))
    return _core.Saved.size(here, batch, NAMES[images.dtype], on_cuda(images), memory)


def _fake(
    images: Tensor, params: Sequence[Tensor], config: str, kind: str, layers: Sequence[int], memory: str,
    drop_path: Maybe, dropout: Maybe, choices: Maybe, save: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _shapes(config).output_shape(kind, images)
    out = empty(images, (len(layers), *shape) if kind == "layers" else shape)
    size = images.shape[0] * _size(images, config, memory, 1) if save else 0
    return out, empty(images, (size,), torch.uint8)


def _network(
    images: Tensor, params: Sequence[Tensor], config: str, kind: str, layers: Sequence[int], memory: str,
    drop_path: Maybe, dropout: Maybe, choices: Maybe, save: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> logits (B, K), tokens (B, L, D) or outputs of layers (n, B, L, D), and what is saved with `save`."""
    images = dense(images)
    draws = (drop_path, dropout, choices)
    out, bytes = _fake(images, params, config, kind, layers, memory, *draws, save, apart)
    if images.shape[0] == 0:
        return out, bytes
    core, request = CORES.of(config, params), _request(kind, layers, memory, *draws)
    core.network.forward(
        core.weights(params), exported(images), outputs_of(request, out if kind == "layers" else [out]),
        request.draws, place(images), _core.Saved.lent(memory, exported(bytes)) if save else None,
    )  # fmt: skip
    return out, bytes


def _backward_fake(
    dout: Tensor, images: Tensor, params: Sequence[Tensor], saved: Tensor, config: str, kind: str,
    layers: Sequence[int], memory: str, drop_path: Maybe, dropout: Maybe, choices: Maybe,
    wanted: Sequence[bool], of_images: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = layout(params, wanted)[0]
    return empty(params[0], (total,)), empty(images) if of_images else none(images)


def _backward(
    dout: Tensor, images: Tensor, params: Sequence[Tensor], saved: Tensor, config: str, kind: str,
    layers: Sequence[int], memory: str, drop_path: Maybe, dropout: Maybe, choices: Maybe,
    wanted: Sequence[bool], of_images: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of the wanted parameters in one buffer, and of the images (else empty)."""
    dout, images = dense(dout), dense(images)
    total, offsets, _ = layout(params, wanted)
    flat = params[0].new_zeros(total)
    dimages = torch.zeros_like(images) if of_images else None
    if images.shape[0]:
        core = CORES.of(config, params)
        request = _request(kind, layers, memory, drop_path, dropout, choices)
        kept = aligned(saved[: _size(images, config, memory, images.shape[0])])
        core.network.backward(
            core.bound(params, copy=False).weights, exported(images), _core.Kept(exported(kept), memory),
            outputs_of(request, dout if kind == "layers" else [dout]),
            _core.Gradients(exported(flat), offsets, exported(dimages)), request.draws, place(images),
        )  # fmt: skip
    return flat, none(images) if dimages is None else dimages


network = operator(
    f"network(Tensor images, Tensor[] parameters, {_SCHEMA}, bool save, bool apart) -> (Tensor, Tensor)",
    _network,
    _fake,
)
network_backward = operator(
    f"network_backward(Tensor dout, Tensor images, Tensor[] parameters, Tensor saved, {_SCHEMA},"
    " bool[] wanted, bool of_images) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ---- gradient ----------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, params, *options, drop_path, dropout, choices, _, _ = inputs
    ctx.save_for_backward(images, output[1], drop_path, dropout, choices, *params)
    ctx.mark_non_differentiable(output[1])
    ctx.options = options


def _gradient(ctx: Any, needed: Any, dout: Maybe, _: Any) -> tuple[Any, ...]:
    images, saved, drop_path, dropout, choices, *params = ctx.saved_tensors
    nothing = None if ctx.options[2] else []  # for torch an empty list is one of tensors
    rest = (None, None, nothing, None, None, None, None, None, None)
    if dout is None:
        return None, [None] * len(params), *rest
    config, kind, layers, _ = ctx.options
    of_images, of_params = needed[:2]
    names = _shapes(config).names
    wanted = [
        need and (kind == "logits" or takes_part(name, kind, layers)) for need, name in zip(of_params, names)
    ]
    flat, dimages = network_backward(
        dout, images, params, saved, *ctx.options, drop_path, dropout, choices, wanted, of_images
    )
    dparams = pieces_of(flat, params, wanted, layout(params, wanted)[2])
    return dimages if of_images else None, dparams, *rest


network.gradient(_gradient, _setup)
network_backward.last_derivative()


# ---- vmap: images may differ, and what is drawn for each ---------------------------------------------------


def _rule(info: Any, in_dims: Any, images: Tensor, params: Sequence[Tensor], *rest: Any) -> tuple[Any, Any]:
    *options, drop_path, dropout, choices, save, apart = rest
    if save and apart:  # what is saved of a batch is no sequence of what is saved of its images
        return looped(network)(info, in_dims, images, params, *rest)
    n, (of_images, of_params, *others) = info.batch_size, in_dims
    of_path, of_dropout, of_choices = others[len(options) : len(options) + 3]
    for name, p, dim in zip(_shapes(options[0]).names, params, of_params or [None] * len(params)):
        same_for_all("VisionMamba", name, p, dim)
    if choices is not None:
        same_for_all("VisionMamba", "draws of flip and class position", choices, of_choices)
    if drop_path is not None:
        drop_path = _batch(drop_path, of_path, n, axis=1)
    if dropout is not None:
        dropout = _batch(dropout, of_dropout, n)
    images = _batch(images, of_images, n)
    out, saved = network(images, params, *options, drop_path, dropout, choices, save, apart)
    axis = 1 if options[1] == "layers" else 0
    return (out.unflatten(axis, (n, out.shape[axis] // n)), saved), (axis, None)


def _batch(value: Tensor, dim: int | None, n: int, axis: int = 0) -> Tensor:
    value = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.movedim(0, axis).flatten(axis, axis + 1)


network.vmapped(_rule)
network_backward.vmapped(looped(network_backward))


# ---- multiply-adds -----------------------------------------------------------------------------------------


@functools.lru_cache(64)
def _image_macs(config: str, kind: str, height: int, width: int) -> int:
    """Of one image; without read-out where tokens are wanted."""
    unread = {} if kind == "logits" else {"num_classes": 0, "neck_reduction": 1}
    return config_of(config).replace(img_size=(height, width), **unread).flops()


def _macs(images: Any, config: str, kind: str) -> Any:
    return images[0] * _image_macs(config, kind, int(images[-2]), int(images[-1]))


network.multiply_adds(lambda images, params, config, kind, *args: _macs(images, config, kind))
network_backward.multiply_adds(
    lambda dout, images, params, saved, config, kind, *args: 2 * _macs(images, config, kind),
)
