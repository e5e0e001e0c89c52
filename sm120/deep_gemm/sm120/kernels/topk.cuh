// The k largest of each row, exactly: larger values first, among equal ones the smaller position; -0 equals +0, and NaN is
// below everything. A row of at most k keys gives all of its positions, and its logits are not read.
//
//     out[row, i] = position, -1 past the end; or as pages: table[row, position / page] * page + position % page; + offset[row]
//
// The same for candidates of a sparse indexer: the keys are maxima of blocks of keys, the lists ascend, and end in 2^31 - 1.
//
// A value becomes a key, an uint32 of the same order (0: nothing); a key and ~position together are in order without ties.
// The least of the k largest is found by a histogram in shared memory. Its bins are made for logits: the upper 11 bits of an
// fp16, 32 bins to each power of two from 2^-14 to 2^16, of both signs. As a rule the bin in which the k-th falls holds a
// few keys, which are ranked by comparing them with each other. Many are narrowed down by further histograms,
// 11 bits at a time: of the keys within the bin, then, where equal keys are left to choose among, of ~position. Nothing is
// sampled and no buffer can overflow: what does not fit is narrowed first, whatever the values are.
//
// Grid    x: rows; y: parts of a row, as many as fill the chip. A row of few keys uses fewer of them, so that the cost
//         follows the lengths, not the width. Parts take turns, 32 vectors at a time: hot stretches are shared out.
// Block   reads its part once, a piece at a time in registers, the next one on its way meanwhile. The best so far are kept
//         in a list; a key must pass the gate, the least that can still be among the k largest, to get there. When the list
//         is full it is narrowed and the gate rises. A lone part ends with the k largest. Others publish what could be
//         among them: the front, as many of the largest as the merge has registers for, and the rest.
// Merge   one block a row, a second launch: no block waits for another one. It takes all fronts; only where a front ended
//         above the row's threshold does it look at that part's rest.
// Lane    16 bytes of the row at a time. Places in the output follow from ballots and sums, not from who came first: two
//         runs are bitwise equal.
// Bound   one row: latency, of loads, histograms and barriers; rows by the thousand: reading the logits.
#pragma once

#include "window.cuh"

struct TopkParams {
    const uint8* logits;     // [rows][logits_stride] fp32 or bf16
    int64 logits_stride;     // elements
    int columns;
    Windows windows;
    int ends_are_lengths;    // windows.ends count from the start
    int unit;                // a logit stands for so many of what windows count
    int nowhere;             // what stands past the end of a row's choice
    int k;
    int front;               // entries of a part's front
    int page;                // keys of a page; 1 without a table
    int page_shift;          // its logarithm, or -1
    int tokens;              // rows that share a row of the table
    int table_columns;       // pages that a row of the table has
    const int* table;        // [rows / tokens][table_stride] pages, or null
    const int* offset;       // [rows] what is added, or null
    int* out;                // [rows][out_stride]
    int* positions;          // [rows][positions_stride], or null
    float* scores;           // [rows][scores_stride], or null
    int64 table_stride, out_stride, positions_stride, scores_stride;
    // What parts leave for the merge: {key, position}, key 0 where there is none
    uint2* heads;            // [rows][parts] {entries of the rest, key that all of the front reach and nothing else does}
    uint2* fronts;           // [rows][parts][front]
    uint2* rests;            // [rows][parts][kCapacity]
    int parts;
};
static_assert(sizeof(TopkParams) == PARAMS_BYTES, "the launcher packs a different struct");

constexpr uint32 kAllLanes = 0xffffffff;
constexpr int kDigit = 11, kBins = 1 << kDigit;
constexpr int kMostK = kBins;
constexpr uint32 kNothing = 0, kNan = 1, kZero = 0x80000000;    // keys

__device__ inline uint32 key_of(float x) {
    const uint32 bits = __float_as_uint(x + 0.0f);    // -0 + 0 is +0
    return x == x ? bits ^ (uint32(int(bits) >> 31) | kZero) : kNan;
}

