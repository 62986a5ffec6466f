/* Attention over many positions, forward and backward. */

/* Transposes rows (n, d) to (d, room), padded with 0. */
INLINE void transpose(const float *restrict rows, float *restrict out, Size n, Size d,
                      Size room)
{
    for (Size i = 0; i < d; i++) {
        for (Size t = 0; t < n; t++) {
            out[i * room + t] = rows[t * d + i];
        }
        for (Size t = n; t < room; t++) {
            out[i * room + t] = 0;
        }
    }
}

/* Multiplies rows of weights by n columns, a number of whole vectors: QUERIES rows at once, or one
 * by one. */
INLINE void some_rows_times(const float *weight, Size weight_step, const float *columns,
                            Size columns_step, float *restrict out, Size out_step, Size rows,
                            Size n, Size k)
{
    const int together = rows == QUERIES ? QUERIES : 1;
    for (Size r = 0; r < rows; r += together) {
        const float *mine = weight + r * weight_step;
        Size i = 0;
        for (; i + LANES < n; i += 2 * LANES) {
            if (together > 1) {
                rows_times(mine, weight_step, columns + i, columns_step, out + r * out_step + i,
                           out_step, QUERIES, 2, k);
            } else {
                rows_times(mine, weight_step, columns + i, columns_step, out + r * out_step + i,
                           out_step, 1, 2, k);
            }
        }
        for (; i < n; i += LANES) {
            if (together > 1) {
                rows_times(mine, weight_step, columns + i, columns_step, out + r * out_step + i,
                           out_step, QUERIES, 1, k);
            } else {
                rows_times(mine, weight_step, columns + i, columns_step, out + r * out_step + i,
                           out_step, 1, 1, k);
            }
        }
    }
}

/* Multiplies x (rows, d) by the first n of columns (d, room), rounded up to whole vectors. */
INLINE void tile(const float *x, const float *columns, float *restrict out, Size rows, Size d,
                 Size n, Size room)
{
    some_rows_times(x, d, columns, room, out, room, rows, (n + LANES - 1) / LANES * LANES, d);
}

/* Sums weights (rows, room) times x (n, d) over n positions. */
INLINE void weighted_sum(const float *weights, const float *x, float *restrict out, Size rows, Size d,
                     Size n, Size room)
{
    some_rows_times(weights, room, x, d, out, d, rows, d, n);
}

/* Adds weights (rows, room) times x (rows, d), summed over rows, to out (n, d), by position. */
INLINE void outer(const float *weights, const float *x, float *restrict out, Size rows,
                   Size d, Size n, Size room)
{
    for (Size i = 0; i < d; i += LANES) {
        vec mine[QUERIES];
        for (Size r = 0; r < rows; r++) {
            mine[r] = *(const vec *)(x + r * d + i);
        }
        for (Size t = 0; t < n; t++) {
            vec sum = *(vec *)(out + t * d + i);
#pragma GCC unroll 8
            for (Size r = 0; r < rows; r++) {
                sum += weights[r * room + t] * mine[r];
            }
            *(vec *)(out + t * d + i) = sum;
        }
    }
}

INLINE void add_outer(const float *weights, const float *x, float *restrict out, Size rows,
                       Size d, Size n, Size room)
{
    if (rows == QUERIES) {
        outer(weights, x, out, QUERIES, d, n, room);
        return;
    }
    for (Size r = 0; r < rows; r++) {
        outer(weights + r * room, x + r * d, out, 1, d, n, room);
    }
}

/* Weights (rows, room) of some queries of one head, from position `first` on; 0 after a query's own
 * position. */
INLINE void weigh(const Attention *p, const float *queries, const float *keys, const float *mask_bias,
                  Size first, Size rows, float *restrict weights)
{
    tile(queries, keys, weights, rows, p->d, p->past + first + rows, p->room);
    for (Size r = 0; r < rows; r++) {
        float *restrict row = weights + r * p->room;
        Size seen = p->past + first + r + 1;
        for (Size t = 0; t < seen; t++) {
            row[t] *= p->scale;
        }
        for (Size t = 0; t < p->past; t++) {
            row[t] += mask_bias[t];
        }
        softmax_row(row, seen);
        for (Size t = seen; t < p->past + first + rows; t++) {
            row[t] = 0;
        }
    }
}

/* An item is one key head of one row; scores exist for QUERIES queries at once. */
STEP void attend(const void *what, Size from, Size to)
{
    const Attention *p = what;
    float *scratch = malloc((size_t)((p->d + QUERIES) * p->room) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(p->failed, true);
        return;
    }
    float *transposed = scratch, *weights = scratch + p->d * p->room;
    for (Size item = from; item < to; item++) {
        Size total = p->past + p->length, start = item * p->queried;
        const float *values = p->values + item * total * p->d;
        const float *mask_bias = p->mask_bias + item / p->heads * p->past;
        transpose(p->keys + item * total * p->d, transposed, total, p->d, p->room);
        for (Size q = 0, rows; q < p->queried; q += rows) {
            Size first = q % p->length;
            rows = p->length - first < QUERIES ? p->length - first : QUERIES;
            weigh(p, p->queries + (start + q) * p->d, transposed, mask_bias, first, rows, weights);
            weighted_sum(weights, values, p->out + (start + q) * p->d, rows, p->d,
                     p->past + first + rows, p->room);
        }
    }
    free(scratch);
}

