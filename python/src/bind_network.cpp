// SPDX-License-Identifier: Apache-2.0
// The whole network for vimcore.nn, and Engine, the network of a file for vimcore.Runtime.
#include <atomic>
#include <map>
#include <mutex>

#include "core/checksum.h"
#include "place.h"
#include "saved.h"

namespace vimcore::python {

namespace {

// The weights of one network: views of arrays, which it owns as long as a call of some thread may read them, with their
// packed forms.
class Weights {
public:
    Weights(Params params, std::vector<In> arrays, const std::vector<Tensor>& all)
        : params_(std::move(params)),
          arrays_(std::move(arrays)),
          first_(all.front()),
          checksum_(on_cpu() ? all : std::vector<Tensor>{})
    {
        params_.changed();
    }

    const Params& params() const { return params_; }
    DType dtype() const { return first_.dtype; }
    Device device() const { return first_.device; }

    // Whoever wrote to the weights, and however: packed forms are made anew if contents changed since the last look.
    // On a device, where looking would cost as much as that, they always are. Returns the checksum, 0 on a device.
    std::uint64_t look(Context& ctx)
    {
        if (!on_cpu()) {
            params_.changed();
            return 0;
        }
        const std::uint64_t now = checksum_(ctx);
        std::lock_guard lock(mutex_);  // no thread may take a sum for seen before the forms are stale
        if (now != seen_) params_.changed();
        seen_ = now;
        return now;
    }

private:
    bool on_cpu() const { return device().type == Device::Type::cpu; }

    Params params_;
    std::vector<In> arrays_;
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

struct DrawArgs {
    MaybeIn drop_path, mask;
    bool flip;
    std::int64_t class_position;
};

class Network {
public:
    explicit Network(const std::string& json) : config_(Config::from_json(json)) { config_.validate(); }

    std::unique_ptr<Weights> bind(const std::vector<In>& arrays) const
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
        return std::make_unique<Weights>(std::move(params), arrays, all);
    }

    std::unique_ptr<SavedHandle> saved(const std::string& memory, std::uintptr_t stream, bool capturing)
    {
        std::lock_guard lock(mutex_);
        std::shared_ptr<SavedPool>& pool = pools_[stream];
        if (!pool) pool = std::make_shared<SavedPool>();
        return std::make_unique<SavedHandle>(to_memory(memory), pool, capturing);
    }

    void release()
    {
        std::lock_guard lock(mutex_);
        for (auto& [stream, pool] : pools_) pool->clear();
    }

    void forward(Weights& weights, const In& images, const MaybeOut& logits, const MaybeOut& tokens,
                 const std::vector<std::int64_t>& layers, const std::vector<Out>& intermediates, SavedHandle* saved,
                 const MaybeIn& drop_path, const MaybeIn& mask, bool flip, std::int64_t class_position, int threads,
                 std::uintptr_t stream, bool capturing, bool constant)
    {
        const Tensor x = to_tensor(images, "VisionMamba", "images");
        if (x.device != weights.device())
            fail("images", "expected a tensor on " + to_string(weights.device()) + ", got " + describe(x));
        const Outputs out = outputs(x, logits, tokens, layers, intermediates);
        const Draws draws = to_draws(x, {drop_path, mask, flip, class_position});
        with_context(x.device, {threads, stream, capturing}, [&](Context& ctx) {
            if (!constant) weights.look(ctx);
            vimcore::forward(ctx, config_, weights.params(), x, out, saved ? &**saved : nullptr, draws);
        });
    }

