/* arguments.c - what Python passes to a plan: parsed, and checked so that no call of the core can go astray.
 */
#define NO_IMPORT_ARRAY
#include "arguments.h"
#include "dlpack.h"

#include <math.h>
#include <stdlib.h>

static int type_number(gsgd_type type) { return type == GSGD_FLOAT32 ? NPY_FLOAT32 : NPY_FLOAT64; }

/* How tensors of a type tell where they lie; it is asked once for a run of them. */
typedef struct {
    PyTypeObject *type;
    const dlpack_exchange *exchange; /* NULL: they do not */
} source;

static void ask(source *from, PyTypeObject *type) {
    if (from->type == type)
        return;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    const dlpack_exchange *found =
        capsule != NULL ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : NULL;
    Py_XDECREF(capsule);
    PyErr_Clear();
    while (found != NULL && found->major != DLPACK_MAJOR)
        found = found->older;
    *from = (source){type, found != NULL && found->view != NULL ? found : NULL};
}

/* Whether it has this number of axes and is of float32 or float64, as `size` says, on the CPU. */
static int is_real(const dlpack_tensor *t, int ndim, size_t size) {
    return t->device.type == DLPACK_CPU && t->dtype.code == DLPACK_FLOAT && t->dtype.bits == 8 * size &&
           t->dtype.lanes == 1 && t->ndim == ndim;
}

PyObject *gsgd_takes(PyObject *Py_UNUSED(module), PyObject *type) {
    source from = {NULL, NULL};
    if (PyType_Check(type))
        ask(&from, (PyTypeObject *)type);
    return PyBool_FromLong(from.exchange != NULL);
}

PyObject *gsgd_lie_at(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *tensors, *arrays;
    source from = {NULL, NULL};
    if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &tensors, &PyList_Type, &arrays))
        return NULL;
    int same = PyList_Size(tensors) == PyList_Size(arrays);
    for (Py_ssize_t i = 0; same && i < PyList_Size(tensors); ++i) {
        PyObject *item = PyList_GetItem(tensors, i);
        PyArrayObject *a = (PyArrayObject *)PyList_GetItem(arrays, i);
        dlpack_tensor t;
        ask(&from, Py_TYPE(item));
        same = PyArray_Check((PyObject *)a) && from.exchange != NULL && from.exchange->view(item, &t) == 0;
        PyErr_Clear();
        size_t size = same ? (size_t)PyArray_ITEMSIZE(a) : 0;
        same = same && PyArray_ISFLOAT(a) && is_real(&t, PyArray_NDIM(a), size);
        int empty = same && PyArray_SIZE(a) == 0; /* there is nothing at its address */
        same = same && (empty || (char *)t.data + t.byte_offset == PyArray_BYTES(a));
        for (int d = 0; same && d < PyArray_NDIM(a); ++d) {
            int steps = !empty && t.shape[d] > 1;
            same = t.shape[d] == PyArray_DIM(a, d) &&
                   (!steps || t.strides[d] * (ptrdiff_t)size == PyArray_STRIDE(a, d));
        }
    }
    return PyBool_FromLong(same);
}

/* Fill array `i` of role `role` from a tensor. */
static int take_tensor(Plan *self, PyObject *item, const source *from, ptrdiff_t i, int role,
                       const char *what, size_t size) {
    const spec *s = &self->spec[i];
    ptrdiff_t *strides = self->strides + (role * self->arrays + i) * MAX_NDIM;
    dlpack_tensor t;
    if (from->exchange == NULL) {
        PyErr_Format(PyExc_TypeError, "%s of %R: expected a NumPy array, got %R", what, s->name, from->type);
        return 0;
    }
    if (from->exchange->view(item, &t) != 0)
        return 0;
    int fits = is_real(&t, s->ndim, size), empty = 0;
    for (int d = 0; fits && d < s->ndim; ++d) {
        fits = t.shape[d] == s->shape[d];
        empty |= t.shape[d] == 0;
        strides[d] = t.strides[d];
    }
    /* empty ones are there, too; a tensor that wraps others has a shape, but no memory */
    char *data = empty ? (char *)strides : t.data != NULL ? (char *)t.data + t.byte_offset : NULL;
    if (!fits || data == NULL || (uintptr_t)data % size) {
        PyErr_Format(PyExc_ValueError,
                     "%s of %R: expected a tensor of its shape, of float%zd in the CPU's memory, aligned",
                     what, s->name, (Py_ssize_t)(8 * size));
        return 0;
    }
    self->array[role * self->arrays + i] = (gsgd_array){data, strides};
    return 1;
}

