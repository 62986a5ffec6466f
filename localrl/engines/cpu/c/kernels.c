/* localrl._kernels: operations of a transformer block that take NumPy several passes, matrix products
 * that share a team of threads with them, and drawing tokens from logits.
 *
 * Every kernel has a counterpart in `math.py`, `attention.py`, `decode.py` or `sampling.py` of
 * `engines/cpu/`, which defines what it computes and is used if this module could not be built or is not
 * faster. Results are written into arrays provided by the caller.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "steps.h"
#include "team.h"
#include "matmul.h"

/* The build in use, and the numbers of columns its product is used for: bit i for those up to 2 ** i and
 * above half of that. */
static const Steps *steps = &steps16;
static unsigned few = 0;

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

/* Take the first `count` arguments as contiguous arrays; `written` has a bit for each that is written to.
 * All are float32 except those with a bit in `whole`, which are int64. */
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

/* Returns None, or sets an error if shapes do not match. */
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

/* A float32 matrix as a BLAS takes it. */
typedef struct {
    Py_buffer view;
    float *at;
    int64_t rows, columns, step; /* step: between rows, or between columns if transposed (`turned`) */
    bool turned;
} Matrix;

/* Returns false, with an error set, unless it is a float32 matrix with contiguous rows or columns. */
static bool take_matrix(PyObject *given, Matrix *matrix, bool written)
{
    Py_buffer *view = &matrix->view;
    if (PyObject_GetBuffer(given, view, written ? PyBUF_RECORDS : PyBUF_RECORDS_RO) != 0) {
        return false;
    }
    if (strcmp(view->format, "f") == 0 && view->ndim == 2) {
        const Py_ssize_t *size = view->shape, *step = view->strides, each = sizeof(float);
        *matrix = (Matrix){*view, view->buf, size[0], size[1], 0, false};
        bool plain = step[1] == each || size[1] == 1, turned = step[0] == each || size[0] == 1;
        if (plain && step[0] % each == 0 && (step[0] >= size[1] * each || size[0] == 1)) {
            matrix->step = size[0] == 1 ? size[1] : step[0] / each;
            return true;
        }
        if (turned && step[1] % each == 0 && step[1] >= size[0] * each && !written) {
            matrix->step = step[1] / each;
            matrix->turned = true;
            return true;
        }
    }
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_TypeError, "a matrix of float32 with contiguous rows is needed");
    return false;
}

/* The build that multiplies n columns: if they fill half a vector of 64 bytes, the 32-byte build. */
static const Steps *steps_for(Py_ssize_t n)
{
    return steps == &steps64 && n > FEWEST && n <= 8 ? &steps32 : steps;
}

static Py_ssize_t whole_vectors(Py_ssize_t n, const Steps *mine)
{
    Py_ssize_t lanes = mine->bytes / 4;
    return (n + lanes - 1) / lanes * lanes;
}

/* Computes a product with the kernels, on the team. */
static void multiply_blocks(const Product *p)
{
    const Steps *mine = steps_for(p->n);
    bool along = p->n <= FEWEST;
    Py_ssize_t lanes = mine->bytes / 4, vectors = along ? 1 : p->columns_step / lanes;
    parallel_for(along ? mine->product_along : mine->product, p, (p->m + BLOCK - 1) / BLOCK,
             BLOCK * (p->k + p->ranks) * vectors / (along ? 2 : 1));
}

/* True if products of n columns use the kernels and are not left to the BLAS. */
static bool takes(Py_ssize_t n)
{
    int power = 0;
    while (power < 31 && ((Py_ssize_t)1 << power) < n) {
        power++;
    }
    return (Py_ssize_t)1 << power >= n && few >> power & 1;
}

/* Columns (k, n) in the layout that their product takes: as rows if few, else whole vectors. Returns them
 * unchanged, or in new memory, which is stored in `made`; NULL if out of memory. */
