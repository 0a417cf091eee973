// SPDX-License-Identifier: Apache-2.0
// The C interface over Model, Session and the preprocessing. Handles are looked up among those that are alive, so that
// a wrong one is an error and one that another thread destroys meanwhile lives on until the call ends.
#include "vimcore/c_api.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "vimcore/error.h"
#include "vimcore/model.h"
#include "vimcore/preprocess.h"
#include "vimcore/segment.h"
#include "vimcore/version.h"

struct vimcore_model {
    std::shared_ptr<const vimcore::Model> model;
    std::vector<std::string> labels;
    std::optional<vimcore::Preprocess> preprocess;
    std::int64_t outputs = 0;  // floats per image
    std::int64_t features = 0;
};

struct vimcore_session {
    vimcore_session(std::shared_ptr<const vimcore_model> loaded, const vimcore::SessionOptions& options)
        : model(std::move(loaded)), session(model->model, options)
    {
    }
    const std::shared_ptr<const vimcore_model> model;
    vimcore::Session session;
    std::mutex busy;
};

struct vimcore_segmentation {
    std::shared_ptr<const vimcore::SegmentationModel> model;
};

struct vimcore_segmentation_session {
    vimcore_segmentation_session(std::shared_ptr<const vimcore_segmentation> loaded, int threads, vimcore::DType dtype)
        : model(std::move(loaded)), session(model->model, threads, dtype)
    {
    }
    const std::shared_ptr<const vimcore_segmentation> model;
    vimcore::SegmentationSession session;
    vimcore::ClassMap map;  // of the last picture
    std::mutex busy;
};

namespace {

// Of all kinds. A handle is a number, not an address, which a later object may have.
std::atomic<std::uintptr_t> last_handle = 0;

template <class T>
class Handles {
public:
    T* add(std::shared_ptr<T> object)
    {
        T* handle = reinterpret_cast<T*>(last_handle += 16);
        const std::lock_guard lock(mutex_);
        alive_.emplace(handle, std::move(object));
        return handle;
    }
    std::shared_ptr<T> find(const T* handle, const char* what)
    {
        if (!handle)
            throw std::invalid_argument(std::string("[") + what + "] handle: expected a " + what + ", got NULL");
        const std::lock_guard lock(mutex_);
        const auto found = alive_.find(handle);
        if (found == alive_.end())
            throw std::invalid_argument(std::string("[") + what + "] handle: not a " + what + ", or destroyed");
        return found->second;
    }
    void remove(const T* handle)
    {
        std::shared_ptr<T> last;  // freed after the lock is
        const std::lock_guard lock(mutex_);
        const auto found = alive_.find(handle);
        if (found == alive_.end()) return;
        last = std::move(found->second);
        alive_.erase(found);
    }

private:
    std::mutex mutex_;
    std::map<const T*, std::shared_ptr<T>> alive_;
};

// Never destroyed: handles may be used until the very end of the program.
template <class T>
Handles<T>& handles()
{
    static auto* const all = new Handles<T>;
    return *all;
}

std::shared_ptr<vimcore_model> find(const vimcore_model* model)
{
    return handles<vimcore_model>().find(model, "model");
}
std::shared_ptr<vimcore_session> find(const vimcore_session* session)
{
    return handles<vimcore_session>().find(session, "session");
}

std::shared_ptr<vimcore_segmentation> find(const vimcore_segmentation* model)
{
    return handles<vimcore_segmentation>().find(model, "segmentation");
}
std::shared_ptr<vimcore_segmentation_session> find(const vimcore_segmentation_session* session)
{
    return handles<vimcore_segmentation_session>().find(session, "segmentation_session");
}

// Text of fixed size: a report that memory has run out must not need any.
struct LastError {
    char text[2048] = "";
} thread_local last_error;

vimcore_status fail(vimcore_status status, const char* text) noexcept
{
    std::size_t length = std::strlen(text);
    if (length >= sizeof last_error.text) {
        length = sizeof last_error.text - 1;
        while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) length--;  // whole characters
    }
    std::memcpy(last_error.text, text, length);
    last_error.text[length] = '\0';
    return status;
}

