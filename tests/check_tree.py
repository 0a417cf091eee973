"""Checks of the source tree: who includes and imports whom, paths in the documents, stated versions.

Headers that stand alone are looked at in tests/package/run.sh.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)

# A file below the folder on the left may not include anything that matches the pattern on the right.
FORBIDDEN = {
    "cpp/include/vimcore": r"^(?!vimcore/)(?!/)(?!std)[a-z_/]+\.h$|cuda|torch|nlohmann|nanobind|Python\.h",
    "cpp/src": r"\.\./|\.cu|cuda_|torch|kernels\.h|simd\.h|isa\.h|threads\.h|-inl\.h",
    "cpp/cpu": r"\.\./|cuda|torch|model\.h|^(files|images|network)/",
    "cpp/tools": r"^(core|files|images|network)/|(^|/)(kernels|simd\w*|isa)\.h$|-inl\.h$|cuda",
    "cuda": r"\.\./|/cpu/|model\.h|^(files|images|network)/|torch",
    "python/src": r"torch|/cpu/|^(core|files|images|network)/|^(?!vimcore/|nanobind/)\w+/",
    "tests": r"/src/|\.\./cuda/",
}
# The floors of cpp/src with their public headers: a file includes its own floor and those below.
FLOORS = {
    "core": ["tensor", "context", "error", "option", "ops", "config", "checksum", "build_info", "version"],
    "files": ["safetensors", "atomic_file"],
    "images": ["image", "preprocess"],
    "network": ["params", "model", "model_file", "plan", "weights", "optimizer", "positions"],
    "segment": ["segment"],
    "": ["c_api"],  # cpp/src/c_api.cpp
}
# Kernel translation units may not include the standard library: see cpp/cpu/kernels.h.
KERNEL_HEADERS = {"immintrin.h", "arm_neon.h", "kernels.h", "simd.h", "simd_math.h"}


def check_includes() -> list[str]:
    errors = []
    for folder, pattern in FORBIDDEN.items():
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
                continue
            for name in INCLUDE.findall(path.read_text()):
                if re.search(pattern, name):
                    errors.append(f"{path.relative_to(root)} includes {name}")
    return errors + check_floors() + check_kernels()


def check_floors() -> list[str]:
    errors = []
    source = root / "cpp/src"
    floor_of = {f"vimcore/{name}.h": floor for floor, names in FLOORS.items() for name in names}
    for path in sorted(source.rglob("*.*")):
        above = list(FLOORS)[list(FLOORS).index(str(path.relative_to(source).parent).strip(".")) + 1 :]
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            if name not in floor_of and not (source / name).is_file():
                errors.append(f"{path.relative_to(root)} includes {name}, expected a path below cpp/src")
            elif floor_of.get(name, name.rpartition("/")[0]) in above:
                errors.append(f"{path.relative_to(root)} includes {name} of a floor above its own")
    return errors


def check_kernels() -> list[str]:
    errors = []
    for path in [*(root / "cpp/cpu").glob("*-inl.h"), root / "cpp/cpu/simd.h", root / "cpp/cpu/kernels.h"]:
        for name in INCLUDE.findall(path.read_text()):
            if name not in KERNEL_HEADERS and not name.endswith("-inl.h"):
                errors.append(f"{path.relative_to(root)} includes {name}, kernels use no other headers")
    return errors


# Python: a module imports from floors below its own and from its own folder; none imports itself by way
# of others.
# The package's face (`__init__.py`: public names, imported when first used) and `_core` belong to no floor.
PYTHON_FLOORS = [
    "utils",
    "config",
    "positions autograd weights",
    "hub",
    "ops",
    "nn",
    "io segmentation detection pretraining",
    "timm data",
    "clip results",
    "runtime",
    "tasks",
    "train",
    "analysis export",
    "plots",
    "tools",
    "cli",
    "__main__",
]
# Modules of the first folder, or the module, see of the second one only these.
PYTHON_NARROW = {
    ("train", "tasks"): {"task", "settings"},
    # the small public face of the engine is for classifiers
    ("train.in_memory", "tasks"): {"classification.evaluation"},
    ("analysis", "train"): set(),
    ("plots", "train"): {"log"},
}


def imports_of(path: Path, package: Path) -> set[str]:
    """What a module of the package imports from it: at its top, in functions, for type checkers."""
    here = path.relative_to(package).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("vimcore.") for a in node.names if a.name.startswith("vimcore.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            elif node.module and node.module.split(".")[0] == "vimcore":
                base = node.module.split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            for alias in node.names:
                for parts in ([*base, alias.name], base):
                    if (
                        package.joinpath(*parts).is_dir()
                        or package.joinpath(*parts).with_suffix(".py").exists()
                    ):
                        found.add(".".join(parts))
                        break
    return {name for name in found if name and name != "_core"} - {".".join(here)}


def check_imports() -> list[str]:
    """Directions between the floors of the Python package, and circles."""
    package = root / "python/vimcore"
    floor = {name: i for i, names in enumerate(PYTHON_FLOORS) for name in names.split()}
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            graph[name] = imports_of(path, package)
    errors = []
    for module, names in graph.items():
        own = module.split(".")[0]
        if own not in floor:
            errors.append(f"python/vimcore: {module} is on no floor (PYTHON_FLOORS in tests/check_tree.py)")
            continue
        for name in sorted(names):
            other, _, rest = name.partition(".")
            if other != own and floor.get(other, len(PYTHON_FLOORS)) >= floor[own]:
                errors.append(f"python/vimcore: {module} imports {name}, which is not below it")
            seen = PYTHON_NARROW.get((module, other), PYTHON_NARROW.get((own, other)))
            if seen is not None and rest not in seen:
                errors.append(f"python/vimcore: {module} imports {name}, which is not for it")
    for module in graph:
        if reaches(graph, module, module):
            errors.append(f"python/vimcore: {module} imports itself, by way of others")
    return errors


def reaches(graph: dict[str, set[str]], start: str, end: str) -> bool:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in graph.get(todo.pop(), ()):
            if name == end:
                return True
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return False


# Where a path in a document may begin.
BASES = ("", "python/vimcore", "cpp/include", "cpp/src")
# A path by itself, and one in a command.
PATH = re.compile(r"(?:[\w.{},*-]+/)+(?:[\w{},*.-]+\.(?:cff|cmake|cpp|cuh?|h|json|md|npz|py|sh|toml|txt))?")
OURS = re.compile(r"(?:cpp|cuda|python|tests|\.ci)/[\w./*{},-]*")


def expanded(pattern: str) -> list[str]:
    """A pattern with {a,b} as one for each choice; {name} stands for any name."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [re.sub(r"\{\w+\}", "*", pattern)]
    ends = (pattern[: found.start()] + choice + pattern[found.end() :] for choice in found[1].split(","))
    return [one for end in ends for one in expanded(end)]


