// Who takes which keys of which rows. What is computed of them stands in paged.cuh and sparse.cuh, whose kernels this is.
//
// Grid    one block for each slot, of kWarps warps; one block an SM.
// One     row: its tiles go round the blocks, and then round the warps of each. Too few tiles: a warp takes 8 keys.
// Few     rows (a decode step, up to 256): their tiles are cut into runs, as short as gives no warp two of them. No schedule:
//         in splits of 256 keys it is coarser than that, and reading it is one more load that others wait for.
// Many    rows (a prefill, or a very large batch): blocks take groups of `rows_per_group` neighbouring rows, over the part of
//         their keys that the schedule gives the slot. group.cuh deals these out to warps.
// Warp    works out alone what it takes, from lengths or the schedule: no warp waits for another.
// Lane    few rows: has the length of one of them, or of eight; all lanes together find the warp's run. Many: has the window
//         of one token of the group.
// Bound   one row, few rows: DRAM where they are long, else latency. Of one row two round trips follow each other, length and
//         place, then query and keys; of few rows three: lengths, place, then query and keys. Many rows: see group.cuh.
//
// What comes next is set up while the last tiles are scored: earlier, a top-k that waits meanwhile holds threads and shared
// memory that are needed here (1 x 16K: 12.1 instead of 11.3 us together); later, setting it up is waited for (64 x 16K of FP4:
// 39.2 instead of 38.1; H100, 28 Nov 2026).
//
// What `Params` says beside what group.cuh asks for:
//   windows           of, longest, length: of one of `rows * lengths_per_row` lengths; limit
//   entry             (row, split of 256 keys) where a slot starts                      many rows
//   rows_per_group                                                                      many rows
#pragma once

#include "group.cuh"

constexpr int kTilesPerSplit = 256 / kTile;

// What the host works out for few rows.
struct FewRows {
    int shares;                  // warps of a block that share the keys of the same tokens
    int takers;                  // slots * shares
    int quarters;                // of the SMs: warps that have a tensor pipe to themselves
    int pairs;                   // 1 where `shares` is even: neighbouring runs go to the same SM by twos
    uint32 takers_inverse;       // 2^32 / takers, rounded down
    uint32 spare_inverse;        // 2^32 / (takers - rows), rounded down
};

template <class Params, class Format, int kHeads, class Source, class Weight, class Logit, int kWarps, int kTokens>
struct Rows {
    using Group = ::Group<Format, kHeads, kTokens, Weight, Source, Logit, kWarps>;

    // ---- few rows ------------------------------------------------------------------------------------------------------
    // Every instruction here is waited for: nothing else is there to do yet.

    __device__ static int tiles_of(int keys) { return (keys + kTile - 1) / kTile; }

    // The warps of a block share out its tokens first, kTokens each, then the keys: this warp's part of either.
    struct Part {
        int set, share;
        __device__ explicit Part(const Params& p) : set(0), share(threadIdx.x / 32) {
            for (; share >= p.few.shares; ++set) share -= p.few.shares;
        }
        __device__ bool idle(const Params& p) const { return set * kTokens >= p.windows.next_n; }
    };

