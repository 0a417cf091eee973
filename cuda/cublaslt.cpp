// SPDX-License-Identifier: Apache-2.0
#include "cublaslt.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <tuple>
#include <vector>

#include "core/context_internals.h"
#include "core/device_scratch.h"
#include "vimcore/build_info.h"
#include "vimcore/error.h"

namespace vimcore::cuda {

namespace {

using namespace lt;

std::string describe(const GemmArgs& g)
{
    std::string text = "m " + std::to_string(g.m) + ", n " + std::to_string(g.n) + ", k " + std::to_string(g.k) + " " +
                       name_of(g.dtype);
    if (g.x_across) text += ", sums over tokens";
    return text;
}

void check_lt(Status status, const char* call, const GemmArgs& args)
{
    if (status == status_success) return;
    VIM_CUDA(cudaGetLastError());  // an earlier kernel's failure is the better explanation
    throw Error("[cublaslt] " + std::string(call) + ": " + library().call.get_status_name(status) + " for " +
                describe(args) + "; " + blas_name() + ". VIMCORE_CUBLASLT=none computes without it");
}

template <class T, class A>
void set(Status (*setter)(T, A, const void*, std::size_t), T of, A attribute, const auto& value, const GemmArgs& args)
{
    check_lt(setter(of, attribute, &value, sizeof value), "setting an attribute", args);
}

// A descriptor that is destroyed with the block.
template <class T>
class Descriptor {
public:
    template <class... A>
    Descriptor(Status (*destroy)(T), const GemmArgs& args, Status (*create)(T*, A...), std::type_identity_t<A>... a)
        : destroy_(destroy)
    {
        check_lt(create(&descriptor_, a...), "creating a descriptor", args);
    }
    ~Descriptor() { destroy_(descriptor_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    operator T() const { return descriptor_; }

private:
    Status (*destroy_)(T);
    T descriptor_ = nullptr;
};

CudaProducts products;
std::mutex products_mutex;

void count_product(const GemmArgs& g, bool by_library, bool first)
{
    std::lock_guard lock(products_mutex);
    products.library += by_library;
    products.other_algorithm += by_library && !first;
    if (!by_library && products.built_in++ == 0) products.first_built_in = describe(g);
}

DataType data_type(DType dtype) { return dtype == DType::bf16 ? real_bf16 : dtype == DType::f16 ? real_f16 : real_f32; }

bool wanted(const char* variable)
{
    const char* value = std::getenv(variable);
    return value && *value && std::strcmp(value, "0") != 0;
}

bool tf32()
{
    static const bool yes = wanted("VIMCORE_TF32");
    return yes;
}

bool algorithm_per_batch()
{
    static const bool yes = wanted("VIMCORE_ALGORITHM_PER_BATCH");
    return yes;
}

// Of any row of a matrix, up to 16 bytes: no algorithm asks for more, and the choice must depend neither on where
// memory happens to lie nor on the row that a call begins with.
std::uint32_t alignment(const void* first, Index ld, Index stride, DType dtype)
{
    const auto bytes = static_cast<std::uintptr_t>((ld | stride) * static_cast<Index>(size_of(dtype)));
    const std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(first) | bytes | 16;
    return static_cast<std::uint32_t>(bits & (~bits + 1));
}

struct Blas {
    Handle handle = nullptr;
    std::uint64_t workspace = 0;
};

Blas blas_of(int index, const GemmArgs& args)
{
    static std::mutex mutex;
    static std::map<int, Blas> devices;  // handles live as long as the process
    std::lock_guard lock(mutex);
    Blas& device = devices[index];
    if (device.handle) return device;
    int major = 0;
    VIM_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    device.workspace = major >= 9 ? std::uint64_t{device_scratch::blas_workspace} : 4u << 20;
    check_lt(library().call.create(&device.handle), "cublasLtCreate", args);
    return device;
}

// Row-major y (m, n) = x (m, k) W (n, k)^T is column-major D (n, m) = A^T B with A = W (k, n) and B = x (k, m): both
// operands are read along k, and nothing is transposed in memory. What lies across is A (n, k) or B^T (m, k) as it is.
struct Product {
    Descriptor<Matmul> op;
    Descriptor<Layout> a, b, d;

    Product(const GemmArgs& g, const void* bias)
        : op(call().matmul_desc_destroy, g, call().matmul_desc_create,
             g.dtype == DType::f32 && tf32() ? compute_tf32 : compute_f32, real_f32),
          a(call().layout_destroy, g, call().layout_create, data_type(g.dtype), size(g.w_across ? g.n : g.k),
            size(g.w_across ? g.k : g.n), g.ldw),
          b(call().layout_destroy, g, call().layout_create, data_type(g.dtype), size(g.x_across ? g.m : g.k),
            size(g.x_across ? g.k : g.m), g.ldx),
          d(call().layout_destroy, g, call().layout_create, data_type(g.y_dtype), size(g.n), size(g.m), g.ldy)
    {
        if (g.count > 1) {
            batch(g, a, g.stride_w);
            batch(g, b, g.stride_x);
            batch(g, d, g.stride_y);
        }
        set(call().matmul_desc_set, Matmul(op), matmul_transa, std::int32_t{g.w_across ? operation_n : operation_t}, g);
        set(call().matmul_desc_set, Matmul(op), matmul_transb, std::int32_t{g.x_across ? operation_t : operation_n}, g);
        if (!bias) return;
        set(call().matmul_desc_set, Matmul(op), matmul_epilogue, std::uint32_t{epilogue_bias}, g);
        set(call().matmul_desc_set, Matmul(op), matmul_bias_pointer, bias, g);
    }

private:
    static const Functions& call() { return library().call; }
    static std::uint64_t size(Index n) { return static_cast<std::uint64_t>(n); }
    static void batch(const GemmArgs& g, Layout layout, Index stride)
    {
        set(call().layout_set, layout, layout_batch_count, static_cast<std::int32_t>(g.count), g);
        set(call().layout_set, layout, layout_strided_batch_offset, std::int64_t{stride}, g);
    }
};

// Whether a sum may be cut in parts that a second kernel adds in a fixed order: those over tokens, since there are few
// elements and long sums. A kernel may leave out what does not fill its last slice, so only whole slices are.
// (Seen in cuBLAS 12 and 13.1: facebookexperimental/triton 2767.)
constexpr Index slices = 128;  // a multiple of every kernel's
bool may_be_cut(const GemmArgs& g) { return g.x_across && g.k % slices == 0; }

// What the choice of an algorithm depends on; without the number of rows for products of rows.
using Key = std::tuple<int, DType, DType, std::array<bool, 4>, std::array<Index, 7>, std::array<std::uint32_t, 3>>;
using Alignments = std::array<std::uint32_t, 3>;

struct Choice {
    Algorithm algorithm{};
    std::size_t workspace = 0;
    bool found = false, first = true;  // first: the one that other numbers of rows get, too
};

// What `ask` said when the key came for the first time.
template <class K, class F>
auto remembered(const K& key, F&& ask)
{
    using Value = decltype(ask());
    static std::shared_mutex mutex;
    static std::map<K, Value> known;
    {
        std::shared_lock lock(mutex);
        const auto found = known.find(key);
        if (found != known.end()) return found->second;
    }
    const Value value = ask();
    std::unique_lock lock(mutex);
    return known.emplace(key, value).first->second;  // the first of two threads that asked
}

// Algorithms for a problem, best first; `given`: the one that came.
std::vector<Algorithm> candidates(const Blas& device, const GemmArgs& g, const GemmArgs& given, const void* bias,
                                  const Alignments& align)
{
    const Functions& call = library().call;
    // The search does not read the bias, but takes its address for as aligned as that of every bias to come: 16 bytes.
    const auto near = reinterpret_cast<std::uintptr_t>(bias) / 256 * 256 + 16;
    const Product product(g, bias ? reinterpret_cast<const void*>(near) : nullptr);
    const Descriptor<Preference> preference(call.preference_destroy, g, call.preference_create);
    auto prefer = [&](PreferenceAttribute attribute, auto value) {
        set(call.preference_set, Preference(preference), attribute, value, g);
    };
    prefer(preference_max_workspace_bytes, device.workspace);
    prefer(preference_reduction_scheme_mask, std::uint32_t{may_be_cut(g) ? reduction_compute_type : reduction_none});
    prefer(preference_min_alignment_a_bytes, align[0]);
    prefer(preference_min_alignment_b_bytes, align[1]);
    prefer(preference_min_alignment_c_bytes, align[2]);
    prefer(preference_min_alignment_d_bytes, align[2]);
    std::array<HeuristicResult, 8> results{};
    int count = 0;
    const Status status = call.heuristic(device.handle, product.op, product.a, product.b, product.d, product.d,
                                         preference, static_cast<int>(results.size()), results.data(), &count);
    if (status != status_not_supported) check_lt(status, "cublasLtMatmulAlgoGetHeuristic", given);
    std::vector<Algorithm> found;
    for (int i = 0; i < count; i++)
        if (const HeuristicResult& r = results[static_cast<std::size_t>(i)]; r.state == status_success)
            found.push_back(r.algorithm);
    return found;
}

// The same problem with as many rows as are typical of training: the answer for it serves all numbers of rows.
GemmArgs typical(GemmArgs g)
{
    if (g.x_across || algorithm_per_batch()) return g;
    g.m = 4096;
    if (g.count > 1) {
        g.stride_x = g.m * g.ldx;
        g.stride_y = g.m * g.ldy;
    }
    return g;
}

Choice choose(const Blas& device, int index, const GemmArgs& g, const void* bias, const Alignments& align,
              const Product& product)
{
    const GemmArgs asked = typical(g);
    const Key problem{index,
                      g.dtype,
                      g.y_dtype,
                      {bias != nullptr, g.x_across, g.w_across, g.add},
                      {asked.m, g.n, g.k, g.count, g.ldx, g.ldw, g.ldy},
                      align};
    return remembered(std::pair(problem, g.m), [&] {
        Choice choice;
        for (const Algorithm& algorithm :
             remembered(problem, [&] { return candidates(device, asked, g, bias, align); })) {
            HeuristicResult result{};
            const Status status = library().call.algorithm_check(device.handle, product.op, product.a, product.b,
                                                                 product.d, product.d, &algorithm, &result);
            if (status == status_success && result.state == status_success && result.workspace <= device.workspace)
                return Choice{algorithm, result.workspace, true, choice.first};
            choice.first = false;
        }
        return choice;
    });
}

bool matmul_once(Context& ctx, const GemmArgs& g, const void* bias)
{
    const int index = ctx.device().index;
    const Blas device = blas_of(index, g);
    const Alignments align = {alignment(g.w, g.ldw, g.count > 1 ? g.stride_w : 0, g.dtype),
                              alignment(g.x, g.ldx, g.count > 1 ? g.stride_x : 0, g.dtype),
                              alignment(g.y, g.ldy, g.count > 1 ? g.stride_y : 0, g.y_dtype)};
    const Product product(g, bias);
    const Choice choice = choose(device, index, g, bias, align, product);
    count_product(g, choice.found, choice.first);
    if (!choice.found) return false;

    Arena::Scope scope(arena_of(ctx));
    void* workspace = nullptr;
    if (choice.workspace) {
        constexpr std::uintptr_t align_to = device_scratch::blas_alignment;
        const Tensor space = device_scratch::blas_memory(ctx, choice.workspace);
        workspace = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(space.data) + align_to - 1) / align_to *
                                            align_to);
    }
    const float one = 1.0f, beta = g.add ? 1.0f : 0.0f;
    check_lt(
        library().call.matmul(device.handle, product.op, &one, g.w, product.a, g.x, product.b, &beta, g.y, product.d,
                              g.y, product.d, &choice.algorithm, workspace, choice.workspace, stream_of(ctx)),
        "cublasLtMatmul", g);
    after_launch(cudaSuccess, "cublasLtMatmul", __FILE__, __LINE__, stream_of(ctx));
    return true;
}

}  // namespace

bool matmul(Context& ctx, const GemmArgs& args, const void* bias)
{
    if (!library().found) return false;
    // Tokens of one call: no matrix reaches 2^31 elements, which not every algorithm is made for.
    const Index widest = std::max(args.ldx, args.x_across ? args.ldw : args.ldy);
    const Index most = std::max<Index>(256, ((Index{1} << 31) - 1) / widest / 256 * 256);
    const auto size = static_cast<Index>(size_of(args.dtype)), y_size = static_cast<Index>(size_of(args.y_dtype));
    const Index tokens = args.x_across ? args.k : args.m;
    Index count = 0;
    for (Index token = 0; token < tokens; token += count) {
        count = std::min(most, tokens - token);
        if (args.x_across && count > slices) count -= count % slices;  // the rest comes last
        GemmArgs part = args;
        part.x = static_cast<const char*>(args.x) + token * args.ldx * size;
        if (args.x_across) {
            part.k = count;
            part.w = static_cast<const char*>(args.w) + token * args.ldw * size;
            part.add = args.add || token > 0;
        } else {
            part.m = count;
            part.y = static_cast<char*>(args.y) + token * args.ldy * y_size;
        }
        if (matmul_once(ctx, part, bias)) continue;
        if (token == 0) return false;
        gemm(ctx, part);  // the last part has a size of its own
    }
    return true;
}

}  // namespace vimcore::cuda

vimcore::CudaProducts vimcore::cuda_products()
{
    std::lock_guard lock(cuda::products_mutex);
    return cuda::products;
}
