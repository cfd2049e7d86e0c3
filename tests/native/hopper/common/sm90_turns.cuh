// The functions of csrc/common/sm90_turns.cuh, done by the emulated machine: blocks run one after the other, so whoever
// is not there yet will never be.
#pragma once

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

inline int take_ticket(int* counter) { return atomicAdd(counter, 1); }

inline void wait_for_turn(int const* turn, int value) {
    if (*turn != value) hopper::fail("waits for turn %d, and it is that of %d", value, *turn);
}

inline void pass_turn(int* turn, int next) {
    hopper::demand_stores("pass_turn");
    *turn = next;
}

}  // namespace hunyuan_fast::sm90
