// How queries and keys become operands of the tensor core: FP8, MXFP8, FP4, and the last two for cards whose tensor cores
// do not know scales, where FP4 is widened to FP8 as well.
//
// The product is scores[16 heads, 8 keys] += query[16 heads, k] * key[k, 8 keys]; ptx.cuh says which lane holds what. A dot
// product does not care in which order k runs, as long as both sides agree: a lane loads the bytes of its row that are
// convenient and calls the words it got the slots of its fragment. Queries and keys come through the same function.
//
// What a format says:
//   kRowBytes      bytes of one head's query, or of one key
//   kLoaded        words of a row that a lane holds after `load`
//   kWords         words of a row that a lane holds as operand, after `widen`; two of them feed one mma
//   kSteps         mma for 16 heads and 8 keys
//   lane_offset    where in a row the words of a lane begin
//   load           the lane's words of a row, given the address of the first
//   load_once      the same of a key that no other warp wants
//   kTurned        whether queries have another way, `load_turned`, after which words change places or lanes in `turn_back`
//   widen          from the words as they were loaded to operands
//   QueryScales    of all heads, what a lane holds of them
//   multiply       one step, all heads: scores[tile] += query[tile][step] * key
//   kScaleFirst    whether multiply needs the scale of a key, or finish does
//   scale_key      which of 32 keys this lane loads the scale of
//   finish         from the sum over heads to the logit
#pragma once

#include "ptx.cuh"

constexpr uint32 kAllLanes = 0xffffffff;

// Where a lane stands in its fragments.
struct Lane {
    int id, g, t;
    __device__ Lane() : id(threadIdx.x % 32), g(id / 4), t(id % 4) {}
};

// e4m3; the query's scale is folded into the weights, a key's scale is one fp32.
template <int Dim, bool BlockScaled, int VectorBytes>
struct Fp8 {
    static constexpr int kRowBytes = Dim;
    static constexpr int kLoaded = Dim / 16, kWords = kLoaded, kSteps = kWords / 2;
    static constexpr bool kScaleFirst = false;

    // The largest loads that the alignment allows. A quad reads its row in pieces of 4 lanes x vector: with 32 bytes all of
    // 128 at once, and 8 keys are 8 wavefronts of L1; two loads of 16 bytes a lane meet in half of the banks and are 16.
    static constexpr int kVector = VectorBytes / 4 < kLoaded ? VectorBytes / 4 : kLoaded;
    __device__ static uint32 lane_offset(const Lane& lane) { return 4 * kVector * lane.t; }
    __device__ static void load(uint32 (&words)[kLoaded], const uint8* address) {
        for (int j = 0; j < kLoaded; j += kVector) ptx::load<kVector>(words + j, address + 16 * j);
    }
    __device__ static void load_once(uint32 (&words)[kLoaded], const uint8* address) {
        for (int j = 0; j < kLoaded; j += kVector) ptx::load_once<kVector>(words + j, address + 16 * j);
    }

    // Odd rows begin with their second half: so two loads of 16 bytes a lane do not meet in the same banks, for a select a
    // word (8 x 16K with next_n 3 and 6, an MMA as on SM120: -5%; stand-in on an H100, 28 Nov 2026).
    static constexpr bool kTurned = kVector == 4 && kLoaded == 8;
    __device__ static void load_turned(uint32 (&words)[kLoaded], const uint8* address, const Lane& lane) {
        const int first = lane.g % 2 ? 64 : 0;
        ptx::load<4>(words, address + first);
        ptx::load<4>(words + 4, address + (64 - first));
    }
    __device__ static void turn_back(uint32 (&words)[kLoaded], const Lane& lane) {
        const bool odd = lane.g % 2;
        for (int j = 0; j < 4; ++j) {
            const uint32 first = words[j];
            words[j] = odd ? words[j + 4] : first;
            words[j + 4] = odd ? first : words[j + 4];
        }
    }

    __device__ static void widen(uint32 (&words)[kWords], const uint32 (&loaded)[kLoaded]) {
        for (int j = 0; j < kWords; ++j) words[j] = loaded[j];
    }

    template <int HeadTiles>
    struct QueryScales {
        __device__ void load(const uint32*, int, const Lane&) {}
    };

    template <int Step, int KeyTile, int HeadTiles>
    __device__ static void multiply(float (&scores)[HeadTiles][4], const uint32 (&query)[HeadTiles][kSteps][4],
                                    const QueryScales<HeadTiles>&, const uint32 (&key)[kWords], uint32, const Lane&) {
        for (int m = 0; m < HeadTiles; ++m) {
            if constexpr (BlockScaled) {
                ptx::mma_e4m3_block_scaled(scores[m], query[m][Step], key[2 * Step], key[2 * Step + 1], 0x7f7f7f7f);
            } else {
                ptx::mma_e4m3(scores[m], query[m][Step], key[2 * Step], key[2 * Step + 1]);
            }
        }
    }

