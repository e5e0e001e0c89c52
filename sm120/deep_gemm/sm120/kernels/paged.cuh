// Lightning Indexer logits against a paged cache:
//
//   logits[token, key] = scale[key] * sum_h weights[token, h] * relu(query[token, h] . key)
//
// Grid    one block for each slot, as many as the schedule has.
// Who takes which keys of which rows stands in rows.cuh; what a warp does with them in group.cuh and stream.cuh, which are
// made of formats.cuh (operands), score.cuh (queries and their scores), keys.cuh (where keys lie) and sinks.cuh (logits).
#pragma once

#include "rows.cuh"

struct PagedParams {
    Queries queries;
    Pages keys;
    Output output;
    Windows windows;
    const int2* schedule;        // [slots + 1] (row, split of 256 keys)                many rows
    int rows_per_group;          //                                                     many rows
    FewRows few;                 //                                                     few rows

    __device__ int2 entry(int slot, const Lane&) const {
        int2 entry;
        ptx::load<2>(reinterpret_cast<uint32*>(&entry), schedule + slot);
        return entry;
    }
};

template <class Format, int kHeads, int kPage, class Weight, class Logit, int kWarps, int kTokens, bool kPastEnd, bool kOnce>
using Paged = Rows<PagedParams, Format, kHeads, PagedKeys<kPage, Format::kRowBytes, kPastEnd, kOnce>, Weight, Logit, kWarps,
                   kTokens>;
