// The metadata of sparse logits (lists.cuh): which blocks of keys each row's list names, and where they lie.
//
// The first min(W, ceil(length / kBlock)) entries of a list count. Block i of a row is
//
//   paged     keys i * kBlock, ... of its context, which a page holds together: place = page number * blocks of a page + block
//   ragged    keys i * kBlock, ... of the run, or i * kBlock + start % kBlock, ...: place = the first one
//
// Grid    blockIdx.x: `rows_per_block` neighbouring rows; blockIdx.y: a share of their entries.
// Block   the first warp of the first share writes the rows' heads, for which it sums up the lengths of all rows before; the
//         others write places, a thread an entry.
// Bound   bytes: 4 of the list, 4 of the block table and 4 written for each entry. Where rows are few, latency: the list is
//         asked for before the row's length is known, so two round trips follow each other, list and table.
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
    int unaligned;               // ragged: blocks begin at start % kBlock
    int rows_per_block;
};

// kPage keys a page; 0: ragged.
template <int kPage, int kBlock>
struct SparseMetadata {
    static constexpr int kWarps = 8, kAtOnce = 4;
    static constexpr uint32 kBlocks = kPage ? kPage / kBlock : 1;      // of a page

    // Entries of a row's list that count; `first` is its first key.
    __device__ static int entries_of(const SparseMetadataParams& p, int row, int& first) {
        const int end = p.windows.length(row);
        first = kPage ? 0 : min(max(int(ptx::load_word(p.windows.starts + row)), 0), p.windows.limit);
        const uint32 keys = max(first, min(end, p.windows.limit)) - first;
        return min(uint32(p.width), keys / kBlock + (keys % kBlock > 0));
    }

    __device__ static int splits_of(int entries) {
        return (entries * kBlock + kColumnsPerSplit - 1) / kColumnsPerSplit;
    }

    __device__ static void write_heads(const SparseMetadataParams& p, int from, int to, const Lane& lane) {
        int first, before = 0;
        #pragma unroll 4
        for (int row = lane.id; row < from; row += 32) before += splits_of(entries_of(p, row, first));
        before = __reduce_add_sync(kAllLanes, before);
        for (int row = from; row < to; ++row) {
            const int entries = entries_of(p, row, first);
            if (lane.id == 0) {
                *reinterpret_cast<int4*>(p.metadata + kFirstRow + int64(row) * p.pitch)
                    = {int(p.seal), entries * kBlock, before, 0};
            }
            before += splits_of(entries);
        }
    }

    __device__ static void write_header(const SparseMetadataParams& p, const Lane& lane) {
        const int sheet[8] = {int(kMagic), p.windows.rows, p.width, kBlock, kBlocks, p.unaligned, int(p.seal), int(p.pitch)};
        for (int i = lane.id; i < kFirstRow / 4; i += 32) {
            int word = 0;
            #pragma unroll
            for (int j = 0; j < 8; ++j) word = i == j ? sheet[j] : word;
            reinterpret_cast<int*>(p.metadata)[i] = word;
        }
    }

    // The place of block `id` of a row whose keys begin at `first`; `page` is the number of the page that holds it. What leads
    // outside lies past everything.
    __device__ static uint32 place_of(const SparseMetadataParams& p, uint32 id, uint32 page, int first) {
        if constexpr (kPage > 0) return min(int64(page) * kBlocks + id % kBlocks, 0xffffffffll);
        const uint32 keys = p.windows.limit;
        return id <= keys / kBlock ? min(id * kBlock + (p.unaligned ? first % kBlock : 0), keys) : keys;
    }

    // Entries at, at + threads, ... of a list.
    __device__ static void ask(const SparseMetadataParams& p, uint32 (&ids)[kAtOnce], const int* list, int at, int threads) {
        #pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            ids[i] = at + i * threads < p.width ? ptx::load_word(list + at + i * threads) : 0;
        }
    }

    __device__ static void list(const SparseMetadataParams& p) {
        ptx::griddepcontrol();
        const Lane lane;
        const int warp = threadIdx.x / 32;
        const int from = blockIdx.x * p.rows_per_block, to = min(p.windows.rows, from + p.rows_per_block);
        if (blockIdx.y == 0 && warp == 0) {
            if (blockIdx.x == 0) write_header(p, lane);
            write_heads(p, from, to, lane);
            return;
        }
        const int thread = (blockIdx.y * kWarps + warp - 1) * 32 + lane.id, threads = (gridDim.y * kWarps - 1) * 32;
        for (int row = from; row < to; ++row) {
            const int* list = p.lists + row * p.list_stride;
            const int* table = p.block_table + int64(row) * p.table_stride;
            uint32* places = reinterpret_cast<uint32*>(p.metadata + kFirstRow + int64(row) * p.pitch + sizeof(RowHead));
            uint32 ids[kAtOnce], pages[kAtOnce] = {};
            ask(p, ids, list, thread, threads);
            int first;
            const int entries = entries_of(p, row, first), written = (entries + 3) / 4 * 4;
            for (int base = thread; base < written; base += kAtOnce * threads) {
                if (base > thread) ask(p, ids, list, base, threads);
                #pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const int at = base + i * threads;
                    if (at >= entries && at < written) ids[i] = ptx::load_word(list + entries - 1);
                    if (kPage > 0 && at < written) {
                        pages[i] = ptx::load_word(table + min(ids[i] / kBlocks, p.pages_per_row - 1u));
                    }
                }
                #pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    if (base + i * threads < written) places[base + i * threads] = place_of(p, ids[i], pages[i], first);
                }
            }
        }
    }
};
