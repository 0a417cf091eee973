// SPDX-License-Identifier: Apache-2.0
#include "options.h"

#include <cmath>

namespace vimcore::python {

namespace {

// Whether a numpy scalar of type bool, which is no index.
bool is_numpy_bool(nb::handle value)
{
    const nb::handle type = value.type();
    const auto name = nb::cast<std::string>(type.attr("__name__"));
    return (name == "bool" || name == "bool_") && nb::cast<std::string>(type.attr("__module__")) == "numpy";
}

std::string start_of(nb::handle text)
{
    const auto all = nb::cast<std::string>(nb::str(text));
    return nb::cast<std::string>(nb::str(all.c_str())[nb::slice(nb::none(), nb::int_(60), nb::none())]);
}

[[noreturn]] void type_error(const std::string& what) { throw nb::type_error(what.c_str()); }

// An int, or what counts as one; false for anything else.
bool to_integer(nb::handle value, const std::string& what, std::int64_t& out)
{
    if (!PyIndex_Check(value.ptr())) return false;
    PyObject* index = PyNumber_Index(value.ptr());
    if (!index) {  // an array, or a tensor that is no integer
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
        PyErr_Clear();
        return false;
    }
    const nb::object number = nb::steal(index);
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0)
        throw std::invalid_argument(what + ": expected an integer of 64 bits, got " + start_of(nb::repr(number)));
    return true;
}

// A float, or a numpy or torch number without axes; false for anything else.
bool to_real(nb::handle value, const std::string& what, double& out)
{
    const nb::object shape = nb::getattr(value, "shape", nb::none());
    if (!nb::hasattr(value, "__float__") || !(shape.is_none() || shape.equal(nb::tuple()))) return false;
    PyObject* real = PyNumber_Float(value.ptr());
    if (!real) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
            throw nb::python_error();
        PyErr_Clear();
        type_error(what + ": expected a number or text, got " + start_of(nb::repr(value)));
    }
    out = PyFloat_AsDouble(nb::steal(real).ptr());
    if (!std::isfinite(out))
        throw std::invalid_argument(what + ": expected a finite number, got " + start_of(nb::repr(nb::float_(out))));
    return true;
}

}  // namespace

Option to_option(nb::handle value, const std::string& what)
{
    if (value.is_none()) return {};
    if (PyBool_Check(value.ptr())) return value.is(Py_True);
    if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
    if (is_numpy_bool(value)) return PyObject_IsTrue(value.ptr()) == 1;
    std::int64_t integer = 0;
    if (to_integer(value, what, integer)) return integer;
    double real = 0;
    if (to_real(value, what, real)) return real;
    const bool listed =
        nb::hasattr(value, "__iter__") && !nb::isinstance<nb::bytes>(value) && !nb::hasattr(value, "keys");
    if (!listed)
        type_error(what + ": expected a number or text, got " + nb::cast<std::string>(value.type().attr("__name__")));
    std::vector<Option> items;
    for (const nb::handle item : nb::iter(value)) items.push_back(to_option(item, what));
    return items;
}

Options to_options(const nb::kwargs& values, const char* group)
{
    Options options;
    for (const auto& [key, value] : values) {
        const auto name = nb::cast<std::string>(key);
        options.emplace_back(name, to_option(value, std::string("[") + group + "] " + name));
    }
    return options;
}

nb::object from_option(const Option& option)
{
    if (const auto* boolean = std::get_if<bool>(&option)) return nb::bool_(*boolean);
    if (const auto* integer = std::get_if<std::int64_t>(&option)) return nb::int_(*integer);
    if (const auto* real = std::get_if<double>(&option)) return nb::float_(*real);
    if (const auto* text = std::get_if<std::string>(&option)) return nb::str(text->c_str(), text->size());
    const auto* list = std::get_if<std::vector<Option>>(&option);
    if (!list) return nb::none();
    nb::list out;
    for (const Option& item : *list) out.append(from_option(item));
    return out;
}

nb::dict from_options(const Options& options)
{
    nb::dict out;
    for (const auto& [key, option] : options) out[key.c_str()] = from_option(option);
    return out;
}

std::string shown(const char* name, const Options& options, const Options& defaults)
{
    std::string out = std::string(name) + "(";
    bool first = true;
    for (std::size_t i = 0; i < options.size(); i++) {
        if (options[i] == defaults[i]) continue;
        out += (first ? "" : ", ") + options[i].first + "=";
        out += nb::cast<std::string>(nb::repr(from_option(options[i].second)));
        first = false;
    }
    return out + ")";
}

}  // namespace vimcore::python
