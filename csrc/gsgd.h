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
 * GSGD_ADAM: m <- momentum m + (1 - momentum) d, v <- second v + (1 - second) d^2, e = correct_m m /
 * (sqrt(correct_v v) + eps). GSGD_RMSPROP: v <- second v + (1 - second) d^2, e = d / (sqrt(v) + eps), with m:
 * m <- momentum m + e, e = m. Weight decay is of ordinary paths: d has weight_decay x added, or, decoupled, e
 * has. */
typedef struct {
    gsgd_method method;
    double lr, momentum, weight_decay, second, eps, correct_m, correct_v;
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

/** Skeleton construction (section 4.1). Chooses an in-edge and an out-edge for every unit among the non-zero
 * `weights`: an in-edge from the first block that writes the unit, an out-edge from the last that reads it.
 * GSGD_MODULO: row i takes column i mod columns, column j takes row j mod rows, the centre tap, or the next
 * candidate where that is zero. GSGD_LARGEST: the largest |w| c(v) / c(u), `scale` being c (NULL: 1). A unit
 * that no path of non-zero weights passes gets no edges (block -1): it is pinned by gsgd_set_trees. Writes
 * in[units] and out[units]. */
void gsgd_choose_trees(gsgd_plan *plan, const gsgd_array *weights, gsgd_rule rule, const double *scale,
                       gsgd_edge *in, gsgd_edge *out);

/** Take these in-edges and out-edges, checked: GSGD_BAD_TREE with *unit telling where. Pins units without
 * edges. Writes free_in[units]: whether the in-edge is some unit's out-edge. */
gsgd_status gsgd_set_trees(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, uint8_t *free_in,
                           int64_t *unit);

/** After gsgd_set_trees (which gsgd_choose_trees undoes), set the reference scale: the weights of in-edges
 * and out-edges and the number c per unit, relative to which path values are measured (all non-zero). Arrays
 * of `units` entries. */
void gsgd_set_reference(gsgd_plan *plan, const double *in, const double *out, const double *c);

/** The balanced scale (METHOD.md, section 4): the c per unit that carries `weights` to the rescaling of least
 * sum of squares. Units that no path of non-zero weights passes must be pinned; c is 1 for those that
 * gsgd_set_trees has pinned. Writes c[units]; *left is 0, or by how much log c still moved when it gave up.
 * Allocates memory of the order of units and pairs of layers, and frees it. */
gsgd_status gsgd_balance(gsgd_plan *plan, const gsgd_array *weights, double *c, double *left);

/** One step: gather, solve, apply. `weights` and the moments `m` and `v` are updated in place; data NULL:
 * there is no such moment. `sums` are the gradients that the inverse chain rule of in-edges reads:
 * `gradients` but for approximations of batch normalization. Data NULL in `gradients` and `sums`: the array's
 * own terms are left out; its paths keep their values, and its moments theirs. Where the norm of dl / dx over
 * all arrays exceeds clip_norm, dl / dx is multiplied by clip_norm / (norm + 1e-6). Writes the number of
 * ratios that were limited; a limited ratio keeps its sign, and 0 counts as positive. GSGD_NOT_FINITE leaves
 * everything as it was, with *unit telling where, or -1 for a gradient. */
gsgd_status gsgd_step(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                      const gsgd_array *sums, const gsgd_array *m, const gsgd_array *v,
                      const gsgd_options *options, ptrdiff_t *clamped, int64_t *unit);

/** The value of the basis path that each weight owns, in(u) + e + out(v); NaN where the weight is free.
 * `values` are float64 arrays; `logs`, if not NULL, receive log |value| while `values` receive the sign. */
void gsgd_path_values(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *values,
                      const gsgd_array *logs);

/** The inverse chain rule (section 4.2): dl/dv per weight, float64, NaN where it is free. `sums` as in
 * gsgd_step, `norm` as in gsgd_options. GSGD_NOT_FINITE when a sum is not finite: nothing is written. */
gsgd_status gsgd_path_gradients(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *gradients,
                                const gsgd_array *sums, const double *norm, const gsgd_array *out);

/** Weight allocation (section 4.3): the weights, in the weights' own type, whose basis paths are `ratios`
 * (float64) times those of `weights`. Ratios of free weights are not read. */
void gsgd_allocate(gsgd_plan *plan, const gsgd_array *weights, const gsgd_array *ratios,
                   const gsgd_array *out);

#endif
