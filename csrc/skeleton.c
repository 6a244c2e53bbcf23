/* skeleton.c - plans, and skeleton construction: an in-tree and an out-tree over the units, chosen and
 * checked. */
#include "plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void gsgd_destroy(gsgd_plan *plan) {
    if (plan == NULL)
        return;
    for (ptrdiff_t k = 0; plan->block != NULL && k < plan->blocks; ++k) {
        free(plan->block[k].row_unit);
        free(plan->block[k].column_sum);
        free(plan->block[k].place);
    }
    free(plan->block);
    free(plan->order);
    free(plan->in);
    free(plan->in_unit);
    free(plan->active);
    free(plan->memory);
    free(plan);
}

/* Copy a description. */
static gsgd_status take_block(block *to, const gsgd_block *from, ptrdiff_t units, ptrdiff_t arrays,
                              const gsgd_type *types) {
    if (from->array < 0 || from->array >= arrays)
        return GSGD_BAD_BLOCK;
    memcpy(to->dim, from->dim, sizeof to->dim);
    to->array = from->array;
    to->type = types[from->array];
    to->start_axis = from->start_axis;
    to->start = from->start;
    to->groups = from->dim[GSGD_GROUP].extent;
    to->rows = from->dim[GSGD_ROW].extent;
    to->cols = from->dim[GSGD_COL].extent;
    to->taps = 1;
    for (int d = GSGD_TAP; d < GSGD_NDIM; ++d)
        to->taps *= from->dim[d].extent;

    ptrdiff_t num_rows = to->groups * to->rows, num_cols = to->groups * to->cols;
    for (ptrdiff_t j = 0; j < num_cols; ++j)
        to->gathers |= from->col_unit[j] != GSGD_PINNED;
    ptrdiff_t line = to->gathers ? num_cols * to->taps : 0;
    ptrdiff_t places = to->taps > 1 ? to->cols * to->taps : 0;
    to->row_unit = malloc((size_t)(num_rows + 2 * num_cols + 1) * sizeof(int64_t));
    to->column_sum = malloc((size_t)(4 * line + 2 * num_rows + num_cols * to->taps + 1) * sizeof(double));
    to->place = calloc((size_t)(2 * places + 1), sizeof(ptrdiff_t));
    if (to->row_unit == NULL || to->column_sum == NULL || to->place == NULL)
        return GSGD_NO_MEMORY;
    to->unplace = to->place + places;
    to->col_unit = to->row_unit + num_rows;
    to->col_root = to->col_unit + num_cols;
    to->line = to->column_sum + line;
    to->row_b = to->column_sum + 4 * line;
    to->row_inv_b = to->column_sum + 4 * line + num_rows;
    to->column_square = to->column_sum + 4 * line + 2 * num_rows;
    if (num_rows)
        memcpy(to->row_unit, from->row_unit, (size_t)num_rows * sizeof(int64_t));
    if (num_cols)
        memcpy(to->col_unit, from->col_unit, (size_t)num_cols * sizeof(int64_t));
    for (ptrdiff_t i = 0; i < num_rows + num_cols; ++i)
        if (to->row_unit[i] < GSGD_PINNED || to->row_unit[i] >= units)
            return GSGD_BAD_BLOCK;
    return GSGD_OK;
}

enum { UNIT_ARRAYS = 18 }; /* of double */

