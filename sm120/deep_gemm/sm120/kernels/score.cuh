// From operands to scores: the queries that stay in a warp's registers, and what 32 keys are worth to them.
//
//   score[key] = sum_h weight[h] * relu(query[h] . key)
//
// Warp    holds the whole queries of kTokens tokens as A fragments, 16 heads a tile, with their weights; keys come as B
//         fragments, 8 a tile (formats.cuh).
// Lane    (g = lane / 4, t = lane % 4) holds heads g and g + 8 of each head tile. A product comes out as
//         [head g, g + 8][key 2t, 2t + 1]; relu and weights are applied on it, and the eight quads are summed by exchange:
//         seven shuffles for 32 keys, after which every lane has the score of one.
#pragma once

#include "formats.cuh"

struct Queries {
    const uint8* values;         // [tokens][heads][row bytes]
    const uint32* scales;        // [tokens][heads]                 FP4
    const uint8* weights;        // [tokens][weights_stride], fp32 or bf16
    int64 weights_stride;        // elements
};

// In the end the keys of a block of eight are with lanes 1, 2 and so many apart; so are the eight keys alone.
constexpr int kApart = 8, kApartOfEight = 4;

template <class Format, int kHeads, int kTokens, class Weight>
struct Scorer {
    static constexpr int kHeadTiles = (kHeads + 15) / 16;
    static_assert(kHeads % 8 == 0 && kHeads <= 64);

    uint32 fragments[kTokens][kHeadTiles][Format::kSteps][4];
    typename Format::template QueryScales<kHeadTiles> scales[kTokens];
    float weights[kTokens][kHeadTiles][2];

    // Place `i` takes the query of `token`. `zero` is 0, which the compiler must not know: it would keep the vectors as they
    // were loaded and copy four words before every mma, 4 of 9 instructions of the loop (24 Nov 2026). kTurn: in the other
    // way, where the format has one. All is asked for before any of it is turned back, which waits for it.
    template <bool kTurn>
    __device__ void load(int i, const Queries& queries, int token, uint32 zero, const Lane& lane) {
        constexpr bool kTurned = kTurn && Format::kTurned;
        const uint32 first_head = token * kHeads;
        const uint8* values = queries.values + int64(first_head + lane.g) * Format::kRowBytes + Format::lane_offset(lane);
        const uint8* factors = queries.weights + (token * queries.weights_stride + lane.g) * sizeof(Weight);
        uint32 loaded[kHeadTiles][2][Format::kLoaded];
        #pragma unroll
        for (int m = 0; m < kHeadTiles; ++m) {
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int head = 16 * m + 8 * half;              // and lane.g: one address, constant offsets
                #pragma unroll
                for (int j = 0; j < Format::kLoaded; ++j) loaded[m][half][j] = 0;
                weights[i][m][half] = 0;     // heads that pad the last tile weigh nothing
                if (head < kHeads) {
                    const uint8* address = values + head * Format::kRowBytes;
                    if constexpr (kTurned) Format::load_turned(loaded[m][half], address, lane);
                    else Format::load(loaded[m][half], address);
                    weights[i][m][half] = weight(factors + head * sizeof(Weight));
                }
            }
        }
        scales[i].load(queries.scales + first_head, kHeads, lane);
        #pragma unroll
        for (int m = 0; m < kHeadTiles; ++m) {
            uint32 rows[2][Format::kWords];
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (kTurned) Format::turn_back(loaded[m][half], lane);
                Format::widen(rows[half], loaded[m][half]);
            }
            #pragma unroll
            for (int s = 0; s < Format::kSteps; ++s) {
                fragments[i][m][s][0] = rows[0][2 * s] ^ zero;
                fragments[i][m][s][1] = rows[1][2 * s] ^ zero;
                fragments[i][m][s][2] = rows[0][2 * s + 1] ^ zero;
                fragments[i][m][s][3] = rows[1][2 * s + 1] ^ zero;
            }
        }
    }

    __device__ static float weight(const uint8* address) {
        if constexpr (sizeof(Weight) == 4) return __uint_as_float(ptx::load_word(address));
        else return __uint_as_float(ptx::load_half(address) << 16);
    }

    // sums[column] over this lane's heads, for the 8 keys of key tile KeyTile.
    template <int KeyTile>
    __device__ void keys(float (&sums)[2], int i, const uint32 (&loaded)[Format::kLoaded], uint32 scale,
                         const Lane& lane) const {
        uint32 words[Format::kWords];
        Format::widen(words, loaded);
        float products[kHeadTiles][4] = {};
        multiply<KeyTile>(products, i, words, scale, lane);
        #pragma unroll
        for (int m = 0; m < kHeadTiles; ++m) {
            #pragma unroll
            for (int j = 0; j < 4; ++j) sums[j % 2] += weights[i][m][j / 2] * ptx::relu(products[m][j]);
        }
    }

    template <int KeyTile, int Step = 0>
    __device__ void multiply(float (&products)[kHeadTiles][4], int i, const uint32 (&words)[Format::kWords], uint32 scale,
                             const Lane& lane) const {
        Format::template multiply<Step, KeyTile>(products, fragments[i], scales[i], words, scale, lane);
        if constexpr (Step + 1 < Format::kSteps) multiply<KeyTile, Step + 1>(products, i, words, scale, lane);
    }

    // The sum over heads runs over the quads, in three steps. In each a lane keeps one of two sums and adds to it what the
    // lane `4 << Step` away has of it, to which it gives the other: in the end a lane has all of one key.
    template <int Step>
    __device__ static float exchange(float lower, float upper, const Lane& lane) {
        const bool keeps_upper = lane.id & 4 << Step;
        const float given = keeps_upper ? lower : upper;
        return (keeps_upper ? upper : lower) + __shfl_xor_sync(kAllLanes, given, 4 << Step);
    }

    // From the sums of a tile's four groups of 8 keys to the score of one key.
    __device__ static float total(const float (&sums)[4][2], const Lane& lane) {
        float halves[2];
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            halves[half] = exchange<1>(exchange<0>(sums[2 * half][0], sums[2 * half + 1][0], lane),
                                       exchange<0>(sums[2 * half][1], sums[2 * half + 1][1], lane), lane);
        }
        return exchange<2>(halves[0], halves[1], lane);
    }

    // Which of 32 keys a lane has the score of in the end.
    __device__ static uint32 key_of(const Lane& lane) {
        return 16 * (lane.g >> 2) + 8 * (lane.g & 1) + 2 * lane.t + (lane.g >> 1 & 1);
    }

    // The same for 8 keys alone: lanes with g < 2 have the score of key 2t + g.
    __device__ float eight(int i, const uint32 (&loaded)[Format::kLoaded], uint32 scale, const Lane& lane) const {
        float sums[2] = {};
        keys<0>(sums, i, loaded, scale, lane);
        float sum = exchange<0>(sums[0], sums[1], lane);
        sum += __shfl_xor_sync(kAllLanes, sum, 8);
        return sum + __shfl_xor_sync(kAllLanes, sum, 16);
    }
    __device__ static uint32 key_of_eight(const Lane& lane) { return 2 * lane.t + (lane.g & 1); }
};
