// Lightning Indexer logits of listed blocks (DeepSeek-V4.1): each row has a list of blocks of kBlock keys, and column
// j * kBlock + o of it is the logit of key o of its jth block:
//
//   logits[row, column] = sum_h weights[row, h] * relu(query[row, h] . key)
//
// with UE8M0 scales for every 32 elements of both sides, all sums fp32. Rows and columns are taken as those of a paged cache
// (rows.cuh): the columns of a row are its keys, and keys.cuh finds them.
//
// Grid    one block for each slot.
// One     row is `SparseEights`, below, where it has no more blocks than the grid's warps take.
// Many    rows are a prefill, whose neighbours have most blocks in common and lists in the same order. The warps of a block
//         take neighbours over the same columns, so they come to the blocks that they share at about the same time, and find
//         them in L1.
// Bound   32 heads of FP4: 16 mma for 32 keys and one row, 256 clocks of a tensor pipe, against 2176 bytes of keys, 70
//         wavefronts of L1 and 16 bytes of places. 4,096 rows of 16,384 keys that each came out of L2 alone were 4.5 GB.
#pragma once

#include "rows.cuh"

struct SparseParams {
    Queries queries;
    Listed keys;
    Output output;
    Lists windows;
    int rows_per_group;          // many rows
    FewRows few;                 // few rows

    __device__ int2 entry(int slot, const Lane& lane) const { return windows.entry(slot, gridDim.x, lane); }
};

template <class Format, int kHeads, int kPage, int kBlock, class Weight, class Logit, int kWarps>
using Sparse = Rows<SparseParams, Format, kHeads, ListedKeys<kPage, kBlock, Format::kRowBytes>, Weight, Logit, kWarps, 1>;

// One row (a decode step of one request) of no more blocks than the grid's warps take: each takes eight keys that lie together,
// neighbours are in one block, so that it finds their places in a sector or two. Two round trips follow each other, and nothing
// is looked for: the place of the keys, then they; meanwhile the query comes. It is the same in all warps of a block: each asks
// for eight heads of it and finds the others in shared memory. Warps wait for each other there alone, while keys are on their
// way; else each comes to its end as soon as its own keys are there, so that the slowest place is not added to the slowest keys.
template <class Format, int kHeads, int kPage, int kBlock, class Weight, class Logit, int kWarps>
struct SparseEights {
    using Source = ListedKeys<kPage, kBlock, Format::kRowBytes>;
    using Scorer = ::Scorer<Format, kHeads, 1, Weight>;
    using QueryScales = typename Format::template QueryScales<Scorer::kHeadTiles>;
    static_assert(Format::kScaleFirst && 2 * Scorer::kHeadTiles < kWarps);

    // What the lanes of a warp hold of the query, see score.cuh.
    struct Query {
        alignas(16) uint32 fragments[Scorer::kHeadTiles][Format::kSteps][32][4];
        uint32 weights[Scorer::kHeadTiles][2][32];     // as they were loaded
        QueryScales scales[32];
    };

    __device__ static void run(const SparseParams& p) {
        ptx::griddepcontrol();
        const Lane lane;
        const uint32 warp = threadIdx.x / 32, eight = blockIdx.x * kWarps + warp, last = p.windows.limit / 8 - 1;
        const uint8* list = p.keys.metadata + kFirstRow + sizeof(RowHead);
        uint32 place = ptx::load_word(list + 4 * (min(eight, last) / Source::kEights));
        const RowHead head = p.windows.asked(0);

        uint32 heads[Format::kLoaded] = {}, weight = 0;           // heads that pad the last tile weigh nothing
        QueryScales scales = {};
        if (warp < kHeads / 8) {
            const uint32 row = 8 * warp + lane.g;
            Format::load(heads, p.queries.values + row * Format::kRowBytes + Format::lane_offset(lane));
            const uint8* its = p.queries.weights + row * sizeof(Weight);
            weight = sizeof(Weight) == 4 ? ptx::load_word(its) : ptx::load_half(its);
        } else if (warp == kWarps - 1) {
            scales.load(p.queries.scales, kHeads, lane);
        }

        const uint32 count = p.windows.columns(head) / 8;
        uint32 keys[Format::kLoaded] = {}, scale = 0;
        if (eight < count) {
            if (kPage) place = min(place, p.keys.places - 1);
            Format::load(keys, Source::template of<Format::kRowBytes>(p.keys, p.keys.values, place, eight, lane.g,
                                                                      Format::lane_offset(lane)));
            scale = ptx::load_word(Source::template of<4>(p.keys, Source::scales(p.keys), place, eight, lane.g, 0));
        }

        __shared__ Query query;
        if (warp < 2 * Scorer::kHeadTiles) {
            uint32 words[Format::kWords];
            Format::widen(words, heads);
            #pragma unroll
            for (int i = 0; i < Format::kWords; ++i) {
                query.fragments[warp / 2][i / 2][lane.id][warp % 2 + 2 * (i % 2)] = words[i];
            }
            query.weights[warp / 2][warp % 2][lane.id] = weight;
        } else if (warp == kWarps - 1) {
            query.scales[lane.id] = scales;
        }
        __syncthreads();
        if (eight >= count) return;

        Scorer scorer;
        #pragma unroll
        for (int m = 0; m < Scorer::kHeadTiles; ++m) {
            #pragma unroll
            for (int i = 0; i < 4 * Format::kSteps; ++i) {
                scorer.fragments[0][m][i / 4][i % 4] = query.fragments[m][i / 4][lane.id][i % 4];
            }
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32 loaded = query.weights[m][half][lane.id];
                scorer.weights[0][m][half] = __uint_as_float(sizeof(Weight) == 4 ? loaded : loaded << 16);
            }
        }
        scorer.scales[0] = query.scales[lane.id];
        Stored<Logit> sink;
        sink.open(p.output, 0, {0, int(8 * count)}, false);
        const float logit = Format::finish(scorer.eight(0, keys, scale, lane), scale);
        sink.template take<kApartOfEight>(lane.g < 2 ? 8 * eight + scorer.key_of_eight(lane) : kNoKey, logit);
    }
};
