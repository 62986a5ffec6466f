/* localrl._kernels: steps of a transformer's block that NumPy would take several passes for.
 *
 * Every function has its counterpart in `policy/array_math.py`, which says what it computes and is
 * used where this module could not be built. Arrays are float32 and contiguous; states are columns,
 * (.., d, n) for n tokens. Results are written into arrays that the caller gives.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

enum { LANES = 16, ROWS = 8, COLUMNS = 64, MOST_ARGUMENTS = 9 };

/* -- the team: one piece of work, done by several threads ----------------------------------------
 *
 * A piece is at most some 100 us long and the next one follows soon, so helpers look out for it for
 * a while before they sleep, and let others run meanwhile. Parts are taken one by one: a helper
 * whose processor is busy with something else takes few.
 */
enum { MOST_HELPERS = 7, LOOKS = 400, PART = 1 << 14 };

/* Items from `from` to before `to` of some work. */
typedef void Work(const void *what, Py_ssize_t from, Py_ssize_t to);

static struct {
    Work *work;
    const void *what;
    Py_ssize_t items, each, parts;
    atomic_long next, finished;
    atomic_uint turn;  /* odd while there is work */
    atomic_int inside; /* helpers that may be looking at it */
    atomic_int asleep;
    atomic_flag taken;
    pthread_mutex_t lock;
    pthread_cond_t woken;
    int helpers, wanted; /* that there are, and that are asked for */
    int active;          /* that this work is for */
} team = {.taken = ATOMIC_FLAG_INIT,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .woken = PTHREAD_COND_INITIALIZER};

static void take_parts(void)
{
    for (;;) {
        long part = atomic_fetch_add(&team.next, 1);
        if (part >= team.parts) {
            return;
        }
        Py_ssize_t from = part * team.each, to = from + team.each;
        team.work(team.what, from, to < team.items ? to : team.items);
        atomic_fetch_add(&team.finished, 1);
    }
}

static void *help(void *number)
{
    unsigned seen = 0;
    for (;;) {
        for (int looks = 0; atomic_load(&team.turn) == seen; looks++) {
            if (looks < LOOKS) {
                sched_yield();
                continue;
            }
            pthread_mutex_lock(&team.lock);
            atomic_fetch_add(&team.asleep, 1);
            while (atomic_load(&team.turn) == seen) {
                pthread_cond_wait(&team.woken, &team.lock);
            }
            atomic_fetch_sub(&team.asleep, 1);
            pthread_mutex_unlock(&team.lock);
        }
        atomic_fetch_add(&team.inside, 1);
        seen = atomic_load(&team.turn);
        if (seen & 1 && (intptr_t)number < team.active) {
            take_parts();
        }
        atomic_fetch_sub(&team.inside, 1);
    }
    return NULL;
}

/* A child of a fork has no helpers. */
static void forget_helpers(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.woken, NULL);
    atomic_flag_clear(&team.taken);
    atomic_store(&team.turn, 0);
    atomic_store(&team.inside, 0);
    atomic_store(&team.asleep, 0);
    team.helpers = 0;
}

static void find_helpers(void)
{
    while (team.helpers < team.wanted) {
        pthread_t helper;
        if (pthread_create(&helper, NULL, help, (void *)(intptr_t)team.helpers) != 0) {
            team.wanted = team.helpers;
            return;
        }
        pthread_detach(helper);
        team.helpers++;
    }
}

/* Do all items of the work, of which one takes about `size` steps of arithmetic; alone where that is
 * little, or where another thread has the team. */
static void together(Work *work, const void *what, Py_ssize_t items, Py_ssize_t size)
{
    Py_ssize_t each = size < PART ? PART / (size > 0 ? size : 1) : 1;
    Py_ssize_t parts = items / each + (items % each != 0);
    if (parts < 2 || team.wanted < 1 || atomic_flag_test_and_set(&team.taken)) {
        work(what, 0, items);
        return;
    }
    find_helpers();
    team.active = team.wanted;
    team.work = work;
    team.what = what;
    team.items = items;
    team.each = each;
    team.parts = parts;
    atomic_store(&team.next, 0);
    atomic_store(&team.finished, 0);
    atomic_fetch_add(&team.turn, 1);
    if (atomic_load(&team.asleep) > 0) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.woken);
        pthread_mutex_unlock(&team.lock);
    }
    take_parts();
    while (atomic_load(&team.finished) < parts) {
        sched_yield();
    }
    atomic_fetch_add(&team.turn, 1);
    while (atomic_load(&team.inside) > 0) {
        sched_yield();
    }
    atomic_flag_clear(&team.taken);
}

/* -- arithmetic ------------------------------------------------------------------------------- */

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

