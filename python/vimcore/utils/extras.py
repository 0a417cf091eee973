# SPDX-License-Identifier: Apache-2.0
"""How to get what an optional part of vimcore needs."""

from __future__ import annotations


def needs(extra: str) -> str:
    """What to do where a package of `extra` (torch, demo, train, track, test or bench) is not installed.

    vimcore is in no package registry, so it is named by its folder.
    """
    return f"install it with: pip install '.[{extra}]' in a checkout of vimcore"
