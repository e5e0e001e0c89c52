// The k largest of each row, exactly: larger values first, among equal ones the smaller position; -0 equals +0, and NaN is
// below everything. A row of at most k keys gives all of its positions, and its logits are not read.
//
//     out[row, i] = position, -1 past the end; or as pages: table[row, position / page] * page + position % page; + offset[row]
//
// The same for candidates of a sparse indexer: the keys are maxima of blocks of keys, the lists ascend, and end in 2^31 - 1.
// Rows may begin within a run of keys: their lists have numbers of the run's blocks.
//
// The least of the k largest is found by a histogram in shared memory. Its bins are made for logits: the upper bits of an
// fp16, 32 or 64 bins to each power of two from 2^-14 to 2^16, of both signs. As a rule the bin in which the k-th falls holds a few
// keys, which are ranked by comparing them with each other.
//
// Whole   a block holds its row, or its part of one, in registers, counts all of it, and takes what lies above the bin.
// Sifted  longer rows go by in pieces, of which each warp has a chunk; pieces take turns at chunks, so that the first one is
//         a sample of the row. Of that one the maxima of small groups are counted alone: a gate is found that its share of
//         the k largest reach, and a quarter more. What reaches it is listed, of later pieces, too. When the list is full,
//         the gate rises to about its k-th. The k largest are taken from the list; there bins are of equal size, from its
//         least to its largest key. If it has fewer, the sample was none: once more, with a gate that k groups reach.
// Ahead   where few blocks share an SM, the next piece is on its way while this one is listed. Its registers are those of
//         this one, so listed keys are looked up again, in L1. Where many do, that no longer has them.
// Parts   few rows are shared out among blocks, 8 vectors at a time, so that hot stretches are too. Each part publishes its
//         front: as many of the largest as the merge has registers for, and the gate that all of them reach and nothing else.
// Merge   one block a row, a second launch: no block waits for another one. Only if a part's gate lies above the k-th of
//         all fronts can keys be missing: then as below.
// Slowly  what does not fit, whatever the values are (equal, NaN, all in one bin or one part): one block reads the row again
//         for each digit of the k-th key and of its position. Slower, never different.
// Guess   few rows wait for one load after the other: their bounds are read before the kernel waits for the one before it,
//         and again together with the logits that they lead to. If they have changed, those are loaded once more.
// Lane    16 bytes of the row at a time. Places in the output follow from ballots and sums, not from who came first: two
//         runs are bitwise equal.
// Bound   one row: latency, of loads, histograms and barriers; rows by the thousand: reading the logits.
#pragma once

#include "order.cuh"
#include "window.cuh"

struct TopkParams {
    const uint8* logits;     // [rows][logits_stride] fp32 or bf16
    int64 logits_stride;     // elements
    int columns;
    Windows windows;
    int ends_are_lengths;    // windows.ends count from the start
    int unit;                // a logit stands for a block of so many of what windows count; 0: for one, a position
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
    // What parts leave for the merge
    float* gates;            // [rows][parts] what all of a front reach, and nothing else of the part does
    uint2* fronts;           // [rows][parts][front] {value, position}, NaN where there is none
    int parts;
    int compressed;          // column 0 is the block with the row's first key, not that with the run's
};

constexpr uint32 kAllLanes = 0xffffffff;

// ---- bins: the largest values first, NaN in bin 0, which counts for nothing ----

// Of an fp16, rounded towards zero and inverted unless it is negative, the upper bits.
template <int kDigit>
struct Bins {
    static constexpr int kShift = 16 - kDigit, kCount = 1 << kDigit, kNegative = kCount / 2;

    // Of two values, without the sign of -0; that of `second` in the upper half.
    __device__ static uint32 codes(float first, float second) {
        const uint32 halves = ptx::cvt_rz_f16x2(second + 0.0f, first + 0.0f);
        return halves ^ (~ptx::signs_of_halves(halves) & 0x7fff7fff);
    }

    // The least value that is in a bin or before it; of bins before that of +inf NaN, which none reaches.
    __device__ static float edge(int bin) {
        const bool negative = bin >= kNegative;         // what is past it is not in it
        const int half = (negative ? bin + 1 : kNegative - 1 - bin) << kShift;
        const float value = __int_as_float(__float_as_int(ptx::float_of_half(half)) - int(negative));
        return bin >= kNegative + (0x7c00 >> kShift) ? lowest() : value;
    }
};

// ---- rows ----

// 16 bytes of logits at a time.
template <class Logit>
struct Vector {
    static constexpr int kKeys = 16 / sizeof(Logit);
    uint32 words[4];

    __device__ float value(int i) const {
        if constexpr (kKeys == 4) return __uint_as_float(words[i]);
        else return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    }
};

// The parameters' cache lines are on their way while there is nothing else to do.
__device__ inline void fetch_parameters(const TopkParams& p) {
    asm volatile("" :: "l"(p.logits), "r"(p.ends_are_lengths), "l"(p.table), "l"(p.out), "l"(p.scores_stride), "r"(p.parts));
}

// Where a row lies, and what becomes of its choice. kUnits: a logit may stand for a block of what windows count.
template <class Logit, bool kUnits>
struct Row {
    using Vec = Vector<Logit>;
    static constexpr int kKeys = Vec::kKeys;

    const TopkParams& p;
    int row, length;
    const uint8* begin;      // its first key
    int skew;                // keys before that one in its vector
    uint32 base = 0;         // kUnits: the block that is the row's first one

    // What a row's bounds are made of; and where that stands. A row may have no start.
    struct Words {
        int end, start;
        __device__ bool operator==(Words other) const { return end == other.end && start == other.start; }
    };
    struct Sources { const int* end; const int* start; };

