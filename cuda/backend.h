// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: memory, streams, graphs, and the operators of ops.h on the context's device and stream.
#pragma once

#include "core/backend.h"
#include "cuda_operators.h"

namespace vimcore::cuda {

class CudaBackend final : public Backend {
public:
    int default_threads() const override { return 1; }
    std::int64_t tile() const override { return std::int64_t{1} << 40; }  // whole sequences

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
    void scale_rows(Context& ctx, const Tensor& matrix, const Tensor& factor, const Tensor& out) override;
    void scale_rows_backward(Context& ctx, const Tensor& matrix, const Tensor& factor, const Tensor& dout,
                             const Tensor& dmatrix, const Tensor& dfactor) override;
    void accumulate(Context& ctx, std::span<const Tensor> to, std::span<const Tensor> from) override;

    void change_stream(Context& ctx, void* from, void* to) override;
    std::shared_ptr<void> mark(Context& ctx) override;
    void await(Context& ctx, void* mark) override;
    std::uint64_t recording(Context& ctx) override;
    std::shared_ptr<void> make_stream(int device) override;
    std::shared_ptr<void> record(Context& ctx, void (*program)(void*), void* context) override;
    void replay(Context& ctx, void* recording) override;

    void norm_forward(Context& ctx, const NormForward& args) override;
    void norm_backward(Context& ctx, const NormBackward& args) override;
    void linear_forward(Context& ctx, std::span<const LinearForward> args) override;
    void linear_backward(Context& ctx, std::span<const LinearBackward> args) override;
    void conv1d_forward(Context& ctx, const Conv1d& args) override;
    void conv1d_backward(Context& ctx, const Conv1d& args) override;
    void scan_forward(Context& ctx, const Scan& args) override;
    void scan_backward(Context& ctx, const Scan& args) override;
    void selective_scan_forward(Context& ctx, const SelectiveScan& args) override;
    void selective_scan_backward(Context& ctx, const SelectiveScan& args) override;
    void patches_forward(Context& ctx, const Patches& args) override;
    void patches_backward(Context& ctx, const Patches& args) override;
    void tokens_forward(Context& ctx, const Tokens& args) override;
    void tokens_backward(Context& ctx, const Tokens& args) override;
    void rope(Context& ctx, const Rope& args) override;
    void readout_forward(Context& ctx, const Readout& args) override;
    void readout_backward(Context& ctx, const Readout& args) override;
    void add(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& row_scale) override;
};

}  // namespace vimcore::cuda