__device__ inline float value_of(uint32 key) {
    return __uint_as_float(key & kZero ? key ^ kZero : ~key);
}

// Bins, the largest keys first: of an fp16, rounded towards zero and inverted unless it is negative, the upper 11 bits.
constexpr int kBinShift = 16 - kDigit, kNegative = kBins / 2;

struct Bins { uint32 first, second; };

__device__ inline Bins bins_of(uint32 first, uint32 second) {
    const float lowest = __int_as_float(0xff800000);              // -inf instead of NaN
    const uint32 halves = ptx::cvt_rz_f16x2(fmaxf(value_of(second), lowest), fmaxf(value_of(first), lowest));
    const uint32 codes = halves ^ (~ptx::signs_of_halves(halves) & 0x7fff7fff);
    return {(codes & 0xffff) >> kBinShift, codes >> (16 + kBinShift)};
}

// The least key that is in bin `bin` or before it.
__device__ inline uint32 edge_of(int bin) {
    if (bin < kNegative) return kZero + __float_as_uint(ptx::float_of_half(((kNegative - 1 - bin) << kBinShift)));
    const uint32 past = (bin - kNegative + 1) << kBinShift;
    return past > 0x7c00 ? kNan : kZero - __float_as_uint(ptx::float_of_half(past));
}

// All that is at or above it is chosen.
struct Bound {
    uint32 key, tie;         // of two equal keys the one of the larger ~position is above

    __device__ bool reached(uint32 other, uint32 position) const {
        return tie == 0 ? other >= key : other > key || (other == key && ~position >= tie);
    }
};

// A block's choice among keys that come piece by piece. `kFresh`: keys of a piece in a lane. `kOrdered`: positions in later
// pieces are larger, so that later keys must be larger than the gate.
template <int kThreads, int kFresh, int kCapacity, bool kOrdered>
struct Choice {
    static constexpr int kWarps = kThreads / 32, kThreadBins = kBins / kThreads;
    static constexpr int kTies = kThreads < 512 ? 64 : 128;            // as many are ranked by comparing
    static_assert(kThreads % 32 == 0 && kWarps <= 32 && kBins % kThreads == 0);

    struct Match { int bin, above, inside; };         // the first bin by which there are as many as wanted

    struct Memory {
        uint4 histograms[2][kBins / 4];               // one is counted in, the other is cleared meanwhile
        uint2 list[kCapacity];                        // {key, position}
        uint2 ties[kTies];                            // {key, ~position}
        uint32 counts[2][kWarps], totals[kWarps];
        Match match[2];
        Bound bound;
        int tied;
    };

    using Keys = uint32[kFresh];

    Memory& memory;
    const int k, position_bits;
    const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int listed = 0;
    uint32 gate = kNan;
    int turn = 0, count_turn = 0;

    __device__ Choice(Memory& memory, int k, int length) : memory(memory), k(k), position_bits(32 - __clz(length)) {}

    __device__ void clear_histogram(int which) {
        #pragma unroll
        for (int i = thread; i < kBins / 4; i += kThreads) memory.histograms[which][i] = {0, 0, 0, 0};
    }

    // To be followed by a barrier before the first piece.
    __device__ void start() {
        clear_histogram(0);
        if (thread == 0) memory.tied = 0, memory.match[1].bin = kBins;
    }

