// Matrix products of a warpgroup, sums in fp32: "wgmma.mma_async" of the PTX ISA 9.0. How operands lie is told in
// sm90_layout.h.
#pragma once

#include <type_traits>

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

#ifdef HUNYUAN_SM90A

// Names of the registers of sums in the instruction's text, eight at a time, and the sums themselves.
#define HUNYUAN_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HUNYUAN_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define HUNYUAN_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define HUNYUAN_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define HUNYUAN_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define HUNYUAN_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define HUNYUAN_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define HUNYUAN_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define HUNYUAN_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define HUNYUAN_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define HUNYUAN_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define HUNYUAN_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define HUNYUAN_NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define HUNYUAN_NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define HUNYUAN_NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define HUNYUAN_NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define HUNYUAN_NAMES_OF_64 HUNYUAN_NAMES_0 ", " HUNYUAN_NAMES_1 ", " HUNYUAN_NAMES_2 ", " HUNYUAN_NAMES_3
#define HUNYUAN_NAMES_OF_80 HUNYUAN_NAMES_OF_64 ", " HUNYUAN_NAMES_4
#define HUNYUAN_NAMES_OF_96 HUNYUAN_NAMES_OF_80 ", " HUNYUAN_NAMES_5
#define HUNYUAN_NAMES_OF_128 HUNYUAN_NAMES_OF_96 ", " HUNYUAN_NAMES_6 ", " HUNYUAN_NAMES_7
#define HUNYUAN_NAMES_OF_176 HUNYUAN_NAMES_OF_128 ", " HUNYUAN_NAMES_8 ", " HUNYUAN_NAMES_9 ", " HUNYUAN_NAMES_10
#define HUNYUAN_NAMES_OF_192 HUNYUAN_NAMES_OF_176 ", " HUNYUAN_NAMES_11
#define HUNYUAN_NAMES_OF_256 \
    HUNYUAN_NAMES_OF_192 ", " HUNYUAN_NAMES_12 ", " HUNYUAN_NAMES_13 ", " HUNYUAN_NAMES_14 ", " HUNYUAN_NAMES_15

#define HUNYUAN_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HUNYUAN_SUMS(i) HUNYUAN_SUMS_4(8 * i), HUNYUAN_SUMS_4(8 * i + 4)
#define HUNYUAN_SUMS_OF_64 HUNYUAN_SUMS(0), HUNYUAN_SUMS(1), HUNYUAN_SUMS(2), HUNYUAN_SUMS(3)
#define HUNYUAN_SUMS_OF_80 HUNYUAN_SUMS_OF_64, HUNYUAN_SUMS(4)
#define HUNYUAN_SUMS_OF_96 HUNYUAN_SUMS_OF_80, HUNYUAN_SUMS(5)
#define HUNYUAN_SUMS_OF_128 HUNYUAN_SUMS_OF_96, HUNYUAN_SUMS(6), HUNYUAN_SUMS(7)
#define HUNYUAN_SUMS_OF_176 HUNYUAN_SUMS_OF_128, HUNYUAN_SUMS(8), HUNYUAN_SUMS(9), HUNYUAN_SUMS(10)
#define HUNYUAN_SUMS_OF_192 HUNYUAN_SUMS_OF_176, HUNYUAN_SUMS(11)
#define HUNYUAN_SUMS_OF_256 \
    HUNYUAN_SUMS_OF_192, HUNYUAN_SUMS(12), HUNYUAN_SUMS(13), HUNYUAN_SUMS(14), HUNYUAN_SUMS(15)

// The instruction: its shape and types, the names of the operands that follow the sums, and how they end.
#define HUNYUAN_WGMMA(N, shape, a, b, p, more) \
    "{ .reg .pred p; setp.ne.b32 p, " p ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" #N shape " {" HUNYUAN_NAMES_OF_##N "}, " a ", " b ", p, 1, 1" more "; }"

