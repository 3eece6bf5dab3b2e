/* The two primitives of resizing and blur: sums of rows of bytes, and the transposition of rows and columns.
 *
 * No intrinsics: the compiler's own vector types, so that one text serves every processor. docs/kernels.md
 * derives both with pictures (parts 1 and 2).
 */
#ifndef VITDS_SUMS_H
#define VITDS_SUMS_H

#include "view.h"

#if defined(__x86_64__)
#define VECTOR 32                               /* bytes in a vector, as in AVX2; two registers of SSE2 */
#else
#define VECTOR 16
#endif
/* aligned(1): they may stand anywhere */
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t u16s __attribute__((vector_size(VECTOR), aligned(1), may_alias));
typedef int32_t i32s __attribute__((vector_size(VECTOR), aligned(1), may_alias));

/* VECTOR * WIDE neighbouring bytes of weighted_sum below. A vector of 16-bit words is two rows of bytes, the
 * even and the odd ones. `odd` sums the odd bytes; `both` sums whole words modulo 2^16, which is 256 times
 * `odd` too much. No byte ever moves. */
INLINE void sum_narrow(uint8_t *out, const uint8_t *in, ptrdiff_t stride, const int16_t *weight, int taps,
                       const int WIDE) {
    u16s both[WIDE], odd[WIDE];
    for (int j = 0; j < WIDE; j++) both[j] = odd[j] = (u16s){0};
    for (int k = 0; k < taps; k++, in += stride)
        for (int j = 0; j < WIDE; j++) {
            u16s words = *(const u16s *)(in + VECTOR * j);
            both[j] += words * (uint16_t)weight[k];
            odd[j] += (words >> 8) * (uint16_t)weight[k];
        }
    for (int j = 0; j < WIDE; j++) {
        u16s even = both[j] - (odd[j] << 8);
        *(u16s *)(out + VECTOR * j) = ((even + 128) >> 8) | ((odd[j] + 128) & 0xff00);
    }
}

/* VECTOR bytes of it with weights of any sign in 1 / 2^14: four sums in 32-bit lanes. */
INLINE void sum_wide(uint8_t *out, const uint8_t *in, ptrdiff_t stride, const int16_t *weight, int taps) {
    i32s sum[4], bytes = {0};
    for (int j = 0; j < 4; j++) sum[j] = (i32s){0} + (1 << 13);
    for (int k = 0; k < taps; k++, in += stride)
        for (int j = 0; j < 4; j++) sum[j] += ((*(const i32s *)in >> 8 * j) & 255) * weight[k];
    for (int j = 0; j < 4; j++) {
        i32s level = (sum[j] >> 14) & ~(sum[j] >> 31);  /* below 0: 0 */
        level = (level | (level > 255)) & 255;          /* above 255: 255; a comparison that holds is -1 */
        bytes |= level << 8 * j;
    }
    *(i32s *)out = bytes;
}

/* out[i] = sum over k of weight[k] * in[k * stride + i], rounded, for i < n. The last vector of a row
 * overlaps the one before, so that nothing outside the row is touched. shift 8: no weight is negative and
 * they sum to 256, so a sum, at most 255 * 256, fits 16 bits. */
INLINE void weighted_sum(uint8_t *restrict out, const uint8_t *restrict in, ptrdiff_t stride, int n,
                         const int16_t *weight, int taps, int shift) {
    int i = 0;
    if (n < VECTOR) {
        for (; i < n; i++) {
            int32_t sum = 1 << (shift - 1);
            for (int k = 0; k < taps; k++) sum += in[k * stride + i] * weight[k];
            out[i] = clamp(sum >> shift);
        }
    } else if (shift == 8) {
        for (; i + 96 <= n; i += 96) sum_narrow(out + i, in + i, stride, weight, taps, 96 / VECTOR);
        for (; i + VECTOR <= n; i += VECTOR) sum_narrow(out + i, in + i, stride, weight, taps, 1);
        if (i < n) sum_narrow(out + n - VECTOR, in + n - VECTOR, stride, weight, taps, 1);
    } else {
        for (; i + VECTOR <= n; i += VECTOR) sum_wide(out + i, in + i, stride, weight, taps);
        if (i < n) sum_wide(out + n - VECTOR, in + n - VECTOR, stride, weight, taps);
    }
}

#ifdef __clang__
#define ZIP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(a, b, ...) __builtin_shuffle(a, b, (u8x16){__VA_ARGS__})
#endif
#define ZIP_LOW(a, b) ZIP(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) ZIP(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

/* out[x * out_stride + y] = in[y * in_stride + x] for a 16 x 16 block. A byte's place has 8 bits, yyyyxxxx;
 * zipping rows i and i + 8 moves the top bit to the bottom, so four rounds exchange y and x. */
INLINE void transpose_16(uint8_t *out, ptrdiff_t out_stride, const uint8_t *in, ptrdiff_t in_stride) {
    u8x16 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = *(const u8x16 *)(in + i * in_stride);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = ZIP_LOW(a[i], a[i + 8]);
            b[2 * i + 1] = ZIP_HIGH(a[i], a[i + 8]);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < 16; i++) *(u8x16 *)(out + i * out_stride) = a[i];
}

/* Transposes (rows, columns) in blocks of 16, rounding both up. Block rows go from the last to the first:
 * where out_stride is not a multiple of 16, what a block writes beyond its row's end is the next row's start,
 * and is written again, rightly, after it. */
INLINE void transpose(uint8_t *out, ptrdiff_t out_stride, const uint8_t *in, ptrdiff_t in_stride, int rows,
                      int columns) {
    for (int y = (rows - 1) / 16 * 16; y >= 0; y -= 16)
        for (int x = 0; x < columns; x += 16)
            transpose_16(out + x * out_stride + y, out_stride, in + y * in_stride + x, in_stride);
}

#endif
