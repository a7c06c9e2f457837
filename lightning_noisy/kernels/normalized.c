// Normalized activations: moments, values and gradients, for normalized.py.
//
// The moments are those of the elements around the mean of their chunk, in single precision, put together in double
// precision: as exact far from zero as near it. Sums are those of fixed parts, so that they don't depend on the threads.

#include "functions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 2048, LANES = 32, PART = 8 * CHUNK, MOST_PARTS = 1024, SUMS = 5 };
enum { FROM_BUFFERS, FOLLOW, POOL, AS_POOLED };  // as in normalized.py: what becomes of the batch's statistics

typedef struct {
    enum kind kind;
    const struct options *options;
    const float *x, *gradient;
    float *out;
    int64_t count, part;           // elements, and how many of them at once
    int64_t columns, step;         // of the sample: rows of contiguous elements, step apart
    float scale, constant, shift;  // the result is scale * y + constant, which is scale * (y - shift)
    double (*sums)[SUMS];          // of each part
    atomic_int_fast64_t next;      // part
} work;

// Calls a function with a constant kind, so that each has loops of its own.
#define FOR_KIND(kind, CALL)                                                                                               \
    switch (kind) {                                                                                                        \
    case CLIP: CALL(CLIP); break;                                                                                          \
    case LEAKY: CALL(LEAKY); break;                                                                                        \
    case SILU: CALL(SILU); break;                                                                                          \
    case GELU: CALL(GELU); break;                                                                                          \
    case GELU_TANH: CALL(GELU_TANH); break;                                                                                \
    case TANH: CALL(TANH); break;                                                                                          \
    case ELU: CALL(ELU); break;                                                                                            \
    case SIGMOID: CALL(SIGMOID); break;                                                                                    \
    }

// sum f(x[i]), in lanes that the compiler keeps in vectors; f uses i.
#define SUM(result, n, term)                                                                                               \
    do {                                                                                                                   \
        float lanes[LANES] = {0};                                                                                          \
        int64_t i = 0;                                                                                                     \
        for (; i + LANES <= (n); i += LANES)                                                                               \
            for (int lane = 0; lane < LANES; lane++) {                                                                     \
                int64_t j = i + lane;                                                                                      \
                lanes[lane] += (term);                                                                                     \
            }                                                                                                              \
        for (int64_t j = i; j < (n); j++)                                                                                  \
            lanes[0] += (term);                                                                                            \
        for (int half = LANES / 2; half; half /= 2)                                                                        \
            for (int lane = 0; lane < half; lane++)                                                                        \
                lanes[lane] += lanes[lane + half];                                                                         \
        (result) = lanes[0];                                                                                               \
    } while (0)

// Not inlined: each function would have copies of its own.
#define SHARED static __attribute__((noinline))

// Adds the sum and the sum of squares to two sums.
SHARED void add_moments(const float *restrict x, int64_t n, double *sums)
{
    float total, square;
    SUM(total, n, x[j]);
    double mean = total / (double)n;
    float origin = (float)mean;
    SUM(square, n, (x[j] - origin) * (x[j] - origin));
    sums[0] += mean * (double)n;
    sums[1] += square + (mean * mean - (mean - origin) * (mean - origin)) * (double)n;
}

SHARED float sum_of_squares(const float *restrict d, int64_t n)
{
    float total;
    SUM(total, n, d[j] * d[j]);
    return total;
}

SHARED float sum_of_products(const float *restrict gradient, const float *restrict y, int64_t n, float shift)
{
    float total;
    SUM(total, n, gradient[j] * (y[j] - shift));
    return total;
}

INLINE void moments_of(enum kind kind, const struct options *options, const float *restrict x, int64_t n, float *restrict y,
                       double *sums)
{
    float d[CHUNK];
    struct options o = *options;
    for (int64_t i = 0; i < n; i++)
        y[i] = value_and_slope(kind, o, x[i], &d[i]);
    add_moments(x, n, sums);
    add_moments(y, n, sums + 2);
    sums[4] += sum_of_squares(d, n);
}

INLINE void values_of(enum kind kind, const struct options *options, const float *restrict x, int64_t n, float scale,
                      float constant, float *restrict out)
{
    struct options o = *options;
    for (int64_t i = 0; i < n; i++) {
        float d;
        out[i] = scale * value_and_slope(kind, o, x[i], &d) + constant;
    }
}

INLINE void gradients_of(enum kind kind, const struct options *options, const float *restrict x, const float *restrict gradient,
                         int64_t n, float scale, float shift, float *restrict out, double *sum)
{
    float y[CHUNK];
    struct options o = *options;
    for (int64_t i = 0; i < n; i++) {
        float d;
        y[i] = value_and_slope(kind, o, x[i], &d);
        out[i] = gradient[i] * (scale * d);
    }
    if (sum)
        *sum += sum_of_products(gradient, y, n, shift);
}

