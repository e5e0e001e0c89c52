// The inner loop: one warp, the tokens whose queries it holds, and tile after tile of 32 keys.
//
// Keys go from global memory straight into B fragments: as soon as one half of a tile has been multiplied, the same half of
// the next tile is asked for. No shared memory, no barrier.
//
// Lane    loads its words of four keys of a tile (formats.cuh) and the scale of one; in the end it has the logit of one key
//         for each token (score.cuh), and stores it.
// Loops   two: kMany (many rows, ragged) keeps what it would else work out in each turn; the other one (one row, few rows)
//         begins sooner.
// Bound   kMany: the tensor pipe, and beside it issue slots. For 32 keys and 64 heads, 64 FP8 or 32 FP4 mma stand among some
//         240 other instructions, of which relu and weights are 128. The other one: DRAM, and the latency of its loads.
#pragma once

#include "keys.cuh"
#include "score.cuh"
#include "sinks.cuh"

template <class Format, int kHeads, int kTokens, class Weight, class Source, class Sink>
struct Stream {
    // What is fetched while a tile is scored: a tile that has all its keys, the last one, which may not, or none.
    enum class Next { kWhole, kCut, kNone };

    const Lane lane;
    const int step;              // from tile to tile
    const int end, limit;        // of the keys of all tokens; and of those there are
    uint32 never;                // 0, unknown to the compiler
    Source source;
    Scorer<Format, kHeads, kTokens, Weight> scorer;
    Sink sinks[kTokens];
    Maxima<Sink, kTokens> maxima;         // kMany
    uint32 words[4][Format::kLoaded];     // keys g, g + 8, g + 16, g + 24 of the tile
    uint32 scale, next_scale;
    // kMany: where in 8 keys this lane begins, the key of a tile whose scale it loads, and 0 once more.
    uint32 kept, kept_scale, never_either;

    __device__ uint32 last_key() const { return Source::last_key(end, limit); }

    // Both sides of a branch that is never taken want the words, so the compiler asks for them before it. It would otherwise
    // move all loads to the end of the turn, since nothing in it needs them, and nothing would hide how long they take (64 x
    // 16K, FP8, stand-in on an H100: 62 instead of 57 us; prefill of 2,048 rows 457 instead of 380; 25 Nov 2026).
    template <int Half>
    __device__ void demand(uint32 never) {
        if (never) {
            uint32* nowhere = reinterpret_cast<uint32*>(sinks[0].row);
            #pragma unroll
            for (int j = 0; j < 2 * Format::kLoaded; ++j) nowhere[j] = words[2 * Half + j % 2][j / 2];
            asm volatile("exit;");
        }
    }

    __device__ uint32 own() const { return lane.g * Format::kRowBytes + Format::lane_offset(lane); }
    __device__ uint32 own_scale() const { return Format::scale_key(lane, scorer.key_of(lane)); }

    __device__ static void load_key(uint32 (&words)[Format::kLoaded], const uint8* address) {
        if constexpr (Source::kReadOnce) Format::load_once(words, address);
        else Format::load(words, address);
    }

    template <int Half, bool kWhole, bool kMany = false>
    __device__ void fetch(uint32 tile) {
        #pragma unroll
        for (int j = 2 * Half; j < 2 * Half + 2; ++j) {
            load_key(words[j], source.template values<Half, kWhole>(tile, last_key(), lane.g, 8 * j,
                                                                    Format::lane_offset(lane), kMany ? kept : own()));
        }
    }

    template <bool kWhole, bool kMany = false>
    __device__ void fetch_scale(uint32 tile) {
        next_scale = ptx::load_word(source.template scales<kWhole>(tile, last_key(), kMany ? kept_scale : own_scale()));
    }

