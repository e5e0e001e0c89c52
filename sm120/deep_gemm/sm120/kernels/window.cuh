// Which keys a query token sees: the half-open range [begin, end). The same for logits, their schedule and their cleaning.
#pragma once

#include "ptx.cuh"

constexpr int kTile = 32;              // keys a warp takes at a time

struct Window { int begin, end; };     // begin <= end

struct Windows {
    const int* starts;       // [tokens] first key                               ragged; else null: 0
    const int* ends;         // [rows][lengths_per_row] context lengths          paged
                             // [tokens] one past the last key                   ragged
    int rows;                // paged: rows of the block table; ragged: tokens
    int next_n;              // tokens a row; ragged: 1
    int lengths_per_row;     // next_n, or 1: the row's last token sees `length` keys, the one before it one less
    int limit;               // no window reaches past it: max_context_len, or the keys there are
    int least;               // a window of no more keys is empty: all of them are chosen, whatever their logits. Else 0

    // What counts of a window of so many keys.
    __device__ int counted(int keys) const { return keys > least ? keys : 0; }

    __device__ Window of(int token) const {
        const auto load = [](const int* address) { return int(ptx::load_word(address)); };
        return of(token, load, load);
    }

    // The same of words that somebody has: what stands where the end does, and the start.
    template <class End, class Start>
    __device__ Window of(int token, End end_at, Start start_at) const {
        int end;
        if (lengths_per_row == next_n) {
            end = end_at(ends + token);
        } else {
            const int row = token / next_n;
            end = max(end_at(ends + row), 0) - (next_n - 1 - (token - row * next_n));
        }
        const int begin = starts ? max(start_at(starts + token), 0) : 0;
        return {begin, begin + counted(max(begin, min(end, limit)) - begin)};
    }

    // The same of token `n` of `row`, paged.
    __device__ int end(int row, int n) const {
        const bool own = lengths_per_row == next_n;
        const int length = ptx::load_word(ends + (own ? row * next_n + n : row));
        return counted(max(0, min(own ? length : max(length, 0) - (next_n - 1 - n), limit)));
    }

    __device__ int length(int i) const { return ptx::load_word(ends + i); }

    // The keys of a row's longest token, all that are there: what schedules are made of.
    __device__ int longest(int row) const {
        int longest = 0;
        #pragma unroll 1
        for (int i = 0; i < lengths_per_row; ++i) longest = max(longest, length(row * lengths_per_row + i));
        return min(longest, limit);
    }
};
