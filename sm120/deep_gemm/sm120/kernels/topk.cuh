// The k largest of each row, exactly: larger values first, among equal ones the smaller position; -0 equals +0, and NaN is
// below everything. A row of at most k keys gives all of its positions, and its logits are not read.
//
//     out[row, i] = position, -1 past the end; or as pages: table[row, position / page] * page + position % page; + offset[row]
//
// A value becomes a key, an uint32 of the same order (0: nothing); a key and ~position together are in order without ties.
// The least of the k largest is found digit by digit, 11 bits at a time, with a histogram in shared memory each: first the
// key's digits, then, where equal keys are left to choose among, those of ~position. In fp32 two digits usually do. Nothing
// is sampled and no buffer can overflow: what does not fit is narrowed first, whatever the values are.
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
    Windows windows;         // limit: columns
    int ends_are_lengths;    // windows.ends count from the start
    int k;
    int share;               // keys that a part takes at least, where a row has several
    int front;               // entries of a part's front
    int page;                // keys of a page; 1 without a table
    const int* table;        // [rows][table_stride] pages, or null
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
constexpr uint32 kNothing = 0, kNan = 1;

__device__ inline uint32 key_of(float x) {
    const uint32 bits = __float_as_uint(x + 0.0f);    // -0 + 0 is +0
    return x == x ? bits ^ (uint32(int(bits) >> 31) | 0x80000000) : kNan;
}

__device__ inline float value_of(uint32 key) {
    return __uint_as_float(key & 0x80000000 ? key ^ 0x80000000 : ~key);
}

// All that is at or above it is chosen.
struct Bound {
    uint32 key, tie;         // of two equal keys the one of the larger ~position is above

    __device__ bool reached(uint32 other, uint32 position) const {
        return other > key || (other == key && ~position >= tie);
    }
};

template <int kThreads, int kCapacity>
struct Shared {
    uint4 histograms[2][kBins / 4];                   // one is counted in, the other is cleared meanwhile
    uint32 totals[2][kThreads / 32], counts[2][kThreads / 32];
    uint2 list[kCapacity];                            // {key, position}
};

// A block's choice among keys that come piece by piece. `kFresh`: keys of a piece in a lane. `kOrdered`: positions in later
// pieces are larger, so that later keys must be larger than the gate.
template <int kThreads, int kFresh, int kCapacity, bool kOrdered>
struct Choice {
    static constexpr int kWarps = kThreads / 32, kListed = kCapacity / kThreads;
    static constexpr int kLaneBins = kBins / kThreads, kWarpBins = 32 * kLaneBins;
    static_assert(kCapacity % kThreads == 0 && kWarps <= 32 && kLaneBins >= 1);

    using Memory = Shared<kThreads, kCapacity>;
    using Keys = uint32[kFresh];
    using List = uint2[kListed];

    Memory& memory;
    const int k, position_bits;
    const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int listed = 0;
    uint32 gate = kNan;
    int turn = 0, count_turn = 0;

    __device__ Choice(Memory& memory, int k, int length)
        : memory(memory), k(k), position_bits(32 - __clz(length)) {}

    __device__ void clear_histogram(int which) {
        for (int i = thread; i < kBins / 4; i += kThreads) memory.histograms[which][i] = {0, 0, 0, 0};
    }

    // To be followed by a barrier before the first piece.
    __device__ void start() { clear_histogram(0), clear_histogram(1); }

