# SPDX-License-Identifier: Apache-2.0
"""What the engine in `vimcore.train` asks of a task: what is learnt, from what, and how good it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .settings import Settings


class Batch(Protocol):
    """A batch as it comes from the loaders; the rest of it is between a task's data and the task.

    Attributes:
        errors: files that could not be read, and why.
    """

    errors: dict[str, str]


@dataclass(frozen=True)
class Data:
    """What a run learns from and is evaluated on. Samples may be of any kind and size.

    Attributes:
        train: samples by (index, seed), and their number; all chance follows from the seed.
        valid: samples by index, and their number; without chance.
        collate: samples to a batch.
        about: a sentence on how many there are and where they come from.
        fingerprint: another one for other training data: a run goes on with the data that it began with.
        passed_over: files that lay between them, by kind.
        valid_batch_size: of evaluation; None: as for training.
        samples: to learn from of each class, where samples have one.
    """

    train: Dataset[Any]
    valid: Dataset[Any]
    collate: Callable[[Sequence[Any]], Batch]
    about: str
    fingerprint: str
    passed_over: Mapping[str, int] = field(default_factory=dict)
    valid_batch_size: int | None = None
    samples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation that is kept with the best weights.

    Attributes:
        name: as in the log.
        label: as in a table.
        low, high: its range.
        larger_is_better: else the smallest is the best.
        percent: a share, shown as such.
    """

    name: str
    label: str
    low: float = 0.0
    high: float = 1.0
    larger_is_better: bool = True
    percent: bool = True

    def text(self, value: float) -> str:
        """For people."""
        return f"{100 * value:.2f} % {self.label}" if self.percent else f"{self.label} {value:.4f}"

    def improves(self, value: float, best: float) -> bool:
        """Whether it is better than the best so far; an equal one is not."""
        return value > best if self.larger_is_better else value < best


@dataclass(frozen=True)
class Scores:
    """Of one evaluation, over the shares of all processes.

    Attributes:
        values: by name, as the log holds them; the task's metrics are among them.
        text: the same for people, in a few words.
        errors: files of this process's share that could not be read.
    """

    values: Mapping[str, float]
    text: str
    errors: dict[str, str] = field(default_factory=dict)


class Task(ABC):
    """What is learnt: one object serves one run.

    The engine calls `data` and `build` once, in this order, then the others as often as it likes. Whatever a
    task draws at random while it trains comes from the global generators, which the engine seeds before each
    update: that makes resumed runs equal bit for bit.

    Attributes:
        metrics: kept with the best weights; the first of them decides which these are.
        files: that `report` writes.
        settings: of the run; `data` replaces them by complete ones, where something follows from the data.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    files: ClassVar[tuple[str, ...]] = ("eval.npz",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def data(self) -> Data:
        """Opens what the settings name.

        Raises:
            ValueError, OSError: it is not there, or does not fit.
        """

    @abstractmethod
    def build(self) -> tuple[nn.Module, list[str]]:
        """The model on the CPU, and what a reader should know about how its weights came about."""

    def layers(self) -> Mapping[str, Any]:
        """Patterns of parameter names from input to output, as timm's `group_matcher`, for layer_decay.

        Those of a bare backbone; what follows its blocks is the last layer, as is what no pattern names.
        """
        return {
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None)],
        }

    def layer_decay(self) -> float | None:
        """Learning rate of one group of `layers` over that of the next; None: the same for all."""
        return self.settings.layer_decay

    @abstractmethod
    def prepare(self, batch: Any, device: torch.device) -> Any:
        """A batch from the training loader as `loss` takes it: on the device, mixed, augmented."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a prepared batch: the scalar to minimise, and further scalars for the log, by name.

        Args:
            model: maybe wrapped for several processes, under autocast where the run is of 16 bits; to be
                called once, as a module.
        """

    def constrain(self, model: nn.Module) -> None:  # noqa: B027  most tasks have nothing to keep
        """Brings weights that have a range back into it, after each update; of the bare model."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, batches: Iterable[Any], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """How good the model is, in eval mode; its mode is restored afterwards.

        Args:
            batches: of this process's share; sums and gathered results of all processes make the scores
                (`vimcore.utils.distributed`), the same in each of them.
            precision: of autocast; float32: none.
        """

    @abstractmethod
    def save(self, model: nn.Module, path: Path) -> None:
        """Writes weights with all that is needed to use them."""

    @abstractmethod
    def load(self, path: Path, device: torch.device) -> nn.Module:
        """The model that `save` wrote."""

    @abstractmethod
    def report(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """Writes what the best model makes of all validation data into the folder of the run; one process."""
