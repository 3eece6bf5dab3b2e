/* What the stages share: a view in the making, the memory it is made in, and some small arithmetic. */
#ifndef VITDS_VIEW_H
#define VITDS_VIEW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <turbojpeg.h>

#include "pixels.h"

/* Inlined whatever the compiler thinks of it: only so is a stage, with all it calls, compiled for each
 * processor. */
#define INLINE static inline __attribute__((always_inline))

enum { MAX_SIDE = 4096, MAX_LENGTH = 65535, MAX_VIEWS = 1024, MAX_RADIUS = 32, TABLES = 1024 };

/* Output pixel i is the sum of weight[i * taps + k] times source pixel first[i] + k, for k < taps. All have
 * the same number of taps (some weights are 0), which the processor's branch prediction rewards more than
 * fewer sums would. */
typedef struct {
    int32_t length, resized, filter;            /* what the table is for; 0: empty */
    int32_t taps;
    int32_t shift;                              /* weights are in 1 / 2^shift: 8 (16-bit sums), 14 (32-bit) */
    int32_t *first;
    int16_t *weight;
} Taps;

typedef struct {
    uint8_t *bytes;
    size_t size;
} Buffer;

typedef struct {
    tjhandle jpeg;                              /* NULL before the first JPEG and after a damaged one */
    Buffer picture;                             /* decoded rows of RGB */
    Buffer rows, strips, columns;               /* up to 32 rows on their way through the resampler */
    Buffer middle;                              /* planes of all rows that were summed across, not yet down */
    Buffer planes, spare;                       /* the view, and room for what does not work in place */
    Taps down[TABLES], across[TABLES];          /* a new table takes the place of an old one */
} Scratch;

typedef struct {
    const uint8_t *pixels;                      /* (H, W, 3) */
    ptrdiff_t stride;                           /* bytes from one row to the next */
    int height, width;
} Picture;

/* One view to be made. Its planes are side x side bytes without gaps between rows. */
typedef struct {
    const Picture *picture;
    const ViewSpec *spec;
    const Taps *down, *across;                  /* vertical and horizontal taps */
    Scratch *scratch;
    int side, pixels;                           /* pixels = side * side, of a plane */
    ptrdiff_t plane_stride;                     /* bytes from one plane to the next */
    bool flip_last;                             /* a policy operation asks where left is: flip after it */
} View;

INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
INLINE int at_most(int a, int b) { return a < b ? a : b; }
INLINE int between(int low, int value, int high) { return value < low ? low : value > high ? high : value; }
INLINE uint8_t clamp(int value) { return (uint8_t)between(0, value, 255); }

INLINE uint8_t *plane(const View *view, int channel) {
    return view->scratch->planes.bytes + channel * view->plane_stride;
}

/* Bytes of a plane with room for transpose() to write whole blocks. */
INLINE ptrdiff_t plane_bytes(int rows, int side) { return (ptrdiff_t)round_up(rows, 32) * side + 16; }

#endif
