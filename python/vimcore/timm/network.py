# SPDX-License-Identifier: Apache-2.0
"""`VisionMamba` under timm's conventions. Needs no timm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import saving
from ..nn.readout import class_positions, map_shape, patches_of, pooled
from ..nn.structure import does_more
from ..nn.vision_mamba import Network, VisionMamba
from ..utils.arguments import integer, native, sides

_POOLS: dict[str, dict[str, str]] = {
    "token": {},
    "avg": {"class_token": "none", "pool": "mean"},
    "max": {"class_token": "none", "pool": "max"},
    "": {"class_token": "none", "pool": "all"},
}


class TimmVisionMamba(VisionMamba):
    """`VisionMamba` under timm's conventions: the same parameters, keys and results.

    Where the two differ, timm's meaning holds: `drop_rate` is dropout before the head, `pos_drop_rate` that
    of the tokens, and `forward_intermediates` has timm's arguments. Tokens keep the image's order: a middle
    class token stands in the middle, not first.

    Args:
        global_pool: "token" for the class token; "avg", "max" and "" (logits of every token) build the
            network without one.
        drop_rate, pos_drop_rate: dropout before the head, and of the tokens after the position table.
        device, dtype: where and as what the parameters are made.
        options: the other arguments of `VisionMamba`.

    Raises:
        ValueError: an option is out of range or two do not go together.
    """

    _described = True

    def __init__(
        self,
        *,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if global_pool is not None:
            if global_pool not in _POOLS:
                expected = ", ".join(map(repr, _POOLS))
                raise ValueError(
                    f"[VisionMamba] global_pool: expected one of {expected}, got {global_pool!r}"
                )
            options = {**options, **_POOLS[global_pool]}
        if not 0 <= drop_rate < 1:
            raise ValueError(f"[VisionMamba] drop_rate: expected 0 <= drop_rate < 1, got {drop_rate}")
        if drop_rate and (options.get("class_token") == "random" or options.get("pool") in ("max", "all")):
            raise ValueError(
                "[VisionMamba] drop_rate: dropout before the head goes with one token or a mean, not with "
                'class_token="random" or a head that sees every token'
            )
        super().__init__(drop_rate=pos_drop_rate, **options)
        self.head_drop = nn.Dropout(drop_rate)
        self.head_hidden_size = self._config.readout_width
        self._pool: str | None = None  # of a network with class tokens whose head reads the patches
        self._without_norm = False
        self._describe_features()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @classmethod
    def _of_config(cls: type[Network], config: dict[str, Any]) -> Network:
        # the configuration's drop_rate is that of the tokens
        return super()._of_config({**config, "drop_rate": 0.0, "pos_drop_rate": config["drop_rate"]})

    def _describe_features(self) -> None:
        """What `features_only` tells its users: one entry for each layer that has an output."""
        c = self._config
        first, step = (1, 2) if c.directions == "block" else (0, 1)
        self._taps = list(range(first, c.depth, step))
        self.feature_info: list[dict[str, Any]] = [
            {"module": f"layers.{i}", "num_chs": c.embed_dim, "reduction": c.stride} for i in self._taps
        ]

    # ---- what timm asks ------------------------------------------------------------------------------------

    @property
    def in_chans(self) -> int:
        return int(self._config.in_chans)

    @property
    def global_pool(self) -> str:
        """timm's name of how the head reads the tokens."""
        if self._pool is not None:
            return self._pool
        if self._config.class_token != "none":
            return "token"
        return {"mean": "avg", "all": ""}.get(self._config.pool, self._config.pool)

    @property
    def grad_checkpointing(self) -> bool:
        return self.memory != "fast"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Backward recomputes more (memory="lean", or "least" if set), or keeps more ("fast")."""
        if enable != self.grad_checkpointing:
            self.memory = "lean" if enable else "fast"

    def get_classifier(self) -> nn.Module:
        """The head: nn.Linear, or nn.Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one with random weights; 0: no head.

        Args:
            global_pool: what the head reads from now on. With class tokens "avg" and "max" pool the patches,
                "" gives it every token; such a network cannot be saved. "token" needs a class token.
        """
        if global_pool is not None and global_pool != self.global_pool:
            tokens = self._config.class_token != "none"
            if self._config.class_token == "registers":
                raise ValueError(
                    f"[VisionMamba] global_pool: the head of registers reads 'token', got {global_pool!r}"
                )
            if global_pool not in _POOLS or (global_pool == "token" and not tokens):
                expected = ", ".join(repr(pool) for pool in _POOLS if tokens or pool != "token")
                raise ValueError(
                    f"[VisionMamba] global_pool: expected one of {expected}, got {global_pool!r}"
                )
            if tokens:
                self._pool = None if global_pool == "token" else global_pool
            else:
                self._reconfigure(pool=_POOLS[global_pool]["pool"])
        super().reset_classifier(num_classes)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """See `VisionMamba.set_input_size`; None leaves the size as it is.

        Raises:
            ValueError: another patch_size, which weights of patches do not follow here.
        """
        same = {self._config.patch_size}
        if patch_size is not None and {*sides("[VisionMamba] patch_size", patch_size)} != same:
            raise ValueError(
                f"[VisionMamba] set_input_size: patch_size stays {self._config.patch_size}, got "
                f"{patch_size!r}; build a network with the other one"
            )
        if img_size is not None:
            super().set_input_size(img_size)

    def _reconfigure(self, **changes: Any) -> None:
        self._config = self._config.replace(**changes)
        self._core = self._places = None

    def save(
        self,
        path: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """As `VisionMamba.save`.

        Raises:
            ValueError: no `VisionMamba` computes what this network does, see `reset_classifier` and
                `prune_intermediate_layers`.
        """
        if self._pool is not None:
            raise ValueError(
                f"[VisionMamba] save: no class token network reads with global_pool={self._pool!r}"
            )
        if self._without_norm:
            raise ValueError("[VisionMamba] save: the last normalisation was pruned")
        super().save(path, labels, dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from input to output, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^neck|^norm_neck", (99999,))],
        }

    def load_pretrained(self, path: str) -> None:
        """Weights of a local file; for a pretrained_cfg with custom_load. See `vimcore.load_checkpoint`."""
        saving.load_checkpoint(self, path)

    # ---- computing -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W), see `VisionMamba.forward`."""
        fused = self._pool is None and not self._without_norm and self._drop_is_idle()
        return super().forward(x) if fused else self.forward_head(self.forward_features(x))

    def _drop_is_idle(self) -> bool:
        """Whether the dropout before the head does nothing, so that the core may compute the head."""
        drop: nn.Module = self.head_drop
        if type(drop) is nn.Dropout and not (drop.training and drop.p > 0) and not does_more(drop):
            return True
        c = self._config
        if c.class_token == "random" or c.head_per_token:
            raise RuntimeError(
                "[VisionMamba] head_drop: is not called with class_token='random' or a head that sees every "
                "token, so its rate, hooks or other class would be ignored: leave it as it was made"
            )
        return False

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens (B, L, D), see `VisionMamba.forward_features`."""
        if self._without_norm:
            return self._call("layers", x, (self._config.depth - 1,))[0]
        return super().forward_features(x)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools normalised tokens (B, L, D) and applies the head.

        Args:
            pre_logits: stop before the head: (B, head_hidden_size), or (B, L, D) where the head sees every
                token, that is with global_pool "max" and "".
        """
        c = self._config
        if c.head_per_token:
            return tokens if pre_logits else super().forward_head(tokens)
        if self._pool is not None:
            patches = patches_of(tokens, self._config)
            row = {"avg": patches.mean(1), "max": patches.amax(1)}.get(self._pool, tokens)
        else:
            row = pooled(tokens, self._config, self._weight)
        row = self.head_drop(row)
        return row if pre_logits else self.head(row)

    def forward_intermediates(  # timm's arguments and result
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The residual stream after these layers, class tokens taken out. One pass of the network.

        Args:
            x: images (B, C, H, W).
            indices: entries of `feature_info`: the last n for a number, all for None, negative ones counted
                from the end. With directions="block" there is one for each pair of layers.
            return_prefix_tokens: add the class tokens (B, their number, D) of each.
            norm: apply the last normalisation to each.
            stop_early: stop at the last of these layers, also for the final features.
            output_fmt: "NCHW" for (B, D, h, w), "NLC" for (B, h w, D).

        Returns:
            (final features (B, L, D), list); the list alone with intermediates_only; with output_dict a
            dictionary with "image_features", "image_intermediates" and "image_intermediates_prefix".
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"[VisionMamba] output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = [self._taps[i] for i in _chosen(len(self._taps), indices)]
        last = max(wanted) if stop_early or intermediates_only else self._config.depth - 1
        layers = tuple(sorted({*wanted} if intermediates_only else {*wanted, last}))
        streams = dict(zip(layers, self._call("layers", x, layers)))
        chosen = [self._normalised(streams[i]) if norm else streams[i] for i in sorted(set(wanted))]
        maps = [patches_of(y, self._config) for y in chosen]
        if output_fmt == "NCHW":
            grid = map_shape(self._config_for(x))
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        prefix = [self._class_tokens(y) for y in chosen] if self._config.class_tokens else None
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and prefix is not None:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self._normalised(streams[last])
            return result
        out: list[Any] = list(zip(maps, prefix)) if return_prefix_tokens and prefix is not None else maps
        return out if intermediates_only else (self._normalised(streams[last]), out)

    def _normalised(self, stream: Tensor) -> Tensor:
        c, norm = self._config, self.norm_f
        if self._without_norm:
            return stream
        if c.norm == "layer":
            return ops.layer_norm(stream, norm.weight, norm.bias, eps=c.norm_eps)  # type: ignore[return-value]
        return ops.rms_norm(stream, norm.weight, eps=c.norm_eps)  # type: ignore[return-value]

    def _class_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, class_positions(tokens, self._config)]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cuts off the layers behind the last of these entries of `feature_info`.

        Args:
            prune_norm: the tokens are no longer normalised; the weights for that become buffers.
            prune_head: take the head away.

        Returns:
            the entries, counted from 0.
        """
        take = _chosen(len(self._taps), indices)
        before, depth = self._config.depth, self._taps[max(take)] + 1
        # drop path grows with the layer: what is left keeps its rates
        rate = self._config.drop_path_rate * (depth - 1) / (before - 1) if before > 1 else 0.0
        if depth < before:
            self._reconfigure(depth=depth, drop_path_rate=rate)
            self.layers = self.layers[:depth]
            self._describe_features()
        if prune_norm and not self._without_norm:
            self._without_norm = True
            for name, weight in list(self.norm_f.named_parameters()):
                delattr(self.norm_f, name)
                self.norm_f.register_buffer(name, weight.detach())
        if prune_head:
            self.reset_classifier(0)
        return take


def _chosen(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Entries 0 .. count - 1: the last n for a number, all for None, negative ones counted from the end."""
    if indices is None or not isinstance(found := native("[VisionMamba] indices", indices), list):
        n = count if indices is None else integer("[VisionMamba] indices", found)
        if not 0 < n <= count:
            raise ValueError(f"[VisionMamba] indices: expected a number from 1 to {count}, got {n}")
        return list(range(count - n, count))
    entries = [integer("[VisionMamba] indices", i) for i in found]
    if not entries or not all(-count <= i < count for i in entries):
        raise ValueError(f"[VisionMamba] indices: expected {-count} to {count - 1}, got {entries}")
    return [i % count for i in entries]
