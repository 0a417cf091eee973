// SPDX-License-Identifier: Apache-2.0
// The matrix products of the published networks, of ones: every element must be exactly the length of its sum, also
// where sums over tokens are cut. A row must have the same bits whatever the number of rows. On a device it also prints
// microseconds. A problem for which cuBLASLt has no algorithm fails.
//   gemm_check [MOST_ROWS]          25216 unless given, 7 without a device
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "check_cuda.h"
#include "core/device_scratch.h"
#include "cublaslt.h"
#include "timing_cuda.h"
#include "vimcore/build_info.h"
#include "vimcore/ops.h"

using namespace vimcore;
using namespace vimcore::test;

namespace {

using Index = std::int64_t;

struct Projection {
    const char* name;
    Index k, n;
    bool bias = false;
};

constexpr Projection projections[] = {
    {"Ti patches", 768, 192, true}, {"Ti in_proj", 192, 768}, {"Ti x_proj", 384, 44}, {"Ti out_proj", 384, 192},
    {"Ti head", 192, 1000, true},   {"S in_proj", 384, 1536}, {"S x_proj", 768, 56},  {"S out_proj", 768, 384},
};

constexpr Index image_rows = 197;  // at 224 px

// Rows of whole batches of images, and others.
std::vector<Index> row_counts(Index most)
{
    std::vector<Index> rows = {1, 7, 128, 591, 1025, 4100, 6085, 12170, 24340, 32800};
    for (const Index batch : {1, 2, 3, 4, 5, 7, 8, 13, 16, 32, 64, 96, 127, 128}) rows.push_back(image_rows * batch);
    std::erase_if(rows, [&](Index r) { return r > most; });
    return rows;
}

Floats filled(Index count, float value = 1) { return Floats(static_cast<std::size_t>(count), value); }

// A row again and again: what is large here is the same in every row, and never converted number by number.
Bytes repeated(DType dtype, const Floats& row, Index rows)
{
    const Bytes one = encode(dtype, row);
    Bytes all(one.size() * static_cast<std::size_t>(rows));
    for (std::size_t at = 0; at < all.size(); at += one.size())
        std::copy(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(at));
    return all;
}

// One projection, and its two directions as a batch of two where it is x_proj.
class Check {
public:
    Check(DType dtype, const Projection& p, Index most)
        : dtype_(dtype),
          p_(p),
          most_(most),
          count_(std::string(p.name).find("x_proj") != std::string::npos ? 2 : 1),
          row_(device_scratch::padded_columns(p.n, dtype, Device::Type::cuda)),
          // of sums of products that every type holds exactly, but in no order of adding
          some_(rounded(dtype, Random(3).normal(p.k))),
          weights_(rounded(dtype, Random(4).normal(p.n * p.k, 0.1f)))
    {
    }

