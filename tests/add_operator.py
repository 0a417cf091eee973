"""Adds an operator by CONTRIBUTING's list of places, in a scratch copy of the tree, and runs it.

    python tests/add_operator.py [--build build/dev]

The operator is `square`: out = x * x. Its edits must be in the places that the list names, and in no other;
what they touch is compiled (the instruction set `baseline` alone), and compared with a loop on the CPU and on
the simulated GPU, whose other kernels come from the build's libvimcore_shim.a (target vimcore_shim).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "square"

# What the seventh place of the list is made of: here one program serves both devices.
TEST = """
#include <stdexcept>
#include <vector>

#include "core/backend.h"
#include "tests/cpp/check.h"

using namespace vimcore;
int main()
{
#if defined(VIMCORE_SHIM)
    const Device device = Device::cuda(0);
#else
    const Device device = Device::cpu();
#endif
    Context ctx(device, 2);
    const Shape shape{3, 70, 5};
    std::vector<float> values;
    for (int i = 0; i < shape.numel(); i++) values.push_back(0.25f * static_cast<float>(i % 37) - 3.0f);
    const Buffer in(values.size() * 4, device), result(values.size() * 4, device);
    const Tensor x{in.data(), shape, DType::f32, device}, out{result.data(), shape, DType::f32, device};
    backend_of(ctx).upload(ctx, values.data(), x);
    square(ctx, {.x = x, .out = out});
    std::vector<float> got(values.size());
    backend_of(ctx).download(ctx, out, got.data());
    for (std::size_t i = 0; i < got.size(); i++) CHECK(got[i] == values[i] * values[i]);
    CHECK_THROWS(square(ctx, {.x = x, .out = {}}), std::invalid_argument);
    return check_failures();
}
"""

NEW_FILES = {
    f"cpp/cpu/{NAME}.cpp": """#include "cpu_backend.h"

namespace vimcore::cpu {

void CpuBackend::square(Context& ctx, const Square& args)
{
    dispatch(args.out.dtype, [&](auto t) {
        using T = decltype(t);
        const Index count = args.out.numel(), rows = 64, tasks = ceil_div(count, rows);
        parallel_for(ctx, tasks, [&](Index task) {
            const Index begin = task * rows, length = std::min(rows, count - begin);
            kernels<T>().square({args.x.as<T>() + begin, args.out.as<T>() + begin, length});
        });
    });
}

}  // namespace vimcore::cpu
""",
    f"cpp/cpu/{NAME}-inl.h": """#pragma once
#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

template <class T>
static void square(const SquareArgs<T>& args)
{
    for (Index i = 0; i < args.count; i += lanes<T>) {
        const Index n = args.count - i < lanes<T> ? args.count - i : lanes<T>;
        const Vec<T> x = load_upto<T>(args.x + i, n);
        store_upto<T>(args.out + i, x * x, n);
    }
}

}  // namespace vimcore::cpu::VIM_ISA
""",
    f"cuda/{NAME}.cu": """#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

template <class T>
__global__ void square_kernel(const T* x, T* out, Index count)
{
    const Index i = device::flat_index();
    if (i < count) out[i] = device::from_float<T>(device::to_float(x[i]) * device::to_float(x[i]));
}

}  // namespace

void square(Context& ctx, const Square& args)
{
    const Index count = args.out.numel();
    dispatch(args.out.dtype, [&](auto t) {
        using T = decltype(t);
        if (count)
            VIM_LAUNCH((square_kernel<T>), flat_grid(count), flat_block, 0, stream_of(ctx), args.x.as<T>(),
                       args.out.as<T>(), count);
    });
}

}  // namespace vimcore::cuda
""",
}


def before(mark: str, text: str) -> Callable[[str], str]:
    """Inserts text before the last mark."""

    def edit(source: str) -> str:
        if mark not in source:
            raise SystemExit(f"add_operator: no {mark!r} to insert before")
        head, _, tail = source.rpartition(mark)
        return head + text + mark + tail

    return edit


EDITS: dict[str, Callable[[str], str]] = {
    "cpp/include/vimcore/ops.h": before(
        "\n}  // namespace vimcore",
        """
// out = x x
struct Square {
    Tensor x;    // any shape
    Tensor out;  // the same
};
void square(Context& ctx, const Square& args);
""",
    ),
    "cpp/src/core/operators.h": lambda text: re.sub(
        r"(    OPERATOR\(\w+, \w+\))(\n// clang-format on)", r"\1 \\\n    OPERATOR(square, Square)\2", text
    ),
    "cpp/src/core/ops.cpp": before(
        "\n}  // namespace vimcore",
        """