    // All lanes of a warp visit as many. `visit(key, position)`
    template <class Position, class Visit>
    __device__ void each(const Keys& keys, Position position, Visit visit) const {
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) visit(keys[i], position(i));
        #pragma unroll 1
        for (int first = 0; first < listed; first += kThreads) {
            const uint2 entry = entry_of(first);
            visit(entry.x, entry.y);
        }
    }

    __device__ uint2 entry_of(int first) const {
        return first + thread < listed ? memory.list[first + thread] : uint2{kNothing, 0};
    }

    // ---- the bound ----

    __device__ void count(uint32 bin) {
        atomicAdd(reinterpret_cast<uint32*>(memory.histograms[turn]) + bin, 1);
    }

    __device__ void seek(Match& match, int want, int before, int sum, const uint32 (&bins)[kThreadBins]) const {
        if (before < want && before + sum >= want) {
            int bin = 0;
            #pragma unroll
            for (int i = 0; i + 1 < kThreadBins; ++i) {
                if (bin == i && before + int(bins[i]) < want) before += bins[i], bin = i + 1;
            }
            int inside = bins[0];
            #pragma unroll
            for (int i = 1; i < kThreadBins; ++i) inside = bin == i ? bins[i] : inside;
            match = {thread * kThreadBins + bin, before, inside};
        }
        if (thread == kThreads - 1 && before + sum < want) match = {kBins, before + sum, 0};
    }

    // After all lanes have counted. Also the match of `other` into memory.match[1], if it is more than 0.
    __device__ Match find(int want, int other) {
        const uint32* histogram = reinterpret_cast<const uint32*>(memory.histograms[turn]) + thread * kThreadBins;
        turn ^= 1;
        __syncthreads();
        uint32 bins[kThreadBins], sum = 0;
        #pragma unroll
        for (int i = 0; i < kThreadBins; ++i) sum += bins[i] = histogram[i];
        uint32 until = sum;
        #pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint32 below = __shfl_up_sync(kAllLanes, until, distance);
            if (lane >= distance) until += below;
        }
        if (lane == 31) memory.totals[warp] = until;
        clear_histogram(turn);
        __syncthreads();
        const int before = until - sum + __reduce_add_sync(kAllLanes, lane < warp ? memory.totals[lane] : 0);
        seek(memory.match[0], want, before, sum, bins);
        if (other > 0) seek(memory.match[1], other, before, sum, bins);
        __syncthreads();
        return memory.match[0];
    }

    // Digit by digit: the prefix of the words of those that `belong`, `bits` long, such that `want` or more, at most `room`,
    // are at or above it. `want` and `room` are left with what is to be had of those equal to it: want 0 where all are.
    template <class Position, class Belongs, class Word>
    __device__ uint32 descend(const Keys& keys, Position position, int bits, int& want, int& room, Belongs belongs, Word word) {
        uint32 prefix = 0;
        #pragma unroll 1
        do {
            const int shift = max(bits - kDigit, 0);
            const uint32 known = bits < 32 ? kAllLanes << bits : 0;
            each(keys, position, [&](uint32 key, uint32 position) {
                const uint32 rest = word(key, position) ^ prefix;
                if (belongs(key) && (rest & known) == 0) count(kBins - 1 - (rest >> shift));
            });
            const Match match = find(want, 0);
            prefix |= uint32(kBins - 1 - match.bin) << shift;
            want -= match.above, room -= match.above;
            if (match.inside <= room) want = 0;
            bits = shift;
        } while (want > 0 && bits > 0);
        return prefix;
    }

    // The bound that `want` of the keys from `low` up to, not including, `high` reach.
    template <class Position>
    __device__ Bound rank(const Keys& keys, Position position, int want, int inside, uint32 low, uint32 high) {
        each(keys, position, [&](uint32 key, uint32 position) {
            if (key >= low && key < high) memory.ties[atomicAdd(&memory.tied, 1)] = {key, ~position};
        });
        __syncthreads();
        uint2 others[kTies / 32];
        #pragma unroll
        for (int i = 0; i < kTies / 32; ++i) {
            others[i] = {kNothing, 0};
            if (32 * i < inside && 32 * i + lane < inside) others[i] = memory.ties[32 * i + lane];
        }
        #pragma unroll 1
        for (int i = warp; i < inside; i += kWarps) {
            const uint2 tie = memory.ties[i];
            int above = 0;
            #pragma unroll
            for (int j = 0; j < kTies / 32; ++j) {
                if (32 * j >= inside) break;
                const uint2 other = others[j];
                above += __popc(__ballot_sync(kAllLanes, other.x > tie.x || (other.x == tie.x && other.y > tie.y)));
            }
            if (above != want - 1) continue;
            bool alone = true;       // of the keys that are equal to it none is left out
            #pragma unroll
            for (const uint2& other : others) alone &= !(other.x == tie.x && other.y < tie.y);
            alone = __all_sync(kAllLanes, alone);
            if (lane == 0) memory.bound = {tie.x, alone ? 0 : tie.y};
        }
        if (thread == 0) memory.tied = 0;
        __syncthreads();
        return memory.bound;
    }

    // Finds a bound that k keys or more reach, but at most `room`; all do where there are no more than k. `front`, if it is
    // more than 0: also the least key such that it and larger ones are at most so many.
    template <class Position>
    __device__ Bound narrow(const Keys& keys, Position position, int room, int front, uint32& front_key) {
        static_assert(kFresh % 2 == 0);
        #pragma unroll
        for (int i = 0; i < kFresh; i += 2) {
            const Bins bins = bins_of(keys[i], keys[i + 1]);
            if (keys[i] != kNothing) count(bins.first);
            if (keys[i + 1] != kNothing) count(bins.second);
        }
        #pragma unroll 1
        for (int i = thread; i < listed; i += kThreads) count(bins_of(memory.list[i].x, kNan).first);
        const Match match = find(k, front > 0 ? front + 1 : 0);
        if (front > 0) {
            const int past = memory.match[1].bin;
            front_key = past == kBins ? kNan : past == 0 ? kAllLanes : edge_of(past - 1);
        }
        if (match.bin == kBins) return {kNan, 0};
        const uint32 low = edge_of(match.bin), high = match.bin == 0 ? kAllLanes : edge_of(match.bin - 1);
        int want = k - match.above;
        room -= match.above;
        if (match.inside <= room) return {low, 0};
        if (__builtin_expect(match.inside <= kTies, 1)) return rank(keys, position, want, match.inside, low, high);

        const uint32 key = low + descend(keys, position, 32 - __clz(high - low - 1), want, room,
                                         [&](uint32 key) { return key >= low && key < high; },
                                         [&](uint32 key, uint32) { return key - low; });
        if (want == 0) return {key, 0};
        const uint32 unused = kAllLanes << position_bits;         // bits that no position has
        return {key, unused | descend(keys, position, position_bits, want, room,
                                      [&](uint32 other) { return other == key; },
                                      [&](uint32, uint32 position) { return ~position ^ unused; })};
    }

    // ---- what becomes of those that reach it ----

    // Of the warps' counts the sum, and the sum before this one. A barrier.
    struct Places { int first, total; };

    __device__ Places share_out(int mine) {
        uint32* counts = memory.counts[count_turn];
        count_turn ^= 1;
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        const int count = lane < kWarps ? counts[lane] : 0;
        return {int(__reduce_add_sync(kAllLanes, lane < warp ? count : 0)), int(__reduce_add_sync(kAllLanes, count))};
    }

    // Of the fresh keys that equal the bound's those that do not reach it are nothing.
    template <class Position>
    __device__ void settle(Keys& keys, Position position, Bound bound) const {
        if (__builtin_expect(bound.tie == 0, 1)) return;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            if (keys[i] == bound.key && ~position(i) < bound.tie) keys[i] = kNothing;
        }
    }

    // `put(place, key, position)`, places from 0, for each one that reaches `bound` with a key from `low` up to, not
    // including, `high`; fresh ones are settled. Returns how many there are.
    template <class Position, class Put>
    __device__ int place(const Keys& keys, Position position, Bound bound, uint32 low, uint32 high, Put put) {
        uint32 fresh[kFresh];
        int mine = 0;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) mine += __popc(fresh[i] = __ballot_sync(kAllLanes, keys[i] >= low && keys[i] < high));
        auto chosen = [&](uint2 entry) { return entry.x >= low && entry.x < high && bound.reached(entry.x, entry.y); };
        #pragma unroll 1
        for (int first = 0; first < listed; first += kThreads) mine += __popc(__ballot_sync(kAllLanes, chosen(entry_of(first))));
        const Places places = share_out(mine);
        const uint32 self = 1u << lane;
        int first = places.first;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            if (fresh[i] & self) put(first + __popc(fresh[i] & (self - 1)), keys[i], position(i));
            first += __popc(fresh[i]);
        }
        #pragma unroll 1
        for (int of = 0; of < listed; of += kThreads) {
            const uint2 entry = entry_of(of);
            const bool mine = chosen(entry);
            const uint32 all = __ballot_sync(kAllLanes, mine);
            if (mine) put(first + __popc(all & (self - 1)), entry.x, entry.y);
            first += __popc(all);
        }
        return places.total;
    }

    template <class Position>
    __device__ void append(const Keys& keys, Position position, Places places) {
        int first = listed + places.first;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            const uint32 all = __ballot_sync(kAllLanes, keys[i] != kNothing);
            if (keys[i] != kNothing) memory.list[first + __popc(all & ((1u << lane) - 1))] = {keys[i], position(i)};
            first += __popc(all);
        }
        listed += places.total;
    }

    __device__ int count_in_warp(const Keys& keys) const {
        int mine = 0;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) mine += __popc(__ballot_sync(kAllLanes, keys[i] != kNothing));
        return mine;
    }

    // Those of the list and of the fresh keys that reach the bound are the list.
    template <class Position>
    __device__ void keep(Keys& keys, Position position, Bound bound) {
        int kept = 0;
        #pragma unroll 1
        for (int first = 0; first < listed; first += kThreads) {   // places never lie past those that have been read
            const uint2 entry = entry_of(first);
            const bool mine = bound.reached(entry.x, entry.y);
            const uint32 all = __ballot_sync(kAllLanes, mine);
            const Places places = share_out(__popc(all));
            if (mine) memory.list[kept + places.first + __popc(all & ((1u << lane) - 1))] = entry;
            kept += places.total;
        }
        settle(keys, position, bound);
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) keys[i] = keys[i] >= bound.key ? keys[i] : kNothing;
        const Places places = share_out(count_in_warp(keys));
        listed = kept;
        append(keys, position, places);
        gate = bound.key + kOrdered;
    }

    // Takes a piece of keys that pass the gate. The last one, or one for which the list has no room, is narrowed with the list: then the bound is
    // told, and of one that is not the last `keep` must follow.
    template <class Position>
    __device__ bool add(Keys& keys, Position position, bool last, int room, int front, Bound& bound, uint32& front_key) {
        const Places places = last ? Places{0, kCapacity} : share_out(count_in_warp(keys));
        if (listed + places.total <= kCapacity && !last) {
            append(keys, position, places);
            return false;
        }
        if (last && listed > 0) __syncthreads();       // what was put there is seen
        bound = narrow(keys, position, last ? room : k + (kCapacity - k) / 4, last ? front : 0, front_key);
        return true;
    }

    // The k largest, by `put(place, key, position)`, all lanes at once. Nothing can be chosen after it.
    template <bool kAscending, class Position, class Put>
    __device__ void emit(Keys& keys, Position position, Bound bound, Put put) {
        if constexpr (kAscending) {
            ascend(keys, position, bound, put);
        } else {
            uint2* chosen = reinterpret_cast<uint2*>(memory.histograms);
            static_assert(sizeof(memory.histograms) >= kMostK * sizeof(uint2));
            settle(keys, position, bound);
            place(keys, position, bound, bound.key, kAllLanes,
                  [&](int at, uint32 key, uint32 position) { chosen[at] = {key, position}; });
            __syncthreads();
            #pragma unroll 1
            for (int i = thread; i < k; i += kThreads) put(i, chosen[i].x, chosen[i].y);
        }
    }

    // The same in the order of positions: a bit for each position, as many at a time as there is memory for.
    template <class Position, class Put>
    __device__ void ascend(const Keys& keys, Position position, Bound bound, Put put) {
        constexpr int kWords = kBins, kThreadWords = kWords / kThreads;
        static_assert(kBins >= kMostK);
        uint32* bits = reinterpret_cast<uint32*>(memory.histograms[0]);
        uint32* chosen = reinterpret_cast<uint32*>(memory.histograms[1]);
        int before = 0;
        #pragma unroll 1
        for (uint32 first = 0; before < k; first += 32 * kWords) {
            __syncthreads();                           // what stood there has been read
            #pragma unroll
            for (int i = 0; i < kThreadWords; ++i) bits[thread * kThreadWords + i] = 0;
            __syncthreads();
            each(keys, position, [&](uint32 key, uint32 position) {
                const uint32 bit = position - first;
                if (bound.reached(key, position) && bit < 32 * kWords) atomicOr(&bits[bit / 32], 1u << bit % 32);
            });
            __syncthreads();
            uint32 words[kThreadWords];
            int sum = 0;
            #pragma unroll
            for (int i = 0; i < kThreadWords; ++i) words[i] = bits[thread * kThreadWords + i], sum += __popc(words[i]);
            int until = sum;
            #pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int below = __shfl_up_sync(kAllLanes, until, distance);
                if (lane >= distance) until += below;
            }
            const Places places = share_out(__shfl_sync(kAllLanes, until, 31));
            int at = before + places.first + until - sum;
            #pragma unroll
            for (int i = 0; i < kThreadWords; ++i) {
                for (uint32 word = words[i]; word != 0; word &= word - 1) {
                    chosen[at++] = first + (thread * kThreadWords + i) * 32 + __ffs(word) - 1;
                }
            }
            before += places.total;
        }
        __syncthreads();
        #pragma unroll 1
        for (int i = thread; i < k; i += kThreads) put(i, kNan, chosen[i]);
    }
};

