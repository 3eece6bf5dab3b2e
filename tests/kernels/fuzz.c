/* Random pictures, view specs and damaged JPEGs for pixels.c, to be compiled with it under the sanitizers.
 * Every buffer has exactly the length that is passed, so that a byte read or written outside one ends the
 * program. Usage: fuzz CASES SEED JPEG [JPEG ..], each named HEIGHTxWIDTH.jpg. Prints how often each result
 * came: made, refused, damaged. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"

static uint64_t state;

/* splitmix64 */
static uint64_t bits(void) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
static int upto(int low, int high) { return low + (int)(bits() % (uint64_t)(high - low + 1)); }
static float real(float low, float high) {
    return low + (high - low) * (float)(bits() >> 40) / (float)(1 << 24);
}
static int length(void) { return upto(0, 9) ? upto(1, 90) : upto(1, 1500); }

/* In range, every number of it. */
static ViewSpec good_spec(int height, int width, int side) {
    /* What the operations' values may be, of those that look at one. */
    static const float low[POLICY_OPS] = {
        [SHEAR_X] = -2, [SHEAR_Y] = -2, [TRANSLATE_X] = -2, [TRANSLATE_Y] = -2, [ROTATE] = -360,
    };
    static const float high[POLICY_OPS] = {
        [CUTOUT] = 60, [SHARPNESS] = 3, [POSTERIZE] = 8, [SHEAR_X] = 2, [SHEAR_Y] = 2, [TRANSLATE_X] = 2,
        [TRANSLATE_Y] = 2, [ROTATE] = 360, [POLICY_CONTRAST] = 3, [POLICY_COLOUR] = 3, [SOLARIZE] = 256,
        [POLICY_BRIGHTNESS] = 3,
    };
    ViewSpec p = {0};
    p.height = upto(1, height);
    p.width = upto(1, width);
    p.top = upto(0, height - p.height);
    p.left = upto(0, width - p.width);
    p.resized_height = side + (upto(0, 2) ? 0 : upto(0, 70));
    p.resized_width = side + (upto(0, 2) ? 0 : upto(0, 70));
    p.out_top = upto(0, p.resized_height - side);
    p.out_left = upto(0, p.resized_width - side);
    p.filter = upto(BILINEAR, BICUBIC);
    p.flip = upto(0, 1);
    for (int i = 0; i < 4; i++) p.colour_order[i] = (uint8_t)upto(NO_COLOUR, HUE);
    p.brightness = real(0, 3);
    p.contrast = real(0, 3);
    p.saturation = real(0, 3);
    p.hue = real(-0.5f, 0.5f);
    p.grey = !upto(0, 4);
    p.blur_sigma = upto(0, 1) ? fminf(real(0, 11), 32 / 3.0f) : 0; /* the largest too */
    p.solarise = !upto(0, 4);
    for (int i = 0; i < 2; i++) {
        p.policy_op[i] = upto(0, 1) ? upto(NO_POLICY, POLICY_BRIGHTNESS) : NO_POLICY;
        p.policy_value[i] = real(low[p.policy_op[i]], high[p.policy_op[i]]);
        p.cutout_centre[i] = real(0, 1);
    }
    return p;
}

/* Some of its 4-byte words replaced: by anything, by an extreme, or by a near miss. */
static void spoil(ViewSpec *spec) {
    static const uint32_t extremes[] = {
        0, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fc00000 /* NaN */, 0x7f800000 /* inf */, 0xff800000,
    };
    for (int count = upto(1, 3); count > 0; count--) {
        uint32_t word, kind = (uint32_t)upto(0, 2);
        uint8_t *at = (uint8_t *)spec + 4 * upto(0, (int)sizeof *spec / 4 - 1);
        memcpy(&word, at, 4);
        word = kind == 0 ? (uint32_t)bits() : kind == 1 ? extremes[upto(0, 6)] : word + (uint32_t)upto(-3, 3);
        memcpy(at, &word, 4);
    }
}

static uint8_t *noise(size_t bytes) {
    uint8_t *p = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) p[i] = (uint8_t)bits();
    return p;
}

/* A copy of a file's bytes, perhaps cut off, perhaps with some bytes changed. */
static uint8_t *damaged(const uint8_t *file, int64_t *bytes) {
    if (!upto(0, 2)) *bytes = upto(0, (int)*bytes);
    uint8_t *copy = malloc((size_t)*bytes + !*bytes);
    memcpy(copy, file, (size_t)*bytes);
    for (int changes = upto(0, 3) * upto(0, 3); changes > 0 && *bytes; changes--)
        copy[upto(0, (int)*bytes - 1)] = (uint8_t)bits();
    return copy;
}

static uint8_t *read_file(const char *path, int64_t *bytes, int *height, int *width) {
    FILE *file = fopen(path, "rb");
    if (!file || sscanf(strrchr(path, '/'), "/%dx%d", height, width) != 2) exit(2);
    uint8_t *data = malloc(1 << 20);
    *bytes = (int64_t)fread(data, 1, 1 << 20, file);
    fclose(file);
    return data;
}

int main(int count, char **argument) {
    int made = 0, refused = 0, broken = 0;
    void *scratch = vitds_scratch_new();
    state = strtoull(argument[2], NULL, 10);
    for (int n = atoi(argument[1]); n > 0; n--) {
        int height = length(), width = length(), side = upto(1, 70), views = upto(1, 2);
        int storage = upto(0, 4) ? RAW : JPEG;
        int64_t bytes = (int64_t)height * width * 3, out_bytes = (int64_t)views * 3 * side * side;
        uint8_t *source;
        if (storage == JPEG) {
            uint8_t *file = read_file(argument[upto(3, count - 1)], &bytes, &height, &width);
            source = damaged(file, &bytes);
            free(file);
        } else {
            source = noise((size_t)bytes);
            bytes -= !upto(0, 40);
        }
        ViewSpec *specs = malloc((size_t)views * sizeof *specs);
        for (int v = 0; v < views; v++) specs[v] = good_spec(height, width, side);
        if (!upto(0, 3)) spoil(&specs[upto(0, views - 1)]);
        uint8_t *out = malloc((size_t)out_bytes);
        int32_t h = height, w = width, kind = storage, status = 1;
        int64_t address = (int64_t)(intptr_t)source;
        int error = vitds_views(&address, &bytes, &kind, &h, &w, specs, 1, views, side, out, out_bytes,
                                &status, scratch);
        if (!error) error = status;
        made += error == 0;
        broken += error && storage == JPEG;
        refused += error && storage == RAW;
        /* A whole picture into a buffer of its size, now and then of another one: that is an error, and so is
         * what was one before. */
        int64_t whole_bytes = (int64_t)h * w * 3 + (upto(0, 9) ? 0 : upto(1, 9));
        uint8_t *whole = malloc((size_t)whole_bytes + !whole_bytes);
        int unsound = vitds_decode(source, bytes, storage, h, w, whole, whole_bytes, scratch);
        if (!error && (unsound != 0) != (whole_bytes != (int64_t)h * w * 3)) exit(4);
        free(whole);
        free(out);
        free(specs);
        free(source);
        if (!upto(0, 200)) {
            vitds_scratch_free(scratch);
            scratch = vitds_scratch_new();
        }
    }
    vitds_scratch_free(scratch);
    printf("made %d refused %d damaged %d\n", made, refused, broken);
    return 0;
}
