/* Pixels of vitds: one stored picture and a table of view specs in, finished views out.
 *
 *   stored bytes --decode--> (H, W, 3) --resample--> (3, S, S) planes --colour, grey, blur, solarise, policy, flip--> out (V, 3, S, S)
 *
 * A ViewSpec is one row of that table: which box of the picture, how it is resized, and the numbers of everything that
 * follows. All draws were made by the caller; this file knows no seed, no epoch and no setting, and keeps no state but a
 * Scratch, one a thread: a JPEG handle, the decoded picture, tap tables, and one view's planes, which fit the caches.
 *
 * Three ideas carry it; docs/kernels.md derives them with pictures:
 * - Every resize and blur is one primitive, weighted_sum(): a sum of byte rows that lie in memory, in 16-bit lanes.
 * - Horizontal sums are vertical ones between two transpositions, the other primitive.
 * - Colour is 16-bit fixed point in plain loops, which the compiler turns into vectors.
 * Pixels are integers all the way, so every processor gives the same bytes. Compile with -ffp-contract=off: the few numbers
 * that pass through double (weights, factors, a mean) must not depend on whether the processor has fused multiply-add.
 *
 * Read it from the end: cut_picture() opens the picture, cut_view() checks a spec, make_view() runs the stages.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <turbojpeg.h>

typedef struct {
    int32_t top, left, height, width;           /* the source box, in pixels, inside the picture */
    int32_t resized_height, resized_width;      /* the whole box is resized to this */
    int32_t out_top, out_left;                  /* and this side x side window of the result is kept */
    int32_t filter;                             /* BILINEAR or BICUBIC, both antialiased */
    int32_t flip;                               /* 1: left and right change places */
    uint8_t colour_order[4];                    /* each 0 (nothing) or BRIGHTNESS .. HUE, applied in this order */
    float brightness, contrast, saturation;     /* factors, 0 .. 3; 1 changes nothing */
    float hue;                                  /* shift in turns, -0.5 .. 0.5 */
    int32_t grey;                               /* 1: greyscale, after colour */
    float blur_sigma;                           /* in pixels of the view; 0: none */
    int32_t solarise;                           /* 1: levels from 128 on become 255 - level, after blur */
    int32_t policy_op[2];                       /* 0 or INVERT .. POLICY_BRIGHTNESS, after solarise */
    float policy_value[2];                      /* degrees, fraction of the side, factor, bits, threshold or pixels */
    float cutout_centre[2];                     /* y, x as fractions of the side, for both operations */
} ViewSpec;
_Static_assert(sizeof(ViewSpec) == 96, "ViewSpec must match VIEW_SPEC in views.py");

enum { JPEG, RAW };                             /* how a picture is stored: FFCV's numbers */
enum { BILINEAR, BICUBIC };
enum { BRIGHTNESS = 1, CONTRAST, SATURATION, HUE };
enum {
    INVERT = 1, CUTOUT, SHARPNESS, AUTOCONTRAST, POSTERIZE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE,
    EQUALIZE, POLICY_CONTRAST, POLICY_COLOUR, SOLARIZE, POLICY_BRIGHTNESS
};
enum {
    BAD_ARGUMENT = -1, BAD_LENGTH = -2, DAMAGED = -3, BAD_SIZE = -4, BAD_KIND = -5, BAD_BOX = -6, BAD_SPEC = -7, NO_MEMORY = -8
};
enum { MAX_SIDE = 4096, MAX_LENGTH = 65535, MAX_VIEWS = 1024, MAX_RADIUS = 32, NARROW_TAPS = 12, TABLES = 1024 };

const char *vitds_error(int code) {
    switch (code) {
    case 0: return "no error";
    case BAD_ARGUMENT: return "an argument is missing or out of range";
    case BAD_LENGTH: return "a buffer does not have the length that its picture or views need";
    case DAMAGED: return "the JPEG data are damaged or end early";
    case BAD_SIZE: return "the picture's size differs from the one that was recorded for it";
    case BAD_KIND: return "the JPEG is of a kind that has no direct way to RGB (CMYK)";
    case BAD_BOX: return "a view spec's box or window reaches outside its picture";
    case BAD_SPEC: return "a view spec holds a number that is out of range";
    case NO_MEMORY: return "out of memory";
    default: return "unknown error code";
    }
}

/* ------------------------------------------------------------------------------------------------ tap tables and scratch */

/* Output pixel i is the sum of weight[i * taps + k] times source pixel first[i] + k, for k < taps. All have the same number of taps
 * (some weights are 0), which the processor's branch prediction rewards more than fewer sums would. */
typedef struct {
    int32_t length, resized, filter;            /* what the table is for; 0: empty */
    int32_t taps;
    int32_t shift;                              /* weights are in 1 / 2^shift: 8 (16-bit sums) or 14 (32-bit sums) */
    int32_t *first;
    int16_t *weight;
} Taps;

typedef struct {
    uint8_t *bytes;
    size_t size;
} Buffer;

