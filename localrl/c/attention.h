/* Attention over many positions, forward and back. */

typedef struct {
    const float *queries;       /* (R, h, r, L, d) */
    const float *keys, *values; /* (R, h, P + L, d) */
    const float *hidden;        /* (R, P): what is added to scores of ancestors */
    const float *within, *slope; /* on the way back: (R, h, r, L), and by what was found */
    float *out;                 /* what is found, or the slope by the queries */
    float *by_keys, *by_values; /* set to 0 before */
    Py_ssize_t heads, queried, length, past, d, room;
    float scale;
    atomic_bool *failed;
} Attention;

/* (d, room) of rows (n, d). */
INLINE void transpose(const float *restrict rows, float *restrict out, Py_ssize_t n, Py_ssize_t d,
                      Py_ssize_t room)
{
    for (Py_ssize_t i = 0; i < d; i++) {
        for (Py_ssize_t t = 0; t < n; t++) {
            out[i * room + t] = rows[t * d + i];
        }
        for (Py_ssize_t t = n; t < room; t++) {
            out[i * room + t] = 0;
        }
    }
}

/* Rows of weights times 16 columns: eight at once, or one after another. */
INLINE void some_rows_times(const float *weight, Py_ssize_t weight_step, const float *columns,
                            Py_ssize_t columns_step, float *restrict out, Py_ssize_t out_step,
                            Py_ssize_t rows, Py_ssize_t k)
{
    if (rows == ROWS) {
        rows_times(weight, weight_step, columns, columns_step, out, out_step, ROWS, k, LANES);
        return;
    }
    for (Py_ssize_t r = 0; r < rows; r++) {
        rows_times(weight + r * weight_step, weight_step, columns, columns_step,
                   out + r * out_step, out_step, 1, k, LANES);
    }
}

/* x (rows, d) times columns (d, room), for the first n columns, whole vectors of them. */
INLINE void tile(const float *x, const float *columns, float *restrict out, Py_ssize_t rows,
                 Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    for (Py_ssize_t t = 0; t < n; t += LANES) {
        some_rows_times(x, d, columns + t, room, out + t, room, rows, d);
    }
}

/* The sum over n places of weights (rows, room) times x (n, d). */
INLINE void gathered(const float *weights, const float *x, float *restrict out, Py_ssize_t rows,
                     Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    for (Py_ssize_t i = 0; i < d; i += LANES) {
        some_rows_times(weights, room, x + i, d, out + i, d, rows, n);
    }
}

/* Adds to out (n, d) weights (rows, room) times x (rows, d), by places. */
INLINE void spread(const float *weights, const float *x, float *restrict out, Py_ssize_t rows,
                   Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    for (Py_ssize_t i = 0; i < d; i += LANES) {
        lanes mine[ROWS];
        for (Py_ssize_t r = 0; r < rows; r++) {
            mine[r] = *(const lanes *)(x + r * d + i);
        }
        for (Py_ssize_t t = 0; t < n; t++) {
            lanes sum = *(lanes *)(out + t * d + i);
#pragma GCC unroll 8
            for (Py_ssize_t r = 0; r < rows; r++) {
                sum += weights[r * room + t] * mine[r];
            }
            *(lanes *)(out + t * d + i) = sum;
        }
    }
}

INLINE void add_spread(const float *weights, const float *x, float *restrict out, Py_ssize_t rows,
                       Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    if (rows == ROWS) {
        spread(weights, x, out, ROWS, d, n, room);
    } else {
        spread(weights, x, out, rows, d, n, room);
    }
}

/* Weights (rows, room) of some queries of one head, from position `first` on; 0 behind a query. */
INLINE void weigh(const Attention *p, const float *queries, const float *keys, const float *hidden,
                  Py_ssize_t first, Py_ssize_t rows, float *restrict weights)
{
    tile(queries, keys, weights, rows, p->d, p->past + first + rows, p->room);
    for (Py_ssize_t r = 0; r < rows; r++) {
        float *restrict row = weights + r * p->room;
        Py_ssize_t seen = p->past + first + r + 1;
        for (Py_ssize_t t = 0; t < seen; t++) {
            row[t] *= p->scale;
        }
        for (Py_ssize_t t = 0; t < p->past; t++) {
            row[t] += hidden[t];
        }
        softmax_row(row, seen);
        for (Py_ssize_t t = seen; t < p->past + first + rows; t++) {
            row[t] = 0;
        }
    }
}

/* Items are rows' heads of keys; scores exist for eight queries at once. */
WIDE static void attend(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Attention *p = what;
    float *scratch = malloc((size_t)((p->d + ROWS) * p->room) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(p->failed, true);
        return;
    }
    float *turned = scratch, *weights = scratch + p->d * p->room;
    for (Py_ssize_t item = from; item < to; item++) {
        Py_ssize_t total = p->past + p->length, start = item * p->queried;
        const float *values = p->values + item * total * p->d;
        const float *hidden = p->hidden + item / p->heads * p->past;
        transpose(p->keys + item * total * p->d, turned, total, p->d, p->room);
        for (Py_ssize_t q = 0, rows; q < p->queried; q += rows) {
            Py_ssize_t first = q % p->length;
            rows = p->length - first < ROWS ? p->length - first : ROWS;
            weigh(p, p->queries + (start + q) * p->d, turned, hidden, first, rows, weights);
            gathered(weights, values, p->out + (start + q) * p->d, rows, p->d,
                     p->past + first + rows, p->room);
        }
    }
    free(scratch);
}

WIDE static void attend_back(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Attention *p = what;
    float *scratch = malloc((size_t)((2 * p->d + 2 * ROWS) * p->room) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(p->failed, true);
        return;
    }
    float *turned = scratch, *turned_values = turned + p->d * p->room;
    float *weights = turned_values + p->d * p->room, *slopes = weights + ROWS * p->room;
    for (Py_ssize_t item = from; item < to; item++) {
        Py_ssize_t total = p->past + p->length, start = item * p->queried;
        const float *keys = p->keys + item * total * p->d;
        const float *hidden = p->hidden + item / p->heads * p->past;
        float *by_keys = p->by_keys + item * total * p->d;
        float *by_values = p->by_values + item * total * p->d;
        transpose(keys, turned, total, p->d, p->room);
        transpose(p->values + item * total * p->d, turned_values, total, p->d, p->room);
        for (Py_ssize_t q = 0, rows; q < p->queried; q += rows) {
            Py_ssize_t first = q % p->length;
            rows = p->length - first < ROWS ? p->length - first : ROWS;
            Py_ssize_t seen = p->past + first + rows;
            const float *queries = p->queries + (start + q) * p->d;
            const float *slope = p->slope + (start + q) * p->d;
            weigh(p, queries, turned, hidden, first, rows, weights);
            tile(slope, turned_values, slopes, rows, p->d, seen, p->room);
            add_spread(weights, slope, by_values, rows, p->d, seen, p->room);
            for (Py_ssize_t r = 0; r < rows; r++) {
                float *restrict row = slopes + r * p->room;
                const float *restrict mine = weights + r * p->room;
                float within = p->within[start + q + r];
                for (Py_ssize_t t = 0; t < seen; t++) {
                    row[t] = (row[t] - within) * mine[t] * p->scale;
                }
            }
            gathered(slopes, keys, p->out + (start + q) * p->d, rows, p->d, seen, p->room);
            add_spread(slopes, queries, by_keys, rows, p->d, seen, p->room);
        }
    }
    free(scratch);
}
