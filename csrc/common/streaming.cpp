#include "common/streaming.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hunyuan_fast {
namespace {

constexpr int64_t kMiB = 1024 * 1024;
constexpr int64_t kLeastStreamed = 8 * kMiB;  // about what one core has of the last cache
constexpr int64_t kLeastHuge = 4 * kMiB;      // two pages of 2 MB

int64_t bytes_of(TensorView const& t) { return t.numel() * element_size(t.dtype); }

}  // namespace

bool worth_streaming(TensorView const& rows) {
    if (bytes_of(rows) < kLeastStreamed) return false;
    bool aligned = reinterpret_cast<uintptr_t>(rows.data) % kStreamAlignment == 0;
    for (int i = 0; i < rows.ndim - 1; ++i) {
        aligned = aligned && rows.stride[i] * element_size(rows.dtype) % kStreamAlignment == 0;
    }
    return aligned;
}

void prefer_huge_pages(TensorView const& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes_of(fresh) < kLeastHuge || !fresh.is_contiguous()) return;
    static uintptr_t const page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    uintptr_t const data = reinterpret_cast<uintptr_t>(fresh.data);
    uintptr_t const begin = (data + page - 1) / page * page;
    uintptr_t const end = (data + static_cast<uintptr_t>(bytes_of(fresh))) / page * page;
    // a hint: whether it is taken makes no difference to what is computed
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)fresh;
#endif
}

}  // namespace hunyuan_fast