STEP void attend_back(const void *what, Size from, Size to)
{
    const Attention *p = what;
    float *scratch = malloc((size_t)((2 * p->d + 2 * QUERIES) * p->room) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(p->failed, true);
        return;
    }
    float *transposed = scratch, *transposed_values = transposed + p->d * p->room;
    float *weights = transposed_values + p->d * p->room, *grads = weights + QUERIES * p->room;
    for (Size item = from; item < to; item++) {
        Size total = p->past + p->length, start = item * p->queried;
        const float *keys = p->keys + item * total * p->d;
        const float *mask_bias = p->mask_bias + item / p->heads * p->past;
        float *grad_keys = p->grad_keys + item * total * p->d;
        float *grad_values = p->grad_values + item * total * p->d;
        transpose(keys, transposed, total, p->d, p->room);
        transpose(p->values + item * total * p->d, transposed_values, total, p->d, p->room);
        for (Size q = 0, rows; q < p->queried; q += rows) {
            Size first = q % p->length;
            rows = p->length - first < QUERIES ? p->length - first : QUERIES;
            Size seen = p->past + first + rows;
            const float *queries = p->queries + (start + q) * p->d;
            const float *grad = p->grad + (start + q) * p->d;
            weigh(p, queries, transposed, mask_bias, first, rows, weights);
            tile(grad, transposed_values, grads, rows, p->d, seen, p->room);
            add_outer(weights, grad, grad_values, rows, p->d, seen, p->room);
            for (Size r = 0; r < rows; r++) {
                float *restrict row = grads + r * p->room;
                const float *restrict mine = weights + r * p->room;
                float rowsum = p->rowsum[start + q + r];
                for (Size t = 0; t < seen; t++) {
                    row[t] = (row[t] - rowsum) * mine[t] * p->scale;
                }
            }
            weighted_sum(grads, keys, p->out + (start + q) * p->d, rows, p->d, seen, p->room);
            add_outer(grads, queries, grad_keys, rows, p->d, seen, p->room);
        }
    }
    free(scratch);
}

/* Scores of `each` queries (d,) with keys (n, d), multiplied by `scale`. */
INLINE void score(const float *queries, const float *keys, float *restrict scores, Size each, Size n,
                  Size room, Size d, float scale)
{
    for (Size t = 0; t < n; t++) {
        for (Size r = 0; r < each; r++) {
            vec sum = {0};
            for (Size i = 0; i < d; i += LANES) {
                sum += *(const vec *)(queries + r * d + i) * *(const vec *)(keys + t * d + i);
            }
            scores[r * room + t] = sum_of(sum) * scale;
        }
    }
}

/* Adds the weighted sum of values (n, d) to out (d,). */
INLINE void add_weighted(const float *weights, const float *values, float *restrict out, Size n,
                         Size d)
{
    Size i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        vec sums[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            sums[v] = *(vec *)(out + i + v * LANES);
        }
        for (Size t = 0; t < n; t++) {
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                sums[v] += weights[t] * *(const vec *)(values + t * d + i + v * LANES);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            *(vec *)(out + i + v * LANES) = sums[v];
        }
    }
    for (; i < d; i += LANES) {
        vec sum = *(vec *)(out + i);
        for (Size t = 0; t < n; t++) {
            sum += weights[t] * *(const vec *)(values + t * d + i);
        }
        *(vec *)(out + i) = sum;
    }
}

/* Copy one column to contiguous numbers (n,), and back. */
INLINE void take_column(const float *columns, float *restrict out, Size n, Size step)
{
    for (Size i = 0; i < n; i++) {
        out[i] = columns[i * step];
    }
}

INLINE void put_column(const float *x, float *restrict columns, Size n, Size step)
{
    for (Size i = 0; i < n; i++) {
        columns[i * step] = x[i];
    }
}

/* Attends with one key head of one row; `scratch` holds its queries, scores and output. */
INLINE void attend_head(const DecodeAttention *p, Size row, Size head, float *scratch)
{
    const Size size = p->each * p->d, item = row * p->heads + head, own = p->lengths[row] + 1;
    float *queries = scratch, *found = queries + size, *scores = found + size;
    float *keys = p->keys + item * p->room * p->d, *values = p->values + item * p->room * p->d;
    const float *past_values = NULL;
    Size past = 0;
    take_column(p->queries + head * size * p->rows + row, queries, size, p->rows);
    take_column(p->new_keys + head * p->d * p->rows + row, keys + (own - 1) * p->d, p->d, p->rows);
    take_column(p->new_values + head * p->d * p->rows + row, values + (own - 1) * p->d, p->d,
                p->rows);
    if (p->prompts != NULL) {
        const int64_t *prompt = p->prompts + 4 * row;
        past = prompt[2];
        past_values = (const float *)(intptr_t)prompt[1] + head * prompt[3];
        score(queries, (const float *)(intptr_t)prompt[0] + head * prompt[3], scores, p->each, past,
              p->longest, p->d, p->scale);
    }
    score(queries, keys, scores + past, p->each, own, p->longest, p->d, p->scale);
    const Size whole = (past + own + LANES - 1) / LANES * LANES;
    for (Size r = 0; r < p->each; r++) {
        float *weights = scores + r * p->longest, *out = found + r * p->d;
        for (Size t = past + own; t < whole; t++) {
            weights[t] = -INFINITY; /* pads to whole vectors */
        }
        softmax_row(weights, whole);
        for (Size i = 0; i < p->d; i++) {
            out[i] = 0;
        }
        add_weighted(weights, past_values, out, past, p->d);
        add_weighted(weights + past, values, out, own, p->d);
    }
    put_column(found, p->out + head * size * p->rows + row, size, p->rows);
}

STEP void attend_token(const void *what, Size from, Size to)
{
    const DecodeAttention *p = what;
    float *scratch = malloc((size_t)(p->each * (2 * p->d + p->longest)) * sizeof(float));
    if (scratch == NULL) {
        atomic_store(p->failed, true);
        return;
    }
    for (Size item = from; item < to; item++) {
        attend_head(p, item / p->heads, item % p->heads, scratch);
    }
    free(scratch);
}
