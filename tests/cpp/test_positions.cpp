// SPDX-License-Identifier: Apache-2.0
// Position tables of other grids: the resize against the textbook formula, its gradient against its transpose, and the
// network at another size against one whose table was resized before. Nothing stale, nothing allocated per call.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "allocations.h"
#include "check.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

template <class T>
using Values = std::vector<T>;

template <class T>
Values<T> random_values(std::int64_t count, unsigned seed)
{
    std::mt19937 rng(seed);
    std::normal_distribution<T> normal;
    Values<T> values(static_cast<std::size_t>(count));
    for (T& v : values) v = normal(rng);
    return values;
}

template <class T>
Tensor view(const Values<T>& values, const Shape& shape)
{
    return {const_cast<T*>(values.data()), shape, dtype_of<T>, {}};
}

constexpr ClassToken tokens[] = {ClassToken::none,    ClassToken::head,   ClassToken::middle,
                                 ClassToken::double_, ClassToken::random, ClassToken::registers};

std::int64_t class_tokens(ClassToken token) { return table_places(token, 1).count; }

// ---- the resize ----------------------------------------------------------------------------------------------------

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

// ---- the network ---------------------------------------------------------------------------------------------------

template <class T>
struct NetworkWeights {
    Params params;
    std::map<std::string, Values<T>> values;

    NetworkWeights(const Config& config, bool random)
    {
        unsigned seed = 7;
        for_each_param(config, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            Values<T>& v = values[name];
            v = random_values<T>(shape.numel(), seed++);
            const bool decay = name.find("A_log") != std::string::npos || name.find("A_b_log") != std::string::npos;
            for (std::size_t i = 0; i < v.size(); i++)
                v[i] = !random ? T(0)
                       : decay ? std::log(T(1) + static_cast<T>(i % static_cast<std::size_t>(config.d_state)))
                               : (name.find("norm") != std::string::npos ? T(1) : T(0)) + T(0.2) * v[i];
            tensor = view(v, shape);
        });
        params.changed();
    }
};

Config small(ClassToken token, bool rope = false)
{
    Config c;
    c.img_height = 12;
    c.img_width = 20;
    c.patch_size = c.stride = 4;
    c.embed_dim = 24;
    c.depth = 2;
    c.num_classes = 5;
    c.class_token = token;
    if (token == ClassToken::registers) c.registers = 4, c.neck_reduction = 2;
    c.rope = rope;
    c.rope_residual = rope;
    c.validate();
    return c;
}

template <class T>
struct Run {
    Values<T> logits, dimages;
    std::map<std::string, Values<T>> gradients;
    bool operator==(const Run&) const = default;
};

template <class T>
Run<T> run(Context& ctx, const Config& c, const NetworkWeights<T>& weights, std::int64_t batch, bool train = true,
           const Draws& draws = {})
{
    const Shape shape{batch, c.in_chans, c.img_height, c.img_width};
    const Values<T> images = random_values<T>(shape.numel(), 3);
    const Values<T> dlogits = random_values<T>(batch * c.num_classes, 4);
    Run<T> r;
    r.logits.resize(dlogits.size());
    Outputs out, dout;
    out.logits = view(r.logits, {batch, c.num_classes});
    dout.logits = view(dlogits, {batch, c.num_classes});
    if (!train) {
        forward(ctx, c, weights.params, view(images, shape), out, nullptr, draws);
        return r;
    }
    Saved saved;
    NetworkWeights<T> gradients(c, false);
    r.dimages.resize(images.size());
    forward(ctx, c, weights.params, view(images, shape), out, &saved, draws);
    backward(ctx, c, weights.params, view(images, shape), saved, dout, gradients.params, view(r.dimages, shape), draws);
    r.gradients = gradients.values;
    return r;
}

// The weights of `from` with the table that a network of size `to` has.
template <class T>
NetworkWeights<T> resized(const NetworkWeights<T>& weights, const Config& from, const Config& to)
{
    NetworkWeights<T> result(to, false);
    for (auto& [name, values] : result.values)
        if (name != "pos_embed")
            std::copy(weights.values.at(name).begin(), weights.values.at(name).end(), values.begin());
    Context ctx(Device::cpu(), 1);
    positions_forward(ctx, {.table = weights.params.pos_embed,
                            .out = result.params.pos_embed,
                            .resize = table_resize(from.class_token, from.grid(), to.grid())});
    return result;
}

constexpr std::int64_t sizes[][2] = {{20, 12}, {32, 36}, {7, 5}, {12, 20}};  // one of them the table's own

