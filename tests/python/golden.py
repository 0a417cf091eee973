# SPDX-License-Identifier: Apache-2.0
"""The files in tests/golden: values of the authors' code, their constructor arguments in our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reference import Config
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(f.stem for f in FOLDER.glob("*.safetensors"))


@dataclass
class Golden:
    """One file. Gradients are those of sum(logits * probe)."""

    config: Config
    weights: dict[str, Tensor]  # float32
    input: Tensor  # (B, 3, H, W) float32
    probe: Tensor  # (B, 10) float32
    logits: Tensor  # (B, 10) float64
    grads: dict[str, Tensor]  # float32, per parameter and "input"


def config_from(metadata: Mapping[str, str]) -> Config:
    """The authors' constructor arguments (text values) as a configuration of ours."""
    known = {
        "img_size", "patch_size", "stride", "num_classes", "embed_dim", "depth", "d_state", "rms_norm",
        "bimamba_type",
        "if_bidirectional", "if_cls_token", "use_middle_cls_token", "use_double_cls_token", "final_pool_type",
        "if_divide_out", "if_rope", "if_rope_residual", "pt_hw_seq_len", "init_layer_scale", "drop_path_rate",
        "residual_in_fp32", "fused_add_norm",
    }  # fmt: skip
    if unknown := set(metadata) - known:
        raise ValueError(f"golden metadata: unknown arguments {sorted(unknown)}")

    def flag(name: str, default: bool) -> bool:
        return {"True": True, "False": False}[metadata.get(name, str(default))]

    kind = metadata.get("bimamba_type", "v2")
    directions = {
        "none": "block" if flag("if_bidirectional", False) else "none",
        "v1": "ssm",
        "v2": "ssm_conv",
    }[kind]
    if not flag("if_cls_token", True):
        class_token = "none"
    elif flag("use_double_cls_token", False):
        class_token = "double"
    else:
        class_token = "middle" if flag("use_middle_cls_token", True) else "head"
    scale = metadata.get("init_layer_scale")
    return Config(
        img_size=int(metadata["img_size"]),
        patch_size=int(metadata["patch_size"]),
        stride=int(metadata["stride"]),
        num_classes=int(metadata["num_classes"]),
        embed_dim=int(metadata["embed_dim"]),
        depth=int(metadata["depth"]),
        d_state=int(metadata.get("d_state", "16")),
        directions=directions,
        average_directions=flag("if_divide_out", True),
        class_token=class_token,
        pool={"none": "last"}.get(pool := metadata.get("final_pool_type", "none"), pool),
        norm="rms" if flag("rms_norm", True) else "layer",
        rope=flag("if_rope", False),
        rope_residual=flag("if_rope_residual", False),
        rope_grid=int(metadata.get("pt_hw_seq_len", "14")),
        layer_scale=None if scale is None else float(scale),
        drop_path_rate=float(metadata.get("drop_path_rate", "0.1")),
    )


def load(name: str) -> Golden:
    """Reads tests/golden/<name>.safetensors."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        config = config_from(file.metadata())

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    grads = under("grad.") | {"input": tensors["input_grad"]}
    return Golden(config, under("weights."), tensors["input"], tensors["probe"], tensors["logits"], grads)


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in float64; b is the truth. Zero against zero is 0."""
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm().item()
    error = (a - b).norm().item()
    return error if norm == 0 else error / norm
