// SPDX-License-Identifier: Apache-2.0
// cuBLASLt, opened at run time: building needs neither its headers nor its library. What is declared here of its binary
// interface is the same in versions 12 and 13; tests/cuda/check_cublaslt.cpp compares it with NVIDIA's header.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_operators.h"

namespace vimcore::cuda {

namespace lt {

enum Status : int { status_success = 0, status_not_supported = 15 };
enum DataType : int { real_f32 = 0, real_f16 = 2, real_bf16 = 14 };                      // cudaDataType
enum ComputeType : int { compute_f32 = 68, compute_tf32 = 77 };                          // cublasComputeType_t
enum Operation : int { operation_n = 0, operation_t = 1 };                               // cublasOperation_t
enum Epilogue : unsigned { epilogue_default = 1, epilogue_bias = 4 };                    // cublasLtEpilogue_t
enum Reduction : unsigned { reduction_none = 0, reduction_compute_type = 2 };            // cublasLtReductionScheme_t
enum LayoutAttribute : int { layout_batch_count = 5, layout_strided_batch_offset = 6 };  // int32, int64
enum MatmulAttribute : int {                                                             // int32, unless noted
    matmul_transa = 3,
    matmul_transb = 4,
    matmul_epilogue = 7,      // uint32
    matmul_bias_pointer = 8,  // const void*
};
enum PreferenceAttribute : int {
    preference_max_workspace_bytes = 1,    // uint64
    preference_reduction_scheme_mask = 3,  // uint32
    preference_min_alignment_a_bytes = 5,  // uint32, as the next three
    preference_min_alignment_b_bytes = 6,
    preference_min_alignment_c_bytes = 7,
    preference_min_alignment_d_bytes = 8,
};

struct Handle_;
struct Layout_;
struct Matmul_;
struct Preference_;
using Handle = Handle_*;
using Layout = Layout_*;
using Matmul = Matmul_*;
using Preference = Preference_*;

struct Algorithm {
    std::uint64_t data[8];
};
struct HeuristicResult {
    Algorithm algorithm;
    std::size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

struct Functions {
    std::size_t (*get_version)();
    const char* (*get_status_name)(Status);
    Status (*create)(Handle*);
    Status (*matmul_desc_create)(Matmul*, ComputeType, DataType scale);
    Status (*matmul_desc_set)(Matmul, MatmulAttribute, const void*, std::size_t);
    Status (*matmul_desc_destroy)(Matmul);
    Status (*layout_create)(Layout*, DataType, std::uint64_t rows, std::uint64_t columns, std::int64_t ld);
    Status (*layout_set)(Layout, LayoutAttribute, const void*, std::size_t);
    Status (*layout_destroy)(Layout);
    Status (*preference_create)(Preference*);
    Status (*preference_set)(Preference, PreferenceAttribute, const void*, std::size_t);
    Status (*preference_destroy)(Preference);
    Status (*heuristic)(Handle, Matmul, Layout a, Layout b, Layout c, Layout d, Preference, int wanted,
                        HeuristicResult[], int* found);
    Status (*algorithm_check)(Handle, Matmul, Layout a, Layout b, Layout c, Layout d, const Algorithm*,
                              HeuristicResult*);
    Status (*matmul)(Handle, Matmul, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                     const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, std::size_t,
                     cudaStream_t);
};

// The library of this process, opened at first use.
struct Library {
    Functions call{};
    std::string name;  // for people; with why where there is none
    bool found = false;
};
const Library& library();

}  // namespace lt

// Runs args through cuBLASLt, `bias` being args.bias in the type args.y_dtype, at an address that 16 divides. False: it
// is not there, or has no algorithm for this problem; use gemm().
// A row of y has the same bits whatever the number of rows, because all numbers of rows share an algorithm
// (VIMCORE_ALGORITHM_PER_BATCH=1 asks for one each). Sums over tokens have the same bits in every run.
bool matmul(Context& ctx, const GemmArgs& args, const void* bias);

bool has_cublaslt();
std::string blas_name();  // which library multiplies matrices, and why

}  // namespace vimcore::cuda
