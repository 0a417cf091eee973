# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is one of this very run: all of it is looked at before any of it is taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..tasks.task import Metric
from ..utils.files import listed, shortened

_KEYS = ("format", "model", "average", "optimizer", "scaler", "step", "epoch", "done", "best", "identity")
_GROUP = ("params", "lr", "lr_scale", "betas", "eps", "weight_decay")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW


@dataclass(frozen=True)
class Expected:
    """What this run would write if it were at its start: tensors of the right shapes, and its lengths."""

    model: Mapping[str, Tensor]
    average: Sequence[Tensor] | None
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    parameters: Sequence[Tensor]  # in the order of the optimizer
    epochs: int
    updates: int
    updates_per_epoch: int
    identity: Mapping[str, Any]
    metrics: Sequence[Metric]
    by_updates: bool = False  # the length of the run is in updates, and its last epoch may be a part of one
    adamw: bool = True  # torch's own, whose state is known in detail


def check(path: Path, saved: Mapping[str, Any], expected: Expected) -> None:
    """Looks at everything.

    Raises:
        ValueError: names file, field, what was expected and what is there.
    """
    _Checker(path).run(saved, expected)


def cut_short(saved: Mapping[str, Any], per_epoch: int) -> bool:
    """Whether the run ended in the middle of its last epoch, which a longer one completes."""
    step, whole = saved["step"], saved["epoch"] * per_epoch
    return type(step) is int and saved["done"] == 0 and whole - per_epoch < step < whole