INLINE void slopes_of(enum kind kind, const struct options *options, const float *restrict x, int64_t n, float *restrict out)
{
    struct options o = *options;
    for (int64_t i = 0; i < n; i++)
        value_and_slope(kind, o, x[i], &out[i]);
}

// Elements from..from + n of the sample: in place, or copied.
static const float *sampled(const work *w, int64_t from, int64_t n, float *copies)
{
    if (w->columns == w->step)
        return w->x + from;
    for (int64_t done = 0; done < n;) {
        int64_t row = (from + done) / w->columns, column = (from + done) % w->columns;
        int64_t some = w->columns - column < n - done ? w->columns - column : n - done;
        memcpy(copies + done, w->x + row * w->step + column, (size_t)some * sizeof *copies);
        done += some;
    }
    return copies;
}

// A loop over the chunks of the parts that this thread takes: start and n of a chunk, and the part.
#define CHUNKS(w)                                                                                                          \
    for (int64_t part; (part = atomic_fetch_add(&(w)->next, 1)) * (w)->part < (w)->count;)                                 \
        for (int64_t start = part * (w)->part, stop = least(start + (w)->part, (w)->count), n;                             \
             n = least(CHUNK, stop - start), n > 0; start += n)

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void take_moments(void *argument)
{
    work *w = argument;
    float copies[CHUNK], values[CHUNK];
    CHUNKS(w) {
        const float *x = sampled(w, start, n, copies);
        float *y = w->out ? w->out + start : values;
#define CALL(KIND) moments_of(KIND, w->options, x, n, y, w->sums[part])
        FOR_KIND(w->kind, CALL)
#undef CALL
    }
}

static void take_values(void *argument)
{
    work *w = argument;
    CHUNKS(w) {
#define CALL(KIND) values_of(KIND, w->options, w->x + start, n, w->scale, w->constant, w->out + start)
        FOR_KIND(w->kind, CALL)
#undef CALL
    }
}

static void take_gradients(void *argument)
{
    work *w = argument;
    CHUNKS(w) {
#define CALL(KIND)                                                                                                         \
    gradients_of(KIND, w->options, w->x + start, w->gradient + start, n, w->scale, w->shift, w->out + start,               \
                 w->sums ? w->sums[part] : NULL)
        FOR_KIND(w->kind, CALL)
#undef CALL
    }
}

static void rescale(void *argument)
{
    work *w = argument;
    CHUNKS(w)
        for (int64_t i = start; i < start + n; i++)
            w->out[i] = w->scale * w->out[i] + w->constant;
}

// Parts of equal length, whatever the number of threads.
static void run(void (*task)(void *), work *w, int threads)
{
    w->part = PART;
    while (w->count > w->part * MOST_PARTS)
        w->part *= 2;
    w->next = 0;
    in_parallel(task, w, w->count <= w->part ? 1 : threads);
}

// What becomes of the running statistics: mean, rho and rho'. Returns whether the batch's are to be used.
static int use(const double *batch, float *const *running, int64_t *tracked, int64_t *rejected, const double *options,
               int mode)
{
    double momentum = options[0], lower = options[1], upper = options[2], most_rejections = options[3];
    double smallest = options[5], largest = 3.4028234663852886e38;
    if (!(batch[1] > smallest && batch[2] > smallest && fabs(batch[0]) + batch[1] + batch[2] < largest))
        return 0;
    if (mode != FOLLOW)
        return *tracked == 0;
    int accepted[3] = {1}, all = 1;
    for (int i = 1; i < 3; i++) {
        accepted[i] = lower * *running[i] < batch[i] && batch[i] < upper * *running[i];
        all &= accepted[i];
    }
    int restart = *tracked == 0 || (!all && (double)*rejected >= most_rejections);
    for (int i = 0; i < 3; i++) {
        double old = *running[i];
        if (restart)
            *running[i] = (float)batch[i];
        else if (accepted[i])
            *running[i] = (float)(old + momentum * (batch[i] - old));
    }
    *rejected = restart || all ? 0 : *rejected + 1;
    *tracked += 1;
    return 0;
}

// scale, from the statistics and alpha, whose hyperbolic tangent is curve.
static double scale_of(const double *used, double beta, double curve)
{
    return sqrt((used[1] + used[2]) / (2.0 * used[1] * used[2])) + beta * curve;
}

