# SPDX-License-Identifier: Apache-2.0
"""Where torch tensors live, and what the extension must know to compute there.

On CUDA a call is queued on torch's current stream of the tensor's device, and what it writes was allocated by
torch: streams, lifetimes and `torch.cuda.graph` work as with torch's own operators. Before a capture, run the
call once. What was captured, an inference or a training step, reads the weights anew in every replay; an
inference captured within `constant_weights` keeps the casts that it found. What a network saves for its
backward is memory of torch's, too: a hook on saved tensors that copies it on another stream calls
`record_stream`, as for any tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from .. import _core

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
_CUDA = 2  # kDLCUDA
_HALF = (torch.bfloat16, torch.float16)


def on_cuda(tensor: Tensor) -> bool:
    """Whether the tensor lies on a CUDA device."""
    return tensor.device.type == "cuda"


def exported(tensor: Tensor | None) -> Any:
    """What the extension takes for a tensor. `Tensor.__dlpack__` would wait for, or mix, streams."""
    if tensor is None:
        return None
    return to_dlpack(tensor.detach()) if on_cuda(tensor) else tensor.detach()


_on_threads = functools.cache(_core.Place)


def place(tensor: Tensor) -> _core.Place:
    """Where a call whose output is `tensor` computes."""
    if not on_cuda(tensor):
        return _on_threads(torch.get_num_threads())
    stream = torch.cuda.current_stream(tensor.device)
    with torch.cuda.device(tensor.device):
        return _core.Place(0, stream.cuda_stream, torch.cuda.is_current_stream_capturing())


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of parameters, residual and states beside activations of `dtype`."""
    return torch.float32 if dtype in _HALF else dtype


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast wants activations to have beside this tensor; None without autocast.

    On the CPU float64 stays, as it does in torch's own operators.
    """
    kind = "cuda" if on_cuda(tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return None
    return (
        torch.float64 if kind == "cpu" and tensor.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    )


def activation_types(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """Types that activations may have where this tensor is."""
    return (torch.float32, *_HALF) if on_cuda(tensor) else (torch.float32, torch.float64, torch.bfloat16)


def no_half(dtype: torch.dtype) -> str:
    """What to say besides, where activations of this type are refused on the CPU."""
    if dtype != torch.float16:
        return ""
    return (
        ": the cpu has no arithmetic for it; torch.bfloat16 is the 16-bit type there, for torch.autocast too"
    )


def require_unit(what: str, dtype: torch.dtype) -> None:
    """vimcore.Error where activations of this type are on the CPU, which has no unit for them."""
    if dtype == torch.bfloat16 and (why := _core.bf16_refusal()):
        raise _core.Error(f"{what}: bf16: {why}")


def from_device(value: Any) -> Any:
    """A tensor on the memory of a CUDA array of another library (CuPy, ...); anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(type(value), "__dlpack_device__"):
        return value
    return torch.from_dlpack(value) if int(value.__dlpack_device__()[0]) == _CUDA else value


def describe(value: Any) -> str:
    """ "(2, 197, 192) f32 cpu" of a tensor; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{tuple(value.shape)} {dtype} {value.device}"


def aligned(token: Tensor) -> Tensor:
    """What was saved, where a saved-tensor hook brought it back to an odd address."""
    return token.clone() if token.data_ptr() % 64 else token
