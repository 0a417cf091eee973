# SPDX-License-Identifier: Apache-2.0
"""The command `vimcore`: results on stdout, progress and errors on stderr; status 0, 1 (failed) or 2 (usage).

A command NAME is the file or folder NAME beside this one, with `add_arguments(parser)` and `run(args)`, which
returns the exit status, and a line in COMMANDS. Only the command asked for is imported. A folder has a file
for each task; the file of weights or the run says which one is meant.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from .streams import complain, lost_output, standard_streams

COMMANDS = {
    "demo": "train a small Vim on handwritten digits, save it, reload it and show what it sees",
    "train": "train on your images with the paper's recipes; resumable, distributed",
    "eval": "evaluate weights: top-1, top-5, accuracy per class, confusion matrix",
    "predict": "say what is in image files: classes, masks or objects (classes need no torch)",
    "features": "write a vector for each picture: .npz, .npy, .csv or .safetensors",
    "search": "find pictures by a sentence or by an example picture",
    "explain": "show what a network does with images, and why it decides: attention, features, relevance",
    "download": "fetch the weights that the authors of Vim published, or list them",
    "convert": "convert a PyTorch checkpoint, such as the authors', to a vimcore file",
    "export": "write a network for ONNX Runtime, OpenVINO or torch.export, checked against the core",
    "info": "show what a vimcore file contains",
    "bench": "benchmark against other networks and libraries",
    "plot": "plot training curves, the confusion matrix and the worst mistakes of runs",
    "health": "check whether bfloat16 or float16 is safe: value ranges by layer, first non-finite tensor",
    "plan": "estimate memory and the largest batch that fits",
    "doctor": "show build and machine, and test kernels and gradients against a float64 reference",
}


def _parser(
    chosen: str | None, arguments: Sequence[str]
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of all commands, and that of the chosen one."""
    from .. import __version__

    parser = own = argparse.ArgumentParser(
        prog="vimcore", description="Vision Mamba on CPU and GPU: train, load, explain, run."
    )
    parser.add_argument("--version", action="version", version=f"vimcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            command = importlib.import_module(f".{name}", __name__)
            if name == "train":  # its flags follow from the task
                command.add_arguments(sub, arguments)
            else:
                command.add_arguments(sub)
            sub.set_defaults(run=command.run)
            own = sub
    return parser, own


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Like `parse_args`; unknown arguments are reported with the usage of the command they were given to."""
    first = next((a for a in arguments if not a.startswith("-")), None)
    parser, own = _parser(first if first in COMMANDS else None, arguments)
    if first is not None and first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, 1, 0.6)
        hint = f" (did you mean {close[0]}?)" if close else ""
        parser.error(f"no command {first!r}{hint}; see vimcore --help")
    args, unknown = parser.parse_known_args(arguments)
    if not unknown:
        return args
    if unknown[0] in arguments[: arguments.index(args.command)]:
        own = parser
    text = "unrecognized arguments: " + " ".join(unknown)
    flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
    if close := difflib.get_close_matches(flag, own._option_string_actions, 1, 0.7):
        text += f" (did you mean {close[0]}?)"
    own.error(text)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Raises:
        SystemExit: after `--help` and `--version` with 0, after bad usage with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with standard_streams():
        status, failure = 1, ""
        leaving: SystemExit | None = None
        try:
            args = _parsed(arguments)
            status = int(args.run(args))
        except SystemExit as asked:
            leaving = asked
        except KeyboardInterrupt:
            status, failure = 130, "interrupted"
        except BrokenPipeError:
            pass  # the reader has gone, and wants to hear no more
        except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            failure = _message(error)
        if lost := lost_output():
            status, leaving = 1, None
            failure = (
                "" if isinstance(lost, BrokenPipeError) else f"cannot write the results: {lost.strerror}"
            )
        if leaving is not None:
            raise leaving
        if failure:
            complain(failure)
        return status
