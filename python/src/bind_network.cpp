// SPDX-License-Identifier: Apache-2.0
// The whole network for vimcore.nn.
#include <map>
#include <mutex>

#include "bindings.h"
#include "place.h"
#include "saved.h"
#include "vimcore/checksum.h"

namespace vimcore::python {

namespace {

// The weights of one network: views of arrays, which it owns as long as a call of some thread may read them, with their
// packed forms.
class BoundWeights {
public:
    BoundWeights(Params params, std::vector<In> arrays, const std::vector<Tensor>& all)
        : bound_(std::make_shared<Bound>(std::move(params), std::move(arrays))),
          first_(all.front()),
          checksum_(on_cpu() ? all : std::vector<Tensor>{})
    {
        bound_->params.changed();
    }

    const Params& params() const { return bound_->params; }
    const std::shared_ptr<const void> memory() const { return bound_; }
    DType dtype() const { return first_.dtype; }
    Device device() const { return first_.device; }

    // Whoever wrote to the weights, and however: packed forms are made anew if contents changed since the last look.
    // On a device, where looking would cost as much as that, they always are. Returns the checksum, 0 on a device.
    std::uint64_t look(Context& ctx)
    {
        if (!on_cpu()) {
            bound_->params.changed();
            return 0;
        }
        const std::uint64_t now = checksum_(ctx);
        std::lock_guard lock(mutex_);  // no thread may take a sum for seen before the forms are stale
        if (now != seen_) bound_->params.changed();
        seen_ = now;
        return now;
    }

private:
    bool on_cpu() const { return device().type == Device::Type::cpu; }

    struct Bound {
        Params params;
        std::vector<In> arrays;
    };
    std::shared_ptr<Bound> bound_;
    Tensor first_;
    Checksum checksum_;
    std::mutex mutex_;
    std::uint64_t seen_ = 0;
};

using Token = nb::ndarray<std::uint8_t, nb::ndim<1>>;

// The bytes that were saved. The array owns them: as a tensor in torch's graph they are freed together with its other
// saved tensors, and hooks on those can move them away and back.
Token token_of(nb::handle self)
{
    Saved& saved = *nb::cast<SavedHandle&>(self);
    const Device device = saved.storage.device();
    const bool cuda = device.type == Device::Type::cuda;
    return Token(saved.storage.data(), {saved.used}, self, {}, nb::dtype<std::uint8_t>(),
                 cuda ? nb::device::cuda::value : nb::device::cpu::value, cuda ? device.index : 0);
}

std::unique_ptr<SavedHandle> lent(const std::string& memory, Out bytes)
{
    return std::make_unique<SavedHandle>(to_memory(memory), std::move(bytes), false);
}

// "f32", ... of what is computed in.
DType to_activation(const std::string& name)
{
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
        if (name == name_of(dtype)) return dtype;
    throw std::invalid_argument("[Saved] dtype: expected f32, f64, bf16 or f16, got " + name);
}

Device device_for(bool cuda) { return cuda ? Device::cuda(0) : Device::cpu(); }

std::size_t saved_size(const Config& config, std::int64_t batch, const std::string& dtype, bool cuda,
                       const std::string& memory)
{
    return Saved::bytes(config, batch, to_activation(dtype), device_for(cuda), to_memory(memory));
}

std::size_t saved_block_size(const Config& config, std::int64_t batch, std::int64_t len, const std::string& dtype,
                             bool cuda, const std::string& memory)
{
    const Shape shape{batch, len, config.embed_dim};
    return Saved::block_bytes(config, shape, to_activation(dtype), device_for(cuda), to_memory(memory));
}

// Where a call writes what it is asked for; in backward, the gradients of these.
struct OutputArrays {
    MaybeOut logits, tokens;
    std::vector<std::int64_t> layers;
    std::vector<Out> intermediates;  // one for each of `layers`
};

struct DrawArrays {
    MaybeIn drop_path, dropout;
    bool flip = false;
    std::int64_t class_position = -1;
};

// One array with the gradient of parameter i at offsets[i], which are added to; offset -1: not wanted.
struct GradientArrays {
    Out flat;
    std::vector<std::int64_t> offsets;
    MaybeOut dimages;
};

class BoundNetwork {
public:
    explicit BoundNetwork(const Config& config) : config_(config) {}

