// The schedule of paged logits: which splits of which rows each slot (one block, one SM) takes.
//
// A split is 256 keys of one row; all splits stand in one list, rows in order. With T splits and S slots the first
// S - T % S slots take T / S splits each, the others one more. schedule[j] = (row, split) is where slot j starts, and where
// slot j - 1 ends; past the last split it is (rows, 0).
//
// Grid    one block.
// Block   goes through the rows twice, a thread a row and kThreads rows at a time: first it counts the splits, then it sums
//         them up as it goes and keeps the running sums of the rows at hand in shared memory, where each thread looks up the
//         starts of its slots by bisection. Any number of rows; nothing grows with it.
// Bound   latency: for up to kThreads rows one load, two scans, one store.
#pragma once

#include "formats.cuh"
#include "window.cuh"

struct MetadataParams {
    int2* schedule;          // [slots + 1]
    int slots;
    Windows windows;         // a row is as long as its longest token
};

constexpr int kSplit = 256;

__device__ inline int scan_warp(int x, int lane) {
    #pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(kAllLanes, x, distance);
        if (lane >= distance) x += below;
    }
    return x;
}

// The sum of `x` over this thread and those before it.
template <int kWarps>
__device__ inline int scan_block(int x, int (&warp_sums)[kWarps]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = scan_warp(x, lane);
    __syncthreads();         // the last call's sums have been read
    if (lane == 31) warp_sums[warp] = x;
    __syncthreads();
    if (warp == 0) {
        const int sum = scan_warp(lane < kWarps ? warp_sums[lane] : 0, lane);
        if (lane < kWarps) warp_sums[lane] = sum;
    }
    __syncthreads();
    return warp > 0 ? x + warp_sums[warp - 1] : x;
}

__device__ inline int splits_of(const Windows& windows, int row) {
    return row < windows.rows ? (windows.longest(row) + kSplit - 1) / kSplit : 0;
}

template <int kThreads>
__device__ inline void plan(const MetadataParams& p) {
    constexpr int kWarps = kThreads / 32;
    __shared__ int warp_sums[kWarps], sums[kThreads];
    ptx::griddepcontrol();
    const int thread = threadIdx.x, rows = p.windows.rows;

    int total = 0;
    for (int row = thread; row < rows; row += kThreads) total += splits_of(p.windows, row);
    scan_block(total, warp_sums);
    total = warp_sums[kWarps - 1];

    const int share = total / p.slots, shorter = p.slots - total % p.slots;
    for (int first = 0, before = 0; first < rows && before < total; first += kThreads) {
        const int sum = before + scan_block(splits_of(p.windows, first + thread), warp_sums);
        sums[thread] = sum;
        const int until = before + warp_sums[kWarps - 1];
        __syncthreads();
        for (int slot = thread; slot < p.slots; slot += kThreads) {
            const int start = slot * share + max(0, slot - shorter);
            if (start < before || start >= until) continue;
            int row = 0;     // the first one whose splits reach past `start`
            #pragma unroll
            for (int step = kThreads / 2; step > 0; step /= 2) {
                if (sums[row + step - 1] <= start) row += step;
            }
            p.schedule[slot] = {first + row, start - (row > 0 ? sums[row - 1] : before)};
        }
        before = until;
    }
    for (int slot = thread; slot <= p.slots; slot += kThreads) {
        if (slot == p.slots || total == 0) p.schedule[slot] = {rows, 0};
    }
}
