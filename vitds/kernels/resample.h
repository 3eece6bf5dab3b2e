/* Crop and resize: a box of the picture becomes the planes of a view, by PIL's antialiased filters. */
#ifndef VITDS_RESAMPLE_H
#define VITDS_RESAMPLE_H

#include <math.h>

#include "sums.h"

/* More taps than these need finer weights than 256ths. */
enum { NARROW_TAPS = 12 };

/* The filter at x = n / d, times a positive number that is the same for all n: exact on every machine.
 *   bilinear: 1 - |x| below 1
 *   bicubic (a = -1/2): 1.5|x|^3 - 2.5x^2 + 1 below 1, -0.5|x|^3 + 2.5x^2 - 4|x| + 2 below 2
 */
static int64_t filter_at(int filter, int64_t n, int64_t d) {
    n = n < 0 ? -n : n;
    if (filter == BILINEAR) return n < d ? d - n : 0;
    if (n < d) return 3 * n * n * n - 5 * n * n * d + 2 * d * d * d;
    return n < 2 * d ? -n * n * n + 5 * n * n * d - 8 * n * d * d + 4 * d * d * d : 0;
}

/* PIL's antialiased resize: output pixel i looks at (i + 1/2) * length / resized, through the filter
 * stretched by the reduction. With d = 2 * max(length, resized), source pixel x stands
 * ((2x + 1) * resized - centre) / d from there. */
static int fill_taps(Taps *table, int length, int resized, int filter) {
    int64_t d = 2 * (int64_t)(length > resized ? length : resized), reach = filter == BICUBIC ? 2 * d : d;
    int64_t widest = (reach + resized - 1) / resized;
    int taps = widest < length ? (int)widest : length;
    int shift = filter == BILINEAR && taps <= NARROW_TAPS ? 8 : 14;
    free(table->first);
    *table = (Taps){0};
    int32_t *first = malloc((size_t)resized * (sizeof(int32_t) + taps * sizeof(int16_t)));
    if (!first) return NO_MEMORY;
    *table = (Taps){length, resized, filter, taps, shift, first, (int16_t *)(first + resized)};
    for (int i = 0; i < resized; i++) {
        int64_t centre = (2 * (int64_t)i + 1) * length, before = centre - reach - resized;
        int64_t x = before < 0 ? 0 : before / (2 * (int64_t)resized) + 1;
        double total = 0, sum = 0;
        first[i] = (int32_t)(x = x < length - taps ? x : length - taps);
        for (int k = 0; k < taps; k++)
            total += (double)filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
        /* Rounding the running sum, not each weight, makes them add up to exactly 2^shift. */
        for (int k = 0, done = 0; k < taps; k++) {
            sum += (double)filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
            int now = (int)floor(sum / total * (1 << shift) + 0.5);
            table->weight[(size_t)i * taps + k] = (int16_t)(now - done);
            done = now;
        }
    }
    return 0;
}

/* The table from the cache, or built in the place of another. */
static int find_taps(Taps *tables, int length, int resized, int filter, const Taps **found) {
    Taps *taps = &tables[((uint32_t)length + (uint32_t)resized * 677 + (uint32_t)filter * 331) % TABLES];
    *found = taps;
    if (taps->length == length && taps->resized == resized && taps->filter == filter) return 0;
    return fill_taps(taps, length, resized, filter);
}

/* The horizontal sums of `deep` rows (16 or 32) of interleaved RGB, which begin at source column `from` of
 * the box: transposed into strips (a source column's pixels, channel after channel), summed over strips,
 * transposed back into planes with rows of side bytes. A flip only changes the place where an output column
 * is put. */
INLINE void sum_across(const View *view, const uint8_t *rows, ptrdiff_t stride, int bytes, int deep, int from,
                       uint8_t *out, ptrdiff_t plane_stride) {
    const Taps *across = view->across;
    bool flip = view->spec->flip && !view->flip_last;
    int side = view->side, strip = 3 * deep, taps = across->taps;
    uint8_t *strips = view->scratch->strips.bytes, *columns = view->scratch->columns.bytes;
    transpose(strips, deep, rows, stride, deep, bytes);
    for (int x = 0; x < side; x++) {
        int i = view->spec->out_left + x, place = flip ? side - 1 - x : x;
        const uint8_t *first = strips + strip * (ptrdiff_t)(across->first[i] - from);
        const int16_t *weight = across->weight + (ptrdiff_t)i * taps;
        weighted_sum(columns + strip * place, first, strip, strip, weight, taps, across->shift);
    }
    for (int c = 0; c < 3; c++)
        transpose(out + c * plane_stride, side, columns + deep * c, strip, side, deep);
}

/* Output rows y .. y + count - 1 as vertical sums of rows of n bytes, from row `from` of the box on. */
INLINE void sum_down(const View *view, const uint8_t *rows, ptrdiff_t stride, int n, int from, int y,
                     int count, uint8_t *out, ptrdiff_t out_stride) {
    const Taps *down = view->down;
    for (int r = 0; r < count; r++) {
        int i = view->spec->out_top + y + r;
        const int16_t *weight = down->weight + (ptrdiff_t)i * down->taps;
        const uint8_t *first = rows + (down->first[i] - from) * stride;
        weighted_sum(out + r * out_stride, first, stride, n, weight, down->taps, down->shift);
    }
}

/* Box -> planes, in blocks of rows that fit the L1 cache. Bilinear sums go down first, so that only output
 * rows are transposed. Bicubic ones go across first, as in PIL: its overshoots are cut off between the two,
 * so that the order shows. */
INLINE void resample(const View *view) {
    const ViewSpec *spec = view->spec;
    const int32_t *from_x = view->across->first + spec->out_left, *from_y = view->down->first + spec->out_top;
    /* What of the box the window's taps reach. */
    int left = from_x[0], top = from_y[0], side = view->side;
    int bytes = 3 * (from_x[side - 1] + view->across->taps - left), padded = round_up(bytes, 16);
    int height = from_y[side - 1] + view->down->taps - top;
    ptrdiff_t stride = view->picture->stride;
    const uint8_t *box = view->picture->pixels + (spec->top + top) * stride;
    box += 3 * ((ptrdiff_t)spec->left + left);
    uint8_t *rows = view->scratch->rows.bytes, *middle = view->scratch->middle.bytes;
    if (spec->filter == BILINEAR) {
        for (int y = 0; y < side; y += 32) {
            int deep = side - y > 16 ? 32 : 16;
            sum_down(view, box, stride, bytes, top, y, at_most(32, side - y), rows, padded);
            sum_across(view, rows, padded, bytes, deep, left, plane(view, 0) + y * side, view->plane_stride);
        }
        return;
    }
    ptrdiff_t plane_stride = plane_bytes(height, side);
    for (int y = 0; y < height; y += 32) {
        int deep = height - y > 16 ? 32 : 16;
        /* Copied, as transpose() reads whole blocks, and the picture may end here. */
        for (int r = 0; r < at_most(32, height - y); r++)
            memcpy(rows + r * (ptrdiff_t)padded, box + (y + r) * stride, bytes);
        sum_across(view, rows, padded, bytes, deep, left, middle + (ptrdiff_t)y * side, plane_stride);
    }
    for (int c = 0; c < 3; c++)
        sum_down(view, middle + c * plane_stride, side, side, top, 0, side, plane(view, c), side);
}

#endif
