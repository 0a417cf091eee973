// SPDX-License-Identifier: Apache-2.0
// The scan of ops.h: the tuned kernels where they apply, else the generic one, a launch per pass.
#include <atomic>
#include <stdexcept>

#include "cuda_operators.h"
#include "scan/args.cuh"
#include "scan/choice.h"

namespace vimcore::cuda {

namespace {

std::atomic<ScanKernel> forced = ScanKernel::automatic;

}  // namespace

void force_scan(ScanKernel kernel) { forced = kernel; }
ScanKernel forced_scan() { return forced; }

void scan_forward(Context& ctx, const ScanForward& args)
{
    const ScanKernel kernel = forced;
    if (kernel != ScanKernel::generic && scan_forward_tuned(ctx, args)) return;
    if (args.passes.size() != 1) {  // not two directions of one sum: one after the other
        ScanForward single = args;
        for (const ScanForwardPass& pass : args.passes) {
            single.passes = {&pass, 1};
            cuda::scan_forward(ctx, single);
        }
        return;
    }
    if (kernel != ScanKernel::generic && kernel != ScanKernel::automatic)
        throw std::invalid_argument("[scan] the forced kernel does not apply to these sizes");
    dispatch(args.xz.dtype, [&](auto type) {
        const ScanForwardPass& p = args.passes[0];
        auto s = generic_pass<decltype(type)>(args, p, p.begin);
        s.add = p.add;
        s.finish = p.finish;
        s.state_inout = p.state.as<float>();
        run_generic(ctx, s);
    });
}

void selective_scan_forward(Context& ctx, const SelectiveScanForward& a)
{
    dispatch(a.u.dtype, [&](auto type) { run_generic(ctx, textbook_pass<decltype(type)>(a)); });
}

}  // namespace vimcore::cuda