template <class T>
void test_network()
{
    Context ctx(Device::cpu(), 2);
    for (const auto& [token, rope] : {std::pair{ClassToken::none, false},
                                      {ClassToken::none, true},
                                      {ClassToken::head, true},
                                      {ClassToken::middle, false},
                                      {ClassToken::double_, false},
                                      {ClassToken::random, false},
                                      {ClassToken::registers, false}}) {
        const Config c = small(token, rope);
        const NetworkWeights<T> weights(c, true);
        Draws draws;
        if (token == ClassToken::random) draws.class_position = 1;
        for (const auto& [height, width] : sizes) {
            if (height / 4 * (width / 4) <= c.registers) continue;
            const Config here = c.at_size(height, width);
            Config plain = c;
            plain.img_height = height;
            plain.img_width = width;
            const NetworkWeights<T> other = resized(weights, c, plain);
            const Run<T> expected = run(ctx, plain, other, 3, true, draws);
            Run<T> found = run(ctx, here, weights, 3, true, draws);
            CHECK(found.logits == expected.logits);
            CHECK(found.dimages == expected.dimages);
            CHECK(run(ctx, here, weights, 3, false, draws).logits == expected.logits);
            Values<T> dtable(weights.values.at("pos_embed").size());
            auto rows = [&](const Config& of) { return of.patches() + table_places(token, of.patches()).count; };
            positions_backward(ctx, {.dout = view(expected.gradients.at("pos_embed"), {1, rows(plain), 24}),
                                     .dtable = view(dtable, {1, rows(c), 24}),
                                     .resize = table_resize(token, c.grid(), plain.grid())});
            const bool own = plain.grid() == c.grid();
            CHECK(found.gradients.at("pos_embed") == (own ? expected.gradients.at("pos_embed") : dtable));
            for (const auto& [name, gradient] : expected.gradients)
                if (name != "pos_embed") CHECK(found.gradients.at(name) == gradient);

            const Run<T> first = run(ctx, here, weights, 1, false, draws);
            CHECK(std::equal(first.logits.begin(), first.logits.end(), found.logits.begin()));
        }
    }
}

void test_sizes_side_by_side()
{
    const Config c = small(ClassToken::middle);
    NetworkWeights<float> weights(c, true);
    Context ctx(Device::cpu(), 2);
    const auto at = [&](int i) { return c.at_size(8 + 4 * (i % 7), 8 + 4 * (i / 7)); };
    std::vector<Run<float>> alone;
    for (int i = 0; i < 35; i++) {  // more than are kept
        Context fresh(Device::cpu(), 1);
        const NetworkWeights<float> own(c, true);
        alone.push_back(run(fresh, at(i), own, 2));
    }
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 35; i++) CHECK(run(ctx, at(i), weights, 2) == alone[static_cast<std::size_t>(i)]);
    for (const int i : {3, 30, 3, 17, 30}) CHECK(run(ctx, at(i), weights, 2) == alone[static_cast<std::size_t>(i)]);

    std::vector<std::thread> callers;  // one set of weights, tables that come and go
    std::atomic<int> wrong = 0;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
            Context own(Device::cpu(), 1);
            for (int i = 0; i < 35; i++) {
                const int k = (i * 3 + caller * 8) % 35;
                wrong += run(own, at(k), weights, 2, false).logits != alone[static_cast<std::size_t>(k)].logits;
            }
        });
    for (std::thread& caller : callers) caller.join();
    CHECK(wrong == 0);
}

// After a write to the weights every size is that of the new table, also with a memory that another table had.
void test_nothing_stale()
{
    const Config c = small(ClassToken::middle), large = c.at_size(28, 24), tiny = c.at_size(8, 4);
    NetworkWeights<float> weights(c, true);
    Context ctx(Device::cpu(), 1);
    for (int step = 0; step < 4; step++) {
        const Run<float> before[] = {run(ctx, large, weights, 2), run(ctx, tiny, weights, 2), run(ctx, c, weights, 2)};
        for (std::size_t row = 0; row < 16; row++)
            weights.values["pos_embed"][row * 24 + static_cast<std::size_t>(step)] += 1.0f;
        weights.params.changed();
        NetworkWeights<float> fresh(c, false);
        for (auto& [name, values] : fresh.values)
            std::copy(weights.values[name].begin(), weights.values[name].end(), values.begin());
        int i = 0;
        for (const Config* size : {&large, &tiny, &c}) {
            const Run<float> now = run(ctx, *size, weights, 2);
            CHECK(now.logits != before[i++].logits);
            CHECK(now == run(ctx, *size, fresh, 2));
            fresh.params.cache.reset();  // without a cache the table is made at every call
            CHECK(now == run(ctx, *size, fresh, 2));
            fresh.params.changed();
        }
    }
}