static const float *laid_out(const Matrix *x, float **made)
{
    Py_ssize_t k = x->rows, n = x->columns, whole = whole_vectors(n, steps_for(n));
    bool along = n <= FEWEST;
    *made = NULL;
    if (along ? x->turned && x->step == k : whole == n && !x->turned && x->step == n) {
        return x->at;
    }
    Py_ssize_t down = x->turned ? 1 : x->step, across = x->turned ? x->step : 1;
    *made = along ? malloc((size_t)(n * k) * sizeof(float) + 1)
                  : calloc((size_t)(whole * k) + 1, sizeof(float));
    if (*made == NULL) {
        return NULL;
    }
    for (Py_ssize_t j = 0; along && j < n; j++) {
        for (Py_ssize_t i = 0; i < k; i++) {
            (*made)[j * k + i] = x->at[i * down + j * across];
        }
    }
    for (Py_ssize_t i = 0; !along && i < k; i++) {
        for (Py_ssize_t j = 0; j < n; j++) {
            (*made)[i * whole + j] = x->at[i * down + j * across];
        }
    }
    return *made;
}

/* Multiplies few columns with the kernels. Returns false if out of memory. */
static bool multiply_few(const Matrix *weight, const Matrix *x, const Matrix *out, bool add)
{
    float *made;
    const float *columns = laid_out(x, &made);
    if (columns == NULL) {
        return false;
    }
    const Product p = {.weight = weight->at, .columns = columns, .out = out->at, .m = weight->rows,
                       .k = weight->columns, .n = x->columns,
                       .columns_step = whole_vectors(x->columns, steps_for(x->columns)),
                       .row_step = out->turned ? 1 : out->step,
                       .column_step = out->turned ? out->step : 1, .add = add};
    multiply_blocks(&p);
    free(made);
    return true;
}

/* Out = weight x + up (down x), for few columns: the adapter's part is added to the same sums. Returns
 * false if out of memory. */
static bool multiply_adapted(const Matrix *weight, const Matrix *down, const Matrix *up,
                             const Matrix *x, const Matrix *out)
{
    float *made, *low = NULL;
    Py_ssize_t n = x->columns, whole = whole_vectors(n, steps_for(n));
    bool along = n <= FEWEST;
    const float *columns = laid_out(x, &made);
    if (columns != NULL) {
        low = malloc((size_t)(down->rows * (along ? n : whole)) * sizeof(float) + 1);
    }
    if (low != NULL) {
        Product p = {.weight = down->at, .columns = columns, .out = low, .m = down->rows,
                     .k = down->columns, .n = along ? n : whole, .columns_step = whole,
                     .row_step = along ? 1 : whole, .column_step = along ? down->rows : 1};
        multiply_blocks(&p);
        p.weight = weight->at;
        p.m = weight->rows;
        p.n = n;
        p.out = out->at;
        p.row_step = out->step;
        p.column_step = 1;
        p.up = up->at;
        p.low = low;
        p.ranks = down->rows;
        multiply_blocks(&p);
    }
    free(made);
    free(low);
    return low != NULL;
}

/* Out = a b, or out += a b. `out` has contiguous rows, or is transposed and takes few columns. */
static bool multiply(const Matrix *a, const Matrix *b, const Matrix *out, bool add)
{
    bool whole = !a->turned && a->step == a->columns;
    if (whole && takes(b->columns)) {
        return multiply_few(a, b, out, add);
    }
    float beta = add ? 1 : 0;
    if (b->columns == 1 && (out->step == 1 || out->turned)) {
        team_gemv(ROW_MAJOR, a->turned ? TRANS : NO_TRANS, a->turned ? a->columns : a->rows,
                  a->turned ? a->rows : a->columns, 1, a->at, a->step, b->at,
                  b->turned ? 1 : b->step, beta, out->at, 1);
    } else if (out->turned) { /* out' = b' a' */
        team_gemm(ROW_MAJOR, b->turned ? NO_TRANS : TRANS, a->turned ? NO_TRANS : TRANS, b->columns,
                  a->rows, a->columns, 1, b->at, b->step, a->at, a->step, beta, out->at, out->step);
    } else {
        team_gemm(ROW_MAJOR, a->turned ? TRANS : NO_TRANS, b->turned ? TRANS : NO_TRANS, a->rows,
                  b->columns, a->columns, 1, a->at, a->step, b->at, b->step, beta, out->at,
                  out->step);
    }
    return true;
}