    __device__ static Sources sources(const TopkParams& p) {
        const Windows& of = p.windows;
        const int row = blockIdx.x, own = p.ends_are_lengths || of.lengths_per_row == of.next_n;
        return {of.ends + (own ? row : row / of.next_n), of.starts ? of.starts + row : nullptr};
    }

    __device__ static Words read(Sources from) {
        return {int(ptx::load_word(from.end)), from.start ? int(ptx::load_word(from.start)) : 0};
    }

    // As they stand in memory now, whatever has been read before. No branch waits for them.
    __device__ static Words read_anew(Sources from) {
        uint32 start = 0;
        ptx::load_anew_if(start, from.start, from.start != nullptr);
        return {int(ptx::load_anew(from.end)), int(start)};
    }

    __device__ explicit Row(const TopkParams& p) : Row(p, read(sources(p))) {}

    __device__ Row(const TopkParams& p, Words words) : p(p), row(blockIdx.x) { place(words); }

    __device__ void place(Words words) {
        int first = max(words.start, 0);
        if (p.ends_are_lengths) {
            length = max(0, min(words.end, p.windows.limit));
        } else {
            const Window window = p.windows.of(row, [&](const int*) { return words.end; }, [&](const int*) { return words.start; });
            first = window.begin, length = window.end - window.begin;
        }
        if (kUnits && p.unit > 0) {                                      // those blocks in which the row has keys
            const uint32 unit = p.unit, end = first + min(length, 0x7fffffff - first);
            base = first / unit;
            length = end > uint32(first) ? (end + unit - 1) / unit - base : 0;
            first = p.compressed ? 0 : base;
        }
        length = min(length, p.columns - first);
        begin = p.logits + (row * p.logits_stride + first) * int64(sizeof(Logit));
        skew = reinterpret_cast<unsigned long long>(begin) % 16 / sizeof(Logit);
    }

    // A part has `share` keys at least, where there are several.
    __device__ int parts(int share) const { return max(1, min(p.parts, (length + share - 1) / share)); }

    __device__ int vectors() const { return (skew + length + kKeys - 1) / kKeys; }
    __device__ uint32 position_of(int vector, int i) const { return vector * kKeys + i - skew; }

    // The keys of the vector whose first one has the position `first`; NaN where the row has none.
    __device__ void load(Vec& to, int first) const {
        if (first >= 0 && first <= length - kKeys) ptx::load<4>(to.words, begin + first * int64(sizeof(Logit)));
        else load_each(to, first);
    }

    // The same, one by one.
    __device__ void load_each(Vec& to, int first) const {
        const uint8* address = begin + first * int64(sizeof(Logit));
        #pragma unroll
        for (int i = 0; i < 4; ++i) to.words[i] = kNanWord;
        #pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            if (uint32(first + i) >= uint32(length)) continue;
            if constexpr (kKeys == 4) {
                to.words[i] = ptx::load_word(address + 4 * i);
            } else {
                const uint32 half = ptx::load_half(address + 2 * i);
                uint32& word = to.words[i / 2];
                word = i % 2 ? (word & 0xffff) | half << 16 : (word & 0xffff0000) | half;
            }
        }
    }

    __device__ int page_of(uint32 position) const {
        return p.page_shift >= 0 ? position >> p.page_shift : position / uint32(p.page);
    }

    __device__ const int* pages() const { return p.table + (p.tokens > 1 ? row / p.tokens : row) * p.table_stride; }

    // Lengths may promise more pages than the table has: those are taken for its last one.
    __device__ int column_of(int page) const { return min(page, p.table_columns - 1); }

    // The row's pages are on their way to L1 while there is nothing else to do.
    __device__ void fetch_pages() const {
        constexpr int kSector = 8;
        if (!p.table) return;
        const int last = column_of(page_of(base + length - 1));
        for (int i = page_of(base) + threadIdx.x * kSector; i <= last; i += blockDim.x * kSector) {
            ptx::load_word(pages() + i);
        }
    }

    // Tells the choice: where the row's results lie, once for all of them.
    struct Results {
        const Row& row;
        const TopkParams& p;
        const int* pages;
        int* out;
        int* positions;
        float* scores;
        int offset;
        bool more;               // positions or scores

        // What stands for each of some positions; their pages are looked up at once.
        template <int kCount>
        __device__ void find_places(const uint32 (&positions)[kCount], uint32 (&places)[kCount]) const {
            #pragma unroll
            for (int i = 0; i < kCount; ++i) places[i] = number_of(positions[i]);
            if (!pages) return;
            uint32 page[kCount], found[kCount] = {};
            if (p.page_shift >= 0) {
                #pragma unroll
                for (int i = 0; i < kCount; ++i) page[i] = places[i] >> p.page_shift;
            } else {
                #pragma unroll
                for (int i = 0; i < kCount; ++i) page[i] = places[i] / uint32(p.page);
            }
            if (p.table_columns > 0) {
                #pragma unroll
                for (int i = 0; i < kCount; ++i) found[i] = ptx::load_word(pages + row.column_of(page[i]));
            }
            #pragma unroll
            for (int i = 0; i < kCount; ++i) places[i] += (found[i] - page[i]) * p.page;
        }

        __device__ uint32 number_of(uint32 position) const { return kUnits ? row.base + position : position; }

        __device__ void put(int at, uint32 position, uint32 place) const {
            out[at] = place + offset;
            if (!more) return;
            if (positions) positions[at] = number_of(position);
            if (scores) scores[at] = row.value_at(position);
        }

        __device__ void put_nothing(int at) const {
            out[at] = p.nowhere;
            if (!more) return;
            if (positions) positions[at] = p.nowhere;
            if (scores) scores[at] = lowest();
        }
    };

    __device__ Results results() const {
        return {*this, p, p.table ? pages() : nullptr, p.out + row * p.out_stride,
                p.positions ? p.positions + row * p.positions_stride : nullptr,
                p.scores ? p.scores + row * p.scores_stride : nullptr, p.offset ? int(ptx::load_word(p.offset + row)) : 0,
                p.positions || p.scores};
    }

    // Looked up again where it is asked for.
    __device__ float value_at(uint32 position) const {
        const uint8* logit = begin + int64(position) * sizeof(Logit);
        if constexpr (kKeys == 4) return __uint_as_float(ptx::load_word(logit)) + 0.0f;
        else return __uint_as_float(ptx::load_half(logit) << 16) + 0.0f;
    }

    // All keys of a row that has no more than k; logits are read only to tell the scores.
    __device__ void put_all() const {
        const Results results = this->results();
        #pragma unroll 1
        for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
            const uint32 position[1] = {uint32(i)};
            uint32 place[1];
            if (i < length) results.find_places(position, place), results.put(i, i, place[0]);
            else results.put_nothing(i);
        }
    }
};

