// SPDX-License-Identifier: Apache-2.0
// A cuBLASLt for host memory, to run cuda/cublaslt.cpp without a GPU: a shared library with the functions that it looks
// up, naive loops, and checks of what it is told. What it gets wrong in its arguments it answers with an error.
// What the real library does and nobody wishes for, it does too: another number of rows gets another algorithm, which
// adds in another order; an algorithm that may cut sums leaves out what does not fill its last slice; algorithms know
// only types, transpositions, addresses, leading dimensions and sizes that they were made for, the address of the bias
// included, of which the search looks at the alignment; what no preference says has the default of NVIDIA's header.
// Products are queued on their stream where the program that loads this has the shim's queues.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
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
    std::map<int, std::uint64_t> values = {
        {preference_max_workspace_bytes, 0},     {preference_reduction_scheme_mask, 7},
        {preference_min_alignment_a_bytes, 256}, {preference_min_alignment_b_bytes, 256},
        {preference_min_alignment_c_bytes, 256}, {preference_min_alignment_d_bytes, 256}};
};
struct vimcore::cuda::lt::Handle_ {
    int unused;
};

namespace vimcore::shim {
[[gnu::weak]] cudaError_t submit(cudaStream_t stream, std::function<void()> work);  // of the program, if it has it
}

namespace {

constexpr Status invalid = static_cast<Status>(7);
constexpr std::size_t most_workspace = 1000;
int heuristics = 0, matmuls = 0, batches = 0;  // calls; of these, of more than one matrix

// What an algorithm of ours remembers: what it was chosen for, the order of its sums, whether it cuts them, the most
// rows that it takes.
struct Chosen {
    std::uint32_t tag, kind;     // kind: types and transpositions
    std::uint16_t align[4];      // of A, B, D and bias, in bytes
    std::uint32_t chains, cuts;  // `chains` sums side by side
    std::uint64_t most_rows;
    std::uint64_t workspace;
};
static_assert(sizeof(Chosen) <= sizeof(Algorithm));
constexpr std::uint32_t tag = 0x5eed;
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

// Of an address, at most what the library looks at.
std::uint16_t alignment(const void* memory)
{
    std::uint16_t bytes = 256;
    while (!aligned(memory, bytes)) bytes /= 2;
    return bytes;
}

template <class T>
Status assign(T& to, const void* from, std::size_t bytes)
{
    if (!from || bytes != sizeof to) return invalid;
    std::memcpy(&to, from, bytes);
    return status_success;
}

// Elements from the first to the last of a matrix.
std::uint64_t extent(const Layout_& l) { return (l.columns - 1) * static_cast<std::uint64_t>(l.ld) + l.rows; }

bool sound(const Layout_& l, bool written)
{
    if (l.rows == 0 || l.columns == 0 || l.ld < 0 || static_cast<std::uint64_t>(l.ld) < l.rows || l.count < 1)
        return false;
    return !written || l.count == 1 || static_cast<std::uint64_t>(std::abs(l.stride)) >= extent(l);
}

// Whether there can be an algorithm for the problem.
Status examine(const Matmul_& m, const Layout_& a, const Layout_& b, const Layout_& d)
{
    const bool ta = m.transa == operation_t, tb = m.transb == operation_t;
    if (!sound(a, false) || !sound(b, false) || !sound(d, true)) return invalid;
    if ((ta ? a.rows : a.columns) != (tb ? b.columns : b.rows)) return invalid;
    if ((ta ? a.columns : a.rows) != d.rows || (tb ? b.rows : b.columns) != d.columns) return invalid;
    if (a.count != d.count || b.count != d.count) return invalid;
    if (m.scale != real_f32 || (m.epilogue != epilogue_default && m.epilogue != epilogue_bias)) return invalid;
    if ((m.bias != nullptr) != (m.epilogue == epilogue_bias)) return invalid;
    const bool types = a.type == b.type && (d.type == a.type || d.type == real_f32);
    const bool compute = m.compute == compute_f32 || (m.compute == compute_tf32 && a.type == real_f32);
    constexpr std::uint64_t most = (std::uint64_t{1} << 31) - 1;
    const bool small = extent(a) <= most && extent(b) <= most && extent(d) <= most;
    return types && compute && small ? status_success : status_not_supported;
}

std::uint32_t kind_of(const Matmul_& m, const Layout_& a, const Layout_& d)
{
    const int parts[] = {m.compute, a.type, d.type, m.transa, m.transb, static_cast<int>(m.epilogue), d.count > 1};
    std::uint32_t kind = 0;
    for (const int part : parts) kind = kind * 131 + static_cast<std::uint32_t>(part);
    return kind;
}

// Whether a matrix lies as the algorithm expects: every column of it, every matrix of a batch.
bool lies(const void* memory, const Layout_& l, std::uint64_t align)
{
    const std::uint64_t steps =
        static_cast<std::uint64_t>(l.columns > 1 ? l.ld : 0) | static_cast<std::uint64_t>(l.count > 1 ? l.stride : 0);
    return aligned(memory, align) && steps * size(l.type) % align == 0;
}

// Whether bytes from `memory` on are none of the matrix's.
bool apart(const void* memory, std::size_t bytes, const void* matrix, const Layout_& l)
{
    const auto begin = reinterpret_cast<std::uintptr_t>(memory), first = reinterpret_cast<std::uintptr_t>(matrix);
    const std::int64_t last = l.stride * (l.count - 1) * static_cast<std::int64_t>(size(l.type));
    const std::uintptr_t low = first + static_cast<std::uintptr_t>(std::min<std::int64_t>(last, 0));
    const std::uintptr_t high =
        first + static_cast<std::uintptr_t>(std::max<std::int64_t>(last, 0)) + extent(l) * size(l.type);
    return begin + bytes <= low || begin >= high;
}

// A product, as it is when its turn comes.
struct Product {
    Matmul_ m;
    Layout_ la, lb, ld;
    const void *a, *b;
    void *d, *workspace;
    Chosen chosen;
    bool add;

