// Large outputs: where their memory comes from, and how it is written.
#pragma once

#include "common/tensor_view.h"

namespace hunyuan_fast {

inline constexpr int64_t kStreamAlignment = 64;

// Whether the rows of an output are better written past the caches. It is so large that whoever reads it next
// finds little of it in a cache anyway; then a cache that reads each line before it is written makes a quarter
// to a half of all traffic. Every row must start at a multiple of kStreamAlignment.
bool worth_streaming(TensorView const& rows);

// Asks for pages of 2 MB under an output that nobody has touched yet. The allocator gives large blocks back to
// the system and gets them anew in pages of 4 KB, whose faults cost an elementwise op several times what it
// computes. Smaller blocks are reused and left alone. Where there is no support, or huge pages are off, nothing
// happens.
void prefer_huge_pages(TensorView const& fresh);

}  // namespace hunyuan_fast