// ---- what a block does together ----

template <int kThreads, int kDigit, int kCapacity, int kMost, bool kAscending>
struct Block {
    using Bin = Bins<kDigit>;
    static constexpr int kWarps = kThreads / 32, kBins = Bin::kCount;
    static constexpr int kOwn = kBins > kThreads ? kBins / kThreads : 1, kOwners = kBins / kOwn;  // bins of a thread
    static constexpr int kTies = 256;
    static_assert(kThreads % 32 == 0 && kWarps <= 32 && kOwners % 32 == 0);

    // The first bin by which there are as many as wanted: its least value, that of the bins before it, how many are in
    // these, and in itself; 0 where there are not so many.
    struct alignas(16) Match { float low, high; int above, inside; };

    struct Memory {
        union {
            alignas(16) uint32 histogram[kBins];      // zero between two uses
            uint32 results[kAscending ? 1 : kMost];   // the chosen positions, when all has been counted
        };
        uint32 in_turn[kAscending ? kMost : 1];       // where they stand meanwhile, before they are put in order
        Match match;
        uint2 list[kCapacity];                        // {value, position}
        uint2 ties[kTies];                            // likewise
        uint32 totals[kWarps], counts[2][kWarps];
        uint2 ends[kWarps];
        int bin, tied;
    };

    Memory& memory;
    const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int turn = 0;

    // A barrier must follow before the first use.
    __device__ explicit Block(Memory& memory) : memory(memory) {
        uint32 bins[kOwn];
        if (kOwners == kThreads || thread < kOwners) take_bins(bins);
        if (thread == 0) memory.tied = 0;
    }

    __device__ uint32* chosen() { return kAscending ? memory.in_turn : memory.results; }

    // ---- counting ----

    __device__ void count(int bin) { atomicAdd(&memory.histogram[bin], 1); }

    template <int kValues>
    __device__ void count(const float (&values)[kValues]) {
        #pragma unroll
        for (int i = 0; i < kValues; i += 2) {
            const uint32 codes = Bin::codes(values[i], i + 1 < kValues ? values[i + 1] : 0.0f);
            count((codes & 0xffff) >> Bin::kShift);
            if (i + 1 < kValues) count(codes >> (16 + Bin::kShift));
        }
    }

    // The sum of the lanes up to this one.
    __device__ static int sum_of_lanes(int x) {
        #pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) ptx::add_from_below(x, distance);
        return x;
    }

    // A thread's bins, which are zero then; what is not used is not read.
    __device__ void take_bins(uint32 (&bins)[kOwn]) {
        constexpr int kWords = kOwn < 4 ? kOwn : 4;
        static_assert(kOwn % kWords == 0);
        struct alignas(4 * kWords) Words { uint32 of[kWords]; };
        Words* words = reinterpret_cast<Words*>(memory.histogram) + thread * (kOwn / kWords);
        #pragma unroll
        for (int i = 0; i < kOwn / kWords; ++i) {
            const Words found = words[i];
            words[i] = Words{};
            #pragma unroll
            for (int j = 0; j < kWords; ++j) bins[i * kWords + j] = found.of[j];
        }
    }

    // After all lanes have counted; three barriers.
    __device__ Match find(int want, bool bin_0_counts = false) {
        __syncthreads();
        uint32 bins[kOwn], sum = 0, until = 0;
        const bool owner = kOwners == kThreads || thread < kOwners;
        if (owner) {
            take_bins(bins);
            if (thread == 0 && !bin_0_counts) bins[0] = 0;
            #pragma unroll
            for (int i = 0; i < kOwn; ++i) sum += bins[i];
            const uint32 total = __reduce_add_sync(kAllLanes, sum);
            if (lane == 0) memory.totals[warp] = total;
        }
        __syncthreads();
        if (owner) {
            until = sum_of_lanes(sum);                   // while the totals are on their way
            const int before = until - sum + __reduce_add_sync(kAllLanes, lane < warp ? memory.totals[lane] : 0);
            if (before < want && before + int(sum) >= want) {
                int bin = thread * kOwn, above = before, inside = bins[0], upto = before;
                #pragma unroll
                for (int i = 0; i + 1 < kOwn; ++i) {
                    upto += bins[i];
                    if (upto < want) ++bin, above = upto, inside = bins[i + 1];
                }
                memory.match = {Bin::edge(bin), Bin::edge(bin - 1), above, inside};
                memory.bin = bin;
            }
            if (thread == kOwners - 1 && before + int(sum) < want) memory.match = {0, 0, before + int(sum), 0};
        }
        __syncthreads();
        return memory.match;
    }