    // gradients: one array with the gradient of parameter i at offsets[i], which are added to; offset -1: not wanted.
    void backward(Weights& weights, const In& images, const In& saved, const std::string& memory,
                  const MaybeIn& dlogits, const MaybeIn& dtokens, const std::vector<std::int64_t>& layers,
                  const std::vector<In>& dintermediates, const Out& gradients, const std::vector<std::int64_t>& offsets,
                  const MaybeOut& dimages, const MaybeIn& drop_path, const MaybeIn& mask, bool flip,
                  std::int64_t class_position, int threads, std::uintptr_t stream, bool capturing)
    {
        const Tensor x = to_tensor(images, "VisionMamba", "images");
        const Tensor dx = to_tensor(dimages, "VisionMamba", "dimages");
        const Tensor flat = to_tensor(gradients, "VisionMamba", "gradients");
        const Saved kept = to_saved(saved, memory, config_, x, "VisionMamba");
        const Outputs out = outputs(x, dlogits, dtokens, layers, dintermediates);
        const Draws draws = to_draws(x, {drop_path, mask, flip, class_position});
        expect("dimages", dx, x.shape, x);
        if (flat.dtype != weights.dtype() || flat.device != weights.device() || x.device != weights.device())
            fail("gradients", "expected " + std::string(name_of(weights.dtype())) + " " + to_string(weights.device()) +
                                  " as the weights, got " + describe(flat) + " beside images " + describe(x));
        Params dparams;
        std::size_t index = 0;
        for_each_param(config_, dparams, [&](const std::string& name, Tensor& tensor, const Shape& shape) {
            if (index == offsets.size()) fail(name, "expected an offset, got none");
            const std::int64_t offset = offsets[index++];
            if (offset < 0) return;
            if (offset > flat.numel() - shape.numel())
                fail(name, "offset " + std::to_string(offset) + " does not fit " + describe(flat));
            tensor = flat;
            tensor.data = flat.as<char>() + static_cast<std::size_t>(offset) * size_of(flat.dtype);
            tensor.shape = shape;
        });
        with_context(x.device, {threads, stream, capturing}, [&](Context& ctx) {
            vimcore::backward(ctx, config_, weights.params(), x, kept, out, dparams, dx, draws);
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

    // The arrays of `logits`, `tokens` and `intermediates`, or of their gradients, for the images x.
    template <class Array>
    Outputs outputs(const Tensor& x, const std::optional<Array>& logits, const std::optional<Array>& tokens,
                    const std::vector<std::int64_t>& layers, const std::vector<Array>& intermediates) const
    {
        if (x.shape.rank() != 4) fail("images", "expected (B, C, H, W), got " + describe(x));
        const Config& c = config_;
        const std::int64_t batch = x.size(0), width = c.num_classes > 0 ? c.num_classes : c.embed_dim;
        const bool per_token = c.class_token == ClassToken::none && c.pool == vimcore::Pool::all;
        const Shape sequence{batch, c.tokens(), c.embed_dim};
        Outputs out;
        out.logits = to_tensor(logits, "VisionMamba", "logits");
        expect("logits", out.logits, per_token ? Shape{batch, c.tokens(), width} : Shape{batch, width}, x);
        out.tokens = to_tensor(tokens, "VisionMamba", "tokens");
        expect("tokens", out.tokens, sequence, x);
        out.layers = layers;
        for (const Array& array : intermediates) {
            out.intermediates.push_back(to_tensor(array, "VisionMamba", "intermediates"));
            expect("intermediates", out.intermediates.back(), sequence, x);
        }
        if (layers.size() != intermediates.size())
            fail("intermediates",
                 "expected " + std::to_string(layers.size()) + " arrays, got " + std::to_string(intermediates.size()));
        return out;
    }

    Draws to_draws(const Tensor& x, const DrawArgs& args) const
    {
        Draws draws;
        draws.drop_path = to_tensor(args.drop_path, "VisionMamba", "drop_path");
        expect("drop_path", draws.drop_path, {config_.depth, x.size(0)}, x, true);
        draws.dropout = to_tensor(args.mask, "VisionMamba", "mask");
        expect("mask", draws.dropout, {x.size(0), config_.tokens(), config_.embed_dim}, x, true);
        draws.flip = args.flip;
        draws.class_position = args.class_position;
        if (args.class_position < -1 || args.class_position >= config_.tokens())
            fail("class_position", "does not fit: " + std::to_string(args.class_position));
        return draws;
    }

    Config config_;
    std::mutex mutex_;
    std::map<std::uintptr_t, std::shared_ptr<SavedPool>> pools_;  // by stream; 0 on the CPU
};

std::int64_t saved_bytes(const std::string& json, const std::string& memory, std::int64_t batch, bool float64)
{
    return Saved::bytes_per_block(Config::from_json(json), to_memory(memory), batch, float64 ? DType::f64 : DType::f32);
}

// A network from a file, for inference from any number of threads.
class Engine {
public:
    Engine(nb::handle path, int threads, std::int64_t img_height, std::int64_t img_width, int cuda,
           const std::string& dtype)
        : options_{.max_batch = 8, .threads = threads, .dtype = to_activation(dtype)}
    {
        model_ = Model::load(path_of(path), cuda < 0 ? Device::cpu() : Device::cuda(cuda), img_height, img_width);
        sessions_.give(make_session());
    }

    const Model& model() const { return *model_; }

    nb::ndarray<nb::numpy, float> run(const In& images)
    {
        const Config& c = model_->config();
        const std::size_t batch = check(images), classes = static_cast<std::size_t>(c.num_classes);
        float* data = nullptr;
        nb::ndarray<nb::numpy, float> out;
        if (c.class_token == ClassToken::none && c.pool == vimcore::Pool::all) {
            const auto width = classes ? classes : static_cast<std::size_t>(c.embed_dim);
            out = make_numpy<float>({batch, static_cast<std::size_t>(c.tokens()), width}, &data);
        } else {
            out = make_numpy<float>({batch, outputs_}, &data);
        }
        const float* x = static_cast<const float*>(images.data());
        with_session(batch, [&](Session& session) { session.run(x, static_cast<std::int64_t>(batch), data); });
        return out;
    }

    nb::ndarray<nb::numpy, float> features(const In& images)
    {
        const Config& c = model_->config();
        const std::size_t batch = check(images);
        float* data = nullptr;
        auto out = make_numpy<float>(
            {batch, static_cast<std::size_t>(c.tokens()), static_cast<std::size_t>(c.embed_dim)}, &data);
        const float* x = static_cast<const float*>(images.data());
        with_session(batch, [&](Session& session) { session.features(x, static_cast<std::int64_t>(batch), data); });
        return out;
    }

private:
    std::unique_ptr<Session> make_session()
    {
        auto session = std::make_unique<Session>(model_, options_);
        outputs_ = static_cast<std::size_t>(session->outputs());
        return session;
    }

    std::size_t check(const In& images) const
    {
        const Config& c = model_->config();
        const Tensor x = to_host_tensor(images, "Runtime", "images");
        const Shape wanted{x.shape.rank() > 0 ? x.size(0) : 0, c.in_chans, c.img_height, c.img_width};
        if (x.dtype != DType::f32 || !(x.shape == wanted))
            throw std::invalid_argument("[Runtime] images: expected (B, " + std::to_string(c.in_chans) + ", " +
                                        std::to_string(c.img_height) + ", " + std::to_string(c.img_width) +
                                        ") f32 cpu, got " + describe(x));
        return static_cast<std::size_t>(x.size(0));
    }

    template <class F>
    void with_session(std::size_t batch, F&& f)
    {
        if (batch == 0) return;
        nb::gil_scoped_release release;
        Pool<Session>::Lease session(sessions_, sessions_.take([this] { return make_session(); }));
        f(*session);
    }

    static DType to_activation(const std::string& name)
    {
        if (name == "float32") return DType::f32;
        if (name == "float16") return DType::f16;
        if (name == "bfloat16") return DType::bf16;
        throw std::invalid_argument("[Runtime] dtype: expected \"float32\", \"bfloat16\" or \"float16\", got \"" +
                                    name + "\"");
    }

    SessionOptions options_;
    std::shared_ptr<const Model> model_;
    std::atomic<std::size_t> outputs_{0};
    Pool<Session> sessions_;
};

}  // namespace

void bind_network(nb::module_& m)
{
    nb::class_<Weights>(m, "Weights")
        .def(
            "look",
            [](Weights& weights, int threads, std::uintptr_t stream) {
                std::uint64_t sum = 0;
                with_context(weights.device(), {threads, stream, false},
                             [&](Context& ctx) { sum = weights.look(ctx); });
                return sum;
            },
            nb::arg("threads") = 0, nb::arg("stream") = 0);

    nb::class_<SavedHandle>(m, "Saved")
        .def(
            "__init__",
            [](SavedHandle* self, const std::string& memory, bool capturing) {
                new (self) SavedHandle(to_memory(memory), nullptr, capturing);
            },
            nb::arg("memory") = "lean", nb::arg("capturing") = false)
        .def_prop_ro("bytes", &SavedHandle::bytes)
        .def_prop_ro("memory", &SavedHandle::memory)
        .def_prop_ro("token", &token_of)
        .def_static(
            "chunk", [](const std::string& memory) { return Saved::chunk(to_memory(memory)); }, nb::arg("memory"))
        .def_static("bytes_per_block", &saved_bytes, nb::arg("config_json"), nb::arg("memory"), nb::arg("batch"),
                    nb::arg("float64") = false);

    nb::class_<Network>(m, "Network")
        .def(nb::init<const std::string&>(), nb::arg("config_json"))
        .def("bind", &Network::bind, nb::arg("parameters").noconvert())
        .def("saved", &Network::saved, nb::arg("memory") = "lean", nb::arg("stream") = 0, nb::arg("capturing") = false)
        .def("release", &Network::release)
        .def("forward", &Network::forward, nb::arg("weights"), nb::arg("images").noconvert(),
             nb::arg("logits").noconvert().none() = nb::none(), nb::arg("tokens").noconvert().none() = nb::none(),
             nb::arg("layers") = std::vector<std::int64_t>{}, nb::arg("intermediates").noconvert() = std::vector<Out>{},
             nb::arg("saved").none() = nb::none(), nb::arg("drop_path").noconvert().none() = nb::none(),
             nb::arg("mask").noconvert().none() = nb::none(), nb::arg("flip") = false, nb::arg("class_position") = -1,
             nb::arg("threads") = 0, nb::arg("stream") = 0, nb::arg("capturing") = false, nb::arg("constant") = false)
        .def("backward", &Network::backward, nb::arg("weights"), nb::arg("images").noconvert(),
             nb::arg("saved").noconvert(), nb::arg("memory"), nb::arg("dlogits").noconvert().none() = nb::none(),
             nb::arg("dtokens").noconvert().none() = nb::none(), nb::arg("layers") = std::vector<std::int64_t>{},
             nb::arg("dintermediates").noconvert() = std::vector<In>{}, nb::arg("gradients").noconvert(),
             nb::arg("offsets"), nb::arg("dimages").noconvert().none() = nb::none(),
             nb::arg("drop_path").noconvert().none() = nb::none(), nb::arg("mask").noconvert().none() = nb::none(),
             nb::arg("flip") = false, nb::arg("class_position") = -1, nb::arg("threads") = 0, nb::arg("stream") = 0,
             nb::arg("capturing") = false);

    nb::class_<Engine>(m, "Engine")
        .def(nb::init<nb::handle, int, std::int64_t, std::int64_t, int, const std::string&>(), nb::arg("path"),
             nb::arg("threads") = 0, nb::arg("img_height") = 0, nb::arg("img_width") = 0, nb::arg("cuda") = -1,
             nb::arg("dtype") = "float32")
        .def("run", &Engine::run, nb::arg("images").noconvert())
        .def("features", &Engine::features, nb::arg("images").noconvert())
        .def_prop_ro("config_json", [](const Engine& e) { return e.model().config().to_json(); })
        .def_prop_ro("metadata", [](const Engine& e) {
            nb::dict out;
            for (const auto& [key, value] : e.model().metadata()) out[key.c_str()] = value;
            return out;
        });
}

}  // namespace vimcore::python
