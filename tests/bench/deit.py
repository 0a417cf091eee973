# SPDX-License-Identifier: Apache-2.0
"""DeiT in plain torch, and the same network in OpenVINO and ONNX Runtime: the peers of `vimcore bench`.

The transformer of the same size as Vim: patch embedding, learned class token and position table, pre-norm
blocks of attention (`scaled_dot_product_attention`, qkv bias) and an MLP of four times the width with GELU,
LayerNorm with eps 1e-6, and a linear head on the class token. Tiny is 12 layers of 192 with 3 heads: 5.7 M
parameters at 224 px.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"toy": (64, 2), "tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) -> (B, L, D); `materialised`: (L, L) matrices in memory."""

    def __init__(self, width: int, heads: int, materialised: bool = False) -> None:
        super().__init__()
        self.heads, self.materialised = heads, materialised
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.materialised:
            mixed = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int, materialised: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, materialised)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DeiT(nn.Module):
    """Images (B, 3, img_size, img_size) -> logits (B, num_classes)."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        width: int = 192,
        heads: int = 3,
        depth: int = 12,
        num_classes: int = 1000,
        materialised: bool = False,
    ) -> None:
        super().__init__()
        patches = (img_size // patch_size) ** 2
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, materialised) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self._tokens(images)))[:, 0])

    def features(self, images: Tensor) -> Tensor:
        """The last map (B, width, h, w), not normalised, as ViTDet takes it."""
        x = self.blocks(self._tokens(images))[:, 1:]
        return x.transpose(1, 2).unflatten(2, (images.shape[2] // self.patch_size, -1))

    def _tokens(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed


def build(size: str, img_size: int, materialised: bool = False) -> DeiT:
    """The transformer that goes with vim_{tiny,small,base}."""
    width, heads = SIZES[size]
    return DeiT(
        img_size, width=width, heads=heads, depth=2 if size == "toy" else 12, materialised=materialised
    )


def openvino(model: nn.Module, images: Tensor, threads: int, dtype: str = "float32") -> Callable[[], Any]:
    """A call of `model` on `images` (B, 3, H, W) by OpenVINO; ImportError where not installed.

    Args:
        dtype: "float32" or "bfloat16", of the arithmetic; images and logits are float32.

    Raises:
        NotImplementedError: OpenVINO would compute in another type here.
    """
    import openvino as ov

    if dtype == "bfloat16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise NotImplementedError("has no bfloat16 on this CPU")
    converted = ov.convert_model(model.eval(), example_input=images, input=[list(images.shape)])
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.compile_model(converted, "CPU", options)
    request, array = compiled.create_infer_request(), images.numpy()

    def call() -> Any:
        request.infer([array], share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return call


def onnxruntime(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Any]:
    """The same by ONNX Runtime; needs onnx, onnxscript and onnxruntime."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deit.onnx"
        torch.onnx.export(model.eval(), (images,), path, input_names=["images"], dynamo=True, verbose=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)[0]
