# SPDX-License-Identifier: Apache-2.0
"""Folders that take results of picture files, named after the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..data.picture_files import STDIN


class ResultFolder:
    """A folder of results, none of which replaces a picture or another result. It is made if there is none.

    Args:
        folder: where results are to be.
        pictures: files that are going to be read.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str, pictures: Iterable[str]) -> None:
        os.makedirs(folder, exist_ok=True)
        self.folder, self._taken = folder, {os.path.realpath(picture) for picture in pictures}

    def names(self, picture: str, *endings: str) -> tuple[str, ...]:
        """Files for the results of a picture: its name with each ending instead of its suffix.

        Raises:
            ValueError: one of them is taken.
        """
        base = "stdin" if picture == STDIN else os.path.splitext(os.path.basename(picture))[0]
        stem = os.path.join(self.folder, base)
        names = tuple(stem + ending for ending in endings)
        for name in names:
            place = os.path.realpath(name)
            if place in self._taken:
                raise ValueError(
                    f"{name} is another picture, or the result of one; pictures of the same name need runs "
                    "of their own with another --out"
                )
            self._taken.add(place)
        return names
