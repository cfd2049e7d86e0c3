// parallel_for: fixed pieces of a loop on the threads that torch computes with.
//
// torch's OpenMP threads spin for a while after each of its ops, in expectation of the next. Threads of
// our own would fight them for the processors: on two cores an op of 120 us took 130 to 365 us after an
// op of torch, against 72 us on torch's own threads. So the runtime that torch has loaded is looked up
// when a loop first runs, and nothing is linked: a wheel needs no OpenMP. Without one, plain C++ threads
// do the work. Python hands over torch.get_num_threads(), so that one setting rules both.
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