void test_no_allocation(bool rope)
{
    const Config c = small(rope ? ClassToken::head : ClassToken::middle, rope);
    const Config all[] = {c, c.at_size(28, 24), c.at_size(8, 4)};
    NetworkWeights<float> weights(c, true), gradients(c, false);
    const std::int64_t batch = 3;
    const Values<float> images = random_values<float>(batch * c.in_chans * 28 * 24, 1), dlogits(15, 1.0f);
    Values<float> logits(15);
    Context ctx(Device::cpu(), 2);
    Saved saved;
    Outputs out, dout;
    out.logits = view(logits, {batch, c.num_classes});
    dout.logits = view(dlogits, {batch, c.num_classes});
    long heap = 0;
    for (int step = 0; step < 6; step++) {
        weights.params.changed();  // as after an optimiser step: tables are made again, in place
        for (const Config& size : all) {
            const Tensor x = view(images, {batch, c.in_chans, size.img_height, size.img_width});
            forward(ctx, size, weights.params, x, out, &saved);
            backward(ctx, size, weights.params, x, saved, dout, gradients.params, {});
            forward(ctx, size, weights.params, x, out);
        }
        if (step == 2) heap = allocations;
    }
    CHECK(allocations == heap);
}

// Some sizes keep their tables; where more take turns, tables go and are made again.
void test_tables_are_few()
{
    const Config c = small(ClassToken::middle);
    const NetworkWeights<float> weights(c, true);
    const Values<float> images(static_cast<std::size_t>(c.in_chans * 100 * 8));
    Values<float> logits(5);
    Context ctx(Device::cpu(), 1);
    Outputs out;
    out.logits = view(logits, {1, 5});
    auto allocated = [&](std::int64_t count) {  // in the third of three rounds of `count` sizes
        long before = 0;
        for (int round = 0; round < 3; round++) {
            before = allocations;
            for (std::int64_t k = 1; k <= count; k++) {
                const Config size = c.at_size(4 * k, 8);
                forward(ctx, size, weights.params, view(images, {1, c.in_chans, 4 * k, 8}), out);
            }
        }
        return allocations - before;
    };
    CHECK(allocated(16) == 0);
    CHECK(allocated(24) > 0);
    CHECK(allocated(16) == 0);
}

// What a size means for weights, files and arguments.
void test_configurations()
{
    const Config c = small(ClassToken::middle), other = c.at_size(28, 24);
    CHECK(other.grid() == (Grid{7, 6}) && other.table_grid() == (Grid{3, 5}) && other.composes_positions());
    CHECK(other.tokens() == 43 && c.tokens() == 16);
    CHECK(!c.composes_positions() && !other.at_size(12, 20).composes_positions());
    CHECK(other.at_size(12, 20).to_json() == c.to_json());
    CHECK(other.at_size(8, 8).table_grid() == c.grid());
    CHECK(other.to_json() == c.to_json());           // of a file: the size that its table has
    CHECK(!c.at_size(13, 23).composes_positions());  // other pixels, the same grid
    Params params;
    for_each_param(other, params, [&](const std::string& name, Tensor&, const Shape& shape) {
        if (name == "pos_embed") CHECK((shape == Shape{1, 16, 24}));
    });
    CHECK(weight_bytes(other) == weight_bytes(c));
    CHECK_THROWS(c.at_size(3, 20), std::invalid_argument);
    CHECK_THROWS(c.at_size(12, 0), std::invalid_argument);
    CHECK_THROWS(c.at_size(12, std::int64_t{1} << 40), std::invalid_argument);

    Config without = c;
    without.pos_embed = false;
    CHECK(!without.at_size(28, 24).composes_positions());
    const NetworkWeights<float> weights(c, true);
    Context ctx(Device::cpu(), 1);
    Values<float> images(3 * 28 * 24), logits(5);
    Outputs out;
    out.logits = view(logits, {1, 5});
    CHECK_THROWS(forward(ctx, c, weights.params, view(images, {1, 3, 28, 24}), out), std::invalid_argument);
    CHECK_THROWS(forward(ctx, other, weights.params, view(images, {1, 3, 24, 28}), out), std::invalid_argument);
    Config wrong = other;  // a configuration that the weights were not made for
    wrong.table_height = 16;
    CHECK_THROWS(forward(ctx, wrong, weights.params, view(images, {1, 3, 28, 24}), out), std::invalid_argument);
}

}  // namespace

// With an argument, for emulated machines: float32 alone.
int main(int argc, char**)
{
    test_rows();
    test_rotation_tables();
    test_resize<float>(3e-6);
    test_resize<double>(1e-13);
    test_network<float>();
    if (argc == 1) test_network<double>();
    test_sizes_side_by_side();
    test_nothing_stale();
    test_no_allocation(false);
    test_no_allocation(true);
    test_tables_are_few();
    test_configurations();
    return check_failures();
}
