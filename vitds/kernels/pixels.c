/* Pixels of vitds: one stored picture and a table of view specs in, finished views out.
 *
 *   stored bytes --decode--> (H, W, 3) --resample--> (3, S, S) planes
 *                        --colour, grey, blur, solarise, policy, flip--> out (V, 3, S, S)
 *
 * A ViewSpec (pixels.h) is one row of that table: which box of the picture, how it is resized, and the
 * numbers of everything that follows. All draws were made by the caller; this code knows no seed, no epoch
 * and no setting, and keeps no state but a Scratch, one a thread: a JPEG handle, the decoded picture, tap
 * tables, and one view's planes, which fit the caches.
 *
 * Three ideas carry it; docs/kernels.md derives them with pictures:
 * - Every resize and blur is one primitive, weighted_sum(): a sum of byte rows that lie in memory, in 16-bit
 *   lanes.
 * - Horizontal sums are vertical ones between two transpositions, the other primitive.
 * - Colour is 16-bit fixed point in plain loops, which the compiler turns into vectors.
 * Pixels are integers all the way, so every processor gives the same bytes. Compile with -ffp-contract=off:
 * the few numbers that pass through double (weights, factors, a mean) must not depend on whether the
 * processor has fused multiply-add.
 *
 * The stages stand in headers (resample.h, colour.h, blur.h, policy.h), on view.h and sums.h, so that all is
 * one translation unit: a stage is compiled whole, once for each kind of processor. What decodes and drives
 * them is here. Read it from the end: vitds_views() opens the pictures, cut_view() checks a spec, make_view()
 * runs the stages.
 */
#include "blur.h"
#include "colour.h"
#include "pixels.h"
#include "policy.h"
#include "processor.h"
#include "resample.h"
#include "view.h"

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

/* --------------------------------------------------------------------------------------------- scratch */

/* At least `size` bytes in the buffer, on cache lines of its own; they become 0 when it grows. */
static int reserve(Buffer *buffer, size_t size) {
    if (buffer->size >= size) return 0;
    free(buffer->bytes);
    size = (size + 63) / 64 * 64;
    buffer->bytes = aligned_alloc(64, size);
    buffer->size = buffer->bytes ? size : 0;
    if (!buffer->bytes) return NO_MEMORY;
    memset(buffer->bytes, 0, size);
    return 0;
}

void *vitds_scratch_new(void) { return calloc(1, sizeof(Scratch)); }

void vitds_scratch_free(void *opaque) {
    Scratch *scratch = opaque;
    if (!scratch) return;
    if (scratch->jpeg) tjDestroy(scratch->jpeg);
    free(scratch->picture.bytes);
    free(scratch->rows.bytes);
    free(scratch->strips.bytes);
    free(scratch->columns.bytes);
    free(scratch->middle.bytes);
    free(scratch->planes.bytes);
    free(scratch->spare.bytes);
    for (int i = 0; i < TABLES; i++) {
        free(scratch->down[i].first);
        free(scratch->across[i].first);
    }
    free(scratch);
}

/* What one view needs. The blocks that transpose() writes are whole, so lengths are rounded up. */
static int reserve_view(Scratch *scratch, const ViewSpec *spec, int side) {
    size_t padded = (size_t)round_up(3 * spec->width, 16), margined = (size_t)side + 2 * MAX_RADIUS;
    size_t middle = spec->filter == BICUBIC ? (size_t)plane_bytes(spec->height, side) : 0;
    int error = reserve(&scratch->rows, 32 * padded);
    if (!error) error = reserve(&scratch->strips, 32 * padded);
    if (!error) error = reserve(&scratch->columns, 96 * (size_t)round_up(side, 16));
    if (!error) error = reserve(&scratch->middle, 3 * middle);
    if (!error) error = reserve(&scratch->planes, 3 * (size_t)plane_bytes(side, side));
    if (!error) error = reserve(&scratch->spare, 2 * margined * margined);
    return error;
}

/* ---------------------------------------------------------------------------- a view from end to end */

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

/* A stage for one processor has everything it calls inlined. */
#define STAGE(name)                                                                                        \
    FOR_512 static void name##_512(const View *view) { name(view); }                                       \
    FOR_256 static void name##_256(const View *view) { name(view); }                                       \
    static void name##_any(const View *view) { name(view); }                                               \
    static void run_##name(const View *view) {                                                             \
        int bits = register_bits();                                                                        \
        (bits == 512 ? name##_512 : bits == 256 ? name##_256 : name##_any)(view);                          \
    }
