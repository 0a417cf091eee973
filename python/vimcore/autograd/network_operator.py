# SPDX-License-Identifier: Apache-2.0
"""The whole network as an operator of torch, for what records or transforms calls.

Plain calls go by `NetworkFunction`, which passes hundreds of parameters faster than torch's dispatcher does.
"""

from __future__ import annotations

import functools
import threading
import weakref
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

_SCHEMA = "str config, str outputs, str memory, Tensor? drop_path, Tensor? dropout, Tensor? choices"


class _Cores:
    """Networks by architecture and weights, since an operator has no place of its own: the last ones used.

    Those of a model that is gone are let go; of tensors that are no parameters, as packages have them, nobody
    tells when.
    """

    LIMIT = 8

    def __init__(self) -> None:
        self._all: OrderedDict[tuple[str, int, str], Core] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, config: str, params: Sequence[Tensor]) -> Core:
        """The network of these weights, packed if it was used lately."""
        key = (config, params[0].data_ptr(), str(params[0].device))
        with self._lock:
            core = self._all.pop(key, None)
            if core is None:
                core = Core(config_of(config))
                if isinstance(params[0], torch.nn.Parameter):
                    weakref.finalize(params[0], self._forget, key)
            self._all[key] = core
            if len(self._all) > self.LIMIT:
                self._all.popitem(last=False)
            return core

    def _forget(self, key: tuple[str, int, str]) -> None:
        self._all.pop(key, None)  # no lock: this may run anywhere, also within `of`

    def __len__(self) -> int:
        return len(self._all)


CORES = _Cores()


@functools.lru_cache(64)
def _shapes(config: str) -> Core:
    """For shapes alone: bound to nothing."""
    return Core(config_of(config))


@functools.lru_cache(256)
def parsed(outputs: str) -> tuple[str, tuple[int, ...]]:
    """Kind and layers out of what an operator takes for them: an empty list would get lost in packages."""
    kind, _, layers = outputs.partition(" ")
    return kind, tuple(int(layer) for layer in layers.split(",")) if layers else ()


def outputs_text(kind: str, layers: Sequence[int]) -> str:
    """ "logits", "tokens" or "layers 1,3"."""
    return f"{kind} {','.join(str(layer) for layer in layers)}" if layers else kind


def _request(
    outputs: str,
    memory: str,
    drop_path: Maybe,
    dropout: Maybe,
    choices: Maybe,
) -> Request:
    flip, position = (False, -1) if choices is None else choices.tolist()
    path, mask = [None if t is None else exported(dense(t)) for t in (drop_path, dropout)]
    return Request(*parsed(outputs), _core.Draws(path, mask, bool(flip), position), memory)


def _size(images: Tensor, config: str, memory: str, batch: Any) -> int:
    """Bytes that are saved of so many images."""
    here = _shapes(config).at(*map(int, images.shape[-2:]))
    return _core.Saved.size(here, batch, NAMES[images.dtype], on_cuda(images), memory)


def _fake(
    images: Tensor, params: Sequence[Tensor], config: str, outputs: str, memory: str,
    drop_path: Maybe, dropout: Maybe, choices: Maybe, save: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind, layers = parsed(outputs)
    shape = _shapes(config).output_shape(kind, images)
    out = empty(images, (len(layers), *shape) if kind == "layers" else shape)
    size = images.shape[0] * _size(images, config, memory, 1) if save else 0
    return out, empty(images, (size,), torch.uint8)


def _network(
    images: Tensor, params: Sequence[Tensor], config: str, outputs: str, memory: str,
    drop_path: Maybe, dropout: Maybe, choices: Maybe, save: bool, apart: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> logits (B, K), tokens (B, L, D) or outputs of layers (n, B, L, D), and what is saved with `save`."""
    images = dense(images)
    draws = (drop_path, dropout, choices)
    out, bytes = _fake(images, params, config, outputs, memory, *draws, save, apart)
    if images.shape[0] == 0:
        return out, bytes
    core, request = CORES.of(config, params), _request(outputs, memory, *draws)
    core.network.forward(
        core.weights(params), exported(images), outputs_of(request, list(out) if request.layers else [out]),
        request.draws, place(images), _core.Saved.lent(memory, exported(bytes)) if save else None,
    )  # fmt: skip
    return out, bytes


def _backward_fake(
    dout: Tensor, images: Tensor, params: Sequence[Tensor], saved: Tensor, config: str, outputs: str,
    memory: str, drop_path: Maybe, dropout: Maybe, choices: Maybe,
    wanted: Sequence[bool], of_images: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = layout(params, wanted)[0]
    return empty(params[0], (total,)), empty(images) if of_images else none(images)


def _backward(
    dout: Tensor, images: Tensor, params: Sequence[Tensor], saved: Tensor, config: str, outputs: str,
    memory: str, drop_path: Maybe, dropout: Maybe, choices: Maybe,
    wanted: Sequence[bool], of_images: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of the wanted parameters in one buffer, and of the images (else empty)."""
    dout, images = dense(dout), dense(images)
    total, offsets, _ = layout(params, wanted)
    flat = params[0].new_zeros(total)
    dimages = torch.zeros_like(images) if of_images else None
    if images.shape[0]:
        core = CORES.of(config, params)
        request = _request(outputs, memory, drop_path, dropout, choices)
        kept = aligned(saved[: _size(images, config, memory, images.shape[0])])
        core.network.backward(
            core.bound(params, copy=False).weights, exported(images), _core.Kept(exported(kept), memory),
            outputs_of(request, list(dout) if request.layers else [dout]),
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
    rest = (None,) * 8
    if dout is None:
        return None, [None] * len(params), *rest
    config, outputs, _ = ctx.options
    kind, layers = parsed(outputs)
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
        remedy = "torch.vmap(..., randomness='same')"
        same_for_all("VisionMamba", "what is drawn for all tokens", choices, of_choices, remedy)
    if drop_path is not None:
        drop_path = _batch(drop_path, of_path, n, axis=1)
    if dropout is not None:
        dropout = _batch(dropout, of_dropout, n)
    images = _batch(images, of_images, n)
    out, saved = network(images, params, *options, drop_path, dropout, choices, save, apart)
    axis = 1 if parsed(options[1])[1] else 0
    return (out.unflatten(axis, (n, out.shape[axis] // n)), saved), (axis, None)


def _batch(value: Tensor, dim: int | None, n: int, axis: int = 0) -> Tensor:
    value = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.movedim(0, axis).flatten(axis, axis + 1)


network.vmapped(_rule)
network_backward.vmapped(looped(network_backward))


# ---- multiply-adds -----------------------------------------------------------------------------------------


@functools.lru_cache(64)
def _image_macs(config: str, outputs: str, height: int, width: int) -> int:
    """Of one image; without read-out where tokens are wanted."""
    unread = {} if outputs == "logits" else {"num_classes": 0, "neck_reduction": 1}
    return config_of(config).replace(img_size=(height, width), **unread).flops()


def _macs(images: Any, config: str, outputs: str) -> Any:
    return images[0] * _image_macs(config, outputs, int(images[-2]), int(images[-1]))


network.multiply_adds(lambda images, params, config, outputs, *args: _macs(images, config, outputs))
network_backward.multiply_adds(
    lambda dout, images, params, saved, config, outputs, *args: 2 * _macs(images, config, outputs),
)
