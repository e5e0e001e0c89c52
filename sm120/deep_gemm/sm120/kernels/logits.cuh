// Lightning Indexer logits:   logits[token, key] = scale[key] * sum_h weights[token, h] * relu(query[token, h] . key)
//
// Grid    paged: one block for each slot of the schedule. Ragged: blockIdx.x is a group of `kWarps` neighbouring tokens,
//         blockIdx.y a share of the keys that they see.
// Block   works on a *group* of query tokens that (are likely to) see the same keys: the next_n tokens of a request, or of
//         `rows_per_group` neighbouring rows. Its warps share out the tokens first, then the keys, without ever meeting: a
//         key leaves L2 once and is found in L1 by the warps of the other tokens.
// Warp    one token, whose whole query stays in registers as A fragments (16 heads a tile), with its weights. Keys stream
//         past in tiles of 16, from global memory straight into B fragments: the loads of the next tile and the page of the
//         one after it are in flight while this one multiplies. No shared memory, no barrier.
// Lane    (g = lane / 4, t = lane % 4) holds heads g and g + 8 of each head tile and a quarter of keys g and g + 8. Scores
//         come out as [head g, g + 8][key 2t, 2t + 1]; relu and weights are applied on them, the eight quads are summed with
//         four shuffles, and lanes 0..15 store one logit each.
// Bound   64 heads of 128: 32 FP8 or 16 FP4 mma for 16 keys and one token, 512 or 256 clocks of a tensor pipe, against 2112
//         or 1088 bytes. One token a request is bound by DRAM; more tokens, or rows that share keys, by the tensor pipe.
#pragma once

#include "formats.cuh"
#include "window.cuh"

struct Params {
    const uint8* query;          // [tokens][heads][row bytes]
    const uint32* query_scales;  // [tokens][heads]                              FP4
    const uint8* weights;        // [tokens][weights_stride], fp32 or bf16
    const uint8* keys;           // [pages][page_stride]                         paged: a page is its values, then its scales
                                 // [num_keys][row bytes]                        ragged
    const uint32* key_scales;    // [num_keys]                                   ragged
    const int* block_table;      // [rows][table_stride] page numbers            paged
    const int2* schedule;        // [slots + 1] (row, split of 256 keys)         paged
    uint8* logits;               // [tokens][logits_stride]
    int64 table_stride;          // elements
    int64 weights_stride;        // elements
    int64 logits_stride;         // elements
    uint32 page_stride;          // bytes
    int rows_per_group;          // paged
    int columns;                 // ragged, compressed: column 0 is the row's first key, and there are so many; else 0
    Windows windows;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher packs a different struct");

constexpr int kTile = 16;                     // keys a warp takes at a time
constexpr int kTilesPerSplit = 256 / kTile;   // the schedule counts in splits
constexpr uint32 kAllLanes = 0xffffffff;
constexpr int kNever = 0x7fffffff;

template <class Format, int kHeads, int kPage, class Weight, class Logit, int kWarps>
struct Indexer {
    static constexpr bool kPaged = kPage > 0;
    static constexpr int kHeadTiles = (kHeads + 15) / 16;
    static_assert(kHeads % 8 == 0 && kHeads <= 64 && kPage % kTile == 0 && kWarps <= 32);

    // ---- what stays: one token's query and weights ---------------------------------------------------------------------

    struct Query {
        int token = -1;
        uint32 fragments[kHeadTiles][Format::kSteps][4];
        typename Format::template QueryScales<kHeadTiles> scales;
        float weights[kHeadTiles][2];