/* x (rows, d) times columns (d, room), for the first n columns, whole vectors of them. */
INLINE void tile(const float *x, const float *columns, float *restrict out, Py_ssize_t rows,
                 Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    for (Py_ssize_t t = 0; t < n; t += LANES) {
        if (rows == ROWS) {
            rows_times(x, d, columns + t, room, out + t, room, ROWS, d, LANES);
        } else {
            for (Py_ssize_t r = 0; r < rows; r++) {
                rows_times(x + r * d, d, columns + t, room, out + r * room + t, room, 1, d, LANES);
            }
        }
    }
}

/* The sum over n places of weights (rows, room) times x (n, d). */
INLINE void gathered(const float *weights, const float *x, float *restrict out, Py_ssize_t rows,
                     Py_ssize_t d, Py_ssize_t n, Py_ssize_t room)
{
    for (Py_ssize_t i = 0; i < d; i += LANES) {
        if (rows == ROWS) {
            rows_times(weights, room, x + i, d, out + i, d, ROWS, n, LANES);
        } else {
            for (Py_ssize_t r = 0; r < rows; r++) {
                rows_times(weights + r * room, room, x + i, d, out + r * d + i, d, 1, n, LANES);
            }
        }
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

/* -- the functions that Python sees ----------------------------------------------------------- */

typedef struct {
    Py_buffer views[MOST_ARGUMENTS];
    int count;
} Arrays;

static void release(Arrays *arrays)
{
    while (arrays->count > 0) {
        PyBuffer_Release(&arrays->views[--arrays->count]);
    }
}

/* Take the first `count` arguments as contiguous arrays; `written` has a bit for each that is
 * written. All are float32, but for those of the bits `whole`, which are int64. */
static bool take(Arrays *arrays, PyObject *const *given, Py_ssize_t got, int count, int all,
                 unsigned written, unsigned whole)
{
    arrays->count = 0;
    if (got != all) {
        PyErr_Format(PyExc_TypeError, "%d arguments are needed, not %zd", all, got);
        return false;
    }
    for (int i = 0; i < count; i++) {
        int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (written >> i & 1 ? PyBUF_WRITABLE : 0);
        Py_buffer *view = &arrays->views[i];
        if (PyObject_GetBuffer(given[i], view, flags) != 0) {
            release(arrays);
            return false;
        }
        arrays->count++;
        const char *formats = whole >> i & 1 ? "lq" : "f";
        if (strlen(view->format) != 1 || strchr(formats, view->format[0]) == NULL) {
            PyErr_Format(PyExc_TypeError, "array %d is of the wrong type: %s", i, view->format);
            release(arrays);
            return false;
        }
    }
    return true;
}

static Py_ssize_t numbers(const Arrays *arrays, int place)
{
    return arrays->views[place].len / arrays->views[place].itemsize;
}

static Py_ssize_t axis(const Arrays *arrays, int place, int from_end)
{
    const Py_buffer *view = &arrays->views[place];
    return view->ndim < from_end ? 1 : view->shape[view->ndim - from_end];
}

/* None, or an error where shapes do not fit. */
static PyObject *done(Arrays *arrays, bool fits)
{
    release(arrays);
    if (fits) {
        Py_RETURN_NONE;
    }
    if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "the shapes of these arrays do not go together");
    }
    return NULL;
}

static PyObject *no_memory(Arrays *arrays)
{
    release(arrays);
    return PyErr_NoMemory();
}

/* product(weight, columns, out) */
static PyObject *py_product(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 3, 3, 4, 0)) {
        return NULL;
    }
    Py_ssize_t m = axis(&a, 0, 2), k = axis(&a, 0, 1), n = axis(&a, 1, 1);
    if (numbers(&a, 0) != m * k || numbers(&a, 1) != k * n || numbers(&a, 2) != m * n) {
        return done(&a, false);
    }
    Py_ssize_t blocks = n / LANES + (n % LANES != 0);
    float *padded = calloc((size_t)(blocks * k) * LANES + 1, sizeof(float));
    if (padded == NULL) {
        return no_memory(&a);
    }
    const float *columns = a.views[1].buf;
    for (Py_ssize_t first = 0; first < n; first += LANES) {
        Py_ssize_t width = n - first < LANES ? n - first : LANES;
        for (Py_ssize_t i = 0; i < k; i++) {
            for (Py_ssize_t j = 0; j < width; j++) {
                padded[first * k + i * LANES + j] = columns[i * n + first + j];
            }
        }
    }
    const Product p = {a.views[0].buf, padded, a.views[2].buf, m, k, n};
    Py_BEGIN_ALLOW_THREADS
    together(product, &p, (m + ROWS - 1) / ROWS, ROWS * k * blocks / 2);
    Py_END_ALLOW_THREADS
    free(padded);
    return done(&a, true);
}

