// Noise on the output of a clipped line, NAN and NAH: values, slopes, and derivatives by p, for noisy.py.
//
// The inner loops have no branches, so that the compiler vectorizes them.

#include "functions.h"
#include "gaussian.h"
#include "threads.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 64, WIDE = 512, FEW = 16, MOST_PARTS = 1024, PART = 32 * WIDE };

struct line {
    float slope, offset, lower, upper, alpha, level;  // level: in place of the noise, where there is none
    int32_t half;                                     // whether the noise is |noise|
};

// Some elements next to each other, and what is asked of them; by_p gets sums added.
struct some {
    const float *x, *noise, *p, *c, *gradient;
    float *value, *slope, *by_p;
    int64_t count;
};

INLINE float noise_of(const float *noise, int64_t j, struct line line)
{
    float value = noise ? noise[j] : line.level;
    return line.half ? fabsf(value) : value;
}

// Most gates are within the bounds, where there is no noise: whole chunks of them are done without a sigmoid.
static inline int saturates(const float *restrict x, int64_t count, struct line line)
{
    int32_t outside = 0;
    for (int64_t j = 0; j < count; j++) {
        float u = line.slope * x[j] + line.offset;
        outside |= !((u >= line.lower) & (u <= line.upper));
    }
    return outside;
}

static inline void within(const struct some *s, struct line line)
{
    if (s->value)
        for (int64_t j = 0; j < s->count; j++) {
            float u = line.slope * s->x[j] + line.offset;
            s->value[j] = line.alpha * u + (1.0f - line.alpha) * u;
        }
    if (s->slope)
        for (int64_t j = 0; j < s->count; j++)
            s->slope[j] = s->gradient ? line.slope * s->gradient[j] : line.slope;
}

// of_all: whether p and c are those of all elements.
INLINE void add_values(const struct some *s, struct line line, int of_all, const float *restrict x,
                       const float *restrict noise, const float *restrict p, const float *restrict c,
                       float *restrict value)
{
    float away = line.alpha <= 1.0f ? -1.0f : 1.0f, beside = 1.0f - line.alpha, first_p = *p, first_c = *c;
    for (int64_t j = 0; j < s->count; j++) {
        float u = line.slope * x[j] + line.offset, h = clamped(u, line.lower, line.upper);
        float sigma = centred_sigmoid((of_all ? first_p : p[j]) * (h - u)), direction = x[j] >= 0.0f ? away : -away;
        sigma = (of_all ? first_c : c[j]) * (sigma * sigma);
        value[j] = line.alpha * h + beside * u + direction * sigma * noise_of(noise, j, line);
    }
}

INLINE void add_slopes(const struct some *s, struct line line, int of_all, const float *restrict x,
                       const float *restrict noise, const float *restrict p, const float *restrict c,
                       const float *restrict gradient, float *restrict slope, float *restrict by_p)
{
    float away = line.alpha <= 1.0f ? -1.0f : 1.0f, beside = 1.0f - line.alpha, first_p = *p, first_c = *c;
    for (int64_t j = 0; j < s->count; j++) {
        float u = line.slope * x[j] + line.offset, delta = clamped(u, line.lower, line.upper) - u;
        float own_p = of_all ? first_p : p[j], own_c = of_all ? first_c : c[j];
        float s = centred_sigmoid(own_p * delta), direction = x[j] >= 0.0f ? away : -away;
        float by_noise = direction * own_c * noise_of(noise, j, line) * 2.0f * s * (0.25f - s * s);
        int32_t inside = (u >= line.lower) & (u <= line.upper);
        float by_x = line.slope * (inside ? 1.0f : beside - by_noise * own_p);
        if (slope)
            slope[j] = gradient ? gradient[j] * by_x : by_x;
        if (by_p)
            by_p[j] += gradient[j] * (by_noise * delta);
    }
}

// What is asked for, with noise or the level. Those that aren't are constants, so that each loop is as short as it can be.
INLINE void saturated(const struct some *s, struct line line, int of_all)
{
    if (s->value && s->noise)
        add_values(s, line, of_all, s->x, s->noise, s->p, s->c, s->value);
    else if (s->value)
        add_values(s, line, of_all, s->x, NULL, s->p, s->c, s->value);
    if (s->slope && s->by_p)
        add_slopes(s, line, of_all, s->x, s->noise, s->p, s->c, s->gradient, s->slope, s->by_p);
    else if (s->slope && s->gradient)
        add_slopes(s, line, of_all, s->x, s->noise, s->p, s->c, s->gradient, s->slope, NULL);
    else if (s->slope)
        add_slopes(s, line, of_all, s->x, s->noise, s->p, s->c, NULL, s->slope, NULL);
    else if (s->by_p)
        add_slopes(s, line, of_all, s->x, s->noise, s->p, s->c, s->gradient, NULL, s->by_p);
}

static void columns_saturated(const struct some *s, struct line line)
{
    saturated(s, line, 0);
}

static void row_saturated(const struct some *s, struct line line)
{
    saturated(s, line, 1);
}

struct columns {
    const float *x, *noise, *p, *c, *gradient;
    float *value, *slope, *by_p;
    int64_t rows, blocks, columns, x_stride, noise_stride;
    struct line line;
    int64_t part;  // rows at once
    atomic_int_fast64_t next;
};

