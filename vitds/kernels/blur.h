/* Gaussian blur of a view. */
#ifndef VITDS_BLUR_H
#define VITDS_BLUR_H

#include <math.h>

#include "sums.h"

/* The place of pixel i beyond an edge, mirrored at the edge pixels as often as needed. */
INLINE int mirrored(int i, int side) {
    int period = side > 1 ? 2 * (side - 1) : 1;
    i = abs(i) % period;
    return i < side ? i : period - i;
}

/* The right half of a Gaussian of radius ceil(3 sigma) in 1/256, where the largest sigma as a float rounds to
 * one pixel more than there is room for. Its running sum from the tail is what is rounded, so that half[0] +
 * 2 * (half[1] + ..) = 256. Returns the radius, less where the outermost weights have become 0. */
INLINE int gaussian(double sigma, int16_t half[MAX_RADIUS + 1]) {
    int radius = (int)fmin(ceil(3 * sigma), MAX_RADIUS), kept = 0, done = 0;
    double bell[MAX_RADIUS + 1], total = 0, tail = 0;
    for (int k = 0; k <= radius; k++) {
        bell[k] = exp(-0.5 * k * k / (sigma * sigma));
        total += (k ? 2 : 1) * bell[k];
    }
    for (int k = radius; k > 0; k--) {
        tail += bell[k];
        int now = (int)floor(tail / total * 256 + 0.5);
        half[k] = (int16_t)(now - done);
        kept = kept || !half[k] ? kept : k;
        done = now;
    }
    half[0] = (int16_t)(256 - 2 * done);
    return kept;
}

/* A plane with a mirrored margin: rows of side + 2 * radius bytes, as many. */
INLINE void add_margin(uint8_t *restrict out, const uint8_t *restrict in, int side, int radius,
                       const int *place) {
    int wide = side + 2 * radius;
    for (int y = 0; y < wide; y++, out += wide) {
        const uint8_t *row = in + place[y] * side;
        for (int x = 0; x < radius; x++) out[x] = row[place[x]];
        memcpy(out + radius, row, side);
        for (int x = radius + side; x < wide; x++) out[x] = row[place[x]];
    }
}

/* True Gaussian: a plane with its margin is summed down as one long row, then across into its place. */
INLINE void blur(const View *view) {
    int16_t half[MAX_RADIUS + 1], weight[2 * MAX_RADIUS + 1];
    int radius = gaussian(view->spec->blur_sigma, half), taps = 2 * radius + 1;
    int side = view->side, wide = side + 2 * radius;
    int place[MAX_SIDE + 2 * MAX_RADIUS];
    for (int k = 0; k < taps; k++) weight[k] = half[abs(k - radius)];
    for (int x = 0; x < wide; x++) place[x] = mirrored(x - radius, side);
    uint8_t *margined = view->scratch->spare.bytes, *summed = margined + (ptrdiff_t)wide * wide;
    for (int c = 0; c < 3 && radius > 0; c++) {
        add_margin(margined, plane(view, c), side, radius, place);
        weighted_sum(summed, margined, wide, side * wide, weight, taps, 8);
        for (int y = 0; y < side; y++)
            weighted_sum(plane(view, c) + y * side, summed + (ptrdiff_t)y * wide, 1, side, weight, taps, 8);
    }
}

#endif
