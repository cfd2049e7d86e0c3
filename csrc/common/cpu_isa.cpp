#include "common/cpu_isa.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/check.h"

namespace hunyuan_fast {
namespace {

struct Choice {
    CpuIsa isa;
    bool multiplies_bf16;
};

constexpr Choice kChoices[] = {
    {CpuIsa::plain, false}, {CpuIsa::avx2, false}, {CpuIsa::avx512, false}, {CpuIsa::avx512, true}};

std::string name_of(Choice choice) {
    return std::string(name_of(choice.isa)) + (choice.multiplies_bf16 ? "_bf16" : "");
}

// As an index of kChoices.
int best_of_processor() {
#ifdef HUNYUAN_FAST_X86
    auto const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    auto const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef HUNYUAN_FAST_X86_BF16
    if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
#endif
    // every processor with AVX2 has F16C, which this builtin does not know under g++ 11
    if (avx2 && avx512) return 2;
    if (avx2) return 1;
#endif
    return 0;
}

Choice allowed() {
    int const best = best_of_processor();
    char const* const wish = std::getenv("HUNYUAN_FAST_CPU_ISA");
    if (wish == nullptr || *wish == '\0') return kChoices[best];
    for (int i = 0; i < 4; ++i) {
        if (wish == name_of(kChoices[i])) return kChoices[std::min(i, best)];
    }
    refuse("HUNYUAN_FAST_CPU_ISA must be plain, avx2, avx512 or avx512_bf16, got ", wish);
}

Choice const& choice() {
    static Choice const chosen = allowed();
    return chosen;
}

}  // namespace

CpuIsa cpu_isa() { return choice().isa; }

bool cpu_multiplies_bf16() { return choice().multiplies_bf16; }

char const* name_of(CpuIsa isa) {
    switch (isa) {
        case CpuIsa::plain: return "plain";
        case CpuIsa::avx2: return "avx2";
        case CpuIsa::avx512: return "avx512";
    }
    return "unknown";
}

}  // namespace hunyuan_fast
