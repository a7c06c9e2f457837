// Noise on the output of a clipped line, NAN and NAH: values, slopes, and derivatives by p, for noisy.py.
//
// The inner loops have no branches, so that the compiler vectorizes them.

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MOST_THREADS = 16, CHUNK = 64 };

struct line {
    float slope, offset, lower, upper, alpha, level;  // level: in place of the noise, where there is none
    int32_t half;                                     // whether the noise is |noise|
};

struct work {
    const float *x, *noise, *p, *c, *gradient;
    float *value, *slope, *by_p;
    int64_t rows, blocks, columns, x_stride, noise_stride;
    struct line line;
};

// The sigmoid minus 1/2, to 2 ulp of the sigmoid.
static inline float centred_sigmoid(float t)
{
    t = t < -80.0f ? -80.0f : t > 80.0f ? 80.0f : t;
    float k = t * -1.44269504f + 12582912.0f;  // rounds to an integer in the lower bits
    int32_t bits;
    memcpy(&bits, &k, sizeof bits);
    k -= 12582912.0f;
    float r = (-t - k * 0.693359375f) - k * -2.12194440e-4f;
    float e = 1.98756912e-4f;
    e = e * r + 1.39819994e-3f;
    e = e * r + 8.33345205e-3f;
    e = e * r + 4.16657962e-2f;
    e = e * r + 1.66666657e-1f;
    e = e * r + 5.00000012e-1f;
    e = e * r * r + r + 1.0f;
    uint32_t scale = (uint32_t)(bits + 127) << 23;  // 2^k: the lower bits of the sum hold k
    float power;
    memcpy(&power, &scale, sizeof power);
    return 1.0f / (1.0f + e * power) - 0.5f;
}

static inline float noise_of(const float *noise, int64_t column, struct line line)
{
    float value = noise ? noise[column] : line.level;
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

static inline float clipped(float u, struct line line)
{
    return u < line.lower ? line.lower : u > line.upper ? line.upper : u;
}

static inline void add_values(const float *restrict x, const float *restrict noise, const float *restrict p,
                              const float *restrict c, struct line line, int64_t count, float *restrict value)
{
    float away = line.alpha <= 1.0f ? -1.0f : 1.0f;
    if (!saturates(x, count, line)) {
        for (int64_t j = 0; j < count; j++) {
            float u = line.slope * x[j] + line.offset;
            value[j] = line.alpha * u + (1.0f - line.alpha) * u;
        }
        return;
    }
    for (int64_t j = 0; j < count; j++) {
        float u = line.slope * x[j] + line.offset, h = clipped(u, line);
        float s = centred_sigmoid(p[j] * (h - u)), direction = x[j] >= 0.0f ? away : -away;
        value[j] = line.alpha * h + (1.0f - line.alpha) * u + direction * (c[j] * (s * s)) * noise_of(noise, j, line);
    }
}

static inline void add_slopes(const float *restrict x, const float *restrict noise, const float *restrict p,
                              const float *restrict c, struct line line, int64_t count, float *restrict slope)
{
    float away = line.alpha <= 1.0f ? -1.0f : 1.0f;
    if (!saturates(x, count, line)) {
        for (int64_t j = 0; j < count; j++)
            slope[j] = line.slope;
        return;
    }
    for (int64_t j = 0; j < count; j++) {
        float u = line.slope * x[j] + line.offset, h = clipped(u, line);
        float s = centred_sigmoid(p[j] * (h - u)), direction = x[j] >= 0.0f ? away : -away;
        float by_noise = direction * c[j] * noise_of(noise, j, line) * 2.0f * s * (0.25f - s * s) * p[j];
        float within = (u >= line.lower) & (u <= line.upper) ? 1.0f : 0.0f;
        slope[j] = line.slope * (within + (1.0f - within) * ((1.0f - line.alpha) - by_noise));
    }
}

static inline void add_by_p(const float *restrict x, const float *restrict noise, const float *restrict p,
                            const float *restrict c, struct line line, int64_t count, const float *restrict gradient,
                            float *restrict by_p)
{
    float away = line.alpha <= 1.0f ? -1.0f : 1.0f;
    if (!saturates(x, count, line))
        return;
    for (int64_t j = 0; j < count; j++) {
        float u = line.slope * x[j] + line.offset, delta = clipped(u, line) - u;
        float s = centred_sigmoid(p[j] * delta), direction = x[j] >= 0.0f ? away : -away;
        by_p[j] += gradient[j] * direction * c[j] * noise_of(noise, j, line) * 2.0f * s * (0.25f - s * s) * delta;
    }
}

static void *run(void *argument)
{
    const struct work *w = argument;
    int64_t columns = w->columns;
    for (int64_t i = 0; i < w->rows; i++)
        for (int64_t block = 0; block < w->blocks; block++)
            for (int64_t start = 0; start < columns; start += CHUNK) {
                int64_t count = columns - start < CHUNK ? columns - start : CHUNK;
                int64_t column = block * columns + start, element = i * w->blocks * columns + column;
                const float *x = w->x + i * w->x_stride + column, *p = w->p + column, *c = w->c + column;
                const float *noise = w->noise ? w->noise + block * w->noise_stride + i * columns + start : NULL;
                if (w->value)
                    add_values(x, noise, p, c, w->line, count, w->value + element);
                if (w->slope)
                    add_slopes(x, noise, p, c, w->line, count, w->slope + element);
                if (w->by_p)
                    add_by_p(x, noise, p, c, w->line, count, w->gradient + element, w->by_p + column);
            }
    return NULL;
}

// Of x, shape (rows, blocks * columns), whose rows are x_stride apart. The noise, which may be NULL, has the shape (blocks,
// rows, columns), with its blocks noise_stride apart; p and c (blocks * columns,); all else the shape of x. Written are
// what isn't NULL of the values, the slopes, and by_p: for each thread a row, the sums over the rows of gradient times the
// derivative by p.
void output_noise(const float *x, const float *noise, const float *p, const float *c, const float *gradient, float *value,
                  float *slope, float *by_p, int64_t rows, int64_t blocks, int64_t columns, int64_t x_stride,
                  int64_t noise_stride, const float *line, int half, int threads)
{
    struct work works[MOST_THREADS];
    pthread_t others[MOST_THREADS];
    int running[MOST_THREADS] = {0};
    int64_t row = blocks * columns;
    for (int i = threads - 1; i >= 0; i--) {
        int64_t first = rows / threads * i, last = i == threads - 1 ? rows : rows / threads * (i + 1);
        works[i] = (struct work){
            .x = x + first * x_stride, .noise = noise ? noise + first * columns : NULL, .p = p, .c = c,
            .gradient = gradient ? gradient + first * row : NULL, .value = value ? value + first * row : NULL,
            .slope = slope ? slope + first * row : NULL, .by_p = by_p ? by_p + i * row : NULL,
            .rows = last - first, .blocks = blocks, .columns = columns, .x_stride = x_stride, .noise_stride = noise_stride,
            .line = {line[0], line[1], line[2], line[3], line[4], line[5], half},
        };
        running[i] = i > 0 && !pthread_create(&others[i], NULL, run, &works[i]);
        if (!running[i])
            run(&works[i]);
    }
    for (int i = 1; i < threads; i++)
        if (running[i])
            pthread_join(others[i], NULL);
}
