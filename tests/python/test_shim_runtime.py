# SPDX-License-Identifier: Apache-2.0
"""Runtime and `predict` on CUDA without a GPU (shim.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for
from shim import TOLERANCE, vimcore_shim
from vimcore_shim import cli


@pytest.fixture
def file(tmp_path: Path) -> str:
    build(SMALL).save(tmp_path / "small.safetensors", labels=["a", "b", "c"])
    return str(tmp_path / "small.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NAMES)
def test_runtime_golden(name: str, tmp_path: Path) -> None:
    g = golden.load(name)
    build(g.config, g.weights).save(tmp_path / "model.safetensors")
    runtime = vimcore_shim.Runtime(tmp_path / "model.safetensors", device="cuda")
    for _ in range(3):  # directly, recorded, replayed
        assert relative(torch.from_numpy(runtime(g.input.numpy())), g.logits) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_runtime_types_and_devices(dtype: torch.dtype, file: str) -> None:
    images = images_for(SMALL, 3, torch.float32).numpy()
    wanted = vimcore.Runtime(file)
    runtime = vimcore_shim.Runtime(file, device="cuda:1", dtype=str(dtype).removeprefix("torch."))
    for batch in (3, 1, 3, 0):
        logits, tokens = runtime(images[:batch]), runtime.features(images[:batch])
        assert logits.dtype == tokens.dtype == np.float32
        pairs = ((logits, wanted(images[:batch])), (tokens, wanted.features(images[:batch])))
        for found, truth in pairs:
            assert found.shape == truth.shape
            assert relative(torch.from_numpy(found), torch.from_numpy(truth)) < TOLERANCE[dtype]
    assert np.array_equal(runtime(images)[:1], runtime(images[:1]))
    exact = np.array_equal(runtime(images), vimcore_shim.Runtime(file, device="cuda:1")(images))
    assert exact == (dtype == torch.float32)  # the type asked for is the one that is used


def test_more_images_than_are_taken_at_a_time(file: str) -> None:
    images = images_for(SMALL, 70, torch.float32).numpy()
    runtime = vimcore_shim.Runtime(file, device="cuda", dtype="bfloat16")
    wanted = np.concatenate([runtime(images[i : i + 1]) for i in range(70)])
    for _ in range(3):  # directly, recorded, replayed
        assert np.array_equal(runtime(images), wanted)


def test_runtime_from_several_threads(file: str) -> None:
    images = images_for(SMALL, 2, torch.float32).numpy()
    runtime = vimcore_shim.Runtime(file, device="cuda")
    wanted, found = runtime(images), []

    def call() -> None:
        found.extend(runtime(images) for _ in range(4))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(np.array_equal(wanted, logits) for logits in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:7"}, vimcore_shim.Error, "cuda:7|7"),
        ({"device": "gpu"}, ValueError, "'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ({"device": "cuda", "dtype": "float64"}, ValueError, "'bfloat16' or 'float16' on cuda"),
        ({"device": "cpu", "dtype": "float16"}, ValueError, "expected 'float32' or 'bfloat16' on cpu"),
    ],
)
def test_runtime_errors(file: str, options: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vimcore_shim.Runtime(file, **options)


def test_a_device_that_is_not_there(file: str) -> None:
    """The installed package: no CUDA in the build, or no GPU in the machine; the remedy is named."""
    assert vimcore_shim.cuda_is_available()
    assert "CPU shim" in vimcore_shim.build_info()["cuda"][0]
    if vimcore.cuda_is_available():
        assert vimcore.Runtime(file, device="cuda").config["num_classes"] == 3
        return
    remedy = "VIMCORE_CUDA=ON" if vimcore.build_info()["cuda"] is False else "GPU|driver"
    with pytest.raises(vimcore.Error, match=remedy):
        vimcore.Runtime(file, device="cuda")


FORKED = """
import os, sys
import numpy as np
import vimcore_shim

images = np.zeros((1, 3, 8, 12), np.float32)
runtime = vimcore_shim.Runtime(sys.argv[1], device="cuda")
wanted = runtime(images)
child = os.fork()
if child == 0:
    for call in (lambda: runtime(images), lambda: vimcore_shim.Runtime(sys.argv[1], device="cuda")):
        try:
            call()
        except vimcore_shim.Error as error:
            print(error, flush=True)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert np.array_equal(runtime(images), wanted)
"""


def test_a_process_that_was_forked(file: str) -> None:
    """The child is told what to do instead, by what it has and by what it makes; the parent goes on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORKED, file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('was forked, and the child cannot use it; start processes by "spawn"') == 2


def test_predict_on_the_device(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vimcore.data.digits import encode_png

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    lines = []
    for options in ([], ["--device", "cuda"], ["--device", "cuda:1", "--dtype", "bfloat16"]):
        command = ["predict", "--weights", file, "--json", "--logits", *options, str(tmp_path / "a.png")]
        assert cli.main(command) == 0
        lines.append(np.array(json.loads(capsys.readouterr().out)["logits"]))
    assert np.linalg.norm(lines[1] - lines[0]) < 1e-5 * np.linalg.norm(lines[0])
    assert 1e-5 < np.linalg.norm(lines[2] - lines[0]) / np.linalg.norm(lines[0]) < 3e-2
