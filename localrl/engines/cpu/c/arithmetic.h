/* Arithmetic on single numbers, rows and tiles, the building blocks of the kernels. */

/* e ** x to within 2 units in the last place; 0 below the smallest normal number, NaN for NaN. */
INLINE float exponential(float x)
{
    const float most = 88.72f, least = -87.33f;
    float clipped = x > most ? most : (x < least ? least : x);
    /* x = n ln 2 + r; adding 1.5 * 2**23 rounds to an integer, which ends up in the lowest bits. */
    float shifted = clipped * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = clipped - n * 0.693145752f - n * 1.42860677e-6f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { float number; int32_t bits; } power = {.number = shifted};
    /* As two factors, since 2 ** 128 is not a float. */
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

/* Adds products of weights and `vectors` vectors of columns to `rows` rows of sums. The rows of a
 * matrix are `_step` numbers apart. Both counts are constants wherever this is inlined in a kernel. */
INLINE void accumulate(vec sums[][2], const float *weight, Size weight_step,
                       const float *columns, Size columns_step, int rows, int vectors, Size k)
{
    for (Size i = 0; i < k; i++) {
        vec x[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            x[v] = *(const vec *)(columns + i * columns_step + v * LANES);
        }
        if (i % 2 == 0) { /* the next rows; with 8 rows, a cache line holds 2 iterations' weights */
            __builtin_prefetch(weight + rows * (weight_step + i));
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sums[r][v] += weight[r * weight_step + i] * x[v];
            }
        }
    }
}

/* Multiplies rows of weights, from `row` on, by one or two vectors of columns, from `first` on. */
INLINE void tile_times(const Product *p, Size row, Size first, int rows, int vectors)
{
    const float *weight = p->weight + row * p->k, *columns = p->columns + first;
    const float *up = p->up + row * p->ranks, *low = p->low + first;
    const Size width = p->n - first < vectors * LANES ? p->n - first : vectors * LANES;
    float *out = p->out + row * p->row_step + first * p->column_step;
    vec sums[ROWS1 > ROWS2 ? ROWS1 : ROWS2][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = (vec){0};
        }
    }
    accumulate(sums, weight, p->k, columns, p->columns_step, rows, vectors, p->k);
    if (p->ranks > 0) {
        accumulate(sums, up, p->ranks, low, p->columns_step, rows, vectors, p->ranks);
    }
    if (width == vectors * LANES && p->column_step == 1 && !p->add) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                *(vec *)(out + r * p->row_step + v * LANES) = sums[r][v];
            }
        }
        return;
    }
    float found[ROWS1 > ROWS2 ? ROWS1 : ROWS2][2 * LANES];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            *(vec *)(found[r] + v * LANES) = sums[r][v];
        }
    }
    for (Size j = 0; j < width; j++) {
        for (int r = 0; r < rows; r++) {
            float *place = out + r * p->row_step + j * p->column_step;
            *place = p->add ? *place + found[r][j] : found[r][j];
        }
    }
}

/* Multiplies rows of weights (rows, k) by a number of whole vectors of columns. */
INLINE void rows_times(const float *weight, Size weight_step, const float *columns,
                       Size columns_step, float *restrict out, Size out_step, int rows,
                       int vectors, Size k)
{
    vec sums[QUERIES][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = (vec){0};
        }
    }
    accumulate(sums, weight, weight_step, columns, columns_step, rows, vectors, k);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            *(vec *)(out + r * out_step + v * LANES) = sums[r][v];
        }
    }
}

typedef float four_lanes __attribute__((vector_size(16), aligned(4)));

/* The sum of all lanes, four at a time, which shortens the chain of dependent additions. */
INLINE float sum_of(vec x)
{
    union { vec all; four_lanes part[LANES / 4]; } split = {.all = x};
    four_lanes sum = split.part[0];
#pragma GCC unroll 4
    for (int i = 1; i < LANES / 4; i++) {
        sum += split.part[i];
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE float larger(float x, float y)
{
    return x > y ? x : y;
}

/* Replaces a row of scores by its softmax weights. */
INLINE void softmax_row(float *restrict row, Size n)
{
    float most[LANES], sums[LANES] = {0}, highest = -INFINITY, total = 0;
    Size whole = n - n % LANES;
    for (int lane = 0; lane < LANES; lane++) {
        most[lane] = -INFINITY;
    }
    for (Size i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            most[lane] = larger(row[i + lane], most[lane]);
        }
    }
    for (Size i = whole; i < n; i++) {
        highest = larger(row[i], highest);
    }
    for (int lane = 0; lane < LANES; lane++) {
        highest = larger(most[lane], highest);
    }
    for (Size i = 0; i < n; i++) {
        row[i] = exponential(row[i] - highest);
    }
    for (Size i = 0; i < whole; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            sums[lane] += row[i + lane];
        }
    }
    for (Size i = whole; i < n; i++) {
        total += row[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
        total += sums[lane];
    }
    for (Size i = 0; i < n; i++) {
        row[i] *= 1.0f / total;
    }
}
