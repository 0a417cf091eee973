// SPDX-License-Identifier: Apache-2.0
// The forward scan of the published networks by each of its tuned kernels (scan/choice.h): the same bits, and on a
// device microseconds, side by side, so that what the batch chooses can be judged.
//   scan_check [MOST_TOKENS]        of a batch; 40000 unless given, 12 without a device
#include <array>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check_cuda.h"
#include "core/device_scratch.h"
#include "scan/choice.h"
#include "timing_cuda.h"
#include "vimcore/build_info.h"
#include "vimcore/ops.h"

using namespace vimcore;
using namespace vimcore::test;
using vimcore::cuda::force_scan;
using vimcore::cuda::ScanKernel;

namespace {

using Index = std::int64_t;

struct Network {
    const char* name;
    Index inner, rank;
};
constexpr Network networks[] = {{"Ti", 384, 12}, {"S", 768, 24}};
constexpr std::array<std::pair<Index, Index>, 7> sizes = {
    // batch, tokens
    {{1, 197}, {8, 197}, {32, 197}, {64, 197}, {128, 197}, {32, 1025}, {4, 6085}}};

struct Kernel {
    const char* name;
    ScanKernel kernel;
};
constexpr Kernel kernels[] = {{"automatic", ScanKernel::automatic},
                              {"whole", ScanKernel::whole},
                              {"wide", ScanKernel::wide},
                              {"middle", ScanKernel::middle},
                              {"narrow", ScanKernel::narrow}};

void check(const Network& net, DType dtype, Index batch, Index len)
{
    constexpr Index states = 16;
    const Index row = device_scratch::padded_columns(net.rank + 2 * states, dtype, Device::Type::cuda);
    Random random(1);
    Side side = Side::cuda(dtype);
    // one image, many times
    const auto repeated = [&](const Shape& shape, float low, float high) {
        const Floats image = rounded(dtype, random.uniform(shape.numel() / batch, low, high));
        Floats all;
        for (Index b = 0; b < batch; b++) all.insert(all.end(), image.begin(), image.end());
        return side.activation(shape, all);
    };
    std::array<ScanForwardPass, 2> passes;
    for (std::size_t i = 0; i < 2; i++) {
        ScanForwardPass& p = passes[i];
        p.reverse = p.add = p.finish = i == 1;
        p.u = repeated({batch, len, net.inner}, -1, 1);
        p.q = repeated({batch, len, row}, -1, 1);
        p.A_log = side.parameter({net.inner, states}, random.uniform(net.inner * states, 0, 2.8f));
        p.D = side.parameter({net.inner}, random.uniform(net.inner, -1, 1));
        p.dt_weight = side.parameter({net.inner, net.rank}, random.uniform(net.inner * net.rank, -0.3f, 0.3f));
        p.dt_bias = side.parameter({net.inner}, random.uniform(net.inner, -6, -2));
    }
    ScanForward scan;
    scan.xz = repeated({batch, len, 2 * net.inner}, -3, 3);
    scan.passes = passes;
    scan.scale = 0.5;
    scan.out = side.result({batch, len, net.inner});

    std::printf("%-2s %-4s batch %3lld tokens %4lld us:", net.name, name_of(dtype), static_cast<long long>(batch),
                static_cast<long long>(len));
    Floats first;
    for (const Kernel& kernel : kernels) {
        force_scan(kernel.kernel);
        scan_forward(side.ctx, scan);
        const Floats out = side.values(scan.out);
        if (first.empty()) first = out;
        CHECK(same_bits(out, first));
        std::printf("  %s %.1f", kernel.name, microseconds(side.ctx, 2, 10, [&] { scan_forward(side.ctx, scan); }));
    }
    force_scan(ScanKernel::automatic);
    std::printf("\n");
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv)
{
#ifdef VIMCORE_SHIM
    constexpr Index usual = 12;
#else
    constexpr Index usual = 40000;
#endif
    const Index most = argc > 1 && std::atoll(argv[1]) > 0 ? std::atoll(argv[1]) : usual;
    std::printf("%s\n", cuda_description(0).c_str());
    for (const DType dtype : {DType::bf16, DType::f32})
        for (const Network& net : networks)
            for (const auto& [batch, len] : sizes) {
                // without a device, a few tokens of the smallest batch
                if (batch * len <= most)
                    check(net, dtype, batch, len);
                else if (batch == 1)
                    check(net, dtype, 1, most);
            }
    return check_failures();
}
