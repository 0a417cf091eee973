# SPDX-License-Identifier: Apache-2.0
"""Networks for other programs: ONNX, OpenVINO and torch.export files, checked against the core."""

from __future__ import annotations

from .files import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
