/* Brightness, contrast, saturation, hue and greyscale, on the planes of a view in place: 16-bit fixed point
 * in plain loops, which the compiler turns into vectors. docs/kernels.md derives the arithmetic (part 3).
 */
#ifndef VITDS_COLOUR_H
#define VITDS_COLOUR_H

#include <math.h>

#include "view.h"

/* Two neighbouring pixels of a plane as one 16-bit word. Even and odd byte are worked on in turn, so that the
 * compiler's vectors have 16-bit lanes from load to store. */
typedef uint16_t Pair __attribute__((aligned(1), may_alias));

INLINE int pairs(const View *view) { return (view->pixels + 1) / 2; }
INLINE Pair *pair_plane(const View *view, int channel) { return (Pair *)plane(view, channel); }

/* A factor f in 16-bit arithmetic: 32 * f * level = level * whole + (level * part >> 8). Results are in 1/32
 * of a level. They may pass below 0 and wrap, as long as the end result lies within +- 1023 levels, which
 * factors up to 3 guarantee. */
typedef struct {
    uint16_t whole;
    uint8_t part;
} Factor;

INLINE Factor factor(double f) {
    int in_8192ths = (int)floor(f * 8192 + 0.5);
    return (Factor){(uint16_t)(in_8192ths >> 8), (uint8_t)(in_8192ths & 255)};
}

INLINE uint16_t times(uint16_t level, Factor f) {
    return (uint16_t)(level * f.whole + (level * f.part >> 8));
}

INLINE uint16_t to_level(uint16_t in_32nds) {
    int16_t level = (int16_t)((int16_t)(in_32nds + 16) >> 5);
    return (uint16_t)(level < 0 ? 0 : level > 255 ? 255 : level);
}

/* level * f + offset: brightness (offset 0) and contrast (offset (1 - f) * mean grey). */
INLINE void scale_levels(Pair *restrict p, int n, Factor f, uint16_t offset) {
    for (int i = 0; i < n; i++) {
        uint16_t even = to_level((uint16_t)(times(p[i] & 255, f) + offset));
        uint16_t odd = to_level((uint16_t)(times(p[i] >> 8, f) + offset));
        p[i] = (uint16_t)(even | odd << 8);
    }
}

INLINE void brightness(const View *view, double f) {
    for (int c = 0; c < 3; c++) scale_levels(pair_plane(view, c), pairs(view), factor(f), 0);
}

INLINE uint64_t sum_of(const uint8_t *p, int n) {
    uint64_t sum = 0;
    for (int i = 0; i < n; i += 256) {          /* 256 * 255 still fits 16 bits */
        uint16_t part = 0;
        for (int j = i; j < at_most(i + 256, n); j++) part = (uint16_t)(part + p[j]);
        sum += part;
    }
    return sum;
}

INLINE void contrast(const View *view, double f) {
    static const uint64_t share[3] = {2989, 5870, 1140};        /* of a channel in grey, in 1/10000 */
    uint64_t sum = 0;
    for (int c = 0; c < 3; c++) sum += share[c] * sum_of(plane(view, c), view->pixels);
    double mean = (double)sum / (1e4 * view->pixels);
    uint16_t offset = (uint16_t)(int)floor((1 - f) * mean * 32 + 0.5);
    for (int c = 0; c < 3; c++) scale_levels(pair_plane(view, c), pairs(view), factor(f), offset);
}

typedef struct {
    uint16_t red, green, blue;
} Colour;

INLINE Colour evens(Pair r, Pair g, Pair b) { return (Colour){r & 255, g & 255, b & 255}; }
INLINE Colour odds(Pair r, Pair g, Pair b) { return (Colour){r >> 8, g >> 8, b >> 8}; }
INLINE void put(Pair *r, Pair *g, Pair *b, Colour even, Colour odd) {
    *r = (uint16_t)(even.red | odd.red << 8);
    *g = (uint16_t)(even.green | odd.green << 8);
    *b = (uint16_t)(even.blue | odd.blue << 8);
}

INLINE Colour mixed_with_grey(Colour v, Factor own, Factor grey) {
    uint16_t level = (uint16_t)(77 * v.red + 150 * v.green + 29 * v.blue + 128) >> 8;
    uint16_t rest = times(level, grey);
    return (Colour){
        .red = to_level((uint16_t)(times(v.red, own) + rest)),
        .green = to_level((uint16_t)(times(v.green, own) + rest)),
        .blue = to_level((uint16_t)(times(v.blue, own) + rest)),
    };
}

