// SPDX-License-Identifier: Apache-2.0
// What this library was built with and what it uses on this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace [[gnu::visibility("default")]] vimcore {

struct BuildInfo {
    std::string version, compiler;
    std::string isa;                // kernels in use
    std::vector<std::string> isas;  // kernels built in
    bool cuda = false, jpeg = false, png = false, openmp = false;
};

int cuda_device_count();                   // 0 where the build, the driver or the machine has none
std::string cuda_description(int device);  // name, compute capability, memory, driver, BLAS in use

// Products of matrices on CUDA in this process so far. Where cuBLASLt has no algorithm for a problem, a built-in kernel
// multiplies, many times slower.
struct CudaProducts {
    std::int64_t library = 0;          // by cuBLASLt
    std::int64_t built_in = 0;         // for which it had no algorithm
    std::int64_t other_algorithm = 0;  // by another algorithm than other numbers of rows have: other bits, perhaps
    std::string first_built_in;        // the first of those, for people
};
CudaProducts cuda_products();

BuildInfo build_info();  // vimcore::Error when VIMCORE_ISA names kernels that are unknown or not available

// What multiplies bfloat16 on this CPU: "avx512bf16", ...; "emulated" where VIMCORE_ISA names kernels without such a
// unit, exact but slow; "" where there is no unit: then operators refuse activations of DType::bf16 on the CPU.
std::string bf16_unit();

// Why this CPU does not compute with activations of DType::bf16, and what to do; "" where it does.
std::string bf16_refusal();

// float32 multiply-add rate of `threads` busy threads in GFLOP/s, measured now for a few milliseconds; the same of what
// multiplies bfloat16 (Error: nothing does).
double fma_peak(int threads);
double bf16_peak(int threads);

}  // namespace vimcore
