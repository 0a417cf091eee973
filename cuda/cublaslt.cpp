// SPDX-License-Identifier: Apache-2.0
#include "cublaslt.h"

#include <dlfcn.h>

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
#include "vimcore/error.h"

namespace vimcore::cuda {

namespace {

using namespace lt;

// ---- finding the library -------------------------------------------------------------------------------------------

struct Library {
    Functions call{};
    std::string name;  // for people; with why where there is none
    bool found = false;
};

// The folder of the file that holds this code.
std::string own_folder()
{
    Dl_info info{};
    if (!dladdr(reinterpret_cast<const void*>(&own_folder), &info) || !info.dli_fname) return ".";
    const std::string file = info.dli_fname;
    const auto slash = file.rfind('/');
    return slash == std::string::npos ? "." : file.substr(0, slash);
}

template <class F>
void symbol(void* library, const char* name, F& function)
{
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw Error(std::string("[cublaslt] the library has no ") + name);
}

Functions functions(void* library)
{
    Functions f{};
    symbol(library, "cublasLtGetVersion", f.get_version);
    symbol(library, "cublasLtGetStatusName", f.get_status_name);
    symbol(library, "cublasLtCreate", f.create);
    symbol(library, "cublasLtMatmulDescCreate", f.matmul_desc_create);
    symbol(library, "cublasLtMatmulDescSetAttribute", f.matmul_desc_set);
    symbol(library, "cublasLtMatmulDescDestroy", f.matmul_desc_destroy);
    symbol(library, "cublasLtMatrixLayoutCreate", f.layout_create);
    symbol(library, "cublasLtMatrixLayoutSetAttribute", f.layout_set);
    symbol(library, "cublasLtMatrixLayoutDestroy", f.layout_destroy);
    symbol(library, "cublasLtMatmulPreferenceCreate", f.preference_create);
    symbol(library, "cublasLtMatmulPreferenceSetAttribute", f.preference_set);
    symbol(library, "cublasLtMatmulPreferenceDestroy", f.preference_destroy);
    symbol(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic);
    symbol(library, "cublasLtMatmul", f.matmul);
    return f;
}

// Where to look, in this order: what the process has loaded already (torch's), NVIDIA's wheels beside the package, what
// the system's loader finds.
struct Place {
    std::string path;
    int mode;
};
std::vector<Place> places()
{
    const std::string packages = own_folder() + "/..";
    return {{"libcublasLt.so.13", RTLD_NOLOAD},
            {"libcublasLt.so.12", RTLD_NOLOAD},
            {packages + "/nvidia/cu13/lib/libcublasLt.so.13", 0},
            {packages + "/nvidia/cublas/lib/libcublasLt.so.12", 0},
            {"libcublasLt.so.13", 0},
            {"libcublasLt.so.12", 0}};
}

Library open_library()
{
    Library library;
    const char* wanted = std::getenv("VIMCORE_CUBLASLT");
    if (wanted && std::strcmp(wanted, "none") == 0) {
        library.name = "built-in kernels (VIMCORE_CUBLASLT=none)";
        return library;
    }
    const bool named = wanted && *wanted;
    void* handle = nullptr;
    std::string searched;
    for (const Place& place : named ? std::vector<Place>{{wanted, 0}} : places()) {
        handle = dlopen(place.path.c_str(), RTLD_NOW | RTLD_LOCAL | place.mode);
        if (handle) break;
        if (place.mode == RTLD_NOLOAD) continue;
        const char* why = dlerror();
        searched += (searched.empty() ? "" : "; ") + std::string(why ? why : place.path);
    }
    if (!handle && named) throw Error("[cublaslt] VIMCORE_CUBLASLT names a file that cannot be loaded: " + searched);
    if (!handle) {
        library.name =
            "built-in kernels (slow; cuBLASLt was not found, install nvidia-cublas or name the file in "
            "VIMCORE_CUBLASLT; tried: " +
            searched + ")";
        return library;
    }
    library.call = functions(handle);  // the library stays loaded
    library.found = true;
    Dl_info info{};
    const bool known = dladdr(reinterpret_cast<const void*>(library.call.matmul), &info) && info.dli_fname;
    const std::size_t version = library.call.get_version();
    library.name = "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
                   std::to_string(version % 100) + (known ? std::string(" (") + info.dli_fname + ")" : "");
    return library;
}

const Library& library()
{
    static const Library opened = open_library();
    return opened;
}

// ---- calling it ----------------------------------------------------------------------------------------------------

void check_lt(Status status, const char* call, const GemmArgs& args)
{
    if (status == status_success) return;
    VIM_CUDA(cudaGetLastError());  // an earlier kernel's failure is the better explanation
    throw Error("[cublaslt] " + std::string(call) + ": " + library().call.get_status_name(status) + " for m " +
                std::to_string(args.m) + ", n " + std::to_string(args.n) + ", k " + std::to_string(args.k) + " " +
                name_of(args.dtype) + "; " + blas_name() + ". VIMCORE_CUBLASLT=none computes without it");
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

DataType data_type(DType dtype) { return dtype == DType::bf16 ? real_bf16 : dtype == DType::f16 ? real_f16 : real_f32; }

bool tf32()
{
    static const bool wanted = [] {
        const char* value = std::getenv("VIMCORE_TF32");
        return value && *value && std::strcmp(value, "0") != 0;
    }();
    return wanted;
}

// Up to 16 bytes: no algorithm asks for more, and the choice must not depend on where memory happens to lie.
std::uint32_t alignment(const void* first, Index stride_bytes)
{
    const auto bits = reinterpret_cast<std::uintptr_t>(first) | static_cast<std::uintptr_t>(stride_bytes) | 16;
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

// What the choice of an algorithm depends on.
using Key = std::tuple<int, DType, DType, std::array<bool, 4>, std::array<Index, 7>, std::array<std::uint32_t, 4>>;

struct Choice {
    Algorithm algorithm{};
    std::size_t workspace = 0;
    bool found = false;
};

template <class F>
Choice choose(const Key& key, F&& ask)
{
    static std::shared_mutex mutex;
    static std::map<Key, Choice> choices;
    {
        std::shared_lock lock(mutex);
        const auto found = choices.find(key);
        if (found != choices.end()) return found->second;
    }
    const Choice choice = ask();
    std::unique_lock lock(mutex);
    return choices.emplace(key, choice).first->second;  // the first of two threads that asked
}

// Row-major y (m, n) = x (m, k) W (n, k)^T is column-major D (n, m) = A^T B with A = W (k, n) and B = x (k, m): both
// operands are read along k, and nothing is transposed in memory. What lies across is A (n, k) or B^T (m, k) as it is.
bool matmul_rows(Context& ctx, const GemmArgs& g, const void* bias)
{
    const Functions& call = library().call;
    const Blas device = blas_of(ctx.device().index, g);
    const auto size = static_cast<Index>(size_of(g.dtype)), y_size = static_cast<Index>(size_of(g.y_dtype));
    const DataType type = data_type(g.dtype);
    const std::array<std::uint32_t, 4> align = {alignment(g.w, g.stride_w * size), alignment(g.x, g.stride_x * size),
                                                alignment(g.y, g.stride_y * y_size), alignment(bias, 0)};

    const Descriptor<Matmul> op(call.matmul_desc_destroy, g, call.matmul_desc_create,
                                g.dtype == DType::f32 && tf32() ? compute_tf32 : compute_f32, real_f32);
    set(call.matmul_desc_set, Matmul(op), matmul_transa, std::int32_t{g.w_across ? operation_n : operation_t}, g);
    set(call.matmul_desc_set, Matmul(op), matmul_transb, std::int32_t{g.x_across ? operation_t : operation_n}, g);
    if (bias) {
        set(call.matmul_desc_set, Matmul(op), matmul_epilogue, std::uint32_t{epilogue_bias}, g);
        set(call.matmul_desc_set, Matmul(op), matmul_bias_pointer, bias, g);
    }
    const auto m = static_cast<std::uint64_t>(g.m), n = static_cast<std::uint64_t>(g.n),
               k = static_cast<std::uint64_t>(g.k);
    const Descriptor<Layout> a(call.layout_destroy, g, call.layout_create, type, g.w_across ? n : k, g.w_across ? k : n,
                               g.ldw);
    const Descriptor<Layout> b(call.layout_destroy, g, call.layout_create, type, g.x_across ? m : k, g.x_across ? k : m,
                               g.ldx);
    const Descriptor<Layout> d(call.layout_destroy, g, call.layout_create, data_type(g.y_dtype), n, m, g.ldy);
    if (g.count > 1) {
        const std::pair<Layout, Index> strides[] = {{a, g.stride_w}, {b, g.stride_x}, {d, g.stride_y}};
        for (const auto& [layout, stride] : strides) {
            set(call.layout_set, layout, layout_batch_count, static_cast<std::int32_t>(g.count), g);
            set(call.layout_set, layout, layout_strided_batch_offset, std::int64_t{stride}, g);
        }
    }

    const Key key{ctx.device().index,
                  g.dtype,
                  g.y_dtype,
                  {bias != nullptr, g.x_across, g.w_across, g.add},
                  {g.m, g.n, g.k, g.count, g.ldx, g.ldw, g.ldy},
                  align};
    const Choice choice = choose(key, [&] {
        const Descriptor<Preference> preference(call.preference_destroy, g, call.preference_create);
        auto prefer = [&](PreferenceAttribute attribute, auto value) {
            set(call.preference_set, Preference(preference), attribute, value, g);
        };
        prefer(preference_max_workspace_bytes, device.workspace);
        // A row of activations is one sum, whatever the rows around it. A gradient of weights sums over all tokens: few
        // elements, long sums, which may be cut; the parts are added by a second kernel in a fixed order.
        prefer(preference_reduction_scheme_mask, std::uint32_t{g.x_across ? reduction_compute_type : reduction_none});
        prefer(preference_min_alignment_a_bytes, align[0]);
        prefer(preference_min_alignment_b_bytes, align[1]);
        prefer(preference_min_alignment_c_bytes, align[2]);
        prefer(preference_min_alignment_d_bytes, align[2]);
        std::array<HeuristicResult, 4> results{};
        int count = 0;
        const Status status = call.heuristic(device.handle, op, a, b, d, d, preference,
                                             static_cast<int>(results.size()), results.data(), &count);
        if (status != status_not_supported) check_lt(status, "cublasLtMatmulAlgoGetHeuristic", g);
        Choice best;
        for (int i = 0; i < count && !best.found; i++)
            if (const HeuristicResult& r = results[static_cast<std::size_t>(i)]; r.state == status_success)
                best = {r.algorithm, r.workspace, true};
        return best;
    });
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
    check_lt(call.matmul(device.handle, op, &one, g.w, a, g.x, b, &beta, g.y, d, g.y, d, &choice.algorithm, workspace,
                         choice.workspace, stream_of(ctx)),
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
    for (Index token = 0; token < tokens; token += most) {
        GemmArgs part = args;
        part.x = static_cast<const char*>(args.x) + token * args.ldx * size;
        if (args.x_across) {
            part.k = std::min(most, tokens - token);
            part.w = static_cast<const char*>(args.w) + token * args.ldw * size;
            part.add = args.add || token > 0;
        } else {
            part.m = std::min(most, tokens - token);
            part.y = static_cast<char*>(args.y) + token * args.ldy * y_size;
        }
        if (matmul_rows(ctx, part, bias)) continue;
        if (token == 0) return false;
        gemm(ctx, part);  // the last part has a size of its own
    }
    return true;
}

bool has_cublaslt() { return library().found; }

std::string blas_name() { return library().name; }

}  // namespace vimcore::cuda
