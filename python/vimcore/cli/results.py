# SPDX-License-Identifier: Apache-2.0
"""Results of picture files, whatever the task: for people, as JSON or for a file, and what failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from ..data.picture_files import FORMATS_TEXT, passed_over_text
from ..utils.files import literal
from .progress import Progress
from .streams import complain


class Result(Protocol):
    """Of one image; `error` says what prevented it."""

    @property
    def image(self) -> str: ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=Result)
Handle = Callable[[R, Mapping[str, int] | None], None]


def tell(
    found: Iterable[R],
    total: int,
    passed_over: Mapping[str, int],
    handle: Handle[R],
    progress: bool,
    what: str = "images",
) -> int:
    """Hands results on as they come, and says what failed; returns the exit status.

    Args:
        total: how many results there will be.
        passed_over: files that are no images by suffix.
        handle: of a result; with the last one it is also given what was passed over.
        progress: show it at once, and also without a terminal.
        what: they are, clips or images.

    Raises:
        RuntimeError: there was no image.
    """
    failed = 0
    results, following = itertools.tee(found)
    next(following, None)
    with Progress(total, progress) as bar:
        for result, later in itertools.zip_longest(results, following):
            if result.error is not None:
                failed += 1
                bar.clear()
                complain(f"{result.image}: {result.error}")
            handle(result, None if later else passed_over)
            bar.advance()
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        clips = "no clips found (folders of pictures, .npy files)"
        raise RuntimeError(clips if what == "clips" else f"no pictures found ({FORMATS_TEXT})")
    if failed:
        complain(f"{failed} of {total} {what} failed")
    return 1 if failed else 0


def as_lines(show: Callable[[R], None]) -> Handle[R]:
    """For people: the image's name, then what `show` prints."""

    def handle(result: R, passed_over: Mapping[str, int] | None) -> None:
        if result.error is None:
            print(literal(result.image))
            show(result)

    return handle


def as_json(to_json: Callable[[R, Mapping[str, int] | None], str]) -> Handle[R]:
    """A line each."""

    def handle(result: R, passed_over: Mapping[str, int] | None) -> None:
        print(to_json(result, passed_over), flush=True)

    return handle
