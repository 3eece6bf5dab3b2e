/* Solarise, and the fifteen operations of the fine-tuning policy, each after PIL. */
#ifndef VITDS_POLICY_H
#define VITDS_POLICY_H

#include <math.h>

#include "colour.h"
#include "sums.h"

enum { FILL = 128 };                            /* what comes from outside the view */

INLINE void apply_table(uint8_t *p, int n, const uint8_t table[256]) {
    for (int i = 0; i < n; i++) p[i] = table[p[i]];
}

INLINE void count_levels(const uint8_t *p, int n, int32_t count[256]) {
    memset(count, 0, 256 * sizeof *count);
    for (int i = 0; i < n; i++) count[p[i]]++;
}

/* Each channel stretched to 0 .. 255; one with a single level stays. */
INLINE void autocontrast(const View *view) {
    for (int c = 0; c < 3; c++) {
        int32_t count[256], low = 0, high = 255;
        uint8_t table[256];
        count_levels(plane(view, c), view->pixels, count);
        while (!count[low]) low++;
        while (!count[high]) high--;
        int range = high - low;
        for (int i = low; i <= high; i++)
            table[i] = (uint8_t)(range ? (2 * 255 * (i - low) + range) / (2 * range) : i);
        apply_table(plane(view, c), view->pixels, table);
    }
}

/* Each channel's histogram made flat, as in PIL: a level becomes its rank, in steps of 1/255 of the pixels
 * below the highest level. */
INLINE void equalize(const View *view) {
    for (int c = 0; c < 3; c++) {
        int32_t count[256], highest = 255;
        uint8_t table[256];
        count_levels(plane(view, c), view->pixels, count);
        while (!count[highest]) highest--;
        int32_t step = (view->pixels - count[highest]) / 255, rank = step / 2;
        if (step == 0) continue;
        for (int i = 0; i < 256; i++) {
            table[i] = clamp(rank / step);
            rank += count[i];
        }
        apply_table(plane(view, c), view->pixels, table);
    }
}

/* One row of value = smooth + f * (value - smooth), smooth by [1 1 1; 1 5 1; 1 1 1] / 13. */
INLINE void sharpen_row(uint8_t *restrict out, const uint8_t *restrict in, int side, Factor own,
                        Factor other) {
    const uint8_t *up = in - side, *down = in + side;
    for (int x = 1; x < side - 1; x++) {
        int around = up[x - 1] + up[x] + up[x + 1] + in[x - 1] + in[x + 1];
        around += down[x - 1] + down[x] + down[x + 1];
        uint16_t smooth = (uint16_t)(2 * (around + 5 * in[x]) + 13) / 26;
        out[x] = (uint8_t)to_level((uint16_t)(times(in[x], own) + times(smooth, other)));
    }
}

/* Pixels at the edge stay. */
INLINE void sharpness(const View *view, double f) {
    int side = view->side;
    for (int c = 0; c < 3; c++) {
        const uint8_t *old = memcpy(view->scratch->spare.bytes, plane(view, c), view->pixels);
        for (int y = 1; y < side - 1; y++)
            sharpen_row(plane(view, c) + y * side, old + y * side, side, factor(f), factor(1 - f));
    }
}

INLINE void invert_from(uint8_t *p, int n, int limit) {
    for (int i = 0; i < n; i++) p[i] = p[i] < limit ? p[i] : 255 - p[i];
}

INLINE void keep_bits(uint8_t *p, int n, uint8_t kept) {
    for (int i = 0; i < n; i++) p[i] &= kept;
}

INLINE void solarize(const View *view, double threshold) {
    for (int c = 0; c < 3; c++) invert_from(plane(view, c), view->pixels, (int)ceil(threshold));
}

INLINE void posterize(const View *view, int bits) {
    for (int c = 0; c < 3; c++) keep_bits(plane(view, c), view->pixels, (uint8_t)(0xff00 >> bits));
}

/* A square of the given side, its edges cut off at the view's, filled with the data set mean. */
INLINE void cutout(const View *view, int square, double centre_y, double centre_x) {
    static const uint8_t mean[3] = {125, 122, 113};
    int side = view->side;
    int top = (int)(centre_y * side) - square / 2, left = (int)(centre_x * side) - square / 2;
    int bottom = between(0, top + square, side), right = between(0, left + square, side);
    top = between(0, top, side);
    left = between(0, left, side);
    for (int c = 0; c < 3; c++)
        for (int y = top; y < bottom; y++) memset(plane(view, c) + y * side + left, mean[c], right - left);
}

/* out[x] = row[x + shift] for whole shifts, FILL from outside. */
INLINE void translate_row(uint8_t *row, int side, int shift) {
    int kept = side - at_most(abs(shift), side);
    memmove(row + (shift < 0 ? side - kept : 0), row + (shift < 0 ? 0 : side - kept), kept);
    memset(row + (shift < 0 ? 0 : kept), FILL, side - kept);
}

/* out[x] = row at x + shift, by PIL's cubic (a = -1); FILL where x + 1/2 + shift lies outside 0 .. side. */
INLINE void shear_row(uint8_t *row, int side, double shift, uint8_t *line) {
    double d = shift - floor(shift), d2 = d * d, d3 = d2 * d;
    double weights[4] = {2 * d2 - d - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2}, sum = 0;
    int16_t weight[4];
    for (int k = 0, done = 0; k < 4; k++) {
        sum += weights[k];
        int now = (int)floor(sum * 16384 + 0.5);
        weight[k] = (int16_t)(now - done);
        done = now;
    }
    memset(line, row[0], 2);
    memcpy(line + 2, row, side);
    memset(line + 2 + side, row[side - 1], 2);
    double begin = ceil(-0.5 - shift), end = ceil(side - 0.5 - shift);
    int from = between(0, (int)begin, side), to = between(0, (int)end, side);
    memset(row, FILL, side);
    if (from < to) weighted_sum(row + from, line + from + 1 + (int)floor(shift), 1, to - from, weight, 4, 14);
}

