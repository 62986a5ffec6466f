/* localrl._blas: lends NumPy's OpenBLAS to MLX.
 *
 * MLX's Linux wheel imports cblas_{s,d,c}gemm and brings the reference BLAS to serve them. NumPy's
 * wheel carries OpenBLAS, whose names have a prefix and a suffix and whose integers are 64 bits
 * wide. This module exports the plain names and forwards each call, widening the integers.
 *
 * Python loads extension modules with local symbols, so importing this one changes nothing. Only
 * publish(), which already holds the addresses to forward to, makes the names global; a library
 * loaded after that resolves its cblas_*gemm here.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Values from the CBLAS standard, whose enumerations are passed as int. */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void real32_gemm(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t,
                         const float *, int64_t, float, float *, int64_t);
typedef void real64_gemm(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t,
                         const double *, int64_t, double, double *, int64_t);
typedef void complex_gemm(int, int, int, int64_t, int64_t, int64_t, const void *, const void *,
                          int64_t, const void *, int64_t, const void *, void *, int64_t);

typedef void real32_gemv(int, int, int64_t, int64_t, float, const float *, int64_t, const float *,
                         int64_t, float, float *, int64_t);

static real32_gemm *target_sgemm;
static real32_gemv *target_sgemv;
static real64_gemm *target_dgemm;
static complex_gemm *target_cgemm;
static atomic_ulong calls;

static inline void count_call(void)
{
    /* A lost increment is harmless, while an atomic instruction for each tiny product has a cost. */
    unsigned long seen = atomic_load_explicit(&calls, memory_order_relaxed);
    atomic_store_explicit(&calls, seen + 1, memory_order_relaxed);
}

/* True if sgemv, row by row, is faster than sgemm for these few rows times a large matrix.
 *
 * sgemm repacks the whole matrix before it multiplies, which never pays off for a few rows; up to about
 * a million multiplications it has kernels that do not repack, and wins. Repacking a transposed matrix
 * costs more, so sgemv is faster for more rows. benchmarks/matmul.md has the figures.
 */
static inline bool rows_are_few(int order, int trans_b, int m, int n, int k)
{
    const int most_rows = trans_b == NO_TRANS ? 2 : 4;
    const int64_t large = 1 << 19;
    return order == ROW_MAJOR && m <= most_rows && (int64_t)n * k > large;
}

static void multiply_rows(int trans_a, int trans_b, int m, int n, int k, float alpha,
                          const float *a, int lda, const float *b, int ldb, float beta, float *c,
                          int ldc)
{
    const bool plain_a = trans_a == NO_TRANS, plain_b = trans_b == NO_TRANS;
    const int64_t next_row = plain_a ? lda : 1, next_element = plain_a ? 1 : lda;
    for (int64_t row = 0; row < m; row++) {
        target_sgemv(ROW_MAJOR, plain_b ? TRANS : NO_TRANS, plain_b ? k : n, plain_b ? n : k,
                     alpha, b, ldb, a + row * next_row, next_element, beta, c + row * ldc, 1);
    }
}

EXPORT void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                        const float *a, int lda, const float *b, int ldb, float beta, float *c,
                        int ldc)
{
    count_call();
    if (rows_are_few(order, trans_b, m, n, k)) {
        multiply_rows(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    target_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha,
                        const double *a, int lda, const double *b, int ldb, double beta, double *c,
                        int ldc)
{
    count_call();
    target_dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k,
                        const void *alpha, const void *a, int lda, const void *b, int ldb,
                        const void *beta, void *c, int ldc)
{
    count_call();
    target_cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* Loads this file a second time, which only adds its names to the global scope. */
static int make_names_global(void)
{
    Dl_info self;
    if (!dladdr((void *)&cblas_sgemm, &self) ||
        !dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD)) {
        const char *reason = dlerror();
        PyErr_Format(PyExc_OSError, "cannot make cblas_*gemm global: %s",
                     reason ? reason : "the dynamic linker does not know this module");
        return -1;
    }
    return 0;
}

static PyObject *publish(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long sgemm, dgemm, cgemm, sgemv;
    if (!PyArg_ParseTuple(args, "KKKK:publish", &sgemm, &dgemm, &cgemm, &sgemv)) {
        return NULL;
    }
    if (!sgemm || !dgemm || !cgemm || !sgemv) {
        PyErr_SetString(PyExc_ValueError, "publish() needs four addresses other than 0");
        return NULL;
    }
    target_sgemm = (real32_gemm *)(uintptr_t)sgemm;
    target_dgemm = (real64_gemm *)(uintptr_t)dgemm;
    target_cgemm = (complex_gemm *)(uintptr_t)cgemm;
    target_sgemv = (real32_gemv *)(uintptr_t)sgemv;
    if (make_names_global() < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *call_count(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(atomic_load_explicit(&calls, memory_order_relaxed));
}

static PyMethodDef methods[] = {
    {"publish", publish, METH_VARARGS,
     "publish(sgemm, dgemm, cgemm, sgemv)\n--\n\n"
     "Forward cblas_*gemm to these CBLAS functions of 64-bit integers; make the names global."},
    {"call_count", call_count, METH_NOARGS,
     "call_count()\n--\n\nReturn how many products have come through this module."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "localrl._blas",
    .m_doc = "Lends NumPy's OpenBLAS to MLX; see localrl.backend.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__blas(void)
{
    return PyModuleDef_Init(&definition);
}
