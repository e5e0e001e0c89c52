// A choice among rows that are too long to keep the logits of: their keys come in pieces, and the k largest so far are carried
// from one to the next.
//
//     buffer[row]   ... carried | logits of a piece         chosen from together, by topk.cuh
//
// The carried logits stand right before the piece's, in the order of their positions, and all of these are smaller than the
// piece's: so of equal logits the one of the smaller position is chosen, as out of the whole row, and a row with few keys so
// far carries few. This kernel comes after each choice, and once before the first piece: it carries what was chosen, and tells
// the next piece's windows; or, after the last one, it hands the choice out.
//
// Grid    x: rows.
// Block   takes all that it carries in registers, since it puts it where some of it came from.
// Bound   latency, of three dependent loads; 16 bytes in and 8 out for each of k.
#pragma once

#include "window.cuh"

struct CarryParams {
    float* buffer;           // [rows][stride], `front` columns before the piece's
    int64 stride;
    int front, k;
    Windows windows;         // of the whole rows
    int least;               // rows of no more keys are not scored: all of them are chosen
    int at, until;           // the piece that was chosen from
    int next;                // where the next one ends; there is none if that is `until`
    const int* chosen;       // [rows][k] counted from where the row begins in the buffer, ascending
    int* carried;            // [rows][k] positions of the carried
    int* starts;             // [rows] windows of the next piece's logits: its first key is key 0
    int* ends;               // [rows]
    int* firsts;             // [rows] and of the next choice, in the buffer
    int* lengths;            // [rows]
    // Results, as in topk.cuh
    int tokens;              // rows that share a row of the table
    int page;                // keys of a page; 1 without a table
    int table_columns;       // pages that a row of the table has
    const int* table;        // [rows / tokens][table_stride] pages, or null
    const int* offset;       // [rows] what is added, or null
    int* out;                // [rows][out_stride]
    int* positions;          // [rows][positions_stride], or null
    float* scores;           // [rows][scores_stride], or null
    int64 table_stride, out_stride, positions_stride, scores_stride;
};

constexpr int kMostK = 2048;

struct Carry {
    const CarryParams& p;
    const int row;
    const Window window;
    const bool scored;

    __device__ explicit Carry(const CarryParams& p) : p(p), row(blockIdx.x), window(p.windows.of(row)),
                                                   scored(window.end - window.begin > p.least) {}

    __device__ int keys_before(int key) const { return max(min(window.end, key) - window.begin, 0); }
    __device__ int carried_at(int key) const { return min(p.k, keys_before(key)); }
    __device__ int within(int key, int from, int to) const { return min(max(key, from), to) - from; }

    __device__ void tell_next(int carried) const {
        const int start = within(window.begin, p.until, p.next), end = within(window.end, p.until, p.next);
        p.starts[row] = start;
        p.ends[row] = scored ? end : start;
        p.firsts[row] = p.front + start - carried;         // who carries something begins before the piece: start is 0
        p.lengths[row] = carried + end - start;            // below 0 where the window is: as good as 0
    }

    __device__ int place_of(int position) const {
        int place = position;
        if (p.table) {
            const int page = position / p.page;
            const int* pages = p.table + row / p.tokens * p.table_stride;
            const uint32 found = p.table_columns > 0 ? ptx::load_word(pages + min(page, p.table_columns - 1)) : 0;
            place = found * p.page + position % p.page;
        }
        return p.offset ? place + int(ptx::load_word(p.offset + row)) : place;
    }

    __device__ void put(int i, bool any, int position, float score) const {
        p.out[row * p.out_stride + i] = any ? place_of(position) : -1;
        if (p.positions) p.positions[row * p.positions_stride + i] = any ? position : -1;
        if (p.scores) p.scores[row * p.scores_stride + i] = any ? score + 0.0f : __int_as_float(0xff800000);
    }
};

template <int kThreads>
__device__ inline void carry(const CarryParams& p) {
    constexpr int kEach = kMostK / kThreads;
    ptx::griddepcontrol();
    const Carry row(p);
    const int before = row.carried_at(p.at), now = row.carried_at(p.until);
    float* buffer = p.buffer + row.row * p.stride + p.front;       // of the piece's first key
    int* carried = p.carried + row.row * int64(p.k);
    const int first = max(row.window.begin, p.at);                 // key of the piece that the row sees

    int positions[kEach] = {};
    float scores[kEach] = {};
    #pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int i = j * kThreads + threadIdx.x;
        if (i >= now) continue;
        const int chosen = p.chosen[row.row * int64(p.k) + i], fresh = chosen - before;
        positions[j] = fresh < 0 ? carried[chosen] : first - row.window.begin + fresh;
        if (row.scored) scores[j] = buffer[fresh < 0 ? fresh : first - p.at + fresh];
    }
    if (p.next == p.until) {
        #pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int i = j * kThreads + threadIdx.x;
            if (i < p.k) row.put(i, i < now, positions[j], scores[j]);
        }
        return;
    }
    __syncthreads();                                               // all that stood there has been read
    #pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int i = j * kThreads + threadIdx.x;
        if (i >= now) continue;
        carried[i] = positions[j];
        if (row.scored) buffer[i - now] = scores[j];
    }
    if (threadIdx.x == 0) row.tell_next(now);
}