    // Tiles from `tile` on, each `step` further, below `to`, of the warp's tokens of `row`, the longest of which sees `keys`
    // keys.
    __device__ static Share<kTokens> share_of(const Params& p, int row, int keys, int set, int tile, int step, int to) {
        Share<kTokens> share{{}, {}, row, 0, tile, step, to};
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int n = min(set * kTokens + i, p.windows.next_n - 1);
            share.tokens[i] = row * p.windows.next_n + n;
            share.windows[i] = {0, p.windows.next_n == 1 ? keys : p.windows.end(row, n)};
            share.end = i == 0 ? share.windows[i].end : max(share.end, share.windows[i].end);
            if (set * kTokens + i > n) share.windows[i].end = 0;                   // the last token again, for nobody
        }
        share.to = min(to, tiles_of(share.end));
        return share;
    }

    // One row: neighbouring tiles go to different SMs. Which tile is a warp's first does not depend on the length, so its page
    // is asked for together with that.
    __device__ static void run_one(const Params& p) {
        ptx::griddepcontrol_wait();
        const Lane lane;
        const Part part(p);
        const int item = blockIdx.x + gridDim.x * part.share, step = p.few.takers;
        if (part.idle(p) || item * 8 >= p.windows.limit) return;
        Source source(p.keys, 0), source_of_eight = source;
        source_of_eight.open(item / (kTile / 8), 0, p.windows.limit - 1, lane);
        source.open(item, step, p.windows.limit - 1, lane);
        const int mine = lane.id < p.windows.lengths_per_row ? p.windows.length(lane.id) : 0;
        const int longest = min(max(__reduce_max_sync(kAllLanes, mine), 0), p.windows.limit);
        const int keys = p.windows.counted(longest), tiles = tiles_of(keys);
        const Share<kTokens> work = share_of(p, 0, keys, part.set, item, step, tiles);
        // Where there is less than a tile for each quarter of an SM, a warp takes 8 keys.
        if (tiles * (kTile / 8) <= p.few.quarters) {
            if (item * 8 < work.end) Group::score_eight(p, work, source_of_eight, item, lane);
        } else if (work.tile < work.to) {
            Group::template score<false>(p, work, source, false, lane);
        }
    }

    // Numbers below 2^31 over `by`, rounded down.
    struct Divisor {
        uint32 by, inverse;
        __device__ explicit Divisor(uint32 by) : by(by), inverse(0xffffffff / by) {}
        __device__ Divisor(uint32 by, uint32 inverse) : by(by), inverse(inverse) {}
        __device__ uint32 operator()(uint32 number) const {
            const uint32 quotient = __umulhi(number, inverse);           // one too small at most
            return quotient + (number - quotient * by >= by);
        }
    };

    // Up to kRows rows: their tiles are cut into runs, each of one row, as short as gives no warp two of them: a second would
    // begin with a query that nobody has asked for, which takes as long as a dozen tiles. Runs go round the SMs, two
    // neighbours at a time.
    template <int kRows>
    __device__ static void run_few(const Params& p) {
        constexpr int kPerLane = (kRows + 31) / 32;
        ptx::griddepcontrol_wait();
        const Lane lane;
        int keys[kPerLane] = {}, tiles = 0;            // of this lane's rows
        #pragma unroll 1
        for (int n = 0; n < p.windows.lengths_per_row; ++n) {
            int lengths[kPerLane];
            #pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                const int row = min(kPerLane * lane.id + i, p.windows.rows - 1);
                lengths[i] = p.windows.length(row * p.windows.lengths_per_row + n);
            }
            #pragma unroll
            for (int i = 0; i < kPerLane; ++i) keys[i] = max(keys[i], lengths[i]);
        }
        #pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            keys[i] = kPerLane * lane.id + i < p.windows.rows ? p.windows.counted(min(keys[i], p.windows.limit)) : 0;
            tiles += tiles_of(keys[i]);
        }
        const Part part(p);
        const uint32 total = __reduce_add_sync(kAllLanes, tiles), takers = p.few.takers;
        if (total == 0 || part.idle(p)) return;
        // A row's last run may be short, so there are up to as many more as there are rows.
        uint32 run = Divisor(takers, p.few.takers_inverse)(total - 1) + 1;
        uint32 enough = Divisor(takers - p.windows.rows, p.few.spare_inverse)(total - 1) + 1;
        while (run < enough) {
            const uint32 middle = (run + enough) / 2;
            if (__reduce_add_sync(kAllLanes, runs_of(keys, middle)) <= takers) enough = middle;
            else run = middle + 1;
        }
        // The lane that has the row of run `item`, and which of its rows that is.
        const Divisor divisor(run);
        const int mine = runs_of(keys, divisor), item = run_of(p, part.share);
        int end = mine;
        #pragma unroll 1
        for (int distance = 1; distance * kPerLane < p.windows.rows; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, end, distance);
            if (lane.id >= distance) end += before;
        }
        const uint32 found = __ballot_sync(kAllLanes, end > item);
        if (found == 0) return;
        const int at = __ffs(found) - 1;
        int rest = item - __shfl_sync(kAllLanes, end - mine, at), row = kPerLane * at;
        int length = __shfl_sync(kAllLanes, keys[0], at);
        #pragma unroll
        for (int i = 1; i < kPerLane; ++i) {
            const int next = __shfl_sync(kAllLanes, keys[i], at), runs = divisor(tiles_of(length) + run - 1);
            if (rest >= runs) rest -= runs, length = next, row = kPerLane * at + i;
        }
        const Share<kTokens> work = share_of(p, row, length, part.set, rest * run, 1, (rest + 1) * run);
        if (work.tile < work.to) Group::template score<false>(p, work, Group::open(p, work, lane), false, lane);
    }

    // Which run is that of share `share` of this block. Neighbours where they are two tiles of a page, so that one SM looks
    // for it and not two (FP4, 8 x 4K: 5.0 to 4.7 us; stand-in on an H100, 28 Nov 2026).
    __device__ static int run_of(const Params& p, int share) {
        return ((blockIdx.x + gridDim.x * (share >> p.few.pairs)) << p.few.pairs) + (share & p.few.pairs);
    }

    // Into how many runs the tiles of this lane's rows are cut, each of `run` tiles but for a row's last.
    template <int kPerLane>
    __device__ static int runs_of(const int (&keys)[kPerLane], const Divisor& run) {
        int runs = 0;
        #pragma unroll
        for (int i = 0; i < kPerLane; ++i) runs += run(tiles_of(keys[i]) + run.by - 1);
        return runs;
    }
    template <int kPerLane>
    __device__ static int runs_of(const int (&keys)[kPerLane], uint32 run) { return runs_of(keys, Divisor(run)); }

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
                some[i] = j < lengths && p.windows.counted(p.windows.length(j)) > 0;
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
        return lane.id < count ? p.windows.of(first_token + lane.id) : Window{0, 0};
    }

    __device__ static void run_many(const Params& p) {
        ptx::griddepcontrol_wait();
        const Lane lane;
        // The next token, and how far in the keys its turn has come. All else is read anew in each turn: registers are dearer
        // than a look into L1.
        for (int next = 0, tile = 0;;) {
            const int2 begin = p.entry(blockIdx.x, lane), end = p.entry(blockIdx.x + 1, lane);
            const int limit = begin.x == end.x && begin.y >= end.y ? 0 : min(p.windows.rows, end.x + (end.y > 0));
            const int row = max(next / p.windows.next_n, begin.x);
            const int first_row = row - row % p.rows_per_group, rows = min(p.rows_per_group, p.windows.rows - first_row);
            // Not the row counts, but the group: of the one in which the slot ends it has a part of the keys of all rows.
            if (first_row >= limit || row >= p.windows.rows) return;
            const int done = max(next - first_row * p.windows.next_n, 0);
            const int first_token = first_row * p.windows.next_n + done, count = rows * p.windows.next_n - done;
            const int size = Group::at_once(count);
            if (tile == kNever) {
                next = first_token + size, tile = 0;
                continue;
            }
            const Window mine = window_of(p, first_token, size, lane);
            if (count > size || done > 0 || __any_sync(kAllLanes, mine.end > 0)) {
                const int from = boundary(p, begin, first_row, rows, lane), to = boundary(p, end, first_row, rows, lane);
                tile = Group::score_span(p, first_token, mine, max(tile, from), to, false, lane);
            } else {
                next = next_row(p, first_row + rows, limit, lane) * p.windows.next_n;
            }
        }
    }
};
