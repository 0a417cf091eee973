# SPDX-License-Identifier: Apache-2.0
"""The command `vimcore`: results on stdout, progress and errors on stderr; status 0, 1 (failed) or 2."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..utils import options
from ..utils.extras import needs
from .streams import complain, lost_output, standard_streams

Command = Callable[[argparse.Namespace], int]


def _print_table(rows: Sequence[Sequence[Any]], indent: str = "") -> None:
    """Rows of cells, the columns aligned."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    for row in text:
        print((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip())


# ---- commands ----------------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="vimcore-demo", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=options.positive, help="passes over the training digits (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same result (default: %(default)s)")
    parser.add_argument("--threads", type=options.threads, help="default: 1; does not change the result")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")


def _demo(args: argparse.Namespace) -> int:
    try:
        from ..plots.style import plot_curve  # noqa: F401  a missing package is reported before the training, not after
        from ..tools.demo import run_demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vimcore"):
            raise
        raise RuntimeError(f"the demo needs {error.name}; {needs('demo')}") from error
    metrics = run_demo(args.out, args.epochs, args.seed, args.threads, show=not args.json)
    if args.json:
        print(json.dumps(metrics))
    return 0


def _training() -> Any:
    """The module of `train` and `eval`, or an error that says how to get what it needs."""
    try:
        import timm  # noqa: F401  reported before the work, not after
        import torchvision  # noqa: F401
        import tqdm  # noqa: F401

        from . import train as commands
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vimcore"):
            raise
        package = error.name.partition(".")[0]
        raise RuntimeError(f"training needs {package}; {needs('train')}") from error
    return commands


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from . import train as commands

    commands.train_arguments(parser)


def _train(args: argparse.Namespace) -> int:
    return int(_training().train(args))


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    from . import train as commands

    commands.eval_arguments(parser)


def _eval(args: argparse.Namespace) -> int:
    return int(_training().evaluate(args))


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="picture files, or folders of them")
    parser.add_argument("--weights", required=True, metavar="FILE", help="vimcore safetensors file")
    parser.add_argument(
        "--topk", type=options.positive, default=5, metavar="N", help="classes to show (default: %(default)s)"
    )
    parser.add_argument("--logits", action="store_true", help="with --json: add the logits of all classes")
    parser.add_argument(
        "--threads", type=options.threads, help="default: all cores; does not change the result"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of activations, on cuda (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line and image")


def _predict(args: argparse.Namespace) -> int:
    from ..data.picture_files import passed_over_text
    from ..runtime import Runtime
    from ..tools.predict import predict
    from ..utils.files import printable

    runtime = Runtime(args.weights, args.device, args.threads, dtype=args.dtype)
    total = failed = 0
    passed_over = Counter[str]()
    results, following = itertools.tee(predict(runtime, args.images, args.topk, passed_over))
    next(following, None)
    for result, later in itertools.zip_longest(results, following):
        total += 1
        if result.error is not None:
            failed += 1
            complain(f"{result.image}: {result.error}")
        if args.json:  # the last line also tells what was passed over
            print(result.to_json(args.logits, None if later else passed_over), flush=True)
        elif result.error is None:
            print(printable(result.image))
            rows = [[f"{100 * p:7.3f} %", f"{i:>5}", label or ""] for i, label, p in result.top]
            _print_table(rows, indent="  ")
            if args.logits:
                assert result.logits is not None
                print("  logits " + " ".join(f"{float(v):.9g}" for v in result.logits))
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        raise RuntimeError("no pictures found (JPEG, PNG, PPM, PGM)")
    if failed:
        complain(f"{failed} of {total} images failed")
    return 1 if failed else 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="the authors' weights: .pth (needs torch) or .safetensors under their keys"
    )
    parser.add_argument("destination", help="vimcore safetensors file to write")
    parser.add_argument(
        "--weights", choices=("model", "ema"), default="model", help="which of a training checkpoint"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a constructor argument that no tensor tells or that was assumed wrongly; may be repeated",
    )
    parser.add_argument("--labels", metavar="FILE", help="class names, one per line or a JSON list")
    parser.add_argument("--json", action="store_true", help="print configuration and assumptions as JSON")


def _convert(args: argparse.Namespace) -> int:
    from ..weights.convert import convert, parse_setting, read_labels

    settings = dict(parse_setting(text) for text in args.set)
    labels = read_labels(args.labels) if args.labels else None
    config, assumptions = convert(
        args.source, args.destination, weights=args.weights, settings=settings, labels=labels
    )
    if args.json:
        print(json.dumps({"config": config, "assumptions": assumptions, "written": args.destination}))
        return 0
    print("architecture:")
    _print_table([[key, json.dumps(value)] for key, value in config.items()], indent="  ")
    print("assumed (change with --set):" if assumptions else "nothing had to be assumed")
    for text in assumptions:
        print(f"  {text}")
    print(f"written: {args.destination}")
    return 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="FILE", help="vimcore safetensors file")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _info(args: argparse.Namespace) -> int:
    from ..weights.info import describe_file

    facts = describe_file(args.weights)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    labels = facts["labels"]
    shown = (
        "none"
        if labels is None
        else ", ".join(labels[:10]) + (f", ... ({len(labels)})" if len(labels) > 10 else "")
    )
    tokens, (rows, columns) = facts["tokens"], facts["grid"]
    _print_table(
        [
            ["file", f"{facts['file']} ({facts['bytes'] / 1e6:.2f} MB, {', '.join(facts['types'])})"],
            ["parameters", f"{facts['parameters']:,}"],
            ["flops", f"{facts['flops'] / 1e9:.4g} G multiply-adds per image, scans included"],
            [
                "tokens",
                f"{tokens}: {rows} x {columns} patches, class tokens: {tokens - rows * columns}",
            ],
            ["labels", shown],
            ["preprocess", "none" if facts["preprocess"] is None else json.dumps(facts["preprocess"])],
        ]
    )
    print("architecture")
    _print_table([[key, json.dumps(value)] for key, value in facts["config"].items()], indent="  ")
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from ..tools.bench import cpu as bench

    bench.add_arguments(parser)


