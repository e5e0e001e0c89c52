// Lightning Indexer logits:   logits[token, key] = scale[key] * sum_h weights[token, h] * relu(query[token, h] . key)
//
// Grid    paged: one block for each slot of the schedule. Ragged: blockIdx.x is a group of `kWarps` neighbouring tokens,
//         blockIdx.y a share of the keys that they see.
// Block   works on a *group* of query tokens that (are likely to) see the same keys: the next_n tokens of a request, or of
//         `rows_per_group` neighbouring rows. Its warps share out the tokens first, then the keys, without ever meeting: a
//         key leaves L2 once and is found in L1 by the warps of the other tokens.
// Warp    one token, whose whole query stays in registers as A fragments (16 heads a tile), with its weights. Keys stream
//         past in tiles of 32, from global memory straight into B fragments: while one half of a tile is multiplied, the same
//         half of the next tile is on its way, and the page of the tile after it. No shared memory, no barrier.
// Lane    (g = lane / 4, t = lane % 4) holds heads g and g + 8 of each head tile and a quarter of keys g, g + 8, g + 16 and
//         g + 24. Scores come out as [head g, g + 8][key 2t, 2t + 1]; relu and weights are applied on them, the eight quads
//         are summed with seven shuffles, and every lane stores one logit.
// Bound   64 heads of 128: 64 FP8 or 32 FP4 mma for 32 keys and one token, 1024 or 512 clocks of a tensor pipe, against 4224
//         or 2176 bytes. One token a request is bound by DRAM; more tokens, or rows that share keys, by the tensor pipe.
//         Registers are what is scarce: 64 heads of FP8 leave room for 12 warps of 168, and the compiler fills them all.
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
    int64 weights_stride;        // elements
    int64 logits_stride;         // elements
    uint32 page_stride;          // bytes
    int table_stride;            // elements
    int table_columns;
    int rows_per_group;          // paged
    int columns;                 // ragged, compressed: column 0 is the row's first key, and there are so many; else 0
    Windows windows;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher packs a different struct");

constexpr int kTile = 32;                     // keys a warp takes at a time
constexpr int kTilesPerSplit = 256 / kTile;   // the schedule counts in splits
constexpr uint32 kAllLanes = 0xffffffff;
constexpr int kNever = 0x7fffffff;

// kPage is the number of keys of a page, 0 for ragged keys; kTurns: a request may have more tokens than a block has warps.
template <class Format, int kHeads, int kPage, class Weight, class Logit, int kWarps, bool kTurns>
struct Indexer {
    static constexpr bool kPaged = kPage > 0;
    static constexpr int kHeadTiles = (kHeads + 15) / 16;
    static_assert(kHeads % 8 == 0 && kHeads <= 64 && kPage % 16 == 0 && kWarps <= 32);

    // ---- what stays: one token's query and weights ---------------------------------------------------------------------

    struct Query {
        uint32 fragments[kHeadTiles][Format::kSteps][4];
        typename Format::template QueryScales<kHeadTiles> scales;
        float weights[kHeadTiles][2];