/* matmul(a, b, out, add, turned): out = a @ b, or out += a @ b; turned: out is the transpose */
static PyObject *py_matmul(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Matrix a, b, out;
    if (got != 5) {
        return PyErr_Format(PyExc_TypeError, "5 arguments are needed, not %zd", got);
    }
    int add = PyObject_IsTrue(given[3]), turned = PyObject_IsTrue(given[4]);
    if (add < 0 || turned < 0 || blas_gemm == NULL) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_RuntimeError, "lend() a BLAS first");
    }
    if (!take_matrix(given[0], &a, false)) {
        return NULL;
    }
    if (!take_matrix(given[1], &b, false)) {
        PyBuffer_Release(&a.view);
        return NULL;
    }
    if (!take_matrix(given[2], &out, true)) {
        PyBuffer_Release(&a.view);
        PyBuffer_Release(&b.view);
        return NULL;
    }
    if (turned) { /* the transpose of the result has contiguous rows */
        int64_t rows = out.rows;
        out.rows = out.columns;
        out.columns = rows;
        out.turned = true;
    }
    bool fits = a.columns == b.rows && out.rows == a.rows && out.columns == b.columns
                && a.rows * a.columns * b.columns > 0;
    bool made = false;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        made = multiply(&a, &b, &out, add);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&a.view);
    PyBuffer_Release(&b.view);
    PyBuffer_Release(&out.view);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the shapes of these matrices do not go together");
        return NULL;
    }
    if (!made) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

/* linear(weight, down, up, x, out): out = weight @ x + up @ (down @ x) */
static PyObject *py_linear(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    enum { WEIGHT, DOWN, UP, X, OUT, ALL };
    Matrix m[ALL];
    int taken = 0;
    if (got != ALL) {
        return PyErr_Format(PyExc_TypeError, "5 matrices are needed, not %zd", got);
    }
    while (taken < ALL && take_matrix(given[taken], &m[taken], taken == OUT)) {
        taken++;
    }
    bool fits = taken == ALL && m[WEIGHT].columns == m[X].rows && m[DOWN].columns == m[X].rows
                && m[UP].columns == m[DOWN].rows && m[UP].rows == m[WEIGHT].rows
                && m[OUT].rows == m[WEIGHT].rows && m[OUT].columns == m[X].columns
                && m[X].columns > 0;
    for (int i = WEIGHT; fits && i <= UP; i++) {
        fits = !m[i].turned && m[i].step == m[i].columns;
    }
    bool made = false;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        made = multiply_adapted(&m[WEIGHT], &m[DOWN], &m[UP], &m[X], &m[OUT]);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < taken; i++) {
        PyBuffer_Release(&m[i].view);
    }
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the shapes of these matrices do not go together");
        return NULL;
    }
    if (!made) {
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
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
    parallel_for(work, &p, total / (d * n) * blocks, d * (n < COLUMNS ? n : COLUMNS));
    Py_END_ALLOW_THREADS
    return done(&a, true);
}

/* norm(x, weight, out, eps) */
static PyObject *py_norm(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    return normed(steps->norm, given, got);
}

/* norm_back(x, weight, grad, eps): grad w.r.t. the output becomes that w.r.t. x */
static PyObject *py_norm_back(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    return normed(steps->norm_back, given, got);
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
    parallel_for(steps->swiglu, &p, fits ? count : 0, 1);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* swiglu_back(gate, x, grad, grad_gate): grad w.r.t. the output becomes that w.r.t. x */
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
    parallel_for(steps->swiglu_back, &p, fits ? count : 0, 1);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* Fill in the shapes of queries, keys, values and the additive mask, the first four arrays. */
static bool attended(const Arrays *a, PyObject *scale, atomic_bool *failed, Attention *p)
{
    const Py_buffer *queries = &a->views[0], *keys = &a->views[1], *mask_bias = &a->views[3];
    double factor = PyFloat_AsDouble(scale);
    if (PyErr_Occurred() || queries->ndim != 5 || keys->ndim != 4 || mask_bias->ndim != 2) {
        return false;
    }
    Py_ssize_t rows = queries->shape[0], total = keys->shape[2];
    *p = (Attention){.queries = queries->buf, .keys = keys->buf, .values = a->views[2].buf,
                     .mask_bias = mask_bias->buf, .heads = queries->shape[1],
                     .queried = queries->shape[2] * queries->shape[3],
                     .length = queries->shape[3], .past = mask_bias->shape[1],
                     .d = queries->shape[4], .scale = (float)factor, .failed = failed};
    Py_ssize_t lanes = steps->bytes / 4;
    p->room = (total + lanes - 1) / lanes * lanes;
    return keys->shape[0] == rows && keys->shape[1] == p->heads && keys->shape[3] == p->d
           && numbers(a, 2) == numbers(a, 1) && mask_bias->shape[0] == rows
           && p->past + p->length == total && p->d % lanes == 0 && numbers(a, 0) > 0;
}

static PyObject *attending(Work *work, const Attention *p, Arrays *a)
{
    Py_BEGIN_ALLOW_THREADS
    parallel_for(work, p, numbers(a, 1) / (p->d * (p->past + p->length)),
             p->queried * p->d * (p->past + p->length / 2));
    Py_END_ALLOW_THREADS
    return atomic_load(p->failed) ? no_memory(a) : done(a, true);
}

/* attend(queries, keys, values, mask_bias, out, scale) */
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
    return attending(steps->attend, &p, &a);
}