// Where a row lies, and what becomes of its choice.
template <int kShare>
struct Row {
    const TopkParams& p;
    int row, begin, length;

    __device__ explicit Row(const TopkParams& p) : p(p), row(blockIdx.x) {
        const Window window = p.windows.of(row);
        begin = window.begin;
        length = p.ends_are_lengths ? window.end : window.end - begin;
        if (p.unit > 1) length = (uint32(length) + p.unit - 1) / p.unit;
        length = min(length, p.columns - begin);
    }

    // A part has `kShare` keys at least, where there are several.
    __device__ int parts() const { return max(1, min(p.parts, (length + kShare - 1) / kShare)); }

    __device__ int page_of(uint32 position) const {
        return p.page_shift >= 0 ? position >> p.page_shift : position / uint32(p.page);
    }

    __device__ const int* pages() const { return p.table + (p.tokens > 1 ? row / p.tokens : row) * p.table_stride; }

    // Lengths may promise more pages than the table has: those are taken for its last one.
    __device__ int column_of(int page) const { return min(page, p.table_columns - 1); }

    // The row's pages are on their way to L1 while there is nothing else to do.
    __device__ void fetch_pages() const {
        constexpr int kLine = 32;
        if (!p.table) return;
        const int last = column_of(page_of(length - 1));
        for (int i = threadIdx.x * kLine; i <= last; i += blockDim.x * kLine) {
            ptx::load_word(pages() + i);
        }
    }