    // The lane that stores a logit loads its scale.
    __device__ static uint32 scale_key(const Lane&, uint32 stored_key) { return stored_key; }
    __device__ static float finish(float sum, uint32 key_scale) { return sum * __uint_as_float(key_scale); }
};

// Queries and keys with UE8M0 scales for every 32 elements, the scales of a row being the bytes of one word: what formats whose
// mma applies them have in common. `Format::mma` does one step of one head tile.
template <class Format>
struct Microscaled {
    static constexpr bool kScaleFirst = true;

    // The mma takes the scales of rows g and g + 8 from two lanes of the quad, so one register serves two head tiles.
    template <int HeadTiles>
    struct QueryScales {
        uint32 word[(HeadTiles + 1) / 2];
        __device__ void load(const uint32* scales, int heads, const Lane& lane) {
            for (int i = 0; i < (HeadTiles + 1) / 2; ++i) {
                const int head = 32 * i + 8 * lane.t + lane.g;
                word[i] = head < heads ? ptx::load_word(scales + head) : 0;
            }
        }
    };

    template <int Step, int KeyTile, int HeadTiles, int Steps, int Words>
    __device__ static void multiply(float (&scores)[HeadTiles][4], const uint32 (&query)[HeadTiles][Steps][4],
                                    const QueryScales<HeadTiles>& query_scales, const uint32 (&key)[Words],
                                    uint32 key_scale, const Lane&) {
        for (int m = 0; m < HeadTiles; m += 2) {
            Format::template mma<Step, 0, KeyTile>(scores[m], query[m][Step], key[2 * Step], key[2 * Step + 1],
                                                   query_scales.word[m / 2], key_scale);
            if (m + 1 < HeadTiles) {
                Format::template mma<Step, 1, KeyTile>(scores[m + 1], query[m + 1][Step], key[2 * Step], key[2 * Step + 1],
                                                       query_scales.word[m / 2], key_scale);
            }
        }
    }

    // Lane t of a quad holds the scales of key 8t + g, where the mma looks for them.
    __device__ static uint32 scale_key(const Lane& lane, uint32) { return 8 * lane.t + lane.g; }
    __device__ static float finish(float sum, uint32) { return sum; }
};

// The same where the mma knows no scales: each step is the 32 elements of one scale, and its products are multiplied by both.
struct Unscaled {
    static constexpr bool kScaleFirst = true;

    // Byte `step` of a word of UE8M0 as fp32: 2^(byte - 127); 255 is NaN.
    __device__ static float scale(uint32 word, int step) {
        const uint32 byte = word >> 8 * step & 0xff;
        return __uint_as_float(byte == 0 ? 0x00400000 : byte == 255 ? 0x7fffffff : byte << 23);
    }

    template <int HeadTiles>
    struct QueryScales {
        uint32 word[HeadTiles][2];
        __device__ void load(const uint32* scales, int heads, const Lane& lane) {
            for (int i = 0; i < 2 * HeadTiles; ++i) {
                const int head = 8 * i + lane.g;
                word[i / 2][i % 2] = head < heads ? ptx::load_word(scales + head) : 0;
            }
        }
    };

    template <int Step, int KeyTile, int HeadTiles, int Steps, int Words>
    __device__ static void multiply(float (&scores)[HeadTiles][4], const uint32 (&query)[HeadTiles][Steps][4],
                                    const QueryScales<HeadTiles>& query_scales, const uint32 (&key)[Words],
                                    uint32 key_scale, const Lane& lane) {
        // The scales of this lane's two columns of scores, 2t and 2t + 1, lie in the quads of those keys.
        float of_key[2];
        for (int c = 0; c < 2; ++c) {
            of_key[c] = scale(__shfl_sync(kAllLanes, key_scale, 4 * (2 * lane.t + c) + KeyTile), Step);
        }
        for (int m = 0; m < HeadTiles; ++m) {
            float products[4] = {};
            ptx::mma_e4m3(products, query[m][Step], key[2 * Step], key[2 * Step + 1]);
            for (int i = 0; i < 4; ++i) {
                scores[m][i] += products[i] * scale(query_scales.word[m][i / 2], Step) * of_key[i % 2];
            }
        }
    }

    __device__ static uint32 scale_key(const Lane& lane, uint32) { return 8 * lane.t + lane.g; }
    __device__ static float finish(float sum, uint32) { return sum; }
};

// e2m1, two to a byte.
// A scale binds 32 physical elements, so each lane of a quad must hold a quarter of every 32: one word out of each 16 bytes.
// That is 4 loads for 8 keys, of 4 wavefronts each: half of what L1 serves in the time of their mma. One load of 16 bytes
// a lane has 4 wavefronts in all, but then 4 words must change lanes: 4 shuffles and 12 selects.
// Queries, which few rows load as often as keys, are worth that (1 x 16K 3.67 to 3.43 us, with next_n 4 5.13 to 4.68;
// stand-in on an H100, 28 Nov 2026), where they are aligned to VectorBytes = 16.
template <int Dim, int VectorBytes = 4>
struct Fp4 : Microscaled<Fp4<Dim, VectorBytes>> {
    static constexpr int kRowBytes = Dim / 2;
    static constexpr int kLoaded = Dim / 32, kWords = kLoaded, kSteps = kWords / 2;