STAGE(resample)
STAGE(recolour)
STAGE(blur)
STAGE(apply_policies)

static void make_view(const View *view, uint8_t *out) {
    const ViewSpec *spec = view->spec;
    /* The output's lines come to the cache while the view is made. */
    for (int i = 0; i < 3 * view->pixels; i += 64) __builtin_prefetch(out + i, 1);
    run_resample(view);
    run_recolour(view);
    if (spec->blur_sigma > 0) run_blur(view);
    if (spec->solarise || spec->policy_op[0] || spec->policy_op[1]) run_apply_policies(view);
    if (spec->flip && view->flip_last) flip_rows(view);
    for (int c = 0; c < 3; c++) memcpy(out + (size_t)c * view->pixels, plane(view, c), view->pixels);
}

/* ----------------------------------------------------------------------------- is a view spec sound? */

static bool within(float value, float low, float high) { return value >= low && value <= high; } /* no NaN */
static bool is_flag(int32_t value) { return value == 0 || value == 1; }

static int check_box(const ViewSpec *spec, const Picture *picture, int side) {
    int64_t bottom = (int64_t)spec->top + spec->height, right = (int64_t)spec->left + spec->width;
    int64_t out_bottom = (int64_t)spec->out_top + side, out_right = (int64_t)spec->out_left + side;
    bool box_begins = spec->top >= 0 && spec->left >= 0 && spec->height > 0 && spec->width > 0;
    bool box_ends = bottom <= picture->height && right <= picture->width;
    bool window_begins = spec->out_top >= 0 && spec->out_left >= 0;
    bool window_ends = out_bottom <= spec->resized_height && out_right <= spec->resized_width;
    bool sized = spec->resized_height <= MAX_LENGTH && spec->resized_width <= MAX_LENGTH;
    return box_begins && box_ends && window_begins && window_ends && sized ? 0 : BAD_BOX;
}

static int check_numbers(const ViewSpec *spec) {
    bool good = spec->filter == BILINEAR || spec->filter == BICUBIC;
    good = good && is_flag(spec->flip) && is_flag(spec->grey) && is_flag(spec->solarise);
    good = good && within(spec->brightness, 0, 3) && within(spec->contrast, 0, 3);
    good = good && within(spec->saturation, 0, 3) && within(spec->hue, -0.5f, 0.5f);
    good = good && within(spec->blur_sigma, 0, MAX_RADIUS / 3.0f);
    for (int i = 0; i < 4; i++) good = good && spec->colour_order[i] < COLOUR_OPS;
    for (int i = 0; i < 2; i++) {
        int op = spec->policy_op[i];
        good = good && op >= 0 && op < POLICY_OPS;
        good = good && within(spec->policy_value[i], policy_range[op].lowest, policy_range[op].highest);
        good = good && within(spec->cutout_centre[i], 0, 1);
    }
    return good ? 0 : BAD_SPEC;
}

/* ----------------------------------------------------------------------------------- from the doors in */

/* A JPEG into scratch->picture. Warnings count as damage: a file that ends early would otherwise come out
 * grey from there on. No row begins at a multiple of 16 bytes: those libjpeg-turbo writes past the caches,
 * and the crops would wait for them. */
static int decode(const uint8_t *source, unsigned long bytes, Scratch *scratch, Picture *picture) {
    tjhandle jpeg = scratch->jpeg;
    int width = 0, height = 0, sampling, space = TJCS_RGB;
    if (tjDecompressHeader3(jpeg, source, bytes, &width, &height, &sampling, &space)) return DAMAGED;
    if (!width) return DAMAGED;
    if (space == TJCS_CMYK || space == TJCS_YCCK) return BAD_KIND;
    if (width != picture->width || height != picture->height) return BAD_SIZE;
    int stride = round_up(3 * width, 16);
    int error = reserve(&scratch->picture, 8 + (size_t)height * stride);
    if (error) return error;
    uint8_t *pixels = scratch->picture.bytes + 8;
    picture->pixels = pixels;
    picture->stride = stride;
    if (tjDecompress2(jpeg, source, bytes, pixels, width, stride, height, TJPF_RGB, TJFLAG_ACCURATEDCT))
        return DAMAGED;
    return 0;
}