/* Fill role `role` from a list of arrays or tensors as the specs say; NULL with an exception set. Where they
 * are OPTIONAL an item may be None. Whether a tensor may be written to can't be checked. */
const gsgd_array *gsgd_take_arrays(Plan *self, PyObject *list, int role, const char *what, int flags) {
    gsgd_array *arrays = self->array + role * self->arrays;
    source from = {NULL, NULL};
    if (!PyList_Check(list) || PyList_Size(list) != self->arrays) {
        PyErr_Format(PyExc_TypeError, "%s: expected a list of %zd arrays", what, (Py_ssize_t)self->arrays);
        return NULL;
    }
    for (ptrdiff_t i = 0; i < self->arrays; ++i) {
        const spec *s = &self->spec[i];
        PyObject *item = PyList_GetItem(list, i);
        if (item == Py_None && flags & OPTIONAL) {
            arrays[i] = (gsgd_array){NULL, NULL};
            continue;
        }
        int number = flags & AS_FLOAT64 ? NPY_FLOAT64 : type_number(s->type);
        ptrdiff_t size = number == NPY_FLOAT32 ? sizeof(float) : sizeof(double);
        if (!PyArray_Check(item)) {
            ask(&from, Py_TYPE(item));
            if (!take_tensor(self, item, &from, i, role, what, (size_t)size))
                return NULL;
            continue;
        }
        PyArrayObject *a = (PyArrayObject *)item;
        if (PyArray_TYPE(a) != number || !PyArray_ISBEHAVED_RO(a)) {
            PyErr_Format(PyExc_TypeError, "%s of %R: expected dtype %s in native byte order, aligned, got %R",
                         what, s->name, number == NPY_FLOAT32 ? "float32" : "float64",
                         (PyObject *)PyArray_DESCR(a));
            return NULL;
        }
        int same = PyArray_NDIM(a) == s->ndim;
        for (int d = 0; same && d < s->ndim; ++d)
            same = PyArray_DIM(a, d) == s->shape[d];
        if (!same) {
            PyObject *expected = PyArray_IntTupleFromIntp(s->ndim, s->shape);
            PyObject *got = PyArray_IntTupleFromIntp(PyArray_NDIM(a), PyArray_DIMS(a));
            if (expected != NULL && got != NULL)
                PyErr_Format(PyExc_ValueError, "%s of %R: expected shape %R, got %R", what, s->name, expected,
                             got);
            Py_XDECREF(expected);
            Py_XDECREF(got);
            return NULL;
        }
        if (flags & WRITABLE && !PyArray_ISWRITEABLE(a)) {
            PyErr_Format(PyExc_ValueError, "%s of %R: expected a writable array, it is read-only", what,
                         s->name);
            return NULL;
        }
        ptrdiff_t *strides = self->strides + (role * self->arrays + i) * MAX_NDIM;
        for (int d = 0; d < s->ndim; ++d) {
            if (PyArray_DIM(a, d) > 1 && PyArray_STRIDE(a, d) % size) {
                PyErr_Format(PyExc_ValueError, "%s of %R: expected strides that are multiples of %zd bytes",
                             what, s->name, (Py_ssize_t)size);
                return NULL;
            }
            strides[d] = PyArray_STRIDE(a, d) / size;
        }
        arrays[i] = (gsgd_array){PyArray_DATA(a), strides};
    }
    return arrays;
}