def _bench(args: argparse.Namespace) -> int:
    from ..tools.bench import cpu as bench

    return int(bench.main(args))


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that `vimcore train` wrote")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: the run, or the current folder for several)"
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="default: %(default)s")
    parser.add_argument(
        "--mistakes",
        type=options.positive,
        default=24,
        metavar="N",
        help="pictures to show (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _plot(args: argparse.Namespace) -> int:
    try:
        from ..plots.runs import plot_runs
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vimcore"):
            raise
        raise RuntimeError(f"plotting needs {error.name}; {needs('demo')}") from error
    written, notes = plot_runs(args.runs, args.out, args.format, args.mistakes)
    for note in notes:
        complain(note)
    print(json.dumps({"written": written}) if args.json else "\n".join(written))
    return 0


def _health_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE|FOLDER", help="pictures to compute (default: noise)"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="vimcore safetensors file")
    parser.add_argument(
        "--count",
        type=options.positive,
        default=4,
        metavar="N",
        help="images to look at (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="every range as JSON")


def _health(args: argparse.Namespace) -> int:
    from ..data.picture_files import passed_over_text

    try:
        from ..analysis.health import health_of_file
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise RuntimeError(f"the health report needs torch; {needs('torch')}") from error
    passed_over = Counter[str]()
    try:
        found = health_of_file(args.weights, args.images, args.count, passed_over)
    finally:
        if passed_over:
            complain(passed_over_text(passed_over))
    extra = {"passed_over": dict(sorted(passed_over.items()))} if passed_over else {}
    print(json.dumps({**found.to_dict(), **extra}) if args.json else found)
    return 0 if found.first_nonfinite is None else 1


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from ..tools import plan

    plan.add_arguments(parser)


def _plan(args: argparse.Namespace) -> int:
    from ..tools import plan

    found = plan.report(args)
    if args.json:
        print(json.dumps(found))
        return 0
    height, width = found["config"]["img_size"]
    print(f"{height} x {width} pixels, {found['tokens']} tokens; bytes are an upper estimate")
    _print_table(plan.table(found))
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _doctor(args: argparse.Namespace) -> int:
    from ..tools.selftest.kernels import report

    facts = report()
    if args.json:
        print(json.dumps(facts))
        return 0 if facts["ok"] else 1
    for title in ("build", "machine"):
        print(title)
        _print_table(
            [[k, ", ".join(v) or "none" if isinstance(v, list) else v] for k, v in facts[title].items()],
            indent="  ",
        )
    print("self-test")
    _print_table([[row["check"], row["status"], row["detail"]] for row in facts["checks"]], indent="  ")
    print("all is well" if facts["ok"] else "something is wrong: see the failed lines above")
    return 0 if facts["ok"] else 1


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Command]] = {
    "demo": (
        "train a small Vim on handwritten digits, save it, reload it, show what it sees",
        _demo_arguments,
        _demo,
    ),
    "train": ("train on images: recipes of the paper, resumable, distributed", _train_arguments, _train),
    "eval": ("measure weights on images: top-1, top-5, per class, confusion", _eval_arguments, _eval),
    "predict": ("classify picture files (no torch needed)", _predict_arguments, _predict),
    "convert": ("make a vimcore file from the authors' weights", _convert_arguments, _convert),
    "info": ("show what a vimcore file holds", _info_arguments, _info),
    "bench": ("measure speed against other networks and libraries", _bench_arguments, _bench),
    "plot": ("draw training curves, confusion matrix and worst mistakes of runs", _plot_arguments, _plot),
    "health": ("show the ranges inside a network and the precision it bears", _health_arguments, _health),
    "plan": ("say how much memory a network needs, and which batches fit", _plan_arguments, _plan),
    "doctor": (
        "show build and machine, and test the kernels against a float64 reference",
        _doctor_arguments,
        _doctor,
    ),
}


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """That of all commands, and that of the chosen one.

    Only the chosen command gets its options, so that no other command's module is imported.
    """
    from .. import __version__

    parser = own = argparse.ArgumentParser(
        prog="vimcore", description="Vision Mamba on CPU and GPU: train, load, explain, run."
    )
    parser.add_argument("--version", action="version", version=f"vimcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, add_arguments, run) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            add_arguments(sub)
            own = sub
        sub.set_defaults(run=run)
    return parser, own


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Like `parse_args`, but what nobody knows is answered by the command that was given it."""
    chosen = next((a for a in arguments if a in COMMANDS), None)
    parser, own = _parser(chosen)
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
            status = args.run(args)
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


if __name__ == "__main__":
    sys.exit(main())