    // ---- placing ----

    struct Places { int first, total; };

    // How many warps before this one have, and all of them. A barrier.
    __device__ Places share_out_warps(int mine) {
        uint32* counts = memory.counts[turn];
        turn ^= 1;
        if (lane == 0) counts[warp] = mine;
        __syncthreads();
        const int count = lane < kWarps ? counts[lane] : 0;
        return {int(__reduce_add_sync(kAllLanes, lane < warp ? count : 0)), int(__reduce_add_sync(kAllLanes, count))};
    }

    // How many lanes before this one have, by warps, and all of them. A barrier.
    __device__ Places share_out(int mine) {
        const Places warps = share_out_warps(__reduce_add_sync(kAllLanes, mine));
        return {warps.first + sum_of_lanes(mine) - mine, warps.total};
    }

    template <int kValues>
    __device__ static int reaching(const float (&values)[kValues], float gate) {
        int count = 0;
        #pragma unroll
        for (int i = 0; i < kValues; ++i) ptx::count_if_at_least(count, values[i], gate);
        return count;
    }

    __device__ int reaching(int listed, float gate) const {
        int count = 0;
        each(listed, [&](float value) { ptx::count_if_at_least(count, value, gate); });
        return count;
    }

    // A bit for each value that reaches the gate.
    template <int kValues>
    __device__ static uint32 mask_of(const float (&values)[kValues], float gate) {
        static_assert(kValues <= 32);
        uint32 mask = 0;
        #pragma unroll
        for (int i = 0; i < kValues; ++i) ptx::set_if_at_least(mask, values[i], gate, 1u << i);
        return mask;
    }

    // Those that reach the gate as entries of the list; all or none.
    template <int kValues, class Position>
    __device__ bool append(const float (&values)[kValues], Position position, float gate, int& listed) {
        const Places places = share_out(reaching(values, gate));
        if (listed + places.total > kCapacity) return false;
        uint32 at = ptx::shared_address(memory.list + listed + places.first);
        gate = __shfl_sync(kAllLanes, gate, lane);       // the same; else how each comparison came out is kept, bit by bit
        #pragma unroll
        for (int i = 0; i < kValues; ++i) ptx::store_if_at_least(at, values[i], gate, position(i));
        listed += places.total;
        return true;
    }

    // The same of a mask, one entry for each bit. Values are looked up again: registers are free for the next piece, and
    // where few blocks share an SM, L1 still has them.
    template <class Position, class Value>
    __device__ bool append(uint32 mask, Position position, Value value, int& listed) {
        const Places places = share_out(__popc(mask));
        if (listed + places.total > kCapacity) return false;
        uint2* at = memory.list + listed + places.first;
        #pragma unroll 1
        for (; mask != 0; mask &= mask - 1) {
            const uint32 where = position(__ffs(mask) - 1);
            *at++ = {__float_as_uint(value(where)), where};
        }
        listed += places.total;
        return true;
    }

    // ---- choosing ----

    __device__ static uint2 entry_of(const uint2* entries, int at, int count) {
        return at < count ? entries[at] : uint2{kNanWord, kNowhere};
    }

    // `inside` ties: the `want` largest of them are chosen[first] and what follows.
    __device__ void rank(int inside, int want, int first) {
        auto place = [&](bool mine, int rank, uint32 position) {
            if (mine && rank < want) chosen()[first + rank] = position;
        };
        if (__builtin_expect(inside <= 64, 1)) {
            const uint2 other = entry_of(memory.ties, lane, inside), another = entry_of(memory.ties, lane + 32, inside);
            #pragma unroll 2
            for (int i = warp; i < inside; i += kWarps) {
                const uint2 tie = memory.ties[i];
                int rank = __popc(__ballot_sync(kAllLanes, is_above(other, tie)));
                if (inside > 32) rank += __popc(__ballot_sync(kAllLanes, is_above(another, tie)));
                place(lane == 0, rank, tie.y);
            }
        } else {
            // As many neighbouring lanes to a tie as there are: each compares it with its share of the others.
            const int shift = max(0, __clz(inside - 1) - __clz(kThreads - 1)), lanes = 1 << shift;
            #pragma unroll 1
            for (int some = 0; some < inside; some += kThreads >> shift) {
                const int i = some + (thread >> shift);
                const uint2 tie = entry_of(memory.ties, i, inside);
                int rank = 0;
                #pragma unroll 4
                for (int other = thread & (lanes - 1); other < inside; other += lanes) {
                    rank += is_above(memory.ties[other], tie);
                }
                #pragma unroll 1
                for (int distance = 1; distance < lanes; distance *= 2) {
                    rank += __shfl_xor_sync(kAllLanes, rank, distance);
                }
                place(i < inside && (thread & (lanes - 1)) == 0, rank, tie.y);
            }
        }
    }

    // Chooses the k largest of all lanes' values; `match` is the bin of the k-th.
    template <int kValues, class Position>
    __device__ void take(const float (&values)[kValues], Position position, int k, Match match) {
        const int above = reaching(values, match.high), ties = reaching(values, match.low) - above;
        if (ties > 0) {
            uint32 at = ptx::shared_address(memory.ties + atomicAdd(&memory.tied, ties));
            #pragma unroll
            for (int i = 0; i < kValues; ++i) ptx::store_if_between(at, values[i], match.low, match.high, position(i));
        }
        const int before = sum_of_lanes(above) - above;
        const int first = share_out_warps(__reduce_add_sync(kAllLanes, above)).first;
        uint32 at = ptx::shared_address(chosen() + first + before);
        #pragma unroll
        for (int i = 0; i < kValues; ++i) ptx::store_word_if_at_least(at, values[i], match.high, position(i));
        rank(match.inside, k - match.above, match.above);
    }