/* A contiguous array of `units` rows of the given type, or NULL with an exception set. */
void *gsgd_take_units(const Plan *self, PyObject *x, int number, int ndim, const char *what) {
    if (PyArray_Check(x)) {
        PyArrayObject *a = (PyArrayObject *)x;
        if (PyArray_TYPE(a) == number && PyArray_IS_C_CONTIGUOUS(a) && PyArray_ISBEHAVED_RO(a) &&
            PyArray_NDIM(a) == ndim && PyArray_DIM(a, 0) == self->units &&
            (ndim == 1 || PyArray_DIM(a, 1) == 2))
            return PyArray_DATA(a);
    }
    PyErr_Format(PyExc_ValueError, "%s: expected a contiguous array with one row per unit (%zd)", what,
                 (Py_ssize_t)self->units);
    return NULL;
}

/* The same for numbers that the core divides by. */
const double *gsgd_take_factors(const Plan *self, PyObject *x, const char *what) {
    const double *factor = gsgd_take_units(self, x, NPY_FLOAT64, 1, what);
    for (ptrdiff_t u = 0; factor != NULL && u < self->units; ++u)
        if (!isfinite(factor[u]) || factor[u] == 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected finite numbers that are not 0, for unit %zd too",
                         what, (Py_ssize_t)u);
            return NULL;
        }
    return factor;
}

/* x y of numbers that are not negative, or more than MOST. */
static ptrdiff_t times(ptrdiff_t x, ptrdiff_t y) { return y != 0 && x > MOST / y ? MOST + 1 : x * y; }

int gsgd_take_spec(PyObject *item, spec *to) {
    PyObject *name, *shape;
    int type;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "specs: expected tuples (name, shape, dtype character)");
        return 0;
    }
    if (!PyArg_ParseTuple(item, "UO!C", &name, &PyTuple_Type, &shape, &type))
        return 0;
    if (PyTuple_Size(shape) > MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "parameter %R: expected at most %d dimensions", name, MAX_NDIM);
        return 0;
    }
    if (type != 'f' && type != 'd') {
        PyErr_Format(PyExc_ValueError, "parameter %R: expected dtype 'f' or 'd', got '%c'", name, type);
        return 0;
    }
    to->type = type == 'f' ? GSGD_FLOAT32 : GSGD_FLOAT64;
    to->ndim = (int)PyTuple_Size(shape);
    ptrdiff_t size = 1;
    for (int d = 0; d < to->ndim; ++d) {
        to->shape[d] = PyLong_AsSsize_t(PyTuple_GetItem(shape, d));
        if (PyErr_Occurred())
            return 0;
        size = to->shape[d] < 0 ? MOST + 1 : times(size, to->shape[d] ? to->shape[d] : 1);
        if (size > MOST) {
            PyErr_Format(PyExc_ValueError, "parameter %R: %R is no shape", name, shape);
            return 0;
        }
    }
    Py_INCREF(name);
    to->name = name;
    return 1;
}

/* Unit ids of a block, as many as its groups times rows (or columns). */
static const int64_t *take_ids(PyObject *x, ptrdiff_t count) {
    PyArrayObject *a = (PyArrayObject *)x;
    if (PyArray_TYPE(a) != NPY_INT64 || !PyArray_IS_C_CONTIGUOUS(a) || !PyArray_ISBEHAVED_RO(a) ||
        PyArray_SIZE(a) != count) {
        PyErr_SetString(PyExc_ValueError,
                        "expected contiguous native int64 unit ids, one per row and one per column");
        return NULL;
    }
    return PyArray_DATA(a);
}

int gsgd_take_block(PyObject *item, gsgd_block *b) {
    ptrdiff_t extent[GSGD_NDIM], step[GSGD_NDIM];
    int axis[GSGD_NDIM];
    PyObject *rows, *cols;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "blocks: expected tuples");
        return 0;
    }
    if (!PyArg_ParseTuple(item, "n(nnnnnn)(iiiiii)(nnnnnn)inO!O!", &b->array, &extent[0], &extent[1],
                          &extent[2], &extent[3], &extent[4], &extent[5], &axis[0], &axis[1], &axis[2],
                          &axis[3], &axis[4], &axis[5], &step[0], &step[1], &step[2], &step[3], &step[4],
                          &step[5], &b->start_axis, &b->start, &PyArray_Type, &rows, &PyArray_Type, &cols))
        return 0;
    for (int d = 0; d < GSGD_NDIM; ++d) {
        if (extent[d] < 0 || extent[d] > MOST) {
            PyErr_Format(PyExc_ValueError, "a block of %zd entries along a dimension", (Py_ssize_t)extent[d]);
            return 0;
        }
        b->dim[d] = (gsgd_dim){extent[d], step[d], axis[d]};
    }
    b->row_unit = take_ids(rows, times(extent[GSGD_GROUP], extent[GSGD_ROW]));
    b->col_unit = b->row_unit ? take_ids(cols, times(extent[GSGD_GROUP], extent[GSGD_COL])) : NULL;
    return b->col_unit != NULL;
}