/* The picture as RGB rows: raw storage where it lies, a JPEG decoded into the scratch. */
static int open_picture(const uint8_t *source, int64_t source_bytes, int storage, int height, int width,
                        Scratch *scratch, Picture *picture) {
    if (!source || height < 1 || width < 1 || height > MAX_LENGTH || width > MAX_LENGTH) return BAD_ARGUMENT;
    *picture = (Picture){source, 3 * (ptrdiff_t)width, height, width};
    if (storage == RAW) {
        if (source_bytes != height * picture->stride) return BAD_LENGTH;
        /* One sweep through a picture that fits the L2 cache costs less than the waits for its rows later: a
         * tenth of the whole. */
        if (source_bytes <= 1 << 20)
            for (int64_t i = 0; i < source_bytes; i += 64) __builtin_prefetch(source + i);
        return 0;
    }
    if (storage != JPEG) return BAD_ARGUMENT;
    if (source_bytes < 1) return DAMAGED;
    if (!scratch->jpeg) scratch->jpeg = tjInitDecompress();
    if (!scratch->jpeg) return NO_MEMORY;
    int error = decode(source, (unsigned long)source_bytes, scratch, picture);
    if (error) {
        /* After a damaged header libjpeg-turbo's handle may refuse sound pictures. */
        tjDestroy(scratch->jpeg);
        scratch->jpeg = NULL;
    }
    return error;
}

static int cut_view(const Picture *picture, const ViewSpec *spec, int side, Scratch *scratch, uint8_t *out) {
    const Taps *down = NULL, *across = NULL;
    int error = check_box(spec, picture, side);
    if (!error) error = check_numbers(spec);
    if (!error) error = find_taps(scratch->down, spec->height, spec->resized_height, spec->filter, &down);
    if (!error) error = find_taps(scratch->across, spec->width, spec->resized_width, spec->filter, &across);
    if (!error) error = reserve_view(scratch, spec, side);
    if (error) return error;
    View view = {
        .picture = picture,
        .spec = spec,
        .down = down,
        .across = across,
        .scratch = scratch,
        .side = side,
        .pixels = side * side,
        .plane_stride = plane_bytes(side, side),
        .flip_last = is_positional(spec->policy_op[0]) || is_positional(spec->policy_op[1]),
    };
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

int vitds_views(const int64_t *sources, const int64_t *source_bytes, const int32_t *storages,
                const int32_t *heights, const int32_t *widths, const ViewSpec *specs, int32_t samples,
                int32_t views, int32_t side, uint8_t *out, int64_t out_bytes, int32_t *status,
                void *scratch) {
    if (!sources || !source_bytes || !storages || !heights || !widths) return BAD_ARGUMENT;
    if (!specs || !out || !status || !scratch) return BAD_ARGUMENT;
    if (samples < 0 || views < 1 || views > MAX_VIEWS || side < 1 || side > MAX_SIDE) return BAD_ARGUMENT;
    int64_t sample_bytes = (int64_t)views * 3 * side * side;
    if (out_bytes != samples * sample_bytes) return BAD_LENGTH;
    for (int64_t b = 0; b < samples; b++) {
        const uint8_t *source = (const uint8_t *)(intptr_t)sources[b];
        status[b] = cut_picture(source, source_bytes[b], storages[b], heights[b], widths[b],
                                specs + b * views, views, side, out + b * sample_bytes, scratch);
    }
    return 0;
}

int vitds_decode(const uint8_t *source, int64_t source_bytes, int32_t storage, int32_t height, int32_t width,
                 uint8_t *out, int64_t out_bytes, void *scratch) {
    if (!out || !scratch) return BAD_ARGUMENT;
    Picture picture;
    int error = open_picture(source, source_bytes, storage, height, width, scratch, &picture);
    if (error) return error;
    ptrdiff_t row_bytes = 3 * (ptrdiff_t)width;
    if (out_bytes != height * row_bytes) return BAD_LENGTH;
    for (ptrdiff_t y = 0; y < height; y++)
        memcpy(out + y * row_bytes, picture.pixels + y * picture.stride, (size_t)row_bytes);
    return 0;
}
