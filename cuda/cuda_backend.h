// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: memory, streams, graphs, and the operators on the context's device and stream.
#pragma once

#include "core/backend.h"
#include "cuda_operators.h"

namespace vimcore::cuda {

class CudaBackend final : public Backend {
public:
    int default_threads() const override { return 1; }
    std::int64_t tile() const override { return device_scratch::undivided_tile; }

    void run(Context& ctx, void (*program)(void*), void* context) override;
    void run_workers(Context& ctx, int count, void (*body)(void*, int), void* context) override;

    void* allocate(std::size_t bytes, int device) override;
    void release(void* memory, int device) noexcept override;
    void upload(Context& ctx, const void* host, const Tensor& to) override;
    void download(Context& ctx, const Tensor& from, void* host) override;
    void copy(Context& ctx, const Tensor& from, const Tensor& to) override;
    std::shared_ptr<void> prepare_copies(Context& ctx, std::vector<Copy> copies) override;
    void run_copies(Context& ctx, const void* prepared) override;
    void fill_zero(Context& ctx, const Tensor& tensor) override;
    void change_stream(Context& ctx, void* from, void* to) override;
    std::shared_ptr<void> mark(Context& ctx) override;
    void await(Context& ctx, void* mark) override;
    std::uint64_t recording(Context& ctx) override;
    std::shared_ptr<void> make_stream(int device) override;
    std::shared_ptr<void> record(Context& ctx, void (*program)(void*), void* context) override;
    void replay(Context& ctx, void* recording) override;

#define VIM_DECLARE(function, Arguments) void function(Context& ctx, const Arguments& args) override;
    VIM_OPERATORS(VIM_DECLARE)
#undef VIM_DECLARE
};

}  // namespace vimcore::cuda
