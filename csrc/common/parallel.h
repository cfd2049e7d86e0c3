// parallel_for: fixed pieces of a loop on a pool of threads that lives as long as the process.
//
// Plain C++ threads: a wheel then needs no OpenMP runtime beside torch's own, and Python hands over
// torch.get_num_threads(), so that one setting rules both.
#pragma once

#include <cstdint>

namespace hunyuan_fast {

using Piece = void (*)(void const* body, int64_t first, int64_t last);

void run_pieces(int64_t count, int64_t grain, int num_threads, Piece piece, void const* body);

// Calls body(first, last) for [0, grain), [grain, 2 * grain), ... up to count, each exactly once, on
// at most num_threads threads, and returns when all are done. The pieces do not depend on the number
// of threads: what is summed within a piece is the same bit for bit on every machine. The body must
// not throw and must not touch Python. A parallel_for inside a body, or one that meets another
// already running, works through its pieces alone.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int num_threads, Body const& body) {
    Piece const piece = [](void const* self, int64_t first, int64_t last) {
        (*static_cast<Body const*>(self))(first, last);
    };
    run_pieces(count, grain, num_threads, piece, &body);
}

}  // namespace hunyuan_fast
