// SPDX-License-Identifier: Apache-2.0
// A cuBLASLt for host memory, to run cuda/cublaslt.cpp without a GPU: a shared library with the functions that it looks
// up, naive loops, and checks of what it is told. What it gets wrong in its arguments it answers with an error.
// What the real library does and nobody wishes for, it does too: another number of rows gets another algorithm, which
// adds in another order; an algorithm that may cut sums leaves out what does not fill its last slice; algorithms know
// only addresses, leading dimensions and sizes that they were made for; a bias is read 16 bytes at a time.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "check_cuda.h"
#include "cublaslt.h"

using namespace vimcore::cuda::lt;
using vimcore::test::from_bf16;
using vimcore::test::from_f16;
using vimcore::test::to_bf16;
using vimcore::test::to_f16;

struct vimcore::cuda::lt::Matmul_ {
    ComputeType compute;
    DataType scale;
    std::int32_t transa = operation_n, transb = operation_n;
    std::uint32_t epilogue = epilogue_default;
    const void* bias = nullptr;
};
struct vimcore::cuda::lt::Layout_ {
    DataType type;
    std::uint64_t rows, columns;
    std::int64_t ld;
    std::int32_t count = 1;
    std::int64_t stride = 0;
};
struct vimcore::cuda::lt::Preference_ {
    std::map<int, std::uint64_t> values;
};
struct vimcore::cuda::lt::Handle_ {
    int unused;
};

namespace {

constexpr Status invalid = static_cast<Status>(7);
constexpr std::size_t workspace_bytes = 1000;
int heuristics = 0, matmuls = 0, batches = 0;  // calls; of these, of more than one matrix

// What an algorithm of ours remembers: the alignments that it was chosen for, the order of its sums, whether it cuts
// them, the most rows that it takes.
struct Chosen {
    std::uint64_t tag, align[3];
    std::uint32_t chains, cuts;  // `chains` sums side by side
    std::uint64_t most_rows;
};
constexpr std::int64_t slice = 64;  // of a cut sum

std::size_t size(DataType type) { return type == real_f32 ? 4 : 2; }

float get(const void* memory, std::int64_t i, DataType type)
{
    if (type == real_f32) return static_cast<const float*>(memory)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(memory)[i];
    return type == real_f16 ? from_f16(bits) : from_bf16(bits);
}

void put(void* memory, std::int64_t i, DataType type, float value)
{
    if (type == real_f32)
        static_cast<float*>(memory)[i] = value;
    else
        static_cast<std::uint16_t*>(memory)[i] = type == real_f16 ? to_f16(value) : to_bf16(value);
}

bool aligned(const void* memory, std::uint64_t bytes) { return reinterpret_cast<std::uintptr_t>(memory) % bytes == 0; }

template <class T>
Status assign(T& to, const void* from, std::size_t bytes)
{
    if (bytes != sizeof to) return invalid;
    std::memcpy(&to, from, bytes);
    return status_success;
}

}  // namespace

