/* Products, norms, gates, rotary positions and softmax. */

enum { COLUMNS = 64 };

typedef struct {
    const float *weight; /* (m, k) */
    const float *padded; /* (n / 16, k, 16) */
    float *out;          /* (m, n) */
    Py_ssize_t m, k, n;
} Product;

/* Items are blocks of 8 rows of weights; each weight is read once for up to 16 columns. */
WIDE static void product(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Product *p = what;
    for (Py_ssize_t first = 0; first < p->n; first += LANES) {
        Py_ssize_t width = p->n - first < LANES ? p->n - first : LANES;
        const float *columns = p->padded + first * p->k;
        for (Py_ssize_t row = from * ROWS; row < to * ROWS && row < p->m;) {
            const float *weight = p->weight + row * p->k;
            float *out = p->out + row * p->n + first;
            if (row + ROWS <= p->m) {
                rows_times(weight, p->k, columns, LANES, out, p->n, ROWS, p->k, width);
                row += ROWS;
            } else {
                rows_times(weight, p->k, columns, LANES, out, p->n, 1, p->k, width);
                row += 1;
            }
        }
    }
}

typedef struct {
    const float *x, *weight; /* (g, d, n) and (d,) */
    float *out;              /* what is made of x; on the way back the slope by that, then by x */
    Py_ssize_t d, n, blocks; /* of 64 columns */
    float eps;
} Norm;

/* 1 / sqrt(mean of squares + eps) of some columns. */
INLINE void factors(const Norm *p, const float *x, Py_ssize_t width, float *found)
{
    for (Py_ssize_t j = 0; j < width; j++) {
        found[j] = 0;
    }
    for (Py_ssize_t i = 0; i < p->d; i++) {
        for (Py_ssize_t j = 0; j < width; j++) {
            found[j] += x[i * p->n + j] * x[i * p->n + j];
        }
    }
    for (Py_ssize_t j = 0; j < width; j++) {
        found[j] = 1.0f / sqrtf(found[j] / (float)p->d + p->eps);
    }
}

/* Items are blocks of 64 columns of each of g. */
WIDE static void norm(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Norm *p = what;
    float factor[COLUMNS];
    for (Py_ssize_t item = from; item < to; item++) {
        Py_ssize_t first = item % p->blocks * COLUMNS, at = item / p->blocks * p->d * p->n + first;
        Py_ssize_t width = p->n - first < COLUMNS ? p->n - first : COLUMNS;
        const float *restrict x = p->x + at;
        float *restrict out = p->out + at;
        factors(p, x, width, factor);
        for (Py_ssize_t i = 0; i < p->d; i++) {
            for (Py_ssize_t j = 0; j < width; j++) {
                out[i * p->n + j] = x[i * p->n + j] * factor[j] * p->weight[i];
            }
        }
    }
}

WIDE static void norm_back(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Norm *p = what;
    float factor[COLUMNS], along[COLUMNS];
    for (Py_ssize_t item = from; item < to; item++) {
        Py_ssize_t first = item % p->blocks * COLUMNS, at = item / p->blocks * p->d * p->n + first;
        Py_ssize_t width = p->n - first < COLUMNS ? p->n - first : COLUMNS;
        const float *restrict x = p->x + at;
        float *restrict slope = p->out + at;
        factors(p, x, width, factor);
        for (Py_ssize_t j = 0; j < width; j++) {
            along[j] = 0;
        }
        for (Py_ssize_t i = 0; i < p->d; i++) {
            for (Py_ssize_t j = 0; j < width; j++) {
                along[j] += x[i * p->n + j] * slope[i * p->n + j] * p->weight[i];
            }
        }
        for (Py_ssize_t j = 0; j < width; j++) {
            along[j] *= factor[j] * factor[j] * factor[j] / (float)p->d;
        }
        for (Py_ssize_t i = 0; i < p->d; i++) {
            for (Py_ssize_t j = 0; j < width; j++) {
                float mine = slope[i * p->n + j] * p->weight[i] * factor[j];
                slope[i * p->n + j] = mine - x[i * p->n + j] * along[j];
            }
        }
    }
}

typedef struct {
    const float *gate, *x;
    float *out, *by_gate; /* the first is on the way back the slope by what was made, then by x */
} Swiglu;

WIDE static void swiglu(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Swiglu *p = what;
    const float *restrict gate = p->gate, *restrict x = p->x;
    float *restrict out = p->out;
    for (Py_ssize_t i = from; i < to; i++) {
        out[i] = sigmoid(gate[i]) * gate[i] * x[i];
    }
}

WIDE static void swiglu_back(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Swiglu *p = what;
    const float *restrict gate = p->gate, *restrict x = p->x;
    float *restrict slope = p->out, *restrict by_gate = p->by_gate;
    for (Py_ssize_t i = from; i < to; i++) {
        float s = sigmoid(gate[i]), silu = s * gate[i];
        by_gate[i] = (s * (1.0f - silu) + silu) * x[i] * slope[i];
        slope[i] *= silu;
    }
}

typedef struct {
    const float *x, *cosines, *sines; /* (heads, d, n) and (d, n) */
    const int64_t *partners;          /* (d,) */
    float *out;
    Py_ssize_t d, n;
} Turn;

/* Items are the heads' numbers. */
WIDE static void turn(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Turn *p = what;
    for (Py_ssize_t item = from; item < to; item++) {
        Py_ssize_t i = item % p->d, n = p->n;
        const float *restrict mine = p->x + item * n;
        const float *restrict other = p->x + (item - i + p->partners[i]) * n;
        const float *restrict cosines = p->cosines + i * n, *restrict sines = p->sines + i * n;
        float *restrict out = p->out + item * n;
        for (Py_ssize_t j = 0; j < n; j++) {
            out[j] = mine[j] * cosines[j] + other[j] * sines[j];
        }
    }
}

typedef struct {
    float *scores;       /* (outer, inner, length, n) */
    const float *hidden; /* (1 or outer, length, n), or NULL */
    Py_ssize_t per_outer, length, n;
    bool one;
} Softmax;

/* Items are rows of scores. */
WIDE static void softmax(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Softmax *p = what;
    for (Py_ssize_t item = from; item < to; item++) {
        float *restrict row = p->scores + item * p->n;
        if (p->hidden != NULL) {
            Py_ssize_t outer = p->one ? 0 : item / p->per_outer;
            const float *restrict hidden =
                p->hidden + (outer * p->length + item % p->length) * p->n;
            for (Py_ssize_t i = 0; i < p->n; i++) {
                row[i] += hidden[i];
            }
        }
        softmax_row(row, p->n);
    }
}

typedef struct {
    const float *weights, *within; /* (rows, n) and (rows,) */
    float *slope;                  /* by the weights, then by the scores before the scale */
    float scale;
    Py_ssize_t n;
} SoftmaxBack;

WIDE static void softmax_back(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const SoftmaxBack *p = what;
    for (Py_ssize_t item = from; item < to; item++) {
        const float *restrict weights = p->weights + item * p->n;
        float *restrict slope = p->slope + item * p->n;
        for (Py_ssize_t i = 0; i < p->n; i++) {
            slope[i] = (slope[i] - p->within[item]) * weights[i] * p->scale;
        }
    }
}
