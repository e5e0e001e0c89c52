// Lightning Indexer logits of listed blocks (DeepSeek-V4.1): each row has a list of blocks of kBlock keys, and column
// j * kBlock + o of it is the logit of key o of its jth block:
//
//   logits[row, column] = sum_h weights[row, h] * relu(query[row, h] . key)
//
// with UE8M0 scales for every 32 elements of both sides, all sums fp32. Rows and columns are taken as those of a paged cache
// (rows.cuh): the columns of a row are its keys, and keys.cuh finds them.
//
// Grid    one block for each slot.
// Many    rows are a prefill, whose neighbours have most blocks in common and lists in the same order. The warps of a block
//         take neighbours over the same columns, so they come to the blocks that they share at about the same time, and find
//         them in L1.
// Bound   32 heads of FP4: 16 mma for 32 keys and one row, 256 clocks of a tensor pipe, against 2176 bytes of keys, 70
//         wavefronts of L1 and 16 bytes of places. 4,096 rows of 16,384 keys that each came out of L2 alone were 4.5 GB.
#pragma once

#include "rows.cuh"

struct SparseParams {
    Queries queries;
    Listed keys;
    Output output;
    Lists windows;
    int rows_per_group;          // many rows
    FewRows few;                 // few rows

    __device__ int2 entry(int slot, const Lane& lane) const { return windows.entry(slot, gridDim.x, lane); }
};
static_assert(sizeof(SparseParams) == PARAMS_BYTES, "the launcher packs a different struct");

template <class Format, int kHeads, int kPage, int kBlock, class Weight, class Logit, int kWarps>
using Sparse = Rows<SparseParams, Format, kHeads, ListedKeys<kPage, kBlock, Format::kRowBytes>, Weight, Logit, kWarps, 1>;
