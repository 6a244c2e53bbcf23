/* _core.c - the binding: the only file that knows Python and NumPy. Parse, check everything, release the GIL,
 * call the core once, map the status. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <numpy/arrayobject.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "gsgd.h"

enum { MAX_NDIM = 8, NUM_RATES = 10 };

/* What a list of arrays is for. Plan_step uses all five; the other calls take what they need. */
enum { WEIGHTS, GRADIENTS, SUMS, FIRST_MOMENTS, SECOND_MOMENTS, MAX_ROLES };

/* How take_arrays checks a list. */
enum { AS_FLOAT64 = 1, WRITABLE = 2, OPTIONAL = 4, ADDRESSES = 8 };

/* What must have been called before. */
typedef enum { NOTHING, TREES, REFERENCE } stage;

/* No number of entries or units is larger, so that sizes in bytes do not overflow. */
#define MOST (PTRDIFF_MAX / 1024)

/* What the plan expects of an array. */
typedef struct {
    PyObject *name;
    gsgd_type type;
    int ndim;
    ptrdiff_t shape[MAX_NDIM];
} spec;

/* The memory [low, high) that an array spans, and the largest `high` up to here in order of `low`. */
typedef struct {
    const char *low, *high, *highest;
    ptrdiff_t array;
    int role;
} span;

typedef struct {
    PyObject_HEAD gsgd_plan *plan;
    stage stage;
    ptrdiff_t units, arrays;
    spec *spec;
    gsgd_rates *rates;
    gsgd_array *array;  /* (MAX_ROLES, arrays) */
    ptrdiff_t *strides; /* (MAX_ROLES, arrays, MAX_NDIM) */
    span *written;      /* (3, arrays): what a step writes, by address */
    atomic_long busy;   /* the process whose thread uses the plan, or 0 */
} Plan;

static int type_number(gsgd_type type) { return type == GSGD_FLOAT32 ? NPY_FLOAT32 : NPY_FLOAT64; }

/* Fill role `role` from a contiguous array of addresses: buffers that are laid out as the weights are; 0 for
 * none. Nothing but their alignment can be checked. */
static const gsgd_array *take_addresses(Plan *self, PyArrayObject *list, int role, const char *what) {
    gsgd_array *arrays = self->array + role * self->arrays;
    if (PyArray_NDIM(list) != 1 || PyArray_DIM(list, 0) != self->arrays || !PyArray_IS_C_CONTIGUOUS(list) ||
        !PyArray_ISBEHAVED_RO(list)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zd contiguous addresses", what,
                     (Py_ssize_t)self->arrays);
        return NULL;
    }
    const uintptr_t *address = PyArray_DATA(list);
    for (ptrdiff_t i = 0; i < self->arrays; ++i) {
        size_t size = self->spec[i].type == GSGD_FLOAT32 ? sizeof(float) : sizeof(double);
        if (address[i] % size) {
            PyErr_Format(PyExc_ValueError, "%s of %R: expected an aligned address", what, self->spec[i].name);
            return NULL;
        }
        arrays[i] = (gsgd_array){(void *)address[i], address[i] ? self->array[i].strides : NULL};
    }
    return arrays;
}

/* Fill role `role` from a list of arrays as the specs say; NULL with an exception set. Where they are
 * OPTIONAL an item may be None; where ADDRESSES will do, an array of dtype uintp may stand for the list. */