template <class F>
vimcore_status guarded(F&& body) noexcept
{
    try {
        body();
        return VIMCORE_OK;
    } catch (const std::invalid_argument& error) {
        return fail(VIMCORE_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return fail(VIMCORE_OUT_OF_MEMORY, "out of memory");
    } catch (const std::length_error&) {
        return fail(VIMCORE_OUT_OF_MEMORY, "out of memory: a size is beyond what can be allocated");
    } catch (const vimcore::OutOfMemory& error) {
        return fail(VIMCORE_OUT_OF_MEMORY, error.what());
    } catch (const vimcore::Error& error) {
        return fail(VIMCORE_FAILED, error.what());
    } catch (const std::exception& error) {
        return fail(VIMCORE_INTERNAL, error.what());
    } catch (...) {
        return fail(VIMCORE_INTERNAL, "an exception of unknown type");
    }
}

template <class T>
T* given(const char* op, const char* name, T* pointer)
{
    if (!pointer) throw std::invalid_argument(std::string("[") + op + "] " + name + ": expected a pointer, got NULL");
    return pointer;
}

vimcore::DType parse_dtype(const char* op, const char* text)
{
    const std::string dtype = text ? text : "f32";
    for (const vimcore::DType known : {vimcore::DType::f32, vimcore::DType::f16, vimcore::DType::bf16})
        if (dtype == vimcore::name_of(known)) return known;
    throw std::invalid_argument(std::string("[") + op + "] dtype: expected \"f32\", \"bf16\" or \"f16\", got \"" +
                                dtype + '"');
}

void check_room(const char* op, std::int64_t batch, std::int64_t per_image, std::size_t capacity)
{
    if (batch < 0)
        throw std::invalid_argument(std::string("[") + op + "] batch: expected 0 or more, got " +
                                    std::to_string(batch));
    if (static_cast<std::size_t>(batch) > capacity / static_cast<std::size_t>(per_image))
        throw std::invalid_argument(std::string("[") + op + "] capacity: expected room for " + std::to_string(batch) +
                                    " x " + std::to_string(per_image) + " floats, got " + std::to_string(capacity));
}

// How the network's pictures are made, after `image` has been found large enough for one.
const vimcore::Preprocess& pictures_of(const vimcore_model& model, const char* op, float* image, std::size_t capacity)
{
    const vimcore::Config& c = model.model->config();
    if (!model.preprocess)
        throw std::invalid_argument(std::string("[") + op + "] model: takes " + std::to_string(c.in_chans) +
                                    " channels, so no picture file can be its input");
    if (c.frames > 0)
        throw std::invalid_argument(std::string("[") + op + "] model: takes clips of " + std::to_string(c.frames) +
                                    " frames, (channels, frames, height, width) floats that the caller fills");
    given(op, "image", image);
    check_room(op, 1, c.images_shape(1).numel(), capacity);
    return *model.preprocess;
}

void load_model(const char* path, const char* device, std::int64_t img_height, std::int64_t img_width,
                std::optional<vimcore::DType> only, vimcore_model** model)
{
    given("model", "path", path);
    given("model", "model", model);
    if (img_height < 0 || img_width < 0)
        throw std::invalid_argument("[model] img_height and img_width: expected 0 or more, got " +
                                    std::to_string(img_height) + " and " + std::to_string(img_width));
    auto loaded = std::make_shared<vimcore_model>();
    loaded->model = vimcore::Model::load(path, {.device = vimcore::device_from(device ? device : "cpu"),
                                                .img_height = img_height,
                                                .img_width = img_width,
                                                .only = only});
    const vimcore::Config& config = loaded->model->config();
    loaded->labels = vimcore::labels_of(config, loaded->model->metadata());
    loaded->preprocess = vimcore::preprocess_of(config, loaded->model->metadata());
    loaded->outputs = config.logits_shape(1).numel();
    loaded->features = config.tokens_shape(1).numel();
    *model = handles<vimcore_model>().add(std::move(loaded));
}

}  // namespace