    template <class Position, class Visit>
    __device__ void each(const Keys& keys, Position position, const List& list, Visit visit) {
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) visit(keys[i], position(i));
        if (listed > 0) {
            #pragma unroll
            for (int i = 0; i < kListed; ++i) visit(list[i].x, list[i].y);
        }
    }

    // The highest bin such that it and those above hold at least `want`.
    struct Crossing { int bin, above, inside, total; };

    __device__ Crossing cross(int which, int want) const {
        uint32 sum = lane < kWarps ? memory.totals[which][lane] : 0;
        #pragma unroll
        for (int distance = 1; distance < kWarps; distance *= 2) {
            const uint32 above = __shfl_down_sync(kAllLanes, sum, distance);
            if (lane + distance < 32) sum += above;
        }
        Crossing found;
        found.total = __shfl_sync(kAllLanes, sum, 0);
        const int from = 31 - __clz(__ballot_sync(kAllLanes, sum >= want) | 1);
        found.above = __shfl_sync(kAllLanes, sum, (from + 1) % 32);
        if (from == 31) found.above = 0;

        const uint32* bins = reinterpret_cast<const uint32*>(memory.histograms[which]) + from * kWarpBins + lane * kLaneBins;
        uint32 count[kLaneBins], inside = 0;
        #pragma unroll
        for (int i = 0; i < kLaneBins; ++i) inside += count[i] = bins[i];
        sum = inside;
        #pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint32 above = __shfl_down_sync(kAllLanes, sum, distance);
            if (lane + distance < 32) sum += above;
        }
        const int of = 31 - __clz(__ballot_sync(kAllLanes, found.above + sum >= want) | 1);
        int above = found.above + sum - inside, bin = kLaneBins - 1;
        #pragma unroll
        for (int i = kLaneBins - 1; i > 0; --i) {
            if (bin == i && above + count[i] < want) above += count[i], bin = i - 1;
        }
        uint32 here = count[0];
        #pragma unroll
        for (int i = 1; i < kLaneBins; ++i) here = bin == i ? count[i] : here;
        found.bin = from * kWarpBins + of * kLaneBins + __shfl_sync(kAllLanes, bin, of);
        found.above = __shfl_sync(kAllLanes, above, of);
        found.inside = __shfl_sync(kAllLanes, here, of);
        return found;
    }

    // After all lanes have counted: sums up the histogram's share of each warp, and clears the other one.
    __device__ int count_up() {
        const int which = turn;
        turn ^= 1;
        __syncthreads();
        const uint32* bins = reinterpret_cast<const uint32*>(memory.histograms[which]) + thread * kLaneBins;
        uint32 sum = 0;
        #pragma unroll
        for (int i = 0; i < kLaneBins; ++i) sum += bins[i];
        sum = __reduce_add_sync(kAllLanes, sum);
        if (lane == 0) memory.totals[which][warp] = sum;
        clear_histogram(turn);
        __syncthreads();
        return which;
    }

    __device__ void count(uint32 digit) {
        atomicAdd(reinterpret_cast<uint32*>(memory.histograms[turn]) + digit, 1);
    }

    // Finds a bound that k keys or more reach, but at most `room`; all do where there are no more than k. `front`: also the
    // least key such that at most so many reach it and larger ones.
    template <class Position>
    __device__ Bound narrow(const Keys& keys, Position position, const List& list, int room, int front, uint32& front_key) {
        int want = k;
        uint32 prefix = 0, known = 0;
        #pragma unroll 1
        for (int shift = 32 - kDigit;; shift = max(shift - kDigit, 0)) {
            each(keys, position, list, [&](uint32 key, uint32) {
                if (key != kNothing && ((key ^ prefix) & known) == 0) count((key & ~known) >> shift);
            });
            const int which = count_up();
            const Crossing found = cross(which, want);
            if (known == 0 && front > 0) {
                front_key = found.total <= front ? kNan : uint32(cross(which, front + 1).bin + 1) << shift;
            }
            if (found.total <= want) return {kNan, 0};
            prefix |= uint32(found.bin) << shift, known = kAllLanes << shift;
            want -= found.above, room -= found.above;
            if (found.inside <= room) return {max(prefix, kNan), 0};
            if (shift == 0) break;
        }
        uint32 tie = kAllLanes << position_bits;
        #pragma unroll 1
        for (int bits = position_bits;;) {
            const int shift = max(bits - kDigit, 0);
            each(keys, position, list, [&](uint32 key, uint32 position) {
                if (key == prefix && ((~position ^ tie) & (kAllLanes << bits)) == 0) count((~position ^ tie) >> shift);
            });
            const Crossing found = cross(count_up(), want);
            tie |= uint32(found.bin) << shift, bits = shift;
            want -= found.above, room -= found.above;
            if (found.inside <= room) return {prefix, tie};
        }
    }

    // `put(place, key, position)` for each key that is chosen, places from 0; returns how many there are.
    template <class Position, class Chosen, class Put>
    __device__ int place(const Keys& keys, Position position, const List& list, Chosen chosen, Put put) {
        int mine = 0;
        each(keys, position, list, [&](uint32 key, uint32 position) {
            mine += __popc(__ballot_sync(kAllLanes, chosen(key, position)));
        });
        uint32* counts = memory.counts[count_turn];
        count_turn ^= 1;
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        const int count = lane < kWarps ? counts[lane] : 0;
        int first = __reduce_add_sync(kAllLanes, lane < warp ? count : 0);
        each(keys, position, list, [&](uint32 key, uint32 position) {
            const bool mine = chosen(key, position);
            const uint32 all = __ballot_sync(kAllLanes, mine);
            if (mine) put(first + __popc(all & ((1u << lane) - 1)), key, position);
            first += __popc(all);
        });
        return __reduce_add_sync(kAllLanes, count);
    }

    __device__ void load(List& list) const {
        #pragma unroll
        for (int i = 0; i < kListed; ++i) {
            const int at = i * kThreads + thread;
            list[i] = at < listed ? memory.list[at] : uint2{kNothing, 0};
        }
    }

    __device__ void pass_gate(Keys& keys) const {
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) keys[i] = keys[i] >= gate ? keys[i] : kNothing;
    }

    // Keys at hand and, if `listed`, those of the list: chosen by `bound`, they are the list.
    template <class Position>
    __device__ void keep(const Keys& keys, Position position, const List& list, Bound bound) {
        listed = place(keys, position, list,
                       [&](uint32 key, uint32 position) { return bound.reached(key, position); },
                       [&](int at, uint32 key, uint32 position) { memory.list[at] = {key, position}; });
        gate = bound.key + kOrdered;
    }

    // A piece that is not the last one.
    template <class Position>
    __device__ void add(Keys& keys, Position position) {
        pass_gate(keys);
        int passing = 0;
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) passing += keys[i] != kNothing;
        const int before = listed;
        List list;
        // Only the fresh ones are placed: the list is left out of it for a while.
        listed = 0;
        const int mine = __reduce_add_sync(kAllLanes, passing);
        uint32* counts = memory.counts[count_turn];
        count_turn ^= 1;
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        const int count = lane < kWarps ? counts[lane] : 0;
        const int total = __reduce_add_sync(kAllLanes, count);
        if (before + total <= kCapacity) {
            int first = before + __reduce_add_sync(kAllLanes, lane < warp ? count : 0);
            #pragma unroll
            for (int i = 0; i < kFresh; ++i) {
                const uint32 all = __ballot_sync(kAllLanes, keys[i] != kNothing);
                if (keys[i] != kNothing) memory.list[first + __popc(all & ((1u << lane) - 1))] = {keys[i], position(i)};
                first += __popc(all);
            }
            listed = before + total;
        } else {
            listed = before;
            uint32 unused;
            load(list);
            keep(keys, position, list, narrow(keys, position, list, (k + kCapacity) / 2, 0, unused));
        }
    }

    // The last piece: `use(keys, position, list, bound)`, chosen among it and the list.
    template <class Position, class Use>
    __device__ void finish(Keys& keys, Position position, int room, int front, Use use) {
        pass_gate(keys);
        List list;
        if (listed > 0) __syncthreads();               // what was put there is seen
        load(list);
        uint32 front_key = 0;
        const Bound bound = narrow(keys, position, list, room, front, front_key);
        use(list, bound, front_key);
    }
};

