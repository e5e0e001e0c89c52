// How many columns of sparse logits a choice may be made from. Column j * block + o is key o of the jth block of the row's
// list, and the block that holds the row's last key may have room for more, which are scored too. Lists ascend, so that block
// is the last one: the columns are those of full blocks, then those of the row's own keys in the block after them.
//
// Nothing in a list is believed: it ends before the first block that is not full, and only its own part of that one counts.
//
// Grid    x: rows. It runs beside the kernel before it, the logits': lists and lengths are older than that one, which has
//         waited for them.
// Block   a thread an entry, kThreads entries at a time.
// Bound   latency, of three dependent loads; 4 bytes an entry.
#pragma once

#include "ptx.cuh"

struct ListedColumnsParams {
    const int* lists;            // [rows][list_stride] blocks
    int64 list_stride;
    const int* lengths;          // [rows] keys
    int* columns;                // [rows]
    int width;                   // entries of a list
    int block;                   // keys
    int limit;                   // no row has more keys
};

template <int kThreads>
__device__ inline void count_columns(const ListedColumnsParams& p) {
    constexpr int kWarps = kThreads / 32;
    __shared__ int ends[kWarps];
    if (p.limit == 0) ptx::griddepcontrol();   // a cache without pages: there was no kernel of logits
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int* list = p.lists + row * p.list_stride;
    const uint32 length = min(max(int(ptx::load_word(p.lengths + row)), 0), p.limit), full = length / p.block;
    const int entries = min(uint32(p.width), (length + p.block - 1) / p.block);
    int end = entries;                         // the first entry whose block is not full
    #pragma unroll 4
    for (int i = threadIdx.x; i < entries; i += kThreads) end = min(end, ptx::load_word(list + i) < full ? entries : i);
    end = __reduce_min_sync(0xffffffff, end);
    if (lane == 0) ends[warp] = end;
    __syncthreads();
    if (warp == 0) {
        end = __reduce_min_sync(0xffffffff, ends[lane % kWarps]);
        const bool cut = end < entries && ptx::load_word(list + end) == full;
        if (lane == 0) p.columns[row] = end * p.block + (cut ? length % p.block : 0);
    }
    ptx::griddepcontrol();                     // what comes next waits for the logits by waiting for this
}
