// Who takes which keys of which rows: the grid's blocks and warps, one block for each slot, kWarps warps each; one block an SM.
//
// Few     rows (a decode step) of no more tokens than a block takes: the warps of the whole grid share out the tiles of all
//         rows evenly, each finds its own. A schedule, in splits of 256 keys, is coarser than that, and reading it would be
//         one more load that others wait for. With one row, two round trips follow each other: length and place, then query
//         and keys.
// Many    rows (a prefill, or a very large batch): blocks take groups of `rows_per_group` neighbouring rows, over the part of
//         their keys that the schedule gives the slot.
//
// What `Params` says beside what group.cuh asks for:
//   windows           of, longest, length: of one of `rows * lengths_per_row` lengths; limit
//   entry             (row, split of 256 keys) where a slot starts                      many rows
//   rows_per_group                                                                      many rows
//   slots_inverse     2^32 / slots, rounded down                                        few rows
#pragma once

#include "group.cuh"

constexpr int kTilesPerSplit = 256 / kTile;
constexpr int kQuarters = 4;                  // of an SM, each with a tensor pipe of its own

template <class Params, class Format, int kHeads, class Source, class Weight, class Logit, int kWarps, int kTokens>
struct Rows {
    using Group = ::Group<Format, kHeads, kTokens, Weight, Source, Logit, kWarps>;

    // ---- few rows ------------------------------------------------------------------------------------------------------

    static constexpr int kRowsPerLane = 4;             // so at most 128

    __device__ static int tiles_of(int keys) { return (keys + kTile - 1) / kTile; }