typedef struct Scratch {
    tjhandle jpeg;                              /* NULL before the first JPEG and after a damaged one */
    Buffer picture;                             /* decoded rows of RGB */
    Buffer rows, strips, columns;               /* a block of up to 32 rows on its way through the resampler */
    Buffer middle;                              /* planes of all rows that were summed across and not yet down */
    Buffer planes, spare;                       /* the view, and room for operations that do not work in place */
    Taps down[TABLES], across[TABLES];          /* tap tables of the two directions; a new one takes an old one's place */
} Scratch;

/* At least `size` bytes in the buffer, on cache lines of its own; they become 0 when it grows. Returns 0 where memory is out. */
static int reserve(Buffer *buffer, size_t size) {
    if (buffer->size >= size) return 1;
    free(buffer->bytes);
    size = (size + 63) / 64 * 64;
    buffer->bytes = aligned_alloc(64, size);
    buffer->size = buffer->bytes ? size : 0;
    if (buffer->bytes) memset(buffer->bytes, 0, size);
    return buffer->bytes != NULL;
}

void *vitds_scratch_new(void) { return calloc(1, sizeof(Scratch)); }

void vitds_scratch_free(void *opaque) {
    Scratch *scratch = opaque;
    if (!scratch) return;
    if (scratch->jpeg) tjDestroy(scratch->jpeg);
    Buffer *buffers[] = {&scratch->picture, &scratch->rows,   &scratch->strips, &scratch->columns,
                         &scratch->middle,  &scratch->planes, &scratch->spare};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]->bytes);
    for (int i = 0; i < TABLES; i++) {
        free(scratch->down[i].first);
        free(scratch->across[i].first);
    }
    free(scratch);
}

/* The filter at n / d, times a positive number that is the same for all n: exact, and the same on every machine.
 * Bilinear: 1 - |x| below 1. Bicubic (a = -1/2): 1.5|x|^3 - 2.5x^2 + 1 below 1, -0.5|x|^3 + 2.5x^2 - 4|x| + 2 below 2. */
static int64_t filter_at(int filter, int64_t n, int64_t d) {
    n = n < 0 ? -n : n;
    if (filter == BILINEAR) return n < d ? d - n : 0;
    if (n < d) return 3 * n * n * n - 5 * n * n * d + 2 * d * d * d;
    return n < 2 * d ? -n * n * n + 5 * n * n * d - 8 * n * d * d + 4 * d * d * d : 0;
}

/* PIL's antialiased resize: output pixel i looks at (i + 1/2) * length / resized, through the filter stretched by the
 * reduction. With d = 2 * max(length, resized), source pixel x stands ((2x + 1) * resized - centre) / d from there. */
static int fill_taps(Taps *table, int length, int resized, int filter) {
    int64_t d = 2 * (int64_t)(length > resized ? length : resized), reach = filter == BICUBIC ? 2 * d : d;
    int64_t widest = (reach + resized - 1) / resized;
    int taps = widest < length ? (int)widest : length, shift = filter == BILINEAR && taps <= NARROW_TAPS ? 8 : 14;
    free(table->first);
    *table = (Taps){0};
    int32_t *first = malloc((size_t)resized * (sizeof(int32_t) + taps * sizeof(int16_t)));
    if (!first) return 0;
    *table = (Taps){length, resized, filter, taps, shift, first, (int16_t *)(first + resized)};
    for (int i = 0; i < resized; i++) {
        int64_t centre = (2 * (int64_t)i + 1) * length, before = centre - reach - resized;
        int64_t x = before < 0 ? 0 : before / (2 * (int64_t)resized) + 1;
        double total = 0, sum = 0;
        first[i] = (int32_t)(x = x < length - taps ? x : length - taps);
        for (int k = 0; k < taps; k++) total += (double)filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
        /* Rounding the running sum, not each weight, makes them add up to exactly 2^shift. */
        for (int k = 0, done = 0; k < taps; k++) {
            sum += (double)filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
            int now = (int)floor(sum / total * (1 << shift) + 0.5);
            table->weight[(size_t)i * taps + k] = (int16_t)(now - done);
            done = now;
        }
    }
    return 1;
}

/* The table from the cache, or built in the place of another. NULL where memory is out. */
static const Taps *find_taps(Taps *tables, int length, int resized, int filter) {
    Taps *taps = &tables[((uint32_t)length + (uint32_t)resized * 677 + (uint32_t)filter * 331) % TABLES];
    if (taps->length == length && taps->resized == resized && taps->filter == filter) return taps;
    return fill_taps(taps, length, resized, filter) ? taps : NULL;
}

/* -------------------------------------------------------------------------------------- the two primitives of resampling */

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define VECTOR 32                               /* bytes in a vector, as in AVX2; two registers where there is only SSE2 */
#else
#define VECTOR 16
#endif
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));      /* aligned(1): they may stand anywhere */
typedef uint16_t u16s __attribute__((vector_size(VECTOR), aligned(1), may_alias));
typedef int32_t i32s __attribute__((vector_size(VECTOR), aligned(1), may_alias));

INLINE uint8_t clamp(int value) { return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value); }