extern "C" {

const char* vimcore_version(void) { return VIMCORE_VERSION; }
const char* vimcore_last_error(void) { return last_error.text; }

vimcore_status vimcore_model_load(const char* path, const char* device, int64_t img_height, int64_t img_width,
                                  vimcore_model** model)
{
    return guarded([&] { load_model(path, device, img_height, img_width, {}, model); });
}

vimcore_status vimcore_model_load_for(const char* path, const char* device, int64_t img_height, int64_t img_width,
                                      const char* dtype, vimcore_model** model)
{
    return guarded([&] { load_model(path, device, img_height, img_width, parse_dtype("model", dtype), model); });
}

void vimcore_model_destroy(vimcore_model* model) { handles<vimcore_model>().remove(model); }

vimcore_status vimcore_model_get_info(const vimcore_model* model, vimcore_model_info* info)
{
    return guarded([&] {
        const auto m = find(model);
        const vimcore::Config& c = m->model->config();
        *given("model", "info", info) = {c.in_chans,    c.img_height, c.img_width, m->outputs,
                                         c.num_classes, c.tokens(),   c.embed_dim, c.frames};
    });
}

vimcore_status vimcore_model_label(const vimcore_model* model, int64_t index, const char** label)
{
    return guarded([&] {
        const auto m = find(model);
        const std::int64_t classes = m->model->config().num_classes;
        if (index < 0 || index >= classes)
            throw std::invalid_argument("[model_label] index: expected 0 to " + std::to_string(classes - 1) + ", got " +
                                        std::to_string(index));
        *given("model_label", "label", label) =
            m->labels.empty() ? nullptr : m->labels[static_cast<std::size_t>(index)].c_str();
    });
}

vimcore_status vimcore_model_metadata(const vimcore_model* model, const char* key, const char** value)
{
    return guarded([&] {
        const auto m = find(model);
        const auto& metadata = m->model->metadata();
        const auto found = metadata.find(given("model_metadata", "key", key));
        *given("model_metadata", "value", value) = found == metadata.end() ? nullptr : found->second.c_str();
    });
}

vimcore_status vimcore_load_image(const vimcore_model* model, const char* path, float* image, size_t capacity)
{
    return guarded([&] {
        const auto m = find(model);
        given("load_image", "path", path);
        vimcore::load_image(path, pictures_of(*m, "load_image", image, capacity), image);
    });
}

vimcore_status vimcore_decode_image(const vimcore_model* model, const void* bytes, size_t size, float* image,
                                    size_t capacity)
{
    return guarded([&] {
        const auto m = find(model);
        given("decode_image", "bytes", bytes);
        vimcore::load_image(bytes, size, "<memory>", pictures_of(*m, "decode_image", image, capacity), image);
    });
}

vimcore_status vimcore_session_create(const vimcore_model* model, int threads, int64_t max_batch, const char* dtype,
                                      vimcore_session** session)
{
    return guarded([&] {
        const auto m = find(model);
        given("session", "session", session);
        vimcore::SessionOptions options;
        options.max_batch = max_batch;
        options.threads = threads;
        options.dtype = parse_dtype("session", dtype);
        *session = handles<vimcore_session>().add(std::make_shared<vimcore_session>(m, options));
    });
}

void vimcore_session_destroy(vimcore_session* session) { handles<vimcore_session>().remove(session); }

vimcore_status vimcore_session_run(vimcore_session* session, const float* images, int64_t batch, float* logits,
                                   size_t capacity)
{
    return guarded([&] {
        const auto s = find(session);
        check_room("session_run", batch, s->model->outputs, capacity);
        if (batch == 0) return;
        given("session_run", "images", images);
        given("session_run", "logits", logits);
        const std::lock_guard lock(s->busy);
        s->session.run(images, batch, logits);
    });
}

vimcore_status vimcore_session_features(vimcore_session* session, const float* images, int64_t batch, float* tokens,
                                        size_t capacity)
{
    return guarded([&] {
        const auto s = find(session);
        check_room("session_features", batch, s->model->features, capacity);
        if (batch == 0) return;
        given("session_features", "images", images);
        given("session_features", "tokens", tokens);
        const std::lock_guard lock(s->busy);
        s->session.features(images, batch, tokens);
    });
}

vimcore_status vimcore_segmentation_load(const char* path, vimcore_segmentation** model)
{
    return guarded([&] {
        given("segmentation", "path", path);
        given("segmentation", "model", model);
        auto loaded = std::make_shared<vimcore_segmentation>();
        loaded->model = vimcore::SegmentationModel::load(path);
        *model = handles<vimcore_segmentation>().add(std::move(loaded));
    });
}

void vimcore_segmentation_destroy(vimcore_segmentation* model) { handles<vimcore_segmentation>().remove(model); }

vimcore_status vimcore_segmentation_get_info(const vimcore_segmentation* model, vimcore_segmentation_info* info)
{
    return guarded([&] {
        const auto m = find(model);
        const vimcore::SegmentationFile& about = m->model->about();
        *given("segmentation", "info", info) = {about.config.in_chans, about.window_height, about.window_width,
                                                static_cast<std::int64_t>(about.classes.size())};
    });
}

vimcore_status vimcore_segmentation_class(const vimcore_segmentation* model, int64_t index, const char** label,
                                          uint8_t colour[3])
{
    return guarded([&] {
        const auto m = find(model);
        const vimcore::SegmentationFile& about = m->model->about();
        const auto classes = static_cast<std::int64_t>(about.classes.size());
        if (index < 0 || index >= classes)
            throw std::invalid_argument("[segmentation_class] index: expected 0 to " + std::to_string(classes - 1) +
                                        ", got " + std::to_string(index));
        const auto i = static_cast<std::size_t>(index);
        if (label) *label = about.classes[i].c_str();
        for (std::size_t c = 0; colour && c < 3; c++) colour[c] = about.palette[i][c];
    });
}

vimcore_status vimcore_segmentation_session_create(const vimcore_segmentation* model, int threads, const char* dtype,
                                                   vimcore_segmentation_session** session)
{
    return guarded([&] {
        const auto m = find(model);
        given("segmentation_session", "session", session);
        *session = handles<vimcore_segmentation_session>().add(
            std::make_shared<vimcore_segmentation_session>(m, threads, parse_dtype("segmentation_session", dtype)));
    });
}

void vimcore_segmentation_session_destroy(vimcore_segmentation_session* session)
{
    handles<vimcore_segmentation_session>().remove(session);
}

vimcore_status vimcore_segment_file(vimcore_segmentation_session* session, const char* path, int64_t* height,
                                    int64_t* width, const uint8_t** classes)
{
    return guarded([&] {
        const auto s = find(session);
        given("segment_file", "path", path);
        given("segment_file", "height", height);
        given("segment_file", "width", width);
        given("segment_file", "classes", classes);
        const vimcore::Image image = vimcore::decode_image(path);
        const std::lock_guard lock(s->busy);
        s->session.segment(image, s->map);
        *height = s->map.height;
        *width = s->map.width;
        *classes = s->map.classes.data();
    });
}

vimcore_status vimcore_segment_pixels(vimcore_segmentation_session* session, const uint8_t* rgb, int64_t height,
                                      int64_t width, uint8_t* classes, size_t capacity)
{
    return guarded([&] {
        const auto s = find(session);
        given("segment_pixels", "rgb", rgb);
        given("segment_pixels", "classes", classes);
        if (height < 1 || width < 1 || height > 65535 || width > 65535)
            throw std::invalid_argument("[segment_pixels] height and width: expected 1 to 65535, got " +
                                        std::to_string(height) + " and " + std::to_string(width));
        const auto pixels = static_cast<std::size_t>(height * width);
        if (pixels > capacity)
            throw std::invalid_argument("[segment_pixels] capacity: expected room for " + std::to_string(height) +
                                        " x " + std::to_string(width) + " classes, got " + std::to_string(capacity));
        const vimcore::Image image{height, width, {rgb, rgb + 3 * pixels}};
        const std::lock_guard lock(s->busy);
        s->session.segment(image, s->map);
        std::memcpy(classes, s->map.classes.data(), pixels);
    });
}

vimcore_status vimcore_segment_logits(vimcore_segmentation_session* session, const float* images, int64_t batch,
                                      float* logits, size_t capacity)
{
    return guarded([&] {
        const auto s = find(session);
        const vimcore::SegmentationFile& about = s->model->model->about();
        check_room("segment_logits", batch,
                   static_cast<std::int64_t>(about.classes.size()) * about.window_height * about.window_width,
                   capacity);
        if (batch == 0) return;
        given("segment_logits", "images", images);
        given("segment_logits", "logits", logits);
        const std::lock_guard lock(s->busy);
        s->session.logits(images, batch, logits);
    });
}

}  // extern "C"