/* attend_back(queries, keys, values, mask_bias, rowsum, grad, grad_queries, grad_keys, grad_values, scale)
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
    p.rowsum = a.views[4].buf;
    p.grad = a.views[5].buf;
    p.out = a.views[6].buf;
    p.grad_keys = a.views[7].buf;
    p.grad_values = a.views[8].buf;
    memset(p.grad_keys, 0, (size_t)a.views[7].len);
    memset(p.grad_values, 0, (size_t)a.views[8].len);
    return attending(steps->attend_back, &p, &a);
}

/* attend_token(queries, new keys, new values, keys, values, lengths, out, prompts or None, scale) */
static PyObject *py_attend_token(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    atomic_bool failed = false;
    if (got != 9) {
        return PyErr_Format(PyExc_TypeError, "9 arguments are needed, not %zd", got);
    }
    bool alone = given[7] == Py_None;
    if (!take(&a, given, 9, alone ? 7 : 8, 9, 8 + 16 + 64, 32 + 128)) {
        return NULL;
    }
    double scale = PyFloat_AsDouble(given[8]);
    const Py_buffer *keys = &a.views[3];
    if (PyErr_Occurred() || keys->ndim != 4) {
        return done(&a, false);
    }
    Py_ssize_t rows = numbers(&a, 5), heads = keys->shape[1], d = keys->shape[3];
    Py_ssize_t one = rows * heads * d, lanes = steps->bytes / 4;
    if (one == 0 || d % lanes != 0 || numbers(&a, 0) % one != 0) {
        return done(&a, false);
    }
    DecodeAttention p = {.queries = a.views[0].buf, .new_keys = a.views[1].buf,
                         .new_values = a.views[2].buf, .keys = keys->buf, .values = a.views[4].buf,
                         .lengths = a.views[5].buf, .out = a.views[6].buf,
                         .prompts = alone ? NULL : a.views[7].buf, .rows = rows, .heads = heads,
                         .each = numbers(&a, 0) / one, .d = d, .room = keys->shape[2],
                         .scale = (float)scale, .failed = &failed};
    bool fits = keys->shape[0] >= rows && numbers(&a, 1) == one && numbers(&a, 2) == one
                && numbers(&a, 4) == numbers(&a, 3) && numbers(&a, 6) == numbers(&a, 0)
                && (alone || numbers(&a, 7) == 4 * rows);
    Py_ssize_t seen = 0;
    for (Py_ssize_t row = 0; fits && row < rows; row++) {
        Py_ssize_t past = alone ? 0 : (Py_ssize_t)p.prompts[4 * row + 2], own = p.lengths[row] + 1;
        fits = own > 0 && own <= p.room && past >= 0;
        p.longest = past + own > p.longest ? past + own : p.longest;
        seen += past + own;
    }
    if (!fits) {
        return done(&a, false);
    }
    p.longest = whole_vectors(p.longest, steps);
    Py_BEGIN_ALLOW_THREADS
    parallel_for(steps->attend_token, &p, rows * heads, 2 * p.each * (d / lanes) * (seen / rows));
    Py_END_ALLOW_THREADS
    return atomic_load(&failed) ? no_memory(&a) : done(&a, true);
}