INLINE void shear_x(const View *view, double slope) {
    int side = view->side;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < side; y++)
            shear_row(plane(view, c) + y * side, side, slope * (y + 0.5), view->scratch->spare.bytes);
}

INLINE void shear_y(const View *view, double slope) {
    int side = view->side, wide = round_up(side, 16);
    uint8_t *columns = view->scratch->spare.bytes, *line = columns + wide * wide;
    for (int c = 0; c < 3; c++) {
        transpose(columns, wide, plane(view, c), side, side, side);
        for (int x = 0; x < side; x++) shear_row(columns + x * wide, side, slope * (x + 0.5), line);
        transpose(plane(view, c), side, columns, wide, side, side);
    }
}

INLINE void translate_x(const View *view, double fraction) {
    int side = view->side, shift = (int)floor(fraction * side + 0.5);
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < side; y++) translate_row(plane(view, c) + y * side, side, shift);
}

INLINE void translate_y(const View *view, double fraction) {
    int side = view->side, shift = (int)floor(fraction * side + 0.5) * side;
    for (int c = 0; c < 3; c++) translate_row(plane(view, c), view->pixels, shift);
}

/* Counter-clockwise about the centre, nearest pixel, FILL from outside; in PIL's 16.16 fixed point. */
INLINE void rotate(const View *view, double degrees) {
    int side = view->side;
    double angle = degrees * 3.14159265358979323846 / 180, cosine = cos(angle), sine = sin(angle);
    double half = side / 2.0, arm = half - 0.5;
    int a = (int)floor(cosine * 65536 + 0.5), b = (int)floor(sine * 65536 + 0.5);
    int x0 = (int)floor((half - cosine * arm + sine * arm) * 65536 + 0.5);
    int y0 = (int)floor((half - sine * arm - cosine * arm) * 65536 + 0.5);
    for (int c = 0; c < 3; c++) {
        const uint8_t *restrict old = memcpy(view->scratch->spare.bytes, plane(view, c), view->pixels);
        uint8_t *restrict out = plane(view, c);
        for (int y = 0; y < side; y++)
            for (int x = 0; x < side; x++) {
                /* Unsigned, so that what lies left or above is beyond the side as well. */
                unsigned from_x = (unsigned)((x0 + x * a - y * b) >> 16);
                unsigned from_y = (unsigned)((y0 + x * b + y * a) >> 16);
                bool inside = from_x < (unsigned)side && from_y < (unsigned)side;
                *out++ = inside ? old[from_y * side + from_x] : FILL;
            }
    }
}

/* Where left and right are not alike to it. */
static bool is_positional(int op) { return op == CUTOUT || (op >= SHEAR_X && op <= ROTATE); }

/* What values an operation can take; infinity where it looks at none. */
static const struct {
    float lowest, highest;
} policy_range[POLICY_OPS] = {
    [NO_POLICY] = {-INFINITY, INFINITY},
    [INVERT] = {-INFINITY, INFINITY},
    [CUTOUT] = {0, MAX_SIDE},
    [SHARPNESS] = {0, 3},
    [AUTOCONTRAST] = {-INFINITY, INFINITY},
    [POSTERIZE] = {0, 8},
    [SHEAR_X] = {-2, 2},
    [SHEAR_Y] = {-2, 2},
    [TRANSLATE_X] = {-2, 2},
    [TRANSLATE_Y] = {-2, 2},
    [ROTATE] = {-360, 360},
    [EQUALIZE] = {-INFINITY, INFINITY},
    [POLICY_CONTRAST] = {0, 3},
    [POLICY_COLOUR] = {0, 3},
    [SOLARIZE] = {0, 256},
    [POLICY_BRIGHTNESS] = {0, 3},
};

INLINE void apply_policy(const View *view, int op, double value) {
    switch (op) {
    case INVERT: solarize(view, 0); break;
    case CUTOUT: cutout(view, (int)value, view->spec->cutout_centre[0], view->spec->cutout_centre[1]); break;
    case SHARPNESS: sharpness(view, value); break;
    case AUTOCONTRAST: autocontrast(view); break;
    case POSTERIZE: posterize(view, (int)value); break;
    case SHEAR_X: shear_x(view, value); break;
    case SHEAR_Y: shear_y(view, value); break;
    case TRANSLATE_X: translate_x(view, value); break;
    case TRANSLATE_Y: translate_y(view, value); break;
    case ROTATE: rotate(view, value); break;
    case EQUALIZE: equalize(view); break;
    case POLICY_CONTRAST: contrast(view, value); break;
    case POLICY_COLOUR: saturation(view, value); break;
    case SOLARIZE: solarize(view, value); break;
    case POLICY_BRIGHTNESS: brightness(view, value); break;
    }
}

INLINE void apply_policies(const View *view) {
    if (view->spec->solarise) solarize(view, 128);
    for (int i = 0; i < 2; i++) apply_policy(view, view->spec->policy_op[i], view->spec->policy_value[i]);
}

#endif