// The forward pass in evaluation.
void normalized_values(const float *x, float *y, int64_t count, int kind, const struct options *function, double beta,
                       const float *alpha, const float *mean, const float *rho, const float *rho_prime, int threads)
{
    double used[3] = {*mean, *rho, *rho_prime}, scale = scale_of(used, beta, tanh((double)*alpha));
    work w = {
        .kind = (enum kind)kind, .options = function, .x = x, .out = y, .count = count, .scale = (float)scale,
        .constant = (float)(-scale * used[0]),
    };
    run(take_values, &w, threads);
}

// The forward pass. x and y: ``count`` elements in the same order; of these, the statistics are those of rows of ``columns``
// elements, ``step`` apart. options: momentum, L, U, most rejections, beta, smallest usable gain. kept gets the scale, the
// shift and tanh(alpha), for the backward pass. pending (NULL unless mode is POOL) gets the sums added.
void normalized_forward(const float *x, float *y, int64_t count, int64_t columns, int64_t step, int kind,
                        const struct options *function, const double *options, const float *alpha, float *mean, float *rho,
                        float *rho_prime, int64_t *tracked, int64_t *rejected, double *pending, double *kept, int mode,
                        int threads)
{
    double sums[MOST_PARTS][SUMS];
    float *running[3] = {mean, rho, rho_prime};
    double used[3] = {*mean, *rho, *rho_prime};
    work w = {.kind = (enum kind)kind, .options = function, .x = x};
    // Where the values stay in the cache, they are kept until the scale is known; elsewhere they are computed again.
    int twice = mode != FROM_BUFFERS && (columns != step || count > 1 << 17);
    if (mode != FROM_BUFFERS) {
        w.columns = columns, w.step = step, w.sums = sums, w.out = twice ? NULL : y;
        w.count = columns == step ? count : (count + step - 1) / step * columns;
        memset(sums, 0, sizeof(double[SUMS]) * (size_t)least(MOST_PARTS, w.count / PART + 1));
        run(take_moments, &w, threads);
        double total[SUMS] = {0}, n = (double)w.count;
        for (int64_t part = 0; part * w.part < w.count; part++)
            for (int i = 0; i < SUMS; i++)
                total[i] += sums[part][i];
        if (pending && isfinite(total[0] + total[1] + total[2] + total[3] + total[4])) {
            pending[0] += n;
            for (int i = 0; i < SUMS; i++)
                pending[i + 1] += total[i];
        }
        double mean_x = total[0] / n, mean_y = total[2] / n;
        double var_x = total[1] / n - mean_x * mean_x, var_y = total[3] / n - mean_y * mean_y;
        // A smaller variance is rounding: of a constant, or of numbers whose squares are hardly larger than 0.
        int varies = var_x > 1e-11 * mean_x * mean_x && var_x > 1e-36;
        double batch[3] = {mean_y, varies ? var_y / var_x : NAN, total[4] / n};
        if (use(batch, running, tracked, rejected, options, mode))
            memcpy(used, batch, sizeof used);
        else
            for (int i = 0; i < 3; i++)
                used[i] = *running[i];
    }
    double curve = tanh((double)*alpha);
    double scale = scale_of(used, options[4], curve);
    kept[0] = scale, kept[1] = used[0], kept[2] = curve;
    w.out = y, w.count = count, w.scale = (float)scale, w.constant = (float)(-scale * used[0]);
    run(mode == FROM_BUFFERS || twice ? take_values : rescale, &w, threads);
}

// The backward pass: out gets the gradient of x, of_alpha, unless it is NULL, that of alpha.
void normalized_backward(const float *x, const float *gradient, float *out, int64_t count, int kind,
                         const struct options *function, double beta, const double *kept, float *of_alpha, int threads)
{
    double sums[MOST_PARTS][SUMS], total = 0.0;
    work w = {
        .kind = (enum kind)kind, .options = function, .x = x, .gradient = gradient, .out = out, .count = count,
        .scale = (float)kept[0], .shift = (float)kept[1], .sums = of_alpha ? sums : NULL,
    };
    memset(sums, 0, sizeof(double[SUMS]) * (size_t)least(MOST_PARTS, count / PART + 1));
    run(take_gradients, &w, threads);
    if (!of_alpha)
        return;
    for (int64_t part = 0; part * w.part < count; part++)
        total += sums[part][0];
    *of_alpha = (float)(total * beta * (1.0 - kept[2] * kept[2]));
}

// The slopes of a function.
void normalized_slopes(const float *x, float *out, int64_t count, int kind, const struct options *function)
{
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t n = least(CHUNK, count - start);
#define CALL(KIND) slopes_of(KIND, function, x + start, n, out + start)
        FOR_KIND((enum kind)kind, CALL)
#undef CALL
    }
}
