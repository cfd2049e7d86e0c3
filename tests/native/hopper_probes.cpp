// sm90_probes.cuh on the emulated machine.
#include "common/sm90_tensor_map.cu"

#include "sm90_probes.cuh"

using namespace hunyuan_fast;

extern "C" {

char const* share(void const* from, void* to, int64_t rows, int64_t heads, int64_t rounds) {
    return hopper::attempt(
        [&] { probes::share(from, static_cast<uint4*>(to), int(rows), int(heads), int(rounds), nullptr); });
}

char const* multiply_bytes(void const* a, void const* b, float const* values, float* d) {
    return hopper::attempt([&] { probes::multiply_bytes(a, b, values, d, nullptr); });
}

char const* multiply_tails(__nv_bfloat16 const* a, __nv_bfloat16 const* b, float* d, int64_t valid) {
    return hopper::attempt([&] { probes::multiply_tails(a, b, d, int(valid), nullptr); });
}

char const* add_in_turns(float* sums, int* counters, int64_t blocks) {
    return hopper::attempt([&] { probes::add_in_turns(sums, counters, int(blocks), nullptr); });
}

}  // extern "C"
