// The order of logits: -0 equals +0, and NaN is below everything; among equal ones the smaller position comes first.
#pragma once

#include "ptx.cuh"

constexpr uint32 kNowhere = 0xffffffff;                                  // a position that no key has
constexpr uint32 kNothing = 0, kNan = 1, kZero = 0x80000000;             // keys of the slow way, in the order of their values
constexpr uint32 kNanWord = 0xffffffff;                                  // one fp32 or two bf16

__device__ inline float lowest() { return __int_as_float(0xff800000); }

// x + 0 turns -0 into +0.
__device__ inline uint32 key_of_number(float x) {
    const uint32 bits = __float_as_uint(x + 0.0f);
    return bits ^ (uint32(int(bits) >> 31) | kZero);
}

__device__ inline uint32 key_of(float x) { return x == x ? key_of_number(x) : kNan; }

__device__ inline float value_of(uint32 key) {
    return __uint_as_float(key & kZero ? key ^ kZero : ~key);
}

// Of entries {value, position}.
__device__ inline bool is_above(uint2 entry, uint2 other) {
    const float value = __uint_as_float(entry.x), than = __uint_as_float(other.x);
    return value > than || (value == than && entry.y < other.y);
}

// Of a front, the largest logits of a block (paged_fronts.cuh): so many at most, of which fronts.cuh reads the first of all
// fronts; and what they are a choice of, at most.
constexpr int kFrontRoom = 64, kFrontRows = 16, kMostOfFronts = 512;
