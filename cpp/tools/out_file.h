// SPDX-License-Identifier: Apache-2.0
// Files of results, of the format that their suffix says; they take their names when all is written. Python writes
// the same (vimcore/tools/prediction_files.py and features.py).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "vimcore/atomic_file.h"
#include "vimcore/tensor.h"

namespace vim_infer {

// The suffix of `out` in small letters, one of those given; UsageError where it is another. A long run must not end
// with a folder that is not there: that is looked at as well.
std::string check_out(const std::string& out, const std::vector<std::string>& suffixes);

std::string csv_row(const std::vector<std::string>& cells);  // with its line's end; quotes where they are needed

// .csv: a row a picture; .jsonl: an object a line; .json: an array of these.
class PredictionFile {
public:
    // topk: classes of a picture; logits: of how many classes they are written.
    PredictionFile(const std::string& path, const std::string& suffix, std::int64_t topk, std::size_t logits);

    bool is_table() const { return table_; }
    void add_row(const std::string& image, std::vector<std::string> cells, const std::string& error);  // of a table
    void add_object(const std::string& json);
    void end();

private:
    void write(std::string_view text) { file_.write(text.data(), text.size()); }

    vimcore::AtomicFile file_;
    bool table_, array_, begun_ = false;
    std::size_t columns_;
};

// values: (N, D) or, but for .csv, (N, L, D) float32, a row an image.
void write_features(const std::string& path, const std::string& suffix, const std::vector<std::string>& images,
                    const std::vector<float>& values, const vimcore::Shape& shape);

}  // namespace vim_infer