INLINE void mix_planes(Pair *restrict r, Pair *restrict g, Pair *restrict b, int n, Factor own, Factor grey) {
    for (int i = 0; i < n; i++) {
        Colour even = mixed_with_grey(evens(r[i], g[i], b[i]), own, grey);
        Colour odd = mixed_with_grey(odds(r[i], g[i], b[i]), own, grey);
        put(r + i, g + i, b + i, even, odd);
    }
}

/* own * level + grey * grey level, for each pixel and channel. */
INLINE void mix_with_grey(const View *view, double own, double grey) {
    Pair *r = pair_plane(view, 0), *g = pair_plane(view, 1), *b = pair_plane(view, 2);
    mix_planes(r, g, b, pairs(view), factor(own), factor(grey));
}

INLINE void saturation(const View *view, double f) { mix_with_grey(view, f, 1 - f); }
INLINE void greyscale(const View *view) { mix_with_grey(view, 0, 1); }

/* Channel n of a colour of hue `turn` (1/16 of a level, 0 .. 6 * chroma): top less a trapezium of the hue. */
INLINE uint16_t hue_channel(uint16_t turn, uint16_t top, uint16_t chroma, int n) {
    uint16_t moved = (uint16_t)(turn + 16 * n * chroma), less = (uint16_t)(moved - 96 * chroma);
    int16_t at = (int16_t)(moved < less ? moved : less), back = (int16_t)(64 * chroma - at);
    int16_t most = (int16_t)(16 * chroma);
    int16_t down = at < back ? at : back;
    down = down < 0 ? 0 : down > most ? most : down;
    return (uint16_t)(16 * top + 8 - down) >> 4;
}

/* Hue is kept multiplied by the chroma, so that no division is needed: a full turn is 6 * chroma, and
 * magenta, not red, is 0 so that no hue is negative. A number beyond a turn is brought back by taking the
 * smaller of x and x - turn modulo 2^16. */
INLINE Colour with_hue_shifted(Colour v, Factor shift) {
    int16_t red = (int16_t)v.red, green = (int16_t)v.green, blue = (int16_t)v.blue;
    int16_t top = red > green ? red : green, low = red < green ? red : green;
    top = top > blue ? top : blue;
    low = low < blue ? low : blue;
    int16_t chroma = (int16_t)(top - low), from_red = (int16_t)(chroma + green - blue);
    int16_t from_green = (int16_t)(3 * chroma + blue - red), from_blue = (int16_t)(5 * chroma + red - green);
    int16_t turn = top == red ? from_red : top == green ? from_green : from_blue;
    uint16_t moved = (uint16_t)(16 * turn + times((uint16_t)chroma, shift));
    uint16_t less = (uint16_t)(moved - 96 * chroma);
    moved = moved < less ? moved : less;
    return (Colour){
        .red = hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 5),
        .green = hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 3),
        .blue = hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 1),
    };
}

INLINE void shift_hue(Pair *restrict r, Pair *restrict g, Pair *restrict b, int n, Factor shift) {
    for (int i = 0; i < n; i++) {
        Colour even = with_hue_shifted(evens(r[i], g[i], b[i]), shift);
        Colour odd = with_hue_shifted(odds(r[i], g[i], b[i]), shift);
        put(r + i, g + i, b + i, even, odd);
    }
}

INLINE void hue(const View *view, double turns) {
    turns -= 1.0 / 6;                           /* from magenta back to red */
    Factor shift = factor(3 * (turns - floor(turns)));          /* 32 * 3 * chroma is 16 * a full turn */
    shift_hue(pair_plane(view, 0), pair_plane(view, 1), pair_plane(view, 2), pairs(view), shift);
}

/* Jitter in the spec's order, then greyscale. */
INLINE void recolour(const View *view) {
    const ViewSpec *spec = view->spec;
    for (int i = 0; i < 4; i++)
        switch (spec->colour_order[i]) {
        case BRIGHTNESS: brightness(view, spec->brightness); break;
        case CONTRAST: contrast(view, spec->contrast); break;
        case SATURATION: saturation(view, spec->saturation); break;
        case HUE: hue(view, spec->hue); break;
        }
    if (spec->grey) greyscale(view);
}

#endif
