// The metadata of sparse logits (lists.cuh): which blocks of keys each row's list names, and where they lie.
//
// The first min(W, ceil(length / block)) entries of a list count. Block i of a row is
//
//   paged     keys i * block, ... of its context, which a page holds together: place = page number * blocks of a page + block
//   ragged    keys i * block, ... of the run, or i * block + start % block, ...: place = the first one
//
// Grid    blockIdx.x: `rows_per_block` neighbouring rows; blockIdx.y: a share of their entries.
// Block   the first warp of the first share writes the rows' heads, for which it sums up the lengths of all rows before; the
//         others write places, a thread an entry.
// Bound   bytes: 4 of the list, 4 of the block table and 4 written for each entry; latency where rows are few.
#pragma once

#include "lists.cuh"

struct SparseMetadataParams {
    uint8* metadata;
    uint32 seal;
    uint32 pitch;                // bytes from row to row
    Windows windows;             // of the rows' keys
    const int* lists;            // [rows][list_stride]
    int64 list_stride;           // elements
    const int* block_table;      // [rows][table_stride]                                paged; else null
    int table_stride;            // elements
    int pages_per_row;           // columns of the table
    int width;                   // entries of a list
    int block;                   // keys
    int blocks_per_page;         // paged
    int unaligned;               // ragged: blocks begin at start % block
    int rows_per_block;
};
static_assert(sizeof(SparseMetadataParams) == PARAMS_BYTES, "the launcher packs a different struct");

constexpr int kWarps = 8;

// Entries of a row's list that count; `first` is its first key.
__device__ inline int entries_of(const SparseMetadataParams& p, int row, int& first) {
    const Window window = p.windows.of(row);
    first = min(window.begin, p.windows.limit);
    return min(p.width, (max(0, window.end - first) + p.block - 1) / p.block);
}

__device__ inline int splits_of(const SparseMetadataParams& p, int row) {
    int first;
    return (entries_of(p, row, first) * p.block + kColumnsPerSplit - 1) / kColumnsPerSplit;
}

__device__ inline void write_heads(const SparseMetadataParams& p, int from, int to, const Lane& lane) {
    int before = 0;
    #pragma unroll 4
    for (int row = lane.id; row < from; row += 32) before += splits_of(p, row);
    before = __reduce_add_sync(kAllLanes, before);
    for (int row = from; row < to; ++row) {
        int first;
        const int columns = entries_of(p, row, first) * p.block;
        if (lane.id == 0) {
            *reinterpret_cast<int4*>(p.metadata + kFirstRow + int64(row) * p.pitch) = {int(p.seal), columns, before, 0};
        }
        before += (columns + kColumnsPerSplit - 1) / kColumnsPerSplit;
    }
}

__device__ inline void write_header(const SparseMetadataParams& p, const Lane& lane) {
    const int sheet[kZeros / 4] = {int(kMagic), p.windows.rows, p.width, p.block, p.blocks_per_page, p.unaligned,
                                   int(p.seal), int(p.pitch)};
    for (int i = lane.id; i < kFirstRow / 4; i += 32) {
        int word = 0;
        #pragma unroll
        for (int j = 0; j < 8; ++j) word = i == j ? sheet[j] : word;
        reinterpret_cast<int*>(p.metadata)[i] = word;
    }
}

// The place of block `id` of a row whose keys begin at `first`; `page` is the number of the page that holds it. What leads
// outside lies past everything.
__device__ inline uint32 place_of(const SparseMetadataParams& p, uint32 id, uint32 page, int first) {
    if (p.block_table) return min(int64(page) * p.blocks_per_page + id % p.blocks_per_page, 0xffffffffll);
    const uint32 keys = p.windows.limit;
    return id <= keys / p.block ? min(id * p.block + (p.unaligned ? first % p.block : 0), keys) : keys;
}

__device__ inline void list(const SparseMetadataParams& p) {
    ptx::griddepcontrol();
    const Lane lane;
    const int warp = threadIdx.x / 32;
    const int from = blockIdx.x * p.rows_per_block, to = min(p.windows.rows, from + p.rows_per_block);
    if (blockIdx.y == 0 && warp == 0) {
        if (blockIdx.x == 0) write_header(p, lane);
        write_heads(p, from, to, lane);
        return;
    }
    constexpr int kAtOnce = 4;
    const int thread = (blockIdx.y * kWarps + warp - 1) * 32 + lane.id, threads = (gridDim.y * kWarps - 1) * 32;
    for (int row = from; row < to; ++row) {
        int first;
        const int entries = entries_of(p, row, first), written = (entries + 3) / 4 * 4;
        const int* list = p.lists + row * p.list_stride;
        const int* table = p.block_table + int64(row) * p.table_stride;
        uint32* places = reinterpret_cast<uint32*>(p.metadata + kFirstRow + int64(row) * p.pitch + sizeof(RowHead));
        for (int base = thread; base < written; base += kAtOnce * threads) {
            uint32 ids[kAtOnce], pages[kAtOnce];
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) ids[i] = ptx::load_word(list + min(base + i * threads, entries - 1));
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                pages[i] = 0;
                if (p.block_table) pages[i] = ptx::load_word(table + min(ids[i] / p.blocks_per_page, p.pages_per_row - 1u));
            }
            #pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (base + i * threads < written) places[base + i * threads] = place_of(p, ids[i], pages[i], first);
            }
        }
    }
}
