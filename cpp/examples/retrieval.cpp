// SPDX-License-Identifier: Apache-2.0
// Image retrieval: the pictures of a folder that look most like one picture, by the cosine of their features.
//   example_retrieval vim.safetensors photos/ cat.jpg [how many]
#include <vimcore/vimcore.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

// The feature of a picture: its class token after the final norm, or the mean of all tokens; of length 1.
class Features {
public:
    explicit Features(const char* weights)
        : model_(vimcore::Model::load(weights)),
          config_(model_->config()),
          steps_(vimcore::preprocess_of(config_, model_->metadata()).value()),
          session_(model_, {.max_batch = 1}),
          image_(static_cast<std::size_t>(config_.in_chans * config_.img_height * config_.img_width)),
          tokens_(static_cast<std::size_t>(config_.tokens() * config_.embed_dim))
    {
    }

    std::vector<float> of(const std::string& picture)
    {
        vimcore::load_image(picture, steps_, image_.data());
        session_.features(image_.data(), 1, tokens_.data());
        vimcore::ClassPlaces read = config_.class_places();
        if (read.count == 0) read = {0, 1, config_.tokens()};
        std::vector<float> sum(static_cast<std::size_t>(config_.embed_dim));
        for (std::int64_t k = 0; k < read.count; k++)
            for (std::size_t d = 0; d < sum.size(); d++)
                sum[d] += tokens_[static_cast<std::size_t>(read.at(k)) * sum.size() + d];
        double squares = 1e-30;
        for (const float v : sum) squares += double{v} * v;
        for (float& v : sum) v = static_cast<float>(v / std::sqrt(squares));
        return sum;
    }

private:
    std::shared_ptr<const vimcore::Model> model_;
    const vimcore::Config& config_;
    vimcore::Preprocess steps_;
    vimcore::Session session_;
    std::vector<float> image_, tokens_;
};

bool is_picture(const fs::path& path)
{
    std::string end = path.extension().string();
    std::transform(end.begin(), end.end(), end.begin(), [](unsigned char c) { return std::tolower(c); });
    return end == ".jpg" || end == ".jpeg" || end == ".png" || end == ".ppm" || end == ".pgm";
}

struct Match {
    double cosine;
    std::string picture;
};

int run(const char* weights, const char* folder, const char* query, std::size_t wanted)
{
    Features features(weights);
    const std::vector<float> like = features.of(query);
    std::vector<std::string> pictures;
    for (const auto& entry : fs::recursive_directory_iterator(folder))
        if (entry.is_regular_file() && is_picture(entry.path())) pictures.push_back(entry.path().string());

    std::vector<Match> matches;
    for (std::size_t i = 0; i < pictures.size(); i++) {
        std::fprintf(stderr, "\r%zu of %zu pictures", i + 1, pictures.size());
        try {
            const std::vector<float> feature = features.of(pictures[i]);
            double cosine = 0;
            for (std::size_t d = 0; d < feature.size(); d++) cosine += double{like[d]} * feature[d];
            matches.push_back({cosine, pictures[i]});
        } catch (const vimcore::Error& error) {  // told and left out
            std::fprintf(stderr, "\n%s\n", error.what());
        }
    }
    std::fprintf(stderr, "\n");
    std::sort(matches.begin(), matches.end(), [](const Match& a, const Match& b) {
        return a.cosine > b.cosine || (a.cosine == b.cosine && a.picture < b.picture);
    });
    std::printf("rank  cosine  picture\n");
    for (std::size_t i = 0; i < std::min(wanted, matches.size()); i++)
        std::printf("%4zu  %6.3f  %s\n", i + 1, matches[i].cosine, matches[i].picture.c_str());
    return matches.size() == pictures.size() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv)
try {
    const int wanted = argc == 5 ? std::atoi(argv[4]) : 10;
    if (argc < 4 || argc > 5 || wanted < 1)
        return std::fprintf(stderr, "usage: example_retrieval WEIGHTS FOLDER PICTURE [COUNT]\n"), 2;
    return run(argv[1], argv[2], argv[3], static_cast<std::size_t>(wanted));
} catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
