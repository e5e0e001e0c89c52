// The decode step of one token, second of two launches: the k largest out of the fronts that the logits' blocks have left
// (paged_fronts.cuh). What is promised of a choice stands in topk.cuh.
//
// Place   an entry's place among all is a sum over the fronts: of those in a front that come before it, found by bisection,
//         since fronts are in order. So nothing is counted, and no entry waits for another one: its warp finds its place, and
//         puts it there. The results of a row are in the order of their values.
// Block   a few fronts are its own. It reads the first kFrontRows entries of all of them; what goes further is read where it lies.
// Warp    an entry of an own front, and the next ones as long as they are among the k. Lane: fronts 32 apart.
// Exact   keys that are missing are below the largest gate. Entries that reach that have their true places, and are put; if
//         they are fewer than k, the other places are filled slowly, by a block that has no front of its own.
// Bound   latency: one load of the fronts, one barrier, bisection.
#pragma once

#include "topk.cuh"

// Grid: x one row; y one block more than it takes to own all fronts, kOwn each. kColumns: of 32 fronts each, that suffice.
template <int kThreads, int kOwn, int kColumns>
struct Fronts {
    static constexpr int kWarps = kThreads / 32, kTogether = kWarps / kOwn;        // entries of a front at a time
    using Of = Block<kThreads, 9, 1, kMostOfFronts, false>;
    using Lies = Row<float, false>;

    struct Memory {
        union {
            alignas(16) float values[kFrontRows * 32 * kColumns];
            typename Of::Memory of;
        };
        uint32 least;                              // what entries have to reach to be put, as a key
    };

    static constexpr int kPitch = 32 * kColumns;                                   // of a row of all fronts, in elements

    const TopkParams& p;
    Memory& memory;
    const int fronts = p.parts, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint2* heads = reinterpret_cast<const uint2*>(p.gates);                  // {gate, as a key; entries}
    const float* values = reinterpret_cast<const float*>(p.fronts);                // [kFrontRoom][kPitch]
    const uint32* positions = reinterpret_cast<const uint32*>(values) + kFrontRoom * kPitch;
    const uint32* places = positions + (p.table ? kFrontRoom * kPitch : 0);

