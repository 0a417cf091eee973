# SPDX-License-Identifier: Apache-2.0
"""Under attack: many threads beside a training, forks in mid-call, full disks, files that want to be run."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from helpers import SMALL, build, images_for
from train_helpers import ONCE, folder
from vim_infer import picture
from vimcore.cli import main
from vimcore.io import save_model

# ---- threads and forks -------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[vimcore.Runtime, vimcore.VisionMamba, list[torch.Tensor]]]:
    """A runtime and a network of the same weights, while another network learns in a thread of its own."""
    torch.set_num_threads(2)
    model = build(SMALL).eval()
    model.save(tmp_path / "model.safetensors")
    images = [images_for(SMALL, 1 + i % 3, torch.float32, seed=i) for i in range(8)]
    learner = build(SMALL).train()
    begun, done = threading.Event(), threading.Event()

    def learn() -> None:
        parameters = list(learner.parameters())
        while not done.is_set():
            gradients = torch.autograd.grad(learner(images[2]).square().sum(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.01 * gradient
            begun.set()

    thread = threading.Thread(target=learn)
    thread.start()
    try:
        assert begun.wait(60)
        before = learner.head.weight.detach().clone()
        yield vimcore.Runtime(tmp_path / "model.safetensors", threads=2), model, images
    finally:
        done.set()
        thread.join()
    assert not torch.equal(learner.head.weight, before)  # it did learn meanwhile


def test_threads_beside_a_training_give_the_same_bits(busy: tuple[Any, Any, list[torch.Tensor]]) -> None:
    runtime, model, images = busy
    arrays = [x.numpy() for x in images]
    with torch.no_grad():
        wanted = [model(x).numpy() for x in images]
    assert all(np.array_equal(runtime(x), logits) for x, logits in zip(arrays, wanted, strict=True))

    def call(i: int) -> bool:
        with torch.no_grad():
            found = runtime(arrays[i % 8]) if i % 2 else model(images[i % 8]).numpy()
        return np.array_equal(found, wanted[i % 8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(400)))


@pytest.mark.slow
def test_forks_in_the_middle_of_calls(busy: tuple[Any, Any, list[torch.Tensor]]) -> None:
    """A child has only the thread that forked, whatever the others were at; its calls give the same bits."""
    runtime, model, images = busy
    array = images[1].numpy()
    wanted = runtime(array)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                with torch.no_grad():
                    right = np.array_equal(runtime(array), wanted)
                    right &= np.array_equal(model(images[1]).numpy(), wanted)
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(runtime(array), wanted)  # and the parent goes on


# ---- a disk that is full -----------------------------------------------------------------------------------


def with_small_files(call: Callable[[], int], log: Path) -> int:
    """The status of a call in a child whose files cannot pass 512 bytes; its output goes to `log`."""
    child = os.fork()
    if child == 0:
        try:
            number = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(number, 1)
            os.dup2(number, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            sys.dont_write_bytecode = True  # Python would leave modules of 512 bytes, which nobody can import
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
            os._exit(call())
        finally:
            os._exit(77)  # an uncaught exception
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: photos, a run of training on them, weights under the authors' names."""
    root = tmp_path_factory.mktemp("trained")
    folder(root / "photos", (0, 1), each=8)
    size = ["--img-size", "16", "--patch-size", "8", "--embed-dim", "16", "--depth", "1", "--batch-size", "8"]
    data = ["--data", str(root / "photos"), "--val-fraction", "0.5", "--epochs", "1"]
    assert main(["train", *data, *size, *ONCE, "--out", str(root / "run")]) == 0
    model = vimcore.VisionMamba.load(root / "run" / "best.safetensors")
    torch.save({"model": model.state_dict()}, root / "authors.pth")
    return root


def save_again(target: Path) -> int:
    with pytest.raises(vimcore.Error, match=target.name):
        vimcore.VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=1).save(target)
    return 1


