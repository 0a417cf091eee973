# SPDX-License-Identifier: Apache-2.0
"""Optional dependencies: how to install those that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def needs(extra: str) -> str:
    """How to install the packages of an extra, or several, of pyproject.toml: torch, demo, train, export ...

    vimcore is in no package registry, so it is named by its folder.
    """
    return f"install it with: pip install '.[{extra}]' in a checkout of vimcore"


@contextmanager
def required(feature: str, extra: str) -> Iterator[None]:
    """Within it, importing a package that is missing raises an error that says how to install it.

    Raises:
        RuntimeError: names the feature, the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith("vimcore"):
            raise
        raise RuntimeError(f"{feature} needs {package}; {needs(extra)}") from error
