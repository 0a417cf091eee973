# SPDX-License-Identifier: Apache-2.0
"""`vimcore search`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.named_files import named
from ..data.picture_files import FORMATS_TEXT, STDIN, passed_over_text
from ..utils import options
from ..utils.extras import required
from ..utils.files import printable
from .computing import add_computing, add_img_size
from .output import print_json, print_table
from .progress import Progress
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "query",
        metavar="QUERY",
        help="a picture file, which is not among the results, - : a picture on stdin, or a sentence "
        "(weights of `train --task clip`)",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="FOLDER|IMAGE|@LIST",
        help="folders of pictures, picture files, patterns such as 'photos/*.jpg', @FILE: a list of these",
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="vimcore safetensors file of any task"
    )
    parser.add_argument(
        "-k",
        "--topk",
        type=options.positive,
        default=20,
        metavar="N",
        help="number of pictures to show (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="contact sheet of the results, .png or .svg")
    parser.add_argument(
        "--batch",
        type=options.positive,
        default=8,
        metavar="N",
        help="pictures that are computed at once (default: %(default)s)",
    )
    add_img_size(parser)
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither use nor keep vectors of pictures; they are kept in ~/.cache/vimcore/search and used "
        "while weights, size and time of a file are the same",
    )
    add_computing(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per picture")


def run(args: argparse.Namespace) -> int:
    """Prints the nearest pictures; status 1 where some could not be read."""
    if args.out is not None:
        if Path(args.out).suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"out: expected a name that ends in .png or .svg, got {args.out}")
        with required("a contact sheet", "demo"):
            import matplotlib  # noqa: F401
    from ..tools.embedders import open_embedder
    from ..tools.search import collect, nearest, query_vector

    embedder = open_embedder(args.weights, args.device, args.threads, args.img_size, args.dtype)
    if embedder.frames:
        raise ValueError(f"{args.weights}: takes clips, of which none can be searched")
    images = _images(args.query, args.images)
    vector, kind, notes = query_vector(embedder, args.query)
    for note in notes:
        complain(note)
    with Progress(0) as progress:

        def watch(done: int, total: int) -> None:
            progress.total = total
            progress.advance(done)

        library = collect(
            embedder,
            args.weights,
            images,
            len(vector),
            variant="-{}x{}".format(*args.img_size) if args.img_size else "",
            batch=args.batch,
            cached=not args.no_cache,
            watch=watch,
        )
    for note in library.notes:
        complain(note)
    for name, reason in library.errors.items():
        complain(f"{name}: {reason}")
        if args.json:
            print_json({"image": name, "error": reason})
    if library.passed_over:
        complain(passed_over_text(library.passed_over))
    total = len(library.images) + len(library.errors)
    if not total:
        raise RuntimeError(f"no pictures found ({FORMATS_TEXT})")
    hits = nearest(library, vector, args.topk, args.query if kind == "picture" else None)
    if args.out is not None:
        from ..plots.contact_sheet import plot_sheet

        plot_sheet(args.query, kind, [(hit.image, hit.score) for hit in hits], Path(args.out))
    if args.json:
        for rank, hit in enumerate(hits, 1):
            print_json({"rank": rank, "image": hit.image, "score": round(hit.score, 6)})
    else:
        if hits:
            print_table(
                [
                    [f"{rank:>3}", f"{hit.score:7.4f}", printable(hit.image)]
                    for rank, hit in enumerate(hits, 1)
                ]
            )
        if args.out is not None:
            print(printable(args.out))
    if library.errors:
        complain(f"{len(library.errors)} of {total} images failed")
    return 1 if library.errors else 0


def _images(query: str, arguments: list[str]) -> list[str]:
    """Files and folders to search.

    Raises:
        ValueError: the query stands on standard input, and a list too; or a picture is to come from there.
    """
    if STDIN in arguments:
        raise ValueError("-: the query may be standard input; pictures that are searched are files")
    return (
        [name for name in named([query, *arguments]) if name != STDIN] if query == STDIN else named(arguments)
    )