        __device__ void load(const Params& p, int new_token, const Lane& lane) {
            if (token == new_token) return;
            token = new_token;
            const int64 first_head = int64(token) * kHeads;
            const uint32 zero = p.windows.rows >> 31;   // unknown to the compiler: it would keep the vectors as they were loaded
                                                // and copy four words before every mma (4 of 9 instructions, 24 Nov 2026)
            #pragma unroll
            for (int m = 0; m < kHeadTiles; ++m) {
                uint32 rows[2][Format::kWords];
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int head = 16 * m + 8 * half + lane.g;
                    uint32 loaded[Format::kLoaded] = {};
                    weights[m][half] = 0;     // heads that pad the last tile weigh nothing
                    if (16 * m + 8 * half < kHeads) {
                        Format::load(loaded, p.query + (first_head + head) * Format::kRowBytes + Format::lane_offset(lane));
                        weights[m][half] = weight(p.weights + (token * p.weights_stride + head) * sizeof(Weight));
                    }
                    Format::widen(rows[half], loaded);
                }
                #pragma unroll
                for (int s = 0; s < Format::kSteps; ++s) {
                    fragments[m][s][0] = rows[0][2 * s] ^ zero;
                    fragments[m][s][1] = rows[1][2 * s] ^ zero;
                    fragments[m][s][2] = rows[0][2 * s + 1] ^ zero;
                    fragments[m][s][3] = rows[1][2 * s + 1] ^ zero;
                }
            }
            scales.load(p.query_scales + first_head, kHeads, lane);
        }

        __device__ static float weight(const uint8* address) {
            if constexpr (sizeof(Weight) == 4) return __uint_as_float(ptx::load_word(address));
            else return __uint_as_float(ptx::load_half(address) << 16);
        }
    };

    // ---- what streams: 16 keys -----------------------------------------------------------------------------------------

    struct Keys {
        uint32 words[2][Format::kLoaded];     // keys g and g + 8
        uint32 scale;

        // Keys past `last` are not there: the last one is read in their place, and not stored.
        __device__ void load(const Params& p, uint32 tile, uint32 page, uint32 last, const Lane& lane) {
            const uint8 *values = p.keys + Format::lane_offset(lane), *scales;
            uint32 slot = 0;
            if constexpr (kPaged) {
                slot = tile % (kPage / kTile) * kTile;
                values += int64(page) * p.page_stride;
                scales = p.keys + kPage * Format::kRowBytes + int64(page) * p.page_stride;
            } else {
                values += int64(tile) * (kTile * Format::kRowBytes);
                scales = reinterpret_cast<const uint8*>(p.key_scales) + int64(tile) * (kTile * 4);
            }
            #pragma unroll
            for (uint32 j = 0; j < 2; ++j) {
                Format::load(words[j], values + (slot + min(8 * j + lane.g, last)) * Format::kRowBytes);
            }
            scale = ptx::load_word(scales + (slot + min(Format::scale_key(lane, stored_key(lane)), last)) * 4);
        }
    };

    // Which of a tile's keys a lane has the sum of, after `sum_over_quads`.
    __device__ static uint32 stored_key(const Lane& lane) {
        return 8 * (lane.g & 1) + 2 * lane.t + (lane.g >> 1 & 1);
    }