/* draw(logits, uniforms or None, tokens, logprobs, entropies, temperature): None: most likely token */
static PyObject *py_draw(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    Arrays a;
    if (got != 6) {
        return PyErr_Format(PyExc_TypeError, "6 arguments are needed, not %zd", got);
    }
    bool greedy = given[1] == Py_None;
    PyObject *arrays[] = {given[0], given[2], given[3], given[4], given[1]};
    if (!take(&a, arrays, 5, greedy ? 4 : 5, 5, 2 + 4 + 8, 2)) {
        return NULL;
    }
    double temperature = PyFloat_AsDouble(given[5]);
    Py_ssize_t rows = numbers(&a, 1), vocabulary = axis(&a, 0, 1);
    bool fits = !PyErr_Occurred() && numbers(&a, 0) == rows * vocabulary && vocabulary > 0
                && numbers(&a, 2) == rows && numbers(&a, 3) == rows
                && (greedy || numbers(&a, 4) == rows);
    const Draw p = {a.views[0].buf, greedy ? NULL : a.views[4].buf, a.views[1].buf,
                    a.views[2].buf, a.views[3].buf, vocabulary, (float)temperature};
    Py_BEGIN_ALLOW_THREADS
    parallel_for(steps->draw, &p, fits ? rows : 0, vocabulary);
    Py_END_ALLOW_THREADS
    return done(&a, fits);
}

/* lend(sgemm, sgemv): takes addresses in a single-threaded BLAS with 64-bit integers; returns addresses of
 * the same functions run by the team. */
static PyObject *py_lend(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    if (got != 2) {
        return PyErr_Format(PyExc_TypeError, "2 addresses are needed, not %zd", got);
    }
    void *gemm = PyLong_AsVoidPtr(given[0]), *gemv = PyLong_AsVoidPtr(given[1]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (gemm == NULL || gemv == NULL) {
        return PyErr_Format(PyExc_ValueError, "lend() needs two addresses other than 0");
    }
    blas_gemm = (Gemm *)gemm;
    blas_gemv = (Gemv *)gemv;
    return Py_BuildValue("KK", (unsigned long long)(uintptr_t)&team_gemm,
                         (unsigned long long)(uintptr_t)&team_gemv);
}

static const Steps *build_of(long bytes)
{
    const Steps *all[] = {&steps16, &steps32, &steps64};
    for (int i = 0; i < 3; i++) {
        if (all[i]->bytes == bytes) {
            return all[i];
        }
    }
    return NULL;
}

/* True if this processor and the operating system support the instructions of a build. */
static bool can_run(long bytes)
{
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (bytes == 64) {
        return narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
               && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    return bytes == 16 || (bytes == 32 && narrow);
#else
    return bytes == 16;
#endif
}

/* builds(): vector bytes of each build that this processor can run, ascending */
static PyObject *py_builds(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    PyObject *found = PyList_New(0);
    for (long bytes = 16; found != NULL && bytes <= 64; bytes *= 2) {
        if (can_run(bytes)) {
            PyObject *one = PyLong_FromLong(bytes);
            if (one == NULL || PyList_Append(found, one) != 0) {
                Py_CLEAR(found);
            }
            Py_XDECREF(one);
        }
    }
    return found;
}

/* use(bytes, columns): use this build, and its product for the numbers of columns given by bits: bit i for
 * those up to 2 ** i and above half of that */
static PyObject *py_use(PyObject *self, PyObject *const *given, Py_ssize_t got)
{
    if (got != 2) {
        return PyErr_Format(PyExc_TypeError, "2 numbers are needed, not %zd", got);
    }
    long bytes = PyLong_AsLong(given[0]), columns = PyLong_AsLong(given[1]);
    if (PyErr_Occurred()) {
        return NULL;
    }
    if (!can_run(bytes) || build_of(bytes) == NULL || columns < 0 || columns > INT32_MAX) {
        return PyErr_Format(PyExc_ValueError, "there is no build of %ld bytes for columns %ld here",
                            bytes, columns);
    }
    steps = build_of(bytes);
    few = (unsigned)columns;
    Py_RETURN_NONE;
}

/* set_threads(n): threads of these functions, the caller's included; returns the number in effect. */
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
    FUNCTION(matmul), FUNCTION(linear),      FUNCTION(norm),         FUNCTION(norm_back),
    FUNCTION(swiglu), FUNCTION(swiglu_back), FUNCTION(attend),       FUNCTION(attend_back),
    FUNCTION(draw),   FUNCTION(lend),        FUNCTION(attend_token), FUNCTION(builds),
    FUNCTION(use),    FUNCTION(set_threads), {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "localrl._kernels", .m_size = -1, .m_methods = functions,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    pthread_atfork(NULL, NULL, forget_helpers);
    return PyModule_Create(&module);
}