/* VECTOR * WIDE neighbouring bytes of weighted_sum below. A vector of 16-bit words is two rows of bytes, the even and the odd
 * ones. `odd` sums the odd bytes; `both` sums whole words modulo 2^16, which is 256 times `odd` too much. No byte ever moves. */
INLINE void sum_narrow(uint8_t *out, const uint8_t *in, ptrdiff_t stride, const int16_t *weight, int taps, const int WIDE) {
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
        i32s level = (sum[j] >> 14) & ~(sum[j] >> 31);          /* below 0: 0 */
        level = (level | (level > 255)) & 255;                  /* above 255: 255; a comparison gives -1 where it holds */
        bytes |= level << 8 * j;
    }
    *(i32s *)out = bytes;
}

/* out[i] = sum over k of weight[k] * in[k * stride + i], rounded, for i < n. The last vector of a row overlaps the one before, so
 * that nothing outside the row is touched. shift 8: no weight is negative and they sum to 256, so a sum, at most 255 * 256,
 * fits 16 bits. */
INLINE void weighted_sum(uint8_t *restrict out, const uint8_t *restrict in, ptrdiff_t stride, int n, const int16_t *weight, int taps,
                         int shift) {
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

/* out[x * out_stride + y] = in[y * in_stride + x] for a 16 x 16 block. A byte's place has 8 bits, yyyyxxxx; zipping rows i and
 * i + 8 moves the top bit to the bottom, so four rounds exchange y and x. */
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

/* Transposes (rows, columns) in blocks of 16, rounding both up. Block rows go from the last to the first: where out_stride is not
 * a multiple of 16, what a block writes beyond its row's end is the next row's start, and is written again, rightly, after it. */
INLINE void transpose(uint8_t *out, ptrdiff_t out_stride, const uint8_t *in, ptrdiff_t in_stride, int rows, int columns) {
    for (int y = (rows - 1) / 16 * 16; y >= 0; y -= 16)
        for (int x = 0; x < columns; x += 16) transpose_16(out + x * out_stride + y, out_stride, in + y * in_stride + x, in_stride);
}

/* ------------------------------------------------------------------------------------------------------------ one view */

typedef struct {
    const uint8_t *pixels;                      /* (H, W, 3) */
    ptrdiff_t stride;                           /* bytes from one row to the next */
    int height, width;
} Picture;

/* One view to be made. Its planes are side x side bytes without gaps between rows, `apart` bytes from each other. */
typedef struct {
    const Picture *picture;
    const ViewSpec *spec;
    const Taps *down, *across;                  /* vertical and horizontal taps */
    Scratch *scratch;
    int side, pixels;                           /* pixels = side * side, of a plane */
    ptrdiff_t apart;
    int flip_last;                              /* 1: a policy operation depends on where left is, so a flip comes after it */
} View;

INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
INLINE int at_most(int a, int b) { return a < b ? a : b; }
INLINE int between(int low, int value, int high) { return value < low ? low : value > high ? high : value; }
INLINE uint8_t *plane(const View *view, int channel) { return view->scratch->planes.bytes + channel * view->apart; }

/* Bytes of a plane with room for transpose() to write whole blocks. */
INLINE ptrdiff_t plane_bytes(int rows, int side) { return (ptrdiff_t)round_up(rows, 32) * side + 16; }

/* The horizontal sums of `deep` rows (16 or 32) of interleaved RGB, which begin at source column `from` of the box: transposed
 * into strips (a source column's pixels, channel after channel), summed over strips, transposed back into planes with rows of
 * side bytes. A flip only changes the place where an output column is put. */
INLINE void sum_across(const View *view, const uint8_t *rows, ptrdiff_t stride, int bytes, int deep, int from, uint8_t *out,
                       ptrdiff_t apart) {
    const Taps *across = view->across;
    int side = view->side, strip = 3 * deep, flip = view->spec->flip && !view->flip_last;
    uint8_t *strips = view->scratch->strips.bytes, *columns = view->scratch->columns.bytes;
    transpose(strips, deep, rows, stride, deep, bytes);
    for (int x = 0; x < side; x++) {
        int i = view->spec->out_left + x;
        weighted_sum(columns + strip * (flip ? side - 1 - x : x), strips + strip * (ptrdiff_t)(across->first[i] - from), strip,
                     strip, across->weight + (ptrdiff_t)i * across->taps, across->taps, across->shift);
    }
    for (int c = 0; c < 3; c++) transpose(out + c * apart, side, columns + deep * c, strip, side, deep);
}

/* Output rows y .. y + count - 1 as vertical sums of rows of n bytes, which begin at source row `from` of the box. */
INLINE void sum_down(const View *view, const uint8_t *rows, ptrdiff_t stride, int n, int from, int y, int count, uint8_t *out,
                     ptrdiff_t out_stride) {
    const Taps *down = view->down;
    for (int r = 0; r < count; r++) {
        int i = view->spec->out_top + y + r;
        weighted_sum(out + r * out_stride, rows + (down->first[i] - from) * stride, stride, n,
                     down->weight + (ptrdiff_t)i * down->taps, down->taps, down->shift);
    }
}

/* Box -> planes, in blocks of rows that fit the L1 cache. Bilinear sums go down first, so that only output rows are transposed.
 * Bicubic ones go across first, as in PIL: its overshoots are cut off between the two, so that the order shows. */
INLINE void resample(const View *view) {
    const ViewSpec *spec = view->spec;
    const int32_t *from_x = view->across->first + spec->out_left, *from_y = view->down->first + spec->out_top;
    int side = view->side, bytes = 3 * (from_x[side - 1] + view->across->taps - *from_x), padded = round_up(bytes, 16);
    int height = from_y[side - 1] + view->down->taps - *from_y;
    ptrdiff_t stride = view->picture->stride;
    const uint8_t *box = view->picture->pixels + (spec->top + *from_y) * stride + 3 * ((ptrdiff_t)spec->left + *from_x);
    uint8_t *rows = view->scratch->rows.bytes, *middle = view->scratch->middle.bytes;
    if (spec->filter == BILINEAR) {
        for (int y = 0; y < side; y += 32) {
            sum_down(view, box, stride, bytes, *from_y, y, at_most(32, side - y), rows, padded);
            sum_across(view, rows, padded, bytes, side - y > 16 ? 32 : 16, *from_x, plane(view, 0) + y * side, view->apart);
        }
    } else {
        ptrdiff_t apart = plane_bytes(height, side);
        for (int y = 0; y < height; y += 32) {
            /* Copied, as transpose() reads whole blocks, and the picture may end here. */
            for (int r = 0; r < at_most(32, height - y); r++) memcpy(rows + r * (ptrdiff_t)padded, box + (y + r) * stride, bytes);
            sum_across(view, rows, padded, bytes, height - y > 16 ? 32 : 16, *from_x, middle + (ptrdiff_t)y * side, apart);
        }
        for (int c = 0; c < 3; c++) sum_down(view, middle + c * apart, side, side, *from_y, 0, side, plane(view, c), side);
    }
}

/* ------------------------------------------------------------------------------------------------------ colour and grey */

/* Two neighbouring pixels of a plane as one 16-bit word. Even and odd byte are worked on apart, so that the compiler's vectors
 * have 16-bit lanes from load to store. */
typedef uint16_t Pair __attribute__((aligned(1), may_alias));

INLINE int pairs(const View *view) { return (view->pixels + 1) / 2; }
INLINE Pair *pair_plane(const View *view, int channel) { return (Pair *)plane(view, channel); }

/* A factor f in 16-bit arithmetic: 32 * f * level = level * whole + (level * part >> 8). Results are in 1/32 of a level. They may
 * pass below 0 and wrap, as long as the end result lies within +- 1023 levels, which factors up to 3 guarantee. */
typedef struct {
    uint16_t whole;
    uint8_t part;
} Factor;

INLINE Factor factor(double f) {
    int in_8192ths = (int)floor(f * 8192 + 0.5);
    return (Factor){(uint16_t)(in_8192ths >> 8), (uint8_t)(in_8192ths & 255)};
}

INLINE uint16_t times(uint16_t level, Factor f) { return (uint16_t)(level * f.whole + (level * f.part >> 8)); }

INLINE uint16_t to_level(uint16_t in_32nds) {
    int16_t level = (int16_t)((int16_t)(in_32nds + 16) >> 5);
    return (uint16_t)(level < 0 ? 0 : level > 255 ? 255 : level);
}

/* level * f + offset: brightness (offset 0) and contrast (offset (1 - f) * mean grey). */
INLINE void scale_levels(Pair *restrict p, int n, Factor f, uint16_t offset) {
    for (int i = 0; i < n; i++) {
        uint16_t even = p[i] & 255, odd = p[i] >> 8;
        p[i] = (uint16_t)(to_level((uint16_t)(times(even, f) + offset)) | to_level((uint16_t)(times(odd, f) + offset)) << 8);
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
    uint16_t level = (uint16_t)(77 * v.red + 150 * v.green + 29 * v.blue + 128) >> 8, rest = times(level, grey);
    return (Colour){to_level((uint16_t)(times(v.red, own) + rest)), to_level((uint16_t)(times(v.green, own) + rest)),
                    to_level((uint16_t)(times(v.blue, own) + rest))};
}

INLINE void mix_with_grey(Pair *restrict r, Pair *restrict g, Pair *restrict b, int n, Factor own, Factor grey) {
    for (int i = 0; i < n; i++) {
        Colour even = mixed_with_grey(evens(r[i], g[i], b[i]), own, grey), odd = mixed_with_grey(odds(r[i], g[i], b[i]), own, grey);
        put(r + i, g + i, b + i, even, odd);
    }
}

INLINE void saturation(const View *view, double f) {
    mix_with_grey(pair_plane(view, 0), pair_plane(view, 1), pair_plane(view, 2), pairs(view), factor(f), factor(1 - f));
}

INLINE void greyscale(const View *view) {
    mix_with_grey(pair_plane(view, 0), pair_plane(view, 1), pair_plane(view, 2), pairs(view), factor(0), factor(1));
}

/* Channel n of a colour whose hue is `turn` (in 1/16 of a level, 0 .. 6 * chroma): the top level less a trapezium of the hue. */
INLINE uint16_t hue_channel(uint16_t turn, uint16_t top, uint16_t chroma, int n) {
    uint16_t moved = (uint16_t)(turn + 16 * n * chroma), less = (uint16_t)(moved - 96 * chroma);
    int16_t at = (int16_t)(moved < less ? moved : less), back = (int16_t)(64 * chroma - at), most = (int16_t)(16 * chroma);
    int16_t down = at < back ? at : back;
    down = down < 0 ? 0 : down > most ? most : down;
    return (uint16_t)(16 * top + 8 - down) >> 4;
}

/* Hue is kept multiplied by the chroma, so that no division is needed: a full turn is 6 * chroma, and magenta, not red, is 0 so
 * that no hue is negative. A number beyond a turn is brought back by taking the smaller of x and x - turn modulo 2^16. */
INLINE Colour with_hue_shifted(Colour v, Factor shift) {
    int16_t red = (int16_t)v.red, green = (int16_t)v.green, blue = (int16_t)v.blue;
    int16_t top = red > green ? red : green, low = red < green ? red : green;
    top = top > blue ? top : blue;
    low = low < blue ? low : blue;
    int16_t chroma = (int16_t)(top - low), from_red = (int16_t)(chroma + green - blue);
    int16_t from_green = (int16_t)(3 * chroma + blue - red), from_blue = (int16_t)(5 * chroma + red - green);
    int16_t turn = top == red ? from_red : top == green ? from_green : from_blue;
    uint16_t moved = (uint16_t)(16 * turn + times((uint16_t)chroma, shift)), less = (uint16_t)(moved - 96 * chroma);
    moved = moved < less ? moved : less;
    return (Colour){hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 5), hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 3),
                    hue_channel(moved, (uint16_t)top, (uint16_t)chroma, 1)};
}