static void take_some_rows(const struct columns *w, int64_t first, int64_t last, float *by_p)
{
    int64_t row = w->blocks * w->columns;
    for (int64_t i = first; i < last; i++)
        for (int64_t block = 0; block < w->blocks; block++)
            for (int64_t start = 0; start < w->columns; start += CHUNK) {
                int64_t column = block * w->columns + start, element = i * row + column;
                struct some some = {
                    .x = w->x + i * w->x_stride + column, .p = w->p + column, .c = w->c + column,
                    .noise = w->noise ? w->noise + block * w->noise_stride + i * w->columns + start : NULL,
                    .gradient = w->gradient ? w->gradient + element : NULL,
                    .value = w->value ? w->value + element : NULL, .slope = w->slope ? w->slope + element : NULL,
                    .by_p = by_p ? by_p + column : NULL,
                    .count = w->columns - start < CHUNK ? w->columns - start : CHUNK,
                };
                if (saturates(some.x, some.count, w->line))
                    columns_saturated(&some, w->line);
                else
                    within(&some, w->line);
            }
}

static void take_rows(void *argument)
{
    struct columns *w = argument;
    int64_t row = w->blocks * w->columns;
    for (int64_t part; part = atomic_fetch_add(&w->next, 1), part * w->part < w->rows;) {
        int64_t first = part * w->part, last = first + w->part < w->rows ? first + w->part : w->rows;
        take_some_rows(w, first, last, w->by_p ? w->by_p + part * row : NULL);
    }
}

// A p and a c for each column. x has the shape (rows, blocks * columns), its rows x_stride apart. The noise, which may be
// NULL, has the shape (blocks, rows, columns), with its blocks noise_stride apart; p and c (blocks * columns,); all else the
// shape of x. Written are what isn't NULL of the values, the slopes (times the gradient, if there is one), and by_p: for
// each part of the rows one, the sums of the gradient times the derivative by p.
void noisy_columns(const float *x, const float *noise, const float *p, const float *c, const float *gradient, float *value,
                   float *slope, float *by_p, int64_t rows, int64_t blocks, int64_t columns, int64_t x_stride,
                   int64_t noise_stride, const struct line *line, int64_t part, int threads)
{
    struct columns w = {
        x, noise, p, c, gradient, value, slope, by_p, rows, blocks, columns, x_stride, noise_stride, *line, part, 0,
    };
    in_parallel(take_rows, &w, threads);
}

struct elements {
    const float *x, *p, *c, *gradient;
    float *value, *slope;
    const uint64_t *key;
    int64_t count, part, inner, units;
    struct line line;
    double *sums;  // of the derivatives by p: of each part, if there is one unit
    float *by_p;
    atomic_int_fast64_t next;
};

// Elements start..stop, in a row, with the same p; returns the derivative by p.
static double take_row(const struct elements *w, int64_t start, int64_t stop, int64_t unit)
{
    float noise[WIDE + 2 * PAIRS], by_p[WIDE] = {0};
    double total = 0.0;
    for (int64_t n; n = stop - start < WIDE ? stop - start : WIDE, n > 0; start += n) {
        struct some some = {
            .x = w->x + start, .p = w->p + unit, .c = w->c, .gradient = w->gradient ? w->gradient + start : NULL,
            .value = w->value ? w->value + start : NULL, .slope = w->slope ? w->slope + start : NULL,
            .by_p = w->by_p ? by_p : NULL, .count = n,
        };
        if (!saturates(some.x, n, w->line)) {
            within(&some, w->line);
            continue;
        }
        if (w->key) {  // the number of an element is that of its index
            if (n < 2 * FEW)
                draw(FEW, w->key[0] + (uint64_t)(start / 2) * WEYL, w->key[1], 1.0f, noise);
            else
                for (int64_t i = 0; i < n + start % 2; i += 2 * PAIRS)
                    draw(PAIRS, w->key[0] + (uint64_t)((start + i) / 2) * WEYL, w->key[1], 1.0f, noise + i);
            some.noise = noise + start % 2;
        }
        row_saturated(&some, w->line);
    }
    for (int j = 0; j < WIDE && w->by_p; j++)
        total += by_p[j];
    return total;
}

static void take_elements(void *argument)
{
    struct elements *w = argument;
    for (int64_t part; part = atomic_fetch_add(&w->next, 1), part * w->part < w->count;) {
        if (w->units == 1) {
            int64_t start = part * w->part, stop = start + w->part < w->count ? start + w->part : w->count;
            w->sums[part] = take_row(w, start, stop, 0);
            continue;
        }
        if (part >= w->units)
            return;
        double sum = 0.0;
        for (int64_t start = part * w->inner; start < w->count; start += w->units * w->inner)
            sum += take_row(w, start, start + w->inner, part);
        if (w->by_p)
            w->by_p[part] = (float)sum;
    }
}

// A p for each unit, that of the elements of shape (samples, units, inner), or one for all; one c. Element i gets the number
// of the key (first, second) at i; if it isn't noisy, the level. Written are what isn't NULL of the values, the slopes (times the gradient, if
// there is one), and by_p, the sums of the gradient times the derivative by p.
void noisy_elements(const float *x, const float *p, float c, const float *gradient, float *value, float *slope,
                    float *by_p, int64_t count, int64_t units, int64_t inner, int noisy, uint64_t first,
                    uint64_t second, const struct line *line, int threads)
{
    double sums[MOST_PARTS];
    uint64_t key[2] = {first, second};
    struct elements w = {
        x, p, &c, gradient, value, slope, noisy ? key : NULL, count, units > 1 ? 1 : PART, inner, units, *line, sums, by_p, 0,
    };
    while (units == 1 && w.count > w.part * MOST_PARTS)
        w.part *= 2;
    in_parallel(take_elements, &w, count <= PART ? 1 : threads);
    if (by_p && units == 1) {
        double total = 0.0;
        for (int64_t part = 0; part * w.part < count; part++)
            total += sums[part];
        *by_p = (float)total;
    }
}