gsgd_status gsgd_create(gsgd_plan **out, ptrdiff_t units, ptrdiff_t arrays, const gsgd_type *types,
                        ptrdiff_t blocks, const gsgd_block *source) {
    *out = NULL;
    gsgd_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL)
        return GSGD_NO_MEMORY;
    size_t n = (size_t)units + 1;
    plan->units = units;
    plan->blocks = blocks;
    plan->block = calloc((size_t)blocks + 1, sizeof *plan->block);
    plan->order = calloc((size_t)blocks + 1, sizeof *plan->order);
    plan->in = calloc(2 * n, sizeof *plan->in);
    plan->in_unit = calloc(5 * n, sizeof *plan->in_unit);
    plan->active = calloc(2 * n, 1);
    plan->memory = calloc(UNIT_ARRAYS * n, sizeof *plan->memory);
    if (!plan->block || !plan->order || !plan->in || !plan->in_unit || !plan->active || !plan->memory) {
        gsgd_destroy(plan);
        return GSGD_NO_MEMORY;
    }
    plan->out = plan->in + n;
    plan->out_unit = plan->in_unit + n;
    plan->root = plan->in_unit + 2 * n;
    plan->in_order = plan->in_unit + 3 * n;
    plan->out_order = plan->in_unit + 4 * n;
    plan->in_is_free = plan->active + n;
    double **array[] = {&plan->in0,   &plan->out0, &plan->c,     &plan->in_w,    &plan->out_w, &plan->to_a,
                        &plan->to_b,  &plan->a,    &plan->b,     &plan->inv_a,   &plan->inv_b, &plan->x,
                        &plan->inv_x, &plan->sum,  &plan->ratio, &plan->inv_rho, &plan->new_m, &plan->new_v};
    for (size_t i = 0; i < UNIT_ARRAYS; ++i)
        *array[i] = plan->memory + i * n + 1;
    plan->to_a[-1] = plan->to_b[-1] = plan->a[-1] = plan->b[-1] = plan->inv_a[-1] = plan->inv_b[-1] =
        plan->inv_rho[-1] = 1;

    for (ptrdiff_t k = 0; k < blocks; ++k) {
        gsgd_status status = take_block(&plan->block[k], &source[k], units, arrays, types);
        if (status != GSGD_OK) {
            gsgd_destroy(plan);
            return status;
        }
    }
    *out = plan;
    return GSGD_OK;
}

void gsgd_bind(gsgd_plan *plan, const gsgd_array *arrays, size_t which) {
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        view *v = (view *)((char *)b + which);
        v->data = NULL;
        if (arrays == NULL || arrays[b->array].data == NULL)
            continue;
        const gsgd_array *x = &arrays[b->array];
        for (int d = 0; d < GSGD_NDIM; ++d)
            v->stride[d] = b->dim[d].step ? b->dim[d].step * x->strides[b->dim[d].axis] : 0;
        ptrdiff_t first = b->start ? b->start * x->strides[b->start_axis] : 0;
        size_t size = b->type == GSGD_FLOAT32 ? sizeof(float) : sizeof(double);
        v->data = (char *)x->data + first * (ptrdiff_t)size;
    }
}

/* Choosing. A unit is `done` when following the edges chosen so far from it ends at a pinned end. Both trees
 * are chosen by the same code: `near` is the dimension of the unit that seeks an edge, `far` that of the
 * other end. */
typedef struct {
    gsgd_plan *plan;
    gsgd_rule rule;
    const double *scale;
    uint8_t *done;
    gsgd_edge *edge;
    int near, far;
} chooser;

static int64_t unit_at(const block *b, int dim, ptrdiff_t group, ptrdiff_t i) {
    return dim == GSGD_ROW ? b->row_unit[group * b->rows + i] : b->col_unit[group * b->cols + i];
}

/* The edge that `near` entry i of a group takes; -1: there is none. */
static int64_t candidate(const chooser *s, const block *b, ptrdiff_t group, ptrdiff_t i) {
    ptrdiff_t others = b->dim[s->far].extent, centre = 0;
    for (int d = GSGD_TAP; d < GSGD_NDIM; ++d)
        centre = centre * b->dim[d].extent + b->dim[d].extent / 2;
    int64_t best = -1;
    double best_size = 0;
    for (ptrdiff_t k = 0; k < others; ++k) {
        ptrdiff_t j = s->rule == GSGD_MODULO ? (i + k) % others : k;
        int64_t other = unit_at(b, s->far, group, j);
        if (other != GSGD_PINNED && !s->done[other])
            continue;
        double c = s->scale == NULL || other == GSGD_PINNED ? 1 : s->scale[other];
        for (ptrdiff_t n = 0; n < b->taps; ++n) {
            ptrdiff_t tap = n == 0 ? centre : n <= centre ? n - 1 : n, rest = tap;
            ptrdiff_t index[GSGD_NDIM] = {group};
            index[s->near] = i;
            index[s->far] = j;
            for (int d = GSGD_NDIM; d-- > GSGD_TAP; rest /= b->dim[d].extent)
                index[d] = rest % b->dim[d].extent;
            double size = fabs(load(b->type, &b->w, index)) * (s->far == GSGD_COL ? 1 / c : c);
            if (size > best_size) {
                best_size = size;
                best = ((group * b->rows + index[GSGD_ROW]) * b->cols + index[GSGD_COL]) * b->taps + tap;
                if (s->rule == GSGD_MODULO)
                    return best;
            }
        }
    }
    return best;
}