    void operator()() const
    {
        if (chosen.workspace > 0) std::memset(workspace, 0xff, chosen.workspace);
        const bool ta = m.transa == operation_t, tb = m.transb == operation_t;
        const auto rows = static_cast<std::int64_t>(ld.rows), columns = static_cast<std::int64_t>(ld.columns);
        auto length = static_cast<std::int64_t>(ta ? la.rows : la.columns);
        if (chosen.cuts) length -= length % slice;
        const auto at_of = [](const Layout_& l, std::int64_t i, std::int64_t j) { return j * l.ld + i; };
        for (std::int64_t batch = 0; batch < ld.count; batch++)
            for (std::int64_t j = 0; j < columns; j++)
                for (std::int64_t i = 0; i < rows; i++) {
                    const std::int64_t at = batch * ld.stride + at_of(ld, i, j);
                    float sums[8] = {};
                    for (std::int64_t k = 0; k < length; k++)
                        sums[k % chosen.chains] +=
                            get(a, batch * la.stride + (ta ? at_of(la, k, i) : at_of(la, i, k)), la.type) *
                            get(b, batch * lb.stride + (tb ? at_of(lb, j, k) : at_of(lb, k, j)), lb.type);
                    float sum = m.bias ? get(m.bias, i, ld.type) : 0;
                    if (add) sum += get(d, at, ld.type);
                    for (const float part : sums) sum += part;
                    put(d, at, ld.type, sum);
                }
    }
};

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
    return status_success;
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
    return status_success;  // whatever it is: the search for an algorithm says so
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
    if (!p->values.contains(attribute)) return invalid;
    std::uint64_t number = 0;
    if (!value || bytes != (attribute == preference_max_workspace_bytes ? 8u : 4u)) return invalid;
    std::memcpy(&number, value, bytes);
    if (attribute >= preference_min_alignment_a_bytes && (number == 0 || (number & (number - 1)) != 0)) return invalid;
    p->values[attribute] = number;
    return status_success;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference preference)
{
    delete preference;
    return status_success;
}