static PyObject *normed(Work *work, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 3, 4, 4, 0)) {
        return NULL;
    }
    double eps = PyFloat_AsDouble(given[3]);
    Py_ssize_t d = axis(&a, 0, 2), n = axis(&a, 0, 1), total = numbers(&a, 0);
    if (numbers(&a, 1) != d || numbers(&a, 2) != total || d * n == 0 || PyErr_Occurred()) {
        return done(&a, false);
    }
    Py_ssize_t blocks = (n + COLUMNS - 1) / COLUMNS;
    const Norm p = {a.views[0].buf, a.views[1].buf, a.views[2].buf, d, n, blocks, (float)eps};
    Py_BEGIN_ALLOW_THREADS
    together(work, &p, total / (d * n) * blocks, d * (n < COLUMNS ? n : COLUMNS));
    Py_END_ALLOW_THREADS
    return done(&a, true);
}

/* norm(x, weight, out, eps) */
static PyObject *py_norm(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    return normed(norm, given, got);
}

/* norm_back(x, weight, slope, eps) */
static PyObject *py_norm_back(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    return normed(norm_back, given, got);
}

/* swiglu(gate, x, out) */
static PyObject *py_swiglu(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 3, 3, 4, 0)) {
        return NULL;
    }
    Py_ssize_t count = numbers(&a, 0);
    bool fits = numbers(&a, 1) == count && numbers(&a, 2) == count;
    const Swiglu p = {a.views[0].buf, a.views[1].buf, a.views[2].buf, NULL};
    Py_BEGIN_ALLOW_THREADS
    together(swiglu, &p, fits ? count : 0, 1);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* swiglu_back(gate, x, slope, by_gate) */
static PyObject *py_swiglu_back(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 4, 4, 12, 0)) {
        return NULL;
    }
    Py_ssize_t count = numbers(&a, 0);
    bool fits = numbers(&a, 1) == count && numbers(&a, 2) == count && numbers(&a, 3) == count;
    const Swiglu p = {a.views[0].buf, a.views[1].buf, a.views[2].buf, a.views[3].buf};
    Py_BEGIN_ALLOW_THREADS
    together(swiglu_back, &p, fits ? count : 0, 1);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* turn(x, cosines, sines, out, partners) */
static PyObject *py_turn(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 5, 5, 8, 16)) {
        return NULL;
    }
    Py_ssize_t d = axis(&a, 0, 2), n = axis(&a, 0, 1), total = numbers(&a, 0);
    const int64_t *partners = a.views[4].buf;
    bool fits = numbers(&a, 1) == d * n && numbers(&a, 2) == d * n && numbers(&a, 3) == total
                && numbers(&a, 4) == d && n > 0;
    for (Py_ssize_t i = 0; fits && i < d; i++) {
        fits = partners[i] >= 0 && partners[i] < d;
    }
    const Turn p = {a.views[0].buf, a.views[1].buf, a.views[2].buf, partners, a.views[3].buf, d, n};
    Py_BEGIN_ALLOW_THREADS
    together(turn, &p, fits ? total / n : 0, n);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* softmax(scores) or softmax(scores, hidden): (R, .., L, n) and (1 or R, .., L, n) */
static PyObject *py_softmax(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, got == 1 ? 1 : 2, got == 1 ? 1 : 2, 1, 0)) {
        return NULL;
    }
    Py_ssize_t n = axis(&a, 0, 1), total = numbers(&a, 0);
    Softmax p = {a.views[0].buf, NULL, 1, 1, n, true};
    bool fits = n > 0;
    if (got == 2) {
        Py_ssize_t length = axis(&a, 1, 2), seen = numbers(&a, 1);
        if (a.views[0].ndim < 2 || length < 1) {
            return done(&a, false);
        }
        Py_ssize_t outer = a.views[0].shape[0];
        p.hidden = a.views[1].buf;
        p.length = length;
        p.one = seen == length * n;
        fits = fits && axis(&a, 1, 1) == n && axis(&a, 0, 2) % length == 0 && outer > 0
               && (p.one || seen == outer * length * n);
        p.per_outer = fits && total > 0 ? total / n / outer : 1;
    }
    Py_BEGIN_ALLOW_THREADS
    together(softmax, &p, fits ? total / n : 0, n);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* softmax_back(weights, within, slope, scale) */
