# SPDX-License-Identifier: Apache-2.0
"""Files from a Hugging Face hub into its cache, checked against their hashes. Needs no torch.

`huggingface_hub` downloads: under a temporary name, resumed where a connection breaks, into the cache that
other programs use (HF_HOME, HF_HUB_CACHE, XDG_CACHE_HOME), from HF_ENDPOINT, and not at all with
HF_HUB_OFFLINE. What it does not do is to look at what arrived: that is done here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.extras import required
from ..utils.files import write_text
from .service import BrokenOffError, explained, is_offline

Directory = str | os.PathLike[str]
_ATTEMPTS = 4
_SHA256 = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[0-9A-Za-z_+=-][0-9A-Za-z_.+=-]{0,127}")


class _Asked(NamedTuple):
    revision: str | None
    token: str | bool | None
    cache_dir: Directory | None
    local_only: bool


def fetch(
    repo: str,
    file: str,
    *,
    sha256: str | None = None,
    pinned: bool = False,
    note: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Directory | None = None,
    force: bool = False,
    local_only: bool = False,
) -> Path:
    """The path of a repository's file in the cache, where it is after the first call.

    The file is checked against `sha256`, against the hash that the hub names for large files, and with
    `pinned` against the one recorded at the first download. One that arrived damaged is downloaded once more.

    Args:
        pinned: the file never changes: its hash is recorded, in `record_of`.
        note: printed on stderr where the file is downloaded, not where it is in the cache.
        revision, token, cache_dir: as of `huggingface_hub.hf_hub_download`.
        force: download it although it is in the cache.
        local_only: take it from the cache, or fail.

    Raises:
        RuntimeError: huggingface_hub is missing, there is no such file or access to it, no connection, or the
            file is another than it was; says which, and the remedy.
    """
    asked = _Asked(revision, token, cache_dir, local_only)
    if note and (force or not _in_cache(repo, file, revision, cache_dir)):
        print(note, file=sys.stderr, flush=True)
    path = _download(repo, file, asked, force)
    for attempt in ("first", "second"):
        digest = sha256_of(path)
        wanted = sha256 or _named(path) or (_recorded(repo, file) if pinned else None) or digest
        if digest == wanted:
            break
        if attempt == "first":  # damaged on its way, or since
            path = _download(repo, file, asked, force=True, damaged=True)
            continue
        _remove(path)
        raise RuntimeError(
            f"[download] {repo}/{file}: sha256 {digest}, expected {wanted}: damaged, or another file now; it "
            "was removed from the cache. Try again, or another mirror (HF_ENDPOINT)"
            + _remedy(repo, file, pinned)
        )
    if pinned:
        _check_record(repo, file, digest)
    return path


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# ---- hashes ------------------------------------------------------------------------------------------------


def record_of(repo: str, file: str) -> Path:
    """Where the hash of the first download is kept, in the form of sha256sum; beside the cache of the hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "vimcore" / repo.replace("/", "--") / f"{file}.sha256"


def _check_record(repo: str, file: str, digest: str) -> None:
    recorded = _recorded(repo, file)
    if recorded is None:
        record = record_of(repo, file)
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, f"{digest}  {file}\n")
        except OSError as error:  # a cache that others fill
            warnings.warn(f"[download] hash not recorded: {record}: {error.strerror}", stacklevel=4)
    elif recorded != digest:
        raise RuntimeError(
            f"[download] {repo}/{file}: sha256 {digest}, but {recorded} at the first download: it is another "
            f"file now{_remedy(repo, file, True)}"
        )


def _recorded(repo: str, file: str) -> str | None:
    record = record_of(repo, file)
    if not record.exists():
        return None
    kept = record.read_text().split(" ")[0]
    if not _SHA256.fullmatch(kept):
        raise RuntimeError(f"[download] {record}: holds no sha256; remove it, then the next one is recorded")
    return kept


def _remedy(repo: str, file: str, pinned: bool) -> str:
    if not pinned:
        return ""
    record = record_of(repo, file)
    return f". If its authors say that they replaced it, remove the record of the first one, {record}"


def _named(path: Path) -> str | None:
    """The sha256 by which the hub names a large file; None: it names none."""
    name = os.path.basename(os.path.realpath(path))
    return name if _SHA256.fullmatch(name) else None


def _remove(path: Path) -> None:
    content = Path(os.path.realpath(path))
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


# ---- huggingface_hub ---------------------------------------------------------------------------------------


def _in_cache(repo: str, file: str, revision: str | None, cache_dir: Directory | None) -> bool:
    with required("downloading weights", "hub"):
        from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(repo, file, _text(cache_dir), revision), str)
    except ValueError:  # no name of a repository: the download says so
        return False


def _download(
    repo: str, file: str, asked: _Asked, force: bool, damaged: bool = False, attempts: int = _ATTEMPTS
) -> Path:
    what, offline = f"[download] {repo}/{file}", is_offline(asked.local_only)
    if offline and force:
        state = "its copy in the cache is damaged, and" if damaged else "cannot be downloaded anew:"
        raise RuntimeError(f"{what}: {state} HF_HUB_OFFLINE or local_files_only forbids a download")
    try:
        with explained(what, repo, asked.revision, asked.cache_dir, offline):
            return Path(_asked_of_hub(repo, file, asked, force))
    except BrokenOffError:
        if attempts == 1:
            raise
    time.sleep(1)  # some versions give up at the first break, but resume at the next call
    return _download(repo, file, asked, force, damaged, attempts - 1)


def _asked_of_hub(repo: str, file: str, asked: _Asked, force: bool) -> str:
    from huggingface_hub import hf_hub_download

    _stay_in_cache()
    return hf_hub_download(
        repo,
        file,
        revision=asked.revision,
        token=asked.token,
        cache_dir=_text(asked.cache_dir),
        local_files_only=asked.local_only,
        force_download=force,
    )


@functools.cache
def _stay_in_cache() -> None:
    """Makes huggingface_hub refuse an ETag or commit that is no plain name: its cache has files called so.

    A mirror that sends a path would write, and after a wrong hash remove, files anywhere.
    """
    from huggingface_hub import constants, errors, file_download

    ask = file_download.get_hf_file_metadata

    @functools.wraps(ask)
    def checked(url: str, *args: Any, **options: Any) -> Any:
        try:
            found = ask(url, *args, **options)
        except errors.EntryNotFoundError as error:  # remembered by an empty file
            headers = getattr(getattr(error, "response", None), "headers", {})
            _plain_name(url, "commit", headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT))
            raise
        _plain_name(url, "ETag", found.etag)
        _plain_name(url, "commit", found.commit_hash)
        return found

    file_download.get_hf_file_metadata = checked


def _plain_name(url: str, what: str, value: str | None) -> None:
    if value is not None and _NAME.fullmatch(value) is None:
        raise RuntimeError(
            f"[download] {url}: {what}: expected letters and digits, got {value!r:.60}, so the answer is "
            "not a hub's; check HF_ENDPOINT and proxies"
        )


def _text(path: Directory | None) -> str | None:
    return None if path is None else os.fsdecode(path)
