// SPDX-License-Identifier: Apache-2.0
// Config and Preprocess as values of Python, and what follows from a Config alone.
#include <functional>
#include <optional>
#include <type_traits>

#include "bindings.h"
#include "options.h"
#include "saved.h"

namespace vimcore::python {

namespace {

nb::tuple to_tuple(const Shape& shape)
{
    nb::list sizes;
    for (std::int64_t size : shape) sizes.append(size);
    return nb::tuple(sizes);
}

nb::dict param_shapes(const Config& config)
{
    nb::dict out;
    for_each_param(config, [&](const std::string& name, const Shape& shape) { out[name.c_str()] = to_tuple(shape); });
    return out;
}

nb::dict block_shapes(const Config& config)
{
    nb::dict out;
    BlockParams none;
    for_each_param(config, none,
                   [&](const std::string& name, Tensor&, const Shape& shape) { out[name.c_str()] = to_tuple(shape); });
    return out;
}

// With other options.
template <class T>
T replaced(const T& value, const Options& changes)
{
    Options options = value.options();
    for (const auto& [name, change] : changes) {
        bool known = false;
        for (auto& [own, old] : options) {
            if (own != name) continue;
            old = change;
            known = true;
        }
        if (!known) options.emplace_back(name, change);  // which from_options refuses
    }
    return T::from_options(options);
}

// Bytes that a network needs by part; see vimcore/plan.h. memory "": inference.
nb::dict plan_bytes(const Config& config, std::int64_t batch, const std::string& memory, const std::string& dtype,
                    int threads, bool cuda)
{
    const DType type = to_float_type("[plan] dtype", dtype);
    const Device device = cuda ? Device::cuda() : Device::cpu();
    nb::dict out;
    const bool inference_here = memory.empty() && !cuda;
    out["weights"] = weight_bytes(config, inference_here ? std::optional(type) : std::nullopt);
    if (memory.empty()) {
        out["scratch"] = forward_bytes(config, batch, type, threads, device);
    } else {
        out["saved"] = saved_bytes(config, to_memory(memory), batch, type, device);
        out["scratch"] = training_bytes(config, to_memory(memory), batch, type, threads, device);
    }
    return out;
}

// What values have in common; `group` is that of their errors.
template <class T>
void bind_value(nb::class_<T>& bound, const char* name, const char* group)
{
    bound
        .def(
            "replace",
            [group](const T& value, const nb::kwargs& changes) { return replaced(value, to_options(changes, group)); },
            nb::sig(std::is_same_v<T, Config> ? "def replace(self, **changes: typing.Any) -> Config"
                                              : "def replace(self, **changes: typing.Any) -> Preprocess"),
            "The same with other options.")
        .def(
            "to_dict", [](const T& value) { return from_options(value.options()); },
            nb::sig("def to_dict(self) -> dict[str, typing.Any]"), "All options, as the constructor takes them.")
        .def("to_json", &T::to_json)
        .def_static(
            "from_json", [](const std::string& text) { return T::from_json(text); }, nb::arg("text"))
        .def(
            "__eq__",
            [](const T& a, nb::handle b) {
                return nb::isinstance<T>(b) ? nb::object(nb::bool_(a == nb::cast<const T&>(b)))
                                            : nb::borrow(Py_NotImplemented);
            },
            nb::sig("def __eq__(self, other: object, /) -> bool"))
        .def("__hash__", [](const T& value) { return std::hash<std::string>{}(value.to_json()); })
        .def("__repr__", [name](const T& value) { return shown(name, value.options(), T{}.options()); })
        .def("__getstate__", &T::to_json)
        .def("__setstate__", [](T& value, const std::string& text) { new (&value) T(T::from_json(text)); });
}

void bind_preprocess(nb::module_& m)
{
    nb::class_<Preprocess> bound(m, "Preprocess",
                                 "How a picture becomes input: short side, centre crop, mean and standard deviation.");
    bound.def(
        "__init__",
        [](Preprocess* self, const nb::kwargs& options) {
            new (self) Preprocess(Preprocess::from_options(to_options(options, "preprocess")));
        },
        nb::sig("def __init__(self, *, resize: int = 256, crop: int | collections.abc.Sequence[int] = 224, "
                "mean: collections.abc.Sequence[float] = (0.485, 0.456, 0.406), std: collections.abc.Sequence[float] = "
                "(0.229, 0.224, 0.225), "
                "interpolation: str = 'bicubic') -> None"));
    bind_value(bound, "Preprocess", "preprocess");
    bound.def_ro("resize", &Preprocess::resize)
        .def_prop_ro("crop", [](const Preprocess& p) { return std::pair(p.crop_height, p.crop_width); })
        .def_ro("mean", &Preprocess::mean)
        .def_ro("std", &Preprocess::std)
        .def_static("default", &default_preprocess, nb::arg("config"),
                    "ImageNet's evaluation at the network's image size; None where its input is no picture.")
        .def("rescaled", &rescaled, nb::arg("crop_height"), nb::arg("crop_width"),
             "The same steps for another crop: the short side before it keeps its proportion.");
}

std::optional<std::int64_t> positive(std::int64_t value) { return value > 0 ? std::optional(value) : std::nullopt; }

void bind_fields(nb::class_<Config>& bound)
{
    bound.def_prop_ro("img_size", [](const Config& c) { return std::pair(c.img_height, c.img_width); })
        .def_ro("patch_size", &Config::patch_size)
        .def_ro("stride", &Config::stride)
        .def_ro("in_chans", &Config::in_chans)
        .def_ro("num_classes", &Config::num_classes)
        .def_ro("embed_dim", &Config::embed_dim)
        .def_ro("depth", &Config::depth)
        .def_ro("d_state", &Config::d_state)
        .def_ro("d_conv", &Config::d_conv)
        .def_ro("expand", &Config::expand)
        .def_prop_ro("dt_rank", &Config::rank)
        .def_prop_ro("directions", [](const Config& c) { return name_of(c.directions); })
        .def_ro("average_directions", &Config::average_directions)
        .def_prop_ro("class_token", [](const Config& c) { return name_of(c.class_token); })
        .def_prop_ro("registers", [](const Config& c) { return positive(c.registers); })
        .def_ro("neck_reduction", &Config::neck_reduction)
        .def_prop_ro("pool", [](const Config& c) { return name_of(c.pool); })
        .def_prop_ro("norm", [](const Config& c) { return name_of(c.norm); })
        .def_ro("norm_eps", &Config::norm_eps)
        .def_ro("pos_embed", &Config::pos_embed)
        .def_ro("rope", &Config::rope)
        .def_ro("rope_residual", &Config::rope_residual)
        .def_ro("rope_grid", &Config::rope_grid)
        .def_ro("layer_scale", &Config::layer_scale)
        .def_ro("drop_rate", &Config::drop_rate)
        .def_ro("drop_path_rate", &Config::drop_path_rate)
        .def_prop_ro("frames", [](const Config& c) { return positive(c.frames); });
}

void bind_facts(nb::class_<Config>& bound)
{
    bound.def_prop_ro("inner", &Config::inner, "E, the width of the mixers.")
        .def_prop_ro(
            "grid", [](const Config& c) { return std::pair(c.grid_height(), c.grid_width()); },
            "(rows, columns) of patches.")
        .def_prop_ro("patches", &Config::patches)
        .def_prop_ro("tokens", &Config::tokens, "L, class tokens included.")
        .def_prop_ro("class_tokens", &Config::class_tokens, "Their number.")
        .def_prop_ro("readout_width", &Config::readout_width, "Numbers that the head sees of an image.")
        .def_prop_ro("images_axes", &Config::images_axes, "Shape of a batch of images, as a text.")
        .def_prop_ro("class_position", &Config::class_position, "Index of the (first) class token in eval, or -1.")
        .def_prop_ro(
            "class_positions",
            [](const Config& c) {
                nb::list found;
                const ClassPlaces places = c.class_places();
                for (std::int64_t k = 0; k < places.count; k++) found.append(places.at(k));
                return found;
            },
            nb::sig("def class_positions(self) -> list[int]"), "Indices of the class tokens in eval, ascending.")
        .def_prop_ro("two_directions", &Config::two_directions)
        .def_prop_ro("head_per_token", &Config::head_per_token, "Whether the head is applied to every token.")
        .def_prop_ro("outputs", &Config::outputs, "Classes, or the width of the read-out where there is no head.")
        .def(
            "logits_shape", [](const Config& c, std::int64_t batch) { return to_tuple(c.logits_shape(batch)); },
            nb::arg("batch"), nb::sig("def logits_shape(self, batch: int) -> tuple[int, ...]"))
        .def("flops", &Config::flops, "Multiply-adds of one image, scans included.")
        .def("param_shapes", &param_shapes, nb::sig("def param_shapes(self) -> dict[str, tuple[int, ...]]"),
             "Shapes of all parameters by state-dict key, in order.")
        .def("block_shapes", &block_shapes, nb::sig("def block_shapes(self) -> dict[str, tuple[int, ...]]"),
             "Shapes of the parameters of one block by name, without \"layers.N.\".");
}

NamedShapes to_named_shapes(const nb::dict& shapes)
{
    NamedShapes out;
    for (const auto& [name, sizes] : shapes) {
        const auto values = nb::cast<std::vector<std::int64_t>>(sizes);
        if (values.size() > Shape::max_rank)
            throw std::invalid_argument(nb::cast<std::string>(name) + ": expected at most 8 axes, got " +
                                        std::to_string(values.size()));
        out.emplace_back(nb::cast<std::string>(name), Shape(values.data(), static_cast<int>(values.size())));
    }
    return out;
}

}  // namespace

void bind_config(nb::module_& m)
{
    nb::class_<Config> bound(m, "Config",
                             "The architecture of one Vision Mamba: a value, checked when it is made.\n\n"
                             "Options and defaults are those of `VisionMamba`; dt_rank is the number that \"auto\" "
                             "stands for.\n\nRaises:\n"
                             "    ValueError, TypeError: an option is unknown, out of range or of another type, or\n"
                             "        two do not go together.");
    bound.def(
        "__init__",
        [](Config* self, const nb::kwargs& options) {
            new (self) Config(Config::from_options(to_options(options, "config")));
        },
        nb::sig("def __init__(self, *, img_size: int | collections.abc.Sequence[int] = 224, patch_size: int = 16, "
                "stride: int | None = None, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 192, "
                "depth: int = 24, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | str = 'auto', "
                "directions: str = 'ssm_conv', average_directions: bool = True, class_token: str = 'middle', "
                "registers: int | None = None, neck_reduction: int = 1, pool: str = 'mean', norm: str = 'rms', "
                "norm_eps: float = 1e-5, pos_embed: bool = True, "
                "rope: bool = False, rope_residual: bool = False, rope_grid: int = 14, "
                "layer_scale: float | None = None, drop_rate: float = 0.0, drop_path_rate: float = 0.0, "
                "frames: int | None = None) -> None"));
    bind_value(bound, "Config", "config");
    bind_fields(bound);
    bind_facts(bound);
    bind_preprocess(m);

    m.def("plan_bytes", &plan_bytes, nb::arg("config"), nb::arg("batch"), nb::arg("memory") = "",
          nb::arg("dtype") = "float32", nb::arg("threads") = 1, nb::arg("cuda") = false,
          nb::sig("def plan_bytes(config: Config, batch: int, memory: str = '', dtype: str = 'float32', "
                  "threads: int = 1, cuda: bool = False) -> dict[str, int]"));
    m.def("machine_bytes", machine_bytes);
    m.def(
        "misfits",
        [](const nb::dict& wanted, const nb::dict& given) {
            return misfits(to_named_shapes(wanted), to_named_shapes(given));
        },
        nb::arg("wanted"), nb::arg("given"),
        nb::sig("def misfits(wanted: collections.abc.Mapping[str, collections.abc.Sequence[int]], "
                "given: collections.abc.Mapping[str, collections.abc.Sequence[int]]) -> list[str]"),
        "How given tensors differ from wanted ones, by name and shape; one line each.");
}

}  // namespace vimcore::python
