// SPDX-License-Identifier: Apache-2.0
// The network: forward and backward over Config, Params and Saved; Model and Session are conveniences over them.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "vimcore/config.h"
#include "vimcore/context.h"
#include "vimcore/params.h"
#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

// What backward keeps of every block, from little to much; what is not kept is computed again.
//   least   the residual stream, x_proj's output, a scan state per 64 tokens
//   lean    and in_proj's output
//   fast    and a scan state per 16 tokens
enum class Memory : std::uint8_t { least, lean, fast };
const char* name_of(Memory memory);

// What the backward pass of one block needs; everything else is recomputed. n is the number of scan directions.
struct BlockSaved {
    Tensor residual;     // (B, L, D) input of the norm
    Tensor xz;           // (B, L, 2E), or none: Memory::least
    Tensor q;            // (n', B, L, R + 2N), n' = 1 where both directions share x_proj
    Tensor checkpoints;  // (n, B, chunks, N, E) scan states
    std::int64_t chunk = 0;
};

// Filled by forward, read by backward, reusable for the next step of the same shape without allocation.
struct Saved {
    Memory memory = Memory::lean;
    std::int64_t batch = 0;
    std::vector<BlockSaved> blocks;
    Tensor residual;  // (B, L, D) input of the final norm
    Buffer storage;
    std::size_t used = 0;  // bytes of the storage that the tensors take, from its beginning
    Tensor lent;           // (bytes) u8, memory of the caller in the place of the storage, or none

    // Points all tensors into the storage, which grows when it is too small, or into what was lent, which must do.
    void prepare(const Config& config, std::int64_t batch, DType dtype, Device device = Device::cpu());
    // Points all tensors into other memory: a copy of the `used` bytes of a Saved of the same mode and arguments.
    void attach(const Config& config, std::int64_t batch, DType dtype, Device device, void* data, std::size_t bytes);
    // The same for one block on tokens of `shape`, (B, L, D), without the residual, which the caller keeps.
    void prepare_block(const BlockConfig& config, const Shape& shape, DType dtype, Device device = Device::cpu());
    void attach_block(const BlockConfig& config, const Shape& shape, DType dtype, Device device, void* data,
                      std::size_t bytes);

    // Bytes that tensors take of a forward of these arguments, of a block: at most those of one image, times batch.
    static std::size_t bytes(const Config& config, std::int64_t batch, DType dtype, Device device, Memory memory);
    static std::size_t block_bytes(const BlockConfig& config, const Shape& shape, DType dtype, Device device,
                                   Memory memory);

    static std::int64_t chunk(Memory memory);  // tokens between scan checkpoints: 64, fast 16
};

// One Vim block on its own (paper, algorithm 1). The addition residual_out + out is left to the next block's norm.
struct Block {
    Tensor h = {};             // (B, L, D) or none
    Tensor row_scale = {};     // (B) drop-path factor of h, or none
    Tensor residual = {};      // (B, L, D) or none; h or residual is given
    bool reverse = false;      // one direction only: from the last token to the first
    Tensor residual_out = {};  // (B, L, D): residual + row_scale h; may be the memory of residual
    Tensor out = {};           // (B, L, D) mixer output, forward only; may be the memory of h
    std::int64_t only = -1;    // the one token whose output is wanted: out is (B, 1, D), memory of its own
};
struct BlockGradients {
    Tensor dout;           // (B, L, D)
    Tensor dresidual_out;  // (B, L, D) or none
    Tensor dresidual;      // (B, L, D) overwritten; may be the memory of dresidual_out
    Tensor dh;             // (B, L, D) overwritten, or none; may be the memory of dout
};
void block_forward(Context& ctx, const BlockConfig& config, const BlockParams& params, const Block& block,
                   BlockSaved* saved);
void block_backward(Context& ctx, const BlockConfig& config, const BlockParams& params, const Block& block,
                    const BlockSaved& saved, const BlockGradients& gradients, BlockParams& dparams);

