// SPDX-License-Identifier: Apache-2.0
#include "out_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "arguments.h"
#include "find_images.h"
#include "numpy_file.h"
#include "text.h"
#include "vimcore/safetensors.h"

namespace vim_infer {
namespace {

std::string cell(const std::string& text)
{
    if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
    std::string quoted = "\"";
    for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
    return quoted + '"';
}

std::string listed(const std::vector<std::string>& names)
{
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

std::string json_list(const std::vector<std::string>& names)
{
    std::string text = "[";
    for (const std::string& name : names) text += (text.size() > 1 ? ", " : "") + json_text(name);
    return text + "]";
}

}  // namespace

std::string check_out(const std::string& out, const std::vector<std::string>& suffixes)
{
    const std::string suffix = suffix_of(out);
    if (std::find(suffixes.begin(), suffixes.end(), suffix) == suffixes.end())
        throw UsageError("argument --out: expected a name that ends with " + listed(suffixes) + ", got '" + out + "'" +
                         (suffix == ".parquet" ? "; `vimcore predict` writes .parquet" : ""));
    const std::filesystem::path folder = std::filesystem::path(out).parent_path();
    if (::access(folder.empty() ? "." : folder.string().c_str(), W_OK | X_OK) != 0)
        throw std::runtime_error(out + ": cannot write: " + std::strerror(errno));
    return suffix;
}

std::string csv_row(const std::vector<std::string>& cells)
{
    std::string text;
    for (std::size_t i = 0; i < cells.size(); i++) text += (i ? "," : "") + cell(cells[i]);
    return text + '\n';
}

PredictionFile::PredictionFile(const std::string& path, const std::string& suffix, std::int64_t topk,
                               std::size_t logits)
    : file_("predict", path),
      table_(suffix == ".csv"),
      array_(suffix == ".json"),
      columns_(3 * static_cast<std::size_t>(topk) + logits)
{
    if (!table_) return;
    std::vector<std::string> names{"image"};
    for (std::int64_t rank = 1; rank <= topk; rank++)
        for (const char* name : {"index", "label", "p"})
            names.push_back(name + (rank == 1 ? "" : "_" + std::to_string(rank)));
    for (std::size_t i = 0; i < logits; i++) names.push_back("logit_" + std::to_string(i));
    names.push_back("error");
    write(csv_row(names));
}

void PredictionFile::add_row(const std::string& image, std::vector<std::string> cells, const std::string& error)
{
    cells.resize(columns_);
    cells.insert(cells.begin(), image);
    cells.push_back(error);
    write(csv_row(cells));
}

void PredictionFile::add_object(const std::string& json)
{
    write(array_ ? (begun_ ? ",\n" : "[\n") : (begun_ ? "\n" : ""));
    write(json);
    begun_ = true;
}

void PredictionFile::end()
{
    if (!table_) write(array_ ? "\n]\n" : "\n");
    file_.commit();
}

void write_features(const std::string& path, const std::string& suffix, const std::vector<std::string>& images,
                    const std::vector<float>& values, const vimcore::Shape& shape)
{
    if (suffix == ".npy" || suffix == ".npz") return write_numpy(path, suffix == ".npz", images, values, shape);
    if (suffix == ".csv") {
        vimcore::AtomicFile file("features", path);
        const std::size_t width = values.size() / images.size();
        std::vector<std::string> cells{"image"};
        for (std::size_t i = 0; i < width; i++) cells.push_back("f" + std::to_string(i));
        std::string text = csv_row(cells);
        file.write(text.data(), text.size());
        for (std::size_t n = 0; n < images.size(); n++) {
            cells[0] = images[n];
            for (std::size_t i = 0; i < width; i++) cells[1 + i] = number(values[n * width + i], 9);
            text = csv_row(cells);
            file.write(text.data(), text.size());
        }
        return file.commit();
    }
    // what is kept is not written to
    vimcore::save_safetensors(path, {{"features", {const_cast<float*>(values.data()), shape, vimcore::DType::f32, {}}}},
                              {{"vimcore.images", json_list(images)}});
}

}  // namespace vim_infer