INLINE void shift_hue(Pair *restrict r, Pair *restrict g, Pair *restrict b, int n, Factor shift) {
    for (int i = 0; i < n; i++) {
        Colour even = with_hue_shifted(evens(r[i], g[i], b[i]), shift), odd = with_hue_shifted(odds(r[i], g[i], b[i]), shift);
        put(r + i, g + i, b + i, even, odd);
    }
}

INLINE void hue(const View *view, double turns) {
    turns -= 1.0 / 6;                           /* from magenta back to red */
    Factor shift = factor(3 * (turns - floor(turns)));          /* 32 * 3 * chroma is 16 * a full turn */
    shift_hue(pair_plane(view, 0), pair_plane(view, 1), pair_plane(view, 2), pairs(view), shift);
}

/* ----------------------------------------------------------------------------------------------------------------- blur */

/* The place of pixel i beyond an edge, mirrored at the edge pixels as often as needed. */
INLINE int mirrored(int i, int side) {
    int period = side > 1 ? 2 * (side - 1) : 1;
    i = abs(i) % period;
    return i < side ? i : period - i;
}

/* The right half of a Gaussian of radius ceil(3 sigma) in 1/256. Its running sum from the tail is what is rounded, so that
 * half[0] + 2 * (half[1] + ..) = 256. Returns the radius, less where the outermost weights have become 0. */