    void run()
    {
        const CudaProducts before = cuda_products();
        for (const Index rows : row_counts(most_)) run(rows);
        const CudaProducts after = cuda_products();
        const double bytes = static_cast<double>(most_ * count_ * (p_.k + p_.n)) * static_cast<double>(size_of(dtype_));
        std::printf(
            "%-4s %-11s other bits of a row at %d of %d sizes, %lld built-in, %lld by another algorithm; us of %lld "
            "rows: "
            "forward %.1f dx %.1f dw %.1f (copy at 4.3 TB/s %.1f), of %lld: forward %.1f; with casts of weights\n",
            name_of(dtype_), p_.name, varies_, sizes_, static_cast<long long>(after.built_in - before.built_in),
            static_cast<long long>(after.other_algorithm - before.other_algorithm), static_cast<long long>(most_),
            forward_us_, dx_us_, dw_us_, bytes / 4.3e6, static_cast<long long>(image_rows), image_us_);
        std::fflush(stdout);
        CHECK(varies_ == 0 || std::getenv("VIMCORE_ALGORITHM_PER_BATCH"));
        CHECK(after.built_in == before.built_in);
    }

private:
    void run(Index rows)
    {
        Side side = Side::cuda(dtype_);
        const auto c = static_cast<std::size_t>(count_);
        const Index all_rows = count_ * rows;
        const Tensor x = side.make({count_, rows, p_.k}, dtype_, repeated(dtype_, filled(p_.k), all_rows));
        auto result = [&](Index columns) {
            const Floats row = filled(columns, std::numeric_limits<float>::quiet_NaN());
            return side.make({count_, rows, columns}, dtype_, repeated(dtype_, row, all_rows));
        };
        const Tensor y = result(row_), dx = result(p_.k);
        const Tensor dw = side.parameter({count_, p_.n, p_.k}, filled(count_ * p_.n * p_.k));
        const Tensor dy = side.make(y.shape, dtype_, repeated(dtype_, padded(1), all_rows));
        const Tensor bias = p_.bias ? side.parameter({p_.n}, filled(p_.n)) : Tensor{};
        std::vector<Tensor> w(c);
        std::vector<LinearForward> forward(c);
        std::vector<LinearBackward> to_x(c), to_w(c);
        for (std::size_t i = 0; i < c; i++) {
            const auto at = static_cast<Index>(i);
            w[i] = side.parameter({p_.n, p_.k}, filled(p_.n * p_.k));
            forward[i] = {.x = x[at], .weight = w[i], .bias = bias, .y = y[at]};
            to_x[i] = {.weight = w[i], .dy = dy[at], .dx = dx[at]};
            to_w[i] = {.x = x[at], .dy = dy[at], .dweight = dw[at]};
        }
        linear_forward(side.ctx, forward);
        linear_backward(side.ctx, to_x);
        linear_backward(side.ctx, to_w);
        expect("y", rows, side, y, padded(static_cast<float>(p_.k + (bias ? 1 : 0))));
        expect("dx", rows, side, dx, filled(p_.k, static_cast<float>(p_.n)));
        expect("dw", rows, side, dw, filled(p_.k, static_cast<float>(rows + 1)));
        if (rows == image_rows) image_us_ = microseconds(side.ctx, 3, 20, [&] { linear_forward(side.ctx, forward); });
        if (rows == most_) {
            forward_us_ = microseconds(side.ctx, 3, 20, [&] { linear_forward(side.ctx, forward); });
            dx_us_ = microseconds(side.ctx, 3, 20, [&] { linear_backward(side.ctx, to_x); });
            dw_us_ = microseconds(side.ctx, 3, 20, [&] { linear_backward(side.ctx, to_w); });
        }

        // the same last row, among others
        Bytes values = repeated(dtype_, filled(p_.k, 0.5f), all_rows);
        const Bytes last_row = encode(dtype_, some_);
        std::copy_backward(last_row.begin(), last_row.end(), values.end());
        assign(side.ctx, x, values);
        assign(side.ctx, w.back(), weights_);
        linear_forward(side.ctx, forward);
        const Floats last = side.values(y[count_ - 1].slice(rows - 1, rows));
        if (first_.empty()) first_ = last;
        varies_ += !same_bits(first_, last);
        sizes_++;
    }

    Floats padded(float value) const { return with_rows(filled(p_.n, value), p_.n, row_); }  // a row of y

    // Every row of the tensor is `wanted`.
    void expect(const char* what, Index rows, Side& side, const Tensor& tensor, const Floats& wanted)
    {
        const Bytes bytes = side.bytes(tensor);
        if (bytes == repeated(tensor.dtype, wanted, tensor.numel() / tensor.shape[-1])) return;
        const Floats got = decode(tensor.dtype, bytes);
        for (std::size_t i = 0; i < got.size(); i++) {
            const float value = rounded(tensor.dtype, wanted[i % wanted.size()]);
            if (got[i] == value) continue;
            CHECK(got[i] == value);
            std::printf("WRONG %s %s %s, %lld rows: %g instead of %g at %zu\n", name_of(dtype_), p_.name, what,
                        static_cast<long long>(rows), static_cast<double>(got[i]), static_cast<double>(value), i);
            return;
        }
    }

    DType dtype_;
    const Projection& p_;
    Index most_, count_, row_;
    Floats some_, weights_, first_;
    int varies_ = 0, sizes_ = 0;
    double forward_us_ = 0, dx_us_ = 0, dw_us_ = 0, image_us_ = 0;
};

}  // namespace

int main(int argc, char** argv)
{
#ifdef VIMCORE_SHIM
    constexpr Index usual = 7;
#else
    constexpr Index usual = 25216;
#endif
    const Index most = argc > 1 && std::atoll(argv[1]) > 0 ? std::atoll(argv[1]) : usual;
    std::printf("%s\n", cuda_description(0).c_str());
    for (const DType dtype : device_types)
        for (const Projection& p : projections) Check(dtype, p, most).run();
    return check_failures();
}