    std::unique_ptr<BoundWeights> bind(const std::vector<In>& arrays) const
    {
        Params params;
        std::vector<Tensor> all;
        for_each_param(config_, params, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            if (all.size() == arrays.size()) fail(name, "expected " + to_string(shape) + ", got none");
            tensor = to_tensor(arrays[all.size()], "VisionMamba", name);
            const Tensor& first = all.empty() ? tensor : all.front();
            if (first.dtype != DType::f32 && (first.dtype != DType::f64 || first.device.type != Device::Type::cpu))
                fail(name, "expected f32, or f64 on the cpu, got " + describe(tensor));
            Tensor expected = first;
            expected.shape = shape;
            if (tensor.shape != shape || tensor.dtype != first.dtype || tensor.device != first.device)
                fail(name, "expected " + describe(expected) + ", got " + describe(tensor));
            all.push_back(tensor);
        });
        if (all.size() != arrays.size())
            fail("parameters", "expected " + std::to_string(all.size()) + ", got " + std::to_string(arrays.size()));
        return std::make_unique<BoundWeights>(std::move(params), arrays, all);
    }

    std::unique_ptr<SavedHandle> saved(const std::string& memory, const Place& place)
    {
        std::lock_guard lock(mutex_);
        std::shared_ptr<ReusableSaved>& reusable = reusable_[place.stream];
        if (!reusable) reusable = std::make_shared<ReusableSaved>();
        return std::make_unique<SavedHandle>(to_memory(memory), reusable, place.capturing);
    }

    void release()
    {
        std::lock_guard lock(mutex_);
        for (auto& [stream, reusable] : reusable_) reusable->clear();
    }

    void forward(BoundWeights& weights, const In& images, const OutputArrays& wanted, const DrawArrays& drawn,
                 const Place& place, SavedHandle* saved, bool constant)
    {
        const Tensor x = to_tensor(images, "VisionMamba", "images");
        if (x.device != weights.device())
            fail("images", "expected a tensor on " + to_string(weights.device()) + ", got " + describe(x));
        const Config config = at_size_of(x);
        const Outputs out = to_outputs(config, x, wanted);
        const Draws draws = to_draws(config, x, drawn);
        if (place.capturing) captured_weights().insert(weights.memory());
        with_context(x.device, place, [&](Context& ctx) {
            if (!constant) weights.look(ctx);
            vimcore::forward(ctx, config, weights.params(), x, out, saved ? &**saved : nullptr, draws);
        });
    }

    void backward(BoundWeights& weights, const In& images, const Kept& kept, const OutputArrays& incoming,
                  const GradientArrays& gradients, const DrawArrays& drawn, const Place& place)
    {
        const Tensor x = to_tensor(images, "VisionMamba", "images");
        const Tensor dx = to_tensor(gradients.dimages, "VisionMamba", "dimages");
        const Config config = at_size_of(x);
        const Outputs out = to_outputs(config, x, incoming);
        const Saved saved = kept.saved(x, "VisionMamba", [&](Saved& at, void* data, std::size_t bytes) {
            at.attach(config, x.size(0), x.dtype, x.device, data, bytes);
        });
        const Draws draws = to_draws(config, x, drawn);
        expect("dimages", dx, x.shape, x);
        Params dparams = to_gradients(weights, x, gradients);
        if (place.capturing) captured_weights().insert(weights.memory());
        with_context(x.device, place, [&](Context& ctx) {
            vimcore::backward(ctx, config, weights.params(), x, saved, out, dparams, dx, draws);
        });
    }

private:
    [[noreturn]] static void fail(const std::string& name, const std::string& what)
    {
        throw std::invalid_argument("[VisionMamba] " + name + ": " + what);
    }

    // Like x in type and device, or in the wide type beside it.
    void expect(const char* name, const Tensor& tensor, const Shape& shape, const Tensor& x, bool is_wide = false) const
    {
        const Tensor wanted{nullptr, shape, is_wide ? wide(x.dtype) : x.dtype, x.device};
        if (!tensor || (tensor.shape == shape && tensor.dtype == wanted.dtype && tensor.device == x.device)) return;
        fail(name, "expected " + describe(wanted) + ", got " + describe(tensor));
    }

