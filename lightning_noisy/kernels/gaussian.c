// Adds the numbers of gaussian.h to float32 vectors in one pass, or writes them.

#include "gaussian.h"
#include "threads.h"

#include <stdatomic.h>
#include <stddef.h>

enum { FEW = 8, PART = 1 << 15 };

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

static void take_parts(void *argument)
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
            return;
    }
}

// For each run i, add count[i] numbers of the key (first[i], second), from address start[i] on and times std, to the
// floats at data[i]; skip runs whose data[i] is 0.
void add_gaussian(int64_t runs, const int64_t *data, const int64_t *first, const int64_t *start, const int64_t *count,
                  int64_t second, float std, int threads)
{
    struct work work = {runs, data, first, start, count, (uint64_t)second, std, 0};
    in_parallel(take_parts, &work, threads);
}
