// Sums and counts over the elements of a float32 tensor in one pass, for sums.py.
//
// Sums are accumulated in double precision, in lanes, so that the compiler vectorizes the loops.

#include <stddef.h>
#include <stdint.h>

enum { LANES = 32, CHUNK = 2048 };

struct sums {
    double total[LANES], square[LANES];
    int64_t inactive, flat, left, hard;
};

static void add_moments(const float *x, int64_t count, struct sums *sums)
{
    double total[LANES] = {0}, square[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double value = x[i + lane];
            total[lane] += value;
            square[lane] += value * value;
        }
    for (; i < count; i++) {
        double value = x[i];
        total[0] += value;
        square[0] += value * value;
    }
    for (int lane = 0; lane < LANES; lane++) {
        sums->total[lane] += total[lane];
        sums->square[lane] += square[lane];
    }
}

static int32_t count_inactive(const float *x, int64_t count)
{
    int32_t found = 0;
    for (int64_t i = 0; i < count; i++)
        found += x[i] <= 0.0f;
    return found;
}

static void count_slopes(const float *x, const float *side, int64_t count, float small, struct sums *sums)
{
    int32_t flat = 0, left = 0, hard = 0;
    for (int64_t i = 0; i < count; i++) {
        flat += (x[i] < small) & (-x[i] < small);
        hard += x[i] == 0.0f;
    }
    if (side)
        for (int64_t i = 0; i < count; i++)
            left += (x[i] < small) & (-x[i] < small) & (side[i] < 0.0f);
    sums->flat += flat;
    sums->left += left;
    sums->hard += hard;
}

// NaN is no sign of death.
static void mark_alive(const float *x, int64_t outer, int64_t units, int64_t inner, float *alive)
{
    if (inner == 1) {
        for (int64_t i = 0; i < outer; i++, x += units)
            for (int64_t unit = 0; unit < units; unit++)
                alive[unit] = x[unit] == 0.0f ? alive[unit] : 1.0f;
        return;
    }
    for (int64_t i = 0; i < outer; i++)
        for (int64_t unit = 0; unit < units; unit++, x += inner) {
            int32_t zeros = 0;
            for (int64_t k = 0; k < inner; k++)
                zeros += x[k] == 0.0f;
            if (zeros < inner)
                alive[unit] = 1.0f;
        }
}

// Of x, with the shape (outer, units, inner): out gets the sum, the sum of squares, how many are <= 0; and if small >= 0
// how many are smaller than that in size, how many of these where side < 0, and how many are 0. alive[unit] becomes 1 if
// something isn't 0. side and alive may be NULL. In one thread: starting others takes longer than what they would save.
void element_sums(const float *x, const float *side, int64_t outer, int64_t units, int64_t inner, float small, double *out,
                  float *alive)
{
    struct sums sums = {{0}, {0}, 0, 0, 0, 0};
    int64_t row = units * inner, rows = row < CHUNK ? CHUNK / row : 1;
    for (int64_t first = 0; first < outer; first += rows) {
        int64_t some = outer - first < rows ? outer - first : rows;
        for (int64_t start = 0, count = some * row; start < count; start += CHUNK) {
            int64_t n = count - start < CHUNK ? count - start : CHUNK;
            add_moments(x + start, n, &sums);
            sums.inactive += count_inactive(x + start, n);
            if (small >= 0.0f)
                count_slopes(x + start, side ? side + start : NULL, n, small, &sums);
        }
        if (alive)
            mark_alive(x, some, units, inner, alive);
        x += some * row;
        if (side)
            side += some * row;
    }
    for (int lane = 0; lane < LANES; lane++) {
        out[0] += sums.total[lane];
        out[1] += sums.square[lane];
    }
    out[2] += (double)sums.inactive;
    out[3] += (double)sums.flat;
    out[4] += (double)sums.left;
    out[5] += (double)sums.hard;
}
