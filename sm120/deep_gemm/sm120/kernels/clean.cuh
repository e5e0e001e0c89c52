// Logits outside a row's window become -inf. The columns inside are left alone, so the order of this kernel and the one that
// writes the logits does not matter.
//
// Grid    blockIdx.x is a row (in strides of the grid), blockIdx.y a share of its columns.
// Bound   stores.
#pragma once

#include "window.cuh"

struct CleanParams {
    uint8* logits;           // [tokens][logits_stride]
    int64 logits_stride;     // elements
    int tokens;
    int columns;
    int compressed;          // column 0 is the row's first key
    Windows windows;
};

template <class Logit>
__device__ inline void clean(const CleanParams& p) {
    ptx::griddepcontrol();
    const Logit minus_infinity(__int_as_float(0xff800000));
    for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
        const Window window = p.windows.of(token);
        const int begin = p.compressed ? 0 : window.begin, end = p.compressed ? window.end - window.begin : window.end;
        Logit* row = reinterpret_cast<Logit*>(p.logits) + token * p.logits_stride;
        for (int n = blockIdx.y * blockDim.x + threadIdx.x; n < p.columns; n += gridDim.y * blockDim.x) {
            if (n < begin || n >= end) row[n] = minus_infinity;
        }
    }
}
