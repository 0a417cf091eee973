# SPDX-License-Identifier: Apache-2.0
"""One file from a hub on loopback: broken connections, damage, hashes, offline, mirrors, and what is said."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import Hub, serving
from huggingface_hub import constants
from vimcore.hub.fetch import fetch, record_of


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_interrupted_and_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three breaks: each goes on where the last one ended."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    data = np.random.default_rng(0).bytes(100_000)
    hub.files["a/b", "w.pth"] = data
    hub.cut = 3
    path = fetch("a/b", "w.pth")
    assert path.read_bytes() == data
    assert [line.partition(" bytes=")[2] for line in hub.downloads()] == ["", "50000-", "75000-", "87500-"]


def test_versions_of_the_hub_that_do_not_resume(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """They raise at every break; what was asked for is asked for again, four times in all."""
    hub.files["a/b", "w.pth"] = bytes(1000)
    whole, breaks = huggingface_hub.hf_hub_download, [3]

    def breaking(*args: Any, **options: Any) -> str:
        breaks[0] -= 1
        if breaks[0] >= 0:
            raise ConnectionError("reset by peer")
        return str(whole(*args, **options))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", breaking)
    monkeypatch.setattr("vimcore.hub.fetch.time.sleep", lambda seconds: None)
    assert fetch("a/b", "w.pth").read_bytes() == bytes(1000)
    breaks[0] = 4
    with pytest.raises(RuntimeError, match="broken off"):
        fetch("a/b", "w.pth", force=True)


def test_broken_off_for_good(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half file takes the name; a later call succeeds."""
    hub.files["a/b", "w.pth"] = bytes(1000)
    hub.cut = 1000
    with pytest.raises(RuntimeError, match=r"\[download\] a/b/w\.pth: broken off \(.*\); nothing was kept"):
        fetch("a/b", "w.pth")
    assert not [path for path in files_of(tmp_path / "home") if path.name == "w.pth"]
    assert not [
        path for path in files_of(tmp_path / "home") if path.parent.name == "blobs" and "." not in path.name
    ]
    hub.cut = 0
    assert fetch("a/b", "w.pth").read_bytes() == bytes(1000)


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of this machine is not tried again."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(RuntimeError, match=r"\[download\] a/b/w\.pth: No space left on device: /cache/x"):
        fetch("a/b", "w.pth")


@pytest.mark.parametrize("name", ["../../../../outside", "{}/outside", "", "..", "a/b", "a" * 300])
def test_answers_that_lead_out_of_the_cache(hub: Hub, tmp_path: Path, name: str) -> None:
    """The hub's client calls files by what a server sends: nothing is written where that would be a path."""
    hub.files["o/n", "a.pth"] = b"content"
    name = name.format(tmp_path)
    hub.etag = name
    with pytest.raises(RuntimeError, match=r"/o/n/resolve/main/a\.pth: ETag: expected letters and digits"):
        fetch("o/n", "a.pth")
    hub.etag, hub.named_commit = None, name or "."
    for file in ("a.pth", "absent.pth"):
        with pytest.raises(RuntimeError, match="commit: expected letters and digits"):
            fetch("o/n", file)
    assert files_of(tmp_path) == []
    hub.named_commit = None
    assert fetch("o/n", "a.pth").read_bytes() == b"content"


