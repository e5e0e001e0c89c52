// The metadata of sparse logits: for each row, where the blocks of keys lie that its list names. It has no pointer in it and
// ends with its last row, so it may be copied anywhere; it does not depend on the chip.
//
//   header      [0, 64)         magic, rows, and what the rows were made for: a sheet for the reader
//   zeros       [64, 192)       a key that does not exist
//   rows        [192, ...)      rows x pitch: a seal, columns, splits of the rows before; then the places of its blocks
//
// A row's seal says what it was made for (sizes, kind): other bytes in its place, a row past the end of what was copied or a
// call with other sizes make a row without keys. Nothing else in a row is believed either: columns are cut at what the output
// has, places at what the cache has.
#pragma once

#include "formats.cuh"
#include "window.cuh"

constexpr int kZeros = 64, kFirstRow = 192;   // bytes
constexpr uint32 kMagic = 0x31534744;         // "DGS1"
constexpr int kColumnsPerSplit = 256;

// The first 16 bytes of a row; its places follow, one for each block, repeated at the end up to a multiple of four.
struct RowHead {
    uint32 seal;
    int columns;                 // keys of its blocks
    int before;                  // splits of the rows before it
    int reserved;
};

// Windows of rows that see listed blocks: all columns of the list's blocks, whatever keys they are.
struct Lists {
    const uint8* metadata;
    uint32 seal;
    uint32 pitch;                // bytes from row to row
    int rows;
    int limit;                   // columns
    int least;                   // as in Windows
    static constexpr int next_n = 1, lengths_per_row = 1;

    __device__ int counted(int columns) const { return columns > least ? columns : 0; }

    // A row's head as it stands there, and what is believed of it.
    __device__ RowHead asked(int row) const {
        RowHead head;
        ptx::load<4>(reinterpret_cast<uint32*>(&head), metadata + kFirstRow + int64(row) * pitch);
        return head;
    }
    __device__ int columns(const RowHead& head) const {
        return counted(max(0, min(head.seal == seal ? head.columns : 0, limit)));
    }
    __device__ RowHead head(int row) const {
        RowHead head = asked(row);
        head.columns = columns(head);
        return head;
    }
    __device__ int length(int row) const { return head(row).columns; }
    __device__ int longest(int row) const { return length(row); }
    __device__ Window of(int row) const { return {0, length(row)}; }
    __device__ int end(int row, int) const { return length(row); }

    // Where slot `slot` of `slots` starts in the list of all splits, shared out as in metadata.cuh: (row, split).
    __device__ int2 entry(int slot, int slots, const Lane& lane) const {
        const int made = ptx::load_word(metadata) == kMagic ? ptx::load_word(metadata + 4) : 0;
        const int rows = min(this->rows, made);
        if (rows <= 0) return {0, 0};
        const RowHead last = head(rows - 1);
        const int total = last.before + (last.columns + kColumnsPerSplit - 1) / kColumnsPerSplit;
        const int share = total / slots, start = slot * share + max(0, slot - (slots - total % slots));
        if (start >= total) return {rows, 0};
        int row = 0;             // the last one that no more than `start` splits come before: it is below row + span
        for (int span = rows, step; span > 1; span = min(step, span)) {
            step = (span + 31) / 32;
            const int probe = row + step * lane.id;
            const bool before = step * lane.id < span && head(probe).before <= start;
            const uint32 found = __ballot_sync(kAllLanes, before) | 1;
            const int skipped = step * (31 - __clz(found));
            row += skipped, span -= skipped;
        }
        return {row, max(0, start - head(row).before)};
    }
};