static PyObject *py_softmax_back(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (!take(&a, given, got, 3, 4, 4, 0)) {
        return NULL;
    }
    double scale = PyFloat_AsDouble(given[3]);
    Py_ssize_t n = axis(&a, 0, 1), rows = numbers(&a, 1);
    bool fits = numbers(&a, 0) == rows * n && numbers(&a, 2) == rows * n && !PyErr_Occurred();
    const SoftmaxBack p = {a.views[0].buf, a.views[1].buf, a.views[2].buf, (float)scale, n};
    Py_BEGIN_ALLOW_THREADS
    together(softmax_back, &p, fits ? rows : 0, n);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* Fill in the shapes of queries, keys, values and what hides, the first four arrays. */
static bool attended(const Arrays *a, PyObject *scale, atomic_bool *failed, Attention *p)
{
    const Py_buffer *queries = &a->views[0], *keys = &a->views[1], *hidden = &a->views[3];
    double factor = PyFloat_AsDouble(scale);
    if (PyErr_Occurred() || queries->ndim != 5 || keys->ndim != 4 || hidden->ndim != 2) {
        return false;
    }
    Py_ssize_t rows = queries->shape[0], total = keys->shape[2];
    *p = (Attention){.queries = queries->buf, .keys = keys->buf, .values = a->views[2].buf,
                     .hidden = hidden->buf, .heads = queries->shape[1],
                     .queried = queries->shape[2] * queries->shape[3],
                     .length = queries->shape[3], .past = hidden->shape[1],
                     .d = queries->shape[4], .scale = (float)factor, .failed = failed};
    p->room = (total + LANES - 1) / LANES * LANES;
    return keys->shape[0] == rows && keys->shape[1] == p->heads && keys->shape[3] == p->d
           && numbers(a, 2) == numbers(a, 1) && hidden->shape[0] == rows
           && p->past + p->length == total && p->d % LANES == 0 && numbers(a, 0) > 0;
}

static PyObject *attending(Work *work, const Attention *p, Arrays *a)
{
    Py_BEGIN_ALLOW_THREADS
    together(work, p, numbers(a, 1) / (p->d * (p->past + p->length)),
             p->queried * p->d * (p->past + p->length / 2));
    Py_END_ALLOW_THREADS
    return atomic_load(p->failed) ? no_memory(a) : done(a, true);
}

/* attend(queries, keys, values, hidden, out, scale) */
static PyObject *py_attend(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    Attention p;
    atomic_bool failed = false;
    if (!take(&a, given, got, 5, 6, 16, 0)) {
        return NULL;
    }
    if (!attended(&a, given[5], &failed, &p) || numbers(&a, 4) != numbers(&a, 0)) {
        return done(&a, false);
    }
    p.out = a.views[4].buf;
    return attending(attend, &p, &a);
}

/* attend_back(queries, keys, values, hidden, within, slope, by_queries, by_keys, by_values, scale)
 */
static PyObject *py_attend_back(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    Attention p;
    atomic_bool failed = false;
    if (!take(&a, given, got, 9, 10, 64 + 128 + 256, 0)) {
        return NULL;
    }
    if (!attended(&a, given[9], &failed, &p) || numbers(&a, 4) * p.d != numbers(&a, 0)
        || numbers(&a, 5) != numbers(&a, 0) || numbers(&a, 6) != numbers(&a, 0)
        || numbers(&a, 7) != numbers(&a, 1) || numbers(&a, 8) != numbers(&a, 1)) {
        return done(&a, false);
    }
    p.within = a.views[4].buf;
    p.slope = a.views[5].buf;
    p.out = a.views[6].buf;
    p.by_keys = a.views[7].buf;
    p.by_values = a.views[8].buf;
    memset(p.by_keys, 0, (size_t)a.views[7].len);
    memset(p.by_values, 0, (size_t)a.views[8].len);
    return attending(attend_back, &p, &a);
}

/* set_threads(n): of these functions, the caller's included; gives the number in force. */
static PyObject *py_set_threads(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    long wanted = got == 1 ? PyLong_AsLong(given[0]) : 0;
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (wanted < 1) {
        PyErr_SetString(PyExc_ValueError, "one number of threads is needed, of at least 1");
        return NULL;
    }
    team.wanted = wanted - 1 < MOST_HELPERS ? (int)wanted - 1 : MOST_HELPERS;
    return PyLong_FromLong(team.wanted + 1);
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FUNCTION(product),     FUNCTION(norm), FUNCTION(norm_back), FUNCTION(swiglu),
    FUNCTION(swiglu_back), FUNCTION(turn), FUNCTION(softmax),   FUNCTION(softmax_back),
    FUNCTION(attend),      FUNCTION(attend_back), FUNCTION(set_threads), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "localrl._kernels", .m_size = -1, .m_methods = functions,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    pthread_atfork(NULL, NULL, forget_helpers);
    PyObject *made = PyModule_Create(&module);
    /* Whether products and attention are faster here than with a BLAS. */
    if (made != NULL && PyModule_AddIntConstant(made, "WIDE", IS_WIDE ? 1 : 0) != 0) {
        Py_CLEAR(made);
    }
    return made;
}