    // The first rows of all fronts.
    static constexpr int kVectors = kFrontRows * kPitch / 4, kEach = (kVectors + kThreads - 1) / kThreads;
    __device__ void load(uint32 (&words)[kEach][4]) const {
        #pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = i * kThreads + threadIdx.x;
            if (at < kVectors) ptx::load<4>(words[i], values + 4 * at);
        }
    }
    __device__ void keep(const uint32 (&words)[kEach][4]) const {
        #pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = i * kThreads + threadIdx.x;
            if (at < kVectors) {
                *reinterpret_cast<uint4*>(memory.values + 4 * at) = {words[i][0], words[i][1], words[i][2], words[i][3]};
            }
        }
    }

    // How many entries of all fronts are above `value`, of which one, at `position`, has it; or are equal to that, and before
    // it. kEqual: are above or equal to any value. If there are `enough`, not all of them are counted. `further`: the entry
    // lies behind an equal one of its front, or so far behind that bisection does not find it.
    template <bool kEqual>
    __device__ int before(float value, uint32 position, bool further, int enough) const {
        uint32 at[kColumns], total = 0;            // in bytes; and how many are found, above the entries that are met there
        const uint32 first = ptx::shared_address(memory.values) + lane * sizeof(float);
        constexpr uint32 kRow = kPitch * sizeof(float);
        #pragma unroll
        for (int i = 0; i < kColumns; ++i) at[i] = first + 32 * i * sizeof(float);
        const auto precedes = [](float x, float y) { return kEqual ? x >= y : x > y; };
        #pragma unroll
        for (int step = kFrontRows / 2; step > 0; step /= 2) {
            #pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                if (precedes(ptx::load_shared(at[i] + (step - 1) * kRow), value)) at[i] += step * kRow;
            }
        }
        #pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            total += at[i] - (first + 32 * i * sizeof(float));
            if (ptx::load_shared(at[i]) >= value) ++total;
        }
        total = __reduce_add_sync(kAllLanes, total);
        const int found = total / kRow, met = total % kRow;
        // Equal ones, or a front that goes further.
        if (__builtin_expect(found < enough && (met != !kEqual || further), 0)) {
            int count = 0;
            #pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                if (!(ptx::load_shared(at[i]) >= value)) continue;
                const int front = 32 * i + lane, entries = heads[front].y;
                #pragma unroll 1
                for (int row = (at[i] - first) / kRow; row < entries; ++row, ++count) {
                    const float x = row < kFrontRows ? memory.values[row * kPitch + front] : values[row * kPitch + front];
                    if (!precedes(x, value) && (x != value || positions[row * kPitch + front] >= position)) break;
                }
            }
            return found + __reduce_add_sync(kAllLanes, count);
        }
        return found;
    }

    // Only one lane puts.
    __device__ void put(int at, uint32 position, uint32 place, float value) const {
        p.out[at] = place;
        if (p.positions) p.positions[at] = position;
        if (p.scores) p.scores[at] = value;
    }

    // All that is needed is asked for at once: blocks are set up late, where the logits' have left an SM.
    __device__ static void run(const TopkParams& p) {
        __shared__ Memory memory;
        fetch_parameters(p);
        ptx::griddepcontrol();
        const Fronts all{p, memory};
        uint32 words[kEach][4];
        all.load(words);
        if (blockIdx.y + 1 == gridDim.y) all.check(words);
        else all.place(words);
    }

    // The largest gate, or, if the row is chosen whole, what none reaches.
    __device__ uint32 least() const {
        uint32 gate = p.windows.end(0, 0) > p.k ? kNothing : kAllLanes;
        #pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (32 * i + lane < fronts) gate = max(gate, ptx::load_word(heads + 32 * i + lane));
        }
        return __reduce_max_sync(kAllLanes, gate);
    }

    __device__ void place(const uint32 (&words)[kEach][4]) const {
        const int own = blockIdx.y * kOwn + warp % kOwn, shown = min(own, fronts - 1);
        int i = warp / kOwn;
        uint32 position = ptx::load_word(positions + i * kPitch + shown), place = ptx::load_word(places + i * kPitch + shown);
        const int entries = own < fronts ? ptx::load_word(&heads[shown].y) : 0;
        if (warp == kWarps - 1) memory.least = least();
        keep(words);
        __syncthreads();
        #pragma unroll 1
        while (i < entries) {
            const int next = i + kTogether;
            uint32 next_position = 0, next_place = 0;
            if (next < entries) {
                next_position = ptx::load_word(positions + next * kPitch + own);
                next_place = ptx::load_word(places + next * kPitch + own);
            }
            const float value = i < kFrontRows ? memory.values[i * kPitch + own] : values[i * kPitch + own];
            const bool further = i >= kFrontRows || (i > 0 && memory.values[(i - 1) * kPitch + own] == value);
            const int at = before<false>(value, position, further, p.k);
            if (at >= p.k) break;
            if (lane == 0 && key_of(value) >= memory.least) put(at, position, place, value);
            i = next, position = next_position, place = next_place;
        }
    }

    // Fills what places nobody else does.
    __device__ void check(const uint32 (&words)[kEach][4]) const {
        const Lies row(p);
        if (row.length <= p.k) return row.put_all();
        const auto results = row.results();
        const uint32 least = this->least();
        keep(words);
        __syncthreads();
        const int reached = least == kAllLanes ? 0 : before<true>(value_of(least), kNowhere, false, p.k);
        if (__builtin_expect(reached >= p.k, 1)) return;
        __syncthreads();
        Of block(memory.of);
        block.template take_slowly<Lies>(p);
        __syncthreads();
        int filled = reached;
        #pragma unroll 1
        for (int first = 0; first < p.k; first += kThreads) {
            const int i = first + threadIdx.x;
            const uint32 position[1] = {i < p.k ? block.chosen()[i] : 0};
            const float value = row.value_at(position[0]);
            const bool mine = i < p.k && (least == kAllLanes || key_of(value) < least);
            const auto places = block.share_out(mine);
            uint32 place[1];
            if (mine) results.find_places(position, place), put(filled + places.first, position[0], place[0], value);
            filled += places.total;
        }
    }
};
