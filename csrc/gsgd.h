/* gsgd.h - the C interface of gsgd, and its manual.
 *
 * A plan describes a network's edges once; every call then works on the caller's buffers. Nothing here knows
 * Python. Strides and extents are counted in elements and are ptrdiff_t. A plan owns copies of all that it is
 * given and all scratch memory: only gsgd_create allocates, and gsgd_balance while it runs. A plan serves one
 * call at a time.
 *
 * Terms (unit, block, in-edge, out-edge, free, chain root) and formulas are those of METHOD.md:
 * Meng et al., "G-SGD", ICLR 2019, in the form for any feed-forward network.
 */
#ifndef GSGD_H
#define GSGD_H

#include <stddef.h>
#include <stdint.h>

/** Dimensions of a block: groups, rows (destinations), columns (sources), and three of taps. */
enum { GSGD_GROUP, GSGD_ROW, GSGD_COL, GSGD_TAP, GSGD_NDIM = 6 };

/** The id of what is never rescaled, in the place of a unit. */
enum { GSGD_PINNED = -1 };

typedef enum { GSGD_FLOAT32, GSGD_FLOAT64 } gsgd_type;

typedef enum {
    GSGD_OK = 0,
    GSGD_NO_MEMORY,
    GSGD_BAD_BLOCK,  /* a block refers to an array or a unit that does not exist */
    GSGD_BAD_TREE,   /* an edge does not meet its unit, or following edges never ends */
    GSGD_NOT_FINITE, /* a gradient, a path value or a path ratio is not finite */
} gsgd_status;

/** `extent` entries, `step` apart along `axis` of the array. */
typedef struct {
    ptrdiff_t extent, step;
    int axis;
} gsgd_dim;

/** A (part of a) weight array as edges: entry (g, r, c, t0, t1, t2) leads from unit col_unit[g * cols + c] to
 * unit row_unit[g * rows + r]. The first entry lies at index `start` of `start_axis`. */
typedef struct {
    ptrdiff_t array;
    gsgd_dim dim[GSGD_NDIM];
    int start_axis;
    ptrdiff_t start;
    const int64_t *row_unit; /* (groups * rows) */
    const int64_t *col_unit; /* (groups * cols) */
} gsgd_block;

/** A caller's buffer; `strides` has one entry per axis of the array. */
typedef struct {
    void *data;
    const ptrdiff_t *strides;
} gsgd_array;

/** One weight: an entry of a block, counted in C order over its six extents. block < 0: none. */
typedef struct {
    int64_t block, entry;
} gsgd_edge;

typedef enum { GSGD_MODULO, GSGD_LARGEST } gsgd_rule;

typedef enum { GSGD_SGD, GSGD_ADAM, GSGD_RMSPROP } gsgd_method;

/** The hyperparameters of one array. With d = dl / dx, moments m and v, each coordinate moves by lr e:
 * GSGD_SGD: m <- momentum m + d, e = m, or d + momentum m with nesterov; without m, e = d.
 * GSGD_ADAM: m <- momentum m + (1 - momentum) d, v <- beta2 v + (1 - beta2) d^2, e = correct_m m /
 * (sqrt(correct_v v) + eps). GSGD_RMSPROP: v <- beta2 v + (1 - beta2) d^2, e = d / (sqrt(v) + eps), with m:
 * m <- momentum m + e, e = m. Weight decay is of ordinary paths: d has weight_decay x added, or, decoupled, e
 * has. */
typedef struct {
    gsgd_method method;
    double lr, momentum, weight_decay, beta2, eps, correct_m, correct_v;
    int nesterov, decoupled;
} gsgd_rates;

typedef struct {
    const gsgd_rates *rates; /* one per array */
    double max_ratio;   /* r: the magnitude of a path ratio is limited to [1 / r, r]; INFINITY: it is not */
    double clip_norm;   /* the largest norm of dl / dx over all coordinates; INFINITY: any */
    const double *norm; /* one per unit: dl / dx of its chain is divided by this; NULL: by 1 */
    int threads;        /* at most; one where the network is small or more have not paid */
} gsgd_options;

