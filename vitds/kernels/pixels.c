/* Pixels of vitds: one stored picture and a table of plans in, finished views out.
 *
 *   stored bytes --decode--> (H, W, 3) --resample--> (3, S, S) planes --colour, grey, blur, policy, flip--> out (V, 3, S, S)
 *
 * A ViewPlan is one row of that table: which box of the picture, how it is resized, and the numbers of everything that
 * follows. All draws were made by the caller; this file knows no seed, no epoch and no setting, and keeps no state but a
 * Scratch, one a thread: a JPEG handle, the decoded picture, tap tables, and one view's planes (they fit the L1 cache).
 *
 * Three ideas carry it; docs/kernels.md derives them with pictures:
 * - Every resize and blur is one primitive, weighted_sum(): a sum of byte rows in 16-bit lanes, weights in 1/256.
 * - It only ever works along rows that lie in memory: for the horizontal direction the block is transposed before and after.
 * - Colour is 16-bit fixed point in plain loops that the compiler turns into vectors.
 * All pixel arithmetic is on integers, so every processor gives the same bytes. view_512 and view_256 are the same code as
 * view_any, compiled once more for wider registers.
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
    uint8_t colour_order[4];                    /* each 0 or BRIGHTNESS .. HUE, applied in this order */
    float brightness, contrast, saturation;     /* factors, 0 .. 3; 1 changes nothing */
    float hue;                                  /* shift in turns, -0.5 .. 0.5 */
    int32_t grey;                               /* 1: greyscale, after colour */
    float blur_sigma;                           /* in pixels of the view; 0: none */
    int32_t policy_op[2];                       /* 0 or INVERT .. POLICY_BRIGHTNESS, after blur */
    float policy_value[2];                      /* degrees, fraction of the side, factor, bits, threshold or pixels */
    float cutout_centre[2];                     /* y, x as fractions of the side */
} ViewPlan;
_Static_assert(sizeof(ViewPlan) == 92, "ViewPlan must match VIEW_PLAN in views.py");

enum { RAW, JPEG };
enum { BILINEAR, BICUBIC };
enum { BRIGHTNESS = 1, CONTRAST, SATURATION, HUE };
enum {
    INVERT = 1, CUTOUT, SHARPNESS, AUTOCONTRAST, POSTERIZE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE,
    EQUALIZE, POLICY_CONTRAST, POLICY_COLOUR, SOLARIZE, POLICY_BRIGHTNESS
};
enum {
    BAD_ARGUMENT = -1, BAD_LENGTH = -2, DAMAGED = -3, BAD_SIZE = -4, BAD_KIND = -5, BAD_BOX = -6, BAD_PLAN = -7, NO_MEMORY = -8
};
enum { MAX_SIDE = 4096, MAX_LENGTH = 65535, MAX_RADIUS = 32, NARROW_TAPS = 12, TABLES = 1024 };

