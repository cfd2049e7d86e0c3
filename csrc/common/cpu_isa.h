// Which vector instructions this processor has, asked at run time: one wheel runs on all of them.
//
// A file csrc/<op>/*_avx2.cpp is compiled with -mavx2 -mfma -mf16c, *_avx512.cpp with AVX-512
// F/BW/VL/DQ besides, *_avx512_bf16.cpp with its products of bfloat16 as well; every other file is plain x86-64 (or whatever the machine is). CMake defines
// HUNYUAN_FAST_X86 when those files are built.
//
//     switch (cpu_isa()) {                      // in a plain file
//     #ifdef HUNYUAN_FAST_X86
//         case CpuIsa::avx512: return forward_avx512(params);
//         case CpuIsa::avx2: return forward_avx2(params);
//     #endif
//         default: return forward_plain(params);
//     }
//
// The files of higher instruction sets come last on the linker's command line, so that an inline
// function which several of them share is the plain one.
#pragma once

namespace hunyuan_fast {

enum class CpuIsa { plain, avx2, avx512 };

// The best one of this processor, found once; HUNYUAN_FAST_CPU_ISA=plain|avx2|avx512|avx512_bf16 lowers it.
CpuIsa cpu_isa();

// Whether there are, beyond AVX-512, products of pairs of bfloat16, and this build has files that use them
// (HUNYUAN_FAST_X86_BF16).
bool cpu_multiplies_bf16();

char const* name_of(CpuIsa isa);

}  // namespace hunyuan_fast
