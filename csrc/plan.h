/* plan.h - what the parts of the core share. */
#ifndef GSGD_PLAN_H
#define GSGD_PLAN_H

#include "gsgd.h"

enum { PANEL = 4096 }; /* columns of one accumulator */

/* A buffer through the eyes of a block. */
typedef struct {
    void *data;
    ptrdiff_t stride[GSGD_NDIM];
} view;

typedef struct {
    gsgd_dim dim[GSGD_NDIM];
    gsgd_type type;
    int start_axis;
    ptrdiff_t array, start;
    ptrdiff_t groups, rows, cols, taps; /* taps: of all three tap dimensions */
    int gathers;                        /* some source is a unit */
    int64_t *row_unit, *col_unit, *col_root;
    double *column_sum;      /* (groups, cols, taps): sums over rows of w g, where the block gathers */
    double *column_square;   /* the same shape: sums over rows of (g / B)^2, for clip_norm */
    void *row_b, *row_inv_b; /* (groups, rows), of the block's type */
    /* (groups, cols * taps) of the block's type; not read where the block does not gather */
    void *line_a, *line_inv_a, *line_inv_rho, *line;
    view w, g, s, m, v;         /* of the call at work: weights, gradients, those that are summed, moments */
    view seen[5];               /* of the call before */
    int by_rows;                /* whether a line over columns and taps is contiguous in all views */
    ptrdiff_t *place, *unplace; /* memory order of a line -> C order, and back */
    int shuffled;               /* they differ */
    ptrdiff_t gather_pieces, gather_chunk, apply_pieces, apply_chunk;
} block;

/* A tree edge, ready to be read. */
typedef struct {
    ptrdiff_t block;
    ptrdiff_t index[GSGD_NDIM];
    ptrdiff_t w, g, s, m, v; /* its offsets in the block's views */
} tree_edge;

/* Per-unit arrays begin at [-1], which stands for a pinned end. */
struct gsgd_plan {
    ptrdiff_t units, blocks;
    block *block;
    ptrdiff_t *order; /* blocks that gather, then the others */
    tree_edge *in, *out;
    int64_t *in_unit;    /* source of the in-edge */
    int64_t *out_unit;   /* destination of the out-edge */
    int64_t *root;       /* the unit whose chain ratio moves this unit */
    uint8_t *active;     /* has edges */
    uint8_t *in_is_free; /* the in-edge is the source's out-edge */
    ptrdiff_t num_active;
    int64_t *in_order, *out_order;    /* active units: sources first, destinations first */
    double *in0, *out0, *c;           /* the reference scale */
    double *in_w, *out_w;             /* weights of the tree edges; after solve, those to come */
    double *to_a, *to_b;              /* chain products relative to in0 and out0 */
    double *a, *b, *inv_a, *inv_b;    /* A and B of METHOD.md, section 4, and their inverses */
    double *x, *inv_x;                /* A B and its inverse */
    double *sum, *ratio, *inv_rho;    /* S and R by chain root, and 1 / rho */
    double *new_m, *new_v;            /* moments of in-edges after the step */
    double *memory;                   /* all of the above lies in here */
    int clips;                        /* the call at work has a clip_norm */
    double alone, credit, unmeasured; /* seconds: see learn_what_pays */
};

/* Where an entry lies in a view. */
static inline ptrdiff_t offset_of(const view *v, const ptrdiff_t index[GSGD_NDIM]) {
    ptrdiff_t offset = 0;
    for (int d = 0; d < GSGD_NDIM; ++d)
        offset += index[d] * v->stride[d];
    return offset;
}

static inline double load_at(gsgd_type type, const view *v, ptrdiff_t i) {
    return type == GSGD_FLOAT32 ? (double)((const float *)v->data)[i] : ((const double *)v->data)[i];
}

static inline void store_at(gsgd_type type, const view *v, ptrdiff_t i, double x) {
    if (type == GSGD_FLOAT32)
        ((float *)v->data)[i] = (float)x;
    else
        ((double *)v->data)[i] = x;
}

static inline double load(gsgd_type type, const view *v, const ptrdiff_t index[GSGD_NDIM]) {
    return load_at(type, v, offset_of(v, index));
}

static inline void store(gsgd_type type, const view *v, const ptrdiff_t index[GSGD_NDIM], double x) {
    store_at(type, v, offset_of(v, index), x);
}

static inline int64_t row_unit(const block *b, const ptrdiff_t index[GSGD_NDIM]) {
    return b->row_unit[index[GSGD_GROUP] * b->rows + index[GSGD_ROW]];
}

static inline int64_t col_unit(const block *b, const ptrdiff_t index[GSGD_NDIM]) {
    return b->col_unit[index[GSGD_GROUP] * b->cols + index[GSGD_COL]];
}

/* The next index in C order; 0 after the last. */
static inline int advance(const block *b, ptrdiff_t index[GSGD_NDIM]) {
    for (int d = GSGD_NDIM; d-- > 0; index[d] = 0)
        if (++index[d] < b->dim[d].extent)
            return 1;
    return 0;
}

/* See the caller's arrays (NULL: none) through every block; `which` is the view's offset in block. Data NULL:
 * none. */
void gsgd_bind(gsgd_plan *plan, const gsgd_array *arrays, size_t which);

/* Gather by one thread: S per chain root, in plan->sum. */
gsgd_status gsgd_gather(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                        const gsgd_array *sums);

/* w g, with g of `sums`, of a tree edge after gsgd_gather, rounded as the kernels round it. */
double gsgd_product(const gsgd_plan *plan, const tree_edge *e);

#endif
