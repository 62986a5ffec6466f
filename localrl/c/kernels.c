/* localrl._kernels: steps of a transformer's block that NumPy would take several passes for.
 *
 * Every function has its counterpart in `policy/array_math.py` or `array_attention.py`, which says
 * what it computes and is used where this module could not be built. Arrays are float32 and contiguous; states are columns,
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

/* Parts of this one file, in this order; each step of a loop is compiled into it. */
#include "team.h"
#include "arithmetic.h"
#include "columns.h"
#include "attention.h"

enum { MOST_ARGUMENTS = 9 };

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