        __device__ void load(const Params& p, int token) {
            const Lane lane;
            const uint32 first_head = token * kHeads;
            // Unknown to the compiler, which would keep the vectors as they were loaded and copy four words before every
            // mma: 4 of 9 instructions of the loop (24 Nov 2026).
            const uint32 zero = p.windows.rows >> 31;
            #pragma unroll
            for (int m = 0; m < kHeadTiles; ++m) {
                uint32 rows[2][Format::kWords];
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int head = 16 * m + 8 * half + lane.g;
                    uint32 loaded[Format::kLoaded] = {};
                    weights[m][half] = 0;     // heads that pad the last tile weigh nothing
                    if (16 * m + 8 * half < kHeads) {
                        Format::load(loaded, p.query + int64(first_head + head) * Format::kRowBytes + Format::lane_offset(lane));
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

    // ---- what streams: 32 keys, in two halves --------------------------------------------------------------------------

    static constexpr bool kOnePage = kPaged && kPage % kTile == 0;   // else the two halves of a tile may lie in two pages

    // What is fetched while a tile is scored: a tile that has all its keys, the last one, which may not, or none.
    enum class Next { kWhole, kCut, kNone };

    struct Guess { int tile; uint32 page; };               // a tile whose page is known early; -1: none

    struct Keys {
        uint32 words[4][Format::kLoaded];     // keys g, g + 8, g + 16, g + 24
        uint32 scale, next_scale;
        uint32 pages[2];                      // of the tile that is fetched next

        // Which of a tile's keys a lane has the sum of in the end, and stores.
        __device__ static uint32 stored(const Lane& lane) {
            return 16 * (lane.g >> 2) + 8 * (lane.g & 1) + 2 * lane.t + (lane.g >> 1 & 1);
        }

        __device__ void locate(const Params& p, uint32 table, uint32 tile, uint32 last_key) {
            if constexpr (kOnePage) {
                pages[0] = pages[1] = ptx::load_word(p.block_table + (table + tile / (kPage / kTile)));
            } else if constexpr (kPaged) {
                pages[0] = ptx::load_word(p.block_table + (table + tile * kTile / kPage));
                pages[1] = ptx::load_word(p.block_table + (table + min(tile * kTile + kTile / 2, last_key) / kPage));
            }
        }

        // Address of a tile's key number `key + more`, at `offset` in its row, in an array of kRowBytes a key: of a page, or
        // of all keys. Keys past the last one are not there: it is read in their place. `more` is a constant, and becomes
        // one of the load where the tile is whole.
        template <int kRowBytes, Next kNext>
        __device__ static const uint8* at(const Params& p, const uint8* array, uint32 page, uint32 tile, uint32 last_key,
                                          uint32 key, uint32 more, uint32 offset) {
            if constexpr (!kPaged) array += int64(tile) * (kTile * kRowBytes);
            else array += int64(page) * p.page_stride;
            if constexpr (kOnePage) offset += tile % (kPage / kTile) * (kTile * kRowBytes);
            if constexpr (kPaged && !kOnePage) {
                return array + (min(tile * kTile + key + more, last_key) % kPage * kRowBytes + offset);
            } else if constexpr (kNext == Next::kWhole) {
                return array + (key * kRowBytes + offset) + more * kRowBytes;
            } else {
                return array + (min(key + more, last_key - tile * kTile) * kRowBytes + offset);
            }
        }

        template <int Half, Next kNext>
        __device__ void fetch(const Params& p, uint32 tile, uint32 last_key, const Lane& lane) {
            #pragma unroll
            for (int j = 2 * Half; j < 2 * Half + 2; ++j) {
                Format::load(words[j], at<Format::kRowBytes, kNext>(p, p.keys, pages[Half], tile, last_key,
                                                                    lane.g, 8 * j, Format::lane_offset(lane)));
            }
        }

        template <Next kNext>
        __device__ void fetch_scale(const Params& p, uint32 tile, uint32 last_key, const Lane& lane) {
            const uint32 key = Format::scale_key(lane, stored(lane));
            const uint8* array = kPaged ? p.keys + kPage * Format::kRowBytes : reinterpret_cast<const uint8*>(p.key_scales);
            const uint32 page = key < kTile / 2 ? pages[0] : pages[1];
            next_scale = ptx::load_word(at<4, kNext>(p, array, page, tile, last_key, key, 0, 0));
        }
    };

    // The sum over heads runs over the quads, in three steps. In each a lane keeps one of two sums and adds to it what the
    // lane `4 << Step` away has of it, to which it gives the other: in the end a lane has all of one key.
    template <int Step>
    __device__ static float exchange(float lower, float upper, const Lane& lane) {
        const bool keeps_upper = lane.g >> Step & 1;
        const float given = keeps_upper ? lower : upper;
        return (keeps_upper ? upper : lower) + __shfl_xor_sync(kAllLanes, given, 4 << Step);
    }

    template <int KeyTile, int Step = 0>
    __device__ static void multiply(float (&scores)[kHeadTiles][4], const Query& query,
                                    const uint32 (&words)[Format::kWords], uint32 scale, const Lane& lane) {
        Format::template multiply<Step, KeyTile>(scores, query.fragments, query.scales, words, scale, lane);
        if constexpr (Step + 1 < Format::kSteps) multiply<KeyTile, Step + 1>(scores, query, words, scale, lane);
    }

    // sums[column] over this lane's heads, for 8 keys.
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

    // The sum over this lane's heads and those of the lanes it has exchanged with, for one key of 16.
    template <int Half>
    __device__ static float score_half(const Query& query, const Keys& keys, const Lane& lane) {
        float lower[2] = {}, upper[2] = {};
        score_keys<2 * Half>(lower, query, keys, lane);
        score_keys<2 * Half + 1>(upper, query, keys, lane);
        return exchange<1>(exchange<0>(lower[0], upper[0], lane), exchange<0>(lower[1], upper[1], lane), lane);
    }

    // ---- the loop: one token, tiles tile, tile + step, ... below to ------------------------------------------------------

    struct Stream {
        const Params& p;
        const Lane& lane;
        const int step;
        const uint32 last_key;                // that may be read
        const uint32 table;                   // entry of the block table at which this row begins
        const uint32 last_stored;             // key of the window, counted from its first
        const int stored;                     // this lane's key of tile 0, counted from the window's first
        Logit* first_logit;                   // of the window
        Query query;
        Keys keys;

        __device__ Stream(const Params& p, int token, Window window, int step, const Lane& lane)
            : p(p), lane(lane), step(step), last_key((kPaged ? window.end : p.windows.limit) - 1),
              table(kPaged ? token / p.windows.next_n * p.table_stride : 0),
              last_stored(kPaged ? last_key : window.end - window.begin - 1),
              stored(int(Keys::stored(lane)) - (kPaged ? 0 : window.begin)),
              first_logit(reinterpret_cast<Logit*>(p.logits) + token * p.logits_stride
                          + (kPaged || p.columns ? 0 : window.begin)) {}

        // Scores a tile. Each half of its keys makes room for the next tile's as soon as it has been multiplied, and so does
        // their scale: FP4's mma takes it, so the next one waits beside it; FP8 needs it in the end only.
        template <Next kNext>
        __device__ void turn(int tile) {
            const int next = tile + step;
            constexpr bool kFetch = kNext != Next::kNone, kScaleFirst = Format::kScaleFirst;
            if constexpr (kScaleFirst) keys.scale = keys.next_scale;
            const float lower = score_half<0>(query, keys, lane);
            if constexpr (kFetch) keys.template fetch<0, kNext>(p, next, last_key, lane);
            if constexpr (kFetch && kScaleFirst) keys.template fetch_scale<kNext>(p, next, last_key, lane);
            const float upper = score_half<1>(query, keys, lane);
            if constexpr (kFetch) keys.template fetch<1, kNext>(p, next, last_key, lane);
            const float logit = Format::finish(exchange<2>(lower, upper, lane), keys.next_scale);
            if constexpr (kFetch && !kScaleFirst) keys.template fetch_scale<kNext>(p, next, last_key, lane);
            if constexpr (kNext == Next::kWhole) keys.locate(p, table, next + step, last_key);
            const uint32 n = tile * kTile + stored;        // keys before the window wrap around
            if (n <= last_stored) first_logit[n] = Logit(logit);
        }

        __device__ void run(int token, int tile, int to, Guess guess) {
            keys.pages[0] = keys.pages[1] = guess.page;
            if (guess.tile != tile) keys.locate(p, table, tile, last_key);
            query.load(p, token);
            keys.template fetch<0, Next::kCut>(p, tile, last_key, lane);
            keys.template fetch<1, Next::kCut>(p, tile, last_key, lane);
            keys.template fetch_scale<Next::kCut>(p, tile, last_key, lane);
            if (tile + step < to) {
                keys.locate(p, table, tile + step, last_key);
                #pragma unroll (kHeadTiles > 1 ? 1 : 2)       // with few heads it pays not to move what a turn hands on
                for (const int cut = to - 2 * step; tile < cut; tile += step) turn<Next::kWhole>(tile);
                turn<Next::kCut>(tile);
                tile += step;
            }
            turn<Next::kNone>(tile);
        }
    };

    // ---- who takes what ------------------------------------------------------------------------------------------------

    __device__ static Window window_of(const Params& p, int token) {
        Window window = p.windows.of(token);
        if (p.columns) window.end = min(window.end, window.begin + p.columns);
        return window;
    }

    // Lane i's is that of token i of a group.
    __device__ static Window windows_of(const Params& p, int first_token, int count, const Lane& lane) {
        return lane.id < min(count, kWarps) ? window_of(p, first_token + lane.id) : Window{0, 0};
    }

    // Scores up to kWarps tokens from tile `from` to where the set of tokens that have keys changes; returns where that is,
    // kNever if not before `to`. After a change the warps are dealt out anew, so none waits on a long row among short ones.
    __device__ static int score_span(const Params& p, int first_token, Window mine, int from, int to, Guess guess,
                                     const Lane& lane) {
        const bool empty = mine.begin >= mine.end;
        const int first = empty ? 0 : mine.begin / kTile, last = empty ? 0 : (mine.end - 1) / kTile + 1;
        const bool active = first <= from && from < last;
        const int change = __reduce_min_sync(kAllLanes, active ? last : first > from ? first : kNever);
        const int until = min(change, to), rest = change < to ? change : kNever;
        const uint32 actives = __ballot_sync(kAllLanes, active);
        if (actives && from < to) {
            const int warp = threadIdx.x / 32, tokens = __popc(actives), share = warp / tokens, shares = kWarps / tokens;
            const int rank = __popc(actives & ((1u << lane.id) - 1));
            const int chosen = __ffs(__ballot_sync(kAllLanes, active && rank == warp % tokens)) - 1;
            const Window window{__shfl_sync(kAllLanes, mine.begin, chosen), __shfl_sync(kAllLanes, mine.end, chosen)};
            const int token = first_token + chosen, tile = from + share;
            if (share < shares && tile < until) Stream(p, token, window, shares, lane).run(token, tile, until, guess);
        }
        return rest;
    }

    // The same for any number of tokens: more than warps take turns on a piece of the keys that L1 holds.
    __device__ static int score_group(const Params& p, int first_token, int count, Window mine, int from, int to,
                                      Guess guess, const Lane& lane) {
        if constexpr (!kTurns) return score_span(p, first_token, mine, from, to, guess, lane);
        constexpr int kPieceTiles = 16;
        to = min(to, (p.windows.longest(first_token / p.windows.next_n) - 1) / kTile + 1);
        const int piece = min(to, from + kPieceTiles);
        for (int i = 0; i < count; i += kWarps) {
            mine = windows_of(p, first_token + i, count - i, lane);
            for (int tile = from; tile < piece;) tile = score_span(p, first_token + i, mine, tile, piece, guess, lane);
        }
        return piece < to ? piece : kNever;
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

    // The page that this warp will need first if the row has keys and all its tokens do: asked for together with the
    // lengths that would tell, so that only three loads wait for each other before the first mma (schedule, page, key).
    __device__ static Guess guess_page(const Params& p, int row, int tile) {
        Guess guess{tile + int(threadIdx.x / 32) / min(p.windows.next_n, kWarps), 0};
        const int column = kOnePage ? guess.tile * kTile / kPage : kNever;
        if (p.rows_per_group > 1 || column >= p.table_columns) guess.tile = -1;
        else guess.page = ptx::load_word(p.block_table + row * p.table_stride + column);
        return guess;
    }

    __device__ static int2 entry_of(const Params& p, int slot) {
        int2 entry;
        ptx::load<2>(reinterpret_cast<uint32*>(&entry), p.schedule + slot);
        return entry;
    }

    __device__ static void run_slot(const Params& p) {
        const Lane lane;
        for (int row = 0, tile = 0;;) {       // the next row, and how far its group has come
            // All else is read anew in each turn: registers are dearer than a look into L1.
            const int2 begin = entry_of(p, blockIdx.x), end = entry_of(p, blockIdx.x + 1);
            const int limit = begin.x == end.x && begin.y >= end.y ? 0 : min(p.windows.rows, end.x + (end.y > 0));
            row = max(row, begin.x);
            if (row >= limit) return;
            const Guess guess = guess_page(p, row, max(tile, row == begin.x ? begin.y * kTilesPerSplit : 0));
            const int first_row = row - row % p.rows_per_group;
            const int rows = min(p.rows_per_group, p.windows.rows - first_row);
            const int first_token = first_row * p.windows.next_n, count = rows * p.windows.next_n;
            const Window mine = windows_of(p, first_token, count, lane);
            const bool some = kTurns ? p.windows.longest(row) > 0 : __any_sync(kAllLanes, mine.end > 0);
            if (some) {
                const int from = boundary(p, begin, first_row, rows, lane), to = boundary(p, end, first_row, rows, lane);
                tile = score_group(p, first_token, count, mine, max(tile, from), to, guess, lane);
                if (tile != kNever) continue;
                row += p.rows_per_group - row % p.rows_per_group;
            } else {
                row = next_row(p, first_row + rows, limit, lane);
            }
            tile = 0;
        }
    }

    // ---- ragged: a share of a group's keys -----------------------------------------------------------------------------

    __device__ static void run_share(const Params& p) {
        const Lane lane;
        const int first_token = blockIdx.x * kWarps, count = min(kWarps, p.windows.rows - first_token);
        const Window mine = windows_of(p, first_token, count, lane);
        const bool empty = mine.begin >= mine.end;
        const int first = __reduce_min_sync(kAllLanes, empty ? kNever : mine.begin / kTile);
        const int last = __reduce_max_sync(kAllLanes, empty ? 0 : (mine.end - 1) / kTile + 1);
        const int share = (last - first - 1) / int(gridDim.y) + 1;
        const int from = first + int(blockIdx.y) * share, to = min(last, from + share);
        if (first >= last) return;
        for (int tile = from; tile < to;) {
            tile = score_span(p, first_token, windows_of(p, first_token, count, lane), tile, to, {-1, 0}, lane);
        }
    }

    __device__ static void run(const Params& p) {
        ptx::griddepcontrol();
        if constexpr (kPaged) run_slot(p);
        else run_share(p);
    }
};
