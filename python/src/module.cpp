// SPDX-License-Identifier: Apache-2.0
// The extension module vimcore._core. Everything here is private to the package vimcore.
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
    nb::list devices;
    for (int i = 0, count = cuda_device_count(); i < count; i++) devices.append(cuda_description(i));
    out["cuda"] = info.cuda ? nb::object(devices) : nb::object(nb::bool_(false));
    out["jpeg"] = info.jpeg;
    out["png"] = info.png;
    out["openmp"] = info.openmp;
    return out;
}

nb::tuple to_tuple(const Shape& shape)
{
    nb::list sizes;
    for (std::int64_t size : shape) sizes.append(size);
    return nb::tuple(sizes);
}

Config parse(const std::string& json)
{
    Config config = Config::from_json(json);
    config.validate();
    return config;
}

nb::list param_shapes(const std::string& json)
{
    nb::list out;
    Params params;
    for_each_param(parse(json), params, [&](const std::string& name, Tensor&, const Shape& shape) {
        out.append(nb::make_tuple(name, to_tuple(shape)));
    });
    return out;
}

nb::dict config_facts(const std::string& json)
{
    const Config c = parse(json);
    nb::dict out;
    out["inner"] = c.inner();
    out["rank"] = c.rank();
    out["grid"] = nb::make_tuple(c.grid_height(), c.grid_width());
    out["patches"] = c.patches();
    out["tokens"] = c.tokens();
    out["class_tokens"] = c.class_tokens();
    out["class_position"] = c.class_position();
    out["flops"] = c.flops();
    return out;
}

// Bytes that a network needs by part; see vimcore/plan.h. memory "": inference.
nb::dict plan_bytes(const std::string& json, std::int64_t batch, const std::string& memory, const std::string& dtype,
                    int threads, bool cuda)
{
    const Config c = parse(json);
    const DType type = dtype == "bfloat16" ? DType::bf16 : dtype == "float16" ? DType::f16 : DType::f32;
    const Device device = cuda ? Device::cuda() : Device::cpu();
    nb::dict out;
    out["weights"] = weight_bytes(c);
    if (memory.empty()) {
        out["scratch"] = forward_bytes(c, batch, type, threads, device);
    } else {
        out["saved"] = saved_bytes(c, to_memory(memory), batch, type);
        out["scratch"] = training_bytes(c, to_memory(memory), batch, type, threads, device);
    }
    return out;
}

}  // namespace

NB_MODULE(_core, m)
{
    nb::set_leak_warnings(false);  // a Saved may outlive the interpreter inside torch's graph
    nb::exception<Error>(m, "Error", PyExc_RuntimeError);
    m.attr("__version__") = VIMCORE_VERSION;

    m.def("build_info", build_info_dict);
    m.def("cuda_device_count", cuda_device_count);
    m.def("cuda_description", cuda_description, nb::arg("device"));
    m.def("fma_peak", fma_peak, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("config_normalize", [](const std::string& json) { return parse(json).to_json(); }, nb::arg("config_json"));
    m.def("config_facts", config_facts, nb::arg("config_json"));
    m.def("param_shapes", param_shapes, nb::arg("config_json"));
    m.def("flops", [](const std::string& json) { return parse(json).flops(); }, nb::arg("config_json"));
    m.def("plan_bytes", plan_bytes, nb::arg("config_json"), nb::arg("batch"), nb::arg("memory") = "",
          nb::arg("dtype") = "float32", nb::arg("threads") = 1, nb::arg("cuda") = false);
    m.def("machine_bytes", machine_bytes);
    m.def("release_memory", [] {
        contexts().clear();
        captured_saved().clear();
    });

    bind_network(m);
    bind_ops(m);
    bind_files(m);
}

}  // namespace vimcore::python
