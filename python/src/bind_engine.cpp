// SPDX-License-Identifier: Apache-2.0
// Engine, the network of a file for vimcore.Runtime.
#include <utility>

#include "bindings.h"
#include "convert.h"
#include "reusable.h"
#include "vimcore/plan.h"

namespace vimcore::python {

namespace {

// Images that a device takes at a time: 64, or as many as a GiB of scratch memory is enough for, but no fewer than 8.
std::int64_t device_batch(const Config& config, DType dtype, Device device)
{
    constexpr std::int64_t most = std::int64_t{1} << 30;
    std::int64_t batch = 64;
    while (batch > 8 && forward_scratch(config, batch, dtype, 1, device).held > most) batch /= 2;
    return batch;
}

// A network from a file, for inference from any number of threads.
class Engine {
public:
    Engine(nb::handle path, int threads, std::int64_t img_height, std::int64_t img_width, int cuda,
           const std::string& dtype)
        : options_{.max_batch = 8, .threads = threads, .dtype = to_float_type("[Runtime] dtype", dtype)}
    {
        model_ = Model::load(path_of(path), {.device = cuda < 0 ? Device::cpu() : Device::cuda(cuda),
                                             .img_height = img_height,
                                             .img_width = img_width,
                                             .only = options_.dtype});
        if (model_->device().type == Device::Type::cuda)
            options_.max_batch = device_batch(model_->config(), options_.dtype, model_->device());
        sessions_.give(make_session());
    }

    const Model& model() const { return *model_; }

    nb::ndarray<nb::numpy, float> run(const In& images)
    {
        const std::int64_t batch = check(images);
        float* data = nullptr;
        auto out = make_numpy<float>(model_->config().logits_shape(batch), &data);
        const float* x = static_cast<const float*>(images.data());
        with_session(batch, [&](Session& session) { session.run(x, batch, data); });
        return out;
    }

    nb::ndarray<nb::numpy, float> features(const In& images)
    {
        const std::int64_t batch = check(images);
        float* data = nullptr;
        auto out = make_numpy<float>(model_->config().tokens_shape(batch), &data);
        const float* x = static_cast<const float*>(images.data());
        with_session(batch, [&](Session& session) { session.features(x, batch, data); });
        return out;
    }

private:
    std::unique_ptr<Session> make_session() { return std::make_unique<Session>(model_, options_); }

    std::int64_t check(const In& images) const
    {
        const Config& c = model_->config();
        const Tensor x = to_host_tensor(images, "Runtime", "images");
        if (x.dtype != DType::f32 || !(x.shape == c.images_shape(x.shape.rank() > 0 ? x.size(0) : 0)))
            throw std::invalid_argument("[Runtime] images: expected " + c.images_axes() + " f32 cpu, got " +
                                        describe(x));
        return x.size(0);
    }

    template <class F>
    void with_session(std::int64_t batch, F&& f)
    {
        if (batch == 0) return;
        Reusable<Session>::Lease session(sessions_, sessions_.take([this] {
            const nb::gil_scoped_release release;
            return make_session();
        }));
        const nb::gil_scoped_release release;
        f(*session);
    }

    SessionOptions options_;
    std::shared_ptr<const Model> model_;
    Reusable<Session> sessions_;
};

}  // namespace

void bind_engine(nb::module_& m)
{
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<nb::handle, int, std::int64_t, std::int64_t, int, const std::string&>(), nb::arg("path"),
             nb::arg("threads") = 0, nb::arg("img_height") = 0, nb::arg("img_width") = 0, nb::arg("cuda") = -1,
             nb::arg("dtype") = "float32")
        .def("run", &Engine::run, nb::arg("images").noconvert())
        .def("features", &Engine::features, nb::arg("images").noconvert())
        .def_prop_ro("config", [](const Engine& e) { return e.model().config(); })
        .def_prop_ro("metadata", [](const Engine& e) { return e.model().metadata(); });
}

}  // namespace vimcore::python