    __device__ void put(int at, uint32 key, uint32 position) const {
        const bool any = key != kNothing;
        int place = position;
        if (any && p.table) {
            const int page = page_of(position);
            const uint32 found = p.table_columns > 0 ? ptx::load_word(pages() + column_of(page)) : 0;
            place = found * p.page + (position - page * p.page);
        }
        if (any && p.offset) place += int(ptx::load_word(p.offset + row));
        p.out[row * p.out_stride + at] = any ? place : p.nowhere;
        if (p.positions) p.positions[row * p.positions_stride + at] = any ? int(position) : p.nowhere;
        if (p.scores) p.scores[row * p.scores_stride + at] = any ? value_of(key) : __int_as_float(0xff800000);
    }
};

// 16 bytes of logits at a time.
template <class Logit>
struct Vector {
    static constexpr int kKeys = 16 / sizeof(Logit);
    uint32 words[4];

    // Those of the row's keys `first` .. first + kKeys that it has; `address` is that of `first`, and aligned.
    __device__ void load(const uint8* address, uint32 first, uint32 length) {
        if (first < length && length - first >= kKeys) {
            ptx::load<4>(words, address);
        } else {
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                words[i] = 0;
                #pragma unroll
                for (int j = 0; j < kKeys / 4; ++j) {
                    if (first + (i * kKeys / 4 + j) >= length) continue;
                    if constexpr (kKeys == 4) words[i] = ptx::load_word(address + 4 * i);
                    else words[i] |= ptx::load_half(address + 4 * i + 2 * j) << 16 * j;
                }
            }
        }
    }

    __device__ float value(int i) const {
        if constexpr (kKeys == 4) return __uint_as_float(words[i]);
        else return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    }
};