    // sums[8 keys j, column c] over the eight quads: lanes 4 apart split the keys, lanes 8 apart the columns.
    __device__ static float sum_over_quads(const float (&sums)[2][2], const Lane& lane) {
        const bool upper = lane.g & 1, odd = lane.g & 2;
        float half[2];
        #pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float given = upper ? sums[0][c] : sums[1][c];
            half[c] = (upper ? sums[1][c] : sums[0][c]) + __shfl_xor_sync(kAllLanes, given, 4);
        }
        const float given = odd ? half[0] : half[1];
        const float sum = (odd ? half[1] : half[0]) + __shfl_xor_sync(kAllLanes, given, 8);
        return sum + __shfl_xor_sync(kAllLanes, sum, 16);
    }

    template <int KeyTile, int Step = 0>
    __device__ static void multiply(float (&scores)[kHeadTiles][4], const Query& query,
                                    const uint32 (&words)[Format::kWords], uint32 scale, const Lane& lane) {
        Format::template multiply<Step, KeyTile>(scores, query.fragments, query.scales, words, scale, lane);
        if constexpr (Step + 1 < Format::kSteps) multiply<KeyTile, Step + 1>(scores, query, words, scale, lane);
    }

    template <int KeyTile>
    __device__ static void score_keys(float (&sums)[2], const Query& query, const Keys& keys, const Lane& lane) {
        uint32 words[Format::kWords];
        Format::widen(words, keys.words[KeyTile]);
        float scores[kHeadTiles][4] = {};
        multiply<KeyTile>(scores, query, words, keys.scale, lane);
        #pragma unroll
        for (int m = 0; m < kHeadTiles; ++m) {
            #pragma unroll
            for (int i = 0; i < 4; ++i) sums[i % 2] += query.weights[m][i / 2] * ptx::relu(scores[m][i]);
        }
    }

    // ---- the loop: one token, tiles from, from + step, ... below to ------------------------------------------------------

    __device__ static void stream(const Params& p, Query& query, int token, Window window,
                                  int tile, int step, int to, const Lane& lane) {
        if (tile >= to) return;
        const int* table = kPaged ? p.block_table + token / p.windows.next_n * p.table_stride : nullptr;
        const auto page_of = [&](uint32 t) { return kPaged ? ptx::load_word(table + t / (kPage / kTile)) : 0; };
        const int readable = kPaged ? window.end : p.windows.limit;
        const int first_column = kPaged || p.columns ? 0 : window.begin;
        Logit* first_logit = reinterpret_cast<Logit*>(p.logits) + token * p.logits_stride + first_column;
        const int stored = int(stored_key(lane)) - window.begin;
        const uint32 width = lane.id < 16 ? window.end - window.begin : 0;

        uint32 page = page_of(tile);
        query.load(p, token, lane);
        const auto fetch = [&](Keys& keys, int t) {
            keys.load(p, t, page, readable - 1 - t * kTile, lane);
            if (t + step < to) page = page_of(t + step);
        };
        const auto score = [&](const Keys& keys, int t) {
            float sums[2][2] = {};
            score_keys<0>(sums[0], query, keys, lane);
            score_keys<1>(sums[1], query, keys, lane);
            const float logit = Format::finish(sum_over_quads(sums, lane), keys.scale);
            const uint32 n = t * kTile + stored;       // keys before the window wrap around
            if (n < width) first_logit[n] = Logit(logit);
        };

        Keys even, odd;                       // two tiles in turn, so that no register is ever moved
        fetch(even, tile);
        while (true) {
            if (tile + step < to) fetch(odd, tile + step);
            score(even, tile);
            if ((tile += step) >= to) break;
            if (tile + step < to) fetch(even, tile + step);
            score(odd, tile);
            if ((tile += step) >= to) break;
        }
    }

    // ---- who takes what ------------------------------------------------------------------------------------------------

    __device__ static Window window_of(const Params& p, int token) {
        Window window = p.windows.of(token);
        if (p.columns) window.end = min(window.end, window.begin + p.columns);
        return window;
    }

    // Scores tiles [tile_begin, tile_end) for up to kWarps tokens. Where the set of tokens that have keys changes, the warps
    // are dealt out anew, so none waits on a long row among short ones. Returns where the longest window ends, in tiles.
    __device__ static int score_tokens(const Params& p, Query& query, int first_token, int count,
                                       int tile_begin, int tile_end, const Lane& lane) {
        const int warp = threadIdx.x / 32;
        const Window mine = lane.id < count ? window_of(p, first_token + lane.id) : Window{0, 0};
        const bool empty = mine.begin >= mine.end;
        const int first = empty ? 0 : mine.begin / kTile, last = empty ? 0 : (mine.end - 1) / kTile + 1;

        for (int from = tile_begin, to; from < tile_end; from = to) {
            const bool active = first <= from && from < last;
            to = min(tile_end, __reduce_min_sync(kAllLanes, active ? last : first > from ? first : kNever));
            const uint32 actives = __ballot_sync(kAllLanes, active);
            const int tokens = __popc(actives);
            if (tokens == 0) continue;
            const int share = warp / tokens, shares = kWarps / tokens;
            const int rank = __popc(actives & ((1u << lane.id) - 1));
            const int chosen = __ffs(__ballot_sync(kAllLanes, active && rank == warp % tokens)) - 1;
            const Window window{__shfl_sync(kAllLanes, mine.begin, chosen), __shfl_sync(kAllLanes, mine.end, chosen)};
            if (share < shares) stream(p, query, first_token + chosen, window, from + share, shares, to, lane);
        }
        return __reduce_max_sync(kAllLanes, last);
    }

    // More tokens than warps take turns on a piece of the keys that L1 holds.
    __device__ static void score_group(const Params& p, Query& query, int first_token, int count,
                                       int tile_begin, int tile_end, const Lane& lane) {
        constexpr int kPieceTiles = 32;
        for (int from = tile_begin, to, last = kNever; from < min(tile_end, last); from = to) {
            to = count <= kWarps ? tile_end : min(tile_end, from + kPieceTiles);
            last = 0;
            for (int i = 0; i < count; i += kWarps) {
                last = max(last, score_tokens(p, query, first_token + i, min(kWarps, count - i), from, to, lane));
            }
        }
    }

    // ---- paged: a slot of the schedule ---------------------------------------------------------------------------------

    // The first row from `row` on that has keys; `limit` if there is none. Padded batches have many that have not.
    __device__ static int next_row(const Params& p, int row, int limit, const Lane& lane) {
        constexpr int kAtOnce = 4;
        const int lengths = limit * p.windows.lengths_per_row;
        for (int first = row * p.windows.lengths_per_row; first < lengths; first += 32 * kAtOnce) {
            bool some[kAtOnce];
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int j = first + 32 * i + lane.id;
                some[i] = j < lengths && p.windows.ends[j] > 0;
            }
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const uint32 found = __ballot_sync(kAllLanes, some[i]);
                if (found) return (first + 32 * i + __ffs(found) - 1) / p.windows.lengths_per_row;
            }
        }
        return limit;
    }

    // The tile at which a boundary of the schedule cuts a group of rows: it leaves as much work of the group behind it as
    // the schedule has planned before (row, split). Both slots that meet there compute the same tile.
    __device__ static int boundary(const Params& p, int2 entry, int first_row, int rows, const Lane& lane) {
        if (entry.x < first_row) return 0;
        if (entry.x >= first_row + rows) return kNever;
        if (rows == 1) return entry.y * kTilesPerSplit;
        // Of this lane's row, as planned: whole splits.
        const int tiles = lane.id < rows ? (p.windows.longest(first_row + lane.id) + 255) / 256 * kTilesPerSplit : 0;
        const int row = entry.x - first_row;
        int work = lane.id < row ? tiles : lane.id == row ? min(tiles, entry.y * kTilesPerSplit) : 0;
        work = __reduce_add_sync(kAllLanes, work);
        // Solve sum over rows of min(tiles, cut) = work: a concave function, so Newton's steps approach from below.
        int cut = 0;
        while (true) {
            const int active = __popc(__ballot_sync(kAllLanes, tiles > cut));
            const int missing = work - __reduce_add_sync(kAllLanes, min(tiles, cut));
            if (active == 0) return kNever;
            if (missing < active) return cut;
            cut += missing / active;
        }
    }

    __device__ static void run_slot(const Params& p) {
        const Lane lane;
        const int2 begin = p.schedule[blockIdx.x], end = p.schedule[blockIdx.x + 1];
        if (begin.x == end.x && begin.y >= end.y) return;
        const int limit = min(p.windows.rows, end.x + (end.y > 0));
        Query query;
        for (int row = begin.x; (row = next_row(p, row, limit, lane)) < limit;) {
            const int first_row = row - row % p.rows_per_group;
            const int rows = min(p.rows_per_group, p.windows.rows - first_row);
            score_group(p, query, first_row * p.windows.next_n, rows * p.windows.next_n,
                        boundary(p, begin, first_row, rows, lane), boundary(p, end, first_row, rows, lane), lane);
            row = first_row + rows;
        }
    }

    // ---- ragged: a share of a group's keys -----------------------------------------------------------------------------

    __device__ static void run_share(const Params& p) {
        const Lane lane;
        const int first_token = blockIdx.x * kWarps;
        const int count = min(kWarps, p.windows.rows - first_token);
        const Window mine = lane.id < count ? window_of(p, first_token + lane.id) : Window{0, 0};
        const bool empty = mine.begin >= mine.end;
        const int first = __reduce_min_sync(kAllLanes, empty ? kNever : mine.begin / kTile);
        const int last = __reduce_max_sync(kAllLanes, empty ? 0 : (mine.end - 1) / kTile + 1);
        if (first >= last) return;
        const int share = (last - first - 1) / int(gridDim.y) + 1;
        const int from = first + int(blockIdx.y) * share;
        Query query;
        score_tokens(p, query, first_token, count, from, min(last, from + share), lane);
    }

    __device__ static void run(const Params& p) {
        ptx::griddepcontrol();
        if constexpr (kPaged) run_slot(p);
        else run_share(p);
    }
};
