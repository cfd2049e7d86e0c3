// A hint for large outputs that are about to be written for the first time.
#pragma once

#include <cstdint>

namespace hunyuan_fast {

// Asks for pages of 2 MB under memory that nobody has touched yet. glibc's allocator never keeps a block of
// more than 32 MB for the next call: each such output comes from the system anew, in pages of 4 KB, whose
// faults cost an elementwise op several times what it computes. Smaller blocks are reused and left alone.
// Where there is no support, or huge pages are off, nothing happens.
void prefer_huge_pages(void* data, int64_t num_bytes);

}  // namespace hunyuan_fast