const char *vitds_error(int code) {
    switch (code) {
    case 0: return "no error";
    case BAD_ARGUMENT: return "an argument is missing or out of range";
    case BAD_LENGTH: return "a buffer does not have the length that its picture or views need";
    case DAMAGED: return "the JPEG data are damaged or end early";
    case BAD_SIZE: return "the picture's size differs from the one that was recorded for it";
    case BAD_KIND: return "the JPEG is of a kind that has no direct way to RGB (CMYK)";
    case BAD_BOX: return "a plan's box or window reaches outside its picture";
    case BAD_PLAN: return "a plan holds a number that is out of range";
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
    tjhandle jpeg;
    Buffer picture;                             /* (H, W, 3), decoded */
    Buffer rows, strips, columns;               /* a block of 16 output rows on its way through the resampler */
    Buffer planes, spare;                       /* the view, and room for operations that do not work in place */
    Taps down[TABLES], across[TABLES];          /* tap tables of the two directions; a new one takes an old one's place */
} Scratch;

/* At least `size` bytes in the buffer; their content is lost when it grows. Returns 0 where memory is out. */
static int reserve(Buffer *buffer, size_t size) {
    if (buffer->size >= size) return 1;
    free(buffer->bytes);
    buffer->bytes = aligned_alloc(64, (size+63)/64*64);
    buffer->size = buffer->bytes ? size : 0;
    return buffer->bytes != NULL;
}

void *vitds_scratch_new(void) {
    Scratch *scratch = calloc(1, sizeof(Scratch));
    if (scratch && !(scratch->jpeg = tjInitDecompress())) {
        free(scratch);
        scratch = NULL;
    }
    return scratch;
}

void vitds_scratch_free(void *opaque) {
    Scratch *scratch = opaque;
    if (!scratch) return;
    tjDestroy(scratch->jpeg);
    Buffer *buffers[] = {&scratch->picture, &scratch->rows, &scratch->strips, &scratch->columns, &scratch->planes, &scratch->spare};
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
    int64_t d = 2 * (int64_t)(length > resized ? length : resized), reach = filter == BICUBIC ? 2 * d : d, widest = (reach + resized - 1) / resized;
    int taps = widest < length ? (int)widest : length, shift = filter == BILINEAR && taps <= NARROW_TAPS ? 8 : 14;
    free(table->first);
    *table = (Taps){0};
    int32_t *first = malloc((size_t)resized * (sizeof(int32_t) + taps * sizeof(int16_t)));
    if (!first) return 0;
    *table = (Taps){length, resized, filter, taps, shift, first, (int16_t *)(first + resized)};
    for (int i = 0; i < resized; i++) {
        int64_t centre = (2 * (int64_t)i + 1) * length, before = centre - reach - resized;
        int64_t x = before < 0 ? 0 : before / (2 * (int64_t)resized) + 1, total = 0, sum = 0;
        first[i] = (int32_t)(x = x < length - taps ? x : length - taps);
        for (int k = 0; k < taps; k++) total += filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
        /* Rounding the running sum, not each weight, makes them add up to exactly 2^shift. */
        for (int k = 0, done = 0; k < taps; k++) {
            sum += filter_at(filter, (2 * (x + k) + 1) * resized - centre, d);
            int now = (int)floor((double)sum / (double)total * (1 << shift) + 0.5);
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
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));   /* aligned(1): may stand anywhere in memory */
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint16_t u16x16r __attribute__((vector_size(32)));

INLINE uint8_t clamp(int value) { return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value); }

/* 32 * WIDE neighbouring bytes of the sum below. A vector of 16-bit lanes is two rows of bytes, the even and the odd ones: they
 * are told apart by a mask and a shift, summed each in its own register, and put together again without any shuffle. */
INLINE void sum_narrow(uint8_t *out, const uint8_t *in, ptrdiff_t stride, const int16_t *weight, int taps, const int WIDE) {
    u16x16 even[WIDE], odd[WIDE];
    for (int j = 0; j < WIDE; j++) even[j] = (u16x16){0} + 128 + (128 << 8), odd[j] = (u16x16){0} + 128;
    for (int k = 0; k < taps; k++, in += stride)
        for (int j = 0; j < WIDE; j++) {
            u16x16 pair = *(const u16x16 *)(in + 32 * j);
            even[j] += pair * (uint16_t)weight[k];
            odd[j] += (pair >> 8) * (uint16_t)weight[k];
        }
    for (int j = 0; j < WIDE; j++) *(u16x16 *)(out + 32 * j) = ((even[j] - (odd[j] << 8)) >> 8) | (odd[j] & 0xff00);
}

INLINE void sum_wide(uint8_t *out, const uint8_t *in, ptrdiff_t stride, const int16_t *weight, int taps) {
    i32x16 sum = (i32x16){0} + (1 << 13);
    for (int k = 0; k < taps; k++, in += stride)
        sum += __builtin_convertvector(__builtin_convertvector(*(const u8x16 *)in, u16x16), i32x16) * weight[k];
    sum = (sum >> 14) & ~(sum >> 31);                       /* below 0: 0 */
    sum = (sum | (sum > 255)) & 255;                        /* above 255: 255; a comparison gives -1 where it holds */
    *(u8x16 *)out = __builtin_convertvector(__builtin_convertvector(sum, u16x16), u8x16);
}

/* out[i] = sum over k of weight[k] * in[k * stride + i], rounded, for i < n. The last vector of a row overlaps the one before
 * it, so that nothing outside the row is touched. shift 8: weights are >= 0 and sum to 256, so 255 * 256 + 128 fits 16 bits. */
INLINE void weighted_sum(uint8_t *restrict out, const uint8_t *restrict in, ptrdiff_t stride, int n, const int16_t *weight, int taps, int shift) {
    int i = 0;
    if (n < 32) {
        for (; i < n; i++) {
            int32_t sum = 1 << (shift - 1);
            for (int k = 0; k < taps; k++) sum += in[k * stride + i] * weight[k];
            out[i] = clamp(sum >> shift);
        }
    } else if (shift == 8) {
        for (; i + 96 <= n; i += 96) sum_narrow(out + i, in + i, stride, weight, taps, 3);
        for (; i + 32 <= n; i += 32) sum_narrow(out + i, in + i, stride, weight, taps, 1);
        if (i < n) sum_narrow(out + n - 32, in + n - 32, stride, weight, taps, 1);
    } else {
        for (; i + 16 <= n; i += 16) sum_wide(out + i, in + i, stride, weight, taps);
        if (i < n) sum_wide(out + n - 16, in + n - 16, stride, weight, taps);
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

/* One view to be made. Its planes are side x side bytes without gaps between rows, `apart` bytes from each other. */
typedef struct {
    const uint8_t *picture;                     /* (H, W, 3) */
    ptrdiff_t stride;                           /* 3 * W */
    const ViewPlan *plan;
    const Taps *down, *across;                  /* vertical and horizontal taps */
    int side;
    ptrdiff_t apart;
    Scratch *scratch;
} View;

INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }
INLINE ptrdiff_t plane_bytes(int side) { return (ptrdiff_t)round_up(side, 32) * side + 16; }      /* room for whole 16 x 16 blocks */
INLINE uint8_t *plane(const View *view, int channel) { return view->scratch->planes.bytes + channel * view->apart; }

/* Box -> planes, 16 output rows at a time: vertical sums over interleaved source rows, transposed into strips (one column
 * of 16 pixels, three channels, 48 bytes), horizontal sums over strips, transposed back into planes. A flip only changes
 * the place where an output column is put. */
INLINE void resample(const View *view, int flip) {
    const ViewPlan *plan = view->plan;
    const Taps *down = view->down, *across = view->across;
    int side = view->side, last = plan->out_left + side - 1;
    int from = across->first[plan->out_left], bytes = 3 * (across->first[last] + across->taps - from), padded = round_up(bytes, 16);
    uint8_t *rows = view->scratch->rows.bytes, *strips = view->scratch->strips.bytes, *columns = view->scratch->columns.bytes;
    const uint8_t *box = view->picture + plan->top * view->stride + 3 * ((ptrdiff_t)plan->left + from);
    for (int y = 0; y < side; y += 32) {
        int deep = side - y > 16 ? 32 : 16, strip = 3 * deep;
        for (int r = 0; r < deep && y + r < side; r++) {
            int i = plan->out_top + y + r;
            weighted_sum(rows + (ptrdiff_t)r * padded, box + down->first[i] * view->stride, view->stride, bytes,
                         down->weight + (ptrdiff_t)i * down->taps, down->taps, down->shift);
        }
        transpose(strips, deep, rows, padded, deep, bytes);
        for (int x = 0; x < side; x++) {
            int i = plan->out_left + x;
            weighted_sum(columns + strip * (flip ? side - 1 - x : x), strips + strip * (ptrdiff_t)(across->first[i] - from), strip, strip,
                         across->weight + (ptrdiff_t)i * across->taps, across->taps, across->shift);
        }
        for (int c = 0; c < 3; c++) transpose(plane(view, c) + y * side, side, columns + deep * c, strip, side, deep);
    }
}

/* The same code for three kinds of processor: `flatten` compiles everything it calls into it, for its registers. */
INLINE void make_view(const View *view, uint8_t *out) {
    size_t pixels = (size_t)view->side * view->side;
    resample(view, view->plan->flip);
    for (int c = 0; c < 3; c++) memcpy(out + c * pixels, plane(view, c), pixels);
}

static void view_any(const View *view, uint8_t *out) { make_view(view, out); }

#if defined(__x86_64__) && !defined(VITDS_PLAIN)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void view_512(const View *view, uint8_t *out) { make_view(view, out); }
__attribute__((target("avx2"))) static void view_256(const View *view, uint8_t *out) { make_view(view, out); }

static void view_best(const View *view, uint8_t *out) {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) view_512(view, out);
    else if (__builtin_cpu_supports("avx2")) view_256(view, out);
    else view_any(view, out);
}
#else
static void view_best(const View *view, uint8_t *out) { view_any(view, out); }
#endif

/* ------------------------------------------------------------------------------------------------------------- the doors */

/* The picture as RGB rows: raw storage where it lies, a JPEG decoded into the scratch. Returns 0 or an error. */
static int open_picture(const uint8_t *source, int64_t source_bytes, int storage, int height, int width, Scratch *scratch,
                        const uint8_t **picture) {
    if (!source || height < 1 || width < 1 || height > MAX_LENGTH || width > MAX_LENGTH) return BAD_ARGUMENT;
    int64_t size = (int64_t)height * width * 3;
    if (storage == RAW) {
        *picture = source;
        return source_bytes == size ? 0 : BAD_LENGTH;
    }
    if (storage != JPEG) return BAD_ARGUMENT;
    if (source_bytes < 1) return DAMAGED;
    unsigned long bytes = (unsigned long)source_bytes;
    int jpeg_width, jpeg_height, sampling, space;
    if (tjDecompressHeader3(scratch->jpeg, source, bytes, &jpeg_width, &jpeg_height, &sampling, &space)) return DAMAGED;
    if (space == TJCS_CMYK || space == TJCS_YCCK) return BAD_KIND;
    if (jpeg_width != width || jpeg_height != height) return BAD_SIZE;
    if (!reserve(&scratch->picture, (size_t)size)) return NO_MEMORY;
    *picture = scratch->picture.bytes;
    /* Warnings return -1 too: a file that ends early would otherwise come out grey from there on. */
    return tjDecompress2(scratch->jpeg, source, bytes, scratch->picture.bytes, width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT) ? DAMAGED : 0;
}

static int within(float value, float low, float high) { return value >= low && value <= high; }     /* false for NaN */

static int check_box(const ViewPlan *plan, int height, int width, int side) {
    int64_t bottom = (int64_t)plan->top + plan->height, right = (int64_t)plan->left + plan->width;
    int64_t out_bottom = (int64_t)plan->out_top + side, out_right = (int64_t)plan->out_left + side;
    int box = plan->top >= 0 && plan->left >= 0 && plan->height > 0 && plan->width > 0 && bottom <= height && right <= width;
    int window = plan->out_top >= 0 && plan->out_left >= 0 && out_bottom <= plan->resized_height && out_right <= plan->resized_width;
    return box && window && plan->resized_height <= MAX_LENGTH && plan->resized_width <= MAX_LENGTH ? 0 : BAD_BOX;
}

static int check_numbers(const ViewPlan *plan) {
    int good = (plan->filter == BILINEAR || plan->filter == BICUBIC) && (plan->flip | 1) == 1 && (plan->grey | 1) == 1;
    good = good && within(plan->brightness, 0, 3) && within(plan->contrast, 0, 3) && within(plan->saturation, 0, 3);
    good = good && within(plan->hue, -0.5f, 0.5f) && within(plan->blur_sigma, 0, MAX_RADIUS / 3.0f);
    for (int i = 0; i < 4; i++) good = good && plan->colour_order[i] <= HUE;
    return good ? 0 : BAD_PLAN;
}

static int cut_view(const uint8_t *picture, int height, int width, const ViewPlan *plan, int side, Scratch *scratch, uint8_t *out) {
    int error = check_box(plan, height, width, side);
    if (!error) error = check_numbers(plan);
    if (error) return error;
    size_t padded = (size_t)round_up(3 * plan->width, 16), planes = 3 * (size_t)plane_bytes(side);
    View view = {picture, 3 * (ptrdiff_t)width, plan, find_taps(scratch->down, plan->height, plan->resized_height, plan->filter),
                 find_taps(scratch->across, plan->width, plan->resized_width, plan->filter), side, plane_bytes(side), scratch};
    if (!view.down || !view.across || !reserve(&scratch->rows, 32 * padded) || !reserve(&scratch->strips, 32 * padded) ||
        !reserve(&scratch->columns, 96 * (size_t)round_up(side, 16)) || !reserve(&scratch->planes, planes))
        return NO_MEMORY;
    view_best(&view, out);
    return 0;
}

/* One picture, all its views: out is (views, 3, side, side). storage: 0 raw RGB of height * width * 3 bytes, 1 JPEG.
 * Returns 0 or an error code (see vitds_error); after an error the content of out is undefined. */
int vitds_views(const uint8_t *source, int64_t source_bytes, int32_t storage, int32_t height, int32_t width, const ViewPlan *plans,
                int32_t views, int32_t side, uint8_t *out, int64_t out_bytes, void *opaque) {
    Scratch *scratch = opaque;
    if (!plans || !out || !scratch || views < 1 || side < 1 || side > MAX_SIDE) return BAD_ARGUMENT;
    int64_t view_bytes = 3 * (int64_t)side * side;
    if (out_bytes != views * view_bytes) return BAD_LENGTH;
    const uint8_t *picture;
    int error = open_picture(source, source_bytes, storage, height, width, scratch, &picture);
    for (int v = 0; v < views && !error; v++) error = cut_view(picture, height, width, plans + v, side, scratch, out + v * view_bytes);
    return error;
}

/* Samples first <= b < last of a batch, so that callers can share one among threads: out is (samples, views, 3, side, side), plans
 * (samples, views), everything else (samples,). status[b] becomes 0 or the sample's error: a damaged one never stops the others.
 * Returns an error only where the batch itself is wrong; sources are addresses. */
int vitds_batch(const int64_t *sources, const int64_t *source_bytes, const int32_t *storages, const int32_t *heights, const int32_t *widths,
                const ViewPlan *plans, int32_t samples, int32_t views, int32_t side, uint8_t *out, int64_t out_bytes, int32_t *status,
                int32_t first, int32_t last, void *scratch) {
    if (!sources || !source_bytes || !storages || !heights || !widths || !plans || !out || !status || !scratch) return BAD_ARGUMENT;
    if (views < 1 || side < 1 || side > MAX_SIDE || first < 0 || first > last || last > samples) return BAD_ARGUMENT;
    int64_t sample_bytes = views * 3 * (int64_t)side * side;
    if (out_bytes != samples * sample_bytes) return BAD_LENGTH;
    for (int64_t b = first; b < last; b++)
        status[b] = vitds_views((const uint8_t *)(intptr_t)sources[b], source_bytes[b], storages[b], heights[b], widths[b],
                                plans + b * views, views, side, out + b * sample_bytes, sample_bytes, scratch);
    return 0;
}

/* The whole picture as (height, width, 3). */
int vitds_decode(const uint8_t *source, int64_t source_bytes, int32_t storage, int32_t height, int32_t width, uint8_t *out,
                 int64_t out_bytes, void *scratch) {
    if (!out || !scratch) return BAD_ARGUMENT;
    const uint8_t *picture;
    int error = open_picture(source, source_bytes, storage, height, width, scratch, &picture);
    if (!error && out_bytes != (int64_t)height * width * 3) error = BAD_LENGTH;
    if (!error) memcpy(out, picture, (size_t)out_bytes);
    return error;
}
