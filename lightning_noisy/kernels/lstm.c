// The elementwise part of a step of the backward pass of lstm.py.

#include <stdint.h>

// All but c and h have the rows of all steps, of which these are ``rows``; by_gates has two blocks of columns, z four, all
// else one of ``hidden``. h: gradient of o phi(c'). c: that of c' on another way, then of the cell state before. of_c, if it
// isn't NULL, gets that of c', and of_h a copy of h.
void lstm_backward_step(const float *h, float *restrict c, const float *by_gates, const float *by_o, const float *by_g,
                        const float *by_cell, const float *f, float *restrict z, float *restrict of_h,
                        float *restrict of_c, int64_t f_stride, int64_t rows, int64_t hidden)
{
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < hidden; j++) {
            float sum = c[j] + h[j] * by_cell[j];
            z[j] = sum * by_gates[j];
            z[hidden + j] = sum * by_gates[hidden + j];
            z[2 * hidden + j] = h[j] * by_o[j];
            z[3 * hidden + j] = sum * by_g[j];
            c[j] = sum;
        }
        if (of_c) {
            for (int64_t j = 0; j < hidden; j++) {
                of_h[j] = h[j];
                of_c[j] = c[j];
            }
            of_h += hidden, of_c += hidden;
        }
        for (int64_t j = 0; j < hidden; j++)
            c[j] *= f[j];
        h += hidden, c += hidden, by_gates += 2 * hidden, by_o += hidden, by_g += hidden, by_cell += hidden;
        f += f_stride, z += 4 * hidden;
    }
}
