// SPDX-License-Identifier: Apache-2.0
// Position tables: the resize to other grids against the textbook formula, its gradient against its transpose. Tables
// of rotations against their formula.
#include <cmath>

#include "check.h"
#include "values.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

constexpr ClassToken tokens[] = {ClassToken::none,    ClassToken::head,   ClassToken::middle,
                                 ClassToken::double_, ClassToken::random, ClassToken::registers};

std::int64_t class_tokens(ClassToken token) { return table_places(token, 1).count; }

// Cubic convolution of a distance, a = -0.75 (Keys 1981).
double share(double distance)
{
    constexpr double a = -0.75;
    const double x = std::abs(distance);
    if (x <= 1) return (a + 2) * x * x * x - (a + 3) * x * x + 1;
    return x < 2 ? a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a : 0;
}

// Share of cell `in` of `from` in cell `at` of `to`: those beyond the border count for the cell there.
double share_of(std::int64_t in, std::int64_t at, std::int64_t from, std::int64_t to)
{
    const double sample = (static_cast<double>(at) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    double sum = 0;
    for (std::int64_t c = -3; c < from + 3; c++)
        if (std::clamp<std::int64_t>(c, 0, from - 1) == in) sum += share(sample - static_cast<double>(c));
    return sum;
}

// Every row of the new table as shares of all rows of the old one.
Values<double> matrix(const TableResize& r, std::int64_t rows, std::int64_t old_rows)
{
    Values<double> shares(static_cast<std::size_t>(rows * old_rows));
    auto patches = [](const ClassPlaces& classes, std::int64_t count) {  // rows that are not of class tokens
        std::vector<std::int64_t> found;
        for (std::int64_t row = 0; row < count; row++) {
            bool of_token = false;
            for (std::int64_t k = 0; k < classes.count; k++) of_token |= row == classes.at(k);
            if (!of_token) found.push_back(row);
        }
        return found;
    };
    const auto to = patches(r.to_class, rows), from = patches(r.from_class, old_rows);
    for (std::size_t i = 0; i < to.size(); i++)
        for (std::size_t j = 0; j < from.size(); j++) {
            const auto y = static_cast<std::int64_t>(i), x = static_cast<std::int64_t>(j);
            shares[static_cast<std::size_t>(to[i] * old_rows + from[j])] =
                share_of(x / r.from.columns, y / r.to.columns, r.from.rows, r.to.rows) *
                share_of(x % r.from.columns, y % r.to.columns, r.from.columns, r.to.columns);
        }
    for (std::int64_t k = 0; k < r.to_class.count; k++)
        shares[static_cast<std::size_t>(r.to_class.at(k) * old_rows + r.from_class.at(k))] = 1;
    return shares;
}

constexpr Grid grids[][2] = {{{3, 3}, {5, 5}}, {{4, 6}, {3, 9}},   {{2, 8}, {4, 4}},   {{1, 1}, {3, 2}},
                             {{7, 5}, {1, 1}}, {{14, 14}, {5, 3}}, {{2, 3}, {17, 40}}, {{4, 9}, {6, 6}}};

template <class T>
void test_resize(double tolerance)
{
    constexpr std::int64_t D = 5;
    for (const auto& [from, to] : grids)
        for (const ClassToken token : tokens)
            for (const TableWay way : {TableWay::correct, TableWay::authors}) {
                const TableResize resize = table_resize(token, from, to, way);
                const std::int64_t old_rows = from.count() + class_tokens(token),
                                   rows = to.count() + class_tokens(token);
                const Values<T> table = random_values<T>(old_rows * D, 1), dout = random_values<T>(rows * D, 2);
                const Values<double> shares = matrix(resize, rows, old_rows);
                Values<T> out(static_cast<std::size_t>(rows * D)), before = random_values<T>(old_rows * D, 3);
                Values<T> dtable = before, again = before;
                Context ctx(Device::cpu(), 1), threads(Device::cpu(), 3);
                positions_forward(
                    ctx, {.table = view(table, {1, old_rows, D}), .out = view(out, {1, rows, D}), .resize = resize});
                positions_backward(
                    ctx,
                    {.dout = view(dout, {1, rows, D}), .dtable = view(dtable, {1, old_rows, D}), .resize = resize});
                positions_backward(
                    threads,
                    {.dout = view(dout, {1, rows, D}), .dtable = view(again, {1, old_rows, D}), .resize = resize});
                CHECK(again == dtable);
                for (std::int64_t row = 0; row < rows; row++)
                    for (std::int64_t d = 0; d < D; d++) {
                        double sum = 0;
                        for (std::int64_t i = 0; i < old_rows; i++)
                            sum += shares[static_cast<std::size_t>(row * old_rows + i)] *
                                   static_cast<double>(table[static_cast<std::size_t>(i * D + d)]);
                        CHECK_CLOSE(out[static_cast<std::size_t>(row * D + d)], sum, tolerance);
                    }
                for (std::int64_t i = 0; i < old_rows; i++)
                    for (std::int64_t d = 0; d < D; d++) {
                        double sum = before[static_cast<std::size_t>(i * D + d)];  // added to
                        for (std::int64_t row = 0; row < rows; row++)
                            sum += shares[static_cast<std::size_t>(row * old_rows + i)] *
                                   static_cast<double>(dout[static_cast<std::size_t>(row * D + d)]);
                        CHECK_CLOSE(dtable[static_cast<std::size_t>(i * D + d)], sum, 100 * tolerance);
                    }
            }
}

void test_rows()
{
    auto all = [](const ClassPlaces& places) {
        std::vector<std::int64_t> found;
        for (std::int64_t k = 0; k < places.count; k++) found.push_back(places.at(k));
        return found;
    };
    using List = std::vector<std::int64_t>;
    CHECK(all(class_places(ClassToken::none, 9)).empty());
    CHECK(all(class_places(ClassToken::head, 9)) == List{0} && all(class_places(ClassToken::random, 9)) == List{0});
    CHECK(all(class_places(ClassToken::middle, 9)) == List{4});
    CHECK((all(class_places(ClassToken::double_, 9)) == List{0, 10}));
    CHECK((all(class_places(ClassToken::registers, 14, 4)) == List{2, 5, 8, 11}));  // pp r pp r pp r pp r pppppp
    CHECK(table_places(ClassToken::registers, 14).count == 0);
    const TableResize authors = table_resize(ClassToken::middle, {2, 2}, {3, 3}, TableWay::authors);
    CHECK(authors.from_class == ClassPlaces::one(0) && authors.to_class == ClassPlaces::one(0));
    Values<float> table(20), out(40);
    Context ctx(Device::cpu(), 1);
    const TableResize resize = table_resize(ClassToken::head, {2, 2}, {3, 3});
    const Tensor in = view(table, {1, 5, 4}), result = view(out, {1, 10, 4});
    positions_forward(ctx, {.table = in, .out = result, .resize = resize});
    CHECK_THROWS(positions_forward(ctx, {.table = view(table, {1, 4, 4}), .out = result, .resize = resize}),
                 std::invalid_argument);
    CHECK_THROWS(positions_forward(ctx, {.table = in, .out = view(out, {1, 9, 4}), .resize = resize}),
                 std::invalid_argument);
    CHECK_THROWS(positions_backward(ctx, {.dout = result, .dtable = view(table, {1, 4, 5}), .resize = resize}),
                 std::invalid_argument);
    CHECK_THROWS(positions_forward(ctx, {.table = in, .out = result, .resize = {.from = {0, 2}, .to = {3, 3}}}),
                 std::invalid_argument);
}

// Angles by the formula, place by place.
void test_rotation_tables()
{
    const Grid grid{3, 5};
    const Shape shape{grid.count(), 16};
    Values<double> cos(static_cast<std::size_t>(shape.numel())), sin = cos;
    Values<float> narrow(cos.size());
    rope_tables(grid, 7, view(cos, shape), view(sin, shape));
    for (std::int64_t i = 0; i < shape.numel(); i++) {
        const std::int64_t d = i % 16, x = i / 16 % 5, y = i / 80, j = d % 8 / 2;
        const double place = d < 8 ? static_cast<double>(y) / 3 : static_cast<double>(x) / 5;
        const double angle = place * 7 * std::pow(10000.0, -2.0 * static_cast<double>(j) / 8);
        CHECK_CLOSE(cos[static_cast<std::size_t>(i)], std::cos(angle), 1e-12);
        CHECK_CLOSE(sin[static_cast<std::size_t>(i)], std::sin(angle), 1e-12);
    }
    CHECK_THROWS(rope_tables(grid, 7, view(cos, shape), view(narrow, shape)), std::invalid_argument);
    CHECK_THROWS(rope_tables(grid, 7, view(cos, {16, 15}), view(sin, shape)), std::invalid_argument);
    CHECK_THROWS(rope_tables({5, 4}, 7, view(cos, shape), view(sin, shape)), std::invalid_argument);
    CHECK_THROWS(rope_tables({40, 6}, 7, view(cos, {240, 1}), view(sin, {240, 1})), std::invalid_argument);
}

}  // namespace

int main()
{
    test_rows();
    test_rotation_tables();
    test_resize<float>(3e-6);
    test_resize<double>(1e-13);
    return check_failures();
}