// Grid: x rows, y parts.
template <class Logit, int kThreads, int kVectors, int kCapacity, int kShare, bool kAscending>
__device__ inline void choose(const TopkParams& p) {
    using Vec = Vector<Logit>;
    constexpr int kPerVector = Vec::kKeys, kFresh = kVectors * kPerVector, kWarps = kThreads / 32;
    using Chosen = Choice<kThreads, kFresh, kCapacity, true>;
    __shared__ typename Chosen::Memory memory;

    ptx::griddepcontrol();
    const Row<kShare> row(p);
    const int parts = row.parts(), part = blockIdx.y;
    if (part >= parts) return;
    if (row.length <= p.k) {
        for (int i = threadIdx.x; i < p.k; i += kThreads) {
            const bool any = i < row.length;
            uint32 key = any ? kNan : kNothing;
            if (any && p.scores) {
                const Logit* logit = reinterpret_cast<const Logit*>(p.logits) + row.row * p.logits_stride + row.begin + i;
                if constexpr (kPerVector == 4) key = key_of(__uint_as_float(ptx::load_word(logit)));
                else key = key_of(__uint_as_float(ptx::load_half(logit) << 16));
            }
            row.put(i, key, i);
        }
        return;
    }

    const uint8* begin = p.logits + (row.row * p.logits_stride + row.begin) * int64(sizeof(Logit));
    const int skew = reinterpret_cast<unsigned long long>(begin) % 16 / sizeof(Logit);  // keys before the row's first one
    begin -= skew * sizeof(Logit);
    const int chunks = (skew + row.length + (32 * kPerVector - 1)) / (32 * kPerVector);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    Vec vectors[kVectors];
    auto vector_of = [&](int piece, int i) { return (((piece * kVectors + i) * kWarps + warp) * parts + part) * 32 + lane; };
    auto load = [&](int piece) {
        #pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int vector = vector_of(piece, i);
            vectors[i].load(begin + vector * int64(16), uint32(vector) * kPerVector - skew, row.length);
        }
    };
    load(0);
    Chosen choice(memory, p.k, row.length);
    choice.start();
    if (parts == 1) row.fetch_pages();
    __syncthreads();
    #pragma unroll 1
    for (int piece = 0;; ++piece) {
        auto position = [&](int i) {
            return uint32(vector_of(piece, i / kPerVector)) * kPerVector + i % kPerVector - skew;
        };
        uint32 keys[kFresh];
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            const uint32 key = key_of(vectors[i / kPerVector].value(i % kPerVector));
            keys[i] = position(i) < uint32(row.length) && key >= choice.gate ? key : kNothing;
        }
        const bool last = (piece + 1) * kVectors * kWarps * parts + part >= chunks;
        if (!last) load(piece + 1);
        Bound bound;
        uint32 front_key = 0;
        if (!choice.add(keys, position, last, parts == 1 ? p.k : kCapacity, parts == 1 ? 0 : p.front, bound, front_key)) continue;
        if (!last) {
            choice.keep(keys, position, bound);
            continue;
        }
        if (parts == 1) {
            choice.template emit<kAscending>(keys, position, bound, [&](int at, uint32 key, uint32 position) { row.put(at, key, position); });
            return;
        }
        const int64 region = int64(row.row) * p.parts + part;
        uint2 *front = p.fronts + region * p.front, *rest = p.rests + region * kCapacity;
        choice.settle(keys, position, bound);
        const int in_front = choice.place(keys, position, bound, max(front_key, bound.key), kAllLanes,
            [&](int at, uint32 key, uint32 position) { front[at] = {key, position}; });
        for (int i = in_front + threadIdx.x; i < p.front; i += kThreads) front[i] = {kNothing, 0};
        const int in_rest = choice.place(keys, position, bound, bound.key, front_key,
            [&](int at, uint32 key, uint32 position) { rest[at] = {key, position}; });
        if (threadIdx.x == 0) p.heads[region] = {uint32(in_rest), front_key};
        return;
    }
}

