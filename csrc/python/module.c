/* module.c - the binding: parse, check everything, release the GIL, call the core once, map the status. */
#include "arguments.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
        if (!gsgd_take_spec(PyList_GetItem(specs, self->arrays), s))
            goto done;
        types[self->arrays] = s->type;
    }
    for (Py_ssize_t k = 0; k < count; ++k) {
        if (!gsgd_take_block(PyList_GetItem(blocks, k), &block[k]))
            goto done;
        if (block[k].array < 0 || block[k].array >= arrays ||
            !gsgd_block_fits(&block[k], &self->spec[block[k].array])) {
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
    if ((w = gsgd_take_arrays(self, weights, WEIGHTS, "parameter", 0)) == NULL ||
        (scale != Py_None && (c = gsgd_take_factors(self, scale, "scale")) == NULL) ||
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
    const gsgd_edge *from_in = gsgd_take_units(self, in, NPY_INT64, 2, "in_edges");
    const gsgd_edge *from_out = from_in ? gsgd_take_units(self, out, NPY_INT64, 2, "out_edges") : NULL;
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

static PyObject *Plan_set_shard(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *x[7];
    const void *from[7] = {NULL};
    static const char *const names[7] = {"in_edges", "out_edges", "source", "destination",
                                         "in_array", "free_in",   "counts"};
    int64_t unit = 0;
    if (!PyArg_ParseTuple(args, "OOOOOOO", &x[0], &x[1], &x[2], &x[3], &x[4], &x[5], &x[6]))
        return NULL;
    for (int i = 0; i < 6; ++i)
        if ((from[i] = gsgd_take_units(self, x[i], i < 5 ? NPY_INT64 : NPY_BOOL, i < 2 ? 2 : 1, names[i])) ==
            NULL)
            return NULL;
    if (x[6] != Py_None) {
        PyArrayObject *counts = (PyArrayObject *)x[6];
        if (!PyArray_Check(x[6]) || PyArray_TYPE(counts) != NPY_BOOL || !PyArray_IS_C_CONTIGUOUS(counts) ||
            PyArray_NDIM(counts) != 1 || PyArray_DIM(counts, 0) != self->arrays) {
            PyErr_Format(PyExc_ValueError, "counts: expected a contiguous bool array, one per array (%zd)",
                         (Py_ssize_t)self->arrays);
            return NULL;
        }
        from[6] = PyArray_DATA(counts);
    }
    if (!enter(self, NOTHING))
        return NULL;
    gsgd_status status =
        gsgd_set_shard(self->plan, from[0], from[1], from[2], from[3], from[4], from[5], from[6], &unit);
    self->stage = status == GSGD_OK ? TREES : NOTHING;
    leave(self);
    if (status != GSGD_OK)
        return PyErr_Format(PyExc_ValueError, "the skeleton edges of unit %lld make no tree",
                            (long long)unit);
    Py_RETURN_NONE;
}

static PyObject *Plan_set_reference(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *x[3];
    const double *from[3];
    static const char *const names[3] = {"in", "out", "c"};
    if (!PyArg_ParseTuple(args, "OOO", &x[0], &x[1], &x[2]))
        return NULL;
    for (int i = 0; i < 3; ++i)
        if ((from[i] = gsgd_take_factors(self, x[i], names[i])) == NULL)
            return NULL;
    if (!enter(self, TREES))
        return NULL;
    gsgd_set_reference(self->plan, from[0], from[1], from[2]);
    self->stage = REFERENCE;
    leave(self);
    Py_RETURN_NONE;
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
    if ((w = gsgd_take_arrays(self, weights, WEIGHTS, "parameter", 0)) == NULL ||
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

/* Limits and threads of a step. */
static int take_options(gsgd_options *o) {
    if (o->threads <= 0) {
        PyErr_Format(PyExc_ValueError, "threads: expected a number of threads, got %d", o->threads);
        return 0;
    }
    if (!(o->max_ratio > 1) || !(o->clip_norm > 0)) {
        PyErr_SetString(PyExc_ValueError, "max_ratio: expected more than 1; clip_norm: expected more than 0");
        return 0;
    }
    return 1;
}

/* The arrays of a step; what is asked for as `writes` must be writable. */
typedef struct {
    PyObject *weights, *gradients, *sums, *m, *v; /* sums None: gradients; NULL: not asked for */
    const gsgd_array *w, *g, *s, *first, *second;
} step_arrays;

static int take_step(Plan *self, step_arrays *x, int writes) {
    int moments = OPTIONAL | writes;
    return (x->w = gsgd_take_arrays(self, x->weights, WEIGHTS, "parameter", writes)) != NULL &&
           (x->g = gsgd_take_arrays(self, x->gradients, GRADIENTS, "gradient", OPTIONAL)) != NULL &&
           (x->s = x->sums == Py_None
                       ? x->g
                       : gsgd_take_arrays(self, x->sums, SUMS, "summed gradient", OPTIONAL)) != NULL &&
           (x->s == x->g || gsgd_refuse_half(self, x->g, x->s)) &&
           (x->first = gsgd_take_arrays(self, x->m, FIRST_MOMENTS, "first moment", moments)) != NULL &&
           (x->second = gsgd_take_arrays(self, x->v, SECOND_MOMENTS, "second moment", moments)) != NULL;
}

/* Gradients are read while weights and moments are written. */
static int refuse_overlaps(Plan *self, const step_arrays *x) {
    gsgd_sort_written(self);
    return gsgd_refuse_overlap(self, GRADIENTS, "gradient") &&
           (x->s == x->g || gsgd_refuse_overlap(self, SUMS, "summed gradient"));
}

static PyObject *Plan_step(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *norm, *rates;
    step_arrays x;
    gsgd_options o;
    int ok;
    if (!PyArg_ParseTuple(args, "OOOOOOOddi", &x.weights, &x.gradients, &x.sums, &norm, &x.m, &x.v, &rates,
                          &o.max_ratio, &o.clip_norm, &o.threads) ||
        !take_options(&o))
        return NULL;
    o.norm = gsgd_take_norm(self, norm, &ok);
    if (!ok || !enter(self, REFERENCE))
        return NULL;
    ptrdiff_t clamped = 0;
    int64_t unit = -1;
    gsgd_status status = GSGD_OK;
    if (take_step(self, &x, WRITABLE) && (o.rates = gsgd_take_rates(self, rates)) != NULL &&
        refuse_overlaps(self, &x)) {
        Py_BEGIN_ALLOW_THREADS
        status = gsgd_step(self->plan, x.w, x.g, x.s, x.first, x.second, &o, &clamped, &unit);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    return status == GSGD_OK ? PyLong_FromSsize_t(clamped) : raise_not_finite(unit);
}

/* The data of what gather or solve has found, (rows, 1 + units), or NULL with an exception set. */
static const double *take_rows(const Plan *self, PyObject *x, int rows, const char *what) {
    PyArrayObject *a = (PyArrayObject *)x;
    if (PyArray_Check(x) && PyArray_TYPE(a) == NPY_FLOAT64 && PyArray_IS_C_CONTIGUOUS(a) &&
        PyArray_ISBEHAVED_RO(a) && PyArray_NDIM(a) == 2 && PyArray_DIM(a, 0) >= rows &&
        PyArray_DIM(a, 1) == self->units + 1)
        return PyArray_DATA(a);
    PyErr_Format(PyExc_ValueError, "%s: expected a contiguous float64 array of shape (%d, %zd)", what, rows,
                 (Py_ssize_t)self->units + 1);
    return NULL;
}

/* A new array for what gather or solve finds. */
static PyObject *new_rows(const Plan *self, int rows) {
    npy_intp shape[2] = {rows, self->units + 1};
    return PyArray_SimpleNew(2, shape, NPY_FLOAT64);
}

static PyObject *Plan_gather(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *trees, *gathered = NULL;
    step_arrays x;
    gsgd_options o = {.max_ratio = INFINITY};
    const double *from = NULL;
    if (!PyArg_ParseTuple(args, "OOOOOdOi", &x.weights, &x.gradients, &x.sums, &x.m, &x.v, &o.clip_norm,
                          &trees, &o.threads) ||
        !take_options(&o) || (trees != Py_None && (from = take_rows(self, trees, 2, "trees")) == NULL) ||
        !enter(self, REFERENCE))
        return NULL;
    if (take_step(self, &x, 0) && (gathered = new_rows(self, GSGD_GATHERED)) != NULL) {
        double *to = PyArray_DATA((PyArrayObject *)gathered);
        Py_BEGIN_ALLOW_THREADS
        gsgd_gather(self->plan, x.w, x.g, x.s, x.first, x.second, &o, from, to);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    return gathered;
}

static PyObject *Plan_solve(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *gathered, *norm, *rates, *solved = NULL;
    gsgd_options o = {.threads = 1};
    int ok;
    if (!PyArg_ParseTuple(args, "OOOdd", &gathered, &norm, &rates, &o.max_ratio, &o.clip_norm) ||
        !take_options(&o))
        return NULL;
    const double *from = take_rows(self, gathered, GSGD_GATHERED, "gathered");
    o.norm = gsgd_take_norm(self, norm, &ok);
    if (from == NULL || !ok || !enter(self, REFERENCE))
        return NULL;
    ptrdiff_t clamped = 0;
    int64_t unit = -1;
    gsgd_status status = GSGD_OK;
    if ((o.rates = gsgd_take_rates(self, rates)) != NULL && (solved = new_rows(self, GSGD_SOLVED)) != NULL) {
        double *to = PyArray_DATA((PyArrayObject *)solved);
        Py_BEGIN_ALLOW_THREADS
        status = gsgd_solve(self->plan, from, &o, to, &clamped, &unit);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    PyObject *result = NULL;
    if (status != GSGD_OK)
        raise_not_finite(unit);
    else if (solved != NULL)
        result = Py_BuildValue("On", solved, (Py_ssize_t)clamped);
    Py_XDECREF(solved);
    return result;
}

static PyObject *Plan_apply(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *rates, *solved;
    step_arrays x = {.sums = Py_None};
    gsgd_options o = {.max_ratio = INFINITY, .clip_norm = INFINITY};
    if (!PyArg_ParseTuple(args, "OOOOOOi", &x.weights, &x.gradients, &x.m, &x.v, &rates, &solved,
                          &o.threads) ||
        !take_options(&o))
        return NULL;
    const double *from = take_rows(self, solved, GSGD_SOLVED, "solved");
    if (from == NULL || !enter(self, REFERENCE))
        return NULL;
    if (take_step(self, &x, WRITABLE) && (o.rates = gsgd_take_rates(self, rates)) != NULL &&
        refuse_overlaps(self, &x)) {
        Py_BEGIN_ALLOW_THREADS
        gsgd_apply(self->plan, x.w, x.g, x.first, x.second, &o, from);
        Py_END_ALLOW_THREADS
    }
    leave(self);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *Plan_path_values(PyObject *object, PyObject *args) {
    Plan *self = (Plan *)object;
    PyObject *weights, *values, *logs;
    const gsgd_array *w, *v, *l = NULL;
    if (!PyArg_ParseTuple(args, "OOO", &weights, &values, &logs) || !enter(self, TREES))
        return NULL;
    if ((w = gsgd_take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (v = gsgd_take_arrays(self, values, 1, "path value", AS_FLOAT64 | WRITABLE)) != NULL &&
        (logs == Py_None ||
         (l = gsgd_take_arrays(self, logs, 2, "logarithm", AS_FLOAT64 | WRITABLE)) != NULL)) {
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
    const double *norms = gsgd_take_norm(self, norm, &ok);
    if (!ok || !enter(self, TREES))
        return NULL;
    if ((w = gsgd_take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (g = gsgd_take_arrays(self, gradients, 1, "gradient", 0)) != NULL &&
        (s = gsgd_take_arrays(self, sums, 2, "summed gradient", 0)) != NULL &&
        (d = gsgd_take_arrays(self, out, 3, "path gradient", AS_FLOAT64 | WRITABLE)) != NULL) {
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
    if ((w = gsgd_take_arrays(self, weights, 0, "parameter", 0)) != NULL &&
        (r = gsgd_take_arrays(self, ratios, 1, "ratio", AS_FLOAT64)) != NULL &&
        (to = gsgd_take_arrays(self, out, 2, "new weight", WRITABLE)) != NULL) {
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
    {"set_shard", Plan_set_shard, METH_VARARGS,
     "set_shard(in_edges, out_edges, source, destination, in_array, free_in, counts)"},
    {"set_reference", Plan_set_reference, METH_VARARGS, "set_reference(in_weights, out_weights, c)"},
    {"balance", Plan_balance, METH_VARARGS, "balance(weights) -> (c, what is left)"},
    {"step", Plan_step, METH_VARARGS,
     "step(weights, gradients, sums, norm, m, v, rates, max_ratio, clip_norm, threads) -> number clamped"},
    {"gather", Plan_gather, METH_VARARGS,
     "gather(weights, gradients, sums, m, v, clip_norm, trees, threads) -> gathered"},
    {"solve", Plan_solve, METH_VARARGS,
     "solve(gathered, norm, rates, max_ratio, clip_norm) -> (solved, number clamped)"},
    {"apply", Plan_apply, METH_VARARGS, "apply(weights, gradients, m, v, rates, solved, threads)"},
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

/* One to one in `x`, and in `h`. */
static uint64_t mix(uint64_t h, uint64_t x) {
    h = (h ^ x) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

/* Four sums side by side, each of every fourth word of 8 bytes; `n` is at most 32. */
static inline void add_words(uint64_t sums[4], const char *from, size_t n) {
    uint64_t words[4] = {0};
    memcpy(words, from, n);
    for (int i = 0; i < 4; ++i)
        sums[i] = mix(sums[i], words[i]);
}

static PyObject *checksum(PyObject *Py_UNUSED(module), PyObject *array) {
    PyArrayObject *a = (PyArrayObject *)array;
    if (!PyArray_Check(array) || !PyArray_IS_C_CONTIGUOUS(a)) {
        PyErr_SetString(PyExc_ValueError, "checksum: expected a contiguous array");
        return NULL;
    }
    const char *from = PyArray_BYTES(a);
    size_t left = (size_t)PyArray_NBYTES(a);
    uint64_t sum = left, sums[4] = {1, 2, 3, 4};
    for (; left >= 32; left -= 32, from += 32)
        add_words(sums, from, 32);
    add_words(sums, from, left);
    for (int i = 0; i < 4; ++i)
        sum = mix(sum, sums[i]);
    return PyLong_FromUnsignedLongLong(sum);
}

static PyMethodDef module_methods[] = {
    {"checksum", checksum, METH_O, "checksum(array) -> a hash of its bytes, 64 bits"},
    {"takes", gsgd_takes, METH_O, "takes(type) -> whether tensors of it may stand in lists of arrays"},
    {"lie_at", gsgd_lie_at, METH_VARARGS, "lie_at(tensors, arrays) -> whether these have the same memory"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_core",           .m_doc = "The C core of gsgd.",
    .m_size = 0,           .m_methods = module_methods, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module); }
