#include "common/cpu_isa.h"

#include <algorithm>
#include <cstdlib>

#include "common/check.h"

namespace hunyuan_fast {
namespace {

CpuIsa best_of_processor() {
#ifdef HUNYUAN_FAST_X86
    auto const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    auto const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    // every processor with AVX2 has F16C, which this builtin does not know under g++ 11
    if (avx2 && avx512) return CpuIsa::avx512;
    if (avx2) return CpuIsa::avx2;
#endif
    return CpuIsa::plain;
}

CpuIsa allowed() {
    CpuIsa const best = best_of_processor();
    char const* const wish = std::getenv("HUNYUAN_FAST_CPU_ISA");
    if (wish == nullptr || *wish == '\0') return best;
    for (CpuIsa isa : {CpuIsa::plain, CpuIsa::avx2, CpuIsa::avx512}) {
        if (std::string(wish) == name_of(isa)) return std::min(isa, best);
    }
    refuse("HUNYUAN_FAST_CPU_ISA must be plain, avx2 or avx512, got ", wish);
}

}  // namespace

CpuIsa cpu_isa() {
    static CpuIsa const isa = allowed();
    return isa;
}

char const* name_of(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::plain: return "plain";
        case CpuIsa::avx2: return "avx2";
        case CpuIsa::avx512: return "avx512";
    }
    return "unknown";
}

}  // namespace hunyuan_fast
