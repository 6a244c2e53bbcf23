/* arguments.h - the plan as Python has it, and what its methods are passed. */
#ifndef GSGD_ARGUMENTS_H
#define GSGD_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL gsgd_numpy
#include <numpy/arrayobject.h>
#include <stdatomic.h>

#include "gsgd.h"

enum { MAX_NDIM = 8, NUM_RATES = 10 };

/* What a list of arrays is for. Plan_step uses all five; the other calls take what they need. */
enum { WEIGHTS, GRADIENTS, SUMS, FIRST_MOMENTS, SECOND_MOMENTS, MAX_ROLES };

/* How take_arrays checks a list. */
enum { AS_FLOAT64 = 1, WRITABLE = 2, OPTIONAL = 4 };

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

/* Whether tensors of a type may stand in lists of arrays. */
PyObject *gsgd_takes(PyObject *module, PyObject *type);

/* Whether each of a list of tensors has the memory of its array: address, shape, strides and dtype. */
PyObject *gsgd_lie_at(PyObject *module, PyObject *args);

const gsgd_array *gsgd_take_arrays(Plan *self, PyObject *list, int role, const char *what, int flags);

void *gsgd_take_units(const Plan *self, PyObject *x, int number, int ndim, const char *what);

const double *gsgd_take_factors(const Plan *self, PyObject *x, const char *what);

int gsgd_take_spec(PyObject *item, spec *to);

int gsgd_take_block(PyObject *item, gsgd_block *b);

int gsgd_block_fits(const gsgd_block *b, const spec *s);

const double *gsgd_take_norm(const Plan *self, PyObject *x, int *ok);

const gsgd_rates *gsgd_take_rates(Plan *self, PyObject *x);

void gsgd_sort_written(Plan *self);

int gsgd_refuse_overlap(Plan *self, int role, const char *what);

int gsgd_refuse_half(const Plan *self, const gsgd_array *gradients, const gsgd_array *sums);

#endif