typedef struct gsgd_plan gsgd_plan;

/** Plan a network of `units` units whose weights lie in `arrays` arrays of the given `types`. Blocks are in
 * the order in which the network computes; no entry may belong to two of them. GSGD_NO_MEMORY or
 * GSGD_BAD_BLOCK leave *plan NULL; otherwise it is to be given to gsgd_destroy. */
gsgd_status gsgd_create(gsgd_plan **plan, ptrdiff_t units, ptrdiff_t arrays, const gsgd_type *types,
                        ptrdiff_t blocks, const gsgd_block *block);

void gsgd_destroy(gsgd_plan *plan);

/** Skeleton construction (the paper's section 4.1). Chooses an in-edge and an out-edge for every unit among
 * the non-zero `weights`: an in-edge from the first block that writes the unit, an out-edge from the last
 * that reads it. GSGD_MODULO: row i takes column i mod columns, column j takes row j mod rows, the centre
 * tap, or the next candidate where that is zero. GSGD_LARGEST: the largest |w| c(v) / c(u), `scale` being c
 * (NULL: 1). A unit that no path of non-zero weights passes gets no edges (block -1): it is pinned by
 * gsgd_set_trees. Writes in[units] and out[units]. */
void gsgd_choose_trees(gsgd_plan *plan, const gsgd_array *weights, gsgd_rule rule, const double *scale,
                       gsgd_edge *in, gsgd_edge *out);

/** Take these in-edges and out-edges, checked: GSGD_BAD_TREE with *unit telling where. Pins units without
 * edges. Writes free_in[units]: whether the in-edge is some unit's out-edge. */
gsgd_status gsgd_set_trees(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, uint8_t *free_in,
                           int64_t *unit);

/** The same for a plan that holds a shard: its blocks are the part of the network's weights that lies here,
 * with the network's units. Per unit: its edges, where they lie here (block < 0: elsewhere); the units at the
 * other ends, that of the in-edge (`source`) and that of the out-edge (`destination`); the array of the
 * in-edge, < 0 for a unit without edges; whether the in-edge is free. All shards are given the same but for
 * `in` and `out`. `counts`, one per array, or NULL for all: whether gsgd_gather counts the array; of several
 * shards that hold the same entries one must. */
gsgd_status gsgd_set_shard(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, const int64_t *source,
                           const int64_t *destination, const int64_t *in_array, const uint8_t *free_in,
                           const uint8_t *counts, int64_t *unit);

/** After gsgd_set_trees or gsgd_set_shard (which gsgd_choose_trees undoes), set the reference scale: the
 * weights of in-edges and out-edges and the number c per unit, relative to which path values are measured
 * (all non-zero). Arrays of `units` entries. */
void gsgd_set_reference(gsgd_plan *plan, const double *in, const double *out, const double *c);

/** The balanced scale (METHOD.md, section 4): the c per unit that carries `weights` to the rescaling of least
 * sum of squares. Units that no path of non-zero weights passes must be pinned; c is 1 for those that
 * gsgd_set_trees has pinned. Writes c[units]; *left is 0, or by how much log c still moved when it gave up.
 * Allocates memory of the order of units and pairs of layers, and frees it. */
gsgd_status gsgd_balance(gsgd_plan *plan, const gsgd_array *weights, double *c, double *left);

/** One step in place: gsgd_gather, gsgd_solve, gsgd_apply, whose arguments these are. GSGD_NOT_FINITE leaves
 * everything as it was. */
gsgd_status gsgd_step(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                      const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                      const gsgd_options *options, ptrdiff_t *clamped, int64_t *unit);

/** What gsgd_gather finds: (GSGD_GATHERED, 1 + units) numbers, of which entry 0 of each row stands for pinned
 * ends. Of units without edges all are 0. */