#define HUNYUAN_FROM_SHARED(N, shape, p0, p1, p2, p3, p4) \
    asm volatile(HUNYUAN_WGMMA(N, shape, #p0, #p1, #p2, ", " #p3 ", " #p4) \
                 : HUNYUAN_SUMS_OF_##N \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(A)), "n"(int(B)))
#define HUNYUAN_FROM_REGISTERS(N, shape, p0, p1, p2, p3, p4, p5, p6) \
    asm volatile(HUNYUAN_WGMMA(N, shape, "{" #p0 ", " #p1 ", " #p2 ", " #p3 "}", #p4, #p5, ", " #p6) \
                 : HUNYUAN_SUMS_OF_##N \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(B)))
// 8-bit operands are K-major always.
#define HUNYUAN_BYTES_FROM_SHARED(N, p0, p1, p2) \
    asm volatile(HUNYUAN_WGMMA(N, "k32.f32.e4m3.e4m3", #p0, #p1, #p2, "") \
                 : HUNYUAN_SUMS_OF_##N \
                 : "l"(a), "l"(b), "r"(accumulate))
#define HUNYUAN_BYTES_FROM_REGISTERS(N, p0, p1, p2, p3, p4, p5) \
    asm volatile(HUNYUAN_WGMMA(N, "k32.f32.e4m3.e4m3", "{" #p0 ", " #p1 ", " #p2 ", " #p3 "}", #p4, #p5, "") \
                 : HUNYUAN_SUMS_OF_##N \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// The instructions of one N.
template <int N>
struct Products;

// p0 to p6 are the names of what follows the sums.
#define HUNYUAN_PRODUCTS(N, p0, p1, p2, p3, p4, p5, p6) \
    template <> \
    struct Products<N> { \
        template <class T, Major B, Major A> \
        __device__ static void from_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) { \
            if constexpr (std::is_same_v<T, __half>) { \
                HUNYUAN_FROM_SHARED(N, "k16.f32.f16.f16", p0, p1, p2, p3, p4); \
            } else { \
                HUNYUAN_FROM_SHARED(N, "k16.f32.bf16.bf16", p0, p1, p2, p3, p4); \
            } \
        } \
        template <class T, Major B> \
        __device__ static void from_registers(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) { \
            if constexpr (std::is_same_v<T, __half>) { \
                HUNYUAN_FROM_REGISTERS(N, "k16.f32.f16.f16", p0, p1, p2, p3, p4, p5, p6); \
            } else { \
                HUNYUAN_FROM_REGISTERS(N, "k16.f32.bf16.bf16", p0, p1, p2, p3, p4, p5, p6); \
            } \
        } \
        __device__ static void bytes(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) { \
            HUNYUAN_BYTES_FROM_SHARED(N, p0, p1, p2); \
        } \
        __device__ static void bytes(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) { \
            HUNYUAN_BYTES_FROM_REGISTERS(N, p0, p1, p2, p3, p4, p5); \
        } \
    };

HUNYUAN_PRODUCTS(64, %32, %33, %34, %35, %36, %37, %38)
HUNYUAN_PRODUCTS(80, %40, %41, %42, %43, %44, %45, %46)
HUNYUAN_PRODUCTS(96, %48, %49, %50, %51, %52, %53, %54)
HUNYUAN_PRODUCTS(128, %64, %65, %66, %67, %68, %69, %70)
HUNYUAN_PRODUCTS(176, %88, %89, %90, %91, %92, %93, %94)
HUNYUAN_PRODUCTS(192, %96, %97, %98, %99, %100, %101, %102)
HUNYUAN_PRODUCTS(256, %128, %129, %130, %131, %132, %133, %134)

#undef HUNYUAN_PRODUCTS
#undef HUNYUAN_BYTES_FROM_REGISTERS
#undef HUNYUAN_BYTES_FROM_SHARED
#undef HUNYUAN_FROM_REGISTERS
#undef HUNYUAN_FROM_SHARED
#undef HUNYUAN_WGMMA

// d (64 x N) = a (64 x 16) b (16 x N), plus d where accumulate is not 0; a and b are descriptors. The products of a
// warpgroup are done in order, at some time before a wait: until then nothing may touch d, registers of a, or tiles.
template <class T, int N, Major B = Major::K, Major A = Major::K>
__device__ inline void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    Products<N>::template from_shared<T, B, A>(d, a, b, accumulate);
}

// With a in registers, as fragment_row and fragment_column say.
template <class T, int N, Major B = Major::K>
__device__ inline void multiply(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    Products<N>::template from_registers<T, B>(d, a, b, accumulate);
}

// d (64 x N) = a (64 x 32) b (32 x N) of 8-bit numbers: a row of an operand tile is 128 of them.
template <int N>
__device__ inline void multiply_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    Products<N>::bytes(d, a, b, accumulate);
}

template <int N>
__device__ inline void multiply_e4m3(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) {
    Products<N>::bytes(d, a, b, accumulate);
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