/* One pass over a block; whether any unit was done. */
static int choose_in_block(chooser *s, ptrdiff_t k) {
    const block *b = &s->plan->block[k];
    int found = 0;
    for (ptrdiff_t group = 0; group < b->groups; ++group)
        for (ptrdiff_t i = 0; i < b->dim[s->near].extent; ++i) {
            int64_t unit = unit_at(b, s->near, group, i);
            if (unit == GSGD_PINNED || s->done[unit])
                continue;
            int64_t entry = candidate(s, b, group, i);
            if (entry < 0)
                continue;
            s->edge[unit] = (gsgd_edge){k, entry};
            s->done[unit] = 1;
            found = 1;
        }
    return found;
}

/* Mark the units that have a non-zero edge on their `near` side. */
static void mark_alive(const chooser *s, uint8_t *alive) {
    memset(alive, 0, (size_t)s->plan->units);
    for (ptrdiff_t k = 0; k < s->plan->blocks; ++k) {
        const block *b = &s->plan->block[k];
        ptrdiff_t index[GSGD_NDIM] = {0};
        if (b->groups * b->rows * b->cols * b->taps == 0)
            continue;
        do {
            int64_t unit = s->near == GSGD_ROW ? row_unit(b, index) : col_unit(b, index);
            if (unit != GSGD_PINNED && !alive[unit] && load(b->type, &b->w, index) != 0)
                alive[unit] = 1;
        } while (advance(b, index));
    }
}

/* Pin the units that no non-zero edge reaches, or else the first of a cycle; 0 when every unit is done. */
static int pin_stuck(chooser *s, uint8_t *pinned, uint8_t *alive) {
    ptrdiff_t units = s->plan->units, first = 0, count = 0;
    while (first < units && s->done[first])
        ++first;
    if (first == units)
        return 0;
    mark_alive(s, alive);
    for (ptrdiff_t u = first; u < units; ++u)
        if (!s->done[u] && !alive[u]) {
            pinned[u] = s->done[u] = 1;
            ++count;
        }
    if (count == 0)
        pinned[first] = s->done[first] = 1;
    return 1;
}

static void choose_tree(chooser *s, uint8_t *pinned, uint8_t *alive) {
    ptrdiff_t blocks = s->plan->blocks;
    memcpy(s->done, pinned, (size_t)s->plan->units);
    do {
        for (int found = 1; found;) {
            found = 0;
            for (ptrdiff_t n = 0; n < blocks; ++n)
                found |= choose_in_block(s, s->near == GSGD_ROW ? n : blocks - 1 - n);
        }
    } while (pin_stuck(s, pinned, alive));
}

void gsgd_choose_trees(gsgd_plan *plan, const gsgd_array *weights, gsgd_rule rule, const double *scale,
                       gsgd_edge *in, gsgd_edge *out) {
    gsgd_bind(plan, weights, offsetof(block, w));
    uint8_t *pinned = plan->active, *done = plan->in_is_free, *alive = (uint8_t *)plan->root;
    memset(pinned, 0, (size_t)plan->units);
    chooser s = {plan, rule, scale, done, in, GSGD_ROW, GSGD_COL};
    choose_tree(&s, pinned, alive);
    s.edge = out;
    s.near = GSGD_COL;
    s.far = GSGD_ROW;
    choose_tree(&s, pinned, alive);
    for (ptrdiff_t u = 0; u < plan->units; ++u)
        if (pinned[u])
            in[u] = out[u] = (gsgd_edge){-1, 0};
}

/* Checking. */

/* Decode an edge; whether it exists. */
static int decode(const gsgd_plan *plan, gsgd_edge e, tree_edge *to) {
    if (e.block < 0 || e.block >= plan->blocks || e.entry < 0)
        return 0;
    const block *b = &plan->block[e.block];
    int64_t rest = e.entry;
    to->block = e.block;
    for (int d = GSGD_NDIM; d-- > 0; rest /= b->dim[d].extent) {
        if (b->dim[d].extent == 0)
            return 0;
        to->index[d] = rest % b->dim[d].extent;
    }
    return rest == 0;
}