@pytest.mark.slow
def test_full_disk(trained: Path, tmp_path: Path) -> None:
    """The old file is whole, nothing is left beside it, and the message names the file and the reason."""
    run, weights = str(trained / "run"), str(trained / "run" / "best.safetensors")
    convert = ["convert", str(trained / "authors.pth"), "{}", "--set", "img_size=16"]
    eval_ = ["eval", run, "--workers", "0", "--threads", "1", "--out", "{}"]
    attempts: dict[str, Callable[[Path], int]] = {
        "saved.safetensors": save_again,
        "converted.safetensors": lambda target: main([word.format(target) for word in convert]),
        "eval.npz": lambda target: main([word.format(target) for word in eval_]),
        "curves.png": lambda target: main(["plot", run, "--out", str(target.parent)]),
    }
    for name, attempt in attempts.items():
        target = tmp_path / name / name
        target.parent.mkdir()
        target.write_bytes(b"old")
        log = tmp_path / f"{name}.log"
        status = with_small_files(lambda attempt=attempt, target=target: attempt(target), log)  # type: ignore[misc]
        assert status == 1, (name, log.read_text())
        assert target.read_bytes() == b"old"
        assert os.listdir(target.parent) == [name]
        if name != "saved.safetensors":
            (line,) = log.read_text().splitlines()
            assert line.startswith("vimcore: ")
            assert name in line
    for i in range(40):
        picture(20, 20, i).save(tmp_path / f"{i}.png")
    words = ["predict", "--weights", weights, "--json", "--logits", str(tmp_path)]
    log = tmp_path / "predict.log"
    assert with_small_files(lambda: main(words), log) == 1
    assert log.stat().st_size == 512


# ---- files that want to be run -----------------------------------------------------------------------------


class Evil:
    """Pickled, it is a call."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def payloads(mark: Path) -> dict[str, bytes]:
    """Pickles that write a file where they are trusted."""
    shell, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    system = Evil(os.system, shell)
    bytes_of_shell = b"S" + repr(shell).encode() + b"\n"
    return {
        "system": pickle.dumps(system, 2),
        "eval": pickle.dumps(Evil(builtins.eval, code), 2),
        "stack global": pickle.dumps(Evil(builtins.exec, code), 4),
        "process": pickle.dumps(Evil(subprocess.Popen, ["touch", str(mark)]), 2),
        "opcode INST": b"(" + bytes_of_shell + b"ios\nsystem\n.",
        "opcode OBJ": b"(cos\nsystem\n" + bytes_of_shell + b"o.",
        "in a state dict": pickle.dumps({"model": {"head.weight": system}}, 2),
        "in a namespace": pickle.dumps({"model": {}, "args": Namespace(lr=system)}, 2),
    }


def wrapped(payload: bytes, way: str) -> bytes:
    """As torch writes files today, as it did before 1.6, and bare."""
    if way == "raw":
        return payload
    if way == "legacy":
        facts = {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4},
        }
        head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, facts)]
        return b"".join([*head, payload, pickle.dumps([], 2), struct.pack("<q", 0)])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return data.getvalue()


def test_payloads_are_real(tmp_path: Path) -> None:
    """What trusts them runs them: else the next test would show nothing."""
    for name, payload in payloads(tmp_path / "ran").items():
        value = pickle.loads(payload)
        if isinstance(value, subprocess.Popen):
            value.wait()
        assert (tmp_path / "ran").exists(), name
        (tmp_path / "ran").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zip", "legacy", "raw"])
def test_nothing_in_a_file_is_run(
    way: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    run, file = tmp_path / "run", tmp_path / "evil.pth"
    run.mkdir()
    for part in (trained / "run").iterdir():
        if part.is_file():
            (run / part.name).write_bytes(part.read_bytes())
    data = ["--data", str(trained / "photos"), "--img-size", "16", "--patch-size", "8", "--embed-dim", "16"]
    lines = (
        ["convert", str(file), str(tmp_path / "out.safetensors")],
        ["train", *data, *ONCE, "--depth", "1", "--init", str(file), "--out", str(tmp_path / "new")],
        ["train", "--resume", str(run)],
    )
    for name, payload in payloads(mark).items():
        for path in (file, run / "checkpoint.pt"):
            path.write_bytes(wrapped(payload, way))
        for words in lines:
            assert main(words) == 1, (name, words[0])
            error = capsys.readouterr().err
            assert error.startswith("vimcore: ")
            assert not mark.exists(), (name, words)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_trusted_is_still_read(trained: Path, tmp_path: Path) -> None:
    """The same ways around honest weights: convert takes what torch writes, new and old."""
    state = torch.load(trained / "authors.pth", weights_only=True)
    for zipped in (True, False):
        torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert (
            main(
                ["convert", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), "--set", "img_size=16"]
            )
            == 0
        )
    save_model(vimcore.VisionMamba.load(tmp_path / "w.safetensors"), tmp_path / "again.safetensors")