INLINE int gaussian(double sigma, int16_t half[MAX_RADIUS + 1]) {
    int radius = (int)ceil(3 * sigma), kept = 0, done = 0;
    double bell[MAX_RADIUS + 1], total = 0, tail = 0;
    for (int k = 0; k <= radius; k++) total += (k ? 2 : 1) * (bell[k] = exp(-0.5 * k * k / (sigma * sigma)));
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
INLINE void add_margin(uint8_t *restrict out, const uint8_t *restrict in, int side, int radius, const int *place) {
    int wide = side + 2 * radius;
    for (int y = 0; y < wide; y++, out += wide) {
        const uint8_t *row = in + place[y] * side;
        for (int x = 0; x < radius; x++) out[x] = row[place[x]];
        memcpy(out + radius, row, side);
        for (int x = radius + side; x < wide; x++) out[x] = row[place[x]];
    }
}

/* True Gaussian: each plane, with its margin, is summed down as one long row, then across row by row into its place. */
INLINE void blur(const View *view) {
    int16_t half[MAX_RADIUS + 1], weight[2 * MAX_RADIUS + 1];
    int side = view->side, radius = gaussian(view->spec->blur_sigma, half), taps = 2 * radius + 1, wide = side + 2 * radius;
    int place[MAX_SIDE + 2 * MAX_RADIUS];
    for (int k = 0; k < taps; k++) weight[k] = half[abs(k - radius)];
    for (int x = 0; x < wide; x++) place[x] = mirrored(x - radius, side);
    uint8_t *margined = view->scratch->spare.bytes, *summed = margined + (ptrdiff_t)wide * wide;
    for (int c = 0; c < 3 && radius > 0; c++) {
        add_margin(margined, plane(view, c), side, radius, place);
        weighted_sum(summed, margined, wide, side * wide, weight, taps, 8);
        for (int y = 0; y < side; y++) weighted_sum(plane(view, c) + y * side, summed + (ptrdiff_t)y * wide, 1, side, weight, taps, 8);
    }
}

/* ------------------------------------------------------------------------- the policy operations of the fine-tuning recipe */

enum { FILL = 128 };

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
        for (int i = low; i <= high; i++) table[i] = (uint8_t)(range ? (2 * 255 * (i - low) + range) / (2 * range) : i);
        apply_table(plane(view, c), view->pixels, table);
    }
}