def test_damaged_on_its_way(hub: Hub, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(5000)
    hub.files["a/b", "w.pth"] = data
    hub.damaged = 1
    assert fetch("a/b", "w.pth").read_bytes() == data
    assert len(hub.downloads()) == 2
    hub.files["a/b", "v.pth"] = data[::-1]
    hub.damaged = 2
    with pytest.raises(
        RuntimeError, match=r"v\.pth: sha256 \w+, expected \w+: damaged, .* removed from the cache"
    ):
        fetch("a/b", "v.pth")
    assert not [path for path in files_of(tmp_path / "home") if path.name == "v.pth"]
    assert fetch("a/b", "v.pth").read_bytes() == data[::-1]


def test_damaged_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["a/b", "w.pth"] = bytes(5000)
    path = fetch("a/b", "w.pth")
    Path(os.path.realpath(path)).write_bytes(bytes(4999) + b"\1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="its copy in the cache is damaged, and HF_HUB_OFFLINE"):
        fetch("a/b", "w.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch("a/b", "w.pth").read_bytes() == bytes(5000)


def test_hash_of_the_first_download(hub: Hub) -> None:
    """Recorded where the file is pinned; another file is an error that names the record."""
    hub.files["a/b", "w.pth"] = b"first" * 99
    fetch("a/b", "w.pth", pinned=True)
    hub.files["a/b", "w.pth"] = b"other" * 99
    for large in (True, False):
        hub.large = large
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"another file now.*\. If its authors say .* remove the record"
            ):
                fetch("a/b", "w.pth", pinned=True, force=True)
    assert fetch("a/b", "w.pth", force=True).read_bytes() == b"other" * 99
    record_of("a/b", "w.pth").unlink()
    fetch("a/b", "w.pth", pinned=True)
    record_of("a/b", "w.pth").write_text("rubbish")
    with pytest.raises(RuntimeError, match="holds no sha256; remove it"):
        fetch("a/b", "w.pth", pinned=True)


def test_hash_that_cannot_be_recorded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that is not ours to write: that is said, and the weights serve."""
    hub.files["a/b", "w.pth"] = b"x"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.warns(
        UserWarning, match=r"\[download\] hash not recorded: .*w\.pth\.sha256: Not a directory"
    ):
        assert fetch("a/b", "w.pth", pinned=True).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            (403, "GatedRepo"),
            r"gated: accept the conditions on http://127.*/a/b, then log in by `hf auth login`",
        ),
        ((401, "RepoNotFound"), "no such repository, or it is private: check the name, or log in"),
        ((503, ""), r"was not reached \(.*503.*\), and the file is not in the cache"),
        ((401, ""), "no such repository, or it is private|refused"),
    ],
)
def test_refusals(hub: Hub, status: tuple[int, str], text: str) -> None:
    hub.files["a/b", "w.pth"] = b"x"
    hub.status = status
    with pytest.raises(RuntimeError, match=r"\[download\] a/b/w\.pth: .*" + text):
        fetch("a/b", "w.pth")


def test_missing(hub: Hub) -> None:
    hub.files["a/b", "w.pth"] = b"x"
    with pytest.raises(RuntimeError, match=r"a/b/v\.pth: the repository holds no such file"):
        fetch("a/b", "v.pth")
    with pytest.raises(RuntimeError, match=r"no revision 'v9'"):
        fetch("a/b", "w.pth", revision="v9")
    with pytest.raises(RuntimeError, match=r"no name of a repository \(OWNER/NAME\)"):
        fetch("a/b/c/d", "w.pth")
    assert fetch("a/b", "w.pth", token="hf_secret").read_bytes() == b"x"
    assert hub.tokens[-1] == "Bearer hf_secret"


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["a/b", "w.pth"] = b"x"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"not in the cache \(.*home/hub\), and HF_HUB_OFFLINE"):
        fetch("a/b", "w.pth")
    with pytest.raises(RuntimeError, match="cannot be downloaded anew: HF_HUB_OFFLINE"):
        fetch("a/b", "w.pth", force=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch("a/b", "w.pth")
    asked = len(hub.requests)
    assert fetch("a/b", "w.pth", local_only=True).read_bytes() == b"x"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("a/b", "w.pth").read_bytes() == b"x"
    assert len(hub.requests) == asked


def test_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: the cache serves what it has."""
    hub.files["a/b", "w.pth"] = b"x"
    fetch("a/b", "w.pth")
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(str(hub.server_port), "9"))
    assert fetch("a/b", "w.pth").read_bytes() == b"x"
    with pytest.raises(
        RuntimeError, match=r"127.0.0.1:9 was not reached .* mirror by HF_ENDPOINT.*vimcore convert"
    ):
        fetch("a/b", "v.pth")


@pytest.mark.slow
def test_variables(tmp_path: Path) -> None:
    """A mirror, places for the cache, offline: as a user sets them, in a process of its own."""
    code = "import sys; from vimcore.hub.fetch import *; print(fetch('a/b', 'w.pth', pinned=True))"
    with serving() as hub:
        hub.files["a/b", "w.pth"] = b"content"
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "XDG"))}
        for i, (variables, place) in enumerate(
            (
                ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "huggingface" / "hub"),
                ({"HF_HOME": str(tmp_path / "home")}, tmp_path / "home" / "hub"),
                ({"HF_HUB_CACHE": str(tmp_path / "c"), "HF_HOME": str(tmp_path / "home2")}, tmp_path / "c"),
            )
        ):
            variables = {**plain, **variables, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
            for offline in ("1", "0", "1") if i == 0 else ("0",):
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    env={**variables, "HF_HUB_OFFLINE": offline},
                    capture_output=True,
                    text=True,
                )
                if offline == "1" and len(hub.downloads()) == i:
                    assert "not in the cache" in done.stderr
                    continue
                assert done.returncode == 0, done.stderr
                assert Path(done.stdout.strip()).is_relative_to(place)
            assert len(hub.downloads()) == i + 1
