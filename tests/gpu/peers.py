# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels of the peers from their source packages, for the GPU here only.

    python tests/gpu/peers.py --source FOLDER --build FOLDER

FOLDER of --source holds PyPI's `mamba_ssm-2.*.tar.gz` and, if wanted, `causal_conv1d-1.*.tar.gz`. Only their
CUDA extensions are built, `selective_scan_cuda` and `causal_conv1d_cuda`, with the flags of their setup.py;
each goes to a folder of its name below --build, where `add_to_path` finds it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Extension: pattern of the source package, folder of its sources.
EXTENSIONS = {
    "selective_scan_cuda": ("mamba_ssm-*.tar.gz", "csrc/selective_scan"),
    "causal_conv1d_cuda": ("causal_conv1d-*.tar.gz", "csrc"),
}
NVCC_FLAGS = [
    "-O3",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
]


def add_to_path(build: Path) -> None:
    """Makes the extensions below `build` importable; torch must have been imported."""
    for name in EXTENSIONS:
        if (build / name / f"{name}.so").is_file():
            sys.path.insert(0, str(build / name))


def unpack(source: Path, pattern: str, into: Path) -> Path | None:
    """The folder of the newest package that matches, or None."""
    packages = sorted(source.glob(pattern))
    if not packages:
        return None
    shutil.rmtree(into, ignore_errors=True)
    with tarfile.open(packages[-1]) as archive:
        # Python before 3.11.4 and 3.10.12 knows no filters
        archive.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return into / packages[-1].name.removesuffix(".tar.gz")


def build(name: str, source: Path, target: Path) -> str:
    """Builds one extension into target/name; returns a line that says what happened."""
    from torch.utils import cpp_extension

    pattern, folder = EXTENSIONS[name]
    package = unpack(source, pattern, target / "source" / name)
    if package is None:
        return f"{name}: no {pattern} in {source}: this peer is left out"
    sources = sorted(str(p) for p in (package / folder).iterdir() if p.suffix in {".cpp", ".cu"})
    where = target / name
    where.mkdir(parents=True, exist_ok=True)
    (where / "lock").unlink(
        missing_ok=True
    )  # of a build that was killed: the next would wait for it for ever
    cpp_extension.load(
        name=name,
        sources=sources,
        extra_cflags=["-O3"],
        extra_cuda_cflags=NVCC_FLAGS,
        build_directory=str(where),
    )
    if not (where / f"{name}.so").is_file():
        raise RuntimeError(f"{name}: {where / f'{name}.so'} was not made")
    return f"{name}: built from {package.name}"


def main() -> int:
    """Builds what it has sources for, side by side; 1 if a build failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--build", type=Path, required=True)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        print("peers: no GPU that torch can use, and no TORCH_CUDA_ARCH_LIST", file=sys.stderr)
        return 1
    status = 0
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, job in [(name, pool.submit(build, name, args.source, args.build)) for name in EXTENSIONS]:
            try:
                print(job.result(), flush=True)
            except Exception as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
