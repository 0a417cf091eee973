// SPDX-License-Identifier: Apache-2.0
// Sizes other than the position table's on the device: the resize and its gradient, the network against the CPU, and a
// recorded step, which reads the table anew in every replay.
#include "network_cuda.h"
#include "vimcore/positions.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

constexpr Grid grids[][2] = {
    {{3, 3}, {5, 5}}, {{4, 6}, {3, 9}}, {{1, 1}, {3, 2}}, {{14, 14}, {5, 3}}, {{2, 3}, {17, 9}}};
constexpr ClassToken tokens[] = {ClassToken::none, ClassToken::head, ClassToken::middle, ClassToken::double_};

void test_resize()
{
    constexpr std::int64_t D = 40;  // several rows a block, and a last block that is not full
    for (const auto& [from, to] : grids)
        for (const ClassToken token : tokens)
            for (const TableWay way : {TableWay::correct, TableWay::authors}) {
                const std::int64_t classes = token == ClassToken::none ? 0 : token == ClassToken::double_ ? 2 : 1;
                const Shape old_shape{1, from.count() + classes, D}, shape{1, to.count() + classes, D};
                const Floats table = normal(1, DType::f32, old_shape.numel()),
                             dout = normal(2, DType::f32, shape.numel());
                const Floats before = normal(3, DType::f32, old_shape.numel());
                const TableResize resize = table_resize(token, from, to, way);
                auto run = [&](Side&& side) {
                    const Tensor out = side.wide_result(shape), dtable = side.parameter(old_shape, before);
                    positions_forward(side.ctx,
                                      {.table = side.parameter(old_shape, table), .out = out, .resize = resize});
                    positions_backward(side.ctx,
                                       {.dout = side.parameter(shape, dout), .dtable = dtable, .resize = resize});
                    Floats both = side.values(out);
                    const Floats gradient = side.values(dtable);
                    both.insert(both.end(), gradient.begin(), gradient.end());
                    return both;
                };
                const Floats got = run(Side::cuda(DType::f32));
                CHECK_AGREE(got, run(Side::cpu()), 1e-6);
                CHECK(same_bits(got, run(Side::cuda(DType::f32))));
            }
}

// What a table of patches, one of class tokens and one of frames come to.
void test_several_tables()
{
    constexpr std::int64_t D = 40, frames = 3, registers = 4;
    for (const bool own_rows : {false, true}) {
        const Grid from{3, 4}, to{2, 5};
        const ClassToken token = own_rows ? ClassToken::registers : ClassToken::middle;
        const TableResize resize{.from = from,
                                 .to = to,
                                 .from_class = table_places(token, from.count()),
                                 .to_class = class_places(token, frames * to.count(), registers),
                                 .frames = frames};
        const Shape shapes[] = {{1, from.count() + resize.from_class.count, D},
                                {1, own_rows ? registers : 0, D},
                                {1, frames, D},
                                {1, frames * to.count() + resize.to_class.count, D}};
        auto run = [&](Side&& side) {
            auto make = [&](int k, unsigned seed) {
                return shapes[k].numel() == 0 ? Tensor{}
                                              : side.parameter(shapes[k], normal(seed, DType::f32, shapes[k].numel()));
            };
            const Tensor out = side.wide_result(shapes[3]), tables[] = {make(0, 11), make(1, 12), make(2, 13)};
            positions_forward(side.ctx, {tables[0], tables[1], tables[2], out, resize});
            const Tensor gradients[] = {make(0, 14), make(1, 15), make(2, 16)};
            positions_backward(side.ctx, {make(3, 17), gradients[0], gradients[1], gradients[2], resize});
            Floats all = side.values(out);
            for (const Tensor& t : gradients)
                if (t)
                    for (const float value : side.values(t)) all.push_back(value);
            return all;
        };
        const Floats got = run(Side::cuda(DType::f32));
        CHECK_AGREE(got, run(Side::cpu()), 1e-6);
        CHECK(same_bits(got, run(Side::cuda(DType::f32))));
    }
}

struct Step {
    Floats logits, images;
    std::map<std::string, Floats> gradients;
    bool operator==(const Step&) const = default;
};

Step step(Context& ctx, const Config& c, const Params& params, DType dtype, std::int64_t batch)
{
    Side side(ctx, dtype);
    const Shape shape{batch, c.in_chans, c.img_height, c.img_width};
    const Tensor x = side.activation(shape, normal(5, DType::bf16, shape.numel())), dx = side.result(shape);
    vimcore::Outputs out, dout;
    out.logits = side.result(c.logits_shape(batch));
    dout.logits = side.activation(out.logits.shape, normal(6, DType::bf16, out.logits.numel()));
    Saved saved;
    NetworkWeights gradients = NetworkWeights::zeros(ctx, c, wide(dtype));
    forward(ctx, c, params, x, out, &saved);
    backward(ctx, c, params, x, saved, dout, gradients.params, dx);
    return {side.values(out.logits), side.values(dx), gradients.values()};
}