def check_documents() -> list[str]:
    """Paths in backquotes, patterns with {a,b} and * among them, exist."""
    errors = []
    for document in sorted(root.glob("*.md")):
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`]+)`", prose):
            words = [word for word in span.split() if OURS.fullmatch(word)]
            if PATH.fullmatch(span):
                words = [span]
            for path in (path for word in words for path in expanded(word)):
                if not any(any((root / base).glob(path)) for base in BASES):
                    errors.append(f"{document.name} names {path}, which does not exist")
    return errors


def check_versions() -> list[str]:
    """Header, Python package and citation state one version; CMake compares its own with the header's."""
    places = {
        "cpp/include/vimcore/version.h": r'^#define VIMCORE_VERSION "(.*)"$',
        "pyproject.toml": r'^version = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
    }
    stated = {
        name: re.findall(rule, (root / name).read_text(), re.MULTILINE) for name, rule in places.items()
    }
    if (
        all(len(found) == 1 for found in stated.values())
        and len({found[0] for found in stated.values()}) == 1
    ):
        return []
    return ["versions differ: " + ", ".join(f"{name} {' '.join(found)}" for name, found in stated.items())]


def main() -> int:
    errors = check_includes() + check_imports() + check_documents() + check_versions()
    print("\n".join(errors) if errors else "source tree: in order")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
