// The gradients of attention on Hopper: what crosses from the host to the kernels, how tiles lie in shared memory and
// partial results in global memory, and the launchers. bf16 and fp16, 64 or 128 features.
#pragma once

#include <cstdint>

#include "rope3d_attention/sm90_layout.h"

namespace hunyuan_fast::rope3d_attention {

struct BackwardParams {
    int B = 0;
    int L = 0;                 // rows of q, out, dout and dq
    int keys = 0;              // rows of k, v, dk and dv
    int N = 0;
    int D = 0;                 // 64 or 128
    float scale = 0;           // of the scores
    float score_scale = 0;     // scale / log(2)
    Lengths lengths;           // as in HopperParams
    Lengths queries;
    Rows q;
    Rows k;
    Rows v;
    Rows out;
    Rows dout;
    Rows dq;
    Rows dk;
    Rows dv;
    float const* lse = nullptr;  // (B, N, L)
    void* workspace = nullptr;   // of backward_workspace, at a multiple of 16; what it holds before does not matter
};

constexpr int kBackwardKeys = 128;  // of a block
constexpr int kBackwardConsumers = 2;
constexpr int kBackwardThreads = (kBackwardConsumers + 1) * sm90::kWarpgroup;
constexpr int kBackwardStages = 2;

// Queries of a step.
constexpr int backward_queries(int features) { return features == 128 ? 80 : 128; }

// Bytes of tiles and where they begin in shared memory. Tiles of q, k, v and dout are blocks of 64 features with all
// their rows below each other; a tile of dS is one block of 64 keys for each consumer, its rows being queries.
template <int Features>
struct BackwardTile {
    static constexpr int kQueries = backward_queries(Features);
    static constexpr int kBlocks = Features / sm90::kRowElements;  // of 64 features
    static constexpr int kQueryBlock = kQueries * sm90::kRowBytes;
    static constexpr int kKeyBlock = kBackwardKeys * sm90::kRowBytes;
    static constexpr int kQueryBytes = kBlocks * kQueryBlock;
    static constexpr int kKeyBytes = kBlocks * kKeyBlock;
    static constexpr int kScoreBytes = kBackwardConsumers * kQueryBlock;
    static constexpr int kRowNumbers = kQueries * 4;               // one fp32 number for each query

    // dq^T of a step, 128 x 80 or 64 x 128: a consumer makes 64 rows, or all rows of 64 columns.
    static constexpr int kSumColumns = Features == 128 ? kQueries : kQueries / kBackwardConsumers;
    static constexpr int kSumQuads = kSumColumns / 8;              // groups of four sums of a thread
    static constexpr int kHalfSums = sm90::kBlockRows * kSumColumns;
    static constexpr int kSums = kBackwardConsumers * kHalfSums;
    static_assert(kSums == kQueries * Features);

    static constexpr int kKeysAt = 0;
    static constexpr int kValuesAt = kKeysAt + kKeyBytes;
    static constexpr int kQueriesAt = kValuesAt + kKeyBytes;
    static constexpr int kDoutAt = kQueriesAt + kBackwardStages * kQueryBytes;
    static constexpr int kScoresAt = kDoutAt + kBackwardStages * kQueryBytes;
    static constexpr int kSumsAt = kScoresAt + kBackwardStages * kScoreBytes;
    static constexpr int kLseAt = kSumsAt + kSums * 4;
    static constexpr int kDeltaAt = kLseAt + kBackwardStages * kRowNumbers;
    static constexpr int kBarriersAt = kDeltaAt + kBackwardStages * kRowNumbers;
    static constexpr int kBarriers = 18;                           // 17 of them, up to a multiple of 16 bytes
    static constexpr int kTicketAt = kBarriersAt + kBarriers * 8;
    static constexpr int kBytes = kTicketAt + 16;
    static constexpr int kAllocated = kBytes + sm90::kAtomBytes;   // to begin at a multiple of an atom
    static_assert(kAllocated <= sm90::kSharedBytes);

