# SPDX-License-Identifier: Apache-2.0
"""Modules: `VisionMamba` and the networks of published sizes."""

from .vision_mamba import Network, VisionMamba

__all__ = ["Network", "VisionMamba"]
