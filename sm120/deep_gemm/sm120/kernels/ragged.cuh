// Lightning Indexer logits against one run of keys, of which each token sees a window:
//
//   logits[token, key] = scale[key] * sum_h weights[token, h] * relu(query[token, h] . key)
//
// Grid    one block an SM. Each takes several groups of neighbouring tokens in turn, and of their keys a part. Its warps go
//         from one to the next without waiting for each other.
// Lane    i has the window of token i of a group.
// Bound   the tensor pipe: rows share their keys.
// What a block and its warps do with a group stands in group.cuh and stream.cuh.
#pragma once

#include "group.cuh"

struct RaggedParams {
    Queries queries;
    Run keys;
    Output output;
    Windows windows;
    int columns;                 // compressed: column 0 is the row's first key, and there are so many; else 0
    int groups, parts, stripes;  // of tokens; of the keys of each group; of the list of all parts
};

template <class Format, int kHeads, class Weight, class Logit, int kWarps, int kTokens>
struct Ragged {
    using Group = ::Group<Format, kHeads, kTokens, Weight, RunOfKeys<Format::kRowBytes>, Logit, kWarps>;

    // Lane i's is that of token i of a group.
    __device__ static Window window_of(const RaggedParams& p, int first_token, const Lane& lane) {
        const int token = first_token + lane.id;
        if (lane.id >= Group::kSize || token >= p.windows.rows) return {0, 0};
        Window window = p.windows.of(token);
        if (p.columns) window.end = window.begin + min(window.end - window.begin, p.columns);
        return window;
    }

    // The list of all parts, group after group, is cut in stripes, each stripe in pieces, one for each block: in every
    // second stripe in reverse order, so that a block has as much of the short windows at one end as of the long ones at the
    // other. Parts `from` to `to` are the piece of this block.
    __device__ static void piece_of(const RaggedParams& p, int stripe, int& from, int& to) {
        const int parts = p.groups * p.parts, blocks = gridDim.x;
        const int longest = (parts - 1) / p.stripes + 1, first = stripe * longest, count = min(longest, parts - first);
        const int block = stripe % 2 ? blocks - 1 - blockIdx.x : blockIdx.x;
        const int piece = count / blocks, longer = count % blocks;
        from = first + piece * block + min(block, longer), to = first + piece * (block + 1) + min(block + 1, longer);
    }

    __device__ static void run(const RaggedParams& p) {
        ptx::griddepcontrol();
        const Lane lane;
        // The stripe, the parts that are done, and how far the next ones of the same group have come; all else is worked out
        // anew in each turn: registers are dearer.
        for (int stripe = 0, done = 0, tile = 0; stripe < p.stripes;) {
            int from, to;
            piece_of(p, stripe, from, to);
            from = max(from, done);
            const int group = from / p.parts, first_token = group * Group::kSize;
            from -= group * p.parts, to = min(to - group * p.parts, p.parts);
            if (from >= to) { ++stripe; continue; }
            const Window mine = window_of(p, first_token, lane);
            const bool empty = mine.begin >= mine.end;
            const int first = __reduce_min_sync(kAllLanes, empty ? kNever : mine.begin / kTile);
            const int last = __reduce_max_sync(kAllLanes, empty ? 0 : (mine.end - 1) / kTile + 1);
            const int tiles = max(last - first, 0), share = tiles / p.parts, longer = tiles - share * p.parts;
            tile = max(tile, first + share * from + min(from, longer));
            tile = Group::score_span(p, first_token, mine, tile, first + share * to + min(to, longer), p.columns > 0, lane);
            if (tile == kNever) done = group * p.parts + to, tile = 0;
        }
    }
};
