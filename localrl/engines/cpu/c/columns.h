/* Matrix products, norms and gates. */

/* Multiplies `count` rows of weights by the columns from `first` on, at most two vectors of them. */
INLINE void block_times(const Product *p, Size row, Size count, Size first, int vectors)
{
    const int rows = vectors == 1 ? ROWS1 : ROWS2;
    Size end = row + count;
    for (; row + rows <= end; row += rows) {
        tile_times(p, row, first, rows, vectors);
    }
    for (; row < end; row++) {
        tile_times(p, row, first, 1, vectors);
    }
}

/* Each weight is read from memory once, for any number of columns: a block's rows stay in cache. */
STEP void product(const void *what, Size from, Size to)
{
    const Product *p = what;
    for (Size item = from; item < to; item++) {
        Size row = item * BLOCK, count = p->m - row < BLOCK ? p->m - row : BLOCK;
        for (Size first = 0; first < p->n; first += 2 * LANES) {
            if (p->n - first > LANES) {
                block_times(p, row, count, first, 2);
            } else {
                block_times(p, row, count, first, 1);
            }
        }
    }
}

/* Adds products of `rows` rows of a matrix and `n` columns, stored as rows. Both are constants. */
INLINE void accumulate_along(vec sums[][FEWEST], float rest[][FEWEST], const float *weight,
                             const float *columns, int rows, int n, Size k)
{
    Size whole = k - k % LANES;
    for (Size i = 0; i < whole; i += LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec w = *(const vec *)(weight + r * k + i);
            __builtin_prefetch(weight + (r + rows) * k + i);
#pragma GCC unroll 4
            for (int j = 0; j < n; j++) {
                sums[r][j] += w * *(const vec *)(columns + j * k + i);
            }
        }
    }
    for (Size i = whole; i < k; i++) {
        for (int r = 0; r < rows; r++) {
            for (int j = 0; j < n; j++) {
                rest[r][j] += weight[r * k + i] * columns[j * k + i];
            }
        }
    }
}

INLINE void tile_along(const Product *p, Size row, int rows, int n)
{
    vec sums[4][FEWEST];
    float rest[4][FEWEST];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            sums[r][j] = (vec){0};
            rest[r][j] = 0;
        }
    }
    accumulate_along(sums, rest, p->weight + row * p->k, p->columns, rows, n, p->k);
    if (p->ranks > 0) {
        accumulate_along(sums, rest, p->up + row * p->ranks, p->low, rows, n, p->ranks);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            float *place = p->out + (row + r) * p->row_step + j * p->column_step;
            float found = sum_of(sums[r][j]) + rest[r][j];
            *place = p->add ? *place + found : found;
        }
    }
}

INLINE void rows_along(const Product *p, Size row, Size end, int n)
{
    const int rows = n == FEWEST ? ALONG : 4;
    for (; row + rows <= end; row += rows) {
        tile_along(p, row, rows, n);
    }
    for (; row < end; row++) {
        tile_along(p, row, 1, n);
    }
}

/* A product with few columns, where most of a vector of columns would be padding. */
STEP void product_along(const void *what, Size from, Size to)
{
    const Product *p = what;
    Size row = from * BLOCK, end = to * BLOCK < p->m ? to * BLOCK : p->m;
    switch (p->n) { /* a constant in each case */
    case 1: rows_along(p, row, end, 1); break;
    case 2: rows_along(p, row, end, 2); break;
    case 3: rows_along(p, row, end, 3); break;
    case 4: rows_along(p, row, end, 4); break;
    }
}

/* 1 / sqrt(mean of squares + eps) of each of `width` columns. */
INLINE void factors(const Norm *p, const float *x, Size width, float *found)
{
    for (Size j = 0; j < width; j++) {
        found[j] = 0;
    }
    for (Size i = 0; i < p->d; i++) {
        for (Size j = 0; j < width; j++) {
            found[j] += x[i * p->n + j] * x[i * p->n + j];
        }
    }
    for (Size j = 0; j < width; j++) {
        found[j] = 1.0f / sqrtf(found[j] / (float)p->d + p->eps);
    }
}

/* An item is a block of 64 columns in one of the g matrices. */
STEP void norm(const void *what, Size from, Size to)
{
    const Norm *p = what;
    float factor[COLUMNS];
    for (Size item = from; item < to; item++) {
        Size first = item % p->blocks * COLUMNS, at = item / p->blocks * p->d * p->n + first;
        Size width = p->n - first < COLUMNS ? p->n - first : COLUMNS;
        const float *restrict x = p->x + at;
        float *restrict out = p->out + at;
        factors(p, x, width, factor);
        for (Size i = 0; i < p->d; i++) {
            for (Size j = 0; j < width; j++) {
                out[i * p->n + j] = x[i * p->n + j] * factor[j] * p->weight[i];
            }
        }
    }
}

STEP void norm_back(const void *what, Size from, Size to)
{
    const Norm *p = what;
    float factor[COLUMNS], along[COLUMNS];
    for (Size item = from; item < to; item++) {
        Size first = item % p->blocks * COLUMNS, at = item / p->blocks * p->d * p->n + first;
        Size width = p->n - first < COLUMNS ? p->n - first : COLUMNS;
        const float *restrict x = p->x + at;
        float *restrict grad = p->out + at;
        factors(p, x, width, factor);
        for (Size j = 0; j < width; j++) {
            along[j] = 0;
        }
        for (Size i = 0; i < p->d; i++) {
            for (Size j = 0; j < width; j++) {
                along[j] += x[i * p->n + j] * grad[i * p->n + j] * p->weight[i];
            }
        }
        for (Size j = 0; j < width; j++) {
            along[j] *= factor[j] * factor[j] * factor[j] / (float)p->d;
        }
        for (Size i = 0; i < p->d; i++) {
            for (Size j = 0; j < width; j++) {
                float mine = grad[i * p->n + j] * p->weight[i] * factor[j];
                grad[i * p->n + j] = mine - x[i * p->n + j] * along[j];
            }
        }
    }
}

STEP void swiglu(const void *what, Size from, Size to)
{
    const Swiglu *p = what;
    const float *restrict gate = p->gate, *restrict x = p->x;
    float *restrict out = p->out;
    for (Size i = from; i < to; i++) {
        out[i] = sigmoid(gate[i]) * gate[i] * x[i];
    }
}

STEP void swiglu_back(const void *what, Size from, Size to)
{
    const Swiglu *p = what;
    const float *restrict gate = p->gate, *restrict x = p->x;
    float *restrict grad = p->out, *restrict grad_gate = p->grad_gate;
    for (Size i = from; i < to; i++) {
        float s = sigmoid(gate[i]), silu = s * gate[i];
        grad_gate[i] = (s * (1.0f - silu) + silu) * x[i] * grad[i];
        grad[i] *= silu;
    }
}
