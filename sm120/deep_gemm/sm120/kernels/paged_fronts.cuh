// The decode step of one token, first of two launches: the logits of paged.cuh for one row, and of each block its front.
//
// Front   the block's largest logits, in their order, and a gate that all of them reach and nothing else of the block does.
//         fronts.cuh chooses from the fronts of all blocks.
// Score   as run_one of rows.cuh: tiles go round the blocks, so that a stretch of good keys is spread over them. What is stored
//         is kept in shared memory too.
// Gate    keys fall into groups, of some neighbouring lanes of a warp each: the gate is the `rank`th of the groups' maxima, so
//         that as many keys reach it at least, and hardly ever twice as many. Warps find it alone, all of them the same.
// List    what reaches the gate, in no order; a warp to each entry finds its place in the order. One that does not fit has a
//         gate above everything.
// Bound   latency: of logits, see rows.cuh; then of two barriers, and of what is between them.
#pragma once

#include "order.cuh"
#include "paged.cuh"

struct PagedFrontsParams : PagedParams {
    uint2* heads;                // [blocks] {gate, as a key; entries of the front}
    float* values;               // [room][blocks] NaN past a front's end, in the rows that fronts.cuh reads of all
    uint32* positions;           // [room][blocks]
    uint32* places;              // [room][blocks] in the cache, or null; `blocks` rounded up to whole warps of columns
};

// Logits that are stored, and kept by the block.
template <int kWarps, int kTiles>
struct Kept {
    // [warp][tile][lane], NaN for keys outside the window
    __device__ static float* of_lane() {
        __shared__ float memory[kWarps * kTiles * 32];
        return memory + threadIdx.x / 32 * (kTiles * 32) + threadIdx.x % 32;
    }
};

template <int kWarps, int kTiles>
struct Stored<Kept<kWarps, kTiles>> : Stored<float> {
    uint32 kept;                 // where this lane's next one goes

    // Of the one token there is.
    __device__ void open(const Output& p, int, Window window, bool) {
        begin = 0, count = window.end;
        row = reinterpret_cast<float*>(p.logits);
        kept = ptx::shared_address(Kept<kWarps, kTiles>::of_lane());
    }

    template <int kApart>
    __device__ void take(uint32 key, float logit) {
        if (key < count) row[key] = logit;
        ptx::store_shared(kept, key < count ? __float_as_uint(logit) : kNanWord);
        kept += 32 * sizeof(float);
    }
};

// kTiles: of a warp, at most.
template <class Format, int kHeads, int kPage, class Weight, int kWarps, bool kPastEnd, bool kOnce, int kTiles>
struct PagedFronts {
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kGroups = 32, kRank = 16;
    using Kept = ::Kept<kWarps, kTiles>;
    using Scored = Rows<PagedFrontsParams, Format, kHeads, PagedKeys<kPage, Format::kRowBytes, kPastEnd, kOnce>, Weight, Kept,
                        kWarps, 1>;
    using Key = Scorer<Format, kHeads, 1, Weight>;

    struct Memory {
        alignas(16) float maxima[kGroups];
        uint2 list[kFrontRoom];                    // {value, position}
        int listed;
    };

    // What a block has scored: items, tiles or eights of keys, from `first` on.
    struct Work {
        int items, first, step;
        bool eights;

        __device__ Work(const PagedFrontsParams& p, int keys) {
            const int tiles = (keys + kTile - 1) / kTile;
            eights = tiles * (kTile / 8) <= p.few.quarters;
            items = eights ? (keys + 7) / 8 : tiles;
            first = blockIdx.x + gridDim.x * (threadIdx.x / 32), step = p.few.takers;
        }

        // Of this lane; of eight keys only eight lanes have one.
        __device__ uint32 key(int item, const Lane& lane) const {
            return eights ? 8 * item + Key::key_of_eight(lane) : item * kTile + Key::key_of(lane);
        }
    };

    // A warp's kept logits, of one item after the other.
    template <class Visit>
    __device__ static void each(const Work& work, Visit visit) {
        const float* kept = Kept::of_lane();
        #pragma unroll 1
        for (int item = work.first; item < work.items; item += work.step, kept += 32) visit(*kept, item);
    }

