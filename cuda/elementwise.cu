// SPDX-License-Identifier: Apache-2.0
// Sums, copies and scalings element by element.
//   add         out = a + row_scale[b] b over (B, L, D); each of the three T or float; out may be a or b
//   copy        between float types
//   scale_rows  out[i, :] = factor[i] matrix[i, :], float; backward: dmatrix[i, :] += factor[i] dout[i, :],
//               dfactor[i] += sum_j matrix[i, j] dout[i, j]
// Parallel mapping: a thread per V neighbouring elements, in vectors of 16 bytes where sizes and addresses allow it;
// scale_rows backward: a warp per row.
#include <stdexcept>

#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Either;
using device::Floats;

template <class T>
struct AddParams {
    Either<T> a, b, out;
    const float* row_scale;
    Index count, per_image;
};

template <class T, int V>
__global__ void add_kernel(AddParams<T> p)
{
    const Index i = device::flat_index() * V;
    if (i >= p.count) return;
    const float scale = p.row_scale ? p.row_scale[i / p.per_image] : 1.0f;
    Floats<V> sum = p.a.template load<V>(i);
    const Floats<V> b = p.b.template load<V>(i);
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = fmaf(scale, b[j], sum[j]);
    p.out.template store<V>(i, sum);
}

template <class T>
void run_add(Context& ctx, const Tensor& a, const Tensor& b, const Tensor& out, const Tensor& row_scale)
{
    auto either = [](const Tensor& t) { return Either<T>{t.data, t.dtype == DType::f32}; };
    const AddParams<T> p{
        either(a), either(b), either(out), row_scale.as<float>(), out.numel(), out.size(1) * out.size(2)};
    if (p.count == 0) return;
    constexpr int V = full_vector<T>;
    if (p.per_image % V == 0 && aligned(V, {a, b, out}))
        VIM_LAUNCH((add_kernel<T, V>), flat_grid(p.count / V), flat_block, 0, stream_of(ctx), p);
    else
        VIM_LAUNCH((add_kernel<T, 1>), flat_grid(p.count), flat_block, 0, stream_of(ctx), p);
}

template <class From, class To, int V>
__global__ void convert(const From* from, To* to, Index count)
{
    const Index i = device::flat_index() * V;
    if (i < count) device::store_floats<V>(to + i, device::load_floats<V>(from + i));
}

template <class From, class To>
void run_convert(Context& ctx, const Tensor& from, const Tensor& to)
{
    constexpr int V = 8;
    const Index count = to.numel();
    if (count % V == 0 && aligned(V, {from, to}))
        VIM_LAUNCH((convert<From, To, V>), flat_grid(count / V), flat_block, 0, stream_of(ctx), from.as<From>(),
                   to.as<To>(), count);
    else
        VIM_LAUNCH((convert<From, To, 1>), flat_grid(count), flat_block, 0, stream_of(ctx), from.as<From>(),
                   to.as<To>(), count);
}

__global__ void scale_rows_kernel(const float* matrix, const float* factor, float* out, Index count, Index columns)
{
    const Index i = device::flat_index();
    if (i < count) out[i] = factor[i / columns] * matrix[i];
}

constexpr int rows_per_block = 4;

__global__ void scale_rows_backward_kernel(const float* matrix, const float* factor, const float* dout, float* dmatrix,
                                           float* dfactor, Index rows, Index columns)
{
    const Index row = static_cast<Index>(blockIdx.x) * rows_per_block + threadIdx.x / device::warp_size;
    if (row >= rows) return;
    float sum = 0;
    for (Index i = row * columns + threadIdx.x % device::warp_size; i < (row + 1) * columns; i += device::warp_size) {
        sum = fmaf(matrix[i], dout[i], sum);
        if (dmatrix) dmatrix[i] = fmaf(factor[row], dout[i], dmatrix[i]);
    }
    sum = device::warp_sum(sum);
    if (dfactor && threadIdx.x % device::warp_size == 0) dfactor[row] += sum;
}

bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

}  // namespace

void add(Context& ctx, const Add& args)
{
    DType narrow = DType::f32;
    for (const Tensor& t : {args.a, args.b, args.out})
        if (t.dtype != DType::f32) narrow = t.dtype;
    dispatch(narrow, [&](auto t) { run_add<decltype(t)>(ctx, args.a, args.b, args.out, args.row_scale); });
}

void accumulate(Context& ctx, const Accumulate& args)
{
    for (std::size_t i = 0; i < args.to.size(); i++) {
        const Tensor& to = args.to[i];
        const Shape flat{1, 1, to.numel()};
        if (to) cuda::add(ctx, {.a = to.view(flat), .b = args.from[i].view(flat), .out = to.view(flat)});
    }
}

void copy(Context& ctx, const Tensor& from, const Tensor& to)
{
    if (to.numel() == 0) return;
    if (from.dtype == to.dtype) {
        VIM_CUDA(cudaMemcpyAsync(to.data, from.data, to.bytes(), cudaMemcpyDeviceToDevice, stream_of(ctx)));
        return;
    }
    if (!is_float(from.dtype) || !is_float(to.dtype))
        throw std::invalid_argument("[copy] to: expected " + describe(from) + ", got " + describe(to));
    dispatch(from.dtype, [&](auto f) {
        dispatch(to.dtype, [&](auto t) {
            if constexpr (!std::is_same_v<decltype(f), decltype(t)>)
                run_convert<decltype(f), decltype(t)>(ctx, from, to);
        });
    });
}

void fill_zero(Context& ctx, const Tensor& tensor)
{
    if (tensor.numel()) VIM_CUDA(cudaMemsetAsync(tensor.data, 0, tensor.bytes(), stream_of(ctx)));
}

void scale_rows(Context& ctx, const ScaleRows& args)
{
    const Index count = args.matrix.numel();
    if (count)
        VIM_LAUNCH(scale_rows_kernel, flat_grid(count), flat_block, 0, stream_of(ctx), args.matrix.as<float>(),
                   args.factor.as<float>(), args.out.as<float>(), count, args.matrix.size(1));
}

void scale_rows_backward(Context& ctx, const ScaleRowsBackward& args)
{
    const Index rows = args.matrix.size(0), columns = args.matrix.size(1);
    if (rows)
        VIM_LAUNCH(scale_rows_backward_kernel, static_cast<unsigned>(ceil_div(rows, rows_per_block)),
                   rows_per_block * device::warp_size, 0, stream_of(ctx), args.matrix.as<float>(),
                   args.factor.as<float>(), args.dout.as<float>(), args.dmatrix.as<float>(), args.dfactor.as<float>(),
                   rows, columns);
}

}  // namespace vimcore::cuda