// Where a row lies, and what becomes of its choice.
struct Row {
    const TopkParams& p;
    int row, begin, length;

    __device__ explicit Row(const TopkParams& p) : p(p), row(blockIdx.x) {
        const Window window = p.windows.of(row);
        begin = window.begin;
        length = p.ends_are_lengths ? min(window.end, p.windows.limit - begin) : window.end - begin;
    }

    __device__ int parts() const { return min(p.parts, (length + p.share - 1) / p.share); }

    __device__ void put(int at, uint32 key, uint32 position) const {
        const bool any = key != kNothing;
        int place = position;
        if (any && p.table) {
            const int page = position / uint32(p.page);
            place = int(ptx::load_word(p.table + row * p.table_stride + page)) * p.page + (place - page * p.page);
        }
        if (any && p.offset) place += int(ptx::load_word(p.offset + row));
        p.out[row * p.out_stride + at] = any ? place : -1;
        if (p.positions) p.positions[row * p.positions_stride + at] = any ? int(position) : -1;
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
template <class Logit, int kThreads, int kVectors, int kCapacity>
__device__ inline void choose(const TopkParams& p) {
    using Vec = Vector<Logit>;
    constexpr int kPerVector = Vec::kKeys, kFresh = kVectors * kPerVector, kWarps = kThreads / 32;
    using Chosen = Choice<kThreads, kFresh, kCapacity, true>;
    using List = typename Chosen::List;
    __shared__ typename Chosen::Memory memory;

    ptx::griddepcontrol();
    const Row row(p);
    const int parts = row.parts(), part = blockIdx.y;
    if (part >= max(parts, 1)) return;
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
    const int pieces = max(1, ((chunks - part + parts - 1) / parts + kWarps * kVectors - 1) / (kWarps * kVectors));
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
            keys[i] = position(i) < uint32(row.length) ? key : kNothing;
        }
        if (piece + 1 < pieces) {
            load(piece + 1);
            choice.add(keys, position);
            continue;
        }
        if (parts == 1) {
            choice.finish(keys, position, p.k, 0, [&](const List& list, Bound bound, uint32) {
                choice.place(keys, position, list,
                             [&](uint32 key, uint32 position) { return bound.reached(key, position); },
                             [&](int at, uint32 key, uint32 position) { row.put(at, key, position); });
            });
        } else {
            choice.finish(keys, position, kCapacity, p.front, [&](const List& list, Bound bound, uint32 front_key) {
                const int64 region = int64(row.row) * p.parts + part;
                uint2 *front = p.fronts + region * p.front, *rest = p.rests + region * kCapacity;
                const int in_front = choice.place(keys, position, list,
                    [&](uint32 key, uint32 position) { return key >= front_key && bound.reached(key, position); },
                    [&](int at, uint32 key, uint32 position) { front[at] = {key, position}; });
                for (int i = in_front + threadIdx.x; i < p.front; i += kThreads) front[i] = {kNothing, 0};
                const int in_rest = choice.place(keys, position, list,
                    [&](uint32 key, uint32 position) { return key < front_key && bound.reached(key, position); },
                    [&](int at, uint32 key, uint32 position) { rest[at] = {key, position}; });
                if (threadIdx.x == 0) p.heads[region] = {uint32(in_rest), front_key};
            });
        }
        return;
    }
}

