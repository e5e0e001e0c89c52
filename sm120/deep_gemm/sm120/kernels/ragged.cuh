// Lightning Indexer logits against one run of keys, of which each token sees a window:
//
//   logits[token, key] = scale[key] * sum_h weights[token, h] * relu(query[token, h] . key)
//
// Grid    blockIdx.x: a group of neighbouring tokens; blockIdx.y: a share of the keys that they see.
// What a block and its warps do with them stands in group.cuh and stream.cuh.
#pragma once

#include "group.cuh"

struct RaggedParams {
    Queries queries;
    Run keys;
    Output output;
    Windows windows;
    int columns;                 // compressed: column 0 is the row's first key, and there are so many; else 0
};
static_assert(sizeof(RaggedParams) == PARAMS_BYTES, "the launcher packs a different struct");

template <class Format, int kHeads, class Weight, class Logit, int kWarps, int kTokens>
struct Ragged {
    using Group = ::Group<Format, kHeads, kTokens, Weight, RunOfKeys<Format::kRowBytes>, Logit, kWarps>;

    // Lane i's is that of token i of a group.
    __device__ static Window window_of(const RaggedParams& p, int first_token, const Lane& lane) {
        const int token = first_token + lane.id;
        if (lane.id >= Group::kSize || token >= p.windows.rows) return {0, 0};
        Window window = p.windows.of(token);
        if (p.columns) window.end = min(window.end, window.begin + p.columns);
        return window;
    }

    __device__ static void run(const RaggedParams& p) {
        ptx::griddepcontrol();
        const Lane lane;
        const int first_token = blockIdx.x * Group::kSize;
        const Window mine = window_of(p, first_token, lane);
        const bool empty = mine.begin >= mine.end;
        const int first = __reduce_min_sync(kAllLanes, empty ? kNever : mine.begin / kTile);
        const int last = __reduce_max_sync(kAllLanes, empty ? 0 : (mine.end - 1) / kTile + 1);
        if (first >= last) return;
        const int share = (last - first - 1) / int(gridDim.y) + 1;
        const int from = first + int(blockIdx.y) * share, to = min(last, from + share);
        for (int tile = from; tile < to;) {
            tile = Group::score_span(p, first_token, window_of(p, first_token, lane), tile, to, p.columns > 0, lane);
        }
    }
};
