# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` as a torch module: parameters under the authors' state-dict keys, the arithmetic in C++."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor, nn

from .._core import Config
from ..autograd.checks import refuse_wrapped
from ..positions import resize_pos_embed
from ..utils.arguments import integer
from . import saving
from .computing import ComputingNetwork
from .constant import ENTERING, ConstantWeights
from .following import Plan, at_size
from .parameters import Layer, PatchEmbed, Rope, Scale, empty, trunc_normal
from .readout import activations_like, layer_indices, map_shape, patches_of, readout
from .structure import made

Network = TypeVar("Network", bound="VisionMamba")
_NOT_OF_CONFIG = ("self", "memory", "dynamic_img_size", "__class__")  # among what the constructor sees


class VisionMamba(ComputingNetwork):
    """Vision Mamba: patches, class token, bidirectional Mamba blocks, linear head.

    Submodules only hold parameters: the whole network is one call of the C++ core. Hooks on submodules,
    adapters and other modules in their place make it run layer by layer instead, with the same result (a
    layer is called with the output before it and the residual stream, and gives both). A head that is no
    plain Linear, or has hooks, is called as a module; parametrizations are followed. torch.compile,
    torch.export, torch.func and FLOP counters see one operator. Weights may be written in any way
    (fused optimizers, `.data`, numpy views, other processes): every call looks, see `constant_weights`.

    Parameters and their gradients are float32, activations of the images' type: float32 or bfloat16, on CUDA
    also float16; under `torch.autocast` of its type. bfloat16 on the CPU needs a processor with a unit for it
    (`vimcore doctor` names it). With float16 scale the loss (`torch.amp.GradScaler`). On the CPU everything
    may be float64, which autocast leaves alone.

    Args:
        img_size: side or (height, width) in pixels; images of another size are an error, unless
            dynamic_img_size.
        patch_size, stride: pixels; stride None is patch_size.
        in_chans, num_classes: channels; classes, 0 for no head.
        embed_dim, depth, d_state, d_conv, expand: D, blocks, N, K and E / D.
        dt_rank: R, or "auto" for ceil(D / 16).
        directions: the paper's five: "none", "sequence" (tokens reversed with probability 0.5 in training),
            "block" (pairs of a forward and a reverse layer), "ssm" (two scans, one convolution), "ssm_conv".
        average_directions: halve the sum of both directions ("ssm_conv" only).
        class_token: "none", "head", "double", "middle", "random" (drawn in training, at the head in eval), or
            "registers" (Mamba-R, arXiv 2405.14858): several, evenly among the patches, which the head reads
            one beside the other.
        registers: their number, with class_token="registers"; None is 12 of them.
        neck_reduction: r of the neck between registers and head, which narrows each to D / r and normalises
            them together; 1: no neck.
        pool: with class_token="none": "mean", "max", "last" or "all".
        norm, norm_eps: "rms" or "layer".
        pos_embed, rope, rope_residual: learnt positions; rotary ones; these also on the residual.
        rope_grid: tokens a side of the grid that rotary coordinates are scaled to.
        layer_scale: initial factor of each mixer output, None for no factor.
        drop_rate: dropout of the tokens after the position table, in training.
        drop_path_rate: of the last mixer output, growing linearly from 0 at the first, in training.
        frames: T, for clips (B, C, T, H, W) in place of images (VideoMamba, arXiv 2403.06977): the patches of
            all frames are one sequence, with learnt positions in the frame and of the frame. Stride is
            patch_size, which divides the sides. None: images.
        memory: what backward keeps: "lean" recomputes more, "fast" keeps more; "least" does
            without in_proj's output as well: of Vim-Ti 41 % of "lean" in float32, 56 % in 16 bits.
        dynamic_img_size: images of any size with at least one patch. The position table is resized for each
            size (bicubic, rows of class tokens left alone), once until weights change; gradients go to the
            table itself, rotary coordinates are scaled to the size. As `memory` this may be set later
            (`model.dynamic_img_size = True`) and is not part of the architecture: files do not say it.

    Whole numbers and sides may be of numpy or torch as well.

    Raises:
        ValueError, TypeError: an option is out of range or of another type, or two do not go together.
    """

    _described = True  # by its configuration; a class derived from it may have other tensors

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        directions: str = "ssm_conv",
        average_directions: bool = True,
        class_token: str = "middle",
        registers: int | None = None,
        neck_reduction: int = 1,
        pool: str = "mean",
        norm: str = "rms",
        norm_eps: float = 1e-5,
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = False,
        rope_grid: int = 14,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frames: int | None = None,
        memory: str = "lean",
        dynamic_img_size: bool = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in _NOT_OF_CONFIG}
        super().__init__(Config(**given), memory, dynamic_img_size)
        c = self._config
        self.embed_dim = self.num_features = embed_dim = c.embed_dim  # Python's types, whatever came in
        for name, shape in c.param_shapes().items():
            if "." not in name:  # class tokens and position tables; the others belong to modules
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.patch_embed = PatchEmbed(c)
        if rope:
            self.rope = Rope(c.to_dict())
        if c.neck_reduction > 1:
            self.neck = empty(nn.Linear, embed_dim, embed_dim // c.neck_reduction, bias=False)
            trunc_normal(self.neck.weight, 0.02)
            self.norm_neck = Scale(c.readout_width, c.norm, c.norm_eps)
        self.head = self._new_head(c.num_classes)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.norm_f = Scale(embed_dim, c.norm, c.norm_eps)

        weight = self.patch_embed.proj.weight
        trunc_normal(weight, math.sqrt(1 / weight[0].numel()) / 0.87962566103423978)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name != "temporal_pos_embedding":  # as published, frames begin alike
                trunc_normal(parameter, 0.02)
        self._made = made(self)

    # ---- description ---------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        c = self._config
        free = ", dynamic_img_size=True" if self.dynamic_img_size else ""
        return f"img_size={list(c.img_size)}, tokens={c.tokens}, memory={self.memory!r}{free}"

    def flops(self, img_size: int | Sequence[int] | None = None) -> int:
        """Multiply-adds of one image of this size (None: the network's own), scans included."""
        size = self._config.img_size if img_size is None else img_size
        return self._config.replace(num_classes=self.num_classes, img_size=size).flops()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides vectors and biases, that the published training does not decay."""
        return {name for name in self._config.param_shapes() if "." not in name}

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one with random weights; 0: no head."""
        num_classes = integer("[VisionMamba] num_classes", num_classes)
        self._config.replace(num_classes=num_classes)  # says whether it is out of range
        like = self.norm_f.weight
        self.head = self._new_head(num_classes).to(like.device, like.dtype)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Makes this a network for images of another size, with a resized position table; `config` follows.

        Where the grid of patches changes, `pos_embed` becomes a new parameter (bicubic, rows of class tokens
        left alone) and the rotation tables are made anew. Optimizers, averaged copies and wrappers such as
        DistributedDataParallel go on with the old one: make them afterwards.

        Args:
            img_size: side or (height, width) in pixels.

        Raises:
            ValueError, TypeError: no size, or one without a patch.
            RuntimeError: within `constant_weights`, or the table is parametrised or not a parameter.
        """
        before, config = self._config, self._config.replace(img_size=img_size)
        if self._constant:
            raise RuntimeError("[VisionMamba] set_input_size: not within constant_weights")
        if config.grid != before.grid:
            if config.pos_embed:
                table = self._parameters.get("pos_embed")
                if table is None:
                    raise RuntimeError(
                        "[VisionMamba] set_input_size: pos_embed is no parameter (parametrised?); "
                        'torch.nn.utils.parametrize.remove_parametrizations(model, "pos_embed") makes it one'
                    )
                refuse_wrapped("VisionMamba", ["pos_embed"], [table])
                resized = resize_pos_embed(table.detach(), before.grid, config.grid, config.class_token)
                self.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)
            if config.rope:
                self.rope.fill(config.to_dict())
        self._config = config
        self._core = self._places = None

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = empty(nn.Linear, self._config.readout_width, num_classes)
        trunc_normal(head.weight, 0.02)
        nn.init.zeros_(head.bias)
        return head

    # ---- files ---------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Writes weights, architecture and labels to one safetensors file, whole or not at all.

        Of a parametrised weight (torch.nn.utils.parametrize) its value in eval mode is written, under its
        plain name. The tensors that a class derived from `VisionMamba` has besides are written under their
        names, for `load` of that class.

        Args:
            labels: one name for each class.
            dtype: of the file: "float32", or "bfloat16" or "float16" (or torch's) for the weights of linear
                maps, which 16-bit computing rounds in any case; the rest, some per cent, is float32 beside
                them. None: as the parameters are, 16 bits widened to float32.

        Raises:
            ValueError: the file could not describe the network: another head, pruned weights, adapters, ...;
                names what and the remedy. Nothing is written then.
            vimcore.Error: a weight is too large for float16.
        """
        saving.save(self, path, labels, dtype=dtype)

    @classmethod
    def load(
        cls: type[Network],
        path: str | os.PathLike[str],
        img_size: int | tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
        dynamic_img_size: bool = False,
    ) -> Network:
        """The network of a file that `save` wrote, in eval mode; of a derived class with its own tensors.

        Another img_size (pixels, side or (height, width)) resizes the position table; dynamic_img_size as in
        the constructor.

        Raises:
            vimcore.Error: the file is missing or damaged.
            ValueError: it is no vimcore file, or its tensors are not those of architecture and class.
            TypeError: the constructor of the derived class takes other arguments than `VisionMamba`.
        """
        return saving.load_as(cls, path, img_size, device, dynamic_img_size=dynamic_img_size)

    # ---- computing -----------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images.

        Args:
            images: (B, C, H, W), with `frames` (B, C, T, H, W), in the type of the parameters, or in a 16-bit
                type beside float32. Of `img_size`, with `dynamic_img_size` of any size.

        Returns:
            (B, num_classes); (B, L, num_classes) with pool="all"; without a head features (B, D), with
            registers (B, registers D / neck_reduction).

        Raises:
            ValueError: shape, type or device of the images or of a parameter do not fit.
            vimcore.Error: this CPU does not compute in bfloat16.
        """
        plan = self._known()
        fused = plan.head_is_fused if isinstance(plan, Plan) else self._head_is_fused()
        if fused:
            return self._call("logits", images)[0]
        if plan.class_token == "random" and self.training:
            here = plan if isinstance(plan, Plan) else self._config_for(images)
            position = torch.randint(0, here.patches + 1, ())
            tokens = self._call("tokens", images, position=position)[0]
            with activations_like(tokens):
                return self.head(tokens.index_select(1, position.view(1).to(tokens.device)).squeeze(1))
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, L, D) of images (B, C, H, W), in image order, class tokens included.

        With class_token="random" the token stands at the head here, also in training.
        """
        return self._call("tokens", images)[0]

    def forward_intermediates(self, images: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """Feature maps (B, D, h, w) of images (B, C, H, W): the residual stream after each of these layers.

        Not normalised, class tokens removed; (h, w) is the grid of patches of these images. Of clips
        (B, D, T, h, w).

        Args:
            indices: layers, negative ones count from the last; None: the last of each quarter. With
                directions="block" a pair of layers has one output, that of its second (odd) layer.
        """
        plan = self._known()
        wanted = layer_indices(plan, indices)
        layers = tuple(sorted(set(wanted)))
        if not layers:
            return []
        outputs = self._call("layers", images, layers)
        grid = map_shape(at_size(self, plan, images) if isinstance(plan, Plan) else self._config_for(images))
        maps = {
            layer: patches_of(x, plan).transpose(1, 2).unflatten(2, grid) for layer, x in zip(layers, outputs)
        }
        return [maps[layer] for layer in wanted]

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pools normalised tokens (B, L, D), applies the head: (B, num_classes); pool="all": per token."""
        with activations_like(tokens):
            return readout(tokens, self._known(), self._weight, self.head, self._neck)

    def _neck(self, registers: Tensor) -> Tensor:
        found: Tensor = self.norm_neck(self.neck(registers).flatten(1))
        return found

    def _weight(self, name: str) -> Tensor:
        """A parameter by its state-dict key, also a parametrised one."""
        weight: Tensor = attrgetter(name)(self)
        return weight

    # ---- weights that change -------------------------------------------------------------------------------

    def weights_changed(self) -> None:
        """Announces a write to weights within `constant_weights`; elsewhere calls look for changes."""
        for constant in self._constant:
            constant.renew(self)

    @contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Within, calls do not look whether weights or submodules changed.

        For loops of inference in which nothing may be spent on that: on the CPU a checksum of the weights, on
        CUDA one launch that casts them anew. `torch.func.functional_call` within computes with the network's
        own weights.

        Raises:
            RuntimeError: on leaving, if weights did change within (on CUDA as far as torch counts writes).
        """
        constant = ConstantWeights(self)
        with ENTERING:
            self._constant += (constant,)
        try:
            yield
        finally:
            with ENTERING:  # not always the last one: threads and generators leave in any order
                self._constant = tuple(other for other in self._constant if other is not constant)
        constant.check(self)
