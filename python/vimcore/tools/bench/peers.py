# SPDX-License-Identifier: Apache-2.0
"""The peers of `vimcore bench`: networks that live in tests/bench of a source checkout."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def peers_folder(given: Path | None) -> Path | None:
    """The folder given, or tests/bench of the checkout around this file or the current folder."""
    if given is not None:
        if not (given / "deit.py").is_file():
            raise FileNotFoundError(f"--peers-dir {given}: no deit.py there")
        return given
    for root in (Path(__file__).resolve().parents[4], Path.cwd()):
        if (root / "tests" / "bench" / "deit.py").is_file():
            return root / "tests" / "bench"
    return None


def load_module(folder: Path, name: str) -> ModuleType:
    """The module folder/name.py."""
    spec = importlib.util.spec_from_file_location(f"vimcore_bench_{name}", folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what exporters say about packages and versions, which plays no part here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