    // The warp's tokens of `row`, the longest of which sees `keys` keys, and tiles from `tile` on, each `step` further,
    // below `to`.
    __device__ static Share<kTokens> share_of(const Params& p, int row, int keys, int set, int tile, int step, int to) {
        Share<kTokens> share{{}, {}, row, 0, tile, step, to};
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int n = min(set * kTokens + i, p.windows.next_n - 1);
            share.tokens[i] = row * p.windows.next_n + n;
            share.windows[i] = p.windows.next_n == 1 ? Window{0, keys} : p.windows.of(share.tokens[i]);
            share.end = max(share.end, share.windows[i].end);
            if (set * kTokens + i > n) share.windows[i].end = 0;                   // the last token again, for nobody
        }
        share.to = min(to, tiles_of(share.end));
        return share;
    }

    // The keys of the longest token of row 0.
    __device__ static int longest_of_one(const Params& p, const Lane& lane) {
        const int length = lane.id < p.windows.lengths_per_row ? p.windows.length(lane.id) : 0;
        return min(max(__reduce_max_sync(kAllLanes, length), 0), p.windows.limit);
    }

    // One row: neighbouring tiles go to different SMs. Which tile is a warp's first does not depend on the length, so its page
    // is asked for together with that. More rows: all tiles of all rows stand in one list, of which each block takes a piece,
    // and each of its warps every so many.
    __device__ static void run_few(const Params& p) {
        ptx::griddepcontrol();
        const Lane lane;
        // How far in the list this warp has come; all else is worked out anew when a row ends: registers are dearer.
        for (int come = 0;;) {
            const int warp = threadIdx.x / 32, block = blockIdx.x, slots = gridDim.x;
            const int sets = (p.windows.next_n + kTokens - 1) / kTokens;
            const int shares = sets == 1 ? kWarps : kWarps / sets, share = sets == 1 ? warp : warp / sets;
            const int set = warp - share * sets;
            if (share >= shares) return;
            const bool one_row = p.windows.rows == 1;

            int row = 0, first = 0, length, item = block + slots * share, step = slots * shares, to;
            Source source(p.keys, 0);
            if (one_row) {
                if (item * 8 >= p.windows.limit) return;
                Source source_of_eight = source;
                source_of_eight.open(item / (kTile / 8), 0, p.windows.limit - 1, lane);
                source.open(item, step, p.windows.limit - 1, lane);
                length = longest_of_one(p, lane);
                to = tiles_of(length);
                // Where there is less than a tile for each quarter of an SM, a warp takes 8 keys.
                if (to * (kTile / 8) <= slots * min(shares, max(1, kQuarters / sets))) {
                    const Share<kTokens> work = share_of(p, 0, length, set, item, step, to);
                    if (item * 8 < work.end) Group::score_eight(p, work, source_of_eight, item, lane);
                    return;
                }
            } else {
                int keys[kRowsPerLane], mine = 0;      // of this lane's rows, and their tiles
                #pragma unroll
                for (int i = 0; i < kRowsPerLane; ++i) {
                    const int of = kRowsPerLane * lane.id + i;
                    keys[i] = of < p.windows.rows ? max(p.windows.longest(of), 0) : 0;
                }
                #pragma unroll
                for (int i = 0; i < kRowsPerLane; ++i) mine += tiles_of(keys[i]);
                int end = mine;                        // in the list
                #pragma unroll
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int before = __shfl_up_sync(kAllLanes, end, distance);
                    if (lane.id >= distance) end += before;
                }
                const uint32 total = __shfl_sync(kAllLanes, end, 31);
                uint32 piece = __umulhi(total, p.slots_inverse);
                if (total - piece * slots >= slots) ++piece;
                const int longer = total - piece * slots;
                item = piece * block + min(block, longer) + share + come;
                to = piece * (block + 1) + min(block + 1, longer);
                step = shares;
                if (item >= to) return;
                const int at = __ffs(__ballot_sync(kAllLanes, end > item)) - 1;        // the lane that has its row
                first = __shfl_sync(kAllLanes, end - mine, at), row = kRowsPerLane * at;
                length = __shfl_sync(kAllLanes, keys[0], at);
                #pragma unroll
                for (int i = 1; i < kRowsPerLane; ++i) {
                    const int next = __shfl_sync(kAllLanes, keys[i], at);
                    if (item >= first + tiles_of(length)) first += tiles_of(length), length = next, row = kRowsPerLane * at + i;
                }
            }
            const int limit = min(to - first, tiles_of(length));
            const Share<kTokens> work = share_of(p, row, length, set, item - first, step, limit);
            const bool more = !one_row && first + limit < to;          // to find that out again would take 0.5 us
            if (work.tile < work.to) {
                if (!one_row) source = Group::open(p, work, lane);
                Group::score(p, work, source, false, lane);
            }
            if (!more) return;
            come += (limit - work.tile + step - 1) / step * step;
        }
    }

    // ---- many rows -----------------------------------------------------------------------------------------------------

    // The first row from `row` on that has keys; `limit` if there is none. Padded batches have many that have not.
    __device__ static int next_row(const Params& p, int row, int limit, const Lane& lane) {
        constexpr int kAtOnce = 4;
        const int lengths = limit * p.windows.lengths_per_row;
        for (int first = row * p.windows.lengths_per_row; first < lengths; first += 32 * kAtOnce) {
            bool some[kAtOnce];
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int j = first + 32 * i + lane.id;
                some[i] = j < lengths && p.windows.length(j) > 0;
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

    // Lane i's is that of token i of a group.
    __device__ static Window window_of(const Params& p, int first_token, int count, const Lane& lane) {
        return lane.id < min(count, Group::kSize) ? p.windows.of(first_token + lane.id) : Window{0, 0};
    }

    __device__ static void run_many(const Params& p) {
        ptx::griddepcontrol();
        const Lane lane;
        // The next row, which of its group's tokens are next, and how far they have come.
        for (int row = 0, done = 0, tile = 0;;) {
            // All else is read anew in each turn: registers are dearer than a look into L1.
            const int2 begin = p.entry(blockIdx.x, lane), end = p.entry(blockIdx.x + 1, lane);
            const int limit = begin.x == end.x && begin.y >= end.y ? 0 : min(p.windows.rows, end.x + (end.y > 0));
            row = max(row, begin.x);
            if (row < 0 || row >= limit) return;
            const int first_row = row - row % p.rows_per_group;
            const int rows = min(p.rows_per_group, p.windows.rows - first_row);
            const int first_token = first_row * p.windows.next_n + done, count = rows * p.windows.next_n - done;
            const Window mine = window_of(p, first_token, count, lane);
            const bool some = count > Group::kSize || done > 0 || __any_sync(kAllLanes, mine.end > 0);
            if (some) {
                const int from = boundary(p, begin, first_row, rows, lane), to = boundary(p, end, first_row, rows, lane);
                tile = Group::score_span(p, first_token, mine, max(tile, from), to, false, lane);
                if (tile != kNever) continue;
                done = count > Group::kSize ? done + Group::kSize : 0;
                if (done == 0) row = first_row + p.rows_per_group;
            } else {
                row = next_row(p, first_row + rows, limit, lane);
            }
            tile = 0;
        }
    }
};