extern "C" {
#define EXPORT [[gnu::visibility("default")]]

EXPORT void fakeCounts(int counts[3])
{
    counts[0] = heuristics;
    counts[1] = matmuls;
    counts[2] = batches;
}

EXPORT std::size_t cublasLtGetVersion() { return 130102; }
EXPORT const char* cublasLtGetStatusName(Status) { return "FAKE_STATUS"; }
EXPORT Status cublasLtCreate(Handle* handle)
{
    static Handle_ only{};
    *handle = &only;
    return status_success;
}

EXPORT Status cublasLtMatmulDescCreate(Matmul* matmul, ComputeType compute, DataType scale)
{
    *matmul = new Matmul_{compute, scale};
    return scale == real_f32 ? status_success : invalid;
}
EXPORT Status cublasLtMatmulDescSetAttribute(Matmul m, MatmulAttribute attribute, const void* value, std::size_t bytes)
{
    switch (attribute) {
        case matmul_transa:
            return assign(m->transa, value, bytes);
        case matmul_transb:
            return assign(m->transb, value, bytes);
        case matmul_epilogue:
            return assign(m->epilogue, value, bytes);
        case matmul_bias_pointer:
            return assign(m->bias, value, bytes);
    }
    return invalid;
}
EXPORT Status cublasLtMatmulDescDestroy(Matmul matmul)
{
    delete matmul;
    return status_success;
}

EXPORT Status cublasLtMatrixLayoutCreate(Layout* layout, DataType type, std::uint64_t rows, std::uint64_t columns,
                                         std::int64_t ld)
{
    *layout = new Layout_{type, rows, columns, ld};
    return static_cast<std::uint64_t>(ld) >= rows ? status_success : invalid;
}
EXPORT Status cublasLtMatrixLayoutSetAttribute(Layout l, LayoutAttribute attribute, const void* value,
                                               std::size_t bytes)
{
    if (attribute == layout_batch_count) return assign(l->count, value, bytes);
    return attribute == layout_strided_batch_offset ? assign(l->stride, value, bytes) : invalid;
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout layout)
{
    delete layout;
    return status_success;
}

EXPORT Status cublasLtMatmulPreferenceCreate(Preference* preference)
{
    *preference = new Preference_;
    return status_success;
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference p, PreferenceAttribute attribute, const void* value,
                                                   std::size_t bytes)
{
    if (bytes != (attribute == preference_max_workspace_bytes ? 8u : 4u)) return invalid;
    std::memcpy(&p->values[attribute], value, bytes);
    return status_success;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference preference)
{
    delete preference;
    return status_success;
}

// Knows no algorithm for problems of 13 columns, so that there is one to go elsewhere.
EXPORT Status cublasLtMatmulAlgoGetHeuristic(Handle, Matmul m, Layout a, Layout, Layout, Layout d,
                                             Preference preference, int wanted, HeuristicResult results[], int* found)
{
    heuristics++;
    *found = 0;
    auto& values = preference->values;
    if (values[preference_max_workspace_bytes] < workspace_bytes || wanted < 2) return invalid;
    // sums over tokens may be cut, those along a row may not
    const bool over_tokens = m->transa == operation_n && m->transb == operation_t;
    const bool cuts = values[preference_reduction_scheme_mask] == reduction_compute_type;
    if (values[preference_reduction_scheme_mask] != reduction_none && !(cuts && over_tokens)) return invalid;
    if (d->rows == 13) return status_not_supported;
    const auto chains = static_cast<std::uint32_t>(over_tokens ? 1 : 1 + d->columns % 5);
    Chosen chosen = {0x5eed,
                     {values[preference_min_alignment_a_bytes], values[preference_min_alignment_b_bytes],
                      values[preference_min_alignment_d_bytes]},
                     chains,
                     cuts,
                     std::uint64_t{1} << 40};
    for (std::uint64_t align : chosen.align)
        if (align < size(a->type) || align > 16) return invalid;
    for (int i = 0; i < 3; i++) results[i] = {};
    results[0].state = status_not_supported;                    // must be passed over
    chosen.most_rows = d->rows == 11 ? 300 : chosen.most_rows;  // for 11 columns the best one takes few rows only
    std::memcpy(&results[1].algorithm, &chosen, sizeof chosen);
    chosen.most_rows = std::uint64_t{1} << 40;
    chosen.chains += 3;
    std::memcpy(&results[2].algorithm, &chosen, sizeof chosen);
    results[1].workspace = results[2].workspace = workspace_bytes;
    *found = std::min(wanted, 3);
    return status_success;
}

EXPORT Status cublasLtMatmulAlgoCheck(Handle handle, Matmul m, Layout a, Layout b, Layout c, Layout d,
                                      const Algorithm* algorithm, HeuristicResult* result)
{
    Chosen chosen{};
    std::memcpy(&chosen, algorithm, sizeof chosen);
    if (!handle || !m || !a || !b || c != d || chosen.tag != 0x5eed) return invalid;
    *result = {};
    result->algorithm = *algorithm;
    result->workspace = workspace_bytes;
    result->state = d->columns <= chosen.most_rows ? status_success : status_not_supported;
    return result->state;
}

EXPORT Status cublasLtMatmul(Handle handle, Matmul m, const void* alpha, const void* a, Layout la, const void* b,
                             Layout lb, const void* beta, const void* c, Layout lc, void* d, Layout ld,
                             const Algorithm* algorithm, void* workspace, std::size_t bytes, cudaStream_t)
{
    Chosen chosen{};
    std::memcpy(&chosen, algorithm, sizeof chosen);
    const bool tf32 = la->type == real_f32 && std::getenv("VIMCORE_TF32");
    const bool known = handle && chosen.tag == 0x5eed && c == d && lc == ld && la->type == lb->type &&
                       (ld->type == la->type || ld->type == real_f32) &&
                       m->compute == (tf32 ? compute_tf32 : compute_f32);
    const float old = *static_cast<const float*>(beta);
    if (!known || *static_cast<const float*>(alpha) != 1 || (old != 0 && old != 1)) return invalid;
    if (bytes < workspace_bytes || !workspace || !aligned(workspace, 256)) return invalid;
    if (ld->columns > chosen.most_rows || (m->bias && !aligned(m->bias, 16))) return invalid;
    if (la->rows == 0 || la->columns == 0 || ld->rows == 0 || ld->columns == 0) return invalid;
    if (!aligned(a, chosen.align[0]) || !aligned(b, chosen.align[1]) || !aligned(d, chosen.align[2])) return invalid;
    const bool ta = m->transa == operation_t, tb = m->transb == operation_t;
    const std::uint64_t sum_a = ta ? la->rows : la->columns, sum_b = tb ? lb->columns : lb->rows;
    if (sum_a != sum_b || (ta ? la->columns : la->rows) != ld->rows || (tb ? lb->rows : lb->columns) != ld->columns)
        return invalid;
    if (la->count != ld->count || lb->count != ld->count || (m->bias != nullptr) != (m->epilogue == epilogue_bias))
        return invalid;
    std::memset(workspace, 0xff, workspace_bytes);
    matmuls++;
    batches += ld->count > 1;
    const auto rows = static_cast<std::int64_t>(ld->rows), columns = static_cast<std::int64_t>(ld->columns);
    auto length = static_cast<std::int64_t>(sum_a);
    if (chosen.cuts) length -= length % slice;
    const auto at_of = [](const Layout& l, std::int64_t i, std::int64_t j) { return j * l->ld + i; };
    for (std::int64_t batch = 0; batch < ld->count; batch++)
        for (std::int64_t j = 0; j < columns; j++)
            for (std::int64_t i = 0; i < rows; i++) {
                const std::int64_t at = batch * ld->stride + at_of(ld, i, j);
                float sums[8] = {};
                for (std::int64_t k = 0; k < length; k++)
                    sums[k % chosen.chains] +=
                        get(a, batch * la->stride + (ta ? at_of(la, k, i) : at_of(la, i, k)), la->type) *
                        get(b, batch * lb->stride + (tb ? at_of(lb, j, k) : at_of(lb, k, j)), lb->type);
                float sum = m->bias ? get(m->bias, i, ld->type) : 0;
                if (old == 1) sum += get(d, at, ld->type);
                for (const float part : sums) sum += part;
                put(d, at, ld->type, sum);
            }
    return status_success;
}

}  // extern "C"