// Knows no algorithm for problems of 13 columns, so that there is one to go elsewhere.
EXPORT Status cublasLtMatmulAlgoGetHeuristic(Handle handle, Matmul m, Layout a, Layout b, Layout c, Layout d,
                                             Preference preference, int wanted, HeuristicResult results[], int* found)
{
    heuristics++;
    *found = 0;
    if (!handle || !m || !a || !b || !d || c != d || !preference) return invalid;
    if (const Status status = examine(*m, *a, *b, *d)) return status;
    auto& values = preference->values;
    if (values[preference_max_workspace_bytes] < most_workspace || wanted < 3) return invalid;
    // sums over tokens may be cut, those along a row may not
    const bool over_tokens = m->transa == operation_n && m->transb == operation_t;
    const bool cuts = values[preference_reduction_scheme_mask] == reduction_compute_type;
    if (values[preference_reduction_scheme_mask] != reduction_none && !(cuts && over_tokens)) return invalid;
    if (d->rows == 13) return status_not_supported;
    Chosen chosen{};
    chosen.tag = tag;
    chosen.kind = kind_of(*m, *a, *d);
    constexpr PreferenceAttribute aligns[] = {preference_min_alignment_a_bytes, preference_min_alignment_b_bytes,
                                              preference_min_alignment_d_bytes};
    for (int i = 0; i < 3; i++) {
        const std::uint64_t align = values[aligns[i]];
        if (align < size(i == 2 ? d->type : a->type)) return invalid;
        chosen.align[i] = static_cast<std::uint16_t>(std::min<std::uint64_t>(align, 256));
    }
    if (values[preference_min_alignment_c_bytes] != values[preference_min_alignment_d_bytes]) return invalid;
    chosen.align[3] = alignment(m->bias);
    chosen.cuts = cuts;
    chosen.chains = static_cast<std::uint32_t>(over_tokens ? 1 : 1 + d->columns % 5);
    chosen.most_rows = d->rows == 11 ? 300 : std::uint64_t{1} << 40;  // for 11 columns the best one takes few rows only
    chosen.workspace = m->bias ? 0 : most_workspace;
    for (int i = 0; i < 3; i++) results[i] = {};
    results[0].state = status_not_supported;  // must be passed over
    std::memcpy(&results[1].algorithm, &chosen, sizeof chosen);
    results[1].workspace = chosen.workspace;
    chosen.most_rows = std::uint64_t{1} << 40;
    chosen.chains += 3;
    std::memcpy(&results[2].algorithm, &chosen, sizeof chosen);
    results[2].workspace = chosen.workspace;
    *found = 3;
    return status_success;
}

EXPORT Status cublasLtMatmulAlgoCheck(Handle handle, Matmul m, Layout a, Layout b, Layout c, Layout d,
                                      const Algorithm* algorithm, HeuristicResult* result)
{
    if (!handle || !m || !a || !b || c != d || !algorithm) return invalid;
    Chosen chosen{};
    std::memcpy(&chosen, algorithm, sizeof chosen);
    if (const Status status = examine(*m, *a, *b, *d)) return status;
    if (chosen.tag != tag || chosen.kind != kind_of(*m, *a, *d)) return invalid;
    *result = {};
    result->workspace = chosen.workspace;
    result->state = d->columns <= chosen.most_rows ? status_success : status_not_supported;
    return result->state;
}

EXPORT Status cublasLtMatmul(Handle handle, Matmul m, const void* alpha, const void* a, Layout la, const void* b,
                             Layout lb, const void* beta, const void* c, Layout lc, void* d, Layout ld,
                             const Algorithm* algorithm, void* workspace, std::size_t bytes, cudaStream_t stream)
{
    if (!handle || !m || !alpha || !a || !la || !b || !lb || !beta || c != d || lc != ld || !d || !algorithm)
        return invalid;
    Chosen chosen{};
    std::memcpy(&chosen, algorithm, sizeof chosen);
    if (const Status status = examine(*m, *la, *lb, *ld)) return status;
    if (chosen.tag != tag || chosen.kind != kind_of(*m, *la, *ld) || ld->columns > chosen.most_rows) return invalid;
    const bool tf32 = la->type == real_f32 && std::getenv("VIMCORE_TF32");
    if (m->compute != (tf32 ? compute_tf32 : compute_f32)) return invalid;
    const float old = *static_cast<const float*>(beta);
    if (*static_cast<const float*>(alpha) != 1 || (old != 0 && old != 1)) return invalid;
    if (!lies(a, *la, chosen.align[0]) || !lies(b, *lb, chosen.align[1]) || !lies(d, *ld, chosen.align[2]))
        return invalid;
    if (m->bias && (!aligned(m->bias, chosen.align[3]) || !aligned(m->bias, 16))) return invalid;
    if (bytes < chosen.workspace || (bytes > 0 && !workspace) || !aligned(workspace, 256)) return invalid;
    if (bytes > 0 &&
        !(apart(workspace, bytes, a, *la) && apart(workspace, bytes, b, *lb) && apart(workspace, bytes, d, *ld)))
        return invalid;
    matmuls++;
    batches += ld->count > 1;
    const Product product{*m, *la, *lb, *ld, a, b, d, workspace, chosen, old == 1};
    if (!vimcore::shim::submit)
        product();
    else if (vimcore::shim::submit(stream, product) != cudaSuccess)
        return static_cast<Status>(13);  // CUBLAS_STATUS_EXECUTION_FAILED
    return status_success;
}

}  // extern "C"