    // The same in fewer instructions, of which more wait for each other: a lane goes through those of its values that are
    // chosen, and looks up again the ties among them.
    template <int kValues, class Position, class Value>
    __device__ void walk(const float (&values)[kValues], Position position, Value value, int k, Match match) {
        uint32 above = mask_of(values, match.high), ties = mask_of(values, match.low) & ~above;
        if (ties != 0) {
            uint2* at = memory.ties + atomicAdd(&memory.tied, __popc(ties));
            #pragma unroll 1
            for (; ties != 0; ties &= ties - 1) {
                const uint32 where = position(__ffs(ties) - 1);
                *at++ = {__float_as_uint(value(where)), where};
            }
        }
        const int mine = __popc(above), before = sum_of_lanes(mine) - mine;
        uint32* at = chosen() + share_out_warps(__reduce_add_sync(kAllLanes, mine)).first + before;
        #pragma unroll 1
        for (; above != 0; above &= above - 1) *at++ = position(__ffs(above) - 1);
        rank(match.inside, k - match.above, match.above);
    }

    // The same of the list, of which a lane has every kThreads-th entry.
    __device__ void take(int listed, int k, Match match) {
        uint32 at = ptx::shared_address(chosen() + share_out(reaching(listed, match.high)).first);
        #pragma unroll 4
        for (int i = thread; i < listed; i += kThreads) {
            const uint2 entry = memory.list[i];
            const float value = __uint_as_float(entry.x);
            ptx::store_word_if_at_least(at, value, match.high, entry.y);
            if (__builtin_expect(value >= match.low && !(value >= match.high), 0)) {
                memory.ties[atomicAdd(&memory.tied, 1)] = entry;
            }
        }
        __syncthreads();
        rank(match.inside, k - match.above, match.above);
    }

    // Those in the bin can be ranked.
    __device__ static bool few(Match match) { return match.inside > 0 && match.inside <= kTies; }

    template <int kValues, class Visit>
    __device__ static void each(const float (&values)[kValues], Visit visit) {
        #pragma unroll
        for (int i = 0; i < kValues; ++i) visit(values[i]);
    }

    template <class Visit>
    __device__ void each(int listed, Visit visit) const {
        #pragma unroll 4
        for (int i = thread; i < listed; i += kThreads) visit(__uint_as_float(memory.list[i].x));
    }

    // Divides a bin that holds more than `limit`, by the bits of the keys in it. `values`: in registers, or the list's size.
    template <class Values>
    __device__ Match refine(Match match, int want, int limit, const Values& values) {
        if (__builtin_expect(match.inside <= limit, 1)) return match;
        const uint32 low = key_of(match.low);
        return divide(match, low, match.high == match.high ? key_of(match.high) : low + 1, want, limit, values, false);
    }

    // The same of a bin of keys from `low` on, below `high`. `all`: which all values are in.
    template <class Values>
    __device__ Match divide(Match match, uint32 low, uint32 high, int want, int limit, const Values& values, bool all) {
        #pragma unroll 1
        while (match.inside > limit && high - low > 1) {
            const int shift = max(0, 32 - __clz(high - low - 1) - kDigit);
            const auto add = [&](float value) { count(kBins - 1 - ((key_of_number(value) - low) >> shift)); };
            if (all) {
                each(values, add);
            } else {
                each(values, [&](float value) {
                    if (value >= match.low && !(value >= match.high)) add(value);
                });
            }
            all = false;
            const Match inner = find(want - match.above, true);
            low += uint32(kBins - 1 - memory.bin) << shift;
            high = min(high, low + (1u << shift));
            match = {value_of(low), value_of(high), match.above + inner.above, inner.inside};
        }
        return match;
    }

    // The bin of the `want`-th of the list, which has so many, among bins of equal size from its least to its largest key.
    __device__ Match search(int listed, int want, int limit) {
        float least = __uint_as_float(kNanWord), largest = least;
        each(listed, [&](float value) { least = fminf(least, value), largest = fmaxf(largest, value); });
        const uint32 first = __reduce_min_sync(kAllLanes, least == least ? key_of(least) : kAllLanes);
        const uint32 last = __reduce_max_sync(kAllLanes, key_of(largest));
        if (lane == 0) memory.ends[warp] = {first, last};
        __syncthreads();
        const uint2 ends = lane < kWarps ? memory.ends[lane] : uint2{kAllLanes, 0};
        const uint32 low = __reduce_min_sync(kAllLanes, ends.x), high = __reduce_max_sync(kAllLanes, ends.y) + 1;
        return divide({value_of(low), value_of(high), 0, listed}, low, high, want, limit, listed, true);
    }

    // Raises the gate to about the k-th of the list, which has so many; what does not reach it is dropped.
    __device__ void narrow(int k, int& listed, float& gate) {
        __syncthreads();
        gate = search(listed, k, kCapacity / 8).low;
        const int all = listed;
        listed = 0;
        #pragma unroll 1
        for (int first = 0; first < all; first += kThreads) {    // places never lie past those that have been read
            const uint2 entry = entry_of(memory.list, first + thread, all);
            const float value = __uint_as_float(entry.x);
            append(value >= gate, [&](int) { return entry.y; }, [&](uint32) { return value; }, listed);
        }
    }

