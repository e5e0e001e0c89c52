// A block's warps and a group of tokens that (are likely to) see the same keys.
//
// Block   takes up to kSize neighbouring tokens at a time. A key leaves L2 once, and is found in L1 by the warps of the other
//         tokens.
// Warp    takes kTokens of them, and where that leaves warps over, a share of the keys. Warps never meet: each works out for
//         itself what it takes.
// Lane    i has the window of token i of the group.
// Bound   64 heads of 128: 64 FP8 or 32 FP4 mma for 32 keys and one token, 1024 or 512 clocks of a tensor pipe, against 4224
//         or 2176 bytes of keys. One token a request is bound by DRAM; more tokens, or rows that share keys, by the tensor
//         pipe. Registers are what is scarce: 64 heads of FP8 take 64 of a warp's 168. Where heads are few a warp takes
//         kTokens tokens, and what it costs to bring a key is divided by as many.
#pragma once

#include "stream.cuh"

constexpr int kNever = 0x7fffffff;

// One warp's share of the work: kN tokens, and tiles tile, tile + step, ... below `to` of the keys of `row`, which end
// before `end`.
template <int kN>
struct Share {
    int tokens[kN];
    Window windows[kN];
    int row, end;
    int tile, step, to;
};

template <class Format, int kHeads, int kTokens, class Weight, class Source, class Logit, int kWarps>
struct Group {
    static constexpr int kSize = kWarps * kTokens < 32 ? kWarps * kTokens : 32;   // tokens that a block takes at once
    static_assert(kWarps <= 32);

    // How many of `count` tokens, the last of a group, a block takes next: all of them where that leaves few warps idle, else
    // as many as leave none (8 tokens and 12 warps: 6, by two warps each, then 2).
    __device__ static int at_once(int count) {
        const int tokens = min(count, kSize), sets = (tokens + kTokens - 1) / kTokens;
        int even = 1;
        #pragma unroll
        for (int n = 2; n <= kWarps; ++n) if (kWarps % n == 0 && n <= sets) even = n;
        return kWarps % sets <= kWarps / 8 ? tokens : even * kTokens;
    }

    template <int kN>
    using Loop = Stream<Format, kHeads, kN, Weight, Source, Stored<Logit>>;

    template <int kN, class Params>
    __device__ static Loop<kN> prepare(const Params& p, const Share<kN>& share, const Source& source, bool compressed,
                                       const Lane& lane) {
        const uint32 zero = p.windows.rows >> 31;      // unknown to the compiler
        Loop<kN> loop{Lane(), share.step, share.end, p.windows.limit, zero, source};
        #pragma unroll
        for (int i = 0; i < kN; ++i) loop.sinks[i].open(p.output, share.tokens[i], share.windows[i], compressed);
        return loop;
    }

    // `source` is open.
    template <bool kMany, int kN, class Params>
    __device__ static void score(const Params& p, const Share<kN>& share, const Source& source, bool compressed,
                                const Lane& lane) {
        Loop<kN> loop = prepare(p, share, source, compressed, lane);
        loop.begin(share.tile);
        // FP8's keys before its queries, which are twice as many as FP4's and come from as far. (Not the 0 of `prepare`: once
        // one has let a warp pass, the compiler knows that it is 0.)
        if constexpr (!Format::kScaleFirst) loop.template demand<1>(p.windows.next_n >> 31);
        loop.template load<!kMany>(p.queries, share.tokens);
        loop.template run<kMany>(share.tile, share.to);
    }

    // Keys 8 * unit to 8 * unit + 7 alone.
    template <int kN, class Params>
    __device__ static void score_eight(const Params& p, const Share<kN>& share, const Source& source, int unit,
                                       const Lane& lane) {
        Loop<kN> loop = prepare(p, share, source, false, lane);
        loop.begin_eight(unit);
        loop.template load<false>(p.queries, share.tokens);
        loop.finish_eight(unit);
    }

    template <int kN, class Params>
    __device__ static Source open(const Params& p, const Share<kN>& share, const Lane& lane) {
        Source source(p.keys, share.row);
        source.open(share.tile, share.step, Source::last_key(share.end, p.windows.limit), lane);
        return source;
    }

    // Scores up to kSize tokens, of which lane i knows the window of token i, from tile `from` to where the set of tokens that
    // have keys changes; returns where that is, kNever if not before `to`. After a change the warps are dealt out anew, so
    // none waits on a long row among short ones.
    template <class Params>
    __device__ static int score_span(const Params& p, int first_token, Window mine, int from, int to, bool compressed,
                                     const Lane& lane) {
        const bool empty = mine.begin >= mine.end;
        const int first = empty ? 0 : mine.begin / kTile, last = empty ? 0 : (mine.end - 1) / kTile + 1;
        const bool active = first <= from && from < last;
        const int change = __reduce_min_sync(kAllLanes, active ? last : first > from ? first : kNever);
        const int until = min(change, to), rest = change < to ? change : kNever;
        const uint32 actives = __ballot_sync(kAllLanes, active);
        if (actives == 0 || from >= to) return rest;

        const int warp = threadIdx.x / 32, count = __popc(actives), sets = (count + kTokens - 1) / kTokens;
        const int share = warp / sets, shares = kWarps / sets, rank = warp % sets * kTokens;
        if (share >= shares || from + share >= until) return rest;
        const int my_rank = active ? __popc(actives & ((1u << lane.id) - 1)) : -1;

        Share<kTokens> work;
        work.tile = from + share, work.step = shares, work.to = until;
        #pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const int chosen = __ffs(__ballot_sync(kAllLanes, my_rank == min(rank + i, count - 1))) - 1;
            work.tokens[i] = first_token + chosen;
            work.windows[i] = {Source::kFromZero ? 0 : __shfl_sync(kAllLanes, mine.begin, chosen),
                               __shfl_sync(kAllLanes, mine.end, chosen)};
            if (i == 0 || work.windows[i].end > work.end) {
                work.row = work.tokens[i] / p.windows.next_n, work.end = work.windows[i].end;
            }
            if (rank + i >= count) work.windows[i].end = work.windows[i].begin;    // the last token again, for nobody
        }
        bool together = true;                          // whether one look at the keys serves all tokens
        #pragma unroll
        for (int i = 0; i < (kTokens > 1 ? kTokens : 0); ++i) {
            together &= Source::alike(p.keys, work.row, work.tokens[i] / p.windows.next_n, work.tile, until,
                                      work.windows[i].end, lane);
        }
        if (together) {
            score<true>(p, work, open(p, work, lane), compressed, lane);
        } else if constexpr (kTokens > 1 && Source::kRowsDiffer) {
            #pragma unroll 1
            for (int i = 0; i < min(kTokens, count - rank); ++i) {
                const int chosen = __ffs(__ballot_sync(kAllLanes, my_rank == rank + i)) - 1, token = first_token + chosen;
                const Window window{0, __shfl_sync(kAllLanes, mine.end, chosen)};
                const Share<1> alone{{token}, {window}, token / p.windows.next_n, window.end, from + share, shares, until};
                score<true>(p, alone, open(p, alone, lane), compressed, lane);
            }
        }
        return rest;
    }
};
