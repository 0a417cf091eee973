# SPDX-License-Identifier: Apache-2.0
"""vim-infer: help, and what it refuses."""

from __future__ import annotations

import re
import resource
import subprocess
from pathlib import Path

import pytest
import vimcore
from vim_infer import BINARY, run, save
from vimcore import _core


@pytest.mark.parametrize("command", [None, "predict", "features", "info", "bench"])
def test_help(command: str | None) -> None:
    done = run("--help") if command is None else run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: vim-infer")
    if command is not None:
        assert "--json" in done.stdout
    assert run("--version").stdout == f"vim-infer {vimcore.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["predict", "x.png"],
        ["predict", "--weights", "w"],
        ["predict", "--weights"],
        ["predict", "--weights", "w", "--topk", "0", "x.png"],
        ["predict", "--weights", "w", "--threads", "many", "x.png"],
        ["predict", "--weights", "w", "--batch", "99999999999999999999", "x.png"],
        ["predict", "--weights", "w", "--img-size", "24x", "x.png"],
        ["predict", "--weights", "w", "--img-size", "0", "x.png"],
        ["predict", "--weights", "w", "--device", "tpu", "x.png"],
        ["predict", "--weights", "w", "--device", "cuda:-1", "x.png"],
        ["predict", "--weights", "w", "--json=yes", "x.png"],
        ["features", "--weights", "w", "x.png"],
        ["info", "a", "b"],
        ["info", "--frobnicate"],
        ["bench", "--weights", "w", "--sizes", "24,,32"],
        ["bench", "--weights", "w", "--seconds", "-1"],
    ],
)
def test_bad_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vim-infer: ")
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "no head"),
        ({"class_token": "none", "pool": "all"}, "every patch"),
        ({"in_chans": 4}, "4 channels"),
    ],
)
def test_networks_that_do_not_classify_pictures(
    options: dict, message: str, tmp_path: Path, pictures: Path
) -> None:
    path = save(tmp_path / "m.safetensors", **options)
    done = run("predict", "--weights", path, pictures)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "info", "segment", "features"])
def test_the_name_of_a_task_is_short(command: str, weights: Path, pictures: Path, tmp_path: Path) -> None:
    tensors, metadata = _core.read_safetensors(str(weights))
    path = tmp_path / "odd.safetensors"
    _core.write_safetensors(str(path), tensors, {**metadata, "vimcore.task": f'{{"task": "{70_000 * "x"}"}}'})
    words = {"info": [], "features": ["--out", tmp_path / "a.npy", pictures]}.get(command, [pictures])
    done = run(command, "--weights", path, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "vimcore.task: task: expected a name of at most 100 bytes" in done.stderr
    assert len(done.stderr) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "1000000"], "threads: expected 0 to 1024, got 1000000"),
        (["--batch", "1000000000"], "bytes of memory, this machine has"),
        (["--img-size", "300000"], "bytes of memory, this machine has"),
        (["--img-size", "1000000000"], "img_size height: expected 1 to 1048576"),
    ],
)
def test_more_than_the_machine(options: list[str], message: str, weights: Path, pictures: Path) -> None:
    """Refused before any work, with what is needed."""
    done = run("predict", "--weights", weights, *options, pictures / "a.b")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_threads_that_cannot_be_started(weights: Path, pictures: Path, tmp_path: Path) -> None:
    """In 300 MB of addresses, where stacks take 8 each: a line for those that read and those that compute."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20))
        resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 8 << 20))

    def tried(*words: object) -> subprocess.CompletedProcess[str]:
        command = [BINARY, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small)

    if tried("--version").returncode:
        pytest.skip("it does not start there, as with a sanitizer")
    names = tmp_path / "names.txt"
    names.write_text(f"{pictures / 'a.b'}\n" * 300)
    for words, said in (
        (
            ("predict", "--weights", weights, "--threads", 1000, "--batch", 300, f"@{names}"),
            "that read pictures",
        ),
        (
            ("bench", "--weights", weights, "--threads", 1000, "--batches", 256),
            r"\[threads\] cannot start number|libgomp: Thread creation failed",  # own ones, or OpenMP's
        ),
    ):
        done = tried(*words)
        assert done.returncode == 1, done
        assert re.search(said, done.stderr), done
        assert done.stderr.strip().count("\n") == 0


def test_a_device_that_is_not_there(weights: Path, pictures: Path) -> None:
    done = run("predict", "--weights", weights, "--device", "cuda:77", pictures)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cuda" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_and_a_full_disk(weights: Path, pictures: Path) -> None:
    command = [BINARY, "predict", "--weights", str(weights), "--json", str(pictures / "a.b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr == "vim-infer: cannot write the results: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predcit", "x.png"], "no command 'predcit' (did you mean predict?); see vim-infer --help"),
        (["feature"], "no command 'feature' (did you mean features?)"),
        (["paint"], "no command 'paint'; see"),
        (
            ["predict", "--weihgts", "w"],
            "'--weihgts' (did you mean --weights?); see vim-infer predict --help",
        ),
        (["predict", "--top-k=3"], "'--top-k' (did you mean --topk?)"),
        (["bench", "--hepl"], "'--hepl' (did you mean --help?)"),
        (["predict", "--frobnicate"], "'--frobnicate'; see"),
    ],
)
def test_what_was_meant(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
