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
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

/* Into each of those builds. */
#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(64), aligned(4)));

enum { LANES = 16, ROWS = 8, COLUMNS = 64, MOST_ARGUMENTS = 8 };

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
    int helpers, wanted;
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

static void *help(void *nothing)
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
        if (seen & 1) {
            take_parts();
        }
        atomic_fetch_sub(&team.inside, 1);
    }
    return nothing;
}

/* A child of a fork has no helpers. */
static void forget_helpers(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.woken, NULL);
    atomic_flag_clear(&team.taken);
    atomic_store(&team.inside, 0);
    atomic_store(&team.asleep, 0);
    team.helpers = 0;
}

static void find_helpers(void)
{
    while (team.helpers < team.wanted) {
        pthread_t helper;
        if (pthread_create(&helper, NULL, help, NULL) != 0) {
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

/* e ** x to 2 units in the last place, 0 below the smallest normal number; NaN stays NaN. */
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
    return x < least ? 0.0f : found;
}

INLINE float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

/* Some rows of weights (rows, k) times 16 columns. */
INLINE void rows_times(const float *weight, const float *columns, float *restrict out,
                       Py_ssize_t rows, Py_ssize_t k, Py_ssize_t n, Py_ssize_t width)
{
    lanes sums[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        sums[r] = (lanes){0};
    }
    for (Py_ssize_t i = 0; i < k; i++) {
        lanes x = *(const lanes *)(columns + i * LANES);
        if (i % 2 == 0) { /* a line holds the weights of two turns */
            __builtin_prefetch(weight + rows * (k + i));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            sums[r] += weight[r * k + i] * x;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        for (Py_ssize_t j = 0; j < width; j++) {
            out[r * n + j] = sums[r][j];
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
                rows_times(weight, columns, out, ROWS, p->k, p->n, width);
                row += ROWS;
            } else {
                rows_times(weight, columns, out, 1, p->k, p->n, width);
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

/* Items are rows of scores, which become weights. */
WIDE static void softmax(const void *what, Py_ssize_t from, Py_ssize_t to)
{
    const Softmax *p = what;
    Py_ssize_t n = p->n, whole = n - n % LANES;
    for (Py_ssize_t item = from; item < to; item++) {
        float *restrict row = p->scores + item * n;
        float most[LANES], sums[LANES] = {0}, highest = -INFINITY, total = 0;
        if (p->hidden != NULL) {
            Py_ssize_t outer = p->one ? 0 : item / p->per_outer;
            const float *restrict hidden = p->hidden + (outer * p->length + item % p->length) * n;
            for (Py_ssize_t i = 0; i < n; i++) {
                row[i] += hidden[i];
            }
        }
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
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the shapes of these arrays do not go together");
        return NULL;
    }
    Py_RETURN_NONE;
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
        Py_ssize_t length = axis(&a, 1, 2), outer = a.views[0].shape[0], seen = numbers(&a, 1);
        p.hidden = a.views[1].buf;
        p.length = length;
        p.one = seen == length * n;
        fits = fits && axis(&a, 1, 1) == n && axis(&a, 0, 2) % length == 0 && outer > 0
               && (p.one || seen == outer * length * n);
        p.per_outer = fits ? total / n / outer : 1;
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
    FUNCTION(set_threads), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "localrl._kernels", .m_size = -1, .m_methods = functions,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    pthread_atfork(NULL, NULL, forget_helpers);
    return PyModule_Create(&module);
}
