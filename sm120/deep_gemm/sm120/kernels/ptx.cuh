// Thin wrappers around the PTX instructions that C++ has no name for, each named after its instruction; the numbers are
// sections of the PTX ISA 9.0. Loads are volatile, so that none moves above griddepcontrol.wait.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

namespace ptx {

// 9.7.13.13 griddepcontrol: wait for the kernels that this one depends on.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be set up, once all blocks have said so or are done.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait, and let the next kernel be set up meanwhile.
__device__ inline void griddepcontrol() {
    griddepcontrol_wait();
    launch_dependents();
}

// 9.7.9.9 ld.global.nc: `Words` words of 4 bytes, naturally aligned as a whole. 8 words at once exist since SM100.
template <int Words>
__device__ inline void load(uint32* words, const void* address) {
    if constexpr (Words == 8) {
        asm volatile("ld.global.nc.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]),
                       "=r"(words[4]), "=r"(words[5]), "=r"(words[6]), "=r"(words[7]) : "l"(address));
    } else if constexpr (Words == 4) {
        asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(address));
    } else if constexpr (Words == 2) {
        asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(address));
    } else {
        static_assert(Words == 1);
        asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(words[0]) : "l"(address));
    }
}

// The same of keys that no other warp wants: their lines are the first to leave L1.
template <int Words>
__device__ inline void load_once(uint32* words, const void* address) {
    if constexpr (Words == 8) {
        asm volatile("ld.global.nc.L1::evict_first.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]),
                       "=r"(words[4]), "=r"(words[5]), "=r"(words[6]), "=r"(words[7]) : "l"(address));
    } else if constexpr (Words == 4) {
        asm volatile("ld.global.nc.L1::evict_first.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(address));
    } else if constexpr (Words == 2) {
        asm volatile("ld.global.nc.L1::evict_first.v2.b32 {%0, %1}, [%2];"
                     : "=r"(words[0]), "=r"(words[1]) : "l"(address));
    } else {
        static_assert(Words == 1);
        asm volatile("ld.global.nc.L1::evict_first.b32 %0, [%1];" : "=r"(words[0]) : "l"(address));
    }
}

__device__ inline uint32 load_word(const void* address) {
    uint32 word;
    load<1>(&word, address);
    return word;
}

// Not what an earlier load has left in L1: what may have been written meanwhile.
__device__ inline uint32 load_anew(const void* address) {
    uint32 word;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
    return word;
}

// The same under a predicate: without it the word stays.
__device__ inline void load_anew_if(uint32& word, const void* address, bool there) {
    asm volatile("{\n\t.reg .pred there;\n\tsetp.ne.b32 there, %2, 0;\n\t@there ld.relaxed.gpu.global.b32 %0, [%1];\n\t}"
                 : "+r"(word) : "l"(address), "r"(int(there)) : "memory");
}

__device__ inline uint32 load_half(const void* address) {
    uint16 half;
    asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(half) : "l"(address));
    return half;
}

// 9.7.6.2 setp, and what it guards: of code that a compiler turns into branches with all their arithmetic.

// count += a >= b
__device__ inline void count_if_at_least(int& count, float a, float b) {
    asm("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %1, %2;\n\t@p add.s32 %0, %0, 1;\n\t}" : "+r"(count) : "f"(a), "f"(b));
}

// count += a > b
__device__ inline void count_if_above(int& count, float a, float b) {
    asm("{\n\t.reg .pred p;\n\tsetp.gt.f32 p, %1, %2;\n\t@p add.s32 %0, %0, 1;\n\t}" : "+r"(count) : "f"(a), "f"(b));
}

// mask |= a >= b ? bit : 0
__device__ inline void set_if_at_least(uint32& mask, float a, float b, uint32 bit) {
    asm("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %1, %2;\n\t@p or.b32 %0, %0, %3;\n\t}" : "+r"(mask) : "f"(a), "f"(b), "r"(bit));
}

// if (a >= b) *to++ = {a, word}, in shared memory
__device__ inline void store_if_at_least(uint32& to, float a, float b, uint32 word) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %1, %2;\n\t@p st.shared.v2.b32 [%0], {%1, %3};\n\t"
                 "@p add.u32 %0, %0, 8;\n\t}" : "+r"(to) : "f"(a), "f"(b), "r"(word) : "memory");
}

