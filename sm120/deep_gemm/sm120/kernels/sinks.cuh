// What becomes of a tile's logits: they are stored, and, where they are wanted, so are the maxima of blocks of eight.
//
// Lane    has the logit of one of a tile's 32 keys, and stores it. The maximum of a block is found by three shuffles, and the
//         lane with the block's first key stores it.
//
// What a sink, one token's row, says:
//   open        begins a row
//   take        this lane's logit, of any key; a key outside the window is dropped
//   keep        from now on this lane has the key of that number in each tile
//   take_of     its logit of a tile, if the key is in the window
//   put         its logit of a tile that the window has whole
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
    bool first;                  // after `keep`: whether this lane's key is the first of a block

    __device__ void open(const Output& p, int token, Window window, bool compressed) {
        Stored<Logit>::open(p, token, window, compressed);
        const int first = compressed ? begin / kBlock : 0;                   // the block of column 0
        const int room = (first + p.blocks) * kBlock - begin;
        maxima = reinterpret_cast<uint8*>(p.maxima + token * p.maxima_stride - first);
        reach = count ? min(int(count), room) + (kBlock - 1) : 0;
    }

    template <int kApart>
    __device__ void take(uint32 key, float logit) const {
        const uint32 n = key - begin;
        const Logit stored(logit);
        if (n < count) this->row[n] = stored;
        place<kApart>(n, key % kBlock == 0, key / 2, stored);
    }

    __device__ void keep(uint32 key) {
        Stored<Logit>::keep(key);
        maxima += key / 2, first = key % kBlock == 0;
    }
    __device__ void take_of(uint32 tile, float logit) const {
        const uint32 n = tile * kTile - begin;
        const Logit stored(logit);
        if (n < count) Stored<Logit>::put(tile, logit);
        place<::kApart>(n, first, int64(tile) * (kTile / 2), stored);
    }
    __device__ void put(uint32 tile, float logit) const {          // and more of the window follows
        Stored<Logit>::put(tile, logit);
        const float most = largest<::kApart>(float(Logit(logit)));
        if (first) *reinterpret_cast<float*>(maxima + int64(tile) * (kTile / 2)) = most;
    }

    // Of this lane's block of eight.
    template <int kApart>
    __device__ static float largest(float logit) {
        logit = fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, 1));
        logit = fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, 2));
        return fmaxf(logit, __shfl_xor_sync(kAllLanes, logit, kApart));
    }

    // `n`: which of the window's keys this lane has. The lane with a block's first key stores, if the window has any of its.
    template <int kApart>
    __device__ void place(uint32 n, bool first, int64 offset, Logit stored) const {
        const float most = largest<kApart>(n < count ? float(stored) : __int_as_float(0x7fffffff));
        if (!first || n + (kBlock - 1) >= reach) return;
        *reinterpret_cast<float*>(maxima + offset) = n + kBlock >= count ? __int_as_float(0x7f800000) : most;
    }
};
