// What becomes of a tile's logits: they are stored.
#pragma once

#include "ptx.cuh"
#include "window.cuh"

struct Output {
    uint8* logits;               // [tokens][stride]
    int64 stride;                // elements
};

constexpr uint32 kNoKey = 0xffffffff;

// One token's row. `take` is called by all lanes of a warp, each with a key of its own; keys outside the window are dropped.
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

    __device__ void take(uint32 key, float logit) const {
        const uint32 n = key - begin;        // keys before the window wrap around
        if (n < count) row[n] = Logit(logit);
    }
};
