// Adds the numbers of gaussian.py to float32 vectors in one pass, bit for bit as its torch operations compute them.
//
// Uses only operations that IEEE 754 rounds correctly, each rounded separately: compile with -ffp-contract=off.

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { FEW = 8, PAIRS = 64, PART = 1 << 15, MOST_THREADS = 64 };

static const uint64_t WEYL = 0x9E3779B97F4A7C15, FACTOR = 0xD6E8FEB86659FD93;

static uint64_t upper(uint64_t bits)
{
    return (uint64_t)((int64_t)bits >> 32);  // arithmetic shift
}

// Write the numbers of at most PAIRS pairs, times std. The loops have no branches and, after inlining, constant lengths,
// so the compiler vectorizes them.
static inline void draw(int pairs, uint64_t counter, uint64_t second, float std, float *restrict out)
{
    uint32_t low[PAIRS], high[PAIRS];
    for (int i = 0; i < pairs; i++) {
        uint64_t bits = counter + (uint64_t)i * WEYL;
        bits = (bits ^ upper(bits) ^ second) * FACTOR;
        bits = (bits ^ upper(bits)) * FACTOR;
        bits += upper(bits);
        low[i] = (uint32_t)bits;
        high[i] = (uint32_t)(bits >> 32);
    }
    for (int i = 0; i < pairs; i++) {
        float u = (float)(int32_t)(low[i] >> 1) * 0x1p-31f + 0x1p-32f;
        int32_t bits, exponent;
        memcpy(&bits, &u, sizeof bits);
        exponent = (bits - 0x3F3504F3) >> 23;
        bits -= (int32_t)((uint32_t)exponent << 23);
        float m;
        memcpy(&m, &bits, sizeof m);
        float f = m - 1.0f, f2 = f * f;
        float p = -0.178343669f;
        p = p * f + 0.287004471f;
        p = p * f + -0.297544450f;
        p = p * f + 0.331312805f;
        p = p * f + -0.399307430f;
        p = p * f + 0.500034928f;
        p = p * f + -0.666677177f;
        float square = p * (f2 * f) + f2 + f * -2.0f + (float)exponent * -1.38629436f;
        float radius = sqrtf(square) * std;

        float t = (float)(int32_t)high[i] * 0x1p-31f, t2 = t * t;
        float s = 0.000149283500f;
        s = s * t2 + -0.00466894731f;
        s = s * t2 + 0.0796861798f;
        s = s * t2 + -0.645962775f;
        s = s * t2 + 1.57079625f;
        s = s * t;
        float c = -0.0000234020771f;
        c = c * t2 + 0.000916733348f;
        c = c * t2 + -0.0208619013f;
        c = c * t2 + 0.253669083f;
        c = c * t2 + -1.23370051f;
        c = c * t2 + 1.0f;
        float twice = s + s;
        out[2 * i] = radius * (1.0f - twice * s);
        out[2 * i + 1] = radius * (twice * c);
    }
}

static void add_run(float *data, uint64_t first, int64_t start, int64_t count, uint64_t second, float std)
{
    float noise[2 * PAIRS];
    while (count > 0) {
        uint64_t counter = first + (uint64_t)(start / 2) * WEYL;
        int64_t skip = start % 2, n = 2 * PAIRS - skip;
        if (n > count)
            n = count;
        if (skip + n <= 2 * FEW)
            draw(FEW, counter, second, std, noise);
        else
            draw(PAIRS, counter, second, std, noise);
        for (int64_t i = 0; i < n; i++)
            data[i] += noise[skip + i];
        data += n;
        start += n;
        count -= n;
    }
}

struct work {
    int64_t runs;
    const int64_t *data, *first, *start, *count;
    uint64_t second;
    float std;
    atomic_int_fast64_t next;  // the first element not yet taken by a thread, counted across all runs
};

static void *take_parts(void *argument)
{
    struct work *work = argument;
    int64_t i = 0, begin = 0;  // a run, and the index of its first element
    for (;;) {
        int64_t from = atomic_fetch_add(&work->next, PART), to = from + PART;
        while (i < work->runs && begin < to) {
            int64_t count = work->count[i], skip = from > begin ? from - begin : 0;
            int64_t stop = to - begin < count ? to - begin : count;
            if (work->data[i] && skip < stop)
                add_run((float *)(intptr_t)work->data[i] + skip, (uint64_t)work->first[i], work->start[i] + skip,
                        stop - skip, work->second, work->std);
            if (to < begin + count)
                break;
            begin += count;
            i++;
        }
        if (i == work->runs)
            return NULL;
    }
}

// For each run i, add count[i] numbers of the key (first[i], second), from address start[i] on and times std, to the
// floats at data[i]; skip runs whose data[i] is 0.
void add_gaussian(int64_t runs, const int64_t *data, const int64_t *first, const int64_t *start, const int64_t *count,
                  int64_t second, float std, int threads)
{
    struct work work = {runs, data, first, start, count, (uint64_t)second, std, 0};
    pthread_t others[MOST_THREADS];
    int running = 0;
    while (running < threads - 1 && running < MOST_THREADS &&
           !pthread_create(&others[running], NULL, take_parts, &work))
        running++;
    take_parts(&work);
    while (running--)
        pthread_join(others[running], NULL);
}
