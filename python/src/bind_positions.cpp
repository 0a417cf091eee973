// SPDX-License-Identifier: Apache-2.0
// Position tables and rotations for vimcore.positions; arrays are the host's.
#include "bindings.h"
#include "convert.h"

namespace vimcore::python {

namespace {

using Sides = std::pair<std::int64_t, std::int64_t>;  // rows, columns

ClassToken to_class_token(const std::string& name)
{
    constexpr ClassToken all[] = {ClassToken::none,   ClassToken::head,    ClassToken::random,
                                  ClassToken::middle, ClassToken::double_, ClassToken::registers};
    std::string names;
    for (const ClassToken token : all) {
        if (name == name_of(token)) return token;
        names += std::string(names.empty() ? "" : ", ") + name_of(token);
    }
    throw std::invalid_argument("class_token: expected one of " + names + ", got '" + name + "'");
}

std::vector<std::int64_t> listed(const ClassPlaces& places)
{
    std::vector<std::int64_t> found;
    for (std::int64_t k = 0; k < places.count; k++) found.push_back(places.at(k));
    return found;
}

TableResize to_resize(const std::string& class_token, Sides from, Sides to, const std::string& way)
{
    if (way != "correct" && way != "authors")
        throw std::invalid_argument("pos_embed: expected 'correct' or 'authors', got '" + way + "'");
    return table_resize(to_class_token(class_token), {from.first, from.second}, {to.first, to.second},
                        way == "authors" ? TableWay::authors : TableWay::correct);
}

void resize_positions(const In& table, const Out& out, const std::string& class_token, Sides from, Sides to,
                      const std::string& way)
{
    const TableResize resize = to_resize(class_token, from, to, way);
    const PositionsForward args{.table = to_host_tensor(table, "resize_pos_embed", "table"),
                                .out = to_host_tensor(out, "resize_pos_embed", "out"),
                                .resize = resize};
    nb::gil_scoped_release release;
    Context ctx(Device::cpu(), 1);
    positions_forward(ctx, args);
}

void resize_positions_backward(const In& dout, const Out& dtable, const std::string& class_token, Sides from, Sides to,
                               const std::string& way)
{
    const TableResize resize = to_resize(class_token, from, to, way);
    const PositionsBackward args{.dout = to_host_tensor(dout, "resize_pos_embed", "dout"),
                                 .dtable = to_host_tensor(dtable, "resize_pos_embed", "dtable"),
                                 .resize = resize};
    nb::gil_scoped_release release;
    Context ctx(Device::cpu(), 1);
    positions_backward(ctx, args);
}

}  // namespace

void bind_positions(nb::module_& m)
{
    m.def(
        "class_rows",
        [](const std::string& class_token, std::int64_t patches) {
            return listed(table_places(to_class_token(class_token), patches));
        },
        nb::arg("class_token"), nb::arg("patches"));
    m.def(
        "class_places",
        [](const std::string& class_token, std::int64_t patches, std::int64_t registers) {
            return listed(class_places(to_class_token(class_token), patches, registers));
        },
        nb::arg("class_token"), nb::arg("patches"), nb::arg("registers") = 0);
    m.def("resize_positions", &resize_positions, nb::arg("table").noconvert(), nb::arg("out").noconvert(),
          nb::arg("class_token"), nb::arg("old_grid"), nb::arg("new_grid"), nb::arg("way"),
          "The position table for another grid, written to `out`.");
    m.def("resize_positions_backward", &resize_positions_backward, nb::arg("dout").noconvert(),
          nb::arg("dtable").noconvert(), nb::arg("class_token"), nb::arg("old_grid"), nb::arg("new_grid"),
          nb::arg("way"), "The gradient of the table, added to `dtable`.");
    m.def(
        "rope_tables",
        [](Sides grid, std::int64_t rope_grid, const Out& cos, const Out& sin) {
            rope_tables({grid.first, grid.second}, rope_grid, to_host_tensor(cos, "rope_tables", "cos"),
                        to_host_tensor(sin, "rope_tables", "sin"));
        },
        nb::arg("grid"), nb::arg("rope_grid"), nb::arg("cos").noconvert(), nb::arg("sin").noconvert());
}

}  // namespace vimcore::python
