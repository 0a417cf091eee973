# SPDX-License-Identifier: Apache-2.0
"""What files and checks know of a `VisionMamba`: its configuration, its head, its weights."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import Tensor, nn

from .._core import Config
from ..autograd.network import Core

Base = TypeVar("Base", bound="NetworkBase")


class NetworkBase(nn.Module):
    """A network with a configuration."""

    _config: Config
    head: nn.Module
    dynamic_img_size: bool

    @property
    def config(self) -> dict[str, Any]:
        """The architecture: `VisionMamba(**model.config)` builds it again. img_size is [height, width]."""
        return {**self._config.to_dict(), "num_classes": self.num_classes}

    @property
    def num_classes(self) -> int:
        """Classes of the head, 0 without one."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def _weights(self) -> tuple[Core, list[Tensor]]:
        """The core's network, and its parameters in its order."""
        raise NotImplementedError

    @classmethod
    def _of_config(cls: type[Base], config: dict[str, Any]) -> Base:
        """A network of this class and configuration, as far as its constructor takes that."""
        try:
            inspect.signature(cls).bind(**config)
        except TypeError as error:
            raise TypeError(
                f"[VisionMamba] load: {cls.__name__} does not take VisionMamba's options ({error}); make "
                "the network yourself and fill it with vimcore.load_checkpoint(model, path)"
            ) from None
        return cls(**config)
