// What a thread knows to have happened: a vector clock. A component counts events of one source: a thread's own steps,
// phases of a barrier, products that a warpgroup has waited for, stores of a thread that have read. Waits and barriers
// hand knowledge on. Two accesses of which neither knows of the other are a race, in whatever order they came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace hopper {

// The event after which something is over.
struct Stamp {
    int component = -1;  // none
    uint32_t count = 0;
};

class Clock {
public:
    Clock() = default;
    explicit Clock(int components) : counts_(2 * size_t(components)) {}

    bool knows(Stamp const& stamp) const {
        return stamp.component < 0 || counts_[size_t(stamp.component)] >= stamp.count;
    }
    // Whether a proxy fence has followed since, on the way here.
    bool knows_fenced(Stamp const& stamp) const {
        return stamp.component < 0 || counts_[half() + size_t(stamp.component)] >= stamp.count;
    }

    void learn(Stamp const& stamp) {
        uint32_t& count = counts_[size_t(stamp.component)];
        count = std::max(count, stamp.count);
    }
    void learn(Clock const& other) {
        for (size_t i = 0; i < counts_.size(); ++i) counts_[i] = std::max(counts_[i], other.counts_[i]);
    }
    // What both know.
    void keep(Clock const& other) {
        for (size_t i = 0; i < counts_.size(); ++i) counts_[i] = std::min(counts_[i], other.counts_[i]);
    }
    void fence() {
        for (size_t i = 0; i < half(); ++i) counts_[half() + i] = std::max(counts_[half() + i], counts_[i]);
    }

    int components() const { return int(half()); }
    Stamp now(int component) const { return {component, counts_[size_t(component)]}; }
    void step(int component) { ++counts_[size_t(component)]; }

private:
    size_t half() const { return counts_.size() / 2; }

    std::vector<uint32_t> counts_;  // known, then known and fenced
};

}  // namespace hopper