// The random draws of one training forward; the caller makes them.
struct Draws {
    Tensor drop_path;                  // (depth, B): factor of the mixer output of each layer, 0 or 1 / keep; or none
    Tensor dropout;                    // (B, L, D): factors after the position table, or none
    bool flip = false;                 // Directions::sequence: run this batch from the last token to the first
    std::int64_t class_position = -1;  // ClassToken::random: where the token stands; -1: at the head
};

// Outputs that the caller wants; none tensors are not computed.
struct Outputs {
    Tensor logits;                      // (B, classes), or (B, L, classes) for Pool::all, or features if no head
    Tensor tokens;                      // (B, L, D) normalised
    std::vector<std::int64_t> layers;   // intermediate layers, ascending
    std::vector<Tensor> intermediates;  // (B, L, D) each: h + r after that layer, class tokens included
};

// images: (B, C, H, W) of the configuration's size. saved == nullptr is inference and gives the same numbers.
// Activations have the type of `out`, and so have images; on the CPU float32 images go with bf16, too.
// Another size than the weights were made for: forward(ctx, config.at_size(H, W), ...), and backward with the same. The
// position table is resized, on the CPU once for each of the sizes used last until Params::changed(); dparams.pos_embed
// has the shape of the table itself.
void forward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Outputs& out,
             Saved* saved = nullptr, const Draws& draws = {});

// `gradients` holds dlogits / dtokens / dintermediates in the same places; dparams is added to, where present.
void backward(Context& ctx, const Config& config, const Params& params, const Tensor& images, const Saved& saved,
              const Outputs& gradients, Params& dparams, const Tensor& dimages, const Draws& draws = {});

struct ModelOptions {
    Device device{};
    // 0: as stored. Otherwise the position table is resized, class tokens left alone.
    std::int64_t img_height = 0, img_width = 0;
    // The one type of activations that sessions will have, or any. With bf16 on the CPU, weights of linear maps are
    // kept as DType::bf16_panels alone, in about a third of the memory.
    std::optional<DType> only{};
};

// A loaded network: immutable, shared between threads.
class Model {
public:
    static std::shared_ptr<const Model> load(const std::string& path, const ModelOptions& options);
    static std::shared_ptr<const Model> load(const std::string& path, Device device = Device::cpu());
    static std::shared_ptr<const Model> load(const std::string& path, Device device, std::int64_t img_height,
                                             std::int64_t img_width);

    const Config& config() const { return config_; }
    Device device() const { return device_; }
    std::optional<DType> only() const { return only_; }
    const Params& params() const { return params_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }

private:
    Config config_;
    Device device_;
    std::optional<DType> only_;
    Params params_;
    std::map<std::string, std::string> metadata_;
    std::vector<Buffer> storage_;
};

struct SessionOptions {
    std::int64_t max_batch = 8;
    int threads = 0;
    DType dtype = DType::f32;  // of activations; also bf16, and on CUDA f16
    bool graph = true;         // CUDA: replay a recorded graph from the second run of a batch size on
};

class Staging;

// One per thread: scratch memory, staging, on CUDA a stream. Runs on the model's device; images and results are in the
// host's memory. Does not allocate after the first runs of a batch size.
class Session {
public:
    explicit Session(std::shared_ptr<const Model> model, SessionOptions options = {});
    std::vector<float> run(const float* images, std::int64_t batch);  // (batch, C, H, W) -> logits
    void run(const float* images, std::int64_t batch, float* logits);
    void features(const float* images, std::int64_t batch, float* tokens);  // (batch, L, D)
    std::int64_t outputs() const;                                           // floats per image of run()

private:
    void run(const float* images, std::int64_t batch, float* result, bool features);

    std::shared_ptr<const Model> model_;
    SessionOptions options_;
    Context ctx_;
    std::shared_ptr<Staging> staging_;  // none on the CPU
};

}  // namespace vimcore