enum {
    GSGD_IN_WEIGHT,   /* the weight of the in-edge */
    GSGD_OUT_WEIGHT,  /* the weight of the out-edge */
    GSGD_SUM,         /* S, at chain roots; entry 0 is not finite where a gradient is not */
    GSGD_IN_GRADIENT, /* the gradient of the in-edge; entry 0: with clip_norm, the sum of squares of dl / dx
                         over ordinary edges */
    GSGD_IN_M, /* the moments of the in-edge; a method without moments may leave these rows out of sums */
    GSGD_IN_V,
    GSGD_GATHERED
};

/** What gsgd_solve finds: (GSGD_SOLVED, 1 + units) numbers. The first two rows are those of gsgd_gather with
 * the weights after the step; entry 0 of the first is what clip_norm multiplies dl / dx by. */
enum {
    GSGD_A = GSGD_OUT_WEIGHT + 1, /* A(v) and B(v) of METHOD.md, section 4; 1 at pinned ends */
    GSGD_B,
    GSGD_INV_A, /* 1 / A(v) */
    GSGD_INV_B,
    GSGD_INV_RHO, /* 1 / rho(v) */
    GSGD_NEW_M,   /* the moments of the in-edge after the step */
    GSGD_NEW_V,
    GSGD_SOLVED
};

/** Gather (METHOD.md, section 2): one pass that reads weights and gradients. `sums` are the gradients that
 * the inverse chain rule of in-edges reads: `gradients` but for approximations of batch normalization.
 * Moments that a method does not have are NULL. Data NULL in both `gradients` and `sums`: the array's own
 * terms are left out; its paths keep their values, and its moments theirs. Of `options` it reads clip_norm
 * and threads. Writes `gathered`.
 *
 * Where a plan holds a shard (gsgd_set_shard), this is its part: every number is the sum of those of all
 * shards. So one all-reduce of `gathered` lets all of them go on. With clip_norm, A and B are needed at once:
 * `trees` are all tree weights, (2, 1 + units), in the first two rows of the `solved` of the step before, or
 * of a gather without clip_norm; where the sum turns out to have others, since something else has written
 * weights, gather again with those. NULL: those that the plan holds. */
void gsgd_gather(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                 const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                 const gsgd_options *options, const double *trees, double *gathered);

/** Solve (METHOD.md, section 3): path ratios, on the trees alone. Which arrays have gradients and a moment m
 * is what the last gsgd_gather has seen. Where the norm of dl / dx over all arrays exceeds clip_norm, dl / dx
 * is multiplied by clip_norm / (norm + 1e-6). Writes `solved`, and the number of ratios that were limited; a
 * limited ratio keeps its sign, and 0 counts as positive. GSGD_NOT_FINITE when something is not finite, with
 * *unit telling where, or -1 for a gradient: there is nothing to apply. */
gsgd_status gsgd_solve(gsgd_plan *plan, const double *gathered, const gsgd_options *options, double *solved,
                       ptrdiff_t *clamped, int64_t *unit);

/** Apply (METHOD.md, section 3): one pass that writes `weights` and moments, those that gsgd_gather was
 * given. Of `options` it reads rates and threads. */
void gsgd_apply(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients, const gsgd_array *m,
                const gsgd_array *v, const gsgd_options *options, const double *solved);

/** The value of the basis path that each weight owns, in(u) + e + out(v); NaN where the weight is free.
 * `values` are float64 arrays; `logs`, if not NULL, receive log |value| while `values` receive the sign. */
void gsgd_path_values(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *values,
                      const gsgd_array *logs);

/** The inverse chain rule (the paper's section 4.2): dl/dv per weight, float64, NaN where it is free. `sums`
 * as in gsgd_gather, `norm` as in gsgd_options. GSGD_NOT_FINITE when a sum is not finite: nothing is written.
 */
gsgd_status gsgd_path_gradients(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                                const gsgd_array *sums, const double *norm, const gsgd_array *out);

/** Weight allocation (the paper's section 4.3): the weights, in the weights' own type, whose basis paths are
 * `ratios` (float64) times those of `weights`. Ratios of free weights are not read. */
void gsgd_allocate(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *ratios,
                   const gsgd_array *out);

#endif
