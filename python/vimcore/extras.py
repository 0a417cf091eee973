# SPDX-License-Identifier: Apache-2.0
"""Optional packages: how to get what an extra of pyproject.toml names."""

from __future__ import annotations


def needs(extra: str) -> str:
    """How to install an extra; vimcore is on no package index, so only a checkout has it."""
    return f"install it with: pip install '.[{extra}]' in a checkout of vimcore"