/* Whether every entry of the block lies in its array, and there are not more of them than it has. */
int gsgd_block_fits(const gsgd_block *b, const spec *s) {
    ptrdiff_t last[MAX_NDIM] = {0}, size = 1, entries = 1, taps = 1;
    int axes = s->ndim ? s->ndim : 1;
    if (b->start_axis < 0 || b->start_axis >= axes || b->start < 0 || b->start > MOST)
        return 0;
    last[b->start_axis] = b->start;
    for (int d = 0; d < s->ndim; ++d)
        size *= s->shape[d];
    for (int d = 0; d < GSGD_NDIM; ++d) {
        const gsgd_dim *dim = &b->dim[d];
        if (dim->step < 0 || dim->axis < 0 || dim->axis >= axes)
            return 0;
        entries = times(entries, dim->extent);
        taps = d < GSGD_TAP ? 1 : times(taps, dim->extent);
        last[dim->axis] += times(dim->step, dim->extent > 1 ? dim->extent - 1 : 0);
    }
    if (entries > size || taps > MOST)
        return 0;
    for (int d = 0; entries && d < axes; ++d)
        if (last[d] >= (s->ndim ? s->shape[d] : 1))
            return 0;
    return 1;
}

/* The norms of chains from an array of one per unit, or None: then *ok and NULL. */
const double *gsgd_take_norm(const Plan *self, PyObject *x, int *ok) {
    const double *norm = x == Py_None ? NULL : gsgd_take_units(self, x, NPY_FLOAT64, 1, "norm");
    *ok = x == Py_None || norm != NULL;
    return norm;
}

/* Hyperparameters from a contiguous float64 array with a row per array: the fields of gsgd_rates, in their
 * order. */
const gsgd_rates *gsgd_take_rates(Plan *self, PyObject *x) {
    PyArrayObject *a = (PyArrayObject *)x;
    if (!PyArray_Check(x) || PyArray_TYPE(a) != NPY_FLOAT64 || !PyArray_IS_C_CONTIGUOUS(a) ||
        PyArray_NDIM(a) != 2 || PyArray_DIM(a, 0) != self->arrays || PyArray_DIM(a, 1) != NUM_RATES) {
        PyErr_Format(PyExc_ValueError, "rates: expected a contiguous float64 array of shape (%zd, %d)",
                     (Py_ssize_t)self->arrays, NUM_RATES);
        return NULL;
    }
    const double *r = PyArray_DATA(a);
    const gsgd_array *g = self->array + GRADIENTS * self->arrays,
                     *m = self->array + FIRST_MOMENTS * self->arrays,
                     *v = self->array + SECOND_MOMENTS * self->arrays;
    for (ptrdiff_t i = 0; i < self->arrays; ++i, r += NUM_RATES) {
        const char *lacks = NULL;
        if (g[i].data != NULL && r[0] == GSGD_ADAM && m[i].data == NULL)
            lacks = "first moment";
        if (g[i].data != NULL && (r[0] == GSGD_ADAM || r[0] == GSGD_RMSPROP) && v[i].data == NULL)
            lacks = "second moment";
        if (lacks != NULL) {
            PyErr_Format(PyExc_ValueError, "%s of %R: expected one for this method", lacks,
                         self->spec[i].name);
            return NULL;
        }
        int finite = r[0] == GSGD_SGD || r[0] == GSGD_ADAM || r[0] == GSGD_RMSPROP;
        for (int k = 0; k < NUM_RATES; ++k)
            finite &= isfinite(r[k]) != 0;
        if (!finite) {
            PyErr_Format(PyExc_ValueError, "rates of %R: expected a method from 0 to %d and finite numbers",
                         self->spec[i].name, GSGD_RMSPROP);
            return NULL;
        }
        self->rates[i] =
            (gsgd_rates){(gsgd_method)r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8] != 0, r[9] != 0};
    }
    return self->rates;
}

