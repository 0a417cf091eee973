// SPDX-License-Identifier: Apache-2.0
// Compares cuda/cublaslt.h with NVIDIA's cublasLt.h; to compile is to pass. tests/cuda/compile_all.sh does it with the
// header of the wheel nvidia-cublas.
#include <cublasLt.h>

#include <cstddef>
#include <type_traits>

#include "cublaslt.h"

namespace {

using namespace vimcore::cuda::lt;

static_assert(int{status_success} == CUBLAS_STATUS_SUCCESS);
static_assert(int{status_not_supported} == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(int{real_f32} == CUDA_R_32F);
static_assert(int{real_f16} == CUDA_R_16F);
static_assert(int{real_bf16} == CUDA_R_16BF);
static_assert(int{compute_f32} == CUBLAS_COMPUTE_32F);
static_assert(int{compute_tf32} == CUBLAS_COMPUTE_32F_FAST_TF32);
static_assert(int{operation_n} == CUBLAS_OP_N);
static_assert(int{operation_t} == CUBLAS_OP_T);
static_assert(int{epilogue_default} == CUBLASLT_EPILOGUE_DEFAULT);
static_assert(int{epilogue_bias} == CUBLASLT_EPILOGUE_BIAS);
static_assert(int{reduction_none} == CUBLASLT_REDUCTION_SCHEME_NONE);
static_assert(int{reduction_compute_type} == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
static_assert(int{layout_batch_count} == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
static_assert(int{layout_strided_batch_offset} == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
static_assert(int{matmul_transa} == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(int{matmul_transb} == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(int{matmul_epilogue} == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(int{matmul_bias_pointer} == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(int{preference_max_workspace_bytes} == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(int{preference_reduction_scheme_mask} == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
static_assert(int{preference_min_alignment_a_bytes} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(int{preference_min_alignment_b_bytes} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(int{preference_min_alignment_c_bytes} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(int{preference_min_alignment_d_bytes} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);

static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t) && alignof(Algorithm) == alignof(cublasLtMatmulAlgo_t));
using Theirs = cublasLtMatmulHeuristicResult_t;
static_assert(sizeof(HeuristicResult) == sizeof(Theirs) && alignof(HeuristicResult) == alignof(Theirs));
static_assert(offsetof(HeuristicResult, algorithm) == offsetof(Theirs, algo));
static_assert(offsetof(HeuristicResult, workspace) == offsetof(Theirs, workspaceSize));
static_assert(offsetof(HeuristicResult, state) == offsetof(Theirs, state));
static_assert(offsetof(HeuristicResult, waves) == offsetof(Theirs, wavesCount));

// Two types are passed the same way: pointers, or integers and enumerations of one size.
template <class A, class B>
constexpr bool same_passing = (std::is_pointer_v<A> && std::is_pointer_v<B>) || std::is_same_v<A, B> ||
                              ((std::is_enum_v<A> || std::is_integral_v<A>) &&
                               (std::is_enum_v<B> || std::is_integral_v<B>) && sizeof(A) == sizeof(B));

template <class R, class... A, class S, class... B>
constexpr bool same_call(R (*)(A...), S (*)(B...))
{
    if constexpr (sizeof...(A) == sizeof...(B))
        return same_passing<R, S> && (same_passing<A, B> && ...);
    else
        return false;
}

constexpr Functions ours{};
static_assert(same_call(ours.get_version, decltype(&cublasLtGetVersion){}));
static_assert(same_call(ours.get_status_name, decltype(&cublasLtGetStatusName){}));
static_assert(same_call(ours.create, decltype(&cublasLtCreate){}));
static_assert(same_call(ours.matmul_desc_create, decltype(&cublasLtMatmulDescCreate){}));
static_assert(same_call(ours.matmul_desc_set, decltype(&cublasLtMatmulDescSetAttribute){}));
static_assert(same_call(ours.matmul_desc_destroy, decltype(&cublasLtMatmulDescDestroy){}));
static_assert(same_call(ours.layout_create, decltype(&cublasLtMatrixLayoutCreate){}));
static_assert(same_call(ours.layout_set, decltype(&cublasLtMatrixLayoutSetAttribute){}));
static_assert(same_call(ours.layout_destroy, decltype(&cublasLtMatrixLayoutDestroy){}));
static_assert(same_call(ours.preference_create, decltype(&cublasLtMatmulPreferenceCreate){}));
static_assert(same_call(ours.preference_set, decltype(&cublasLtMatmulPreferenceSetAttribute){}));
static_assert(same_call(ours.preference_destroy, decltype(&cublasLtMatmulPreferenceDestroy){}));
static_assert(same_call(ours.heuristic, decltype(&cublasLtMatmulAlgoGetHeuristic){}));
static_assert(same_call(ours.algorithm_check, decltype(&cublasLtMatmulAlgoCheck){}));
static_assert(same_call(ours.matmul, decltype(&cublasLtMatmul){}));
static_assert(!same_call(ours.matmul, decltype(&cublasLtMatmulAlgoGetHeuristic){}));  // the comparison can fail

}  // namespace

int main() { return 0; }
