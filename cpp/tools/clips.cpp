// SPDX-License-Identifier: Apache-2.0
#include "clips.h"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "find_images.h"
#include "npy.h"
#include "regular_file.h"
#include "vimcore/error.h"

namespace vim_infer {
namespace {

namespace fs = std::filesystem;

bool is_digit(const std::string& text, std::size_t at)
{
    return at < text.size() && text[at] >= '0' && text[at] <= '9';
}

// The digits from `at` on without leading zeros; `at` moves behind them.
std::string taken_number(const std::string& text, std::size_t& at)
{
    const std::size_t begin = at;
    while (is_digit(text, at)) at++;
    const std::string digits = text.substr(begin, at - begin);
    return digits.substr(std::min(digits.find_first_not_of('0'), digits.size()));
}

// Runs of digits by their value, so that frame 10 comes after frame 9.
bool earlier(const std::string& a, const std::string& b)
{
    for (std::size_t i = 0, j = 0; i < a.size() || j < b.size();) {
        if (is_digit(a, i) != is_digit(b, j)) return is_digit(a, i);
        if (is_digit(a, i)) {
            const std::string x = taken_number(a, i), y = taken_number(b, j);
            if (x != y) return x.size() != y.size() ? x.size() < y.size() : x < y;
        } else {
            const auto x = static_cast<unsigned char>(i < a.size() ? a[i] : 0),
                       y = static_cast<unsigned char>(j < b.size() ? b[j] : 0);
            if (x != y) return x < y;
            i++;
            j++;
        }
    }
    return a < b;
}

std::vector<std::string> frames_in(const std::string& folder)
{
    std::vector<std::string> names;
    std::error_code error;
    fs::directory_iterator entries(folder, error);
    for (const fs::directory_iterator end; !error && entries != end; entries.increment(error)) {
        const std::string name = entries->path().filename().string();
        if (is_picture(name)) names.push_back(name);
    }
    if (error) throw std::system_error(error);
    std::sort(names.begin(), names.end(), earlier);
    return names;
}

// The place of the frame that is seen of each of `frames` equal parts.
std::int64_t chosen(std::int64_t length, std::int64_t frames, std::int64_t part)
{
    if (length == 0 || length % frames != 0)
        throw vimcore::Error(std::to_string(length) + " frames, which " + std::to_string(frames) +
                             " do not divide: expected " + std::to_string(frames) + " or a multiple of them");
    const std::int64_t each = length / frames;
    return part * each + each / 2;
}

// The network's input, filled frame by frame.
class Input {
public:
    Input(const vimcore::Preprocess& steps, std::int64_t frames, std::vector<float>& pixels)
        : steps_(steps),
          frames_(static_cast<std::size_t>(frames)),
          area_(static_cast<std::size_t>(steps.crop_height * steps.crop_width)),
          frame_(steps.mean.size() * area_),
          pixels_(pixels)
    {
        pixels_.resize(frame_.size() * frames_);
    }

    void set(std::int64_t place, const vimcore::Image& picture)
    {
        vimcore::preprocess(picture, steps_, frame_.data());
        for (std::size_t c = 0; c < steps_.mean.size(); c++)
            std::copy_n(frame_.data() + c * area_, area_,
                        pixels_.data() + (c * frames_ + static_cast<std::size_t>(place)) * area_);
    }

private:
    const vimcore::Preprocess& steps_;
    const std::size_t frames_, area_;
    std::vector<float> frame_;
    std::vector<float>& pixels_;
};

void read_folder(const std::string& folder, std::int64_t frames, Input& input)
{
    const std::vector<std::string> names = frames_in(folder);
    std::set<std::pair<std::int64_t, std::int64_t>> sizes;
    for (std::int64_t t = 0; t < frames; t++) {
        const auto place = chosen(static_cast<std::int64_t>(names.size()), frames, t);
        const std::string& name = names[static_cast<std::size_t>(place)];
        try {
            const std::vector<unsigned char> bytes = read_file(folder + '/' + name);
            const vimcore::Image picture = vimcore::decode_image(bytes.data(), bytes.size(), "");
            sizes.insert({picture.height, picture.width});
            input.set(t, picture);
        } catch (...) {
            throw vimcore::Error(name + ": " + what_is_wrong());
        }
    }
    if (sizes.size() == 1) return;
    std::string text;
    for (const auto& [height, width] : sizes)
        text += (text.empty() ? "" : ", ") + std::to_string(height) + " x " + std::to_string(width);
    throw vimcore::Error("frames of different sizes: " + text);
}

void read_array(const std::string& path, std::int64_t frames, Input& input)
{
    const RegularFile file(path);
    const ArrayHeader header = read_array_header(file);
    const std::vector<std::int64_t>& shape = header.shape;
    const bool fits = shape.size() == 4 && (shape[3] == 1 || shape[3] == 3);
    if (!fits || std::count(shape.begin(), shape.end(), 0))
        throw vimcore::Error("expected an array (T, H, W, C) of 1 or 3 channels, got " + shape_text(shape));
    if (header.type != "uint8") throw vimcore::Error("expected uint8, got " + header.type);
    if (header.fortran_order)
        throw vimcore::Error("stored in Fortran order; numpy.save of numpy.ascontiguousarray(clip) is read");
    std::int64_t left = file.size() - header.data;  // of each frame, row and pixel in turn
    for (const std::int64_t count : shape) left /= count;
    if (left < 1) throw vimcore::Error("the file is cut off: it is too short for " + shape_text(shape));

    const std::int64_t area = shape[1] * shape[2], channels = shape[3];
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(area * channels));
    vimcore::Image picture{.height = shape[1], .width = shape[2], .pixels = {}};
    picture.pixels.resize(static_cast<std::size_t>(3 * area));
    for (std::int64_t t = 0; t < frames; t++) {
        const std::int64_t at = header.data + chosen(shape[0], frames, t) * area * channels;
        if (file.read(bytes.data(), bytes.size(), at) < bytes.size()) throw vimcore::Error("the file became shorter");
        for (std::size_t i = 0; i < picture.pixels.size(); i++) picture.pixels[i] = bytes[channels == 3 ? i : i / 3];
        input.set(t, picture);
    }
}

}  // namespace

Decode to_clip(const vimcore::Preprocess& steps, std::int64_t frames)
{
    return [steps, frames](const std::string& path, Loaded& clip) {
        Input input(steps, frames, clip.pixels);
        std::error_code error;
        if (fs::is_directory(path, error))
            read_folder(path, frames, input);
        else if (suffix_of(path) == ".npy")
            read_array(path, frames, input);
        else
            throw vimcore::Error("a clip is a folder of pictures or a .npy file (T, H, W, C)");
    };
}

}  // namespace vim_infer