    // The weights may serve images of any size; which ones are wanted is decided in Python.
    Config at_size_of(const Tensor& x) const
    {
        const int rank = config_.frames > 0 ? 5 : 4;
        if (x.shape.rank() != rank)
            fail("images",
                 std::string("expected ") + (rank == 5 ? "(B, C, T, H, W)" : "(B, C, H, W)") + ", got " + describe(x));
        const std::int64_t height = x.size(rank - 2), width = x.size(rank - 1);
        return height == config_.img_height && width == config_.img_width ? config_ : config_.at_size(height, width);
    }

    Outputs to_outputs(const Config& config, const Tensor& x, const OutputArrays& arrays) const
    {
        Outputs out;
        out.logits = to_tensor(arrays.logits, "VisionMamba", "logits");
        expect("logits", out.logits, config.logits_shape(x.size(0)), x);
        out.tokens = to_tensor(arrays.tokens, "VisionMamba", "tokens");
        expect("tokens", out.tokens, config.tokens_shape(x.size(0)), x);
        out.layers = arrays.layers;
        for (const Out& array : arrays.intermediates) {
            out.intermediates.push_back(to_tensor(array, "VisionMamba", "intermediates"));
            expect("intermediates", out.intermediates.back(), config.tokens_shape(x.size(0)), x);
        }
        if (out.layers.size() != out.intermediates.size())
            fail("intermediates", "expected " + std::to_string(out.layers.size()) + " arrays, got " +
                                      std::to_string(out.intermediates.size()));
        return out;
    }

    Draws to_draws(const Config& config, const Tensor& x, const DrawArrays& arrays) const
    {
        Draws draws;
        draws.drop_path = to_tensor(arrays.drop_path, "VisionMamba", "drop_path");
        expect("drop_path", draws.drop_path, {config.depth, x.size(0)}, x, true);
        draws.dropout = to_tensor(arrays.dropout, "VisionMamba", "dropout");
        expect("dropout", draws.dropout, config.tokens_shape(x.size(0)), x, true);
        draws.flip = arrays.flip;
        draws.class_position = arrays.class_position;
        if (draws.class_position < -1 || draws.class_position >= config.tokens())
            fail("class_position", "does not fit: " + std::to_string(draws.class_position));
        return draws;
    }

    Params to_gradients(const BoundWeights& weights, const Tensor& x, const GradientArrays& arrays) const
    {
        const Tensor flat = to_tensor(arrays.flat, "VisionMamba", "gradients");
        if (flat.dtype != weights.dtype() || flat.device != weights.device() || x.device != weights.device())
            fail("gradients", "expected " + std::string(name_of(weights.dtype())) + " " + to_string(weights.device()) +
                                  " as the weights, got " + describe(flat) + " beside images " + describe(x));
        Params dparams;
        std::size_t index = 0;
        for_each_param(config_, dparams, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            if (index == arrays.offsets.size()) fail(name, "expected an offset, got none");
            const std::int64_t offset = arrays.offsets[index++];
            if (offset < 0) return;
            if (offset > flat.numel() - shape.numel())
                fail(name, "offset " + std::to_string(offset) + " does not fit " + describe(flat));
            tensor = flat;
            tensor.data = flat.as<char>() + static_cast<std::size_t>(offset) * size_of(flat.dtype);
            tensor.shape = shape;
        });
        return dparams;
    }

    Config config_;
    std::mutex mutex_;
    std::map<std::uintptr_t, std::shared_ptr<ReusableSaved>> reusable_;  // by stream; 0 on the CPU
};

std::uint64_t look(BoundWeights& weights, const Place& place)
{
    std::uint64_t sum = 0;
    with_context(weights.device(), place, [&](Context& ctx) { sum = weights.look(ctx); });
    return sum;
}