class _Checker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, saved: Mapping[str, Any], expected: Expected) -> None:
        self._keys("checkpoint", saved, _KEYS)
        self._identity(saved["identity"], expected.identity)
        self._place(saved, expected)
        self._tensors("model", saved["model"], expected.model)
        if expected.average is None or saved["average"] is None:
            if saved["average"] is not expected.average:
                wanted = "None (ema is 0)" if expected.average is None else "averaged weights (ema is not 0)"
                self._wrong("average", wanted, _shown(saved["average"]))
        else:
            average = self._list("average", saved["average"], len(expected.average))
            self._tensors("average", dict(enumerate(average)), dict(enumerate(expected.average)))
        self._optimizer(saved["optimizer"], expected, saved["step"])
        self._scaler(saved["scaler"], expected.scaler)
        last = saved["epoch"] + expected.by_updates  # the best may be of a part of one
        self._best(saved["best"], last, expected.metrics)

    # ---- parts ---------------------------------------------------------------------------------------------

    def _identity(self, value: Any, now: Mapping[str, Any]) -> None:
        self._keys("identity", value, tuple(now))
        others = {"images": "other images to learn from", "per_update": "another number an update"}
        for name, what in others.items():
            if type(value[name]) is not type(now[name]):
                self._wrong(f"identity.{name}", type(now[name]).__name__, _shown(value[name]))
            if value[name] != now[name]:
                raise ValueError(
                    f"{self.path.parent}: cannot go on with {what} than the checkpoint's "
                    f"({_shown(value[name])}, now {now[name]})"
                )

    def _place(self, saved: Mapping[str, Any], expected: Expected) -> None:
        per_epoch, updates = expected.updates_per_epoch, expected.updates
        epoch = self._integer("epoch", saved["epoch"], 0, expected.epochs)
        before = min(epoch * per_epoch, updates)
        done = self._integer("done", saved["done"], 0, min(per_epoch, updates - before))
        step = before + done
        if expected.by_updates and cut_short(saved, per_epoch):
            step = saved["step"]
        if self._integer("step", saved["step"], 0, updates) != step:
            self._wrong(
                "step", f"{step}, of epoch {epoch} and {done} updates of {per_epoch}", _shown(saved["step"])
            )

    def _optimizer(self, value: Any, expected: Expected, step: int) -> None:
        self._keys("optimizer", value, tuple(expected.optimizer))
        own_groups = expected.optimizer["param_groups"]
        groups = self._list("optimizer.param_groups", value["param_groups"], len(own_groups))
        for i, (group, own) in enumerate(zip(groups, own_groups)):
            field = f"optimizer.param_groups[{i}]"
            # a later torch may have options that this group was saved without: they have their defaults
            wanted_keys = tuple(name for name in own if name in group or name in _GROUP)
            self._keys(field, group, wanted_keys)
            for name, wanted in own.items():
                if name not in group:
                    continue
                if name == "lr":
                    self._number(f"{field}.lr", group[name], 0, math.inf)
                elif not expected.adamw and name not in _GROUP:
                    continue  # other optimizers count there
                elif type(group[name]) is not type(wanted) or group[name] != wanted:
                    self._wrong(f"{field}.{name}", _shown(wanted), _shown(group[name]))
        state, count = value["state"], len(expected.parameters)
        skips = bool(expected.scaler)  # updates of float16 that overflowed
        begun = step > 0 and not (skips and state == {})
        if not expected.adamw:
            self._state(state, count)
            return
        self._keys("optimizer.state", state, tuple(range(count)) if begun else ())
        for i, moments in state.items():
            field = f"optimizer.state[{i}]"
            self._keys(field, moments, _MOMENTS)
            own = expected.parameters[i]
            self._tensors(field, moments, {"step": torch.zeros(()), "exp_avg": own, "exp_avg_sq": own})
            made = moments["step"].item()
            if not (0 < made <= step if skips else made == step):
                self._wrong(f"{field}.step", f"{step}", _shown(made))
            if bool((moments["exp_avg_sq"] < 0).any()):
                self._wrong(
                    f"{field}.exp_avg_sq", "no value below 0", _shown(moments["exp_avg_sq"].min().item())
                )

    def _state(self, state: Any, count: int) -> None:
        """Of an optimizer that is not known in detail."""
        if not isinstance(state, dict):
            self._wrong("optimizer.state", "a dictionary", _shown(state))
        for i, values in state.items():
            field = f"optimizer.state[{i}]"
            if type(i) is not int or not 0 <= i < count or not isinstance(values, dict):
                self._wrong(field, f"a dictionary, of one of {count} parameters", _shown(values))
            for name, value in values.items():
                if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                    self._wrong(f"{field}.{name}", "finite numbers", f"{_shown(value)} with others")

    def _scaler(self, value: Any, own: Mapping[str, Any]) -> None:
        self._keys("scaler", value, tuple(own))
        for name, wanted in own.items():
            if name in ("scale", "_growth_tracker"):  # what changes
                self._number(f"scaler.{name}", value[name], 1e-30 if name == "scale" else 0, math.inf)
            elif value[name] != wanted:
                self._wrong(f"scaler.{name}", _shown(wanted), _shown(value[name]))

    def _best(self, value: Any, epoch: int, metrics: Sequence[Metric]) -> None:
        if value == {}:
            return
        self._keys("best", value, (*(metric.name for metric in metrics), "epoch", "weights"))
        for metric in metrics:
            self._number(f"best.{metric.name}", value[metric.name], metric.low, metric.high)
        self._integer("best.epoch", value["epoch"], 1, epoch)
        if value["weights"] not in ("raw", "ema"):
            self._wrong("best.weights", "raw or ema", _shown(value["weights"]))

    # ---- kinds of value ------------------------------------------------------------------------------------

    def _keys(self, field: str, value: Any, wanted: tuple[Any, ...]) -> None:
        if not isinstance(value, dict):
            self._wrong(field, "a dictionary", _shown(value))
        missing = [key for key in wanted if key not in value]
        strange = [key for key in value if key not in wanted]
        for found, what in ((missing, "missing"), (strange, "not expected")):
            if found:
                names = listed([_shown(key) for key in found])
                raise ValueError(f"{self.path}: {field}: {what}: {names}")

    def _list(self, field: str, value: Any, length: int) -> list[Any]:
        if not isinstance(value, list) or len(value) != length:
            given = f"one of {len(value)}" if isinstance(value, list) else _shown(value)
            self._wrong(field, f"a list of {length}", given)
        return list(value)

    def _integer(self, field: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            self._wrong(field, f"a whole number from {low} to {high}", _shown(value))
        return int(value)

    def _number(self, field: str, value: Any, low: float, high: float) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            span = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            self._wrong(field, f"a finite number, {span}", _shown(value))

    def _tensors(self, field: str, value: Any, wanted: Mapping[Any, Tensor]) -> None:
        self._keys(field, value, tuple(wanted))
        for key, own in wanted.items():
            name, tensor = f"{field}.{key}", value[key]
            plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
            if (
                not plain
                or tensor.device.type != "cpu"
                or tensor.shape != own.shape
                or tensor.dtype != own.dtype
            ):
                self._wrong(name, _shown(own), _shown(tensor))
            if not bool(tensor.isfinite().all()):
                self._wrong(name, "finite numbers", f"{int((~tensor.isfinite()).sum())} that are not")

    def _wrong(self, field: str, wanted: str, given: str) -> NoReturn:
        raise ValueError(f"{self.path}: {field}: expected {wanted}, got {given}")


def _shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device.type}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}"
    return shortened(repr(value), 60)