/* Each channel's histogram made flat, as in PIL: a level becomes its rank, in steps of 1/255 of the pixels below the highest level. */
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
INLINE void sharpen_row(uint8_t *restrict out, const uint8_t *restrict in, int side, Factor own, Factor other) {
    const uint8_t *up = in - side, *down = in + side;
    for (int x = 1; x < side - 1; x++) {
        int around = up[x - 1] + up[x] + up[x + 1] + in[x - 1] + in[x + 1] + down[x - 1] + down[x] + down[x + 1];
        uint16_t smooth = (uint16_t)(2 * (around + 5 * in[x]) + 13) / 26;
        out[x] = (uint8_t)to_level((uint16_t)(times(in[x], own) + times(smooth, other)));
    }
}

/* Pixels at the edge stay. */
INLINE void sharpness(const View *view, double f) {
    int side = view->side;
    for (int c = 0; c < 3; c++) {
        const uint8_t *old = memcpy(view->scratch->spare.bytes, plane(view, c), view->pixels);
        for (int y = 1; y < side - 1; y++) sharpen_row(plane(view, c) + y * side, old + y * side, side, factor(f), factor(1 - f));
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
    int side = view->side, top = (int)(centre_y * side) - square / 2, left = (int)(centre_x * side) - square / 2;
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
        for (int y = 0; y < side; y++) shear_row(plane(view, c) + y * side, side, slope * (y + 0.5), view->scratch->spare.bytes);
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
    double angle = degrees * 3.14159265358979323846 / 180, cosine = cos(angle), sine = sin(angle), half = side / 2.0, arm = half - 0.5;
    int a = (int)floor(cosine * 65536 + 0.5), b = (int)floor(sine * 65536 + 0.5);
    int x0 = (int)floor((half - cosine * arm + sine * arm) * 65536 + 0.5);
    int y0 = (int)floor((half - sine * arm - cosine * arm) * 65536 + 0.5);
    for (int c = 0; c < 3; c++) {
        const uint8_t *restrict old = memcpy(view->scratch->spare.bytes, plane(view, c), view->pixels);
        uint8_t *restrict out = plane(view, c);
        for (int y = 0; y < side; y++)
            for (int x = 0; x < side; x++) {
                unsigned from_x = (unsigned)((x0 + x * a - y * b) >> 16), from_y = (unsigned)((y0 + x * b + y * a) >> 16);
                *out++ = from_x < (unsigned)side && from_y < (unsigned)side ? old[from_y * side + from_x] : FILL;
            }
    }
}

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

/* ------------------------------------------------------------------------------------------------- a view from end to end */

INLINE void flip_rows(const View *view) {
    int side = view->side;
    for (int c = 0; c < 3; c++)
        for (uint8_t *row = plane(view, c), *end = row + view->pixels; row < end; row += side)
            for (int x = 0; x < side / 2; x++) {
                uint8_t left = row[x];
                row[x] = row[side - 1 - x];
                row[side - 1 - x] = left;
            }
}

INLINE void recolour(const View *view) {
    const ViewSpec *spec = view->spec;
    for (int i = 0; i < 4; i++) {
        if (spec->colour_order[i] == BRIGHTNESS) brightness(view, spec->brightness);
        if (spec->colour_order[i] == CONTRAST) contrast(view, spec->contrast);
        if (spec->colour_order[i] == SATURATION) saturation(view, spec->saturation);
        if (spec->colour_order[i] == HUE) hue(view, spec->hue);
    }
    if (spec->grey) greyscale(view);
}

INLINE void apply_policies(const View *view) {
    if (view->spec->solarise) solarize(view, 128);
    for (int i = 0; i < 2; i++) apply_policy(view, view->spec->policy_op[i], view->spec->policy_value[i]);
}

/* Each stage is compiled for three kinds of processor, with everything it calls inlined; the best one that runs here is taken. */
#if defined(__x86_64__) && !defined(VITDS_PLAIN)
#define STAGE(name)                                                                                                              \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void name##_512(const View *view) { name(view); }       \
    __attribute__((target("avx2"))) static void name##_256(const View *view) { name(view); }                                     \
    static void name##_any(const View *view) { name(view); }                                                                     \
    static void run_##name(const View *view) {                                                                                   \
        (register_bits() == 512 ? name##_512 : register_bits() == 256 ? name##_256 : name##_any)(view);                          \
    }
static int register_bits(void) {
    int all = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return all ? 512 : __builtin_cpu_supports("avx2") ? 256 : 128;
}
#else
#define STAGE(name) static void run_##name(const View *view) { name(view); }
#endif
STAGE(resample)
STAGE(recolour)
STAGE(blur)
STAGE(apply_policies)

static void make_view(const View *view, uint8_t *out) {
    for (int i = 0; i < 3 * view->pixels; i += 64) __builtin_prefetch(out + i, 1);      /* it comes while the view is made */
    run_resample(view);
    run_recolour(view);
    if (view->spec->blur_sigma > 0) run_blur(view);
    if (view->spec->solarise || view->spec->policy_op[0] || view->spec->policy_op[1]) run_apply_policies(view);
    if (view->spec->flip && view->flip_last) flip_rows(view);
    for (int c = 0; c < 3; c++) memcpy(out + (size_t)c * view->pixels, plane(view, c), view->pixels);
}

/* ------------------------------------------------------------------------------------------------------------- the doors */

/* A JPEG into scratch->picture. Warnings count as damage: a file that ends early would otherwise come out grey from there on.
 * No row begins at a multiple of 16 bytes: those libjpeg-turbo writes past the caches, and the crops would wait for them. */
static int decode(const uint8_t *source, unsigned long bytes, Scratch *scratch, Picture *picture) {
    int width = 0, height = 0, sampling, space = TJCS_RGB;
    if (tjDecompressHeader3(scratch->jpeg, source, bytes, &width, &height, &sampling, &space) || !width) return DAMAGED;
    if (space == TJCS_CMYK || space == TJCS_YCCK) return BAD_KIND;
    if (width != picture->width || height != picture->height) return BAD_SIZE;
    int stride = round_up(3 * width, 16);
    if (!reserve(&scratch->picture, 8 + (size_t)height * stride)) return NO_MEMORY;
    uint8_t *pixels = scratch->picture.bytes + 8;
    picture->pixels = pixels;
    picture->stride = stride;
    return tjDecompress2(scratch->jpeg, source, bytes, pixels, width, stride, height, TJPF_RGB, TJFLAG_ACCURATEDCT) ? DAMAGED : 0;
}

/* The picture as RGB rows: raw storage where it lies, a JPEG decoded into the scratch. Returns 0 or an error. */
static int open_picture(const uint8_t *source, int64_t source_bytes, int storage, int height, int width, Scratch *scratch,
                        Picture *picture) {
    if (!source || height < 1 || width < 1 || height > MAX_LENGTH || width > MAX_LENGTH) return BAD_ARGUMENT;
    *picture = (Picture){source, 3 * (ptrdiff_t)width, height, width};
    if (storage == RAW) {
        if (source_bytes != height * picture->stride) return BAD_LENGTH;
        /* One sweep through a picture that fits the L2 cache costs less than the waits for its rows later: a tenth of the whole. */
        for (int64_t i = 0; i < source_bytes && source_bytes <= 1 << 20; i += 64) __builtin_prefetch(source + i);
        return 0;
    }
    if (storage != JPEG) return BAD_ARGUMENT;
    if (source_bytes < 1) return DAMAGED;
    if (!scratch->jpeg && !(scratch->jpeg = tjInitDecompress())) return NO_MEMORY;
    int error = decode(source, (unsigned long)source_bytes, scratch, picture);
    if (error) {                                /* libjpeg-turbo's handle may refuse sound pictures after a damaged header */
        tjDestroy(scratch->jpeg);
        scratch->jpeg = NULL;
    }
    return error;
}

static int within(float value, float low, float high) { return value >= low && value <= high; }     /* false for NaN */

static int check_box(const ViewSpec *spec, const Picture *picture, int side) {
    int64_t bottom = (int64_t)spec->top + spec->height, right = (int64_t)spec->left + spec->width;
    int64_t out_bottom = (int64_t)spec->out_top + side, out_right = (int64_t)spec->out_left + side;
    int begins = spec->top >= 0 && spec->left >= 0 && spec->out_top >= 0 && spec->out_left >= 0 && spec->height > 0 && spec->width > 0;
    int box_ends = bottom <= picture->height && right <= picture->width;
    int window_ends = out_bottom <= spec->resized_height && out_right <= spec->resized_width;
    int sized = spec->resized_height <= MAX_LENGTH && spec->resized_width <= MAX_LENGTH;
    return begins && box_ends && window_ends && sized ? 0 : BAD_BOX;
}

static int check_numbers(const ViewSpec *spec) {
    /* of policy_value, for each policy_op */
    static const float lowest[] = {-INFINITY, -INFINITY, 0, 0, -INFINITY, 0, -2, -2, -2, -2, -360, -INFINITY, 0, 0, 0, 0};
    static const float highest[] = {INFINITY, INFINITY, MAX_SIDE, 3, INFINITY, 8, 2, 2, 2, 2, 360, INFINITY, 3, 3, 256, 3};
    int good = (spec->filter == BILINEAR || spec->filter == BICUBIC) && (spec->flip | 1) == 1 && (spec->grey | 1) == 1;
    good = good && (spec->solarise | 1) == 1;
    good = good && within(spec->brightness, 0, 3) && within(spec->contrast, 0, 3) && within(spec->saturation, 0, 3);
    good = good && within(spec->hue, -0.5f, 0.5f) && within(spec->blur_sigma, 0, MAX_RADIUS / 3.0f);
    for (int i = 0; i < 4; i++) good = good && spec->colour_order[i] <= HUE;
    for (int i = 0; i < 2; i++) {
        int op = spec->policy_op[i];
        good = good && op >= 0 && op <= POLICY_BRIGHTNESS && within(spec->policy_value[i], lowest[op], highest[op]);
        good = good && within(spec->cutout_centre[i], 0, 1);
    }
    return good ? 0 : BAD_SPEC;
}

static int is_positional(int op) { return op == CUTOUT || (op >= SHEAR_X && op <= ROTATE); }

static int reserve_view(Scratch *scratch, const ViewSpec *spec, int side) {
    size_t padded = (size_t)round_up(3 * spec->width, 16), margined = (size_t)side + 2 * MAX_RADIUS;
    size_t middle = spec->filter == BICUBIC ? (size_t)plane_bytes(spec->height, side) : 0;
    return reserve(&scratch->rows, 32 * padded) && reserve(&scratch->strips, 32 * padded) &&
           reserve(&scratch->columns, 96 * (size_t)round_up(side, 16)) && reserve(&scratch->middle, 3 * middle) &&
           reserve(&scratch->planes, 3 * (size_t)plane_bytes(side, side)) && reserve(&scratch->spare, 2 * margined * margined);
}

static int cut_view(const Picture *picture, const ViewSpec *spec, int side, Scratch *scratch, uint8_t *out) {
    int error = check_box(spec, picture, side);
    if (!error) error = check_numbers(spec);
    if (error) return error;
    const Taps *down = find_taps(scratch->down, spec->height, spec->resized_height, spec->filter);
    const Taps *across = find_taps(scratch->across, spec->width, spec->resized_width, spec->filter);
    if (!down || !across || !reserve_view(scratch, spec, side)) return NO_MEMORY;
    int flip_last = is_positional(spec->policy_op[0]) || is_positional(spec->policy_op[1]);
    View view = {picture, spec, down, across, scratch, side, side * side, plane_bytes(side, side), flip_last};
    make_view(&view, out);
    return 0;
}

/* One picture, all its views. */
static int cut_picture(const uint8_t *source, int64_t source_bytes, int storage, int height, int width,
                       const ViewSpec *specs, int views, int side, uint8_t *out, Scratch *scratch) {
    Picture picture;
    int error = open_picture(source, source_bytes, storage, height, width, scratch, &picture);
    for (int v = 0; v < views && !error; v++)
        error = cut_view(&picture, specs + v, side, scratch, out + (size_t)v * 3 * side * side);
    return error;
}

/* The views of a batch: out is (samples, views, 3, side, side), specs (samples, views), everything else (samples,);
 * sources are addresses. status[b] becomes 0 or the sample's error, after which its part of out is undefined: a damaged
 * one never stops the others. Returns an error only where the batch itself is wrong. */
int vitds_views(const int64_t *sources, const int64_t *source_bytes, const int32_t *storages,
                    const int32_t *heights, const int32_t *widths, const ViewSpec *specs, int32_t samples,
                    int32_t views, int32_t side, uint8_t *out, int64_t out_bytes, int32_t *status, void *scratch) {
    if (!sources || !source_bytes || !storages || !heights || !widths || !specs || !out || !status || !scratch)
        return BAD_ARGUMENT;
    if (samples < 0 || views < 1 || views > MAX_VIEWS || side < 1 || side > MAX_SIDE) return BAD_ARGUMENT;
    int64_t sample_bytes = (int64_t)views * 3 * side * side;
    if (out_bytes != samples * sample_bytes) return BAD_LENGTH;
    for (int64_t b = 0; b < samples; b++)
        status[b] = cut_picture((const uint8_t *)(intptr_t)sources[b], source_bytes[b], storages[b], heights[b],
                                widths[b], specs + b * views, views, side, out + b * sample_bytes, scratch);
    return 0;
}

/* The whole picture as (height, width, 3). */
int vitds_decode(const uint8_t *source, int64_t source_bytes, int32_t storage, int32_t height, int32_t width, uint8_t *out,
                 int64_t out_bytes, void *scratch) {
    if (!out || !scratch) return BAD_ARGUMENT;
    Picture picture;
    int error = open_picture(source, source_bytes, storage, height, width, scratch, &picture);
    if (!error && out_bytes != (int64_t)height * width * 3) error = BAD_LENGTH;
    for (ptrdiff_t y = 0; y < height && !error; y++) memcpy(out + y * 3 * width, picture.pixels + y * picture.stride, 3 * (size_t)width);
    return error;
}
