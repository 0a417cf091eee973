"""Checks of the source tree: who includes and imports whom, paths that the documents name.

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
    "python/src": r"torch|/cpu/|arena\.h|backend\.h",
    "tests": r"/src/|\.\./cuda/",
}
# The floors of cpp/src with their public headers: a file includes its own floor and those below.
FLOORS = {
    "core": ["tensor", "context", "error", "ops", "config", "build_info", "version"],
    "files": ["safetensors"],
    "images": ["image", "preprocess"],
    "network": ["params", "model", "plan", "optimizer"],
    "": ["c_api"],  # cpp/src/c_api.cpp
}
# Kernel translation units may not include the standard library: see cpp/cpu/kernels.h.
KERNEL_HEADERS = {"immintrin.h", "arm_neon.h", "kernels.h", "simd.h", "simd_math.h"}


def check_includes() -> list[str]:
    faults = []
    for folder, pattern in FORBIDDEN.items():
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
                continue
            for name in INCLUDE.findall(path.read_text()):
                if re.search(pattern, name):
                    faults.append(f"{path.relative_to(root)} includes {name}")
    return faults + check_floors() + check_kernels()


def check_floors() -> list[str]:
    faults = []
    source = root / "cpp/src"
    floor_of = {f"vimcore/{name}.h": floor for floor, names in FLOORS.items() for name in names}
    for path in sorted(source.rglob("*.*")):
        above = list(FLOORS)[list(FLOORS).index(str(path.relative_to(source).parent).strip(".")) + 1 :]
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            if name not in floor_of and not (source / name).is_file():
                faults.append(f"{path.relative_to(root)} includes {name}, expected a path below cpp/src")
            elif floor_of.get(name, name.rpartition("/")[0]) in above:
                faults.append(f"{path.relative_to(root)} includes {name} of a floor above its own")
    return faults


def check_kernels() -> list[str]:
    faults = []
    for path in [*(root / "cpp/cpu").glob("*-inl.h"), root / "cpp/cpu/simd.h", root / "cpp/cpu/kernels.h"]:
        for name in INCLUDE.findall(path.read_text()):
            if name not in KERNEL_HEADERS and not name.endswith("-inl.h"):
                faults.append(f"{path.relative_to(root)} includes {name}, kernels use no other headers")
    return faults


# Python: a module imports from floors below its own and from its own folder; none imports itself by way
# of others.
# The package's face (`__init__.py`: public names, imported when first used) and `_core` belong to no floor.
PYTHON_FLOORS = [
    "utils",
    "config",
    "positions autograd weights",
    "ops runtime",
    "nn",
    "io",
    "timm data",
    "tasks",
    "train",
    "analysis",
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
    faults = []
    for module, names in graph.items():
        own = module.split(".")[0]
        if own not in floor:
            faults.append(f"python/vimcore: {module} is on no floor (PYTHON_FLOORS in tests/check_tree.py)")
            continue
        for name in sorted(names):
            other, _, rest = name.partition(".")
            if other != own and floor.get(other, len(PYTHON_FLOORS)) >= floor[own]:
                faults.append(f"python/vimcore: {module} imports {name}, which is not below it")
            seen = PYTHON_NARROW.get((module, other), PYTHON_NARROW.get((own, other)))
            if seen is not None and rest not in seen:
                faults.append(f"python/vimcore: {module} imports {name}, which is not for it")
    for module in graph:
        if reaches(graph, module, module):
            faults.append(f"python/vimcore: {module} imports itself, by way of others")
    return faults


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


def check_documents() -> list[str]:
    """Paths in backquotes that look like ours exist."""
    faults = []
    for document in sorted(root.glob("*.md")):
        for name in re.findall(r"`((?:cpp|cuda|python|tests|\.ci)/[\w./*{},-]*)`", document.read_text()):
            if not re.search(r"[*{]", name) and not (root / name).exists():
                faults.append(f"{document.name} names {name}, which does not exist")
    return faults


def main() -> int:
    faults = check_includes() + check_imports() + check_documents()
    print("\n".join(faults) if faults else "source tree: in order")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
