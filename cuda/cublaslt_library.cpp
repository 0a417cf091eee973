// SPDX-License-Identifier: Apache-2.0
// Finds cuBLASLt and opens it.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cublaslt.h"
#include "vimcore/error.h"

namespace vimcore::cuda {

using namespace lt;

namespace {

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
    symbol(library, "cublasLtMatmulAlgoCheck", f.algorithm_check);
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

}  // namespace

const Library& lt::library()
{
    static const Library opened = open_library();
    return opened;
}

bool has_cublaslt() { return library().found; }

std::string blas_name() { return library().name; }

}  // namespace vimcore::cuda
