#include "common/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace hunyuan_fast {
namespace {

constexpr int64_t kLargestReused = 32 * 1024 * 1024;  // DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits

}  // namespace

void prefer_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (num_bytes < kLargestReused) return;
    static uintptr_t const page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    uintptr_t const begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    uintptr_t const end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes)) / page * page;
    // a hint: whether it is taken makes no difference to what is computed
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data;
    (void)num_bytes;
#endif
}

}  // namespace hunyuan_fast
