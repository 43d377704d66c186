// Vectors of VL floats, VL and the instruction set being the including file's: 16 (AVX-512), 8 (AVX2) or 4.
// GCC's and clang's vector types carry the arithmetic; only what they lack is written per instruction set.
//
// The library is compiled with -ffp-contract=off: a * b + c is rounded twice unless `fma_` says otherwise, so that
// no number depends on how a loop was unrolled. In the portable build fma_ itself rounds twice.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ops.h"

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef float vf_unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int8_t v_bytes __attribute__((vector_size(VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * VL), aligned(2), may_alias));

INLINE vf set1(float x) { return x - (vf){}; }
INLINE vf load(const float *p) { return (vf) * (const vf_unaligned *)p; }
INLINE void store(float *p, vf x) { *(vf_unaligned *)p = x; }
INLINE vf select_(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf as_float(vu bits) { return (vf)bits; }

#if VL == 16
INLINE vf fma_(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
#elif VL == 8
INLINE vf fma_(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
#else
INLINE vf fma_(vf a, vf b, vf c) { return a * b + c; }
#endif

// The larger, the smaller; b if either is NaN.
#if VL == 16
INLINE vf max_(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf min_(vf a, vf b) { return _mm512_min_ps(a, b); }
#elif VL == 8
INLINE vf max_(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf min_(vf a, vf b) { return _mm256_min_ps(a, b); }
#else
INLINE vf max_(vf a, vf b) { return select_(a > b, a, b); }
INLINE vf min_(vf a, vf b) { return select_(a < b, a, b); }
#endif

INLINE vi lane(void) {
    vi ids;
    for (int i = 0; i < VL; i++) ids[i] = i;
    return ids;
}

// Bit i is set where lane i of the mask is.
INLINE unsigned lanes_of(vi mask) {
#if VL == 16
    return _mm512_movepi32_mask((__m512i)mask);
#elif VL == 8
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#else
    unsigned bits = 0;
    for (int i = 0; i < VL; i++) bits |= (unsigned)(mask[i] & 1) << i;
    return bits;
#endif
}

// Every lane i gets lane i ^ distance.
INLINE vf swap_lanes(vf x, const int distance) {
#if defined(__clang__)
    vf out;
    for (int i = 0; i < VL; i++) out[i] = x[i ^ distance];
    return out;
#else
    return __builtin_shuffle(x, lane() ^ distance);
#endif
}

// Sum of all lanes, halves first: always in this order.
INLINE float sum_lanes(vf x) {
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2) x += swap_lanes(x, half);
    return x[0];
}

// NaN if there is one.
INLINE float max_lanes(vf x) {
#pragma GCC unroll 4
    for (int half = VL / 2; half; half /= 2) {
        vf other = swap_lanes(x, half);
        x = select_((other > x) | (other != other), other, x);
    }
    return x[0];
}

// --- bfloat16: the upper half of a float, rounded to nearest even ---

INLINE float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE vf load_bf16(const uint16_t *p) {
#if VL == 16
    return as_float((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)) << 16);
#elif VL == 8
    return as_float((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)) << 16);
#else
    return as_float(__builtin_convertvector((vh) * (const vh_unaligned *)p, vu) << 16);
#endif
}

INLINE void store_bf16(uint16_t *p, vf x) {
#if defined(DOT_BF16)
    *(vh_unaligned *)p = (vh)_mm512_cvtneps_pbh(x);
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    vu quiet = bits >> 16 | 0x40;  // rounding up could turn a NaN into an infinity
    vu nan = (vu)(x != x);
    *(vh_unaligned *)p = __builtin_convertvector((nan & quiet) | (~nan & rounded), vh);
#endif
}

// IEEE half, as GGUF keeps its scales.
INLINE float half_to_float(uint16_t x) {
    int exponent = x >> 10 & 31, fraction = x & 1023;
    float value = exponent == 0    ? ldexpf((float)fraction, -24)
                  : exponent == 31 ? (fraction ? NAN : INFINITY)
                                   : ldexpf((float)(1024 + fraction), exponent - 25);
    return x >> 15 ? -value : value;
}

INLINE vf load_half(const uint16_t *p) {
#if VL == 16
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif VL == 8
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    vf out;
    for (int i = 0; i < VL; i++) out[i] = half_to_float(p[i]);
    return out;
#endif
}

// --- the first n numbers of a vector, for the ends of rows; nothing beyond them is touched ---

INLINE vf load_some(const float *p, int64_t n) {
    float lanes[VL] = {0};
    memcpy(lanes, p, (size_t)n * 4);
    return load(lanes);
}
INLINE void store_some(float *p, vf x, int64_t n) {
    float lanes[VL];
    store(lanes, x);
    memcpy(p, lanes, (size_t)n * 4);
}

// Numbers [at, at + VL) of a row of either type; those at or beyond `end` read as 0 and are not written.
INLINE vf load_row(const void *row, int64_t dtype, int64_t at, int64_t end) {
    if (dtype == F32) {
        const float *p = (const float *)row + at;
        return end - at >= VL ? load(p) : load_some(p, end - at);
    }
    const uint16_t *p = (const uint16_t *)row + at;
    if (end - at >= VL) return load_bf16(p);
    uint16_t lanes[VL] = {0};
    memcpy(lanes, p, (size_t)(end - at) * 2);
    return load_bf16(lanes);
}
INLINE void store_row(void *row, int64_t dtype, int64_t at, int64_t end, vf x) {
    if (dtype == F32) {
        float *p = (float *)row + at;
        if (end - at >= VL) store(p, x);
        else store_some(p, x, end - at);
        return;
    }
    uint16_t *p = (uint16_t *)row + at;
    if (end - at >= VL) {
        store_bf16(p, x);
        return;
    }
    uint16_t lanes[VL];
    store_bf16(lanes, x);
    memcpy(p, lanes, (size_t)(end - at) * 2);
}

INLINE int64_t element_bytes(int64_t dtype) { return dtype == F32 ? 4 : dtype == BF16 ? 2 : 1; }

INLINE void *row_of(const struct rows *rows, int64_t t) {
    return (char *)rows->data + t * rows->stride * element_bytes(rows->dtype);
}

// --- the largest of a row ---

// Numbers [at, at + VL) of a row of floats; those at or beyond `end` read as -inf.
INLINE vf load_padded(const float *row, int64_t at, int64_t end) {
    if (end - at >= VL) return load(row + at);
    float lanes[VL];
    for (int i = 0; i < VL; i++) lanes[i] = -INFINITY;
    memcpy(lanes, row + at, (size_t)(end - at) * 4);
    return load(lanes);
}

// Integers in the order of the floats; one for both zeros, and one, the largest, for every NaN.
INLINE vi order_key(vf x) {
    vi bits = (vi)(x + 0.0f);  // -0 becomes 0
    vi nan = x != x;
    return (nan & INT32_MAX) | (~nan & (bits ^ (bits >> 31 & INT32_MAX)));
}

// The first of a row's largest numbers; a NaN counts as the largest.
INLINE int64_t first_largest(const float *row, int64_t width) {
    vi best = (vi){} + INT32_MIN, where = {}, ids = lane();
    for (int64_t i = 0; i < width; i += VL, ids += VL) {
        vi key = order_key(load_padded(row, i, width)), better = key > best;
        best = (better & key) | (~better & best);
        where = (better & ids) | (~better & where);
    }
    int first = 0;
    for (int i = 1; i < VL; i++)
        if (best[i] > best[first] || (best[i] == best[first] && where[i] < where[first])) first = i;
    return where[first];
}

// --- functions ---

// e^x to about 1 ulp: exactly 1 at 0, exactly 0 at -inf; NaN stays NaN.
INLINE vf exp_(vf x) {
    x = max_(set1(-104.0f), min_(set1(89.0f), x));
    vf magic = set1(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    vf shifted = fma_(x, set1(1.44269504f), magic);
    vf n = shifted - magic;
    vf r = fma_(n, set1(-0.693145752f), x);  // ln 2 in two parts, the first with trailing zeros
    r = fma_(n, set1(-1.42860677e-6f), r);
    vf p = set1(1.98756915e-4f);  // minimax on [-ln 2 / 2, ln 2 / 2] (Cephes expf)
    p = fma_(p, r, set1(1.39819995e-3f));
    p = fma_(p, r, set1(8.33345205e-3f));
    p = fma_(p, r, set1(4.16657962e-2f));
    p = fma_(p, r, set1(1.66666657e-1f));
    p = fma_(p, r, set1(0.5f));
    p = fma_(p, r * r, r) + 1.0f;
    vi power = (vi)shifted - (vi)magic, half = power >> 1;  // 2^n in two factors: n goes from -150 to 128
    return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

INLINE vf tanh_(vf x) {
    vf size = (vf)((vi)x & 0x7FFFFFFF);
    vf e = exp_(size * -2.0f);
    vf large = (1.0f - e) / (1.0f + e);
    vf z = x * x;  // small: Cephes tanhf
    vf p = set1(-5.70498872745e-3f);
    p = fma_(p, z, set1(2.06390887954e-2f));
    p = fma_(p, z, set1(-5.37397155531e-2f));
    p = fma_(p, z, set1(1.33314422036e-1f));
    p = fma_(p, z, set1(-3.33332819422e-1f));
    vf small = fma_(p * z, x, x);
    vf signed_large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
    return select_(size < 0.625f, small, select_(x == x, signed_large, x));
}

// x · Φ(x), with the complementary error function of Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
INLINE vf gelu_(vf x) {
    vf z = (vf)((vi)x & 0x7FFFFFFF) * 0.707106781f;
    vf t = 1.0f / fma_(z, set1(0.3275911f), set1(1.0f));
    vf p = set1(1.061405429f);
    p = fma_(p, t, set1(-1.453152027f));
    p = fma_(p, t, set1(1.421413741f));
    p = fma_(p, t, set1(-0.284496736f));
    p = fma_(p, t, set1(0.254829592f));
    vf tail = 0.5f * p * t * exp_(-z * z);
    vf phi = select_(x > 0.0f, 1.0f - tail, tail);
    return select_(z < 20.0f, x * phi, select_(x < 0.0f, set1(0.0f), x));  // ±inf · Φ would be NaN at -inf
}

INLINE vf sigmoid_times(vf x, vf slope) {  // x / (1 + e^-slope), 0 at -inf
    vf y = x / (1.0f + exp_(-slope));
    return select_(x == -INFINITY, set1(0.0f), y);
}

INLINE vf activate_(vf x, int64_t kind) {
    switch (kind) {
        case ACT_SILU: return sigmoid_times(x, x);
        case ACT_GELU: return gelu_(x);
        // 0.5 · x · (1 + tanh u) = x · σ(2u), u = √(2/π) · (x + 0.044715 x³)
        case ACT_GELU_TANH: return sigmoid_times(x, 1.595769122f * fma_(x * x * 0.044715f, x, x));
        case ACT_RELU: return select_(x < 0.0f, set1(0.0f), x);
        default: return x;
    }
}

// --- several rows at once ---

// Up to 16 rows of numbers; row i is at[i / 4] + i % 4 rows, so that 14 of them need few registers for their addresses.
struct quads {
    const char *at[4];
    int64_t row_bytes;
};

INLINE struct quads quads_of(const int R, const char *x, int64_t row_bytes) {
    struct quads q = {.row_bytes = row_bytes};
#pragma GCC unroll 4
    for (int i = 0; i < (R + 3) / 4; i++) q.at[i] = x + 4 * i * row_bytes;
    return q;
}

INLINE void advance(const int R, struct quads *q, int64_t bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < (R + 3) / 4; i++) q->at[i] += bytes;
}

// The 4 bytes of row i at `offset` in every lane: a float, or a pair of bf16.
INLINE vi word_of(const struct quads *q, int i, int64_t offset) {
    int32_t word;
    memcpy(&word, q->at[i / 4] + i % 4 * q->row_bytes + offset, 4);
    return word + (vi){};
}