    // The last, incomplete tiles of a sequence in the order of shared memory, with zeros where rows are missing.
    static constexpr int kEdgeQueriesAt = 0;
    static constexpr int kEdgeDoutAt = kQueryBytes;
    static constexpr int kEdgeKeysAt = 2 * kQueryBytes;
    static constexpr int kEdgeValuesAt = 2 * kQueryBytes + kKeyBytes;
    static constexpr int kEdgeBytes = 2 * (kQueryBytes + kKeyBytes);
};

// What the kernels leave for each other, from the start of the workspace. A sequence is one head of one sample.
struct BackwardWorkspace {
    int64_t lse;     // (sequences, query tiles, queries) in units of log 2, +inf where there is no query
    int64_t delta;   // the same shape
    int64_t sums;    // (sequences, query tiles, sums of dq in the order of backward_sum)
    int64_t edges;   // (sequences, edge bytes)
    int64_t turns;   // (sequences, query tiles): the key tile whose share of dq is next
    int64_t ticket;  // blocks that have started
    int64_t bytes;
};

template <int Features>
HUNYUAN_HOST_DEVICE constexpr BackwardWorkspace backward_workspace(int64_t sequences, int length) {
    using Tile = BackwardTile<Features>;
    int64_t const tiles = sequences * ceil_div(length, Tile::kQueries);
    BackwardWorkspace w{};
    w.lse = 0;
    w.delta = w.lse + tiles * Tile::kRowNumbers;
    w.sums = w.delta + tiles * Tile::kRowNumbers;
    w.edges = w.sums + tiles * Tile::kSums * 4;
    w.turns = w.edges + sequences * Tile::kEdgeBytes;
    w.ticket = w.turns + (tiles + 3) / 4 * 16;
    w.bytes = w.ticket + 16;
    return w;
}

// Where dq lies among the sums of a tile: number `e` of the four that a thread of a consumer moves at a time.
template <int Features>
HUNYUAN_HOST_DEVICE constexpr int backward_sum_at(int consumer, int quad, int thread) {
    return consumer * BackwardTile<Features>::kHalfSums + (quad * sm90::kWarpgroup + thread) * 4;
}
template <int Features>
HUNYUAN_HOST_DEVICE constexpr int backward_sum_feature(int consumer, int quad, int thread, int e) {
    return (Features == 128 ? consumer * sm90::kBlockRows : 0) + sm90::accumulator_row(thread, 4 * quad + e);
}
template <int Features>
HUNYUAN_HOST_DEVICE constexpr int backward_sum_query(int consumer, int quad, int thread, int e) {
    return (Features == 128 ? 0 : consumer * BackwardTile<Features>::kSumColumns) +
           sm90::accumulator_column(thread, 4 * quad + e);
}

// Which keys of which sequence a block takes, by its ticket: `width` sequences side by side, the first keys of all of
// them, then the second ones, and so on.
struct BackwardWork {
    int sequence;
    int key_tile;
};

HUNYUAN_HOST_DEVICE constexpr BackwardWork backward_work(int ticket, int sequences, int key_tiles, int width) {
    int const group = ticket / (width * key_tiles), place = ticket % (width * key_tiles);
    int const first = group * width, here = sequences - first < width ? sequences - first : width;
    return {first + place % here, place / here};
}

// Blocks of a sequence follow each other through its query tiles, some steps apart. The distance of the first from the
// last of all blocks that run at a time is to be small beside a round: it is lost where the work ends, and where a
// block is late those behind it wait. The more sequences, the smaller it is, and the more comes from memory, of which
// there is little need (a block takes 40 KB a step, and with eight sequences a sixteenth of it from memory).
constexpr int kBackwardLag = 16;
constexpr int backward_width(int processors, int query_tiles, int sequences) {
    int const width = ceil_div(processors * kBackwardLag, query_tiles > 0 ? query_tiles : 1);
    return width < sequences ? width : sequences;
}

inline int64_t backward_workspace_bytes(BackwardParams const& p) {
    int64_t const sequences = int64_t(p.B) * p.N;
    return p.D == 64 ? backward_workspace<64>(sequences, p.L).bytes : backward_workspace<128>(sequences, p.L).bytes;
}

void run_backward_bf16(BackwardParams const& params, void* stream);
void run_backward_f16(BackwardParams const& params, void* stream);

}  // namespace hunyuan_fast::rope3d_attention
