/* Softmax of the rows of a matrix of logits, in place, and each row's log-sum-exp in two parts: the instance
 * head's inner loop.
 *
 * A row lies in the first cache, so it is walked three times: its highest logit, the sum of exp(logit -
 * highest), and, where they are wanted, the shares exp(logit - highest - above), with above = log(sum).
 * highest and above stay two numbers because their sum would lose what is small beside a large logit. A row
 * whose two parts are known already needs the last walk alone.
 *
 * Numbers are float32 or bfloat16; everything in between is float32, with an exponential for each: bfloat16
 * keeps 8 bits of it. NaN and infinity make their row's sum NaN or infinite, no other. Rows are shared out
 * over OpenMP's threads, which are torch's own: its library is the one that is loaded already.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "processor.h"

#define INLINE static inline __attribute__((always_inline))

enum { FINDS = 1, STORES = 2 };                 /* what is done of: find the two parts, store the shares */

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float load(const void *row, int is_bf16, int64_t i) {
    return is_bf16 ? from_bits((uint32_t)((const uint16_t *)row)[i] << 16) : ((const float *)row)[i];
}

INLINE void store(void *row, int is_bf16, int64_t i, float value) {
    uint32_t bits = to_bits(value);             /* a share or NaN: adding overflows neither; ties go up */
    if (is_bf16) ((uint16_t *)row)[i] = (uint16_t)((bits + 0x8000) >> 16);
    else ((float *)row)[i] = value;
}

/* e^x to 8e-6, a few thousandths of what rounding to bfloat16 takes: without log(2) in two parts, and with
 * the polynomial of degree 5 whose relative error on |r| <= 1/2 is the least. Else as below. */
INLINE float coarse_exponential(float x) {
    const float shift = 12582912.0f;
    float scaled = x * 1.44269504f, shifted = scaled + shift, r = scaled - (shifted - shift);
    float e = 0.00132765f;
    e = e * r + 0.00967554f;
    e = e * r + 0.05550713f;
    e = e * r + 0.24022120f;
    e = e * r + 0.69314697f;
    e = e * r + 1.0f;
    e *= from_bits((to_bits(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : e;
}

/* e^x for x from -87 to 0, to 2 units in the last place (tests/kernels/test_softmax.py), 0 below, NaN where x
 * is: 2^n e^r with n whole and |r| <= log(2) / 2, e^r by its Taylor terms. Adding 1.5 * 2^23 rounds to a
 * whole number and leaves it in the low bits. */
INLINE float exponential(float x) {
    const float shift = 12582912.0f;
    float shifted = x * 1.44269504f + shift, n = shifted - shift;
    float r = x - n * 0.693359375f;             /* log(2) in two parts, of which n times the first is exact */
    r += n * 2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    e *= from_bits((to_bits(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : e;
}

INLINE float exponential_of(float x, int is_bf16) { return is_bf16 ? coarse_exponential(x) : exponential(x); }

INLINE float highest_float(const float *row, int64_t columns) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < columns; i++) most = row[i] > most ? row[i] : most;
    return most;
}

/* Bits of bfloat16 numbers are in order as whole numbers, once those below a minus sign are turned over. */
INLINE int16_t in_order(int16_t bits) { return bits ^ (bits >> 15 & 0x7fff); }

INLINE float highest_bf16(const int16_t *row, int64_t columns) {
    int16_t most = INT16_MIN;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < columns; i++) {
        int16_t value = in_order(row[i]);
        most = value > most ? value : most;
    }
    return from_bits((uint32_t)(uint16_t)in_order(most) << 16);
}

INLINE void one_row(void *row, int is_bf16, int64_t columns, int does, float *highest, float *above) {
    if (does & FINDS) {
        float most = is_bf16 ? highest_bf16(row, columns) : highest_float(row, columns), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < columns; i++) sum += exponential_of(load(row, is_bf16, i) - most, is_bf16);
        *highest = most;
        *above = logf(sum);
    }
    if (does & STORES) {
        float most = *highest, rest = *above;
#pragma omp simd
        for (int64_t i = 0; i < columns; i++)
            store(row, is_bf16, i, exponential_of(load(row, is_bf16, i) - most - rest, is_bf16));
    }
}

typedef void Row(void *row, int64_t columns, int does, float *highest, float *above);
#define ROW(name, is_bf16, attributes)                                                                     \
    attributes static void name(void *row, int64_t columns, int does, float *highest, float *above) {      \
        one_row(row, is_bf16, columns, does, highest, above);                                              \
    }
ROW(float_any, 0, )
ROW(bf16_any, 1, )
ROW(float_256, 0, FOR_256)
ROW(bf16_256, 1, FOR_256)
ROW(float_512, 0, FOR_512)
ROW(bf16_512, 1, FOR_512)
static Row *best(int is_bf16) {
    int bits = register_bits();
    if (bits == 512) return is_bf16 ? bf16_512 : float_512;
    if (bits == 256) return is_bf16 ? bf16_256 : float_256;
    return is_bf16 ? bf16_any : float_any;
}

/* logits: rows x columns, without gaps. highest, above: a number a row, found or read as `does` says. */
void vitds_softmax(void *logits, int is_bf16, int64_t rows, int64_t columns, int does, float *highest,
                   float *above, int threads) {
    Row *row = best(is_bf16);
    int64_t bytes = columns * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < rows; m++) row((char *)logits + m * bytes, columns, does, highest + m, above + m);
}
