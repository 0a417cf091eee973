# SPDX-License-Identifier: Apache-2.0
"""Networks as folders and repositories: model.safetensors, config.json, README.md. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _core
from .._core import Config
from ..utils.extras import required
from ..utils.files import write_text
from ..weights.metadata import CONFIG_KEY, unpack
from .card import card, repository_config
from .fetch import fetch
from .published import of_repository
from .service import explained

WEIGHTS, CONFIG_FILE, CARD = "model.safetensors", "config.json", "README.md"
_NOT_STORED = ("memory", "dynamic_img_size")  # arguments that are no part of the architecture
_LARGEST_CONFIG = 10 << 20  # bytes


def write_beside(
    folder: Path, repo: str, given: Mapping[str, Any] | None, more: Mapping[str, Any] | None = None
) -> None:
    """config.json and, where there is none, README.md, of the vimcore file in a folder.

    Args:
        repo: OWNER/NAME, or the folder's name, for the text.
        given: of the card, see `card`.
        more: further keys of config.json.

    Raises:
        ValueError: `given` or `more` hold what they may not.
    """
    contents = unpack(_core.safetensors_header(str(folder / WEIGHTS))[1], folder / WEIGHTS)
    facts = repository_config(*contents)
    if twice := sorted(set(facts) & set(more or {})):
        raise ValueError(f"config: {', '.join(twice)}: follows from the network")
    text = card(repo, *contents, given or {})
    write_text(
        folder / CONFIG_FILE, json.dumps({**facts, **(more or {})}, indent=2, ensure_ascii=False) + "\n"
    )
    if not (folder / CARD).exists():
        write_text(folder / CARD, text)


def locate(source: str | os.PathLike[str], **options: Any) -> tuple[Path, dict[str, Any] | None]:
    """A network's file of weights, and the options of `VisionMamba` where only config.json says them.

    Args:
        source: a folder, a vimcore file, or OWNER/NAME of a repository.
        options: of `fetch`.

    Raises:
        OSError, ValueError: the folder holds no network, or its files contradict each other.
        RuntimeError: the download fails, see `fetch`.
    """
    name = os.fsdecode(source)
    if os.path.isdir(name):
        weights: Path = Path(name) / WEIGHTS
        if not weights.is_file():
            there = ", ".join(sorted(os.listdir(name))[:8]) or "nothing"
            raise FileNotFoundError(f"{name}: expected {WEIGHTS} in the folder, which holds {there}")
        beside: Path | None = Path(name) / CONFIG_FILE
    elif os.path.exists(name) or name.endswith((".safetensors", ".pth", ".pt")):
        return Path(name), None
    else:
        weights, beside = _of_hub(name, options)
    return weights, _agreed(weights, beside if beside is not None and beside.is_file() else None)


def _of_hub(repo: str, options: Mapping[str, Any]) -> tuple[Path, Path | None]:
    if known := of_repository(repo):
        raise ValueError(
            f"{repo}: holds checkpoints of the authors, no network of vimcore's: vimcore.create_model("
            f"{known[0].name!r}, pretrained=True) reads {known[0].file}"
        )
    weights = fetch(repo, WEIGHTS, **options)
    try:
        return weights, fetch(repo, CONFIG_FILE, **options)
    except RuntimeError:
        if CONFIG_KEY in _core.safetensors_header(str(weights))[1]:
            return weights, None  # which says it all
        raise


def _agreed(weights: Path, beside: Path | None) -> dict[str, Any] | None:
    """None where the weights say what network they are; else the options that config.json names.

    `PyTorchModelHubMixin` writes such files: the constructor's arguments, and tensors alone.
    """
    facts = None if beside is None else _parsed(beside)
    metadata = _core.safetensors_header(str(weights))[1]
    if CONFIG_KEY in metadata:
        stored = unpack(metadata, weights).config.to_dict()
        if facts is not None and facts.get("config", stored) != stored:
            said = facts["config"] if isinstance(facts["config"], dict) else {}
            other = next((key for key in stored if said.get(key) != stored[key]), "config")
            theirs, ours = said.get(other), stored.get(other)
            raise ValueError(
                f"{beside}: {other}: {theirs!r:.60}, but {ours!r:.60} in {WEIGHTS}; the two files are of "
                "different networks"
            )
        return None
    if facts is None:
        raise ValueError(
            f"{weights}: tensors without an architecture, and no {CONFIG_FILE} beside them; make the network "
            "yourself and fill it with vimcore.load_checkpoint(model, path), or `vimcore convert` the file"
        )
    options = facts.get("config", facts)
    if not isinstance(options, dict):
        raise ValueError(f"{beside}: config: expected options of VisionMamba, got {options!r:.60}")
    try:
        return Config(**{key: value for key, value in options.items() if key not in _NOT_STORED}).to_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path}: larger than {_LARGEST_CONFIG >> 20} MB")
    try:
        facts = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected an object of JSON, got {type(facts).__name__}")
    return facts


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None,
    token: str | bool | None,
    keep_card: bool,
    ignore_patterns: Sequence[str] | str | None = None,
    **options: Any,
) -> str:
    """Makes the repository where there is none, and puts a folder's files into it as one commit.

    Args:
        keep_card: leave a README.md that the repository has as it is.
        ignore_patterns, options: of `huggingface_hub.HfApi.upload_folder`.

    Returns:
        the address of the commit.

    Raises:
        RuntimeError: huggingface_hub is missing, nobody is logged in, or the hub refuses; says the remedy.
    """
    with required("push_to_hub", "hub"):
        from huggingface_hub import HfApi

    ignored = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or ())
    with explained(f"[push_to_hub] {repo}", repo):
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if keep_card and api.file_exists(name, CARD, revision=options.get("revision")):
            ignored.append(CARD)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=ignored or None, **options
        )
    return str(commit)
