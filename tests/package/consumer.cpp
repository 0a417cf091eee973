// SPDX-License-Identifier: Apache-2.0
// What a stranger's program does with the installed library: makes a network, saves, loads and runs it, and catches
// what the library throws. Prints "ok" and the version.
#include <vimcore/c_api.h>
#include <vimcore/vimcore.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void require(bool condition, const char* what)
{
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

}  // namespace

int main(int argc, char** argv)
{
    require(argc == 2, "one argument: a file to write");
    vimcore::Config config;
    config.img_height = config.img_width = 32;
    config.embed_dim = 16;
    config.depth = 2;
    config.num_classes = 3;
    vimcore::Weights weights(config);
    vimcore::initialize(config, weights.params, 0);
    vimcore::save_model(argv[1], config, weights.params, {"cat", "dog", "bird"});

    const auto model = vimcore::Model::load(argv[1], vimcore::Device::cpu());
    vimcore::Session session(model, {.max_batch = 2});
    const std::vector<float> images(2 * 3 * 32 * 32, 0.5f), logits = session.run(images.data(), 2);
    require(logits.size() == 6 && std::equal(logits.begin(), logits.begin() + 3, logits.begin() + 3), "run");

    std::string said;
    try {
        vimcore::Model::load("no such file");
    } catch (const vimcore::Error& error) {  // its type information comes from the library
        said = error.what();
    }
    require(said.find("no such file") != std::string::npos, "vimcore::Error is caught");
    try {
        session.run(images.data(), -1);
        require(false, "a negative batch is an error");
    } catch (const std::invalid_argument&) {
    }
    require(std::strcmp(vimcore_version(), VIMCORE_VERSION) == 0, "header and library are of one version");
    require(vimcore::build_info().version == VIMCORE_VERSION, "build_info");
    std::printf("ok %s\n", VIMCORE_VERSION);
}
