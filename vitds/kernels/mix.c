/* The network's input: uint8 crops in the order (chunk, view, image), each mixed with its partner's, scaled by
 * channel and written as float32 or bfloat16, in one walk.
 *
 * A pixel is level * scale + shift, rounded after each: compile with -ffp-contract=off. Mixup is one fused
 * multiply-add of two such numbers, as torch.lerp makes it. So every processor writes the same bits.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "processor.h"

#define INLINE static inline __attribute__((always_inline))

typedef enum { NONE, CUTMIX, MIXUP } Kind;

typedef struct {
    const uint8_t *crops;                       /* (images, views, 3, side, side), the last three without gaps */
    int64_t image_stride, view_stride;          /* bytes */
    int64_t rows, views, chunk_images, side;
    int64_t kind, is_bf16;
    const int64_t *partner, *box;               /* (rows), (4, rows): top, bottom, left, right */
    const float *lam;                           /* (rows), the share of the own crop, 1/2 or more */
    float scale[3], shift[3];
    void *images;                               /* (rows, 3, side, side) */
} Batch;

INLINE const uint8_t *crop_of(const Batch *b, int64_t row) {
    int64_t image = row % b->chunk_images, view = row / b->chunk_images % b->views;
    int64_t chunk = row / (b->chunk_images * b->views);
    return b->crops + (chunk * b->chunk_images + image) * b->image_stride + view * b->view_stride;
}

INLINE void store(void *out, int is_bf16, int64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    /* To the nearest bfloat16, ties to even; a level is no NaN. */
    if (is_bf16) ((uint16_t *)out)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    else ((float *)out)[i] = value;
}

INLINE void scale_line(void *out, int is_bf16, int64_t first, const uint8_t *in, int64_t n, float scale,
                       float shift) {
    for (int64_t i = 0; i < n; i++) store(out, is_bf16, first + i, in[i] * scale + shift);
}

INLINE void mix_line(void *out, int is_bf16, int64_t first, const uint8_t *own, const uint8_t *other, int64_t n,
                     float scale, float shift, float lam) {
    for (int64_t i = 0; i < n; i++) {
        float mine = own[i] * scale + shift, theirs = other[i] * scale + shift;
        store(out, is_bf16, first + i, fmaf(lam - 1, mine - theirs, mine));
    }
}

INLINE void one_row(const Batch *b, int64_t row, int is_bf16) {
    int64_t side = b->side, pixels = side * side;
    const uint8_t *own = crop_of(b, row), *other = b->kind == NONE ? own : crop_of(b, b->partner[row]);
    int64_t top = 0, bottom = 0, left = 0, right = 0;
    if (b->kind == CUTMIX) {
        const int64_t *edge = b->box + row;
        top = edge[0] < 0 ? 0 : edge[0];
        bottom = edge[b->rows] > side ? side : edge[b->rows];
        left = edge[2 * b->rows] < 0 ? 0 : edge[2 * b->rows];
        right = edge[3 * b->rows] > side ? side : edge[3 * b->rows];
    }
    for (int c = 0; c < 3; c++, own += pixels, other += pixels) {
        int64_t plane = (row * 3 + c) * pixels;
        if (b->kind == MIXUP) {
            mix_line(b->images, is_bf16, plane, own, other, pixels, b->scale[c], b->shift[c], b->lam[row]);
            continue;
        }
        scale_line(b->images, is_bf16, plane, own, pixels, b->scale[c], b->shift[c]);
        /* The box is written a second time, while its lines are still in the cache. */
        for (int64_t y = top; y < bottom; y++)
            scale_line(b->images, is_bf16, plane + y * side + left, other + y * side + left, right - left,
                       b->scale[c], b->shift[c]);
    }
}

typedef void Row(const Batch *b, int64_t row);
#define ROW(name, is_bf16, attributes)                                                                     \
    attributes static void name(const Batch *b, int64_t row) { one_row(b, row, is_bf16); }
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

void vitds_write_images(const Batch *batch, int threads) {
    Row *row = best((int)batch->is_bf16);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < batch->rows; m++) row(batch, m);
}