    // A piece of which more reach the gate than there is room for: some keys of each lane at a time, and the list is
    // narrowed in between. A narrow list and some keys of all lanes always fit, unless too many are equal.
    template <class Row, class Position>
    __device__ bool append_slowly(const Row& row, int keys, Position position, int k, int& listed, float& gate) {
        constexpr int kSome = kThreads > 512 ? 1 : kThreads > 256 ? 2 : 4;
        const auto value = [&](uint32 at) { return row.value_at(at); };
        bool narrowed = false;
        #pragma unroll 1
        for (int first = 0; first < keys;) {
            const auto some = [&](int i) { return position(first + i); };
            uint32 mask = 0;
            #pragma unroll
            for (int i = 0; i < kSome; ++i) mask |= some(i) < uint32(row.length) && value(some(i)) >= gate ? 1u << i : 0;
            if (append(mask, some, value, listed)) {
                first += kSome, narrowed = false;
            } else {
                if (narrowed || listed < k) return false;
                narrow(k, listed, gate), narrowed = true;
            }
        }
        return true;
    }

    // ---- the slow way ----

    template <class Row, class Visit>
    __device__ void each_vector(const Row& row, Visit visit) {
        const int vectors = row.vectors();
        #pragma unroll 1
        for (int first = 0; first < vectors; first += kThreads) {
            typename Row::Vec vector;
            row.load(vector, row.position_of(first + thread, 0));
            visit(vector, first + thread);
        }
    }

    // Chooses the k largest of the row.
    template <class Row>
    __device__ void take_slowly(const TopkParams& p) {
        using Vec = typename Row::Vec;
        const Row row(p);                                      // again, so that nothing is kept for the rare case
        constexpr int kKeys = Vec::kKeys;
        const int position_bits = 32 - __clz(row.length);
        const uint32 unused = kAllLanes << position_bits;             // bits that no position has
        uint32 bound = 0, tie = unused;                               // all keys above the one, its equals of ~positions from the other on
        int want = p.k;
        __syncthreads();
        #pragma unroll 1
        for (int of_positions = 0; of_positions < 2; ++of_positions) {
            uint32 prefix = of_positions ? unused : 0;
            int bits = of_positions ? position_bits : 32;
            #pragma unroll 1
            while (bits > 0 && want > 0) {
                const int shift = max(bits - kDigit, 0);
                const uint32 known = bits < 32 ? kAllLanes << bits : 0;
                each_vector(row, [&](const Vec& vector, int at) {
                    #pragma unroll
                    for (int i = 0; i < kKeys; ++i) {
                        const uint32 key = key_of(vector.value(i)), position = row.position_of(at, i);
                        const uint32 rest = (of_positions ? ~position : key) ^ prefix;
                        const bool belongs = position < uint32(row.length) && (!of_positions || key == bound);
                        if (belongs && (rest & known) == 0) count(kBins - 1 - (rest >> shift));
                    }
                });
                const Match match = find(want, true);
                prefix |= uint32(kBins - 1 - memory.bin) << shift;
                want -= match.above;
                if (match.inside == want) want = 0;                   // all that is inside
                bits = shift;
            }
            (of_positions ? tie : bound) = prefix;
        }
        int first = 0;
        each_vector(row, [&](const Vec& vector, int at) {
            uint32 mask = 0;
            #pragma unroll
            for (int i = 0; i < kKeys; ++i) {
                const uint32 key = key_of(vector.value(i)), position = row.position_of(at, i);
                const bool reaches = key > bound || (key == bound && ~position >= tie);
                mask |= position < uint32(row.length) && reaches ? 1u << i : 0;
            }
            const Places places = share_out(__popc(mask));
            int place = first + places.first;
            first += places.total;
            #pragma unroll
            for (int i = 0; i < kKeys; ++i) {
                if (mask >> i & 1) chosen()[place++] = row.position_of(at, i);
            }
        });
    }

    // ---- telling ----

    // The gate that no more than `room` of what has been counted reach, and not many less.
    template <int kValues>
    __device__ float gate_of(int room, const float (&values)[kValues]) {
        const Match match = refine(find(room + 1), room + 1, room / 4 + 16, values);
        return match.inside == 0 ? lowest() : match.high;
    }

    // The same of the list, all of which reaches `gate`.
    __device__ float gate_of(int room, float gate, int listed) {
        return listed > room ? search(listed, room + 1, room / 4 + 16).high : gate;
    }

    // What reaches the gate as a front; what is left of it is NaN.
    template <int kValues, class Position>
    __device__ void publish(const float (&values)[kValues], Position position, float gate, uint2* front, int room) {
        const Places places = share_out(reaching(values, gate));
        uint2* at = front + places.first;
        #pragma unroll
        for (int i = 0; i < kValues; ++i) {
            if (values[i] >= gate) *at++ = {__float_as_uint(values[i]), position(i)};
        }
        for (int i = places.total + thread; i < room; i += kThreads) front[i] = {kNanWord, kNowhere};
    }

    // The same of the list.
    __device__ void publish(int listed, float gate, uint2* front, int room) {
        const Places places = share_out(reaching(listed, gate));
        uint2* at = front + places.first;
        #pragma unroll 1
        for (int i = thread; i < listed; i += kThreads) {
            const uint2 entry = memory.list[i];
            if (__uint_as_float(entry.x) >= gate) *at++ = entry;
        }
        for (int i = places.total + thread; i < room; i += kThreads) front[i] = {kNanWord, kNowhere};
    }

