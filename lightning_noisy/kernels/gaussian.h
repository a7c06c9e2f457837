// The numbers of gaussian.py, bit for bit as its torch operations compute them.
//
// Uses only operations that IEEE 754 rounds correctly, each rounded separately: compile with -ffp-contract=off.

#ifndef GAUSSIAN_H
#define GAUSSIAN_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PAIRS = 64 };

static const uint64_t WEYL = 0x9E3779B97F4A7C15, FACTOR = 0xD6E8FEB86659FD93;

static inline uint64_t upper(uint64_t bits)
{
    return (uint64_t)((int64_t)bits >> 32);  // arithmetic shift
}

// Write the numbers of at most PAIRS pairs, times std. The loops have no branches and, after inlining, constant lengths,
// so the compiler vectorizes them.
static inline __attribute__((always_inline)) void draw(int pairs, uint64_t counter, uint64_t second, float std,
                                                       float *restrict out)
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

#endif
