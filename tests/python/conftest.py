# SPDX-License-Identifier: Apache-2.0
"""Same seeds and few threads for every test."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from hypothesis import HealthCheck, settings

# The same examples on every run, so that a red test stays red; `--hypothesis-profile=wander` draws new ones.
settings.register_profile(
    "fixed", max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("wander", deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
settings.load_profile("fixed")

# Where the processor has no unit for bfloat16 its kernels are emulated, here and in the processes of tests.
if not vimcore.build_info()["bf16"]:
    os.environ["VIMCORE_ISA"] = vimcore.build_info()["isa"]

# Where several processes share the tests (tests/run.sh), a file is one piece of work: the longest first.
LONG = ["test_gpu_bench", "test_train_run", "test_bench", "test_demo", "test_ablation", "test_processes"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not slow"` does not import files that are slow as a whole."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """For test_shim_*.py: tensors of the CPU pass for tensors on cuda:0 (shim.py); no gradients."""
    import shim

    with torch.no_grad():
        yield shim.pretend(monkeypatch)


@pytest.fixture
def training(gpu: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same with gradients."""
    with torch.enable_grad():
        yield gpu


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For test_vim_infer*.py: a file of weights with labels, not to be changed."""
    from vim_infer import LABELS, save

    return save(tmp_path_factory.mktemp("weights") / "model.safetensors", LABELS)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For test_vim_infer*.py: every kind of file that is read, others, and odd names; not to be changed."""
    from vim_infer import make_pictures

    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """For test_hub_*.py: asked in place of huggingface.co, an empty cache, no waiting between attempts."""
    from hub_server import ask_instead, serving

    with serving() as hub:
        ask_instead(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest.fixture(autouse=True)
def _fixed_state() -> Iterator[None]:
    """Seeds torch, numpy and Python; one thread unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes where it was called from, for GPUs
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  what libraries draw from
    yield
    torch.set_num_threads(threads)
