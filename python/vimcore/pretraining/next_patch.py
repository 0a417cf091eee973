# SPDX-License-Identifier: Apache-2.0
"""Next-patch prediction in both directions, as suits a recurrence: every token teaches, and none is masked.

Two passes over the blocks, one with the forward scan's weights from the first patch on, one with the reverse
scan's from the last one on, so that no pass sees what it predicts. They share norms and projections. On
photographs the neighbour of 16 pixels is too easy: there, a decoder predicts clusters of patches, as in ARM
(arXiv 2406.07537), which has the forward direction alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn.inputs import checked_images
from ..nn.readout import patches_of
from ..utils.arguments import boolean, integer, real
from .clusters import ClusterDecoder, cluster_order
from .patches import checked_backbone, normalised, patches, restored, unpatched

# The reverse scan's weights, under the names that a block of one direction has.
_REVERSE = {
    "mixer.A_b_log": "mixer.A_log",
    "mixer.D_b": "mixer.D",
    "mixer.conv1d_b.": "mixer.conv1d.",
    "mixer.x_proj_b.": "mixer.x_proj.",
    "mixer.dt_proj_b.": "mixer.dt_proj.",
}


class NextPatch(nn.Module):
    """Predicts pixels of the next patch by the forward scans, and of the one before by the reverse scans.

    loss = half of mean |f_t - y_(t+1)|^2 over t < J - 1, plus half of mean |g_t - y_(t-1)|^2 over t > 0.

    Args:
        backbone: `VisionMamba` without a head, stride as its patches, directions="ssm_conv", no rotary
            positions, no dropout. Everything but a class token is trained.
        norm_target, norm_floor: as for `MaskedImages`.
        cluster: side, in patches, of what is predicted at a time; more than 1 takes the decoder, and patches
            are scanned cluster by cluster.
        decoder_dim, decoder_depth: width and blocks of the decoder.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    order: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        norm_target: bool = False,
        norm_floor: float = 1e-6,
        cluster: int = 1,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
    ) -> None:
        super().__init__()
        self.backbone = checked_backbone("NextPatch", backbone)
        config = self.backbone._config
        if config.directions != "ssm_conv":
            raise ValueError(f"[NextPatch] backbone: expected directions ssm_conv, got {config.directions}")
        if config.rope:
            raise ValueError("[NextPatch] backbone: rotary positions are not supported, got rope=True")
        if self.backbone._config.drop_rate or self.backbone._config.drop_path_rate:
            raise ValueError("[NextPatch] backbone: expected drop_rate and drop_path_rate 0")
        for name, parameter in self.backbone.named_parameters():
            if name.startswith(("cls_token", "pos_embed_cls")):
                parameter.requires_grad_(False)  # it is no patch; DDP would wait for its gradient
        self.norm_target = boolean("[NextPatch] norm_target", norm_target)
        self.norm_floor = real("[NextPatch] norm_floor", norm_floor)
        self.cluster = integer("[NextPatch] cluster", cluster, 1)
        pixels = config.in_chans * config.patch_size**2
        if self.cluster == 1:
            self.register_buffer("order", None)
            self.predict_next = nn.Linear(config.embed_dim, pixels)
            self.predict_previous = nn.Linear(config.embed_dim, pixels)
            return
        order = cluster_order("NextPatch", config.grid, self.cluster)
        self.register_buffer("order", order, persistent=False)
        width = integer("[NextPatch] decoder_dim", decoder_dim, 1)
        blocks = integer("[NextPatch] decoder_depth", decoder_depth, 1)
        if blocks > config.depth:
            raise ValueError(f"[NextPatch] decoder_depth: expected at most {config.depth}, got {blocks}")
        size = self.cluster**2
        self.depths = [round((i + 1) * config.depth / blocks) - 1 for i in range(blocks)]
        self.decode_next, self.decode_previous = (
            ClusterDecoder(config.embed_dim, len(order), size, width, blocks, pixels, reverse=reverse)
            for reverse in (False, True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss of images (B, C, H, W), normalised."""
        y = patches(images, self.backbone._config.patch_size)
        y = normalised(y, self.norm_floor) if self.norm_target else y
        if self.order is not None:
            y = y[:, self.order]
        step = self.cluster**2
        following, previous = self._predictions(images)
        ahead = (following[:, :-step] - y[:, step:]).square().mean()
        behind = (previous[:, step:] - y[:, :-step]).square().mean()
        return (ahead + behind) / 2

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g), each (B, J, P): at t, patch t + 1 from those up to t, and patch t - 1 from those from t on.

        With clusters, t counts patches cluster by cluster, and f at t is the patch at the same place of the
        next cluster. Without a neighbour (the last of f, the first of g) a prediction means nothing.
        """
        return self._predictions(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two pictures (B, C, H, W): every patch as predicted from those before it, and from those behind it.

        A patch without any stays as it is; `norm_target` as for `MaskedImages.reconstruct`.
        """
        config, step = self.backbone._config, self.cluster**2
        pixels = patches(images, config.patch_size)
        pixels = pixels if self.order is None else pixels[:, self.order]
        following, previous = self._predictions(images)
        ahead = torch.cat([pixels[:, :step], self._coloured(following[:, :-step], pixels[:, step:])], 1)
        behind = torch.cat([self._coloured(previous[:, step:], pixels[:, :-step]), pixels[:, -step:]], 1)
        if self.order is not None:
            back = self.order.argsort()
            ahead, behind = ahead[:, back], behind[:, back]
        return unpatched(ahead, config), unpatched(behind, config)

    def _coloured(self, found: Tensor, pixels: Tensor) -> Tensor:
        """Predictions with mean and deviation of the true patches, where they are relative to these."""
        return restored(found, pixels, self.norm_floor) if self.norm_target else found.to(pixels.dtype)

    def _predictions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._embedded(images)
        if self.order is None:
            (f,), (g,) = (self._encoded(tokens, reverse, [-1]) for reverse in (False, True))
            return self.predict_next(f), self.predict_previous(g)
        tokens = tokens[:, self.order]
        ahead = self.decode_next(self._encoded(tokens, False, self.depths))
        behind = self.decode_previous(self._encoded(tokens, True, self.depths))
        return ahead, behind

    def _embedded(self, images: Tensor) -> Tensor:
        """Patches with their positions, (B, J, D), without class token."""
        backbone, config = self.backbone, self.backbone._config
        proj = backbone.patch_embed.proj
        images = checked_images(images, proj.weight, config, False)
        pixels = patches(images, config.patch_size)
        tokens = F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        if config.pos_embed:
            own = config.class_token == "registers"  # they have a table of their own
            tokens = tokens + (backbone.pos_embed if own else patches_of(backbone.pos_embed, config))
        return tokens

    def _encoded(self, tokens: Tensor, reverse: bool, layers: list[int]) -> list[Tensor]:
        """Normalised sums (B, J, D) of the residual stream after these layers, of a pass in one direction."""
        backbone, config = self.backbone, self.backbone._config
        wanted = {layer % config.depth for layer in layers}
        h, residual, found = tokens, None, {}
        for i, layer in enumerate(backbone.layers):
            weights = _of_direction(dict(layer.named_parameters()), reverse)
            h, residual = ops.vim_block(
                h,
                weights,
                residual,
                directions="none",
                norm=config.norm,
                norm_eps=config.norm_eps,
                reverse=reverse,
                memory=backbone.memory,
            )
            if i in wanted:
                found[i] = self._normed(h + residual)
        return [found[layer % config.depth] for layer in layers]

    def _normed(self, x: Tensor) -> Tensor:
        norm, config = self.backbone.norm_f, self.backbone._config
        if config.norm == "rms":
            found = ops.rms_norm(x, norm.weight, eps=config.norm_eps)
        else:
            found = ops.layer_norm(x, norm.weight, norm.bias, eps=config.norm_eps)
        assert isinstance(found, Tensor)
        return found


def _of_direction(weights: Mapping[str, Tensor], reverse: bool) -> dict[str, Tensor]:
    """A block's weights for one scan, under the names that a block of one direction has."""
    found = {name: value for name, value in weights.items() if not name.startswith(tuple(_REVERSE))}
    if reverse:
        for name, value in weights.items():
            for suffixed, plain in _REVERSE.items():
                if name.startswith(suffixed):
                    found[plain + name.removeprefix(suffixed)] = value
    return found