/* The memory that an array spans; nothing where there is none. */
static span span_of(const Plan *self, int role, ptrdiff_t array) {
    const spec *s = &self->spec[array];
    const gsgd_array *a = &self->array[role * self->arrays + array];
    if (a->data == NULL)
        return (span){.array = array, .role = role};
    ptrdiff_t size = s->type == GSGD_FLOAT32 ? sizeof(float) : sizeof(double);
    span found = {.low = a->data, .high = (const char *)a->data + size, .array = array, .role = role};
    for (int d = 0; d < s->ndim; ++d) {
        ptrdiff_t reach = (s->shape[d] - 1) * a->strides[d] * size;
        if (s->shape[d] == 0)
            return (span){.low = a->data, .high = a->data, .array = array, .role = role};
        if (reach < 0)
            found.low += reach;
        else
            found.high += reach;
    }
    return found;
}

static int by_address(const void *one, const void *other) {
    const char *x = ((const span *)one)->low, *y = ((const span *)other)->low;
    return (x > y) - (x < y);
}

/* Bring self->written up to date; sorted anew only when something has moved. */
void gsgd_sort_written(Plan *self) {
    static const int roles[] = {WEIGHTS, FIRST_MOMENTS, SECOND_MOMENTS};
    span *written = self->written;
    ptrdiff_t n = 3 * self->arrays;
    int moved = 0;
    for (ptrdiff_t i = 0; i < n; ++i) {
        span now = span_of(self, written[i].role, written[i].array);
        moved |= now.low != written[i].low || now.high != written[i].high;
    }
    if (!moved)
        return;
    for (ptrdiff_t i = 0; i < n; ++i)
        written[i] = span_of(self, roles[i / self->arrays], i % self->arrays);
    qsort(written, (size_t)n, sizeof *written, by_address);
    for (ptrdiff_t i = 0; i < n; ++i)
        written[i].highest =
            i > 0 && written[i - 1].highest > written[i].high ? written[i - 1].highest : written[i].high;
}

/* Gradients are read while weights and moments are written: one may be its parameter itself, but not overlap
 * anything otherwise. */
int gsgd_refuse_overlap(Plan *self, int role, const char *what) {
    const gsgd_array *weights = self->array, *gradients = self->array + role * self->arrays;
    for (ptrdiff_t i = 0; i < self->arrays; ++i) {
        const spec *s = &self->spec[i];
        const gsgd_array *w = &weights[i], *g = &gradients[i];
        int same = g->data == w->data;
        for (int d = 0; same && d < s->ndim; ++d)
            same = g->strides[d] == w->strides[d] || s->shape[d] <= 1;
        if (g->data == NULL || same)
            continue;
        span read = span_of(self, role, i);
        ptrdiff_t begin = 0, end = 3 * self->arrays; /* the first that begins behind it */
        while (begin < end) {
            ptrdiff_t middle = begin + (end - begin) / 2;
            if (self->written[middle].low < read.high)
                begin = middle + 1;
            else
                end = middle;
        }
        if (end == 0 || self->written[end - 1].highest <= read.low || read.low == read.high)
            continue;
        while (self->written[--end].high <= read.low)
            ;
        const span *over = &self->written[end];
        PyErr_Format(PyExc_ValueError, "%s of %R overlaps the %s of %R in memory: pass a copy", what, s->name,
                     over->role == WEIGHTS ? "values" : "moments", self->spec[over->array].name);
        return 0;
    }
    return 1;
}

/* An array has a gradient in both lists or in neither. */
int gsgd_refuse_half(const Plan *self, const gsgd_array *gradients, const gsgd_array *sums) {
    for (ptrdiff_t i = 0; i < self->arrays; ++i)
        if ((gradients[i].data == NULL) != (sums[i].data == NULL)) {
            PyErr_Format(PyExc_ValueError,
                         "gradient of %R: expected one in gradients and in sums, or in neither",
                         self->spec[i].name);
            return 0;
        }
    return 1;
}