constexpr std::int64_t sizes[][2] = {{28, 20}, {8, 36}};

void test_network()
{
    for (const ClassToken token : tokens)
        for (const bool rope : {false, true}) {
            if (rope && token != ClassToken::none && token != ClassToken::head) continue;
            Config c = designs()[4];
            c.class_token = token;
            c.rope = c.rope_residual = rope;
            auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
            const NetworkWeights here(cpu_context(), c, values, DType::f64), there(cuda_context(), c, values);
            for (const DType dtype : {DType::f32, DType::bf16}) {
                if (dtype != DType::f32 && token != ClassToken::middle) continue;
                for (const auto& [height, width] : sizes) {
                    const Config other = c.at_size(height, width);
                    const Step want = step(cpu_context(), other, here.params, DType::f64, 3);
                    const Step got = step(cuda_context(), other, there.params, dtype, 3);
                    const double most = dtype == DType::f32 ? 2e-5 : 0.1;
                    CHECK_CLOSE(difference(got.logits, want.logits), 0, most);
                    CHECK_CLOSE(difference(got.images, want.images), 0, most);
                    CHECK_CLOSE(difference(got.gradients.at("pos_embed"), want.gradients.at("pos_embed")), 0, most);
                    if (height == sizes[0][0]) continue;
                    CHECK(step(cuda_context(), other, there.params, dtype, 3) == got);  // as often as it is asked
                }
            }
        }
}

void infer(const Config& c, const Params& params)
{
    Context ctx(Device::cuda());
    Side side(ctx, DType::f32);
    const Shape shape{1, c.in_chans, c.img_height, c.img_width};
    vimcore::Outputs out;
    out.logits = side.result({1, c.num_classes});
    forward(ctx, c, params, side.activation(shape, Floats(static_cast<std::size_t>(shape.numel()))), out);
}

// A step whose table changes between replays, beside calls of other sizes, more than tables are kept for.
void test_recorded(bool rope)
{
    Config c = designs()[4];
    c.class_token = ClassToken::head;
    c.rope = rope;
    auto values = [&](const std::string& name, const Shape& shape) { return random_weight(c, name, shape); };
    Context ctx(Device::cuda());
    NetworkWeights weights(ctx, c, values);
    const Config other = c.at_size(28, 20);
    const std::shared_ptr<void> stream = backend_of(ctx).make_stream(0);
    ctx.set_stream(stream.get());
    Side side(ctx, DType::f32);
    const Shape shape{2, c.in_chans, 28, 20};
    const Tensor x = side.activation(shape, normal(5, DType::f32, shape.numel()));
    vimcore::Outputs out, dout;
    out.logits = side.result({2, c.num_classes});
    dout.logits = side.activation({2, c.num_classes}, normal(6, DType::f32, 2 * c.num_classes));
    Saved saved;
    NetworkWeights gradients = NetworkWeights::zeros(ctx, c);
    auto program = [&] {
        for (const auto& [name, tensor] : gradients.tensors) backend_of(ctx).fill_zero(ctx, tensor);
        forward(ctx, other, weights.params, x, out, &saved);
        backward(ctx, other, weights.params, x, saved, dout, gradients.params, {});
    };
    auto record = [&] {
        return backend_of(ctx).record(ctx, [](void* f) { (*static_cast<decltype(program)*>(f))(); }, &program);
    };
    if (rope) {  // its rotations have no memory yet, when everything else has
        for (int i = 0; i < 2; i++) step(ctx, c.at_size(40, 28), weights.params, DType::f32, 2);
        saved.prepare(other, 2, DType::f32, ctx.device());
        CHECK_THROWS(record(), Error);
    }
    for (int i = 0; i < 2; i++) program();
    ctx.hold_memory(true);
    const std::shared_ptr<void> recorded = record();
    for (int i = 0; i < 3; i++) {
        Floats table = values_of(ctx, weights.tensors.at("pos_embed"));
        for (float& v : table) v += 0.25f;
        assign(ctx, weights.tensors.at("pos_embed"), table);
        weights.params.changed();
        for (std::int64_t k = 1; rope && i == 1 && k < 20; k++) infer(c.at_size(4 * k, 4), weights.params);
        backend_of(ctx).replay(ctx, recorded.get());
        const Floats logits = side.values(out.logits);
        const auto found = gradients.values();
        program();
        CHECK(same_bits(side.values(out.logits), logits));
        CHECK(gradients.values() == found);
    }
}

}  // namespace

// With the argument "tables", these alone: they are quick enough to look for races.
int main(int argc, char** argv)
{
    test_resize();
    test_several_tables();
    if (argc == 2 && std::string(argv[1]) == "tables") return check_failures();
    test_network();
    test_recorded(false);
    test_recorded(true);
    return check_failures();
}