// The same if a >= b, but not a >= c.
__device__ inline void store_if_between(uint32& to, float a, float b, float c, uint32 word) {
    asm volatile("{\n\t.reg .pred p, q;\n\tsetp.ge.f32 q, %1, %3;\n\tsetp.ge.and.f32 p, %1, %2, !q;\n\t"
                 "@p st.shared.v2.b32 [%0], {%1, %4};\n\t@p add.u32 %0, %0, 8;\n\t}"
                 : "+r"(to) : "f"(a), "f"(b), "f"(c), "r"(word) : "memory");
}

// if (a >= b) *to++ = word, in shared memory
__device__ inline void store_word_if_at_least(uint32& to, float a, float b, uint32 word) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %1, %2;\n\t@p st.shared.b32 [%0], %3;\n\t"
                 "@p add.u32 %0, %0, 4;\n\t}" : "+r"(to) : "f"(a), "f"(b), "r"(word) : "memory");
}

// x += the x of the lane `distance` below, where there is one.
__device__ inline void add_from_below(int& x, int distance) {
    asm volatile("{\n\t.reg .pred there;\n\t.reg .b32 below;\n\tshfl.sync.up.b32 below|there, %0, %1, 0, 0xffffffff;\n\t"
                 "@there add.s32 %0, %0, below;\n\t}" : "+r"(x) : "r"(distance));
}

__device__ inline uint32 shared_address(const void* address) { return uint32(__cvta_generic_to_shared(address)); }

__device__ inline void store_shared(uint32 address, uint32 word) {
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(word) : "memory");
}

__device__ inline float load_shared(uint32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// What the compiler is to keep, rather than to compute again wherever it is used.
__device__ inline int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 9.7.9.22 cvt.rn.bf16
struct bf16 {
    uint16 bits;
    __device__ explicit bf16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ explicit operator float() const { return __uint_as_float(uint32(bits) << 16); }
};

// 9.7.9.22 cvt.rz.f16x2: two numbers, towards zero; and back.
__device__ inline uint32 cvt_rz_f16x2(float upper, float lower) {
    uint32 halves;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(upper), "f"(lower));
    return halves;
}

// 9.7.8.7 prmt: each half becomes its sign, all ones or all zeros. (The intrinsic's selector has no bit for signs.)
__device__ inline uint32 signs_of_halves(uint32 halves) {
    uint32 signs;
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(halves));
    return signs;
}

__device__ inline float float_of_half(uint32 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16(half)));
    return x;
}

// 9.7.4 max.NaN: a NaN stays a NaN, as in torch's relu; fmaxf would turn it into 0. The price is the same.
__device__ inline float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

// 9.7.14.5 mma.sync: d[16, 8] += a[16, k] * b[k, 8]. With g = lane / 4 and t = lane % 4 a lane holds of d
// {[g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]}, of a rows {g, g+8, g, g+8} (the last two in the upper half of k), and of b
// column g (lower and upper half of k). 8-bit: k = 32, the lane's bytes stand at 4t; 4-bit: k = 64, its nibbles at 8t.

__device__ inline void mma_e4m3(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same product through the block-scaled unit, every scale 127 = 2^0: twice as fast as the plain form on GeForce.
__device__ inline void mma_e4m3_block_scaled(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, uint32 ones) {
    asm("mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.e4m3.e4m3.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, {%10}, {0, 0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(ones));
}

// One scale per 32 elements: byte `Byte` of a scale word. The scales of rows g and g+8 come from lanes t = 2 * ALane and
// 2 * ALane + 1 of their quad, the scale of column g from its lane t = BLane.
template <int Byte, int ALane, int BLane>
__device__ inline void mma_e4m3_scaled(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, uint32 a_scale,
                                       uint32 b_scale) {
    asm("mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.e4m3.e4m3.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {%12, %13}, {%11}, {%12, %14};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(a_scale), "r"(b_scale),
          "n"(Byte), "n"(ALane), "n"(BLane));
}

// The same for e2m1: bytes `Byte` and `Byte + 1` belong to the two halves of k.
template <int Byte, int ALane, int BLane>
__device__ inline void mma_e2m1(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, uint32 a_scale, uint32 b_scale) {
    asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::2X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {%12, %13}, {%11}, {%12, %14};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(a_scale), "r"(b_scale),
          "n"(Byte), "n"(ALane), "n"(BLane));
}

}  // namespace ptx