    // The chosen positions in their order: a bit for each, as many at a time as there are bins.
    __device__ const uint32* ascend(int k) {
        uint32* order = reinterpret_cast<uint32*>(memory.list);       // which has been chosen from
        static_assert(!kAscending || sizeof(memory.list) >= kMost * sizeof(uint32));
        int before = 0;
        #pragma unroll 1
        for (uint32 first = 0; before < k; first += 32 * kBins) {
            #pragma unroll 1
            for (int i = thread; i < k; i += kThreads) {
                const uint32 bit = chosen()[i] - first;
                if (bit < 32 * kBins) atomicOr(&memory.histogram[bit / 32], 1u << bit % 32);
            }
            __syncthreads();
            uint32 words[kOwn] = {};
            if (kOwners == kThreads || thread < kOwners) take_bins(words);
            int mine = 0;
            #pragma unroll
            for (int i = 0; i < kOwn; ++i) mine += __popc(words[i]);
            const Places places = share_out(mine);
            int place = before + places.first;
            #pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                for (uint32 word = words[i]; word != 0; word &= word - 1) {
                    order[place++] = first + (thread * kOwn + i) * 32 + __ffs(word) - 1;
                }
            }
            before += places.total;
        }
        __syncthreads();
        return order;
    }

    // Puts what has been chosen.
    template <class Row>
    __device__ void put(const Row& row) {
        const auto results = row.results();
        __syncthreads();
        const uint32* order = chosen();
        if constexpr (kAscending) order = ascend(row.p.k);
        constexpr int kSome = kMost < kThreads ? 1 : kMost / kThreads > 4 ? 4 : kMost / kThreads;
        #pragma unroll 1                                  // some at once, so that their pages are loaded together
        for (int first = thread; first < row.p.k; first += kSome * kThreads) {
            uint32 positions[kSome], places[kSome];
            #pragma unroll
            for (int i = 0; i < kSome; ++i) positions[i] = order[min(first + i * kThreads, row.p.k - 1)];
            results.find_places(positions, places);
            #pragma unroll
            for (int i = 0; i < kSome; ++i) {
                if (first + i * kThreads < row.p.k) results.put(first + i * kThreads, positions[i], places[i]);
            }
        }
    }
};

// Of a row's parts one each; a lone part ends with the row's choice. Grid: x rows, y parts. kGroups: of a lane, in the first
// piece of a row that is sifted, of units of kUnit keys each; 0: no part has a second piece. kAhead: as above. kWalked: a lane
// goes through its chosen keys, instead of all of its keys.
template <class Logit, int kThreads, int kVectors, bool kParted, bool kAhead, bool kWalked, int kGroups, int kUnit, int kDigit, int kCapacity, int kMost, bool kAscending>
__device__ inline void choose(const TopkParams& p) {
    using Of = Block<kThreads, kDigit, kCapacity, kMost, kAscending>;
    constexpr int kPerVector = Vector<Logit>::kKeys, kKeys = kVectors * kPerVector;
    __shared__ typename Of::Memory memory;
    Of block(memory);
    using Lies = Row<Logit, kAscending>;
    constexpr int kLanes = kParted ? 8 : 32, kTogether = kParted ? 1 : kVectors;   // of a chunk, and vectors of each in it
    constexpr bool kGuess = kGroups == 0 && kThreads > 64 * kVectors;      // not where registers are short, and rows many
    constexpr bool kOnce = kGroups > 0 && !kAhead;                         // L1 need not keep what has been read
    auto begin = [] {
        __syncthreads();
        ptx::griddepcontrol();
    };
    fetch_parameters(p);
    if (!kGuess) begin();
    const auto sources = Lies::sources(p);
    auto words = kGuess ? Lies::read_anew(sources) : Lies::read(sources);
    Lies row(p, words);
    int parts, pieces, step, first_position;
    const int part = kParted ? blockIdx.y : 0;
    auto share = [&] {
        parts = kParted ? row.parts(kThreads * kKeys) : 1;
        const uint32 at_once = kThreads * kVectors * parts;
        pieces = kGroups == 0 ? 1 : (row.vectors() + at_once - 1) / at_once;
        step = kThreads * pieces * parts;
        const int chunk = block.thread / kLanes * pieces * parts + part;
        first_position = ptx::kept(row.position_of(chunk * kLanes * kTogether + block.thread % kLanes, 0));
    };
    auto position_of = [&](int piece, int i) {
        const int vector = i / kPerVector * (kParted ? step : kLanes);
        return uint32(first_position + (piece * parts * kLanes * kTogether + vector) * kPerVector + i % kPerVector);
    };
    Vector<Logit> vectors[kVectors];
    auto load = [&](int piece) {
        const int first = position_of(piece, 0), last = position_of(piece, (kVectors - 1) * kPerVector);
        const bool whole = first >= 0 && uint32(last) + kPerVector <= uint32(row.length);
        if (__builtin_expect(__all_sync(kAllLanes, whole), 1)) {
            const uint8* address = row.begin + first * int64(sizeof(Logit));
            #pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const uint8* from = address + i * (kParted ? step : kLanes) * int64(16);
                if constexpr (kOnce) ptx::load_once<4>(vectors[i].words, from);
                else ptx::load<4>(vectors[i].words, from);
            }
        } else {
            #pragma unroll
            for (int i = 0; i < kVectors; ++i) row.load_each(vectors[i], int(position_of(piece, i * kPerVector)));
        }
    };
    share();
    if (kGuess) begin();

    #pragma unroll 1
    for (;;) {                                        // once more if the guess was wrong
        const auto found = kGuess ? Lies::read_anew(sources) : words;
        if ((kGroups == 0 || kAhead) && part < parts && row.length > p.k) load(0);
        if (__builtin_expect(found == words, 1)) break;
        row.place(words = found);
        share();
    }
    if (part >= parts) return;
    if (__builtin_expect(row.length <= p.k, 0)) return row.put_all();
    if (parts == 1) row.fetch_pages();
    float values[kKeys];
    auto convert = [&] {
        #pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            values[i] = vectors[i / kPerVector].value(i % kPerVector);
            if (kGroups == 0) values[i] += 0.0f;             // as bins have it
        }
    };

    const int64 region = int64(row.row) * p.parts + part;
    uint2* front = p.fronts + region * p.front;
    if constexpr (kGroups == 0) {
        convert();
        auto position = [&](int i) { return position_of(0, i); };
        block.count(values);
        if (parts > 1) {
            const float gate = block.gate_of(p.front, values);
            block.publish(values, position, gate, front, p.front);
            if (threadIdx.x == 0) p.gates[region] = gate;
            return;
        }
        const auto match = block.refine(block.find(p.k), p.k, Of::kTies, values);
        if (__builtin_expect(Of::few(match), 1)) {
            if constexpr (kWalked) block.walk(values, position, [&](uint32 at) { return row.value_at(at); }, p.k, match);
            else block.take(values, position, p.k, match);
        } else {
            block.template take_slowly<Lies>(p);
        }
    } else {
        const int most = parts > 1 ? min(p.k, p.front) : p.k;
        // Of the first piece. A part that asks for too few sends its row the slow way, so there is room for a hot chunk.
        int want = min(most, p.k / uint32(pieces * parts) * 5 / 4 + 32 + (kParted ? kLanes * kPerVector : 0));
        float gate = lowest();
        int listed = 0;
        bool fits;
        #pragma unroll 1
        for (int piece = 0;; ++piece) {
            if (!kAhead) load(piece);
            convert();
            const bool last = piece + 1 == pieces;
            auto position = [&](int i) { return position_of(piece, i); };
            auto value = [&](uint32 at) { return row.value_at(at); };
            if (piece == 0 && row.length > kCapacity * parts) {
                static_assert(kKeys % (kUnit * kGroups) == 0);
                float maxima[kGroups];
                #pragma unroll
                for (int i = 0; i < kGroups; ++i) maxima[i] = values[i * kUnit];
                #pragma unroll
                for (int i = 0; i < kKeys; ++i) {
                    maxima[i / kUnit % kGroups] = fmaxf(maxima[i / kUnit % kGroups], values[i]);
                }
                block.count(maxima);
                const auto match = block.find(want);
                if (match.inside > 0) gate = match.low;
            }
            if constexpr (kAhead) {
                const uint32 mask = block.mask_of(values, gate);
                if (!last) load(piece + 1);
                fits = block.append(mask, position, value, listed);
            } else {
                fits = block.append(values, position, gate, listed);
            }
            if (__builtin_expect(!fits, 0)) fits = block.append_slowly(row, kKeys, position, most, listed, gate);
            if (__builtin_expect(!fits, 0)) break;
            if (!last) continue;
            if (kParted || __builtin_expect(listed >= p.k || want == p.k, 1)) break;
            gate = lowest(), listed = 0, want = p.k, piece = -1;
            if (kAhead) load(0);
        }
        __syncthreads();
        if (parts > 1) {
            gate = fits ? block.gate_of(p.front, gate, listed) : __uint_as_float(kNanWord);
            block.publish(listed, gate, front, p.front);
            if (threadIdx.x == 0) p.gates[region] = gate;
            return;
        }
        fits = fits && listed >= p.k;
        const auto match = fits ? block.search(listed, p.k, Of::kTies) : typename Of::Match{};
        if (__builtin_expect(Of::few(match), 1)) block.take(listed, p.k, match);
        else block.template take_slowly<Lies>(p);
    }
    block.put(row);
}