void square(Context& ctx, const Square& args)
{
    const Check check(ctx, "square", "x", args.x);
    check.required("x", args.x, args.x.shape).required("out", args.out, args.x.shape);
    backend_of(ctx).square(ctx, args);
}
""",
    ),
    "CMakeLists.txt": before("cpp/cpu/readout.cpp", f"cpp/cpu/{NAME}.cpp "),
    "cpp/cpu/kernels.h": lambda text: text.replace(
        "struct Kernels {",
        "struct SquareArgs {\n    const T* x;\n    T* out;\n    Index count;\n};\n\n"
        "template <class T>\nstruct Kernels {\n    void (*square)(const SquareArgs<T>&);",
    ),
    "cpp/cpu/kernels-inl.h": lambda text: text.replace(
        '#include "scan-inl.h"', '#include "scan-inl.h"\n#include "square-inl.h"'
    ).replace("    Kernels<T> table = {", "    Kernels<T> table = {\n        .square = square<T>,"),
}


def listed_places() -> set[str]:
    """The files that CONTRIBUTING names, with the operator's name put in."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("**Add an operator.**")[2]
    places = re.findall(r"^\d\. .*(?:\n   .*)*", section.partition("\n\n**")[0], re.MULTILINE)
    if not 1 <= len(places) <= 7:
        raise SystemExit(f"add_operator: CONTRIBUTING.md lists {len(places)} places, expected at most 7")
    names = {
        name.replace("{name}", NAME) for place in places for name in re.findall(r"`([\w./{}-]+)`", place)
    }
    return {name for name in names if not name.startswith("tests/")}


def scratch_copy(tree: Path) -> None:
    for folder in ("cpp", "cuda", "tests/shim", "tests/cpp"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    for name, text in NEW_FILES.items():
        (tree / name).write_text(text)
    for name, edit in EDITS.items():
        source = (tree / name).read_text()
        changed = edit(source)
        if changed == source:
            raise SystemExit(f"add_operator: the edit of {name} found nothing to change")
        (tree / name).write_text(changed)


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"add_operator: {' '.join(command)}\n{done.stdout}{done.stderr}")


def build_and_run(tree: Path, shim: Path) -> None:
    compiler = [*os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", "").split(), os.environ.get("CXX", "c++")]
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror"]
    options += [f"-I{tree / folder}" for folder in ("", "cpp/include", "cpp/src", "cpp/cpu")]
    options += ["-DVIMCORE_HAVE_BASELINE=1"]
    simulated = [f"-I{tree / folder}" for folder in ("tests/shim/include", "tests/shim", "cuda")]
    simulated += ["-DVIMCORE_SHIM=1", "-DVIMCORE_CUDA=1"]

    # Core and CPU backend as CMake lists them: a new file that is not in the list is missed here, too.
    sources = re.findall(r"\bcpp/(?:src/core|cpu)/\w+\.cpp", (tree / "CMakeLists.txt").read_text())
    sources = [name for name in dict.fromkeys(sources) if "build_info" not in name and "checksum" not in name]
    sources += ["cpp/cpu/kernels_baseline.cpp", "cpp/cpu/bf16_baseline.cpp"]
    (tree / "test.cpp").write_text(TEST)
    jobs = dict.fromkeys([*sources, "cpp/src/core/no_cuda.cpp", "test.cpp"], options)
    jobs["test.cpp:simulated"] = simulated + options
    for name in ("cuda/cuda_backend.cpp", f"cuda/{NAME}.cu"):
        jobs[name] = [*simulated, *options, "-Wno-maybe-uninitialized"]

    def compile_one(job: tuple[str, list[str]]) -> None:
        name, flags = job
        source, output = tree / name.partition(":")[0], tree / (name.replace("/", "_") + ".o")
        run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs.items()))

    def objects(names: list[str]) -> list[str]:
        return [str(tree / (name.replace("/", "_") + ".o")) for name in names]

    linker = compiler[-1:] + ["-pthread"]
    run([*linker, *objects([*sources, "cpp/src/core/no_cuda.cpp", "test.cpp"]), "-o", str(tree / "on_cpu")])
    own = objects([*sources, "cuda/cuda_backend.cpp", f"cuda/{NAME}.cu", "test.cpp:simulated"])
    run([*linker, *own, str(shim), "-ldl", "-o", str(tree / "on_gpu")])
    for program in ("on_cpu", "on_gpu"):
        run([str(tree / program)], VIMCORE_ISA="baseline")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Adds an operator by CONTRIBUTING's list, in a scratch copy."
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build/dev", help="a build with vimcore_shim")
    shim = parser.parse_args().build / "tests/cuda/libvimcore_shim.a"
    if not shim.exists():
        raise SystemExit(f"add_operator: {shim} is missing: build the target vimcore_shim")
    listed, touched = listed_places(), {*EDITS, *NEW_FILES}
    if listed != touched:
        raise SystemExit(
            f"add_operator: CONTRIBUTING.md names {sorted(listed - touched)}, which no operator needs, "
            f"and leaves out {sorted(touched - listed)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        scratch_copy(Path(folder))
        build_and_run(Path(folder), shim)
    print(f"an operator was added in the {len(touched)} files that CONTRIBUTING.md names, and runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
