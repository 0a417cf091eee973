// SPDX-License-Identifier: Apache-2.0
// The extension module vimcore._core. Everything here is private to the package vimcore.
#include "bindings.h"
#include "place.h"
#include "saved.h"

namespace vimcore::python {

namespace {

nb::dict build_info_dict()
{
    const BuildInfo info = build_info();
    nb::dict out;
    out["version"] = info.version;
    out["compiler"] = info.compiler;
    out["isa"] = info.isa;
    out["isas"] = info.isas;
    out["bf16"] = bf16_unit();
    nb::list devices;
    for (int i = 0, count = cuda_device_count(); i < count; i++) devices.append(cuda_description(i));
    out["cuda"] = info.cuda ? nb::object(devices) : nb::object(nb::bool_(false));
    out["jpeg"] = info.jpeg;
    out["png"] = info.png;
    out["openmp"] = info.openmp;
    return out;
}

// ask(device, bytes) -> whether memory was given back; None: nobody is asked.
void ask_for_memory(nb::object ask)
{
    if (ask.is_none()) return set_give_back_memory(nullptr);
    auto* const held = new nb::object(std::move(ask));  // never destroyed: calls may outlive the interpreter
    set_give_back_memory([held](int device, std::size_t bytes) {
        if (!Py_IsInitialized()) return false;
        const nb::gil_scoped_acquire gil;
        return nb::cast<bool>((*held)(device, bytes));
    });
}

}  // namespace

NB_MODULE(_core, m)
{
    nb::set_leak_warnings(false);  // a Saved may outlive the interpreter inside torch's graph
    nb::exception<Error>(m, "Error", PyExc_RuntimeError);
    m.attr("__version__") = VIMCORE_VERSION;

    m.def(
        "build_info", build_info_dict, nb::sig("def build_info() -> dict[str, typing.Any]"),
        "Version, compiler, kernels in use and built in, unit for bf16 (\"\": none), CUDA devices, JPEG, PNG, OpenMP.");
    m.def("bf16_refusal", bf16_refusal,
          "Why this CPU does not compute in bfloat16, and what to do; \"\" where it does.");
    m.def("cuda_device_count", cuda_device_count);
    m.def("cuda_description", cuda_description, nb::arg("device"));
    m.def(
        "cuda_products",
        [] {
            const CudaProducts products = cuda_products();
            nb::dict out;
            out["library"] = products.library;
            out["built_in"] = products.built_in;
            out["other_algorithm"] = products.other_algorithm;
            out["first_built_in"] = products.first_built_in;
            return out;
        },
        nb::sig("def cuda_products() -> dict[str, typing.Any]"),
        "Products of matrices on CUDA so far: by cuBLASLt, by built-in kernels as it had no algorithm,\nand by it with "
        "another algorithm than for other numbers of rows.");
    m.def("set_give_back_memory", ask_for_memory, nb::arg("ask").none(),
          nb::sig("def set_give_back_memory(ask: collections.abc.Callable[[int, int], bool] | None) -> None"),
          "Who is asked, by device and bytes, when a CUDA device has no memory left.\n\nTrue: the allocation is tried "
          "again.");
    m.def("fma_peak", fma_peak, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("bf16_peak", bf16_peak, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "release_memory",
        [] {
            contexts().clear();
            captured_saved().clear();
            captured_weights().clear();
        },
        "Frees the scratch memory that calls keep for the next ones.\n\nCUDA graphs captured before must not run "
        "again.");

    bind_config(m);
    bind_network(m);
    bind_engine(m);
    bind_ops(m);
    bind_positions(m);
    bind_files(m);
    bind_images(m);
    bind_segment(m);
}

}  // namespace vimcore::python
