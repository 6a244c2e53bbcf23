/* plan.h - what the parts of the core share. */
#ifndef GSGD_PLAN_H
#define GSGD_PLAN_H

#include "gsgd.h"
#include "parallel.h"

/* A buffer through the eyes of a block. */
typedef struct {
    void *data;
    ptrdiff_t stride[GSGD_NDIM];
} view;

/* The buffers of a call: weights, gradients, those that are summed, moments. Other calls use them for theirs.
 */
enum { VIEW_W, VIEW_G, VIEW_S, VIEW_M, VIEW_V, VIEWS };

typedef struct {
    gsgd_dim dim[GSGD_NDIM];
    gsgd_type type;
    int start_axis;
    ptrdiff_t array, start;
    ptrdiff_t groups, rows, cols, taps; /* taps: of all three tap dimensions */
    int64_t *row_unit, *col_unit, *col_root;
    int64_t *given; /* row_unit and col_unit before trees pinned units without edges */
    int gathers;    /* some source is a unit */
    int counts;     /* no other shard counts the same entries */
    union {
        view views[VIEWS];
        struct {
            view w, g, s, m, v;
        };
    };

    /* How to walk it: see walk.c. */
    view seen[VIEWS];           /* of the call before */
    int by_rows;                /* whether a line over columns and taps is contiguous in all views */
    ptrdiff_t *place, *unplace; /* memory order of a line -> C order, and back */
    int shuffled;               /* they differ */
    ptrdiff_t gather_pieces, gather_chunk, apply_pieces, apply_chunk;

    /* Scratch of the kernels. */
    double *column_sum;      /* (groups, cols, taps): sums over rows of w g, where the block gathers */
    double *column_square;   /* the same shape: sums over rows of (g / B)^2, for clip_norm */
    void *row_b, *row_inv_b; /* (groups, rows), of the block's type */
    /* (groups, cols * taps) of the block's type, in memory order; only where the block gathers */
    void *line_a, *line_inv_a, *line_inv_rho;
} block;

/* A tree edge, ready to be read. */
typedef struct {
    ptrdiff_t block; /* < 0: it is not here */
    int counts;      /* it is, and no other shard counts it */
    ptrdiff_t index[GSGD_NDIM];
    ptrdiff_t at[VIEWS]; /* its offsets in the block's views */
} tree_edge;

/* Per-unit arrays begin at [-1], which stands for pinned ends. */
struct gsgd_plan {
    ptrdiff_t units, arrays, blocks, entries;
    gsgd_type *type; /* per array */
    block *block;
    ptrdiff_t *order; /* blocks that gather, then the others */

    tree_edge *in, *out;
    int64_t *in_unit;    /* source of the in-edge */
    int64_t *out_unit;   /* destination of the out-edge */
    int64_t *in_array;   /* where the in-edge lies */
    int64_t *root;       /* the unit whose chain ratio moves this unit */
    uint8_t *active;     /* has edges */
    uint8_t *in_is_free; /* the in-edge is the source's out-edge */
    ptrdiff_t num_active;
    int64_t *in_order, *out_order; /* active units: sources first, destinations first */
    double *in0, *out0, *c;        /* the reference scale */

    int clips;                     /* the walk is one for clip_norm */
    uint8_t *has_gradient, *has_m; /* per array: in the last gather */
    team gather_team, apply_team;
    int threads_wanted, threads_startable;

    double *gathered, *solved; /* of gsgd_step */
    double *to_a, *to_b;       /* chain products relative to in0 and out0 */
    double *x, *inv_x;         /* A B and its inverse */
    double *ratio;             /* R by chain root */
    double *memory;            /* all arrays of double over units lie in here */
};

/* Where a row of what gsgd_gather or gsgd_solve has found begins: at the entry of unit 0. */
static inline ptrdiff_t row_at(const gsgd_plan *plan, int row) { return row * (plan->units + 1) + 1; }

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

/* w g of one weight, rounded as the kernels round it. */
static inline double product(gsgd_type type, double w, double g) {
    return type == GSGD_FLOAT32 ? (double)((float)w * (float)g) : w * g;
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

/* Column i of a block, i in C order over (group, column, taps), as an index with row 0. */
static inline void column_index(const block *b, ptrdiff_t i, ptrdiff_t index[GSGD_NDIM]) {
    for (int d = GSGD_NDIM; d-- > GSGD_COL; i /= b->dim[d].extent)
        index[d] = i % b->dim[d].extent;
    index[GSGD_ROW] = 0;
    index[GSGD_GROUP] = i;
}

/* Piece i of a block, as an index: by rows a row, else a column. */
static inline void piece_index(const block *b, ptrdiff_t i, ptrdiff_t index[GSGD_NDIM]) {
    if (!b->by_rows) {
        column_index(b, i, index);
        return;
    }
    for (int d = 0; d < GSGD_NDIM; ++d)
        index[d] = 0;
    index[GSGD_GROUP] = i / b->rows;
    index[GSGD_ROW] = i % b->rows;
}

enum {
    PANEL = 4096, /* columns of one accumulator */
    LANES = 8,    /* columns summed side by side where rows are the fast dimension */
};

#ifdef __GNUC__
#pragma GCC visibility push(hidden)
#endif

/* See the caller's arrays (NULL: none) through every block, as `which` view. */
void gsgd_bind(gsgd_plan *plan, const gsgd_array *arrays, int which);

/* Make the walk over the views at hand, unless it is that of the call before. */
void gsgd_plan_walk(gsgd_plan *plan, int clips);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif

#endif
