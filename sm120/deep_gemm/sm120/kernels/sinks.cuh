// What becomes of a tile's logits: they are stored, and, where they are wanted, so are the maxima of blocks of eight.
//
// Lane    has the logit of one of a tile's 32 keys, and stores it. The maximum of a block is found by three shuffles, and the
//         lane with the block's first key stores it (of a second token, the lane beside that).
//
// What a sink, one token's row, says:
//   open        begins a row
//   take        this lane's logit, of any key; a key outside the window is dropped
//   keep        from now on this lane has the key of that number in each tile
//   take_of     its logit of a tile, if the key is in the window; the maxima come from `Maxima`, those of all tokens at once
//   put         its logit of a tile that the window has whole; likewise
#pragma once

#include "ptx.cuh"
#include "window.cuh"

struct Output {
    uint8* logits;               // [tokens][stride]
    int64 stride;                // elements
    float* maxima;               // [tokens][maxima_stride]                             WithMaxima
    int64 maxima_stride;         // elements
    int blocks;                  // columns of the maxima
};

constexpr uint32 kNoKey = 0xffffffff;

// All lanes of a warp call together. kApart: how the keys of a block of eight are spread over lanes (score.cuh).
template <class Logit>
struct Stored {
    Logit* row;                  // column of key 0
    uint32 begin, count;         // the window
    // `compressed`: column 0 is the window's first key.
    __device__ void open(const Output& p, int token, Window window, bool compressed) {
        begin = window.begin;
        count = window.end - window.begin;
        row = reinterpret_cast<Logit*>(p.logits) + token * p.stride + (compressed ? 0 : window.begin);
    }

    template <int kApart>
    __device__ void take(uint32 key, float logit) const {
        const uint32 n = key - begin;        // keys before the window wrap around
        if (n < count) row[n] = Logit(logit);
    }

    __device__ void keep(uint32 key) { row += int(key - begin), begin -= key; }
    __device__ void take_of(uint32 tile, float logit) const {
        if (tile * kTile - begin < count) put(tile, logit);
    }
    __device__ void put(uint32 tile, float logit) const { row[int64(tile) * kTile] = Logit(logit); }
};

// Instead of the type of the logits: of that type, and with the maxima of blocks. Block b is keys 8b to 8b + 7, those of them
// that the window has. Its maximum is that of the logits as they are stored, NaN left out where there is something else; of
// the block with the window's last key it is +inf. Compressed: column 0 is the block with the window's first key.
template <class Logit>
struct WithMaxima;

template <class Logit>
struct Stored<WithMaxima<Logit>> : Stored<Logit> {
    using Stored<Logit>::begin, Stored<Logit>::count;
    static constexpr uint32 kBlock = 8;

    uint8* maxima;               // that of block b is 4b bytes further on
    uint32 reach;                // a block is stored if its first key is one of so many from begin - 7 on

    __device__ void open(const Output& p, int token, Window window, bool compressed) {
        Stored<Logit>::open(p, token, window, compressed);
        const int first = compressed ? begin / kBlock : 0;                   // the block of column 0
        const int room = (first + p.blocks) * kBlock - begin;
        maxima = reinterpret_cast<uint8*>(p.maxima + token * p.maxima_stride - first);
        reach = count ? min(int(count), room) + (kBlock - 1) : 0;
    }

    __device__ void keep(uint32 key) {
        Stored<Logit>::keep(key);
        maxima += key / 2;
    }

    template <int kApart>
    __device__ void take(uint32 key, float logit) const {
        const uint32 n = key - begin;
        const Logit stored(logit);
        if (n < count) this->row[n] = stored;
        const float most = largest<kApart>(n < count ? float(stored) : __int_as_float(0x7fffffff), 1);
        if (key % kBlock == 0) place(n, maxima + int64(key / 2), most);
    }

    // Of this lane's block of eight, from lanes `from` apart on.
    template <int kApart>
    __device__ static float largest(float logit, int from) {
        if (from == 1) logit = fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, 1));
        logit = fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, 2));
        return fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, kApart));
    }

    // The maximum of a block whose first key is the window's nth, if the window has any of its.
    __device__ void place(uint32 n, uint8* at, float most) const {
        if (n + (kBlock - 1) < reach) {
            *reinterpret_cast<float*>(at) = n + kBlock >= count ? __int_as_float(0x7f800000) : most;
        }
    }
};

// The maxima of a tile of all tokens of a warp, for a lane that has kept its key. None:
template <class Sink, int kTokens>
struct Maxima {
    __device__ void keep(const Sink (&)[kTokens], uint32, int) {}
    template <bool kInside>
    __device__ void take(const Sink (&)[kTokens], uint32, const float (&)[kTokens]) const {}
};

// Of two tokens an even lane goes on with the first's logits, an odd one with the second's, after one exchange: as many
// shuffles as for one (FP4 with 32 heads, 2,048 x 8K: 2 instead of 16% more than logits alone; x1 on an H100, 28 Nov 2026).
template <class Logit, int kTokens>
struct Maxima<Stored<WithMaxima<Logit>>, kTokens> {
    using Sink = Stored<WithMaxima<Logit>>;
    static_assert(kTokens <= 2);

    Sink own;                    // this lane's token, from the key of the even lane beside it on
    bool odd, first;             // whether this lane stores

    // Sinks have kept the key.
    __device__ void keep(const Sink (&sinks)[kTokens], uint32 key, int lane) {
        odd = kTokens == 2 && lane % 2;
        if constexpr (kTokens == 2) {
            own = sinks[0];
            if (odd) own = sinks[1], own.begin += 2, --own.maxima;
        }
        first = (key - 2 * odd) % Sink::kBlock == 0 && of(sinks).count > 0;
    }

    __device__ const Sink& of(const Sink (&sinks)[kTokens]) const {
        if constexpr (kTokens == 2) return own;
        else return sinks[0];
    }

    // kInside: windows have the whole tile, and more follows.
    template <bool kInside>
    __device__ void take(const Sink (&sinks)[kTokens], uint32 tile, const float (&logits)[kTokens]) const {
        float values[kTokens];
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const bool seen = kInside || tile * kTile - sinks[i].begin < sinks[i].count;
            values[i] = seen ? float(Logit(logits[i])) : __int_as_float(0x7fffffff);
        }
        float most = values[0];
        if constexpr (kTokens == 2) {
            most = odd ? values[1] : values[0];
            most = fmaxf(most, __shfl_xor_sync(kAllLanes, odd ? values[0] : values[1], 1));
        }
        most = Sink::template largest<kApart>(most, kTokens);
        if (!first) return;
        uint8* at = of(sinks).maxima + int64(tile) * (kTile / 2);
        if constexpr (kInside) *reinterpret_cast<float*>(at) = most;
        else of(sinks).place(tile * kTile - of(sinks).begin, at, most);
    }
};