// Values of one call. What arrays are is checked where they are used.
void bind_values(nb::module_& m)
{
    nb::class_<Place>(m, "Place", "Where a call computes: threads on the CPU, 0 for all; on CUDA a cudaStream_t.")
        .def(nb::init<int, std::uintptr_t, bool>(), nb::arg("threads") = 0, nb::arg("stream") = 0,
             nb::arg("capturing") = false)
        .def_ro("threads", &Place::threads)
        .def_ro("stream", &Place::stream)
        .def_ro("capturing", &Place::capturing);

    nb::class_<OutputArrays>(m, "Outputs",
                             "Where results go, or their gradients come from; absent ones are not wanted.")
        .def(nb::init<MaybeOut, MaybeOut, std::vector<std::int64_t>, std::vector<Out>>(),
             nb::arg("logits").noconvert().none() = nb::none(), nb::arg("tokens").noconvert().none() = nb::none(),
             nb::arg("layers") = std::vector<std::int64_t>{},
             nb::arg("intermediates").noconvert() = std::vector<Out>{});

    nb::class_<DrawArrays>(m, "Draws", "The random draws of one training forward.")
        .def(nb::init<MaybeIn, MaybeIn, bool, std::int64_t>(), nb::arg("drop_path").noconvert().none() = nb::none(),
             nb::arg("dropout").noconvert().none() = nb::none(), nb::arg("flip") = false,
             nb::arg("class_position") = -1)
        .def_ro("flip", &DrawArrays::flip)
        .def_ro("class_position", &DrawArrays::class_position);

    nb::class_<GradientArrays>(m, "Gradients", "One array for the gradients of all parameters, and that of the images.")
        .def(nb::init<Out, std::vector<std::int64_t>, MaybeOut>(), nb::arg("flat").noconvert(), nb::arg("offsets"),
             nb::arg("dimages").noconvert().none() = nb::none());

    nb::class_<Kept>(m, "Kept", "What a forward kept: the bytes of Saved.token, or a copy, and their memory mode.")
        .def(
            "__init__",
            [](Kept* self, In bytes, const std::string& memory) {
                new (self) Kept{std::move(bytes), to_memory(memory)};
            },
            nb::arg("bytes").noconvert(), nb::arg("memory"));
}

}  // namespace

void bind_network(nb::module_& m)
{
    bind_values(m);
    nb::class_<BoundWeights>(m, "BoundWeights").def("look", &look, nb::arg("place"));

    nb::class_<SavedHandle>(m, "Saved")
        .def(
            "__init__",
            [](SavedHandle* self, const std::string& memory, bool capturing) {
                new (self) SavedHandle(to_memory(memory), std::shared_ptr<ReusableSaved>(), capturing);
            },
            nb::arg("memory") = "lean", nb::arg("capturing") = false)
        .def_static("lent", &lent, nb::arg("memory"), nb::arg("bytes").noconvert(),
                    "What a forward keeps goes into an array (bytes) of the caller's.")
        .def_static("size", &saved_size, nb::arg("config"), nb::arg("batch"), nb::arg("dtype"), nb::arg("cuda"),
                    nb::arg("memory"), "Bytes that a forward of the network keeps.")
        .def_static("block_size", &saved_block_size, nb::arg("config"), nb::arg("batch"), nb::arg("len"),
                    nb::arg("dtype"), nb::arg("cuda"), nb::arg("memory"), "Bytes that a forward of one block keeps.")
        .def_prop_ro("bytes", &SavedHandle::bytes)
        .def_prop_ro("memory", &SavedHandle::memory)
        .def_prop_ro("token", &token_of)
        .def_static(
            "chunk", [](const std::string& memory) { return Saved::chunk(to_memory(memory)); }, nb::arg("memory"));

    nb::class_<BoundNetwork>(m, "BoundNetwork")
        .def(nb::init<const Config&>(), nb::arg("config"))
        .def("bind", &BoundNetwork::bind, nb::arg("parameters").noconvert())
        .def("saved", &BoundNetwork::saved, nb::arg("memory"), nb::arg("place"))
        .def("release", &BoundNetwork::release)
        .def("forward", &BoundNetwork::forward, nb::arg("weights"), nb::arg("images").noconvert(), nb::arg("outputs"),
             nb::arg("draws"), nb::arg("place"), nb::arg("saved").none() = nb::none(), nb::arg("constant") = false)
        .def("backward", &BoundNetwork::backward, nb::arg("weights"), nb::arg("images").noconvert(), nb::arg("kept"),
             nb::arg("incoming"), nb::arg("gradients"), nb::arg("draws"), nb::arg("place"));
}

}  // namespace vimcore::python
