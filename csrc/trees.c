/* trees.c - skeleton construction: an in-tree and an out-tree over the units, chosen and checked. */
#include "plan.h"

#include <math.h>
#include <string.h>

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
    ptrdiff_t far_ends = b->dim[s->far].extent, centre = 0;
    for (int d = GSGD_TAP; d < GSGD_NDIM; ++d)
        centre = centre * b->dim[d].extent + b->dim[d].extent / 2;
    int64_t best = -1;
    double best_size = 0;
    for (ptrdiff_t k = 0; k < far_ends; ++k) {
        ptrdiff_t j = s->rule == GSGD_MODULO ? (i + k) % far_ends : k;
        int64_t far_unit = unit_at(b, s->far, group, j);
        if (far_unit != GSGD_PINNED && !s->done[far_unit])
            continue;
        double c = s->scale == NULL || far_unit == GSGD_PINNED ? 1 : s->scale[far_unit];
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
    gsgd_bind(plan, weights, VIEW_W);
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

/* Whether an edge meets the unit whose in-edge or out-edge it is to be; its other end. */
static int meets(const gsgd_plan *plan, const tree_edge *e, int64_t u, int into, int64_t *other_end) {
    const block *b = &plan->block[e->block];
    int64_t row = row_unit(b, e->index), col = col_unit(b, e->index);
    *other_end = into ? col : row;
    return u == (into ? row : col);
}

/* The unit at an end, or GSGD_PINNED where it has no edges. */
static int64_t end_at(const gsgd_plan *plan, int64_t u) {
    return u == GSGD_PINNED || plan->active[u] ? u : GSGD_PINNED;
}

/* Pin what has no edges, order the trees, find chain roots: when the edges and their ends are known. */
static gsgd_status take_trees(gsgd_plan *plan, int64_t *unit) {
    plan->gather_team = plan->apply_team = (team){0};
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        b->gathers = 0;
        for (ptrdiff_t i = 0; i < b->groups * (b->rows + b->cols); ++i)
            if (b->row_unit[i] != GSGD_PINNED && !plan->active[b->row_unit[i]])
                b->row_unit[i] = GSGD_PINNED;
        for (ptrdiff_t i = 0; i < b->groups * b->cols; ++i)
            b->gathers |= b->col_unit[i] != GSGD_PINNED;
        b->seen[VIEW_W].data = NULL;
    }
    ptrdiff_t placed = 0;
    for (int gathers = 1; gathers >= 0; --gathers)
        for (ptrdiff_t k = 0; k < plan->blocks; ++k)
            if (plan->block[k].gathers == gathers)
                plan->order[placed++] = k;
    plan->num_active = 0;
    for (int64_t u = 0; u < plan->units; ++u) {
        if (!plan->active[u])
            continue;
        plan->num_active++;
        tree_edge *in = &plan->in[u], *out = &plan->out[u];
        in->counts = in->block >= 0 && plan->block[in->block].counts;
        out->counts = out->block >= 0 && plan->block[out->block].counts;
        plan->in_unit[u] = end_at(plan, plan->in_unit[u]);
        plan->out_unit[u] = end_at(plan, plan->out_unit[u]);
    }
    uint8_t *placed_units = (uint8_t *)plan->root;
    if ((*unit = sort_tree(plan, plan->in_unit, plan->in_order, placed_units)) >= 0 ||
        (*unit = sort_tree(plan, plan->out_unit, plan->out_order, placed_units)) >= 0)
        return GSGD_BAD_TREE;
    for (ptrdiff_t n = 0; n < plan->num_active; ++n) {
        int64_t v = plan->in_order[n];
        plan->root[v] = plan->in_is_free[v] ? plan->root[plan->in_unit[v]] : v;
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k) {
        block *b = &plan->block[k];
        for (ptrdiff_t j = 0; j < b->groups * b->cols; ++j)
            b->col_root[j] = b->col_unit[j] == GSGD_PINNED ? GSGD_PINNED : plan->root[b->col_unit[j]];
    }
    return GSGD_OK;
}

gsgd_status gsgd_set_trees(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, uint8_t *free_in,
                           int64_t *unit) {
    for (int64_t u = 0; u < plan->units; ++u) {
        *unit = u;
        plan->active[u] = in[u].block >= 0;
        if (!plan->active[u]) {
            if (out[u].block >= 0)
                return GSGD_BAD_TREE;
            continue;
        }
        if (!decode(plan, in[u], &plan->in[u]) || !decode(plan, out[u], &plan->out[u]) ||
            !meets(plan, &plan->in[u], u, 1, &plan->in_unit[u]) ||
            !meets(plan, &plan->out[u], u, 0, &plan->out_unit[u]))
            return GSGD_BAD_TREE;
        plan->in_array[u] = plan->block[in[u].block].array;
    }
    for (int64_t v = 0; v < plan->units; ++v) {
        int64_t u = plan->active[v] ? plan->in_unit[v] : GSGD_PINNED;
        plan->in_is_free[v] =
            u != GSGD_PINNED && plan->active[u] && out[u].block == in[v].block && out[u].entry == in[v].entry;
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k)
        plan->block[k].counts = 1;
    gsgd_status status = take_trees(plan, unit);
    if (status == GSGD_OK && plan->units)
        memcpy(free_in, plan->in_is_free, (size_t)plan->units);
    return status;
}

gsgd_status gsgd_set_shard(gsgd_plan *plan, const gsgd_edge *in, const gsgd_edge *out, const int64_t *source,
                           const int64_t *destination, const int64_t *in_array, const uint8_t *free_in,
                           const uint8_t *counts, int64_t *unit) {
    ptrdiff_t units = plan->units;
    for (int64_t u = 0; u < units; ++u)
        plan->active[u] = in_array[u] >= 0;
    for (int64_t u = 0; u < units; ++u) {
        int64_t from = source[u], to = destination[u], found;
        tree_edge *e_in = &plan->in[u], *e_out = &plan->out[u];
        *unit = u;
        e_in->block = e_out->block = -1;
        if (!plan->active[u]) {
            if (in[u].block >= 0 || out[u].block >= 0)
                return GSGD_BAD_TREE;
            continue;
        }
        if (in_array[u] >= plan->arrays || from < GSGD_PINNED || from >= units || to < GSGD_PINNED ||
            to >= units || (free_in[u] && end_at(plan, from) == GSGD_PINNED))
            return GSGD_BAD_TREE;
        if (in[u].block >= 0 &&
            (!decode(plan, in[u], e_in) || !meets(plan, e_in, u, 1, &found) ||
             end_at(plan, found) != end_at(plan, from) || plan->block[in[u].block].array != in_array[u]))
            return GSGD_BAD_TREE;
        if (out[u].block >= 0 && (!decode(plan, out[u], e_out) || !meets(plan, e_out, u, 0, &found) ||
                                  end_at(plan, found) != end_at(plan, to)))
            return GSGD_BAD_TREE;
        plan->in_unit[u] = from;
        plan->out_unit[u] = to;
        plan->in_array[u] = in_array[u];
        plan->in_is_free[u] = free_in[u] != 0;
    }
    for (ptrdiff_t k = 0; k < plan->blocks; ++k)
        plan->block[k].counts = counts == NULL || counts[plan->block[k].array];
    return take_trees(plan, unit);
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
            plan->in0[u] = plan->out0[u] = plan->c[u] = 1;
}