// Grid: x rows. `kFronts`: entries of all fronts of a row.
template <int kThreads, int kFronts, int kCapacity, int kShare, bool kAscending>
__device__ inline void merge(const TopkParams& p) {
    constexpr int kFresh = kFronts / kThreads;
    using Chosen = Choice<kThreads, kFresh, kCapacity, false>;
    __shared__ typename Chosen::Memory memory;
    const int thread = threadIdx.x;

    const Row<kShare> row(p);  // the lengths are older than the kernel before this one, which has waited for them
    const int parts = row.parts();
    if (row.length <= p.k || parts == 1) {
        ptx::griddepcontrol();
        return;
    }
    Chosen choice(memory, p.k, row.length);
    choice.start();
    row.fetch_pages();
    ptx::griddepcontrol();

    const int64 first = int64(row.row) * p.parts;
    uint32 keys[kFresh], positions[kFresh];
    auto load = [&](const uint2* entries, int count) {
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            const int at = i * kThreads + thread;
            uint32 entry[2] = {kNothing, 0};
            if (at < count) ptx::load<2>(entry, entries + at);
            keys[i] = entry[0] >= choice.gate ? entry[0] : kNothing, positions[i] = entry[1];
        }
    };
    uint32 head[2] = {0, 0}, none;
    if (thread < parts) ptx::load<2>(head, p.heads + first + thread);
    load(p.fronts + first * p.front, parts * p.front);
    auto position = [&](int i) { return positions[i]; };
    __syncthreads();

    Bound bound;
    choice.add(keys, position, true, p.k, 0, bound, none);
    if (__builtin_expect(__syncthreads_or(head[0] > 0 && head[1] > bound.key), 0)) {   // keys past a front may reach it
        choice.keep(keys, position, bound);
        #pragma unroll 1
        for (int part = 0; part <= parts; ++part) {
            head[0] = 0;
            if (part < parts) ptx::load<2>(head, p.heads + first + part);
            const bool last = part == parts;
            if (!last && (head[0] == 0 || head[1] <= choice.gate)) continue;
            uint32 done = 0;
            #pragma unroll 1
            do {
                load(p.rests + (first + part) * kCapacity + done, int(head[0] - done));
                if (choice.add(keys, position, last, p.k, 0, bound, none) && !last) choice.keep(keys, position, bound);
                done += kFronts;
            } while (done < head[0]);
        }
    }
    choice.template emit<kAscending>(keys, position, bound, [&](int at, uint32 key, uint32 position) { row.put(at, key, position); });
}
