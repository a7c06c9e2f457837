// Elementwise functions and their slopes in single precision, without branches, so that loops over them are vectorized.
//
// Largest errors of the values for |x| < 80, in units of 2^-24 of the value: SiLU, sigmoid and tanh 4, ELU 2, SELU 3; GELU 5
// and its approximation by tanh 4, of |x| (tests/kernels/test_backends.py measures them). NaN stays NaN.

#ifndef FUNCTIONS_H
#define FUNCTIONS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

// x y + z, rounded once where that is as fast.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(x, y, z) __builtin_fmaf(x, y, z)
#else
#define FMA(x, y, z) ((x) * (y) + (z))
#endif

#define INLINE static inline __attribute__((always_inline))

// Numbered as in normalized.py.
enum kind { CLIP, LEAKY, SILU, GELU, GELU_TANH, TANH, ELU, SIGMOID };

INLINE float clamped(float x, float lower, float upper)
{
    x = x < lower ? lower : x;
    return x > upper ? upper : x;
}

// exp(t) = scale * (1 + rest), for t that is clamped to where scale is a normal number.
INLINE void split_exp(float t, float *scale, float *rest)
{
    t = clamped(t, -87.0f, 88.0f);
    float k = FMA(t, 1.44269504f, 12582912.0f);  // rounds to an integer in the lower bits
    int32_t bits;
    memcpy(&bits, &k, sizeof bits);
    k -= 12582912.0f;
    float r = FMA(k, 2.12194440e-4f, FMA(k, -0.693359375f, t));
    float e = 1.98756912e-4f;
    e = FMA(e, r, 1.39819994e-3f);
    e = FMA(e, r, 8.33345205e-3f);
    e = FMA(e, r, 4.16657962e-2f);
    e = FMA(e, r, 1.66666657e-1f);
    e = FMA(e, r, 5.00000012e-1f);
    *rest = FMA(e, r * r, r);
    uint32_t power = ((uint32_t)bits + 127u) << 23;  // 2^k: the lower bits of the sum hold k
    memcpy(scale, &power, sizeof *scale);
}

// The sigmoid of x, and that of -x, which is 1 minus it with all its digits.
INLINE float two_sigmoids(float x, float *other)
{
    float scale, rest;
    split_exp(-fabsf(x), &scale, &rest);
    float power = FMA(scale, rest, scale), larger = 1.0f / (1.0f + power), smaller = power * larger;
    *other = x < 0.0f ? larger : smaller;
    return x < 0.0f ? smaller : larger;
}

INLINE float sigmoid(float x)
{
    float other;
    return two_sigmoids(x, &other);
}

INLINE float expm1_of(float x)  // x <= 0 loses no digits
{
    float scale, rest;
    split_exp(x, &scale, &rest);
    return FMA(scale, rest, scale - 1.0f);
}

INLINE float tanh_of(float x)
{
    float m = expm1_of(-2.0f * fabsf(x));
    float size = -m / (2.0f + m);
    return x < 0.0f ? -size : size;
}

// sigmoid(x) - 1/2, as exact near 0.
INLINE float centred_sigmoid(float x)
{
    float m = expm1_of(-fabsf(x));
    float size = -0.5f * m / (2.0f + m);
    return x < 0.0f ? -size : size;
}

// Phi(x), and the density of the normal distribution. Phi(-|x|) is the density times a polynomial in 1 / (1 + 0.23 |x|), a
// minimax fit of the relative error (5e-8) for |x| <= 14.
INLINE void normal(float x, float *phi, float *density)
{
    float size = clamped(fabsf(x), 0.0f, 14.0f), t = 1.0f / (1.0f + 0.23f * size);
    float p = -0.0784672665f;
    p = FMA(p, t, 0.290413194f);
    p = FMA(p, t, -0.278125001f);
    p = FMA(p, t, 0.301470511f);
    p = FMA(p, t, -0.032918595f);
    p = FMA(p, t, 0.119513366f);
    p = FMA(p, t, 0.0857630962f);
    p = FMA(p, t, 0.0923784315f);
    p = FMA(p, t, -2.77609606e-5f);
    float scale, rest;
    split_exp(-0.5f * size * size, &scale, &rest);
    float power = FMA(scale, rest, scale), tail = power * p;
    *density = power * 0.398942280f;
    *phi = x < 0.0f ? tail : 1.0f - tail;
    *phi = x == x ? *phi : x;
}

struct options {
    float a, b, lower, upper;
};

// Returns the value at x and writes the slope, for a kind that is constant after inlining.
INLINE float value_and_slope(enum kind kind, struct options o, float x, float *slope)
{
    if (kind == CLIP) {  // of the line a x + b
        float u = o.a * x + o.b;
        *slope = (u <= o.lower) | ((u >= o.upper) & (o.upper < INFINITY)) ? 0.0f : o.a;
        return clamped(u, o.lower, o.upper);
    }
    if (kind == LEAKY) {
        float factor = x > 0.0f ? 1.0f : o.a;
        *slope = factor;
        return x * factor;
    }
    if (kind == SILU) {
        float other, s = two_sigmoids(x, &other);
        *slope = s * FMA(clamped(x, -100.0f, 100.0f), other, 1.0f);
        return (x < -100.0f ? -100.0f : x) * s;  // whose sigmoid is not exactly 0
    }
    if (kind == GELU) {
        float phi, density;
        normal(x, &phi, &density);
        *slope = FMA(clamped(x, -14.0f, 14.0f), density, phi);
        return (x < -14.0f ? -14.0f : x) * phi;
    }
    if (kind == GELU_TANH) {
        float c = clamped(x, -20.0f, 20.0f), square = c * c;
        float other, s = two_sigmoids(1.59576912f * c * FMA(square, 0.044715f, 1.0f), &other);
        *slope = FMA(c * (s * other), 1.59576912f * FMA(square, 0.134145f, 1.0f), s);
        return (x < -20.0f ? -20.0f : x) * s;
    }
    if (kind == TANH) {
        float y = tanh_of(x);
        *slope = 1.0f - y * y;
        return y;
    }
    if (kind == ELU) {  // b x, or where x <= 0 a (exp(x) - 1)
        float scale, rest;
        split_exp(x, &scale, &rest);
        *slope = x > 0.0f ? o.b : o.a * FMA(scale, rest, scale);
        return x > 0.0f ? o.b * x : o.a * FMA(scale, rest, scale - 1.0f);
    }
    float other, s = two_sigmoids(x, &other);
    *slope = s * other;
    return s;
}

#endif