// Grid: x rows. `kFronts`: entries of all fronts of a row; `kShare`: keys of a part's piece.
template <class Logit, int kThreads, int kFronts, int kShare, int kDigit, int kMost, bool kAscending>
__device__ inline void merge(const TopkParams& p) {
    constexpr int kEntries = kFronts / kThreads;
    using Of = Block<kThreads, kDigit, kAscending ? kMost / 2 : 1, kMost, kAscending>;
    __shared__ typename Of::Memory memory;
    Of block(memory);
    fetch_parameters(p);
    using Lies = Row<Logit, kAscending>;
    const Lies row(p);  // the lengths are older than the kernel before this one, which has waited for them
    const int parts = row.parts(kShare);
    if (row.length <= p.k || parts == 1) {
        ptx::griddepcontrol();
        return;
    }
    row.fetch_pages();
    __syncthreads();
    ptx::griddepcontrol();

    const int64 first = int64(row.row) * p.parts;
    float values[kEntries];
    uint32 positions[kEntries];
    #pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        const int at = i * kThreads + block.thread;
        uint32 entry[2] = {kNanWord, kNowhere};
        if (at < parts * p.front) ptx::load<2>(entry, p.fronts + first * p.front + at);
        values[i] = __uint_as_float(entry[0]), positions[i] = entry[1];
    }
    uint32 least = kNothing;                          // the largest gate, as a key
    #pragma unroll 1
    for (int i = block.lane; i < parts; i += 32) {
        const float gate = __uint_as_float(ptx::load_word(p.gates + first + i));
        least = max(least, gate == gate ? key_of(gate) : kAllLanes);
    }
    least = __reduce_max_sync(kAllLanes, least);
    block.count(values);
    const auto match = block.refine(block.find(p.k), p.k, Of::kTies, values);
    if (__builtin_expect(Of::few(match) && match.low >= value_of(least), 1)) {
        block.take(values, [&](int i) { return positions[i]; }, p.k, match);
    } else {
        block.template take_slowly<Lies>(p);
    }
    block.put(row);
}
