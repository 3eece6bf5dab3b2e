/* The interface of pixels.c: the record that says how a view is cut, and the functions that other code calls.
 *
 * Return values, here and in all files of the kernel: what can fail returns 0, or one of the negative error
 * codes below. What answers a question returns bool. Only vitds_scratch_new returns an address.
 */
#ifndef VITDS_PIXELS_H
#define VITDS_PIXELS_H

#include <stdint.h>

typedef struct {
    int32_t top, left, height, width;           /* the source box, in pixels, inside the picture */
    int32_t resized_height, resized_width;      /* the whole box is resized to this */
    int32_t out_top, out_left;                  /* and this side x side window of the result is kept */
    int32_t filter;                             /* BILINEAR or BICUBIC, both antialiased */
    int32_t flip;                               /* 1: left and right change places */
    uint8_t colour_order[4];                    /* each NO_COLOUR or BRIGHTNESS .. HUE, in this order */
    float brightness, contrast, saturation;     /* factors, 0 .. 3; 1 changes nothing */
    float hue;                                  /* shift in turns, -0.5 .. 0.5 */
    int32_t grey;                               /* 1: greyscale, after colour */
    float blur_sigma;                           /* in pixels of the view; 0: none */
    int32_t solarise;                           /* 1: levels from 128 on become 255 - level, after blur */
    int32_t policy_op[2];                       /* NO_POLICY or INVERT .. POLICY_BRIGHTNESS, after solarise */
    float policy_value[2];                      /* degrees, share of the side, factor, bits, level, pixels */
    float cutout_centre[2];                     /* y, x as fractions of the side, for both operations */
} ViewSpec;
_Static_assert(sizeof(ViewSpec) == 96, "ViewSpec must match VIEW_SPEC in views.py");

/* views.py has the same numbers in the same orders. */
enum { JPEG, RAW };                             /* how a picture is stored: FFCV's numbers */
enum { BILINEAR, BICUBIC };
enum { NO_COLOUR, BRIGHTNESS, CONTRAST, SATURATION, HUE, COLOUR_OPS };
enum {
    NO_POLICY, INVERT, CUTOUT, SHARPNESS, AUTOCONTRAST, POSTERIZE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y,
    ROTATE, EQUALIZE, POLICY_CONTRAST, POLICY_COLOUR, SOLARIZE, POLICY_BRIGHTNESS, POLICY_OPS
};
enum {
    BAD_ARGUMENT = -1, BAD_LENGTH = -2, DAMAGED = -3, BAD_SIZE = -4, BAD_KIND = -5, BAD_BOX = -6,
    BAD_SPEC = -7, NO_MEMORY = -8
};

/* What an error code means. */
const char *vitds_error(int code);

/* What a thread works in, for one call at a time. NULL where memory is out. */
void *vitds_scratch_new(void);
void vitds_scratch_free(void *scratch);

/* The views of a batch: out is (samples, views, 3, side, side), specs (samples, views), everything else
 * (samples,); sources are addresses, storages JPEG, or RAW: RGB of height * width * 3 bytes. status[b]
 * becomes 0 or the sample's error, after which its part of out is undefined: a damaged one never stops the
 * others. Returns an error only where the batch itself is wrong. */
int vitds_views(const int64_t *sources, const int64_t *source_bytes, const int32_t *storages,
                const int32_t *heights, const int32_t *widths, const ViewSpec *specs, int32_t samples,
                int32_t views, int32_t side, uint8_t *out, int64_t out_bytes, int32_t *status,
                void *scratch);

/* A whole picture as (height, width, 3). */
int vitds_decode(const uint8_t *source, int64_t source_bytes, int32_t storage, int32_t height, int32_t width,
                 uint8_t *out, int64_t out_bytes, void *scratch);

#endif