static const gsgd_array *take_arrays(Plan *self, PyObject *list, int role, const char *what, int flags) {
    gsgd_array *arrays = self->array + role * self->arrays;
    if (flags & ADDRESSES && PyArray_Check(list) && PyArray_TYPE((PyArrayObject *)list) == NPY_UINTP)
        return take_addresses(self, (PyArrayObject *)list, role, what);
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
        if (!PyArray_Check(item)) {
            PyErr_Format(PyExc_TypeError, "%s of %R: expected a NumPy array, got %R", what, s->name,
                         (PyObject *)Py_TYPE(item));
            return NULL;
        }
        PyArrayObject *a = (PyArrayObject *)item;
        int number = flags & AS_FLOAT64 ? NPY_FLOAT64 : type_number(s->type);
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
        ptrdiff_t size = number == NPY_FLOAT32 ? sizeof(float) : sizeof(double);
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
static void *take_units(const Plan *self, PyObject *x, int number, int ndim, const char *what) {
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
static const double *take_factors(const Plan *self, PyObject *x, const char *what) {
    const double *factor = take_units(self, x, NPY_FLOAT64, 1, what);
    for (ptrdiff_t u = 0; factor != NULL && u < self->units; ++u)
        if (!isfinite(factor[u]) || factor[u] == 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected finite numbers that are not 0, for unit %zd too",
                         what, (Py_ssize_t)u);
            return NULL;
        }
    return factor;
}

/* A plan has scratch memory of its own, so that one call at a time may use it. In the child of a fork no
 * thread of the parent does. */
static int enter(Plan *self, stage needed) {
    long mine = (long)getpid(), user = 0;
    while (!atomic_compare_exchange_strong(&self->busy, &user, mine))
        if (user == mine) {
            PyErr_SetString(PyExc_RuntimeError, "the plan is in use by another thread");
            return 0;
        }
    if (self->stage >= needed)
        return 1;
    PyErr_Format(PyExc_ValueError, "expected %s to be called first",
                 self->stage < TREES ? "set_trees" : "set_reference");
    atomic_store(&self->busy, 0);
    return 0;
}

static void leave(Plan *self) { atomic_store(&self->busy, 0); }

static PyObject *raise_not_finite(int64_t unit) {
    PyObject *number = PyLong_FromLongLong(unit);
    if (number != NULL)
        PyErr_SetObject(PyExc_FloatingPointError, number);
    Py_XDECREF(number);
    return NULL;
}

/* x y of numbers that are not negative, or more than MOST. */
static ptrdiff_t times(ptrdiff_t x, ptrdiff_t y) { return y != 0 && x > MOST / y ? MOST + 1 : x * y; }

static int take_spec(PyObject *item, spec *to) {
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

static int take_block(PyObject *item, gsgd_block *b) {
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
static int block_fits(const gsgd_block *b, const spec *s) {
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

static PyObject *Plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    Py_ssize_t units;
    PyObject *specs, *blocks;
    gsgd_block *block = NULL;
    gsgd_type *types = NULL;
    int ok = 0;
    if (kwargs != NULL && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Plan takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "nO!O!", &units, &PyList_Type, &specs, &PyList_Type, &blocks))
        return NULL;
    if (units < 0 || units > MOST) {
        PyErr_Format(PyExc_ValueError, "units: expected a number of units, got %zd", units);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Plan *self = (Plan *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    Py_ssize_t count = PyList_Size(blocks), arrays = PyList_Size(specs);
    self->units = units;
    self->spec = PyMem_Calloc((size_t)arrays + 1, sizeof *self->spec);
    self->rates = PyMem_Calloc((size_t)arrays + 1, sizeof *self->rates);
    self->array = PyMem_Calloc((size_t)arrays * MAX_ROLES + 1, sizeof *self->array);
    self->strides = PyMem_Calloc((size_t)arrays * MAX_ROLES * MAX_NDIM + 1, sizeof *self->strides);
    self->written = PyMem_Calloc(3 * (size_t)arrays + 1, sizeof *self->written);
    block = PyMem_Calloc((size_t)count + 1, sizeof *block);
    types = PyMem_Calloc((size_t)arrays + 1, sizeof *types);
    if (!self->spec || !self->rates || !self->array || !self->strides || !self->written || !block || !types) {
        PyErr_NoMemory();
        goto done;
    }
    for (; self->arrays < arrays; ++self->arrays) {
        spec *s = &self->spec[self->arrays];
        if (!take_spec(PyList_GetItem(specs, self->arrays), s))
            goto done;
        types[self->arrays] = s->type;
    }
    for (Py_ssize_t k = 0; k < count; ++k) {
        if (!take_block(PyList_GetItem(blocks, k), &block[k]))
            goto done;
        if (block[k].array < 0 || block[k].array >= arrays ||
            !block_fits(&block[k], &self->spec[block[k].array])) {
            PyErr_Format(PyExc_ValueError, "block %zd does not lie in its array", k);
            goto done;
        }
    }
    switch (gsgd_create(&self->plan, units, arrays, types, count, block)) {
    case GSGD_OK:
        ok = 1;
        break;
    case GSGD_NO_MEMORY:
        PyErr_NoMemory();
        break;
    default:
        PyErr_SetString(PyExc_ValueError, "a block refers to a unit that does not exist");
    }
done:
    PyMem_Free(block);
    PyMem_Free(types);
    if (!ok)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void Plan_dealloc(PyObject *object) {
    Plan *self = (Plan *)object;
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    gsgd_destroy(self->plan);
    for (ptrdiff_t i = 0; self->spec != NULL && i < self->arrays; ++i)
        Py_XDECREF(self->spec[i].name);
    PyMem_Free(self->spec);
    PyMem_Free(self->rates);
    PyMem_Free(self->array);
    PyMem_Free(self->strides);
    PyMem_Free(self->written);
    release(object);
    Py_DECREF(type);
}

static PyObject *Plan_choose_trees(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *scale, *in = NULL, *out = NULL, *result = NULL;
    const gsgd_array *w;
    const double *c = NULL;
    int largest;
    if (!PyArg_ParseTuple(args, "OpO", &weights, &largest, &scale) || !enter(self, NOTHING))
        return NULL;
    npy_intp shape[2] = {self->units, 2};
    if ((w = take_arrays(self, weights, WEIGHTS, "parameter", 0)) == NULL ||
        (scale != Py_None && (c = take_factors(self, scale, "scale")) == NULL) ||
        (in = PyArray_SimpleNew(2, shape, NPY_INT64)) == NULL ||
        (out = PyArray_SimpleNew(2, shape, NPY_INT64)) == NULL)
        goto done;
    gsgd_edge *to_in = PyArray_DATA((PyArrayObject *)in), *to_out = PyArray_DATA((PyArrayObject *)out);
    self->stage = NOTHING;
    Py_BEGIN_ALLOW_THREADS
    gsgd_choose_trees(self->plan, w, largest ? GSGD_LARGEST : GSGD_MODULO, c, to_in, to_out);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("OO", in, out);
done:
    leave(self);
    Py_XDECREF(in);
    Py_XDECREF(out);
    return result;
}

static PyObject *Plan_set_trees(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *in, *out, *free_in;
    int64_t unit;
    if (!PyArg_ParseTuple(args, "OO", &in, &out))
        return NULL;
    const gsgd_edge *from_in = take_units(self, in, NPY_INT64, 2, "in_edges");
    const gsgd_edge *from_out = from_in ? take_units(self, out, NPY_INT64, 2, "out_edges") : NULL;
    if (from_out == NULL || !enter(self, NOTHING))
        return NULL;
    npy_intp shape[1] = {self->units};
    free_in = PyArray_SimpleNew(1, shape, NPY_BOOL);
    self->stage = NOTHING;
    if (free_in != NULL && gsgd_set_trees(self->plan, from_in, from_out,
                                          PyArray_DATA((PyArrayObject *)free_in), &unit) == GSGD_OK) {
        self->stage = TREES;
    } else if (free_in != NULL) {
        Py_CLEAR(free_in);
        PyErr_Format(PyExc_ValueError, "the skeleton edges of unit %lld make no tree", (long long)unit);
    }
    leave(self);
    return free_in;
}

static PyObject *Plan_set_reference(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *x[3];
    const double *from[3];
    static const char *const names[3] = {"in", "out", "c"};
    if (!PyArg_ParseTuple(args, "OOO", &x[0], &x[1], &x[2]))
        return NULL;
    for (int i = 0; i < 3; ++i)
        if ((from[i] = take_factors(self, x[i], names[i])) == NULL)
            return NULL;
    if (!enter(self, TREES))
        return NULL;
    gsgd_set_reference(self->plan, from[0], from[1], from[2]);
    self->stage = REFERENCE;
    leave(self);
    Py_RETURN_NONE;
}

/* The norms of chains from an array of one per unit, or None: then *ok and NULL. */
static const double *take_norm(const Plan *self, PyObject *x, int *ok) {
    const double *norm = x == Py_None ? NULL : take_units(self, x, NPY_FLOAT64, 1, "norm");
    *ok = x == Py_None || norm != NULL;
    return norm;
}

/* Hyperparameters from a contiguous float64 array with a row per array: the fields of gsgd_rates, in their
 * order. */
static const gsgd_rates *take_rates(Plan *self, PyObject *x) {
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
static void sort_written(Plan *self) {
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
static int refuse_overlap(Plan *self, int role, const char *what) {
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
static int refuse_half(const Plan *self, const gsgd_array *gradients, const gsgd_array *sums) {
    for (ptrdiff_t i = 0; i < self->arrays; ++i)
        if ((gradients[i].data == NULL) != (sums[i].data == NULL)) {
            PyErr_Format(PyExc_ValueError,
                         "gradient of %R: expected one in gradients and in sums, or in neither",
                         self->spec[i].name);
            return 0;
        }
    return 1;
}

static PyObject *Plan_balance(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *c = NULL, *result = NULL;
    const gsgd_array *w;
    double left = 0;
    gsgd_status status;
    if (!PyArg_ParseTuple(args, "O", &weights) || !enter(self, NOTHING))
        return NULL;
    npy_intp shape[1] = {self->units};
    if ((w = take_arrays(self, weights, WEIGHTS, "parameter", 0)) == NULL ||
        (c = PyArray_SimpleNew(1, shape, NPY_FLOAT64)) == NULL)
        goto done;
    double *to = PyArray_DATA((PyArrayObject *)c);
    Py_BEGIN_ALLOW_THREADS
    status = gsgd_balance(self->plan, w, to, &left);
    Py_END_ALLOW_THREADS
    result = status == GSGD_OK ? Py_BuildValue("Od", c, left) : PyErr_NoMemory();
done:
    leave(self);
    Py_XDECREF(c);
    return result;
}

static PyObject *Plan_step(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *gradients, *sums, *norm, *first, *second, *rates;
    gsgd_options o;
    int ok;
    const gsgd_array *w, *g, *s, *m, *v;
    if (!PyArg_ParseTuple(args, "OOOOOOOddi", &weights, &gradients, &sums, &norm, &first, &second, &rates,
                          &o.max_ratio, &o.clip_norm, &o.threads))
        return NULL;
    if (o.threads <= 0) {
        PyErr_Format(PyExc_ValueError, "threads: expected a number of threads, got %d", o.threads);
        return NULL;
    }
    if (!(o.max_ratio > 1) || !(o.clip_norm > 0)) {
        PyErr_SetString(PyExc_ValueError, "max_ratio: expected more than 1; clip_norm: expected more than 0");
        return NULL;
    }
    o.norm = take_norm(self, norm, &ok);
    if (!ok || !enter(self, REFERENCE))
        return NULL;
    ptrdiff_t clamped = 0;
    int64_t unit = -1;
    gsgd_status status = GSGD_OK;
    if ((w = take_arrays(self, weights, WEIGHTS, "parameter", WRITABLE)) == NULL ||
        (g = take_arrays(self, gradients, GRADIENTS, "gradient", OPTIONAL | ADDRESSES)) == NULL ||
        (s = sums == Py_None ? g : take_arrays(self, sums, SUMS, "summed gradient", OPTIONAL)) == NULL ||
        (m = take_arrays(self, first, FIRST_MOMENTS, "first moment", OPTIONAL | WRITABLE)) == NULL ||
        (v = take_arrays(self, second, SECOND_MOMENTS, "second moment", OPTIONAL | WRITABLE)) == NULL ||
        (o.rates = take_rates(self, rates)) == NULL)
        goto done;
    sort_written(self);
    if (!refuse_overlap(self, GRADIENTS, "gradient") ||
        (s != g && (!refuse_half(self, g, s) || !refuse_overlap(self, SUMS, "summed gradient"))))
        goto done;
    Py_BEGIN_ALLOW_THREADS
    status = gsgd_step(self->plan, w, g, s, m, v, &o, &clamped, &unit);
    Py_END_ALLOW_THREADS
done:
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    return status == GSGD_OK ? PyLong_FromSsize_t(clamped) : raise_not_finite(unit);
}

static PyObject *Plan_path_values(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *values, *logs;
    const gsgd_array *w, *v, *l = NULL;
    if (!PyArg_ParseTuple(args, "OOO", &weights, &values, &logs) || !enter(self, TREES))
        return NULL;
    if ((w = take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (v = take_arrays(self, values, 1, "path value", AS_FLOAT64 | WRITABLE)) != NULL &&
        (logs == Py_None || (l = take_arrays(self, logs, 2, "logarithm", AS_FLOAT64 | WRITABLE)) != NULL)) {
        Py_BEGIN_ALLOW_THREADS
        gsgd_path_values(self->plan, w, v, l);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *Plan_path_gradients(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *gradients, *sums, *norm, *out;
    int ok;
    const gsgd_array *w, *g, *s, *d;
    gsgd_status status = GSGD_OK;
    if (!PyArg_ParseTuple(args, "OOOOO", &weights, &gradients, &sums, &norm, &out))
        return NULL;
    const double *norms = take_norm(self, norm, &ok);
    if (!ok || !enter(self, TREES))
        return NULL;
    if ((w = take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (g = take_arrays(self, gradients, 1, "gradient", 0)) != NULL &&
        (s = take_arrays(self, sums, 2, "summed gradient", 0)) != NULL &&
        (d = take_arrays(self, out, 3, "path gradient", AS_FLOAT64 | WRITABLE)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = gsgd_path_gradients(self->plan, w, g, s, norms, d);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    if (status != GSGD_OK)
        return raise_not_finite(-1);
    Py_RETURN_NONE;
}

static PyObject *Plan_allocate(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *ratios, *out;
    const gsgd_array *w, *r, *to;
    if (!PyArg_ParseTuple(args, "OOO", &weights, &ratios, &out) || !enter(self, TREES))
        return NULL;
    if ((w = take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (r = take_arrays(self, ratios, 1, "ratio", AS_FLOAT64)) != NULL &&
        (to = take_arrays(self, out, 2, "new weight", WRITABLE)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        gsgd_allocate(self->plan, w, r, to);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef Plan_methods[] = {
    {"choose_trees", Plan_choose_trees, METH_VARARGS,
     "choose_trees(weights, largest, scale) -> (in_edges, out_edges)"},
    {"set_trees", Plan_set_trees, METH_VARARGS,
     "set_trees(in_edges, out_edges) -> whether each in-edge is free"},
    {"set_reference", Plan_set_reference, METH_VARARGS, "set_reference(in_weights, out_weights, c)"},
    {"balance", Plan_balance, METH_VARARGS, "balance(weights) -> (c, what is left)"},
    {"step", Plan_step, METH_VARARGS,
     "step(weights, gradients, sums, norm, m, v, rates, max_ratio, clip_norm, threads) -> number clamped"},
    {"path_values", Plan_path_values, METH_VARARGS, "path_values(weights, values, logs)"},
    {"path_gradients", Plan_path_gradients, METH_VARARGS,
     "path_gradients(weights, gradients, sums, norm, out)"},
    {"allocate", Plan_allocate, METH_VARARGS, "allocate(weights, ratios, out)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Plan_slots[] = {
    {Py_tp_new, Plan_new},
    {Py_tp_dealloc, Plan_dealloc},
    {Py_tp_methods, Plan_methods},
    {Py_tp_doc, "Plan(units, specs, blocks)\n--\n\nThe three stages on NumPy buffers, in C."},
    {0, NULL},
};

static PyType_Spec Plan_spec = {
    .name = "gsgd._core.Plan",
    .basicsize = sizeof(Plan),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = Plan_slots,
};

static int exec_module(PyObject *module) {
    PyObject *type = NULL;
    int failed = PyArray_ImportNumPyAPI() < 0 ||
                 (type = PyType_FromModuleAndSpec(module, &Plan_spec, NULL)) == NULL ||
                 PyModule_AddObjectRef(module, "Plan", type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "The C core of gsgd.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module); }
