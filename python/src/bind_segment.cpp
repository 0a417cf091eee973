// SPDX-License-Identifier: Apache-2.0
// SegmentEngine, the network of a segmentation file without torch.
#include <cstring>
#include <utility>

#include "bindings.h"
#include "convert.h"
#include "reusable.h"

namespace vimcore::python {

namespace {

// Usable from any number of threads.
class SegmentEngine {
public:
    SegmentEngine(nb::handle path, int threads, const std::string& dtype)
        : threads_(threads),
          dtype_(to_float_type("[SegmentEngine] dtype", dtype)),
          model_(SegmentationModel::load(path_of(path)))
    {
        sessions_.give(make_session());
    }

    nb::ndarray<nb::numpy, float> logits(const In& images)
    {
        const Tensor x = check(images);
        const SegmentationFile& about = model_->about();
        float* data = nullptr;
        auto out = make_numpy<float>(
            {x.size(0), static_cast<std::int64_t>(about.classes.size()), about.window_height, about.window_width},
            &data);
        with_session([&](SegmentationSession& session) { session.logits(x.as<float>(), x.size(0), data); });
        return out;
    }

    nb::ndarray<nb::numpy, std::uint8_t> classes(const In& images)
    {
        const Tensor x = check(images);
        const SegmentationFile& about = model_->about();
        std::uint8_t* data = nullptr;
        auto out = make_numpy<std::uint8_t>({x.size(0), about.window_height, about.window_width}, &data);
        with_session([&](SegmentationSession& session) { session.classes(x.as<float>(), x.size(0), data); });
        return out;
    }

    nb::ndarray<nb::numpy, std::uint8_t> segment(const In& array)
    {
        const Image image = to_image(array, "SegmentEngine");
        ClassMap map;
        with_session([&](SegmentationSession& session) { session.segment(image, map); });
        std::uint8_t* data = nullptr;
        auto out = make_numpy<std::uint8_t>({map.height, map.width}, &data);
        std::memcpy(data, map.classes.data(), map.classes.size());
        return out;
    }

private:
    std::unique_ptr<SegmentationSession> make_session()
    {
        return std::make_unique<SegmentationSession>(model_, threads_, dtype_);
    }

    Tensor check(const In& images) const
    {
        const SegmentationFile& about = model_->about();
        const Tensor x = to_host_tensor(images, "SegmentEngine", "images");
        const Shape window{x.shape.rank() > 0 ? x.size(0) : 0, about.config.in_chans, about.window_height,
                           about.window_width};
        if (x.dtype != DType::f32 || !(x.shape == window))
            throw std::invalid_argument("[SegmentEngine] images: expected windows (B, " + std::to_string(window[1]) +
                                        ", " + std::to_string(window[2]) + ", " + std::to_string(window[3]) +
                                        ") f32 cpu, got " + vimcore::describe(x));
        return x;
    }

    template <class F>
    void with_session(F&& f)
    {
        Reusable<SegmentationSession>::Lease session(sessions_, sessions_.take([this] {
            const nb::gil_scoped_release release;
            return make_session();
        }));
        const nb::gil_scoped_release release;
        f(*session);
    }

    int threads_;
    DType dtype_;
    std::shared_ptr<const SegmentationModel> model_;
    Reusable<SegmentationSession> sessions_;
};

}  // namespace

void bind_segment(nb::module_& m)
{
    nb::class_<SegmentEngine>(m, "SegmentEngine")
        .def(nb::init<nb::handle, int, const std::string&>(), nb::arg("path"), nb::arg("threads") = 0,
             nb::arg("dtype") = "float32")
        .def("logits", &SegmentEngine::logits, nb::arg("images").noconvert())
        .def("classes", &SegmentEngine::classes, nb::arg("images").noconvert())
        .def("segment", &SegmentEngine::segment, nb::arg("image").noconvert());
}

}  // namespace vimcore::python