    // Scores a tile. Each half of its keys makes room for the next tile's as soon as it has been multiplied. The next scale
    // is asked for together with the first half and waits beside this one, since all loads of a tile are awaited together and
    // a late one costs; where FP8 has no register left for it, it follows when this one has been used.
    template <Next kNext, bool kMany>
    __device__ void turn(int tile) {
        const int next = tile + step;
        constexpr bool kFetch = kNext != Next::kNone, kWhole = kNext == Next::kWhole;
        constexpr bool kInside = kWhole && Source::kFromZero;                 // of the windows
        constexpr bool kScaleBeside = Format::kScaleFirst || !kMany && Source::kTilesWhole;
        float sums[kTokens][4][2] = {};
        if constexpr (kScaleBeside) scale = next_scale;
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            scorer.template keys<0>(sums[i][0], i, words[0], scale, lane);
            scorer.template keys<1>(sums[i][1], i, words[1], scale, lane);
        }
        if constexpr (kFetch) {
            source.template locate<kMany && kWhole>(next, step, last_key(), lane);
            fetch<0, kWhole, kMany>(next);
            if constexpr (kScaleBeside) fetch_scale<kWhole, kMany>(next);
            demand<0>(never);
        }
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            scorer.template keys<2>(sums[i][2], i, words[2], scale, lane);
            scorer.template keys<3>(sums[i][3], i, words[3], scale, lane);
        }
        if constexpr (kFetch) fetch<1, kWhole, kMany>(next);
        // What follows has no mma, so loads would sink below it, and all of a tile's are awaited together. With few heads of a
        // ragged run there is little of it, and the branch costs more (FP8 of 2,048 x 8K, x1 on an H100: 16 heads 170 instead
        // of 128 us, 32 heads 226 instead of 193); with pages it pays (32 heads: 198 instead of 227).
        if constexpr (kMany && kWhole && (Source::kFromZero || kHeads * kTokens > 32)) demand<1>(never_either);
        float logits[kTokens];
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            logits[i] = Format::finish(scorer.total(sums[i], lane), kScaleBeside ? scale : next_scale);
        }
        if constexpr (kFetch && !kScaleBeside) fetch_scale<kWhole, kMany>(next);
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            if constexpr (!kMany) {
                sinks[i].template take<kApart>(tile * kTile + scorer.key_of(lane), logits[i]);
            } else if constexpr (!kInside) {
                sinks[i].take_of(tile, logits[i]);
            } else if (kTokens == 1 || sinks[i].count) {
                sinks[i].put(tile, logits[i]);
            }
        }
        if constexpr (kMany) maxima.template take<kInside>(sinks, tile, logits);
    }

    template <bool kTurn>
    __device__ void load(const Queries& queries, const int (&tokens)[kTokens]) {
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) scorer.template load<kTurn>(i, queries, tokens[i], never, lane);
    }

    // Asks for the first tile.
    __device__ void begin(int tile) {
        source.locate(tile, step, last_key(), lane);
        fetch<0, Source::kTilesWhole>(tile);
        fetch<1, Source::kTilesWhole>(tile);
        fetch_scale<Source::kTilesWhole>(tile);
    }

    // Tiles tile, tile + step, ... below `to`; the first one has been asked for. kMany: where it pays to set up a leaner loop.
    // What comes out of a shuffle the compiler keeps; what it can work out from a thread's number it works out in each turn.
    // Pages are looked up outside, and whole tiles stored without a look at the window.
    template <bool kMany>
    __device__ void run(int tile, int to) {
        if constexpr (kMany) {
            #pragma unroll
            for (int i = 0; i < kTokens; ++i) sinks[i].keep(scorer.key_of(lane));
            maxima.keep(sinks, scorer.key_of(lane), lane.id);
        }
        if constexpr (kMany) {
            kept = __shfl_sync(kAllLanes, own(), lane.id), kept_scale = __shfl_sync(kAllLanes, own_scale(), lane.id);
            never_either = __reduce_max_sync(kAllLanes, never);
            if constexpr (Format::kScaleFirst) never = __reduce_max_sync(kAllLanes, never);       // FP8 has no register left
        }
        if (tile + step < to) {
            constexpr bool kCut = kMany || !Source::kTilesWhole;
            const int cut = to - (kCut ? 2 : 1) * step;
            if constexpr (kMany) {
                while (tile < cut) {
                    if (!source.opened()) source.open(tile + step, step, last_key(), lane);
                    for (; tile < cut && source.opened(); tile += step) turn<Next::kWhole, true>(tile);
                }
            } else {
                #pragma unroll (kHeads * kTokens > 16 ? 1 : 2)   // with few heads it pays not to move what a turn hands on
                for (; tile < cut; tile += step) turn<Next::kWhole, false>(tile);
            }
            if constexpr (kCut) turn<Next::kCut, kMany>(tile), tile += step;
        }
        if constexpr (!kMany) ptx::launch_dependents();
        turn<Next::kNone, kMany>(tile);
    }

    // Eight keys alone, a quarter of a tile: unit 4 * tile + key tile.
    __device__ void begin_eight(int unit) {
        const int tile = unit / 4, key = unit % 4 * 8;
        source.locate(tile, 0, last_key(), lane);
        const uint32 offset = Format::lane_offset(lane), first = key * Format::kRowBytes + own();
        constexpr bool kWhole = Source::kTilesWhole;
        load_key(words[0], key < kTile / 2
            ? source.template values<0, kWhole>(tile, last_key(), key + lane.g, 0, offset, first)
            : source.template values<1, kWhole>(tile, last_key(), key + lane.g, 0, offset, first));
        next_scale = ptx::load_word(source.template scales<kWhole>(
            tile, last_key(), key + (Format::kScaleFirst ? lane.g : scorer.key_of_eight(lane))));
    }

    __device__ void finish_eight(int unit) {
        ptx::launch_dependents();
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const float logit = Format::finish(scorer.eight(i, words[0], next_scale, lane), next_scale);
            const uint32 key = lane.g < 2 ? 8 * unit + scorer.key_of_eight(lane) : kNoKey;
            sinks[i].template take<kApartOfEight>(key, logit);
        }
    }
};
