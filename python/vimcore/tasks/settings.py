# SPDX-License-Identifier: Apache-2.0
"""What every run can be told, once: keys of the TOML file, flags of the command line, defaults.

A task adds its own by a subclass. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..utils.files import literal
from ..utils.options import MOST_THREADS

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_PROCESSES = MOST_THREADS  # that load images


def key(section: str, default: Any, text: str, choices: tuple[str, ...] = (), later: bool = False) -> Any:
    """A field of settings.

    Args:
        section: of the TOML file.
        later: not in the files of the first runs; its default is what they did.
    """
    metadata = {"section": section, "help": text, "choices": choices, "later": later}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Settings:
    """A run. The defaults are the authors' released script for the tiny model; None: decided by the rest.

    Raises:
        ValueError: names the key, what was expected and what was given.
    """

    SECTIONS: ClassVar[tuple[str, ...]] = (
        "model",
        "data",
        "augmentation",
        "optimizer",
        "schedule",
        "run",
        "task",
    )

    model: str = key("model", "vim_tiny_patch16_224", "size by name, see vimcore.list_models()")
    init: str | None = key(
        "model", None, "weights to start from: .safetensors, .pth, or a name of `vimcore download`"
    )
    init_weights: str = key("model", "model", "which weights of a .pth", ("model", "ema"))
    pos_embed: str = key("model", "correct", "how init's position table is resized", ("correct", "authors"))
    img_size: tuple[int, ...] | None = key("model", None, "pixels: side, or height and width")
    patch_size: int | None = key("model", None, "pixels")
    stride: int | None = key("model", None, "pixels from patch to patch; 8: long sequences")
    in_chans: int | None = key(
        "model", None, "channels: 3 for pictures, 1 reads them grey, .npy as they have"
    )
    embed_dim: int | None = key("model", None, "width D")
    depth: int | None = key("model", None, "blocks")
    directions: str | None = key("model", None, "none, sequence, block, ssm, ssm_conv")
    class_token: str | None = key("model", None, "none, head, double, middle, random, registers")
    pool: str | None = key("model", None, "without class token: mean, max, last")
    drop_rate: float = key("model", 0.0, "dropout of the tokens")
    drop_path_rate: float = key("model", 0.0, "of the last block, growing from 0 at the first")
    set: tuple[str, ...] = key("model", (), "further arguments of VisionMamba, KEY=VALUE each")
    memory: str = key("model", "lean", "what backward keeps", ("least", "lean", "fast"))

    data: str | None = key(
        "data",
        None,
        "folder of class folders (or of train/ and val/), CSV or TSV list, digits, or a data set by timm: "
        "tar:FILE, hfds/NAME[#SPLIT], torch/NAME:FOLDER[#SPLIT]",
    )
    val: str | None = key("data", None, "the same for validation")
    val_fraction: float = key("data", 0.1, "held out where there is no validation data; of classes: of each")
    mean: tuple[float, ...] | None = key(
        "data", None, "of each channel, values 0 to 1; default ImageNet's, grey 0.5"
    )
    std: tuple[float, ...] | None = key("data", None, "likewise; for .npy both are measured")
    workers: int = key("data", 2, "processes that load images; 0: none, changes no result")

    repeats: int = key("augmentation", 3, "repeated augmentation: times an image stands in the order; 1: off")

    batch_size: int = key("optimizer", 128, "images of one process and forward pass")
    accumulate: int = key("optimizer", 1, "forward passes to one update")
    lr: float = key("optimizer", 5e-4, "peak learning rate, for lr_batch images an update if scale_lr")
    scale_lr: bool = key("optimizer", True, "multiply lr by images of an update / lr_batch")
    lr_batch: int = key("optimizer", 512, "see scale_lr")
    opt: str = key("optimizer", "adamw", "any optimizer that timm knows by name", later=True)
    betas: tuple[float, ...] | None = key(
        "optimizer", None, "of AdamW and its kin; default: the optimizer's", later=True
    )
    weight_decay: float = key("optimizer", 0.1, "of the optimizer")
    decay: str = key("optimizer", "authors", "mamba exempts A_log too", ("authors", "mamba"))
    layer_decay: float | None = key(
        "optimizer", None, "learning rate of a block over that of the next one; not set: the same for all"
    )
    clip_grad: float | None = key("optimizer", None, "largest norm of the gradient")
    ema: float = key("optimizer", 0.99996, "decay of the averaged weights; 0: none")
    ema_ramp: bool = key(
        "optimizer", False, "let a young average forget faster; on where ema is given without it"
    )
    precision: str = key(
        "optimizer", "float32", "of activations; float16 on CUDA only", ("float32", "bfloat16", "float16")
    )

    epochs: int = key("schedule", 300, "passes over the training images")
    updates: int | None = key(
        "schedule", None, "length of the run in updates; epochs follow from it", later=True
    )
    schedule: str = key(
        "schedule",
        "cosine",
        "of the learning rate; poly and steps move at each update",
        ("cosine", "constant", "poly", "steps"),
    )
    poly_power: float = key("schedule", 1.0, "poly: of the share of the run that is left", later=True)
    milestones: tuple[float, ...] = key(
        "schedule", (8 / 9, 26 / 27), "steps: shares of the run after which lr is a tenth", later=True
    )
    schedule_steps: str = key(
        "schedule", "authors", "when it moves: authors' is one epoch late", ("authors", "epoch", "update")
    )
    warmup_epochs: float = key(
        "schedule", 5, "of growth from warmup_lr; not set: at most a tenth of a run shorter than its preset"
    )
    warmup_updates: int | None = key(
        "schedule",
        None,
        "the same in updates, instead of warmup_epochs; at most a tenth of a run whose length is in epochs",
        later=True,
    )
    warmup_share: float | None = key(
        "schedule", None, "the same as a share of the run, instead of both", later=True
    )
    warmup_lr: float = key("schedule", 1e-6, "where warm-up starts, never scaled")
    warmup_factor: float = key(
        "schedule",
        1e-6,
        "poly, steps: warm-up starts at this share of the rate, not at warmup_lr",
        later=True,
    )
    min_lr: float = key("schedule", 1e-5, "where the cosine ends, never scaled")

    device: str = key("run", "auto", "cpu, cuda, cuda:N; auto: cuda where this build can use it")
    threads: int | None = key("run", None, "of the CPU; default: torch's choice, changes no result")
    seed: int = key("run", 0, "same seed, same run")
    eval_every: int = key("run", 1, "epochs")
    checkpoint_every: int = key("run", 500, "updates")
    log_every: int = key("run", 10, "updates")
    track: tuple[str, ...] | None = key(
        "run",
        None,
        "also log to tensorboard, wandb, mlflow, ...; none; default: tensorboard where it is installed",
    )

    task: str = key("task", "classify", "what is learnt", later=True)

    def __post_init__(self) -> None:
        if self.task == "classification":  # as runs of version 0.2 have it
            self.task = "classify"
        types = typing.get_type_hints(type(self))
        for field in fields(self):
            value = _converted(field.name, getattr(self, field.name), types[field.name])
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
            setattr(self, field.name, value)
        self._check_ranges()

    def _check_ranges(self) -> None:
        positive = ("batch_size", "accumulate", "lr_batch", "epochs", "eval_every", "checkpoint_every")
        for name in (*positive, "log_every", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("updates", "warmup_updates"):
            value = getattr(self, name)
            if value is not None and value < (name == "updates"):
                raise ValueError(f"{name}: expected at least {int(name == 'updates')}, got {value}")
        self._check_schedule()
        if not self.lr > 0:
            raise ValueError(f"lr: expected more than 0, got {self.lr}")
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("ema", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 or more and less than 1, got {getattr(self, name)}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected more than 0 and at most 1, got {self.layer_decay}")
        if self.betas is not None and not (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)):
            raise ValueError(f"betas: expected 2 numbers from 0 and less than 1, got {self.betas}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad: expected more than 0, got {self.clip_grad}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads: expected 1 to {MOST_THREADS}, got {self.threads}")
        if self.workers > MOST_PROCESSES:
            raise ValueError(f"workers: expected 0 to {MOST_PROCESSES}, got {self.workers}")
        if self.img_size is not None and len(self.img_size) not in (1, 2):
            raise ValueError(f"img_size: expected 1 or 2 numbers, got {self.img_size}")
        for field in fields(self):
            for value in _items(getattr(self, field.name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{field.name}: expected a finite number, got {value}")
                if isinstance(value, str) and not _is_utf8(value):
                    raise ValueError(f"{field.name}: expected text in UTF-8, got {literal(value)}")

    def _check_schedule(self) -> None:
        by_update = {"poly and steps move": self.schedule in ("poly", "steps")}
        by_update["warmup_updates counts"] = self.warmup_updates is not None
        for what, used in by_update.items():
            if used and self.schedule_steps != "update":
                raise ValueError(
                    f"schedule_steps: {what} by updates, got {self.schedule_steps}; "
                    "add --schedule-steps update"
                )
        if self.warmup_share is not None:
            if not 0 <= self.warmup_share < 1:
                raise ValueError(f"warmup_share: expected 0 or more and less than 1, got {self.warmup_share}")
            if self.warmup_updates is not None:
                raise ValueError(
                    "warmup_share, warmup_updates: both give the length of warm-up; name one of them"
                )
        if not 0 < self.warmup_factor <= 1:
            raise ValueError(f"warmup_factor: expected more than 0 and at most 1, got {self.warmup_factor}")
        if not self.poly_power > 0:
            raise ValueError(f"poly_power: expected more than 0, got {self.poly_power}")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones: expected shares between 0 and 1, got {self.milestones}")

    def merged(self, changes: Mapping[str, Any]) -> Self:
        """These settings with other values of some keys; ValueError names a key that does not exist."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
                hint = f"; close to it: {', '.join(close)}" if close else ""
                raise ValueError(f"{name}: there is no such setting{hint}")
        return dataclasses.replace(self, **changes)

    def to_toml(self) -> str:
        """The settings as a TOML file; what is None stands there as a comment."""
        lines = []
        for section in self.SECTIONS:
            lines.append(f"[{section}]")
            for field in fields(self):
                if field.metadata["section"] == section:
                    value = getattr(self, field.name)
                    text = "# " + field.name if value is None else f"{field.name} = {_toml(value)}"
                    lines.append(f"{text:<36}  # {field.metadata['help']}")
            lines.append("")
        return "\n".join(lines)