    // A barrier. `busy`: warps that have scored something.
    __device__ static uint32 gate_of(const Work& work, int busy, Memory& memory, const Lane& lane) {
        float most = __uint_as_float(kNanWord);
        each(work, [&](float value, int) { most = fmaxf(most, value); });
        int shift = 0;                             // lanes of a group, so many that there are groups for all busy warps
        #pragma unroll
        for (int i = 0; 1 << i < kWarps; ++i) {
            const float other = __shfl_xor_sync(kAllLanes, most, 1 << i);
            if (busy > 1 << i) most = fmaxf(most, other), shift = i + 1;
        }
        const int group = threadIdx.x >> shift, groups = min(kGroups, kThreads >> shift);
        if ((lane.id & ((1 << shift) - 1)) == 0 && group < groups) memory.maxima[group] = most;
        if (groups + int(threadIdx.x) < kGroups) memory.maxima[groups + threadIdx.x] = __uint_as_float(kNanWord);
        __syncthreads();
        const float own = memory.maxima[lane.id];
        float4 some[kGroups / 4];
        int above[4] = {};
        #pragma unroll
        for (int i = 0; i < kGroups / 4; ++i) some[i] = *reinterpret_cast<const float4*>(memory.maxima + 4 * i);
        #pragma unroll
        for (int i = 0; i < kGroups / 4; ++i) {
            ptx::count_if_above(above[0], some[i].x, own);
            ptx::count_if_above(above[1], some[i].y, own);
            ptx::count_if_above(above[2], some[i].z, own);
            ptx::count_if_above(above[3], some[i].w, own);
        }
        const bool reaches = own == own && above[0] + above[1] + above[2] + above[3] < kRank;
        const uint32 gate = __reduce_min_sync(kAllLanes, reaches ? key_of(own) : kAllLanes);
        return gate == kAllLanes ? key_of(lowest()) : gate;
    }

    __device__ static void run(const PagedFrontsParams& p) {
        __shared__ Memory memory;
        if (threadIdx.x == 0) memory.listed = 0;
        Scored::run_one(p);
        const Lane lane;
        const int warp = threadIdx.x / 32, slots = gridDim.x, slot = blockIdx.x, pitch = (slots + 31) & ~31;
        const int keys = p.windows.end(0, 0);
        const Work work(p, keys);
        const int busy = __popc(__ballot_sync(kAllLanes, lane.id < kWarps && slot + slots * lane.id < work.items));
        uint32 gate = key_of(lowest());
        if (work.eights || busy <= 1) __syncthreads();                         // so few that all are published
        else gate = gate_of(work, busy, memory, lane);
        const float least = value_of(gate);
        each(work, [&](float value, int item) {
            if (!(value >= least)) return;
            const int place = atomicAdd(&memory.listed, 1);
            if (place < kFrontRoom) memory.list[place] = {__float_as_uint(value + 0.0f), work.key(item, lane)};
        });
        __syncthreads();
        const int listed = memory.listed, count = listed <= kFrontRoom ? listed : 0;
        constexpr int kOthers = kFrontRoom / 32;
        uint2 others[kOthers];
        #pragma unroll
        for (int i = 0; i < kOthers; ++i) {
            others[i] = {kNanWord, kNowhere};
            if (32 * i + lane.id < count) others[i] = memory.list[32 * i + lane.id];
        }
        #pragma unroll 1
        for (int i = warp; i < count; i += kWarps) {
            const uint2 entry = memory.list[i];
            uint32 page = 0;
            if (p.places) page = ptx::load_word(p.keys.block_table + entry.y / kPage);
            int rank = 0;
            #pragma unroll
            for (int j = 0; j < kOthers; ++j) rank += __popc(__ballot_sync(kAllLanes, is_above(others[j], entry)));
            const int at = rank * pitch + slot;
            if (lane.id == 0) {
                p.values[at] = __uint_as_float(entry.x), p.positions[at] = entry.y;
                if (p.places) p.places[at] = page * kPage + entry.y % kPage;
            }
        }
        for (int i = count + threadIdx.x; i < kFrontRows; i += kThreads) {
            const int at = i * pitch + slot;
            p.values[at] = __uint_as_float(kNanWord), p.positions[at] = kNowhere;
            if (p.places) p.places[at] = kNowhere;
        }
        if (slot < pitch - slots && threadIdx.x < kFrontRows) {         // columns of no block
            p.values[threadIdx.x * pitch + slots + slot] = __uint_as_float(kNanWord);
        }
        if (threadIdx.x == 0) p.heads[slot] = {listed <= kFrontRoom ? gate : kAllLanes, uint32(count)};
    }
};
