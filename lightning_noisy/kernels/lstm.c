// The elementwise part of a step of the backward pass of lstm.py.

#include <stdint.h>

// All but c and h have the rows of all steps, of which these are ``rows``; by_gates has two blocks of columns, z four, all
// else one of ``hidden``. h: gradient of o phi(c'). c: that of c', then of the cell state before.
void lstm_backward_step(const float *h, float *restrict c, const float *by_gates, const float *by_o, const float *by_g,
                        const float *by_cell, const float *f, float *restrict z, int64_t f_stride, int64_t rows,
                        int64_t hidden)
{
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < hidden; j++) {
            float of_c = c[j] + h[j] * by_cell[j];
            z[j] = of_c * by_gates[j];
            z[hidden + j] = of_c * by_gates[hidden + j];
            z[2 * hidden + j] = h[j] * by_o[j];
            z[3 * hidden + j] = of_c * by_g[j];
            c[j] = of_c * f[j];
        }
        h += hidden, c += hidden, by_gates += 2 * hidden, by_o += hidden, by_g += hidden, by_cell += hidden;
        f += f_stride, z += 4 * hidden;
    }
}