    __device__ static uint32 lane_offset(const Lane& lane) { return 4 * lane.t; }
    __device__ static void load(uint32 (&words)[kLoaded], const uint8* address) {
        for (int j = 0; j < kLoaded; ++j) words[j] = ptx::load_word(address + 16 * j);
    }
    __device__ static void load_once(uint32 (&words)[kLoaded], const uint8* address) {
        for (int j = 0; j < kLoaded; ++j) ptx::load_once<1>(words + j, address + 16 * j);
    }

    static constexpr bool kTurned = VectorBytes == 16 && kLoaded == 4;
    __device__ static void load_turned(uint32 (&words)[kLoaded], const uint8* address, const Lane& lane) {
        ptx::load<4>(words, address + 12 * lane.t);       // and the offset of the lane: 16 t
    }
    // Word j of lane t and word t of lane j change places.
    __device__ static void turn_back(uint32 (&words)[kLoaded], const Lane& lane) {
        for (int step = 1; step <= 2; ++step) {
            const bool upper = lane.t & step;
            for (int n = 0; n < 2; ++n) {
                uint32& first = words[step == 1 ? 2 * n : n];
                uint32& second = words[step == 1 ? 2 * n + 1 : n + 2];
                const uint32 got = __shfl_xor_sync(kAllLanes, upper ? first : second, step);
                first = upper ? got : first;
                second = upper ? second : got;
            }
        }
    }

    __device__ static void widen(uint32 (&words)[kWords], const uint32 (&loaded)[kLoaded]) {
        for (int j = 0; j < kWords; ++j) words[j] = loaded[j];
    }

    template <int Step, int ALane, int BLane>
    __device__ static void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, uint32 a_scale, uint32 b_scale) {
        ptx::mma_e2m1<2 * Step, ALane, BLane>(d, a, b0, b1, a_scale, b_scale);
    }
};

// An e2m1 number shifted into the bits of an e4m3 one is exactly 2^-6 times itself, so eight nibbles become two words: the even
// ones and the odd ones.
template <int Dim>
struct Fp4Widened : Unscaled {
    static constexpr bool kTurned = false;
    static constexpr int kRowBytes = Dim / 2;
    static constexpr int kLoaded = Dim / 32, kWords = 2 * kLoaded, kSteps = kLoaded;

    __device__ static uint32 lane_offset(const Lane& lane) { return Fp4<Dim>::lane_offset(lane); }
    __device__ static void load(uint32 (&words)[kLoaded], const uint8* address) { Fp4<Dim>::load(words, address); }
    __device__ static void load_once(uint32 (&words)[kLoaded], const uint8* address) {
        Fp4<Dim>::load_once(words, address);
    }

    __device__ static void widen(uint32 (&words)[kWords], const uint32 (&loaded)[kLoaded]) {
        for (int j = 0; j < kLoaded; ++j) {
            words[2 * j] = (loaded[j] << 4 & 0x80808080) | (loaded[j] << 2 & 0x1c1c1c1c);
            words[2 * j + 1] = (loaded[j] & 0x80808080) | (loaded[j] >> 2 & 0x1c1c1c1c);
        }
    }

    __device__ static float finish(float sum, uint32) { return sum * 4096; }
};

// e4m3: each lane of a quad holds 8 of the 32 bytes that share a scale.
template <int Dim, int VectorBytes>
struct Mxfp8Rows {
    static constexpr bool kTurned = false;
    static constexpr int kRowBytes = Dim;
    static constexpr int kLoaded = Dim / 16, kWords = kLoaded, kSteps = kWords / 2;

    static constexpr int kVector = VectorBytes / 4 < 2 ? 1 : 2;
    __device__ static uint32 lane_offset(const Lane& lane) { return 8 * lane.t; }
    __device__ static void load(uint32 (&words)[kLoaded], const uint8* address) {
        for (int j = 0; j < kLoaded; j += kVector) ptx::load<kVector>(words + j, address + 32 * (j / 2) + 4 * (j % 2));
    }

    __device__ static void widen(uint32 (&words)[kWords], const uint32 (&loaded)[kLoaded]) {
        for (int j = 0; j < kWords; ++j) words[j] = loaded[j];
    }
};

template <int Dim, int VectorBytes>
struct Mxfp8 : Mxfp8Rows<Dim, VectorBytes>, Microscaled<Mxfp8<Dim, VectorBytes>> {
    template <int Step, int ALane, int BLane>
    __device__ static void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, uint32 a_scale, uint32 b_scale) {
        ptx::mma_e4m3_scaled<Step, ALane, BLane>(d, a, b0, b1, a_scale, b_scale);
    }
};

template <int Dim, int VectorBytes>
struct Mxfp8Unscaled : Mxfp8Rows<Dim, VectorBytes>, Unscaled {};