def read_toml(path: str, kind: type[Settings] = Settings) -> dict[str, Any]:
    """Keys and values of a TOML file, in their section or in none.

    Args:
        kind: whose sections there may be.

    Raises:
        ValueError: says what is wrong with it.
    """
    with open(path, "rb") as file:
        try:
            content = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from None
    section_of = {field.name: field.metadata["section"] for field in fields(kind)}
    found: dict[str, Any] = {}
    for name, value in content.items():
        if not isinstance(value, dict):
            found[name] = value
        elif name not in kind.SECTIONS:
            raise ValueError(f"{path}: [{name}]: expected one of the sections {', '.join(kind.SECTIONS)}")
        else:
            for key, inner in value.items():
                if section_of.get(key, name) != name:
                    raise ValueError(f"{path}: [{name}] {key}: belongs to [{section_of[key]}]")
                found[key] = inner
    return found


def _toml(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".en") else text + ".0"
    # JSON writes strings, integers, booleans and lists TOML's way as well, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _converted(name: str, value: Any, wanted: Any) -> Any:
    """The value in the type of the field: an integer passes as a float, one number as a list of it."""
    kinds = typing.get_args(wanted) if type(None) in typing.get_args(wanted) else (wanted,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_converted(name, item, inner) for item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}")
    return value