// Grid: x rows. `kFronts`: entries of all fronts of a row.
template <int kThreads, int kFronts, int kCapacity>
__device__ inline void merge(const TopkParams& p) {
    constexpr int kFresh = kFronts / kThreads;
    using Chosen = Choice<kThreads, kFresh, kCapacity, false>;
    using List = typename Chosen::List;
    __shared__ typename Chosen::Memory memory;
    const int thread = threadIdx.x;

    const Row row(p);        // the lengths are older than the kernel before this one, which has waited for them
    const int parts = row.parts();
    Chosen choice(memory, p.k, row.length);
    choice.start();
    ptx::griddepcontrol();
    if (row.length <= p.k || parts == 1) return;

    const int64 first = int64(row.row) * p.parts;
    uint32 keys[kFresh], positions[kFresh];
    auto position = [&](int i) { return positions[i]; };
    auto load = [&](const uint2* entries, int count) {
        #pragma unroll
        for (int i = 0; i < kFresh; ++i) {
            const int at = i * kThreads + thread;
            uint32 entry[2] = {kNothing, 0};
            if (at < count) ptx::load<2>(entry, entries + at);
            keys[i] = entry[0], positions[i] = entry[1];
        }
    };
    uint32 head[2] = {0, 0};
    if (thread < parts) ptx::load<2>(head, p.heads + first + thread);
    load(p.fronts + first * p.front, parts * p.front);
    __syncthreads();

    auto emit = [&](const List& list, Bound bound, uint32) {
        choice.place(keys, position, list,
                     [&](uint32 key, uint32 position) { return bound.reached(key, position); },
                     [&](int at, uint32 key, uint32 position) { row.put(at, key, position); });
    };
    choice.finish(keys, position, p.k, 0, [&](const List& list, Bound bound, uint32) {
        const bool more = head[0] > 0 && head[1] > bound.key;     // keys past this front may reach the bound
        if (!__syncthreads_or(more)) {
            emit(list, bound, 0);
            return;
        }
        choice.keep(keys, position, list, bound);
        #pragma unroll 1
        for (int part = 0; part < parts; ++part) {
            uint32 head[2];
            ptx::load<2>(head, p.heads + first + part);
            if (head[0] == 0 || head[1] <= choice.gate) continue;
            for (uint32 done = 0; done < head[0]; done += kFronts) {
                load(p.rests + (first + part) * kCapacity + done, head[0] - done);
                choice.add(keys, position);
            }
        }
        load(nullptr, 0);
        choice.finish(keys, position, p.k, 0, emit);
    });
}
