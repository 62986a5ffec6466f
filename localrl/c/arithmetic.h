/* Vectors, and the arithmetic on single numbers, rows and tiles that steps are made of. */

/* One build for all processors of a kind: the loader takes the widest vectors that there are. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define IS_WIDE __builtin_cpu_supports("avx2")
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 6
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#define IS_WIDE __builtin_cpu_supports("avx2")
#else
#define WIDE
#define IS_WIDE 0
#endif

/* Into each of those builds. */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64), aligned(4)));

enum { LANES = 16, ROWS = 8 };

/* e ** x to 2 units in the last place; 0 below the smallest normal number, NaN for NaN. */
INLINE float exponential(float x)
{
    const float most = 88.72f, least = -87.33f;
    float within = x > most ? most : (x < least ? least : x);
    /* x = n ln 2 + r; the sum with 1.5 * 2**23 rounds to a whole number, which ends its bits. */
    float shifted = within * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = within - n * 0.693145752f - n * 1.42860677e-6f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { float number; int32_t bits; } power = {.number = shifted};
    /* In two halves, since 2 ** 128 has no float. */
    int32_t whole = power.bits - 0x4B400000, half = whole >> 1;
    union { int32_t bits; float number; } one = {.bits = (half + 127) << 23};
    union { int32_t bits; float number; } two = {.bits = (whole - half + 127) << 23};
    float found = sum * one.number * two.number;
    found = x < least ? 0.0f : found;
    return x > most ? INFINITY : found;
}

INLINE float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

/* Some rows of weights times 16 columns: `width` of them are wanted. A matrix's next row is `_step`
 * numbers on. */
INLINE void rows_times(const float *weight, Py_ssize_t weight_step, const float *columns,
                       Py_ssize_t columns_step, float *restrict out, Py_ssize_t out_step,
                       Py_ssize_t rows, Py_ssize_t k, Py_ssize_t width)
{
    lanes sums[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        sums[r] = (lanes){0};
    }
    for (Py_ssize_t i = 0; i < k; i++) {
        lanes x = *(const lanes *)(columns + i * columns_step);
        if (i % 2 == 0) { /* of the next rows; a line holds the weights of two turns */
            __builtin_prefetch(weight + rows * (weight_step + i));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            sums[r] += weight[r * weight_step + i] * x;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (width == LANES) {
            *(lanes *)(out + r * out_step) = sums[r];
            continue;
        }
        for (Py_ssize_t j = 0; j < width; j++) {
            out[r * out_step + j] = sums[r][j];
        }
    }
}

INLINE float larger(float x, float y)
{
    return x > y ? x : y;
}

/* A row of scores becomes weights. */
INLINE void softmax_row(float *restrict row, Py_ssize_t n)
{
    float most[LANES], sums[LANES] = {0}, highest = -INFINITY, total = 0;
    Py_ssize_t whole = n - n % LANES;
    for (int lane = 0; lane < LANES; lane++) {
        most[lane] = -INFINITY;
    }
    for (Py_ssize_t i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            most[lane] = larger(row[i + lane], most[lane]);
        }
    }
    for (Py_ssize_t i = whole; i < n; i++) {
        highest = larger(row[i], highest);
    }
    for (int lane = 0; lane < LANES; lane++) {
        highest = larger(most[lane], highest);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        row[i] = exponential(row[i] - highest);
    }
    for (Py_ssize_t i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            sums[lane] += row[i + lane];
        }
    }
    for (Py_ssize_t i = whole; i < n; i++) {
        total += row[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
        total += sums[lane];
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        row[i] *= 1.0f / total;
    }
}
