# SPDX-License-Identifier: Apache-2.0
"""Writes python/vimcore/_core.pyi, the types of the extension module, from what the bindings tell.

    python python/src/stub.py            # with the extension installed, or linked into python/vimcore
    python python/src/stub.py --check    # exit status 1 where the file is not what the bindings tell

Needs nanobind and ruff, as tests/constraints.txt pins them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import vimcore
from nanobind.stubgen import StubGen

STUB = Path(__file__).resolve().parent.parent / "vimcore" / "_core.pyi"
HEADER = """# SPDX-License-Identifier: Apache-2.0
# The extension module, private to the package. Written by python/src/stub.py, not by hand.
from os import PathLike
from typing import Any, TypeAlias

"""
ALIASES = """
Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
Array: TypeAlias = Any  # contiguous: a numpy array, a torch tensor or a DLPack capsule

__version__: str
"""


def stub() -> str:
    """The text that the file should have."""
    generator = StubGen(module=vimcore._core)
    generator.put(vimcore._core)
    text = generator.get()
    text = text.replace("Annotated[NDArray, dict(writable=False)]", "Array")
    text = re.sub(r"(?<!import )\bNDArray\b(?!\[)", "Array", text)
    text = re.sub(r"Annotated\[(NDArray\[\w+\.\w+\]), dict\([^\]]*\)\]", r"\1", text)
    text = text.replace("path: object", "path: Path")
    head, body = re.split(r"\n(?=class |def )", text, maxsplit=1)
    return _formatted(HEADER + head + ALIASES + body)


def _formatted(text: str) -> str:
    ruff = [sys.executable, "-m", "ruff"]
    name = ["--quiet", "--stdin-filename", str(STUB), "-"]
    for command in (["check", "--fix", "--select", "I,F401"], ["format"]):
        done = subprocess.run(
            [*ruff, *command, *name], input=text, capture_output=True, text=True, check=True
        )
        text = done.stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    text = stub()
    if args.check:
        if STUB.read_text() == text:
            return 0
        print(f"{STUB} is not what the bindings tell: run python python/src/stub.py", file=sys.stderr)
        return 1
    STUB.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