/* Order the active units so that next[u] precedes u; a unit whose way does not end, or -1. */
static int64_t sort_tree(const gsgd_plan *plan, const int64_t *next, int64_t *order, uint8_t *placed) {
    ptrdiff_t n = 0;
    memset(placed, 0, (size_t)plan->units);
    for (int64_t u = 0; u < plan->units; ++u) {
        ptrdiff_t depth = 0;
        if (!plan->active[u])
            continue;
        for (int64_t v = u; v != GSGD_PINNED && !placed[v]; v = next[v])
            if (++depth > plan->num_active)
                return u;
        n += depth;
        for (int64_t v = u, i = n; depth > 0; v = next[v], --depth) {
            placed[v] = 1;
            order[--i] = v;
        }
    }
    return -1;
}

gsgd_status gsgd_set_trees(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, uint8_t *free_in,
                           int64_t *unit) {
    plan->num_active = 0;
    plan->alone = plan->credit = plan->unmeasured = 0;
    for (int64_t u = 0; u < plan->units; ++u) {
        *unit = u;
        plan->active[u] = in[u].block >= 0;
        if (!plan->active[u]) {
            if (out[u].block >= 0)
                return GSGD_BAD_TREE;
            continue;
        }
        plan->num_active++;
        if (!decode(plan, in[u], &plan->in[u]) || !decode(plan, out[u], &plan->out[u]))
            return GSGD_BAD_TREE;
        const block *b_in = &plan->block[in[u].block], *b_out = &plan->block[out[u].block];
        if (row_unit(b_in, plan->in[u].index) != u || col_unit(b_out, plan->out[u].index) != u)
            return GSGD_BAD_TREE;
        plan->in_unit[u] = col_unit(b_in, plan->in[u].index);
        plan->out_unit[u] = row_unit(b_out, plan->out[u].index);
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        b->gathers = 0;
        for (ptrdiff_t i = 0; i < b->groups * (b->rows + b->cols); ++i)
            if (b->row_unit[i] != GSGD_PINNED && !plan->active[b->row_unit[i]])
                b->row_unit[i] = GSGD_PINNED;
        for (ptrdiff_t i = 0; i < b->groups * b->cols; ++i)
            b->gathers |= b->col_unit[i] != GSGD_PINNED;
        size_t line = (size_t)(b->groups * b->cols * b->taps);
        b->line_a = b->line;
        b->line_inv_a = (double *)b->line + line;
        b->line_inv_rho = (double *)b->line + 2 * line;
        b->seen[0].data = NULL;
    }
    ptrdiff_t placed = 0;
    for (int gathers = 1; gathers >= 0; --gathers)
        for (ptrdiff_t k = 0; k < plan->blocks; ++k)
            if (plan->block[k].gathers == gathers)
                plan->order[placed++] = k;
    for (int64_t u = 0; u < plan->units; ++u) {
        if (!plan->active[u])
            continue;
        plan->in_unit[u] = col_unit(&plan->block[plan->in[u].block], plan->in[u].index);
        plan->out_unit[u] = row_unit(&plan->block[plan->out[u].block], plan->out[u].index);
    }
    if ((*unit = sort_tree(plan, plan->in_unit, plan->in_order, plan->in_is_free)) >= 0)
        return GSGD_BAD_TREE;
    if ((*unit = sort_tree(plan, plan->out_unit, plan->out_order, plan->in_is_free)) >= 0)
        return GSGD_BAD_TREE;
    memset(plan->in_is_free, 0, (size_t)plan->units);
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n], u = plan->in_unit[v];
        plan->in_is_free[v] = u != GSGD_PINNED && out[u].block == in[v].block && out[u].entry == in[v].entry;
        plan->root[v] = plan->in_is_free[v] ? plan->root[u] : v;
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        for (ptrdiff_t j = 0; j < b->groups * b->cols; ++j)
            b->col_root[j] = b->col_unit[j] == GSGD_PINNED ? GSGD_PINNED : plan->root[b->col_unit[j]];
    }
    memcpy(free_in, plan->in_is_free, (size_t)plan->units);
    return GSGD_OK;
}

void gsgd_set_reference(gsgd_plan *plan, const double *in, const double *out, const double *c) {
    size_t size = (size_t)plan->units * sizeof(double);
    if (size == 0)
        return;
    memcpy(plan->in0, in, size);
    memcpy(plan->out0, out, size);
    memcpy(plan->c, c, size);
    for (ptrdiff_t u = 0; u < plan->units; ++u)
        if (!plan->active[u])
            plan->in0[u] = plan->out0[u] = plan->c[u] = plan->in_w[u] = plan->out_w[u] = 1;
}
