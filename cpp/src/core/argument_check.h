// SPDX-License-Identifier: Apache-2.0
// The check of one operator's arguments: every error names operator, tensor, what was expected and what came.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/device_scratch.h"
#include "vimcore/context.h"
#include "vimcore/tensor.h"

namespace vimcore {

// Checks the tensors of one operator call against the type and device of its first one, an activation. Parameters, the
// residual stream, states and statistics are wide: float32 beside 16-bit activations.
class Check {
public:
    Check(Context& ctx, const char* op, const char* name, const Tensor& first) : ctx_(ctx), op_(op), dtype_(first.dtype)
    {
        if (!computes(dtype_)) fail(name, "expected " + std::string(types()) + ", got " + describe(first));
    }

    [[noreturn]] void fail(const char* name, const std::string& what) const
    {
        throw std::invalid_argument(std::string("[") + op_ + "] " + name + ": " + what);
    }

    // `shape` exactly, in the call's type and on its device.
    const Check& required(const char* name, const Tensor& tensor, const Shape& shape) const
    {
        return exactly(name, tensor, shape, dtype_);
    }

    const Check& optional(const char* name, const Tensor& tensor, const Shape& shape) const
    {
        return tensor ? required(name, tensor, shape) : *this;
    }

    // The same for wide tensors.
    const Check& required_wide(const char* name, const Tensor& tensor, const Shape& shape) const
    {
        return exactly(name, tensor, shape, wide(dtype_));
    }

    const Check& optional_wide(const char* name, const Tensor& tensor, const Shape& shape) const
    {
        return tensor ? required_wide(name, tensor, shape) : *this;
    }

    // Wide, or as the CPU's products of bf16 read it.
    const Check& linear_weight(const Tensor& weight) const
    {
        const bool panels = weight.dtype == DType::bf16_panels && dtype_ == DType::bf16 &&
                            ctx_.device().type == Device::Type::cpu && weight.device == ctx_.device();
        return panels && weight ? *this : required_wide("weight", weight, weight.shape);
    }

    // Either an activation or wide.
    const Check& either(const char* name, const Tensor& tensor, const Shape& shape) const
    {
        return tensor.dtype == wide(dtype_) ? required_wide(name, tensor, shape) : required(name, tensor, shape);
    }

    void positive(const char* name, std::int64_t value) const
    {
        if (value <= 0) fail(name, "expected a positive number, got " + std::to_string(value));
    }

    // Elements of a row of `tensor`, which has `columns` columns: more than that where it is padded.
    std::int64_t row_of(const Tensor& tensor, std::int64_t columns) const
    {
        const std::int64_t padded = device_scratch::padded_columns(columns, dtype_, ctx_.device().type);
        return tensor.shape.rank() > 0 && tensor.shape[-1] == padded ? padded : columns;
    }

    void rank(const char* name, const Tensor& tensor, int rank) const
    {
        if (tensor.shape.rank() != rank)
            fail(name, "expected " + std::to_string(rank) + " axes, got " + describe(tensor));
    }

private:
    bool computes(DType dtype) const
    {
        if (ctx_.device().type == Device::Type::cpu)
            return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16;
        return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
    }

    const char* types() const
    {
        return ctx_.device().type == Device::Type::cpu ? "f32, f64 or bf16 on the cpu" : "f32, f16 or bf16 on cuda";
    }

    const Check& exactly(const char* name, const Tensor& tensor, const Shape& shape, DType dtype) const
    {
        auto wanted = [&] { return to_string(shape) + " " + name_of(dtype) + " " + to_string(ctx_.device()); };
        if (!tensor && shape.numel() != 0) fail(name, "expected " + wanted() + ", got none");
        if (tensor.shape == shape && tensor.dtype == dtype && tensor.device == ctx_.device()) return *this;
        if (!tensor && tensor.shape.rank() == 0) return *this;  // an empty tensor needs no memory
        fail(name, "expected " + wanted() + ", got " + describe(tensor));
    }

    Context& ctx_;
    const char* op_;
    DType dtype_;
};

}  // namespace vimcore
