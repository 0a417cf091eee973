// SPDX-License-Identifier: Apache-2.0
// The network at another size against one whose position table was resized before. Nothing stale, nothing allocated per
// call.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <string>
#include <thread>

#include "allocations.h"
#include "check.h"
#include "values.h"
#include "vimcore/vimcore.h"

using namespace vimcore;

namespace {

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
