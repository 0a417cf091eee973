# SPDX-License-Identifier: Apache-2.0
"""Results of `vimcore predict`, whatever the task: as lines for people or as JSON, and what failed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from ...data.picture_files import FORMATS_TEXT, passed_over_text
from ...utils.files import printable
from ..streams import complain


class Result(Protocol):
    """Of one image; `error` says what prevented it."""

    @property
    def image(self) -> str: ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=Result)


def tell(
    found: Iterable[R],
    passed_over: Counter[str],
    show: Callable[[R], None],
    to_json: Callable[[R, Mapping[str, int] | None], str] | None,
    clips: bool = False,
) -> int:
    """Prints results as they come; returns the exit status.

    Args:
        passed_over: files that are no images by suffix, complete when the results are.
        show: prints what follows the image's name, for people.
        to_json: the line of a result, instead; the last one is also told what was passed over.
        clips: they are no pictures.

    Raises:
        RuntimeError: there was no image.
    """
    total = failed = 0
    results, following = itertools.tee(found)
    next(following, None)
    for result, later in itertools.zip_longest(results, following):
        total += 1
        if result.error is not None:
            failed += 1
            complain(f"{result.image}: {result.error}")
        if to_json is not None:
            print(to_json(result, None if later else passed_over), flush=True)
        elif result.error is None:
            print(printable(result.image))
            show(result)
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        raise RuntimeError(
            "no clips found (folders of pictures, .npy files)"
            if clips
            else f"no pictures found ({FORMATS_TEXT})"
        )
    if failed:
        complain(f"{failed} of {total} {'clips' if clips else 'images'} failed")
    return 1 if failed else 0
