# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between here and a Hugging Face hub, in words that say what to do. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.extras import required


class BrokenOffError(RuntimeError):
    """A transfer that ended before its end; another attempt may succeed."""


LOG_IN = "log in by `hf auth login` or the variable HF_TOKEN"


def is_offline(local_only: bool = False) -> bool:
    """Whether nothing may be asked of the hub."""
    with required("downloading weights", "hub"):
        from huggingface_hub import constants
    return bool(constants.HF_HUB_OFFLINE) or local_only


@contextmanager
def explained(
    what: str,
    repo: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> Iterator[None]:
    """Within it, errors of huggingface_hub become a RuntimeError that says what is wrong and the remedy.

    Args:
        what: "[function] repository/file", for the message.
        offline: whether asking the hub is forbidden.
    """
    with required("a hub of weights", "hub"):
        from huggingface_hub import constants, errors
    there = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        text = f"gated: accept the conditions on {there}/{repo}, then {LOG_IN}"
        raise RuntimeError(f"{what}: {text}") from error
    except errors.RepositoryNotFoundError as error:
        text = f"{there} has no such repository, or it is private: check the name, or {LOG_IN}"
        raise RuntimeError(f"{what}: {text}") from error
    except errors.RevisionNotFoundError as error:
        raise RuntimeError(f"{what}: no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        cache = cache_dir or constants.HF_HUB_CACHE
        raise RuntimeError(f"{what}: {_not_cached(cache, there, _cause(error), offline)}") from error
    except errors.EntryNotFoundError as error:
        raise RuntimeError(f"{what}: the repository holds no such file") from error
    except errors.HFValidationError as error:
        raise RuntimeError(f"{what}: no name of a repository (OWNER/NAME): {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise RuntimeError(f"{what}: HF_HUB_OFFLINE forbids to ask the hub") from error
    except errors.HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        remedy = f"; {LOG_IN}" if refused else "; try again later"
        raise RuntimeError(f"{what}: {there} refused: {_cause(error)}{remedy}") from error
    except (ArithmeticError, AttributeError, NameError, RuntimeError, TypeError):
        raise  # a fault of the program's, or explained already
    except Exception as error:  # connections fail in many classes, which differ between versions
        if isinstance(error, OSError) and error.errno is not None:  # a disk that is full, a folder not ours
            where = f": {error.filename}" if error.filename is not None else ""
            raise RuntimeError(f"{what}: {error.strerror or error}{where}") from error
        raise BrokenOffError(f"{what}: broken off ({_cause(error)}); nothing was kept. Try again") from error


def _not_cached(cache: object, endpoint: str, cause: str, offline: bool) -> str:
    if offline:
        return (
            f"not in the cache ({cache}), and HF_HUB_OFFLINE or local_files_only forbids a download; "
            "download it once without, or copy that folder from a machine that has it"
        )
    return (
        f"{endpoint} was not reached ({cause}), and the file is not in the cache ({cache}); check connection "
        "and proxies, or name a mirror by HF_ENDPOINT. A checkpoint that came another way: `vimcore convert`"
    )


def _cause(error: BaseException) -> str:
    """The last reason of several, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
